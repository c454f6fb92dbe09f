"""Chooses ``auto`` settings from the data.

Two functions, because preparation needs the fields before the data are known:

* `with_history` uses the settings alone, when a configuration is read. It decides whether users are
represented by their items, and adds that field. * `choose` also uses the manifest of the prepared
data. It decides all other ``auto`` settings: see ``chosen`` of each section.

Settings given by the user are kept, and dependent ones are chosen accordingly. Each choice is
logged with its reason, and saved in the run's ``config.yaml`` as if it had been typed. The figures
behind the choices are in docs/quality.md.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deepfm_dist.data.manifest import Manifest
from deepfm_dist.data.schema import Negatives
from deepfm_dist.messages import plural
from deepfm_dist.model.settings import ModelConfig
from deepfm_dist.section import AUTO, Section
from deepfm_dist.typed_yaml import value_at

log = logging.getLogger(__name__)
HISTORY_NAMES = ("seen", "seen_items", "history_of_items")
"""Candidate names of the added field; the first unused one is taken."""
ID_NAMES = ("user", "user_id", "id_of_user")
"""The same for the id of users who are not known by their items."""
LATEST_NAMES = ("latest", "latest_items", "history_of_latest_items")
"""The same for the field of the latest items."""
LATEST = 1
"""Number of items in that field."""
HISTORY_DROPOUT = 0.3
ID_DROPOUT = 0.2
"""Share of ids replaced by the unknown one where rows have labels and some items have no training
rows. On generated logs it raised the AUC of new items and, within noise, did not lower that of
others."""
WHOLE_CATALOGUE = 30_000
"""Maximum number of items for a softmax over all of them."""
HOLD_OUT = 0.1
"""Share of training items held out in the loop if there are no validation rows."""
MOST_HELD_OUT_OF = 500_000_000
"""Maximum number of training positives for holding out, which takes about 20 bytes each."""
CANDIDATES = 4_096
"""Number of items to sample in each step beyond that."""
FEW_LABELLED_ROWS = 100_000
"""Below this many labelled rows, tables have a higher learning rate and less L2, and the over-arch
has two layers.
"""
MOST_LABELLED_ROWS_OF_FOLDS = 300_000
"""Below this many labelled rows, the default is a mean of models of folds. They are better than one
model on more rows, too, but take four to nine times its time, minutes from here on."""
PRECISION_PER_FIELD, PRECISION_FROM_START, PRECISION_OF_MANY_ROWS = 5, 1, 500
"""1 / variance of the normal prior on the tables' elements where rows have labels. A row's log-odds
are a sum over its fields, so that with more fields each has to vary less. From a fitted start it
can be weaker: what training learns by heart is not used, and strong interactions need large
factors. An over-arch with batch norm makes up for the scale of the factors; what 500 does to the
first-order weights costs little where rows are many."""
RATE_OF_FEW_ROWS = 0.005
"""Adam's rate for the tables of few labelled rows: first-order weights have to get to about 1 in
about `STEPS_TO_BEST` steps, each of which moves them by at most the rate."""
STEPS_TO_BEST = 128
"""Number of steps with the best validation on logs of 1,400 to 100,000 labelled rows."""
STEPS_PER_VALIDATION = 32
"""Minimum number of steps between validations on labelled rows: small logs are learned in few short
epochs.
"""
MOST_ROWS_OF_ADAM = 2_000_000
"""Maximum total number of table rows for Adam."""
MOST_ROWS_OF_FOLDS = 300_000
"""Maximum total number of table rows for models of several folds: together they take some 0.6 GB
with Adam's state."""
CLOSED_FORM_ITEMS = 20_000
"""Maximum number of items for EASE, whose time is cubic in it."""
DECAY_STEPS = ("optimizer.tables.decay_steps", "optimizer.dense.decay_steps")
_OF_THE_OVER_ARCH = (
    *("over_arch_layer_sizes", "over_arch", "over_arch_options", "over_arch_init"),
    *("activation", "dropout", "batch_norm"),
)


