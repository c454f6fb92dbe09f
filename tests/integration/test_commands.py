"""What README.md, CONTRIBUTING.md and docs/ say to type is typed here, as it stands there."""

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from deepfm_dist.config import BUNDLE
from deepfm_dist.data.dataset import PreparedDataset

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
MAKE = ["make", "-C", str(ROOT), f"VENV={sys.prefix}", "VARIANT=cpu", "-o", f"{sys.prefix}/.cpu"]

SERVED = r"""
answers() { python -c 'from urllib.request import urlopen; urlopen("http://127.0.0.1:8765/")'; }
for _ in $(seq 300); do answers 2>/dev/null && break; sleep 0.2; done
answers
kill $server
"""
NOT_AS_TYPED = [
    # Shorter, that is all: fewer steps, and two ranks where the block before has shown four.
    (r"(-m deepfm_dist\.(?:train|\$command)\b[^&\n]*)", r"\1 trainer.max_steps=20 "),
    (r"(notebook_reference\.py [^\n]*)", r"\1 --epochs 1"),
    (r"(first_order_tables\.py [^\n]*)", r"\1 --seeds 1 trainer.max_steps=5"),
    (r"--nproc_per_node=4 (.* --config)", r"--nproc_per_node=2 \1"),
    # test_wheel.py runs the demo to its end.
    (r"^make demo$", "make demo ARGS=--help"),
    # This very test runs in them, or they make another environment, or they change the tree or the
    # environment under the running tests: make says what it would do.
    (r"^make (test|check|bench|format|clean|VARIANT=|PYTHON=)", r"make -n \1"),
    (r"^pip install .*$", ""),
    # It serves until it is told to stop.
    (r"^(python -m deepfm_dist\.serve\b.*)$", r"\1 --port 8765 &\nserver=$!\n" + SERVED),
    # An hour, two environments and GPUs.
    (r"^benchmarks/rivals/build\.sh", "test -x benchmarks/rivals/build.sh"),
    (r"(benchmarks/(?:training|reading)\.py)[^\n]*", r"\1 --help"),
    (r"(benchmarks/serving\.py) --shape \w+", r"\1 --seconds 1 --rate 20"),
    # What stands in for the reader's own.
    (r"my\.yaml", "mine.yaml"),
    (r"--output /models", "--output models"),
    (r"(deepfm_dist\.plan\b.*)mine\.yaml", r"\1sample"),  # other tables than the shop's
    (r"^export DEEPFM_DATA=.*$", ""),
]
# Hours of work, other people's data or a GPU: options and settings are checked, no more.
NOT_RUN = ("docs/catalogue.md", "docs/quality.md", "docs/tuning.md")
ONLY_CHECKED = [
    (r"(-m deepfm_dist\.\w+[^&\n]*)", r"\1 --print-config >/dev/null "),
    (r"(benchmarks/\w+\.py) [^\n]*", r"\1 --help >/dev/null"),
]


@dataclass(frozen=True)
class Block:
    """Commands of a document, and where they stand."""

    where: str
    text: str

    @property
    def needs_real_data(self) -> bool:
        if self.where.partition(":")[0] in NOT_RUN:
            return False
        names = re.findall(r"--config (\w+)", self.text)
        files = [BUNDLE / "configs" / f"{name}.yaml" for name in names]
        return any("${DEEPFM_DATA}" in f.read_text() for f in files if f.is_file())

    @property
    def script(self) -> str:
        text = self.text.replace("\\\n", " ")
        only_checked = self.where.partition(":")[0] in NOT_RUN
        for pattern, instead in ONLY_CHECKED if only_checked else NOT_AS_TYPED:
            text = re.sub(pattern, instead, text, flags=re.M)
        return f'set -eo pipefail\nmake() {{ {shlex.join(["command", *MAKE])} "$@"; }}\n{text}'


