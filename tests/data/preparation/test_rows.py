"""Seen, repeated and tied rows are treated by their contents, never by their place in a file."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from deepfm_dist.build import deepfm_of, shard_for_training
from deepfm_dist.config import load_config
from deepfm_dist.data.batches.row_batches import TrainingBatches
from deepfm_dist.data.batches.user_batches import Candidates, UserBatches
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.jagged import Jagged
from deepfm_dist.data.preparation import job
from deepfm_dist.data.preparation.local import prepare
from deepfm_dist.data.schema import DataConfig
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.errors import DataError
from deepfm_dist.ranking.evaluation import RankingEvaluator
from deepfm_dist.ranking.recommendation import recommend
from deepfm_dist.ranking.settings import RecommendConfig
from tests.ranks import run_alone

Pairs = set[tuple[str, str]]
BASE: dict[str, Any] = {
    "interactions": {"file": "s.csv", "user": "u", "item": "i", "time": "t"},
    "features": [{"name": "user", "entity": "user"}, {"name": "item", "entity": "item"}],
    "split": {"valid": 0, "test": 0},
}
RATED = BASE["interactions"] | {"rating": "r", "min_rating": 4}
"""Ratings, of which 4 and 5 are positives."""


def prepared(root: Path, rows: pd.DataFrame, name: str = "d", **changes: Any) -> PreparedDataset:
    rows.to_csv(root / "s.csv", index=False)
    prepare(DataConfig.model_validate(BASE | changes), root, root / name, seed=1)
    return PreparedDataset(root / name)


def ratings(n_users: int = 12, n_items: int = 16, each: int = 10, seed: int = 3) -> pd.DataFrame:
    """Every user's ratings of some items, each at a time of its own."""
    rng = np.random.default_rng(seed)
    rows = [
        (f"u{u}", f"i{i}", 4 if k < 4 else int(rng.integers(2, 6)))
        for u in range(n_users)
        for k, i in enumerate(rng.choice(n_items, each, replace=False))
    ]
    frame = pd.DataFrame(rows, columns=["u", "i", "r"])
    frame["t"] = rng.permutation(len(frame))
    return frame


def external(dataset: PreparedDataset, bags: Jagged, first_item: int = 0) -> Pairs:
    """(user, item) of lists by user, as ids."""
    users, items = (dataset.entity_ids(e).to_pylist() for e in ("user", "item"))
    return {(users[u], items[i + first_item]) for u, bag in enumerate(bags.lists()) for i in bag}


def pairs_of(rows: pd.DataFrame) -> Pairs:
    return set(zip(rows["u"], rows["i"], strict=True))


def met(dataset: PreparedDataset, split: str) -> Pairs:
    return set().union(*(external(dataset, bags) for bags in dataset.met(split)))


@pytest.mark.parametrize("partition_bytes", [300, 1 << 30])
def test_rows_below_the_rating_are_seen_from_their_time_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, partition_bytes: int
) -> None:
    """leave_last: a user's last two positives are held out, and what comes with them is later."""
    monkeypatch.setattr(job, "PARTITION_BYTES", partition_bytes)
    rows = ratings()
    split = {"method": "leave_last", "valid": 1, "test": 1}
    one = {"evaluation_per_positive": 1}
    dataset = prepared(tmp_path, rows, interactions=RATED, split=split, negatives=one)
    expected: dict[str, Pairs] = {"train": set(), "valid": set(), "test": set()}
    for user, theirs in rows.groupby("u"):
        liked = np.sort(theirs["t"][theirs["r"] >= 4].to_numpy())
        for row in theirs.itertuples():
            later = [liked[-1] <= row.t, liked[-2] <= row.t]
            expected["test" if later[0] else "valid" if later[1] else "train"] |= {(user, row.i)}
    in_table = set(dataset.entity_ids("item").to_pylist())
    for name, pairs in expected.items():
        assert met(dataset, name) == {(u, i) for u, i in pairs if i in in_table}
    low = rows[rows["r"] < 4]
    assert dataset.manifest.dropped == {"rows rated below 4, kept as seen": len(low)}
    assert external(dataset, dataset.history) == expected["train"] - pairs_of(low)
    n_positive = {n: spec.positives for n, spec in dataset.manifest.splits.items()}
    assert n_positive == {"train": (rows["r"] >= 4).sum() - 24, "valid": 12, "test": 12}


