import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from deepfm_dist.bundle import BUNDLE
from deepfm_dist.config import Config, config_from, load_config
from deepfm_dist.errors import ConfigError
from deepfm_dist.section import Section
from deepfm_dist.typed_yaml import load, parse_scalars

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
CTR = "data={task: ctr, interactions: {file: a.csv, user: u, label: y}, features: [{name: user, entity: user}]}"  # noqa: E501
RATED = "data.interactions={file: a.csv, user: user, item: item, rating: stars, min_rating: 4}"
TIMELESS = "data.interactions.time=null"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["trainer.batchsize=1"],
            r"^trainer\.batchsize=1: unknown field; did you mean trainer\.batch_size\?$",
        ),
        (["modle.x=1"], "did you mean model"),
        (["model.embedding_dim=0"], r"^model\.embedding_dim=0: input .* \(got 0\)"),
        (["model.embedding_dim=x"], r"embedding_dim=x: .*valid integer.* \(got 'x'\)"),
        (["nonsense"], "overrides look like section.field=value"),
        (["run.seed=[1"], "the value is not YAML"),
        (["model={first_order: false, fm: false, deep: false}"], "nothing is left to train"),
        (["data.split.valid=0.6", "data.split.test=0.4"], "leave no training rows"),
        (["data.split={method: leave_last, valid: 0.5}"], "whole rows"),
        (["data.interactions.min_rating=4"], "rating and min_rating go together"),
        (["data.interactions.item=null"], "needs interactions.user and interactions.item"),
        (["data.task=ctr"], "needs interactions.label"),
        ([FIXED, "data.split.method=temporal"], "have no time"),
        *[
            ([FIXED, f"data.negatives.{text}"], f"{text.partition('=')[0]} does not go with fixed_")
            for text in ("evaluation_per_positive=2", "popularity_power=1", "avoid=all", "redraw=0")
        ],
        ([FIXED, "data.split={test_file: x.csv}"], "cannot go with a given split"),
        ([FIXED, "data.features=[{name: hour}]"], "cannot come from the interactions file"),
        (["data.features=[{name: a}, {name: a}]"], "two features are called 'a'"),
        (["data.features=[{name: count}]"], "reserved name"),
        (["data.features=[{name: user, entity: user, kind: numeric}]"], "cannot be numeric"),
        (["data.features=[{name: a, transform: log}]"], "for numeric fields"),
        (
            ["data.features=[{name: a, seperator: x}]"],
            r"data\.features\.0\.seperator: unknown field; did you mean .*\.0\.separator\?$",
        ),
        (["data.features=[{name: a, kind: numeric}]"], "at least one categorical field"),
        ([CTR.replace("[{name: user, entity: user}]", "[]")], "at least one categorical field"),
        (["data.features=[{name: a, kind: numeric, table: t}]"], "table is for categorical"),
        (
            ["data.features=[{name: a, kind: numeric, separator: x}]"],
            "separator is for categorical",
        ),
        (["data.features=[{name: a, file: x.csv}]"], "a: a context field is a column of the inter"),
        (["data.features=[{name: a, min_count: 0}]"], r"features\.0\.min_count: .* \(got 0\)"),
        (
            ["data.features=[{name: user, entity: user}, {name: b, table: user, hash_rows: 9}]"],
            "'user': b cannot share the table of the users' ids",
        ),
        (["data.interactions.label=y"], "needs task: ctr"),
        (
            [CTR, "data.negatives.per_positive=2"],
            "negatives go with task: implicit",
        ),
        ([CTR, "data.interactions.user=null"], "user describes the user: name interactions.user"),
        ([TIMELESS, "data.split.method=temporal"], "method=temporal needs interactions.time"),
        ([FIXED, "data.split={valid_file: x.csv}"], "cannot go with a given split"),
        ([FIXED, "data.interactions.split=s"], "cannot go with a given split"),
        (["data.files={a.csv: {encoding: latin-O}}"], "encoding: unknown text encoding 'latin-O'"),
        (["model.over_arch_layer_sizes=[8, 0]"], r"must be positive: \(8, 0\)"),
        (["model.over_arch_options={a: 1}"], "go with an over_arch given by import path"),
        (["model={fm: false, fm_pairs: across}"], "chooses pairs of the fm part, which is off"),
        (["trainer.targets_per_user=4"], "targets_per_user needs candidates"),
        (["trainer={monitor: null, min_delta: 0.1}"], "min_delta=0.1 needs a monitored figure"),
        (["trainer={monitor: none, patience: 2}"], "patience=2 needs a monitored figure"),
        (["trainer={validate_every_epochs: 0, patience: 2}"], "patience=2 needs validations"),
        (["trainer={validate_every_epochs: 0, monitor: ne}"], "monitor=ne needs validations"),
        (["optimizer.dense.decay_steps=9"], "need a decay: linear, cosine or polynomial"),
        (["optimizer.tables.final_lr=0.1"], "need a decay: linear, cosine or polynomial"),
        (["optimizer.dense={decay: cosine, decay_steps: 9, power: 3}"], "power=3 is an exponent"),
        (["trainer.profile_steps=[10, 5]"], r"trainer: profile_steps=\[10, 5\]: give the first, "),
        (["trainer.profile_steps=[0, 5]"], r"trainer: profile_steps=\[0, 5\]: give the first, "),
        (["evaluate.k=[0]"], r"evaluate: k needs positive cut-offs \(got \[0\]\)"),
        ([CTR], "evaluate.reference=best_possible.parquet: rankings are measured where rows ar"),
        *[
            ([CTR, "evaluate.reference=null", f"evaluate.{text}"], f"evaluate.{named}: rankings")
            for text, named in (
                ("k=[20]", r"k=\[20\]"),
                ("baselines=[]", r"baselines=\[\]"),
                ("item_knn_neighbours=9", "item_knn_neighbours=9"),
                ("ease_l2=9", "ease_l2=9.0"),
                ("ials={factors: 9}", r"ials=\{'factors': 9\}"),
            )
        ],
        (["recommend.probes=9"], "recommend: probes=9 needs an index: set index=IVF1024,Flat"),
        (
            ["recommend={histories: a.csv, mask: [train]}"],
            r"^recommend={.*}: mask=\['train'\] applies to users of the training data",
        ),
        (["run.device=tpu"], r"run\.device=tpu: .*'cuda' \(got 'tpu'\)"),
        (["run.runs_root=https://a.b/c"], r"^run\.runs_root=https://a\.b/c: .* can only be read"),
        (["run.runs_root=''"], r"^run\.runs_root='': '' is empty; name a folder"),
        (["run.loggers=csv"], r"^run\.loggers=csv: input should be a list: \[csv\]$"),
        (["evaluate.k=5"], r"^evaluate\.k=5: input should be a list: \[5\]$"),
        (["run.seed=9223372036854775808"], r"run\.seed=.*: .* \(got 9223372036854775808\)"),
        (["model=3"], r"^model=3: input should be a section of fields \(got 3\)"),
        (["data.features=3"], r"^data\.features=3: input should be a list: \[3\]$"),
        (
            ["data.features=[{nam: user, entity: user}]"],
            r"]: data\.features\.0\.nam: unknown field; did you mean data\.features\.0\.name\?$",
        ),
        (["data.files=3"], r"^data\.files=3: input should be a section of fields \(got 3\)"),
        (["run.name=''"], r"run\.name='': '' is not the name of a folder"),
        (["data.features.0.name=a"], "features is not a section"),
        (["optimizer.tables.lr=.inf"], r"tables\.lr=\.inf: .*finite number \(got inf\)"),
        (["optimizer.dense.lr=.nan"], r"dense\.lr=\.nan: .* \(got nan\)"),
        (["data.split.valid=.nan"], r"split\.valid=\.nan: .* \(got nan\)"),
        (["data.interactions.user=item"], "user and item are both the column 'item'"),
        (["data.interactions.split=time"], "time and split are both the column 'time'"),
        (
            [RATED, "data.features=[{name: item, entity: item}, {name: stars}]"],
            "stars: the column 'stars' is interactions.rating, and no field of the model",
        ),
        ([CTR, "data.features=[{name: y}]"], "y: the column 'y' is interactions.label"),
        (
            ["data.interactions.split=part", "data.features=[{name: p, column: part}]"],
            "p: the column 'part' is interactions.split",
        ),
        (
            ["data.features=[{name: item, entity: item, file: genres.tsv}]"],
            "item: the column 'item' is the key of genres.tsv; name the column that holds",
        ),
        (
            ["data.features=[{name: g, entity: user, file: g.tsv, key: x, column: x}]"],
            "g: the column 'x' is the key of g.tsv",
        ),
        (["data.titles={file: titles.tsv, column: item}"], "titles: the column 'item' is the key"),
        (
            ["data.features=[{name: a/b}]"],
            r"features\.0\.name: 'a/b' is not a valid name; use letters",
        ),
        (["data.features=[{name: ''}]"], r"features\.0\.name: '' is not a valid name"),
        (
            ["data.features=[{name: a, table: ../b}]"],
            r"features\.0\.table: '\.\./b' is not a valid name",
        ),
        (
            ["data.features=[{name: a, table: b.c}]"],
            r"features\.0\.table: 'b\.c' is not a valid name",
        ),
        (["data.features=[{name: a, separator: ''}]"], r"separator: .*at least 1 character"),
        (["data.files={a.csv: {delimiter: ''}}"], r"delimiter: .*at least 1 character"),
    ],
)
def test_what_cannot_work_is_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("sample", overrides)


