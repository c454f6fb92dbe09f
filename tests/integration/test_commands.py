"""Runs the commands of README.md, CONTRIBUTING.md and docs/ as they are written there."""

import argparse
import contextlib
import gzip
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml
from packaging.requirements import Requirement
from safetensors.numpy import load_file

from deepfm_dist.bundle import BUNDLE
from deepfm_dist.data.dataset import PreparedDataset

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
MAKE = ["make", "-C", str(ROOT), f"VENV={sys.prefix}", "VARIANT=cpu"]
for stamp in (".cpu", ".cpu-dev"):  # what is installed stays as it is
    MAKE += ["-o", f"{sys.prefix}/{stamp}"]

SERVED = r"""
answers() { python -c 'from urllib.request import urlopen; urlopen("http://127.0.0.1:8765/")'; }
for _ in $(seq 300); do answers 2>/dev/null && break; sleep 0.2; done
answers
kill $server
"""
NOT_AS_TYPED = [
    # Smaller, that is all: fewer steps and trials, less data, a narrower model where the page's is
    # large, and two ranks where the block before has shown four.
    (r"(-m deepfm_dist\.(?:train|\$command)\b[^&\n]*)", r"\1 trainer.max_steps=20 "),
    (r"(-m deepfm_dist\.tune\b[^\n]*)", r"\1 tune.trials=1 trainer.max_steps=20"),
    (r"(--config avazu_x4)", r"\1 model.over_arch_layer_sizes=[8]"),
    (r"(benchmarks/catalogue\.py [^\n]*)", r"\1 --seconds 0.5 --users 64 --items 512"),
    (r"(benchmarks/first_light\.py)( --device cpu)?", r"\1 --device cpu --only placement"),
    (r"^(python benchmarks/compiled_kernels\.py)", r"env -u TRITON_INTERPRET \1"),
    (r"(notebook_reference\.py [^\n]*)", r"\1 --epochs 1"),
    (r"(first_order_tables\.py [^\n]*)", r"\1 --seeds 1 trainer.max_steps=5"),
    (r"(benchmarks/prepare\.py --rows) \w+", r"\1 1000"),
    (r"(benchmarks/quality\.py [^\n]*)", r"\1 --rows small.yaml"),
    (r"(benchmarks/targets\.py)[^`\n]*", r"\1 --rows 3000 --seeds 1 max_steps=5"),
    (r"(benchmarks/reading\.py)[^\n]*", r"\1 --steps 1 --files speed/data"),
    (r"(benchmarks/serving\.py) --shape \w+", r"\1 --seconds 1 --rate 20"),
    (r"(benchmarks/training\.py .*)", r"\1 --steps 5 --folder speed"),
    (r"--nproc_per_node=4 (.* --config)", r"--nproc_per_node=2 \1"),
    # test_wheel.py runs the demo to its end.
    (r"^make demo$", "make demo ARGS=--help"),
    # This very test runs in them, or they make another environment, or they change the tree or the
    # environment under the running tests: make says what it would do.
    (
        r"^((?:\w+=\w+ )?)make (test|check|coverage|bench|format|clean|VARIANT=|PYTHON=)",
        r"\1make -n \2",
    ),
    (r"^pip install .*$", ""),
    # tests/launch/test_spark.py, tests/launch/test_ray.py
    (r"^(python launch/|spark-submit |ray job submit ).*$", ""),
    # Compilers: tests/jobs/test_export.py.
    (r"^(.*--format aoti|torch=|g\+\+ |    -L\$torch).*$", ""),
    # It serves until SIGTERM.
    (r"^(python -m deepfm_dist\.serve\b.*)$", r"\1 --port 8765 &\nserver=$!\n" + SERVED),
    # An hour and two environments; GPUs.
    (r"^ *benchmarks/rivals/build\.sh.*$", "bash -n benchmarks/rivals/build.sh"),
    (r"^.*benchmarks/training\.py .*--device cuda.*$", ""),
    # What stands in for the reader's own.
    (r"my\.yaml", "mine.yaml"),
    (r"--output /models", "--output models"),
    (  # other tables than the shop's
        r"(deepfm_dist\.plan\b.*)mine\.yaml",
        r"\1sample 'data.features=[{name: user, entity: user}, {name: item, entity: item},"
        r" {name: genre, entity: item, file: genres.tsv}]'",
    ),
    (r"^export DEEPFM_DATA=.*$", ""),
]
# Their data sets are stood in for by files of the same formats, small enough for closed forms.
SMALL_DATA = ("docs/catalogue.md", "docs/quality.md", "docs/quality-notes.md")
TYPED_ELSEWHERE = {
    "docs/import.md": "tests/interop/test_notebook.py, with state dicts that fit",
    "docs/api.md": "no commands: what stands there are options of mkdocstrings",
}
NOT_TYPED = {
    r"docs/launch.md: ((\w+=\w+ )*launch/|sbatch|kubectl|docker|torchx|cp .torchx)": "tests/launch",
    r"docs/nightly.md: (day=|(COMMAND=\w+ (CONFIG=\S+ )?)?launch/)": "tests/launch",
    r"docs/nightly.md: (deepfm|torchrun|Model.load)": "tests/jobs/test_nightly.py",
    r"docs/tuning.md: deepfm tune": "tests/training/test_tune_workers.py",
    r"docs/install.md: docker": "no engine at hand",
    r"docs/spark.md: (python launch/|spark-submit)": "tests/launch/test_spark.py",
    r"docs/(ray|launch).md: (python launch/|ray job submit)": "tests/launch/test_ray.py",
    r"docs/launch.md: (sysctl|scontrol)": "the system's own, as root",
    r"\S+ (python )?benchmarks/\w+\.py": "minutes; their parsers are asked, below",
    r"\S+ pip install": "changes the environment under the running tests; see below",
    r"\S+ (pre-commit install|python docs/configuration\.py)": "changes the tree under them",
    r"\S+ (python -m|torchrun --max-restarts=3)$": "no whole command",
}
"""Commands that are not typed here, after the name of their page, and why not, or where."""


