"""Warns about suspicious texts in vocabularies."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deepfm_dist.data.jagged import Int64Array
from deepfm_dist.data.preparation.job import entity_key
from deepfm_dist.data.schema import DataConfig, Feature
from deepfm_dist.data.sources.nested import list_literals
from deepfm_dist.data.spelling import SPELLED_OTHERWISE, difference, written_twice
from deepfm_dist.messages import plural, short

_NO_IDS = pa.array(
    ["null", "(null)", "nan", "none", "nil", "na", "n/a", "#n/a", "<na>", "nat", "undefined", r"\n"]
)
"""Placeholders, in lower case, that programs write for missing ids."""

_NEVER_IN_IDS = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x{FEFF}\x{FFFD}]"
"""Control characters, the byte-order mark, and the replacement character."""

_ODD = rf"{SPELLED_OTHERWISE}|{_NEVER_IN_IDS}|[|;\[({{]|[eE]\+"
"""Matches every id that one of the checks below may report."""


def vocabulary_warnings(
    data: DataConfig, name: str, texts: pa.Array, counts: Int64Array
) -> list[str]:
    """Warnings about the texts of one vocabulary.

    Args:
        data: the configuration.
        name: the name of the vocabulary.
        texts: ``[n]`` distinct strings.
        counts: ``[n]`` their training rows.
    """
    warnings = [
        _placeholders(data, entity, texts, counts)
        for entity in ("user", "item")
        if name == entity_key(entity)
    ]
    odd = texts.cast(pa.string())
    odd = odd.filter(pc.match_substring_regex(odd, _ODD))
    warnings += [
        check(entity, odd, len(texts))
        for entity in ("user", "item")
        if name == entity_key(entity)
        for check in (_outer_spaces, _control_characters, _rounded_numbers, _several_ids)
    ]
    warnings += [_look_alikes(name, texts), _two_spellings(name, odd, texts)]
    for feature in data.features:
        if feature.has_vocabulary and not feature.names_entity and feature.table_name == name:
            warnings += [_list_literals(feature, texts), _unsplit_values(feature, texts)]
            warnings.append(_nearly_missing(feature, texts))
        table = entity_key(feature.entity) if feature.names_entity else feature.table_name
        if feature.has_vocabulary and table == name:
            warnings.append(_all_rare(feature, counts))
    return [text for text in warnings if text is not None]


def _placeholders(data: DataConfig, entity: str, ids: pa.Array, counts: Int64Array) -> str | None:
    """Ids that are placeholders for a missing value in other programs."""
    words = pc.utf8_lower(pc.utf8_trim_whitespace(ids.cast(pa.string())))
    is_word = np.asarray(pc.is_in(words, value_set=_NO_IDS))
    if not is_word.any():
        return None
    rows = int(counts[is_word].sum())
    shown = sorted(ids.filter(pa.array(is_word)).to_pylist())
    field = next((f.name for f in data.features if f.entity == entity and f.names_entity), None)
    words_missing = json.dumps(shown, ensure_ascii=False)
    cure = "empty these cells" if field is None else f"set missing: {words_missing} for {field}"
    return (
        f"{getattr(data.interactions, entity)}: {plural(rows, 'training row')} with "
        f"{' or '.join(map(repr, shown))} as the id, which other programs write for a missing "
        f"value, and which is one more {entity} here; if it means none, {cure} and "
        f"data.on_bad_row=skip"
    )


def _look_alikes(name: str, ids: pa.Array) -> str | None:
    """Texts that differ only in Unicode's normal form."""
    if pc.all(pc.string_is_ascii(ids)).as_py() is not False:
        return None
    composed = pc.utf8_normalize(ids, "NFC").dictionary_encode()
    count = len(ids) - len(composed.dictionary)
    if not count:
        return None
    places = np.asarray(composed.indices)
    alike = np.flatnonzero(places == np.flatnonzero(np.bincount(places) > 1)[0])
    one, two = (ascii(ids[int(at)].as_py()) for at in alike[:2])
    return (
        f"{name.removeprefix(entity_key(''))}: {count:,} of {len(ids):,} values differ from "
        f"another one only in Unicode's normal form, such as {one} and {two}; they are kept apart: "
        f"write all files in one form (NFC) if they mean the same"
    )


def _outer_spaces(entity: str, ids: pa.Array, n: int) -> str | None:
    """Most ids have surrounding spaces, as in ``a, b, c``."""
    spaced = ids.filter(pc.match_substring_regex(ids, r"^\s|\s$"))
    if len(spaced) == 0 or 2 * len(spaced) < n:
        return None
    return (
        f"{entity}: {len(spaced):,} of {n:,} ids begin or end with a space, such as "
        f"{pc.min(spaced).as_py()!r}, which is a part of them; if it follows each delimiter, "
        f'name both in data.files, such as delimiter: ", "'
    )


