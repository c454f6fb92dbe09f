"""All settings: sections with defaults, read from YAML, overridden on the command line."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from deepfm_dist.data.schema import DataConfig
from deepfm_dist.distributed.settings import CheckpointConfig, OptimizerConfig, ShardingConfig
from deepfm_dist.errors import ConfigError
from deepfm_dist.messages import nearest, short
from deepfm_dist.model.settings import ModelConfig
from deepfm_dist.ranking.settings import EvaluateConfig, RecommendConfig, SimilarConfig
from deepfm_dist.section import Problem, Section, one_per_setting
from deepfm_dist.storage import (
    LocalPath,
    PathOrUrl,
    folder_of,
    is_remote,
    option_of,
    path_or_url,
    storage_errors_to_user,
)
from deepfm_dist.training.settings import TrainerConfig, TuneConfig
from deepfm_dist.typed_yaml import DuplicateKeyError, Plain, kind_below, kinds_of, load, typed

PACKAGE = Path(__file__).parent
BUNDLE = PACKAGE / "_bundled" if (PACKAGE / "_bundled").is_dir() else PACKAGE.parent
"""Where ``configs/`` and ``data/sample/`` lie: in the wheel, or at the root of a clone."""


class RunConfig(Section):
    """What the run is called and where it computes."""

    name: str = Field("default", min_length=1)
    """Name of the run's folder under ``runs_root``."""
    seed: int = Field(1, ge=0, lt=2**63)
    """Seed of everything drawn: splits, negatives, order, initial weights, dropout."""
    prepared_root: LocalPath = "prepared"
    """Folder of prepared datasets, on this machine."""
    runs_root: PathOrUrl = "runs"
    """Folder of runs: checkpoints, metrics, recommendations. Behind a URL (``s3://bucket/runs``) is
    what ``train`` and ``evaluate`` write; what other commands write is then in ``runs`` on this
    machine."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where torch and fbgemm both support it, else the CPU."""
    threads: int = Field(1, ge=1, le=1024)
    """CPU threads per process. More than one may change the last digits of results."""
    deterministic: bool = False
    """On CUDA: only kernels whose result is the same bit for bit every time, which a resumed run
    needs to be that; slower. The CPU's always are."""
    timeout_s: float = Field(120, gt=0)
    """Seconds after which a rank that waits for a lost or hanging one gives up."""
    loggers: tuple[str, ...] = ("tensorboard",)
    """What hears of metrics beside metrics.jsonl: tensorboard, or import paths
    ``package.module:function``; called with (event, values) on rank 0."""

    @property
    def process_group(self) -> tuple[str, float, int, bool]:
        """Device, time-out in seconds, threads and determinism: what `world` takes."""
        return self.device, self.timeout_s, self.threads, self.deterministic