@dataclass(frozen=True)
class Block:
    """Commands of a document, and where they stand."""

    where: str
    text: str

    @property
    def page(self) -> str:
        return self.where.partition(":")[0]

    @property
    def needs_real_data(self) -> bool:
        names = re.findall(r"--config (\w+)", self.text)
        files = [BUNDLE / "configs" / f"{name}.yaml" for name in names]
        real = any("${DEEPFM_DATA}" in f.read_text() for f in files if f.is_file())
        return real and self.page not in SMALL_DATA

    @property
    def script(self) -> str:
        text = self.text.replace("\\\n", " ")
        if self.page != "README.md":
            text = text.replace("--nproc_per_node=4", "--nproc_per_node=2")
        for pattern, instead in NOT_AS_TYPED:
            text = re.sub(pattern, instead, text, flags=re.M)
        return f'set -eo pipefail\nmake() {{ {shlex.join(["command", *MAKE])} "$@"; }}\n{text}'


SHELL = (
    r"^```sh\n(?P<fenced>(?s:.*?))^```$|^```\w*\n(?s:.*?)^```$|(?P<indented>(?:^ {4}\S.*\n)+)"
    r"|`(?P<inline>(?:[A-Z_]+=\w+ )*(?:make|python -m|python benchmarks/\w+\.py"
    r"|torchrun[^`\n]* -m) [^`\n]+)`"
)


def blocks_of(*documents: str) -> list[Block]:
    """Fenced and indented shell blocks, and commands between backticks; each text once."""
    found = {}
    for document in documents:
        text = (ROOT / document).read_text()
        for m in re.finditer(SHELL, text, re.M):
            if m.lastgroup is None:  # a block of something else
                continue
            commands = re.sub("^ +(?=make)", "", m[m.lastgroup], flags=re.M)
            # Lines of make stand alone; others go on where the one before has ended.
            alone = all(line.startswith("make") for line in commands.splitlines())
            for number, command in enumerate(commands.splitlines() if alone else [commands]):
                line = text[: m.start()].count("\n") + 1 + bool(m["fenced"]) + number
                command = re.sub(r"\s+#.*$", "", command, flags=re.M).strip()
                found.setdefault(command, Block(f"{document}:{line}", command))
    return list(found.values())


