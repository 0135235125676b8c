"""`python -m grafting` is the `graft` command."""

from grafting.cli import main

main()
