"""Datasets that keep the rows of earlier ids."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.preparation import job
from deepfm_dist.data.preparation.local import prepare
from deepfm_dist.data.schema import DataConfig
from deepfm_dist.errors import ConfigError
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
        assert [items[v] for v in bag] == [*dict.fromkeys(liked)]
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
