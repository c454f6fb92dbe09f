"""Recommendations: in blocks, from short lists, and resumed after a kill."""

import json
import logging
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from deepfm_dist import vector_code
from deepfm_dist.build import deepfm_of, shard_for_training
from deepfm_dist.config import Config, config_from, load_config
from deepfm_dist.data.batches.collation import Collator
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.schema import History
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.distributed.sharding import local_shards
from deepfm_dist.errors import ConfigError
from deepfm_dist.ranking import chunks, lookup, ranker
from deepfm_dist.ranking.items import Catalogue
from deepfm_dist.ranking.output import ResumableOutput
from deepfm_dist.ranking.recommendation import recommend
from deepfm_dist.ranking.settings import RecommendConfig
from deepfm_dist.report.tables import ranking_table
from tests.conftest import HISTORY
from tests.ranking.cases import config_of, digest
from tests.ranks import RankFailed, run_alone, run_ranks

# A table of bags cut by rows sums them in another order at every world size.
SETTINGS = config_of("sharding.tables={genre: {kind: table_wise}}")
FILES = ("recommendations.csv", "recommendations.parquet")


def _recommended(
    folder: Path,
    config: Config,
    wanted: RecommendConfig,
    out: Path,
    checkpoint: Path | None = None,
    item_block: int = lookup.ITEM_BLOCK,
    dies_after: int | None = None,
    by_torch: bool = False,
    in_parts: bool = False,
) -> tuple[int, list[str], Mapping[str, Any]]:
    """Recommends by a model of the seed alone; (parts written, log, figures of rank 0)."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("deepfm_dist")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    lookup.ITEM_BLOCK = item_block
    if by_torch:
        vector_code.HAS_FMA = False
    written = 0
    write = ResumableOutput.write

    def counted(self: ResumableOutput, begin: int, schema: Any, tables: Any) -> None:
        nonlocal written
        if written == dies_after:
            raise KeyboardInterrupt
        write(self, begin, schema, tables)
        written += 1

    ResumableOutput.write = counted  # type: ignore[method-assign]
    dataset = PreparedDataset(folder)
    with process_group("cpu", threads=1) as world:
        sharded = shard_for_training(config, dataset.manifest, world)[0].eval()
        model = deepfm_of(sharded)
        actual = recommend(model, world, dataset, wanted, out, checkpoint, in_parts=in_parts)
        if actual is not None and in_parts:
            assert ranking_table(actual, dataset).endswith(f"written: {out / 'recommendations'}")
    return written, lines, {} if actual is None else actual.figures


def frame_of(out: Path) -> pd.DataFrame:
    return pd.read_parquet(out / "recommendations.parquet")


@pytest.fixture(scope="module")
def full(sample: PreparedDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every user's unseen items, all of them."""
    out = tmp_path_factory.mktemp("whole")
    run_alone(_recommended, sample.folder, SETTINGS, RecommendConfig(k=400), out)
    return out


def of_lists(frame: pd.DataFrame, users: set[int], items: set[int], k: int) -> pd.DataFrame:
    """The whole ranking cut down to some users and items, K each."""
    kept = frame[frame["user_id"].isin(users) & frame["item_id"].isin(items)]
    kept = kept.groupby("user_id", sort=False).head(k).reset_index(drop=True)
    return kept.assign(rank=kept.groupby("user_id").cumcount().astype("int32") + 1)


