"""The manifest: what a prepared dataset holds, where it came from, whether it is still current."""

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
from deepfm_dist.section import Section
from deepfm_dist.storage import is_remote, storage_errors_to_user

TRAIN, VALID, TEST, FOLD_IN = 0, 1, 2, 3
"""Where rows go. FOLD_IN: into the history of a user who is held out entirely, and nowhere else."""
SPLITS = ("train", "valid", "test")
FORMAT = 4
"""Version of the layout; a dataset of another version is prepared again."""
MANIFEST = "manifest.json"
GIVEN = "given"
"""Fingerprint of a dataset that another tool wrote: it is checked, and never prepared again."""


class TableSpec(Section):
    """One embedding table."""

    rows: int
    """Rows, the out-of-vocabulary row 0 included."""
    features: tuple[str, ...]
    """The fields that read it."""


class LabelSpec(Section):
    """One of several labels in a split."""

    rows: int
    """Rows that have it."""
    positives: int
    """Those with label 1."""


class SplitSpec(Section):
    """One split."""

    rows: int
    """Rows on disk."""
    positives: int
    """Rows with label 1; of several labels, with any."""
    size_bytes: int
    """What training needs of them, in memory."""
    labels: dict[str, LabelSpec] = Field(default_factory=dict)
    """By target; empty if the rows have one label or none."""


class NumericSpec(Section):
    """Statistics of a numeric or vector field, fitted on training data."""

    mean: float
    """Subtracted by the ``standard`` transform; 0 for vectors."""
    std: float
    """Divided by in the ``standard`` transform; for vectors: the root mean square of their lengths,
    which all of them are divided by."""
    boundaries: tuple[float, ...] = ()
    """Least values of the second bucket and those above, ascending."""


class Profile(Section):
    """What the log is like; it decides nothing."""

    first_day: str | None = None
    """Day of the first row, in UTC; none if the log has no dates."""
    days_per_period: int = 1
    """Length of the periods that rows are counted in."""
    rows_by_period: tuple[int, ...] = ()
    """Rows of all splits, period by period; undated ones are left out."""
    missing: dict[str, float] = Field(default_factory=dict)
    """Of each field, the share of the training rows, users or items without a value."""