@dataclass(frozen=True)
class Choice:
    """A setting that was chosen.

    Attributes:
        setting: its dotted name.
        value: its value in the configuration.
        reason: a short explanation with the deciding figures.
    """

    setting: str
    value: Any
    reason: str

    def __str__(self) -> str:
        return f"{self.setting}={self.typed} ({self.reason})"

    @property
    def typed(self) -> str:
        """The value as it would be typed."""
        value = self.value
        return str(value) if isinstance(value, str | float) else json.dumps(value)


def with_choice(choices: Sequence[Choice], choice: Choice) -> list[Choice]:
    """Adds a choice; its reason follows those of the same setting, which it replaces."""
    reasons = [each.reason for each in choices if each.setting == choice.setting]
    others = [each for each in choices if each.setting != choice.setting]
    return [*others, replace(choice, reason="; ".join([*reasons, choice.reason]))]


def that_hold(
    earlier: Sequence[Choice], choices: Sequence[Choice], config: Section
) -> list[Choice]:
    """The choices of a run that resumes: new ones, and earlier ones that nobody has changed."""
    tree, new = config.model_dump(mode="json"), {choice.setting for choice in choices}
    kept = [c for c in earlier if c.setting not in new and value_at(tree, c.setting) == c.value]
    return [*kept, *choices]


def choices_in(state: Mapping[str, Any]) -> tuple[Choice, ...]:
    """The choices in a checkpoint's marker; empty for earlier versions."""
    return tuple(Choice(**choice) for choice in state.get("chosen", ()))


def with_history(tree: Any) -> Any:
    """Adds a history field to the settings if users are represented by their items.

    Otherwise, if all fields are of items, the users' id is added: all users would get one ranking.

    Args:
        tree: sections of settings from the user, not validated yet.

    Returns:
        A changed copy, or ``tree`` itself.
    """
    data = _section(tree, "data")
    features = data.get("features", ())
    if not data:
        return tree
    if not isinstance(features, list | tuple) or data.get("task", "implicit") != "implicit":
        return tree
    fields = [_as_tree(field) for field in features]
    history = _section(data, "history")
    added, changed = history.get("add", AUTO), dict(data)
    is_ranked = trains_on_users(tree)
    has_history = any(field.get("history") is not None for field in fields)
    if added == AUTO:
        added = is_ranked and not has_history and not _stated(tree, "trainer", "loss")
    if not fields:
        names = ["item"] if added else ["user", "item"]
        changed["features"] = [{"name": name, "entity": name} for name in names]
    targets = history.get("targets", AUTO)
    if targets == AUTO and is_ranked and (added is True or has_history):
        left_out = (
            history.get("dropout", AUTO) != AUTO
        )  # stated, as runs before this choice have it
        targets = "later" if _next_is_held_out(data) and not left_out else "random"
    taken = [field.get("name") for field in fields]
    has_new_users = _section(data, "split").get("method") == "users"
    is_chosen = history.get("add", AUTO) == AUTO and not added
    if is_chosen and _are_of_items(fields) and not has_new_users:
        name = next((name for name in ID_NAMES if name not in taken), ID_NAMES[-1])
        changed["features"] = [*features, {"name": name, "entity": "user"}]
    if added is True and not has_history:
        added_fields: list[tuple[Sequence[str], dict[str, int]]] = [(HISTORY_NAMES, {})]
        if targets == "later" and is_ranked:
            added_fields.append((LATEST_NAMES, {"last": LATEST}))
        for options, more in added_fields:
            name = next((name for name in options if name not in taken), options[-1])
            seen = {"name": name, "entity": "user", "history": "item", "pooling": "sqrt", **more}
            changed["features"] = [*changed.get("features", ()), seen]
        has_history = True
    changed["history"] = history = {**history, "add": added, "targets": targets}
    if has_history and is_ranked and history.get("dropout", AUTO) == AUTO:
        history["dropout"] = 0.0 if targets == "later" else HISTORY_DROPOUT
    return {**tree, "data": changed}


def _are_of_items(fields: Sequence[Mapping[str, Any]]) -> bool:
    """Whether there are fields, none of which tells users apart."""
    return bool(fields) and all(field.get("entity") == "item" for field in fields)


