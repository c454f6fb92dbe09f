"""Detects ids that differ only in notation: case, spaces, leading zeros and the like."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deepfm_dist.messages import nearest

_MOST_TEXTS = 10_000
"""Maximum number of unmatched texts to examine."""
_FEW_TEXTS = 100_000
"""Maximum number of known texts to search for similar ones."""


def _replace(pattern: str, replacement: str, texts: pa.Array) -> pa.Array:
    return pc.replace_substring_regex(texts, pattern=pattern, replacement=replacement)


_WAYS: tuple[tuple[str, Callable[[pa.Array], pa.Array]], ...] = (
    ("the spaces around them", pc.utf8_trim_whitespace),
    ("decimals of zero", partial(_replace, r"^(\s*-?\d+)\.0+(\s*)$", r"\1\2")),
    ("leading zeros", partial(_replace, r"^(\s*)0+(\d)", r"\1\2")),
    ("upper and lower case", pc.utf8_lower),
    ("the quotes around them", partial(_replace, r"""^\s*(["'`])(.*)["'`]\s*$""", r"\2")),
    ("characters that cannot be seen", partial(_replace, r"\p{Cf}", "")),
    ("Unicode's form", lambda texts: pc.utf8_normalize(texts, "NFKC")),
    ("separators between thousands", partial(_replace, r"(\d)[,_'](\d{3})", r"\1\2")),
)
_CANDIDATES = (
    r"^\s|\s$",
    r"\.0+\s*$",
    r"^\s*0+\d",
    r"\p{Lu}",
    r"^[\"'`].*[\"'`]$",
    r"\p{Cf}",
    r"[\x{FF01}-\x{FF5E}\x{00A0}\x{202F}\x{3000}]",  # full width, and spaces of other kinds
    r"^\d{1,3}(?:[,_']\d{3})+$",
)
"""Patterns of texts that each of `_WAYS` changes."""
_CASE = 3
SPELLED_OTHERWISE = "|".join(p for n, p in enumerate(_CANDIDATES) if n != _CASE)
"""Matches candidates of `written_twice`, apart from case."""


@dataclass(frozen=True)
class Difference:
    """How most texts differ from known ones that mean the same.

    Attributes:
        what: the difference, after "differ only in".
        count: number of texts examined.
        text: an example.
        known: the known text that it probably means.
    """

    what: str
    count: int
    text: str
    known: str

    def __str__(self) -> str:
        return f"{self.count:,} differ only in {self.what}: {self.text!r} and {self.known!r}"


def difference(texts: pa.Array, known: pa.Array) -> Difference | None:
    """How unmatched texts differ from known ones, if only in notation.

    Args:
        texts: distinct strings, none of them known.
        known: string.
    """
    texts, best = texts.drop_null()[:_MOST_TEXTS], None
    if len(texts) == 0 or len(known) == 0:
        return None
    alike = [texts, known]
    for what, way in (*_WAYS, ("the way they are written", None)):
        if way is None:  # all ways combined
            for _, each in _WAYS:
                alike = [each(side) for side in alike]
            ours, theirs = alike
        else:
            ours, theirs = way(texts), way(known)
        place = np.asarray(pc.index_in(ours, value_set=theirs).fill_null(-1))
        at = np.flatnonzero(place >= 0)
        if len(at) > (best.count if best else 0):
            some = texts.take(pa.array(at))
            first = int(at[pc.index(some, pc.min(some)).as_py()])
            pair = texts[first].as_py(), known[int(place[first])].as_py()
            best = Difference(what, len(at), *pair)
    return best


def suggest_known(known: pa.Array, value: str) -> str:
    """A hint for an unknown value: the most similar known value, or examples.

    Args:
        known: texts.
        value: not in ``known``.
    """
    if how := difference(pa.array([value]), known):
        return f"; did you mean {how.known!r}?"
    if len(known) <= _FEW_TEXTS:
        near = nearest(value, known.to_pylist())
        if near is not None:
            return f"; did you mean {near!r}?"
    return f"; it has {', '.join(known[:5].to_pylist())}" + (", ..." if len(known) > 5 else "")


def written_twice(some: pa.Array, texts: pa.Array, ignore_case: bool) -> Difference | None:
    """How some texts of a vocabulary differ from others that most likely mean the same.

    Args:
        some: string: the texts that match `SPELLED_OTHERWISE`, or all.
        texts: distinct strings.
        ignore_case: whether to treat upper and lower case as equal; ids such as YouTube's are
            case-sensitive.
    """
    best: Difference | None = None
    for number, ((what, way), pattern) in enumerate(zip(_WAYS, _CANDIDATES, strict=True)):
        if number == _CASE and not ignore_case:
            continue
        odd = some.filter(pc.match_substring_regex(some, pattern))[:_MOST_TEXTS]
        if len(odd) == 0:
            continue
        plain = way(odd)
        other = np.asarray(pc.and_(pc.not_equal(plain, odd), pc.is_in(plain, value_set=texts)))
        if other.sum() > (best.count if best else 0):
            differing = odd.filter(pa.array(other))
            first = pc.index(odd, pc.min(differing)).as_py()
            best = Difference(what, int(other.sum()), odd[first].as_py(), plain[first].as_py())
    return best


def check_join(
    source: str,
    keys: pa.Array | pa.ChunkedArray,
    wanted: pa.Array,
    others: pa.Array,
    entity: str,
    cure: str,
) -> str | None:
    """Compares the keys of a side file with the users or items of the rows.

    Args:
        source: the file and its key column, for messages.
        keys: string.
        wanted: ``[m]`` distinct ids of the training rows.
        others: other acceptable ids, such as an earlier dataset's.
        entity: user or item.
        cure: advice if nothing matches.

    Returns:
        A warning: few keys match, or ids are written in different ways.

    Raises:
        ValueError: no key matches.
    """
    distinct = pc.unique(keys).drop_null()
    if isinstance(distinct, pa.ChunkedArray):
        distinct = distinct.combine_chunks()
    is_known = pc.is_in(wanted, value_set=distinct)
    n_found, n = pc.sum(is_known).as_py() or 0, len(wanted)
    if n_found == n:
        return None
    missing = wanted.filter(pc.invert(is_known))
    how = difference(missing, distinct)
    if n_found == 0 and not pc.any(pc.is_in(others, value_set=distinct)).as_py():
        theirs, ours = (how.known, how.text) if how else (_least(distinct), _least(wanted))
        but = f", and {how.count:,} differ only in {how.what}" if how else ""
        raise ValueError(
            f"{source} has none of the {n:,} {entity}s of the training rows: it has {theirs!r} and "
            f"the rows have {ours!r}{but}; {'write them the same way' if how else cure}"
        )
    if how is None and 2 * n_found >= n:
        return None
    without = f", and {missing[0].as_py()!r}, say, is not there" if how is None else f"; {how}"
    return f"{source} has {n_found:,} of the {n:,} {entity}s ({n_found / n:.1%}){without}"


def _least(texts: pa.Array) -> str | None:
    """The smallest, so that messages do not depend on the order of rows."""
    least: str | None = pc.min(texts).as_py()
    return least


class Unseen:
    """Counts unknown values of a field.

    Attributes:
        name: the name of the field.
        count: number of unknown values.
        total: number of values.
    """

    def __init__(self, name: str) -> None:
        self.name, self.count, self.total = name, 0, 0
        self._texts: dict[str, None] = {}

    def add(self, texts: pa.Array | pa.ChunkedArray, is_known: np.ndarray) -> None:
        """Adds values, with flags of known ones."""
        self.total += len(texts)
        if is_known.all():
            return
        unknown = texts.filter(pa.array(~is_known))
        self.count += len(unknown)
        if len(self._texts) < _MOST_TEXTS:
            self._texts |= dict.fromkeys(_as_list(unknown.unique()))

    def merge(self, other: "Unseen") -> None:
        """Adds other counts."""
        self.total += other.total
        self.count += other.count
        if len(self._texts) < _MOST_TEXTS:
            self._texts |= other._texts

    def report(self, known: pa.Array) -> str | None:
        """A report of the unknown values; None without any.

        Args:
            known: the texts that the model knows.
        """
        if self.count == 0:
            return None
        how = difference(pa.array(list(self._texts), pa.string()), known)
        text = (
            f"{self.name}: {self.count:,} of {self.total:,} values were never seen in training and "
            f"are scored as unknown (such as {next(iter(self._texts))!r})"
        )
        return text if how is None else f"{text}; of {len(self._texts):,} different ones, {how}"


def _as_list(texts: pa.Array | pa.ChunkedArray) -> Iterable[str]:
    return (str(text) for text in texts[:_MOST_TEXTS].to_pylist())
