"""A process that waits inside a C call for a rank that is gone, as behind one of NCCL's kernels."""

import ctypes
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from threading import Timer
from typing import Any

import pytest
import torch.distributed as dist
from torchrec.distributed import comm

from deepfm_dist.distributed import heartbeat
from deepfm_dist.distributed import process_group as world_module
from deepfm_dist.distributed.heartbeat import Watch
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.training.stopping import StopSignals
from tests.ranks import RankFailed, run_ranks


@contextmanager
def watched(timeout_s: float) -> Iterator[Watch]:
    heartbeat._ANSWER_S = 0.5
    with process_group("cpu", timeout_s) as world:
        store = world.store.clone()  # type: ignore[attr-defined]
        with StopSignals(), Watch(store, world.rank, world.world_size, timeout_s) as actual:
            yield actual


def stuck(for_s: float) -> None:
    """A call that comes back when it is done and no earlier, whatever signal arrives."""
    library = ctypes.CDLL(None)
    lock = ctypes.create_string_buffer(64)
    library.pthread_mutex_init(lock, None)
    library.pthread_mutex_lock(lock)
    Timer(for_s, lambda: library.pthread_mutex_unlock(lock)).start()
    library.pthread_mutex_lock(lock)


def _one_is_killed() -> None:
    with watched(60) as actual:
        if dist.get_rank() == 1:
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        # As torchrun does for those that are left.
        Timer(0.6, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
        with actual.waiting():
            stuck(20)


def _one_hangs() -> None:
    with watched(2) as actual:
        if dist.get_rank() == 0:
            time.sleep(20)
        with actual.waiting():
            stuck(20)


@pytest.mark.parametrize(
    ("work", "lost"), [(_one_is_killed, "rank 1 of 3"), (_one_hangs, "rank 0 of 3")]
)
def test_a_rank_that_is_lost_while_the_others_are_stuck_is_named_once(
    capfd: pytest.CaptureFixture[str], work: object, lost: str
) -> None:
    begun = time.monotonic()
    with pytest.raises(RankFailed):
        run_ranks(work, 3, timeout_s=15)  # type: ignore[arg-type]
    assert time.monotonic() - begun < 12
    said = capfd.readouterr().err
    assert said.count(f"RankLost: {lost} did not answer: killed, or hanging for run.timeout") == 1
    assert said.count("RankLost") == 1


def _told_to_stop() -> bool:
    """All ranks get the signal that asks for a checkpoint, in the middle of a long step."""
    with watched(60) as actual, StopSignals() as asked:
        Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
        with actual.waiting():
            stuck(3)
        time.sleep(0.1)
        return asked()


def _one_is_told() -> bool:
    """A signal to one rank alone, whose step goes on."""
    with watched(60) as actual, StopSignals() as asked:
        if dist.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(20):
            with actual.waiting():
                stuck(0.05)
        return asked()


def test_a_signal_ends_no_rank_while_all_are_alive() -> None:
    assert run_ranks(_told_to_stop, 2) == [True, True]
    assert run_ranks(_one_is_told, 2) == [True, False]


def test_a_group_with_outstanding_collectives_is_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("_abort_process_group", "destroy_process_group"):
        monkeypatch.setattr(dist.distributed_c10d, name, lambda name=name: calls.append(name))
        monkeypatch.setattr(dist, name, lambda name=name: calls.append(name), raising=False)
    for abort in (True, False):
        monkeypatch.setattr(comm, "_INTRA_PG", "of the ranks of this machine")
        monkeypatch.setattr(comm, "_CROSS_PG", "of a rank of each machine")
        world_module._leave(abort=abort)
        assert comm._INTRA_PG is comm._CROSS_PG is None
    assert calls == ["_abort_process_group", "destroy_process_group"]


def _watched_calls() -> list[bool]:
    """Whether the watch looks on while ranks wait for each other, and after."""
    with process_group("cpu") as world:
        actual = Watch(world.store.clone(), world.rank, world.world_size, 60)  # type: ignore[attr-defined]
        world, seen = replace(world, watch=actual), []
        for name in ("broadcast_object_list", "all_gather_object", "gather_object", "barrier"):
            exchange = getattr(dist, name)

            def looked_at(*arguments: Any, exchange: Any = exchange) -> None:
                with actual.waiting():  # as the host does in a caller
                    exchange(*arguments)
                seen.append(actual._since is not None)

            setattr(dist, name, looked_at)
        world.broadcast(1)
        world.all_gather_object(2)
        world.gather_object(3)
        world.barrier()

        class OnDevice:
            def cpu(self) -> None:
                seen.append(actual._since is not None)

        world.to_host(OnDevice())  # type: ignore[arg-type]
        return [*seen, actual._since is None]


def test_exchanges_of_validation_and_saving_are_watched() -> None:
    assert run_ranks(_watched_calls, 2) == [[True] * 6] * 2
