"""A schedule as a page to step through: one HTML file that needs no network.

The page is ``page.html`` with the story put in as JSON; its script only shows what the story says. Its
address may say where to begin: ``#round=3&chunk=1`` shows what round 3 does and follows chunk 1.
"""

from __future__ import annotations

import json
from html import escape
from importlib.resources import files
from typing import Any

from mpicoll.draw.story import Held, Story, chunk_name, colours, tell, title
from mpicoll.schedule import COLLECTIVES, Schedule

MOST_RANKS = 32
ELSEWHERE = "mpicoll simulate tells its time at any number of ranks"


def page(schedule: Schedule) -> str:
    """An HTML page of ``schedule``, complete in itself.

    Raises `ValueError` for more than 32 ranks, 64 rounds, or 64 chunks on a rank.
    """
    story = tell(schedule, MOST_RANKS, ELSEWHERE)
    template = files("mpicoll.draw").joinpath("page.html").read_text(encoding="utf-8")
    # `<` cannot occur outside of JSON's strings, and so no name can end the script that it is in.
    data = json.dumps(as_data(story), separators=(",", ":")).replace("<", "\\u003c")
    before, between, after = template.split("$TITLE$")
    return (
        before + escape(title(schedule)) + between + escape(title(schedule)) + after.replace("$STORY$", data)
    )


def as_data(story: Story) -> dict[str, Any]:
    """The story for programs, of numbers, texts, lists and dictionaries.

    ``start`` and each round's ``held`` are lists of ``[rank, chunk, contributions]``: the values that are
    still needed. ``chunks`` are names. ``complete[c]`` is the contributions of the whole chunk c.
    """
    schedule = story.schedule
    return {
        "title": title(schedule),
        "name": schedule.name,
        "collective": schedule.collective,
        "nranks": schedule.nranks,
        "reduces": COLLECTIVES[schedule.collective].reduces,
        "chunks": [chunk_name(schedule, chunk) for chunk in range(schedule.nchunks)],
        "colours": colours(schedule),
        "complete": [sorted(ranks) for ranks in story.complete],
        "start": _listed(story.start),
        "rounds": [
            {
                "messages": [
                    {
                        "src": message.src,
                        "dst": message.dst,
                        "op": "reduce" if message.reduce else "copy",
                        "chunks": list(message.chunks),
                    }
                    for message in step.messages
                ],
                "held": _listed(step.held),
            }
            for step in story.steps
        ],
    }


def _listed(held: Held) -> list[list[Any]]:
    return [[rank, chunk, sorted(contributions)] for (rank, chunk), contributions in held.items()]
