"""Where frames come from, one file each; a file's name is its name in the configuration."""
