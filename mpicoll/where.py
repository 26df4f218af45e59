"""`mpicoll where PID`: where every rank of a running job is, asked from outside, without MPI."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mpicoll.service import NoAnswerError, ask_here, local_name

WITHIN = 10.0  # seconds: a rank that answers may itself wait a second or so for one that does not


def processes_below(pid: int) -> list[int]:
    """The process and all that it has started, directly or not, the oldest first."""
    parents: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = status.read_text()
        except OSError:
            continue  # it has ended meanwhile
        parents.setdefault(int(text.rpartition(")")[2].split()[1]), []).append(int(status.parent.name))
    found = [pid]
    for process in found:
        found += sorted(parents.get(process, []))
    return found


def ranks_below(pid: int) -> list[int]:
    """Those among the process and all that it has started that can be asked."""
    names = {line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines() if "@" in line}
    return [process for process in processes_below(pid) if local_name(process).replace("\0", "@") in names]


@click.command("where", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("pid", type=click.IntRange(1))
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of lines.")
def command(pid: int, as_json: bool) -> None:
    """Show where every rank of a running job is: in which collective, since when, on which line.

    PID is the process number of any rank on this machine, or of the mpirun or srun that started it. Nothing
    in the job is disturbed. Ranks say so themselves when they get SIGUSR2, on standard error.

    Example: mpicoll where $(pgrep -nf train.py)
    """
    if not Path(f"/proc/{pid}").exists():
        raise click.ClickException(f"PID: expected a running process, got {pid}")
    ranks = ranks_below(pid)
    if not ranks:
        raise click.ClickException(
            f"PID: expected a rank of a job, or its launcher, got {pid}: neither it nor what it has started "
            "has an mpicoll.Communicator of more than one rank on this machine"
        )
    try:
        rows = ask_here(ranks[0], "where", None, WITHIN)
    except NoAnswerError as error:
        raise click.ClickException(f"{error}; it may be in code that keeps Python's lock") from None
    if as_json:
        click.echo(json.dumps(rows))
        return
    from mpicoll.watch import report  # here, for it needs MPI

    click.echo(report(rows))
