"""Every cure that an error line names is typed, and cures.

A row of the tables is a command that fails, a part of its error line, and what a user then types.
The line has to contain that part, so a cure that is not named fails like one that does not work.
"""

import ast
import gzip
import io
import json
import logging
import re
import shlex
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import deepfm_dist
from deepfm_dist import (
    combine,
    evaluate,
    export,
    plan,
    predict,
    prepare,
    recommend,
    similar,
    train,
    tune,
)
from tests.ranks import heed_permissions, run_alone, run_in_fork

COMMANDS = {
    "prepare": prepare.main,
    "train": train.main,
    "evaluate": evaluate.main,
    "recommend": recommend.main,
    "similar": similar.main,
    "predict": predict.main,
    "export": export.main,
    "tune": tune.main,
    "plan": plan.main,
    "combine": combine.main,
}
N_USERS, N_ITEMS = 40, 30


def _rows() -> list[list[str]]:
    """A third of all pairs, each with a rating, a label, a device and a time."""
    rng = np.random.default_rng(7)
    rows = []
    for user in range(N_USERS):
        for item in rng.choice(N_ITEMS, 10, replace=False):
            rating, device = rng.integers(1, 6), rng.choice(["phone", "desk"])
            label, time = int(rating > 3), 1_600_000_000 + len(rows)
            rows.append([f"u{user}", f"i{item}", str(rating), str(label), device, str(time)])
    return rows


def _csv(rows: Sequence[Sequence[str]], header: str = "user,item,rating,label,device,time") -> str:
    return header + "\n" + "".join(",".join(row) + "\n" for row in rows)


ROWS = _rows()
FILES = {
    "rows.csv": _csv(ROWS),
    "items.csv": "item,genre,price\n"
    + "".join(f"i{i},g{i % 3}|g{i % 5},{i / 4}\n" for i in range(N_ITEMS)),
    "users.csv": "user\nu1\nu2\n",
    "histories.csv": "user,item\nnew,i1\nnew,i2\n",
}
DATA: dict[str, Any] = {
    "interactions": {"file": "rows.csv", "user": "user", "item": "item"},
    "features": [
        {"name": "user", "entity": "user"},
        {"name": "item", "entity": "item"},
        {"name": "genre", "entity": "item", "file": "items.csv", "separator": "|"},
    ],
}
SEEN = {"name": "seen", "entity": "user", "history": "item"}
CITY = {"name": "city", "entity": "user", "file": "people.csv", "keep": "first"}
PEOPLE = {
    "people.csv": "user,city\n" + "".join(f"u{n},{('Oslo', 'Rome')[n % 2]}\n" for n in range(9))
}
CTR = {
    "task": "ctr",
    "interactions": {"file": "rows.csv", "user": "user", "item": "item", "label": "label"},
}
SMALL = {
    "model": {"embedding_dim": 4, "over_arch_layer_sizes": [4]},
    "trainer": {"batch_size": 256, "epochs": 1},
    "run": {"name": "cures", "loggers": []},
}


def _parquet(rows: str) -> bytes:
    file = io.BytesIO()
    pd.read_csv(io.StringIO(rows)).to_parquet(file)
    return file.getvalue()


@dataclass(frozen=True)
class Mistake:
    """A command that fails, what its line says, and what to type then.

    Attributes:
        command: the command and its arguments.
        cure: what has to stand in the error line, word for word.
        typed: arguments added to the command; one of the same setting takes the place of the old.
        left_out: arguments of the command that the cure takes away.
        data: changes of `DATA`.
        files: changes of `FILES`.
        new_files: what the cure changes in files.
        new_data: what the cure changes in the configuration's ``data`` section.
        first: commands that the cure types before the command.
        before: commands that have run before the mistake.
        without: libraries that are not installed until the cure installs them.
        env: variables of the environment.
    """

    command: str
    cure: str
    typed: str = ""
    left_out: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    new_files: Mapping[str, str | bytes] = field(default_factory=dict)
    new_data: Mapping[str, Any] = field(default_factory=dict)
    first: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)


def _changed(row: int, column: int, text: str) -> str:
    rows = [list(r) for r in ROWS]
    rows[row][column] = text
    return _csv(rows)


def _timed(text: Callable[[int], str]) -> str:
    return _csv([[*row[:5], text(int(row[5]))] for row in ROWS])


SPACE = "tune.space={optimizer.dense.lr: {low: 0.0001, high: 0.01, log: true}}"
CTR_OVERRIDES = (
    "data.task=ctr data.interactions.label=label data.interactions.user=null "
    "data.interactions.item=null 'data.features=[{name: device}]'"
)
RANKED = "train trainer.loss=softmax model.deep=false model.linear=ease"
GROWN = "data.name=grown data.vocabulary_from=prepared_root/cures"
HASHED = "data.features=[{name: user, entity: user}, {name: item, entity: item, hash_rows: 9}]"
PRINT = "train --print-config "
VECTORS = "item,v\n" + "".join(f'i{i},"[{i}, 1]"\n' for i in range(N_ITEMS))
IDS = "item\n" + "".join(f"i{i}\n" for i in range(N_ITEMS))


def _vectors(**changes: Any) -> dict[str, Any]:
    vector = {"name": "v", "entity": "item", "kind": "vector", "file": "v.csv"}
    return {"features": [*DATA["features"][:2], vector | changes]}


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


