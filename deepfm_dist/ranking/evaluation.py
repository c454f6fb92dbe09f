"""Evaluates rankings of the whole catalogue for users with held-out items."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.jagged import Int32Array, Int64Array, Jagged, offsets_of, union
from deepfm_dist.data.lookup import RowEncoder
from deepfm_dist.data.manifest import SPLITS
from deepfm_dist.data.sources import Column, read_table
from deepfm_dist.distributed.world import World
from deepfm_dist.environment import available_bytes
from deepfm_dist.errors import ConfigError, DataError
from deepfm_dist.messages import plural
from deepfm_dist.model.deepfm import DeepFM
from deepfm_dist.ranking.baselines import Baseline, distinct
from deepfm_dist.ranking.chunks import gather_ranked, rank_users
from deepfm_dist.ranking.items import Catalogue, ColdItems
from deepfm_dist.ranking.metrics import (
    FloatArray,
    coverage,
    hits,
    interval,
    means,
    ndcg,
    recall,
    resampled_means,
    user_metrics,
)
from deepfm_dist.ranking.profiles import Example, Groups, Insight, examples, profile
from deepfm_dist.ranking.ranker import FixedRanker, ModelRanker, Ranker, Users
from deepfm_dist.ranking.reasons import Explainer
from deepfm_dist.ranking.settings import RecommendConfig
from deepfm_dist.ranking.steering import (
    RerankingRanker,
    is_steered,
    popularity_penalties,
    with_reranking,
)

log = logging.getLogger(__name__)
STEERED = "model, steered"
"""Name of the model's ranking with popularity penalty, diversity and limits of `recommend`."""
REASONS_SHOWN = 3
"""Number of reasons for each item of an example."""
RANKING_FIGURES = ("recall", "ndcg")
"""Ranking figures reported by validation during training."""
LOGGED = ("figures", "intervals", "differences")
"""Figures of a comparison that a run's metrics keep."""


@dataclass(frozen=True)
class Comparison:
    """Figures of several rankings for the same users.

    Attributes:
        figures: by ranking, `means` of `user_metrics`, and `coverage`.
        intervals: by ranking, the 95 % bootstrap interval of each mean over users.
        differences: by ranking other than the model's, the same interval of the model's mean minus
            this ranking's, paired by user.
        insight: details behind the figures.
    """

    figures: dict[str, dict[str, float]]
    intervals: dict[str, dict[str, tuple[float, float]]]
    differences: dict[str, dict[str, tuple[float, float]]]
    insight: Insight


