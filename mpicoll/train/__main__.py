"""``python -m mpicoll.train``."""

from mpicoll.train.cli import main

main()
