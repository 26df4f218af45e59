"""Several hosts on one machine: ``python tests/hosts/rig.py --ranks 2,2 -- python train.py``.

A **host** here is a process with namespaces of its own: network, host name, System V memory, and mounts,
``/dev/shm`` among them. Each host has two cables: one to the **control** network, over which the launcher
starts ranks and hears of their end, and one to the **mpi** network, which carries the messages, so that
messages can be cut while the job stays under control. ``mpirun`` runs on the first host; it reaches the
others through the **agent**, which stands where ``ssh`` stands on a cluster::

    control   10.77.1.0/24   ──┬────────────┬────────────┬──     a bridge in the rig's own namespace
                             host0        host1        host2     .1, .2, .3 on both networks
    mpi       10.77.2.0/24   ──┴────────────┴────────────┴──     real TCP, about 10 µs and 1.6 GB/s

What two hosts share is the file system, the processors, the clock and process numbers.

The bridges, the names in ``/etc/hosts``, the files under ``/run`` and all processes live in namespaces of the
rig: the machine's own network is not touched, and two rigs do not meet. The first process of the process
namespace waits for the end of a pipe that only the rig's Python holds open. However that Python ends, the
first process ends too; with it the kernel ends every process of the rig, and then removes all the rest.

Needs Linux, iproute2, util-linux, Open MPI or MPICH; and root, or the right to make user namespaces
(`Rig.reason` tells). Otherwise the standard library and mpicoll.launch.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from mpicoll import launch
from mpicoll.launch import library_of

CONTROL, MPI = "control", "mpi"
NETWORKS = {CONTROL: "10.77.1", MPI: "10.77.2"}
START_LIMIT = 20.0  # seconds; it takes 0.1


class RigError(Exception):
    """The rig cannot be made here, or was used wrongly; the message says why."""


class Rig:
    """``nhosts`` hosts, from ``with Rig(nhosts) as rig:`` to the end of that block."""

    def __init__(self, nhosts: int) -> None:
        self.hosts = tuple(f"host{number}" for number in range(nhosts))
        self.mpirun = launch.find_mpirun()
        self.mpi = library_of(self.mpirun)

    @staticmethod
    def reason() -> str | None:
        """Why this machine allows no rig, or None if it does."""
        try:
            with Rig(1):
                return None
        except (RigError, launch.LauncherError) as error:
            return str(error)

    def __enter__(self) -> Rig:
        self._make()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def _make(self) -> None:
        user = _if_not_root("--user", "--map-root-user")
        separate = [*user, "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        try:
            self.holder = subprocess.Popen(
                ["unshare", *separate, "sh", "-e", "-c", "\n".join(setup(self.hosts))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        except FileNotFoundError:
            raise RigError("no unshare (of util-linux) here") from None
        limit = threading.Timer(START_LIMIT, self.holder.kill)
        limit.start()
        assert self.holder.stdout is not None
        answer = self.holder.stdout.readline()
        limit.cancel()
        if answer != "ready\n":
            said = self._end() or "no answer"
            raise RigError(f"no network namespaces on this machine: {' '.join(said.split())}")

    def _end(self) -> str:
        """End every process of the rig, and wait until they are gone; what they said on stderr."""
        self.holder.kill()
        return self.holder.communicate()[1]

    def _enter(self, *command: str) -> list[str]:
        """``command`` in the namespaces of the bridges."""
        at = f"/proc/{self.holder.pid}/ns"
        user = _if_not_root(f"--user={at}/user", "--preserve-credentials")
        return [
            *("nsenter", *user, f"--net={at}/net", f"--mount={at}/mnt", f"--pid={at}/pid_for_children"),
            *command,
        ]

    def on(self, host: str, command: Sequence[str]) -> list[str]:
        """The command that runs ``command`` on ``host``, in the present working directory."""
        words = f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(command)}"
        return self._enter("/run/agent", self.hosts[self._number(host)], words)

    def command(
        self, ranks_per_host: Sequence[int], program: Sequence[str], options: Sequence[str] = ()
    ) -> list[str]:
        """The command that runs ``program`` on ranks of all hosts; start it in `environment`.

        ``ranks_per_host[i]`` ranks on ``hosts[i]``, numbered host by host; ``options`` are mpirun's.
        """
        if len(ranks_per_host) != len(self.hosts):
            raise RigError(f"ranks_per_host: expected {len(self.hosts)} counts, got {list(ranks_per_host)}")
        counted = zip(self.hosts, ranks_per_host, strict=True)
        places = ",".join(f"{host}:{count}" for host, count in counted if count)
        nranks = sum(ranks_per_host)
        chosen = self._open_mpi(nranks, places) if self.mpi == launch.OPEN_MPI else self._mpich(places)
        return self.on(self.hosts[0], [self.mpirun, *chosen, "-np", str(nranks), *options, *program])

    def _open_mpi(self, nranks: int, places: str) -> list[str]:
        # Every host believes that it has all processors: ranks that are bound would all share the first.
        return [
            *("--allow-run-as-root", "--host", places, "--bind-to", "none", "--map-by", "slot:oversubscribe"),
            *("--prtemca", "plm_ssh_agent", "/run/agent", "--prtemca", "prte_if_include", CONTROL),
            *("--mca", "btl_tcp_if_include", MPI, "--mca", "pml", "ob1", "--mca", "osc", "^ucx"),
            *(("--mca", "mpi_yield_when_idle", "1") if nranks > launch.usable_cpus() else ()),
        ]

    def _mpich(self, places: str) -> list[str]:
        return ["-launcher", "ssh", "-launcher-exec", "/run/agent", "-hosts", places, "-iface", CONTROL]

    def environment(self) -> dict[str, str]:
        """The environment to start `command` in."""
        mpich = {"UCX_NET_DEVICES": MPI, "FI_TCP_IFACE": MPI}  # for each of the two networks that it may use
        # Each host's own: processes of two hosts may have the same number.
        scratch = dict.fromkeys(("TMPDIR", "PRTE_MCA_prte_tmpdir_base"), "/run/scratch")
        return {**launch.environment(self.mpirun), **mpich, **scratch}

    def start(
        self, ranks_per_host: Sequence[int], program: Sequence[str], settings: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start `command`, with ``settings`` added to its environment; its stderr goes to its stdout."""
        return subprocess.Popen(
            self.command(ranks_per_host, program),
            env={**self.environment(), **(settings or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self, job: subprocess.Popen[str], timeout: float) -> subprocess.CompletedProcess[str]:
        """Wait for the end of what `start` has started; give what it printed.

        A job that failed or is not done within ``timeout`` seconds may leave processes on any host: then
        the rig ends them all and is made anew, with all its cables in place.

        Raises:
            subprocess.TimeoutExpired: with what was printed as its ``output``
        """
        try:
            printed, _ = job.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as expired:
            self.renew()
            expired.output, _ = job.communicate()
            raise
        if job.returncode:
            self.renew()
        return subprocess.CompletedProcess(job.args, job.returncode, printed)

    def run(
        self,
        ranks_per_host: Sequence[int],
        program: Sequence[str],
        timeout: float,
        settings: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """`start` and `finish`."""
        return self.finish(self.start(ranks_per_host, program, settings), timeout)

    def renew(self) -> None:
        """End every process, and make the hosts anew."""
        self._end()
        self._make()

    def cut(self, host: str, network: str = MPI) -> None:
        """Pull the host's cable out of the bridge."""
        self._set_cable(host, network, "down")

    def mend(self, host: str, network: str = MPI) -> None:
        """Plug the cable in again. TCP goes on when it next repeats what was lost: in about as long again."""
        self._set_cable(host, network, "up")

    def _set_cable(self, host: str, network: str, state: str) -> None:
        if network not in NETWORKS:
            raise RigError(f"network: expected one of {', '.join(NETWORKS)}, got {network!r}")
        cable = f"{network}{self._number(host)}"
        subprocess.run(self._enter("ip", "link", "set", cable, state), check=True)

    def _number(self, host: str) -> int:
        if host not in self.hosts:
            raise RigError(f"host: expected one of {', '.join(self.hosts)}, got {host!r}")
        return self.hosts.index(host)


def _if_not_root(*options: str) -> tuple[str, ...]:
    return options if os.geteuid() else ()


def setup(hosts: Sequence[str]) -> Iterator[str]:
    """The shell script, line by line, that makes the hosts and then waits for the end of its input."""
    names = [f"{NETWORKS[CONTROL]}.{number} {host}" for number, host in enumerate(hosts, 1)]
    yield "mount -t tmpfs -o mode=755 rig /run"
    yield f"echo {shlex.quote(AGENT)} >/run/agent; chmod +x /run/agent"
    yield f"printf '%s\\n' '127.0.0.1 localhost' {shlex.join(names)} >/run/names"
    yield "mount --bind /run/names /etc/hosts"
    yield "mkdir -m 1777 /run/scratch; mkdir /run/cgroup; mount --rbind /sys/fs/cgroup /run/cgroup"
    for network in NETWORKS:
        yield f"ip link add {network} type bridge; ip link set {network} up"
    yield "mkfifo /run/made"
    for number, host in enumerate(hosts):
        inside = "; ".join(inside_host(host))
        yield f"unshare --net --uts --ipc --mount sh -e -c {shlex.quote(inside)} </dev/null &"
        yield f"host=$!; read made </run/made; echo $host >/run/{host}"
        for network, prefix in NETWORKS.items():
            cable = f"{network}{number}"
            yield f"ip link add {cable} type veth peer name {network} netns $host"
            yield f"ip link set {cable} master {network} up"
            address = f"ip addr add {prefix}.{number + 1}/24 dev {network}; ip link set {network} up"
            yield f"nsenter --target $host --net sh -e -c '{address}; ip link set lo up'"
    yield "echo ready; exec cat >/dev/null"


def inside_host(host: str) -> Iterator[str]:
    """What the process does whose namespaces are the host."""
    yield f"hostname {host}"
    yield "mount -t tmpfs -o mode=1777 shm /dev/shm"
    # UCX looks for network devices in /sys, which shows those of the namespace that mounted it.
    yield "mount -t sysfs sys /sys; mount --rbind /run/cgroup /sys/fs/cgroup"
    yield "echo made >/run/made; exec sleep infinity"


# What launchers call in place of ssh: options for ssh, a host, and words that a shell on that host is to run.
AGENT = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift; done
host=$1; shift
exec nsenter --target "$(cat "/run/$host")" --net --uts --ipc --mount sh -c "$*"
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python tests/hosts/rig.py", description="Run a program on several hosts made on this machine."
    )
    parser.add_argument("--ranks", default="2,2", metavar="N,N", help="ranks on each host (default 2,2)")
    parser.add_argument(
        "--mca", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="as Open MPI's"
    )
    parser.add_argument("program", nargs=argparse.REMAINDER, help="after --: the program and its arguments")
    arguments = parser.parse_args()
    ranks = [int(count) for count in arguments.ranks.split(",")]
    program = arguments.program[1:] if arguments.program[:1] == ["--"] else arguments.program
    options = [word for name, value in arguments.mca for word in ("--mca", name, value)]
    try:
        with Rig(len(ranks)) as rig:
            sys.exit(subprocess.call(rig.command(ranks, program, options), env=rig.environment()))
    except (RigError, launch.LauncherError) as error:
        sys.exit(f"rig: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
