"""`python -m tools` is `diti`."""

from tools.cli import main

main()