def test_words_for_missing_may_be_numbers() -> None:
    config = load_config("sample", ["data.features=[{name: city, missing: [-1, 99.5, NA]}]"])
    assert config.data.features[0].missing == ("-1", "99.5", "NA")


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
    with pytest.raises(ConfigError, match=r"--config nothing_near: .*bundled: aistages, "):
        load_config("nothing_near")
    with pytest.raises(ConfigError, match=r"--config \.\.: is a folder, .*; name a YAML file$"):
        load_config("..")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"run: [", "not readable as YAML"),
        (b"\xff", "not readable as YAML"),
        (b"[run]", "expected sections"),
    ],
)
def test_files_that_are_not_configurations_are_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(str(path))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_what_is_not_said_has_its_default() -> None:
    features = [{"name": "u", "entity": "user"}]
    rows = {"file": "a.csv", "user": "u", "item": "i"}
    config = config_from({"data": {"interactions": rows, "features": features}})
    assert (config.run.seed, config.model.embedding_dim, config.trainer.epochs) == (1, 16, 10)
    assert str(config.prepared_dir) == "prepared/default"
    named = load_config("sample", ["run.name=mine", "run.runs_root=/r", "data.name=d"])
    assert (str(named.run_dir), str(named.prepared_dir)) == ("/r/mine", "prepared/d")