@pytest.mark.parametrize("memory_bytes", [0, 1 << 30])
@pytest.mark.parametrize("avoid", ["train", "all"])
@pytest.mark.parametrize("least", [1, 6])
def test_rows_below_the_rating_are_never_negatives(
    tmp_path: Path, avoid: str, memory_bytes: int, least: int
) -> None:
    """Of users with a row of their own (least 1) as of those below min_count."""
    rows = ratings()
    dataset = prepared(
        tmp_path,
        rows.assign(who=rows["u"]),
        interactions=RATED,
        features=[
            {"name": "user", "entity": "user", "min_count": least},
            {"name": "item", "entity": "item"},
            {"name": "who"},
        ],
        split={"method": "temporal", "valid": 0.1, "test": 0.1},
        negatives={"per_positive": 2, "avoid": avoid, "evaluation_per_positive": 2},
    )
    held_out_from = np.sort(rows["t"][rows["r"] >= 4].to_numpy())[
        dataset.manifest.splits["train"].rows
    ]
    known = rows if avoid == "all" else rows[rows["t"] < held_out_from]
    dataset = PreparedDataset(dataset.folder, memory_bytes)
    who = [None, *dataset.vocabulary("who").ids.to_pylist()]
    items = dataset.entity_ids("item").to_pylist()
    batches = TrainingBatches(dataset, 40, 0, 1, seed=2)
    negatives: Pairs = set()
    for batch in batches.steps(1, 20 * batches.steps_per_epoch):
        bags = {k: [b.tolist() for b in j.to_dense()] for k, j in batch.sparse.to_dict().items()}
        for row in range(len(batch.labels)):
            if batch.weights[row] and not batch.labels[row]:
                negatives.add((who[bags["who"][row][0]], items[bags["item"][row][0]]))
    users = set(rows["u"][(rows["r"] >= 4) & (rows["t"] < held_out_from)])
    everything = {(u, i) for u in users for i in items[1:]}
    assert negatives == everything - pairs_of(known)
    for split in ("valid", "test"):
        held_out = dataset.rows(split)
        actual = zip(held_out.context["who"], held_out.items, held_out.labels, strict=True)
        drawn = {(who[u], items[i]) for u, i, label in actual if label == 0}
        assert drawn
        assert not drawn & pairs_of(rows)


def test_losses_over_the_catalogue_and_fixed_negatives_avoid_them_too(tmp_path: Path) -> None:
    rows = ratings()
    dataset = prepared(tmp_path, rows, interactions=RATED)
    users, items = (dataset.entity_ids(e).to_pylist() for e in ("user", "item"))
    batch = UserBatches(dataset, 12, 0, 1, 1, Candidates()).batch(1)
    order = [users[b.tolist()[0]] for b in batch.sparse["user"].to_dense()[:12]]
    known = zip(batch.known_users.tolist(), batch.known_items.tolist(), strict=True)
    assert {(order[u], items[1 + i]) for u, i in known} == {
        (u, i) for u, i in pairs_of(rows) if i in items
    }
    fixed = prepared(tmp_path, rows, "f", interactions=RATED, negatives={"fixed_per_user": 3})
    users, items = (fixed.entity_ids(e).to_pylist() for e in ("user", "item"))
    train = fixed.rows("train")
    actual = zip(train.users, train.items, train.labels, strict=True)
    negatives = [(users[u], items[i]) for u, i, label in actual if label == 0]
    assert len(set(negatives)) == 12 * 3
    assert not set(negatives) & pairs_of(rows)
    assert met(fixed, "train") == pairs_of(rows)  # and what was drawn is not seen