class Manifest(Section):
    """``manifest.json`` of a prepared dataset."""

    format: int
    """Layout version."""
    fingerprint: str
    """Of the configuration and the input files; decides whether the dataset is current."""
    vocabulary_hash: str
    """Of every table's ids in row order, the rows of hashed tables and the statistics of numeric
    fields; a checkpoint fits only the same one."""
    data_hash: str | None = None
    """Of the rows of all splits and of users' and items' fields; a run resumes only with the
    same one. None: another tool wrote the dataset, or an earlier version."""
    grown_from: tuple[str, ...] = ()
    """Vocabulary hashes of the datasets whose ids keep their rows here, the latest last: tables of
    their checkpoints are the first rows of this one's."""
    seed: int
    """Seed of splits, negatives and row order."""
    data: DataConfig
    """The configuration it was prepared with."""
    tables: dict[str, TableSpec]
    """Embedding tables by name."""
    entities: dict[str, int]
    """Rows of the entity tables (user, item), row 0 included."""
    cold: dict[str, int] = Field(default_factory=dict)
    """Items without a row of their own in the item table, by entity: files of attributes describe
    them. Their rows follow those of the entity table; another tool need not give them."""
    numeric: dict[str, NumericSpec]
    """Numeric and vector fields by name."""
    mean_weight: float = 1.0
    """Of the training rows; weights are divided by it, so that they do not change the step size."""
    time_scale: int = 1
    """What the times in the rows were multiplied by to make whole numbers of all of them: dates and
    timestamps, which are seconds since 1970 (UTC) with 1, or the input's numbers."""
    splits: dict[str, SplitSpec]
    """train, valid, test."""
    files: int
    """Files that each split is written in."""
    lanes: int
    """Streams that training rows are dealt to."""
    groups: int
    """Groups of training rows, a multiple of ``lanes``; group g belongs to lane g mod lanes."""
    dropped: dict[str, int]
    """What was left out of the input, by reason."""
    noted: dict[str, int] = Field(default_factory=dict)
    """What else to know of the input, by reason: ties, users without enough negatives."""
    inputs: dict[str, int]
    """Input files and their bytes."""
    profile: Profile = Profile()
    """What the log is like; another tool need not give it."""
    versions: dict[str, str]
    """Software that wrote it."""
    field_hashes: dict[str, str] = Field(default_factory=dict)
    """Of what says which row or number a value of a field becomes, by its name; another tool need
    not give them."""
    sums: dict[str, int] = Field(default_factory=dict)
    """`layout.footer_sum` of every Parquet file, by its name; another tool need not give them."""

    @model_validator(mode="after")
    def _splits_count_labels(self) -> Self:
        for name, spec in self.splits.items():
            if (*spec.labels,) != self.targets:
                raise ValueError(f"splits.{name}.labels must be of {', '.join(self.targets)}")
        return self

    @property
    def hashes(self) -> dict[str, str | None]:
        """What a checkpoint remembers of its data."""
        return {"vocabulary_hash": self.vocabulary_hash, "data_hash": self.data_hash}

    @property
    def marks(self) -> dict[str, Any]:
        """`hashes` and those of the fields, for a checkpoint that another run may start from."""
        return self.hashes | {"field_hashes": self.field_hashes}

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the targets, where there are several; empty: the model has one."""
        return self.data.interactions.labels

    @property
    def label_shares(self) -> npt.NDArray[np.float64] | None:
        """``[targets]`` share of the training rows that have each label; None: there is one."""
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
        """Tables whose rows stand for ids, which lie in ``vocabulary/``, in order."""
        of_ids = [f for f in self.features if f.kind == "categorical" and f.hash_rows is None]
        return tuple(dict.fromkeys(f.table_name for f in of_ids))

    @property
    def has_history(self) -> bool:
        """Whether some field is a bag of the user's training items, or of what describes them."""
        return any(f.history is not None for f in self.features)

    @property
    def item_fields_of_closed_form(self) -> tuple[Feature, Feature] | None:
        """The history of items with a table of its own, and the items' own id; None: not both.

        A ranking that is computed from the users' items, as EASE is, can stand in their tables.
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

        The groups differ by a row at most, and so do the lanes.
        """
        return cuts_of(self.splits["train"].rows, self.groups)

    def composition(self, split: str) -> str:
        """What the rows of a split are: ``3,601 positives and 14,404 sampled negatives``.

        Of several labels: ``20,000 rows (click in 3,601 of 20,000, buy in 210 of 3,601)``.

        Training rows whose negatives are drawn in training are positives only.
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
        """Rows that describe users or items: the entity table's, and those of cold items."""
        return self.entities[entity] + self.cold.get(entity, 0)

    @property
    def density(self) -> float | None:
        """Training positives per user and item; None where the rows lack one of them."""
        pairs = (self.entities.get("user", 1) - 1) * (self.entities.get("item", 1) - 1)
        return self.splits["train"].positives / pairs if pairs else None

    @property
    def log_odds(self) -> list[float]:
        """By target, of the mean label in training, half a row of each label added."""
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
        """Whether training draws fresh negatives (else every training row carries a label)."""
        return self.data.task == "implicit" and self.data.negatives.fixed_per_user is None

    def write(self, folder: Path) -> None:
        """Writes ``manifest.json``."""
        (folder / MANIFEST).write_text(self.model_dump_json(indent=2) + "\n")

    @staticmethod
    def is_given(folder: Path) -> bool:
        """Whether a folder's manifest says that another tool wrote the dataset."""
        path = folder / MANIFEST
        try:
            with storage_errors_to_user(folder):
                content = json.loads(path.read_text()) if path.is_file() else None
        except (ValueError, OSError):
            return False
        return isinstance(content, dict) and content.get("fingerprint") == GIVEN

    @classmethod
    def find(cls, folder: Path) -> "Manifest | None":
        """Reads ``manifest.json``, if there is one.

        Raises:
            DataError: it is of another layout.
        """
        with storage_errors_to_user(folder):
            exists = (folder / MANIFEST).is_file()
        return cls.read(folder) if exists else None

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Reads ``manifest.json``.

        Raises:
            DataError: there is no dataset, or one of another layout.
        """
        return cls.parse(cls.read_bytes(folder), folder)

    @staticmethod
    def read_bytes(folder: Path) -> bytes:
        """The text of ``manifest.json``, for `parse`.

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
        """The manifest of a folder from its text.

        Raises:
            DataError: it is of another layout.
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
    """Cuts rows into groups of the same size, the first ``rows mod groups`` larger by one."""
    size, larger = divmod(rows, groups)
    g = np.arange(groups + 1)
    return g * size + np.minimum(g, larger)


def input_files(data: DataConfig, root: str | Path) -> dict[str, list[InputFile]]:
    """Every file a configuration reads, by the `label_of` its setting.

    Raises:
        ConfigError: ``files`` describes a file that it does not read.
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
    """Whether a local file is one that a configuration reads."""
    for files in _files_of(data):
        with suppress(DataError):  # others may be gone
            for file in find_files(root, files):
                if "://" not in file.path and path.exists() and path.samefile(file.path):
                    return True
    return False


def check_formats(data: DataConfig, *others: str) -> None:
    """Refuses the description of a file that is not read.

    Args:
        data: the configuration.
        others: names of further files that are read.

    Raises:
        ConfigError: ``files`` has it.
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

    Files count by name, size and time of change; where they lie does not.

    Args:
        data: the configuration.
        files: `input_files`.
        seed: of the preparation.
        earlier: fingerprint of the dataset that vocabularies are taken from.
    """
    settings = settings_of(data)
    stats = [[f.name, f.size, f.stamp] for of_name in files.values() for f in of_name]
    return hash_of([FORMAT, seed, settings, stats, earlier])


def settings_of(data: DataConfig) -> dict[str, Any]:
    """What decides about the dataset's contents, as JSON values."""
    elsewhere = {"name", "root", "seed", "memory_bytes", "on_device", "vocabulary_from"}
    elsewhere.add("id_dropout")
    if data.catalogue is None:  # so are datasets of versions that did not have it
        elsewhere.add("catalogue")
    if data.forget_after is None:  # likewise
        elsewhere.add("forget_after")
    settings = data.model_dump(mode="json", exclude=elsewhere)
    if not data.interactions.labels:  # likewise
        del settings["interactions"]["labels"]
    for layout in settings["files"].values():
        if not layout["optional"]:  # likewise
            del layout["optional"]
    for feature in settings["features"]:  # likewise
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
