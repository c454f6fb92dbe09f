"""Settings and options that are paths: each takes a URL, or refuses it by name."""

import importlib
from pathlib import Path

import pytest

from deepfm_dist.config import load_config
from deepfm_dist.errors import DeepFMError
from deepfm_dist.storage import folder_of, local_path, path_or_url

TAKES = (
    ("run.runs_root", "run.runs_root=memory://bucket/runs"),
    ("data.root", "data.root=memory://bucket/logs"),
    ("checkpoint.start_from", "checkpoint.start_from=memory://bucket/runs/a"),
    ("run.prepared_root", "run.prepared_root=memory://bucket/prepared"),
    ("data.vocabulary_from", "data.vocabulary_from=memory://bucket/prepared/a"),
)
LOCAL = (
    "run.cache_root",
    "recommend.users",
    "recommend.histories",
    "recommend.allow_items",
    "recommend.block_items",
)
OPTIONS = (
    ("predict", ["--output", "URL"]),
    ("export", ["--output", "URL"]),
    ("import_weights", ["URL"]),
    ("import_weights", ["CONFIG", "--ids", "genre=URL"]),
    ("prepare", ["data.interactions.file=URL"]),
)


@pytest.mark.parametrize(("name", "override"), TAKES)
def test_a_url_is_kept_unchanged(name: str, override: str) -> None:
    section, _, field = name.partition(".")
    assert getattr(getattr(load_config("sample", [override]), section), field) in override


@pytest.mark.parametrize("name", [*LOCAL, *(name for name, _ in TAKES)])
@pytest.mark.parametrize("text", ["s3:", "s3:bucket", "s3:/bucket", "s3://", "gs:bucket/x"])
def test_incomplete_urls_are_not_folders(name: str, text: str) -> None:
    scheme = text.partition(":")[0]
    with pytest.raises(DeepFMError, match=rf"is not a complete URL; write {scheme}://\w") as caught:
        load_config("sample", [f"{name}='{text}'"])
    assert name in str(caught.value)
    assert f": {text} is not" in str(caught.value)


@pytest.mark.parametrize("name", LOCAL)
def test_a_url_is_refused_by_the_setting_s_name(name: str) -> None:
    with pytest.raises(DeepFMError) as caught:
        load_config("sample", [f"{name}=s3://bucket/x"])
    assert name in str(caught.value)
    text = ": s3://bucket/x is a URL, and only a path on this machine can be used here"
    assert str(caught.value).endswith(text)


@pytest.mark.parametrize("name", LOCAL)
def test_the_url_of_a_local_file_is_its_path(name: str) -> None:
    section, _, field = name.partition(".")
    config = load_config("sample", [f"{name}=file:///data/x"])
    assert getattr(getattr(config, section), field) == "/data/x"


@pytest.mark.parametrize(("command", "arguments"), OPTIONS)
def test_options_refuse_urls(
    command: str,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "CONFIG").write_text("")
    main = importlib.import_module(f"deepfm_dist.{command}").main
    arguments = [a.replace("URL", "s3://bucket/x.parquet") for a in arguments]
    assert main(["--quiet", *arguments]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "s3://bucket/x.parquet" in line
    assert "is a URL" in line or "set data.root=s3://bucket and name it x.parquet" in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["CONFIG"]


def test_names_with_a_colon_are_paths() -> None:
    for name in ("runs", "../runs:old", "a:b/c", "/data/s3:x", "C:/x"):
        assert local_path(name) == path_or_url(name) == name
        assert folder_of(name) == Path(name)
    assert folder_of("file:///a/b") == Path("/a/b")
    with pytest.raises(DeepFMError, match="s3:runs is not a complete URL; write s3://runs"):
        folder_of("s3:runs")