@pytest.mark.parametrize("as_files", [False, True])
def test_lists_of_users_and_items_are_kept_to(
    sample: PreparedDataset, full: Path, tmp_path: Path, as_files: bool
) -> None:
    all_users, all_items = (
        [int(i) for i in sample.entity_ids(e).to_pylist()[1:]] for e in ("user", "item")
    )
    users, allowed, blocked = all_users[5:40:3], all_items[:60], [*all_items[::4], 10**9]
    misspelt = f"{all_items[0]}.0"  # meant is all_items[0], which is blocked anyway
    wanted = RecommendConfig.model_validate(
        {
            "k": 40,
            "users": users[::-1],
            "allow_items": [*allowed, misspelt],
            "block_items": blocked,
        }
    )
    if as_files:
        names = {}
        for name, column, ids in (
            ("users", "user", users),
            ("allow_items", "item", [*allowed, misspelt]),
            ("block_items", "item", blocked),
        ):
            names[name] = str(tmp_path / f"{name}.csv")
            pd.DataFrame({column: ids, "note": "x"}).to_csv(names[name], index=False)
        wanted = wanted.model_copy(update=names)
    _, lines, figures = run_alone(_recommended, sample.folder, SETTINGS, wanted, tmp_path)
    expected = of_lists(frame_of(full), set(users), set(allowed) - set(blocked), 40)
    pd.testing.assert_frame_equal(frame_of(tmp_path), expected)
    short = int((expected.groupby("user_id").size() < 40).sum()) + len(users)
    short -= expected["user_id"].nunique()
    assert short > 0
    assert f"fewer than 40 candidates to recommend to {short} users" in lines
    assert figures["pairs"] == len(users) * len(set(allowed) - set(blocked))
    assert figures["pairs_per_s"] == pytest.approx(figures["pairs"] / figures["seconds"])
    assert len(figures["peak_memory_gib"]) == 1 and 0.1 < figures["peak_memory_gib"][0] < 8
    line = (
        f"recommend.allow_items: not in the catalogue: 1 item (such as {misspelt!r}; 1 differ "
        f"only in decimals of zero: {misspelt!r} and '{all_items[0]}')"
    )
    assert line in lines
    assert "recommend.block_items: not in the catalogue: 1 item (such as '1000000000')" in lines


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"users": ["4", "zz", "yy"]}, r"DataError: recommend\.users: 2 of 3 .*'zz'.*train again"),
        (
            {"users": ["4", " 4"]},
            r"1 of 2 .*' 4'; 1 differ only in the spaces.*: ' 4' and '4'",
        ),
        ({"users": []}, r"DataError: recommend\.users: the list is empty"),
        ({"allow_items": ["zz"]}, r"DataError: .* leave no item"),
        ({"users": "nowhere.csv"}, r"DataError: recommend\.users=nowhere\.csv: no such file"),
    ],
)
def test_lists_that_cannot_be_used_are_refused(
    sample: PreparedDataset, tmp_path: Path, lists: dict[str, Any], message: str
) -> None:
    wanted = RecommendConfig(k=3, **lists)
    with pytest.raises(RankFailed, match=message):
        run_alone(_recommended, sample.folder, SETTINGS, wanted, tmp_path)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("by_torch", [False, True])
def test_a_catalogue_larger_than_the_memory_is_ranked_in_blocks(
    sample: PreparedDataset, full: Path, tmp_path: Path, world_size: int, by_torch: bool
) -> None:
    wanted = RecommendConfig(k=400, memory_bytes=20_000)
    _, lines, _ = run_ranks(
        _recommended,
        world_size,
        sample.folder,
        SETTINGS,
        wanted,
        tmp_path,
        item_block=64,
        by_torch=by_torch,
    )[0]
    assert any("items, 64 of them in memory at a time" in line for line in lines)
    assert ("catalogue: torch, since this processor has no fused" in "".join(lines)) == by_torch
    if not by_torch:
        assert [digest(tmp_path / f) for f in FILES] == [digest(full / f) for f in FILES]
        return
    actual, expected = frame_of(tmp_path), frame_of(full)
    assert len(actual) == len(expected)
    both = actual.merge(expected, on=["user_id", "item_id"])
    difference = (both["score_x"] - both["score_y"]).abs()
    assert (difference <= 2e-5 * both["score_y"].abs().clip(lower=1)).all()
    assert (actual["score"] - expected["score"]).abs().max() < 1e-4  # rank by rank


