"""A real Slurm with two nodes on one machine: `Cluster`. Needs root, and Debian's slurm-wlm and munge; for
``srun --mpi=pmix`` also libpmix-dev.

    vocabulary     controller: slurmctld, which queues jobs.  node: a slurmd, which runs them.
                   munge: signs the messages between them.

The nodes, n1 and n2, have a host name and a /dev/shm of their own (namespaces), so MPI takes them for two
machines; and so does PMIx, which with one host name for both does not find what Slurm tells it. Process
numbers are common to both, for MPICH confuses two processes of equal address and number. All processes of the
nodes have one first process; when that ends, the system ends them all, and that ends with the process that
started it. So no process is left.

All files are in one temporary directory; ports are taken from those that are free. So several clusters can
run at once.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

NODES = ("n1", "n2")
COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "unshare", "setpriv", "taskset")
STARTING = 20.0  # seconds until both nodes are ready; it takes two
ANSWERING = 20.0  # seconds for a command of Slurm's
POLLING = 0.1  # seconds
ENDED = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
LAUNCHERS = ("SLURM", "OMPI_", "PMIX", "PMI_", "PRTE_")  # variables that are not to reach jobs

# A node counts more CPUs than it has: ranks may outnumber cores here. GPUs are files, which nobody opens.
# A requeued job waits for at least cred_expire, which is 5 s at the least.
CONFIGURATION = """
ClusterName=mpicoll
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/%n
TmpFS={directory}/%n/tmp
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/%n/slurmd.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
ReturnToService=2
KillWait=2
MpiDefault=none
GresTypes=gpu
NodeName=n[1-2] NodeHostname=n[1-2] NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=4 Gres=gpu:2
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""
# The first process of the nodes, with their process numbers: they end with it.
BOTH_NODES = """
for node in {nodes}; do
    unshare --uts --mount taskset --cpu-list ${{node#*:}} sh -ec "
        hostname ${{node%:*}}
        mount --bind {directory}/hosts /etc/hosts
        mount -t tmpfs tmpfs /dev/shm
        exec slurmd -D -f {directory}/slurm.conf -N ${{node%:*}} >> {directory}/${{node%:*}}.out 2>&1
    " &
done
wait
"""
OWN_PROCESSES = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]


def reason() -> str | None:
    """Why there can be no cluster on this machine; None if there can."""
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    missing = [command for command in COMMANDS if shutil.which(command, path=path) is None]
    if missing:
        return f"needs {', '.join(missing)} (Debian: apt-get install slurm-wlm munge libpmix-dev)"
    if os.geteuid() != 0:
        return "needs root, for a node's own host name and processes"
    tried = subprocess.run(
        [*OWN_PROCESSES, "unshare", "--uts", "--mount", "true"],
        capture_output=True,
        text=True,
        timeout=ANSWERING,
    )
    return f"this machine refuses namespaces: {tried.stderr.strip()}" if tried.returncode else None


def halves_of_cores() -> tuple[str, str]:
    """The cores of each node, as taskset wants them: without that, ranks of both nodes would meet on one."""
    cores = sorted(os.sched_getaffinity(0))
    half = (len(cores) + 1) // 2
    return ",".join(map(str, cores[:half])), ",".join(map(str, cores[half:] or cores))


def free_ports() -> tuple[int, int, int]:
    """Three free ports, the last two of which follow each other."""
    while True:
        with socket.socket() as first, socket.socket() as second, socket.socket() as third:
            first.bind(("127.0.0.1", 0))
            second.bind(("127.0.0.1", 0))
            with contextlib.suppress(OSError, OverflowError):
                third.bind(("127.0.0.1", second.getsockname()[1] + 1))
                return first.getsockname()[1], second.getsockname()[1], third.getsockname()[1]


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").glob("[0-9]*")]


