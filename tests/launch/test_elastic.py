"""Two machines, played by two network namespaces: one is cut off in the middle of a run."""

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from deepfm_dist.distributed.checkpoint import complete_steps
from tests.metrics_lines import lines

pytestmark = [pytest.mark.launch, pytest.mark.slow]  # every start imports torch on two machines

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch/run_train.sh"
TIMEOUT_S = 10
EVERY_STEPS = 10
OPTIONS = (
    "trainer={max_steps: 100, batch_size: 4096, log_every_steps: 1, validate_every_epochs: 1}",
    f"checkpoint={{every_steps: {EVERY_STEPS}, keep_last: 3}}",
    f"run={{name: sample, timeout_s: {TIMEOUT_S}, loggers: ['tests.launch.test_elastic:pace']}}",
)
LOST = f"RankLost: rank {{}} of 2 did not answer: killed, or hanging for run.timeout_s={TIMEOUT_S}"


def pace(event: str, values: Mapping[str, Any]) -> None:
    """Slows rank 0 down where a test asks for it; alone, it waits while there is a file `hold`."""
    if event != "train" or "DEEPFM_PACE_S" not in os.environ:
        return
    time.sleep(float(os.environ["DEEPFM_PACE_S"]))
    while os.environ["WORLD_SIZE"] == "1" and Path("hold").exists():
        time.sleep(0.05)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def wait_until(holds: Callable[[], object], seconds: float, what: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what()}"
        time.sleep(0.05)


