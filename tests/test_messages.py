"""Messages read right for one thing as for many."""

import ast
import re
from pathlib import Path

import deepfm_dist
from deepfm_dist.messages import plural

NOUNS = "rows|users|items|lines|ranks|tables|tensors|trials|pairs|parts|positives|cells|files|steps"
COUNTED = re.compile(rf"(?<!of )(…|%[sd]) (?:held-out |training |damaged )?({NOUNS})\b")
NEVER_ONE = (
    "model.embedding_dim=…: … rows of tables take",  # more than the machine's memory
    "…: … matches … files; name one",
    "…: holds … files, and only a zip",
    "%s, line %d: a quoted cell spans %d lines",
    "%s in %.2f s: %s pairs/s",
    "candidates=… cannot give k=… items",
    "…: … does not apply to … files",
    "it starts like a … file",
    "…: not readable: it starts like a … file",
    "a batch of … over … ranks",
    "sharding.tables.….kind=…: … cut over … ranks",
    "…: no value has min_count=… training rows",  # one training row is enough for 1
    "… training rows are too many to divide",
    "the tables do not fit … ranks",
    "embedding.weight has … rows, the",
    "evaluate.baselines: ",
    "Each point is one of … bins of about … rows",
    "NE … on … rows",  # the name of a split
    "… rows",
    "rows of items with fewer than",
    "rows of users with fewer than",
    "… rows of …s without",  # the name of a file
    "… positives",  # the name of a column
)
"""Beginnings of messages whose placeholder is above one, or is no number."""


def test_a_count_is_followed_by_its_noun_in_the_right_number() -> None:
    assert plural(1, "row") == "1 row"
    assert plural(0, "row") == "0 rows"
    assert plural(2000, "row") == "2,000 rows"
    assert plural(3, "process", "processes") == "3 processes"


def test_no_message_puts_a_plural_behind_a_count_that_may_be_one() -> None:
    wrong = [
        f"{path}: {text}"
        for path in sorted(Path(deepfm_dist.__file__).parent.rglob("*.py"))
        for text in _texts(ast.parse(path.read_text()))
        if COUNTED.search(text) and not text.startswith(NEVER_ONE)
    ]
    assert wrong == [], "use messages.plural"


def _texts(tree: ast.AST) -> list[str]:
    """Texts with … or a % conversion for what is filled in."""
    parts = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in node.values
    }
    texts = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            literal = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
            texts.append("".join(map(str, literal)))
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts
        ):
            texts.append(node.value)
    return texts