PAGES = ["data/README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))]
ALL_TEXT = "\n".join((ROOT / p).read_text() for p in ["README.md", "CONTRIBUTING.md", *PAGES])
OF_ROOT = blocks_of("README.md", "CONTRIBUTING.md")
[NEW_DAY] = [b for b in blocks_of("docs/training.md") if "start_from=" in b.text]
KNOWN = {NEW_DAY.text} | {block.text for block in OF_ROOT}
OF_DOCS = [
    block
    for block in blocks_of(*(page for page in PAGES if page not in TYPED_ELSEWHERE))
    if block.text not in KNOWN
]
BLOCKS = [*OF_ROOT, *OF_DOCS]
[OWN_DATA] = [b for b in OF_ROOT if "--config mine.yaml" in b.text]
[SAMPLE] = [b for b in OF_DOCS if b.where.startswith("docs/quickstart.md") and "activate" in b.text]
Done = tuple[Path, "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def typed(
    tmp_path_factory: pytest.TempPathFactory, forked: dict[str, str]
) -> Callable[[Block], Done]:
    """Runs a block, once, in a folder that holds nothing but what the document says is there.

    What a page of docs/ says goes on from one's own data, or from the sample's run. The sample's
    commands are new interpreters; the others are forked, which saves minutes of imports.
    """
    programs = Path(forked["PYTHON_EXEC"]).parent

    @cache
    def typed(block: Block) -> Done:
        home = tmp_path_factory.mktemp("home")
        if block in OF_DOCS and block != SAMPLE:
            earlier, _ = typed(OWN_DATA if "mine.yaml" in block.script else SAMPLE)
            shutil.copytree(earlier, home, symlinks=True, dirs_exist_ok=True)
        else:
            (home / ".venv/bin").mkdir(parents=True)
            path = str(BIN) if block == SAMPLE else f"{programs}:{BIN}"
            (home / ".venv/bin/activate").write_text(f"PATH={shlex.quote(path)}:$PATH\n")
            (home / "benchmarks").symlink_to(ROOT / "benchmarks")
            (home / "speed").mkdir()
            (home / "speed/data").symlink_to(BUNDLE / "data/sample")
        if block == OWN_DATA:
            write_shop(home)
        if block.page == "docs/tuning.md":
            with (home / "mine.yaml").open("a") as file:
                file.write(yaml_of("docs/tuning.md"))
        variables = {} if block == SAMPLE else forked
        if block.page in SMALL_DATA:
            write_small_data(home)
            variables = variables | {"DEEPFM_DATA": str(home / "small")}
        return home, run(["bash", "-c", block.script], home, **variables)

    return typed


def yaml_of(page: str) -> str:
    """The one YAML block of a page."""
    [found] = re.findall(r"^```yaml\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)
    return str(found)


def write_small_data(home: Path) -> None:
    """The sample as the data sets of `SMALL_DATA`, invented clicks, and rows of quality.yaml."""
    sample, small = BUNDLE / "data/sample", home / "small"
    ratings = pd.read_csv(sample / "train_ratings.csv")
    genres, titles = (pd.read_csv(sample / f"{n}.tsv", sep="\t") for n in ("genres", "titles"))

    shutil.copytree(sample, small / "aistages")
    held_out = ratings.index % 10 == 0
    ratings[~held_out].to_csv(small / "aistages/train_ratings.csv", index=False)
    ratings[held_out].to_csv(small / "aistages/heldout_valid.csv", index=False)
    for name in ("director", "writer"):
        file = small / f"aistages/{name}s.tsv"
        genres.set_axis(["item", name], axis=1).to_csv(file, sep="\t", index=False)

    (small / "ml-1m-m1").mkdir()
    for name, rows in (("train", ratings[~held_out]), ("test", ratings[held_out])):
        rows[["user", "item"]].to_csv(small / f"ml-1m-m1/{name}.csv", index=False)

    movielens = small / "ml-latest-small"
    movielens.mkdir()
    rated = ratings.set_axis(["userId", "movieId", "timestamp"], axis=1).assign(rating=5)
    rated.to_csv(movielens / "ratings.csv", index=False)
    films = titles.assign(genres=titles["item"].map(genres.groupby("item")["genre"].agg("|".join)))
    films.set_axis(["movieId", "title", "genres"], axis=1).to_csv(movielens / "movies.csv")

    rng = np.random.default_rng(1)
    clicks = rng.integers(0, 30, (2000, 24)).astype(str)
    clicks[:, 0] = rng.integers(0, 2, 2000)
    (small / "frappe-x1").mkdir()
    lines = [" ".join([row[0], *(f"{index}:1" for index in row[1:11])]) for row in clicks]
    for name in ("train", "valid"):
        with gzip.open(small / f"frappe-x1/{name}.libsvm.gz", "wt") as packed:
            packed.write("\n".join(lines) + "\n")
    (small / "avazu_x4").mkdir()
    fields = yaml.safe_load((BUNDLE / "configs/avazu_x4.yaml").read_text())["data"]["features"]
    columns = ["click", *(f["name"] for f in fields if f["name"] not in ("weekday", "weekend"))]
    frame = pd.DataFrame(clicks[:, : len(columns)], columns=columns)
    frame["hour"] = [f"141021{k % 24:02}" for k in range(len(frame))]
    for name in ("train", "valid", "test"):
        frame.to_csv(small / f"avazu_x4/{name}.csv", index=False)

    tables = yaml.safe_load((ROOT / "benchmarks/quality.yaml").read_text())
    for table in tables:
        row = {k: v for k, v in table["rows"][-1].items() if k != "mean_of"}
        few = [o for o in row.get("evaluate", []) if "baselines" not in o]  # implicit is an extra
        steps = [*row.get("overrides", []), "trainer.max_steps=2"]
        table["rows"] = [row | {"overrides": steps, "evaluate": few, "seeds": [1]}]
    (home / "small.yaml").write_text(yaml.safe_dump(tables))


def write_shop(home: Path) -> None:
    """The README's configuration as printed, but for its folder, and files that fit."""
    config = yaml_of("README.md")
    assert "/data/shop" in config
    (home / "mine.yaml").write_text(config.replace("/data/shop", str(home / "shop")))
    (home / "shop").mkdir()
    rng = np.random.default_rng(1)
    articles = pd.DataFrame({"article": [f"a{i}" for i in range(55)]})  # five are new
    articles["brand"] = [f"b{i % 7}" for i in range(55)]
    articles["tags"] = [f"t{i % 3}|t{i % 5}" for i in range(55)]
    articles.to_parquet(home / "shop/articles.parquet")
    orders = pd.DataFrame({"customer": np.repeat(np.arange(80), 10)})
    orders["article"] = [f"a{int(50 * x * x)}" for x in rng.random(800)]
    orders["ordered_at"] = pd.Timestamp("2026-01-01") + pd.to_timedelta(rng.random(800) * 365, "D")
    orders.to_csv(home / "shop/orders.csv", index=False)
    (home / "rows.csv").write_text("customer,article\n7,a1\nnobody,a2\n")
    with contextlib.chdir(home):
        exec(python_of("docs/requests.md"), {"pd": pd})


def python_of(page: str) -> str:
    """The first Python block of a page."""
    return str(re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)[0])


def run(command: list[str], cwd: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        **variables,
        "MAKEFLAGS": "",  # options of the make that runs the tests
        "ARGS": "",
        "PET_STANDALONE": "1",  # torchrun --standalone: another launch may hold the default port
        "COVERAGE_FILE": str(cwd / ".coverage"),
    }
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    "block",
    [
        *(b for b in OF_ROOT if not b.needs_real_data),
        # Many commands, each a start, or data of some size.
        *(pytest.param(b, marks=pytest.mark.slow) for b in OF_ROOT if b.needs_real_data),
        *(pytest.param(b, marks=pytest.mark.slow) for b in OF_DOCS),
    ],
    ids=lambda block: block.where,
)
def test_what_the_documents_say_to_type_works(
    block: Block, typed: Callable[[Block], Done], request: pytest.FixtureRequest
) -> None:
    if block.needs_real_data:
        request.getfixturevalue("real_data")
    _, done = typed(block)
    assert done.returncode == 0, f"{block.script}\n{done.stdout}\n{done.stderr}"


