"""Small datasets prepared from a file."""

from pathlib import Path

import yaml

from deepfm_dist.config import Config, load_config
from deepfm_dist.data.manifest import Manifest
from deepfm_dist.data.preparation.local import prepare

FIELDS = """
- {name: user, entity: user}
- {name: seen, entity: user, history: item}
- {name: item, entity: item}
- {name: genre, entity: item, file: items.csv, separator: "|"}
- {name: maker, entity: item, file: items.csv, hash_rows: 50, keep: first}
- {name: mood, fill: calm}
- {name: place, hash_rows: 20}
- {name: day, column: time, derive: weekday, time_format: "%Y-%m-%d"}
- {name: price, kind: numeric, transform: log}
- {name: age, entity: user, column: years, kind: numeric}
"""


def write_input(root: Path, more: str = "") -> None:
    rows = [
        f"u{k % 13},i{(k // 13 * 3 + k % 13) % 40},{['calm', '', 'glad'][k % 3]},p{k % 7},q{k % 5},"
        f"2024-05-{1 + k % 28:02d},{k % 9}.5,{20 + k % 13}\n"
        for k in range(160)
    ]
    head = "user,item,mood,place,other,time,price,years\n"
    (root / "rows.csv").write_text(head + "".join(rows) + more)
    items = [f"i{k},g{k % 3}|g{k % 2},m{k % 4},n{k % 3}\n" for k in range(40)]
    (root / "items.csv").write_text("item,genre,maker,brand\n" + "".join(items))


def config_of(home: Path, fields: str = FIELDS, *overrides: str) -> Config:
    write = {
        "run": {"name": "r", "runs_root": str(home), "prepared_root": str(home / "prepared")},
        "data": {
            "root": str(home),
            "interactions": {"file": "rows.csv", "user": "user", "item": "item"},
            "features": yaml.safe_load(fields),
            "negatives": {"per_positive": 1, "evaluation_per_positive": 1},
            "history": {"max_length": 5},
        },
    }
    (home / "config.yaml").write_text(yaml.safe_dump(write))
    return load_config(str(home / "config.yaml"), list(overrides))


def prepared(config: Config) -> Manifest:
    return prepare(config.data, config.data_root, config.prepared_dir, config.data_seed)
