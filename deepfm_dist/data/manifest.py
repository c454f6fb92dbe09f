"""The manifest of a prepared dataset: contents, origin, fingerprint."""

import hashlib
import json
import math
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError, model_validator

from deepfm_dist.data.schema import DataConfig, Feature, Files, label_of, names_of
from deepfm_dist.data.sources import InputFile, find_files
from deepfm_dist.errors import ConfigError, DataError
from deepfm_dist.messages import brief, nearest, plural
from deepfm_dist.section import DEFAULTS, Section
from deepfm_dist.storage import is_remote, storage_errors_to_user

TRAIN, VALID, TEST, FOLD_IN = 0, 1, 2, 3
"""Codes of splits. FOLD_IN: rows that only enter the history of a held-out user."""
SPLITS = ("train", "valid", "test")
FORMAT = 4
"""Version of the layout; a dataset of another version is prepared again."""
MANIFEST = "manifest.json"
GIVEN = "given"
"""Fingerprint of a dataset that another tool wrote: it is checked, and never prepared again."""


class TableSpec(Section):
    """One embedding table."""

    rows: int
    """Number of rows, including the out-of-vocabulary row 0."""
    features: tuple[str, ...]
    """Fields that use it."""


class LabelSpec(Section):
    """One of several labels in a split."""

    rows: int
    """Number of rows with the label."""
    positives: int
    """Number of rows with label 1."""


class SplitSpec(Section):
    """One split."""

    rows: int
    """Number of rows."""
    positives: int
    """Number of rows with label 1; with several labels, with any."""
    size_bytes: int
    """Size of the rows in memory, as needed for training."""
    labels: dict[str, LabelSpec] = Field(default_factory=dict)
    """By target; empty with one label or none."""


class NumericSpec(Section):
    """Statistics of a numeric or vector field, fitted on training data."""

    mean: float
    """Subtracted by the ``standard`` transform; 0 for vectors."""
    std: float
    """Divisor of the ``standard`` transform; for vectors, the root mean square of their lengths."""
    boundaries: tuple[float, ...] = ()
    """Lower bounds of all buckets but the first, ascending."""


class Profile(Section):
    """A description of the log, for reports only."""

    first_day: str | None = None
    """Day of the first row, in UTC; none if the log has no dates."""
    days_per_period: int = 1
    """Length of the periods of `rows_by_period`."""
    rows_by_period: tuple[int, ...] = ()
    """Number of dated rows of all splits, by period."""
    missing: dict[str, float] = Field(default_factory=dict)
    """By field, the share of training rows, users or items without a value."""


