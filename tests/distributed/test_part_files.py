"""Folders of parts: what they may hold, and when earlier parts are reused."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepfm_dist.distributed.part_files import PartFolder
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.errors import ConfigError, DeepFMError
from deepfm_dist.storage import folder_of
from tests.ranks import run_alone

TABLES = [pa.table({"id": [n, n + 1], "score": [0.5, 0.25]}) for n in range(3)]


def _write(folder: Path, inputs: Any, parts: list[int], content: str = "scores") -> list[int]:
    """Writes some parts, and completes the folder with all of them; those already present."""
    with process_group("cpu") as world:
        out = PartFolder(folder, inputs, world, content)
        for part in parts:
            out.write(part, TABLES[part].schema, [TABLES[part]])
        if parts[-1:] == [2]:
            out.finish(3, {"rows": 6})
        return sorted(out.present)


def _written_behind_a_url() -> tuple[list[int], list[int], list[str], pa.Table]:
    folder = folder_of("memory://results/today")
    with process_group("cpu") as world:
        for part in (0, 1):
            PartFolder(folder, {"a": 1}, world).write(part, TABLES[part].schema, [TABLES[part]])
        out = PartFolder(folder, {"a": 1}, world)
        out.write(2, TABLES[2].schema, [TABLES[2]])
        out.finish(3, {"rows": 6})
        again = PartFolder(folder, {"a": 1}, world)
        assert again.summary == {"parts": 3, "rows": 6}
        tables = []
        for part in range(3):
            with again.path(part).open("rb") as file:
                tables.append(pq.read_table(file))
        names = sorted(path.name for path in folder.iterdir())
        return sorted(out.present), sorted(again.present), names, pa.concat_tables(tables)


def test_parts_go_to_a_url_and_are_found_there() -> None:
    present, again, names, table = run_alone(_written_behind_a_url)
    assert (present, again) == ([0, 1], [0, 1, 2])
    parts = [f"part-00000{n}.parquet" for n in range(3)]
    assert names == ["_SUCCESS", "_inputs.json", *parts]
    assert table.equals(pa.concat_tables(TABLES))


def test_parts_of_other_inputs_are_replaced_and_the_mark_goes_first(
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    assert run_alone(_write, out, {"a": 1}, [0, 1, 2]) == []
    assert run_alone(_write, out, {"a": 1}, []) == [0, 1, 2]
    assert (out / "_SUCCESS").exists()
    assert run_alone(_write, out, {"a": 2}, [0]) == []
    assert sorted(p.name for p in out.iterdir()) == ["_inputs.json", "part-000000.parquet"]
    assert run_alone(_write, out, {"a": 2}, [1, 2]) == [0]
    (out / "part-000001.parquet").unlink()
    assert run_alone(_write, out, {"a": 2}, []) == [0, 2]
    assert not (out / "_SUCCESS").exists()


def _refused(folder: Path, parts: list[int], inputs: Any, content: str = "scores") -> str:
    with pytest.raises(DeepFMError) as caught:
        _write(folder, inputs, parts, content)
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize("file", ["rows.csv", "part-00000-7ad3.snappy.parquet"])
def test_a_folder_with_other_files_is_left_alone(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_text("x")
    (tmp_path / "_SUCCESS").write_text("")
    assert run_alone(_refused, tmp_path, [0], {"a": 1}) == (
        f"{ConfigError.__name__}: {tmp_path}: holds files that this command did not write "
        f"({file}); name a new or empty folder"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["_SUCCESS", file])


def test_a_part_that_another_machine_kept_to_itself_is_missed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_alone(_refused, out, [0, 2], {"a": 1}) == (
        f"DeepFMError: {out}: 1 of 3 parts that other ranks wrote are not there, such as "
        f"part-000001.parquet; name a folder that all machines share, or a URL"
    )
    assert not (out / "_SUCCESS").exists()


@pytest.mark.parametrize("inputs", [{"a": 1}, None])
def test_parts_of_something_else_are_not_replaced(tmp_path: Path, inputs: Any) -> None:
    out = tmp_path / "out"
    run_alone(_write, out, {"a": 1}, [0, 1, 2])
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert run_alone(_refused, out, [0], inputs, "rankings") == (
        f"ConfigError: {out}: holds scores, and this command writes rankings; name a new or empty "
        f"folder"
    )
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    earlier = out / "_inputs.json"  # as versions wrote that did not say what parts hold
    earlier.write_text('{"a": 1}\n')
    assert run_alone(_write, out, inputs, [0], "rankings") == []
