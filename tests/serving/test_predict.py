"""Rows that a request has scored get what the command predict writes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from deepfm_dist.config import Config, with_settings
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.jobs.export import up_to_date_export
from deepfm_dist.jobs.predict import predict
from deepfm_dist.jobs.train import train
from deepfm_dist.runs.trained import find_run
from tests.ranks import run_in_fork
from tests.serving.shop import shop

pytest.importorskip("httpx")
pytest.importorskip("fastapi")

from fastapi.testclient import TestClient

from deepfm_dist.serving.app import make_app
from deepfm_dist.serving.live import Recommender
from deepfm_dist.serving.replacement import ModelInUse


def _answers(config: Config, source: Path, bodies: list[Any]) -> list[tuple[int, Any]]:
    train(config)
    predict(config, str(source), source.with_suffix(".parquet"))
    found = find_run(config, ())
    folder = up_to_date_export(found)
    with process_group("cpu") as world:
        client = TestClient(make_app(ModelInUse(Recommender(found, folder, world))))
    client.headers["Content-Type"] = "application/json"
    responses = [client.post("/predict", content=json.dumps(body)) for body in bodies]
    return [(response.status_code, response.json()) for response in responses]


def test_rows_of_a_request_are_scored_as_those_of_a_file(tmp_path: Path) -> None:
    config = with_settings(shop(tmp_path), {"trainer.loss": "bce", "trainer.max_steps": 10})
    rows = pd.read_csv(tmp_path / "rows.csv").sample(frac=1, random_state=1)[:20]
    strange = pd.DataFrame({"user": [999, 4, 4, 4], "item": [3, 999, 3, 3]})
    strange["device"] = ["desk", "desk", "radio", None]
    rows = pd.concat([rows, strange])
    rows.to_csv(tmp_path / "new.csv", index=False)
    objects = [
        {
            "user": int(r.user),
            "item": str(r.item),
            "device": r.device if r.device == r.device else None,
        }
        for r in rows.itertuples()
    ]
    row = objects[0]
    refused: dict[str, Any] = {
        "rows, row 2: unknown field 'mood'; allowed: user, item, device": [row, {**row, "mood": 1}],
        "rows, row 1: device is missing; give null": [{"user": 4, "item": 3}],
        "rows, row 2: user '' is empty": [row, {**row, "user": None}],
        "rows, row 1: device '[\"desk\"]' is a list; give one value": [{**row, "device": ["desk"]}],
        "rows: list should have at least 1 item": [],
        "rows: list should have at most 1000 items": [row] * 1001,
    }
    bodies = [{"rows": objects}, {"rows": [row]}, *({"rows": rows} for rows in refused.values())]
    bodies += [{}, {"rows": [row], "k": 3}, {"data": [row]}, {"rows": [[4, 3]]}]
    odd: list[Any] = [True, 1.5, 10**30, "", "\ud800", "\x00", "x" * 1000]
    bodies += [{"rows": [{**row, name: value}]} for name in ("item", "device") for value in odd]
    (status, answer), (_, alone), *others = run_in_fork(
        _answers, config, tmp_path / "new.csv", bodies
    )
    written = pd.read_parquet(tmp_path / "new.parquet")
    assert (status, answer["run"], len(answer["scores"])) == (200, "shop", 24)
    for column in ("score", "probability"):
        np.testing.assert_allclose(
            [score[column] for score in answer["scores"]], written[column], rtol=1e-5, atol=1e-6
        )
    assert written["score"].nunique() > 10
    assert answer["unknown"] == {"user": 1, "item": 1, "device": 1}
    assert alone["unknown"] == {}
    assert alone["scores"][0]["score"] == pytest.approx(written["score"][0], rel=1e-5)
    texts = [*refused, "rows is missing", "unknown field 'k'; allowed: rows"]
    texts += ["rows is missing; unknown field 'data'; allowed: rows"]
    texts += ["rows.0: input should be a JSON object (got [4, 3])"]
    assert {status for status, _ in others[len(texts) :]} == {200, 422}
    for text, (status, answer) in zip(texts, others[: len(texts)], strict=True):
        assert status == 422
        assert answer["detail"].startswith(text)
