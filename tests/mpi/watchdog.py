"""Watches one rank of an MPI test run, from a process of its own.

Started by ``conftest.py`` with the rank, the number of ranks and the number of an inherited file. Each line
on the standard input, ``SECONDS PLACE``, sets a new deadline. At a deadline the rank is told to dump its
stacks into the file (`faulthandler` does so in a C signal handler), they are printed, and the rank is killed.
So it works whatever the rank does, even in a C function that never lets go of Python's lock.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time

SIGNAL = signal.SIGUSR2
DUMPING = 0.5  # seconds that a rank gets to write its stacks, on a busy machine
OTHERS = 3.0  # seconds that the other ranks get to do the same before the first death ends the job
FRAMEWORK = ("/_pytest/", "/pluggy/", "/pytest/", "<frozen runpy>")  # frames that say nothing about the test


def watch(rank: str, size: str, dump: int) -> None:
    """Follow the orders on the standard input until it ends, which it does with the rank."""
    seconds, place = None, ""
    while select.select([0], [], [], seconds)[0]:
        # An order is written in one piece far smaller than a pipe holds; only the latest counts.
        orders = os.read(0, 65536).decode().splitlines()
        if not orders:
            return
        limit, place = orders[-1].split(" ", 1)
        seconds = float(limit)
    report_and_kill(f"rank {rank} of {size} was here in {place}:", dump)


def report_and_kill(title: str, dump: int) -> None:
    """Print in one piece where the rank is, and end it."""
    os.close(0)  # a rank that goes on, because the signal woke it, finds nobody to take its next order
    rank = os.getppid()
    os.kill(rank, SIGNAL)
    time.sleep(DUMPING)
    stacks = os.pread(dump, 1 << 20, 0).decode(errors="replace").splitlines()
    shown = [line for line in stacks if not any(part in line for part in FRAMEWORK)]
    os.write(2, "\n".join(["", title, *shown, ""]).encode())
    time.sleep(OTHERS)
    with contextlib.suppress(ProcessLookupError):  # another rank's death has ended the job
        os.kill(rank, signal.SIGKILL)


if __name__ == "__main__":
    watch(sys.argv[1], sys.argv[2], int(sys.argv[3]))
