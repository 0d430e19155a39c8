"""The command `trainer`, and `python -m trainer`, as `torchrun -m trainer` starts it."""

from pipeline.entry import begin


def main() -> None:
    """Run the command."""
    begin("trainer.cli")


if __name__ == "__main__":
    main()