def test_the_sample_is_found_from_anywhere_and_an_own_folder_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config()
    assert config.data_root == BUNDLE / "data/sample"
    (tmp_path / "data/sample").mkdir(parents=True)
    assert config.data_root == Path("data/sample")
    assert load_config("sample", ["data.root=~/x"]).data_root == tmp_path / "x"


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=5),
        st.text(max_size=6) | st.integers(-(2**40), 2**40) | st.floats(-1e9, 1e9),
        max_size=4,
    )
)
def test_values_are_text_and_survive_yaml(context: dict[str, object]) -> None:
    tree = yaml.safe_load((BUNDLE / "configs/sample.yaml").read_text())
    config = config_from(tree | {"recommend": {"context": context}})
    assert config.recommend.context == {k: str(v) for k, v in context.items()}
    assert config_from(parse_scalars(load(config.to_yaml()), Config)) == config


WORDS = (
    *("0074", "1_000", "1e3", "1.0", "2024-01-01", "NO", "on", "NULL", "~", "null", "0x10", ".nan"),
    *("1:30", "-1", "+5", "true", "Off", "=", "0o7", "007.50", "12e03", "_"),
)


@pytest.mark.parametrize("word", WORDS)
def test_text_is_as_typed(word: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        (BUNDLE / "configs/sample.yaml").read_text()
        + f"""
recommend:
  users: [{word}, 4]
  allow_items:
    - {word}
  block_items: ['{word}']
  context: {{hour: {word}, {word}: x}}
"""
    )
    fields = f"{{name: user, entity: user, missing: [{word}]}}, {{name: item, entity: item}}"
    features = f"data.features=[{fields}]"
    config = load_config(str(tmp_path / "c.yaml"), [f"run.name={word}", features])
    asked = config.recommend
    assert (asked.users, asked.allow_items, asked.block_items) == ((word, "4"), (word,), (word,))
    assert asked.context == {"hour": word, word: "x"}
    assert (config.run.name, config.data.features[0].missing) == (word, (word,))
    typed_there = load_config(
        "sample", [f"recommend.users=[{word}]", f"recommend.context.h={word}"]
    )
    assert typed_there.recommend.users == (word,)
    assert typed_there.recommend.context == {"h": word}
    assert config_from(parse_scalars(load(config.to_yaml()), Config)) == config


