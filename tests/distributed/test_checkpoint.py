"""Checkpoints: whole or not there, exact, and readable at any world size and plan."""

import json
import logging
import os
import resource
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.staging import StagingOptions
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from deepfm_dist.build import deepfm_of, shard_for_inference, shard_for_training, weight_transfer
from deepfm_dist.config import Config
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.distributed import checkpoint
from deepfm_dist.distributed.checkpoint import Staging, _optimizer_state
from deepfm_dist.distributed.heartbeat import Watch, in_background
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.distributed.sharding import fused_kernels, local_shards
from deepfm_dist.errors import CheckpointError
from tests.conftest import HISTORY
from tests.distributed.checkpoints import resumed, saved_tables, trained_through
from tests.ranks import RankFailed, run_alone, run_ranks
from tests.steps import COPIES, SMALL, Run, config_of, difference

OPTIMIZERS = ["rowwise_adagrad", "adagrad", "sgd", "adam"]


def _loaded(folder: Path, config: Config, path: Path) -> list[tuple[str, slice, np.ndarray]]:
    with process_group("cpu") as world:
        sharded = shard_for_inference(config, PreparedDataset(folder).manifest, world)
        checkpoint.load(path, world, sharded)
        return [(t, rows, piece.numpy().copy()) for t, rows, _, piece in local_shards(sharded)]


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "sgd", "adam"])
def test_weights_are_read_at_any_world_size_and_plan(
    sample: PreparedDataset, tmp_path: Path, optimizer: str
) -> None:
    saving = config_of(*SMALL, f"optimizer.tables.name={optimizer}", "sharding.kind=row_wise")
    whole = {t: np.zeros((s.rows, 12), np.float32) for t, s in sample.manifest.tables.items()}
    for pieces in run_ranks(saved_tables, 4, sample.folder, saving, tmp_path):
        for table, rows, piece in pieces:
            whole[table][rows] = piece
    path = checkpoint.find_checkpoint(tmp_path)
    assert checkpoint.read_state(path)["step"] == 3
    for size, kind in [(1, "table_wise"), (2, "table_wise"), (4, "row_wise")]:
        config = config_of(*SMALL, f"sharding.kind={kind}")
        for pieces in run_ranks(_loaded, size, sample.folder, config, path):
            for table, rows, piece in pieces:
                np.testing.assert_array_equal(piece, whole[table][rows])


def _placed(kind: str) -> str:
    return COPIES if kind == "replicated" else f"sharding.kind={kind}"