def _next_is_held_out(data: Mapping[str, Any]) -> bool:
    """Whether rankings are measured on each user's next item."""
    by_method = _section(data, "split").get("method") == "leave_last"
    is_given = any(_section(data, "split").get(name) for name in ("valid_file", "test_file"))
    rows = _section(data, "interactions")
    return by_method and not is_given and bool(rows.get("time")) and not rows.get("split")


def trains_on_users(tree: Mapping[str, Any]) -> bool:
    """Whether the loss is over users and the catalogue, given settings from `with_history`."""
    loss = _section(tree, "trainer").get("loss", AUTO)
    if loss != AUTO:
        return bool(loss != "bce")
    return rows_because(tree) is None


def with_rows_for_search(tree: Any) -> Any:
    """Sets ``trainer.loss=bce`` if a value of ``tune.space``, when typed, means training on rows.

    All trials of a search share their data and figure, and so the kind of training.

    Args:
        tree: sections of settings from the user, not validated yet.

    Returns:
        A changed copy, or ``tree`` itself.
    """
    space = _section(tree, "tune").get("space")
    is_decided = _stated(tree, "trainer", "loss") or rows_because(tree) is not None
    if is_decided or not isinstance(space, Mapping) or "trainer.loss" in space:
        return tree
    for name, values in space.items():
        section, _, setting = str(name).partition(".")
        for value in [*values.values()] if isinstance(values, Mapping) else values or ():
            typed = {**_section(tree, section), setting: value}
            if reason := rows_because({**tree, section: typed}):
                log.info("all trials train on rows (trainer.loss=bce): tune.space: %s", reason)
                return {**tree, "trainer": {**_section(tree, "trainer"), "loss": "bce"}}
    return tree


def rows_because(tree: Mapping[str, Any]) -> str | None:
    """Why a model is trained on single rows instead of users; None if it is not.

    Args:
        tree: sections of settings.
    """
    data, model, trainer = (_section(tree, name) for name in ("data", "model", "trainer"))
    rows = _section(data, "interactions")
    if data.get("task") == "ctr":
        return "rows have labels"
    if rows.get("weight") is not None:
        return "rows have weights (data.interactions.weight)"
    for name, value in _section(data, "negatives").items():
        if _is_stated(Negatives, name, value):
            return f"data.negatives.{name} is set, and no others are drawn for users"
    for field in map(_as_tree, data.get("features", ())):
        if field.get("entity", "context") == "context":
            return f"the field {field.get('name')} belongs to single rows"
    if over_arch := _states_an_over_arch(model):
        return over_arch
    if model.get("deep", AUTO) is True:
        return "model.deep is set"
    if model.get("fm", True) is False:
        return "model.fm is off"
    if trainer.get("compile") is True:
        return "trainer.compile is set, which is for rows"
    for name, usual in (("accumulate_steps", 1), ("table_precision", "fp32")):
        if trainer.get(name, usual) != usual:
            return f"trainer.{name} is set, which is for rows"
    return None


def _states_an_over_arch(model: Mapping[str, Any]) -> str | None:
    """The setting that requests an over-arch, as text for the log."""
    for name in _OF_THE_OVER_ARCH:
        if _is_stated(ModelConfig, name, model.get(name, AUTO)):
            return f"model.{name} is set, and it is the over-arch's"
    return None


def saved_choices(
    config: Section, saved: Mapping[str, Any], chosen: Sequence[Choice] = ()
) -> dict[str, Any]:
    """What a continued run keeps of its saved settings where the user leaves them out.

    Args:
        config: the whole configuration; every setting is stated if it is the run's own.
        saved: settings of the run that is continued.
        chosen: what was chosen when it started.

    Returns:
        Values by dotted name; ``auto`` for those to choose again.
    """
    kept = {name: value_at(saved, name, AUTO) for name, _ in config.auto_settings()}
    draft = _Draft(config)
    has_other_length = any(
        name not in kept and draft.get(name) != value_at(saved, name)
        for name in ("trainer.epochs", "trainer.max_steps")
    )
    kept = {name: value for name, value in kept.items() if value != AUTO}
    if has_other_length:  # planned again: after the planned steps the rate is 0
        was_chosen = {choice.setting: choice.value for choice in chosen}
        for name in DECAY_STEPS:
            if kept.get(name, draft.get(name)) == was_chosen.get(name, AUTO):
                kept[name] = AUTO
    return kept


