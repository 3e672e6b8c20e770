"""A SLURM of two nodes on this machine, for tests: real daemons on the loopback device, in a folder of their own, gone
when the test is.

Needs Debian's slurm-wlm and munge, and root for the namespaces: each node has its host name, its /etc/hosts, and its
process numbers, so that nothing of a node outlives it. Only the work of the jobs is real; there is no shared file
system but the one there is.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

NODES = ("n1", "n2")
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "salloc", "scontrol", "unshare")
CONFIG = """
ClusterName=loop
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/run/munge.sock
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldPidFile={folder}/run/slurmctld.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=5,sched_min_interval=0,requeue_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobAcctGatherType=jobacct_gather/linux
AccountingStorageType=accounting_storage/none
MpiDefault=none
KillWait=10
SlurmdTimeout=30
MinJobAge=3600
ReturnToService=2
NodeName=n1 NodeAddr=127.0.0.1 NodeHostname=n1 Port={n1} CPUs=2 RealMemory=1000
NodeName=n2 NodeAddr=127.0.0.1 NodeHostname=n2 Port={n2} CPUs=2 RealMemory=1000
PartitionName=low Nodes=n[1-2] Default=YES PriorityTier=1
PartitionName=high Nodes=n[1-2] PriorityTier=10
"""


def missing() -> str | None:
    """Why there can be no cluster here, or None."""
    absent = [program for program in PROGRAMS if found(program) is None]
    if absent:
        return f"needs slurm-wlm, munge and util-linux: {', '.join(absent)} not found"
    if os.geteuid() != 0:
        return "needs root, for the name spaces of the nodes"
    if subprocess.run([found("unshare"), "-umpf", "true"], capture_output=True).returncode:
        return "name spaces cannot be made here"
    return None


def found(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


@dataclass
class Cluster:
    """What a user of the cluster has: its commands, run in ``folder``."""

    folder: Path
    environment: dict[str, str]
    daemons: dict[str, subprocess.Popen] = field(default_factory=dict)

    def run(self, *command: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=timeout
        )

    def submit(self, script: str, *options: str) -> str:
        """The number of a new job that runs ``script`` in bash; what it prints goes to JOB.log."""
        path = self.folder / "job.sh"
        path.write_text(f"#!/bin/bash\n{script}\n")
        done = self.run("sbatch", "--parsable", "--open-mode=append", "--output=%j.log", *options, str(path))
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def log(self, job: str) -> str:
        path = self.folder / f"{job}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def facts(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` says: JobState, Restarts, ExitCode..."""
        return dict(re.findall(r"(\w+)=(\S+)", self.run("scontrol", "show", "job", job).stdout))

    def wait(self, what: Callable[[], object], job: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, f"{self.facts(job)}\n{self.log(job)[-4000:]}"
            time.sleep(0.1)

    def ended(self, job: str, seconds: float = 180, restarts: int = 0) -> dict[str, str]:
        """Waits for the end of a job that has been started again ``restarts`` times, and pushes it on where it waits
        for its turn."""
        since: float | None = None

        def over() -> bool:
            nonlocal since
            state = self.push(job)
            going = state in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED")
            if going or int(self.facts(job)["Restarts"]) < restarts:
                since = None
            elif since is None:
                since = time.monotonic()
            # A job that is queued again seems to have failed for a moment, on a busy machine for seconds.
            return since is not None and time.monotonic() - since > (1 if state == "COMPLETED" or not restarts else 10)

        self.wait(over, job, seconds)
        return self.facts(job)

    def push(self, job: str) -> str | None:
        """The state of a job; one that waits for its turn after a requeue gets it."""
        facts = self.facts(job)
        if facts.get("JobState") == "PENDING" and int(facts.get("Restarts", 0)):
            self.run("scontrol", "update", f"JobId={job}", "StartTime=now")
        return facts.get("JobState")


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def cluster(folder: Path, environment: dict[str, str]) -> Iterator[Cluster]:
    """Starts the daemons below ``folder``, whose path is to be short (a socket lies in it), and ends them and all
    jobs."""
    for name in ("run", "state", "work", *(f"spool/{node}" for node in NODES)):
        (folder / name).mkdir(parents=True)
    (folder / "hosts").write_text(f"127.0.0.1 localhost {socket.gethostname()} {' '.join(NODES)}\n")
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    controller, *ports = free_ports(3)
    config = folder / "slurm.conf"
    places = dict(zip(NODES, ports, strict=True))
    config.write_text(CONFIG.format(host=socket.gethostname(), port=controller, folder=folder, **places))
    made = Cluster(folder / "work", {**environment, "SLURM_CONF": str(config), "TMPDIR": str(folder / "run")})
    with contextlib.ExitStack() as stack:
        stack.callback(_end, made)
        munge = [
            f"--key-file={folder}/munge.key",
            f"--socket={folder}/run/munge.sock",
            f"--pid-file={folder}/run/munged.pid",
        ]
        munge += [f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed"]
        _start(made, "munged", [found("munged"), "--foreground", "--force", *munge])
        _start(made, "slurmctld", [found("slurmctld"), "-D", "-f", str(config)])
        for node in NODES:
            start_node(made, node)
        deadline = time.monotonic() + 60
        while made.run("sinfo", "-h", "-p", "low", "-o", "%T").stdout.split() != ["idle"]:
            assert time.monotonic() < deadline, (
                made.run("sinfo").stdout + (folder / "slurmctld.log").read_text()[-3000:]
            )
            time.sleep(0.2)
        yield made


def start_node(made: Cluster, node: str) -> None:
    config, hosts = made.environment["SLURM_CONF"], Path(made.environment["SLURM_CONF"]).with_name("hosts")
    inside = f"hostname {node}; mount --bind {hosts} /etc/hosts; exec {found('slurmd')} -D -N {node} -f {config}"
    _start(made, node, [found("unshare"), "-umpf", "--mount-proc", "--kill-child", "bash", "-c", inside])


def kill_node(made: Cluster, node: str) -> None:
    """The node and all that runs on it, at once."""
    made.daemons[node].kill()
    made.daemons[node].wait()


def _start(made: Cluster, name: str, command: list[str]) -> None:
    log = (made.folder.parent / f"{name}.log").open("ab")
    environment = {
        key: value for key, value in made.environment.items() if not key.startswith("SLURM_") or key == "SLURM_CONF"
    }
    made.daemons[name] = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    log.close()


def _end(made: Cluster) -> None:
    for name in (*NODES, "slurmctld", "munged"):
        if (daemon := made.daemons.get(name)) is not None and daemon.poll() is None:
            daemon.send_signal(signal.SIGKILL if name in NODES else signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(timeout=10)
            daemon.kill()
            daemon.wait()
