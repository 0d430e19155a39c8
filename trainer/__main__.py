"""`python -m trainer`: the `trainer` command, as `torchrun -m trainer` starts it."""

from trainer.cli import main

main()
