"""Makes and compiles the engines the pipeline runs."""