SHELL = (
    r"^```sh\n(?P<fenced>(?s:.*?))^```$|^```\w*\n(?s:.*?)^```$|(?P<indented>(?:^ {4}\S.*\n)+)"
    r"|`(?P<inline>(?:make|python -m|torchrun[^`\n]* -m) [^`\n]+)`"
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


ELSEWHERE = {"docs/import.md"}  # tests/test_notebook.py, with state dicts that fit
PAGES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))
OF_ROOT = blocks_of("README.md", "CONTRIBUTING.md")
[NEW_DAY] = [b for b in blocks_of("docs/training.md") if "start_from=" in b.text]
KNOWN = {NEW_DAY.text} | {block.text for block in OF_ROOT}
OF_DOCS = [
    block
    for block in blocks_of(*(page for page in PAGES if page not in ELSEWHERE))
    if block.text not in KNOWN
]
BLOCKS = [*OF_ROOT, *OF_DOCS]
[OWN_DATA] = [b for b in OF_ROOT if "--config mine.yaml" in b.text]
[SAMPLE] = [b for b in OF_DOCS if b.where.startswith("docs/quickstart.md") and "activate" in b.text]
Done = tuple[Path, "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def typed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Block], Done]:
    """Runs a block, once, in a folder that holds nothing but what the document says is there.

    What a page of docs/ says goes on from one's own data, or from the sample's run.
    """

    @functools.cache
    def typed(block: Block) -> Done:
        home = tmp_path_factory.mktemp("home")
        if block in OF_DOCS and block != SAMPLE:
            earlier, _ = typed(OWN_DATA if "mine.yaml" in block.script else SAMPLE)
            shutil.copytree(earlier, home, symlinks=True, dirs_exist_ok=True)
            return home, run(["bash", "-c", block.script], home)
        (home / ".venv/bin").mkdir(parents=True)
        (home / ".venv/bin/activate").write_text(f"PATH={shlex.quote(str(BIN))}:$PATH\n")
        (home / "benchmarks").symlink_to(ROOT / "benchmarks")
        if block == OWN_DATA:
            write_shop(home)
        return home, run(["bash", "-c", block.script], home)

    return typed


def write_shop(home: Path) -> None:
    """The README's configuration of one's own data, and files that fit it."""
    [config] = re.findall(r"^```yaml\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    (home / "mine.yaml").write_text(config.replace("/data/shop", str(home / "shop")))
    (home / "shop").mkdir()
    rng = np.random.default_rng(1)
    articles = pd.DataFrame({"article": [f"a{i}" for i in range(50)]})
    articles["brand"] = [f"b{i % 7}" for i in range(50)]
    articles["tags"] = [f"t{i % 3}|t{i % 5}" for i in range(50)]
    articles.to_parquet(home / "shop/articles.parquet")
    orders = pd.DataFrame({"customer": np.repeat(np.arange(80), 10)})
    orders["article"] = [f"a{int(50 * x * x)}" for x in rng.random(800)]
    orders["ordered_at"] = pd.Timestamp("2026-01-01") + pd.to_timedelta(rng.random(800) * 365, "D")
    orders["device"] = rng.choice(["phone", "desk"], 800)
    orders.to_csv(home / "shop/orders.csv", index=False)
    (home / "rows.csv").write_text("customer,article,device\n7,a1,phone\nnobody,a2,desk\n")


def run(command: list[str], cwd: Path) -> "subprocess.CompletedProcess[str]":
    environment = {
        **os.environ,
        "MAKEFLAGS": "",  # what the make that runs the tests was told
        "PATH": f"{BIN}:{os.environ['PATH']}",
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


def test_a_run_leaves_what_the_readme_names(typed: Callable[[Block], Done]) -> None:
    home, done = typed(OWN_DATA)
    assert done.returncode == 0, done.stderr
    assert "sharding plan on 2 x cpu" in done.stderr
    assert "popularity" in done.stdout
    assert "2 rows scored" in done.stdout
    assert "1 ids were never seen in training" in done.stderr
    run_dir = home / "runs/mine"
    assert {p.name for p in run_dir.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "export",
        "metrics.jsonl",
        "plan.json",
        "recommendations.csv",
        "recommendations.parquet",
        "report.html",
        "similar_items.csv",
        "similar_items.parquet",
        "tensorboard",
    }
    assert (run_dir / "recommendations.csv").read_text().startswith("user,item\n")
    recommended = pq.read_table(run_dir / "recommendations.parquet")
    assert recommended.column_names == ["user_id", "item_id", "score", "rank"]
    assert recommended.num_rows == 80 * 20
    events = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert {e["event"] for e in events[:-1]} == {"train", "valid", "end"}
    assert events[-1]["event"] == "evaluate"


@pytest.mark.slow  # five starts
def test_a_new_day_is_learned_on_top_of_yesterday(typed: Callable[[Block], Done]) -> None:
    home, _ = typed(OWN_DATA)
    today = pd.read_csv(home / "shop/orders.csv").query("customer >= 40").head(300)
    today["ordered_at"] = "2027-01-01"
    newcomer = today.iloc[:4].assign(customer=1000, article=["a1", "a2", "a3", "new"])
    pd.concat([today, newcomer]).to_csv(home / "shop/today.csv", index=False)
    done = run(["bash", "-c", NEW_DAY.script], home)
    assert "ConfigError: checkpoint.start_from=runs/mine: its model has embedding_dim=32, n" in (
        done.stderr
    )
    done = run(["bash", "-c", f"{NEW_DAY.script} model.embedding_dim=32"], home)
    assert done.returncode == 0, done.stderr
    assert "training starts from its weights" in done.stderr
    rows, tables = {}, {}
    for name in ("mine", "today"):
        command = ["python", "-m", "deepfm_dist.export", "--config", "mine.yaml"]
        done = run([*command, f"run.name={name}"], home)
        assert done.returncode == 0, done.stderr
        ids = PreparedDataset(home / "prepared" / name).entity_ids("user").to_pylist()
        rows[name] = {user: row for row, user in enumerate(ids)}
        tables[name] = load_file(home / "runs" / name / "export/model.safetensors")["tables.user"]
    before, after = tables["mine"], tables["today"]
    assert len(after) > len(before)
    assert rows["mine"].items() <= rows["today"].items()
    seen = [rows["mine"][str(user)] for user in today["customer"].unique()]
    others = [row for user, row in rows["mine"].items() if user and int(user) < 40]
    assert (after[others] == before[others]).all()
    assert (after[seen] != before[seen]).any(1).all()


def test_the_doctor_says_what_it_found_and_nothing_else(
    typed: Callable[[Block], Done],
) -> None:
    [block] = [b for b in BLOCKS if b.text == "python -m deepfm_dist.doctor"]
    _, done = typed(block)
    assert done.stdout.endswith("no problems found\n")
    assert done.stderr == ""


def test_asking_for_another_model_than_was_trained_is_refused(
    typed: Callable[[Block], Done],
) -> None:
    home, _ = typed(OWN_DATA)
    command = ["python", "-m", "deepfm_dist.recommend", "--config", "mine.yaml"]
    done = run([*command, "model.embedding_dim=8"], home)
    assert done.returncode == 2
    assert "embedding_dim=8" in done.stderr
    assert "was trained with 32" in done.stderr


def test_a_mistake_on_every_rank_is_said_once(typed: Callable[[Block], Done]) -> None:
    home, _ = typed(OWN_DATA)
    command = ["torchrun", "--nproc_per_node=2", "-m", "deepfm_dist.train", "--config", "mine.yaml"]
    done = run([*command, "trainer.batch_size=1"], home)
    assert done.returncode != 0
    said = [x for x in done.stderr.splitlines() if x.startswith("ConfigError: a batch of 1 rows")]
    assert len(said) == 1
    # The earlier run is untouched.
    assert list((home / "runs/mine/checkpoints").glob("step_*/state.json"))
