"""`python -m laprox` is the `laprox` command."""

from laprox.cli import main

main()