class Config(Section):
    """The whole configuration of a run."""

    run: RunConfig = RunConfig()
    data: DataConfig
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    sharding: ShardingConfig = ShardingConfig()
    trainer: TrainerConfig = TrainerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    recommend: RecommendConfig = RecommendConfig()
    similar: SimilarConfig = SimilarConfig()
    tune: TuneConfig = TuneConfig()

    @model_validator(mode="after")
    def _table_optimizer_can(self) -> Self:
        if self.trainer.table_precision == "fp16" and self.optimizer.tables.name == "adam":
            raise ValueError(
                "trainer.table_precision=fp16: adam on the tables computes in their precision, "
                "which is too little for its sums; use rowwise_adagrad"
            )
        if self.trainer.loss != "bce":
            self._check_loss_of_users()
        if self.trainer.accumulate_steps > 1 and self.optimizer.tables.name != "adam":
            raise ValueError(
                f"trainer.accumulate_steps={self.trainer.accumulate_steps}: "
                f"{self.optimizer.tables.name} updates tables in the backward pass of each part; "
                f"use optimizer.tables.name=adam"
            )
        return self

    @model_validator(mode="after")
    def _labels_are_not_ranked(self) -> Self:
        if self.data.task == "ctr":
            for name, value in self.evaluate:
                if name != "split" and value != EvaluateConfig.model_fields[name].default:
                    told = self.evaluate.model_dump(mode="json")[name]
                    raise ValueError(
                        f"evaluate.{name}={told}: a setting of rankings, which are measured where "
                        f"rows are positives, not where they have labels (data.task=ctr); leave it "
                        f"out"
                    )
        return self

    def _check_loss_of_users(self) -> None:
        told = f"trainer.loss={self.trainer.loss}"
        if self.model.deep and self.model.over_arch != "mlp":
            raise ValueError(
                f"{told}: model.over_arch={self.model.over_arch} cannot be split into a user's and "
                f"an item's part; use mlp, or model.deep=false"
            )
        if self.model.deep and self.model.batch_norm:
            raise ValueError(f"{told}: has no rows for batch norm; set model.batch_norm=false")
        if self.trainer.compile:
            raise ValueError(
                f"{told}: trainer.compile is for the forward pass of rows; leave it out"
            )
        if self.trainer.accumulate_steps > 1:
            raise ValueError(f"{told}: accumulate_steps are for rows; use a smaller batch_size")

    @property
    def monitor(self) -> str | None:
        """The validation figure that decides which checkpoint is best; None: none does."""
        if self.trainer.monitor != "auto":
            return self.trainer.monitor
        if self.trainer.validate_every_epochs == 0:
            return None
        return "log_loss" if self.trainer.loss == "bce" else f"ndcg@{max(self.evaluate.k)}"

    @property
    def prepared_dir(self) -> Path:
        """Folder of the prepared dataset."""
        return Path(self.run.prepared_root) / (self.data.name or self.run.name)

    @property
    def run_dir(self) -> Path:
        """Folder of the run; one behind a URL has `Path`'s methods, too.

        Raises:
            ConfigError: a library for such URLs is not installed.
        """
        return folder_of(self.run.runs_root) / self.run.name

    @property
    def output_dir(self) -> Path:
        """Folder of what commands after training write: a local one, even if the run's is not."""
        if is_remote(self.run_dir):
            return Path(RunConfig().runs_root) / self.run.name
        return self.run_dir

    @property
    def data_root(self) -> Path:
        """Folder of the input files, variables filled in.

        Raises:
            ConfigError: a variable of ``data.root`` is not set.
        """
        path = Path(self._expanded_root())
        bundled = BUNDLE / path
        return bundled if not path.is_dir() and bundled.is_dir() else path

    @property
    def input_root(self) -> Path | str:
        """What the preparation reads from: `data_root`, or its URL (``s3://bucket/logs``)."""
        text = self._expanded_root()
        return text if "://" in text else self.data_root

    def _expanded_root(self) -> str:
        text = os.path.expandvars(os.path.expanduser(self.data.root))
        if "$" in text:
            raise ConfigError(
                f"data.root={self.data.root}: the variable is not set; export it, or pass "
                f"data.root=FOLDER"
            )
        return option_of("data.root", text, path_or_url)

    @property
    def data_seed(self) -> int:
        """Seed of the prepared dataset."""
        return self.run.seed if self.data.seed is None else self.data.seed

    def called(self, name: str) -> Self:
        """The settings of the run of a name."""
        return self.model_copy(update={"run": self.run.model_copy(update={"name": name})})

    def renamed(self, name: str) -> Self:
        """The settings of another run on the same prepared data."""
        data = self.data.model_copy(update={"name": self.data.name or self.run.name})
        return self.called(name).model_copy(update={"data": data})

    def with_columns(self, embedding_dim: int) -> Self:
        """The settings of the model with so many columns of factors."""
        model = self.model.model_copy(update={"embedding_dim": embedding_dim})
        return self.model_copy(update={"model": model})

    def to_yaml(self) -> str:
        """The resolved configuration, as YAML that loads back to it."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_config(path: str | None = None, overrides: Sequence[str] = ()) -> Config:
    """Reads a configuration.

    Args:
        path: a YAML file or its URL, or the name of a bundled one (``sample``); default: the
            sample.
        overrides: ``section.field=value`` each; the value is YAML, or text as it stands where the
            setting is text.

    Raises:
        ConfigError: the file is missing or no YAML, or a field is unknown or has a bad value.
    """
    file = _find(path or "sample")
    try:
        with storage_errors_to_user(file):
            tree = load(file.read_text(encoding="utf-8")) or {}
    except DuplicateKeyError as error:
        raise ConfigError(f"{file}: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{file}: not readable as YAML: {_one_line(error)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: expected sections (run, data, model, ...), got {tree!r}")
    for override in overrides:
        _set(tree, *parse_override(override), repr(override))
    return config_from(typed(tree, Config), str(file), overrides)


def config_from(
    tree: Mapping[str, Any], origin: str = "config", overrides: Sequence[str] = ()
) -> Config:
    """Checks a tree of settings and fills in the defaults.

    Args:
        tree: sections of settings.
        origin: where it comes from, for messages.
        overrides: those that are in it, which are named instead where they are to blame.

    Raises:
        ConfigError: names each bad field, its value, and for an unknown field the nearest one.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        found = one_per_setting(error.errors(), Config)
    causes = [_override_of(problem["loc"], overrides) for problem in found]
    problems = [_describe(problem) for problem in found]
    if len(problems) == 1:
        raise ConfigError(f"{causes[0] or origin}: {problems[0]}")
    lines = "".join(
        f"\n  {problem}" + (f" [{cause}]" if cause else "")
        for cause, problem in zip(causes, problems, strict=True)
    )
    raise ConfigError(f"{origin}: {len(problems)} problems{lines}")


