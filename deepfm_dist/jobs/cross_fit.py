"""The mean of models that were each trained without one fold of the rows, as one wider model.

A model of few labelled rows depends on which rows it saw, and few validation rows say little of how
much of it to use. So where training starts from a logistic regression, training and validation rows
are divided into folds, and for each fold a DeepFM and an FM are trained on the rows of the others,
for about as many steps as the validation rows found best. Every row is then scored by the models
that do not know it. These scores decide how much of the regression, of what the factors and the
over-arch of the DeepFMs add to it, and of what the FMs add to it is used; an FM of its own learns
pairs faster than that of a DeepFM, whose factors learn rows by heart where only the over-arch finds
what the labels depend on.
The models' mean log-odds are those of one model: its factors and hidden units are those of all, and
its over-arch has their layers on the diagonal.

Source: Breiman, "Stacked regressions", 1996, for the shares; Krogh and Vedelsby, "Neural network
ensembles, cross validation, and active learning", 1995, for the mean of the models of the folds.
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchrec.optim.keyed import CombinedOptimizer

from deepfm_dist.build import deepfm_of, training_batches
from deepfm_dist.config import Config, with_settings
from deepfm_dist.data.batches.batch import Batch
from deepfm_dist.data.batches.collation import Collator
from deepfm_dist.data.dataset import PreparedDataset, Rows
from deepfm_dist.data.jagged import Values, joined, taken
from deepfm_dist.distributed.inference import score_rows
from deepfm_dist.distributed.sharding import DistributedModelParallel, local_shards
from deepfm_dist.distributed.world import World
from deepfm_dist.interop.logistic import FOLDS, Weights, fit_folds, folds
from deepfm_dist.interop.shares import log_loss, mean_shares
from deepfm_dist.jobs.first_order import (
    SMALLEST_SHARE,
    first_order_weights,
    put_weights,
    without_output,
)
from deepfm_dist.jobs.widen import add_model, empty_model, shard_to_widen
from deepfm_dist.log import MetricsLog
from deepfm_dist.messages import plural
from deepfm_dist.model.deepfm import VECTOR_FACTORS
from deepfm_dist.model.over_arch import OverArch
from deepfm_dist.recipe import STEPS_TO_BEST, tables_of_fm
from deepfm_dist.training.evaluation import BLOCK_ROWS, collate_rows
from deepfm_dist.training.state import LoopState
from deepfm_dist.training.trainer import Hooks, Trainer

log = logging.getLogger(__name__)
Float64Array = npt.NDArray[np.float64]


def kinds_of(config: Config) -> list[Config]:
    """Settings of the kinds of models that each fold has; one with an over-arch comes first."""
    model = config.model
    if not (model.deep and model.fm):
        return [config]
    return [config, config.model_copy(update={"model": model.model_copy(update={"deep": False})})]


def with_all_models(config: Config) -> Config:
    """Settings of the wider model."""
    model = config.model
    n_columns = len(kinds_of(config)) * FOLDS * model.embedding_dim
    sizes = tuple(FOLDS * size for size in model.over_arch_layer_sizes)
    wide = {"embedding_dim": n_columns, "over_arch_layer_sizes": sizes}
    return config.model_copy(update={"model": model.model_copy(update=wide)})


@dataclass(frozen=True)
class Mean:
    """The wider model.

    Attributes:
        model: with its weights.
        optimizer: the optimizer of the model.
        steps: that each of the models was trained for.
        log_loss: of the validation rows, by models that do not know them.
        text: what was used, with figures.
    """

    model: DistributedModelParallel
    optimizer: CombinedOptimizer
    steps: int
    log_loss: float
    text: str


@dataclass(frozen=True)
class CrossFitting:
    """Trains the models of the folds. All ranks call every method.

    Attributes:
        config: the settings.
        dataset: the data.
        world: the ranks.
        asked_to_stop: whether this process was asked to.
        chosen: names of the settings that the recipe chose.
    """

    config: Config
    dataset: PreparedDataset
    world: World
    asked_to_stop: Callable[[], bool]
    chosen: Collection[str] = ()

    def mean(self, best_step: int) -> Mean | None:
        """Trains the models and puts them together; None: a signal stopped it.

        Args:
            best_step: the best step of the training loop. Each model takes as many steps, and at
                least `STEPS_TO_BEST`, but no more than the loop may: shares are chosen afterwards.
        """
        config, world, columns = self.config, self.world, self._columns()
        rows, kinds, steps = Rows.of(columns), self._kinds(), self._steps(best_step)
        fold_of = folds(rows.n)
        if world.is_first:
            models, each = plural(FOLDS * len(kinds), "model"), plural(steps, "step")
            log.info("training %s, each of %d folds in %d: %s", models, FOLDS - 1, FOLDS, each)
        fit = partial(fit_folds, self.dataset, rows, fold_of)
        starts = world.broadcast(world.run_on_rank0("logistic", fit))
        assert starts is not None
        wide, optimizer = empty_model(with_all_models(config), self.dataset.manifest, world)
        means = [[each.clone() for each in first_order_weights(wide)] for _ in [*kinds, None]]
        scores = [np.zeros((2 if kind.model.deep else 1, rows.n)) for kind in kinds]
        for fold, start in enumerate(starts.weights):
            known, others = (_taken(columns, fold_of == fold), _taken(columns, fold_of != fold))
            for kind, settings in enumerate(kinds):
                trained = self._train(settings, fold, start, others, steps)
                if trained is None:
                    return None
                model, start_weights = trained
                scores[kind][:, fold_of == fold] = self._logits(model, Rows.of(known))
                column = (kind * FOLDS + fold) * config.model.embedding_dim
                add_model(model, wide, column, 1 / FOLDS)
                _add(means[kind], first_order_weights(model))
            _add(means[-1], start_weights)
        parts = starts.constants[fold_of], starts.held_out, scores
        choose = partial(_shares, rows, self.dataset.manifest.splits["valid"].rows, *parts, config)
        result = world.broadcast(world.run_on_rank0("shares", choose))
        assert result is not None
        shares, loss, text = result
        _apply(wide, means, shares, float(starts.constants.mean()))
        text = f"mean of {FOLDS} folds' models, of {plural(rows.n, 'row')} in all: {text}"
        return Mean(wide, optimizer, steps, loss, text)

    def _kinds(self) -> list[Config]:
        """`kinds_of`; FMs next to DeepFMs have what the recipe chooses for an FM."""
        first, *others = kinds_of(self.config)
        for_fm = tables_of_fm(self.dataset.manifest)
        for_fm = {name: value for name, value in for_fm.items() if name in self.chosen}
        return [first, *(with_settings(fm, for_fm) for fm in others)]

    def _steps(self, best_step: int) -> int:
        """Of each model."""
        trainer, n_rows = self.config.trainer, self.dataset.manifest.splits["train"].rows
        last_step = trainer.last_step(-(-n_rows // trainer.batch_size))
        return min(max(best_step, STEPS_TO_BEST), last_step)

    def _columns(self) -> dict[str, Values]:
        """Of training and validation rows together."""
        names = self.dataset.row_columns("train")
        parts = [self.dataset.columns(split, names) for split in ("train", "valid")]
        return {name: joined([part[name] for part in parts]) for name in names}

    def _train(
        self, config: Config, fold: int, start: Weights, columns: Mapping[str, Values], steps: int
    ) -> tuple[DistributedModelParallel, list[Tensor]] | None:
        """A trained model and the first-order weights that it began with; None: it was stopped."""
        world = self.world
        config = with_settings(config, {"run.seed": config.run.seed + fold})
        batches = training_batches(config, self.dataset, world, columns, is_logged=False)
        trainer = config.trainer.for_steps(steps, batches.steps_per_epoch)
        config = config.model_copy(update={"trainer": trainer})
        model, optimizer = shard_to_widen(config, self.dataset.manifest, world)
        put_weights(start, model)
        start_weights = [each.clone() for each in first_order_weights(model)]
        state = Trainer(
            model,
            optimizer,
            batches,
            world,
            config,
            seed=config.run.seed,
            state=LoopState(),
            metrics=MetricsLog(config.run_dir, False),  # has the figures of the loop alone
            hooks=Hooks(asked_to_stop=self.asked_to_stop),
        ).fit()
        return (model, start_weights) if state.step == steps else None

    def _logits(self, model: DistributedModelParallel, rows: Rows) -> Float64Array:
        """``[parts, n]`` of rows, on rank 0; elsewhere 0. An over-arch is added last."""
        model.eval()
        over_arch = deepfm_of(model).interaction_arch.over_arch
        if not isinstance(over_arch, OverArch):
            return self._scores(model, rows)[None]
        with without_output(over_arch):
            others = self._scores(model, rows)
        return np.stack([others, self._scores(model, rows)])

    def _scores(self, model: DistributedModelParallel, rows: Rows) -> Float64Array:
        """``[n]`` logits of rows, on rank 0; elsewhere 0."""
        collate = Collator(self.dataset)

        def batch(begin: int, end: int) -> Batch:
            return collate_rows(collate, rows, begin, end, BLOCK_ROWS)

        blocks = score_rows(model, self.world, rows.n, BLOCK_ROWS, batch)
        logits = np.concatenate([np.zeros(0), *(logits for _, logits in blocks)])
        gathered = self.world.gather_object(logits)
        return np.zeros(rows.n) if gathered is None else np.concatenate(gathered)


def _taken(columns: Mapping[str, Values], chosen: npt.NDArray[np.bool_]) -> dict[str, Values]:
    places = np.flatnonzero(chosen)
    return {name: taken(values, places) for name, values in columns.items()}


def _add(mean: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """Adds the weights of a fold to their mean over the folds."""
    for total, part in zip(mean, weights, strict=True):
        total.add_(part, alpha=1 / FOLDS)


def _shares(
    rows: Rows,
    n_valid: int,
    constants: Float64Array,
    regression: Float64Array,
    scores: Sequence[Float64Array],
    config: Config,
) -> tuple[list[float], float, str]:
    """The share of the regression and of what the parts of each kind of model add, and a sentence.

    In between: the log loss of the validation rows.

    Args:
        rows: all rows.
        n_valid: number of validation rows, which are the last ones.
        constants: ``[B]`` log-odds, as the other arguments by what does not know the row.
        regression: ``[B]``.
        scores: ``[parts, B]`` by each kind of model, from `CrossFitting._logits`.
        config: the settings.
    """
    assert rows.labels is not None
    labels = rows.labels.astype(np.float64)
    weights = np.ones(rows.n) if rows.weights is None else rows.weights.astype(np.float64)
    additions = [regression - constants]
    for of_kind in scores:
        additions += [*np.diff(np.stack([regression, *of_kind]), axis=0)]
    shares = mean_shares(constants, additions, labels, weights)
    blended = constants + sum(s * part for s, part in zip(shares, additions, strict=True))
    trained = [_name(kind) for kind in kinds_of(config)]
    parts = [f"what {name} adds" for name in trained]
    if len(shares) > 1 + len(parts):
        parts[:1] = [f"what {trained[0]} adds without its over-arch", "its over-arch"]
    *first, last = [f"{s:.2f} of {part}" for s, part in zip(shares[1:], parts, strict=True)]
    added = f"{', '.join(first)} and {last}" if first else last
    whole = [of_kind[-1] for of_kind in scores]
    losses = [log_loss(each, labels, weights) for each in (blended, *whole, regression, constants)]
    figures = [f"{loss:.4f}" for loss in losses]
    others = [f"of {name} {figure}" for name, figure in zip(trained, figures[1:], strict=False)]
    text = (
        f"{shares[0]:.2f} of the regression, plus {added}; cross-validated log loss "
        f"{figures[0]}, {', '.join(others)}, of the regression {figures[-2]}, of a constant "
        f"{figures[-1]}"
    )
    return shares, log_loss(blended[-n_valid:], labels[-n_valid:], weights[-n_valid:]), text


def _name(config: Config) -> str:
    model = config.model
    return ("DeepFM" if model.fm else "DNN") if model.deep else ("FM" if model.fm else "LR")


@torch.no_grad()
def _apply(
    wide: DistributedModelParallel,
    means: Sequence[Sequence[Tensor]],
    shares: Sequence[float],
    constant: float,
) -> None:
    """Scales what the parts of each kind of model add to the regression, and the regression.

    Args:
        wide: the sum of the models, each times 1 / `FOLDS`.
        means: first-order weights of each kind of model and, last, of the regression: means over
            the folds.
        shares: the shares of the regression, and of what the parts of each kind of model add.
        constant: log-odds that the rest of the regression is.
    """
    arch, (of_start, *of_kinds) = deepfm_of(wide).interaction_arch, shares
    of_over_arch = of_kinds.pop(1) if isinstance(arch.over_arch, OverArch) else 0.0
    for weights, *trained, start in zip(first_order_weights(wide), *means, strict=True):
        added = [s * (each - start) for s, each in zip(of_kinds, trained, strict=True)]
        weights.copy_(of_start * start + torch.stack(added).sum(0))
    arch.bias.add_((1 - of_start) * constant)
    # A pair is a product of factors; the over-arch gets the input that it had.
    scales = torch.tensor([max(share, SMALLEST_SHARE) ** 0.5 for share in of_kinds])
    by_column = scales.repeat_interleave(arch.embedding_dim // len(scales)).to(arch.bias.device)
    for *_, shard in local_shards(wide):
        shard[:, : arch.embedding_dim] *= by_column
    for name, parameter in arch.named_parameters():
        if name.startswith(("dense_factors", VECTOR_FACTORS)):
            parameter.mul_(by_column)
    if isinstance(arch.over_arch, OverArch):
        first, output = arch.over_arch.layers[0], arch.over_arch.layers[-1]
        first.weight.div_(float(scales[0]))
        output.weight.mul_(of_over_arch)
        output.bias.mul_(of_over_arch)