def _rankings(folder: Path, config_path: str, changes: list[str]) -> dict[str, Pairs]:
    """(user, item) of everything that recommend and evaluate rank, by command."""
    config = load_config(config_path, changes)
    with process_group("cpu") as world:
        dataset = PreparedDataset(folder)
        model = deepfm_of(shard_for_training(config, dataset.manifest, world)[0].eval())
        n_items = dataset.manifest.entities["item"] - 1
        wanted = RecommendConfig(k=n_items, mask=config.recommend.mask)
        recommend(model, world, dataset, wanted, folder / "out")
        held_out = RankingEvaluator(dataset, "test", {}, config.evaluate.mask_seen)
        measured = held_out.measure(held_out.ranker(model, world), (n_items,), world)
    assert measured is not None
    users, items = (dataset.entity_ids(e).to_pylist() for e in ("user", "item"))
    csv = pd.read_csv(folder / "out" / "recommendations.csv", dtype=str)
    return {
        "recommend": set(zip(csv["user"], csv["item"], strict=True)),
        "evaluate": {
            (users[user], items[row])
            for user, ranked in zip(held_out.users, measured[2], strict=True)
            for row in ranked
            if row >= 0
        },
        "relevant": {
            (users[user], items[row])
            for user, bag in zip(held_out.users, held_out.relevant.lists(), strict=True)
            for row in bag
        },
    }


def _config(root: Path, data: dict[str, Any]) -> str:
    small = {"model": {"embedding_dim": 4, "over_arch_layer_sizes": [4]}}
    (root / "c.yaml").write_text(yaml.safe_dump({"data": data, **small}))
    return str(root / "c.yaml")


@pytest.mark.parametrize("task", ["implicit", "ctr"])
def test_what_was_seen_is_not_recommended_unless_allowed(tmp_path: Path, task: str) -> None:
    rows = ratings()
    changes: dict[str, Any] = {
        "interactions": RATED,
        "split": {"method": "temporal", "valid": 0.1, "test": 0.2},
        "negatives": {"evaluation_per_positive": 1},
    }
    if task == "ctr":  # shown and not clicked is seen as well
        rows["y"] = (rows["r"] >= 4).astype(int)
        changes |= {"task": "ctr", "interactions": BASE["interactions"] | {"label": "y"}}
        del changes["negatives"]
    dataset = prepared(tmp_path, rows, **changes)
    config = _config(tmp_path, BASE | changes)
    users, items = (set(dataset.entity_ids(e).to_pylist()[1:]) for e in ("user", "item"))
    everything = {(u, i) for u in users for i in items}
    counted = rows if task == "ctr" else rows[rows["r"] >= 4]
    order = np.sort(counted["t"].to_numpy())
    test_from = order[len(order) - round(0.2 * len(order))]
    in_test = rows[(rows["t"] >= test_from) & (rows["r"] >= 4)]
    actual = run_alone(_rankings, dataset.folder, config, [])
    assert actual["recommend"] == everything - pairs_of(rows)
    ranked_users = {u for u, i in pairs_of(in_test) if u in users}
    assert actual["evaluate"] == {
        (u, i) for u, i in everything - pairs_of(rows[rows["t"] < test_from]) if u in ranked_users
    }
    assert actual["relevant"] == {(u, i) for u, i in pairs_of(in_test) if i in items and u in users}
    allowed = ["recommend.mask=[]"]
    if task == "implicit":  # of clicks, no rankings are evaluated
        allowed.append("evaluate.mask_seen=false")
    actual = run_alone(_rankings, dataset.folder, config, allowed)
    assert actual["recommend"] == everything
    if task == "implicit":
        assert actual["evaluate"] == {(u, i) for u, i in everything if u in ranked_users}


