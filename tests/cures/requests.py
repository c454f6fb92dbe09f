"""Files of requests that `recommend` refuses."""

from tests.cures.mistakes import DATA, FILES, ROWS, Mistake, csv_of

NESTED = '{"user": "u1", "allow": []}\n'


def _request(line: str, header: str = "user,where") -> dict[str, str]:
    return {"q.csv": f"{header}\n{line}\n"}


HOUR = {
    "features": [
        *DATA["features"],
        {"name": "hour", "column": "time", "derive": "hour", "time_format": "s"},
    ]
}
ASK = "recommend --requests q.csv"
CALLED_K = {"features": [*DATA["features"], {"name": "k"}]}
CALLED_DEVICE = {"features": [*DATA["features"], {"name": "device"}]}
REQUESTS = [
    Mistake(
        "recommend recommend.k=3",
        "recommend.context.device=VALUE",
        "recommend.context.device=phone",
        before=("train",),
        data=CALLED_DEVICE,
    ),
    Mistake(
        ASK,
        "write one row per request to it",
        before=("train",),
        new_files=_request("u1,genre=g1"),
    ),
    *(
        Mistake(
            ASK, cure, before=("train",), files=_request(wrong), new_files=_request(right, header)
        )
        for wrong, cure, right, header in (
            ("u1,genre", "write field=value or field!=value", "u1,genre=g1", "user,where"),
            (
                "u1,genre=g1 genre",
                "the items of the training data have no genre='g1 genre'",
                "u1,genre=g1",
                "user,where",
            ),
            ("u1,gnre=g1", "did you mean genre?", "u1,genre=g1", "user,where"),
            ("u1,item=i1", "use allow or block", "u1,i1|i2", "user,allow"),
        )
    ),
    Mistake(
        ASK,
        "or use allow",
        before=("train",),
        data={"features": DATA["features"][:2]},
        files=_request("u1,genre=g1"),
        new_files=_request("u1,i1|i2", "user,allow"),
    ),
    Mistake(
        ASK,
        "train one with {name: genre, entity: item, file: FILE} among data.features",
        "run.name=genres",
        before=("train",),
        data={"features": DATA["features"][:2]},
        files=_request("u1,genre=g1"),
        new_data={"features": DATA["features"]},
        first=("train run.name=genres",),
    ),
    Mistake(
        ASK,
        "give the field another column and train again",
        "run.name=renamed 'recommend.context={device: phone}'",
        before=("train",),
        data=CALLED_K,
        files={
            **_request("u1,3", "user,k"),
            "rows.csv": csv_of(ROWS, FILES["rows.csv"].partition("\n")[0].replace("device", "k")),
        },
        new_data=CALLED_DEVICE,
        new_files={"rows.csv": FILES["rows.csv"]},
        first=("train run.name=renamed",),
    ),
    *(
        Mistake(
            ASK,
            cure,
            before=("train",),
            files=_request("a,u1\na,u2", "request,user"),
            new_files=new,
        )
        for cure, new in (
            ("number the requests", _request("1,u1\n2,u2", "request,user")),
            ("leave the column out", _request("u1\nu2", "user")),
        )
    ),
    *(
        Mistake(
            "recommend --requests q.jsonl",
            cure,
            before=("train",),
            files={"q.jsonl": NESTED + NESTED.replace("[]", '["i1"]')},
            new_files={"q.jsonl": new + NESTED.replace("[]", '["i1"]')},
        )
        for cure, new in (
            ("drop the row", ""),
            ("write null to allow all items", NESTED.replace("[]", "null")),
        )
    ),
    Mistake(
        ASK,
        "leave it empty for recommend.k=10",
        before=("train",),
        files=_request("u1,0.5", "user,k"),
        new_files=_request("u1,", "user,k"),
    ),
    Mistake(
        ASK,
        "leave the cell empty",
        before=("train",),
        data=HOUR,
        files=_request("u1,soon", "user,time"),
        new_files=_request("u1,", "user,time"),
    ),
]
