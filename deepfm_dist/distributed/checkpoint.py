"""Checkpoints: sharded tensors by torch.distributed.checkpoint, complete or not there.

Layout of ``runs/<name>/checkpoints/step_00001000/``::

    .metadata, __0_0.distcp, ...   model and optimizer, written by all ranks
    state.json                     step, data and model it belongs to; written last, the marker
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.shards_wrapper import LocalShardsWrapper
from torchrec.optim.keyed import CombinedOptimizer

from deepfm_dist.distributed.world import World
from deepfm_dist.errors import CheckpointError

MARKER = "state.json"
_NAME = re.compile(r"step_(\d{8,})")


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Folder of the checkpoint of a step."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def latest_checkpoint(run_dir: Path) -> Path:
    """The complete checkpoint with the highest step.

    Raises:
        CheckpointError: there is none.
    """
    found = [
        path
        for path in (run_dir / "checkpoints").glob("step_*")
        if _NAME.fullmatch(path.name) and (path / MARKER).is_file()
    ]
    if not found:
        raise CheckpointError(
            f"{run_dir}: no complete checkpoint; run python -m deepfm_dist.train first"
        )
    return max(found, key=lambda path: int(path.name.removeprefix("step_")))


def save(
    path: Path,
    world: World,
    sharded: DistributedModelParallel,
    optimizer: CombinedOptimizer,
    state: Mapping[str, Any],
) -> None:
    """Writes model and optimizer. All ranks.

    Args:
        path: folder; one that is there is replaced.
        world: the ranks.
        sharded: the model.
        optimizer: its optimizer.
        state: JSON values that go into the marker: step, vocabulary hash, model, configuration.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    name = f"save_{path.name}"
    world.first_does(f"{name}_begin", lambda: _make_room(path))
    model = sharded.state_dict()
    tensors = {"model": model, "optimizer": _optimizer_state(optimizer, model)}
    _translated(lambda: dcp.save(tensors, checkpoint_id=path), path, "cannot be written")
    text = json.dumps(dict(state), indent=2)
    world.first_does(f"{name}_end", lambda: _write_marker(path, text))


def load_model(path: Path, sharded: DistributedModelParallel) -> None:
    """Reads the weights into a model of any plan and world size. All ranks.

    Raises:
        CheckpointError: the checkpoint is damaged or of another model.
    """
    # Before dcp.load, which would log two tracebacks over a missing or damaged index.
    _translated(dcp.FileSystemReader(path).read_metadata, path, "cannot be read")
    tensors = {"model": sharded.state_dict()}
    _translated(lambda: dcp.load(tensors, checkpoint_id=path), path, "cannot be read")
    sharded.load_state_dict(tensors["model"])


def read_state(path: Path) -> dict[str, Any]:
    """The marker of a complete checkpoint.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        state: dict[str, Any] = json.loads((path / MARKER).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: no complete checkpoint ({error})") from None
    return state


def check_vocabulary(path: Path, state: Mapping[str, Any], vocabulary_hash: str) -> None:
    """Refuses a checkpoint that was trained on other data.

    Raises:
        CheckpointError: the hashes differ.
    """
    if state["vocabulary_hash"] != vocabulary_hash:
        raise CheckpointError(
            f"{path} was trained on vocabulary {state['vocabulary_hash']}, this dataset has "
            f"{vocabulary_hash}; use the same prepared data, or train anew"
        )


def remove_all(run_dir: Path) -> None:
    """Deletes a run's checkpoints."""
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)


def _make_room(path: Path) -> None:
    try:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from None


def _write_marker(path: Path, text: str) -> None:
    aside = path / f"{MARKER}.part"
    aside.write_text(text)
    aside.rename(path / MARKER)


def _optimizer_state(optimizer: CombinedOptimizer, model: Mapping[str, Any]) -> dict[str, Any]:
    """The optimizer's tensors in a form that can be resharded, over the same memory.

    Fused optimizers describe their pieces of a table as DTensors. A torch optimizer over a table
    (the dense kernel) knows only its local piece, and every rank's would go under one name.
    """
    state: dict[str, Any] = {}
    for name, values in optimizer.state_dict()["state"].items():
        if not values:  # a stateless optimizer (SGD); an empty dict cannot be resharded
            continue
        group, _, parameter = name.partition(".")
        if group == "tables":
            values = {k: _pieced_like(model[parameter], v) for k, v in values.items()}
        state[name] = values
    return state


def _pieced_like(table: DTensor, piece: Tensor) -> Tensor:
    """This rank's piece of an optimizer's state as part of a DTensor cut as the table is."""
    if piece.dim() == 0:  # a step count
        return piece
    local: Any = table.to_local()
    assert [shard.shape for shard in local.local_shards()] == [piece.shape]
    return DTensor.from_local(
        LocalShardsWrapper([piece], local.local_offsets()),
        device_mesh=table.device_mesh,
        placements=table.placements,
        run_check=False,
        shape=table.shape,
        stride=table.stride(),
    )


def _translated(work: Callable[[], object], path: Path, what: str) -> None:
    try:
        work()
    except CheckpointException as error:
        reason = next((str(failure[0]) for failure in error.failures.values()), str(error))
        raise CheckpointError(f"{path}: {what}: {' '.join(reason.split())[:300]}") from None
    except (RuntimeError, ValueError, OSError, EOFError, UnpicklingError) as error:
        raise CheckpointError(f"{path}: {what}: {' '.join(str(error).split())[:300]}") from None
