"""Mistakes that meet little memory, several ranks, datasets behind URLs, or damaged files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from deepfm_dist.distributed import checkpoint
from deepfm_dist.interop.combine import FACTORS_BYTES
from deepfm_dist.ranking.baselines import USABLE
from deepfm_dist.storage import delete_tree, folder_of
from tests.cures.mistakes import (
    DATA,
    FILES,
    GROWN,
    N_ITEMS,
    PRINT,
    RANKED,
    ROWS,
    SEEN,
    Mistake,
    csv_of,
    exit_code,
)

FLAT = "train model.deep=false"
CROSS = "model.over_arch=tests.cross_net:CrossNet"
REVERSED = json.dumps(DATA["features"][::-1])
FREQUENT = json.dumps(
    [{"name": "user", "entity": "user"}, {"name": "item", "entity": "item", "min_count": 15}, SEEN]
)
EASE = "combine --to both --ease 1 --ease-columns 4"
NEXT = "train run.name=next checkpoint.start_from=runs_root/cures"
FEW_BYTES = {"deepfm_dist.ranking.evaluation.available_bytes": lambda: 1000}


def _at_url(name: str) -> str:
    return f"memory://cures-{name}"


def _published(name: str) -> str:
    """Settings of a dataset that lies behind a URL."""
    return f"run.prepared_root={_at_url(name)} run.cache_root=cache"


def _publish(home: Path, name: str) -> None:
    """Prepares behind a URL, as another machine does."""
    assert exit_code(home, f"prepare {_published(name)}") == 0
    shutil.rmtree(home / "cache")


def _without_vocabulary(name: str) -> Callable[[Path], None]:
    def damage(_: Path) -> None:
        (folder_of(_at_url(name)) / "cures/vocabulary/item.parquet").unlink()

    return damage


def _changed_vocabulary(name: str) -> Callable[[Path], None]:
    def damage(_: Path) -> None:
        file = folder_of(_at_url(name)) / "cures/vocabulary/item.parquet"
        content = bytearray(file.read_bytes())
        content[-20] ^= 1
        file.write_bytes(bytes(content))

    return damage


def _deleted(name: str) -> Callable[[Path], None]:
    return lambda _: delete_tree(folder_of(_at_url(name)))


def _uploaded(_: Path) -> None:
    for name in ("rows.csv", "items.csv"):
        (folder_of(_at_url("logs")) / name).write_text(FILES[name])


def _of_another_version(home: Path) -> None:
    run = home / "runs_root/cures"
    marker = checkpoint.find_checkpoint(run, "latest") / checkpoint.MARKER
    state = json.loads(marker.read_text())
    state = {name: value for name, value in state.items() if name != "crc32_of_this"}
    state["trainer"]["of_the_future"] = 1
    marker.write_text(json.dumps(state))


def _of_another_tool(home: Path) -> None:
    manifest = home / "prepared_root/cures/manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"fingerprint": "given"}))


MACHINES = [
    Mistake(
        f"{NEXT} {CROSS} 'data.features={REVERSED}'",
        "give data.features its fields in its order: user, item, genre",
        left_out=(f"data.features={REVERSED}",),
        before=(f"train {CROSS}",),
    ),
    Mistake(
        "train trainer.batch_size=1",
        "or a larger trainer.batch_size",
        "trainer.batch_size=64",
        ranks=2,
    ),
    Mistake(
        "prepare",
        "set hash_rows for its fields",
        machine={"deepfm_dist.data.codes.MOST_TEXT_BYTES": 1000},
        data={"features": [*DATA["features"], {"name": "second", "column": "time"}]},
        new_data={
            "features": [*DATA["features"], {"name": "second", "column": "time", "hash_rows": 9}]
        },
    ),
    Mistake(
        "prepare",
        "if they are ids of users or items, write shorter ones",
        machine={"deepfm_dist.data.codes.MOST_TEXT_BYTES": 250},
        data={"features": DATA["features"][:2]},
        new_files={"rows.csv": csv_of([[row[0][1:], *row[1:]] for row in ROWS])},
    ),
    Mistake(
        "prepare data.interactions.file=memory://cures-logs/rows.csv",
        "set data.root=memory://cures-logs and name it rows.csv",
        "data.root=memory://cures-logs data.interactions.file=rows.csv",
        damage=_uploaded,
    ),
    Mistake(
        "prepare",
        "name the file that describes them",
        data={
            "task": "ctr",
            "interactions": {"file": "shown.csv", "user": "user", "impressions": "shown"},
            "features": [
                *DATA["features"][:2],
                {"name": "genre", "entity": "item", "column": "kind"},
            ],
        },
        files={
            "shown.csv": "user,shown\n"
            + "".join(f"u{k},i{k}-{k % 2} i{k + 1}-0\n" for k in range(29))
        },
        new_data={"features": DATA["features"]},
    ),
    Mistake(
        f"prepare {GROWN} data.interactions.time=time data.forget_after=30",
        "leave forget_after out",
        before=("prepare",),
        left_out=("data.forget_after=30",),
        files={"rows.csv": csv_of([[*row[:5], str(n)] for n, row in enumerate(ROWS)])},
    ),
    *(
        Mistake(
            "prepare data.interactions.file=" + days,
            "write days like {2026-11-01..2026-11-07}",
            "data.interactions.file={2026-11-01..2026-11-02}.csv",
            files={f"2026-11-0{day}.csv": csv_of(ROWS[day - 1 :: 2]) for day in (1, 2)},
        )
        for days in ("{2026-11-31..2026-12-01}.csv", "{2026-11-02..2026-11-01}.csv")
    ),
    *(
        Mistake(
            "prepare data.split.test=0.3",
            cure,
            typed,
            before=("prepare",),
            damage=_of_another_tool,
        )
        for cure, typed in (
            ("use the same", "data.split.test=0.1"),
            ("set data.name", "data.name=more"),
            ("run.prepared_root to another folder", "run.prepared_root=elsewhere"),
        )
    ),
    Mistake(
        f"train {_published('gone')}",
        f"delete {_at_url('gone')}/cures and prepare it again",
        damage=lambda home: (_publish(home, "gone"), _without_vocabulary("gone")(home)),
        by_hand=_deleted("gone"),
        first=(f"prepare {_published('gone')}",),
    ),
    Mistake(
        f"train {_published('bad')}",
        f"or delete {_at_url('bad')}/cures and prepare it again",
        damage=lambda home: (_publish(home, "bad"), _changed_vocabulary("bad")(home)),
        by_hand=_deleted("bad"),
        first=(f"prepare {_published('bad')}",),
    ),
    Mistake(
        f"train {_published('there')}",
        "set run.cache_root to a writable folder with enough space",
        "run.cache_root=cache",
        damage=lambda home: (_publish(home, "there"), (home / "cache").write_text("")),
        by_hand=lambda home: (home / "cache").unlink(),
    ),
    Mistake(
        f"train {_published('large')}",
        "set run.cache_root to a folder with enough space",
        "run.cache_root=roomy",
        machine={
            "deepfm_dist.data.remote.shutil.disk_usage": lambda path: SimpleNamespace(
                free=10**9 * ("roomy" in str(path))
            )
        },
        damage=lambda home: _publish(home, "large"),
    ),
    Mistake(
        "train 'sharding.tables={device: {kind: row_wise}}'",
        "use table_wise",
        "'sharding.tables={device: {kind: table_wise}}'",
        data={"features": [*DATA["features"], {"name": "device"}]},
        ranks=4,
    ),
    Mistake(
        EASE,
        "or raise min_count of the items",
        "--of frequent",
        data={"features": [*DATA["features"], SEEN]},
        before=(FLAT,),
        machine={
            "deepfm_dist.interop.combine.available_bytes": lambda: int(
                FACTORS_BYTES * (N_ITEMS - 1) ** 2 / USABLE
            )
        },
        first=(f"{FLAT} run.name=frequent 'data.features={FREQUENT}'",),
    ),
    Mistake(
        "combine --to both --of cures,other",
        "train both with the same",
        "--of cures,same",
        ("--of", "cures,other"),
        data={"features": [*DATA["features"], SEEN]},
        before=(FLAT, f"{FLAT} run.name=other data.history.dropout=0.3 data.name=cures"),
        first=(f"{FLAT} run.name=same",),
    ),
    *(
        Mistake(
            "evaluate evaluate.baselines=[item_knn]",
            cure,
            typed,
            left_out,
            before=("train",),
            machine=FEW_BYTES,
        )
        for cure, typed, left_out in (
            ("set evaluate.item_knn_neighbours=3", "evaluate.item_knn_neighbours=3", ()),
            ("or leave it out", "", ("evaluate.baselines=[item_knn]",)),
        )
    ),
    Mistake(
        "evaluate evaluate.baselines=[ease]",
        "leave it out",
        "evaluate.baselines=[]",
        before=("train",),
        machine=FEW_BYTES,
    ),
    Mistake(
        "evaluate recommend.cold_items=only",
        "or leave recommend.cold_items out",
        "",
        ("recommend.cold_items=only",),
        before=("train data.id_dropout=0.2",),
        files={"items.csv": FILES["items.csv"] + "i99,g1,3\n"},
    ),
    Mistake(
        f"{NEXT}/refit trainer.loss=softmax",
        "set checkpoint.start_from=",
        "checkpoint.start_from=runs_root/cures",
        data={"features": [*DATA["features"], SEEN]},
        before=(RANKED,),
    ),
    Mistake(
        "train",
        "train again with checkpoint.resume=never",
        "checkpoint.resume=never",
        before=("train",),
        damage=_of_another_version,
    ),
    *(
        Mistake(
            "train trainer.loss=softmax",
            cure,
            typed,
            files={
                "rows.csv": csv_of(
                    [[f"u{n}", f"i{n % 3}", *row[2:]] for n, row in enumerate(ROWS[:40])]
                )
            },
            data={
                "features": [DATA["features"][1], SEEN],
                "split": {"method": "random", "valid": 0.2, "test": 0.2},
            },
            warnings=True,
        )
        for cure, typed in (
            ("data.split.method=per_user", "data.split.method=per_user"),
            ("set trainer.monitor=null", "trainer.monitor=null"),
        )
    ),
    Mistake(
        "prepare data.root=",
        "name a folder or file, such as .",
        "data.root=.",
    ),
    Mistake(
        PRINT + "run.runs_root=https://host/runs",
        "name a folder on a disk or in an object store (s3://)",
        "run.runs_root=s3://bucket/runs",
    ),
    Mistake(PRINT + "run.name=../up", "use one such as ml1m", "run.name=ml1m"),
    Mistake(
        "evaluate --run runs_root/current",
        "write the name into it, such as 2026-11-30",
        before=("train",),
        damage=lambda home: (home / "runs_root/current").write_text("../x\n"),
        by_hand=lambda home: (home / "runs_root/current").write_text("cures\n"),
    ),
    Mistake(
        "train",
        "a folder of that name is in the way; move or delete it",
        damage=lambda home: (home / "runs_root/cures/plan.json").mkdir(parents=True),
        by_hand=lambda home: (home / "runs_root/cures/plan.json").rmdir(),
    ),
]
