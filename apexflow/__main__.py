"""`python -m apexflow`, and so `torchrun -m apexflow`: the command line."""

from apexflow.cli import main

main()