class Manifest(Section):
    """``manifest.json`` of a prepared dataset."""

    format: int
    """Layout version."""
    fingerprint: str
    """Hash of configuration and input files; decides whether the dataset is up to date."""
    vocabulary_hash: str
    """Hash of every table's ids in row order, the sizes of hashed tables and the statistics of
    numeric fields; a checkpoint requires the same one.
    """
    data_hash: str | None = None
    """Hash of the rows of all splits and the fields of users and items; a run resumes only with the
    same one. None: the dataset was written by another tool or an earlier version.
    """
    grown_from: tuple[str, ...] = ()
    """Vocabulary hashes of earlier datasets whose ids keep their rows, the latest last: the tables
    of their checkpoints are the first rows of these tables.
    """
    seed: int
    """Seed of splits, negatives and row order."""
    data: DataConfig
    """The configuration it was prepared with."""
    tables: dict[str, TableSpec]
    """Embedding tables by name."""
    entities: dict[str, int]
    """Number of rows of the entity tables (user, item), including row 0."""
    cold: dict[str, int] = Field(default_factory=dict)
    """By entity, the number of items without training rows that attribute files describe. Their
    rows follow those of the entity table. Optional for other tools.
    """
    numeric: dict[str, NumericSpec]
    """Numeric and vector fields by name."""
    mean_weight: float = 1.0
    """Mean weight of training rows; weights are divided by it, so that they do not change the step
    size.
    """
    time_scale: int = 1
    """Factor that makes all times in the rows integers. With 1, dates and timestamps are seconds
    since 1970 (UTC), and numbers are the input's.
    """
    splits: dict[str, SplitSpec]
    """train, valid, test."""
    files: int
    """Number of files per split."""
    lanes: int
    """Number of streams of training rows."""
    groups: int
    """Number of groups of training rows, a multiple of ``lanes``; group g belongs to lane g mod
    lanes.
    """
    dropped: dict[str, int]
    """Number of dropped input rows, by reason."""
    noted: dict[str, int] = Field(default_factory=dict)
    """Counts of other remarks on the input: ties, users without enough negatives."""
    inputs: dict[str, int]
    """Input files and their sizes."""
    profile: Profile = Profile()
    """Description of the log. Optional for other tools."""
    versions: dict[str, str]
    """Software that wrote it."""
    field_hashes: dict[str, str] = Field(default_factory=dict)
    """By field, hash of everything that maps its values to rows or numbers. Optional for other
    tools.
    """
    sums: dict[str, int] = Field(default_factory=dict)
    """`layout.footer_sum` of every Parquet file, by name. Optional for other tools."""

    @model_validator(mode="after")
    def _splits_count_labels(self) -> Self:
        for name, spec in self.splits.items():
            if (*spec.labels,) != self.targets:
                raise ValueError(f"splits.{name}.labels must be of {', '.join(self.targets)}")
        return self

    @property
    def hashes(self) -> dict[str, str | None]:
        """The hashes that a checkpoint stores."""
        return {"vocabulary_hash": self.vocabulary_hash, "data_hash": self.data_hash}

    @property
    def marks(self) -> dict[str, Any]:
        """`hashes` and those of the fields, for a checkpoint to start other runs from."""
        return self.hashes | {"field_hashes": self.field_hashes}

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the targets if there are several; empty for a single one."""
        return self.data.interactions.labels

    @property
    def label_shares(self) -> npt.NDArray[np.float64] | None:
        """``[targets]`` share of training rows with each label; None for a single target."""
        train = self.splits["train"]
        rows = [train.labels[target].rows for target in self.targets]
        return np.array(rows) / max(1, train.rows) if rows else None

    @property
    def features(self) -> tuple[Feature, ...]:
        """The model's fields, in order."""
        return self.data.features

    @property
    def categorical(self) -> tuple[Feature, ...]:
        """Fields that are looked up in tables: the keys of every batch, in order."""
        return tuple(f for f in self.features if f.in_table)

    @property
    def single_valued(self) -> frozenset[str]:
        """Names of categorical fields that never have more than one value in a row."""
        # With ``keep: first``, cells of new users may still hold several.
        one = (f for f in self.categorical if not f.multi_valued and not f.in_lists)
        return frozenset(f.name for f in one)

    @property
    def dense(self) -> tuple[Feature, ...]:
        """Fields of one number that enters the model, in order."""
        return tuple(f for f in self.features if f.kind == "numeric" and not f.in_table)

    @property
    def vectors(self) -> dict[str, int]:
        """Lengths of the vector fields by name, in order."""
        return {f.name: f.dim or 0 for f in self.vector_fields}

    @property
    def vector_fields(self) -> tuple[Feature, ...]:
        """Fields whose vectors enter the model, in order; their ``dim`` is known."""
        return tuple(f for f in self.features if f.kind == "vector")

    @property
    def is_item_field(self) -> list[bool]:
        """For each of `categorical`, `dense` and `vector_fields`, whether it is the item's."""
        fields = (*self.categorical, *self.dense, *self.vector_fields)
        return [f.entity == "item" for f in fields]

    @property
    def vocabularies(self) -> tuple[str, ...]:
        """Tables with a vocabulary in ``vocabulary/``, in order."""
        of_ids = [f for f in self.features if f.kind == "categorical" and f.hash_rows is None]
        return tuple(dict.fromkeys(f.table_name for f in of_ids))

    @property
    def has_history(self) -> bool:
        """Whether some field is a bag of the user's training items or of their values."""
        return any(f.history is not None for f in self.features)

    @property
    def item_fields_of_closed_form(self) -> tuple[Feature, Feature] | None:
        """The history of items with a separate table, and the item id field; or None.

        Their tables can represent a ranking that is linear in the users' items, such as EASE.
        """
        histories = [
            f
            for f in self.features
            if f.history is not None
            and f.last is None
            and self.data.source_of(f).is_id
            and self.tables[f.table_name].features == (f.name,)
        ]
        items = [f for f in self.features if f.entity == "item" and f.is_id]
        return (histories[0], items[0]) if histories and items else None

    @property
    def cuts(self) -> npt.NDArray[np.int64]:
        """``[groups + 1]``: group g holds the training rows from cut g to cut g + 1.

        Group sizes differ by at most one row, and so do lanes.
        """
        return cuts_of(self.splits["train"].rows, self.groups)

    def composition(self, split: str) -> str:
        """Describes a split's rows: ``3,601 positives and 14,404 sampled negatives``.

        With several labels: ``20,000 rows (click in 3,601 of 20,000, buy in 210 of 3,601)``.

        If negatives are drawn during training, training rows are positives only.
        """
        spec = self.splits[split]
        if spec.labels:
            counts = [f"{n} in {s.positives:,} of {s.rows:,}" for n, s in spec.labels.items()]
            return f"{plural(spec.rows, 'row')} ({', '.join(counts)})"
        positives = plural(spec.positives, "positive")
        if (split == "train" and self.sampled) or spec.rows == 0:
            return positives
        kind = "sampled negative" if self.data.task == "implicit" else "negative"
        return f"{positives} and {plural(spec.rows - spec.positives, kind)}"

    def n_rows(self, entity: str) -> int:
        """Number of described users or items, including cold items."""
        return self.entities[entity] + self.cold.get(entity, 0)

    @property
    def density(self) -> float | None:
        """Training positives per pair of user and item; None if the rows lack either."""
        pairs = (self.entities.get("user", 1) - 1) * (self.entities.get("item", 1) - 1)
        return self.splits["train"].positives / pairs if pairs else None

    @property
    def log_odds(self) -> list[float]:
        """By target, log-odds of the mean training label, with half a row of each label added."""
        train = self.splits["train"]
        counts = [(spec.rows, spec.positives) for spec in train.labels.values()]
        if self.sampled:
            n = train.positives
            counts = [(n + n * self.data.negatives.per_positive, n)]
        return [
            math.log((positives + 0.5) / (rows - positives + 0.5))
            for rows, positives in counts or [(train.rows, train.positives)]
        ]

    @property
    def sampled(self) -> bool:
        """Whether training draws negatives; otherwise every training row has a label."""
        return self.data.task == "implicit" and self.data.negatives.fixed_per_user is None

    def write(self, folder: Path) -> None:
        """Writes ``manifest.json``."""
        (folder / MANIFEST).write_text(self.model_dump_json(indent=2) + "\n")

    @staticmethod
    def is_given(folder: Path) -> bool:
        """Whether another tool wrote the dataset, according to its manifest."""
        path = folder / MANIFEST
        try:
            with storage_errors_to_user(folder):
                content = json.loads(path.read_text()) if path.is_file() else None
        except (ValueError, OSError):
            return False
        return isinstance(content, dict) and content.get("fingerprint") == GIVEN

    @classmethod
    def find(cls, folder: Path) -> "Manifest | None":
        """Reads ``manifest.json`` if it exists.

        Raises:
            DataError: it has another layout version.
        """
        with storage_errors_to_user(folder):
            exists = (folder / MANIFEST).is_file()
        return cls.read(folder) if exists else None

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Reads ``manifest.json``.

        Raises:
            DataError: there is no dataset, or it has another layout version.
        """
        return cls.parse(cls.read_bytes(folder), folder)

    @staticmethod
    def read_bytes(folder: Path) -> bytes:
        """The contents of ``manifest.json``, for `parse`.

        Raises:
            DataError: there is no dataset.
        """
        path = folder / MANIFEST
        with storage_errors_to_user(folder):
            if not path.is_file():
                raise DataError(f"{folder}: no prepared dataset; run python -m deepfm_dist.prepare")
            try:
                return path.read_bytes()
            except OSError as error:
                if is_remote(folder):
                    raise
                raise _unreadable(folder, error) from None

    @classmethod
    def parse(cls, text: bytes, folder: Path) -> "Manifest":
        """Parses the contents of a folder's ``manifest.json``.

        Raises:
            DataError: it has another layout version.
        """
        try:
            content = json.loads(text)
            version = content.get("format") if isinstance(content, dict) else None
            if isinstance(version, int) and version != FORMAT:
                cure = (
                    f'write it again as docs/data.md says, with "format": {FORMAT}'
                    if content.get("fingerprint") == GIVEN
                    else "run python -m deepfm_dist.prepare, which prepares it again"
                )
                raise DataError(
                    f"{folder / MANIFEST}: the dataset has layout format {version}, and this "
                    f"version reads format {FORMAT}; {cure}"
                )
            return cls.model_validate_json(text)
        except (ValidationError, ValueError) as error:
            raise _unreadable(folder, error) from None


def _unreadable(folder: Path, error: Exception) -> DataError:
    reason = brief(str(error).partition("\n")[0])  # pydantic lists every field after it
    return DataError(
        f"{folder / MANIFEST}: not a manifest of this version ({reason}); delete {folder} and run "
        f"python -m deepfm_dist.prepare"
    )


def cuts_of(rows: int, groups: int) -> npt.NDArray[np.int64]:
    """Divides rows into groups of equal size; the first ``rows mod groups`` have one more."""
    size, larger = divmod(rows, groups)
    g = np.arange(groups + 1)
    return g * size + np.minimum(g, larger)


def input_files(data: DataConfig, root: str | Path) -> dict[str, list[InputFile]]:
    """All input files of a configuration, by `label_of` their setting.

    Raises:
        ConfigError: ``files`` describes a file that is not an input.
        DataError: the file does not exist.
    """
    patterns = [pattern for files in _files_of(data) for pattern in names_of(files)]
    check_formats(data, *(n for n in data.files if any(fnmatchcase(n, p) for p in patterns)))
    by_setting = {label_of(files): find_files(root, files) for files in _files_of(data)}
    check_formats(data, *(file.name for files in by_setting.values() for file in files))
    return {
        setting: [replace(f, pattern=f.name) if f.name in data.files else f for f in files]
        for setting, files in by_setting.items()
    }


def is_input(path: Path, data: DataConfig, root: str | Path) -> bool:
    """Whether a local file is an input of a configuration."""
    for files in _files_of(data):
        with suppress(DataError):  # other inputs may be missing
            for file in find_files(root, files):
                if "://" not in file.path and path.exists() and path.samefile(file.path):
                    return True
    return False


def check_formats(data: DataConfig, *others: str) -> None:
    """Refuses ``files`` entries for files that are not inputs.

    Args:
        data: the configuration.
        others: names of further inputs.

    Raises:
        ConfigError: there is such an entry.
    """
    names = [*dict.fromkeys(name for files in _files_of(data) for name in names_of(files))]
    for name in data.files:
        if name not in (*names, *others):
            near = nearest(name, names)
            hint = f"did you mean {near!r}? " if near else ""
            raise ConfigError(
                f"data.files: {name!r} is not a file that is read; {hint}"
                f"available: {', '.join(names)}"
            )


def _files_of(data: DataConfig) -> list[Files]:
    settings = [data.interactions.file, data.split.valid_file, data.split.test_file]
    settings += [files for f in data.features for files in (f.file, f.npy)]
    settings += [section.file for section in (data.titles, data.catalogue) if section]
    return list(dict.fromkeys(files for files in settings if files is not None))


def fingerprint(
    data: DataConfig, files: Mapping[str, Sequence[InputFile]], seed: int, earlier: str | None
) -> str:
    """A hash that changes when the configuration or an input file does.

    Files are identified by name, size and modification time, not by location.

    Args:
        data: the configuration.
        files: `input_files`.
        seed: the seed of the preparation.
        earlier: fingerprint of the dataset that vocabularies are taken from.
    """
    settings = settings_of(data)
    stats = [[f.name, f.size, f.stamp] for of_name in files.values() for f in of_name]
    return hash_of([FORMAT, seed, settings, stats, earlier])


def settings_of(data: DataConfig) -> dict[str, Any]:
    """The settings that affect the dataset's contents, as JSON values."""
    elsewhere = {"name", "root", "seed", "memory_bytes", "on_device", "vocabulary_from"}
    elsewhere.add("id_dropout")
    if data.catalogue is None:  # as in versions without this setting
        elsewhere.add("catalogue")
    if data.forget_after is None:
        elsewhere.add("forget_after")
    # A run's own settings have what was chosen; where nothing was, that is the default.
    settings = data.model_dump(mode="json", exclude=elsewhere, context=DEFAULTS)
    if not data.interactions.labels:
        del settings["interactions"]["labels"]
    for layout in settings["files"].values():
        if not layout["optional"]:
            del layout["optional"]
    for feature in settings["features"]:
        for option in ("npy", "dim"):
            if feature[option] is None:
                del feature[option]
    return settings


def hash_of(value: Any) -> str:
    """Short hex digest of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def versions(packages: Sequence[str] = ("deepfm-dist", "numpy", "pyarrow")) -> dict[str, str]:
    """Versions of Python and of some packages, as installed."""
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except ModuleNotFoundError:
            versions[package] = "not installed"
    return versions
