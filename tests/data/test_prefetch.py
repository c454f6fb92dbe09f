"""Batches made ahead are the same, in the same order; what fails, fails at its own step."""

import threading
import time
from itertools import islice

import pytest
import torch

from deepfm_dist.data.batches.row_batches import TrainingBatches
from deepfm_dist.data.batches.user_batches import Candidates, UserBatches
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.prefetch import read_ahead
from deepfm_dist.training.trainer import Batches


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize(("first", "last"), [(1, 7), (5, 5), (4, 3)])
def test_steps_come_in_order(threads: int, first: int, last: int) -> None:
    def make(step: int) -> int:
        time.sleep(0.002 * (step % 3))  # a later one may be done first
        return step * step

    made = list(read_ahead(make, first, last, threads))
    assert made == [step * step for step in range(first, last + 1)]


def test_as_many_are_made_at_once_as_there_are_threads() -> None:
    meeting = threading.Barrier(3)

    def make(step: int) -> int:
        meeting.wait(timeout=30)  # breaks unless three come at the same time
        return step

    assert list(read_ahead(make, 1, 9, 3)) == list(range(1, 10))


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_what_fails_fails_at_its_own_step(threads: int) -> None:
    def make(step: int) -> int:
        if step >= 4:
            raise ValueError(f"step {step}")
        return step

    seen = []
    with pytest.raises(ValueError, match="step 4"):
        for step in read_ahead(make, 1, 9, threads):
            seen.append(step)
    assert seen == [1, 2, 3]


def test_threads_end_when_the_consumer_stops() -> None:
    made: list[int] = []

    def make(step: int) -> int:
        time.sleep(0.01)
        made.append(step)
        return step

    steps = read_ahead(make, 1, 1000, 2)
    assert list(islice(steps, 3)) == [1, 2, 3]
    steps.close()  # type: ignore[attr-defined]
    after = list(made)
    time.sleep(0.1)
    assert made == after and max(made) <= 6
    assert not [t for t in threading.enumerate() if t.name.startswith("read_ahead")]


@pytest.mark.parametrize("kind", ["in memory", "streamed", "users"])
def test_a_run_reads_the_same_ahead(sample: PreparedDataset, kind: str) -> None:
    def batches(threads: int) -> Batches:
        if kind == "users":
            return UserBatches(sample, 64, 0, 1, 5, Candidates(), threads)
        dataset = PreparedDataset(sample.folder, 0 if kind == "streamed" else None)
        return TrainingBatches(dataset, 5000, 0, 1, 5, threads)

    alone, ahead = batches(0), batches(4)
    assert ahead.threads == (1 if kind == "streamed" else 4)  # lanes are read in order
    last = alone.steps_per_epoch + 2
    begin = max(1, last - 20)  # over the end of an epoch
    for expected, actual in zip(alone.steps(begin, last), ahead.steps(begin, last), strict=True):
        assert torch.equal(expected.sparse.values(), actual.sparse.values())
        assert torch.equal(expected.sparse.lengths(), actual.sparse.lengths())
        if kind != "users":
            assert torch.equal(expected.labels, actual.labels)