def commands_of(document: str) -> set[str]:
    """Lines of code, fenced, indented or between backticks, that begin with a program's name."""
    programs = (
        "python3?|torchrun|make|pip|pre-commit|torchx|sbatch|kubectl|docker|cp|sysctl|scontrol"
    )
    command = rf"(?:[A-Z_]+=\S+ )*(?:(?:{programs}) |(?:benchmarks|launch)/\w+[^ ]*\.(?:sh|py) )\S"
    text = (ROOT / document).read_text().replace("\\\n", " ")
    fences = r"^```(\w*)\n(.*?)^```$"
    shell = [code for kind, code in re.findall(fences, text, re.M | re.S) if kind in ("", "sh")]
    prose = re.sub(fences, "", text, flags=re.M | re.S)
    lines = [line for code in shell for line in code.splitlines()]
    lines += re.findall(r"^ {4}(\S.*)$", prose, re.M) + re.findall(r"`([^`\n]+)`", prose)
    return {re.sub(r"\s+#.*$", "", line).strip() for line in lines if re.match(command, line)}


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", *PAGES])
def test_every_command_is_typed_or_has_a_reason_not_to_be(document: str) -> None:
    if document in TYPED_ELSEWHERE:
        return
    scripts = [b.text.replace("\\\n", " ") for b in [*BLOCKS, NEW_DAY]]
    known = {line.strip() for script in scripts for line in script.splitlines()}
    left = (f"{document}: {command}" for command in commands_of(document) - known)
    assert [command for command in left if not re.match("|".join(NOT_TYPED), command)] == []