def choose(config: Section, manifest: Manifest) -> list[Choice]:
    """Chooses all ``auto`` settings.

    Args:
        config: the whole configuration.
        manifest: the manifest of the prepared data.

    Returns:
        A choice for every ``auto`` setting, except those that keep their default.
    """
    draft = _Draft(config)
    if draft.get("data.history.add"):
        names = [f.name for f in manifest.features if f.history is not None]
        fields = f"{'fields' if len(names) > 1 else 'field'} {' and '.join(names)}"
        draft.note("data.history.add", True, f"users are known by their items: the {fields}")
        if draft.get("data.history.targets") == "later":
            why = "each user's last rows are held out"
            draft.note("data.history.targets", "later", why)
    elif name := _only_user_id(manifest):
        draft.note("data.history.add", False, f"users are known by their ids: the field {name}")
    reason = rows_because(config.model_dump(mode="json"))
    draft.choose(
        "trainer.loss",
        "softmax" if reason is None else "bce",
        reason or "items are ranked for users",
    )
    if draft.get("trainer.loss") == "bce":
        _for_rows(draft, manifest)
    else:
        _for_users(draft, manifest)
    for setting in DECAY_STEPS:
        if draft.get(setting.replace("decay_steps", "decay")) != "constant":
            draft.choose(setting, *_planned_decay(draft, manifest, setting))
    return draft.choices


def _only_user_id(manifest: Manifest) -> str | None:
    """The name of the users' id where it alone tells users apart from each other."""
    others = [f for f in manifest.features if f.entity != "item"]
    if manifest.data.task != "implicit" or len(others) != 1:
        return None
    return others[0].name if others[0].names_entity and others[0].entity == "user" else None


def _planned_decay(draft: "_Draft", manifest: Manifest, setting: str) -> tuple[int, str]:
    """The steps of a learning rate's decay: all of training after the warm-up, and why."""
    epochs, per_epoch = draft.get("trainer.epochs"), _steps_per_epoch(draft, manifest)
    warm_up = draft.get(setting.replace("decay_steps", "warmup_steps"))
    after = f" after {plural(warm_up, 'step')} of warm-up" if warm_up else ""
    planned, steps = f"{plural(epochs, 'epoch')} of {plural(per_epoch, 'step')}", epochs * per_epoch
    most = draft.get("trainer.max_steps")
    if most is not None and most < steps:
        planned, steps = f"trainer.max_steps={most}", most
    return max(1, steps - warm_up), f"{planned}{after}"


def _steps_per_epoch(draft: "_Draft", manifest: Manifest) -> int:
    """Batches of users, or of rows and the negatives drawn for them."""
    n = _sizes(manifest)[0]
    if draft.get("trainer.loss") == "bce":
        drawn = draft.get("data.negatives.per_positive") if manifest.sampled else 0
        n = max(1, manifest.splits["train"].rows) * (1 + drawn)
    return math.ceil(n / draft.get("trainer.batch_size"))


