"""A run behind HTTP, against the files that the commands write."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from deepfm_dist.config import load_config
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.jobs.export import up_to_date_export
from deepfm_dist.runs.trained import find_run
from tests.conftest import HISTORY
from tests.pages import PICTURES, watched
from tests.ranks import RankFailed, run_alone

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")

from deepfm_dist.serving.live import Recommender  # noqa: E402

pytestmark = pytest.mark.slow  # trains, serves, and drives a browser
SETTINGS = [
    *HISTORY,
    "trainer.max_steps=60",
    "run.loggers=[]",
    "model.over_arch_layer_sizes=[16,8]",
]


@pytest.fixture(scope="module")
def command(forked: dict[str, str]) -> Callable[..., list[str]]:
    """The words of a command."""

    def command(name: str, *arguments: str) -> list[str]:
        return [forked["PYTHON_EXEC"], "-m", f"deepfm_dist.{name}", "--quiet", *arguments]

    return command


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, command: Callable[..., list[str]]) -> Path:
    """A trained run, its report, recommendations and similar items."""
    home = tmp_path_factory.mktemp("served")
    for words in (
        command("train", *SETTINGS, "trainer.log_every_steps=10"),
        command("evaluate", "--run", "runs/sample"),
        command("recommend", "--run", "runs/sample"),
        command("similar", "--run", "runs/sample"),
    ):
        subprocess.run(words, cwd=home, check=True, capture_output=True)
    return home


@pytest.fixture(scope="module")
def url(home: Path, command: Callable[..., list[str]]) -> Iterator[str]:
    """A service of the run."""
    words = command("serve", "--run", "runs/sample", "--port", "0")
    service = subprocess.Popen(words, cwd=home, stdout=subprocess.PIPE, text=True)
    assert service.stdout is not None
    url, shows, _ = service.stdout.readline().partition("/ shows a page")
    assert url.startswith("http://127.0.0.1:") and shows
    deadline = time.monotonic() + 60
    while True:
        try:
            httpx.get(f"{url}/healthz").raise_for_status()
            break
        except httpx.TransportError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    yield url
    service.terminate()
    assert service.wait(10) == 0


@pytest.fixture
def client(url: str) -> Iterator[Any]:
    with httpx.Client(base_url=url) as client:
        yield client


def test_it_ranks_as_the_commands_do(client: Any, home: Path) -> None:
    of_users = pd.read_parquet(home / "runs/sample/recommendations.parquet").groupby("user_id")
    for user, wanted in list(of_users)[::70]:
        actual = client.get(f"/users/{user}/recommendations?k=7").json()["items"]
        assert [i["id"] for i in actual] == wanted["item_id"].tolist()[:7]
        np.testing.assert_allclose([i["score"] for i in actual], wanted["score"][:7], rtol=1e-5)
        assert [i["rank"] for i in actual] == list(range(1, 8))
    of_items = pd.read_parquet(home / "runs/sample/similar_items.parquet").groupby("item_id")
    for item, wanted in list(of_items)[::40]:
        actual = client.get(f"/items/{item}/similar").json()["items"]
        assert [i["id"] for i in actual] == wanted["similar_item_id"].tolist()
        np.testing.assert_allclose([i["score"] for i in actual], wanted["score"], rtol=1e-5)


def test_users_and_items_are_shown_as_people_know_them(client: Any) -> None:
    root = Path(__file__).parents[2] / "data/sample"
    titles = pd.read_csv(root / "titles.tsv", sep="\t").set_index("item")["title"]
    genres = pd.read_csv(root / "genres.tsv", sep="\t").groupby("item")["genre"].agg(set)
    rows = pd.read_csv(root / "train_ratings.csv")
    user = client.get("/users/4?limit=100").json()
    assert 0 < user["n_items"] <= (rows["user"] == 4).sum()
    assert {i["id"] for i in user["latest"]} <= set(rows["item"][rows["user"] == 4])
    times = rows[rows["user"] == 4].groupby("item")["time"].first()
    latest = [times[i["id"]] for i in user["latest"]]
    assert latest == sorted(latest, reverse=True)
    for item in user["latest"]:
        assert item["title"] == titles[item["id"]]
        assert set(item["tags"]) == genres.get(item["id"], set())
    actual = client.get("/items", params={"q": "MOON", "limit": 3}).json()["items"]
    assert len(actual) == 3
    assert all("Moon" in item["title"] for item in actual)
    ids = [str(u) for u in sorted(rows["user"].unique()) if str(u).startswith("4")]
    assert client.get("/users?q=4&limit=2").json() == {"total": 700, "ids": ids[:2]}
    health = client.get("/healthz").json()
    assert (health["run"], health["step"], health["items"]) == ("sample", 60, 400)


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        (
            "/users/nobody/recommendations",
            404,
            "'nobody' is not in the training data",
        ),
        (
            "/users/no%0Abody%0A/recommendations",
            404,
            "'no\\\\nbody\\\\n' is not in the training data",
        ),
        ("/users/no%0Abody%0A", 404, "'no\\\\nbody\\\\n' is not in the training data"),
        ("/items/no%0Aitem/similar", 404, "'no\\\\nitem' is not in the training data"),
        ("/items/0/similar", 404, "/items?q=TITLE"),
        ("/users/4/recommendations?k=0", 422, "greater than or equal to 1"),
        ("/users/4/recommendations?k=101", 422, "less than or equal to 100"),
        (f"/users/{'x' * 201}/recommendations", 422, "at most 200 characters"),
    ],
)
def test_what_cannot_be_answered_is_named(
    client: Any, path: str, status: int, message: str
) -> None:
    answer = client.get(path)
    assert answer.status_code == status
    assert message in answer.text


def test_users_described_by_items_get_the_ranking_of_the_command(
    client: Any, home: Path, tmp_path: Path, command: Callable[..., list[str]]
) -> None:
    home = shutil.copytree(home, tmp_path / "home")
    liked = pd.read_parquet(home / "runs/sample/recommendations.parquet")["item_id"]
    liked = liked.unique()[:3].tolist()
    (home / "strangers.csv").write_text("user,item\n" + "".join(f"x,{i}\n" for i in liked))
    option = "recommend.histories=strangers.csv"
    words = command("recommend", "--run", "runs/sample", option)
    subprocess.run(words, cwd=home, check=True, capture_output=True)
    wanted = pd.read_parquet(home / "runs/sample/recommendations-histories.parquet")
    actual = client.post("/recommend", json={"items": [*liked, liked[0]], "k": 10}).json()["items"]
    assert [i["id"] for i in actual] == wanted["item_id"].tolist()
    np.testing.assert_allclose([i["score"] for i in actual], wanted["score"], rtol=1e-5)


def _asked_by_items(home: Path) -> None:
    where = [f"run.runs_root={home}", f"run.prepared_root={home / 'prepared'}"]
    config = load_config("sample", [*where, "run.name=plain"])
    with process_group("cpu", threads=1) as world:
        actual = find_run(config, [])
        Recommender(actual, up_to_date_export(actual), world).recommend_for(["9"], 3)


def test_a_model_that_knows_users_by_id_alone_says_so(
    tmp_path: Path, command: Callable[..., list[str]]
) -> None:
    settings = ["run.runs_root=.", "run.name=plain", "trainer.max_steps=1", "trainer.loss=bce"]
    subprocess.run(command("train", *settings), cwd=tmp_path, check=True, capture_output=True)
    with pytest.raises(RankFailed, match=r"Unsupported: .*knows its users by id.*history: item"):
        run_alone(_asked_by_items, tmp_path)


def test_bodies_are_limited(client: Any) -> None:
    assert client.post("/recommend", json={"items": ["none"]}).status_code == 404
    assert client.post("/recommend", json={"items": []}).status_code == 422
    long = b"[" + b" " * (1 << 20) + b"]"
    assert client.post("/recommend", content=long).status_code == 413
    assert client.post("/recommend", content=iter([long])).status_code == 413
    assert client.get("/healthz", headers={"Host": "evil.example"}).status_code == 400


def test_a_body_that_is_announced_as_too_long_is_refused_before_it_comes(url: str) -> None:
    address = url.removeprefix("http://").split(":")
    for path in (b"predict", b"recommend", b"nowhere"):
        with socket.create_connection((address[0], int(address[1])), timeout=5) as connection:
            connection.sendall(
                b"POST /" + path + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n"
                b"Expect: 100-continue\r\nContent-Length: 99999999999\r\n\r\n{"
            )
            answer = b"".join(iter(lambda: connection.recv(1000), b""))  # until it is closed
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert answer.endswith(b'{"detail":"the body is longer than 1,048,576 bytes"}')


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/healthz?x=1", "unknown parameter 'x'; none is allowed here"),
        ("/users/4/recommendations?context=a&k=2", "unknown parameter 'context'; allowed: k"),
        ("/users/4?k=2", "unknown parameter 'k'; allowed: limit"),
        ("/items?query=Moon", "unknown parameter 'query'; allowed: q, limit"),
        ("/items/9/similar?k=2&k=3", "k is given 2 times; give it once"),
        ("/items/9/similar?k=x", "k: input should be a valid integer, unable to parse string"),
    ],
)
def test_parameters_are_used_or_refused(client: Any, path: str, message: str) -> None:
    answer = client.get(path)
    assert (answer.status_code, answer.json()["detail"].startswith(message)) == (422, True)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b'{"items": ["9"], "k": NaN}', 422, "k: input should be a finite number (got nan)"),
        (b'{"items": ["9"], "k": 1e400}', 422, "k: input should be a finite number (got inf)"),
        (b'{"items": ["9"], "k": true}', 422, "k: input should be a valid integer (got True)"),
        (b'{"items": [NaN]}', 422, "items.0: input should be text or a whole number (got nan)"),
        (b'{"items": ["9"], "exclude": []}', 422, "unknown field 'exclude'; allowed: items, k"),
        (b'{"items": ["9"], "k": "5"}', 422, "k: input should be a valid integer (got '5')"),
        (b'{"items": ["9"], "k": 1, "k": 5}', 422, "'k' is given 2 times; give it once"),
        (b'{"items": [true]}', 422, "items.0: input should be text or a whole number (got True)"),
        (
            b'{"items": ["9", null, 1.5]}',
            422,
            "items.1: input should be text or a whole number (got None); "
            "items.2: input should be text or a whole number (got 1.5)",
        ),
        (b'{"k": 1}', 422, "items is missing or empty; give items"),  # it has no attributes
        (
            b'{"items": ["9"], "context": {"a": null}}',
            422,
            "context.a: input should be text or a number (got None)",
        ),
        (b'["9"]', 422, "the body must be a JSON object with items, k"),
        (b'{"items": ["\\ud800"]}', 422, "'\\ud800' is half of a character; send it whole"),
        (b'{"items": ["9"], "context": {"\\uDC00": 1}}', 422, "'\\udc00' is half of a character"),
        (b'{"items": ["\\ud83d\\ude00"]}', 404, "'\U0001f600' is not in the training data"),
        (
            b'{"items": ["9"], "context": {"a": ' + b"9" * 400 + b"}}",
            422,
            "context.a: input should be a number of double precision (got 999",
        ),
        (
            b'{"items": ["' + b"x" * 9999 + b'"]}',
            404,
            f"'{'x' * 196}... is not in the training data",
        ),
        (b'{"items": ["9"]', 400, "the body is not JSON: Expecting ',' delimiter"),
        (b'\xff{"items": ["9"]}', 400, "the body is not JSON in UTF-8"),
        (b"[" * 100_000, 400, "the body is not JSON in UTF-8, is nested too deeply"),
        (b'{"items": [' + b"9" * 5000 + b"]}", 400, "the body is not JSON in UTF-8, is nested"),
    ],
)
def test_bodies_are_used_or_refused(client: Any, body: bytes, status: int, message: str) -> None:
    answer = client.post("/recommend", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status
    assert answer.json()["detail"].startswith(message)


def test_head_is_get_without_a_body(client: Any) -> None:
    for path in ("/", "/readyz", "/users/4/recommendations", "/users/nobody", "/docs"):
        head, get = client.head(path), client.get(path)
        assert (head.status_code, head.content) == (get.status_code, b"")
        assert head.headers["content-length"] == get.headers["content-length"]


def test_requests_are_counted_by_route(client: Any) -> None:
    def count() -> float:
        line = 'deepfm_requests_total{route="/users/{user_id}/recommendations",status="200"} '
        [actual] = [x for x in client.get("/metrics").text.splitlines() if x.startswith(line)]
        return float(actual.removeprefix(line))

    client.get("/users/4/recommendations")
    before = count()
    for user in (4, 6, 8):
        client.get(f"/users/{user}/recommendations")
    assert count() == before + 3


def test_the_service_keeps_to_its_openapi(url: str, tmp_path: Path) -> None:
    pytest.importorskip("schemathesis")
    program = str(Path(sys.executable).parent / "schemathesis")
    # The schema does not say which columns and attributes the model knows; others are refused.
    settings = tmp_path / "schemathesis.toml"
    unchecked = "checks.positive_data_acceptance.enabled = false"
    paths = ("/predict", "/recommend")
    settings.write_text(
        "".join(f'[[operations]]\ninclude-path = "{path}"\n{unchecked}\n' for path in paths)
    )
    command = [program, f"--config-file={settings}", "run", f"{url}/openapi.json"]
    command += ["--max-examples=20", "--seed=1", "--no-color"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "Selected: 10/10" in done.stdout


def test_a_browser_shows_what_evaluate_wrote(home: Path, browser: Any) -> None:
    tab = browser.new_page(viewport={"width": 1200, "height": 900})
    problems = watched(tab)
    tab.goto((home / "runs/sample/report.html").as_uri())
    assert problems == []
    figures = tab.locator("figure svg")
    assert {f.get_attribute("id") for f in tab.locator("figure").all()} == PICTURES
    assert figures.count() == len(PICTURES)
    for drawn in figures.all():
        box = drawn.bounding_box()
        assert box["width"] > 250 and box["height"] > 150
        assert drawn.locator("path").count() > 5
    titles = pd.read_csv(Path(__file__).parents[2] / "data/sample/titles.tsv", sep="\t")["title"]
    text = tab.locator("body").inner_text()
    assert sum(title in text for title in titles) >= 10  # recommended beside the users' own
    tab.close()


def test_a_person_picks_a_user_and_a_film(url: str, browser: Any, client: Any) -> None:
    tab = browser.new_page()
    problems = watched(tab, url)
    tab.goto(url)
    tab.fill("#user", "6")
    tab.click("#user-form button:not([type])")
    tab.wait_for_selector("#history-title:has-text('User 6')")
    best = client.get("/users/6/recommendations").json()["items"]
    shown = [text.split(". ", 1)[1] for text in tab.locator("#best .link").all_inner_texts()]
    assert shown == [item["title"] for item in best]
    assert tab.locator("#best .tags").all_inner_texts() == [", ".join(i["tags"]) for i in best]
    reasons = tab.locator("#best .reasons").all_inner_texts()
    assert len(reasons) == 10 and all(text.startswith("because of ") for text in reasons)
    assert any("the item itself +" in text for text in reasons)
    assert tab.locator("#best .score").all_inner_texts() == [f"{i['score']:.3f}" for i in best]
    tab.click("#best li:nth-child(3) .link")
    tab.wait_for_selector("#similar li")
    similar = client.get(f"/items/{best[2]['id']}/similar").json()["items"]
    assert similar[0]["title"] in tab.locator("#similar li").first.inner_text()
    tab.fill("#title", "moon")
    tab.click("#item-form button")
    tab.click("#found li:first-child button.plain")
    tab.click("#for-items")
    tab.wait_for_selector("#best-title:has-text('Recommended for these items')")
    assert tab.locator("#best li").count() == 10
    assert problems == []

    # The page shows the refusal; the browser also logs the status on its console.
    tab.fill("#user", "<b>nobody</b>")
    tab.click("#user-form button:not([type])")
    tab.wait_for_selector("#problem:has-text('<b>nobody</b>')")
    assert tab.locator("#problem b").count() == 0
    assert all("status of 40" in text for text in problems)
    tab.close()


def test_settings_that_a_service_does_not_look_at_are_refused(
    home: Path, command: Callable[..., list[str]]
) -> None:
    config = home / "runs/sample/config.yaml"
    blocking = home / "blocking.yaml"
    blocking.write_text(config.read_text().replace("block_items: null", "block_items: [4]"))
    for arguments, named in (
        (("--run", "runs/sample", "recommend.k=5"), "recommend.k=5"),
        (("--run", "runs/sample", "recommend={k: 10, users: [4]}"), "recommend.users=[4]"),
        (("--run", "runs/sample", "similar.metric=inner_product"), "similar.metric=inner_product"),
        (("--config", str(blocking)), "recommend.block_items=[4]"),
    ):
        done = subprocess.run(
            command("serve", *arguments), cwd=home, capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert done.stderr.startswith(f"ConfigError: {named}: not used by the service, which ")


def test_what_cannot_be_served_is_reported(
    tmp_path: Path, url: str, command: Callable[..., list[str]]
) -> None:
    taken = ("--port", url.rpartition(":")[2])
    for arguments, message in (
        (("--run", "runs/none"), "ConfigError: --run runs/none: no run; "),
        (taken, f"EnvironmentProblem: --host 127.0.0.1 {' '.join(taken)}: Address already in use"),
        (("--port", "70000"), "EnvironmentProblem: --host 127.0.0.1 --port 70000: "),
    ):
        done = subprocess.run(
            command("serve", *arguments),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "NO_COLOR": "1"},
            check=False,
        )
        assert done.returncode == 2
        assert done.stderr.startswith(message)
