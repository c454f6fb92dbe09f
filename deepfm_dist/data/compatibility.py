"""Checks whether a dataset is compatible with the one that a model was trained on.

A model identifies fields by position and values by table row. With a dataset in which these differ,
it would silently give wrong logits, so everything is compared first.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deepfm_dist.data.manifest import GIVEN, Manifest
from deepfm_dist.data.schema import DataConfig, Feature
from deepfm_dist.errors import CheckpointError, ConfigError
from deepfm_dist.section import DEFAULTS

log = logging.getLogger(__name__)
_UNNAMED = "the input or the version of deepfm_dist has changed"
_OF_FILES = ("file", "key", "npy")  # settings of a field that say where its values come from
_OF_READING = ("min_count",)  # and those that vocabularies show
_MOST_CHANGES = 3
"""Maximum number of changes in a message."""
_FREE = {"name", "root", "files", "memory_bytes", "on_device", "lanes", "titles"}
_FREE |= {"vocabulary_from", "forget_after", "features", "id_dropout"}


def check_match(
    checkpoint: Path,
    state: Mapping[str, Any],
    trained: DataConfig,
    folder: Path,
    manifest: Manifest,
    same_rows: bool = False,
) -> None:
    """Compares a checkpoint's data with a prepared dataset.

    Args:
        checkpoint: its folder, for messages.
        state: its marker.
        trained: the data settings of its run.
        folder: the folder of the dataset, for messages.
        manifest: the manifest of the dataset.
        same_rows: whether to refuse different rows; otherwise warn.

    Raises:
        CheckpointError: the dataset differs; the message names the difference, both values and a
            cure.
    """
    cure = (
        f"prepare the data with the settings it was trained with: "
        f"python -m deepfm_dist.prepare --config {checkpoint.parent.parent}; or train again"
    )
    if manifest.fingerprint == GIVEN:
        cure = "set data.name or run.prepared_root to the dataset of the run, or train again"
    prepared = manifest.data
    differing = next(_differences(trained, prepared), None)
    if differing is not None:
        name, old, new = differing
        raise CheckpointError(
            f"{checkpoint} was trained with {name}={old}, {folder} was prepared with {name}={new}; "
            f"{cure}"
        )
    others = [f"{name}={new}, not {old}" for name, old, new in _other(trained, prepared)]
    reason = "; ".join(others) or _UNNAMED
    if state["vocabulary_hash"] != manifest.vocabulary_hash:
        fields = changed_fields(state, manifest)
        reason += f"; ids or statistics differ of {', '.join(fields)}" * bool(fields)
        raise CheckpointError(
            f"{checkpoint} was trained on vocabulary {state['vocabulary_hash']}, {folder} has "
            f"{manifest.vocabulary_hash} ({reason}); {cure}"
        )
    if changed := changed_fields(state, manifest):  # such as a history of items without a table
        raise CheckpointError(
            f"{checkpoint}: the ids or statistics of {', '.join(changed)} are others in {folder} "
            f"({reason}); {cure}"
        )
    hashes = state.get("data_hash"), manifest.data_hash
    if hashes[0] == hashes[1] or None in hashes:
        return
    text = f"{folder} holds other rows than {checkpoint} was trained on ({reason})"
    if same_rows:
        raise CheckpointError(
            f"{text}: held-out rows may be among those it was trained on, and figures on them "
            f"would flatter it; {cure}"
        )
    log.warning("%s: histories and values of users and items are those of the dataset", text)


def changed_fields(state: Mapping[str, Any], manifest: Manifest) -> list[str]:
    """Fields whose values have different rows or numbers than in the checkpoint's data.

    Fields for which either side has no hash are not included.
    """
    before, now = state.get("field_hashes") or {}, manifest.field_hashes
    return [name for name in before if name in now and before[name] != now[name]]


def check_start(
    option: str, state: Mapping[str, Any], trained: DataConfig, manifest: Manifest
) -> None:
    """Checks that fields shared with the model to start from mean the same.

    Args:
        option: the setting that names the checkpoint, and its value, for messages.
        state: the checkpoint's marker.
        trained: the data settings of its run.
        manifest: the manifest of the data that the new model is trained on.

    Raises:
        CheckpointError: ids have different rows, or numbers a different scale.
        ConfigError: a field's kind differs.
    """
    ours, theirs = manifest.data.interactions.labels, trained.interactions.labels
    if ours != theirs:
        raise ConfigError(
            f"{option}: its model was trained on {_targets(theirs)}, and data.interactions has "
            f"{_targets(ours)}; start from a run with the same targets, or train from scratch"
        )
    shared = [*shared_fields(trained, manifest.data)]
    for one, other in shared:
        before, now = one.meaning, other.meaning
        for setting in now:
            if before[setting] != now[setting]:
                raise ConfigError(
                    f"{option}: data.features: {one.name}: {setting} is {now[setting]!r} and was "
                    f"{before[setting]!r} in training; set it back, or give the field (and its "
                    f"table) another name, to train it from scratch"
                )
        for name, old, new in field_differences(one, other):
            log.warning("%s: %s=%s, not %s: its weights are used anyway", option, name, new, old)
    if state["vocabulary_hash"] in (manifest.vocabulary_hash, *manifest.grown_from):
        return
    changed = changed_fields(state, manifest)
    known = (state.get("field_hashes") or {}).keys() & manifest.field_hashes.keys()
    if changed or not {one.name for one, _ in shared} <= known:
        fields = f" in the fields {', '.join(changed)}" if changed else ""
        raise CheckpointError(
            f"{option}: trained on vocabulary {state['vocabulary_hash']}, which this run's data "
            f"does not extend{fields}; prepare it with data.vocabulary_from"
        )


def _targets(labels: Sequence[str]) -> str:
    return f"labels={','.join(labels)}" if labels else "one target"


def _differences(trained: DataConfig, prepared: DataConfig) -> Iterator[tuple[str, Any, Any]]:
    """Differences that change the meaning of a logit even with equal vocabularies."""
    for one, other in shared_fields(trained, prepared):
        yield from field_differences(one, other)
    ours, others = (
        {
            "data.features": ",".join(f.name for f in data.features),
            "data.task": data.task,
            "data.interactions.labels": ",".join(data.interactions.labels),
            "data.history.max_length": data.history.max_length,
        }
        for data in (trained, prepared)
    )
    for name in ours:
        if ours[name] != others[name]:
            yield name, ours[name], others[name]


def shared_fields(trained: DataConfig, prepared: DataConfig) -> Iterator[tuple[Feature, Feature]]:
    """Pairs of fields with the same name in a run's settings and in a dataset."""
    theirs = {f.name: f for f in prepared.features}
    for one in trained.features:
        other = theirs.get(one.name)
        if other is not None:
            yield one.settled_by(other), other