def _for_rows(draft: "_Draft", manifest: Manifest) -> None:
    """Choices for a model of single rows: a DeepFM with its over-arch.

    With labels, by the number n of training rows:

    * ``batch_size``: the power of two nearest to n / 64, so that an epoch has some 64 steps, within
      256 and 8,192; BARS (Zhu et al., 2022) has 4,096 to 10,000 for 2 to 40 million rows.
    * Rates of Adam: 0.001 * sqrt(batch_size / 4096); Malladi et al., "On the SDEs and Scaling Rules
      for Adaptive Gradient Algorithms", 2022, for the square root; BARS for 0.001 at 4,096.
    * The tables: see `_for_tables_of_rows`.
    * ``over_arch_layer_sizes``: see `_layer_sizes`.
    * ``id_dropout``: `ID_DROPOUT` where items without training rows are known by attributes.
    * ``linear``: logistic below `FEW_LABELLED_ROWS`, with models of folds below
      `MOST_LABELLED_ROWS_OF_FOLDS`; see `deepfm_dist.interop.logistic`.
    * ``refit_best``: with a logistic start; see `deepfm_dist.jobs.cross_fit`.
    * ``epochs``: 20, and at least 640 steps, of which early stopping uses what it needs. Without
      validation rows some `STEPS_TO_BEST` steps, and one epoch in any case.
    """
    if manifest.data.task != "ctr":
        return
    n = max(1, manifest.splits["train"].rows)
    rows = plural(n, "training row")
    n_cold = manifest.cold.get("item", 0)
    if n_cold and any(f.names_entity for f in manifest.features):
        reason = f"{plural(n_cold, 'item')} without training rows, known by attributes"
        draft.choose("data.id_dropout", ID_DROPOUT, reason)
    size = 2 ** round(math.log2(n / 64))
    draft.choose("trainer.batch_size", min(8192, max(256, size)), rows)
    batch_size = draft.get("trainer.batch_size")
    draft.choose("model.linear", *_linear_of_rows(draft, manifest))
    draft.choose("trainer.refit_best", *_refit_of_rows(draft, manifest))
    per_epoch = math.ceil(n / batch_size)
    each = f"{plural(per_epoch, 'step')} each"
    if manifest.splits["valid"].rows and draft.get("trainer.monitor") is not None:
        epochs = max(20, math.ceil(20 * STEPS_PER_VALIDATION / per_epoch))
        draft.choose("trainer.epochs", epochs, f"{each}; early stopping ends the run")
        every = max(1, round(STEPS_PER_VALIDATION / per_epoch))
        draft.choose("trainer.validate_every_epochs", every, each)
        if draft.get("trainer.validate_every_epochs"):
            patience = 2 if per_epoch > STEPS_PER_VALIDATION else 4
            if draft.get("model.linear") == "logistic":
                patience = 8  # interactions may take long to show
            reason = f"validations without a better {_monitored_name(draft)}"
            draft.choose("trainer.patience", patience, reason)
    else:
        epochs = max(1, round(STEPS_TO_BEST / per_epoch))
        draft.choose("trainer.epochs", epochs, f"{each}; nothing shows when to stop early")
    rate = float(f"{0.001 * math.sqrt(batch_size / 4096):.2g}")
    scaled = f"0.001 * sqrt({batch_size} / 4096)"
    draft.choose("optimizer.dense.lr", rate, scaled)
    draft.choose("model.init_at_mean", True, "training starts from the mean label")
    if draft.get("model.deep") and draft.get("model.over_arch") == "mlp":
        draft.choose("model.over_arch_layer_sizes", _layer_sizes(n), rows)
        draft.choose("model.dropout", 0.2, "labels are noisy")
        draft.choose("model.batch_norm", True, "the L2 on the tables then leaves their scale open")
    _for_tables_of_rows(draft, manifest, rate, scaled)


def _linear_of_rows(draft: "_Draft", manifest: Manifest) -> tuple[str, str]:
    """Whether first-order weights start from a logistic regression, and why."""
    n = manifest.splits["train"].rows
    against = None
    if manifest.targets:
        against = f"there are {len(manifest.targets)} targets, and it fits one"
    elif n >= MOST_LABELLED_ROWS_OF_FOLDS:
        against = f"{plural(n, 'training row')} take enough steps"
    elif not draft.get("model.first_order"):
        against = "model.first_order is off"
    elif manifest.has_history:
        against = "a row's own item is in its history"
    elif draft.get("checkpoint.start_from") is not None:
        against = "training starts from the weights of another run"
    elif n >= FEW_LABELLED_ROWS and (why := _against_folds(draft, manifest)):
        against = f"{plural(n, 'training row')} take enough steps without models of folds: {why}"
    return ("none", against) if against else ("logistic", plural(n, "training row"))


def _refit_of_rows(draft: "_Draft", manifest: Manifest) -> tuple[bool, str]:
    """Whether models of folds of the rows follow the training loop, and why."""
    against: str | None = "for a fitted start"
    if draft.get("model.linear") == "logistic":
        against = _against_folds(draft, manifest)
    why = "means of models of training and validation rows are better than one of training rows"
    return against is None, against or why


