"""The Python API: data frames in, data frames out, by the same jobs as the commands.

`fit` writes the frames as Parquet into a folder, with a configuration next to them, and trains as
``python -m deepfm_dist.train --config FOLDER/NAME.yaml`` would: the commands can continue a run
that was started here, on more ranks, and vice versa.
"""

import io
import logging
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from deepfm_dist.config import Config, config_from, load_config, with_settings
from deepfm_dist.environment import quieten_libraries, require
from deepfm_dist.errors import CheckpointError, ConfigError, DataError, DeepFMError
from deepfm_dist.launcher import read_launch
from deepfm_dist.messages import listed, plural
from deepfm_dist.storage import follow_pointer

log = logging.getLogger(__name__)
_TITLE = "title"
_OF_NUMPY = (np.ndarray, np.generic, pd.Series, pd.Index)
_METHODS = {
    "prepare": "fit(...)",
    "train": "fit(...)",
    "evaluate": "Model.evaluate()",
    "recommend": "Model.recommend()",
    "similar": "Model.similar()",
    "predict": "Model.predict(rows)",
}
_COMMAND = re.compile(rf"python -m deepfm_dist\.({'|'.join(_METHODS)})\b")
_SETTING = re.compile(
    rf"(?<![\w./-])({'|'.join(Config.model_fields)})\.([a-z_][\w.]*)="
    rf"(\"[^\"]*\"|\[[^\]]*\]|\{{[^}}]*\}}|[^\s;,:)]+)"
)


def fit(
    interactions: pd.DataFrame,
    *,
    user: str = "user",
    item: str = "item",
    time: str | None = None,
    label: str | Sequence[str] | None = None,
    users: pd.DataFrame | None = None,
    items: pd.DataFrame | None = None,
    context: str | Sequence[str] = (),
    folder: str | Path = "deepfm",
    name: str | None = None,
    **sections: Mapping[str, Any],
) -> "Model":
    """Trains a DeepFM on data frames.

    Args:
        interactions: one row each: a user, an item, and optionally a time, labels and context.
        user: its column of users.
        item: its column of items.
        time: its column of times (numbers or timestamps).
        label: its column of labels, 0 or 1, or several, ``["click", "buy"]``, all of which are
            predicted, and whose cells may be empty; without one every row is a positive.
        users: fields of the users: a column ``user`` and others. In all frames, text and integers
            are categories, floats are numbers; lists are several values, or a vector.
        items: fields of the items, in the same way; a column ``title`` is for display only.
        context: further columns of ``interactions`` that are fields of the model.
        folder: where everything is written.
        name: the name of the model in the folder. Default: ``model``, ``model-2`` and so on, a new
            one for every call. An existing model is resumed, or returned if it is finished, but
            only with the same frames and settings; ``trainer.epochs`` may be larger.
        sections: settings, such as ``model={"embedding_dim": 32}``; see docs/configuration.md.

    Returns:
        The trained model.

    Raises:
        DataError: a column is missing, or the data cannot be used.
        ConfigError: a setting is unknown or has a bad value, or ``name`` holds a different model.
    """
    names: dict[str, str] = {}
    with _in_python(names):
        _check_alone()
        for what, frame in (("interactions", interactions), ("users", users), ("items", items)):
            _check_frame(frame, what, optional=what != "interactions")
        context = [context] if isinstance(context, str) else context
        labels = "label" if isinstance(label, str) else "labels"
        roles = {"user": user, "item": item, "time": time, labels: label}
        columns = {role: column for role, column in roles.items() if column is not None}
        entities = {"user": users, "item": items}
        inputs = _inputs(interactions, columns, entities, context, sections.get("data", {}))
        root = Path(folder)
        settings = partial(_settings, root, inputs.data, sections)
        name = name or sections.get("run", {}).get("name")
        config = settings(name or "model")  # errors are raised before anything is written
        config = _claim(root, settings) if name is None else config
        where = _input(root, config.run.name)
        names |= {str(where / file): Path(file).stem for file in inputs.frames}
        _write_frames(where, config, inputs.frames)
        return _train(config, root / f"{config.run.name}.yaml")


@dataclass(frozen=True)
class _Inputs:
    """Data frames and the settings that describe them.

    Attributes:
        data: the section ``data`` of the settings, without its root.
        frames: the frames, by the name of the file that holds them.
    """

    data: dict[str, Any]
    frames: dict[str, pd.DataFrame]


