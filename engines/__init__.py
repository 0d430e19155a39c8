"""Runs compiled networks: one interface, one backend a file, a manifest beside each model."""
