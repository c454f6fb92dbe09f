"""Steps after the training loop, which produce the final checkpoints.

For a model of labelled rows that started from a logistic regression, ``runs/NAME/selected`` is the
regression plus a share of each trained part (`deepfm_dist.jobs.first_order`), and
``runs/NAME/refit`` the mean of several models of training and validation rows
(`deepfm_dist.jobs.cross_fit`).

For a model that ranks, ``runs/NAME/selected`` is the best checkpoint of the loop with EASE's
columns (`deepfm_dist.interop.linear`), whose settings are chosen on the validation rows, or by
cross-validation for small logs. ``runs/NAME/refit`` repeats this with fixed settings on training
and validation rows: the model is trained for as many epochs as the best checkpoint, and EASE is
fitted to both. Without validation rows, training items held out from the loop
(``trainer.hold_out``) replace them. Each is a run with one checkpoint.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from deepfm_dist.build import deepfm_of, training_batches
from deepfm_dist.config import Config
from deepfm_dist.data.batches.histories import HistorySampler, hold_out
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.jagged import Jagged, offsets_of
from deepfm_dist.data.manifest import Manifest
from deepfm_dist.distributed.checkpoint import (
    REFIT,
    SELECTED,
    complete_steps,
    find_checkpoint,
    load,
    read_checkpoint,
)
from deepfm_dist.distributed.sharding import DistributedModelParallel
from deepfm_dist.distributed.world import World
from deepfm_dist.environment import available_bytes
from deepfm_dist.errors import ConfigError
from deepfm_dist.interop.combine import FACTORS_BYTES, ease_tables, groups_of_items
from deepfm_dist.interop.linear import Linear, Validation, search
from deepfm_dist.jobs import first_order
from deepfm_dist.jobs.cross_fit import CrossFitting, with_all_models
from deepfm_dist.jobs.new_run import save_new_run
from deepfm_dist.jobs.widen import add_model, empty_model, put_ease, shard_to_widen
from deepfm_dist.log import MetricsLog
from deepfm_dist.messages import plural
from deepfm_dist.model.deepfm import POWERS
from deepfm_dist.ranking.baselines import USABLE, distinct
from deepfm_dist.ranking.evaluation import RankingEvaluator
from deepfm_dist.recipe import Choice, with_choice
from deepfm_dist.runs.start import read_start
from deepfm_dist.storage import folder_of
from deepfm_dist.training.state import LoopState
from deepfm_dist.training.trainer import Hooks, Trainer

log = logging.getLogger(__name__)
SEARCHED_LOGITS = 30_000_000
"""Maximum number of logits in the search: fewer users for a larger catalogue."""


FEW_POSITIVES, FEW_USERS = 20_000, 1_000
"""With fewer training positives and fewer users to validate on, the search is cross-validated, with
one training per cut. Many users of few items each say enough."""
CUTS, CUT_SHARE, CUT_SHARE_OF_LAST = 5, 0.2, 0.1
"""Number of cuts, and the share of each user's items, or of the latest, that each holds out."""


def parts_of(config: Config, manifest: Manifest) -> list[str]:
    """The parts of a finished run."""
    is_selected = config.model.linear == "ease" or first_order.is_blended(config, manifest)
    parts = [SELECTED] if is_selected else []
    return [*parts, REFIT] if config.trainer.refit_best else parts


def is_finished(config: Config, manifest: Manifest) -> bool:
    """Whether a run whose training loop is over is complete."""
    return all(complete_steps(config.run_dir / part) for part in parts_of(config, manifest))


