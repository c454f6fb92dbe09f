"""A model is read with the data it was trained on, or refused by what differs."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepfm_dist import prepare as prepare_command
from deepfm_dist import train as train_command
from deepfm_dist.config import Config
from deepfm_dist.data.compatibility import changes_between
from deepfm_dist.data.manifest import Manifest, settings_of
from deepfm_dist.data.schema import FileFormat
from deepfm_dist.distributed import checkpoint
from deepfm_dist.errors import CheckpointError
from deepfm_dist.runs.trained import find_run
from deepfm_dist.training.state import LoopState
from tests.data.small_datasets import FIELDS, config_of, prepared, write_input
from tests.ranks import run_alone, run_ranks


def save_marker(config: Config, manifest: Manifest) -> Path:
    """A checkpoint that has no weights."""
    path = checkpoint.checkpoint_path(config.run_dir, 5)
    path.mkdir(parents=True)
    state = {
        "step": 5,
        **manifest.hashes,
        "config": config.model_dump(mode="json"),
        "crc32": {},
        "trainer": asdict(LoopState(5)),
    }
    (path / checkpoint.MARKER).write_text(json.dumps(state))
    (config.run_dir / "config.yaml").write_text(config.to_yaml())
    return path


MOOD, PLACE = "- {name: mood, fill: calm}\n", "- {name: place, hash_rows: 20}\n"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            MOOD + PLACE,
            PLACE + MOOD,
            "features=user,seen,item,genre,maker,mood,place,.*was prepare",
        ),
        ("history: item}", "history: item, pooling: sum}", "seen.pooling=mean, .*pooling=sum"),
        ('separator: "|"}', 'separator: "|", pooling: sqrt}', "genre.pooling=mean, .*=sqrt"),
        ("fill: calm", "fill: glad", "mood.fill=calm, .*fill=glad"),
        ("hash_rows: 20}", "hash_rows: 20, column: other}", "place.column=None, .*column=other"),
        ("hash_rows: 20}", "hash_rows: 20, missing: [p1]}", r"place.missing=\[\], .*=\['p1'\]"),
        ("hash_rows: 20}", "hash_rows: 30}", "place.hash_rows=20, .*hash_rows=30"),
        ("keep: first}", "keep: all}", "maker.keep=first, .*keep=all"),
        ("keep: first}", 'keep: first, separator: "1"}', "maker.separator=None, .*separator=1"),
        ("keep: first}", "keep: first, column: brand}", "maker.column=None, .*column=brand"),
        ("transform: log", "transform: none", "price.transform=log, .*transform=none"),
        ("column: years", "column: price", "age.column=years, .*column=price"),
        (', file: items.csv, separator: "|"', ", column: mood", "genre.column=None, .*column=mood"),
        (
            MOOD,
            "",
            "features=.*mood.*was prepared with data.features=user,seen,item,genre,maker,pl",
        ),
        ("name: mood,", "name: temper, column: mood,", "features=.*mood.*=.*temper"),
        ("derive: weekday", "derive: weekend", "day.derive=weekday, .*derive=weekend"),
        (MOOD, MOOD.replace("fill", "min_count: 90, fill"), "vocabulary .*min_count=90, not 1"),
    ],
)
def test_fields_that_mean_something_else_are_named(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    write_input(tmp_path)
    config = config_of(tmp_path)
    path = save_marker(config, prepared(config))
    assert old in FIELDS
    prepared(config_of(tmp_path, FIELDS.replace(old, new, 1)))
    with pytest.raises(CheckpointError, match=said) as caught:
        find_run(config, [])
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_field_whose_ids_alone_differ_is_named(tmp_path: Path) -> None:
    """Vocabularies and their numbers of rows may be the same, and a field's reading of them not."""
    write_input(tmp_path)
    config = config_of(tmp_path)
    manifest = prepared(config)
    marker = save_marker(config, manifest) / checkpoint.MARKER
    state = json.loads(marker.read_text())
    state["field_hashes"] = {**manifest.field_hashes, "seen": "0"}
    marker.write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="the ids or statistics of seen are others in"):
        find_run(config, [])


def test_the_cure_is_typed_and_cures(tmp_path: Path) -> None:
    write_input(tmp_path)
    config = config_of(tmp_path)
    save_marker(config, prepared(config))
    prepared(config_of(tmp_path, FIELDS.replace("fill: calm", "fill: glad")))
    with pytest.raises(CheckpointError, match=r"mood\.fill") as caught:
        find_run(config, [])
    cure = str(caught.value).split("python -m deepfm_dist.prepare ")[1].split(";")[0]
    assert run_alone(prepare_command.main, ["--quiet", *cure.split()]) == 0
    assert find_run(config, []).state["step"] == 5


def test_where_files_lie_and_what_people_read_may_differ(tmp_path: Path) -> None:
    write_input(tmp_path)
    config = config_of(tmp_path)
    save_marker(config, prepared(config))
    (tmp_path / "items.csv").rename(tmp_path / "things.csv")
    fields = FIELDS.replace("items.csv", "things.csv")
    titles = "data.titles={file: things.csv, column: brand}"
    other = config_of(tmp_path, fields, titles, "data.files={things.csv: {encoding: ascii}}")
    prepared(other)
    assert find_run(config, []).state["step"] == 5


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.negatives.evaluation_per_positive=2", "evaluation_per_positive=2, not 1"),
        (
            "data.name=r",
            "the input or the version of deepfm_dist has changed",
        ),  # values of a hashed column
    ],
)
def test_changed_rows_are_reported_and_not_evaluated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, override: str, said: str
) -> None:
    write_input(tmp_path)
    config = config_of(tmp_path)
    before = prepared(config)
    save_marker(config, before)
    find_run(config, [], same_rows=True)
    assert not caplog.records
    if "input" in said:
        rows = tmp_path / "rows.csv"
        rows.write_text(rows.read_text().replace(",p1,", ",p8,"))
    assert prepared(config_of(tmp_path, FIELDS, override)).vocabulary_hash == before.vocabulary_hash
    find_run(config, [])
    [record] = caplog.records
    assert said in record.getMessage()
    with pytest.raises(CheckpointError, match=f"holds other rows than .*{said}.*flatter"):
        find_run(config, [], same_rows=True)