class RankingEvaluator:
    """Measures rankings of the whole catalogue on held-out items.

    Users are those with training rows and a held-out positive. Items of earlier splits, liked or
    not, are masked: those of train, and for the test split also of valid. A held-out item that
    appears there is not relevant.

    Args:
        dataset: the prepared dataset.
        split: valid or test.
        context: values of the model's context fields.
        mask_seen: whether items of earlier splits are masked; default: true unless repeated rows
            are kept (`DataConfig.seen_is_masked`).
        most_users: size of an evenly spaced sample of the users; None: all.
        cold_items: how to treat items without training rows. Held-out items that are not ranked
            count as missed, except with "only", which measures cold items alone.
        is_logged: whether to say how many users and held-out items are left out.

    Raises:
        ConfigError: a context field has no value or an unknown one.
        DataError: only items without training rows are ranked, and none is held out.
    """

    def __init__(
        self,
        dataset: PreparedDataset,
        split: str,
        context: Mapping[str, str | float],
        mask_seen: bool | None = None,
        most_users: int | None = None,
        cold_items: ColdItems = "exclude",
        is_logged: bool = True,
    ) -> None:
        self._context = RowEncoder(dataset).fixed_context(context)
        if mask_seen is None:
            mask_seen = dataset.manifest.data.seen_is_masked
        before = [bags for s in SPLITS[: SPLITS.index(split)] for bags in dataset.met(s)]
        before = before if mask_seen else []
        positives = dataset.positives(split)
        if cold_items == "only":
            positives = _part(positives, positives.values >= dataset.manifest.entities["item"])
        relevant_of_all, n_seen = _relevant(positives, before)
        if n_seen and is_logged:
            log.info(
                "%s seen in earlier splits: masked, not counted as relevant",
                plural(n_seen, "held-out item"),
            )
        users = np.flatnonzero(relevant_of_all.lengths > 0).astype(np.int32)
        self.users = users[users > 0]
        if cold_items == "only" and len(self.users) == 0:
            raise DataError(
                f"recommend.cold_items=only: no item of the {split} split's rows is without "
                f"training rows; hold out by time (data.split.method=temporal) in a run of another "
                f"run.name, or leave recommend.cold_items out"
            )
        left_out = len(relevant_of_all) - 1 - len(self.users)
        if left_out and is_logged:
            log.info("%s without held-out items: not ranked", plural(left_out, "user"))
        if (n_unknown := int(relevant_of_all.lengths[0])) and is_logged:
            log.info(
                "%s of unknown users: not ranked",
                plural(n_unknown, "held-out item"),
            )
        if most_users is not None and len(self.users) > most_users:
            self.users = self.users[np.linspace(0, len(self.users) - 1, most_users).astype(int)]
        self.dataset, self.catalogue = dataset, Catalogue(dataset, cold_items=cold_items)
        self._before = before
        self._seen = self.catalogue.seen_by(self.users, before)
        self.relevant = Jagged.from_pairs(
            np.repeat(np.arange(len(self.users)), relevant_of_all.lengths[self.users]),
            relevant_of_all.take(self.users)[1],
            len(self.users),
        )
        self.counts = np.pad(dataset.popularity(), (0, dataset.manifest.cold.get("item", 0)))
        self.is_divided = cold_items == "include" and "item" in dataset.manifest.cold
        """Whether the ranked items are a mix of items with and without training rows."""
        self._n_active = int((dataset.training_history.lengths > 0).sum())
        self._strong = dataset.manifest.data.split.method == "users"

    @property
    def masked(self) -> Jagged:
        """``[U]`` each user's masked item rows."""
        taken = [lists.take(self.users) for lists in self._before]
        none = Jagged.empty(len(self.users))
        return union([none, *(Jagged(offsets_of(n), items) for n, items in taken)])

    def measure(
        self, ranker: Ranker, cutoffs: Sequence[int], world: World
    ) -> tuple[dict[str, float], dict[str, FloatArray], Int64Array] | None:
        """Measures a ranking. All ranks.

        Returns:
            On rank 0 the figures, `user_metrics` and what was ranked, ``[U, K]`` item rows; None
            elsewhere.
        """
        figures: dict[str, float] = {}
        by_metric: dict[str, FloatArray] = {}
        ranked = None
        for some in _cutoffs_at_once(ranker, cutoffs):
            measured = self._ranked(ranker, some, world)
            if measured is not None:
                metrics, ranked = measured
                by_metric |= metrics
                figures |= means(metrics) | coverage(ranked, some, len(self.catalogue))
        return None if ranked is None else (figures, by_metric, ranked)

    def _ranked(
        self, ranker: Ranker, cutoffs: Sequence[int], world: World
    ) -> tuple[dict[str, FloatArray], Int64Array] | None:
        """`user_metrics` and the items of one ranking, on rank 0; None elsewhere. All ranks."""
        k = max(cutoffs)
        positions = gather_ranked(
            rank_users(ranker, len(self.users), self._seen, k, world), k, world
        )
        if positions is None:
            return None
        ranked = np.where(positions >= 0, self.catalogue.rows[positions], -1)
        figures = user_metrics(
            ranked, self.relevant, cutoffs, self.counts, self._n_active, self._strong
        )
        if self.is_divided:
            figures |= self._figures_apart(ranked, cutoffs)
        return figures, ranked

    def _figures_apart(self, ranked: Int64Array, cutoffs: Sequence[int]) -> dict[str, FloatArray]:
        """Recall and NDCG of relevant items with and without training rows.

        The ranking is that of all items; ``[U]`` each, NaN for users without such an item.
        """
        items, first_cold = self.relevant.values, self.catalogue.first_cold
        parts = {"warm": (items > 0) & (items < first_cold), "cold": items >= first_cold}
        figures = {}
        for name, is_of_part in parts.items():
            relevant = _part(self.relevant, is_of_part)
            n, hit = np.maximum(relevant.lengths, 1), hits(ranked, relevant)
            for k in cutoffs:
                for metric, measure in (("recall", recall), ("ndcg", ndcg)):
                    values = np.where(relevant.lengths > 0, measure(hit, n, k), np.nan)
                    figures[f"{metric}_{name}@{k}"] = values
        return figures

    def ranker(
        self, model: DeepFM, world: World, penalties: npt.NDArray[np.float32] | None = None
    ) -> ModelRanker:
        """A ranker for the users by a model in eval mode. All ranks.

        Args:
            model: the DeepFM, sharded, in eval mode.
            world: the ranks.
            penalties: by item row, subtracted from scores; None: nothing.
        """
        return ModelRanker.from_model(
            model,
            world,
            self.dataset,
            self.catalogue,
            Users(self.users),
            self._context,
            penalties=penalties,
        )

    def steered_ranker(self, model: DeepFM, world: World, config: RecommendConfig) -> Ranker:
        """`ranker`, steered by the settings of `recommend`. All ranks."""
        penalties = popularity_penalties(self.dataset, config.popularity_penalty)
        ranker = self.ranker(model, world, penalties)
        return with_reranking(ranker, ranker, self.dataset, self.catalogue, config)

    def metrics(self, model: DeepFM, world: World, cutoffs: Sequence[int]) -> dict[str, float]:
        """`RANKING_FIGURES` of a model in eval mode, on rank 0; empty elsewhere. All ranks."""
        measured = self.measure(self.ranker(model, world), cutoffs, world)
        if measured is None:
            return {}
        return {
            name: value
            for name, value in measured[0].items()
            if name.partition("@")[0] in RANKING_FIGURES
        }


