"""Input files -> a prepared dataset: split, fit vocabularies, write rows, entities, manifest.

Layout of ``prepared/<name>/``::

    manifest.json                contents and origin of the dataset; written last
    vocabulary/<table>.parquet   row, id, count
    entities/user.parquet        row r describes user r: id, fields as lists, history, seen_*
    entities/item.parquet        row r describes item r: id, fields, count, title
    entities/rare.parquet        the same lists of the users below min_count, who share row 0
    train/ valid/ test/          user, item, [labels], [time], one column per context field

Rows are streamed twice and never held in memory together. First they are read, texts are encoded,
and rows are partitioned by a hash of their user: on disk, unless all fit one partition. A partition
fits in memory and has all rows of its users, so that repeated rows, splits by user and histories
are local to a partition; splits over all rows need two bounds, which are found by histograms. Then
vocabularies and statistics are fitted on training rows alone, and the partitions are written out as
table rows.

The steps are `reading`, `partitions`, `counts`, `fitting` and `writing`. Threads divide the files,
then the partitions, among them; between steps, the first thread parallelises its work with
`Crew.map`. Results depend neither on the number of threads nor on the sizes of blocks.
"""

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from deepfm_dist.data.fields import column_of, table_names
from deepfm_dist.data.layout import DatasetFiles, footer_sums
from deepfm_dist.data.manifest import (
    FORMAT,
    MANIFEST,
    SPLITS,
    Manifest,
    Profile,
    TableSpec,
    fingerprint,
    hash_of,
    input_files,
    settings_of,
    versions,
)
from deepfm_dist.data.preparation.checksums import sums_of_tables
from deepfm_dist.data.preparation.counts import Counts, split_and_count
from deepfm_dist.data.preparation.crew import Crew, run_crew
from deepfm_dist.data.preparation.fitting import Fitter, PreviousDataset
from deepfm_dist.data.preparation.histories import HistoryWriter
from deepfm_dist.data.preparation.job import Job
from deepfm_dist.data.preparation.partitions import Partitions
from deepfm_dist.data.preparation.reading import ThreadReader
from deepfm_dist.data.preparation.write_plan import WritePlan
from deepfm_dist.data.preparation.writing import WriteResult, carry, write_entities, write_rows
from deepfm_dist.data.remote import publish, published
from deepfm_dist.data.schema import DataConfig, Feature, label_of
from deepfm_dist.data.sources import (
    EmptyFile,
    InputFile,
    find_lists,
    length_of_vectors,
    open_array,
)
from deepfm_dist.data.vocabulary import Vocabulary
from deepfm_dist.errors import ConfigError, DataError
from deepfm_dist.lock import Lock
from deepfm_dist.messages import plural
from deepfm_dist.storage import remove_leftovers, work_folder

log = logging.getLogger(__name__)
_ELSEWHERE = "set data.name (or --output) to write elsewhere"
BeforeReplacing = Callable[[Manifest | None, Manifest], Path | None]
"""Called with the manifest of the existing dataset (None if unreadable) and of its replacement; may
raise, or return where to move the existing one.
"""
_MOST_PERIODS = 400
"""Maximum number of periods in the manifest's profile."""


