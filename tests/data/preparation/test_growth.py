"""Datasets that keep the rows of earlier ids."""

import json
import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.preparation import job
from deepfm_dist.data.preparation.local import prepare
from deepfm_dist.data.schema import DataConfig
from deepfm_dist.errors import ConfigError, DataError
from tests.data.small_logs import USER_AND_ITEM, bag_of, contents, small

GROWING: dict[str, Any] = yaml.safe_load("""
interactions: {file: day1.csv, user: u, item: i, time: t}
features:
  - {name: user, entity: user}
  - {name: item, entity: item}
  - {name: tag, entity: item, file: tags.csv}
  - {name: city, entity: user, column: city}
  - {name: h}
  - {name: n, kind: numeric, transform: standard}
split: {valid: 0, test: 0}
""")


@pytest.mark.parametrize("partition_bytes", [40, 1 << 30])
def test_a_grown_vocabulary_keeps_the_rows_of_old_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, partition_bytes: int
) -> None:
    monkeypatch.setattr(job, "PARTITION_BYTES", partition_bytes)
    day1 = [(f"u{k % 9}", f"i{k % 14}", k, "pqr"[k % 9 % 3], k % 4, k % 5) for k in range(60)]
    day2 = [(f"u{k % 13}", f"i{k % 20}", 99 + k, "", k % 6, 50 + k) for k in range(3, 60)]
    for name, rows in (("day1", day1), ("day2", day2)):
        lines = "".join(",".join(map(str, row)) + "\n" for row in rows)
        (tmp_path / f"{name}.csv").write_text("u,i,t,city,h,n\n" + lines)
    (tmp_path / "tags.csv").write_text("i,tag\n" + "".join(f"i{k},t{k % 3}\n" for k in range(14)))
    prepare(DataConfig.model_validate(GROWING), tmp_path, tmp_path / "old", seed=1)
    (tmp_path / "tags.csv").write_text(
        "i,tag\n" + "".join(f"i{k},t{k % 5}\n" for k in range(7, 20))
    )
    spec = GROWING | {"vocabulary_from": str(tmp_path / "old")}
    spec["interactions"] = GROWING["interactions"] | {"file": "day2.csv"}
    prepare(DataConfig.model_validate(spec), tmp_path, tmp_path / "new", seed=8)
    old, new = PreparedDataset(tmp_path / "old"), PreparedDataset(tmp_path / "new")
    assert new.manifest.grown_from == (old.manifest.vocabulary_hash,)
    for table in old.manifest.tables:
        before, after = (d.vocabulary(table).ids.to_pylist() for d in (old, new))
        assert after[: len(before)] == before
        assert len(set(after)) == len(after)
    assert sorted(new.entity_ids("user").to_pylist()[1:]) == sorted(f"u{k}" for k in range(13))
    assert sorted(new.entity_ids("item").to_pylist()[1:]) == sorted(f"i{k}" for k in range(20))
    assert new.manifest.numeric == old.manifest.numeric
    users, items = (new.entity_ids(e).to_pylist() for e in ("user", "item"))
    cities = [None, *new.vocabulary("city").ids.to_pylist()]
    tags = [None, *new.vocabulary("tag").ids.to_pylist()]
    for k in range(9):  # given on the first day only
        bag = bag_of(new.entity_fields["city"], users.index(f"u{k}"))
        assert [cities[v] for v in bag] == ["pqr"[k % 3]]
    for k in range(20):  # given again with another value
        bag = bag_of(new.entity_fields["tag"], items.index(f"i{k}"))
        assert [tags[v] for v in bag] == [f"t{k % 3}" if k < 7 else f"t{k % 5}"]
    for user in range(13):
        liked = [r[1] for r in (*day1, *day2) if r[0] == f"u{user}"]
        bag = bag_of(new.history, users.index(f"u{user}"))
        assert [items[v] for v in bag] == [*dict.fromkeys(reversed(liked))][::-1]
    counts = dict(zip(items, new.popularity().tolist(), strict=True))
    pairs = [p for day in (day1, day2) for p in {r[:2] for r in day}]
    assert all(counts[f"i{k}"] == sum(p[1] == f"i{k}" for p in pairs) for k in range(20))
    for table, at in (("user", 0), ("item", 1)):
        vocabulary = new.vocabulary(table)
        actual = dict(zip(vocabulary.ids.to_pylist(), vocabulary.counts.tolist(), strict=True))
        assert actual == Counter(p[at] for p in pairs)
    unchanged = new.manifest.fingerprint
    prepare(DataConfig.model_validate(GROWING), tmp_path, tmp_path / "old", seed=2)
    prepare(DataConfig.model_validate(spec), tmp_path, tmp_path / "new", seed=8)
    assert PreparedDataset(tmp_path / "new").manifest.fingerprint != unchanged


