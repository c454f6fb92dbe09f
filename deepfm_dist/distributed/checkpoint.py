"""Atomic sharded checkpoints with torch.distributed.checkpoint (DCP).

Layout of ``runs/<name>/checkpoints/step_00001000/``::

    __0_0.distcp, ...   model and optimizer, written by all ranks in the background
    .metadata           where DCP finds which tensor
    state.json          the marker, written last: step, settings, data, state of the loop, and the
                        CRC-32 of every other file and of its own contents

The folder may be an object store's (``s3://bucket/runs``): nothing here requires atomic renames or
consistent listings, only that the marker is uploaded last and atomically.

DCP keeps ``.metadata`` as a pickle, and unpickles it to read a checkpoint; everything else is read
as plain tensors or JSON. Open only checkpoints you trust.
"""

import hashlib
import io
import json
import logging
import os
import re
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemBase
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.shards_wrapper import LocalShardsWrapper
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper

from deepfm_dist.distributed.heartbeat import in_background
from deepfm_dist.distributed.replicated import REPLICATED
from deepfm_dist.distributed.sharding import set_table_steps
from deepfm_dist.distributed.world import World
from deepfm_dist.errors import CheckpointError
from deepfm_dist.messages import brief
from deepfm_dist.model.over_arch import biases_before_norm
from deepfm_dist.model.transfer import Transfer
from deepfm_dist.storage import (
    crc32,
    delete_tree,
    follow_pointer,
    is_of_storage,
    is_remote,
    rename,
    storage_errors_to_user,
)

log = logging.getLogger(__name__)

MARKER = "state.json"
SELECTED, REFIT = "selected", "refit"
"""Parts of a finished run, each a run with one checkpoint: the best checkpoint of training with its
closed-form part; and the same trained on validation rows, too.
"""
_SUMS = "crc32"
_OWN_SUM = "crc32_of_this"
_NAME = re.compile(r"step_(\d{8,})")
_IN_TABLE = ".embedding_bags."
_OVER_ARCH = "model.interaction_arch.over_arch."
_TIMEOUT = timedelta(hours=1)  # ranks may write very different amounts
_DAMAGE_ERRORS = (RuntimeError, ValueError, EOFError, UnpicklingError)
T = TypeVar("T")


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint on disk.

    Attributes:
        path: its folder.
        state: contents of its marker.
    """

    path: Path
    state: dict[str, Any]


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Folder of the checkpoint of a step."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def complete_steps(run_dir: Path) -> list[int]:
    """Steps with a complete checkpoint, ascending."""
    return sorted(step for step, path in _folders(run_dir).items() if (path / MARKER).is_file())


def _folders(run_dir: Path) -> dict[int, Path]:
    """Folders of checkpoints by step, including incomplete ones."""
    try:
        folders = [*(run_dir / "checkpoints").iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return {int(name[1]): path for path in folders if (name := _NAME.fullmatch(path.name))}


def time_of(checkpoint: Path) -> float:
    """When a complete checkpoint was saved, in seconds since 1970."""
    with storage_errors_to_user(checkpoint):
        return (checkpoint / MARKER).stat().st_mtime


def find_checkpoint(
    run_dir: Path, which: str | int = "latest", finished: Collection[str] = (REFIT, SELECTED)
) -> Path:
    """Finds a run's checkpoint.

    Args:
        run_dir: folder of the run, or of one of its checkpoints, which is then returned.
        which: latest; best, by the monitored metric; selected or refit; a step; or auto: the first
            existing one of ``finished``, best if a metric was monitored, or latest.
        finished: parts that auto prefers to checkpoints of the training loop.

    Raises:
        CheckpointError: there is no checkpoint, or not the requested one.
    """
    run_dir = follow_pointer(run_dir)
    if _NAME.fullmatch(run_dir.name) and (run_dir / MARKER).is_file():
        return run_dir
    for part in finished if which == "auto" else [which] if which in (SELECTED, REFIT) else ():
        if steps := complete_steps(run_dir / part):
            return checkpoint_path(run_dir / part, steps[-1])
    steps = complete_steps(run_dir)
    if steps and which in (SELECTED, REFIT):
        raise CheckpointError(
            f"{run_dir}: checkpoint.use={which}, but there is none; use checkpoint.use=auto"
        )
    if not steps:
        raise CheckpointError(
            f"{run_dir}: no complete checkpoint; run python -m deepfm_dist.train first"
        )
    step = steps[-1]
    if which in ("best", "auto"):
        best = read_state(checkpoint_path(run_dir, step))["trainer"].get("best_step")
        if best is None and which == "best":
            raise CheckpointError(
                f"{run_dir}: checkpoint.use=best, but no metric was monitored in training "
                f"(trainer.monitor=null, or no validation rows); use checkpoint.use=latest"
            )
        step = step if best is None else best
    elif isinstance(which, int):
        step = which
    if step not in steps:
        raise CheckpointError(
            f"{run_dir}: no complete checkpoint of step {step}; available: "
            f"{', '.join(map(str, steps))}"
        )
    return checkpoint_path(run_dir, step)


def read_checkpoint(
    run_dir: Path, which: str | int = "latest", finished: Collection[str] = (REFIT, SELECTED)
) -> Saved:
    """Finds a run's checkpoint and reads its marker; arguments as for `find_checkpoint`.

    Raises:
        CheckpointError: there is no checkpoint, not the requested one, or it is damaged.
    """
    path = find_checkpoint(run_dir, which, finished)
    return Saved(path, read_state(path))


def use_of(checkpoint: Path) -> str | int:
    """The value of ``checkpoint.use`` for one of a run's checkpoints."""
    part = checkpoint.parents[1].name
    return part if part in (SELECTED, REFIT) else int(checkpoint.name.removeprefix("step_"))


