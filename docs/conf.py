"""How Sphinx makes a site of these pages: ``make docs``, in which every warning is an error.

The pages are Markdown as GitHub shows it. Links to files of the repository, such as
``../mpicoll/algorithms/ring.py``, become downloads; those to directories become plain text.
``<!-- help: mpicoll -->`` and the like become what commands say of themselves, so no copy of it grows old.
Nothing in the site is fetched from elsewhere.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

project = "mpicoll"
author = "the authors of mpicoll"
extensions = ["myst_parser", "sphinx.ext.autodoc"]

html_theme = "furo"
html_title = "mpicoll"
html_copy_source = False
html_show_copyright = False

myst_heading_anchors = 3  # as GitHub makes them
default_role = "py:obj"  # a single backtick, in docstrings
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"

# The menu.
PAGES = {
    "": ["tutorial", "install", "coming-from"],
    "Algorithms": ["algorithms", "at-scale", "adding"],
    "Training": ["training", "compression", "torch"],
    "Running": ["slurm", "gpu", "faults", "performance", "tuning", "trace"],
    "Reference": ["commands", "api", "design"],
}
DIRECTORY = re.compile(r"\[([^]]+)\]\(\.\./[\w/-]+\)")  # a link to something whose name has no suffix
HELP = re.compile(r"<!-- help: (mpicoll|every subcommand|train\.py) -->")


def setup(app: Any) -> None:
    """Sphinx calls this."""
    app.connect("source-read", _complete)


def _complete(app: Any, page: str, source: list[str]) -> None:
    """Put into a page what it has in the site only; ``source`` is its text, alone in a list."""
    if page == "index":
        source[0] += "".join(_menu(caption, names) for caption, names in PAGES.items())
    source[0] = DIRECTORY.sub(r"\1", source[0])
    source[0] = HELP.sub(lambda match: _help(match[1]), source[0])


def _menu(caption: str, names: list[str]) -> str:
    options = [":hidden:", *([f":caption: {caption}"] if caption else [])]
    return "\n".join(["", "```{toctree}", *options, "", *names, "```", ""])


def _help(name: str) -> str:
    """What commands say of themselves, as Markdown."""
    if name == "train.py":
        return _said(importlib.import_module("mpicoll.train.options").command, "python train.py", [])
    main = importlib.import_module("mpicoll.cli").main
    if name == "mpicoll":
        return _said(main, name, [])
    return "\n\n".join(f"## {command}\n\n{_said(main, 'mpicoll', [command])}" for command in main.commands)


def _said(command: Any, shown: str, arguments: list[str]) -> str:
    from click.testing import CliRunner

    outcome = CliRunner().invoke(command, [*arguments, "--help"], prog_name=shown)
    call = " ".join([shown, *arguments, "--help"])
    if outcome.exit_code:
        raise RuntimeError(f"{call}: expected status 0, got {outcome.exit_code}: {outcome.exception}")
    return f"~~~~~~ text\n$ {call}\n{outcome.output}~~~~~~"