SETTINGS = [
    Mistake(
        PRINT,
        "set entity: item",
        data=_vectors(entity="context", file=None),
        new_data=_vectors(),
    ),
    Mistake(PRINT, "set file", data=_vectors(file=None), new_data=_vectors()),
    Mistake(
        PRINT,
        "is a NumPy file, which describes itself; leave it out",
        data=_vectors(npy="v.npy") | {"files": {"v.npy": {"decimal": ","}}},
        new_data={"files": {}},
    ),
    Mistake(
        PRINT + "evaluate.protocol=strong",
        "set data.split.method=users",
        "data.split.method=users",
        data={"features": [DATA["features"][1], SEEN]},
    ),
    Mistake(
        PRINT + "data.split.method=users evaluate.protocol=weak",
        "leave evaluate.protocol out",
        left_out=("evaluate.protocol=weak",),
        data={"features": [DATA["features"][1], SEEN]},
    ),
    Mistake(PRINT + "data.split.fold_in=0.5", "leave it out", left_out=("data.split.fold_in=0.5",)),
    Mistake(
        PRINT + "data.split.method=users",
        "add {name: seen, entity: user, history: item} to data.features",
        data={"features": [DATA["features"][1]]},
        new_data={"features": [DATA["features"][1], SEEN]},
    ),
    Mistake(
        PRINT + "data.split.method=users",
        "replace it by {name: seen, entity: user, history: item}",
        new_data={"features": [SEEN, DATA["features"][1]]},
    ),
    Mistake(
        PRINT + "trainer.batchsize=64",
        "trainer.batch_size",
        "trainer.batch_size=64",
        ("trainer.batchsize=64",),
    ),
    Mistake(PRINT + "optimizer.dense.decay=linear", "decay_steps", "optimizer.dense.decay_steps=9"),
    Mistake(
        PRINT + "optimizer.dense.final_lr=0.1",
        "linear",
        "optimizer.dense.decay=linear optimizer.dense.decay_steps=9",
    ),
    Mistake(
        PRINT + "optimizer.dense.power=3",
        "decay=polynomial",
        "optimizer.dense.decay=polynomial optimizer.dense.decay_steps=9",
    ),
    Mistake(
        PRINT + "optimizer.max_norm=1", "optimizer.tables.name=adam", "optimizer.tables.name=adam"
    ),
    Mistake(
        PRINT + "optimizer.max_norm=1",
        "optimizer.dense.max_norm",
        "optimizer.dense.max_norm=1",
        ("optimizer.max_norm=1",),
    ),
    Mistake(
        PRINT + "'sharding.tables={user: {rank: 0}}'",
        "kind=table_wise",
        "'sharding.tables={user: {rank: 0, kind: table_wise}}'",
    ),
    Mistake(
        PRINT + "trainer.patience=1 trainer.monitor=null", "monitor=auto", "trainer.monitor=auto"
    ),
    Mistake(
        PRINT + "trainer.patience=1 trainer.validate_every_epochs=0",
        "validate_every_epochs=1",
        "trainer.validate_every_epochs=1",
    ),
    Mistake(
        PRINT + "trainer.loss=bpr trainer.candidates=null", "candidates", "trainer.candidates=10"
    ),
    Mistake(PRINT + "trainer.candidates=10 trainer.loss=bce", "softmax", "trainer.loss=softmax"),
    Mistake(
        PRINT + "trainer.targets_per_user=4 trainer.loss=softmax trainer.candidates=null",
        "candidates",
        "trainer.candidates=10",
    ),
    Mistake(
        PRINT + "trainer.monitor=auc trainer.validate_every_epochs=0",
        "validate_every_epochs",
        "trainer.validate_every_epochs=1",
    ),
    Mistake(
        PRINT + "trainer.table_precision=fp16 optimizer.tables.name=adam",
        "rowwise_adagrad",
        "optimizer.tables.name=rowwise_adagrad",
    ),
    Mistake(
        PRINT + "trainer.accumulate_steps=2",
        "optimizer.tables.name=adam",
        "optimizer.tables.name=adam",
    ),
    Mistake(
        PRINT + "trainer.loss=softmax model.batch_norm=true",
        "model.batch_norm=false",
        "model.batch_norm=false",
    ),
    Mistake(
        PRINT + "trainer.loss=softmax model.over_arch=a:B", "model.deep=false", "model.deep=false"
    ),
    Mistake(
        PRINT + "recommend.k=20 recommend.candidates=10", "candidates", "recommend.candidates=20"
    ),
    Mistake(PRINT + "recommend.index=HNSW32", "candidates=500", "recommend.candidates=500"),
    Mistake(
        PRINT + "recommend.probes=4",
        "index=IVF1024,Flat",
        "recommend.index=IVF1024,Flat recommend.candidates=500",
    ),
    Mistake(
        PRINT + "recommend.histories=a.csv recommend.users=[u1]",
        "leave users out",
        "",
        ("recommend.users=[u1]",),
    ),
    Mistake(
        PRINT + "data.interactions.rating=rating", "min_rating", "data.interactions.min_rating=4"
    ),
    Mistake(
        PRINT + "data.split.method=temporal", "interactions.time", "data.interactions.time=time"
    ),
    Mistake(
        PRINT + "data.split.method=leave_last data.interactions.time=time",
        "whole numbers",
        "data.split.valid=1 data.split.test=1",
    ),
    Mistake(PRINT + "data.task=ctr", "interactions.label", "data.interactions.label=label"),
    Mistake(PRINT + "data.interactions.label=label", "task: ctr", "data.task=ctr"),
    Mistake(
        PRINT + "data.interactions.user=null", "interactions.user", "data.interactions.user=user"
    ),
    Mistake(
        PRINT + "model.first_order=false model.fm=false model.deep=false",
        "first_order",
        "model.first_order=true",
    ),
    Mistake(PRINT + "model.fm=false model.fm_pairs=across", "fm part", "model.fm=true"),
    Mistake(PRINT + "'model.over_arch_options={a: 1}'", "over_arch", "model.over_arch=a:B"),
    Mistake(
        PRINT + "trainer.loss=softmax trainer.compile=true",
        "leave it out",
        "",
        ("trainer.compile=true",),
    ),
    Mistake(
        PRINT + "trainer.profile_steps=[3,2]", "the first, from 1", "trainer.profile_steps=[2,3]"
    ),
    Mistake(
        PRINT + "'tune.space={data.seed: [1, 2]}'",
        "vary model, optimizer and trainer",
        "'tune.space={model.embedding_dim: [4, 8]}'",
    ),
    Mistake(
        PRINT + "data.task=ctr data.interactions.label=label evaluate.k=[5]",
        "leave it out",
        "",
        ("evaluate.k=[5]",),
    ),
    Mistake(
        PRINT + "recommend.histories=a.csv recommend.mask=[train]",
        "leave it out",
        "",
        ("recommend.mask=[train]",),
    ),
    Mistake(PRINT + "trainer.epochs=0", "(got 0)", "trainer.epochs=1"),
    Mistake(
        PRINT + "data.id_dropout=0.1",
        "leave id_dropout out",
        "",
        ("data.id_dropout=0.1",),
        data={"features": [{"name": "device"}]},
    ),
    Mistake(PRINT + "run.device=gpu", "cuda", "run.device=auto"),
    Mistake(PRINT + "epochs=3", "did you mean trainer.epochs?", "trainer.epochs=3", ("epochs=3",)),
    Mistake(
        PRINT + "trainer.loss=softmax trainer.accumulate_steps=2 optimizer.tables.name=adam",
        "use a smaller batch_size",
        "trainer.batch_size=64",
        ("trainer.accumulate_steps=2",),
    ),
    Mistake(
        PRINT + "'sharding.tables={user: {kind: replicated, cached: 0.1}}'",
        "a replicated table is small; leave it out",
        "'sharding.tables={user: {kind: replicated}}'",
    ),
    Mistake(
        PRINT + "data.interactions.time_format=%d/%m/%Y",
        "interactions.time; set it",
        "data.interactions.time=time",
    ),
    Mistake(
        PRINT + "data.interactions.time=time data.interactions.time_format=yesterday",
        "such as %d/%m/%Y %H:%M",
        "'data.interactions.time_format=%d/%m/%Y %H:%M'",
    ),
    Mistake(
        PRINT + "'model={embedding_dim: 4, embedding_dim: 8}'",
        "merge the two",
        "'model={embedding_dim: 8}'",
    ),
    Mistake(PRINT + "data.root=s3:/logs/2024", "write s3://logs/2024", "data.root=s3://logs/2024"),
    Mistake(
        PRINT + "data.history.dropout=0.5",
        "add one with history: item",
        new_data={"features": [*DATA["features"], SEEN]},
    ),
    *(
        Mistake(
            PRINT.strip(),
            cure,
            data={"features": [*DATA["features"], bad]},
            new_data={"features": [*DATA["features"], good]},
        )
        for bad, cure, good in [
            (
                {"name": "genre", "entity": "item", "file": "items.csv"},
                "two features",
                {"name": "more", "column": "genre", "entity": "item", "file": "items.csv"},
            ),
            (
                {"name": "price", "kind": "numeric", "fill": "0"},
                "fill is for categorical",
                {"name": "price", "kind": "numeric"},
            ),
            ({"name": "device", "transform": "log"}, "numeric", {"name": "device"}),
            (
                {"name": "device", "hash_rows": 9, "min_count": 2},
                "leave min_count out",
                {"name": "device", "hash_rows": 9},
            ),
            (
                {"name": "device", "fill": "x", "separator": "|"},
                "leave separator out",
                {"name": "device", "fill": "x"},
            ),
            (
                {"name": "device", "file": "items.csv"},
                "column of the interactions file",
                {"name": "device"},
            ),
            (
                {"name": "seen", "history": "item"},
                "entity: user",
                {"name": "seen", "history": "item", "entity": "user"},
            ),
            (
                {"name": "seen", "history": "itm", "entity": "user"},
                "item",
                {"name": "seen", "history": "item", "entity": "user"},
            ),
            (
                {"name": "device", "separator": "|", "several": False},
                "leave one of them out",
                {"name": "device", "separator": "|"},
            ),
            (
                {"name": "rating", "entity": "user", "kind": "numeric"},
                "name its column",
                {"name": "score", "entity": "user", "kind": "numeric", "column": "rating"},
            ),
            (
                {"name": "also", "column": "device", "table": "item", "min_count": 2},
                "leave it out",
                {"name": "also", "column": "device", "table": "item"},
            ),
            ({"name": "time"}, "rename the field", {"name": "at", "column": "time"}),
            (
                {"name": "a.b", "column": "device"},
                "letters, digits, underscores",
                {"name": "a_b", "column": "device"},
            ),
            (
                {"name": "kind", "entity": "item", "file": "items.csv", "column": "item"},
                "name the column that holds the value",
                {"name": "kind", "entity": "item", "file": "items.csv", "column": "genre"},
            ),
            (
                {
                    "name": "again",
                    "entity": "item",
                    "file": "items.csv",
                    "column": "genre",
                    "table": "item",
                    "hash_rows": 9,
                },
                "cannot share",
                {
                    "name": "again",
                    "entity": "item",
                    "file": "items.csv",
                    "column": "genre",
                    "table": "genre",
                },
            ),
        ]
    ),
    *(
        Mistake(
            PRINT.strip(),
            cure,
            data={"negatives": {"fixed_per_user": 3}, **bad},
            new_data={"negatives": {"fixed_per_user": 3}, **good},
        )
        for bad, cure, good in [
            ({"negatives": {"fixed_per_user": 3, "redraw": False}}, "leave redraw out", {}),
            (
                {"interactions": {**DATA["interactions"], "weight": "rating"}},
                "leave it out",
                {"interactions": DATA["interactions"]},
            ),
            (
                {"features": [*DATA["features"], {"name": "device"}]},
                "the field device cannot",
                {"features": DATA["features"]},
            ),
        ]
    ),
]
ITEMS = FILES["items.csv"]
PRICE = [
    *DATA["features"],
    {"name": "price", "entity": "item", "file": "items.csv", "kind": "numeric"},
]
ALSO = {"name": "also", "table": "item"}
"""A field in the table of the items' ids."""
OBJECTS = "".join(f'{{"item": "i{i}", "genres": [{{"id": {i % 3}}}]}}\n' for i in range(N_ITEMS))