def _part(lists: Jagged, is_of_part: npt.NDArray[np.bool_]) -> Jagged:
    """Selects values of each list; ``is_of_part``: ``[values]`` bool."""
    owners = np.repeat(np.arange(len(lists)), lists.lengths)
    return Jagged.from_pairs(owners[is_of_part], lists.values[is_of_part], len(lists))


def _relevant(positives: Jagged, before: Sequence[Jagged]) -> tuple[Jagged, int]:
    """Each user's distinct positives that are not in earlier splits, and how many are dropped.

    Args:
        positives: item rows of all users, those of unknown users in row 0.
        before: users' items of earlier splits.
    """
    n_items = 1 + max((int(bags.values.max(initial=0)) for bags in (positives, *before)), default=0)
    rows = np.repeat(np.arange(len(positives)), positives.lengths)
    pairs = rows * n_items + positives.values
    # Items without a row are all 0, so duplicates among them cannot be detected.
    repeated = np.ones(len(pairs), bool)
    repeated[np.unique(pairs, return_index=True)[1]] = False
    repeated &= (positives.values > 0) & (rows > 0)
    seen = np.zeros(len(pairs), bool)
    active = np.flatnonzero(positives.lengths)
    for bags in before:
        lengths, items = bags.take(active)
        seen |= np.isin(pairs, np.repeat(active, lengths) * n_items + items)
    seen &= (positives.values > 0) & (rows > 0)
    kept = np.flatnonzero(~(repeated | seen))
    return Jagged.from_pairs(rows[kept], positives.values[kept], len(positives)), int(seen.sum())


def evaluate_ranking(
    model: DeepFM,
    world: World,
    held_out: RankingEvaluator,
    cutoffs: Sequence[int],
    baselines: Mapping[str, Baseline],
    reference: str | None = None,
    steering: RecommendConfig | None = None,
) -> Comparison | None:
    """Compares the model's ranking with other rankings for the same users. All ranks.

    Args:
        model: the DeepFM, sharded, in eval mode.
        world: the ranks.
        held_out: users and items to measure on.
        cutoffs: values of K.
        baselines: the baselines, by name; fitted here on the training positives.
        reference: path or URL of a parquet file ``user, item, score`` with another system's scores.
        steering: settings of an additional ranking by the model, `STEERED`, if they change it.

    Returns:
        On rank 0 the rankings' figures, the model's first; None elsewhere.

    Raises:
        ConfigError: a baseline cannot be fitted on this many items, or the reference has the name
            of another ranking.
        DataError: the reference cannot be read, or repeats a pair of user and item.
    """
    rankers = _rankers(model, world, held_out, baselines, reference)
    if steering is not None and is_steered(steering):
        rankers[STEERED] = lambda: held_out.steered_ranker(model, world, steering)
    history = held_out.dataset.history
    activity = Groups.by_quantile(history.lengths[held_out.users])
    popularity = Groups.by_quantile(held_out.counts[held_out.relevant.values])
    figures, samples, profiles, shown = {}, {}, {}, []
    for name, make in rankers.items():
        ranker = make()
        measured = held_out.measure(ranker, cutoffs, world)
        if measured is not None:
            figures[name], by_metric, ranked = measured
            samples[name] = resampled_means(by_metric)
            profiles[name] = profile(ranked, held_out.relevant, activity, popularity)
            if name == "model":
                shown = examples(held_out.users, ranked, history, held_out.relevant)
        if name == "model" and isinstance(ranker, ModelRanker):
            shown = _with_reasons(shown, ranker, held_out, world)
    if not world.is_first:
        return None
    insight = Insight(
        profiles,
        len(held_out.users),
        activity.bounds,
        len(held_out.relevant.values),
        popularity.bounds,
        shown,
    )
    return Comparison(figures, _intervals(samples), _differences(samples), insight)


