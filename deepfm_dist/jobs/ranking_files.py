"""Common parts of jobs that write rankings: a loaded model and a locked target file."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deepfm_dist.build import deepfm_of
from deepfm_dist.config import Config
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.distributed.world import World
from deepfm_dist.model.deepfm import DeepFM
from deepfm_dist.ranking.items import ColdItems, cold_items_to_rank
from deepfm_dist.ranking.output import RankingFiles
from deepfm_dist.ranking.steering import ranked_by
from deepfm_dist.runs.trained import LoadedModel, open_trained, output_lock, parts_output

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rankings:
    """Written rankings.

    Attributes:
        files: paths and sizes.
        dataset: the dataset of their users and items.
    """

    files: RankingFiles
    dataset: PreparedDataset


@dataclass(frozen=True)
class RankingOutput:
    """Target of a job, and its file name without ``--output``.

    Attributes:
        default_name: file name without suffix.
        settings: dotted names of the settings that affect the file's contents.
    """

    default_name: str
    settings: tuple[str, ...]


@dataclass(frozen=True)
class RankingJob:
    """A loaded model and the target of its rankings.

    Attributes:
        world: the ranks.
        trained: the run's model.
        folder: where the results go.
        name: the name of the results, without suffix; this process holds their lock.
        in_parts: whether to write a folder of parts instead of one file.
    """

    world: World
    trained: LoadedModel
    folder: Path
    name: str
    in_parts: bool

    @property
    def model(self) -> DeepFM:
        """The DeepFM that ranks, sharded, in eval mode."""
        config, manifest = self.trained.config.recommend, self.trained.dataset.manifest
        if manifest.targets and self.world.is_first:
            weights = zip(manifest.targets, config.weights_of(manifest.targets), strict=True)
            shown = " + ".join(f"{weight:g} x {target}" for target, weight in weights)
            log.info("items are ranked by the logits of %s (recommend.targets)", shown)
        return ranked_by(deepfm_of(self.trained.sharded), manifest, config)

    @property
    def cold_items(self) -> ColdItems:
        """How to treat items without training rows.

        Raises:
            ConfigError: see `cold_items_to_rank`.
        """
        config = self.trained.config
        return cold_items_to_rank(
            config.recommend.cold_items, config.data.id_dropout, self.trained.dataset.manifest
        )

    def result(self, files: RankingFiles | None) -> Rankings | None:
        """The job's result on rank 0; None elsewhere."""
        return None if files is None else Rankings(files, self.trained.dataset)


@contextmanager
def ranking_job(
    config: Config,
    overrides: Sequence[str],
    output: RankingOutput,
    path: str | None,
    parts: str | None,
) -> Iterator[RankingJob]:
    """Loads a run's model and locks the target. All ranks.

    Args:
        config: the settings.
        overrides: overrides from the command line.
        output: the default target.
        path: the parquet file to write; None: the default, in the run's folder.
        parts: a folder or URL to write in parts instead.

    Raises:
        CheckpointError: the run has no complete checkpoint.
        ConfigError: a setting does not fit the run, or ``path`` is not a parquet file.
        InUse: another process writes the same results.
    """
    target = None if parts is None else parts_output(parts)
    with process_group(*config.run.process_group) as world:
        trained = open_trained(config, overrides, world)
        if target is None:
            target = trained.output(output.default_name, output.settings, path)
        name = target.stem if parts is None else target.name
        with world.hold_on_rank0(output_lock(target, parts is not None)):
            yield RankingJob(world, trained, target.parent, name, parts is not None)