def field_differences(
    one: Feature, other: Feature, free: Sequence[str] = (*_OF_FILES, *_OF_READING)
) -> Iterator[tuple[str, Any, Any]]:
    """Differing settings of two fields: ``data.features.NAME.SETTING``, both values.

    Args:
        one: a field.
        other: the field it is compared with.
        free: settings that are allowed to differ.
    """
    ours, theirs = (
        f.model_dump(mode="json", exclude={*free, "table"})
        | {"table": f.table_name, "several values": f.multi_valued, "id": f.names_entity}
        for f in (one, other)
    )
    for setting in ours:
        if ours[setting] != theirs[setting]:
            yield f"data.features.{one.name}.{setting}", ours[setting], theirs[setting]


def _other(trained: DataConfig, prepared: DataConfig) -> Iterator[tuple[str, Any, Any]]:
    """Settings that change the rows or their splits."""
    ours, theirs = (
        data.model_dump(mode="json", exclude=_FREE, context=DEFAULTS)
        for data in (trained, prepared)
    )
    yield from changed_settings(ours, theirs, "data")
    for one, other in shared_fields(trained, prepared):
        yield from field_differences(one, other, ())


def changes_between(old: Manifest, new: Manifest) -> str:
    """Describes what changed a dataset: settings, input files, or the program's version."""
    theirs, ours = old.data, new.data
    differing = [*_differences(theirs, ours), *_other(theirs, ours)]
    files = [
        d.model_dump(mode="json", include={"files"}, exclude_defaults=True) for d in (theirs, ours)
    ]
    differing += changed_settings(files[0], files[1], "data")
    changes = {name: f"{name}={after}, not {before}" for name, before, after in differing}
    if old.seed != new.seed:
        changes["seed"] = f"the seed is {new.seed}, not {old.seed}"
    for file in {**old.inputs, **new.inputs}:
        sizes = old.inputs.get(file), new.inputs.get(file)
        if sizes[0] != sizes[1]:
            what = "gone" if sizes[1] is None else "new" if sizes[0] is None else "of another size"
            changes[file] = f"{file} is {what}"
    shown = [*changes.values()]
    if shown:
        more = f" and {len(shown) - _MOST_CHANGES} more" * (len(shown) > _MOST_CHANGES)
        what = "; ".join(shown[:_MOST_CHANGES]) + more
        return f"its input files or settings have changed ({what})"
    programs = [name for name in new.versions if new.versions[name] != old.versions.get(name)]
    if programs:
        before, after = (
            ", ".join(f"{name} {versions.get(name)}" for name in programs)
            for versions in (old.versions, new.versions)
        )
        return (
            f"it was prepared with {before}, and with {after} the same settings and files (by name "
            f"and size) give another dataset"
        )
    return "an input file was edited, though its size is the same"


def changed_settings(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Settings whose values differ: dotted name below ``name``, old and new value."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from changed_settings(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
    elif old != new:
        yield name, old, new