@pytest.mark.parametrize("candidates", [None, 30])
def test_a_catalogue_that_only_all_ranks_can_hold_is_shared_out(
    sample: PreparedDataset, full: Path, tmp_path: Path, candidates: int | None
) -> None:
    # 400 items; a rank may hold 128 of them, one of four has a share of its own short of that.
    outs = {size: tmp_path / str(size) for size in (1, 4)}
    for size, out in outs.items():
        out.mkdir()
        wanted = RecommendConfig(
            k=10, candidates=candidates, memory_bytes=40_000 if size == 4 else 1 << 30
        )
        arguments = (sample.folder, SETTINGS, wanted, out)
        results = run_ranks(_recommended, size, *arguments, item_block=64)
    assert any("400 items, 128 of them in memory of each rank" in line for line in results[0][1])
    assert [digest(outs[4] / f) for f in FILES] == [digest(outs[1] / f) for f in FILES]


def test_a_matrix_of_a_catalogue_that_is_shared_out(
    sample: PreparedDataset, tmp_path: Path
) -> None:
    digests = []
    for size, memory_bytes in ((1, 1 << 30), (4, 40_000)):
        out = tmp_path / str(size)
        out.mkdir()
        wanted = RecommendConfig(k=3, matrix="fp32", memory_bytes=memory_bytes)
        run_ranks(_recommended, size, sample.folder, SETTINGS, wanted, out, item_block=64)
        digests.append([digest(out / f) for f in (*FILES, "score_matrix.parquet")])
    assert digests[0] == digests[1]


@pytest.mark.parametrize("by_torch", [False, True])
def test_short_lists_are_scored_in_full(
    sample: PreparedDataset, full: Path, tmp_path: Path, by_torch: bool
) -> None:
    shallow = load_config("sample", ["model={embedding_dim: 10, deep: false, init_std: 0.5}"])
    fm, full, short = tmp_path / "fm", tmp_path / "full", tmp_path / "short"
    for out, config, wanted in (
        (fm, shallow, RecommendConfig(k=30)),
        (full, SETTINGS, RecommendConfig(k=5, candidates=399)),
        (short, SETTINGS, RecommendConfig(k=5, candidates=30)),
    ):
        out.mkdir()
        arguments = (sample.folder, config, wanted, out)
        *_, figures = run_alone(_recommended, *arguments, by_torch=by_torch)
    best_by_fm = frame_of(fm)[["user_id", "item_id"]]
    everything = frame_of(full)
    expected = everything.merge(best_by_fm).groupby("user_id", sort=False).head(5)
    exact = everything.groupby("user_id", sort=False).head(5)
    actual = frame_of(short)
    keys = ["user_id", "item_id"]
    if not by_torch:
        assert (actual[keys].to_numpy() == expected[keys].to_numpy()).all()
        assert (actual["score"].to_numpy() == expected["score"].to_numpy()).all()
    else:
        assert len(actual.merge(expected[keys])) > 0.999 * len(actual)
    assert len(frame_of(full).merge(exact[keys])) > 0.999 * len(exact)
    short_list = figures["short_list"]
    assert (short_list["candidates"], short_list["users"]) == (30, 512)
    users = sorted(exact["user_id"].unique())
    overlap = len(exact.merge(actual[keys])) / len(exact)
    assert short_list["overlap"] == pytest.approx(overlap, abs=0.02)
    of_fm = best_by_fm.groupby("user_id", sort=False).head(5)
    deep_share = 1 - len(exact.merge(of_fm)) / len(exact)
    assert short_list["deep_share"] == pytest.approx(deep_share, abs=0.02)
    assert short_list["times_as_fast"] > 0
    assert len(users) == 700


def test_a_killed_run_is_continued_if_nothing_has_changed(
    sample: PreparedDataset, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "weights").write_text("1")
    once, again = tmp_path / "once", tmp_path / "again"
    once.mkdir()
    arguments = (sample.folder, SETTINGS, RecommendConfig(k=10))
    assert run_alone(_recommended, *arguments, once, checkpoint)[0] == 2
    with pytest.raises(RankFailed, match="KeyboardInterrupt"):
        run_alone(_recommended, *arguments, again, checkpoint, dies_after=1)
    assert not (again / "recommendations.csv").exists()
    killed = tmp_path / "killed"
    shutil.copytree(again, killed)
    results = run_ranks(_recommended, 2, *arguments, again, checkpoint)
    assert [written for written, *_ in results] == [1, 0]
    assert "reusing 1 part of an interrupted run" in results[0][1]
    assert [digest(again / f) for f in FILES] == [digest(once / f) for f in FILES]
    assert sorted(p.name for p in again.iterdir()) == list(FILES)

    other = tmp_path / "other"
    shutil.copytree(killed, other)
    few = RecommendConfig(k=9)
    assert run_alone(_recommended, sample.folder, SETTINGS, few, other, checkpoint)[0] == 2
    (checkpoint / "weights").write_text("22")
    assert run_alone(_recommended, *arguments, killed, checkpoint)[0] == 2