def test_what_is_not_text_is_what_yaml_makes_of_it() -> None:
    asked = load_config(
        "sample",
        [
            "trainer.batch_size=0100",
            "trainer.epochs=1_0",
            "trainer.monitor=null",
            "optimizer.dense.lr=1e-3",
            "model.deep=no",
            "checkpoint.use=7",
            "checkpoint.resume=never",
            "data.titles=~",
            "tune.space={model.deep: [yes, off], model.activation: [relu]}",
            "data.interactions.user=#user",
            "data.root=a: b",
        ],
    )
    trainer, checkpoint, data = asked.trainer, asked.checkpoint, asked.data
    assert (trainer.batch_size, trainer.epochs, trainer.monitor) == (100, 10, None)
    assert (asked.optimizer.dense.lr, asked.model.deep) == (0.001, False)
    assert (checkpoint.use, checkpoint.resume, data.titles) == (7, "never", None)
    assert asked.tune.space == {"model.deep": (True, False), "model.activation": ("relu",)}
    assert (data.interactions.user, data.root) == ("#user", "a: b")
    for wrong in ("1:30", "2024-01-01"):
        with pytest.raises(ConfigError, match=rf"valid integer.*\(got '{wrong}'\)"):
            load_config("sample", [f"trainer.epochs={wrong}"])


@pytest.mark.parametrize("setting", ["run.name", "data.name"])
def test_a_run_s_folder_is_below_its_root(setting: str) -> None:
    for name in ("../x", "/tmp/x", "a//b", "a/", ".", "a/../../b", "", "a\nb", "a\0"):
        with pytest.raises(
            ConfigError, match="is not the name of a folder below its root; use one"
        ):
            load_config("sample", [f"{setting}={json.dumps(name)}"])
    section, option = setting.split(".")
    for name in ("ml1m", "shop/monday", "2024-01-01", "a b", "..x"):
        config = load_config("sample", [f"{setting}={name}"])
        assert getattr(getattr(config, section), option) == name


