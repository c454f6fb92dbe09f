"""A preview: prepares the first rows of the files without writing anything."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from deepfm_dist.data.jagged import Jagged, Values
from deepfm_dist.data.manifest import SPLITS, input_files
from deepfm_dist.data.preparation.counts import Counts, split_and_count
from deepfm_dist.data.preparation.crew import Crew
from deepfm_dist.data.preparation.fitting import Fitter, PreviousDataset
from deepfm_dist.data.preparation.job import Job, entity_key
from deepfm_dist.data.preparation.local import detect_lists
from deepfm_dist.data.preparation.partitions import Partitions
from deepfm_dist.data.preparation.reading import ThreadReader
from deepfm_dist.data.schema import DataConfig, Feature
from deepfm_dist.messages import plural

ROWS = 100_000
"""Rows read from the interactions and from each file of held-out rows."""
_EXAMPLES = 3


@dataclass(frozen=True)
class FieldPreview:
    """Preview of a field.

    Attributes:
        name: the name of the field.
        entity: user, item or context.
        kind: its form in the model, such as ``table genre, 19 rows``.
        distinct: number of distinct values, for a field with a vocabulary or numbers.
        missing: share of the training rows, users or items without a value.
        examples: its most frequent texts, or its minimum, median and maximum.
    """

    name: str
    entity: str
    kind: str
    distinct: int | None
    missing: float | None
    examples: tuple[str, ...]


@dataclass(frozen=True)
class DryRun:
    """Preview of a dataset.

    Attributes:
        rows: number of rows kept.
        limit: maximum number of rows read.
        splits: rows by split.
        dropped: rows left out, by reason.
        noted: counts of other remarks, by reason.
        fields: the fields, in the order of the configuration.
    """

    rows: int
    limit: int
    splits: dict[str, int]
    dropped: dict[str, int]
    noted: dict[str, int]
    fields: tuple[FieldPreview, ...]


def dry_run(
    data: DataConfig, root: str | Path, seed: int, rows: int = ROWS, earlier: Path | None = None
) -> DryRun:
    """Prepares the first rows in memory.

    Args:
        data: files, features, split, negatives.
        root: folder of the input files, or its URL.
        seed: the seed of splits.
        rows: number to read from the interactions and from each file of held-out rows.
        earlier: local folder of the dataset that ``vocabulary_from`` names, if that is a URL.

    Raises:
        ConfigError: a setting does not fit the data.
        DataError: an input cannot be read or used.
    """
    files = input_files(data, root)
    data = detect_lists(data, files)
    if earlier is None and data.vocabulary_from is not None:
        earlier = Path(data.vocabulary_from)
    job = Job(data, files, seed, Crew(), Path(), rows_limit=rows, earlier=earlier)
    partitions = Partitions.from_readers(job, [ThreadReader(job)])
    counts = split_and_count(job, partitions)
    fit = Fitter(job, partitions, counts, PreviousDataset(job.earlier))
    totals = counts.rows.sum(axis=0).tolist()
    return DryRun(
        rows=sum(totals),
        limit=rows,
        splits=dict(zip(SPLITS, totals, strict=False)),
        dropped=dict(job.dropped),
        noted=dict(job.noted),
        fields=tuple(_preview(feature, partitions, counts, fit) for feature in data.features),
    )


def _preview(feature: Feature, partitions: Partitions, counts: Counts, fit: Fitter) -> FieldPreview:
    distinct: int | None = None
    examples: tuple[str, ...] = ()
    table = entity_key(feature.entity) if feature.names_entity else feature.table_name
    if feature.kind == "numeric":
        in_rows = partitions.load(0).columns.get(f"field {feature.name}")
        distinct, examples = _numbers(fit.values.get(feature.name, in_rows))
    elif feature.history is None and table in partitions.ids:
        distinct, examples = _texts(partitions.ids[table], counts.tables[table])
    return FieldPreview(
        feature.name, feature.entity, _kind(feature, fit), distinct, fit.missing(feature), examples
    )


def _kind(feature: Feature, fit: Fitter) -> str:
    """A field's form in the model."""
    if feature.kind == "vector":
        scale = fit.fitted.numeric[feature.name].std
        return f"vector of {plural(feature.dim or 0, 'number')}, scaled by 1 / {scale:.6g}"
    if not feature.in_table:
        spec = fit.fitted.numeric[feature.name]
        if feature.transform == "standard":
            return f"number, standard (mean {spec.mean:.6g}, deviation {spec.std:.6g})"
        return f"number, {feature.transform}"
    if feature.transform == "bucket":
        rows = 2 + len(fit.fitted.numeric[feature.name].boundaries)
    elif feature.hash_rows is not None:
        rows = 1 + feature.hash_rows
    else:
        rows = fit.vocabularies[feature.table_name].rows
    kind = f"table {feature.table_name}, {plural(rows, 'row')}"
    if feature.history is not None:
        latest = "" if feature.last is None else f"{feature.last} latest "
        return f"{kind}; bag of the user's {latest}{feature.history}s"
    return f"{kind}; several values" if feature.multi_valued else kind


def _texts(ids: pa.Array, counts: np.ndarray) -> tuple[int, tuple[str, ...]]:
    """Number of distinct values in training rows, and the most frequent ones."""
    most = np.argsort(-counts, kind="stable")[:_EXAMPLES]
    known = [ids[int(code)].as_py() for code in most if counts[code]]
    return int((counts > 0).sum()), tuple(known)


def _numbers(values: Values | None) -> tuple[int, tuple[str, ...]]:
    """Number of distinct numbers; minimum, median and maximum."""
    assert values is not None and not isinstance(values, Jagged)
    known = np.sort(values[~np.isnan(values)])
    chosen: Sequence[float] = known[[0, len(known) // 2, -1]].tolist() if len(known) else ()
    return len(np.unique(known)), tuple(dict.fromkeys(f"{number:.10g}" for number in chosen))