def _against_folds(draft: "_Draft", manifest: Manifest) -> str | None:
    """Why no models of folds can follow the training loop; None if they can."""
    if not draft.is_auto("trainer.refit_best") and not draft.get("trainer.refit_best"):
        return "trainer.refit_best is off"
    if not manifest.splits["valid"].rows:
        return "there are no validation rows"
    if (rows := sum(table.rows for table in manifest.tables.values())) > MOST_ROWS_OF_FOLDS:
        return f"{rows:,} table rows, of which ten models together would need much memory"
    if draft.get("trainer.monitor") not in (AUTO, "log_loss"):
        return f"shares are for the log loss, not for {draft.get('trainer.monitor')}"
    if draft.get("model.deep") and draft.get("model.over_arch") != "mlp":
        return "the over-arch is your own"
    return None


def tables_of_fm(manifest: Manifest) -> dict[str, float]:
    """Rate and L2 of Adam on the tables of an FM that starts from a logistic regression."""
    n, fields = max(1, manifest.splits["train"].rows), len(manifest.features)
    return {
        "optimizer.tables.lr": RATE_OF_FEW_ROWS,
        "optimizer.tables.l2": float(f"{PRECISION_FROM_START * fields / n:.2g}"),
    }


def _for_tables_of_rows(draft: "_Draft", manifest: Manifest, rate: float, scaled: str) -> None:
    """Choices for the tables' optimizer where rows have labels.

    With Adam:

    * Rate: that of the other parameters; below `FEW_LABELLED_ROWS`, and for an FM with a fitted
      start, `RATE_OF_FEW_ROWS`.
    * L2: the precision of a normal prior on each element, over n, as its weight in the mean loss
      falls with the rows. `PRECISION_PER_FIELD` for each field, or `PRECISION_FROM_START` where
      training starts from a logistic regression and is compared with it; from
      `FEW_LABELLED_ROWS` on, with an over-arch, `PRECISION_OF_MANY_ROWS`. BARS's tuned values
      scatter around the latter: 5e-4 for KKBox's 6 million rows, 5e-6 for TaobaoAd's 22 million.

    Args:
        draft: the settings so far.
        manifest: the manifest of the prepared data.
        rate: Adam's learning rate for the other parameters.
        scaled: how it was calculated.
    """
    n = max(1, manifest.splits["train"].rows)
    rows = plural(n, "training row")
    fused = _because_fused(draft, manifest)
    n_rows = plural(sum(table.rows for table in manifest.tables.values()), "table row")
    draft.choose(
        "optimizer.tables.name",
        "rowwise_adagrad" if fused else "adam",
        fused or f"{n_rows}, few enough to move them all at every step",
    )
    if draft.get("optimizer.tables.name") == "adam":
        is_fm = draft.get("model.linear") == "logistic" and not draft.get("model.deep")
        few = n < FEW_LABELLED_ROWS or is_fm
        chosen = (RATE_OF_FEW_ROWS, f"few steps, with {rows}") if few else (rate, scaled)
        draft.choose("optimizer.tables.lr", *chosen)
        precision, why = PRECISION_OF_MANY_ROWS, str(PRECISION_OF_MANY_ROWS)
        if few or not draft.get("model.deep"):
            per_field = PRECISION_PER_FIELD
            if draft.get("model.linear") == "logistic" and manifest.splits["valid"].rows:
                per_field = PRECISION_FROM_START
            precision = per_field * len(manifest.features)
            why = f"{per_field} * {plural(len(manifest.features), 'field')}"
        draft.choose("optimizer.tables.l2", float(f"{precision / n:.2g}"), f"{why} / {rows}")
    elif draft.get("optimizer.tables.name") == "rowwise_adagrad":
        draft.choose("optimizer.tables.lr", 0.01, "rows seen once are learned by heart at 0.05")


def _layer_sizes(n: int) -> list[int]:
    """Hidden layers for ``n`` labelled rows.

    The power of two nearest to sqrt(n) / 2, from 64 to 400, so that the weights between two layers
    are a quarter of the rows; two layers below 100,000 rows, and three from there on.
    """
    width = min(400, max(64, 2 ** round(math.log2(math.sqrt(n) / 2))))
    return [width] * (2 if n < FEW_LABELLED_ROWS else 3)


