"""A run that starts from another's weights takes them by the names of fields."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.tensor import DTensor

from deepfm_dist import train as train_command
from deepfm_dist.config import Config, load_config
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.distributed import checkpoint
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.distributed.sharding import local_shards
from deepfm_dist.runs.start import read_start
from tests.data.small_datasets import config_of, prepared, write_input
from tests.ranks import run_alone, run_ranks
from tests.steps import Run, difference

BEFORE = """
- {name: user, entity: user}
- {name: item, entity: item}
- {name: genre, entity: item, file: items.csv, separator: "|"}
- {name: mood}
- {name: price, kind: numeric, transform: log}
- {name: age, entity: user, column: years, kind: numeric, transform: standard}
- {name: text, entity: item, file: items.csv, npy: text.npy, kind: vector}
"""
AFTER = """
- {name: mood}
- {name: age, entity: user, column: years, kind: numeric, transform: standard}
- {name: place, hash_rows: 20}
- {name: item, entity: item}
- {name: cost, kind: numeric, column: price}
- {name: price, kind: numeric, transform: log}
- {name: user, entity: user}
- {name: image, entity: item, file: items.csv, npy: image.npy, kind: vector}
- {name: text, entity: item, file: items.csv, npy: text.npy, kind: vector}
"""
DIM = 6
MODEL = f"model={{embedding_dim: {DIM}, over_arch_layer_sizes: [8, 5], init_std: 0.3}}"
COMMON = (MODEL, "data.history={}", "trainer.batch_size=64")


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with a trained run, and all tensors of its checkpoint."""
    home = tmp_path_factory.mktemp("start")
    write_input(home)
    rng = np.random.default_rng(1)
    for name, length in (("text", 4), ("image", 3)):
        np.save(home / f"{name}.npy", rng.normal(size=(40, length)))
    config = config_of(home, BEFORE, *COMMON, "data.name=before")
    config_file = home / "before.yaml"
    config_file.write_text(config.to_yaml())
    assert run_alone(train_command.main, ["--quiet", *arguments(home, "before")]) == 0
    path = checkpoint.find_checkpoint(home / "before")
    dcp_to_torch_save(path, home / "whole.pt")
    return home, torch.load(home / "whole.pt")


def arguments(home: Path, name: str, *overrides: str) -> list[str]:
    config = str(home / f"{name}.yaml")
    short = "trainer={max_steps: 6, validate_every_epochs: 0, monitor: null}"
    return ["--config", config, f"run.name={name}", "run.loggers=[]", short, *overrides]


def after(home: Path, fields: str, name: str, *overrides: str) -> Config:
    start = f"checkpoint.start_from={home / 'before'}"
    config = config_of(home, fields, *COMMON, f"data.name={name}", start, *overrides)
    (home / f"{name}.yaml").write_text(config.to_yaml())
    prepared(config)
    return config


def _started(config: Config) -> dict[str, Any]:
    """Weights and a batch before and after, logits after, and the losses that follow."""
    with process_group("cpu") as world:
        run = Run(config.prepared_dir, config, world)
        fresh = _weights(run, world)
        saved = checkpoint.read_checkpoint(Path(str(config.checkpoint.start_from)))
        read_start(saved, config, run.dataset, world, run.sharded, run.optimizer)
        batch = run.batches.batch(1)
        logits = run.sharded.eval()(batch)[1].numpy()
        run.sharded.train()
        bags = {k: [b.tolist() for b in j.to_dense()] for k, j in batch.sparse.to_dict().items()}
        state = {
            f"{name}.{key}": value.clone()
            for name, values in run.optimizer.state_dict()["state"].items()
            for key, value in values.items()
            if ".ebc." not in name
        }
        weights, of_tables = _weights(run, world), _state_of_tables(run, world)
        losses = run.losses(1, 8)
        return {
            "fresh": fresh, "weights": weights, "bags": bags, "dense": batch.dense.numpy(),
            "logits": logits, "state": state, "losses": losses, "of_tables": of_tables,
        }  # fmt: skip