def prepare(
    data: DataConfig,
    root: str | Path,
    folder: Path,
    seed: int,
    threads: int | None = None,
    before_replacing: BeforeReplacing = lambda old, new: None,
    build: Callable[[Job, str], Manifest] | None = None,
    earlier: Path | None = None,
    destination: Path | None = None,
) -> Manifest:
    """Makes sure that ``folder`` holds the dataset that the configuration describes.

    An up-to-date dataset is reused; a changed input file or setting rebuilds it. The folder is
    replaced atomically.

    Args:
        data: files, features, split, negatives.
        root: folder of the input files, or its URL.
        folder: where the prepared dataset goes.
        seed: the seed of splits, negatives and row order.
        threads: number of threads; default: one per core. Results do not depend on it.
        before_replacing: see `BeforeReplacing`.
        build: builds the dataset with a fingerprint in the job's folder; default: with threads.
        earlier: local folder of the dataset that ``vocabulary_from`` names, if that is a URL.
        destination: where to publish the dataset, such as a URL; ``folder`` is then a local copy. A
            different dataset there is never replaced.

    Returns:
        The manifest.

    Raises:
        ConfigError: ``vocabulary_from`` is this folder, or a field there has a different meaning.
        DataError: an input cannot be read or used, or a folder cannot be written.
        InUse: another process is writing to ``destination``.
    """
    remove_leftovers(folder)
    if (given := _from_another_tool(data, folder)) is not None:
        return given
    files = input_files(data, root)
    if earlier is None and data.vocabulary_from is not None:
        earlier = Path(data.vocabulary_from)
    before = _manifest_to_grow_from(data, earlier, folder) if earlier else None
    wanted = fingerprint(data, files, seed, before.fingerprint if before else None)
    place = folder if destination is None else destination
    if (current := (published if destination else _up_to_date)(place, wanted)) is not None:
        log.info("%s is up to date", place)
        return current
    started, make = time.perf_counter(), build or partial(_build_by_threads, threads)
    with nullcontext() if destination is None else Lock(place, str(place), _ELSEWHERE, _ELSEWHERE):
        manifest = _up_to_date(folder, wanted) if destination else None  # an earlier upload failed
        if manifest is None:
            aside = work_folder(folder) / "dataset"
            job = _settled(Job(data, files, seed, Crew(), aside, earlier=earlier), before)
            manifest = _build_in_place(job, folder, lambda: make(job, wanted), before_replacing)
            _report(manifest, place, time.perf_counter() - started)
        if destination is not None:
            publish(folder, destination)
    return manifest


def _settled(job: Job, earlier: Manifest | None) -> Job:
    """The job with settings detected from its files."""
    data = detect_lists(job.data, job.files)
    if earlier is not None:
        _check_meanings(data, earlier)
    return replace(job, data=data)


def _build_in_place(
    job: Job,
    folder: Path,
    make: Callable[[], Manifest],
    before_replacing: BeforeReplacing,
) -> Manifest:
    """Builds a dataset in the job's folder and moves it into place."""
    aside = job.folder.parent
    try:
        job.folder.mkdir(parents=True)
        job.spill("").mkdir()
        manifest = make()
        if folder.exists():  # a slow deletion would leave a partial dataset
            kept = _where_to_keep(folder, manifest, before_replacing)
            folder.rename(kept or aside / "before")
        job.folder.rename(folder)
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be written: {error.strerror or error}; set run.prepared_root to a "
            f"writable folder with enough space"
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return manifest


def _build_by_threads(threads: int | None, job: Job, wanted: str) -> Manifest:
    return run_crew(
        threads or len(os.sched_getaffinity(0)),
        lambda crew: _build_dataset(
            Job(job.data, job.files, job.seed, crew, job.folder, earlier=job.earlier), wanted
        ),
    )


def _where_to_keep(folder: Path, new: Manifest, before_replacing: BeforeReplacing) -> Path | None:
    """Where to move the existing dataset; None if it can be deleted."""
    if not (folder / MANIFEST).is_file():
        return None
    old = None
    with suppress(DataError):  # damaged, or in an unsupported format
        old = Manifest.read(folder)
    return before_replacing(old, new)


def _from_another_tool(data: DataConfig, folder: Path) -> Manifest | None:
    """The manifest of a dataset prepared by another tool; None if it is not one."""
    if not (folder / "manifest.json").is_file():
        return None
    if not Manifest.is_given(folder):
        return None
    manifest = Manifest.read(folder)
    ours, theirs = settings_of(data.settled_by(manifest.data)), settings_of(manifest.data)
    if differ := [name for name in ours if ours[name] != theirs[name]]:
        raise DataError(
            f"{folder}: another tool prepared it with other settings: data.{differ[0]} differs; "
            f"use the same, or set data.name or run.prepared_root to another folder"
        )
    marker, mark = folder / "checked", hash_of(manifest.model_dump(mode="json"))
    if not (marker.is_file() and marker.read_text() == mark):
        DatasetFiles(folder, manifest).check_everything()
        log.info("%s: prepared by another tool; its layout is valid", folder)
        with suppress(OSError):  # if it cannot be saved, every run checks again
            marker.write_text(mark)
    return manifest


