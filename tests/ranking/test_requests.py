"""Requests from a file: each one's ranking against float64 over all pairs, and what is refused."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torchrec import KeyedJaggedTensor

from deepfm_dist import vector_code
from deepfm_dist.build import deepfm_of, shard_for_training
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.negative_rate import NegativeRate
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.errors import ConfigError, DataError
from deepfm_dist.ranking import subsets
from deepfm_dist.ranking.filters import ItemFilters, parse_filter
from deepfm_dist.ranking.items import Catalogue
from deepfm_dist.ranking.recommendation import recommend
from deepfm_dist.ranking.requests import read_requests
from deepfm_dist.ranking.settings import RecommendConfig
from deepfm_dist.report.tables import ranking_table
from tests.data.small_logs import made_of
from tests.ranking.cases import digest
from tests.ranking.shop import BRANDS, CITIES, CONFIG, DEVICES, N_ITEMS, N_USERS, Shop
from tests.ranks import run_alone, run_ranks


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> tuple[Shop, PreparedDataset]:
    folder = tmp_path_factory.mktemp("shop")
    shop = Shop(folder)
    return shop, made_of(folder, shop.data)


FILTERS = {
    None: lambda genres, brand: True,
    "genre=X": lambda genres, brand: "X" in genres,
    "genre=X and genre=Y": lambda genres, brand: {"X", "Y"} <= genres,
    "brand = Rand al'Thor AND genre!=Z": lambda g, brand: brand == BRANDS[0] and "Z" not in g,
    "brand!=b2": lambda genres, brand: brand != "b2",
}


def requests_of(shop: Shop, n: int) -> pd.DataFrame:
    """Known and described users with contexts, filters, lists and K of all kinds, and strangers."""
    rng = np.random.default_rng(9)
    common = sorted(map(int, rng.permutation(N_ITEMS)[:30]))
    rows = []
    for number in range(n):
        kind = rng.choice(
            ["known", "items", "city", "both", "stranger"], p=[0.6, 0.1, 0.1, 0.1, 0.1]
        )
        row: dict[str, Any] = {"who": None, "items": None, "city": None}
        if kind == "known":
            row["who"] = str(rng.integers(N_USERS))
        if kind in ("items", "both"):
            row["items"] = [str(i) for i in rng.permutation(N_ITEMS)[: rng.integers(1, 6)]] + ["99"]
        if kind in ("city", "both"):
            row["city"] = rng.choice(CITIES)
        if kind == "stranger":
            row["who"] = f"s{number}"
        row["where"] = rng.choice([*FILTERS][1:]) if rng.random() < 0.7 else None
        lists = [None, common, [int(i) for i in rng.permutation(N_ITEMS)[:7]], [77]]
        allow = lists[rng.choice(4, p=[0.5, 0.2, 0.28, 0.02])]
        row["allow"] = allow and [str(i) for i in allow]
        row["block"] = (
            [str(i) for i in rng.permutation(N_ITEMS)[:4]] if rng.random() < 0.5 else None
        )
        row["k"] = float(rng.integers(1, 60)) if rng.random() < 0.5 else None
        row |= {"device": rng.choice(DEVICES), "hour": float(rng.integers(24)), "note": "x"}
        rows.append(row)
    return pd.DataFrame(rows)


def is_stranger(requests: pd.DataFrame) -> pd.Series:
    return requests["who"].astype("string").str.startswith("s").fillna(False).astype(bool)


def logits_of_all_pairs(shop: Shop, folder: Path, requests: pd.DataFrame) -> np.ndarray:
    """``[requests, N_ITEMS]`` float64, from the tables' rows of each pair's own values."""
    dataset = PreparedDataset(folder)
    fields = dataset.manifest.categorical
    rows_of = {
        f.name: {
            text: n + 1 for n, text in enumerate(dataset.vocabulary(f.table_name).ids.to_pylist())
        }
        for f in fields
    }
    bags: dict[str, list[list[int]]] = {f.name: [] for f in fields}
    hours = []
    for request in requests.to_dict("records"):
        known = request["who"] is not None
        liked = shop.liked[int(request["who"])] if known else request["items"] or []
        city = shop.cities[int(request["who"])] if known else request["city"]
        for item in range(N_ITEMS):
            values = {
                "user": [request["who"]] if known else [],
                "city": [city] if city else [],
                "seen": [str(i) for i in liked if int(i) < N_ITEMS],
                "item": [str(item)],
                "genre": sorted(shop.genres[item]),
                "brand": [shop.brands[item]],
                "device": [request["device"]],
            }
            for name, texts in values.items():
                bags[name].append([rows_of[name][text] for text in texts])
            hours.append([request["hour"]])
    with process_group("cpu", threads=1) as world:
        model = deepfm_of(shard_for_training(CONFIG, dataset.manifest, world)[0].eval())
        flat = [rows for f in fields for rows in bags[f.name]]
        sparse = KeyedJaggedTensor(
            [f.name for f in fields],
            torch.tensor([row for rows in flat for row in rows], dtype=torch.int32),
            lengths=torch.tensor([len(rows) for rows in flat], dtype=torch.int32),
        )
        with torch.no_grad():
            rows = model.embedding_arch.rows(sparse).double()
            numbers = torch.from_numpy(dense_of(dataset, np.array(hours)))
            logits = model.interaction_arch.double()(rows, numbers)
    return logits.view(len(requests), N_ITEMS).numpy()


def dense_of(dataset: PreparedDataset, hours: np.ndarray) -> np.ndarray:
    """The model's one number, ``[n, 1]`` float64."""
    [feature] = dataset.manifest.dense
    spec = dataset.manifest.numeric[feature.name]
    return (hours - spec.mean) / spec.std