def _cutoffs_at_once(ranker: Ranker, cutoffs: Sequence[int]) -> list[list[int]]:
    """Groups of cut-offs that one ranking can serve.

    A K larger than the number of items that a reranking starts from changes its choices, so that
    ranking does not begin with the one for a smaller K.
    """
    first = ranker.reranking.first if isinstance(ranker, RerankingRanker) else max(cutoffs)
    within = [k for k in cutoffs if k <= first]
    beyond = [[k] for k in sorted(cutoffs) if k > first]
    return [within, *beyond] if within else beyond


def _rankers(
    model: DeepFM,
    world: World,
    held_out: RankingEvaluator,
    baselines: Mapping[str, Baseline],
    reference: str | None,
) -> dict[str, Callable[[], Ranker]]:
    """Functions that make the rankings to compare, by name; arguments as for `evaluate_ranking`."""
    rankers: dict[str, Callable[[], Ranker]] = {"model": lambda: held_out.ranker(model, world)}
    rankers |= _baseline_rankers(held_out, baselines, world)
    if reference is not None:
        name = Path(reference).stem
        if name in rankers:
            raise ConfigError(
                f"evaluate.reference={reference}: another ranking of the table is called {name}; "
                f"give the file another name"
            )
        rankers[name] = _reference_ranker(reference, held_out, world)
    return rankers


def _with_reasons(
    shown: list[Example], ranker: ModelRanker, held_out: RankingEvaluator, world: World
) -> list[Example]:
    """Examples of rank 0 with reasons for each item. All ranks."""
    shown = world.broadcast(shown)
    places = np.searchsorted(held_out.users, [example.user for example in shown])
    items = Jagged.from_pairs(
        np.repeat(np.arange(len(shown)), [len(example.ranked) for example in shown]),
        [item for example in shown for item in example.ranked],
        len(shown),
    )
    batches = ranker.user_batches(places.astype(np.int32))
    explained = Explainer(ranker, held_out.dataset).explain(batches, items, REASONS_SHOWN)
    reasons = [explanation.reasons for explanation in explained]
    return [
        replace(example, reasons=reasons[begin:end])
        for example, (begin, end) in zip(shown, pairwise(items.offsets.tolist()), strict=True)
    ]


def _intervals(
    samples: Mapping[str, Mapping[str, FloatArray]],
) -> dict[str, dict[str, tuple[float, float]]]:
    """95 % intervals of the resampled means, by ranking and metric."""
    return {name: {m: interval(v) for m, v in of.items()} for name, of in samples.items()}


def _differences(
    samples: Mapping[str, Mapping[str, FloatArray]],
) -> dict[str, dict[str, tuple[float, float]]]:
    """95 % intervals of the model's mean minus another ranking's, for the same users."""
    model = samples["model"]
    return _intervals(
        {
            name: {metric: model[metric] - sample for metric, sample in of.items()}
            for name, of in samples.items()
            if name != "model"
        }
    )


def _reference_ranker(
    reference: str, held_out: RankingEvaluator, world: World
) -> Callable[[], Ranker]:
    """Another system's scores, read first so that errors show before long rankings."""
    scores = _reference_scores(reference, held_out.dataset, held_out.catalogue, held_out.users)
    n_items = len(held_out.catalogue)
    return lambda: FixedRanker(lambda begin, end: scores(begin, end).to(world.device), n_items)


@dataclass(frozen=True)
class RankedUsers:
    """The users that a baseline ranks for.

    Attributes:
        history: each user's items, as positions in the catalogue.
        rows: ``[n]`` rows of ``history``.
    """

    history: Jagged
    rows: Int32Array