def test_a_column_that_was_found_to_hold_lists_is_the_one_that_was_trained_on(
    tmp_path: Path,
) -> None:
    rows = {"user": [f"u{k % 9}" for k in range(90)], "item": [f"i{k % 31}" for k in range(90)]}
    lists = pa.array([["a", "b"][: k % 3] for k in range(90)])
    pq.write_table(pa.table(rows | {"tags": lists}), tmp_path / "rows.parquet")
    fields = "[{name: user, entity: user}, {name: item, entity: item}, {name: tags}]"
    rows_of = "data.interactions.file=rows.parquet"
    config = config_of(tmp_path, fields, rows_of, "data.history={}")
    manifest = prepared(config)
    assert manifest.features[-1].multi_valued
    assert not config.data.features[-1].multi_valued
    save_marker(config, manifest)
    assert find_run(config, []).state["step"] == 5


def _train_on_own_data(home: Path) -> int:
    """Each rank on a machine of its own, whose folder is called alike."""
    rank = os.environ["RANK"]
    own = f"run.prepared_root={home / rank}"
    arguments = ["--quiet", "--config", str(home / "config.yaml"), own, "trainer.max_steps=2"]
    return train_command.main(arguments)


def test_different_datasets_of_one_name_on_two_machines_are_detected(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_input(tmp_path)
    for rank, fields in enumerate((FIELDS, FIELDS.replace("fill: calm", "fill: glad"))):
        prepared(config_of(tmp_path, fields, f"run.prepared_root={tmp_path / str(rank)}"))
    config_of(tmp_path)
    assert run_ranks(_train_on_own_data, 2, tmp_path) == [2, 2]
    assert "rank 1 finds another dataset there" in capfd.readouterr().err
    assert not (tmp_path / "r" / "checkpoints").exists()
    shutil.rmtree(tmp_path / "1")
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    assert run_ranks(_train_on_own_data, 2, tmp_path) == [0, 0]


def test_what_made_a_dataset_another_one_is_named(tmp_path: Path) -> None:
    write_input(tmp_path)
    config = config_of(tmp_path)
    new = prepared(config)
    old = new.model_copy(update={"versions": new.versions | {"deepfm-dist": "0.0.1"}})
    version = new.versions["deepfm-dist"]
    assert changes_between(old, new) == (
        f"it was prepared with deepfm-dist 0.0.1, and with deepfm-dist {version} the same settings "
        f"and files (by name and size) give another dataset"
    )
    assert changes_between(new, new).startswith("an input file was edited, though its size")

    split = new.data.split.model_copy(update={"valid": 0.3})
    layout = {"rows.csv": FileFormat(delimiter=";")}
    fields = tuple(f for f in new.data.features if f.name != "mood")
    other = old.model_copy(
        update={
            "data": new.data.model_copy(
                update={"split": split, "files": layout, "features": fields}
            ),
            "inputs": {"rows.csv": 1, "gone.csv": 2},
            "seed": new.seed + 1,
        }
    )
    message = changes_between(other, new)
    kept = ",".join(f.name for f in new.data.features)
    without = ",".join(f.name for f in fields)
    assert message.startswith(
        f"its input files or settings have changed (data.features={kept}, not {without}; "
    )
    n_files = len(new.inputs.keys() | other.inputs.keys())
    assert message.endswith(
        f"data.split.valid={new.data.split.valid}, not 0.3; data.files=None, not "
        f"{{'rows.csv': {{'delimiter': ';'}}}} and {n_files + 1} more)"  # and the seed
    )
    files_alone = old.model_copy(update={"inputs": old.inputs | {"gone.csv": 2}})
    assert changes_between(files_alone, new).endswith("changed (gone.csv is gone)")


def test_an_upgrade_that_prepares_differently_changes_no_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_input(tmp_path)
    config = config_of(tmp_path)
    manifest = prepared(config)
    file = config.prepared_dir / "manifest.json"
    earlier = json.loads(file.read_text()) | {"fingerprint": "0", "data_hash": "0"}
    earlier["versions"]["deepfm-dist"] = "0.0.1"
    file.write_text(json.dumps(earlier))
    save_marker(config, manifest.model_copy(update={"data_hash": "0"}))
    assert prepare_command.main(["--config", str(config.run_dir)]) == 2
    message = capsys.readouterr().err
    assert "was prepared with deepfm-dist 0.0.1, and with deepfm-dist " in message
    assert f"give another dataset, and {config.run_dir} would lose the dataset" in message


def test_new_settings_at_their_defaults_leave_datasets_current(tmp_path: Path) -> None:
    write_input(tmp_path)
    data = config_of(tmp_path).data
    data = data.model_copy(update={"files": {"rows.csv": FileFormat(delimiter=",")}})
    assert "catalogue" not in settings_of(data)
    assert "optional" not in settings_of(data)["files"]["rows.csv"]