LOG = """u,i,b,t,w
a,x,pv,1,1
a,x,buy,2,2
a,x,pv,3,1
a,y,cart,5,1
a,y,pv,6,3
b,x,pv,4,1
b,x,pv,4,1
b,z,cart,9,2
b,z,buy,9,1
c,z,pv,1,1
"""


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        ({}, {"a x pv 3", "a y pv 6", "b x pv 4", "b z cart 9", "c z pv 1"}),
        ({"repeated": "latest"}, {"a x pv 3", "a y pv 6", "b x pv 4", "b z cart 9", "c z pv 1"}),
        (
            {"repeated": "earliest"},
            {"a x pv 1", "a y cart 5", "b x pv 4", "b z cart 9", "c z pv 1"},
        ),
        (
            {"repeated": "strongest", "order": {"b": ["pv", "cart", "buy"]}},
            {"a x buy 2", "a y cart 5", "b x pv 4", "b z buy 9", "c z pv 1"},
        ),
        (
            {"repeated": "strongest"},  # by weight
            {"a x buy 2", "a y pv 6", "b x pv 4", "b z cart 9", "c z pv 1"},
        ),
        ({"repeated": "all"}, set()),
    ],
)
def test_the_row_to_keep_is_chosen_by_rule(
    tmp_path: Path, rule: dict[str, Any], kept: set[str]
) -> None:
    """Of b's two rows of z at one time, weights decide: the strongest of those that are equal."""
    table = pd.DataFrame([line.split(",") for line in LOG.split()[1:]], columns=[*"uibtw"])
    if rule.get("repeated") == "all":
        kept = {" ".join(row[:4]) for row in table.to_numpy().tolist()}
    for seed in range(3):
        shuffled = table.sample(frac=1, random_state=seed)
        dataset = prepared(
            tmp_path,
            shuffled,
            interactions=BASE["interactions"] | {"weight": "w"} | rule,
            features=[*BASE["features"], {"name": "b"}],
        )
        users, items = (dataset.entity_ids(e).to_pylist() for e in ("user", "item"))
        words = [None, *dataset.vocabulary("b").ids.to_pylist()]
        rows = dataset.columns("train", ["user", "item", "b", "time"])
        actual = Counter(
            f"{users[u]} {items[i]} {words[b]} {t}"
            for u, i, b, t in zip(rows["user"], rows["item"], rows["b"], rows["time"], strict=True)
        )
        assert set(actual) == kept
        n_dropped = dataset.manifest.dropped.get("repeated (user, item) rows", 0)
        assert actual.total() + n_dropped == len(table)
        assert n_dropped == (0 if rule.get("repeated") == "all" else 5)


def _clicks(n: int = 400, seed: int = 5) -> pd.DataFrame:
    """Rows of few users, items, times and words, so that many are equal in some of them."""
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "u": [f"u{k}" for k in rng.integers(0, 12, n)],
            "i": [f"i{k}" for k in rng.integers(0, 30, n)],
            "t": rng.integers(0, 9, n),
            "b": rng.choice(["pv", "cart", "buy"], n),
            "x": rng.integers(0, 4, n) / 2,
            "c": rng.choice(["k", "l", "m", ""], n),
            "r": rng.integers(2, 6, n),
        }
    )


def _in_words(dataset: PreparedDataset) -> dict[str, Any]:
    """All that a dataset says of rows and entities, as ids, in an order of its own."""
    users, items = (dataset.entity_ids(e).to_pylist() for e in ("user", "item"))
    words = {n: [None, *dataset.vocabulary(n).ids.to_pylist()] for n in ("b", "cat")}
    actual: dict[str, Any] = {"noted": dataset.manifest.noted, "dropped": dataset.manifest.dropped}
    for split in ("train", "valid", "test"):
        columns = dataset.columns(split, ["user", "item", "b", "x", "time"])
        label = dataset.columns(split, ["label"])["label"] if split != "train" else None
        actual[split] = Counter(
            (users[u], items[i], words["b"][b], float(x), int(t))
            for row, (u, i, b, x, t) in enumerate(zip(*columns.values(), strict=True))
            if label is None or label[row]
        )
        actual[f"met {split}"] = sorted(met(dataset, split))
    actual["history"] = {
        users[u]: [items[i] for i in bag] for u, bag in enumerate(dataset.history.lists())
    }
    for entity, name, ids in (("user", "price", users), ("item", "cat", items)):
        values = dataset.entity_fields[name]
        said = values.lists() if isinstance(values, Jagged) else np.asarray(values).tolist()
        said = [[words["cat"][v] for v in bag] for bag in said] if name == "cat" else said
        actual[f"{entity} {name}"] = dict(zip(ids[1:], said[1:], strict=True))
    return actual


