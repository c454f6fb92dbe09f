"""All settings: sections with defaults, read from YAML, overridden on the command line."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import ValidationError, model_validator

from deepfm_dist.bundle import BUNDLE, bundled_configs
from deepfm_dist.data.manifest import Manifest
from deepfm_dist.data.schema import DataConfig
from deepfm_dist.distributed.settings import (
    CheckpointConfig,
    OptimizerConfig,
    RunConfig,
    ShardingConfig,
)
from deepfm_dist.errors import ConfigError
from deepfm_dist.messages import nearest, short
from deepfm_dist.model.settings import ModelConfig
from deepfm_dist.ranking.settings import EvaluateConfig, RecommendConfig, SimilarConfig
from deepfm_dist.recipe import (
    Choice,
    choose,
    saved_choices,
    trains_on_users,
    with_history,
    with_rows_for_search,
)
from deepfm_dist.section import Section
from deepfm_dist.setting_errors import config_error
from deepfm_dist.storage import folder_of, is_remote, option_of, path_or_url, storage_errors_to_user
from deepfm_dist.training.settings import NightlyConfig, TrainerConfig, TuneConfig
from deepfm_dist.typed_yaml import (
    DuplicateKeyError,
    load,
    parse_override,
    parse_scalars,
    set_value,
    yaml_error,
)

NAMED = [BUNDLE / "configs"]
"""Folders searched for configurations by name, in order."""


class Config(Section):
    """All settings of a run; `resolve` chooses the ``auto`` ones from the data."""

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
    nightly: NightlyConfig = NightlyConfig()

    @model_validator(mode="before")
    @classmethod
    def _users_are_known_by_their_items(cls, tree: Any) -> Any:
        return with_history(tree) if isinstance(tree, dict) else tree

    @model_validator(mode="after")
    def _table_optimizer_can(self) -> Self:
        if self.trainer.table_precision == "fp16" and self.optimizer.tables.name == "adam":
            raise ValueError(
                "trainer.table_precision=fp16: adam on the tables would keep its moments in "
                "fp16, which is too coarse; use rowwise_adagrad"
            )
        if self.trainer.accumulate_steps > 1 and self.optimizer.tables.name != "adam":
            raise ValueError(
                f"trainer.accumulate_steps={self.trainer.accumulate_steps}: "
                f"{self.optimizer.tables.name} updates tables in the backward pass of each part; "
                f"use optimizer.tables.name=adam"
            )
        return self

    @model_validator(mode="after")
    def _sections_fit_the_data(self) -> Self:
        self.evaluate.check_data(self.data)
        for section in (self.model, self.trainer, self.recommend):
            section.check_targets(self.data.interactions.labels)
        return self

    @model_validator(mode="after")
    def _model_fits_the_loss(self) -> Self:
        setting = f"trainer.loss={self.trainer.loss}"
        if self.data.task == "ctr" and self.trainer.loss != "bce":
            raise ValueError(f"{setting}: needs positives (data.task=implicit), not labelled rows")
        if self.trainer.loss == "bce" or not self.model.deep:
            return self
        if self.model.over_arch != "mlp":
            raise ValueError(
                f"{setting}: model.over_arch={self.model.over_arch} cannot be split into a user's "
                f"and an item's part; use mlp, or model.deep=false"
            )
        if self.model.batch_norm:
            raise ValueError(f"{setting}: has no rows for batch norm; set model.batch_norm=false")
        return self

    @property
    def monitor(self) -> str | None:
        """The validation figure that selects the best checkpoint, or None."""
        if self.trainer.monitor != "auto":
            return self.trainer.monitor
        if self.trainer.validate_every_epochs == 0:
            return None
        is_ranked = trains_on_users(self.model_dump(mode="json"))
        return f"ndcg@{max(self.evaluate.k)}" if is_ranked else "log_loss"

    @property
    def prepared_dir(self) -> Path:
        """Folder of the prepared dataset; for a URL, an object with `Path`'s methods.

        Raises:
            ConfigError: a library for such URLs is not installed.
        """
        return folder_of(self.run.prepared_root) / (self.data.name or self.run.name)

    @property
    def run_dir(self) -> Path:
        """Folder of the run; for a URL, an object with `Path`'s methods.

        Raises:
            ConfigError: a library for such URLs is not installed.
        """
        return folder_of(self.run.runs_root) / self.run.name

    @property
    def output_dir(self) -> Path:
        """Local folder for the output of commands after training, even if the run is remote."""
        if is_remote(self.run_dir):
            return Path(RunConfig().runs_root) / self.run.name
        return self.run_dir

    @property
    def input_root(self) -> Path | str:
        """Folder or URL (``s3://bucket/logs``) of the input files, with variables expanded.

        Raises:
            ConfigError: a variable of ``data.root`` is not set.
        """
        text = os.path.expandvars(os.path.expanduser(self.data.root))
        if "$" in text:
            raise ConfigError(
                f"data.root={self.data.root}: the variable is not set; export it, or pass "
                f"data.root=FOLDER"
            )
        if "://" in option_of("data.root", text, path_or_url):
            return text
        bundled = BUNDLE / text
        return bundled if not Path(text).is_dir() and bundled.is_dir() else Path(text)

    @property
    def data_root(self) -> Path:
        """`input_root` as a local path."""
        return Path(self.input_root)

    @property
    def data_seed(self) -> int:
        """Seed of the prepared dataset."""
        return self.run.seed if self.data.seed is None else self.data.seed

    def with_run_name(self, name: str) -> Self:
        """The same settings with another run name."""
        return self.model_copy(update={"run": self.run.model_copy(update={"name": name})})

    def with_run_name_on_same_data(self, name: str) -> Self:
        """The same settings with another run name, on the same prepared data."""
        data = self.data.model_copy(update={"name": self.data.name or self.run.name})
        return self.with_run_name(name).model_copy(update={"data": data})

    def with_columns(self, embedding_dim: int) -> Self:
        """The same settings with another embedding dimension."""
        model = self.model.model_copy(update={"embedding_dim": embedding_dim})
        return self.model_copy(update={"model": model})

    def to_yaml(self) -> str:
        """The configuration as YAML that loads back to it."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_config(
    path: str | None = None, overrides: Sequence[str] = (), searched: bool = False
) -> Config:
    """Reads a configuration.

    Args:
        path: a YAML file or its URL, or the name of a bundled one; default: the sample.
        overrides: ``section.field=value`` each; the value is YAML, or taken verbatim if the setting
            is text.
        searched: whether the settings are those of a search; see `with_rows_for_search`.

    Raises:
        ConfigError: the file is missing or not YAML, or a field is unknown or has a bad value.
    """
    file = _find(path or "sample")
    try:
        with storage_errors_to_user(file):
            tree = load(file.read_text(encoding="utf-8")) or {}
    except DuplicateKeyError as error:
        raise ConfigError(f"{file}: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{file}: not readable as YAML: {yaml_error(error)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: expected sections (run, data, model, ...), got {short(tree)}")
    for override in overrides:
        set_value(tree, *parse_override(override, Config), repr(override))
    tree = parse_scalars(tree, Config)
    return config_from(with_rows_for_search(tree) if searched else tree, str(file), overrides)


