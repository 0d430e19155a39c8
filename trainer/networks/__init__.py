"""Unmixing networks, one file each; a file's name is the network's name on the command line."""