class Checkpoints:
    """Writes a run's checkpoints in the background. All ranks.

    DCP communicates over a separate process group: on training's, its collectives would interleave
    with others in a different order on each rank.

    Args:
        run_dir: folder of the run.
        world: the ranks.
        keep_last: number of latest checkpoints to keep.
    """

    def __init__(self, run_dir: Path, world: World, keep_last: int) -> None:
        self._run_dir, self._world, self._keep_last = run_dir, world, keep_last
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        self._staging = Staging(world.device)
        self._pending: tuple[Path, Future[Metadata]] | None = None

    def save(
        self,
        step: int,
        sharded: DistributedModelParallel,
        optimizer: CombinedOptimizer,
        state: Mapping[str, Any],
        keep: Collection[int] = (),
    ) -> None:
        """Copies model and optimizer, and starts writing the copy. All ranks.

        Args:
            step: optimizer steps taken; an existing checkpoint of this step is replaced.
            sharded: the model.
            optimizer: its optimizer.
            state: JSON values for the marker.
            keep: steps whose checkpoints must not be deleted.

        Raises:
            CheckpointError: the previous one, or this one, cannot be written.
        """
        self.wait()
        path = checkpoint_path(self._run_dir, step)
        self._world.run_on_rank0(f"save_{path.name}", lambda: _make_room(path))
        model = sharded.state_dict()

        def clear() -> None:
            keep_checkpoints(
                self._run_dir, {*complete_steps(self._run_dir)[-self._keep_last :], *keep}
            )

        writer = _Writer(path, {"step": step} | dict(state), clear)
        tensors = {"model": model, "optimizer": _optimizer_state(optimizer, model)}
        with self._world.waiting():  # for the device, which may be in an exchange with a lost rank
            copy = self._staging.copy(tensors)
        # The thread of dcp.async_save would keep a process without peers alive for _TIMEOUT.
        future = in_background(
            lambda: dcp.save(copy, storage_writer=writer, process_group=self._group),
            self._world.device,
        )
        self._pending = path, future

    def wait(self) -> None:
        """Waits until the last checkpoint is complete. All ranks.

        Raises:
            CheckpointError: it cannot be written; the previous one still exists.
        """
        if self._pending is not None:
            path, future = self._pending
            self._pending = None
            # DCP would wait _TIMEOUT for a lost rank; this detects it earlier.
            pause_s = 0.001
            while not self._all(future.done()):
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, 0.5)
            _errors_to_user(future.result, path, "cannot be written")

    def close(self) -> None:
        """`wait`, then release resources. All ranks."""
        self.wait()
        dist.destroy_process_group(self._group)

    def _all(self, here: bool) -> bool:
        return int(self._world.sum(torch.tensor(int(here)))) == self._world.world_size


