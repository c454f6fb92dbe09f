"""The documentation says what the code says."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("*.md"), ROOT / "data/README.md"])


def _text(node: ast.expr) -> str:
    """A string's text, with an ellipsis for each value that is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return "…"


def texts_of_errors() -> set[str]:
    """First arguments of everything that is raised, or reported by the doctor."""
    actual = set()
    for path in (ROOT / "deepfm_dist").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and node.args:
                name = getattr(node.func, "id", "")
                if name.endswith(
                    (
                        "Error",
                        "Problem",
                        "DoesNotFit",
                        "RankLost",
                        "InUse",
                        "NonFiniteLoss",
                        "OutOfMemory",
                    )
                ):
                    actual.add(_text(node.args[0]))
    return actual


TROUBLES = re.findall(r"^### `(.*)`$", (ROOT / "docs/troubleshooting.md").read_text(), re.M)


def test_every_trouble_is_one_that_the_code_can_raise() -> None:
    assert len(TROUBLES) > 20
    known = texts_of_errors()
    assert [text for text in TROUBLES if text not in known] == []


def test_the_configuration_page_is_that_of_the_code() -> None:
    path = ROOT / "docs/configuration.py"
    spec = importlib.util.spec_from_file_location("docs_configuration", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.TARGET.read_text() == module.page(), "run: python docs/configuration.py"


@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen, left = set(), [ROOT / "README.md"]
    while left:
        page = left.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
        left += [(page.parent / link).resolve() for link in links if "://" not in link]
    assert set((ROOT / "docs").glob("*.md")) <= seen


def test_the_site_builds_without_a_warning_and_without_the_network(tmp_path: Path) -> None:
    """mkdocs.yml is strict: a broken link, anchor or API reference, or a page left out, fails."""
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "in the nav" not in done.stderr  # pages that no menu leads to
    api = (tmp_path / "site/api.html").read_text()
    assert "Trains a DeepFM on data frames." in api
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert {path.stem for path in (tmp_path / "site").glob("*.html")} == pages | {"404"}
    loaded = re.compile(r"<(?:script|link|img)[^>]*(?:src|href)=\"?(https?:[^\" >]+)")
    for page in (tmp_path / "site").glob("*.html"):
        assert loaded.findall(page.read_text()) == [], page.name


def test_settings_that_the_pages_name_exist() -> None:
    known = set()
    section = ""
    for line in (ROOT / "docs/configuration.md").read_text().splitlines():
        if heading := re.match(r"#+ `(.*)`", line):
            section = heading[1]
        elif field := re.match(r"\| `(\w+)` \|", line):
            known.add(f"{section}.{field[1]}")
    roots = {name.partition(".")[0] for name in known}
    named = set()
    for document in DOCS:
        for name in re.findall(r"(?<![\w/.])([a-z_]+(?:\.[a-z_0-9]+)+)(?==)", document.read_text()):
            if name.partition(".")[0] in roots and document.name != "CHANGELOG.md":
                named.add(name)
    open_ended = ("recommend.context.", "sharding.tables.", "data.files.")
    assert {n for n in named - known if not n.startswith(open_ended)} == set()


FOREIGN = (
    "anew|mend|told|is said|so many|so often|whatever|beside|as a whole|but for|there are:|goes? on"
    "|hears?|heard|as it says|at hand|said of|is no number|afresh|stretch(?:es)?|somebody|likewise"
    "|in force"
)
"""Phrases that a native speaker would not write in technical English."""
ALLOWED = {
    "CHANGELOG.md": "its entries stay as they were published",
}
PROSE = [
    *DOCS,
    ROOT / "docs/configuration.py",
    *(
        path
        for folder in ("deepfm_dist", "benchmarks", "examples", "launch", "configs")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in (".py", ".sh", ".yaml", ".html")
    ),
]


def test_the_project_is_written_in_plain_english() -> None:
    """Names, messages, comments, help and pages; numbers as 0.157, not .157."""
    phrase = re.compile(rf"(?<![\w/])(?:{FOREIGN})(?!\w)|(?<=[ |(])\.\d+\b", re.IGNORECASE)
    complaints = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in PROSE
        if path.name not in ALLOWED
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if phrase.search(line)
    ]
    assert complaints == []
