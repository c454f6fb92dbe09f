"""What the user leaves out is chosen from the data; what the user sets stays."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from deepfm_dist import train as train_command
from deepfm_dist.api import Model
from deepfm_dist.config import Config, config_from, load_config, resolve
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.manifest import Manifest, SplitSpec, TableSpec
from deepfm_dist.distributed.checkpoint import Saved, complete_steps, find_checkpoint, read_state
from deepfm_dist.errors import ConfigError
from deepfm_dist.events import TrainEvent, read_events
from deepfm_dist.interop import linear
from deepfm_dist.jobs import evaluate as evaluation
from deepfm_dist.jobs import finish
from deepfm_dist.jobs.combine import combine
from deepfm_dist.jobs.evaluate import evaluate
from deepfm_dist.jobs.recommend import recommend
from deepfm_dist.jobs.train import train
from deepfm_dist.ranking.settings import EASE_L2
from deepfm_dist.recipe import LATEST, Choice, choices_in, that_hold
from deepfm_dist.runs.start import read_start
from deepfm_dist.runs.trained import find_run
from deepfm_dist.storage import delete_tree
from tests.ranks import run_in_fork, run_ranks

SAMPLE = "../../configs/sample"
"""The bundled one: tests find their own first."""
ROWS = {"file": "a.csv", "user": "u", "item": "i"}
ITEM = {"name": "item", "entity": "item"}


def _config(**sections: dict[str, Any]) -> Config:
    data = {"interactions": ROWS, "features": [ITEM], **sections.pop("data", {})}
    return config_from({"data": data, **sections})


def test_a_search_for_an_over_arch_trains_on_rows_as_if_its_layers_were_typed() -> None:
    sizes = "model.over_arch_layer_sizes"
    space = f"tune.space={{{sizes}: [[32], [64, 32]]}}"
    typed = load_config(SAMPLE, [f"{sizes}=[32]"])
    searched = load_config(SAMPLE, [space], searched=True)
    assert searched.data == typed.data and searched.monitor == typed.monitor == "log_loss"
    assert not searched.trainer.is_auto("loss")  # in best.yaml, too
    # Other commands, other settings, and searches whose loss is given rank as before.
    for overrides, is_search in (
        ([space], False),
        (["tune.space={model.embedding_dim: {low: 4, high: 8}}"], True),
        ([space, "trainer.loss=softmax"], True),
        (["tune.space={trainer.loss: [softmax, bpr], model.dropout: [0.1]}"], True),
    ):
        assert load_config(SAMPLE, overrides, is_search).monitor == "ndcg@10"
    accumulated = ["tune.space={trainer.accumulate_steps: {low: 1, high: 4}}"]
    assert load_config(SAMPLE, accumulated, searched=True).monitor == "log_loss"


def _manifest(
    sample: PreparedDataset, config: Config, users: int = 700, items: int = 400, rows: int = 30_000
) -> Manifest:
    """The sample's manifest with other sizes."""
    tables: dict[str, list[str]] = {f.table_name: [] for f in config.data.features}
    for field in config.data.features:
        tables[field.table_name].append(field.name)
    train = SplitSpec(rows=rows, positives=rows, size_bytes=8 * rows)
    return sample.manifest.model_copy(
        update={
            "data": config.data,
            "tables": {t: TableSpec(rows=items, features=tuple(f)) for t, f in tables.items()},
            "entities": {"user": users + 1, "item": items + 1},
            "splits": {**sample.manifest.splits, "train": train},
        }
    )


def test_ten_lines_train_a_model_that_ranks(sample: PreparedDataset) -> None:
    config = _config()
    fields = {(f.name, f.history) for f in config.data.features}
    assert fields == {("item", None), ("seen", "item")}
    resolved, choices = resolve(config, _manifest(sample, config))
    assert (resolved.trainer.loss, resolved.model.deep) == ("softmax", False)
    assert resolved.optimizer.tables.name == "adam"
    assert resolved.trainer.patience is not None
    assert resolved.monitor == "ndcg@10" == config.monitor
    said = {choice.setting: choice for choice in choices}
    assert said["trainer.loss"].value == "softmax"
    assert all(choice.reason for choice in choices)
    # What was chosen is written like what was typed, and nothing is left to choose.
    again = config_from(resolved.model_dump(mode="json"))
    assert again == resolved
    assert "auto" not in str(again.model_dump(mode="json", include={"model", "optimizer"}))