def _monitored_name(draft: "_Draft") -> str:
    """Name of the figure that early stopping monitors."""
    monitor = str(draft.get("trainer.monitor"))
    return "log loss" if monitor == AUTO else monitor


def _because_fused(draft: "_Draft", manifest: Manifest) -> str | None:
    """Why the tables cannot be updated by Adam; None if they can."""
    n_rows = sum(table.rows for table in manifest.tables.values())
    if n_rows > MOST_ROWS_OF_ADAM:
        return f"{n_rows:,} table rows, all of which adam moves at every step"
    if draft.get("trainer.table_precision") == "fp16":
        return "trainer.table_precision=fp16 is not for adam"
    if any(plan.get("cached") for plan in _section(draft.tree("sharding"), "tables").values()):
        return "a table is cached (sharding.tables), which adam's cannot be"
    return None


def _for_users(draft: "_Draft", manifest: Manifest) -> None:
    """Choices for a model that ranks a catalogue: an FM trained by softmax."""
    n_users, n_items, n_rows = _sizes(manifest)
    deep = _states_an_over_arch(draft.tree("model"))
    draft.choose(
        "model.deep", deep is not None, deep or "an over-arch ranks no better, and takes most time"
    )
    if draft.get("model.fm"):
        draft.choose("model.fm_pairs", "across", "pairs within an item rank nothing new")
    is_measured = _is_measured(draft, manifest)
    _for_the_end(draft, manifest, n_items, is_measured)
    dim = next((d for rows, d in ((100_000, 64), (1_000_000, 128)) if n_rows < rows), 256)
    draft.choose("model.embedding_dim", dim, plural(n_rows, "training row"))
    if draft.get("trainer.loss") == "softmax" and n_items <= WHOLE_CATALOGUE:
        draft.choose("trainer.candidates", None, f"all {plural(n_items, 'item')}")
    drawn = min(CANDIDATES, n_items)
    draft.choose("trainer.candidates", drawn, f"of {n_items:,} items in each step")
    draft.choose(
        "trainer.batch_size",
        min(1024, max(256, 2 ** round(math.log2(n_users / 24)))),
        plural(n_users, "user"),
    )
    per_epoch = _steps_per_epoch(draft, manifest)
    steps, why = (1000, "") if is_measured else (200, "; nothing shows when to stop early")
    draft.choose(
        "trainer.epochs",
        max(20, min(200, round(steps / per_epoch))),
        f"{plural(per_epoch, 'step')} each{why}",
    )
    epochs = draft.get("trainer.epochs")
    if is_measured:
        every = math.ceil(epochs / 20)
        draft.choose("trainer.validate_every_epochs", every, f"of {epochs:,} epochs")
        if draft.get("trainer.validate_every_epochs"):
            draft.choose("trainer.patience", 4, "validations without a better ranking end the run")
    if draft.get("optimizer.tables.name", "adam", "moves every row at every step") == "adam":
        draft.choose("optimizer.tables.lr", 0.003, "of adam on tables that begin near 0")
        draft.choose("optimizer.tables.l2", 1e-4 if dim == 64 else 3e-5, f"{dim} columns")
        if is_measured and draft.get("data.history.targets") == "later":
            why = "of next items much is left to learn at the end, and a falling rate ranks worse"
            draft.choose("optimizer.tables.decay", "constant", why)
        elif is_measured:
            draft.choose("optimizer.tables.decay", "linear", "ranks better than a constant rate")