def _genres(**of_field: str) -> list[dict[str, Any]]:
    """The fields, with the items' genres in a file of objects."""
    genre = {"name": "genres", "entity": "item", "file": "items.jsonl", **of_field}
    return [*DATA["features"][:2], genre]


INPUT = [
    Mistake(
        "prepare",
        "write a list of numbers for each item",
        data=_vectors(),
        files={"v.csv": "item,v\ni1,\n"},
        new_files={"v.csv": VECTORS},
    ),
    Mistake(
        "prepare",
        "set separator for the field",
        data=_vectors(),
        new_data=_vectors(separator="|"),
        files={"v.csv": VECTORS.replace(", ", "|").replace("[", "").replace("]", "")},
    ),
    Mistake(
        "prepare",
        "write one vector for each row, in the same order",
        data=_vectors(npy="v.npy"),
        files={"v.csv": IDS, "v.npy": _npy(np.ones((3, 2)))},
        new_files={"v.npy": _npy(np.ones((N_ITEMS, 2)))},
    ),
    Mistake(
        "prepare",
        "write it with numpy.save",
        data=_vectors(npy="v.npy"),
        files={"v.csv": IDS, "v.npy": VECTORS},
        new_files={"v.npy": _npy(np.ones((N_ITEMS, 2)))},
    ),
    Mistake(
        "prepare ",
        "write it with numpy.save",
        data=_vectors(npy="v.npy"),
        files={"v.csv": IDS, "v.npy": _npy(np.ones((N_ITEMS, 2)))[:200]},
        new_files={"v.npy": _npy(np.ones((N_ITEMS, 2)))},
    ),
    Mistake(
        "prepare",
        "correct it or set data.on_bad_row=skip",
        "data.on_bad_row=skip",
        data=_vectors(npy="v.npy"),
        files={"v.csv": IDS, "v.npy": _npy(np.array([[1, np.nan], *[[1, 1]] * (N_ITEMS - 1)]))},
    ),
    Mistake(
        "prepare 'data.interactions.file=[rows.csv, row*.csv]'",
        "list it once",
        "data.interactions.file=rows.csv",
    ),
    Mistake(
        "prepare 'data.files={items.jsonl: {delimiter: ;}}'",
        "leave it out of data.files",
        "data.files={}",
        data={"features": _genres(column="genres.id")},
        files={"items.jsonl": OBJECTS},
    ),
    Mistake(
        "prepare",
        "leave fill out",
        data={
            "features": [
                *DATA["features"][:2],
                {**DATA["features"][2], "separator": None, "fill": "x"},
            ]
        },
        new_data={"features": DATA["features"]},
        files={
            "items.csv": "item,genre\n" + "".join(f"i{i},\"['a', 'b']\"\n" for i in range(N_ITEMS))
        },
    ),
    Mistake(
        "prepare",
        "name the column of ids",
        data={
            "features": [*DATA["features"], {"name": "also", "column": "device", "table": "item"}]
        },
        new_data={
            "features": [*DATA["features"], {"name": "also", "column": "item", "table": "item"}]
        },
    ),
    Mistake(
        "prepare data.split.test_file=test.csv",
        "write the ids the same way",
        files={"test.csv": _csv([[row[0].upper(), *row[1:]] for row in ROWS[:9]])},
        new_files={"test.csv": _csv(ROWS[:9])},
    ),
    Mistake(
        "prepare",
        'set missing: ["n/a"] for its field',
        new_data={"features": [*PRICE[:-1], PRICE[-1] | {"missing": ["n/a"]}]},
        data={"features": PRICE},
        files={"items.csv": ITEMS.replace(",0.5\n", ",n/a\n")},
    ),
    Mistake(
        "prepare",
        'in data.files: {items.csv: {decimal: ","}}',
        new_data={"files": {"items.csv": {"delimiter": ";", "decimal": ","}}},
        data={"features": PRICE, "files": {"items.csv": {"delimiter": ";"}}},
        files={"items.csv": ITEMS.replace(",", ";").replace(".", ",")},
    ),
    Mistake(
        "prepare",
        r"in data.files: {items.csv: {escape: '\'}}",
        r"""'data.files={items.csv: {escape: "\\"}}'""",
        files={"items.csv": ITEMS.replace("g0|g1", r'"g0|\"g1\""')},
    ),
    Mistake(
        "prepare 'data.files={rows.csv: {columns: [user, item, rating, label, device, time]}}'",
        "leave columns out",
        "data.files={}",
    ),
    Mistake(
        "prepare",
        "name the member that is wanted: genres.id",
        data={"features": _genres()},
        new_data={"features": _genres(column="genres.id")},
        files={"items.jsonl": OBJECTS},
    ),
    Mistake(
        "prepare",
        "call it rows.csv",
        "data.interactions.file=rows.csv",
        data={"interactions": {"file": "rows.csv.gz", "user": "user", "item": "item"}},
        files={"rows.csv.gz": FILES["rows.csv"]},
    ),
    Mistake(
        "prepare data.interactions.file=log",
        "name its files: log/*/*.csv",
        "data.interactions.file=log/*/*.csv",
        files={"log/day=1/rows.csv": FILES["rows.csv"]},
    ),
    Mistake("prepare data.interactions.user=usr", "user", "data.interactions.user=user"),
    Mistake("prepare data.root=$NOT_SET/x", "data.root=FOLDER", "data.root=."),
    Mistake(
        "prepare",
        "set data.on_bad_row=skip",
        "data.on_bad_row=skip",
        files={"rows.csv": _changed(5, 1, "")},
    ),
    Mistake(
        "prepare data.interactions.time=time",
        "set data.on_bad_row=skip",
        "data.on_bad_row=skip",
        files={"rows.csv": _changed(5, 5, "soon")},
    ),
    *(
        Mistake(
            "prepare data.interactions.time=time",
            f'data.interactions.time_format="{wanted}"',
            f'data.interactions.time_format="{wanted}"',
            files={"rows.csv": _timed(lambda s, f=wanted: time.strftime(f, time.gmtime(s)))},
        )
        for wanted in ("%d/%m/%Y %H:%M", "%a %b %d %H:%M:%S %Y", "%m/%d/%Y %I:%M:%S %p")
    ),
    Mistake(
        "prepare data.interactions.time=time",
        "[iso, '%Y%m%d']",
        """data.interactions.time_format="[iso, '%Y%m%d']" """,
        files={"rows.csv": _timed(lambda s: "20200131" if s % 2 else "2020-01-30 10:00:00")},
    ),
    Mistake(
        "prepare",
        "set data.on_bad_row=skip",
        "data.on_bad_row=skip",
        data=CTR,
        files={"rows.csv": _changed(5, 3, "7")},
    ),
    Mistake(
        "prepare data.interactions.repeated=strongest "
        "data.interactions.order={device:[desk,tablet]}",
        "is not a word of interactions.order: desk, tablet; add it there, or",
        "data.interactions.order={device:[desk,tablet,phone]}",
    ),
    Mistake(
        "prepare",
        "files: {rows.csv: {delimiter: ;}}",
        "'data.files={rows.csv: {delimiter: ;}}'",
        files={"rows.csv": FILES["rows.csv"].replace(",", ";")},
    ),
    Mistake(
        "prepare",
        'items.csv: {delimiter: "\\t"}}',
        "'data.files={items.csv: {delimiter: \"\\t\"}}'",
        files={"items.csv": FILES["items.csv"].replace(",", "\t")},
    ),
    Mistake(
        "prepare",
        "columns: [",
        "'data.files={rows.csv: {columns: [user, item, rating, label, device, time]}}'",
        files={"rows.csv": FILES["rows.csv"].partition("\n")[2]},
    ),
    Mistake(
        "prepare data.interactions.rating=rating data.interactions.min_rating=9",
        "lower interactions.min_rating",
        "data.interactions.min_rating=4",
    ),
    Mistake(
        "prepare data.split.valid=0.6 data.split.test=0.6",
        "valid + test",
        "data.split.valid=0.1 data.split.test=0.1",
    ),
    Mistake(
        "prepare 'data.features=[{name: item, entity: item, min_count: 500}]'",
        "lower it",
        "'data.features=[{name: item, entity: item, min_count: 2}]'",
    ),
    Mistake(
        "prepare",
        "data.files",
        "",
        data={"files": {"row.csv": {"delimiter": ";"}}},
        new_data={"files": {"rows.csv": {"delimiter": ","}}},
    ),
    Mistake(
        "prepare data.interactions.file=row.csv",
        "is data.root right?",
        "data.interactions.file=rows.csv",
    ),
    Mistake(
        "prepare",
        "remove it or set data.on_bad_row=skip",
        "data.on_bad_row=skip",
        files={"rows.csv": FILES["rows.csv"] + FILES["rows.csv"]},
    ),
    *(
        Mistake(
            "prepare data.interactions.time=time 'data.files={rows.csv: {delimiter: ;}}'",
            f"in data.files: {{rows.csv: {{{setting}}}}}",
            f"'data.files={{rows.csv: {{delimiter: ;, {setting}}}}}'",
            files={"rows.csv": _timed(written).replace(",", ";").replace("_", mark)},
        )
        for setting, written, mark in (
            ('thousands: ","', "{:_}".format, ","),
            ('thousands: " "', "{:_}".format, "\N{NARROW NO-BREAK SPACE}"),
            ('decimal: ","', "{}_5".format, ","),
        )
    ),
    Mistake(
        "prepare 'data.interactions.file=[rows.csv, more.csv]'",
        "say so in data.files: {more.csv: {optional: [device]}}",
        "'data.files={more.csv: {optional: [device]}}'",
        data={"features": [*DATA["features"], {"name": "device"}]},
        files={"more.csv": _csv([row[:2] for row in ROWS[::-1]], "user,item")},
    ),
    Mistake(
        "prepare 'data.interactions.file=[rows.csv, more.csv]'",
        "rows.csv has it: add the column to this file, or leave the file out",
        "data.interactions.file=rows.csv",
        files={"more.csv": _csv([row[:1] for row in ROWS], "user")},
    ),
    Mistake(
        "prepare 'data.interactions.file=[rows.csv, more.csv]' "
        "'data.files={more.csv: {optional: [item]}}'",
        "every row needs it, so `optional` has no effect: add the column to this file, or leave",
        "data.interactions.file=rows.csv",
        ("data.files={more.csv: {optional: [item]}}",),
        files={"more.csv": _csv([row[:1] for row in ROWS], "user")},
    ),
    Mistake("prepare data.root=rows.csv", "name its folder, data.root=.", "data.root=."),
    Mistake("prepare --config .", "name a YAML file", "--config c.yaml", ("--config", ".")),
    Mistake(
        "prepare data.interactions.file=rows",
        "name its files: rows/*",
        "data.interactions.file=rows/*",
        files={"rows/a.csv": FILES["rows.csv"]},
    ),
    Mistake(
        "prepare",
        "upper and lower case; write them the same way",
        files={"items.csv": FILES["items.csv"].replace("\ni", "\nI")},
        new_files={"items.csv": FILES["items.csv"]},
    ),
    Mistake(
        "prepare",
        "set key to the column of the item ids",
        files={"items.csv": "item,id" + FILES["items.csv"][4:].replace("\ni", "\nthe i,i")},
        new_data={"features": [*DATA["features"][:2], {**DATA["features"][2], "key": "id"}]},
    ),
    Mistake(
        "prepare data.interactions.repeated=strongest",
        "needs something to compare: rating",
        "data.interactions.rating=rating data.interactions.min_rating=3",
    ),
    Mistake(
        "prepare",
        "{quoted: false}",
        "'data.files={items.csv: {quoted: false}}'",
        files={"items.csv": FILES["items.csv"] + 'i1,"g1,3\ni2,g2,4\n'},
    ),
    Mistake(
        "prepare",
        "encoding: utf-16",
        "'data.files={items.csv: {encoding: utf-16}}'",
        files={"items.csv": FILES["items.csv"].encode("utf-16")},
    ),
    Mistake(
        "prepare",
        "encoding: ",
        "'data.files={items.csv: {encoding: latin-1}}'",
        files={"items.csv": (FILES["items.csv"] + "i1,g\xe9,3\n").encode("latin-1")},
    ),
    Mistake(
        "prepare",
        "call it items.csv.gz",
        data={},
        files={"items.csv": gzip.compress(FILES["items.csv"].encode())},
        new_files={"items.csv.gz": gzip.compress(FILES["items.csv"].encode())},
        new_data={
            "features": [*DATA["features"][:2], {**DATA["features"][2], "file": "items.csv.gz"}]
        },
    ),
    Mistake(
        "prepare data.vocabulary_from=prepared_root/cures",
        "set data.name",
        "data.name=grown",
        before=("train",),
    ),
    Mistake(f"prepare {GROWN} '{HASHED}'", "set it back", "", (HASHED,), before=("train",)),
    Mistake(
        f"prepare {GROWN} '{HASHED}'",
        "leave vocabulary_from out",
        "",
        (GROWN.split()[1],),
        before=("train",),
    ),
    Mistake(
        "prepare run.prepared_root=.",
        "set data.name",
        "data.name=other",
        files={"cures/notes.txt": "mine"},
    ),
]
COMMAND_ORDER = [
    Mistake(
        "evaluate",
        "run python -m deepfm_dist.prepare",
        files={"prepared_root/cures/manifest.json": "{"},
        first=("prepare",),
        before=("train",),
    ),
    *(
        Mistake(
            "train run.name=next optimizer.tables.name=adam checkpoint.start_from=runs_root/cures",
            cure,
            cure,
            before=("train",),
        )
        for cure in ("optimizer.tables.name=rowwise_adagrad", "checkpoint.start_weights_only=true")
    ),
    Mistake(
        "train checkpoint.resume=never checkpoint.start_from=runs_root/cures",
        "give the run another run.name",
        "run.name=next",
        before=("train",),
    ),
    Mistake(
        "recommend --output best.csv",
        "--output best.parquet",
        "--output best.parquet",
        ("--output", "best.csv"),
        before=("train",),
    ),
    Mistake(
        "combine --to both --of cures,seeded",
        "train them with the same data.seed",
        "--of cures,same",
        ("--of", "cures,seeded"),
        before=("train model.deep=false", "train run.name=seeded model.deep=false data.seed=5"),
        first=("train run.name=same model.deep=false",),
    ),
    Mistake(
        "tune trainer.monitor=auc tune.trials=1 'tune.space={model.embedding_dim: [4, 8]}'",
        "choose another run.name",
        "run.name=second",
        before=(f"tune trainer.monitor=auc tune.trials=1 '{SPACE}'",),
    ),
    Mistake(
        f"train {CTR_OVERRIDES} trainer.monitor=auc",
        "set trainer.monitor=log_loss",
        "trainer.monitor=log_loss",
        files={"rows.csv": _csv([[*row[:3], "1", *row[4:]] for row in ROWS])},
    ),
    Mistake(
        "recommend",
        "name data.interactions.user and .item",
        "run.name=both",
        data={
            "task": "ctr",
            "interactions": {"file": "rows.csv", "label": "label"},
            "features": [{"name": "device"}],
        },
        new_data={"interactions": CTR["interactions"], "features": DATA["features"]},
        first=("train run.name=both",),
        before=("train",),
    ),
    Mistake("evaluate", "python -m deepfm_dist.train", first=("train",)),
    Mistake("recommend", "python -m deepfm_dist.train", first=("train",)),
    Mistake("similar", "python -m deepfm_dist.train", first=("train",)),
    Mistake(
        "predict --input rows.csv --output out.parquet",
        "python -m deepfm_dist.train",
        first=("train",),
    ),
    Mistake(
        "predict --input rows.csv --output out.csv",
        "out.parquet",
        "--output out.parquet",
        ("--output", "out.csv"),
        before=("train",),
    ),
    Mistake(
        "evaluate model.embedding_dim=8",
        "leave the override out",
        "",
        ("model.embedding_dim=8",),
        before=("train",),
    ),
    Mistake("evaluate checkpoint.use=99", "7", "checkpoint.use=latest", before=("train",)),
    Mistake(
        "recommend recommend.allow_items=[nothing]",
        "recommend.allow_items",
        "",
        ("recommend.allow_items=[nothing]",),
        before=("train",),
    ),
    Mistake("tune trainer.monitor=auc tune.trials=1", SPACE, f"'{SPACE}'"),
    Mistake("train trainer.precision=tf32", "fp32", "trainer.precision=fp32"),
    Mistake("train optimizer.tables.name=lazy_adam", "adam", "optimizer.tables.name=adam"),
    Mistake("train optimizer.tables.l2=0.1", "use adam", "optimizer.tables.name=adam"),
    Mistake("train optimizer.tables.max_gradient=1", "use adam", "optimizer.tables.name=adam"),
    Mistake("train sharding.communication=bf16", "fp16", "sharding.communication=fp16"),
    Mistake(
        "train 'sharding.tables={usr: {kind: table_wise}}'",
        "user",
        "'sharding.tables={user: {kind: table_wise}}'",
    ),
    Mistake(
        "train 'sharding.tables={user: {kind: table_wise, rank: 3}}'",
        "is 0",
        "'sharding.tables={user: {kind: table_wise, rank: 0}}'",
    ),
    Mistake(
        "train data.on_device=true data.negatives.popularity_power=0.5",
        "set data.on_device=auto",
        "data.on_device=auto",
    ),
    Mistake("train trainer.monitor=aucc", "auc", "trainer.monitor=auc"),
    Mistake("train trainer.profile_steps=[900,901]", "earlier", "trainer.profile_steps=[1,1]"),
    Mistake(
        "train data.split.valid=0 trainer.monitor=auc", "hold some out", "data.split.valid=0.1"
    ),
    Mistake(
        "train trainer.batch_size=1 trainer.accumulate_steps=2 optimizer.tables.name=adam",
        "a larger trainer.batch_size",
        "trainer.batch_size=64",
    ),
    Mistake("train model.over_arch=json:JSONDecoder", "mlp", "model.over_arch=mlp"),
    Mistake(
        "train model.over_arch=nothing:Here",
        "package.module:Class",
        "model.over_arch=torch.nn:Bilinear model.over_arch=mlp",
    ),
    Mistake(
        "train trainer.loss=softmax data.history.dropout=0",
        "data.history.dropout, to 0.5",
        "data.history.dropout=0.5",
        data={"features": [*DATA["features"], SEEN]},
    ),
    Mistake(
        "train trainer.loss=softmax",
        "trainer.loss=bce",
        "trainer.loss=bce",
        data={"features": [*DATA["features"], {"name": "device"}]},
    ),
    Mistake(
        "recommend recommend.histories=histories.csv",
        str(SEEN).replace("'", ""),
        "run.name=knows",
        before=("train",),
        first=("train run.name=knows",),
        new_data={"features": [*DATA["features"], SEEN]},
    ),
    Mistake(
        "recommend recommend.users=[nobody]",
        "leave them out",
        "recommend.users=[u1]",
        before=("train",),
    ),
    Mistake(
        "recommend recommend.users=u1",
        "recommend.users=[u1]",
        "recommend.users=[u1]",
        before=("train",),
    ),
    Mistake(
        "recommend recommend.users=[]",
        "leave it out",
        "",
        ("recommend.users=[]",),
        before=("train",),
    ),
    Mistake(
        "recommend 'recommend.context={device: phone}'",
        "recommend.context.device",
        "",
        ("recommend.context={device: phone}",),
        before=("train",),
    ),
    Mistake(
        "recommend recommend.precision=bf16",
        "leave it out",
        "",
        ("recommend.precision=bf16",),
        before=("train",),
    ),
    Mistake(
        "plan --world-size 2 --rows usr=5",
        "user",
        "--rows user=5",
        ("usr=5", "--rows"),
        before=("train",),
    ),
    Mistake(
        "plan --world-size 2 --rows user=many",
        "user=1_000_000_000",
        "--rows user=1_000_000",
        ("user=many", "--rows"),
        before=("train",),
    ),
    Mistake("plan --world-size 2", "python -m deepfm_dist.prepare", first=("prepare",)),
    Mistake("plan --world-size 2", "--rows user=N", "--rows user=9 --rows item=9 --rows genre=9"),
    Mistake(
        "plan --world-size 3 --local-world-size 2",
        "as many GPUs on every machine",
        "--local-world-size 3",
        ("--local-world-size", "2"),
        before=("train",),
    ),
    Mistake(
        "combine --to both --ease 1 --ease-columns 0",
        "must be 1 or more",
        "--ease-columns 4",
        ("--ease-columns", "0"),
        before=("train model.deep=false",),
        data={"features": [*DATA["features"], SEEN]},
    ),
    Mistake(
        "combine --to both --of cures,cures",
        "each once",
        "--of cures",
        ("--of", "cures,cures"),
        before=("train model.deep=false",),
    ),
    Mistake(
        "combine --to both --ease 1 --ease-columns 4",
        "train with model.deep=false",
        "--of flat",
        before=("train",),
        data={"features": [*DATA["features"], SEEN]},
        first=("train run.name=flat model.deep=false",),
    ),
    Mistake(
        "combine --to both --ease 1 --ease-columns 4",
        str(SEEN).replace("'", ""),
        "--of seen",
        before=("train model.deep=false",),
        new_data={"features": [*DATA["features"], SEEN]},
        first=("train run.name=seen model.deep=false",),
    ),
    Mistake(
        "export --tables int8",
        "leave it out, or use --format onnx",
        left_out=("--tables", "int8"),
        before=("train",),
    ),
    Mistake(
        "export --format onnx --max-file-bytes 9",
        "leave it out, or use --format safetensors",
        "--format safetensors --max-file-bytes 9999",
        ("--format", "onnx", "--max-file-bytes", "9"),
        before=("train",),
    ),
    Mistake(
        "predict --output .",
        "such as scores.parquet",
        "--output scores.parquet",
        ("--output", "."),
        before=("train",),
    ),
    *(
        Mistake(
            f"similar --output-parts {given}",
            cure,
            f"--output-parts {new}",
            ("--output-parts", given),
            before=("train",),
            files={"filled/notes.txt": "mine"},
        )
        for given, cure, new in (
            ("/", "such as /scores", "scores"),
            ("rows.csv", "name a folder for the parts", "rows"),
            ("filled", "name a new or empty folder", "empty"),
        )
    ),
    Mistake(
        "predict --output-parts parts",
        "holds similar items, and this command writes predictions; name a new or empty folder",
        "--output-parts more",
        ("--output-parts", "parts"),
        before=("train", "similar --output-parts parts"),
    ),
    Mistake(
        "export --output rows.csv",
        "--output names a folder",
        "--output exported",
        ("--output", "rows.csv"),
        before=("train",),
    ),
    Mistake(
        "export --output filled",
        "give another --output",
        "--output exported",
        ("--output", "filled"),
        before=("train",),
        files={"filled/notes.txt": "mine"},
    ),
    Mistake(
        "predict --input row.csv",
        "no such file",
        "--input rows.csv",
        ("--input", "row.csv"),
        before=("train",),
    ),
    Mistake(
        "evaluate evaluate.split=valid data.split.valid=0",
        "leave the override out",
        "",
        ("data.split.valid=0",),
        before=("train",),
    ),
    Mistake(
        "evaluate checkpoint.use=selected",
        "use checkpoint.use=auto",
        "checkpoint.use=auto",
        before=("train",),
    ),
    Mistake(
        "evaluate evaluate.split=valid checkpoint.use=refit",
        "use checkpoint.use=selected",
        "checkpoint.use=selected",
        data={"features": [*DATA["features"], SEEN]},
        before=(RANKED,),
    ),
    Mistake(
        "train run.runs_root=runs_root/cures run.name=refit",
        "run.name=NAME checkpoint.start_from=",
        "run.name=next checkpoint.start_from=runs_root/cures trainer.loss=softmax",
        data={"features": [*DATA["features"], SEEN]},
        before=(RANKED,),
    ),
    Mistake(
        "recommend recommend.probability=true",
        "leave it out",
        "",
        ("recommend.probability=true",),
        before=("train trainer.loss=softmax trainer.refit_best=false",),
    ),
    Mistake(
        "recommend recommend.cold_items=only",
        "leave it out",
        "",
        ("recommend.cold_items=only",),
        before=("train",),
    ),
    Mistake("train trainer.refit_best=true", "leave it out", "", ("trainer.refit_best=true",)),
    Mistake("train trainer.refit_best=true", "use trainer.loss=softmax", "trainer.loss=softmax"),
    Mistake(
        "train trainer.loss=softmax model.linear=ease",
        "set model.deep=false",
        "model.deep=false",
        data={"features": [*DATA["features"], SEEN]},
    ),
    Mistake(RANKED, "set model.linear=none", "model.linear=none"),
    Mistake(
        "train trainer.loss=softmax trainer.refit_best=true trainer.hold_out=0 data.split.valid=0",
        "hold some out (data.split.valid=0.1)",
        "data.split.valid=0.1",
    ),
    Mistake(
        "evaluate evaluate.split=valid",
        "set evaluate.split=test",
        "evaluate.split=test",
        before=("train data.split.valid=0",),
    ),
    Mistake(
        "evaluate",
        "hold some out (data.split.test=0.1) in a run of another run.name",
        "run.name=held",
        before=("train data.split.test=0 data.split.valid=0",),
        first=("train run.name=held data.split.test=0.1",),
    ),
    Mistake(
        "evaluate checkpoint.use=best",
        "checkpoint.use=latest",
        "checkpoint.use=latest",
        before=("train trainer.monitor=null",),
    ),
    Mistake(
        "tune trainer.monitor=null tune.trials=1 'tune.space={model.dropout: [0, 0.1]}'",
        "trainer.monitor=auc",
        "trainer.monitor=auc",
    ),
    Mistake(
        "train checkpoint.start_from=nowhere",
        "python -m deepfm_dist.train",
        "",
        ("checkpoint.start_from=nowhere",),
    ),
    Mistake(
        "train run.name=next model.embedding_dim=8 checkpoint.start_from=runs_root/cures",
        "set model.embedding_dim=4",
        "model.embedding_dim=4",
        before=("train",),
    ),
    Mistake(
        "tune trainer.monitor=auc tune.trials=1 'tune.space={trainer.monitor: [auc]}'",
        "leave it out",
        f"'{SPACE}'",
    ),
    Mistake(
        f"train {CTR_OVERRIDES} trainer.monitor=user_auc",
        "name data.interactions.user",
        "data.interactions.user=user",
    ),
    Mistake(
        "combine --to cures",
        "choose another --to",
        "--to other",
        ("--to", "cures"),
        before=("train model.deep=false",),
    ),
    Mistake(
        "combine --to both --of cures,wide",
        "model.first_order",
        "--of cures",
        ("--of", "cures,wide"),
        before=(
            "train model.deep=false",
            "train run.name=wide model.deep=false model.first_order=false",
        ),
    ),
    Mistake(
        "similar",
        "model.fm=true",
        "run.name=pairs",
        first=("train run.name=pairs model.fm=true",),
        before=("train model.fm=false",),
    ),
    Mistake(
        "train checkpoint.resume=always optimizer.dense.lr=0.1",
        "checkpoint.resume=never",
        "checkpoint.resume=never",
        before=("train",),
    ),
    Mistake(
        "train optimizer.dense.lr=0.1", "another run.name", "run.name=other", before=("train",)
    ),
    Mistake("prepare data.split.test=0.3", "another run.name", "run.name=other", before=("train",)),
    Mistake(
        "prepare data.split.test=0.3",
        "checkpoint.resume=never",
        "checkpoint.resume=never",
        before=("train",),
    ),
    Mistake(
        "prepare data.split.test=0.3",
        "data.name=NAME",
        "data.name=more",
        before=("train", "train run.name=other data.name=cures"),
    ),
    Mistake(
        "train run.name=next run.seed=4 checkpoint.start_from=runs_root/cures",
        "data.vocabulary_from",
        "data.vocabulary_from=prepared_root/cures",
        before=("train",),
    ),
    Mistake(
        "train trainer.loss=softmax data.history.dropout=0.5 data.interactions.weight=rating",
        "trainer.loss=bce",
        "trainer.loss=bce",
        data={"features": [*DATA["features"], SEEN]},
    ),
    Mistake(
        "train 'sharding.tables={user: {cached: 0.5}}'",
        "leave it out",
        "",
        ("sharding.tables={user: {cached: 0.5}}",),
    ),
    Mistake(
        "predict",
        "name one of them",
        "--input rows.csv",
        data={"interactions": {**DATA["interactions"], "file": "rows*.csv"}},
        files={"rows2.csv": FILES["rows.csv"]},
        before=("train",),
    ),
    Mistake(
        "train checkpoint.start_from=runs_root/cures",
        "another run.name",
        "run.name=next",
        before=("train",),
    ),
]


