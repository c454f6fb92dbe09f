"""Data frames in, data frames out, over the same path as the commands.

`fit` writes the frames as parquet into a folder, beside them a configuration, and trains as
``python -m deepfm_dist.train --config FOLDER/NAME.yaml`` would: what is done here can go on with
the commands, on more ranks, and the other way round.
"""

import contextlib
import io
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from deepfm_dist.cli import quieten_libraries
from deepfm_dist.config import Config, config_from, load_config
from deepfm_dist.environment import require
from deepfm_dist.errors import DataError
from deepfm_dist.events import EvaluateEvent, last, read_events

_TITLE = "title"


def fit(
    interactions: pd.DataFrame,
    *,
    user: str = "user",
    item: str = "item",
    time: str | None = None,
    label: str | None = None,
    users: pd.DataFrame | None = None,
    items: pd.DataFrame | None = None,
    context: Sequence[str] = (),
    folder: str | Path = "deepfm",
    name: str = "model",
    **sections: Mapping[str, Any],
) -> "Model":
    """Trains a DeepFM on data frames.

    Args:
        interactions: one row for each: a user, an item, perhaps a time, a label, and context.
        user: its column of users.
        item: its column of items.
        time: its column of times (numbers or timestamps).
        label: its column of labels, 0 or 1; without one every row is a positive.
        users: fields of the users: a column ``user`` and others. Of every frame of fields, text and
            whole numbers are categories, fractions are numbers, a list holds several categories.
        items: fields of the items likewise; a column ``title`` is only shown.
        context: further columns of ``interactions`` that the model looks at.
        folder: where everything is written.
        name: of the run.
        sections: settings, such as ``model={"embedding_dim": 32}``; see docs/configuration.md.

    Returns:
        The trained model.

    Raises:
        DataError: a column is missing, or the data cannot be used.
        ConfigError: a setting is unknown or has a bad value.
    """
    root = Path(folder)
    data: dict[str, Any] = {"root": str(root / "input"), **sections.get("data", {})}
    rows = {"user": user, "item": item, "time": time, "label": label}
    columns = {role: column for role, column in rows.items() if column is not None}
    _check_columns(interactions, [*columns.values(), *context], "interactions")
    (root / "input").mkdir(parents=True, exist_ok=True)
    _write(interactions[[*columns.values(), *context]], root / "input/interactions.parquet")
    data["interactions"] = {"file": "interactions.parquet", **columns}
    if label is not None:
        data["task"] = "ctr"
    features = [{"name": f"{e}_id" if e != rows[e] else e, "entity": e} for e in ("user", "item")]
    for entity, frame in (("user", users), ("item", items)):
        if frame is not None:
            key = rows[entity]
            _check_columns(frame, [str(key)], f"{entity}s")
            fields = [str(c) for c in frame.columns if c != key]
            if entity == "item" and _TITLE in fields:
                fields.remove(_TITLE)
                data["titles"] = {"file": "titles.parquet", "column": _TITLE}
                _write(frame[[key, _TITLE]], root / "input/titles.parquet")
            features += [_field(frame, entity, str(key), c, root / "input") for c in fields]
    features += [{"name": c, **_kind(interactions[c])} for c in context]
    data.setdefault("features", features)
    places = {"prepared_root": str(root / "prepared"), "runs_root": str(root / "runs")}
    run = {"name": name, **places, "loggers": [], **sections.get("run", {})}
    config = config_from({**sections, "run": run, "data": data}, origin="fit")
    (root / f"{name}.yaml").write_text(config.to_yaml())
    model = Model(config)
    model._run("train")
    return model


