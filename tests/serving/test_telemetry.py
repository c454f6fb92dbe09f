"""Requests as operators see them, and the pages under /docs."""

import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("httpx")
pytest.importorskip("fastapi")

from fastapi.testclient import TestClient

from deepfm_dist.serving import telemetry
from deepfm_dist.serving.app import make_app
from deepfm_dist.serving.replacement import ModelInUse


def _client(**recommender: Any) -> TestClient:
    model: Any = SimpleNamespace(name="monday", step=1, saved_at=0.0, **recommender)
    return TestClient(
        make_app(ModelInUse(model), logs_requests=True), raise_server_exceptions=False
    )


def _broken(*_: object) -> None:
    raise ZeroDivisionError


def test_each_request_has_an_id() -> None:
    client = _client(find_users=_broken)
    for path, status in (("/readyz", 200), ("/none", 404), ("/items?k=1", 422), ("/users", 500)):
        answer = client.get(path, headers={"X-Request-ID": "front/7f-3"})
        assert (answer.status_code, answer.headers["x-request-id"]) == (status, "front/7f-3")
    new = set()
    for headers in ({}, {"X-Request-ID": ""}, {"X-Request-ID": "a b"}, {"X-Request-ID": "a" * 129}):
        new.add(client.get("/readyz", headers=headers).headers["x-request-id"])
    assert len(new) == 4 and all(re.fullmatch("[0-9a-f]{32}", id_) for id_ in new)


def test_log_lines_are_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handler = logging.FileHandler(tmp_path / "log")
    handler.setFormatter(telemetry.JsonFormatter())
    monkeypatch.setattr(telemetry.log, "handlers", [handler])
    monkeypatch.setattr(telemetry.log, "level", logging.INFO)
    _client().get('/none/"é"?a=1', headers={"X-Request-ID": "r1"})
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        telemetry.log.exception("two\nlines")
    request, error = map(json.loads, (tmp_path / "log").read_text().splitlines())
    assert request["time"].endswith("+00:00") and 0 < request.pop("seconds") < 5
    fields = ("level", "message", "request_id", "method", "path", "query", "route", "status", "run")
    path = '/none/"é"'
    assert [request[name] for name in fields] == [
        *("INFO", f"GET {path}: 404", "r1", "GET", path, "a=1", "other", 404, "monday")
    ]
    assert (error["level"], error["message"]) == ("ERROR", "two\nlines")
    assert error["traceback"].endswith("ValueError: first\nsecond")


def test_percentiles_can_be_read_near_the_bar() -> None:
    client = _client()
    client.get("/readyz")
    bounds = re.findall(r'_bucket\{le="([^"]+)",route="/readyz"\}', client.get("/metrics").text)
    assert {"0.0005", "0.0075", "0.01", "0.015", "1.0", "+Inf"} <= {*bounds}


def test_pages_of_the_api_need_no_network() -> None:
    pytest.importorskip("fastapi_offline")
    client = _client()
    for page in ("/docs", "/redoc"):
        text = client.get(page).text
        assert "//" not in re.sub(r"//.*|<!--.*?-->", "", text)
        for address in re.findall(r'(?:src|href)="([^"]+)"', text):
            assert address.startswith("/") and client.get(address).status_code == 200
