"""Settings that are refused before any file is read."""

from tests.cures.mistakes import DATA, PRINT, SEEN, Mistake, vectors

SETTINGS = [
    Mistake(
        PRINT,
        "set entity: item",
        data=vectors(entity="context", file=None),
        new_data=vectors(),
    ),
    Mistake(PRINT, "set file", data=vectors(file=None), new_data=vectors()),
    Mistake(
        PRINT,
        "is a NumPy file, which describes itself; leave it out",
        data=vectors(npy="v.npy") | {"files": {"v.npy": {"decimal": ","}}},
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
    Mistake(
        PRINT + "optimizer.dense.decay=linear optimizer.dense.decay_steps=null",
        "decay_steps; set a number, or auto",
        "optimizer.dense.decay_steps=auto",
    ),
    Mistake(
        PRINT + "optimizer.dense.final_lr=0.1",
        "linear",
        "optimizer.dense.decay=linear",
    ),
    Mistake(
        PRINT + "optimizer.dense.power=3",
        "decay=polynomial",
        "optimizer.dense.decay=polynomial",
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