def test_a_run_that_was_killed_at_its_score_matrix_ranks_nothing_twice(
    sample: PreparedDataset, tmp_path: Path
) -> None:
    checkpoint, once, again = (tmp_path / name for name in ("checkpoint", "once", "again"))
    for folder in (checkpoint, once, again):
        folder.mkdir()
    arguments = (sample.folder, SETTINGS, RecommendConfig(k=10, matrix="fp32"))
    assert run_alone(_recommended, *arguments, once, checkpoint)[0] == 4
    with pytest.raises(RankFailed, match="KeyboardInterrupt"):
        run_alone(_recommended, *arguments, again, checkpoint, dies_after=3)
    assert not list(again.glob("*.parquet"))
    assert run_alone(_recommended, *arguments, again, checkpoint)[0] == 1
    names = [*FILES, "score_matrix.parquet"]
    assert sorted(p.name for p in again.iterdir()) == names
    assert [digest(again / f) for f in names] == [digest(once / f) for f in names]


def test_parts_are_the_same_at_any_world_size_and_after_a_kill(
    sample: PreparedDataset, tmp_path: Path
) -> None:
    checkpoint, file = tmp_path / "checkpoint", tmp_path / "file"
    for folder in (checkpoint, file):
        folder.mkdir()
    wanted = RecommendConfig(k=10, matrix="int8")
    work = partial(_recommended, sample.folder, SETTINGS, wanted, checkpoint=checkpoint)
    run_alone(work, out=file)
    made = {}
    for name, size in (("one", 1), ("two", 2), ("killed", 1)):
        out = tmp_path / name
        if name == "killed":
            with pytest.raises(RankFailed, match="KeyboardInterrupt"):
                run_alone(work, out=out, dies_after=1, in_parts=True)
            assert [p.name for p in sorted((out / "recommendations").iterdir())] == [
                "_inputs.json",
                "part-000000.parquet",
            ]
        results = run_ranks(work, size, out=out, in_parts=True)
        written = [n for n, *_ in results]
        assert written == {"one": [4], "two": [2, 2], "killed": [3]}[name]
        made[name] = {str(p.relative_to(out)): digest(p) for p in out.rglob("*") if p.is_file()}
    assert made["one"] == made["two"] == made["killed"]
    parts = ["_SUCCESS", "_inputs.json", "part-000000.parquet", "part-000001.parquet"]
    folders = ["recommendations", "score_matrix"]
    assert sorted(made["one"]) == [f"{folder}/{part}" for folder in folders for part in parts]
    whole = pq.read_table(file / "recommendations.parquet")
    assert pq.read_table(tmp_path / "one/recommendations").equals(whole)
    summary = json.loads((tmp_path / "killed/recommendations/_SUCCESS").read_text())
    owners = whole["user_id"].unique()
    assert summary == {
        "parts": 2,
        "owners": 700,
        "rows": len(whole),
        "full": len(owners),
        "some": 700,
    }

    written, lines, _ = run_alone(work, out=tmp_path / "one", in_parts=True)
    assert written == 0
    assert f"{tmp_path / 'one/recommendations'}: already complete, from the same inputs" in lines
    (checkpoint / "weights").write_text("2")
    assert run_alone(work, out=tmp_path / "one", in_parts=True)[0] == 4