class Staging:
    """Copies a model's and an optimizer's tensors into the machine's memory.

    The memory is reused for the next copy; under CUDA it is pinned, so that copies run at bus
    speed. DCP's stager is given plain tensors only: for a `LocalShardsWrapper` it would allocate an
    empty one of the same size, and the wrapper does that on the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._stager = self._make(on_gpu=device.type == "cuda")
        self._pinned = device.type == "cuda"

    def copy(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """Copies nested dicts of tensors and DTensors; returns when the copy is complete."""
        plain = _plain(tensors)
        try:
            copied = self._stager.stage(plain)
        except RuntimeError as error:
            if not self._pinned:
                raise
            log.warning(
                "checkpoints are copied through memory that is not pinned, which is slower: %s",
                brief(error),
            )
            self._stager, self._pinned = self._make(on_gpu=False), False
            copied = self._stager.stage(plain)
        assert isinstance(copied, dict)
        return _like(tensors, copied)

    @staticmethod
    def _make(on_gpu: bool) -> DefaultStager:
        return DefaultStager(
            StagingOptions(
                use_pinned_memory=on_gpu,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=on_gpu,
            )
        )


def _plain(value: Any) -> Any:
    """Nested dicts with DTensors replaced by lists of this rank's pieces."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [piece for piece, _ in _local_pieces(value)] if isinstance(value, DTensor) else value


def _like(value: Any, plain: Any) -> Any:
    """The inverse of `_plain`: DTensors as in ``value``, of the pieces in ``plain``."""
    if isinstance(value, Mapping):
        return {key: _like(inner, plain[key]) for key, inner in value.items()}
    if not isinstance(value, DTensor):
        return plain
    local: Any = value.to_local()
    return _from_pieces(value, plain, local.local_offsets(), value.shape)


class _Writer(dcp.FileSystemWriter):
    """Writes DCP's files with checksums, then the marker."""

    def __init__(self, path: Path, state: Mapping[str, Any], then: Callable[[], None]) -> None:
        super().__init__(str(path), sync_files=False)  # _Files does it
        self.path, self._files = path, _Files()
        self.fs: Any = self._files
        self._folder, self._state, self._then = path, state, then

    def write_data(
        self, plan: SavePlan, planner: SavePlanner
    ) -> torch.futures.Future[list[WriteResult]]:
        results: list[WriteResult] = super().write_data(plan, planner).value()
        # They are sent to rank 0 as an additional write result.
        future = torch.futures.Future[list[WriteResult]]()
        future.set_result([*results, WriteResult(MetadataIndex(_SUMS), 0, self._files.sums)])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, [[r for r in part if r.index.fqn != _SUMS] for part in results])
        sums = {".metadata": self._files.sums[".metadata"]}
        for result in [r for rank_results in results for r in rank_results if r.index.fqn == _SUMS]:
            sums |= result.storage_data
        state = {**self._state, _SUMS: sums}
        state[_OWN_SUM] = _sum_of(state)
        aside = self._folder / f"{MARKER}.part"
        with self._files.create_stream(aside, "wb") as file:
            file.write(json.dumps(state, indent=2).encode())
        self._files.rename(aside, self._folder / MARKER)
        self._then()


def _sum_of(state: Mapping[str, Any]) -> int:
    """CRC-32 of a marker's contents, independent of formatting."""
    return zlib.crc32(json.dumps(state, sort_keys=True).encode())


class Reader(dcp.FileSystemReader):
    """Reads what `Checkpoints` wrote."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path, self._remote = path, is_remote(path)
        self.fs: Any = _Files()

    def _slice_file(self, file: Any, sinfo: Any) -> Any:
        if not self._remote:
            return super()._slice_file(file, sinfo)
        file.seek(sinfo.offset)  # in one request; torch would seek back and forth
        return io.BytesIO(file.read(sinfo.length))


class _Files(FileSystemBase):
    """DCP's file system interface on `Path`; computes the CRC-32 of written files.

    Attributes:
        sums: the sums, by name.
    """

    def __init__(self) -> None:
        self.sums: dict[str, int] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with path.open(mode) as file:
            if mode == "rb":
                yield file
                return
            summed = _ChecksumFile(file)
            try:
                yield summed
            except Exception as error:
                raise summed.failure or error from None
            if not is_remote(path):  # an upload is complete when it is closed
                file.flush()
                os.fsync(file.fileno())
        self.sums[path.name] = summed.sum

    def concat_path(self, path: Any, suffix: str) -> Any:
        return path / suffix

    def rename(self, path: Any, new_path: Any) -> None:
        rename(path, new_path)
        self.sums[new_path.name] = self.sums.pop(path.name)

    def init_path(self, path: Any) -> Any:
        return path

    def mkdir(self, path: Any) -> None:
        """Does nothing: `_make_room` created it."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def exists(self, path: Any) -> bool:
        return bool(path.exists())

    def rm_file(self, path: Any) -> None:
        path.unlink()