def _manifest_to_grow_from(data: DataConfig, earlier: Path, folder: Path) -> Manifest:
    """The manifest of the dataset whose rows and statistics are kept."""
    if earlier.resolve() == folder.resolve():
        raise ConfigError(
            f"data.vocabulary_from={data.vocabulary_from}: this dataset itself is written there, "
            f"and would grow at every command; set data.name (or run.name) to another name"
        )
    return Manifest.read(earlier)


def _check_meanings(data: DataConfig, earlier: Manifest) -> None:
    """Refuses fields whose meaning differs from the dataset whose rows are kept."""
    option = f"data.vocabulary_from={data.vocabulary_from}"
    theirs = {f.name: f for f in earlier.features}
    for ours in data.features:
        now, then = ours.meaning, theirs.get(ours.name, ours).meaning
        for setting in now:
            if now[setting] != then.get(setting):
                raise ConfigError(
                    f"data.features: {ours.name}: {setting} is {now[setting]!r} and was "
                    f"{then.get(setting)!r} in {option}, whose rows and statistics stay in use; "
                    f"set it back, give the field another name, or leave vocabulary_from out"
                )


def detect_lists(data: DataConfig, files: Mapping[str, Sequence[InputFile]]) -> DataConfig:
    """The configuration with field settings detected from the files.

    Sets `Feature.several` for columns of lists, and `Feature.dim` of vector fields.
    """
    holds: dict[str, bool] = {}
    open_ones = [
        f
        for f in data.features
        if (f.several, f.separator, f.history) == (None, None, None)
        and f.kind == "categorical"
        and not f.names_entity
    ]
    for setting in dict.fromkeys(f.file or data.interactions.file for f in open_ones):
        fields = [f for f in open_ones if (f.file or data.interactions.file) == setting]
        columns = {f.name: f.column or f.name for f in fields}
        for file in files[label_of(setting)]:
            layout = data.files.get(file.pattern)
            try:
                is_list = find_lists(file.path, [*columns.values()], layout, file.pattern)
            except EmptyFile:
                continue
            except DataError:  # reading raises the precise error
                break
            holds |= {name: is_list[c] for name, c in columns.items() if c in is_list}
            columns = {name: c for name, c in columns.items() if c not in is_list}
            if not columns:
                break
    features = []
    for feature in data.features:
        if holds.get(feature.name):
            if feature.fill is not None:
                raise ConfigError(
                    f"data.features: {feature.name}: fill is for a cell of one value, and the "
                    f"column {feature.column or feature.name!r} holds lists; leave fill out"
                )
            log.info("%s: the column holds lists, so the field has several values", feature.name)
            feature = feature.model_copy(update={"several": True})
        if feature.kind == "vector" and feature.dim is None:
            feature = feature.model_copy(update={"dim": _length_of_vectors(data, feature, files)})
        features.append(feature)
    return data.model_copy(update={"features": tuple(features)})


def _length_of_vectors(
    data: DataConfig, feature: Feature, files: Mapping[str, Sequence[InputFile]]
) -> int:
    """The length of the first vector of a field.

    Raises:
        DataError: there is none.
    """
    setting = feature.npy or feature.file
    assert setting is not None
    if feature.npy is not None:
        return int(open_array(files[label_of(setting)][0]).shape[1])
    column = column_of(feature)
    for file in files[label_of(setting)]:
        with suppress(EmptyFile):
            layout = data.files.get(file.pattern)
            if length := length_of_vectors(file.path, column, layout, file.pattern):
                return length
    raise DataError(
        f"{label_of(setting)}: the column {column.name!r} holds no vector; write a list of numbers "
        f"for each {feature.entity}, or leave the field {feature.name} out"
    )


def _up_to_date(folder: Path, wanted: str) -> Manifest | None:
    """The manifest if the folder holds an up-to-date dataset; otherwise None."""
    if (folder / "manifest.json").is_file():
        try:
            manifest = Manifest.read(folder)
        except DataError as error:  # of another version, or damaged
            log.warning("%s: preparing it again", str(error).partition("; ")[0])
            return None
        if manifest.fingerprint == wanted:
            return manifest
        log.info("%s was prepared from other inputs or settings: preparing it again", folder)
    elif folder.is_dir() and any(folder.iterdir()):
        raise DataError(
            f"{folder}: holds files but no prepared dataset; delete it, or set data.name or "
            f"run.prepared_root to another folder"
        )
    return None


