"""Adjusts rankings: popularity penalty, diversity, and limits per attribute value."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from deepfm_dist.compiled import compiled
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.jagged import FloatArray, Int32Array, Int64Array, Jagged
from deepfm_dist.data.manifest import Manifest
from deepfm_dist.errors import ConfigError
from deepfm_dist.messages import nearest
from deepfm_dist.model.deepfm import DeepFM
from deepfm_dist.ranking.items import Catalogue, attribute_pairs, item_attributes
from deepfm_dist.ranking.ranker import ModelRanker, Ranker
from deepfm_dist.ranking.settings import RecommendConfig
from deepfm_dist.ranking.similarity import unit_length


def ranked_by(model: DeepFM, manifest: Manifest, config: RecommendConfig) -> DeepFM:
    """The model to rank by: with several targets, their logits' weighted sum."""
    if not manifest.targets:
        return model
    return model.weighted_sum(config.weights_of(manifest.targets))


def popularity_penalties(dataset: PreparedDataset, weight: float) -> FloatArray | None:
    """``[items]`` float32, subtracted from scores: ``weight * log(training positives + 1)``.

    None if the weight is 0. The penalty is part of the item side, so the ranking by penalised
    scores is exact. Items without training rows get no penalty.
    """
    if not weight:
        return None
    counts = np.pad(dataset.popularity(), (0, dataset.manifest.cold.get("item", 0)))
    penalties: FloatArray = (weight * np.log1p(counts)).astype(np.float32)
    return penalties


@dataclass(frozen=True)
class Limits:
    """Limits on the number of items with the same attribute value in a ranking.

    Attributes:
        values: numbers of each position's values; the fields' numbers do not overlap.
        most: ``[values]`` int64: maximum number of items per value.
    """

    values: Jagged
    most: Int64Array

    @classmethod
    def from_settings(
        cls, dataset: PreparedDataset, catalogue: Catalogue, at_most: Mapping[str, int]
    ) -> "Limits":
        """Makes limits from settings by item field.

        Raises:
            ConfigError: a name is not an item field with a vocabulary.
        """
        fields = item_attributes(dataset.manifest)
        owners, values = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        most: list[int] = []
        for name, limit in at_most.items():
            if name not in fields:
                near = nearest(name, fields)
                known = f"available: {', '.join(fields)}" if fields else "this model has none"
                hint = f"did you mean {near}?" if near else known
                raise ConfigError(f"recommend.at_most.{name}: unknown item field; {hint}")
            pairs = attribute_pairs(dataset, catalogue, name).astype(np.int64)
            pairs = pairs[pairs[:, 0] > 0]
            values.append(pairs[:, 0] + len(most))
            owners.append(pairs[:, 1])
            most += [limit] * dataset.vocabulary(fields[name].table_name).rows
        joined = Jagged.from_pairs(np.concatenate(owners), np.concatenate(values), len(catalogue))
        return cls(joined, np.array(most, np.int64))


@dataclass(frozen=True)
class Reranking:
    """Reranks the first N items of a ranking.

    Items are chosen one after the other: the one with the highest
    ``(1 - diversity) * relevance - diversity * (largest cosine with a chosen item)`` among those
    that no limit excludes. Relevance is the score, scaled to [0, 1] over the user's first N; the
    cosine is that of the items' summed factors.

    Source: Carbonell, Goldstein, "The Use of MMR, Diversity-Based Reranking for Reordering
    Documents and Producing Summaries", 1998.

    Attributes:
        vectors: ``[I, D]`` float32 of unit length, by position.
        diversity: weight of the cosines, in [0, 1].
        limits: the limits of some values.
        first: N.
    """

    vectors: FloatArray
    diversity: float
    limits: Limits
    first: int

    @classmethod
    def from_settings(
        cls,
        ranker: ModelRanker,
        dataset: PreparedDataset,
        catalogue: Catalogue,
        config: RecommendConfig,
    ) -> Self | None:
        """Reads diversity and limits from the settings; None if neither is set. All ranks.

        Raises:
            ConfigError: a limit is for an unknown field, or the model has no vectors to compare.
        """
        if not config.diversity and not config.at_most:
            return None
        limits = Limits.from_settings(dataset, catalogue, config.at_most)
        vectors = np.zeros((len(catalogue), 0), np.float32)
        if config.diversity:
            if ranker.encoder.model.interaction_arch.fm is None:
                raise ConfigError(
                    f"recommend.diversity={config.diversity:g}: compares the vectors of the "
                    f"pairwise part, which this model does not have (model.fm=false); use "
                    f"recommend.at_most"
                )
            vectors = unit_length(ranker.encoder.world.to_host(ranker.item_vectors())).numpy()
        return cls(vectors, config.diversity, limits, config.rerank)

    def choose(
        self, positions: Int64Array, scores: FloatArray, firsts: Int64Array, k: int
    ) -> tuple[Int64Array, FloatArray]:
        """``[users, K]`` positions and scores, the latter not sorted.

        Args:
            positions: ``[users, N]`` of the other ranking.
            scores: ``[users, N]`` float32, descending.
            firsts: ``[users]`` number of these to choose from.
            k: K.
        """
        chosen = np.full((len(positions), k), -1, np.int64)
        chosen_scores = np.full((len(positions), k), -np.inf, np.float32)
        _rerank(
            positions,
            scores,
            firsts,
            self.vectors,
            self.diversity,
            self.limits.values.offsets,
            self.limits.values.values,
            self.limits.most,
            chosen,
            chosen_scores,
        )
        return chosen, chosen_scores