ALL_PAIRS = [[f"u{u}", f"i{i}", "5", "1", "desk", "1600000000"] for u in range(4) for i in range(4)]
KNOWS_ITEMS = {"features": [*DATA["features"], SEEN]}
RATED = {**DATA["interactions"], "rating": "rating", "min_rating": 4}
HASHED_GENRE = [*DATA["features"][:2], {**DATA["features"][2], "hash_rows": 9}]
PLAIN = json.dumps(DATA["features"])
REFERENCE = "user,item,score\n" + "".join(f"{row[0]},{row[1]},{k}\n" for k, row in enumerate(ROWS))
OTHERS = [
    Mistake("train model.embedding_dim=1000000000000", "smaller one", "model.embedding_dim=4"),
    Mistake(
        "train model.over_arch_layer_sizes=[1000000000000]",
        "use smaller layers",
        "model.over_arch_layer_sizes=[4]",
    ),
    Mistake(
        "train trainer.compile=true run.device=cpu",
        "set trainer.compile=false",
        "trainer.compile=false",
        env={"CXX": "/nowhere/c++"},
    ),
    Mistake(
        "evaluate --run runs/none",
        "python -m deepfm_dist.train makes it",
        "--run runs_root/cures",
        ("--run", "runs/none"),
        before=("train",),
    ),
    Mistake(
        "train",
        "add items",
        files={"rows.csv": _csv(ALL_PAIRS)},
        new_files={"rows.csv": _csv([*ALL_PAIRS, ["u9", "i9", "5", "1", "desk", "1600000000"]])},
        data={"split": {"valid": 0, "test": 0}},
    ),
    Mistake(
        "train run.name=next checkpoint.start_from=runs_root/cures",
        "set it back",
        f"'data.features={PLAIN}'",
        before=(f"train 'data.features={PLAIN}' data.name=plain",),
        data={"features": HASHED_GENRE},
    ),
    Mistake(
        "evaluate run.prepared_root=elsewhere",
        "run python -m deepfm_dist.prepare",
        first=("prepare run.prepared_root=elsewhere",),
        before=("train",),
    ),
    Mistake(
        "prepare data.interactions.split=label",
        "hold out fewer",
        files={"rows.csv": _csv([[*row[:3], "2", *row[4:]] for row in ROWS])},
        new_files={"rows.csv": FILES["rows.csv"]},
    ),
    Mistake(
        "prepare data.split.method=users data.split.valid=20 data.split.test=20",
        "hold out fewer",
        "data.split.valid=5 data.split.test=5",
        data={"features": [DATA["features"][1], SEEN]},
    ),
    Mistake(
        "prepare",
        "write one object for each row",
        data={"features": _genres(column="genres.id")},
        files={"items.jsonl": f"[{','.join(OBJECTS.splitlines())}, 3]"},
        new_files={"items.jsonl": f"[{','.join(OBJECTS.splitlines())}]"},
    ),
    Mistake(
        "prepare data.interactions.time=time",
        "write fewer decimals",
        files={"rows.csv": _timed(lambda s: f"{10**11 * (s % 2) + s}.000000001")},
        new_files={"rows.csv": _timed(lambda s: f"{10**11 * (s % 2) + s}.5")},
    ),
    Mistake(
        "train run.device=cuda",
        "run.device=cpu",
        "run.device=cpu",
        env={"CUDA_VISIBLE_DEVICES": ""},
    ),
    Mistake(
        "train sharding.kind=table_row_wise run.device=cpu",
        "use row_wise",
        "sharding.kind=row_wise",
    ),
    Mistake("train trainer.hold_out=0.1", "leave it out", "", ("trainer.hold_out=0.1",)),
    Mistake(
        "train trainer.loss=softmax data.split.valid=0 trainer.hold_out=0.0001",
        "set a larger share",
        "trainer.hold_out=0.2",
        data=KNOWS_ITEMS,
    ),
    Mistake(
        "train trainer.loss=softmax data.split.valid=0 trainer.monitor=auc",
        "monitor ndcg@10",
        "trainer.monitor=ndcg@10",
        data=KNOWS_ITEMS,
    ),
    Mistake(
        "evaluate evaluate.baselines=[ials]",
        "leave ials out",
        "evaluate.baselines=[]",
        before=("train",),
        without=("implicit",),
    ),
    Mistake(
        "evaluate evaluate.reference=ref.csv",
        "leave one of them",
        before=("train",),
        files={"ref.csv": REFERENCE + "u1,i1,1\nu1,i1,2\n"},
        new_files={"ref.csv": REFERENCE},
    ),
    Mistake(
        "evaluate evaluate.reference=popularity.csv",
        "give the file another name",
        "evaluate.reference=mine.csv",
        before=("train",),
        files={"popularity.csv": REFERENCE},
        new_files={"mine.csv": REFERENCE},
    ),
    Mistake(
        "recommend recommend.index=Flat recommend.candidates=20",
        "or leave it out",
        "",
        ("recommend.index=Flat",),
        before=("train",),
        without=("faiss",),
    ),
    Mistake(
        "recommend recommend.histories=histories.csv",
        "write ids as the log has them",
        before=("train",),
        data=KNOWS_ITEMS,
        files={"histories.csv": "user,item\nnew,I1\n"},
        new_files={"histories.csv": FILES["histories.csv"]},
    ),
    Mistake(
        "recommend recommend.histories=histories.csv",
        "add rows that do",
        before=("train",),
        data={**KNOWS_ITEMS, "interactions": RATED},
        files={"histories.csv": "user,item,rating\nnew,i1,1\n"},
        new_files={"histories.csv": "user,item,rating\nnew,i1,1\nnew,i2,5\n"},
    ),
    Mistake(
        "recommend recommend.histories=histories.csv",
        "fill it in, or leave the item out",
        before=("train",),
        data={"features": [*DATA["features"], SEEN, CITY], "interactions": RATED},
        files={**PEOPLE, "histories.csv": "user,item,rating,city\nnew,i1,,Oslo\n"},
        new_files={"histories.csv": "user,item,rating,city\nnew,i1,5,Oslo\n"},
    ),
    Mistake(
        "recommend recommend.histories=histories.csv",
        "no user has an item or a value of city; fill some in",
        before=("train",),
        data={"features": [*DATA["features"], CITY]},
        files={**PEOPLE, "histories.csv": "user,city\nnew,\n"},
        new_files={"histories.csv": "user,city\nnew,Rome\n"},
    ),
    Mistake(
        "recommend recommend.histories=histories.csv",
        "give columns of these, without items, or train a model",
        before=("train",),
        data={"features": [*DATA["features"], CITY]},
        files=PEOPLE,
        new_files={"histories.csv": "user,city\nnew,Rome\n"},
    ),
    Mistake(
        "predict --input rows.parquet --output=rows.parquet",
        "choose another file",
        "--output=scores.parquet",
        before=("train",),
        data={"interactions": {**DATA["interactions"], "file": "rows.parquet"}},
        files={"rows.parquet": _parquet(FILES["rows.csv"])},
    ),
    Mistake(
        f"tune trainer.monitor=auc tune.trials=1 '{SPACE}'",
        "pip install optuna",
        without=("optuna",),
    ),
    Mistake(
        "plan --world-size 1 --rows user=3_000_000_000 --rows item=9 --rows genre=9",
        "use ",
        "--world-size 4",
    ),
    Mistake(
        "prepare run.prepared_root=memory://cures-remote data.split.test=0.3",
        "set data.name",
        "data.name=more",
        before=("prepare run.prepared_root=memory://cures-remote",),
    ),
    Mistake(
        f"tune trainer.monitor=auc tune.trials=1 '{SPACE}' run.runs_root=memory://cures-runs",
        "set run.runs_root to a local folder",
        "run.runs_root=local",
    ),
    Mistake(
        "train trainer.monitor=user_auc",
        "set trainer.monitor=log_loss",
        "trainer.monitor=log_loss",
        data={"interactions": CTR["interactions"], "task": "ctr"},
        files={"rows.csv": _csv([[*r[:3], str(int(r[0] > "u3")), *r[4:]] for r in ROWS])},
    ),
    Mistake(
        PRINT + "recommend.requests=a.csv recommend.users=[u1]",
        "leave users out",
        "",
        ("recommend.users=[u1]",),
    ),
    Mistake(
        PRINT + "recommend.diversity=0.3 recommend.rerank=5",
        "set rerank=10",
        "recommend.rerank=10",
    ),
    Mistake(
        PRINT + "recommend.diversity=0.3 recommend.rerank=50 recommend.candidates=20",
        "set candidates=50",
        "recommend.candidates=50",
    ),
    Mistake(
        PRINT + "recommend.matrix=fp32 recommend.popularity_penalty=0.5",
        "leave it out",
        "",
        ("recommend.matrix=fp32",),
    ),
    Mistake(
        "recommend recommend.diversity=0.3",
        "use recommend.at_most",
        "'recommend.at_most={genre: 3}'",
        ("recommend.diversity=0.3",),
        before=("train model.fm=false",),
    ),
    Mistake(
        "train trainer.loss=softmax model.linear=logistic",
        "set model.linear=none",
        "model.linear=none",
        data=KNOWS_ITEMS,
    ),
]
ALL = [*SETTINGS, *INPUT, *COMMAND_ORDER, *OTHERS]
READ_ONLY = {
    "recommend": ("--output", "--output OUT/best.parquet"),
    "similar": ("--output", "--output OUT/alike.parquet"),
    "predict": ("--output", "--output OUT/scores.parquet"),
    "recommend --output-parts parts": ("--output-parts", "--output-parts OUT/parts"),
    "export": ("give another --output", "--output OUT/exported"),
    "combine --of flat --to both": ("--to /FOLDER/NAME", "--to OUT/combined/both"),
    "prepare data.name=new": ("set run.prepared_root", "run.prepared_root=OUT"),
    "train run.name=new data.name=cures": ("set run.runs_root", "run.runs_root=OUT"),
    f"tune trainer.monitor=auc tune.trials=1 '{SPACE}'": (
        "set run.runs_root",
        "run.runs_root=OUT data.name=cures",
    ),
}
"""Commands that write below the current folder: what their errors name, and what is then typed."""


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which ``train`` has run; not to be changed."""
    folder = tmp_path_factory.mktemp("cures")
    _write(folder, Mistake("train", ""))
    assert _typed(folder, "train") == 0
    return folder


def _write(folder: Path, mistake: Mistake, cured: bool = False) -> None:
    for name, text in {**FILES, **mistake.files, **(mistake.new_files if cured else {})}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    data = {**DATA, **mistake.data, **(mistake.new_data if cured else {}), "root": str(folder)}
    (folder / "c.yaml").write_text(json.dumps({**SMALL, "data": data}))


def _typed(folder: Path, command: str, left_out: Sequence[str] = (), added: str = "") -> int:
    name, argv = _command_line(folder, command, left_out, added)
    if name == "prepare" or "--print-config" in argv:
        return _exit_code(name, argv)
    code: int = run_alone(_exit_code, name, argv)  # the others join a process group
    return code


def _typed_here(folder: Path, command: str, added: str = "") -> int:
    """`_typed` in a process that may join process groups itself."""
    return _exit_code(*_command_line(folder, command, (), added))


def _command_line(
    folder: Path, command: str, left_out: Sequence[str], added: str
) -> tuple[str, list[str]]:
    name, *arguments = shlex.split(command)
    more = shlex.split(added)
    settings = {a.partition("=")[0] for a in more if "=" in a}
    kept = [a for a in arguments if a not in left_out and a.partition("=")[0] not in settings]
    where = [f"run.prepared_root={folder / 'prepared_root'}"]
    if "--run" not in (*kept, *more):
        where += ["--config", str(folder / "c.yaml"), f"run.runs_root={folder / 'runs_root'}"]
    return name, ["--quiet", *where, *kept, *more]


def _exit_code(name: str, argv: Sequence[str]) -> int:
    try:
        return COMMANDS[name](argv)
    except SystemExit as error:  # argparse
        return int(error.code or 0)


@cache
def _templates() -> dict[str, str]:
    """Messages that name a cure after a semicolon, with … for values, and their modules."""
    package, found = Path(deepfm_dist.__file__).parent, {}
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                text = _literal(node.exc.args[0])
                if re.search(_VERBS, _clause(text)) and "; " in text:
                    found[text] = path.relative_to(package).as_posix()
    return found


_VERBS = (
    r"\b(use|set|give|leave|choose|run|install|name|take|train|write|lower|delete|export|hold|create"
    r"|remove|ask|vary|correct|wait|unset|list|add|put|prepare)\b"
)


def _literal(node: ast.expr) -> str:
    """The text of a message's expression; … stands for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_literal, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _literal(node.left) + _literal(node.right)
    return "…"