@pytest.mark.parametrize("method", ["leave_last", "temporal"])
@pytest.mark.parametrize("repeated", ["latest", "earliest", "strongest", "all"])
def test_nothing_depends_on_the_order_of_rows_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, repeated: str
) -> None:
    rows = _clicks()
    spec = BASE | {
        "interactions": {
            **{"file": "s*.csv", "user": "u", "item": "i", "time": "t", "repeated": repeated},
            **({"rating": "r", "min_rating": 3} if repeated != "earliest" else {}),
        },
        "features": [
            *BASE["features"],
            {"name": "b"},
            {"name": "x", "kind": "numeric"},
            {"name": "cat", "entity": "item", "column": "c"},
            {"name": "price", "entity": "user", "column": "x", "kind": "numeric"},
        ],
        "split": {"method": method}
        | ({"valid": 1, "test": 2} if method == "leave_last" else {"valid": 0.1, "test": 0.2}),
        "negatives": {"evaluation_per_positive": 1},
    }
    actual = []
    for seed, (n_files, partition_bytes) in enumerate(((1, 1 << 30), (1, 1 << 30), (3, 700))):
        monkeypatch.setattr(job, "PARTITION_BYTES", partition_bytes)
        root = tmp_path / str(seed)
        root.mkdir()
        shuffled = rows.sample(frac=1, random_state=seed)
        for k in range(n_files):
            shuffled.iloc[k::n_files].to_csv(root / f"s{k}.csv", index=False)
        data = DataConfig.model_validate(spec)
        prepare(data, root, root / "d", 1, threads=1 + seed)
        actual.append(_in_words(PreparedDataset(root / "d")))
    assert actual[1] == actual[0]
    assert actual[2] == actual[0]
    assert any("time" in reason for reason in actual[0]["noted"])
    assert any("differ in cat" in reason for reason in actual[0]["noted"])


def test_users_whose_last_rows_are_tied_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = pd.DataFrame(
        [(f"u{u}", f"i{i}", i) for u in range(20) for i in range(5)], columns=[*"uit"]
    )
    tied = rows["u"].isin(["u3", "u7", "u9"])
    rows.loc[tied & (rows["t"] == 3), "t"] = 4  # their last two rows
    rows.loc[(rows["u"] == "u5") & (rows["t"] == 1), "t"] = 0  # ties far from the end are none
    split = {"method": "leave_last", "valid": 0, "test": 1}
    dataset = prepared(tmp_path, rows, split=split, negatives={"evaluation_per_positive": 1})
    reason = "users (15.0%) whose held-out rows have a training row's time"
    assert dataset.manifest.noted[reason] == 3
    assert f"{reason}: 3" in caplog.text
    split = {"method": "temporal", "valid": 0, "test": 0.1}  # 10 of the 23 rows at time 4
    dataset = prepared(tmp_path, rows, "t", split=split, negatives={"evaluation_per_positive": 1})
    assert dataset.manifest.noted["rows at the time where test begins, on both sides"] == 23


def test_the_latest_training_row_with_a_value_describes_an_item(tmp_path: Path) -> None:
    rows = pd.DataFrame(
        [
            *[("a", "x", 1, "old"), ("b", "x", 3, "new"), ("c", "x", 5, ""), ("a", "y", 2, "one")],
            *[("d", "x", 9, "held out"), ("c", "y", 0, "one"), ("d", "y", 1, "one")],
        ],
        columns=["u", "i", "t", "c"],
    )
    for order in (rows, rows[::-1]):
        dataset = prepared(
            tmp_path,
            order,
            features=[*BASE["features"], {"name": "cat", "entity": "item", "column": "c"}],
            split={"method": "temporal", "valid": 0, "test": 0.15},
            negatives={"evaluation_per_positive": 1},
        )
        words = [None, *dataset.vocabulary("cat").ids.to_pylist()]
        items = dataset.entity_ids("item").to_pylist()
        cats = dataset.entity_fields["cat"]
        assert isinstance(cats, Jagged)
        said = {items[k]: [words[v] for v in bag] for k, bag in enumerate(cats.lists())}
        assert said == {None: [], "x": ["new"], "y": ["one"]}
        assert dataset.manifest.noted["items whose rows differ in cat: the latest row is used"] == 1