def _override_of(loc: Sequence[str | int], overrides: Sequence[str]) -> str | None:
    """The last override that has set a setting, or part of it."""
    where = ".".join(map(str, loc)) + "."
    for override in reversed(overrides):
        names = [f"{name}." for name in settings_of(override)]
        if any(where.startswith(name) or name.startswith(where) for name in names if len(loc)):
            return override
    return None


def with_settings(config: Config, settings: Mapping[str, Any], origin: str = "config") -> Config:
    """The configuration with some settings changed.

    Args:
        config: stays as it is.
        settings: values by dotted name.
        origin: of the settings, for messages.

    Raises:
        ConfigError: one is unknown or has a bad value.
    """
    tree = config.model_dump(mode="json")
    for name, value in settings.items():
        _set(tree, name, value, origin)
    return config_from(tree, origin)


def settings_of(override: str) -> list[str]:
    """Names of the settings that ``section.field=value`` or ``section={field: value}`` sets."""
    name = override.partition("=")[0]
    value = None if "." in name else parse_override(override)[1]
    return [f"{name}.{field}" for field in value] if isinstance(value, dict) else [name]


def _find(path: str) -> Path:
    bundled = BUNDLE / "configs"
    for candidate in (folder_of(path), bundled / path, bundled / f"{path}.yaml", BUNDLE / path):
        with storage_errors_to_user(candidate):
            if candidate.is_file():
                return candidate
    names = sorted(p.stem for p in bundled.glob("*.yaml"))
    near = nearest(Path(path).stem, names)
    hint = f"; did you mean {near}?" if near else f"; bundled are: {', '.join(names)}"
    raise ConfigError(f"--config {path}: no such file{hint}")


def parse_override(override: str) -> tuple[str, Any]:
    """``section.field=value`` -> dotted name and value, as `typed_yaml.load` gives values.

    Raises:
        ConfigError: it is no such thing.
    """
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ConfigError(f"{override!r}: overrides look like section.field=value")
    kinds: list[Any] = [Config]
    for part in name.split("."):
        kinds = kinds_of(kind_below(kinds, part))
    if set(kinds) <= {str, type(None)} and text.strip()[:1] not in ("'", '"'):
        return name, Plain(text.strip())
    try:
        return name, load(text)
    except DuplicateKeyError as error:
        raise ConfigError(f"{override!r}: {error}") from None
    except yaml.YAMLError as error:
        if str in kinds and text[:1] not in ("[", "{", "'", '"'):
            return name, Plain(text)  # such as %d/%m/%Y, which YAML wants in quotes
        raise ConfigError(f"{override!r}: the value is not YAML: {_one_line(error)}") from None


def _set(tree: dict[str, Any], name: str, value: Any, origin: str) -> None:
    *parents, last = name.split(".")
    node = tree
    for parent in parents:
        below = node.setdefault(parent, {})
        if below is None:
            below = node[parent] = {}
        if not isinstance(below, dict):
            raise ConfigError(f"{origin}: {parent} is not a section")
        node = below
    node[last] = value


def _describe(problem: Problem) -> str:
    loc = problem["loc"]
    where = ".".join(str(part) for part in loc) or "config"
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown field; {_what_is_meant(loc, problem['input'])}"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    message = re.sub(r"\btuple\b", "list", message)  # in the words of YAML
    message = re.sub(r"valid dictionary( or instance of \w+)?$", "section of fields", message)
    if problem["type"] in ("missing", "value_error"):
        return f"{where}: {message}"
    return f"{where}: {message} (got {short(problem['input'], 200)})"


def _what_is_meant(loc: tuple[str | int, ...], value: Any) -> str:
    """A hint for an unknown field: YAML's ``{a:1}``, a misspelling, a field of another section."""
    name, fields = str(loc[-1]), _fields_at(loc[:-1])
    key, colon, text = name.partition(":")
    if colon and value is None and key in fields:
        return f"YAML needs a space after the colon: write {key}: {text}"
    if near := nearest(name, fields):
        return f"did you mean {'.'.join([*map(str, loc[:-1]), near])}?"
    elsewhere = [
        f"{section}.{name}" for section in Config.model_fields if name in _fields_at([section])
    ]
    if len(loc) == 1 and elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"available: {', '.join(fields)}"


def _fields_at(loc: Sequence[str | int]) -> list[str]:
    kind: Any = Config
    for part in loc:
        if isinstance(part, int):
            continue
        if not (isinstance(kind, type) and issubclass(kind, Section)):
            return []
        if part not in kind.model_fields:
            continue
        kind = _section_of(kind.model_fields[part].annotation)
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, Section) else []


def _section_of(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        if (found := _section_of(inner)) is not None:
            return found
    return None


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{text}; put the value in quotes" if "cannot start any token" in text else text