def _clause(template: str) -> str:
    return template.rpartition("; ")[2]


def _is_of(line: str, template: str) -> bool:
    return re.search(".*".join(map(re.escape, template.split("…"))), line) is not None


ROWS_OF_CURES = {f"{m.command}: {m.cure}": m for m in ALL}
TYPED = dict(
    line.split("\t")
    for line in (Path(__file__).parent / "cures.txt").read_text(encoding="utf-8").splitlines()
)
"""Messages, as `_templates` has them or had before they were reworded: the row that types each."""
NOT_OF_COMMANDS = {
    "api.py": "arguments of Python, not of a command; see test_api",
    "data/sources/days.py": "see test_nightly",
    "data/preparation/cluster.py": "needs Spark; see test_cluster",
    "interop/graph.py": "needs a missing library or compiler; see test_export",
    "interop/notebook.py": "needs a notebook's weights; see test_notebook",
    "jobs/nightly.py": "needs logs by day; see test_nightly",
    "jobs/import_weights.py": "needs a notebook's weights; see test_notebook",
    "launcher.py": "variables of the environment; see test_launcher",
    "lock.py": "needs a second process; see test_lock",
    "ranking/filters.py": "the cure is another file of requests; see test_requests",
    "ranking/requests.py": "the cure is another file of requests; see test_requests",
    "serve.py": "a service does not end; see test_serving",
    "serving/live.py": "a service does not end; see test_serving",
    "storage.py": "needs a full disk or a library that is missing; see test_paths, test_storage",
}
"""Modules whose cures no row types, and why."""
_MEMORY = "needs more memory than the machine has"
_RANKS = "needs several ranks"
_CUDA = "depends on the machine's GPU"
_LIBRARY = "depends on an optional library"
_URL = "needs a dataset behind a URL; see test_remote"
NOT_TYPED = {
    "… distinct values of one table are": _MEMORY,
    "EASE of … items takes": _MEMORY,
    "evaluate.baselines: item_knn keeps": _MEMORY,
    "evaluate.baselines: ease takes": _MEMORY,
    "a batch of … over … ranks leaves a rank without …s": _RANKS,
    "…: incomplete: … is missing; delete": _URL,
    "…: takes …, and … has … left": _URL,
    "…: cannot be written: …; set run.cache_root": _URL,
    "…: damaged, or replaced while it was copied": _URL,
    "…: no complete checkpoint (…); if its run": "needs a run that is being trained",
    "torchrun over several machines": _RANKS,
    "sharding.tables.….kind=…: … cut over": _RANKS,
    "…=table_row_wise: ": _CUDA,
    "…: rank … finds another dataset": _RANKS,
    "…: … of … parts that other ranks wrote": "needs several machines; see test_part_files",
    "optimizer.tables.l2=…: FBGEMM's lazy_adam": _CUDA,
    "run.device=cuda, but torch sees no GPU": _CUDA,
    "…: adam moves every row at every step": _CUDA,
    "evaluate.baselines: ials has vectors of the users": _LIBRARY,
    "tune --workers starts processes itself": "needs torchrun; see test_tune_workers",
    "--ranks …: needs --workers": "starts processes; see test_tune_workers",
    "--workers … --ranks …: … processes need": _CUDA,
    "model.over_arch=…: which of its weights": "needs an over-arch of the user's own",
    "…: another tool prepared it": "needs a dataset of another tool; see test_layout",
    "column …: … is not …; correct it": "needs requests to a loaded model",
    "…: prepared again, moved or deleted": "needs a second process",
    "…: a row of impressions has many items": "needs impressions; see test_impressions",
    "…: files are named below data.root": "needs an object store",
    "…: damaged (…); delete …, and it is exported": "needs a damaged export; see test_damage",
    "data.forget_after=…: no row of": "the cure is another log; see test_growth",
    "combine: … and … have other data": "vocabularies differ first in nearly all cases",
    "sharding.tables.….kind=replicated: optimizer.tables.name=lazy_adam": _CUDA,
    "…: of another version of deepfm_dist": "needs a run of another version; see test_checkpoint",
    "…: it holds the closed form too": "needs a finished run; see test_recipe",
    "trainer.monitor=…: no user with training rows": "the cure is another split; see test_recipe",
    "recommend.cold_items=only: no item of the": "needs new items; see test_cold_items",
    "…, row …: … is missing; give null": "needs requests to a loaded model; see test_predict",
}
"""Beginnings of messages whose cure no row types, and why."""


