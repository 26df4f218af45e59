"""What every report says of how, when and on what it was measured. Needs no MPI."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from mpicoll.info import cpu_model
from mpicoll.launch import usable_cpus

OUTPUTS = ("json", "plot")  # flags that change nothing of what is measured


def about(command: Sequence[str], flags: Mapping[str, Any]) -> dict[str, Any]:
    """For JSON; ``command`` is what a user types."""
    return {
        "command": shlex.join(command),
        "date": date.today().isoformat(),
        "machine": {"cpu": f"{os.cpu_count()} × {cpu_model()}", "cores": usable_cpus()},
        "flags": {name: value for name, value in flags.items() if name not in OUTPUTS},
    }