class Understood(Exception):
    """A parser has read its arguments."""


def test_benchmarks_know_the_options_that_pages_give_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def only(parse: Callable[..., object]) -> Callable[..., None]:
        def parsed(parser: argparse.ArgumentParser, *arguments: object) -> None:
            raise Understood(parse(parser, *arguments))

        return parsed

    for name in ("parse_args", "parse_intermixed_args"):
        way = getattr(argparse.ArgumentParser, name)
        monkeypatch.setattr(argparse.ArgumentParser, name, only(way))
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    found = re.findall(r"benchmarks/(\w+\.py) ([-\w][^`#\n]*)", ALL_TEXT)
    assert len(found) > 15
    for script, options in found:
        words = shlex.split(options.replace("--rows N", "--rows 1"))
        monkeypatch.setattr(sys, "argv", [script, *words])
        with pytest.raises(Understood):
            runpy.run_path(str(ROOT / "benchmarks" / script), run_name="__main__")


def test_requirements_of_pip_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    known = {"deepfm-dist": {*extras}}
    for requirement in (Requirement(r) for name in extras for r in extras[name]):
        known[requirement.name] = requirement.extras
    lines = re.findall(r"pip install ([^`\n]+)", ALL_TEXT)
    words = [word for line in lines for word in shlex.split(line, comments=True)]
    files = [word for word in words if word.startswith("requirements/")]
    assert [file for file in files if not (ROOT / file).is_file()] == []
    rest = [w for w in words if w not in (*files, "-e", "-r", "--no-deps", ".")]
    wanted = [Requirement(re.sub(r"^(\.|dist/.*\.whl)\[", "deepfm-dist[", w)) for w in rest]
    assert len(wanted) > 5
    assert [r for r in wanted if not r.extras <= known[r.name]] == []


def test_a_run_leaves_what_the_readme_names(typed: Callable[[Block], Done]) -> None:
    home, done = typed(OWN_DATA)
    assert done.returncode == 0, done.stderr
    assert "sharding plan on 2 x cpu" in done.stderr
    assert "popularity" in done.stdout
    assert "2 rows scored" in done.stdout
    assert re.search(r"1 of 2 values were never seen in training", done.stderr)
    run_dir = home / "runs/mine"
    assert {p.name for p in run_dir.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "export",
        "metrics.jsonl",
        "plan.json",
        "recommendations.csv",
        "recommendations.parquet",
        "refit",
        "report.html",
        "selected",
        "similar_items.csv",
        "similar_items.parquet",
        "tensorboard",
    }
    assert (run_dir / "recommendations.csv").read_text().startswith("user,item\n")
    recommended = pq.read_table(run_dir / "recommendations.parquet")
    assert recommended.column_names == ["user_id", "item_id", "score", "rank"]
    assert recommended.num_rows == 80 * 20
    events = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert {e["event"] for e in events[:-2]} == {"train", "valid", "end"}
    assert [e["event"] for e in events[-2:]] == ["evaluate", "recommend"]