def test_a_killed_run_for_strangers_is_not_continued_with_other_items(
    with_history: PreparedDataset, tmp_path: Path
) -> None:
    ids = with_history.entity_ids("item").to_pylist()[1:]
    checkpoint, file = tmp_path / "checkpoint", tmp_path / "strangers.csv"
    checkpoint.mkdir()
    config = load_config("sample", [*HISTORY, "model.init_std=0.3"])
    actual = []
    for name, first in (("once", 0), ("killed", 1), ("killed", 0)):
        rows = [(f"s{n}", ids[(n + k + first) % len(ids)]) for n in range(700) for k in range(3)]
        pd.DataFrame(rows, columns=["user", "item"]).to_csv(file, index=False)
        arguments = (
            with_history.folder,
            config,
            RecommendConfig(k=5, histories=str(file)),
            tmp_path / name,
        )
        (tmp_path / name).mkdir(exist_ok=True)
        if first:
            with pytest.raises(RankFailed, match="KeyboardInterrupt"):
                run_alone(_recommended, *arguments, checkpoint, dies_after=1)
        else:
            actual.append(run_alone(_recommended, *arguments, checkpoint)[0])
    assert actual == [2, 2]
    assert digest(tmp_path / "killed" / FILES[0]) == digest(tmp_path / "once" / FILES[0])


@pytest.mark.parametrize("kind", ["int8", "fp16", "fp32"])
def test_the_score_matrix_holds_every_score(
    sample: PreparedDataset, tmp_path: Path, kind: Literal["int8", "fp16", "fp32"]
) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    for out, size in ((once, 1), (twice, 2)):
        out.mkdir()
        wanted = RecommendConfig(k=400, mask=(), matrix=kind)
        run_ranks(_recommended, size, sample.folder, SETTINGS, wanted, out)
    assert digest(once / "score_matrix.parquet") == digest(twice / "score_matrix.parquet")
    table = pq.read_table(once / "score_matrix.parquet")
    actual = np.stack(table["scores"].to_pandas().to_list())
    ranked = frame_of(once)
    logits = ranked.pivot(index="user_id", columns="item_id", values="score")
    assert table["user_id"].to_pylist() == list(logits.index)
    assert json.loads(table.schema.metadata[b"item_ids"]) == list(logits.columns)
    expected = logits.to_numpy()
    assert actual.shape == expected.shape == (700, 400)
    if kind == "int8":
        expected = np.rint(127 / (1 + np.exp(-expected.astype(np.float64)))).astype(np.int8)
    assert actual.dtype == {"int8": np.int8, "fp16": np.float16, "fp32": np.float32}[kind]
    assert (actual == expected.astype(actual.dtype)).all()


def test_fewer_candidates_than_items_wanted_are_refused() -> None:
    tree = {"data": load_config("sample").data.model_dump(), "recommend": {"candidates": 3}}
    with pytest.raises(ConfigError, match=r"candidates=3 cannot give k=10 items"):
        config_from(tree)