def test_every_cure_is_typed_by_a_row_or_excused() -> None:
    templates = _templates()
    missing = [
        f"{module}: {text}"
        for text, module in templates.items()
        if text not in TYPED
        and module not in NOT_OF_COMMANDS
        and not text.startswith(tuple(NOT_TYPED))
    ]
    reworded = Counter(_clause(text) for text in TYPED if text not in templates)
    missing = [text for text in missing if not reworded[_clause(text)]]
    assert missing == [], "add a row that types the cure, and its message to cures.txt"
    assert {*TYPED.values()} <= {*ROWS_OF_CURES, *READ_ONLY}, "cures.txt names rows that are gone"
    assert set(templates.values()) >= NOT_OF_COMMANDS.keys()


@pytest.mark.parametrize("mistake", ALL, ids=lambda m: f"{m.command}: {m.cure}")
def test_the_cure_that_an_error_names_cures(
    mistake: Mistake,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # log to stderr, as in a process
    monkeypatch.chdir(tmp_path)
    if mistake.before == ("train",) and not mistake.data:
        shutil.copytree(request.getfixturevalue("trained"), tmp_path, dirs_exist_ok=True)
    _write(tmp_path, mistake)
    for command in mistake.before if mistake.before != ("train",) or mistake.data else ():
        assert _typed(tmp_path, command) == 0
    capfd.readouterr()
    with monkeypatch.context() as patch:
        for name in mistake.without:
            patch.setitem(sys.modules, name, None)
        for name, value in mistake.env.items():
            patch.setenv(name, value)
        assert _typed(tmp_path, mistake.command) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert mistake.cure in lines[0]
    name = f"{mistake.command}: {mistake.cure}"
    namesakes = [m for m in ALL if f"{m.command}: {m.cure}" == name]
    for template, row in TYPED.items():
        if row == name and template in _templates() and len(namesakes) == 1:
            assert _is_of(lines[0], template), f"cures.txt: {template}"
    _write(tmp_path, mistake, cured=True)
    for command in mistake.first:
        assert _typed(tmp_path, command) == 0
    code = _typed(tmp_path, mistake.command, mistake.left_out, mistake.typed)
    assert code == 0, capfd.readouterr().err


def test_folders_that_cannot_be_written_have_cures(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    home, out = tmp_path / "home", tmp_path / "out"
    shutil.copytree(trained, home)
    _write(home, Mistake("train", ""))
    assert _typed(home, "train run.name=flat model.deep=false data.name=cures") == 0
    capfd.readouterr()
    out.mkdir()
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.chdir(home)
    folders = [home, *(p for p in home.rglob("*") if p.is_dir())]
    (home / "runs_root/cures/metrics.jsonl").chmod(0o444)
    for path in folders:
        path.chmod(0o555)
    before = {p: p.stat().st_mtime_ns for p in home.rglob("*")}
    try:
        run_in_fork(_type_where_nothing_can_be_written, home, out, capfd)
    finally:
        for path in folders:
            path.chmod(0o755)
    assert {p: p.stat().st_mtime_ns for p in home.rglob("*")} == before


def _type_where_nothing_can_be_written(
    home: Path, out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    heed_permissions()
    for command, (cure, typed) in READ_ONLY.items():
        assert _typed_here(home, command) == 2, command
        [line] = capfd.readouterr().err.splitlines()
        assert "cannot be written: Permission denied; " in line and cure in line, line
        assert _typed_here(home, command, added=typed.replace("OUT", str(out))) == 0, command
        said = capfd.readouterr().err
        assert "Error" not in said, said
    assert _typed_here(home, "evaluate") == 0  # its figures are printed
    shown = capfd.readouterr()
    log_line, page_line = shown.err.splitlines()
    run = home / "runs_root/cures"
    copied = f"copy the run to another folder: cp -r {run} FOLDER, --run FOLDER/cures"
    assert log_line == (
        f"{run / 'metrics.jsonl'}: cannot be written: Permission denied; the figures are not kept; "
        f"{copied}"
    )
    assert page_line.startswith(f"{run / 'report.html'}: cannot be written: Permission denied; ")
    assert "log_loss" in shown.out and "written: " not in shown.out
    shutil.copytree(run, out / "copies/cures")
    for path in ("", "metrics.jsonl"):
        (out / "copies/cures" / path).chmod(0o755)
    assert _typed_here(home, f"evaluate --run {out / 'copies/cures'}") == 0
    assert (out / "copies/cures/report.html").is_file()