def _read(pid: int, name: str) -> list[str]:
    """The command line or the environment of a process."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes().decode().rstrip("\0").split("\0")
    except OSError:  # it has ended
        return []


def _host_space(pid: int) -> str:
    """The namespace that the host name of a process belongs to; that of a zombie is "", for it has none."""
    try:
        return os.readlink(f"/proc/{pid}/ns/uts")
    except OSError:
        return ""


class Cluster:
    """The nodes n1 and n2, with 4 CPUs and 2 (pretended) GPUs each, while the block lasts."""

    def __init__(self) -> None:
        self.directory = Path()
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        self.directory = Path(tempfile.mkdtemp(prefix="mpicoll-slurm-"))
        try:
            self._configure()
            self._start_all()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _configure(self) -> None:
        directory = self.directory
        directory.chmod(0o755)  # munge's clients are to reach its socket
        for name in ("state", "tmp", *NODES, *(f"{node}/tmp" for node in NODES)):
            (directory / name).mkdir()
        for gpu in ("gpu0", "gpu1"):
            os.mknod(directory / gpu, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        (directory / "hosts").write_text(f"127.0.0.1 localhost {' '.join(NODES)}\n")
        (directory / "munge.key").write_bytes(os.urandom(1024))
        (directory / "munge.key").chmod(0o400)
        text = CONFIGURATION.format(host=socket.gethostname(), directory=directory, ports=free_ports())
        (directory / "slurm.conf").write_text(text)
        (directory / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={directory}/gpu[0-1]\n")

    def _start_all(self) -> None:
        munge = {
            "key-file": "key",
            "socket": "socket",
            "pid-file": "pid",
            "log-file": "log",
            "seed-file": "seed",
        }
        files = [f"--{option}={self.directory}/munge.{end}" for option, end in munge.items()]
        self._start("munged", ["munged", "--foreground", "--force", *files])
        self._until(lambda: (self.directory / "munge.socket").exists(), STARTING, "munged")
        self._start("slurmctld", ["slurmctld", "-D", "-f", f"{self.directory}/slurm.conf"])
        nodes = " ".join(f"{node}:{cores}" for node, cores in zip(NODES, halves_of_cores(), strict=True))
        script = BOTH_NODES.format(nodes=nodes, directory=self.directory)
        self._start("nodes", [*OWN_PROCESSES, "sh", "-c", script])
        self._until(lambda: self._idle() == 2, STARTING, "two idle nodes")

    def _start(self, name: str, command: Sequence[str]) -> None:
        """Start a daemon that is killed if this process ends without a word."""
        with open(self.directory / f"{name}.out", "ab") as output:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self.environment(),
                start_new_session=True,
            )

    def fail_node(self, node: str) -> None:
        """End all processes of ``node`` at once, as a power cut would."""
        command = f"{self.directory}/slurm.conf -N {node}"
        (daemon,) = (pid for pid in _processes() if " ".join(_read(pid, "cmdline")).endswith(command))
        space = _host_space(daemon)
        # More than once: a process may be making another one meanwhile.
        while found := [pid for pid in _processes() if _host_space(pid) == space]:
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def processes(self, *variables: str) -> list[int]:
        """The processes of jobs with all of ``variables``, such as "PMI_RANK=3", in their environment."""
        ours = {f"SLURM_CONF={self.directory}/slurm.conf", *variables}
        return [pid for pid in _processes() if ours <= set(_read(pid, "environ"))]

    def environment(self, **changes: str) -> dict[str, str]:
        """That of this process, without what a launcher around it has set, for commands of this Slurm.

        Temporary files go to the cluster's directory: mpirun names them after its process number, and
        stumbles over those of another cluster's, whose process had that number and was killed.
        """
        own = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
        path = f"{own.get('PATH', os.defpath)}:/usr/sbin:/sbin"
        ours = {"SLURM_CONF": f"{self.directory}/slurm.conf", "TMPDIR": f"{self.directory}/tmp"}
        return {**own, "PATH": path, **ours, **changes}

    def run(self, *command: str, **settings: str) -> str:
        """What a command of Slurm's prints, with ``settings`` in its environment. Raises AssertionError."""
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=ANSWERING, env=self.environment(**settings)
        )
        assert done.returncode == 0, f"{shlex.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(
        self, command: Sequence[str], directory: Path, environment: Mapping[str, str], *options: str
    ) -> Job:
        """``sbatch OPTIONS COMMAND`` in ``directory``."""
        output = directory / f"{Path(command[0]).stem}-%j.out"
        # The job's environment, but this Slurm's: an sbatch option of the same name would take precedence.
        line = ["sbatch", "--parsable", f"--chdir={directory}", f"--output={output}", *options, *command]
        number = int(self.run(*line, **environment))
        return Job(self, number, Path(str(output).replace("%j", str(number))))

    def logs(self) -> str:
        """What the daemons have said, for an error message."""
        texts = [f"--- {path.name}\n{path.read_text()[-3000:]}" for path in self.directory.glob("*.out")]
        return "\n".join(texts)

    def _idle(self) -> int:
        done = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--format=%T"],
            capture_output=True,
            text=True,
            timeout=ANSWERING,
            env=self.environment(),
        )
        return done.stdout.split().count("idle")

    def _until(self, done: Callable[[], bool], seconds: float, what: str) -> None:
        limit = time.monotonic() + seconds
        while not done():
            if time.monotonic() > limit:
                raise AssertionError(f"expected {what} within {seconds:g} s\n{self.logs()}")
            time.sleep(POLLING)

    def _end(self) -> None:
        for daemon in self._daemons.values():
            daemon.send_signal(signal.SIGKILL)
            daemon.wait()
        self._daemons.clear()
        shutil.rmtree(self.directory, ignore_errors=True)


class Job:
    """A batch job: what it is doing, and what it has written."""

    def __init__(self, cluster: Cluster, number: int, output: Path):
        self.number = number
        self._cluster = cluster
        self._output = output

    def text(self) -> str:
        """What it has printed so far."""
        return self._output.read_text() if self._output.exists() else ""

    def state(self) -> str:
        """Slurm's word for its state, such as "RUNNING"."""
        return self._fact("JobState")

    def _fact(self, name: str) -> str:
        facts = self._cluster.run("scontrol", "show", "job", "--oneliner", str(self.number))
        found = re.search(rf"\b{name}=(\S+)", facts)
        assert found, facts
        return found[1]

    def until(self, done: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait; past ``seconds``, or if the job has ended meanwhile, raise AssertionError with its output."""
        limit = time.monotonic() + seconds
        while not done():
            state = self.state()
            if (state in ENDED and not done()) or time.monotonic() > limit:
                self._cancel()
                raise AssertionError(f"job {self.number}: expected {what}, is {state}\n{self.text()}")
            time.sleep(POLLING)

    def finish(self, seconds: float) -> str:
        """Wait for the end, which is to be a success; what it has printed."""
        self.until(lambda: self.state() == "COMPLETED", seconds, f"to be completed within {seconds:g} s")
        return self.text()

    def signal(self, name: str) -> None:
        """Send a signal to the batch script, as Slurm does some time before the limit."""
        self._cluster.run("scancel", "--batch", f"--signal={name}", str(self.number))

    def _cancel(self) -> None:
        if self.state() not in ENDED:
            self._cluster.run("scancel", str(self.number))