def check(config: Config, manifest: Manifest) -> None:
    """Checks before training that these steps will be possible.

    Raises:
        ConfigError: there are no validation rows, or the closed-form part is for another model.
    """
    has_ease = config.model.linear == "ease"
    has_end = has_ease or config.trainer.refit_best
    option = "model.linear=ease" if has_ease else "trainer.refit_best=true"
    if has_end and config.trainer.loss == "bce" and not first_order.can_be_cross_fitted(config):
        has_labels = config.data.task == "ctr" and not has_ease
        raise ConfigError(
            f"{option}: with labels, for training from a logistic regression without an over-arch "
            f"of your own (model.linear=logistic, model.over_arch=mlp); leave it out"
            if has_labels
            else f"{option}: for models that are trained on users; leave it out, or use "
            f"trainer.loss=softmax"
        )
    if has_ease and (config.model.deep or not config.model.fm):
        raise ConfigError(
            "model.linear=ease: its columns need a model without a deep part; set "
            "model.deep=false and leave model.fm on"
        )
    has_validation = manifest.splits["valid"].rows > 0
    share = config.trainer.hold_out
    if share and (has_validation or config.trainer.loss == "bce"):
        why = "there are validation rows" if has_validation else "rows are held out by data.split"
        raise ConfigError(f"trainer.hold_out={share:g}: {why}; leave it out, or set 0")
    if has_end and not (has_validation or share):
        raise ConfigError(
            f"{option}: there are no validation rows to choose by; hold some out "
            f"(data.split.valid=0.1), or leave it out"
        )
    if has_ease and manifest.item_fields_of_closed_form is None:
        raise ConfigError(
            "model.linear=ease: EASE needs the items' own id and a history of items with a table "
            "of its own among data.features: {name: item, entity: item}, {name: seen, entity: "
            "user, history: item}; or set model.linear=none"
        )