def _baseline_rankers(
    held_out: RankingEvaluator, baselines: Mapping[str, Baseline], world: World
) -> dict[str, Callable[[], Ranker]]:
    """Functions that fit a baseline on the training positives, by name. All ranks."""
    if not baselines:
        return {}
    dataset, catalogue = held_out.dataset, held_out.catalogue

    def places(items: Jagged) -> Jagged:
        return catalogue.seen_by(np.arange(len(items), dtype=np.int32), [items])(0, len(items))

    # Users below min_count come last: they are not ranked for, but their rows are training rows.
    positives = [places(dataset.training_history), places(dataset.rare_history)]
    train = distinct(Jagged.concatenated(positives))
    known = train
    if dataset.manifest.data.split.method == "users":
        if "ials" in baselines:
            raise ConfigError(
                "evaluate.baselines: ials has vectors of the users it is fitted on, and "
                "data.split.method=users ranks for others; leave ials out"
            )
        known = distinct(places(dataset.history))
    room_bytes = world.broadcast(available_bytes()) // world.local_world_size
    rankers: dict[str, Callable[[], Ranker]] = {}
    for name, baseline in baselines.items():
        sized, difference = baseline.fit_to_memory(len(catalogue), room_bytes)
        name += difference
        users = RankedUsers(known, held_out.users)
        rankers[name] = partial(
            _fit_on_rank0, name, sized, train, n_items=len(catalogue), users=users, world=world
        )
    return rankers


def _fit_on_rank0(
    name: str,
    baseline: Baseline,
    train: Jagged,
    n_items: int,
    users: RankedUsers,
    world: World,
) -> FixedRanker:
    """Fits on rank 0, so that all ranks use the same numbers."""
    log.info("%s: fitting on %s", name, plural(len(train.values), "positive"))
    fitted = world.broadcast(
        world.run_on_rank0(f"fit_{name}", lambda: baseline.fit(train, n_items))
    )
    assert fitted is not None

    def scores(begin: int, end: int) -> Tensor:
        return fitted(users.history, users.rows[begin:end]).to(world.device)

    return FixedRanker(scores, n_items)


def _reference_scores(
    path: str, dataset: PreparedDataset, catalogue: Catalogue, users: Int32Array
) -> Callable[[int, int], Tensor]:
    """Maps (first user, last + 1) to ``[n, I]`` scores of another system; -inf if missing."""
    table = read_table(path, [Column("user"), Column("item"), Column("score", "number")])
    user_ids = dataset.entity_ids("user").take(pa.array(users))
    rows = np.asarray(pc.index_in(table["user"], value_set=user_ids).fill_null(-1))
    places = np.asarray(pc.index_in(table["item"], value_set=catalogue.ids).fill_null(-1))
    known = np.flatnonzero((rows >= 0) & (places >= 0))
    if len(known) == 0:
        raise DataError(f"{path}: none of its users and items are in the dataset")
    pairs = rows[known].astype(np.int64) * len(catalogue) + places[known]
    _, first, times = np.unique(pairs, return_index=True, return_counts=True)
    if len(first) < len(pairs):
        row = table.slice(int(known[first[times.argmax()]]), 1).to_pylist()[0]
        raise DataError(
            f"{path}: user {row['user']!r} and item {row['item']!r} have {times.max()} scores; "
            f"leave one of them"
        )
    n_scored = len(np.unique(rows[known]))
    log.info("%s: scores for %s of %s", path, f"{n_scored:,}", plural(len(users), "user"))
    if n_scored < len(users):
        log.warning(
            "%s: no recommendations for %s, counted as misses",
            path,
            plural(len(users) - n_scored, "user"),
        )
    by_row = known[np.argsort(rows[known], kind="stable")]
    offsets = np.searchsorted(rows[by_row], np.arange(len(users) + 1))
    values = np.asarray(table["score"])[by_row].astype(np.float32)
    rows, places = rows[by_row], places[by_row]

    def scores(begin: int, end: int) -> Tensor:
        block = slice(offsets[begin], offsets[end])
        dense = np.full((end - begin, len(catalogue)), -np.inf, np.float32)
        dense[rows[block] - begin, places[block]] = values[block]
        return torch.from_numpy(dense)

    return scores