@pytest.mark.slow  # five starts
def test_a_new_day_is_learned_on_top_of_yesterday(
    typed: Callable[[Block], Done], forked: dict[str, str]
) -> None:
    home, _ = typed(OWN_DATA)
    today = pd.read_csv(home / "shop/orders.csv").query("customer >= 40").head(300)
    today["ordered_at"] = "2027-01-01"
    newcomer = today.iloc[:4].assign(customer=1000, article=["a1", "a2", "a3", "new"])
    pd.concat([today, newcomer]).to_csv(home / "shop/today.csv", index=False)
    done = run(["bash", "-c", f"{NEW_DAY.script} model.embedding_dim=16"], home, **forked)
    assert "ConfigError: checkpoint.start_from=runs/mine: its model has embedding_dim=64, n" in (
        done.stderr
    )
    rate = 1e-6
    script = f"{NEW_DAY.script} trainer.max_steps=1 optimizer.tables.lr={rate}"
    done = run(["bash", "-c", script], home, **forked)
    assert done.returncode == 0, done.stderr
    assert "training starts from its weights" in done.stderr
    rows, tables = {}, {}
    for name in ("mine", "today"):
        command = ["python", "-m", "deepfm_dist.export", "--config", "mine.yaml"]
        # The loop's own checkpoint: what is made from it later has EASE's columns too.
        done = run([*command, f"run.name={name}", "checkpoint.use=best"], home, **forked)
        assert done.returncode == 0, done.stderr
        ids = PreparedDataset(home / "prepared" / name).entity_ids("user").to_pylist()
        rows[name] = {user: row for row, user in enumerate(ids)}
        tables[name] = load_file(home / "runs" / name / "export/model.safetensors")["tables.user"]
    before, after = tables["mine"], tables["today"]
    assert len(after) > len(before)
    assert rows["mine"].items() <= rows["today"].items()
    seen = [rows["mine"][str(user)] for user in today["customer"].unique()]
    others = [row for user, row in rows["mine"].items() if user and int(user) < 40]
    assert (after[seen] != before[seen]).any(1).all()
    # Rows are where yesterday's training left them, up to the one step that Adam has taken.
    assert np.abs(after[others] - before[others]).max() < 4 * rate < before[others].std() / 1_000


def test_the_doctor_reports_only_its_findings(
    typed: Callable[[Block], Done],
) -> None:
    [block] = [b for b in BLOCKS if b.text == "python -m deepfm_dist.doctor"]
    _, done = typed(block)
    assert done.stdout.endswith("no problems found\n")
    assert done.stderr == ""


def test_asking_for_another_model_than_was_trained_is_refused(
    typed: Callable[[Block], Done], forked: dict[str, str]
) -> None:
    home, _ = typed(OWN_DATA)
    command = ["python", "-m", "deepfm_dist.recommend", "--config", "mine.yaml"]
    done = run([*command, "model.embedding_dim=8"], home, **forked)
    assert done.returncode == 2
    assert "embedding_dim=8" in done.stderr
    assert "was trained with 64" in done.stderr


def test_an_error_on_every_rank_is_reported_once(
    typed: Callable[[Block], Done], forked: dict[str, str]
) -> None:
    home, _ = typed(OWN_DATA)
    command = ["torchrun", "--nproc_per_node=2", "-m", "deepfm_dist.train", "--config", "mine.yaml"]
    done = run(
        [*command, "trainer.batch_size=1", "run.name=tiny", "data.name=mine"], home, **forked
    )
    assert done.returncode != 0
    said = [x for x in done.stderr.splitlines() if "ConfigError: a batch of 1 " in x]
    assert len(said) == 1
    # The earlier run is untouched.
    assert list((home / "runs/mine/checkpoints").glob("step_*/state.json"))