def _train(config: Config, file: Path) -> "Model":
    """Trains and saves the settings; an existing model's are replaced at the end."""
    from deepfm_dist.distributed.checkpoint import complete_steps

    if not complete_steps(config.run_dir):
        file.write_text(config.to_yaml())
    model = Model.train(config)  # refused if the trained model has other settings
    file.write_text(config.to_yaml())
    return model


def _check_alone() -> None:
    """Refuses to train under a launcher.

    Raises:
        ConfigError: a launcher has started several processes.
    """
    if (ranks := read_launch().world_size) > 1:
        raise ConfigError(
            f"fit trains in one process, but a launcher has started {ranks}; write the "
            f"configuration with fit in one process, then train it under the launcher"
        )


def _inputs(
    interactions: pd.DataFrame,
    columns: Mapping[str, Any],
    entities: Mapping[str, pd.DataFrame | None],
    context: Sequence[str],
    given: Mapping[str, Any],
) -> _Inputs:
    """Describes data frames as input files.

    Args:
        interactions: one row each.
        columns: of ``interactions``, by role: user, item, time, label, or labels, a list.
        entities: fields of users and items, by entity.
        context: columns of ``interactions`` that are fields.
        given: the caller's settings of the section ``data``.

    Raises:
        DataError: a column is missing.
    """
    data, frames = {**given}, dict[str, pd.DataFrame]()
    named = [
        c for given in columns.values() for c in ([given] if isinstance(given, str) else given)
    ]
    _check_columns(interactions, [*named, *context], "interactions")
    further = {**data.get("interactions", {})}  # rating, weight, split, ...
    kept = [c for c in further.values() if isinstance(c, str) and c in interactions.columns]
    kept = list(dict.fromkeys([*named, *context, *kept]))
    if unused := [column for column in interactions.columns if column not in kept]:
        log.warning(
            "interactions: columns not used: %s; to make one a field of the model, name it in "
            "context=",
            listed(unused),
        )
    frames["interactions.parquet"] = interactions[kept]
    data["interactions"] = {**further, "file": "interactions.parquet", **columns}
    if columns.keys() & {"label", "labels"}:
        data["task"] = "ctr"
    features: list[dict[str, Any]] = [
        {"name": f"{entity}_id" if columns[entity] != entity else entity, "entity": entity}
        for entity in entities
    ]
    for entity, frame in entities.items():
        if frame is None:
            continue
        key = columns[entity]
        _check_columns(frame, [key], f"{entity}s")
        fields = [str(column) for column in frame.columns if column != key]
        if entity == "item" and _TITLE in fields:
            fields.remove(_TITLE)
            data["titles"] = {"file": "titles.parquet", "column": _TITLE}
            frames["titles.parquet"] = frame[[key, _TITLE]]
        features += [_field(frame, entity, key, column, frames) for column in fields]
    features += [{"name": column, **_kind(interactions[column])} for column in context]
    data.setdefault("features", features)
    return _Inputs(data, frames)


def _settings(
    root: Path, data: Mapping[str, Any], sections: Mapping[str, Mapping[str, Any]], name: str
) -> Config:
    """The settings of a model by its name.

    Raises:
        ConfigError: a setting is unknown or has a bad value.
    """
    places = {"prepared_root": str(root / "prepared"), "runs_root": str(root / "runs")}
    run = {**places, "loggers": [], **sections.get("run", {}), "name": name}
    tree = {**sections, "run": run, "data": {"root": str(_input(root, f"{name}")), **data}}
    config = config_from(_plain(tree), origin="fit")
    if "/" in name:
        raise ConfigError(f"fit: name={name!r}: a name, not a path; give folder= the path")
    return config


@dataclass(frozen=True, repr=False)
class Evaluation:
    """What `Model.evaluate` measured.

    Attributes:
        rows: figures on the rows of the split: one row, named after the split.
        rankings: one row per ranking, the model's first; ``recall@10`` and others as columns. Empty
            where rows have labels.
        verdicts: an assessment in words.
    """

    rows: pd.DataFrame
    rankings: pd.DataFrame
    verdicts: tuple[str, ...]

    def __repr__(self) -> str:
        return "\n\n".join([*(f.T.to_string() for f in self._frames), "\n".join(self.verdicts)])

    def _repr_html_(self) -> str:
        return "".join(f.T.to_html() for f in self._frames) + "<br>".join(self.verdicts)

    @property
    def _frames(self) -> list[pd.DataFrame]:
        return [frame for frame in (self.rows, self.rankings) if not frame.empty]


