"""Users whom the log has never seen, described in a request by items, attributes or both."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from deepfm_dist.config import Config, config_from, with_settings
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
from deepfm_dist.serving.live import Recommender, _bag
from deepfm_dist.serving.replacement import ModelInUse


def _answers(
    config: Config, bodies: list[Any], user: str, requests: list[dict[str, Any]]
) -> tuple[list[Any], list[Any], list[Any]]:
    """Answers by route: a known user's, those to bodies, and those to requests that a file has."""
    train(config)
    found = find_run(config, ())
    folder = up_to_date_export(found)
    with process_group("cpu") as world:
        recommender = Recommender(found, folder, world)
    client = TestClient(make_app(ModelInUse(recommender)))
    known = client.get(f"/users/{user}/recommendations?k=12&explain=2").json()["items"]
    responses = [client.post("/recommend", json=body) for body in [*bodies, *requests]]
    for option, columns in (("histories", {"recommend.k": 12}), ("requests", {})):
        file = found.dataset.folder.parent / ("new.csv" if option == "histories" else "asked.jsonl")
        target = str(file.with_suffix(".parquet"))
        recommend(
            with_settings(config, {f"recommend.{option}": str(file), **columns}), output=target
        )
    _check_steered(config, user)
    answers = [(response.status_code, response.json()) for response in responses]
    return known, answers[: len(bodies)], answers[len(bodies) :]


def _check_steered(config: Config, user: str) -> None:
    """Compares a steered service with the command, all items being allowed, too."""
    steering = {"popularity_penalty": 0.5, "diversity": 0.4, "at_most": {"kind": 2}, "rerank": 9}
    settings = {f"recommend.{name}": value for name, value in steering.items()}
    steered = with_settings(config, {**settings, "recommend.k": 6, "recommend.users": [user]})
    found = find_run(steered, ())
    with process_group("cpu") as world:
        client = TestClient(
            make_app(ModelInUse(Recommender(found, up_to_date_export(found), world)))
        )
    output = found.dataset.folder.parent / "steered.parquet"
    recommend(with_settings(steered, {"recommend.probability": True}), output=str(output))
    expected = pd.read_parquet(output)
    body = {"user": user, "k": 6, "allow": [*range(20)]}
    for answer in (
        client.get(f"/users/{user}/recommendations?k=6"),
        client.post("/recommend", json=body),
    ):
        items = answer.json()["items"]
        assert [item["id"] for item in items] == expected["item_id"].tolist()
        for name in ("score", "probability"):
            theirs = [item[name] for item in items]
            assert theirs == pytest.approx(expected[name].tolist(), abs=1e-5)
    assert expected["score"].diff().max() > 0  # not in the order of scores
    assert expected.groupby(expected["item_id"] % 3).size().max() == 2


OTHER_PARTS = ("context", "attributes", "explain")
"""Of a body, that are no columns of a file."""