def _weights(run: Run, world: Any) -> dict[str, np.ndarray]:
    """Everything above the tables, and whole tables."""
    state = run.sharded.state_dict()
    actual = {n: t.numpy().copy() for n, t in state.items() if ".ebc." not in n}
    mine = [(t, rows.start, p.numpy().copy()) for t, rows, _, p in local_shards(run.sharded)]
    pieces = [piece for of_rank in world.all_gather_object(mine) for piece in of_rank]
    for table in {t for t, *_ in pieces}:
        parts = {begin: p for t, begin, p in pieces if t == table}  # every rank may have them all
        actual[table] = np.concatenate([parts[begin] for begin in sorted(parts)])
    return actual


def _state_of_tables(run: Run, world: Any) -> dict[str, np.ndarray]:
    """The optimizer's state of whole tables, by its name."""
    mine = []
    state = checkpoint._optimizer_state(run.optimizer, run.sharded.state_dict())
    for name, value in checkpoint._flat(state):
        if ".ebc." in name and value.dim():
            pieces = [(value, (0,))]
            if isinstance(value, DTensor):
                pieces = checkpoint._local_pieces(value)
            mine += [(name, offset[0], piece.numpy().copy()) for piece, offset in pieces]
    pieces = [piece for of_rank in world.all_gather_object(mine) for piece in of_rank]
    parts = {(name, begin): piece for name, begin, piece in pieces}
    return {
        name: np.concatenate([parts[key] for key in sorted(parts) if key[0] == name])
        for name, _ in parts
    }


ABOVE = "model.interaction_arch."


def test_weights_go_to_the_fields_of_their_names(before: tuple[Path, dict[str, Any]]) -> None:
    home, saved = before
    config = after(home, AFTER, "after")
    alone = run_alone(_started, config)
    two = run_ranks(_started, 2, config)
    np.testing.assert_allclose(
        np.concatenate([of_rank["logits"] for of_rank in two]), alone["logits"], atol=1e-6
    )
    assert difference(two[0]["losses"], alone["losses"]) <= 1e-6

    old = {k: v.numpy() for k, v in saved["model"].items() if ".ebc." not in k}
    tables = {
        k.split("embedding_bags.")[1].removesuffix(".weight"): v.numpy()
        for k, v in saved["model"].items()
        if ".ebc." in k
    }
    first = old[f"{ABOVE}over_arch.hidden.0.weight"]
    was = ["user", "item", "genre", "mood", "price", "age", "text"]
    blocks = {name: first[:, i * DIM : (i + 1) * DIM] for i, name in enumerate(was)}
    fresh = alone["fresh"]
    now = ["mood", "place", "item", "user", "age", "cost", "price", "image", "text"]
    of_fresh = fresh[f"{ABOVE}over_arch.hidden.0.weight"]
    for name in ("place", "cost", "image"):
        blocks[name] = of_fresh[:, now.index(name) * DIM : (now.index(name) + 1) * DIM]
    tables["place"] = fresh["place"]
    numeric = {
        name: np.append(old[f"{ABOVE}dense_factors"][i], old[f"{ABOVE}dense_first_order"][i])
        for i, name in enumerate(["price", "age"])
    }
    cost = [fresh[f"{ABOVE}{part}"][1] for part in ("dense_factors", "dense_first_order")]
    numeric["cost"] = np.append(*cost)
    matrices = {
        name: np.c_[
            weights[f"{ABOVE}vector_factors_{name}"], weights[f"{ABOVE}vector_first_order_{name}"]
        ]
        for name, weights in (("image", fresh), ("text", old))
    }

    expected = []
    for row in range(len(alone["logits"])):
        vectors = {}
        for name in now[:4]:
            bag = alone["bags"][name][row]
            total = tables[name][bag, : DIM + 1].sum(0)
            vectors[name] = total / max(1, len(bag))
        for i, name in enumerate(now[4:7]):
            vectors[name] = alone["dense"][row, i] * numeric[name]
        vectors["image"] = alone["dense"][row, 3:6] @ matrices["image"]
        vectors["text"] = alone["dense"][row, 6:] @ matrices["text"]
        expected.append(_logit(vectors, blocks, old))
    np.testing.assert_allclose(alone["logits"], expected, atol=2e-5)
    assert np.std(expected) > 0.05

    moments = saved["optimizer"][f"dense.{ABOVE}over_arch.hidden.0.weight"]["exp_avg"].numpy()
    assert np.abs(moments).max() > 0
    actual = alone["state"][f"dense.{ABOVE}over_arch.hidden.0.weight.exp_avg"].numpy()
    for i, name in enumerate(now):
        block = actual[:, i * DIM : (i + 1) * DIM]
        if name in was:
            at = was.index(name) * DIM
            np.testing.assert_array_equal(block, moments[:, at : at + DIM], err_msg=name)
        else:
            assert not block.any()
    step = f"dense.{ABOVE}over_arch.hidden.0.weight"
    assert float(alone["state"][f"{step}.step"]) == float(saved["optimizer"][step]["step"]) == 6


