import pytest

from deepfm_dist.config import BUNDLE, config_from, load_config
from deepfm_dist.errors import ConfigError

BUNDLED = sorted(p.stem for p in (BUNDLE / "configs").glob("*.yaml"))


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_configurations_load_and_survive_yaml(name: str, tmp_path: object) -> None:
    config = load_config(name)
    assert config.run.name == name
    path = f"{tmp_path}/again.yaml"
    with open(path, "w") as file:
        file.write(config.to_yaml())
    assert load_config(path) == config


def test_overrides_are_yaml_values() -> None:
    config = load_config(
        "sample",
        [
            "model.over_arch_layer_sizes=[8]",
            "run.seed=7",
            "sharding.tables={user: {kind: row_wise}}",
        ],
    )
    assert config.model.over_arch_layer_sizes == (8,)
    assert config.run.seed == 7
    assert config.sharding.tables["user"].kind == "row_wise"


FIXED = "data.negatives.fixed_per_user=5"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["trainer.batchsize=1"],
            r"batchsize: unknown field; did you mean trainer\.batch_size\?",
        ),
        (["modle.x=1"], "did you mean model"),
        (["model.embedding_dim=0"], r"model\.embedding_dim: .* \(got 0\)"),
        (["model.embedding_dim=x"], r"embedding_dim: .*valid integer.* \(got 'x'\)"),
        (["nonsense"], "overrides look like section.field=value"),
        (["run.seed=[1"], "the value is not YAML"),
        (["model={first_order: false, fm: false, deep: false}"], "nothing is left to train"),
        (["data.split.valid=0.6", "data.split.test=0.4"], "leave no training rows"),
        (["data.split={method: leave_last, valid: 0.5}"], "whole rows"),
        (["data.interactions.min_rating=4"], "rating and min_rating go together"),
        (["data.interactions.item=null"], "needs interactions.user and interactions.item"),
        (["data.task=ctr"], "needs interactions.label"),
        ([FIXED, "data.split.method=temporal"], "have no time"),
        ([FIXED, "data.split={test_file: x.csv}"], "cannot go with a given split"),
        ([FIXED, "data.features=[{name: hour}]"], "cannot come from the interactions file"),
        (["data.features=[{name: a}, {name: a}]"], "two features are called 'a'"),
        (["data.features=[{name: count}]"], "reserved name"),
        (["data.features=[{name: user, entity: user, kind: numeric}]"], "cannot be numeric"),
        (["data.features=[{name: a, transform: log}]"], "for numeric fields"),
    ],
)
def test_what_cannot_work_is_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("sample", overrides)


def test_all_problems_are_listed() -> None:
    with pytest.raises(ConfigError, match=r"2 problems\n  .*\n  "):
        load_config("sample", ["model.embedding_dim=0", "trainer.epochs=0"])


def test_unknown_files_and_variables_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="did you mean sample"):
        load_config("sampel")
    monkeypatch.delenv("DEEPFM_DATA", raising=False)
    with pytest.raises(ConfigError, match="variable is not set"):
        _ = load_config("aistages").data_root
    monkeypatch.setenv("DEEPFM_DATA", "/somewhere")
    assert str(load_config("aistages").data_root) == "/somewhere/aistages"
    with pytest.raises(ConfigError, match=r"data: .*required"):
        config_from({})
