"""What is done to a frame, one file each; a file's name is its name in the configuration."""
