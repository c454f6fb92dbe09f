"""train.sbatch on a real Slurm of four nodes, all of them this machine."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepfm_dist.distributed.checkpoint import complete_steps
from tests.metrics_lines import lines

pytestmark = [pytest.mark.launch, pytest.mark.slow]  # every job imports torch on four ranks

ROOT = Path(__file__).parents[2]
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo")
NODES = 4
OPTIONS = (
    "trainer={epochs: 8, batch_size: 4096, log_every_steps: 25, validate_every_epochs: 2}",
    "checkpoint={every_steps: 10, keep_last: 3}",
    "run.loggers=[]",
)
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
KillWait=10
SlurmdParameters=config_overrides
ReturnToService=2
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def output_of(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def wait_until(holds: object, seconds: float, what: str) -> None:
    assert callable(holds)
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.1)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """A Slurm of its own, authentication included; nothing is written outside its folder."""
    missing = [
        name
        for name in NEEDED
        if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None
    ]
    if missing or os.getuid() != 0:
        packages = "apt-get install slurmctld slurmd slurm-client munge"
        pytest.skip(f"no Slurm here: {', '.join(missing) or 'not root'} ({packages}; as root)")
    patch = pytest.MonkeyPatch()
    folder = Path(
        output_of("mktemp", "-d", "/tmp/slurm.XXXXXX").strip()
    )  # sockets' paths are short
    patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin")
    host, ports = socket.gethostname().split(".")[0], free_ports(1 + NODES)
    nodes = [
        f"NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[i]} CPUs=2"
        for i in range(1, NODES + 1)
    ]
    (folder / "slurm.conf").write_text(
        CONF.format(host=host, ports=ports, folder=folder, nodes="\n".join(nodes))
    )
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    (folder / "state").mkdir()
    files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid"}
    files |= {"log-file": "munged.log", "seed-file": "munged.seed"}
    daemons = [["munged", "--force", *(f"--{k}={folder / v}" for k, v in files.items())]]
    daemons += [["slurmctld", "-c"], *(["slurmd", "-N", f"n{i}"] for i in range(1, NODES + 1))]
    try:
        for daemon in daemons:
            subprocess.run(daemon, check=True, capture_output=True)
        wait_until(
            lambda: output_of("sinfo", "-hN", "-tidle", "-o%N").split().__len__() == NODES,
            30,
            "idle",
        )
        yield
    finally:
        subprocess.run(["scancel", "--state=RUNNING"], check=False)
        for pid in folder.glob("*.pid"):
            os.kill(int(pid.read_text()), signal.SIGTERM)
        time.sleep(1)  # they write their state
        shutil.rmtree(folder, ignore_errors=True)
        patch.undo()


class Job:
    """A job of two nodes with two ranks each, in a folder as the repository's root looks."""

    def __init__(self, home: Path, *overrides: str, **variables: str) -> None:
        home.mkdir(exist_ok=True)
        if not (home / "launch").exists():
            (home / "launch").symlink_to(ROOT / "launch")
        self.home = home
        given = {"PYTHONPATH": str(ROOT), "NPROC": "2"} | variables
        export = "--export=ALL," + ",".join(f"{k}={v}" for k, v in given.items())
        script = home / "launch/slurm/train.sbatch"
        flags = ["--parsable", "--exclusive", f"--chdir={home}", export]
        self.id = output_of("sbatch", *flags, script, *OPTIONS, *overrides).strip()

    @property
    def state(self) -> str:
        [state] = re.findall(r"JobState=(\w+)", output_of("scontrol", "show", "job", "-o", self.id))
        return state

    @property
    def output(self) -> str:
        file = self.home / f"deepfm-{self.id}.out"
        return file.read_text() if file.exists() else ""

    def wait_for_checkpoint(self, after: int = 0) -> int:
        """Step of the first checkpoint beyond a step."""
        run = self.home / "runs/sample"
        over = ("FAILED", "COMPLETED", "TIMEOUT")
        wait_until(
            lambda: complete_steps(run)[-1:] > [after] or self.state in over, 90, "checkpoint"
        )
        assert self.state == "RUNNING", self.output
        return complete_steps(run)[-1]

    def wait(self) -> str:
        running = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED")
        wait_until(lambda: self.state not in running, 200, f"end of job {self.id}, {self.state}")
        return self.state

    def start_now(self) -> None:
        """Spares a requeued job the two minutes for which Slurm holds it back."""
        wait_until(lambda: self.state == "PENDING", 60, "requeue")

        def begun() -> bool:  # Slurm reports it once and may hold the job back after that
            update = ["scontrol", "update", f"JobId={self.id}", "StartTime=now"]
            subprocess.run(update, capture_output=True, check=False)
            return self.state == "RUNNING"

        wait_until(begun, 60, "start")

    def worker(self, rank: int) -> int:
        """Process id of a rank."""
        wanted = {f"SLURM_JOB_ID={self.id}", f"RANK={rank}"}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if wanted <= {*(process / "environ").read_text().split("\0")}:
                    return int(process.name)
            except OSError:
                continue
        raise AssertionError(f"job {self.id} has no rank {rank}")


@pytest.fixture(scope="module")
def one_machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same four ranks without Slurm."""
    home = tmp_path_factory.mktemp("one_machine")
    environment = os.environ | {"NPROC": "4", "PYTHONPATH": str(ROOT)}
    script = ROOT / "launch/run_train.sh"
    subprocess.run([script, *OPTIONS], cwd=home, env=environment, check=True)
    return home


def test_a_job_ends_with_what_one_machine_gives(one_machine: Path, tmp_path: Path) -> None:
    job = Job(tmp_path)
    assert job.wait() == "COMPLETED", job.output
    assert "sharding plan on 4 x cpu" in job.output
    assert lines(tmp_path) == lines(one_machine)


def test_a_killed_rank_starts_again_inside_its_job(one_machine: Path, tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.wait_for_checkpoint()
    os.kill(job.worker(3), signal.SIGKILL)
    assert job.wait() == "COMPLETED", job.output
    assert job.output.count("resuming training after step") == 1, job.output
    assert "Restarts=0" in output_of("scontrol", "show", "job", "-o", job.id)
    assert lines(tmp_path) == lines(one_machine)


def test_a_requeued_job_resumes(one_machine: Path, tmp_path: Path) -> None:
    job = Job(tmp_path)
    # The signal before the time limit, then the administrator's command.
    job.wait_for_checkpoint()
    output_of("scancel", "--signal=USR1", "--batch", job.id)
    went_on = "resuming training after step"
    job.start_now()
    wait_until(lambda: went_on in job.output, 90, "requeue")
    assert "Stopped by signal" in job.output.split(went_on)[0]
    job.wait_for_checkpoint(complete_steps(tmp_path / "runs/sample")[-1])
    output_of("scontrol", "requeue", job.id)
    job.start_now()
    assert job.wait() == "COMPLETED", job.output
    assert job.output.count(went_on) == 2, job.output
    assert "Restarts=2" in output_of("scontrol", "show", "job", "-o", job.id)
    ours, theirs = ([e for e in lines(h) if e["event"] == "valid"] for h in (tmp_path, one_machine))
    assert ours == theirs  # a stop also ends a window of training figures


def test_a_failing_job_is_reported_failed(tmp_path: Path) -> None:
    job = Job(tmp_path, "trainer.max_steps=soon")
    assert job.wait() == "FAILED"
    assert "trainer.max_steps: input should be a valid integer" in job.output
    assert "ExitCode=0:0" not in output_of("scontrol", "show", "job", "-o", job.id)