def _logit(
    vectors: dict[str, np.ndarray], blocks: dict[str, np.ndarray], old: dict[str, np.ndarray]
) -> float:
    """The logit of a row.

    Args:
        vectors: ``[D + 1]`` of each field.
        blocks: columns of the over-arch's first layer, by field.
        old: the other weights.
    """
    rows = np.array([*vectors.values()], np.float64)
    factors = rows[:, :DIM]
    z = old[f"{ABOVE}bias"][0] + rows[:, DIM].sum()
    z += 0.5 * (factors.sum(0) ** 2 - (factors**2).sum(0)).sum()
    h = old[f"{ABOVE}over_arch.hidden.0.bias"].astype(np.float64)
    for name, vector in vectors.items():
        h = h + blocks[name] @ vector[:DIM]
    for layer in ("hidden.1", "output"):
        weight, bias = (old[f"{ABOVE}over_arch.{layer}.{part}"] for part in ("weight", "bias"))
        h = weight @ np.maximum(h, 0) + bias
    return float(z + h[0])


def test_grown_data_of_other_fields_keep_the_rows_of_earlier_ids(
    before: tuple[Path, dict[str, Any]],
) -> None:
    home, saved = before
    rows = re.sub(r"\bu(\d+),i(\d)", r"v\1,j\2", (home / "rows.csv").read_text())
    (home / "day2.csv").write_text(rows)
    grown = f"data.vocabulary_from={home / 'prepared' / 'before'}"
    config = after(home, AFTER, "grown", grown, "data.interactions.file=day2.csv")
    actual = run_ranks(_started, 2, config)[0]
    for table in ("user", "item", "mood"):
        name = f"model.embedding_arch.ebc.embedding_bags.{table}.weight"
        old, new = saved["model"][name].numpy(), actual["weights"][table]
        np.testing.assert_array_equal(new[: len(old)], old, err_msg=table)
        np.testing.assert_array_equal(new[len(old) :], actual["fresh"][table][len(old) :])
        assert (len(new) > len(old)) == (table != "mood")
    arguments_of = arguments(home, "grown")
    assert run_alone(train_command.main, ["--quiet", *arguments_of]) == 0


def _renamed(match: re.Match[str]) -> str:
    return "new" + match[0]


def test_rows_taken_by_new_ids_are_initialised(before: tuple[Path, dict[str, Any]]) -> None:
    home, saved = before
    rows = (home / "rows.csv").read_text()
    settings = ["data.interactions.time=time", "data.forget_after=30"]
    days = {  # the first day starts the clock of ids that have none
        "first": re.sub("2024-05", "2025-01", rows),
        "then": re.sub(r"\bu([0-4]),|\bi(\d),", _renamed, re.sub("2024-05", "2025-06", rows)),
    }
    earlier = "before"
    for name, lines in days.items():
        (home / f"{name}.csv").write_text(lines)
        grown = f"data.vocabulary_from={home / 'prepared' / earlier}"
        config = after(home, BEFORE, name, grown, f"data.interactions.file={name}.csv", *settings)
        earlier = name
    alone, two = run_alone(_started, config), run_ranks(_started, 2, config)[0]
    for entity, n_gone in (("user", 5), ("item", 10)):
        old, new = (
            PreparedDataset(home / "prepared" / name).entity_ids(entity).to_pylist()
            for name in ("before", "then")
        )
        other = np.array([id_ != new[row] for row, id_ in enumerate(old)])
        assert other.sum() == n_gone
        parameter = f"embedding_arch.ebc.embedding_bags.{entity}.weight"
        trained = saved["model"][f"model.{parameter}"].numpy()
        for actual in (alone, two):
            weights, fresh = actual["weights"][entity], actual["fresh"][entity]
            np.testing.assert_array_equal(weights[: len(old)][~other], trained[~other])
            np.testing.assert_array_equal(weights[: len(old)][other], fresh[: len(old)][other])
            [state] = [s for name, s in actual["of_tables"].items() if parameter in name]
            assert not state[: len(old)][other].any()
            assert state[: len(old)][~other].any()
    assert difference(two["losses"], alone["losses"]) <= 1e-6