@dataclass(frozen=True)
class Model:
    """A trained model, on disk.

    Attributes:
        config: its settings, as the commands take them.
    """

    config: Config

    @classmethod
    def load(cls, config: str | Path) -> "Model":
        """The model of a configuration file: of `fit`'s folder, or of a run's."""
        return cls(load_config(str(config)))

    @property
    def report(self) -> Path:
        """The page that `evaluate` writes."""
        return self.config.run_dir / "report.html"

    def evaluate(self, **settings: Any) -> pd.DataFrame:
        """Measures the model on held-out rows, and writes `report`.

        Args:
            settings: of the section ``evaluate``, such as ``k=[5, 10]``.

        Returns:
            A row for the rows' figures and one for each ranking.
        """
        self._run("evaluate", settings)
        event = last(read_events(self.config.run_dir / "metrics.jsonl"), EvaluateEvent)
        assert event is not None
        rankings = pd.DataFrame(event.figures).T
        return pd.concat([pd.DataFrame(event.rows, index=[f"{event.split} rows"]), rankings])

    def recommend(self, **settings: Any) -> pd.DataFrame:
        """Every user's best unseen items: ``user_id, item_id, score, rank``.

        Args:
            settings: of the section ``recommend``, such as ``k=20, users=[4, 6]``.
        """
        self._run("recommend", settings)
        return pd.read_parquet(self.config.output_dir / "recommendations.parquet")

    def similar(self, **settings: Any) -> pd.DataFrame:
        """Every item's most similar items: ``item_id, similar_item_id, score, rank``.

        Args:
            settings: of the section ``similar``, such as ``k=5``.
        """
        self._run("similar", settings)
        return pd.read_parquet(self.config.output_dir / "similar_items.parquet")

    def predict(self, rows: pd.DataFrame) -> pd.Series:
        """Logits of rows like the interactions, in their order; unknown ids are allowed."""
        source, target = (self.config.run_dir / f"predict-{n}.parquet" for n in ("in", "out"))
        _write(rows, source)
        self._run("predict", None, input=str(source), output=str(target))
        scores = pd.read_parquet(target)["score"]
        return pd.Series(scores.to_numpy(), index=rows.index, name="score")

    def _run(self, command: str, settings: Mapping[str, Any] | None = None, **given: Any) -> None:
        """Does a command's work; its table for people is not printed."""
        tree = self.config.model_dump(mode="json")
        if settings:
            tree[command] |= settings
        config = config_from(tree, origin=command)
        quieten_libraries()
        require(config.run.device)
        with contextlib.redirect_stdout(io.StringIO()):
            _work_of(command)(config, Namespace(overrides=[], **given))


def _work_of(command: str) -> Callable[[Config, Namespace], None]:
    from deepfm_dist import evaluate, predict, recommend, similar, train

    modules = {
        "train": train._train,
        "evaluate": evaluate._evaluate,
        "recommend": recommend._recommend,
        "similar": similar._similar,
        "predict": predict._predict,
    }
    return modules[command]


def _check_columns(frame: pd.DataFrame, wanted: Sequence[str], what: str) -> None:
    if missing := [c for c in wanted if c not in frame.columns]:
        there = ", ".join(map(str, frame.columns))
        raise DataError(f"{what}: no column {missing[0]!r}; there are: {there}")


def _field(frame: pd.DataFrame, entity: str, key: str, column: str, folder: Path) -> dict[str, Any]:
    """A field in a file of its own, a line for each value."""
    file = f"{entity}-{column}.parquet"
    values = frame[[key, column]].explode(column).dropna()
    several = bool(values[key].duplicated().any())
    _write(values, folder / file)
    found = {
        "name": column,
        "entity": entity,
        "file": file,
        **_kind(values[column].infer_objects()),
    }
    return found if several else {**found, "keep": "first"}


def _kind(values: "pd.Series[Any]") -> dict[str, str]:
    if pd.api.types.is_float_dtype(values):
        return {"kind": "numeric", "transform": "standard"}
    return {}


def _write(frame: pd.DataFrame, path: Path) -> None:
    """Writes a frame, where its content has changed: the preparation looks at the file's time."""
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    if not path.is_file() or path.read_bytes() != buffer.getvalue():
        path.write_bytes(buffer.getvalue())