@pytest.mark.parametrize("kind", ["table_wise", "row_wise", "replicated"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_four_ranks_save_the_optimizer_state_of_one(
    sample: PreparedDataset, tmp_path: Path, optimizer: str, kind: str
) -> None:
    config = config_of(*SMALL, f"optimizer.tables.name={optimizer}", _placed(kind))
    states = []
    for size in (1, 4):
        run_ranks(saved_tables, size, sample.folder, config, tmp_path / str(size))
        path = checkpoint.find_checkpoint(tmp_path / str(size))
        dcp_to_torch_save(path, tmp_path / "whole.pt")
        states.append(torch.load(tmp_path / "whole.pt")["optimizer"])
    alone, sharded = states
    assert {k: v.keys() for k, v in alone.items()} == {k: v.keys() for k, v in sharded.items()}
    table_config = [name for name in alone if ".ebc." in name]
    assert len(table_config) == (0 if optimizer == "sgd" else 3)
    for name in alone:
        for key, value in alone[name].items():
            torch.testing.assert_close(sharded[name][key], value, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("optimizer", "kinds"),
    [
        ("rowwise_adagrad", ("table_wise", "row_wise")),
        ("rowwise_adagrad", ("row_wise", "table_wise")),
        ("adam", ("row_wise", "table_wise")),
        ("rowwise_adagrad", ("replicated", "row_wise")),
        ("rowwise_adagrad", ("table_wise", "replicated")),
        ("adam", ("replicated", "table_wise")),
        ("adam", ("row_wise", "replicated")),
        pytest.param("sgd", ("row_wise", "table_wise"), marks=pytest.mark.slow),
        pytest.param("adagrad", ("row_wise", "table_wise"), marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_is_exact_at_any_world_size(
    sample: PreparedDataset, tmp_path: Path, optimizer: str, kinds: tuple[str, str]
) -> None:
    lr = 0.003 if optimizer == "adam" else 0.05
    common = (*SMALL, f"optimizer.tables={{name: {optimizer}, lr: {lr}}}")
    before, after = (config_of(*common, _placed(kind)) for kind in kinds)
    whole = run_ranks(trained_through, 4, sample.folder, before, tmp_path)[0][20:]
    assert run_ranks(resumed, 4, sample.folder, before, tmp_path)[0] == whole
    for size in (1, 2, 4):
        losses = run_ranks(resumed, size, sample.folder, after, tmp_path)[0]
        assert difference(losses, whole) <= 1e-6, size


def test_a_run_on_streamed_rows_resumes_exactly(sample: PreparedDataset, tmp_path: Path) -> None:
    config = config_of(*SMALL, "data.memory_bytes=0")
    whole = run_ranks(trained_through, 2, sample.folder, config, tmp_path)[0][20:]
    assert run_ranks(resumed, 2, sample.folder, config, tmp_path)[0] == whole


def test_a_resumed_run_with_batch_norm_is_exact(sample: PreparedDataset, tmp_path: Path) -> None:
    config = config_of(*SMALL, "sharding.kind=row_wise", "model.batch_norm=true")
    whole = run_ranks(trained_through, 2, sample.folder, config, tmp_path)[0][20:]
    assert run_ranks(resumed, 2, sample.folder, config, tmp_path)[0] == whole


def _with_biases_before_norm(folder: Path, config: Config, run_dir: Path) -> np.ndarray:
    """Saves what earlier versions had, biases in front of batch norm; logits of a batch."""
    with process_group("cpu") as world:
        run = Run(folder, config, world)
        run.losses(1, 3)
        over_arch = deepfm_of(run.sharded).interaction_arch.over_arch
        for i, linear in enumerate(over_arch.hidden):
            generator = torch.Generator().manual_seed(i)
            bias = torch.rand(linear.out_features, generator=generator) - 0.5
            linear.bias = torch.nn.Parameter(bias)
            over_arch.norms[i].running_mean += torch.rand(len(bias), generator=generator)
        run.save(run_dir, 3)
        return run.sharded.eval()(run.batches.batch(4))[1].numpy()


def _logits(folder: Path, config: Config, run_dir: Path) -> np.ndarray:
    with process_group("cpu") as world:
        run = Run(folder, config, world)
        path = checkpoint.find_checkpoint(run_dir)
        checkpoint.load(path, world, run.sharded, run.optimizer)
        logits = run.sharded.eval()(run.batches.batch(4))[1]
        return np.concatenate(world.all_gather_object(logits.numpy()))


def test_a_checkpoint_with_biases_before_batch_norm_keeps_its_logits(
    sample: PreparedDataset, tmp_path: Path
) -> None:
    config = config_of(*SMALL, "model.batch_norm=true", "trainer.batch_size=1000")
    expected = run_alone(_with_biases_before_norm, sample.folder, config, tmp_path)
    for size in (1, 2):
        actual = run_ranks(_logits, size, sample.folder, config, tmp_path)[0]
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [["model.deep=false"], ["trainer.candidates=70"]])
def test_training_on_users_resumes_exactly(
    with_history: PreparedDataset, tmp_path: Path, options: list[str]
) -> None:
    of_users = (*HISTORY, "trainer.loss=softmax", "trainer.batch_size=61")
    config = config_of(*SMALL, *of_users, "optimizer.tables={name: adam, lr: 0.003}", *options)
    for size in (1, 2):
        run_dir = tmp_path / str(size)
        whole = run_ranks(trained_through, size, with_history.folder, config, run_dir)[0][20:]
        assert run_ranks(resumed, size, with_history.folder, config, run_dir)[0] == whole


def _grown(folder: Path, config: Config, run_dir: Path | None, more: int) -> dict[str, Any]:
    """Whole tables and row-wise accumulators of a model whose tables have ``more`` rows."""
    with process_group("cpu") as world:
        manifest = PreparedDataset(folder).manifest
        tables = {
            name: spec.model_copy(update={"rows": spec.rows + more})
            for name, spec in manifest.tables.items()
        }
        sharded, optimizer = shard_for_training(
            config, manifest.model_copy(update={"tables": tables}), world
        )
        if run_dir is not None:
            path = checkpoint.find_checkpoint(run_dir)
            transfer = weight_transfer(config.data, manifest, config.model)
            checkpoint.load(path, world, sharded, optimizer, transfer)
        state = {f"t.{name}": value for name, value in sharded.state_dict().items()}
        for name, values in optimizer.state_dict()["state"].items():
            state |= {f"o.{name}.{key}": value for key, value in values.items()}
        return {
            name: [
                (o[0], p.numpy().copy())
                for p, o in zip(w.local_shards(), w.local_offsets(), strict=False)
            ]
            for name, value in state.items()
            if ".ebc." in name
            for w in [value.to_local()]
        }


def _whole(of_ranks: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    pieces: dict[str, list[tuple[int, np.ndarray]]] = {}
    for of_rank in of_ranks:
        for name, actual in of_rank.items():
            pieces.setdefault(name, []).extend(actual)
    return {
        name: np.concatenate([p for _, p in sorted(actual, key=lambda x: x[0])])
        for name, actual in pieces.items()
    }


@pytest.mark.parametrize("kind", ["table_wise", "row_wise"])
def test_larger_tables_keep_saved_rows_and_initialise_new_ones(
    sample: PreparedDataset, tmp_path: Path, kind: str
) -> None:
    saving = config_of(*SMALL, "sharding.kind=row_wise")
    run_ranks(saved_tables, 2, sample.folder, saving, tmp_path)
    config = config_of(*SMALL, f"sharding.kind={kind}")
    for size, more in ((1, 7), (2, 7), (4, 900)):
        saved = _whole(run_ranks(_grown, 1, sample.folder, config, tmp_path, 0))
        fresh = _whole(run_ranks(_grown, size, sample.folder, config, None, more))
        grown = _whole(run_ranks(_grown, size, sample.folder, config, tmp_path, more))
        assert grown.keys() == saved.keys()
        assert any(name.startswith("o.") for name in grown)
        for name, values in grown.items():
            rows = len(saved[name])
            assert len(values) == rows + more
            np.testing.assert_array_equal(values[:rows], saved[name])
            np.testing.assert_array_equal(values[rows:], fresh[name][rows:])


def _moved_by_make_state(folder: Path, config: Config) -> tuple[list[str], set[float]]:
    """Weights that differ afterwards, and the learning rates of all but fused tables."""
    with process_group("cpu") as world:
        run = Run(folder, config, world)
        before = {name: p.detach().clone() for name, p in run.sharded.named_parameters()}
        checkpoint.make_state(run.optimizer)
        assert run.optimizer.state_dict()["state"]
        after = run.sharded.named_parameters()
        rates = {group["lr"] for group in run.optimizer.param_groups}
        return [name for name, p in after if not p.equal(before[name])], rates


@pytest.mark.parametrize("dense", ["adam", "sgd"])
def test_making_the_state_of_an_optimizer_with_l2_moves_no_weight(
    sample: PreparedDataset, dense: str
) -> None:
    tables = "optimizer.tables={name: adam, lr: 0.5, l2: 0.1}"
    config = config_of(*SMALL, tables, f"optimizer.dense={{name: {dense}, lr: 0.25, l2: 0.1}}")
    assert run_alone(_moved_by_make_state, sample.folder, config) == ([], {0.5, 0.25})


def _fake(run_dir: Path, step: int, best_step: int | None = None) -> None:
    path = checkpoint.checkpoint_path(run_dir, step)
    path.mkdir(parents=True)
    config: dict[str, Any] = {"data": {}, "model": {}}
    state = {"step": step, "config": config, "vocabulary_hash": "", "crc32": {}}
    text = json.dumps({**state, "trainer": {"best_step": best_step}})
    (path / checkpoint.MARKER).write_text(text)


def test_a_checkpoint_is_found_by_its_step_or_as_latest_or_best(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no complete checkpoint; run python -m"):
        checkpoint.find_checkpoint(tmp_path)
    for step in (99_999_999, 100_000_000, 5):
        _fake(tmp_path, step)
    assert checkpoint.find_checkpoint(tmp_path).name == "step_100000000"
    assert checkpoint.find_checkpoint(tmp_path, "auto").name == "step_100000000"
    assert checkpoint.find_checkpoint(tmp_path, 5).name == "step_00000005"
    with pytest.raises(CheckpointError, match="of step 7; available: 5, 99999999, 100000000"):
        checkpoint.find_checkpoint(tmp_path, 7)
    with pytest.raises(CheckpointError, match=r"use=best, but no metric was monitored"):
        checkpoint.find_checkpoint(tmp_path, "best")
    _fake(tmp_path, 100_000_001, best_step=5)
    for which in ("best", "auto"):
        assert checkpoint.find_checkpoint(tmp_path, which).name == "step_00000005"
    checkpoint.keep_checkpoints(tmp_path, [5])
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000005"]


def _many_saved(folder: Path, run_dir: Path) -> None:
    with process_group("cpu") as world:
        run = Run(folder, config_of(*SMALL), world)
        checkpoints = checkpoint.Checkpoints(run_dir, world, keep_last=2)
        for step in range(1, 7):
            state = {"config": {"data": {}, "model": {}}, "vocabulary_hash": "", "trainer": {}}
            checkpoints.save(step, run.sharded, run.optimizer, state, keep=[2])
        checkpoints.wait()


def test_the_newest_and_the_best_stay(sample: PreparedDataset, tmp_path: Path) -> None:
    checkpoint.checkpoint_path(tmp_path, 3).mkdir(parents=True)  # what a killed run left
    run_ranks(_many_saved, 2, sample.folder, tmp_path)
    assert checkpoint.complete_steps(tmp_path) == [2, 5, 6]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3


def test_saving_where_a_file_is_in_the_way_ends_all_ranks_with_one_line(
    sample: PreparedDataset, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    path = checkpoint.checkpoint_path(tmp_path, 3)
    with pytest.raises(RankFailed) as caught:
        run_ranks(saved_tables, 2, sample.folder, config_of(*SMALL), tmp_path)
    assert f"CheckpointError: {path}: cannot be written: Not a directory" in str(caught.value)
    assert "SystemExit: 2" in str(caught.value)


def _disk_gets_full(folder: Path, run_dir: Path, room_bytes: int) -> str:
    with process_group("cpu") as world:
        run = Run(folder, config_of(*SMALL), world)
        run.save(run_dir, 3)
        if world.rank == world.world_size - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room_bytes, resource.RLIM_INFINITY))
        with pytest.raises(CheckpointError) as caught:
            run.save(run_dir, 4)
        return str(caught.value)


@pytest.mark.parametrize("room_bytes", [300, 1000, 20_000])
def test_a_full_disk_is_one_line_on_every_rank_and_leaves_the_checkpoint_before(
    sample: PreparedDataset, tmp_path: Path, room_bytes: int
) -> None:
    run_dir = tmp_path / "run"
    for message in run_ranks(_disk_gets_full, 2, sample.folder, run_dir, room_bytes):
        assert message.startswith(f"{checkpoint.checkpoint_path(run_dir, 4)}: cannot be written: ")
        assert "File too large" in message
        assert "\n" not in message
    assert checkpoint.complete_steps(run_dir) == [3]
    run_alone(_loaded, sample.folder, config_of(*SMALL), checkpoint.find_checkpoint(run_dir))


def _one_stops_in_a_save(folder: Path, run_dir: Path, stops: int) -> None:
    try:
        with process_group("cpu", timeout_s=3) as world:
            run = Run(folder, config_of(*SMALL), world)
            if world.rank == stops:
                with pytest.MonkeyPatch.context() as patch:
                    stop = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)  # noqa: E731
                    patch.setattr(checkpoint._Files, "create_stream", stop)
                    run.save(run_dir, 3)
            run.save(run_dir, 3)
    finally:
        others = {*threading.enumerate()} - {threading.main_thread()}
        assert all(thread.daemon for thread in others)  # none keeps the process from ending


@pytest.mark.slow  # waits for the time-out
@pytest.mark.parametrize("stops", [0, 1])
def test_a_rank_that_goes_silent_in_a_save_is_missed_within_the_time_out(
    sample: PreparedDataset, tmp_path: Path, stops: int
) -> None:
    begun = time.monotonic()
    with pytest.raises(RankFailed, match=rf"RankLost: rank {stops} of 2 did not answer"):
        run_ranks(_one_stops_in_a_save, 2, sample.folder, tmp_path, stops)
    assert time.monotonic() - begun < 60
    assert checkpoint.complete_steps(tmp_path) == []


def test_incomplete_and_foreign_checkpoints_are_refused(
    sample: PreparedDataset, tmp_path: Path
) -> None:
    run_alone(saved_tables, sample.folder, config_of(*SMALL), tmp_path)
    path, later = (checkpoint.checkpoint_path(tmp_path, step) for step in (3, 4))
    shutil.copytree(path, later)
    (later / checkpoint.MARKER).unlink()
    assert checkpoint.find_checkpoint(tmp_path) == path
    with pytest.raises(RankFailed, match=r"CheckpointError: .*cannot be read: .*ize"):
        run_alone(_loaded, sample.folder, config_of("model.embedding_dim=30"), path)
    for text, said in (("{", "damaged: it is not JSON"), ("{}", r"damaged \(step is None\)")):
        (path / checkpoint.MARKER).write_text(text)
        with pytest.raises(CheckpointError, match=said):
            checkpoint.read_state(path)


def _flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("size", [1, 2])
def test_one_flipped_bit_is_found_and_an_earlier_checkpoint_named(
    sample: PreparedDataset, tmp_path: Path, size: int
) -> None:
    config = config_of(*SMALL)
    run_ranks(saved_tables, size, sample.folder, config, tmp_path)
    path = checkpoint.find_checkpoint(tmp_path)
    files = [*path.glob("*.distcp"), path / ".metadata"]
    assert len(files) == size + 1
    for file in files:
        whole = file.read_bytes()
        for damage in (_flipped(whole), None) if size == 1 else (whole[:100],):
            file.unlink() if damage is None else file.write_bytes(damage)
            what = "cannot be read: No such file" if damage is None else "damaged: its checksum"
            for message, logged in run_ranks(_said_about, size, sample.folder, config, path):
                assert message.startswith(f"{file}: {what}")
                assert message.endswith("; train again with checkpoint.resume=never")
                assert logged == []
        file.write_bytes(whole)
    _fake(tmp_path, 1)
    files[0].unlink()
    message, _ = run_ranks(_said_about, size, sample.folder, config, path)[0]
    other = checkpoint.checkpoint_path(tmp_path, 1)
    assert message.endswith(
        f"; take another: checkpoint.use=1, or for a run of another name "
        f"checkpoint.start_from={other}"
    )
    assert checkpoint.find_checkpoint(other, "auto") == other


def _said_about(folder: Path, config: Config, path: Path) -> tuple[str, list[str]]:
    """The error on loading a checkpoint, and what libraries logged with a traceback."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    with pytest.raises(CheckpointError) as caught:
        _loaded(folder, config, path)
    return str(caught.value), [r.getMessage() for r in records if r.exc_info]


def test_one_flipped_bit_of_a_marker_changes_nothing_in_silence(
    sample: PreparedDataset, tmp_path: Path
) -> None:
    run_alone(saved_tables, sample.folder, config_of(*SMALL), tmp_path)
    path = checkpoint.find_checkpoint(tmp_path)
    marker, rng = path / checkpoint.MARKER, np.random.default_rng(1)
    whole, expected = marker.read_bytes(), checkpoint.read_state(path)
    assert "crc32_of_this" in whole.decode()
    actual = 0
    for bit in rng.choice(8 * len(whole), 500, replace=False):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << (bit % 8)
        marker.write_bytes(damaged)
        try:
            assert checkpoint.read_state(path) | {} == expected or b"crc32_of_this" not in damaged
        except CheckpointError as error:
            actual += 1
            assert str(error).startswith(f"{marker}: damaged") or "no complete" in str(error)
    assert actual > 400


def _steps_of_fused_tables(folder: Path, config: Config, run_dir: Path) -> list[list[int]]:
    with process_group("cpu") as world:
        run, actual = Run(folder, config, world), []
        run.losses(1, 3)
        run.save(run_dir, 3)
        run.sharded(next(run.batches.steps(4, 4)))  # FBGEMM counts a look-up that is no step
        actual.append([int(k.iter) for k in fused_kernels(run.sharded)])
        again = Run(folder, config, world)
        checkpoint.load(checkpoint.find_checkpoint(run_dir), world, again.sharded, again.optimizer)
        actual.append([int(k.iter) for k in fused_kernels(again.sharded)])
        again.losses(4, 5)
        actual.append([int(k.iter) for k in fused_kernels(again.sharded)])
        actual.append([int(k.iter_cpu) for k in fused_kernels(again.sharded)])
        return actual


@pytest.mark.parametrize("size", [1, 2])
def test_fused_optimizers_know_how_many_steps_they_have_taken(
    sample: PreparedDataset, tmp_path: Path, size: int
) -> None:
    config = config_of(*SMALL, "sharding.kind=row_wise")
    for actual in run_ranks(_steps_of_fused_tables, size, sample.folder, config, tmp_path):
        assert actual == [[4], [3], [5], [5]]


class Allocations(TorchDispatchMode):
    """Notes every tensor that is made by its likeness to another one."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if str(func) in ("aten.empty_like.default", "aten.new_empty.default"):
            self.shapes.append(tuple(out.shape))
        return out


def _staged(folder: Path, config: Config) -> tuple[list[tuple[int, ...]], list[str], list[str]]:
    """Placeholders that a copy makes; names whose copies differ; names that share memory."""
    with process_group("cpu") as world:
        run = Run(folder, config, world)
        run.losses(1, 2)
        model = run.sharded.state_dict()
        tensors = {"model": model, "optimizer": _optimizer_state(run.optimizer, model)}
        staging = Staging(world.device)
        for _ in range(2):  # into new memory, then into the same again
            with (made := Allocations()):
                copy = staging.copy(tensors)
        before, after = flatten_state_dict(tensors)[0], flatten_state_dict(copy)[0]
        assert before.keys() == after.keys()
        differ, shared = [], []
        for name, value in before.items():
            pairs = (
                zip(*(t.to_local().local_shards() for t in (value, after[name])), strict=True)
                if isinstance(value, DTensor)
                else [(value, after[name])]
            )
            for here, there in pairs:
                differ += [name] * (not torch.equal(here, there))
                shared += [name] * (here.data_ptr() == there.data_ptr())
        return made.shapes, differ, shared


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
def test_a_copy_for_a_checkpoint_makes_nothing_of_a_tables_size_on_its_device(
    sample: PreparedDataset, optimizer: str
) -> None:
    config = config_of(*SMALL, f"optimizer.tables.name={optimizer}")
    placeholders, differ, shared = run_alone(_staged, sample.folder, config)
    assert {shape for shape in placeholders if shape != ()} == set()
    assert differ == []
    assert shared == []


def _copies_are_watched(folder: Path, run_dir: Path) -> list[bool]:
    with process_group("cpu") as world:
        watch = Watch(world.store.clone(), world.rank, world.world_size, 60)  # type: ignore[attr-defined]
        run, seen, copy = (
            Run(folder, config_of(*SMALL), replace(world, watch=watch)),
            [],
            Staging.copy,
        )

        def copied(self: Staging, tensors: dict[str, Any]) -> dict[str, Any]:
            seen.append(watch._since is not None)
            return copy(self, tensors)

        Staging.copy = copied  # type: ignore[method-assign]
        run.save(run_dir, 1)
        return [*seen, watch._since is not None]


def test_a_rank_lost_while_others_copy_for_a_checkpoint_is_noticed(
    sample: PreparedDataset, tmp_path: Path
) -> None:
    assert run_alone(_copies_are_watched, sample.folder, tmp_path) == [True, False]


def test_memory_for_copies_of_a_gpu_is_pinned_where_it_can_be(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = []

    class Stager:
        def __init__(self, options: StagingOptions) -> None:
            self.options = options
            made.append(options)

        def stage(self, tensors: dict[str, Any]) -> dict[str, Any]:
            if self.options.use_pinned_memory:
                raise RuntimeError("Registering memory failed with cudaError: 2")
            return tensors

    monkeypatch.setattr(checkpoint, "DefaultStager", Stager)
    assert Staging(torch.device("cuda", 1)).copy({"a": torch.ones(2)})["a"].tolist() == [1, 1]
    assert [(o.use_pinned_memory, o.use_non_blocking_copy) for o in made] == [
        (True, True),
        (False, False),
    ]
    assert "not pinned, which is slower: Registering memory failed" in caplog.text


def test_the_thread_that_writes_a_checkpoint_is_on_the_ranks_own_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen: list[tuple[torch.device, str]] = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda d: chosen.append((d, threading.current_thread().name))
    )
    device = torch.device("cuda", 3)
    name = in_background(lambda: threading.current_thread().name, device).result(5)
    assert chosen == [(device, name)]