def config_from(
    tree: Mapping[str, Any], origin: str = "config", overrides: Sequence[str] = ()
) -> Config:
    """Validates a tree of settings and fills in defaults.

    Args:
        tree: sections of settings.
        origin: its source, for messages.
        overrides: overrides contained in it, which messages name instead if they are at fault.

    Raises:
        ConfigError: names each bad field and its value, and suggests the nearest name for unknown
            ones.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise config_error(error, Config, origin, overrides) from None


def with_settings(config: Config, settings: Mapping[str, Any], origin: str = "config") -> Config:
    """A copy of the configuration with some settings changed.

    Args:
        config: the configuration.
        settings: values by dotted name.
        origin: the origin of the settings, for messages.

    Raises:
        ConfigError: one is unknown or has a bad value.
    """
    tree = config.model_dump(mode="json")
    for name, value in settings.items():
        set_value(tree, name, value, origin)
    return config_from(tree, origin)


def resolve(
    config: Config,
    manifest: Manifest,
    saved: Mapping[str, Any] | None = None,
    chosen: Sequence[Choice] = (),
) -> tuple[Config, list[Choice]]:
    """The configuration with all ``auto`` settings decided by the recipe.

    Args:
        config: not modified.
        manifest: the manifest of the prepared data.
        saved: settings of the resumed run, which take precedence over the recipe: another machine
            or version may choose differently.
        chosen: what was chosen when that run started.

    Returns:
        The configuration, and the choices with their reasons.
    """
    if saved is not None:
        config = with_settings(config, saved_choices(config, saved, chosen))
    choices = choose(config, manifest)
    decided = dict(config.auto_settings()) | {choice.setting: choice.value for choice in choices}
    return with_settings(config, decided, "chosen for this log"), choices


def _find(path: str) -> Path:
    named = [folder / name for folder in NAMED for name in (path, f"{path}.yaml")]
    for candidate in (folder_of(path), *named, BUNDLE / path):
        with storage_errors_to_user(candidate):
            if candidate.is_file():
                return candidate
    if folder_of(path).is_dir():
        raise ConfigError(
            f"--config {path}: is a folder, and not that of a run, which has a config.yaml; name "
            f"a YAML file"
        )
    names = bundled_configs()
    near = nearest(Path(path).stem, names)
    hint = f"; did you mean {near}?" if near else f"; bundled: {', '.join(names)}"
    raise ConfigError(f"--config {path}: file not found{hint}")