@dataclass(frozen=True)
class RerankingRanker:
    """Reranks the first items of another ranker's results. All ranks. A `Ranker`.

    Attributes:
        ranker: provides the first ranking.
        reranking: chooses from it.
        wanted: ``[users]`` requested number of items, the minimum to choose from; None: k for all.
    """

    ranker: Ranker
    reranking: Reranking
    wanted: Int32Array | None = None

    def __len__(self) -> int:
        """Number of items."""
        return len(self.ranker)

    def prepare(self, chunks: Sequence[tuple[int, int]], height: int) -> Sequence[Any]:
        """Looks the users of several chunks up together; see `Ranker`."""
        prepared = self.ranker.prepare(chunks, height)
        if self.wanted is None:
            return prepared
        wanted = [self.wanted[begin:end] for begin, end in chunks]
        return list(zip(wanted, prepared, strict=True))

    def best(self, users: Any, seen: Jagged, k: int) -> tuple[Int64Array, npt.NDArray[np.float32]]:
        """Ranks a chunk of users; see `Ranker`. Scores are not sorted."""
        wanted, users = (k, users) if self.wanted is None else users
        first = self.reranking.first
        positions, scores = self.ranker.best(users, seen, max(k, first))
        firsts = np.broadcast_to(np.maximum(wanted, first), len(positions)).astype(np.int64)
        return self.reranking.choose(positions, scores, firsts, k)


def is_steered(config: RecommendConfig) -> bool:
    """Whether settings change the ranking by the model's scores."""
    return bool(config.popularity_penalty or config.diversity or config.at_most)


def with_reranking(
    ranker: Ranker,
    model_ranker: ModelRanker,
    dataset: PreparedDataset,
    catalogue: Catalogue,
    config: RecommendConfig,
    wanted: Int32Array | None = None,
) -> Ranker:
    """The ranker with the settings' `Reranking`, or unchanged without one. All ranks.

    ``wanted`` is as in `RerankingRanker`.
    """
    reranking = Reranking.from_settings(model_ranker, dataset, catalogue, config)
    return ranker if reranking is None else RerankingRanker(ranker, reranking, wanted)


@compiled
def _rerank(
    positions: Int64Array,
    scores: FloatArray,
    firsts: Int64Array,
    vectors: FloatArray,
    diversity: float,
    value_offsets: Int64Array,
    values: Int32Array,
    most: Int64Array,
    chosen: Int64Array,
    chosen_scores: FloatArray,
) -> None:
    """Fills ``[users, K]`` from ``[users, N]``; see `Reranking`."""
    n_users, n = positions.shape
    counts = np.zeros(len(most), np.int64)
    cosine = np.empty(n)
    is_left = np.empty(n, np.bool_)
    for user in range(n_users):
        counts[:] = 0
        n_items = 0
        while n_items < min(n, firsts[user]) and positions[user, n_items] >= 0:
            is_left[n_items] = True
            cosine[n_items] = -1.0
            n_items += 1
        if n_items == 0:
            continue
        low = scores[user, n_items - 1]
        span = max(scores[user, 0] - low, np.float32(1e-30))
        for rank in range(chosen.shape[1]):
            best, best_value = -1, -np.inf
            for at in range(n_items):
                value = (1 - diversity) * ((scores[user, at] - low) / span)
                if rank > 0:
                    value -= diversity * cosine[at]
                if not is_left[at] or value <= best_value:
                    continue
                item, allowed = positions[user, at], True
                for place in range(value_offsets[item], value_offsets[item + 1]):
                    allowed = allowed and counts[values[place]] < most[values[place]]
                if allowed:
                    best, best_value = at, value
            if best < 0:
                break
            item = positions[user, best]
            is_left[best] = False
            chosen[user, rank], chosen_scores[user, rank] = item, scores[user, best]
            for place in range(value_offsets[item], value_offsets[item + 1]):
                counts[values[place]] += 1
            if diversity > 0:
                for at in range(n_items):
                    other, product = positions[user, at], 0.0
                    for d in range(vectors.shape[1]):
                        product += vectors[item, d] * vectors[other, d]
                    cosine[at] = max(cosine[at], product)