def test_weights_alone_are_taken_under_another_optimizer(
    before: tuple[Path, dict[str, Any]],
) -> None:
    home, saved = before
    adam = "optimizer.tables={name: adam, lr: 0.003}"
    config = after(home, BEFORE, "alone", adam, "checkpoint.start_weights_only=true")
    alone, two = run_alone(_started, config), run_ranks(_started, 2, config)[1]
    assert not alone["state"]
    assert difference(two["losses"], alone["losses"]) <= 1e-6
    name = f"{ABOVE}over_arch.hidden.0.weight"
    np.testing.assert_array_equal(alone["weights"][name], saved["model"][name].numpy())
    assert run_alone(train_command.main, ["--quiet", *arguments(home, "alone")]) == 0
    state = checkpoint.read_state(checkpoint.find_checkpoint(home / "alone"))
    assert checkpoint.steps_in(state) == 6


@pytest.mark.parametrize(
    ("old", "new", "override", "said"),
    [
        ("", "", "optimizer.tables.name=adam", "optimizer.tables.name=rowwise_adagrad, whose"),
        ("", "", "optimizer.dense.name=sgd", "optimizer.dense.name=adam, whose state sgd cannot"),
        ("{name: mood}", "{name: mood, hash_rows: 9}", "", "mood: hash_rows is 9 and was None"),
        ("{name: mood}", "{name: mood, table: t}", "", "mood: table is 't' and was 'mood'"),
        ("transform: log", "transform: bucket", "", "price: transform is 'bucket' and was 'log'"),
        (
            "{name: mood}",
            "{name: mood, min_count: 70}",
            "",
            "fields mood; prepare it with data.voc",
        ),
    ],
)
def test_what_cannot_be_taken_is_refused_by_the_settings_name(
    before: tuple[Path, dict[str, Any]],
    capfd: pytest.CaptureFixture[str],
    old: str,
    new: str,
    override: str,
    said: str,
) -> None:
    home, _ = before
    name = "r" + re.sub(r"\W", "", new + override)
    more = [override] if override else []
    after(home, BEFORE.replace(old, new, 1) if old else BEFORE, name, *more)
    assert run_alone(train_command.main, ["--quiet", *arguments(home, name, *more)]) == 2
    printed = capfd.readouterr().err
    assert said in printed
    assert not (home / name / "checkpoints").exists()


def test_the_cure_for_another_optimizer_is_typed_and_cures(
    before: tuple[Path, dict[str, Any]],
) -> None:
    home, _ = before
    more = ["optimizer.dense.name=sgd", "checkpoint.start_weights_only=true"]
    after(home, BEFORE, "cured", *more)
    assert run_alone(train_command.main, ["--quiet", *arguments(home, "cured", *more)]) == 0


def test_an_over_arch_of_ones_own_takes_the_same_fields_alone(
    before: tuple[Path, dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    home, _ = before
    own = "model={over_arch: 'tests.cross_net:CrossNet', over_arch_layer_sizes: [400, 400, 400]}"
    (home / "own.yaml").write_text(
        config_of(home, BEFORE, *COMMON[1:], "data.name=own", own).to_yaml()
    )
    assert run_alone(train_command.main, ["--quiet", *arguments(home, "own")]) == 0
    start = f"checkpoint.start_from={home / 'own'}"
    for name, fields, code in (("same", BEFORE, 0), ("other", AFTER, 2)):
        config = config_of(home, fields, *COMMON[1:], f"data.name={name}", own, start)
        (home / f"{name}.yaml").write_text(config.to_yaml())
        assert run_alone(train_command.main, ["--quiet", *arguments(home, name)]) == code
    assert "which of its weights belong to which field is not known" in capfd.readouterr().err
    assert load_config(str(home / "same.yaml"), []).checkpoint.start_from
    assert PreparedDataset(home / "prepared" / "same").manifest.field_hashes
