"""The zarr layouts: CSIST datasets and recordings, written in chunks and read strictly."""