class _ChecksumFile(io.RawIOBase):
    """Forwards sequential writes and computes their checksum."""

    def __init__(self, file: Any) -> None:
        self._file, self.sum = file, 0
        self.failure: OSError | None = None

    def write(self, block: Any) -> int:
        self.sum = zlib.crc32(block, self.sum)
        try:
            return int(self._file.write(block))
        except OSError as error:  # torch.save replaces it by an error about positions
            self.failure = self.failure or error
            raise

    def tell(self) -> int:
        return int(self._file.tell())


def load(
    path: Path,
    world: World,
    sharded: DistributedModelParallel,
    optimizer: CombinedOptimizer | None = None,
    transfer: Transfer | None = None,
    fresh_rows: Mapping[str, npt.NDArray[np.int64]] | None = None,
) -> None:
    """Reads weights, and the optimizer's state, under any plan and at any world size. All ranks.

    Args:
        path: a complete checkpoint.
        world: the ranks.
        sharded: the model.
        optimizer: its optimizer; None reads the weights only.
        transfer: maps weights from a model with other fields; everything else keeps its values, and
            so do rows of tables beyond the saved ones. None: the same model.
        fresh_rows: by table, rows that belonged to other ids when they were saved; they keep their
            values and optimizer state.

    Raises:
        CheckpointError: the checkpoint is damaged, or from a different model or optimizer.
    """
    with storage_errors_to_user(path):
        check_files(path, world)
    # Before dcp.load, which would log two tracebacks for a damaged index.
    reader = Reader(path)
    metadata = _errors_to_user(reader.read_metadata, path, "cannot be read")
    saved: Mapping[str, Any] = metadata.state_dict_metadata
    model = sharded.state_dict()
    for name in _redundant_biases(model, saved):
        model[name] = torch.empty(saved[f"model.{name}"].size)
    tensors: dict[str, Any] = {"model": model}
    if optimizer is not None:
        make_state(optimizer)  # DCP only fills existing entries
        tensors["optimizer"] = _optimizer_state(optimizer, model)
    put_in_place: list[Callable[[], object]] = []
    put_back = _rows_to_put_back(tensors, fresh_rows or {})
    if transfer is not None:
        tensors = _without_new_rows(tensors, saved)
        tensors, put_in_place = _plan_transfer(tensors, saved, transfer)
    _errors_to_user(lambda: dcp.load(tensors, storage_reader=reader), path, "cannot be read")
    for work in (*put_in_place, *put_back):
        work()
    sharded.load_state_dict(model)
    if optimizer is not None:
        set_table_steps(sharded, steps_in(read_state(path)))


def _redundant_biases(model: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """Saved biases before batch norm, from earlier versions, which the model folds in."""
    names = [name.removeprefix("model.") for name in saved if name.startswith("model.")]
    return [name for name in biases_before_norm(names, _OVER_ARCH) if name not in model]


def make_state(optimizer: CombinedOptimizer) -> None:
    """Creates the optimizer state that torch would create at the first step; changes no weight."""
    for _, part in optimizer.optimizers:
        if isinstance(part, KeyedOptimizerWrapper):
            rates = [group["lr"] for group in part.param_groups]
            for group in part.param_groups:
                group["lr"] = 0.0  # a step without gradients; L2 would have one
            part.init_state()
            for group, rate in zip(part.param_groups, rates, strict=True):
                group["lr"] = rate
            for values in part.state.values():
                for value in values.values():
                    value.zero_()


def check_files(path: Path, world: World | None = None) -> None:
    """Verifies the files' checksums; all ranks divide them, or one process does it alone.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    problem = None
    sums = [*read_state(path)[_SUMS].items()]
    for name, expected in sums[world.rank :: world.world_size] if world else sums:
        try:
            if crc32(path / name) != expected:
                problem = f"{path / name}: damaged: its checksum differs from the one in {MARKER}"
        except Exception as error:
            if not is_of_storage(error):
                raise
            problem = f"{path / name}: cannot be read: {brief(error)}"
    problems = world.all_gather_object(problem) if world else [problem]
    first = next((p for p in problems if p is not None), None)
    if first is not None:
        raise CheckpointError(f"{first}; {_instead_of(path)}")


def _instead_of(path: Path) -> str:
    """Advice if a checkpoint is damaged."""
    if (part := path.parents[1]).name in (SELECTED, REFIT):
        return (
            f"take another: checkpoint.use=latest, or delete {part}, and python -m "
            f"deepfm_dist.train makes it again"
        )
    others = [s for s in complete_steps(path.parent.parent) if f"{s:08d}" not in path.name]
    if not others:
        return "train again with checkpoint.resume=never"
    other = checkpoint_path(path.parent.parent, others[-1])
    return (
        f"take another: checkpoint.use={others[-1]}, or for a run of another name "
        f"checkpoint.start_from={other}"
    )


def read_state(path: Path) -> dict[str, Any]:
    """Reads the marker of a complete checkpoint.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    marker = path / MARKER
    try:
        state: dict[str, Any] = json.loads(marker.read_text())
    except OSError as error:
        raise CheckpointError(
            f"{path}: no complete checkpoint ({brief(error)}); if its run is being trained, a "
            f"newer one has taken its place: type the command again"
        ) from None
    except ValueError:
        raise CheckpointError(f"{marker}: damaged: it is not JSON; {_instead_of(path)}") from None
    expected = state.pop(_OWN_SUM, None) if isinstance(state, dict) else None
    if expected is not None and expected != _sum_of(state):  # earlier versions wrote none
        raise CheckpointError(
            f"{marker}: damaged: its contents differ from their checksum; {_instead_of(path)}"
        )
    kinds = {"step": int, "vocabulary_hash": str, "config": dict, "config.data": dict}
    kinds |= {"config.model": dict, "trainer": dict, _SUMS: dict}
    for name, kind in kinds.items():
        value: Any = state
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, kind):
            raise CheckpointError(f"{marker}: damaged ({name} is {value!r}); {_instead_of(path)}")
    return state


