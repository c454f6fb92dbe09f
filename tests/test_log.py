"""A run's logs: JSON Lines, TensorBoard and the user's own listeners."""

import json
import logging
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deepfm_dist.build import loggers
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.errors import ConfigError, DeepFMError
from deepfm_dist.events import (
    EndEvent,
    EvaluateEvent,
    RecommendEvent,
    TrainEvent,
    ValidEvent,
    last,
    read_events,
)
from deepfm_dist.log import MetricsLog, TensorBoard, progress
from tests.ranks import run_ranks
from tests.steps import config_of

heard: list[tuple[str, dict[str, Any]]] = []


def listener(event: str, values: dict[str, Any]) -> None:
    heard.append((event, values))


def read(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(x, parse_constant=refuse) for x in path.read_text().splitlines()]


def test_events_are_lines_of_strict_json(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "run", is_first=True)
    log.write(TrainEvent(step=1, auc=float("nan"), seconds={"data": float("nan"), "forward": 0.5}))
    MetricsLog(tmp_path / "run", is_first=True).write(EndEvent(step=2))
    assert read(log.path) == [
        {"event": "train", "step": 1, "auc": None, "seconds": {"data": None, "forward": 0.5}},
        {"event": "end", "step": 2},
    ]


def test_a_resumed_run_keeps_the_lines_up_to_its_step_and_a_new_one_none(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, is_first=True, from_step=0)
    for step in (5, 10, 15):
        log.write(TrainEvent(step=step))
    assert [e["step"] for e in read(log.path)] == [5, 10, 15]
    MetricsLog(tmp_path, is_first=True, from_step=10).write(TrainEvent(step=12))
    assert [e["step"] for e in read(log.path)] == [5, 10, 12]
    MetricsLog(tmp_path, is_first=True, from_step=0)
    assert read(log.path) == []


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, is_first=True)
    log.write(TrainEvent(step=5))
    with log.path.open("a") as file:
        file.write('{"event": "train", "st')
    MetricsLog(tmp_path, is_first=True, from_step=9).write(TrainEvent(step=10))
    assert [e["step"] for e in read(log.path)] == [5, 10]


def test_only_the_first_rank_writes(tmp_path: Path) -> None:
    MetricsLog(tmp_path / "run", is_first=False, loggers=[listener]).write(TrainEvent(step=1))
    assert not (tmp_path / "run").exists()
    assert not heard


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DeepFMError, match=r"cannot be written: Not a directory; set run\.runs"):
        MetricsLog(tmp_path / "file" / "run", is_first=True)


def test_a_closed_log_has_closed_its_loggers(tmp_path: Path) -> None:
    threads = {*threading.enumerate()}
    board = TensorBoard(tmp_path / "tb")
    board._flushes = False  # as on an object store
    log = MetricsLog(tmp_path, is_first=True, loggers=[listener, board])
    log.write(TrainEvent(step=1, log_loss=0.5))
    assert {*threading.enumerate()} > threads
    log.close()
    heard.clear()
    assert {*threading.enumerate()} == threads
    actual = EventAccumulator(str(tmp_path / "tb"))
    actual.Reload()
    assert actual.Tags()["scalars"] == ["train/log_loss"]


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, is_first=True)
    log.path.unlink()
    log.path.symlink_to("/dev/full")
    with pytest.raises(DeepFMError, match=r"cannot be written: No space left on device; set run\."):
        log.write(TrainEvent(step=1))


def test_tensorboard_gets_every_number_of_a_step(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, is_first=True, loggers=[TensorBoard(tmp_path / "tb")])
    for step in (1, 2):
        log.write(TrainEvent(step=step, log_loss=0.5 / step, seconds={"data": 1.0}))
    log.write(EvaluateEvent(split="test", rows={"auc": 0.5}))
    actual = EventAccumulator(str(tmp_path / "tb"))
    actual.Reload()
    assert actual.Tags()["scalars"] == ["train/log_loss"]
    assert [(e.step, e.value) for e in actual.Scalars("train/log_loss")] == [(1, 0.5), (2, 0.25)]


def _listeners(root: Path, names: str) -> list[str]:
    with process_group("cpu") as world:
        actual = loggers(config_of(f"run.runs_root={root}", f"run.loggers={names}"), world, 0)
        return [getattr(logger, "__name__", type(logger).__name__) for logger in actual]


def test_listeners_are_found_by_import_path_on_rank_zero(tmp_path: Path) -> None:
    names = "[tensorboard, 'tests.test_log:listener']"
    assert run_ranks(_listeners, 2, tmp_path, names) == [["TensorBoard", "listener"], []]