def test_unresolved_settings_are_saved_as_auto(sample: PreparedDataset) -> None:
    config = _config()
    again = config_from(config.model_dump(mode="json"))
    manifest = _manifest(sample, config)
    assert again == config
    assert resolve(again, manifest) == resolve(config, manifest)


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"model": {"over_arch_layer_sizes": [64]}}, "model.over_arch_layer_sizes is set"),
        ({"model": {"over_arch_layer_sizes": [400, 400, 400]}}, "model.over_arch_layer_sizes is"),
        ({"model": {"dropout": 0.1}}, "model.dropout is set"),
        ({"model": {"deep": True}}, "model.deep is set"),
        ({"data": {"negatives": {"per_positive": 2}}}, "data.negatives.per_positive is set"),
        ({"data": {"interactions": {**ROWS, "weight": "w"}}}, "rows have weights"),
        ({"data": {"features": [ITEM, {"name": "hour"}]}}, "the field hour belongs to single rows"),
        ({"trainer": {"compile": True}}, "trainer.compile is set"),
    ],
)
def test_settings_of_rows_train_on_rows(
    sections: dict[str, Any], reason: str, sample: PreparedDataset
) -> None:
    config = _config(**sections)
    assert all(f.history is None for f in config.data.features)
    assert config.monitor == "log_loss"
    resolved, choices = resolve(config, _manifest(sample, config))
    assert (resolved.trainer.loss, resolved.model.deep) == ("bce", True)
    [choice] = [choice for choice in choices if choice.setting == "trainer.loss"]
    assert choice.reason.startswith(reason)


def test_clicks_on_items_with_new_ones_among_them_train_without_some_ids(
    sample: PreparedDataset,
) -> None:
    clicks = {"task": "ctr", "interactions": {**ROWS, "label": "y"}}
    config = _config(data=clicks)
    manifest = _manifest(sample, config).model_copy(update={"cold": {}})
    with_new = manifest.model_copy(update={"cold": {"item": 7}})
    shares = [resolve(config, m)[0].data.id_dropout for m in (manifest, with_new)]
    assert shares == [0.0, 0.2]
    stated = _config(data={**clicks, "id_dropout": 0.0})
    assert resolve(stated, with_new)[0].data.id_dropout == 0.0
    ranks = _config()
    with_new = _manifest(sample, ranks).model_copy(update={"cold": {"item": 7}})
    assert resolve(ranks, with_new)[0].data.id_dropout == 0.0


def test_what_the_user_sets_is_never_overridden(sample: PreparedDataset) -> None:
    settings: dict[str, Any] = {
        "model": {"embedding_dim": 7, "fm_pairs": "all"},
        "optimizer": {"tables": {"name": "rowwise_adagrad", "lr": 0.5}},
        "trainer": {"batch_size": 10, "epochs": 3, "patience": None, "candidates": 9},
        "data": {"history": {"dropout": 0.7}},
    }
    config = _config(**settings)
    resolved, choices = resolve(config, _manifest(sample, config))
    assert resolved.data.history.dropout == 0.7
    tree = resolved.model_dump(mode="json")
    for section in ("model", "optimizer", "trainer"):
        for name, value in settings[section].items():
            stated = value if isinstance(value, dict) else {}
            assert {k: tree[section][name][k] for k in stated} == stated
            assert stated or tree[section][name] == value
    named = {choice.setting for choice in choices}
    assert named.isdisjoint({"model.embedding_dim", "trainer.patience", "trainer.candidates"})


def test_a_stated_loss_adds_no_field(sample: PreparedDataset) -> None:
    for loss in ("bce", "softmax"):
        config = _config(trainer={"loss": loss}, data={"features": []})
        assert [f.name for f in config.data.features] == ["user", "item"], loss
    asked = _config(trainer={"loss": "bce"}, data={"history": {"add": True}})
    assert [f.history for f in asked.data.features] == [None, "item"]
    assert asked.data.history.dropout == 0.0
    kept = _config(data={"history": {"add": False}})
    assert [f.name for f in kept.data.features] == ["item"]
    resolved, _ = resolve(kept, _manifest(sample, kept))
    assert resolved.trainer.loss == "softmax"


def test_an_added_field_has_a_name_of_its_own() -> None:
    config = _config(data={"features": [{"name": "seen", "entity": "item"}, ITEM]})
    assert config.data.features[-1].name == "seen_items"


@pytest.mark.parametrize(
    "field", [{"hash_rows": 20}, {"column": "price", "kind": "numeric"}], ids=["hashed", "numeric"]
)
def test_users_are_known_by_items_whose_field_has_no_vocabulary(field: dict[str, Any]) -> None:
    config = _config(data={"features": [{**ITEM, **field}]})
    [_, seen] = config.data.features
    assert config.data.source_of(seen).is_id


@pytest.mark.parametrize("items", [30_000, 30_001])
def test_large_catalogues_are_sampled(items: int, sample: PreparedDataset) -> None:
    config = _config()
    resolved, _ = resolve(config, _manifest(sample, config, items=items))
    assert (resolved.trainer.candidates is None) == (items == 30_000)


def test_more_rows_get_more_columns_and_more_users_larger_batches(sample: PreparedDataset) -> None:
    config = _config()
    small, large = (
        resolve(config, _manifest(sample, config, users=users, rows=rows))[0]
        for users, rows in ((100, 2_000), (100_000, 5_000_000))
    )
    assert small.model.embedding_dim < large.model.embedding_dim
    assert small.trainer.batch_size < large.trainer.batch_size
    assert small.trainer.epochs > large.trainer.epochs


def test_a_run_that_continues_keeps_what_was_chosen(sample: PreparedDataset) -> None:
    config = _config()
    first, _ = resolve(config, _manifest(sample, config))
    grown = _manifest(sample, config, users=50_000, rows=9_000_000)
    again, choices = resolve(config, grown, first.model_dump(mode="json"))
    assert again == first
    assert [c.setting for c in choices] == ["data.history.add"]