def test_a_key_that_comes_twice_is_named_with_both_lines(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    text = (BUNDLE / "configs/sample.yaml").read_text()
    first = text.splitlines().index("data:") + 1
    path.write_text(text + "data: {seed: 3}\n")
    line = len(text.splitlines()) + 1
    with pytest.raises(
        ConfigError, match=f"c.yaml: 'data' is in line {first} and again in line {line}; merge"
    ):
        load_config(str(path))
    path.write_text("defaults: &d {lr: 1}\noptimizer: {dense: {<<: *d, lr: 2}}\n" + text)
    with pytest.raises(ConfigError, match="defaults: unknown field"):  # a merged key may be changed
        load_config(str(path))
    with pytest.raises(ConfigError, match="'k' is in line 1 and again in line 2"):
        load_config("sample", ["recommend={k: 3,\n k: 4}"])


@pytest.mark.parametrize(
    ("overrides", "monitor"),
    [
        ([], "log_loss"),
        (["trainer.monitor=auc"], "auc"),
        (["trainer.monitor=null"], None),
        (["trainer.monitor=none"], None),
        (["trainer.validate_every_epochs=0"], None),
        (["trainer.loss=softmax", "evaluate.k=[20, 5]"], "ndcg@20"),
        (["trainer={loss: bpr, candidates: 50}"], "ndcg@10"),
        (["trainer={loss: softmax, monitor: log_loss}"], "log_loss"),
    ],
)
def test_the_figure_that_decides_which_checkpoint_is_best(
    overrides: list[str], monitor: str | None
) -> None:
    assert load_config("sample", overrides).monitor == monitor


Parts = tuple[str | int, ...]
KEY = "model.x"  # of every dictionary


def settings(section: type[Section], prefix: Parts = ()) -> Iterator[Parts]:
    """Every setting's place, those of lists' and dictionaries' sections included."""
    for name, field in section.model_fields.items():
        path = (*prefix, name)
        yield path
        for inner, place in ((field.annotation, ()), *_inside(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, Section):
                yield from settings(inner, (*path, *place))


def _inside(annotation: Any) -> Iterator[tuple[Any, Parts]]:
    places: dict[Any, Parts] = {tuple: (0,), dict: (KEY,)}
    for inner in get_args(annotation):
        place = places.get(get_origin(annotation), ())
        yield inner, place
        yield from ((deeper, (*place, *below)) for deeper, below in _inside(inner))


WRONG = [
    *(None, True, -1, 2.5, 10**30, float("nan"), "x", "", "s3:x"),
    *([], [None], [[1]], [{}], {}, {"x": None}, {"x": [[]]}, {1: 2}),
]


def test_every_wrong_value_is_a_sentence_about_its_setting() -> None:
    names = [*settings(Config)]
    assert len(names) > 150
    assert {("data", "features", 0, "min_count"), ("tune", "space", KEY, "low")} <= {*names}
    base = load_config("sample").model_dump(mode="json")
    base["data"]["files"] = {KEY: {}}
    base["tune"]["space"] = {KEY: {"low": 1, "high": 2}}
    base["sharding"]["tables"] = {KEY: {}}
    jargon = re.compile(
        r"tuple|function-|literal\[|NoneType|pydantic|http|dictionary|union|Value error|instance"
        r"|\bstr\b|\bint\b|Traceback"
    )
    bad, refused = [], 0
    for name in names:
        for wrong in WRONG:
            tree = copy.deepcopy(base)
            node: Any = tree
            for parent in name[:-1]:
                if node[parent] is None:  # an optional section
                    node[parent] = {}
                node = node[parent]
            node[name[-1]] = wrong
            try:
                config_from(tree)
            except ConfigError as error:
                refused += 1
                text = str(error)
                if len(text) > 600 or jargon.search(text):
                    bad.append(f"{name}={wrong!r}: {text}")
                elif not any(part in text for part in name if isinstance(part, str)):
                    bad.append(f"{name}={wrong!r}: names no setting: {text}")
                elif text.count("\n") > 3:
                    bad.append(f"{name}={wrong!r}: several lines about one value: {text}")
            except Exception as error:
                bad.append(f"{name}={wrong!r}: {type(error).__name__}: {error}")
    assert refused > 1000
    assert bad == [], "\n".join(bad[:40])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "recommend.users={a: 1}",
            "{a: 1}: input should be text, a list or null (got {",
        ),
        ("recommend.users=[[1]]", "recommend.users.0: input should be a valid string (got [1])"),
        (
            "checkpoint.use=newest",
            "use=newest: input should be auto, latest, best, selected, refit or a whole number",
        ),
        (
            "checkpoint.use=1.5",
            "use=1.5: input should be auto, latest, best, selected, refit or a whole number",
        ),
        ("tune.space={x: 5}", "space.x: input should be a section of fields or a list (got 5)"),
        ("tune.space={x: {low: 1}}", "tune.space.x.high: field required"),
        ("tune.space={x: {low: a, high: 2}}", "space.x.low: input should be a number (got 'a')"),
        ("trainer.profile_steps=[1]", "profile_steps.1: field required"),
        ("evaluate.k=[x]", "evaluate.k.0: input should be a valid integer"),
    ],
)
def test_a_value_of_no_type_of_several_is_one_sentence(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("sample", [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_override_is_named_where_it_is_to_blame(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        load_config("sample").to_yaml().replace("embedding_dim: 16", "embedding_dim: 0")
    )
    with pytest.raises(ConfigError) as caught:
        load_config(str(path), ["recommend.k=0"])
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{path}: 2 problems"
    assert lines[1].startswith("  model.embedding_dim: ") and lines[1].endswith("(got 0)")
    assert lines[2].startswith("  recommend.k: ") and lines[2].endswith("(got 0) [recommend.k=0]")
    for overrides, cause in [
        (["recommend.k=0"], "recommend.k=0"),
        (["recommend={k: 0}"], "recommend={k: 0}"),
        (["recommend.k=0", "run.seed=2"], "recommend.k=0"),
        (["recommend.k=-1", "recommend.k=0"], "recommend.k=0"),
        (["data.nme=x"], "data.nme=x"),
        (["optimizer.dense.power=3"], "optimizer.dense.power=3"),
        (
            ["recommend.diversity=0.5", "recommend.candidates=20", "recommend.k=5"],
            "recommend.candidates=20: recommend",
        ),
        (["recommend.users=[a]", "recommend.requests=a", "recommend.k=5"], "recommend.requests=a"),
    ]:
        with pytest.raises(ConfigError) as caught:
            load_config("sample", overrides)
        assert str(caught.value).startswith(f"{cause}: ")


def test_names_of_files_in_braces_are_names() -> None:
    for text in ("{2026-11-01..2026-11-07}.csv", "{day}", "{day-1..day}.parquet"):
        assert (
            load_config("sample", [f"data.interactions.file={text}"]).data.interactions.file == text
        )
        with pytest.raises(ConfigError):  # a mapping where one is expected
            load_config("sample", [f"data.split={text}"])


def test_missing_spaces_in_yaml_are_reported() -> None:
    with pytest.raises(ConfigError, match=r"space after the colon: write genre: 5$"):
        load_config("sample", ["recommend.at_most={genre:5}"])