def steps_in(state: Mapping[str, Any]) -> int:
    """Optimizer steps of a checkpoint, including those of the runs that it started from."""
    return int(state["step"]) + int(state["trainer"].get("earlier_steps", 0))


def digest_of(state: Mapping[str, Any]) -> str:
    """Short hex digest of a checkpoint's files, from the checksums in its marker."""
    sums = json.dumps(state[_SUMS], sort_keys=True)
    return hashlib.sha256(sums.encode()).hexdigest()[:16]


def fingerprint_of(path: Path) -> str:
    """A hash of a checkpoint's files, without reading the weights: names, sizes and times.

    For a remote checkpoint, whose times are unreliable, it is a hash of the marker, which has
    checksums.
    """
    if is_remote(path):
        return hashlib.sha256((path / MARKER).read_bytes()).hexdigest()
    files = sorted(file for file in path.rglob("*") if file.is_file())
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def keep_checkpoints(run_dir: Path, steps: Collection[int]) -> None:
    """Deletes a run's other checkpoints, including incomplete ones."""
    for step, path in _folders(run_dir).items():
        if step not in steps:
            # The marker first, so that an interrupted removal leaves no valid checkpoint.
            (path / MARKER).unlink(missing_ok=True)
            delete_tree(path)


def _make_room(path: Path) -> None:
    def work() -> None:
        (path / MARKER).unlink(missing_ok=True)  # first, as above
        delete_tree(path)
        if not is_remote(path):  # an object store has no folders
            path.mkdir(parents=True)

    _errors_to_user(work, path, "cannot be written")


def _optimizer_state(optimizer: CombinedOptimizer, model: Mapping[str, Any]) -> dict[str, Any]:
    """The optimizer's tensors in a reshardable form, without copying.

    Fused optimizers expose their pieces of a table as DTensors. A torch optimizer over a table (the
    dense kernel) knows only its local piece, which would have the same name on every rank.
    """
    state: dict[str, Any] = {}
    for name, values in optimizer.state_dict()["state"].items():
        if not values:  # a stateless optimizer (SGD); an empty dict cannot be resharded
            continue
        group, _, parameter = name.partition(".")
        if group == "tables":
            values = {k: _as_dtensor_like(model[parameter], v) for k, v in values.items()}
        # Replicated tables use the names of sharded ones.
        state[name.removeprefix(f"{REPLICATED}_")] = values
    return state


def _as_dtensor_like(table: DTensor, piece: Tensor) -> Tensor:
    """This rank's piece of optimizer state as part of a DTensor sharded like the table."""
    if piece.dim() == 0:  # a step count
        return piece
    local: Any = table.to_local()
    pieces = [piece] if local.local_shards() else []  # a rank may hold no part of a table
    assert [shard.shape for shard in local.local_shards()] == [p.shape for p in pieces]
    return _from_pieces(table, pieces, local.local_offsets(), table.shape)