def _report(manifest: Manifest, folder: Path, seconds: float) -> None:
    for reason, count in manifest.dropped.items():
        log.info("dropped %s: %s", reason, f"{count:,}")
    for reason, count in manifest.noted.items():
        log.warning("%s: %s", reason, f"{count:,}")
    for name in SPLITS[1:]:
        if manifest.splits[name].rows == 0 and not manifest.data.refit:
            _report_empty(manifest.data, name)
    for entity, n in manifest.cold.items():
        log.info(
            "%s without training rows: can be ranked by attributes if the model is trained with "
            "data.id_dropout",
            plural(n, entity),
        )
    sizes = "; ".join(f"{name} {manifest.composition(name)}" for name in SPLITS)
    tables = ", ".join(f"{name} {spec.rows:,}" for name, spec in manifest.tables.items())
    log.info("%s: rows: %s; tables: %s (%.1f s)", folder, sizes, tables, seconds)


def _report_empty(data: DataConfig, name: str) -> None:
    """Warns why a requested split has no rows."""
    share, file = getattr(data.split, name), getattr(data.split, f"{name}_file")
    if file is not None:
        log.warning(
            "the %s split is empty: every row of split.%s_file=%s is dropped", name, name, file
        )
    elif data.interactions.split is not None:
        log.warning(
            "the %s split is empty: no remaining row has it in the column %r",
            name,
            data.interactions.split,
        )
    elif share:
        log.warning(
            "the %s split is empty: split.%s=%g holds out no row; to hold some out, set %s",
            name,
            name,
            share,
            data.split.larger(name),
        )


def _build_dataset(job: Job, wanted: str) -> Manifest:
    """Runs all steps and writes the dataset into an empty folder. All threads."""
    earlier = PreviousDataset(job.earlier)
    readers = job.crew.gather(ThreadReader(job))
    partitions: Partitions = job.crew.broadcast(
        Partitions.from_readers(job, readers) if job.crew.is_first else None
    )
    counts = split_and_count(job, partitions)
    fit = Fitter(job, partitions, counts, earlier) if job.crew.is_first else None
    plan: WritePlan = job.crew.broadcast(fit and WritePlan.from_counts(job, counts, fit.fitted))
    histories = HistoryWriter(
        plan.fitted.rows.get("user", 1), plan.n_rare, job.n_user_groups, job.spill(""), job.crew
    )
    if fit is not None:
        carry(histories, earlier, fit)
    written = write_rows(job, partitions, plan, histories)
    from_threads = job.crew.gather(job)
    manifest = None
    if fit is not None:
        for other in from_threads[1:]:
            job.dropped.update(other.dropped)
            job.noted.update(other.noted)
        manifest = finish(
            job, wanted, counts, fit, plan, written, histories=histories, earlier=earlier
        )
    result: Manifest = job.crew.broadcast(manifest)
    return result


