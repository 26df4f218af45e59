"""The page that one steps through, in a real browser: Debian's chromium, without a screen."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpicoll import algorithms, draw
from mpicoll.draw.story import tell, title
from mpicoll.draw.webpage import as_data
from mpicoll.schedule import Schedule

BROWSER = shutil.which("chromium") or ""
OPTIONS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-component-update
--disable-background-networking --disable-sync --virtual-time-budget=30000 --dump-dom""".split()

# What a user does, and what the page then shows. Put into the page: a browser without a screen has no keys.
WALK = """<script>
const press = (key) => document.dispatchEvent(new KeyboardEvent("keydown", { key }));
const click = (id) => document.getElementById(id).click();
const all = (selector, read) => [...document.querySelectorAll(selector)].map(read);
const see = () => ({
  now: document.getElementById("now").textContent,
  hash: location.hash,
  followed: document.getElementById("followed").textContent,
  chunk: document.getElementById("chunk").value,
  messages: all(".message", (m) => [Number(m.dataset.src), Number(m.dataset.dst), m.matches(".reduce")]),
  labels: all(".message text", (t) => t.textContent),
  listed: all("#messages li", (item) => item.textContent),
  held: all(".cell", (cell) => [Number(cell.parentNode.dataset.rank), Number(cell.dataset.chunk),
                                cell.dataset.held.split(",").map(Number)]),
  lit: all(".cell:not(.faint)", (cell) => Number(cell.dataset.chunk)),
  fresh: all(".cell.new", (cell) => [Number(cell.parentNode.dataset.rank), Number(cell.dataset.chunk)]),
});
const seen = { first: see(), heading: document.querySelector("h1").textContent, steps: [] };
press("Home");
press("ArrowUp"); press("ArrowUp"); seen.wrapped = see();
press("ArrowDown"); press("ArrowDown"); press("ArrowUp");
for (let k = 0; k < steps.length; k += 1) { seen.steps.push(see()); press("ArrowRight"); }
seen.beyond = see();
click("previous"); press("ArrowLeft"); click("next"); seen.back = see();
document.querySelector(".cell[data-chunk='2']").dispatchEvent(new MouseEvent("click")); seen.clicked = see();
document.getElementById("slider").value = 1;
document.getElementById("slider").dispatchEvent(new Event("input")); seen.slid = see();
location.hash = "#round=99&chunk=x";
setTimeout(() => { seen.nonsense = see(); click("play"); seen.playing = see(); }, 100);
setTimeout(() => {
  seen.played = see();
  document.body.replaceChildren(document.createElement("pre"));
  document.querySelector("pre").textContent = JSON.stringify(seen);
}, 20000);
</script></body>"""


def walked(page: str, tmp_path: Path, address: str = "") -> dict[str, Any]:
    """What `WALK` sees on ``page``, opened at ``address``."""
    file = tmp_path / "page.html"
    file.write_text(page.replace("</body>", WALK), encoding="utf-8")
    command = [BROWSER, *OPTIONS, f"--user-data-dir={tmp_path / 'user'}", f"{file.as_uri()}{address}"]
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    found = re.search(r"<pre>(.*)</pre>", dumped, re.DOTALL)
    assert found, dumped[-2000:]
    seen: dict[str, Any] = json.loads(html.unescape(found[1]))
    return seen


@pytest.mark.skipif(not BROWSER, reason="chromium is not installed")
def test_one_steps_through_the_rounds_in_a_browser(tmp_path: Path) -> None:
    schedule = algorithms.schedule("allreduce", "ring", 3)
    name = "</script><b>\"&'$STORY$"
    story = as_data(tell(schedule, 3, ""))
    seen = walked(draw.page(replace(schedule, name=name)), tmp_path, "#round=1&chunk=0")
    assert seen["heading"] == f"{name} allreduce: 3 ranks, 4 rounds, 3 chunks"

    first = seen["first"]
    assert (first["now"], first["chunk"], set(first["lit"])) == ("Round 1 (of 0 to 3)", "0", {0})
    assert first["followed"] == "Chunk 0 is on rank 0 (complete)."
    assert first["labels"] == ["+0"]
    assert first["listed"][2] == "2 → 0: chunk 0 added"

    # Up from chunk 0 is none, then the last one.
    assert (seen["wrapped"]["chunk"], seen["wrapped"]["now"]) == ("2", "Start")
    assert [step["held"] for step in seen["steps"]] == [
        story["start"],
        *(round_["held"] for round_ in story["rounds"]),
    ]
    assert [step["messages"] for step in seen["steps"][1:]] == [
        [[m["src"], m["dst"], m["op"] == "reduce"] for m in round_["messages"]] for round_ in story["rounds"]
    ]
    assert [step["hash"] for step in seen["steps"]] == ["", *(f"#round={k}" for k in range(4))]
    assert seen["steps"][0]["messages"] == []
    assert seen["steps"][1]["fresh"] == [[0, 1], [1, 2], [2, 0]]
    assert seen["steps"][2]["labels"] == ["+1", "+2", "+0"]
    assert seen["beyond"] == seen["steps"][4]
    assert seen["back"] == seen["steps"][3]
    assert (seen["clicked"]["followed"], set(seen["clicked"]["lit"])) == (
        "Chunk 2 is on rank 0 (complete), rank 2 (complete).",
        {2},
    )
    assert (seen["slid"]["now"], seen["slid"]["hash"]) == ("Round 0 (of 0 to 3)", "#round=0&chunk=2")
    assert seen["slid"]["followed"] == "Chunk 2 is on rank 1 (parts of 0-1), rank 2 (parts of 2)."
    assert (seen["nonsense"]["now"], seen["nonsense"]["chunk"]) == ("Start", "")
    assert (seen["playing"]["now"], seen["played"]["now"]) == ("Start", "Round 3 (of 0 to 3)")


def data(page: str) -> dict[str, Any]:
    """The story in a page."""
    found = re.search(r'<script type="application/json" id="story">(.*?)</script>', page, re.DOTALL)
    assert found
    told: dict[str, Any] = json.loads(found[1])
    return told


@pytest.mark.parametrize("collective", algorithms.ALGORITHMS)
def test_every_algorithm_has_a_page(collective: str) -> None:
    for name in algorithms.names(collective):
        for nranks in (1, 2, 3, 5):
            schedule = algorithms.schedule(collective, name, nranks)
            told = data(draw.page(schedule))
            assert told["title"] == title(schedule)
            assert transfers(told) == transfers_of(schedule)


def transfers(told: dict[str, Any]) -> list[tuple[int, int, int, int, str]]:
    return sorted(
        (k, message["src"], message["dst"], chunk, message["op"])
        for k, round_ in enumerate(told["rounds"])
        for message in round_["messages"]
        for chunk in message["chunks"]
    )


def transfers_of(schedule: Schedule) -> list[tuple[int, int, int, int, str]]:
    return sorted((k, *transfer) for k, round_ in enumerate(schedule.rounds) for transfer in round_)


def test_a_page_loads_nothing_and_escapes_names() -> None:
    schedule = replace(algorithms.schedule("allreduce", "ring", 2), name="</script><b>")
    page = draw.page(schedule)
    assert not re.search(r"\b(src|href)=|@import|url\(|\bfetch\(|XMLHttpRequest", page)
    assert re.findall(r"https?://[^\"]*", page) == ["http://www.w3.org/2000/svg"]
    assert "<b>" not in page
    assert "<title>&lt;/script&gt;&lt;b&gt; allreduce: 2 ranks, 2 rounds, 2 chunks</title>" in page