def _day(
    root: Path, name: str, date: str, users: str, items: str, **settings: Any
) -> PreparedDataset:
    """Each of some users with each of some items, all on one date."""
    pairs = [(u, i) for u in users for i in items]
    lines = (f"{u},{i},{date},{'pqr'[ord(u) % 3]},1,2\n" for u, i in pairs)
    (root / f"{name}.csv").write_text("u,i,t,city,h,n\n" + "".join(lines))
    spec = GROWING | {"forget_after": 30} | settings
    spec["interactions"] = GROWING["interactions"] | {"file": f"{name}.csv"}
    prepare(DataConfig.model_validate(spec), root, root / name, seed=1)
    return PreparedDataset(root / name)


def test_rows_of_forgotten_ids_go_to_new_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    day = partial(_day, tmp_path)
    (tmp_path / "tags.csv").write_text("i,tag\n" + "".join(f"{i},t{i}\n" for i in "ABCDE"))
    first = day("first", "2026-01-01", "abcdef", "ABCDEFGH")
    second = day("second", "2026-01-20", "abcd", "ABCDE", vocabulary_from=str(first.folder))
    assert second.manifest.tables == first.manifest.tables
    with caplog.at_level("INFO"):
        third = day("third", "2026-02-01", "axyz", "AXY", vocabulary_from=str(second.folder))
    said = "forgot 2 users and 2 items not seen since 2026-01-02, whose rows went to new ones; "
    assert f"{said}0 users and 1 item more keep theirs until new ones need them" in caplog.text
    before, after = (
        {e: d.entity_ids(e).to_pylist() for e in ("user", "item")} for d in (second, third)
    )
    reused = {}
    for entity, gone, kept in (("user", "ef", "abcd"), ("item", "FGH", "ABCDE")):
        old, new = before[entity], after[entity]
        reused[entity] = [row for row, id_ in enumerate(old) if id_ != new[row]]
        assert {old[row] for row in reused[entity]} <= {*gone}
        assert len(reused[entity]) == 2  # the least rows that are free: all are as old
        assert reused[entity] == sorted(old.index(id_) for id_ in gone)[:2]
        assert [new[row] for row, id_ in enumerate(old) if id_ in [*kept]] == [
            id_ for id_ in old if id_ in [*kept]
        ]
        assert third.vocabulary(entity).ids.to_pylist() == new[1:]
        counts = dict(zip(new[1:], third.vocabulary(entity).counts.tolist(), strict=True))
        n_days = {"a": 8 + 5 + 3, "b": 8 + 5, "x": 3, "A": 6 + 4 + 4, "X": 4}
        assert {k: n for k, n in counts.items() if k in n_days}.items() <= n_days.items()
    assert sorted(after["user"][1:]) == [*"abcdxyz"]
    assert len(after["item"]) == len(before["item"])
    cities = [None, *third.vocabulary("city").ids.to_pylist()]
    for user in "bcdxyz":
        bag = bag_of(third.entity_fields["city"], after["user"].index(user))
        assert [cities[v] for v in bag] == ["pqr"[ord(user) % 3]]
    for row in reused["item"]:  # of the items, X and Y have no tag
        assert bag_of(third.entity_fields["tag"], row) == []
    for user, met in (("b", "ABCDEFGH"), ("x", "AXY")):
        bag = {after["item"][v] for v in bag_of(third.history, after["user"].index(user))}
        assert bag == {*met} & {*after["item"][1:]} - ({*"XY"} - {*met})
    popularity = dict(zip(after["item"], third.popularity().tolist(), strict=True))
    assert popularity["X"] == 4
    fourth = day(
        "fourth", "2026-02-02", "a", "AX", vocabulary_from=str(third.folder), forget_after=None
    )
    for dataset in (third, fourth):  # the record continues without the setting
        for earlier in (first, second):
            rows = dataset.reused_rows(earlier.manifest.vocabulary_hash)
            known = {t: r[r < second.manifest.entities[t]].tolist() for t, r in rows.items()}
            assert known == reused
        assert not any(map(len, dataset.reused_rows(third.manifest.vocabulary_hash).values()))
    with pytest.raises(
        DataError, match=r"=30: no row of undated\.csv has a date in the column .t."
    ):
        day("undated", "5", "a", "A", vocabulary_from=str(first.folder))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("n", {"transform": "bucket"}, "transform is 'bucket' and was 'standard'"),
        ("n", {"transform": "none"}, "transform is 'none' and was 'standard'"),
        ("b", {"transform": "standard"}, "transform is 'standard' and was 'bucket'"),
        ("b", {"buckets": 4}, "buckets is 4 and was 3"),
        ("b", {"kind": "categorical", "transform": "none"}, "kind is 'categorical' and was 'num"),
        ("h", {"hash_rows": 9}, "hash_rows is 9 and was 5"),
        ("h", {"hash_rows": None}, "hash_rows is None and was 5"),
        ("m", {"hash_rows": 7}, "hash_rows is 7 and was None"),
        ("m", {"separator": None}, "separator is None and was '|'"),
        ("m", {"derive": "hour"}, "derive is 'hour' and was None"),
        ("m", {"table": "other"}, "table is 'other' and was 'm'"),
        ("user", {"column": "m"}, "entity's own id is False and was True"),
        ("m", {"table": "m", "min_count": 2, "missing": ["-"], "pooling": "sum"}, None),
        ("n", {"column": "b", "buckets": 9}, None),
        ("k", {"name": "added", "column": "m"}, None),
    ],
    ids=str,
)
def test_a_field_keeps_its_rows_only_where_it_means_the_same(
    root: Path, name: str, changes: dict[str, Any], message: str | None
) -> None:
    features = yaml.safe_load("""[{name: user, entity: user}, {name: item, entity: item},
      {name: m, separator: "|"}, {name: h, column: m, hash_rows: 5}, {name: k, column: m},
      {name: n, kind: numeric, transform: standard},
      {name: b, kind: numeric, transform: bucket, buckets: 3}]""")
    rows = "u,i,m,n,b\n" + "".join(f"{k % 3},{k},{k % 4}|p,{k},{k}\n" for k in range(9))
    before = small(root, rows, str(features)).folder.rename(root / "before")
    changed = [f | changes if f["name"] == name else f for f in features]

    def grown() -> None:
        small(root, rows, json.dumps(changed), vocabulary_from=str(before))

    if message is None:
        grown()
    else:
        with pytest.raises(ConfigError, match=re.escape(f"features: {name}: {message}")):
            grown()


def test_a_dataset_does_not_grow_from_itself(root: Path) -> None:
    rows = "u,i\na,x\nb,y\n"
    folder = small(root, rows, str(USER_AND_ITEM)).folder
    before = contents(folder)
    (root / "link").symlink_to(folder)
    for name in (folder, folder / ".." / "s", root / "link"):
        with pytest.raises(ConfigError, match=r"vocabulary_from=.*grow.*; set data\.name"):
            small(root, rows, str(USER_AND_ITEM), vocabulary_from=str(name))
    assert contents(folder) == before