def _requests(attributes: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Bodies of requests, and the same as rows of a file."""
    bodies: list[dict[str, Any]] = [
        {"user": 4, "k": 20, "where": "kind=dry", "explain": 100},
        {"user": "4", "k": 20, "where": "kind!=dry", "block": ["0", "1", 77]},
        {"user": 4, "k": 3, "context": {"device": "desk"}},
        {"attributes": attributes, "k": 2, "where": "kind=dry and wet and kind!=wet"},
        {"items": [3, 5], "attributes": attributes, "allow": [*range(9), 88], "k": 20},
        {"items": [3, 5], "where": "kind=wet", "allow": [3, 5], "k": 20},
    ]
    rows = []
    for body in bodies:
        row = {"device": "phone", **body, **body.get("context", {}), **body.get("attributes", {})}
        rows.append({k: v for k, v in row.items() if k not in OTHER_PARTS})
    return bodies, rows


def _check_requests(known: list[Any], ranked: list[Any], answered: pd.DataFrame) -> None:
    """Compares answers with those to a file, and with the known user's whole ranking."""
    assert [status for status, _ in ranked] == [200] * len(ranked)
    assert [answer["unknown"] for _, answer in ranked] == [
        {},
        {"block": 1},
        {},
        {},
        {"allow": 1},
        {},
    ]
    for number, (_, answer) in enumerate(ranked):
        in_file = answered[answered["request"] == number]
        assert in_file["item_id"].tolist() == [item["id"] for item in answer["items"]]
        scores = [item["score"] for item in answer["items"]]
        assert in_file["score"].tolist() == pytest.approx(scores, abs=1e-5)
    found = [[item["id"] for item in answer["items"]] for _, answer in ranked]
    whole = [item["id"] for item in known]  # of user 4, twelve of whose twenty items are unseen
    assert found[0] == [i for i in whole if i % 3 == 0]
    assert found[1] == [i for i in whole if i % 3 and i not in (0, 1)]
    assert len(found[2]) == 3
    assert len(found[3]) == 2 and all(i % 3 == 2 for i in found[3])
    assert sorted(found[4]) == [i for i in range(9) if i not in (3, 5)]
    assert found[5] == []
    for item in known:
        explanation = item["explanation"]
        shares = [reason["share"] for reason in explanation["reasons"]]
        rest = explanation["base"] + explanation["other"] + explanation["remainder"]
        assert len(shares) == 2
        assert rest + sum(shares) == pytest.approx(item["score"], abs=1e-4)
    by_id = {item["id"]: item["explanation"]["reasons"] for item in known}
    for item in ranked[0][1]["items"]:
        reasons = item["explanation"]["reasons"]
        fields = {reason["field"] for reason in reasons}
        assert fields == {"seen", "item", "kind", "city", "age", "tags", "taste", "device"}
        assert reasons[:2] == by_id[item["id"]]
    assert ranked[1][1]["items"][0]["explanation"] is None


def _refused(items: list[int]) -> list[tuple[Any, str]]:
    """Bodies that are refused, and what the answer then says; the last names an unknown user."""
    return [
        (
            {"attributes": {"town": "Oslo"}},
            "attributes.town: unknown field; available: city, age, tags, taste",
        ),
        (
            {"attributes": {"city": "Atlantis"}},
            "attributes.city='Atlantis': never seen in training; it has Oslo, Bergen",
        ),
        (
            {"attributes": {"tags": ["a", "zz"]}},
            "attributes.tags=['a', 'zz']: 'zz' was never seen in training; it has ",
        ),
        ({"attributes": {"age": "old"}}, "attributes.age='old': expected a number"),
        ({"attributes": {"age": [30]}}, "attributes.age=[30]: expected a number"),
        (
            {"attributes": {"city": ["Oslo", "Bergen"]}},
            "attributes.city=['Oslo', 'Bergen']: the field has one value",
        ),
        (
            {"attributes": {"taste": [1, 2]}},
            "attributes.taste=[1, 2]: expected a list of 3 finite numbers",
        ),
        (
            {"attributes": {"taste": [1, "2", 3]}},
            "attributes.taste=[1, '2', 3]: expected a list of 3 finite numbers",
        ),
        ({"attributes": {"taste": 7}}, "attributes.taste=7: expected a list of 3 finite numbers"),
        ({"items": items, "context": {"weather": "wet"}}, "context.weather: unknown context field"),
        (
            {"items": items, "context": {"device": "radio"}},
            "context.device='radio': never seen in training",
        ),
        ({"items": items, "context": {"device": ""}}, "context.device='': never seen in training"),
        ({"k": 3}, "items is missing or empty; give items, attributes or both, or a user"),
        (
            {"items": items, "mood": "good"},
            "unknown field 'mood'; allowed: items, k, attributes, context, explain, user, allow",
        ),
        (
            {"user": 4, "items": items},
            "user is in the training data; leave items and attributes out",
        ),
        (
            {"user": 4, "where": "kind=dri"},
            "where='kind=dri': the items of the training data have no kind='dri'; did you mean 'dr",
        ),
        (
            {"user": 4, "where": "city=Oslo"},
            "where='city=Oslo': unknown item field 'city'; available: kind",
        ),
        ({"user": 4, "allow": []}, "allow: list should have at least 1 item"),
        ({"user": 999}, "'999' is not in the training data"),
    ]


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
    ]
    (tmp_path / "p").mkdir()
    new = pd.DataFrame({"user": "new", "item": items, "age": of_user["age"]})
    new = new.assign(city=["", *[of_user["city"]] * 7], tags=[tags, *["a"] * 7])
    new["taste"] = ["", str(of_user["taste"]), *["[0, 0, 0]"] * 6]
    alone = new[:2].assign(user="by_attributes", item="")
    new = pd.concat([new, pd.DataFrame({"user": "by_items", "item": items}), alone])
    new.to_csv(tmp_path / "p/new.csv", index=False)
    refused = _refused(items)
    requests, rows = _requests(attributes)
    (tmp_path / "p/asked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    known, answers, ranked = run_in_fork(
        _answers, config, [*bodies, *(body for body, _ in refused)], "4", requests
    )
    expected = {item["id"]: (item["score"], item["probability"]) for item in known}
    assert len(expected) == 12
    ranked_file = pd.read_parquet(tmp_path / "p/new.parquet").set_index("item_id")
    in_file = ranked_file["score"][ranked_file["user_id"] == "new"]
    for user, (_, answer) in zip(("by_items", "by_attributes"), answers[3:5], strict=True):
        theirs = {item["id"]: item["score"] for item in answer["items"][:12]}
        of_user = ranked_file["score"][ranked_file["user_id"] == user]
        assert dict(of_user) == pytest.approx(theirs, abs=1e-5)
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
    _check_requests(known, ranked, pd.read_parquet(tmp_path / "p/asked.parquet"))
    assert [status for status, _ in answers[5:]] == [422] * (len(refused) - 1) + [404]
    for (_, answer), (_, message) in zip(answers[5:], refused, strict=True):
        assert message in answer["detail"]


