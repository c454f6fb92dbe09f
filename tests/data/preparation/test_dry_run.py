"""The dry run's figures on the first rows, against counts by hand."""

from pathlib import Path

import pytest
import yaml

from deepfm_dist import prepare
from deepfm_dist.data.preparation.dry_run import FieldPreview, dry_run
from deepfm_dist.data.schema import DataConfig

SPEC = """
interactions: {file: "rows*.csv", user: u, item: i}
features:
  - {name: user, entity: user}
  - {name: item, entity: item}
  - {name: hour, column: h}
  - {name: tags, column: t, separator: "|"}
  - {name: amount, kind: numeric, transform: standard}
  - {name: price, entity: item, file: items.csv, kind: numeric}
split: {valid: 0, test: 0}
"""
FIRST = """u,i,h,t,amount
a,x,7,red|blue,1
a,y,7,red,
b,x,8,,3
c,z,,red,2
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "rows1.csv").write_text(FIRST)
    (tmp_path / "rows2.csv").write_text("u,i,h,t,amount\nd,q,9,green,not a number\n")
    (tmp_path / "items.csv").write_text("i,price\nx,10\ny,\nz,30\nq,99\n")
    return tmp_path


def test_the_first_rows_show_what_becomes_of_each_field(root: Path) -> None:
    before = sorted(root.iterdir())
    found = dry_run(DataConfig.model_validate(yaml.safe_load(SPEC)), root, seed=0, rows=4)
    assert sorted(root.iterdir()) == before
    assert found.rows == 4  # the bad cell in the fifth is not read
    assert found.splits == {"train": 4, "valid": 0, "test": 0}
    fields = {field.name: field for field in found.fields}
    assert [*fields] == ["user", "item", "hour", "tags", "amount", "price"]
    user, item, hour, tags, amount, price = found.fields
    assert (user.kind, user.distinct, user.examples[0]) == ("table user, 4 rows", 3, "a")
    assert (item.kind, item.distinct, item.examples[0]) == ("table item, 4 rows", 3, "x")
    assert (hour.distinct, hour.missing, hour.examples) == (2, 0.25, ("7", "8"))
    assert (tags.kind, tags.missing) == ("table tags, 3 rows; several values", 0.25)
    assert tags.examples == ("red", "blue")
    assert amount == FieldPreview(
        *("amount", "context", "number, standard (mean 2, deviation 0.816497)"),
        *(3, 0.25, ("1", "2", "3")),
    )
    assert (price.distinct, price.examples) == (2, ("10", "30"))
    assert price.missing == pytest.approx(1 / 3)  # of x, y and z


def test_the_median_of_a_number_counts_every_row(root: Path) -> None:
    (root / "rows1.csv").write_text(FIRST.replace("a,y,7,red,\n", "a,y,7,red,3\n" * 5))
    spec = yaml.safe_load(SPEC)
    spec["interactions"]["repeated"] = "all"
    found = dry_run(DataConfig.model_validate(spec), root, seed=0, rows=8)
    amount = next(field for field in found.fields if field.name == "amount")
    assert (amount.distinct, amount.examples) == (3, ("1", "3"))  # 1, 2 and six times 3


def test_the_command_shows_it_and_prepares_nothing(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "rows2.csv").unlink()
    config = {"run": {"prepared_root": str(tmp_path / "prepared")}, "data": yaml.safe_load(SPEC)}
    config["data"]["root"] = str(root)
    (root / "my.yaml").write_text(yaml.safe_dump(config))
    assert prepare.main(["--config", str(root / "my.yaml"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "4 rows kept of the first 100,000: train 4, valid 0, test 0\n" in printed
    assert "hour    context  table hour, 3 rows" in printed
    assert not (tmp_path / "prepared").exists()
