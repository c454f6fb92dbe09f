"""Held-out rows that are read, scored and ranked in stretches, against all of them at once."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from deepfm_dist.data.batches.batch import Batch
from deepfm_dist.data.batches.held_out import SplitReader
from deepfm_dist.data.dataset import PreparedDataset, Rows
from deepfm_dist.data.jagged import Jagged, taken
from deepfm_dist.data.preparation import writing
from deepfm_dist.data.preparation.local import prepare
from deepfm_dist.data.schema import DataConfig
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.training import evaluation
from deepfm_dist.training.evaluation import RowEvaluator, Unknown
from tests.oracles.row_figures import click_figures
from tests.ranks import run_ranks

N_VALID = 700


@pytest.fixture(scope="module", params=[None, "w"])
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled rows in several files of several row groups, with and without weights."""
    folder, rng = tmp_path_factory.mktemp("clicks"), np.random.default_rng(3)
    lines = [
        f"{rng.integers(2)},u{rng.integers(40)},{rng.integers(9)},"
        f"{'|'.join(rng.choice([*'abc'], rng.integers(3)))},{rng.lognormal():.3f},"
        f"{'train' if k >= N_VALID else 'valid'}\n"
        for k in range(N_VALID + 300)
    ]
    rng.shuffle(lines)
    (folder / "c.csv").write_text("y,u,n,m,w,s\n" + "".join(lines))
    spec = {"file": "c.csv", "label": "y", "user": "u", "split": "s", "weight": request.param}
    features = [
        {"name": "user", "entity": "user", "min_count": 6},
        {"name": "n", "kind": "numeric"},
        {"name": "m", "separator": "|"},
    ]
    data = {"task": "ctr", "interactions": spec, "features": features, "lanes": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deepfm_dist.data.preparation.job.PARTITION_BYTES", 9000)
        patch.setattr(writing, "HELD_OUT_GROUP_ROWS", 100)
        prepare(DataConfig.model_validate(data), folder, folder / "d", 1)
    return folder / "d"


def same(found: Rows, expected: Rows) -> bool:
    for field in dataclasses.fields(Rows):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        if field.name == "context":
            for name, values in theirs.items():
                if isinstance(values, Jagged):
                    if ours[name].lists() != values.lists():
                        return False
                elif not np.array_equal(ours[name], values):
                    return False
        elif not np.array_equal(ours, theirs):
            return False
    return True


@pytest.mark.parametrize("memory_bytes", [0, 1 << 30])
def test_any_stretch_of_rows_is_read(dataset: Path, memory_bytes: int) -> None:
    prepared = PreparedDataset(dataset, memory_bytes)
    reader, whole = SplitReader(prepared, "valid"), prepared.rows("valid")
    assert reader.n == whole.n == N_VALID
    rng = np.random.default_rng(4)
    stretches = [(0, 0), (0, N_VALID), (N_VALID, N_VALID), (99, 101)]
    stretches += [tuple(sorted(rng.integers(0, N_VALID + 1, 2))) for _ in range(50)]
    for begin, end in stretches:
        at = np.arange(begin, end)
        part = {k: taken(v, at) for k, v in whole.context.items()}
        named = {n: getattr(whole, n) for n in ("users", "labels", "weights")}
        picked = {n: None if v is None else v[at] for n, v in named.items()}
        expected = Rows(items=None, context=part, n=len(at), **picked)
        assert same(reader.read(begin, end), expected)
        if memory_bytes == 0:
            assert len(reader._held) <= 1


class Scorer(nn.Module):
    """Scores with ties, from the dense field and the user's row alone."""

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of a batch; row 0, the unknown user, has its own."""
        logits = batch.dense[:, 0] / 4 - 1
        users = batch.sparse["user"]
        has = users.lengths() > 0
        logits[has] += users.values().float() % 5 / 3
        return logits.sum(), logits


def figures(folder: Path) -> tuple[dict[str, float], Unknown] | None:
    with process_group("cpu") as world:
        actual = RowEvaluator(PreparedDataset(folder, 0), "valid").measure(Scorer(), world)
        return actual and (actual.figures, actual.unknown)


@pytest.mark.parametrize("ranked_rows", [1 << 20, 60])
def test_figures_are_those_of_all_rows_at_once_at_any_world_size(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, ranked_rows: int
) -> None:
    monkeypatch.setattr(evaluation, "BLOCK_ROWS", 32)
    monkeypatch.setattr(evaluation, "RANKED_ROWS", ranked_rows)
    rows = PreparedDataset(dataset).rows("valid")
    assert rows.labels is not None
    assert rows.users is not None
    assert 20 < (rows.users == 0).sum() < N_VALID / 2
    dense = torch.from_numpy(np.asarray(rows.context["n"])) / 4 - 1
    logits = (dense + torch.from_numpy(rows.users).float() % 5 / 3).numpy()
    expected = click_figures(rows.labels, logits, rows.users, rows.weights)
    of_m = rows.context["m"]
    assert isinstance(of_m, Jagged)
    unknown = {"user": int((rows.users == 0).sum()), "m": sum(not any(m) for m in of_m.lists())}
    assert unknown["m"] > 20
    of_worlds = [run_ranks(figures, size, dataset) for size in (1, 2, 4)]
    for actual, *others in of_worlds:
        assert actual is not None
        assert actual[0] == pytest.approx(expected, rel=1e-12)
        assert actual[1] == Unknown(N_VALID, unknown)
        assert others == [None] * len(others)
        assert actual == of_worlds[0][0]