def _known_and_described(config: Config, items: list[int]) -> list[list[dict[str, Any]]]:
    """What the service recommends to user 4, and to a stranger who has some items."""
    train(config)
    found = find_run(config, ())
    with process_group("cpu") as world:
        recommender = Recommender(found, up_to_date_export(found), world)
    client = TestClient(make_app(ModelInUse(recommender)))
    known = client.get("/users/4/recommendations?k=20").json()["items"]
    return [known, client.post("/recommend", json={"items": items, "k": 20}).json()["items"]]


def test_the_service_knows_items_of_validation_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    rows = pd.DataFrame({"user": np.repeat(np.arange(30), 8)})
    rows["item"] = np.concatenate([rng.permutation(20)[:8] for _ in range(30)])
    rows["split"] = (["train"] * 5 + ["valid"] * 2 + ["test"]) * 30
    rows.to_csv(tmp_path / "rows.csv", index=False)
    columns = {"user": "user", "item": "item", "split": "split"}
    roots = {"prepared_root": str(tmp_path / "p"), "runs_root": str(tmp_path / "r"), "loggers": []}
    config = config_from(
        {
            "run": {"name": "known", **roots},
            "data": {"root": str(tmp_path), "interactions": {"file": "rows.csv", **columns}},
            "model": {"embedding_dim": 8},
            "trainer": {"max_steps": 3, "validate_every_epochs": 1},
            "recommend": {"mask": ["train", "valid"]},
        }
    )
    of_user = rows[(rows["user"] == 4) & (rows["split"] != "test")]
    known, described = run_in_fork(_known_and_described, config, of_user["item"].tolist())
    assert [item["id"] for item in known] == [item["id"] for item in described]
    scores = [[item["score"] for item in items] for items in (known, described)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    assert {int(item["id"]) for item in known} == {*range(20)} - {*of_user["item"]}


def test_the_items_of_a_request_stay_in_order() -> None:
    assert _bag([7, 2, 7, 5]).lists() == [[2, 7, 5]]  # an item comes at its latest place
    assert _bag(None).lists() == [[]]