class Machine:
    """A network namespace with one address, and what torchrun says in it.

    Args:
        number: from 0; machine 0 holds the rendezvous.
        home: the disk that both see.
    """

    def __init__(self, number: int, home: Path) -> None:
        self.space, self.number, self.home = f"deepfm{os.getpid()}n{number}", number, home
        self.link, self.address = f"veth{number}", f"10.231.7.{number + 1}"
        self.output = ""
        ip("netns", "add", self.space)

    def connect(self) -> None:
        """Gives the link its address."""
        ip("-n", self.space, "addr", "add", f"{self.address}/24", "dev", self.link)
        ip("-n", self.space, "link", "set", "lo", "up")
        self.plug("up")

    def plug(self, state: str) -> None:
        """Turns the link up or down."""
        ip("-n", self.space, "link", "set", self.link, state)

    def start(self, command: list[str], **variables: str) -> None:
        """Starts a command."""
        self.output = ""
        given = {"GLOO_SOCKET_IFNAME": self.link, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", self.space, *command],
            cwd=self.home,
            env=os.environ | given | path | variables,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        threading.Thread(target=self._read, args=(self.process,), daemon=True).start()

    def _read(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.output += line

    def train(self) -> None:
        """Starts its part of an elastic run."""
        self.start(
            [str(SCRIPT), *OPTIONS],
            NPROC="1",
            NNODES="1:2",
            NODE_RANK=str(self.number),
            MASTER_ADDR="10.231.7.1",
            LOCAL_ADDR=self.address,
            MAX_RESTARTS="3",
            DEEPFM_PACE_S="0.05",
            LOGLEVEL="INFO",  # torchrun's own, for `said`
        )

    def said(self, text: str) -> bool:
        return text in self.output

    def destroy(self) -> None:
        """Ends what still runs there."""
        for pid in subprocess.run(
            ["ip", "netns", "pids", self.space], capture_output=True, text=True, check=False
        ).stdout.split():
            os.kill(int(pid), 9)
        ip("netns", "del", self.space)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[tuple[Machine, Machine]]:
    """Two machines that reach each other."""
    if shutil.which("ip") is None or os.getuid() != 0:
        pytest.skip("no network namespaces: needs root and iproute2")
    try:
        first = Machine(0, tmp_path)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces: {error.stderr.strip()}")
    second = Machine(1, tmp_path)
    try:
        ends = ["peer", "name", second.link, "netns", second.space]
        ip("-n", first.space, "link", "add", first.link, "type", "veth", *ends)
        first.connect()
        second.connect()
        yield first, second
    finally:
        first.destroy()
        second.destroy()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Figures of the same run on one machine."""
    home = tmp_path_factory.mktemp("undisturbed")
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment = os.environ | {"NPROC": "2", "PYTHONPATH": str(ROOT)} | path
    subprocess.run([SCRIPT, *OPTIONS], cwd=home, env=environment, check=True)
    return lines(home)


def difference(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> float:
    """Largest relative difference of figures; everything else must agree."""
    largest = 0.0
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            if isinstance(value, float):
                largest = max(largest, abs(value - theirs[name]) / max(abs(theirs[name]), 1e-9))
            else:
                assert value == theirs[name]
    return largest


def test_a_run_continues_without_a_machine_and_grows_when_it_returns(
    machines: tuple[Machine, Machine], undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    first, second = machines
    run, hold = tmp_path / "runs/sample", tmp_path / "hold"
    hold.touch()
    first.train()
    second.train()
    wait_until(lambda: complete_steps(run), 120, lambda: first.output)
    assert first.said("sharding plan on 2 x cpu")
    second.plug("down")
    cut, at_step = time.monotonic(), complete_steps(run)[-1]
    wait_until(lambda: first.said(LOST.format(1)), 60, lambda: first.output)
    wait_until(lambda: second.said(LOST.format(0)), 60, lambda: second.output)
    print(f"missed after {time.monotonic() - cut:.0f} s")

    went_on = "resuming training after step"
    wait_until(lambda: first.said("sharding plan on 1 x cpu"), 120, lambda: first.output)
    wait_until(lambda: first.said(went_on), 60, lambda: first.output)
    print(f"on one machine after {time.monotonic() - cut:.0f} s")
    [resumed] = re.findall(rf"{went_on} (\d+)", first.output)
    assert int(resumed) >= at_step

    second.plug("up")  # its torchrun starts its rank again as soon as packets get through
    wait_until(lambda: first.said("new nodes from group_rank"), 150, lambda: first.output)
    print(f"back after {time.monotonic() - cut:.0f} s")
    hold.unlink()
    wait_until(lambda: first.process.poll() is not None, 180, lambda: first.output)
    assert first.process.returncode == 0, first.output
    assert second.process.wait(30) == 0, second.output
    assert first.output.count("sharding plan on 2 x cpu") == 2
    joined = re.findall(rf"{went_on} (\d+)", first.output)[1]
    assert first.said(f"Stopped by signal at step {joined};")  # nothing was lost by growing
    of_training = [e for e in lines(tmp_path) if e["event"] != "end"]
    assert difference(of_training, [e for e in undisturbed if e["event"] != "end"]) <= 1e-5


def test_without_the_machine_of_the_rendezvous_the_other_one_ends(
    machines: tuple[Machine, Machine], tmp_path: Path
) -> None:
    first, second = machines
    first.train()
    second.train()
    wait_until(lambda: complete_steps(tmp_path / "runs/sample"), 120, lambda: first.output)
    first.plug("down")
    cut = time.monotonic()
    lost = LOST.format(0)
    # The exchange's time, then the roll call's.
    wait_until(lambda: second.said(lost), 2 * TIMEOUT_S + 15, lambda: second.output)
    print(f"missed after {time.monotonic() - cut:.0f} s")
    # torchrun, whose store is gone as well, waits until TCP gives the connection up.
    ip("netns", "exec", second.space, "sysctl", "-w", "net.ipv4.tcp_retries2=5")
    wait_until(lambda: second.process.poll() is not None, 120, lambda: second.output)
    print(f"ended after {time.monotonic() - cut:.0f} s")
    assert second.process.returncode == 1
    said = "The connection to the C10d store has failed"
    wait_until(lambda: second.said(said), 10, lambda: second.output)
    assert second.output.count(lost) == 1