def _without_new_rows(
    tensors: Mapping[str, Any], saved: Mapping[str, Any], above: str = ""
) -> dict[str, Any]:
    """Views of the tensors, with tables cut to the saved number of rows."""
    cut: dict[str, Any] = {}
    for key, value in tensors.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping):
            cut[key] = _without_new_rows(value, saved, f"{name}.")
        elif name not in saved:
            cut[key] = value
        elif not isinstance(value, DTensor):
            is_table = _IN_TABLE in name and value.dim() > 0  # replicated, or a step count
            cut[key] = value[: saved[name].size[0]] if is_table else value
        elif pieces := [
            (piece[: saved[name].size[0] - offset[0]], offset)
            for piece, offset in _local_pieces(value)
            if offset[0] < saved[name].size[0]
        ]:  # a rank with only new rows reads nothing
            shape = torch.Size([min(saved[name].size[0], len(value)), *value.shape[1:]])
            kept, offsets = [p for p, _ in pieces], [offset for _, offset in pieces]
            cut[key] = _from_pieces(value, kept, offsets, shape)
    return cut


def _rows_to_put_back(
    tensors: Mapping[str, Any], rows_of: Mapping[str, npt.NDArray[np.int64]]
) -> list[Callable[[], object]]:
    """A function that restores this rank's pieces of given rows, in tables and optimizer state."""
    put_back: list[Callable[[], object]] = []
    for name, value in _flat(tensors) if rows_of else ():
        table = name.partition(_IN_TABLE)[2].partition(".")[0]
        if table not in rows_of or not value.dim():  # of the latter: a step count
            continue
        whole = [(value, (0,))]
        for piece, offset in _local_pieces(value) if isinstance(value, DTensor) else whole:
            local = rows_of[table] - offset[0]
            places = torch.from_numpy(local[(local >= 0) & (local < len(piece))]).to(piece.device)
            put_back.append(partial(piece.index_copy_, 0, places, piece.index_select(0, places)))
    return put_back


def _plan_transfer(
    tensors: Mapping[str, Any], saved: Mapping[str, Any], transfer: Transfer
) -> tuple[dict[str, Any], list[Callable[[], object]]]:
    """Plans the reads for a model that takes over another's weights.

    Returns:
        The tensors to read by full name, and a function to call afterwards, which moves tensors
        that are transferred field by field.
    """
    wanted: dict[str, Any] = {}
    then: list[Callable[[], object]] = []
    for name, value in _flat(tensors):
        parameter = name if name.startswith("model.") else name.rpartition(".")[0]
        is_new = name not in saved and transfer.may_be_new(parameter)
        if is_new or transfer.is_fresh(parameter):
            continue
        wanted[name] = value
        if transfer.by_field(parameter) and value.dim():  # else it is a step count
            shape = saved[name].size
            dim, places = transfer.places(parameter, shape[-1])
            wanted[name] = whole = value.new_empty(shape)
            before, after = (
                torch.tensor(p, dtype=torch.int64, device=value.device) for p in places
            )
            then.append(partial(_copy_places, value, whole, dim, before, after))
    return wanted, then


def _copy_places(target: Tensor, source: Tensor, dim: int, before: Tensor, after: Tensor) -> None:
    target.index_copy_(dim, after, source.index_select(dim, before))


def _flat(tensors: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Tensors by their full names in DCP."""
    for key, value in tensors.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _local_pieces(table: DTensor) -> list[tuple[Tensor, Any]]:
    """This rank's pieces and their offsets; a rank without one still lists an offset."""
    local: Any = table.to_local()
    return list(zip(local.local_shards(), local.local_offsets(), strict=False))


def _from_pieces(like: DTensor, pieces: list[Tensor], offsets: Any, shape: torch.Size) -> DTensor:
    return DTensor.from_local(
        LocalShardsWrapper(pieces, offsets),
        device_mesh=like.device_mesh,
        placements=like.placements,
        run_check=False,
        shape=shape,
        stride=like.stride(),
    )


def _errors_to_user(work: Callable[[], T], path: Path, what: str) -> T:
    try:
        return work()
    except CheckpointException as error:
        reason = next((failure[0] for failure in error.failures.values()), error)
    except Exception as error:
        if not (is_of_storage(error) or isinstance(error, _DAMAGE_ERRORS)):
            raise
        reason = error
    raise CheckpointError(f"{path}: {what}: {brief(reason)}")
