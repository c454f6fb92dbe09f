"""Users whom the log has never seen, described in a request by items, attributes or both."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from deepfm_dist.config import Config, with_settings
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.jobs.export import up_to_date_export
from deepfm_dist.jobs.recommend import recommend
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


def _answers(config: Config, bodies: list[Any], user: str) -> tuple[list[Any], list[Any]]:
    train(config)
    found = find_run(config, ())
    folder = up_to_date_export(found)
    with process_group("cpu") as world:
        recommender = Recommender(found, folder, world)
    client = TestClient(make_app(ModelInUse(recommender)))
    known = client.get(f"/users/{user}/recommendations?k=12").json()["items"]
    responses = [client.post("/recommend", json=body) for body in bodies]
    file = {"recommend.histories": str(found.dataset.folder.parent / "new.csv"), "recommend.k": 12}
    recommend(with_settings(config, file), output=str(found.dataset.folder.parent / "new.parquet"))
    return known, [(response.status_code, response.json()) for response in responses]


def test_a_described_user_is_ranked_for_as_a_known_one_alike(tmp_path: Path) -> None:
    config = shop(tmp_path)
    rows, people = pd.read_csv(tmp_path / "rows.csv"), pd.read_csv(tmp_path / "people.csv")
    items = rows["item"][rows["user"] == 4].tolist()
    of_user: dict[Any, Any] = people.set_index("user").to_dict("index")[4]
    of_user["taste"] = pd.read_parquet(tmp_path / "taste.parquet")["taste"][4].tolist()
    tags = of_user["tags"]
    attributes = {**of_user, "tags": tags.split("|")}
    both = {"items": items, "attributes": attributes, "k": 12}
    bodies: list[Any] = [
        both,
        {**both, "attributes": {**attributes, "tags": tags}},
        {**both, "context": {"device": "desk"}},
        {"items": items, "k": 12},
        {"attributes": attributes, "k": 20},
        {"attributes": {"town": "Oslo"}},
        {"attributes": {"city": "Atlantis"}},
        {"attributes": {"age": "old"}},
        {"attributes": {"city": ["Oslo", "Bergen"]}},
        {"attributes": {"taste": [1, 2]}},
        {"attributes": {"taste": [1, "2", 3]}},
        {"attributes": {"taste": 7}},
        {"items": items, "context": {"weather": "wet"}},
        {"items": items, "context": {"device": "radio"}},
        {"k": 3},
        {"items": items, "mood": "good"},
    ]
    (tmp_path / "p").mkdir()
    new = pd.DataFrame({"user": "new", "item": items, "age": of_user["age"]})
    new = new.assign(city=["", *[of_user["city"]] * 7], tags=[tags, *["a"] * 7])
    new["taste"] = ["", str(of_user["taste"]), *["[0, 0, 0]"] * 6]
    new.to_csv(tmp_path / "p/new.csv", index=False)
    known, answers = run_in_fork(_answers, config, bodies, "4")
    expected = {item["id"]: (item["score"], item["probability"]) for item in known}
    assert len(expected) == 12
    in_file = pd.read_parquet(tmp_path / "p/new.parquet").set_index("item_id")["score"]
    assert dict(in_file) == pytest.approx({i: expected[i][0] for i in expected}, abs=1e-5)
    for status, answer in answers[:2]:
        assert status == 200
        found = {item["id"]: (item["score"], item["probability"]) for item in answer["items"]}
        assert found.keys() == expected.keys()
        assert all(found[i] == pytest.approx(expected[i], abs=1e-5) for i in expected)
    others = [{i["id"]: i["score"] for i in answer["items"]} for _, answer in answers[2:5]]
    for scores in others:  # another device, no attributes, no items
        common = [i for i in expected if i in scores]
        assert any(abs(scores[i] - expected[i][0]) > 1e-3 for i in common)
    assert len(others[2]) == 20  # nothing is known to be seen
    assert [status for status, _ in answers[5:]] == [422] * 11
    texts = [answer["detail"] for _, answer in answers[5:]]
    for text, part in zip(
        texts,
        [
            "attributes.town: unknown field; available: city, age, tags, taste",
            "attributes.city='Atlantis': 'Atlantis' was never seen in training",
            "attributes.age='old': expected a number",
            "attributes.city=['Oslo', 'Bergen']: the field has one value",
            "attributes.taste=[1, 2]: expected a list of 3 finite numbers",
            "attributes.taste=[1, '2', 3]: expected a list of 3 finite numbers",
            "attributes.taste=7: expected a list of 3 finite numbers",
            "context.weather: unknown context field",
            "context.device='radio': never seen in training",
            "items is missing or empty; give items, attributes or both",
            "unknown field 'mood'; allowed: items, k, attributes, context",
        ],
        strict=True,
    ):
        assert part in text
