"""Settings of several targets and of the order of time that are refused."""

from typing import Any

from tests.cures.mistakes import CTR, DATA, FILES, PRINT, ROWS, SEEN, Mistake, csv_of

HEADER = FILES["rows.csv"].partition("\n")[0] + ",buy,keep"
BOUGHT = csv_of([[*row, str(int(row[2] == "5")), row[3]] for row in ROWS], HEADER)
NEVER = csv_of([[*row, "", row[3]] for row in ROWS], HEADER)
LAST = {"features": [*DATA["features"], {**SEEN, "last": 3}]}
LEAVE_LAST = (
    "data.interactions.time=time data.split.method=leave_last data.split.valid=1 data.split.test=1"
)


def _targets(*labels: str, **more: Any) -> dict[str, Any]:
    rows = {"file": "rows.csv", "user": "user", "item": "item", "labels": [*labels], **more}
    return {"task": "ctr", "interactions": rows}


BOTH = _targets("label", "buy")
TARGETS = [
    Mistake(
        f"train {LEAVE_LAST} trainer.loss=bce",
        "set trainer.loss=softmax",
        "trainer.loss=softmax",
        data=LAST,
    ),
    Mistake(
        PRINT + "data.interactions.time=time",
        "set split.method to leave_last or temporal",
        "data.split.method=temporal",
        data=LAST,
    ),
    Mistake(
        PRINT + LEAVE_LAST,
        "set history: item",
        data={"features": [*DATA["features"], {"name": "seen", "column": "device", "last": 3}]},
        new_data=LAST,
    ),
    Mistake(
        "train run.name=next checkpoint.start_from=runs_root/cures data.interactions.label=null "
        "data.interactions.labels=[label,buy]",
        "or train from scratch",
        "",
        ("checkpoint.start_from=runs_root/cures",),
        before=("train",),
        data=CTR,
        files={"rows.csv": BOUGHT},
    ),
    Mistake(
        "prepare",
        "leave it out, or train on rows that have it",
        data=_targets("label", "buy", "keep"),
        files={"rows.csv": NEVER},
        new_data=_targets("label", "keep"),
    ),
    Mistake(
        PRINT + "data.interactions.repeated=strongest",
        "or set repeated: latest",
        "data.interactions.repeated=latest",
        data=BOTH,
    ),
    Mistake(
        PRINT + "data.task=ctr",
        "leave labels out",
        data={
            "interactions": {
                "file": "rows.csv",
                "user": "user",
                "impressions": "shown",
                "labels": ["label", "buy"],
            }
        },
        new_data={
            "interactions": {"file": "rows.csv", "user": "user", "impressions": "shown"},
        },
    ),
    Mistake(PRINT, "for one, set label: label", data=_targets("label"), new_data=CTR),
    Mistake(
        PRINT,
        "leave rating out, or labels",
        data=_targets("label", "buy", rating="rating", min_rating=4),
        new_data=BOTH,
    ),
    Mistake(
        PRINT + "model.shared_layers=1",
        "name them in data.interactions.labels",
        data=CTR,
        new_data=BOTH,
    ),
    Mistake(
        PRINT + "model.linear=logistic", "set model.linear=none", "model.linear=none", data=BOTH
    ),
    Mistake(
        PRINT + "recommend.probability=true",
        "such as recommend.targets={buy: 1}",
        "'recommend.targets={buy: 1}'",
        data=BOTH,
    ),
    Mistake(
        PRINT + "'trainer.target_weights={buy: 0}'",
        "leave the target out of data.interactions.labels",
        "",
        ("trainer.target_weights={buy: 0}",),
        data=_targets("label", "buy", "keep"),
        new_data=_targets("label", "keep"),
    ),
]