def test_the_rate_falls_over_all_epochs(sample: PreparedDataset) -> None:
    config = _config()
    manifest = _manifest(sample, config, users=1_000)
    first, _ = resolve(config, manifest)
    steps_per_epoch = -(-1_000 // first.trainer.batch_size)
    tables = first.optimizer.tables
    assert (tables.decay, tables.decay_steps) == ("linear", first.trainer.epochs * steps_per_epoch)
    # Of a run that is continued for more epochs, too: they would have a rate of 0.
    saved, longer = first.model_dump(mode="json"), first.trainer.epochs + 5
    chosen = [Choice("optimizer.tables.decay_steps", tables.decay_steps, "")]
    more, _ = resolve(_config(trainer={"epochs": longer}), manifest, saved, chosen)
    assert more.optimizer.tables.decay_steps == longer * steps_per_epoch
    # And where its own settings, all of them stated, are given by --run.
    own = first.model_copy(update={"trainer": first.trainer.model_copy(update={"epochs": longer})})
    more, again = resolve(own, manifest, saved, chosen)
    assert more.optimizer.tables.decay_steps == longer * steps_per_epoch
    epochs = Choice("trainer.epochs", first.trainer.epochs, "")
    assert again[0] in (held := that_hold([epochs, *chosen], again, more))
    assert not {epochs, *chosen} & {*held}
    for config in (own, _config(trainer={"epochs": longer})):  # what was typed is kept
        typed, _ = resolve(config, manifest, saved, ())
        assert typed.optimizer.tables.decay_steps == tables.decay_steps
    shorter, choices = resolve(_config(trainer={"max_steps": 10}), manifest)
    assert shorter.optimizer.tables.decay_steps == 10
    assert "optimizer.tables.decay_steps=10 (trainer.max_steps=10)" in [*map(str, choices)]
    saved_short = shorter.model_dump(mode="json")
    chosen_short = [Choice("optimizer.tables.decay_steps", 10, "")]
    more, _ = resolve(_config(trainer={"max_steps": 20}), manifest, saved_short, chosen_short)
    assert more.optimizer.tables.decay_steps == 20
    assert typed.optimizer.tables.decay_steps == tables.decay_steps
    constant = _config(optimizer={"tables": {"decay": "constant"}})
    assert resolve(constant, manifest)[0].optimizer.tables.decay_steps is None
    split = {"method": "leave_last", "valid": 1, "test": 1}
    later = _config(data={"interactions": {**ROWS, "time": "time"}, "split": split})
    assert later.data.history.targets == "later"
    assert resolve(later, manifest)[0].optimizer.tables.decay == "constant"


@pytest.mark.parametrize("sections", [{"model": {"deep": True}}, {"trainer": {"loss": "softmax"}}])
def test_users_without_items_are_known_by_their_ids(
    sample: PreparedDataset, sections: dict[str, Any]
) -> None:
    config = _config(**sections, data={"features": [ITEM, {"name": "user", "entity": "item"}]})
    names = {field.name: field.entity for field in config.data.features}
    assert names == {"item": "item", "user": "item", "user_id": "user"}
    _, choices = resolve(config, _manifest(sample, config))
    assert str(choices[0]) == (
        "data.history.add=false (users are known by their ids: the field user_id)"
    )
    assert config_from(config.model_dump(mode="json")) == config
    # Not if that is turned off, nor next to another field that users differ in.
    off = _config(**sections, data={"features": [ITEM], "history": {"add": False}})
    device = _config(**sections, data={"features": [ITEM, {"name": "device"}]})
    assert [f.name for f in off.data.features] == ["item"]
    assert [f.name for f in device.data.features] == ["item", "device"]


def test_a_decay_without_a_length_is_over_all_epochs(sample: PreparedDataset) -> None:
    loop = {"loss": "bce", "epochs": 3, "batch_size": 1_000}
    parts = {"tables": {"decay": "cosine"}, "dense": {"decay": "linear", "warmup_steps": 50}}
    config = _config(trainer=loop, optimizer=parts, data={"negatives": {"per_positive": 4}})
    resolved, choices = resolve(config, _manifest(sample, config, rows=29_999))
    steps = 3 * 150  # of 29,999 positives and four negatives of each
    assert resolved.optimizer.tables.decay_steps == steps
    assert resolved.optimizer.dense.decay_steps == steps - 50
    reasons = {choice.setting: choice.reason for choice in choices}
    assert reasons["optimizer.tables.decay_steps"] == "3 epochs of 150 steps"
    assert resolve(_config(), _manifest(sample, _config()))[0].optimizer.dense.decay_steps is None


def test_the_sample_leaves_its_recipe_open() -> None:
    config = load_config(SAMPLE)
    assert config.trainer.is_auto("loss")
    assert config.model.is_auto("embedding_dim")
    assert not config.model.is_auto("init_std")
    assert load_config(SAMPLE, ["trainer.loss=auto"]) == config


def _chosen(config: Config, part: str) -> dict[str, str]:
    """Settings that one of a run's checkpoints says were chosen, and why."""
    state = read_state(find_checkpoint(config.run_dir, part))
    return {choice.setting: choice.reason for choice in choices_in(state)}


def _ndcg(reason: str) -> tuple[float, float]:
    """NDCG with the closed form and without, as the reason has them."""
    both, without = re.findall(r"0\.\d{4}", reason)[:2]
    return float(both), float(without)


def test_a_run_says_what_was_chosen_and_keeps_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_in_fork(_says_and_keeps_what_was_chosen, tmp_path, caplog)


def _says_and_keeps_what_was_chosen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    roots = [f"run.{kind}_root={tmp_path / kind}" for kind in ("prepared", "runs")]
    settings = [*roots, "run.loggers=[]", "model.embedding_dim=8", "evaluate.reference=null"]
    config = load_config(SAMPLE, [*settings, "trainer.max_steps=2"])
    with caplog.at_level("INFO", "deepfm_dist"):
        train(config)
    assert "chosen for this log:" in caplog.messages
    assert any("trainer.loss=softmax (items are ranked" in line for line in caplog.messages)
    saved = load_config(str(config.run_dir / "config.yaml"))
    assert not saved.trainer.is_auto("epochs")
    assert saved.model.linear == "ease"
    # One checkpoint that everything reads, with what was measured on validation rows.
    assert find_checkpoint(config.run_dir, "auto").parents[1] == config.run_dir / "refit"
    assert "hidden layers none" in repr(Model.of(config))
    both, without = _ndcg(_chosen(config, "selected")["model.linear"])
    assert both > without + 0.1  # the trained part has taken two steps
    figures = {}
    for name in ("split=valid", "validation_known=false", "split=test"):
        found = evaluate(load_config(SAMPLE, [*settings, f"evaluate.{name}"]))
        assert found is not None and found.comparison is not None
        figures[name] = {k: v["ndcg@10"] for k, v in found.comparison.figures.items()}
        assert found.report is not None
        page = found.report.read_text()
        assert "model.linear</th>" in page and "was trained with loss=softmax" in page
        known = ("validation items too, as a deployed model would", "training items only")
        assert [text in page for text in known] == [name == "split=test", name != "split=test"]
    assert figures["split=valid"]["model"] == pytest.approx(both, abs=2e-4)
    for ranking in ("model", "popularity"):
        assert figures["split=test"][ranking] != figures["validation_known=false"][ranking]
    with pytest.raises(ConfigError, match=r"/refit: part of the run .*/sample and .*; train that"):
        train(load_config(str(config.run_dir / "refit/config.yaml"), ["trainer.max_steps=3"]))
    # Typing train on what was put together takes nothing from it.
    put = combine(config, ["sample"], "put")
    assert put is not None
    with caplog.at_level("INFO", "deepfm_dist"):
        train(load_config(str(put.config.run_dir / "config.yaml")))
    assert f"Run already finished: {put.config.run_dir}" in caplog.text
    assert find_checkpoint(put.config.run_dir) == put.checkpoint
    _knows_validation_items(config, settings, tmp_path)
    with pytest.raises(ConfigError, match=r"trained on the validation rows too"):
        evaluate(load_config(SAMPLE, [*settings, "evaluate.split=valid", "checkpoint.use=refit"]))


def _knows_validation_items(config: Config, settings: list[str], folder: Path) -> None:
    """Users get what strangers with their training and validation items get, and none of these."""
    dataset = PreparedDataset(config.prepared_dir)
    train_items, valid_items = (dataset.positives(s).lists() for s in ("train", "valid"))
    users, items = (dataset.entity_ids(name).to_pylist() for name in ("user", "item"))
    some = [row for row in range(1, len(users)) if valid_items[row]][:20]
    known = {row: [*dict.fromkeys(train_items[row] + valid_items[row])] for row in some}
    pairs = [(users[row], items[item]) for row in some for item in known[row]]
    histories = folder / "strangers.csv"
    pd.DataFrame(pairs, columns=["user", "item"]).to_csv(histories, index=False)
    asked = {
        "users": f"recommend.users=[{', '.join(users[row] for row in some)}]",
        "histories": f"recommend.histories={histories}",
    }
    ranked = {}
    for name, setting in asked.items():
        more = ["recommend.mask=[train, valid]", "recommend.explain=100"] if name == "users" else []
        found = recommend(load_config(SAMPLE, [*settings, setting, *more]))
        assert found is not None
        ranked[name] = pd.read_parquet(found.files.parquet).sort_values(["user_id", "rank"])
    for row in ranked["users"].itertuples():  # EASE's part, whose columns are factors, included
        explained = row.explanation
        shares = {(r["field"], r["value"]): r["share"] for r in explained["reasons"]}
        total = (
            explained["base"] + sum(shares.values()) + explained["other"] + explained["remainder"]
        )
        assert total == pytest.approx(row.score, abs=1e-4)
        assert abs(explained["remainder"]) < 1e-4  # no over-arch
        assert {field for field, _ in shares} >= {"seen", "item"}
    for column in ("user_id", "item_id"):
        assert ranked["users"][column].tolist() == ranked["histories"][column].tolist()
    assert ranked["users"]["score"].to_numpy() == pytest.approx(ranked["histories"]["score"])
    assert not {*pairs} & {
        *zip(ranked["users"]["user_id"], ranked["users"]["item_id"], strict=True)
    }


def test_a_longer_run_continues_and_what_is_missing_is_made(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_from: list[Path] = []

    def recorded(saved: Saved, *args: Any) -> None:
        read_from.append(saved.path)
        read_start(saved, *args)

    monkeypatch.setattr(finish, "read_start", recorded)
    run_in_fork(_continues_and_makes_what_is_missing, tmp_path, caplog, read_from)


def _continues_and_makes_what_is_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, read_from: list[Path]
) -> None:
    roots = [f"run.{kind}_root={tmp_path / kind}" for kind in ("prepared", "runs")]
    settings = [
        *roots,
        "run.loggers=[]",
        "model.embedding_dim=8",
        "trainer.validate_every_epochs=1",
    ]
    train(load_config(SAMPLE, [*settings, "trainer.max_steps=2"]))
    config = load_config(SAMPLE, [*settings, "trainer.max_steps=3"])
    saved = load_config(str(config.run_dir / "config.yaml"))
    assert train(config).state.step == 3
    for part in ("refit", "selected"):
        assert complete_steps(config.run_dir / part) == [3]
    again = load_config(str(config.run_dir / "config.yaml"))
    assert again.model == saved.model
    assert again.trainer.epochs == saved.trainer.epochs
    delete_tree(config.run_dir / "refit")  # as if it had been killed before the end
    with caplog.at_level("INFO", "deepfm_dist"):
        train(load_config(SAMPLE, [*settings, "trainer.max_steps=3", "checkpoint.use=selected"]))
    assert "resuming after the training loop" in caplog.text
    assert "already finished" not in caplog.text
    assert complete_steps(config.run_dir / "refit") == [3]
    # Another day's run has the model, the loss and the optimizer that were chosen for this one's.
    next_run = ["run.name=next", f"checkpoint.start_from={config.run_dir}", "trainer.max_steps=1"]
    train(started := load_config(SAMPLE, [*settings, *next_run, "data.name=sample"]))
    trained = load_config(str(started.run_dir / "config.yaml"))
    assert (trained.model, trained.trainer.loss) == (saved.model, "softmax")
    assert trained.optimizer.tables.name == "adam"
    assert complete_steps(started.run_dir / "refit") == [1]
    left_out = load_config(SAMPLE, [*settings, "run.name=next"])
    assert find_run(left_out, ()).dataset.folder == started.prepared_dir
    # Its last training starts from the same weights: it takes as few steps as the loop did.
    assert read_from == [find_checkpoint(config.run_dir, "auto", ())]
    # Not from what the closed form was added to: the next run would add it again.
    of_part = ["run.name=twice", f"checkpoint.start_from={config.run_dir / 'refit'}"]
    with pytest.raises(ConfigError, match=rf"holds what is added.*from={config.run_dir}$"):
        train(load_config(SAMPLE, [*settings, *of_part, "trainer.max_steps=1"]))
    with pytest.raises(ConfigError, match=r"model\.embedding_dim=16 \(was 8\)"):
        train(load_config(SAMPLE, [*settings, "model.embedding_dim=16"]))


def test_the_end_is_the_same_on_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without validation rows: training items take their place until the last training.

    A small log has few of them, and the search is cross-validated.
    """
    monkeypatch.setattr(finish, "FEW_POSITIVES", 10**9)
    monkeypatch.setattr(finish, "CUTS", 2)
    for grid in (("L2", (200.0,)), ("FIELD_WEIGHTS", (0.0, 2.0)), ("COLUMNS", (64,))):
        monkeypatch.setattr(linear, *grid)
    found = []
    for size in (1, 2):
        roots = [f"run.prepared_root={tmp_path / 'data'}", f"run.runs_root={tmp_path / str(size)}"]
        settings = [*roots, "run.loggers=[]", "model.embedding_dim=8", "trainer.max_steps=2"]
        settings.append("data.split.valid=0")
        assert run_ranks(train_command.main, size, ["--config", SAMPLE, *settings]) == [0] * size
        config = load_config(SAMPLE, settings)
        found.append((_chosen(config, "selected"), _chosen(config, "refit")))
    assert found[0] == found[1]
    selected, refit = found[0]
    assert selected["trainer.hold_out"] == "there are no validation rows"
    both, without = _ndcg(selected["model.linear"])
    assert both > without + 0.1  # the trained part has taken two steps
    figures = r": cross-validated NDCG@10 0\.\d+, of the trained part alone 0"
    assert re.search(figures, selected["model.linear"])
    # EASE is compared with the L2 that is best for it.
    assert evaluation._ease_l2(find_checkpoint(config.run_dir, "auto")) == 200
    assert evaluation._ease_l2(find_checkpoint(config.run_dir, "best")) == EASE_L2
    assert refit["trainer.refit_best"].endswith("as the best checkpoint took, on all training rows")


def test_users_of_few_items_leave_few_cuts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two known items one is held out once; after that, nothing is left to hold out."""
    for grid in (("L2", (200.0,)), ("COLUMNS", (64,)), ("SHARES", (1.0, 2.0))):
        monkeypatch.setattr(linear, *grid)
    rng = np.random.default_rng(3)
    taken = [(u, i, t) for u in range(60) for t, i in enumerate(rng.choice(30, 3, replace=False))]
    pd.DataFrame(taken, columns=["user", "item", "time"]).to_csv(tmp_path / "log.csv", index=False)
    rows = {"file": "log.csv", "user": "user", "item": "item", "time": "time"}
    split = {"method": "leave_last", "valid": 1, "test": 1}
    roots = {f"{kind}_root": f"{tmp_path / kind}" for kind in ("prepared", "runs")}
    data = {"root": f"{tmp_path}", "interactions": rows, "split": split}
    path = tmp_path / "short.yaml"
    sections = {"data": data, "run": {"loggers": [], **roots}, "trainer": {"max_steps": 2}}
    path.write_text(yaml.safe_dump(sections))
    assert run_ranks(train_command.main, 1, ["--config", f"{path}"]) == [0]
    assert "cross-validated NDCG@10" in _chosen(load_config(f"{path}"), "refit")["model.linear"]


def test_training_for_the_next_item_has_the_same_losses_on_two_ranks(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    taken = [(u, i, t) for u in range(60) for t, i in enumerate(rng.choice(30, 6, replace=False))]
    pd.DataFrame(taken, columns=["user", "item", "time"]).to_csv(tmp_path / "log.csv", index=False)
    rows = {"file": "log.csv", "user": "user", "item": "item", "time": "time"}
    split = {"method": "leave_last", "valid": 1, "test": 1}
    data = {"root": f"{tmp_path}", "interactions": rows, "split": split}
    trainer = {"max_steps": 6, "log_every_steps": 1, "validate_every_epochs": 1, "batch_size": 20}
    roots = {f"{kind}_root": f"{tmp_path / kind}" for kind in ("prepared", "runs")}
    losses = []
    for size in (1, 2):
        run = {"name": f"ranks_{size}", "loggers": [], **roots}
        model = {"linear": "none", "embedding_dim": 8}
        more = {"trainer": {**trainer, "refit_best": False}, "model": model, "run": run}
        path = tmp_path / "next.yaml"
        path.write_text(yaml.safe_dump({"data": {**data, "name": "next"}, **more}))
        assert run_ranks(train_command.main, size, ["--config", f"{path}"]) == [0] * size
        config = load_config(f"{path}")
        assert [f.last for f in config.data.features if f.history] == [None, LATEST]
        assert config.data.history.targets == "later"
        events = read_events(config.run_dir / "metrics.jsonl")
        losses.append([e.figures["loss"] for e in events if isinstance(e, TrainEvent)])
    assert len(losses[0]) == 6 and losses[0][0] > losses[0][-1] > 0
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize(
    ("sections", "sizes", "share"),
    [
        ({}, {}, 0.1),
        ({"trainer": {"monitor": None}}, {}, 0.0),
        ({"trainer": {"refit_best": False}}, {}, 0.0),
        ({}, {"users": 700, "rows": 1_300}, 0.0),
        ({}, {"rows": 600_000_000}, 0.0),
    ],
)
def test_without_validation_rows_training_items_are_held_out(
    sections: dict[str, Any], sizes: dict[str, int], share: float, sample: PreparedDataset
) -> None:
    manifest = _manifest(sample, config := _config(**sections), **sizes)
    none = {**manifest.splits, "valid": SplitSpec(rows=0, positives=0, size_bytes=0)}
    resolved, _ = resolve(config, manifest.model_copy(update={"splits": none}))
    assert resolved.trainer.hold_out == share
    assert resolved.trainer.refit_best == (share > 0)
    assert (resolved.model.linear == "ease") == (share > 0)
    assert (resolved.trainer.patience is not None) == (share > 0)
    if not share:  # few epochs: nothing would stop it
        assert resolved.trainer.epochs <= 100
    with_rows, _ = resolve(config, manifest)
    assert with_rows.trainer.hold_out == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["trainer.loss=bce", "model.linear=ease"], "model.linear=ease: for models that are"),
        (["trainer.loss=bce", "trainer.refit_best=true"], "refit_best=true: for models that are"),
        (
            ["model={linear: ease, deep: true}", "trainer.loss=softmax"],
            "need a model without a deep part",
        ),
        (
            ["data.split.valid=0", "trainer.refit_best=true", "trainer.hold_out=0"],
            "true: there are no validation rows",
        ),
        (["trainer.hold_out=0.1"], r"hold_out=0\.1: there are validation rows; leave it out"),
        (
            ["trainer.loss=bce", "data.split.valid=0", "trainer.hold_out=0.1"],
            "held out by data.spl",
        ),
        (["data.split.valid=0", "trainer.monitor=auc"], "monitor=auc: a figure of validation rows"),
        (["data.split.valid=0", "trainer.hold_out=1e-9"], "holds out no item of any user"),
        (["data.history.add=false", "model.linear=ease"], "EASE needs the items' own id and a his"),
    ],
)
def test_an_end_that_fits_no_model_is_refused_before_training(
    settings: list[str], message: str, tmp_path: Path
) -> None:
    roots = [f"run.{kind}_root={tmp_path / kind}" for kind in ("prepared", "runs")]
    run_in_fork(_refused, [*roots, *settings], message)