def _is_measured(draft: "_Draft", manifest: Manifest) -> bool:
    """Whether rankings are measured during training; chooses the users held out for them."""
    n_users, _, n_rows = _sizes(manifest)
    share, reason = 0.0, None
    if manifest.splits["valid"].rows:
        reason = "there are validation rows"
    elif draft.get("trainer.monitor") is None:
        reason = "no figure is monitored"
    elif not draft.is_auto("trainer.refit_best") and not draft.get("trainer.refit_best"):
        reason = "trainer.refit_best is off, so that the model would never see it"
    elif manifest.data.split.method == "users":
        reason = "users are held out entirely"
    elif n_rows < 2 * n_users:
        reason = f"{plural(n_rows, 'training row')} of {plural(n_users, 'user')} are too few"
    elif n_rows > MOST_HELD_OUT_OF:
        reason = f"{n_rows:,} training rows are too many to divide in memory; set data.split.valid"
    else:
        share = HOLD_OUT
    draft.choose("trainer.hold_out", share, reason or "there are no validation rows")
    held_out = manifest.splits["valid"].rows or draft.get("trainer.hold_out")
    return bool(held_out) and draft.get("trainer.monitor") is not None


def _for_the_end(draft: "_Draft", manifest: Manifest, n_items: int, is_measured: bool) -> None:
    """Choices for the steps after the training loop; see `deepfm_dist.jobs.finish`."""
    against = None if is_measured else "nothing is measured on validation rows"
    refit = "trainer.refit_best", is_measured, against or "all rows are known then"
    draft.choose(*refit)
    if draft.get("model.deep") or not draft.get("model.fm"):
        against = "for an FM without an over-arch"
    elif manifest.item_fields_of_closed_form is None:
        against = "no item id and item history with separate tables"
    elif n_items > CLOSED_FORM_ITEMS:
        against = f"{plural(n_items, 'item')}: it takes too long beyond {CLOSED_FORM_ITEMS:,}"
    draft.choose("model.linear", "none" if against else "ease", against or plural(n_items, "item"))


def _sizes(manifest: Manifest) -> tuple[int, int, int]:
    """Numbers of users, items and training positives."""
    train = manifest.splits["train"]
    return (
        max(1, manifest.entities["user"] - 1),
        max(1, manifest.entities["item"] - 1),
        train.positives,
    )


class _Draft:
    """The settings during the choice.

    Attributes:
        choices: so far.
    """

    def __init__(self, config: Section) -> None:
        self._config = config
        self._chosen: dict[str, Any] = {}
        self.choices: list[Choice] = []

    def _parts(self, setting: str) -> tuple[Section, str]:
        *parents, name = setting.split(".")
        section = self._config
        for parent in parents:
            section = getattr(section, parent)
        return section, name

    def is_auto(self, setting: str) -> bool:
        """Whether a setting is still undecided."""
        section, name = self._parts(setting)
        return section.is_auto(name) and setting not in self._chosen

    def tree(self, section: str) -> dict[str, Any]:
        """A section as given by the user."""
        return _section(self._config, section)

    def get(self, setting: str, *if_auto: Any) -> Any:
        """A setting's value; with a value and reason, these are chosen if it is ``auto``."""
        if if_auto:
            self.choose(setting, *if_auto)
        section, name = self._parts(setting)
        return self._chosen.get(setting, getattr(section, name))

    def choose(self, setting: str, value: Any, reason: str) -> None:
        """Resolves ``auto`` values; values the user set are kept."""
        section, name = self._parts(setting)
        assert name in section.chosen, f"{setting} cannot be left to the recipe"
        if self.is_auto(setting):
            self.note(setting, value, reason)

    def note(self, setting: str, value: Any, reason: str) -> None:
        """Adds a choice."""
        self._chosen[setting] = value
        self.choices.append(Choice(setting, value, reason))


def _as_tree(section: Any) -> dict[str, Any]:
    """A section given as a dict or a model; empty for anything else."""
    if isinstance(section, Section):
        return section.model_dump(exclude_unset=True)
    return dict(section) if isinstance(section, Mapping) else {}


def _section(tree: Any, name: str) -> dict[str, Any]:
    return _as_tree(_as_tree(tree).get(name))


def _is_stated(section: type[Section], name: str, value: Any) -> bool:
    """Whether a value differs from what a fully written-out configuration contains by default."""
    if name in section.chosen:
        return bool(value != AUTO)
    field = section.model_fields.get(name)
    usual = None if field is None else field.get_default(call_default_factory=True)
    return value not in (AUTO, usual)


def _stated(tree: Any, section: str, name: str) -> bool:
    return _section(tree, section).get(name, AUTO) != AUTO