@dataclass(frozen=True)
class Finish:
    """The steps after a run's training loop. All ranks call every method.

    Attributes:
        config: the settings.
        world: the ranks.
        dataset: the dataset of the run.
        state: the state of the loop, which is over.
        choices: what was chosen from the data.
        asked_to_stop: whether this process was asked to stop.
    """

    config: Config
    world: World
    dataset: PreparedDataset
    state: LoopState
    choices: Sequence[Choice]
    asked_to_stop: Callable[[], bool]

    def run(self) -> bool:
        """Makes the missing parts; False if a signal stopped it."""
        parts = parts_of(self.config, self.dataset.manifest)
        choices, linear = [*self.choices], None
        step = self.state.step if self.state.best_step is None else self.state.best_step
        if self.config.model.linear == "logistic":
            if SELECTED in parts:
                self._blend(step)
            return REFIT not in parts or self._cross_fit(step)
        if SELECTED in parts:
            model, _ = shard_to_widen(self.config, self.dataset.manifest, self.world)
            path = find_checkpoint(self.config.run_dir, step)
            load(path, self.world, model)
            found = self._search(model, step)
            if found is None:
                return False
            linear, choice = found
            choices.append(choice)
            self._say(choices[-1])
            self._save(SELECTED, model, self.dataset, linear, step, choices)
            del model
        if REFIT in parts:
            later = self.dataset.with_validation()
            model_or_none = self._train_again(later, step)
            if model_or_none is None:
                return False
            model, step, epochs = model_or_none
            is_cut = self.dataset.held_out is not None
            rows = "all training rows" if is_cut else "training and validation rows"
            reason = f"{epochs:.4g} epochs, as many as the best checkpoint took, on {rows}"
            choices.append(Choice("trainer.refit_best", True, reason))
            self._say(choices[-1])
            self._save(REFIT, model, later, linear, step, choices)
        return True

    def _blend(self, step: int) -> None:
        """Blends the best checkpoint with the fitted start, and saves the result."""
        blend = first_order.blend(self.config, self.dataset, self.world, step)
        choice = Choice("model.linear", "logistic", blend.text)
        self._say(choice)
        target = self._target(SELECTED)
        marker = self._marker(SELECTED, step, with_choice(self.choices, choice))
        if self.config.monitor == "log_loss":
            marker["trainer"]["best"] = blend.log_loss
        manifest, world = self.dataset.manifest, self.world
        save_new_run(target, manifest, world, blend.model, blend.optimizer, step=step, more=marker)

    def _cross_fit(self, step: int) -> bool:
        """Saves the mean of the models of the folds; False if a signal stopped it."""
        chosen = {choice.setting for choice in self.choices}
        fitting = CrossFitting(self.config, self.dataset, self.world, self.asked_to_stop, chosen)
        mean = fitting.mean(step)
        if mean is None:
            return False
        choice = Choice("trainer.refit_best", True, mean.text)
        self._say(choice)
        marker = self._marker(REFIT, mean.steps, with_choice(self.choices, choice))
        if self.config.monitor == "log_loss":
            marker["trainer"]["best"] = mean.log_loss
        save_new_run(
            with_all_models(self._target(REFIT)),
            self.dataset.manifest,
            self.world,
            mean.model,
            mean.optimizer,
            step=mean.steps,
            more=marker,
        )
        return True

    def _target(self, part: str) -> Config:
        """Settings of a run within this one's folder."""
        return self.config.with_run_name_on_same_data(f"{self.config.run.name}/{part}")

    def _marker(self, part: str, step: int, choices: Sequence[Choice]) -> dict[str, Any]:
        """Entries of a part's checkpoint marker that differ from those of a new run."""
        return {
            "trainer": asdict(replace(self.state, step=step, best_step=step)),
            "trained_config": self.config.model_dump(mode="json"),
            "chosen": [asdict(choice) for choice in choices],
            "part": part,
        }

    def _say(self, choice: Choice) -> None:
        if self.world.is_first:
            log.info("chosen for this log: %s", choice)

    def _search(self, model: DistributedModelParallel, step: int) -> tuple[Linear, Choice] | None:
        """Chooses EASE's settings, the same on all ranks; None if a signal stopped it.

        Args:
            model: the best checkpoint of the loop.
            step: its step.
        """
        dataset, world = self.dataset, self.world
        n_positives, cuts = dataset.manifest.splits["train"].positives, []
        measured = self._measured(dataset, model)
        is_small = n_positives < FEW_POSITIVES and len(measured[1].trained) < FEW_USERS
        if is_small and dataset.manifest.data.split.method != "users":
            for cut in self._cuts():
                again = self._train_again(cut, step, is_logged=False)
                if again is None:
                    return None
                cuts.append(self._measured(cut, again[0]))
        kind = "cross-validated" if cuts else "validation"
        if cuts and world.is_first:
            text = "%s: EASE's settings are cross-validated on %s"
            log.info(text, plural(n_positives, "training positive"), plural(len(cuts), "cut"))
        cuts = cuts or [measured]
        linear = world.broadcast(world.run_on_rank0("linear", lambda: self._fit(cuts)))
        assert linear is not None
        return linear, _choice(linear, f"{kind} NDCG@{max(self.config.evaluate.k)}")

    def _cuts(self) -> Iterator[PreparedDataset]:
        """The known rows, each time with other items of each user held out.

        With ``history.targets: later`` each cut is at an earlier time.
        """
        known = cut = self.dataset.with_validation()
        for number in range(CUTS):
            if known.manifest.data.history.targets == "later":
                cut = hold_out(cut, CUT_SHARE_OF_LAST)
            else:
                cut = hold_out(known, CUT_SHARE, number)
            if cut.held_out is not None and len(cut.held_out.values):
                yield cut

    def _measured(
        self, dataset: PreparedDataset, model: DistributedModelParallel
    ) -> tuple[Jagged, Validation]:
        """A dataset's training items, and its validation users with a model's logits. All ranks."""
        config, n_items = self.config, dataset.manifest.entities["item"]
        most = max(1, SEARCHED_LOGITS // n_items)
        evaluator = RankingEvaluator(
            dataset,
            "valid",
            config.recommend.context,
            config.evaluate.mask_seen,
            most,
            is_logged=False,  # the loop's validation has said it, and users of cuts mean nothing
        )
        model.eval()
        n_users = len(evaluator.users)
        if n_users:
            logits = evaluator.ranker(deepfm_of(model), self.world).scores(0, n_users, n_users)
        else:
            logits = np.empty((0, len(evaluator.catalogue)), np.float32)
        by_row = torch.full((len(logits), n_items), -torch.inf)
        by_row[:, torch.from_numpy(evaluator.catalogue.rows).long()] = torch.from_numpy(logits)
        lengths, items = HistorySampler(dataset).full(evaluator.users)
        fields = dataset.manifest.item_fields_of_closed_form
        assert fields is not None
        return distinct(dataset.training_history), Validation(
            bags=Jagged(offsets_of(lengths), items),
            relevant=evaluator.relevant,
            masked=evaluator.masked,
            trained=by_row,
            power=POWERS[fields[0].pooling],
            k=max(config.evaluate.k),
            ids=evaluator.users,
        )

    def _fit(self, cuts: Sequence[tuple[Jagged, Validation]]) -> Linear:
        """`search`, if memory suffices. Rank 0."""
        n_items = self.dataset.manifest.entities["item"]
        needed, room = FACTORS_BYTES * n_items**2, available_bytes()
        if needed > USABLE * room:
            log.warning(
                "model.linear=ease: EASE of %s takes %.1f GB of memory, and %.1f GB are "
                "available: the model keeps its trained part only",
                plural(n_items, "item"),
                needed / 1e9,
                room / 1e9,
            )
            return Linear(weight=0.0)
        return search(cuts, n_items, groups_of_items(self.dataset))

    def _train_again(
        self, later: PreparedDataset, best_step: int, is_logged: bool = True
    ) -> tuple[DistributedModelParallel, int, float] | None:
        """Trains a model on another dataset for as many epochs as the best checkpoint of the loop.

        Args:
            later: the dataset.
            best_step: the best step of the loop.
            is_logged: whether to log figures in the run's folder.

        Returns:
            The model, its steps and epochs; None if a signal stopped it.
        """
        loop, batches = (
            training_batches(self.config, dataset, self.world, is_logged=False)
            for dataset in (self.dataset, later)
        )
        steps = max(1, round(best_step / loop.steps_per_epoch * batches.steps_per_epoch))
        trainer_config = self.config.trainer.for_steps(steps, batches.steps_per_epoch)
        config = self._target(REFIT).model_copy(update={"trainer": trainer_config})
        model, optimizer = shard_to_widen(self.config, later.manifest, self.world)
        if config.checkpoint.start_from is not None:  # so did the loop, which shortened it
            saved = read_checkpoint(folder_of(config.checkpoint.start_from), "auto", ())
            read_start(saved, config, later, self.world, model, optimizer)
        trainer = Trainer(
            model,
            optimizer,
            batches,
            self.world,
            config,
            seed=config.run.seed,
            state=LoopState(earlier_steps=self.state.earlier_steps),
            metrics=MetricsLog(config.run_dir, self.world.is_first and is_logged, 0),
            hooks=Hooks(asked_to_stop=self.asked_to_stop),
        )
        state = trainer.fit()
        if state.step < steps:
            return None
        return model, steps, steps / batches.steps_per_epoch

    def _save(
        self,
        part: str,
        model: DistributedModelParallel,
        dataset: PreparedDataset,
        linear: Linear | None,
        step: int,
        choices: Sequence[Choice],
    ) -> None:
        """Writes the model, with EASE's columns fitted to a dataset, as a run of one checkpoint."""
        config, world, manifest = self.config, self.world, dataset.manifest
        columns = linear.columns if linear is not None and linear.weight else 0
        target = self._target(part).with_columns(config.model.embedding_dim + columns)
        wide, optimizer = empty_model(target, manifest, world)
        column = add_model(model, wide, 0, 1.0 if linear is None else linear.trained)
        if linear is not None and columns:
            fit = partial(
                ease_tables,
                dataset,
                columns,
                linear.l2,
                linear.weight,
                linear.field_weight,
                is_standardized=True,
            )
            put_ease(wide, world, column, fit)
        marker = self._marker(part, step, choices)
        if linear is not None:
            marker |= {
                "ease_l2": linear.l2_as_published,
                "is_ease_alone": not linear.trained,
                "is_ease_standardized": True,
            }
        save_new_run(target, manifest, world, wide, optimizer, step=step, more=marker)


def _choice(linear: Linear, figure: str) -> Choice:
    """The result as a choice, with the deciding figure."""
    figures = f"{figure} {linear.ndcg:.4f}, of the trained part alone {linear.ndcg_trained:.4f}"
    settings = f"L2 {linear.l2:g}, {plural(linear.columns, 'column')}"
    if not linear.trained:
        what = f"{settings}, without the trained part, which does not rank clearly better"
        return Choice("model.linear", "ease", f"{what}: {figures}")
    if not linear.weight:
        text = f"weight 0: {figures}, of EASE alone {linear.ndcg_ease:.4f}"
        return Choice("model.linear", "ease", text)
    return Choice(
        "model.linear",
        "ease",
        f"{settings}, weight {linear.weight:g}, weight of fields {linear.field_weight:g}: "
        f"{figures}, of EASE alone {linear.ndcg_ease:.4f}",
    )
