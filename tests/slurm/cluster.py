"""A real SLURM cluster on one machine: slurmctld, a slurmd for each node, munged. Needs root and
Debian's packages.

    python -m tests.slurm.cluster COMMAND...      run COMMAND with the cluster's environment,
                                                  then stop the cluster

Every daemon has its own namespaces: a host name (node1, ...), a loopback address (127.0.10.1, ...)
and its processes, which all die with it, as in a power cut. CPUs, memory and GPUs are what
slurm.conf says, not what the machine has.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PACKAGES = "slurmctld slurmd slurm-client munge"
START_SECONDS = 30
# the first process of a namespace
INIT = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; "$@" & wait'
MORTAL = ["setpriv", "--pdeathsig", "KILL"]  # nothing outlives who started it, however that ends
NAMESPACES = [
    "--uts",
    "--mount",
    "--pid",
    "--fork",
    "--kill-child=SIGKILL",
    "--mount-proc",
    "--propagation",
    "private",
]

SLURM_CONF = """\
ClusterName=distseg
SlurmctldHost=ctl(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it may start again (120 s by default)
AuthInfo=socket={root}/munge.sock,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldPidFile={root}/slurmctld.pid
SlurmdLogFile={root}/log/slurmd.%n.log
SlurmctldLogFile={root}/log/slurmctld.log
# no cgroups and no systemd are needed
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
PropagateResourceLimits=NONE
RebootProgram=/bin/false
# nodes are what is written below, whatever the machine is
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1,bf_max_time=1
PriorityType=priority/basic
# or submitit, after a new start, takes the results of an earlier cluster's jobs for its own
FirstJobId={first_job}
JobRequeue=1
ReturnToService=2
SlurmctldTimeout=30
# a node that is silent for so long is down, and its jobs are requeued
SlurmdTimeout={slurmd_timeout}
MessageTimeout=10
TCPTimeout=2
InactiveLimit=0
KillWait=10
UnkillableStepTimeout=30
# jobs that have ended stay visible: the stand-in for sacct reads them
MinJobAge=36000
CompleteWait=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
{nodes}
PartitionName=batch Nodes=ALL Default=YES DefaultTime=5 State=UP PriorityTier=1 \
PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=ALL DefaultTime=5 State=UP PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str:
    """Why no cluster can be started here; "" when one can."""
    if os.geteuid() != 0:
        return "a SLURM cluster for tests needs root"
    missing = [
        name
        for name in ("slurmctld", "slurmd", "munged", "sbatch", "unshare", "setpriv")
        if shutil.which(name) is None
    ]
    if missing:
        return f"no {', '.join(missing)}: apt-get install --no-install-recommends {PACKAGES}"
    if subprocess.run(["unshare", *NAMESPACES, "true"], capture_output=True).returncode:
        return "this container may not make namespaces"
    return ""


@dataclass
class Cluster:
    """A cluster of so many nodes in a folder of its own."""

    num_nodes: int = 4
    cpus: int = 4
    gpus: int = 2  # in name only
    slurmd_timeout: int = 15
    root: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="slurm-")))
    _inits: dict[str, subprocess.Popen] = field(default_factory=dict)
    _munged: subprocess.Popen | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What commands of SLURM need to find this cluster."""
        return {
            "SLURM_CONF": str(self.root / "slurm.conf"),
            "PATH": f"{self.root}/bin:{os.environ['PATH']}",
        }

    @property
    def nodes(self) -> list[str]:
        return [f"node{i + 1}" for i in range(self.num_nodes)]

    def start(self) -> None:
        """Start everything, and wait until all nodes are idle."""
        for folder in ("state", "spool", "log", "bin", "dev"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        self.root.chmod(0o755)
        self._start_munge()
        hosts = [f"127.0.10.{i + 1} {name}" for i, name in enumerate(self.nodes)]
        (self.root / "hosts").write_text(
            "\n".join(["127.0.0.1 localhost ctl", *hosts, "::1 localhost"]) + "\n"
        )
        self._write_configuration()
        shutil.copy(Path(__file__).parent / "sacct", self.root / "bin" / "sacct")
        self._start_daemon("ctl", "slurmctld", "-D", "-c")
        for name in self.nodes:
            self.boot(name)
        deadline = time.monotonic() + START_SECONDS
        while set(
            self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N", check=False).split()
        ) != set(self.nodes):
            if time.monotonic() > deadline:
                logs = "\n".join(
                    path.read_text()[-2000:] for path in sorted((self.root / "log").iterdir())
                )
                self.stop()
                raise RuntimeError(f"no cluster after {START_SECONDS} s:\n{logs}")
            time.sleep(0.1)

    def stop(self) -> None:
        """End every process of the cluster, and remove its folder."""
        for name in list(self._inits):
            self.cut_power(name)
        if self._munged is not None:
            self._munged.kill()
            self._munged.wait()
        shutil.rmtree(self.root, ignore_errors=True)

    def boot(self, node: str) -> None:
        """Start a node, or its daemon, again."""
        self._start_daemon(node, "slurmd", "-D", "-N", node)

    def cut_power(self, node: str) -> None:
        """Every process of a node is gone at once, as it is then."""
        init = self._inits.pop(node)
        # unshare takes the first process of the namespace along, and that everything in it
        init.kill()
        init.wait()

    def kill_daemon(self, node: str) -> None:
        """SIGKILL to slurmd alone: jobs go on."""
        for pid in processes_below(self._inits[node].pid):
            with suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text().strip() == "slurmd":
                    os.kill(pid, signal.SIGKILL)
                    return
        raise RuntimeError(f"no slurmd on {node}")

    def ranks(self, node: str) -> list[int]:
        """Process ids, as seen from outside, of the training processes on a node."""
        found = []
        for pid in processes_below(self._inits[node].pid):
            with suppress(OSError):
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if b"distseg.train" in words and any(
                    item.startswith(b"RANK=") for item in variables
                ):
                    found.append(pid)
        return found

    def run(
        self, *command: str, check: bool = True, variables: dict[str, str] | None = None
    ) -> str:
        """stdout of a command called in the repository.

        Raises RuntimeError with its stderr when it fails.
        """
        environment = os.environ | self.environment | (variables or {})
        done = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        if check and done.returncode:
            raise RuntimeError(
                f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done.stdout

    def _start_munge(self) -> None:
        root = self.root
        (root / "munge.key").write_bytes(os.urandom(128))
        (root / "munge.key").chmod(0o400)
        files = {
            "key-file": "munge.key",
            "socket": "munge.sock",
            "pid-file": "munged.pid",
            "seed-file": "munge.seed",
        }
        options = [f"--{name}={root / file}" for name, file in files.items()]
        log = f"--log-file={root / 'log' / 'munged.log'}"
        command = [*MORTAL, "munged", "--foreground", "--force", "--num-threads=2", log, *options]
        self._munged = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def _write_configuration(self) -> None:
        port = free_ports(self.num_nodes + 1)
        common = f"CPUs={self.cpus} RealMemory=4000 State=UNKNOWN" + (
            f" Gres=gpu:{self.gpus}" if self.gpus else ""
        )
        nodes = [
            f"NodeName={name} NodeHostname={name} NodeAddr=127.0.10.{i + 1} Port={port + 1 + i} "
            f"{common}"
            for i, name in enumerate(self.nodes)
        ]
        numbers = {
            "port": port,
            "first_job": random.randrange(1000, 10**6),
            "slurmd_timeout": self.slurmd_timeout,
        }
        text = SLURM_CONF.format(root=self.root, nodes="\n".join(nodes), **numbers)
        (self.root / "slurm.conf").write_text(text)
        (self.root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        devices = [self.root / "dev" / f"gpu{i}" for i in range(self.gpus)]
        for device in devices:
            os.mknod(device, 0o20666, os.makedev(1, 3))  # /dev/null by another name
        file = f"{self.root}/dev/gpu[0-{self.gpus - 1}]"
        gres = f"NodeName=node[1-{self.num_nodes}] Name=gpu File={file}\n" if devices else ""
        (self.root / "gres.conf").write_text(gres)

    def _start_daemon(self, name: str, *command: str) -> None:
        if name in self._inits:
            self.cut_power(name)
        inside = ["bash", "-c", INIT, "init", name, str(self.root / "hosts"), *command]
        with (self.root / "log" / f"{name}.out").open("ab") as log:
            how = {
                "stdin": subprocess.DEVNULL,
                "stdout": log,
                "stderr": log,
                "start_new_session": True,
            }
            environment = os.environ | {"SLURM_CONF": str(self.root / "slurm.conf")}
            command = [*MORTAL, "unshare", *NAMESPACES, *inside]
            self._inits[name] = subprocess.Popen(command, env=environment, **how)  # type: ignore[call-overload]


def processes_below(pid: int) -> list[int]:
    """All descendants of a process."""
    try:
        children = [
            int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]
    except OSError:
        return []
    return [below for child in children for below in (child, *processes_below(child))]


def free_ports(count: int) -> int:
    """The first of `count` free ports in a row, below those that connections take."""
    for _ in range(200):
        first = random.randrange(10000, 19000)
        sockets = [socket.socket() for _ in range(count)]
        try:
            for i, probe in enumerate(sockets):
                probe.bind(("0.0.0.0", first + i))
            return first
        except OSError:
            continue
        finally:
            for probe in sockets:
                probe.close()
    raise RuntimeError("no free ports")


def main(command: list[str]) -> int:
    """Run a command on a new cluster; returns its exit code."""
    reason = why_not()
    if reason:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    cluster = Cluster()
    try:
        cluster.start()
        return subprocess.run(command, env=os.environ | cluster.environment).returncode
    finally:
        cluster.stop()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
