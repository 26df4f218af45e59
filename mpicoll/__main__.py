"""``python -m mpicoll``: the ``mpicoll`` command."""

from mpicoll.cli import main

if __name__ == "__main__":
    main()