def _refused(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(load_config(SAMPLE, settings))


def test_rankings_without_validation_users_are_refused(tmp_path: Path) -> None:
    """Each user has one row, so that those of validation are of users without training rows."""
    rows = pd.DataFrame({"u": range(40), "i": [k % 3 for k in range(40)]})
    rows.to_csv(tmp_path / "a.csv", index=False)
    split = {"method": "random", "valid": 0.2, "test": 0.2}
    data = {"root": str(tmp_path), "interactions": ROWS, "features": [ITEM], "split": split}
    roots = {f"{kind}_root": str(tmp_path / kind) for kind in ("prepared", "runs")}
    tree = {"data": data, "run": roots | {"loggers": []}}
    run_in_fork(_has_nobody_to_validate_on, tree)


def _has_nobody_to_validate_on(tree: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"no user with training rows has an item to rank"):
        train(config_from(tree))
    # As it says: a split that leaves every user something, or a number of epochs.
    for name, section, settings in (
        ("per_user", "data", tree["data"] | {"split": {"method": "per_user"}}),
        ("epochs", "trainer", {"monitor": None}),
    ):
        run = tree["run"] | {"name": name}
        assert train(config_from(tree | {section: settings, "run": run})).state.step > 0


def test_what_the_closed_form_needs_is_looked_for(sample: PreparedDataset) -> None:
    resolved, choices = resolve(config := _config(), _manifest(sample, config, items=20_001))
    assert resolved.model.linear == "none"
    assert "20,001 items" in {c.setting: c.reason for c in choices}["model.linear"]
    shared = {"name": "s", "entity": "user", "history": "item", "table": "item"}
    config = _config(data={"features": [ITEM, shared]})
    resolved, _ = resolve(config, _manifest(sample, config))
    assert resolved.model.linear == "none"
    assert resolved.trainer.refit_best


def _clicks(**sections: dict[str, Any]) -> Config:
    data = {
        "task": "ctr",
        "interactions": {"file": "a.csv", "label": "y"},
        "features": [{"name": "ad"}],
        **sections.pop("data", {}),
    }
    return config_from({"data": data, **sections})


def _clicks_manifest(
    sample: PreparedDataset, config: Config, rows: int, table_rows: int = 1000, valid: int = 100
) -> Manifest:
    splits = {
        name: SplitSpec(rows=n, positives=n // 5, size_bytes=8 * n)
        for name, n in (("train", rows), ("valid", valid), ("test", 100))
    }
    tables = {"ad": TableSpec(rows=table_rows, features=("ad",))}
    update = {"data": config.data, "splits": splits, "tables": tables, "entities": {}}
    return sample.manifest.model_copy(update=update)


@pytest.mark.parametrize(
    ("rows", "batch_size", "layers"),
    [
        (5_000, 256, [64, 64]),
        (120_000, 2048, [128, 128, 128]),
        (400_000, 8192, [256, 256, 256]),
        (1_300_000, 8192, [400, 400, 400]),
        (40_000_000, 8192, [400, 400, 400]),
    ],
)
def test_labelled_rows_scale_the_model_and_its_training(
    rows: int, batch_size: int, layers: list[int], sample: PreparedDataset
) -> None:
    config = _clicks()
    resolved, choices = resolve(config, _clicks_manifest(sample, config, rows))
    assert (resolved.trainer.loss, resolved.monitor) == ("bce", "log_loss")
    assert resolved.trainer.batch_size == batch_size
    rate = 0.001 * (batch_size / 4096) ** 0.5
    assert resolved.optimizer.dense.lr == pytest.approx(rate, rel=0.05)
    is_few, precision = rows < 100_000, 1 if rows < 100_000 else 500  # there is one field
    tables_rate = 0.005 if is_few else resolved.optimizer.dense.lr
    assert resolved.optimizer.tables.lr == tables_rate
    assert resolved.optimizer.tables.name == "adam"
    assert resolved.optimizer.tables.l2 == pytest.approx(precision / rows, rel=0.05)
    assert [*resolved.model.over_arch_layer_sizes] == layers
    assert (resolved.model.dropout, resolved.model.batch_norm) == (0.2, True)
    assert resolved.model.init_at_mean
    has_folds = rows < 300_000
    assert resolved.model.linear == ("logistic" if has_folds else "none")
    assert resolved.trainer.refit_best == has_folds
    reasons = {choice.setting: choice.reason for choice in choices}
    assert reasons["optimizer.dense.lr"] == f"0.001 * sqrt({batch_size} / 4096)"
    assert reasons["optimizer.tables.l2"] == (
        f"{'1 * 1 field' if is_few else '500'} / {rows:,} training rows"
    )
    assert reasons["trainer.patience"] == "validations without a better log loss"


def test_many_labelled_rows_have_a_fitted_start_only_with_models_of_folds(
    sample: PreparedDataset,
) -> None:
    for refit, rows, expected in (
        (False, 99_999, "logistic"),
        (False, 100_000, "none"),
        (True, 100_000, "logistic"),
    ):
        config = _clicks(trainer={"refit_best": refit})
        resolved, _ = resolve(config, _clicks_manifest(sample, config, rows))
        assert resolved.model.linear == expected
    config = _clicks(model={"deep": False})  # an FM, as those next to the DeepFMs of folds
    tables = resolve(config, _clicks_manifest(sample, config, 200_000))[0].optimizer.tables
    assert (tables.lr, tables.l2) == (0.005, 5e-6)


@pytest.mark.parametrize(
    ("rows", "steps", "expected", "without_validation"),
    [
        (100, 1, (640, 32, 8), 128),
        (1_400, 6, (107, 5, 8), 21),
        (10_000, 40, (20, 1, 8), 3),
        (1_300_000, 159, (20, 1, 2), 1),
        (40_000_000, 4883, (20, 1, 2), 1),
    ],
)
def test_labelled_rows_stop_early_or_after_the_steps_that_mostly_do(
    rows: int,
    steps: int,
    expected: tuple[int, int, int],
    without_validation: int,
    sample: PreparedDataset,
) -> None:
    trainer = resolve(config := _clicks(), _clicks_manifest(sample, config, rows))[0].trainer
    assert (trainer.epochs, trainer.validate_every_epochs, trainer.patience) == expected
    assert -(-rows // trainer.batch_size) == steps
    # Without validation rows, or a figure to watch, nothing stops early.
    for config, valid in ((_clicks(), 0), (_clicks(trainer={"monitor": None}), 100)):
        manifest = _clicks_manifest(sample, config, rows, valid=valid)
        resolved, choices = resolve(config, manifest)
        assert (resolved.trainer.patience, resolved.trainer.epochs) == (None, without_validation)
        reasons = {choice.setting: choice.reason for choice in choices}
        assert reasons["trainer.epochs"].endswith("nothing shows when to stop early")


@pytest.mark.parametrize(
    ("rows", "fields", "model", "expected"),
    [
        (168, 3, {}, 3 / 168),  # 500 / 168 would hold every weight at 0
        (10_000, 39, {}, 39 / 10_000),
        (10_000, 39, {"deep": False}, 39 / 10_000),
        (10_000, 39, {"linear": "none"}, 195 / 10_000),
        (1_000_000, 39, {}, 500 / 1_000_000),
        (1_000_000, 39, {"deep": False}, 195 / 1_000_000),
    ],
)
def test_the_prior_of_labelled_rows_is_narrower_with_more_fields(
    rows: int, fields: int, model: dict[str, Any], expected: float, sample: PreparedDataset
) -> None:
    names = [{"name": "ad"}, *({"name": f"x{i}", "kind": "numeric"} for i in range(fields - 1))]
    config = _clicks(model=model, data={"features": names})
    resolved, _ = resolve(config, _clicks_manifest(sample, config, rows))
    assert resolved.optimizer.tables.l2 == pytest.approx(expected, rel=0.05)


def test_large_tables_of_labelled_rows_are_updated_in_backward(sample: PreparedDataset) -> None:
    for config, table_rows in (
        (_clicks(), 3_000_000),
        (_clicks(trainer={"table_precision": "fp16"}), 1000),
        (_clicks(sharding={"tables": {"ad": {"cached": 0.5}}}), 1000),
    ):
        resolved, _ = resolve(config, _clicks_manifest(sample, config, 10**6, table_rows))
        tables = resolved.optimizer.tables
        assert (tables.name, tables.lr, tables.l2) == ("rowwise_adagrad", 0.01, 0.0)


def test_labelled_rows_keep_what_the_user_sets(sample: PreparedDataset) -> None:
    config = _clicks(
        trainer={"batch_size": 1024, "patience": None, "monitor": "auc"},
        model={"over_arch": "examples.dcn_v2:DCNv2"},
        optimizer={"tables": {"name": "adam", "l2": 0.0}},
    )
    resolved, choices = resolve(config, _clicks_manifest(sample, config, 10**6))
    assert (resolved.trainer.batch_size, resolved.trainer.patience) == (1024, None)
    assert resolved.optimizer.tables.l2 == 0.0
    assert resolved.optimizer.dense.lr == 0.0005  # by the batch size that was set
    assert "model.dropout" not in {choice.setting for choice in choices}


def test_what_comes_next_is_predicted_from_the_order_of_items(sample: PreparedDataset) -> None:
    rows = {**ROWS, "time": "at"}
    last = {"interactions": rows, "split": {"method": "leave_last", "valid": 1, "test": 1}}
    config = _config(data=last)
    assert [(f.name, f.history, f.last) for f in config.data.features] == [
        ("item", None, None),
        ("seen", "item", None),
        ("latest", "item", LATEST),
    ]
    assert (config.data.history.targets, config.data.history.dropout) == ("later", 0.0)
    resolved, choices = resolve(config, _manifest(sample, config))
    assert config_from(resolved.model_dump(mode="json")) == resolved
    assert "data.history.targets" in {choice.setting for choice in choices}
    for stated in (
        {**last, "history": {"targets": "random"}},
        {**last, "history": {"dropout": 0.3}},
        {"interactions": rows, "split": {"method": "temporal"}},
        {"interactions": rows},
    ):
        config = _config(data=stated)
        assert [f.name for f in config.data.features] == ["item", "seen"]
        assert (config.data.history.targets, config.data.history.dropout) == ("random", 0.3)
