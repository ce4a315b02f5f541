"""`python -m parrot_edge` is `parrot`."""

from parrot_edge.cli import main

main()