def _control_characters(entity: str, ids: pa.Array, n: int) -> str | None:
    """Ids with characters that suggest damage or a wrong encoding."""
    strange = ids.filter(pc.match_substring_regex(ids, _NEVER_IN_IDS))
    if len(strange) == 0:
        return None
    return (
        f"{entity}: {len(strange):,} of {n:,} ids have characters that only damaged text "
        f"has, such as {pc.min(strange).as_py()!a}; write the file again, or name its "
        f"encoding in data.files"
    )


def _rounded_numbers(entity: str, ids: pa.Array, n: int) -> str | None:
    """Long numbers rounded by spreadsheets, such as 1.23E+15."""
    rounded = ids.filter(pc.match_substring_regex(ids, r"^\d(\.\d+)?[eE]\+\d{2}$"))
    if len(rounded) == 0:
        return None
    return (
        f"{entity}: {len(rounded):,} of {n:,} ids are rounded numbers, such as "
        f"{pc.min(rounded).as_py()!r}, as spreadsheets write long ones: ids that were different "
        f"may have become one; export them as text"
    )


def _several_ids(entity: str, ids: pa.Array, n: int) -> str | None:
    """Most ids look like several in one cell."""
    joined = [ids.filter(pc.match_substring(ids, mark)) for mark in "|;"]
    joined = [list_literals(ids), *joined]
    several = max(joined, key=len)
    if len(several) < 2 or 2 * len(several) < n:
        return None
    return (
        f"{entity}: {len(several):,} of {n:,} ids look like several in one cell, such as "
        f"{short(pc.min(several).as_py())}, and each is taken for one {entity}; if they are "
        f"several, write a row for each, as pandas' explode does"
    )


def _two_spellings(name: str, odd: pa.Array, ids: pa.Array) -> str | None:
    """Texts that differ from others only in spaces or zeros."""
    is_id = name in map(entity_key, ("user", "item"))
    texts = ids.cast(pa.string())
    how = written_twice(odd if is_id else texts, texts, ignore_case=not is_id)
    if how is None:
        return None
    return (
        f"{name.removeprefix(entity_key(''))}: {how.count:,} of {len(ids):,} values differ from "
        f"another one only in {how.what}, such as {how.text!r} and {how.known!r}; they are kept "
        f"apart: write them the same way if they mean the same"
    )


def _all_rare(feature: Feature, counts: Int64Array) -> str | None:
    """No value is frequent enough for a table row."""
    most = int(counts.max(initial=0))
    if not 0 < most < feature.min_count:
        return None
    return (
        f"{feature.name}: no value has min_count={feature.min_count:,} training rows, the most "
        f"frequent one has {most:,}: all count as unknown; lower min_count or leave the field out"
    )


def _nearly_missing(feature: Feature, texts: pa.Array) -> str | None:
    """Values similar to the words of ``missing``, which are kept."""
    if not feature.missing or feature.derive is not None:
        return None
    longest = max(map(len, feature.missing)) + len("'   '")
    texts = texts.cast(pa.string()).filter(pc.less_equal(pc.utf8_length(texts), longest))
    how = difference(pa.array(feature.missing, pa.string()), texts)
    if how is None:
        return None
    return (
        f"{feature.name}: {how.known!r} is a value, and differs only in {how.what} from "
        f"{how.text!r} in `missing`; add it there if it means no value, too"
    )


def _list_literals(feature: Feature, ids: pa.Array) -> str | None:
    """Lists in a single-valued field."""
    if feature.in_lists or feature.several is not None or feature.derive is not None:
        return None
    lists = list_literals(ids.cast(pa.string()))
    lists = lists.filter(pc.match_substring_regex(lists, """[,'"0-9]"""))  # not the film [REC]
    if len(lists) == 0:
        return None
    return (
        f"{feature.name}: {len(lists):,} of {len(ids):,} values are lists, such as "
        f"{short(pc.min(lists).as_py())}, and each is taken for one value; set several: true for "
        f"the field, or several: false if that is meant"
    )


def _unsplit_values(feature: Feature, ids: pa.Array) -> str | None:
    """Most values look like several values with a separator that is not configured.

    Commas are not considered: too many names contain them.
    """
    if feature.several is False or feature.derive is not None:
        return None
    for separator in "|;":
        joined = ids.filter(pc.match_substring(ids, separator))
        if len(joined) > 1 and 2 * len(joined) >= len(ids):
            which = f", since separator is {feature.separator!r}" if feature.separator else ""
            return (
                f"{feature.name}: {len(joined):,} of {len(ids):,} values hold {separator!r}, such "
                f"as {short(pc.min(joined).as_py())}, and each is taken for one value{which}; set "
                f'separator: "{separator}" for the field if they are several, or several: false'
            )
    return None