def _for_users_and_for_strangers(
    folder: Path, out: Path, file: Path
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The same users: as rows of the user table, which is 0, and as a file of their items."""
    dataset = PreparedDataset(folder)
    data = dataset.manifest.data.model_copy(update={"history": History(dropout=0.5)})
    dataset.manifest = dataset.manifest.model_copy(update={"data": data})
    config = load_config("sample", [*HISTORY, "model.init_std=0.3", "model.embedding_dim=8"])
    with process_group("cpu", threads=1) as world:
        sharded = shard_for_training(config, dataset.manifest, world)[0].eval()
        for table, _, _, piece in local_shards(sharded):
            if table == "user":
                piece.zero_()
        model = deepfm_of(sharded)
        for wanted, target in (
            (RecommendConfig(k=10, mask=("train",)), out / "users"),
            (RecommendConfig(k=10, histories=str(file)), out / "strangers"),
        ):
            recommend(model, world, dataset, wanted, target)
    return frame_of(out / "users"), frame_of(out / "strangers")


def test_strangers_are_scored_by_their_items_as_users_are_by_theirs(
    with_history: PreparedDataset, tmp_path: Path
) -> None:
    ids = with_history.entity_ids("item")
    users = with_history.entity_ids("user").to_pylist()
    pairs = [
        (f"new-{user}", ids[item].as_py())
        for user, bag in zip(users, with_history.history.lists(), strict=True)
        for item in bag
    ]
    shuffled = [pairs[i] for i in np.random.default_rng(1).permutation(len(pairs))]
    extra = [*shuffled, *shuffled[:9], ("lost", "no such item"), (pairs[0][0], "no such item")]
    file = tmp_path / "strangers.csv"
    pd.DataFrame(extra, columns=["user", "item"]).to_csv(file, index=False)
    for size in (1, 2):
        out = tmp_path / str(size)
        known, new = run_ranks(_for_users_and_for_strangers, size, with_history.folder, out, file)[
            0
        ]
        assert set(new["user_id"]) == {f"new-{user}" for user in users if user is not None}
        new["user_id"] = new["user_id"].str.removeprefix("new-").astype(int)
        new = new.sort_values(["user_id", "rank"]).reset_index(drop=True)
        assert known["score"].std() > 0.1
        assert np.abs(known["score"] - new["score"]).max() < 1e-5
        assert (known["item_id"] == new["item_id"]).mean() > 0.999  # but for ties in rounding


@pytest.mark.parametrize(
    ("wanted", "rows", "said"),
    [
        (
            RecommendConfig(k=5, histories="FILE"),
            "1,1",
            "FILE: this model knows its users by id.*history: item",
        ),
        (
            RecommendConfig(k=5, users=("nobody",)),
            "",
            "leave them out, or train a model .*history: item",
        ),
    ],
)
def test_without_a_history_strangers_are_refused_with_the_way_to_get_it(
    sample: PreparedDataset, tmp_path: Path, wanted: RecommendConfig, rows: str, said: str
) -> None:
    file = tmp_path / "FILE"
    file.with_suffix(".csv").write_text(f"user,item\n{rows}\n")
    if wanted.histories:
        wanted = RecommendConfig(k=wanted.k, histories=str(file.with_suffix(".csv")))
        said = said.replace("FILE", "FILE.csv")
    with pytest.raises(RankFailed, match=f"DataError: .*{said}"):
        run_alone(_recommended, sample.folder, SETTINGS, wanted, tmp_path)


def test_a_file_of_strangers_without_a_known_item_is_refused(
    with_history: PreparedDataset, tmp_path: Path
) -> None:
    (tmp_path / "x.csv").write_text("user,item\n1,never seen\n")
    wanted = RecommendConfig(k=5, histories=str(tmp_path / "x.csv"))
    config = load_config("sample", HISTORY)
    with pytest.raises(RankFailed, match=r"x\.csv: none of its items is in the training data"):
        run_alone(_recommended, with_history.folder, config, wanted, tmp_path)


def _scores_of_pairs(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """``[users, items]`` logits: factorised, and from a batch with a row for each pair."""
    dataset = PreparedDataset(folder)
    config = load_config("sample", [*HISTORY, "model.init_std=0.2"])
    with process_group("cpu", threads=1) as world:
        sharded = shard_for_training(config, dataset.manifest, world)[0].eval()
        model, catalogue = deepfm_of(sharded), Catalogue(dataset)
        users = np.array([1, 5, 77], np.int32)
        of_users = ranker.ModelRanker.from_model(
            model, world, dataset, catalogue, ranker.Users(users), {}
        )
        actual = of_users.scores(0, len(users), len(users))
        pairs = np.repeat(users, len(catalogue)), np.tile(catalogue.rows, len(users))
        batch = Collator(dataset)(*pairs)
        with torch.no_grad():
            rows = model.embedding_arch.rows(batch.sparse).double()
            logits = model.interaction_arch.double()(rows, batch.dense.double())
        return actual, logits.view(len(users), -1).numpy()


def test_factorised_scores_of_histories_are_the_forwards(with_history: PreparedDataset) -> None:
    actual, expected = run_alone(_scores_of_pairs, with_history.folder)
    assert expected.std() > 0.1
    assert np.abs(actual - expected).max() <= 1e-5 * max(1, np.abs(expected).max())


def _ranked_users(folder: Path, at_once: int) -> list[chunks.Ranked]:
    """Users of six stretches, of which two were ranked before."""
    dataset, config = PreparedDataset(folder), load_config("sample", ["model.init_std=0.2"])
    chunks.USERS_AT_ONCE = ranker.USERS_AT_ONCE = at_once
    with process_group("cpu") as world:
        model = deepfm_of(shard_for_training(config, dataset.manifest, world)[0].eval())
        catalogue = Catalogue(dataset)
        users = np.resize(np.arange(1, 701, dtype=np.int32), 6 * ranker.USER_BLOCK - 100)
        of_users = ranker.ModelRanker.from_model(
            model, world, dataset, catalogue, ranker.Users(users), {}
        )
        seen = catalogue.seen_by(users, [dataset.positives("train")])
        return list(chunks.rank_users(of_users, len(users), seen, 10, world, [0, 2, 3, 5]))


def test_users_looked_up_together_are_ranked_as_one_stretch_after_another(
    sample: PreparedDataset,
) -> None:
    alone = run_alone(_ranked_users, sample.folder, ranker.USER_BLOCK)
    assert [begin // ranker.USER_BLOCK for begin, _, _ in alone] == [0, 2, 3, 5]
    for size in (1, 2, 3):  # three ranks: the last one has run out of stretches
        actual = [r for of in run_ranks(_ranked_users, size, sample.folder, 1 << 20) for r in of]
        for (begin, positions, scores), (begin_alone, *expected) in zip(actual, alone, strict=True):
            assert begin == begin_alone
            np.testing.assert_array_equal(positions, expected[0])
            np.testing.assert_array_equal(scores, expected[1])


def test_histories_give_the_same_bytes_at_any_world_size(
    with_history: PreparedDataset, tmp_path: Path
) -> None:
    config = load_config("sample", [*HISTORY, "sharding.kind=table_wise", "model.init_std=0.2"])
    digests = set()
    for size in (1, 2, 4):
        out = tmp_path / str(size)
        run_ranks(_recommended, size, with_history.folder, config, RecommendConfig(k=10), out)
        digests.add(tuple(digest(out / name) for name in FILES))
    assert len(digests) == 1


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("memory_bytes", [1 << 30, 40_000])
def test_an_index_that_looks_at_everything_finds_the_candidates(
    sample: PreparedDataset, tmp_path: Path, world_size: int, memory_bytes: int
) -> None:
    pytest.importorskip("faiss")
    outs = [tmp_path / name for name in ("all", "index")]
    by_all = RecommendConfig(k=5, candidates=30, memory_bytes=memory_bytes)
    by_index = by_all.model_copy(update={"index": "IVF4,Flat", "probes": 4})
    for out, wanted in zip(outs, (by_all, by_index), strict=True):
        out.mkdir()
        arguments = (sample.folder, SETTINGS, wanted, out)
        *_, figures = run_ranks(_recommended, world_size, *arguments, item_block=64)[0]
    everything, actual = (frame_of(out) for out in outs)
    both = everything.merge(actual, on=["user_id", "item_id", "rank", "score"])
    assert len(both) > 0.999 * len(everything)  # sums in another order, at the end of a list
    assert len(actual) == len(everything)
    assert figures["short_list"]["users"] == 512


def test_indexes_that_cannot_be_had_are_refused(
    sample: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (
        sample.folder,
        SETTINGS,
        RecommendConfig(k=5, candidates=30, index="IVF9,Nonsense"),
        tmp_path,
    )
    message = r"ConfigError: recommend\.index=IVF9,Nonsense: faiss "
    with pytest.raises(
        RankFailed, match=message + r"(cannot make it of 400 items|is not installed)"
    ):
        run_alone(_recommended, *arguments)
    monkeypatch.setattr("deepfm_dist.ranking.nearest.find_spec", lambda name: None)
    with pytest.raises(RankFailed, match=message + r"is not installed; pip install faiss-cpu"):
        run_alone(_recommended, *arguments)
    tree = {"data": load_config("sample").data.model_dump(), "recommend": {"index": "HNSW32"}}
    with pytest.raises(ConfigError, match=r"index=HNSW32 needs candidates: set candidates"):
        config_from(tree)
