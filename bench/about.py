"""What every report says of how, when and on what it was measured. Needs no MPI."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from mpicoll.info import cpu_model
from mpicoll.launch import usable_cpus

OUTPUTS = ("as_json", "json", "out", "plot")  # flags that change nothing of what is measured


def about(command: Sequence[str], flags: Mapping[str, Any]) -> dict[str, Any]:
    """For JSON; ``command`` is what a user types."""
    return {
        "command": shlex.join(command),
        "date": date.today().isoformat(),
        "machine": {"cpu": f"{os.cpu_count()} × {cpu_model()}", "cores": usable_cpus()},
        "flags": {name: value for name, value in flags.items() if name not in OUTPUTS},
    }


def write_report(file: Path, module: str, flags: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """What ``python -m module`` has found with these options, each item and each row in a line."""
    options = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    file.write_text(layout({**about(["python", "-m", module, *options], flags), **found}))


def layout(report: Mapping[str, Any]) -> str:
    """JSON, each item and each row in a line."""
    return "{\n" + ",\n".join(f" {json.dumps(key)}: {_body(report[key])}" for key in report) + "\n}\n"


def _body(value: Any) -> str:
    if not isinstance(value, list):
        return json.dumps(value)
    return "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