@dataclass(frozen=True, repr=False)
class Model:
    """A trained model, on disk: one checkpoint of one run.

    Attributes:
        config: its settings, as for the commands.
        checkpoint: the folder of its weights; if it is replaced, the model refuses to use it.
        digest: the digest of its files.
    """

    config: Config
    checkpoint: Path
    digest: str

    @classmethod
    def load(cls, path: str | Path) -> "Model":
        """Loads a model by the configuration file that `fit` wrote or by the folder of a run.

        Raises:
            ConfigError: the file does not exist.
            CheckpointError: there is no checkpoint yet.
        """
        with _in_python():
            run = follow_pointer(Path(path))
            is_run = run.is_dir()
            file = run / "config.yaml" if is_run else run
            if not file.is_file():
                raise ConfigError(
                    f"{path}: not a file; give the configuration that fit wrote, such as "
                    f"deepfm/model.yaml, or the folder of a run"
                )
            config = load_config(str(file))
            if is_run:  # even if it was moved since training
                where = {"run.runs_root": str(file.parent.parent), "run.name": file.parent.name}
                config = with_settings(config, where)
            return cls.of(config)

    @classmethod
    def train(cls, config: Config) -> "Model":
        """Trains a model from a configuration."""
        from deepfm_dist.jobs.train import train

        with _in_python():
            _ready(config)
            train(config)
            return cls.of(config)

    @classmethod
    def of(cls, config: Config) -> "Model":
        """The model selected by ``checkpoint.use``."""
        from deepfm_dist.distributed.checkpoint import digest_of, read_checkpoint

        saved = read_checkpoint(config.run_dir, config.checkpoint.use)
        return cls(config, saved.path, digest_of(saved.state))

    @property
    def report(self) -> Path:
        """The HTML report that `evaluate` writes."""
        return self.config.run_dir / "report.html"

    def __repr__(self) -> str:
        from deepfm_dist.data.manifest import Manifest
        from deepfm_dist.distributed.checkpoint import read_state
        from deepfm_dist.model.settings import ModelConfig
        from deepfm_dist.runs.trained import settings_in

        lines = [f"deepfm_dist model {self.config.run.name!r}: {self.checkpoint}"]
        if (manifest := Manifest.find(self.config.prepared_dir)) is not None:
            sizes = [f"trained on {manifest.composition('train')}"]
            sizes += [plural(n - 1, entity) for entity, n in manifest.entities.items()]
            names = [feature.name for feature in manifest.features]
            lines += [f"  {', '.join(sizes)}", f"  fields: {listed(names)}"]
        model = self.config.model
        with suppress(DeepFMError):  # it may have been deleted since
            trained = settings_in(read_state(self.checkpoint))["model"]
            model = ModelConfig.model_validate(trained)
        layers = "-".join(map(str, model.over_arch_layer_sizes)) if model.deep else "none"
        lines.append(f"  embedding_dim {model.embedding_dim}, hidden layers {layers}")
        lines.append("  evaluate(), recommend(), similar(), predict(rows); settings in .config")
        return "\n".join(lines)

    def evaluate(self, **settings: Any) -> Evaluation:
        """Measures the model on held-out rows, and writes `report`.

        Args:
            settings: the settings of the section ``evaluate``, such as ``k=[5, 10]``.
        """
        from deepfm_dist.jobs.evaluate import evaluate

        with _in_python():
            result = evaluate(self._with("evaluate", settings))
        assert result is not None  # one process
        rankings = pd.DataFrame(result.comparison.figures).T if result.comparison else None
        return Evaluation(
            pd.DataFrame(result.meaningful_rows, index=[result.split]),
            pd.DataFrame() if rankings is None else rankings,
            tuple(map(str, result.verdicts)),
        )

    def recommend(self, **settings: Any) -> pd.DataFrame:
        """Every user's best unseen items: ``user_id, item_id, score, rank``.

        Args:
            settings: the settings of the section ``recommend``, such as ``k=20, users=[4, 6]``.
                ``requests`` and ``histories`` may be a pandas DataFrame or pyarrow Table in place
                of a file.
        """
        from deepfm_dist.jobs.recommend import recommend

        with tempfile.TemporaryDirectory() as folder:
            files, names = dict(settings), dict[str, str]()
            for name in {"requests", "histories"} & settings.keys():
                if isinstance(settings[name], pd.DataFrame | pa.Table):
                    files[name] = str(Path(folder, f"{name}.parquet"))
                    names[files[name]] = name
            with _in_python(names):
                for path, name in names.items():
                    Path(path).write_bytes(_parquet(settings[name], name))
                result = recommend(self._with("recommend", files))
            assert result is not None  # one process
            return pd.read_parquet(result.files.parquet)

    def similar(self, **settings: Any) -> pd.DataFrame:
        """Every item's most similar items: ``item_id, similar_item_id, score, rank``.

        Args:
            settings: the settings of the section ``similar``, such as ``k=5``.
        """
        from deepfm_dist.jobs.similar import similar

        with _in_python():
            result = similar(self._with("similar", settings))
        assert result is not None  # one process
        return pd.read_parquet(result.files.parquet)

    def predict(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Scores rows with the columns of the interactions: ``logit`` and ``probability``.

        With several targets, ``logit_buy``, ``probability_buy`` and so on.

        Args:
            rows: in any order; the result keeps the order and index. Unknown ids are allowed.
        """
        from deepfm_dist.jobs.predict import predict

        _check_frame(rows, "rows")
        with tempfile.TemporaryDirectory() as folder:
            source, target = (Path(folder, f"{name}.parquet") for name in ("rows", "scores"))
            with _in_python({str(source): "rows", source.name: "rows"}):
                source.write_bytes(_parquet(rows, "rows"))
                predict(self._with("predict", {}), str(source), target)
            ends = [f"_{label}" for label in self.config.data.interactions.labels] or [""]
            names = [f"{name}{end}" for end in ends for name in ("score", "probability")]
            scores = pd.read_parquet(target, columns=names)
        logits = {f"score{end}": f"logit{end}" for end in ends}
        return scores.rename(columns=logits).set_axis(rows.index)

    def _with(self, command: str, settings: Mapping[str, Any]) -> Config:
        """The settings of a command on this checkpoint.

        Raises:
            CheckpointError: the checkpoint was replaced or deleted.
            ConfigError: a setting is unknown or has a bad value.
        """
        from deepfm_dist.distributed.checkpoint import digest_of, read_state, use_of

        tree = self.config.model_dump(mode="json")
        if settings:
            tree[command] |= _plain(settings)
        if not self.checkpoint.is_dir() or digest_of(read_state(self.checkpoint)) != self.digest:
            raise CheckpointError(
                f"{self.checkpoint}: no longer the checkpoint of this model: its run was trained "
                f"again; Model.load({str(self.config.run_dir)!r}) loads the current one"
            )
        tree["checkpoint"]["use"] = use_of(self.checkpoint)
        config = config_from(tree, origin=command)
        _ready(config)
        return config


def _ready(config: Config) -> None:
    quieten_libraries()
    require(config.run.device)


@contextmanager
def _in_python(names: Mapping[str, str] = MappingProxyType({})) -> Iterator[None]:
    """Rewrites errors and log lines of the commands in terms of this module.

    Args:
        names: replacements for the names of files that the caller does not know.
    """

    def translated(message: str) -> str:
        message = python_words(message)
        for path, name in names.items():
            message = message.replace(path, name)
        return message

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = factory(*args, **kwargs)
        if made.name.startswith("deepfm_dist."):
            made.msg, made.args = translated(made.getMessage()), ()
        return made

    factory = logging.getLogRecordFactory()  # a caller's handlers see these records
    logging.setLogRecordFactory(record)
    try:
        yield
    except DeepFMError as error:
        error.args = (translated(str(error)),)
        raise
    finally:
        logging.setLogRecordFactory(factory)


def python_words(message: str) -> str:
    """``data.on_bad_row=skip`` as ``data={"on_bad_row": "skip"}``, and commands as methods."""

    def argument(match: re.Match[str]) -> str:
        section, name, text = match.groups()
        try:
            value = yaml.safe_load(text)
            if isinstance(value, str) and value.startswith("["):  # a list in quotes, for a shell
                value = yaml.safe_load(value)
        except yaml.YAMLError:
            return match.group()
        for part in reversed(name.split(".")):
            value = {part: value}
        return f"{section}={value!r}".replace("'", '"')

    message = _COMMAND.sub(lambda match: _METHODS[match[1]], message)
    message = message.replace("for it, stop it, or choose another --output", "for it or stop it")
    return _SETTING.sub(argument, message.replace("another run.name", "another name"))


def _input(root: Path, name: str) -> Path:
    return root / "input" / name


def _claim(root: Path, settings: Callable[[str], Config]) -> Config:
    """The settings with the first free name; creating its input folder claims the name."""
    for number in count(1):
        config = settings("model" if number == 1 else f"model-{number}")
        if config.run_dir.exists():
            continue
        try:
            _input(root, config.run.name).mkdir(parents=True)
        except FileExistsError:
            continue
        return config
    raise AssertionError


def _write_frames(folder: Path, config: Config, frames: Mapping[str, pd.DataFrame]) -> None:
    """Writes the frames; refused if the model was trained on others.

    Raises:
        ConfigError: a trained model of this name has other frames.
    """
    from deepfm_dist.distributed.checkpoint import complete_steps

    files = {folder / name: _parquet(frame, Path(name).stem) for name, frame in frames.items()}
    others = [path for path, content in files.items() if not _holds(path, content)]
    if others and complete_steps(config.run_dir) and config.checkpoint.resume != "never":
        raise ConfigError(
            f"fit: {config.run_dir} holds a model {config.run.name!r} of other data frames; give "
            f"this one another name=, leave name= out for a new one, or replace the model with "
            f"checkpoint.resume=never"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for path in others:  # only changed ones: preparation compares modification times
        path.write_bytes(files[path])


def _holds(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content


def _parquet(frame: pd.DataFrame | pa.Table, name: str) -> bytes:
    """A frame or table as a Parquet file.

    Raises:
        DataError: a column mixes types, or several columns have the same name.
    """
    buffer = io.BytesIO()
    if isinstance(frame, pa.Table):
        pq.write_table(frame, buffer)
        return buffer.getvalue()
    _check_frame(frame, name)
    try:
        frame.rename(columns=str).to_parquet(buffer, index=False)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise DataError(
            f"{name}: a column holds values that Parquet cannot store together "
            f"({' '.join(str(error).split())}); give each column one type, such as "
            f"frame[column].astype(str)"
        ) from None
    return buffer.getvalue()


def _plain(value: Any) -> Any:
    """Settings with numpy and pandas scalars converted to Python's."""
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value.tolist() if isinstance(value, _OF_NUMPY) else value


def _check_frame(frame: object, what: str, optional: bool = False) -> None:
    """Requires a pandas DataFrame with unique column names.

    Raises:
        DataError: it is not.
    """
    if optional and frame is None:
        return
    if not isinstance(frame, pd.DataFrame):
        kind = f"{type(frame).__module__}.{type(frame).__name__}".removeprefix("builtins.")
        cure = ".to_pandas()" if hasattr(frame, "to_pandas") else "pandas.DataFrame(...)"
        raise DataError(f"{what}: must be a pandas DataFrame, not {kind}; pass it as {cure}")
    if len(twice := frame.columns[frame.columns.duplicated()]):
        raise DataError(
            f"{what}: several columns are called {twice[0]!r}; keep one, such as by "
            f"frame.loc[:, ~frame.columns.duplicated()]"
        )


def _check_columns(frame: pd.DataFrame, wanted: Sequence[str], what: str) -> None:
    if missing := [c for c in wanted if c not in frame.columns]:
        there = ", ".join(map(str, frame.columns))
        raise DataError(f"{what}: no column {missing[0]!r}; available: {there}")


def _field(
    frame: pd.DataFrame, entity: str, key: str, column: str, frames: dict[str, pd.DataFrame]
) -> dict[str, Any]:
    """A field in a separate file, one row per value; the file is added to ``frames``."""
    file = f"{entity}-{column}.parquet"
    if _holds_vectors(frame[column]):
        frames[file] = frame[[key, column]]
        return {"name": column, "entity": entity, "file": file, "kind": "vector"}
    values = frame[[key, column]].explode(column).dropna()
    several = bool(values[key].duplicated().any())
    frames[file] = values
    field = {
        "name": column,
        "entity": entity,
        "file": file,
        **_kind(values[column].infer_objects()),
    }
    return field if several else {**field, "keep": "first"}


def _kind(values: "pd.Series[Any]") -> dict[str, str]:
    if pd.api.types.is_float_dtype(values):
        return {"kind": "numeric", "transform": "standard"}
    return {}


def _holds_vectors(cells: "pd.Series[Any]") -> bool:
    """Whether all non-empty cells are lists or arrays and at least one number is a float."""
    if cells.dtype != object:
        return False
    lists = cells[[isinstance(cell, Sequence | np.ndarray) for cell in cells]]
    if len(lists) < cells.notna().sum() or any(isinstance(cell, str) for cell in lists):
        return False
    numbers = lists.explode().dropna()
    return len(numbers) > 0 and pd.api.types.is_float_dtype(numbers.infer_objects())
