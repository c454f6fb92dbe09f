"""What the jobs that write rankings share: a loaded model, and one writer per target file."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deepfm_dist.build import deepfm_of
from deepfm_dist.config import Config
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.distributed.world import World
from deepfm_dist.lock import Lock
from deepfm_dist.model.deepfm import DeepFM
from deepfm_dist.ranking.output import RankingFiles
from deepfm_dist.runs.trained import LoadedModel, open_trained


@dataclass(frozen=True)
class Rankings:
    """Rankings that were written.

    Attributes:
        files: where they are, and their size.
        dataset: whose users and items they are of.
    """

    files: RankingFiles
    dataset: PreparedDataset


@dataclass(frozen=True)
class RankingOutput:
    """Where a job writes, and how the file is called without ``--output``.

    Attributes:
        section: of the command's settings.
        default_name: of the file, without its ending.
        settings: those of the section that decide what the file contains; the others decide how it
            is made.
    """

    section: str
    default_name: str
    settings: tuple[str, ...]


@dataclass(frozen=True)
class RankingJob:
    """A loaded model whose rankings are about to be written.

    Attributes:
        world: the ranks.
        trained: the run's model.
        target: the parquet file to write; this process holds its lock.
    """

    world: World
    trained: LoadedModel
    target: Path

    @property
    def model(self) -> DeepFM:
        """The DeepFM, sharded, in eval mode."""
        return deepfm_of(self.trained.sharded)

    def result(self, files: RankingFiles | None) -> Rankings | None:
        """The job's result: on rank 0 what was written; None elsewhere."""
        return None if files is None else Rankings(files, self.trained.dataset)


@contextmanager
def ranking_job(
    config: Config, overrides: Sequence[str], output: RankingOutput, path: str | None
) -> Iterator[RankingJob]:
    """Loads a run's model and locks the target file meanwhile. All ranks.

    Args:
        config: the settings.
        overrides: of the command line.
        output: the default target.
        path: the parquet file to write; None: the default, in the run's folder.

    Raises:
        CheckpointError: the run has no complete checkpoint.
        ConfigError: a setting does not fit the run, or ``path`` is not a parquet file.
        InUse: another process writes the same file.
    """
    with process_group(*config.run.process_group) as world:
        trained = open_trained(config, overrides, world)
        target = trained.output(output.section, output.default_name, output.settings, path)
        with world.hold_on_rank0(Lock(target, str(target), "choose another --output")):
            yield RankingJob(world, trained, target)