def _unknown(root: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        _listeners(root, "['tests.test_log:nobody']")
    return str(caught.value)


def test_a_listener_that_is_not_there_is_refused(tmp_path: Path) -> None:
    [message] = run_ranks(_unknown, 1, tmp_path)
    assert message.startswith("run.loggers=tests.test_log:nobody: AttributeError: module 'tests.")
    assert message.endswith("; give tensorboard or package.module:function")


def test_a_line_cut_short_breaks_no_later_reader(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, is_first=True)
    log.write(TrainEvent(step=5))
    with log.path.open("a") as file:
        file.write('{"event": "tr\n{"event": "train", "st')
    MetricsLog(tmp_path, is_first=True).write(
        EvaluateEvent(split="test", rows={"auc": 0.5})
    )  # as evaluate goes on
    assert [e["event"] for e in read(log.path)] == ["train", "evaluate"]


def _fails(event: str, values: Mapping[str, Any]) -> None:
    raise ConnectionError("the server\nis away")


def test_a_listener_that_fails_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    heard.clear()
    log = MetricsLog(tmp_path, is_first=True, loggers=[_fails, listener])
    for step in (1, 2):
        log.write(TrainEvent(step=step))
    assert len(heard) == len(read(log.path)) == 2
    messages = [r.getMessage() for r in caplog.records]
    assert messages == ["run.loggers: _fails failed and is not called again: the server is away"]


@pytest.mark.parametrize(("from_step", "shown"), [(0, [(1, 9.0)]), (1, [(1, 1.0), (2, 9.0)])])
def test_tensorboard_shows_one_run(
    tmp_path: Path, from_step: int, shown: list[tuple[int, float]]
) -> None:
    first = TensorBoard(tmp_path)
    for step in (1, 2, 3):
        first("train", {"step": step, "loss": 1.0})
    first.close()
    again = TensorBoard(tmp_path, from_step)
    again("train", {"step": from_step + 1, "loss": 9.0})
    again.close()
    actual = EventAccumulator(str(tmp_path))
    actual.Reload()
    assert [(e.step, e.value) for e in actual.Scalars("train/loss")] == shown


def test_written_values_are_read_back_unchanged(tmp_path: Path) -> None:
    """Every kind of event, its figures included, and a number that JSON does not know."""
    written = [
        TrainEvent(step=1, rows_per_s=9, seconds={"data": 0.5}, sent_bytes={"ids": 8}, auc=0.75),
        ValidEvent(step=1, epoch=1, **{"ndcg@10": 0.25}),
        EndEvent(step=1, peak_memory_gib=[0.5, 0.25]),
        EvaluateEvent(
            step=1,
            split="valid",
            rows={"auc": 0.75},
            figures={"model": {"ndcg@10": 0.25}},
            intervals={"model": {"ndcg@10": (0.125, 0.375)}},
            differences={},
        ),
        RecommendEvent(step=1, peak_memory_gib=[0.5], pairs=6, seconds=2.0, pairs_per_s=3.0),
    ]
    log = MetricsLog(tmp_path, is_first=True)
    for event in written:
        log.write(event)
    assert read_events(log.path) == written
    log.write(TrainEvent(step=2, auc=float("nan")))
    latest = last(read_events(log.path), TrainEvent)
    assert latest is not None and latest.step == 2 and latest.figures == {"auc": None}
    assert last(read_events(tmp_path / "none.jsonl"), TrainEvent) is None


@pytest.mark.parametrize(
    "line",
    [
        b'{"event": "train", "step": 3, "auc": 0.5\xff}',
        b'{"event": "train", "st',
        b'{"event": "of another version", "step": 3}',
        b'{"event": "train", "step": "three"}',
        b'["no event"]',
        b"\x00\x00\x00",
    ],
)
def test_damaged_lines_are_skipped_and_counted(
    tmp_path: Path, line: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    first, third = (TrainEvent(step=step).line().encode() for step in (1, 3))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(first + line + b"\n" + third)
    actual = read_events(path)
    assert [e.step for e in actual if isinstance(e, TrainEvent)] == [1, 3]
    [said] = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{path}: 1 of 3 lines skipped: damaged, or of another version")


@pytest.mark.parametrize(("kernel", "shown"), [(object(), True), (None, False)])
def test_progress_shows_in_notebooks(
    monkeypatch: pytest.MonkeyPatch, kernel: object, shown: bool
) -> None:
    shell = SimpleNamespace(kernel=kernel)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    for is_first in (True, False):
        with progress(3, "train", "step", is_first) as bar:
            assert bar.disable is not (shown and is_first)


def test_a_bar_within_another_takes_its_line_in_notebooks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    with progress(2, "train", "step", True) as outer:
        outer.update(1)
        with progress(2, "score", "block", True) as inner:
            inner.update(2)
        outer.refresh()
    shown = capsys.readouterr().err
    assert "train:   0%" in shown and "score:   0%" in shown and "train:  50%" in shown
    assert "\n" not in shown and "\x1b[A" not in shown  # which notebooks show as lines


def test_bars_of_several_threads_restore_the_log() -> None:
    before = logging.getLogger().handlers[:]
    both_inside = threading.Barrier(2)
    first_out = threading.Event()

    def work(is_first: bool) -> None:
        with progress(10, "read", "row", is_first):
            both_inside.wait(10)
            if not is_first:  # leaves last, and would put back what it met
                first_out.wait(10)
        if is_first:
            first_out.set()

    threads = [threading.Thread(target=work, args=(is_first,)) for is_first in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert logging.getLogger().handlers == before
