"""Input files and settings that `prepare` refuses."""

import gzip
import time

import numpy as np

from tests.cures.mistakes import (
    CTR,
    DATA,
    FILES,
    GROWN,
    HASHED,
    IDS,
    N_ITEMS,
    OBJECTS,
    ROWS,
    VECTORS,
    Mistake,
    changed,
    csv_of,
    genres,
    npy_of,
    timed,
    vectors,
)

ITEMS = FILES["items.csv"]
PRICE = [
    *DATA["features"],
    {"name": "price", "entity": "item", "file": "items.csv", "kind": "numeric"},
]
ALSO = {"name": "also", "table": "item"}
"""A field in the table of the items' ids."""
INPUT = [
    Mistake(
        "prepare",
        "write a list of numbers for each item",
        data=vectors(),
        files={"v.csv": "item,v\ni1,\n"},
        new_files={"v.csv": VECTORS},
    ),
    Mistake(
        "prepare",
        "set separator for the field",
        data=vectors(),
        new_data=vectors(separator="|"),
        files={"v.csv": VECTORS.replace(", ", "|").replace("[", "").replace("]", "")},
    ),
    Mistake(
        "prepare",
        "write one vector for each row, in the same order",
        data=vectors(npy="v.npy"),
        files={"v.csv": IDS, "v.npy": npy_of(np.ones((3, 2)))},
        new_files={"v.npy": npy_of(np.ones((N_ITEMS, 2)))},
    ),
    Mistake(
        "prepare",
        "write it with numpy.save",
        data=vectors(npy="v.npy"),
        files={"v.csv": IDS, "v.npy": VECTORS},
        new_files={"v.npy": npy_of(np.ones((N_ITEMS, 2)))},
    ),
    Mistake(
        "prepare ",
        "write it with numpy.save",
        data=vectors(npy="v.npy"),
        files={"v.csv": IDS, "v.npy": npy_of(np.ones((N_ITEMS, 2)))[:200]},
        new_files={"v.npy": npy_of(np.ones((N_ITEMS, 2)))},
    ),
    Mistake(
        "prepare",
        "correct it or set data.on_bad_row=skip",
        "data.on_bad_row=skip",
        data=vectors(npy="v.npy"),
        files={"v.csv": IDS, "v.npy": npy_of(np.array([[1, np.nan], *[[1, 1]] * (N_ITEMS - 1)]))},
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
        data={"features": genres(column="genres.id")},
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
        files={"test.csv": csv_of([[row[0].upper(), *row[1:]] for row in ROWS[:9]])},
        new_files={"test.csv": csv_of(ROWS[:9])},
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
        data={"features": genres()},
        new_data={"features": genres(column="genres.id")},
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
        files={"rows.csv": changed(5, 1, "")},
    ),
    Mistake(
        "prepare data.interactions.time=time",
        "set data.on_bad_row=skip",
        "data.on_bad_row=skip",
        files={"rows.csv": changed(5, 5, "soon")},
    ),
    *(
        Mistake(
            "prepare data.interactions.time=time",
            f'data.interactions.time_format="{wanted}"',
            f'data.interactions.time_format="{wanted}"',
            files={"rows.csv": timed(lambda s, f=wanted: time.strftime(f, time.gmtime(s)))},
        )
        for wanted in ("%d/%m/%Y %H:%M", "%a %b %d %H:%M:%S %Y", "%m/%d/%Y %I:%M:%S %p")
    ),
    Mistake(
        "prepare data.interactions.time=time",
        "[iso, '%Y%m%d']",
        """data.interactions.time_format="[iso, '%Y%m%d']" """,
        files={"rows.csv": timed(lambda s: "20200131" if s % 2 else "2020-01-30 10:00:00")},
    ),
    Mistake(
        "prepare",
        "set data.on_bad_row=skip",
        "data.on_bad_row=skip",
        data=CTR,
        files={"rows.csv": changed(5, 3, "7")},
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
            files={"rows.csv": timed(written).replace(",", ";").replace("_", mark)},
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
        files={"more.csv": csv_of([row[:2] for row in ROWS[::-1]], "user,item")},
    ),
    Mistake(
        "prepare 'data.interactions.file=[rows.csv, more.csv]'",
        "rows.csv has it: add the column to this file, or leave the file out",
        "data.interactions.file=rows.csv",
        files={"more.csv": csv_of([row[:1] for row in ROWS], "user")},
    ),
    Mistake(
        "prepare 'data.interactions.file=[rows.csv, more.csv]' "
        "'data.files={more.csv: {optional: [item]}}'",
        "every row needs it, so `optional` has no effect: add the column to this file, or leave",
        "data.interactions.file=rows.csv",
        ("data.files={more.csv: {optional: [item]}}",),
        files={"more.csv": csv_of([row[:1] for row in ROWS], "user")},
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
