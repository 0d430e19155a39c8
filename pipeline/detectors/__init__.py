"""How point sources are made to stand out, one file each; see pipeline/detector.py."""
