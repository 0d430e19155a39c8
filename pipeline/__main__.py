"""`python -m pipeline`: the same as the command `pipeline`."""

from pipeline.cli import main

if __name__ == "__main__":  # nodes import this too, as they are spawned
    main()