def test_a_grown_dataset_has_seen_what_the_earlier_one_held_out(tmp_path: Path) -> None:
    day1 = ratings(6, 14, 12, seed=1)
    split = {"method": "leave_last", "valid": 1, "test": 1}
    one = {"evaluation_per_positive": 1}
    spec = {"interactions": RATED, "split": split, "negatives": one}
    old = prepared(tmp_path, day1, "old", **spec)
    seen_before = {s: met(old, s) for s in ("train", "valid", "test")}
    day2 = ratings(6, 14, 6, seed=2)
    day2["t"] += 1000
    new = prepared(tmp_path, day2, "new", vocabulary_from=str(tmp_path / "old"), **spec)
    today = {
        (row.u, row.i): split
        for split in ("train", "valid", "test")
        for row in day2.itertuples()
        if (row.u, row.i) in met(new, split)
    }
    before = set().union(*seen_before.values())
    liked_before = external(old, old.history)
    assert met(new, "train") == (before - set(today)) | liked_before | {
        pair for pair, split in today.items() if split == "train"
    }
    assert met(new, "test") <= pairs_of(day2)
    assert before - met(new, "train") - met(new, "valid") - met(new, "test") == set()


@pytest.mark.parametrize("given", [False, True])
def test_another_layout_format_is_refused_by_its_number(tmp_path: Path, given: bool) -> None:
    dataset = prepared(tmp_path, ratings(), interactions=RATED)
    path = dataset.folder / "manifest.json"
    manifest = json.loads(path.read_text()) | {"format": 2}
    if given:
        manifest["fingerprint"] = "given"
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"layout format 2, .* reads format 4") as caught:
        PreparedDataset(dataset.folder)
    if given:
        assert 'write it again as docs/data.md says, with "format": 4' in str(caught.value)
        with pytest.raises(DataError, match="layout format 2"):  # and is never overwritten
            prepared(tmp_path, ratings(), interactions=RATED)
    else:
        assert "run python -m deepfm_dist.prepare, which" in str(caught.value)
        prepared(tmp_path, ratings(), interactions=RATED)


def test_repeated_rows_of_all_are_ranked_again(tmp_path: Path) -> None:
    """`all`: what was bought before may be bought again, and counts once among the relevant."""
    rows = _clicks(150)
    changes = {
        "interactions": BASE["interactions"] | {"repeated": "all"},
        "split": {"method": "temporal", "valid": 0, "test": 0.3},
        "negatives": {"evaluation_per_positive": 1},
    }
    dataset = prepared(tmp_path, rows, **changes)
    train = external(dataset, dataset.history)
    test = external(dataset, dataset.positives("test"))
    assert train & test  # bought again
    actual = run_alone(_rankings, dataset.folder, _config(tmp_path, BASE | changes), [])
    users, items = (dataset.entity_ids(e).to_pylist()[1:] for e in ("user", "item"))
    assert actual["recommend"] == {(u, i) for u in users for i in items}
    assert {(u, i) for u, i in actual["relevant"] if i} == {(u, i) for u, i in test if u and i}
    assert {u for u, _ in actual["evaluate"]} == {u for u, _ in test if u}
    assert len(actual["evaluate"]) == len(items) * len({u for u, _ in actual["evaluate"]})


@pytest.mark.parametrize(
    ("interactions", "message"),
    [
        ({"repeated": "strongest"}, "repeated: strongest needs something to compare"),
        ({"order": {"b": ["pv", "buy"]}}, "order needs repeated: strongest"),
        ({"repeated": "strongest", "order": {"b": ["pv", "pv"]}}, "needs two words or more"),
        ({"repeated": "strongest", "order": {"b": ["pv"], "c": ["k"]}}, "order takes one column"),
    ],
)
def test_a_rule_that_cannot_decide_is_refused(interactions: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig.model_validate(BASE | {"interactions": BASE["interactions"] | interactions})


def test_a_word_outside_the_order_is_named(tmp_path: Path) -> None:
    rule = {"repeated": "strongest", "order": {"b": ["pv", "cart"]}}
    rows = pd.DataFrame([("a", "x", 1, "pv"), ("a", "y", 2, "buy")], columns=[*"uitb"])
    with pytest.raises(DataError, match=r"line 3: b 'buy' is .*word of interactions\.order: pv"):
        prepared(tmp_path, rows, interactions=BASE["interactions"] | rule)