def _answered(
    folder: Path,
    wanted: RecommendConfig,
    out: Path,
    by_torch: bool = False,
    in_parts: bool = False,
) -> tuple[list[str], str]:
    """Answers by a model of the seed alone; (log, table of rank 0)."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("deepfm_dist").addHandler(handler)
    logging.getLogger("deepfm_dist").setLevel(logging.INFO)
    if by_torch:
        vector_code.HAS_FMA = False
    dataset = PreparedDataset(folder)
    with process_group("cpu", threads=1) as world:
        model = deepfm_of(shard_for_training(CONFIG, dataset.manifest, world)[0].eval())
        rate = NegativeRate.from_dataset(dataset)
        files = recommend(model, world, dataset, wanted, out, in_parts=in_parts, rate=rate)
    return lines, "" if files is None else ranking_table(files, dataset)


@pytest.fixture(scope="module")
def asked(
    shop: tuple[Shop, PreparedDataset], tmp_path_factory: pytest.TempPathFactory
) -> tuple[pd.DataFrame, Path, pd.DataFrame]:
    """Requests, their file, and the rankings that they should have."""
    requests = requests_of(shop[0], 600)
    file = tmp_path_factory.mktemp("requests") / "requests.parquet"
    requests.to_parquet(file)
    served = requests[~is_stranger(requests)]
    served = served.astype(object).where(served.notna(), None)
    logits = run_alone(logits_of_all_pairs, shop[0], shop[1].folder, served)
    expected = []
    for (number, row), scores in zip(served.iterrows(), logits, strict=True):
        known = row["who"] is not None
        met = {str(i) for i in shop[0].liked[int(row["who"])]} if known else set(row["items"] or [])
        kept = [
            i
            for i in range(N_ITEMS)
            if FILTERS[row["where"]](shop[0].genres[i], shop[0].brands[i])
            and (row["allow"] is None or str(i) in row["allow"])
            and str(i) not in {*(row["block"] or []), *met}
        ]
        best = sorted(kept, key=lambda i: -scores[i])[: int(row["k"] or 12)]
        who = int(row["who"]) if known else None
        expected += [(number, who, i, scores[i], at) for at, i in enumerate(best, 1)]
    columns = ["request", "user_id", "item_id", "score", "rank"]
    return requests, file, pd.DataFrame(expected, columns=columns)


def check(actual: pd.DataFrame, expected: pd.DataFrame) -> None:
    """Equal to 1e-5, ties within that in any order."""
    assert actual.columns.tolist() == expected.columns.tolist()
    assert len(actual) == len(expected)
    for name in ("request", "rank"):
        np.testing.assert_array_equal(actual[name], expected[name])
    np.testing.assert_array_equal(actual["user_id"].astype(float), expected["user_id"])
    np.testing.assert_allclose(actual["score"], expected["score"], rtol=1e-5, atol=1e-5)
    assert (actual["item_id"].to_numpy() == expected["item_id"].to_numpy()).mean() > 0.999


@pytest.mark.parametrize("by_torch", [False, True])
@pytest.mark.parametrize("memory_bytes", [1 << 30, 20_000])
def test_every_request_gets_the_best_of_its_items(
    shop: tuple[Shop, PreparedDataset],
    asked: tuple[pd.DataFrame, Path, pd.DataFrame],
    tmp_path: Path,
    by_torch: bool,
    memory_bytes: int,
) -> None:
    requests, file, expected = asked
    wanted = RecommendConfig(requests=str(file), k=12, memory_bytes=memory_bytes)
    lines, table = run_alone(_answered, shop[1].folder, wanted, tmp_path, by_torch)
    check(pd.read_parquet(tmp_path / "recommendations.parquet"), expected)
    text = pd.read_csv(tmp_path / "recommendations.csv")
    assert text.columns.tolist() == ["request", "user", "item"] and len(text) == len(expected)
    strangers = is_stranger(requests)
    log_text = "\n".join(lines)
    assert f"left out {strangers.sum()} requests whose user is not in the training" in log_text
    assert "columns that are not used: note" in log_text
    assert "items: 1 item not in the training data (such as '99'" in log_text
    assert "allow: 1 item not in the training data (such as '77'" in log_text
    n_empty = requests["allow"].map(lambda ids: ids is not None and list(ids) == ["77"])
    assert (n_empty & ~strangers).sum() > 0
    assert "lists and filters leave no item for" in log_text
    assert table.startswith("request 0") or "request " in table


def test_the_number_of_ranks_does_not_change_a_byte(
    shop: tuple[Shop, PreparedDataset],
    asked: tuple[pd.DataFrame, Path, pd.DataFrame],
    tmp_path: Path,
) -> None:
    wanted = RecommendConfig(requests=str(asked[1]), k=12, probability=True)
    digests = set()
    for world_size in (1, 2, 4):
        out = tmp_path / str(world_size)
        run_ranks(_answered, world_size, shop[1].folder, wanted, out)
        files = "recommendations.parquet", "recommendations.csv"
        digests.add(tuple(digest(out / name) for name in files))
    assert len(digests) == 1
    ranked = pd.read_parquet(tmp_path / "1" / "recommendations.parquet")
    rate = NegativeRate.from_dataset(shop[1])
    assert rate is not None
    rows = {text: n for n, text in enumerate(shop[1].entity_ids("user").to_pylist())}
    items = {text: n for n, text in enumerate(shop[1].entity_ids("item").to_pylist())}
    known = ranked[ranked["user_id"].notna()]
    log_rates = rate.log_rates(
        known["user_id"].map(lambda u: rows[str(int(u))]), known["item_id"].astype(str).map(items)
    )
    expected = 1 / (1 + np.exp(-(known["score"] + log_rates)))
    np.testing.assert_allclose(known["probability"], expected, rtol=1e-5)
    assert ranked["probability"].between(0, 1).all()
    run_ranks(_answered, 2, shop[1].folder, wanted, tmp_path / "parts", in_parts=True)
    parts = pd.read_parquet(tmp_path / "parts" / "recommendations")
    whole = pd.read_parquet(tmp_path / "1" / "recommendations.parquet")
    pd.testing.assert_frame_equal(parts, whole)


def test_new_users_of_a_file_are_known_by_items_attributes_or_both(
    shop: tuple[Shop, PreparedDataset], tmp_path: Path
) -> None:
    asked = requests_of(shop[0], 60)
    asked = asked[asked["who"].isna()].assign(device="phone", hour=3.0).reset_index(drop=True)
    asked = asked.astype(object).where(asked.notna(), None)
    assert set(map(tuple, asked[["items", "city"]].notna().to_numpy())) == {
        (True, False),
        (False, True),
        (True, True),
    }
    rows = asked.explode("items").rename(columns={"items": "what"})
    rows["who"] = [f"n{number:02}" for number in rows.index]
    rows["city"] = rows["city"].where(~rows.index.duplicated())  # in a user's first row alone
    rows.iloc[::-1].sort_index(kind="stable")[["who", "what", "city"]].to_csv(
        tmp_path / "new.csv", index=False
    )
    logits = run_alone(logits_of_all_pairs, shop[0], shop[1].folder, asked)
    expected = []
    for (number, row), scores in zip(asked.iterrows(), logits, strict=True):
        kept = [i for i in range(N_ITEMS) if str(i) not in (row["items"] or [])]
        best = sorted(kept, key=lambda i: -scores[i])[:12]
        expected += [(f"n{number:02}", i, scores[i]) for i in best]
    wanted = RecommendConfig(
        histories=str(tmp_path / "new.csv"), k=12, context={"device": "phone", "hour": "3"}
    )
    run_alone(_answered, shop[1].folder, wanted, tmp_path)
    actual = pd.read_parquet(tmp_path / "recommendations.parquet")
    assert actual["user_id"].tolist() == [user for user, _, _ in expected]
    assert actual["item_id"].tolist() == [item for _, item, _ in expected]
    np.testing.assert_allclose(actual["score"], [score for _, _, score in expected], rtol=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("who,where\n1,gnre=X\n", r"row 1: where='gnre=X': unknown .* did you mean genre\?"),
        ("who,where\n1,\n2,genre=W\n", r"row 2: .* have no genre='W'"),
        ("who,where\n1,genre\n", r"row 1: .* 'genre' is not a condition; write field=value"),
        ("who,where\n1,hour=3\n", r"unknown item field 'hour'; available: genre, brand"),
        ("who,where\n1,item=3\n", r"row 1: .*'item' is an id, .* use allow or block"),
        ("who,k\n1,2\n2,1.5\n", r"row 2: k 1\.5 is not a whole number above 0"),
        ("who,k\n1,0\n", r"row 1: k 0 is not a whole number above 0"),
        ("request,who\na,1\na,2\n", r"the column request repeats 1 value, such as 'a'; number"),
        (
            "where\ngenre=X\n",
            r"no column identifies the user: who, .*, city; it has: where",
        ),
        ("who;k\n1;2\n", r"its cells seem to be separated by ';'"),
        ("who\nzz\n", r"only requests whose user is not .* \(such as 'zz'\)"),
        ("who,allow\n1,[]\n", r"row 1: allow is a list without items"),
        ("who,allow\n1,\n2,|\n", r"row 2: allow is a list without items"),
        ("who,allow\n1,3\n2,[null]\n", r"row 2: allow is a list without items"),
    ],
)
def test_files_that_cannot_be_answered_are_refused(
    shop: tuple[Shop, PreparedDataset], tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "r.csv").write_text(text)
    config = RecommendConfig(context={"device": "phone", "hour": "3"})
    with pytest.raises(DataError, match=message):
        read_requests(shop[1], Catalogue(shop[1]), tmp_path / "r.csv", config)


def test_more_items_than_there_are_take_no_memory(
    shop: tuple[Shop, PreparedDataset], tmp_path: Path
) -> None:
    file = tmp_path / "r.parquet"
    pd.DataFrame({"who": [1, 2], "k": [10**12, 3]}).to_parquet(file)
    config = RecommendConfig(context={"device": "phone", "hour": "3"})
    catalogue = Catalogue(shop[1])
    requests = read_requests(shop[1], catalogue, file, config)
    assert requests.k.tolist() == [len(catalogue), 3]


def test_a_list_of_nulls_does_not_allow_all_items(
    shop: tuple[Shop, PreparedDataset], tmp_path: Path
) -> None:
    file = tmp_path / "r.parquet"
    pd.DataFrame({"who": [1, 2, 3], "allow": [None, ["1", None], [None, ""]]}).to_parquet(file)
    config = RecommendConfig(context={"device": "phone", "hour": "3"})
    with pytest.raises(DataError, match="row 3: allow is a list without items"):
        read_requests(shop[1], Catalogue(shop[1]), file, config)


def _none_left(folder: Path, file: Path, out: Path) -> tuple[int, str]:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("deepfm_dist").addHandler(handler)
    dataset = PreparedDataset(folder)
    with process_group("cpu", threads=1) as world:
        model = deepfm_of(shard_for_training(CONFIG, dataset.manifest, world)[0].eval())
        config = RecommendConfig(requests=str(file), context={"device": "phone", "hour": "3"})
        files = recommend(model, world, dataset, config, out)
    assert files is not None
    return files.none, "\n".join(records)


def test_requests_that_get_no_item_are_counted(
    shop: tuple[Shop, PreparedDataset], tmp_path: Path
) -> None:
    everything = "|".join(map(str, range(N_ITEMS)))
    (tmp_path / "r.csv").write_text(f"who,block\n1,{everything}\n2,1\n")
    none, said = run_alone(_none_left, shop[1].folder, tmp_path / "r.csv", tmp_path / "out")
    assert none == 1
    assert "no item left to recommend to 1 of 2 requests: all are seen, blocked or filt" in said


def test_a_missing_file_is_named(shop: tuple[Shop, PreparedDataset], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"recommend\.requests=.*nowhere\.csv: no such file; write"):
        read_requests(shop[1], Catalogue(shop[1]), tmp_path / "nowhere.csv", RecommendConfig())


def test_context_comes_from_a_column_or_from_the_settings(
    shop: tuple[Shop, PreparedDataset], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "r.csv").write_text("who,device,allow\n3,desk,1|2|01\n4,radio,3\n5,,\n")
    catalogue = Catalogue(shop[1])
    with pytest.raises(ConfigError, match=r"context\.hour=VALUE, or give the requests a column"):
        read_requests(shop[1], catalogue, tmp_path / "r.csv", RecommendConfig())
    config = RecommendConfig(context={"hour": "3", "device": "phone"})
    requests = read_requests(shop[1], catalogue, tmp_path / "r.csv", config)
    assert requests.users.context is not None
    devices = shop[1].vocabulary("device").ids.to_pylist()
    assert requests.users.context["device"].tolist() == [devices.index("desk") + 1, 0, 0]
    np.testing.assert_allclose(
        requests.users.context["hour"], dense_of(shop[1], np.full(3, 3.0)), rtol=1e-6
    )
    assert "device: 1 of 2 values were never seen in training and are scored as" in caplog.text
    assert "such as '01'; 1 differ only in leading zeros: '01' and '1'" in caplog.text
    unused = "device: 1 row without a value: recommend.context.device=phone is for files without"
    assert unused in caplog.text
    ids = catalogue.ids.to_pylist()
    assert [[ids[p] for p in s] for s in requests.sets.positions] == [["1", "2"], ["3"]]


def test_filters_are_read_as_they_are_written(shop: tuple[Shop, PreparedDataset]) -> None:
    assert parse_filter("a=b and c and d and e != f=g") == [
        ("a", True, "b and c and d"),
        ("e", False, "f=g"),
    ]
    catalogue = Catalogue(shop[1], np.arange(1, N_ITEMS, 2))
    filters = ItemFilters(shop[1], catalogue)
    ids = catalogue.ids.to_pylist()
    for text, keeps in FILTERS.items():
        if text is not None:
            wanted = [i for i in ids if keeps(shop[0].genres[int(i)], shop[0].brands[int(i)])]
            assert [ids[p] for p in filters.positions(text)] == wanted


def test_packed_sets_leave_when_memory_has_no_room_for_them(
    shop: tuple[Shop, PreparedDataset],
    asked: tuple[pd.DataFrame, Path, pd.DataFrame],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All requests share sets, and memory holds little more than the catalogue."""
    monkeypatch.setattr(subsets, "SHARED_BY", 1)
    wanted = RecommendConfig(requests=str(asked[1]), k=12, memory_bytes=1024 * 4 * (1 + 6 + 9))
    run_alone(_answered, shop[1].folder, wanted, tmp_path)
    check(pd.read_parquet(tmp_path / "recommendations.parquet"), asked[2])