def finish(
    job: Job,
    wanted: str,
    counts: Counts,
    fit: Fitter,
    plan: WritePlan,
    written: WriteResult,
    histories: HistoryWriter,
    earlier: PreviousDataset,
    row_sums: Mapping[str, int] | None = None,
) -> Manifest:
    """Writes vocabularies, users and items after the rows, and the manifest last.

    Args:
        job: the preparation.
        wanted: fingerprint of the dataset.
        counts: the counts of all partitions.
        fit: results of fitting.
        plan: the plan for writing rows.
        written: counts of all partitions.
        histories: users' items.
        earlier: the dataset that this one continues.
        row_sums: `footer_sums` of the files of rows, if they are elsewhere.
    """
    sums = write_entities(job, fit, counts, histories, earlier) | sums_of_tables(written.sums)
    before = earlier.manifest.data_hash if earlier.manifest else None  # histories are carried over
    tables = _tables(job.data, fit)
    vocabulary_hash, field_hashes = _hashes_of(job.data, fit, tables)
    manifest = Manifest(
        format=FORMAT,
        fingerprint=wanted,
        vocabulary_hash=vocabulary_hash,
        field_hashes=field_hashes,
        data_hash=hash_of([sums, before]),
        grown_from=(*earlier.manifest.grown_from, earlier.manifest.vocabulary_hash)
        if earlier.manifest
        else (),
        seed=job.seed,
        data=job.data,
        tables=tables,
        entities=fit.fitted.rows,
        cold=fit.fitted.cold,
        numeric=fit.fitted.numeric,
        mean_weight=counts.mean_weight,
        time_scale=fit.time_scale,
        splits=written.splits(counts, job.data),
        files=job.n_partitions,
        lanes=plan.lanes,
        groups=plan.groups,
        dropped=dict(sorted(job.dropped.items())),
        noted=dict(sorted(job.noted.items())),
        inputs={f.name: f.size for files in job.files.values() for f in files},
        profile=_profile(job.data, counts, fit),
        versions=versions(),
        sums=dict(sorted({**footer_sums(job.folder), **(row_sums or {})}.items())),
    )
    manifest.write(job.folder)
    return manifest


def _profile(data: DataConfig, counts: Counts, fit: Fitter) -> Profile:
    missing = {feature.name: fit.missing(feature) for feature in data.features}
    shares = {name: share for name, share in missing.items() if share is not None}
    if not counts.days:
        return Profile(missing=shares)
    first, last = min(counts.days), max(counts.days)
    days_per_period = -(-(last - first + 1) // _MOST_PERIODS)
    rows = [0] * (1 + (last - first) // days_per_period)
    for day, count in counts.days.items():
        rows[(day - first) // days_per_period] += count
    return Profile(
        first_day=str(np.datetime64(first, "D")),
        days_per_period=days_per_period,
        rows_by_period=tuple(rows),
        missing=shares,
    )


def _tables(data: DataConfig, fit: Fitter) -> dict[str, TableSpec]:
    tables = {}
    for name in table_names(data.features):
        features = [f for f in data.features if f.in_table and f.table_name == name]
        if features[0].transform == "bucket":
            rows = 2 + len(fit.fitted.numeric[features[0].name].boundaries)
        elif features[0].hash_rows is not None:
            rows = 1 + features[0].hash_rows
        else:
            rows = fit.vocabularies[name].rows
        tables[name] = TableSpec(rows=rows, features=tuple(f.name for f in features))
    return tables


def _hashes_of(
    data: DataConfig, fit: Fitter, tables: dict[str, TableSpec]
) -> tuple[str, dict[str, str]]:
    """Hash of everything that maps values to rows and numbers, and the same by field."""
    digests = {name: _digest_of(vocabulary) for name, vocabulary in fit.vocabularies.items()}
    numbers: dict[str, tuple[str | float, ...]] = {}
    for feature in (f for f in data.features if f.kind != "categorical"):
        spec = fit.fitted.numeric[feature.name]
        numbers[feature.name] = (feature.transform, *spec.boundaries)
        if feature.kind == "vector":
            numbers[feature.name] = (feature.kind, float(feature.dim or 0), f"{spec.std:.6g}")
        if feature.transform == "standard":
            # Without the last digits, which depend on the order in which partitions are summed.
            numbers[feature.name] += (round(spec.mean / spec.std, 6) + 0.0, f"{spec.std:.6g}")
    rows = {name: spec.rows for name, spec in tables.items()}
    field_hashes = {}
    for feature in data.features:
        source = feature if feature.history is None else data.source_of(feature)
        ids = digests.get(source.table_name) if feature.in_table else None
        if ids is None and source.is_id:  # a history of items without a table
            ids = _digest_of(fit.entities[source.entity])
        own = rows[feature.table_name] if feature.in_table else None, numbers.get(feature.name)
        field_hashes[feature.name] = hash_of([ids, own, feature.multi_valued])
    return hash_of([digests, rows, numbers]), field_hashes


def _digest_of(vocabulary: Vocabulary) -> str:
    digest = hashlib.sha256()
    for buffer in pa.concat_arrays([vocabulary.ids]).buffers():
        digest.update(buffer or b"")
    return digest.hexdigest()
