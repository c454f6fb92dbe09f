"""Small logs whose datasets are known by hand, and what several test files need of them."""

from pathlib import Path
from typing import Any

import yaml

from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.jagged import Jagged
from deepfm_dist.data.preparation.local import prepare
from deepfm_dist.data.schema import DataConfig

ROWS = """u,i,at,stars,hour,mood,amount
a,x,5,5,9,happy|calm,10
a,y,4,5,9,,20
a,y,9,5,10,calm,30
b,x,1,5,9,happy,
b,z,2,5,11,?,40
b,w,3,1,11,calm,50
c,z,7,5,9,calm,60
c,y,8,5,10,calm,70
c,x,9,5,10,calm,80
c,v,10,5,10,calm,90
"""

GENRES = "i\tgenre\nx\tComedy\nx\tDrama\nx\tComedy\ny\tDrama\nq\tHorror\n"

PEOPLE = "u,age\na,30\nb,\nc,50\nc,99\n"

HELD_OUT = (
    "u,i,at,stars,hour,mood,amount\na,z,10,5,9,calm,1\nd,x,10,5,9,calm,1\na,new,11,5,9,sad,1\n"
)

BASE: dict[str, Any] = yaml.safe_load("""
interactions: {file: rows.csv, user: u, item: i, time: at, rating: stars, min_rating: 4}
features:
  - {name: user, entity: user}
  - {name: item, entity: item}
  - {name: genre, entity: item, file: genres.tsv}
  - {name: first, entity: item, file: genres.tsv, column: genre, keep: first, table: genre}
  - {name: age, entity: user, file: people.csv, kind: numeric, transform: standard}
  - {name: hour}
  - {name: mood, separator: "|", missing: ["?"], min_count: 2}
  - {name: amount, kind: numeric, transform: log}
titles: {file: titles.csv, column: name}
split: {valid: 0, test_file: heldout.csv}
negatives: {evaluation_per_positive: 1}
""")


def bag_of(jagged: object, row: int) -> list[int]:
    assert isinstance(jagged, Jagged)
    return jagged.values[jagged.offsets[row] : jagged.offsets[row + 1]].tolist()


def made(root: Path, **changes: Any) -> PreparedDataset:
    data = DataConfig.model_validate(BASE | changes)
    prepare(data, root, root / "out" / "d", seed=1)
    return PreparedDataset(root / "out" / "d")


USER_AND_ITEM = [{"name": "user", "entity": "user"}, {"name": "item", "entity": "item"}]


def small(
    root: Path, rows: str, features: str = "[{name: user, entity: user}]", **changes: Any
) -> PreparedDataset:
    """A dataset of one file ``s.csv`` with users ``u`` and items ``i``, nothing held out."""
    (root / "s.csv").write_text(rows)
    spec = {
        "interactions": {"file": "s.csv", "user": "u", "item": "i"},
        "features": yaml.safe_load(features),
        "split": {"valid": 0, "test": 0},
    }
    return made_of(root, spec | changes)


def made_of(root: Path, spec: dict[str, Any], seed: int = 1) -> PreparedDataset:
    prepare(DataConfig.model_validate(spec), root, root / "out" / "s", seed)
    return PreparedDataset(root / "out" / "s")


def pairs_of(dataset: PreparedDataset, split: str) -> list[tuple[str | None, str | None]]:
    """(user, item) of a split's rows as external ids; None is unknown."""
    rows = dataset.rows(split)
    users, items = (dataset.entity_ids(e).to_pylist() for e in ("user", "item"))
    assert rows.users is not None
    assert rows.items is not None
    return [(users[u], items[i]) for u, i in zip(rows.users, rows.items, strict=True)]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder below it, by name."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def bag_rows(jagged: object) -> list[list[int]]:
    assert isinstance(jagged, Jagged)
    return jagged.lists()
