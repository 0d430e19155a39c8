"""The command `pipeline`, and `python -m pipeline`."""

from pipeline.entry import begin


def main() -> None:
    """Run the command."""
    begin("pipeline.cli")


if __name__ == "__main__":  # nodes import this too, as they are spawned
    main()
