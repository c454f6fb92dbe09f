"""A loaded model that answers requests for single users."""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from deepfm_dist.build import build_model
from deepfm_dist.data.batches.batch import Batch
from deepfm_dist.data.batches.collation import ABSENT, Collator, padded
from deepfm_dist.data.cards import Card, Cards
from deepfm_dist.data.dataset import Rows
from deepfm_dist.data.encoding import Cell
from deepfm_dist.data.jagged import Int32Array, Jagged
from deepfm_dist.data.lookup import RowEncoder, UserAttributes
from deepfm_dist.data.schema import OUT_OF_VOCABULARY
from deepfm_dist.data.sources import read_objects
from deepfm_dist.distributed.checkpoint import time_of
from deepfm_dist.distributed.inference import probabilities
from deepfm_dist.distributed.world import World
from deepfm_dist.errors import CheckpointError, ConfigError, DataError
from deepfm_dist.interop.safetensors import read_weights
from deepfm_dist.jobs.export import is_export_of
from deepfm_dist.messages import brief
from deepfm_dist.model.deepfm import DeepFM
from deepfm_dist.model.pairs import Side
from deepfm_dist.ranking.filters import ItemFilters
from deepfm_dist.ranking.items import Catalogue, cold_items_to_rank, in_id_order
from deepfm_dist.ranking.lookup import SideEncoder
from deepfm_dist.ranking.ranker import ModelRanker, Ranker, UserChunk, Users
from deepfm_dist.ranking.reasons import Explainer, Explanation
from deepfm_dist.ranking.recommendation import masked_splits
from deepfm_dist.ranking.requests import item_sets
from deepfm_dist.ranking.similarity import unit_length
from deepfm_dist.ranking.steering import (
    Reranking,
    RerankingRanker,
    popularity_penalties,
    ranked_by,
)
from deepfm_dist.ranking.subsets import ItemSets, SubsetRanker
from deepfm_dist.ranking.topk import NO_ITEM, top_k
from deepfm_dist.ranking.types import USER_BLOCK
from deepfm_dist.runs.trained import RunOnDisk, negative_rate, ranking_loss, settings_in
from deepfm_dist.training.evaluation import collate_rows

CARDS = 100_000
"""Number of items with cached cards."""


class Scored(NamedTuple):
    """An item in a ranking.

    Attributes:
        card: its displayed columns.
        score: logit or similarity.
        probability: that the user chooses it, corrected for drawn negatives; None: the model's
            scores are not log-odds.
        explanation: the explanation of the score, if requested.
    """

    card: Card
    score: float
    probability: float | None = None
    explanation: Explanation | None = None


class Prediction(NamedTuple):
    """The score of a row.

    Attributes:
        score: logit; None if it is not finite because a number of the row is too far from those of
            training.
        probability: corrected for drawn negatives; None: the model's scores are not log-odds.
        targets: the same for each of several targets, by name; ``score`` is then the ranking
            score. None: there is one target.
    """

    score: float | None
    probability: float | None
    targets: Mapping[str, "Prediction"] | None = None


class ItemChoice(NamedTuple):
    """The items that a request wants to be ranked.

    Attributes:
        allow: external ids; None: all items.
        block: external ids of items to leave out.
        where: a filter, such as ``genre=Drama``; None: no filter.
    """

    allow: Sequence[str] | None = None
    block: Sequence[str] | None = None
    where: str | None = None


EVERY_ITEM = ItemChoice()


class Unknown(KeyError):
    """A user or item is not in the training data; the arguments are its id and the run."""


class Unsupported(Exception):
    """The model does not support a request."""


class Invalid(ValueError):
    """A request names an unknown field or value."""


class Recommender:
    """Answers requests about users and items by external ids.

    Args:
        run: a finished run.
        export: folder of its export; the weights are read from there.
        world: a world of one rank.

    Attributes:
        name: the name of the run.
        step: the step of the checkpoint.
        saved_at: when the checkpoint was saved, in seconds since 1970.
        knows_users_by_items: whether a user can be described by a list of items.
    """

    def __init__(self, run: RunOnDisk, export: Path, world: World) -> None:
        dataset, config = run.dataset.with_validation(), run.config
        self.name, self.step = config.run.name, int(run.state["step"])
        self.saved_at = time_of(run.checkpoint)
        self.knows_users_by_items = dataset.manifest.has_history
        cold_items = cold_items_to_rank(
            config.recommend.cold_items, config.data.id_dropout, dataset.manifest
        )
        self._catalogue = Catalogue(dataset, cold_items=cold_items)
        self._encoder, self._attributes = RowEncoder(dataset), UserAttributes(dataset)
        self._filters = ItemFilters(dataset, self._catalogue)
        self._fixed = config.recommend.context
        context = self._encoder.fixed_context(self._fixed)
        settings = settings_in(run.state)
        manifest = dataset.manifest
        self._targets = dict(
            zip(manifest.targets, config.recommend.weights_of(manifest.targets), strict=True)
        )
        self._ranks_by_one = config.recommend.ranks_by_one(manifest.targets)
        model = exported_model(run, export, world)
        self._rate = negative_rate(
            run.dataset, settings, lambda batch: model(batch.sparse, batch.dense), world
        )
        self._has_probabilities = ranking_loss(settings) is None
        no_users = Users(np.zeros(0, np.int32))
        self._ranker = ModelRanker.from_model(
            ranked_by(model, manifest, config.recommend),
            world,
            dataset,
            self._catalogue,
            no_users,
            context,
            penalties=popularity_penalties(dataset, config.recommend.popularity_penalty),
        )
        self._reranking = Reranking.from_settings(
            self._ranker, dataset, self._catalogue, config.recommend
        )
        self._explainer = Explainer(self._ranker, dataset)
        n_users = dataset.manifest.entities["user"] - 1
        self._kept_users = _all_users(self._ranker.encoder, n_users, config.recommend.memory_bytes)
        masked = masked_splits(dataset, config.recommend.mask)
        self._positives = [bags for split in masked for bags in dataset.met(split)]
        self._history = run.dataset.history  # in order of time, without validation items
        self._vectors = None
        if model.interaction_arch.fm is not None:
            self._vectors = unit_length(self._ranker.item_vectors())
        self._cards = lru_cache(CARDS)(Cards(dataset))
        rows, self._user_ids = in_id_order(dataset, "user")
        self._users = dict(zip(self._user_ids.to_pylist(), rows.tolist(), strict=True))
        self._model, self._collate = model, Collator(dataset)
        rows, items = in_id_order(dataset, "item")
        self._all_items = dict(zip(items.to_pylist(), rows.tolist(), strict=True))
        ids, rows = self._catalogue.ids, self._catalogue.rows
        self._rows = dict(zip(ids.to_pylist(), rows.tolist(), strict=True))
        titles = dataset.titles(cold=True)
        self._names = ids if titles is None else pc.coalesce(titles.take(pa.array(rows)), ids)
        self._places = np.full(dataset.manifest.n_rows("item"), NO_ITEM, np.int64)
        self._places[self._catalogue.rows] = np.arange(len(self._catalogue))
        self.recommend(self.find_users("", 1)[0], 1)  # compiles the kernels

    @property
    def n_users(self) -> int:
        """Number of users."""
        return len(self._users)

    @property
    def n_items(self) -> int:
        """Number of items."""
        return len(self._catalogue)

    def recommend(self, user: str, k: int, explain: int = 0) -> list[Scored]:
        """A user's best unseen items, as the command ``recommend`` ranks them, and their logits.

        Args:
            user: the external id.
            k: number of items.
            explain: number of reasons for each.

        Raises:
            Unknown: the user is unknown.
        """
        if user not in self._users:
            raise Unknown(user, self.name)
        row = np.array([self._users[user]], np.int32)
        seen = self._catalogue.seen_by(row, self._positives)(0, 1)
        log_rate = 0.0 if self._rate is None else float(self._rate.log_of_user[row[0]])
        if self._kept_users is None:
            ranking = self._best(self._ranker.encoder.users(row), seen, k, log_rate)
        else:
            kept = self._kept_users[int(row[0]) - 1 : int(row[0])]
            ranking = self._best([kept], seen, k, log_rate)
        if not explain:
            return ranking
        return self._with_explanations(ranking, self._ranker.encoder.user_batch(row), explain)

    def recommend_for(
        self,
        items: Sequence[str],
        k: int,
        attributes: Mapping[str, Cell] | None = None,
        context: Mapping[str, str | float] | None = None,
        user: str | None = None,
        choice: ItemChoice = EVERY_ITEM,
        explain: int = 0,
    ) -> tuple[list[Scored], dict[str, int]]:
        """The best other items for a known user, or one described by items, attributes or both.

        Args:
            items: external ids.
            k: number of items.
            attributes: values of user fields, by name.
            context: values of context fields, by name; default: those of the service.
            user: a user of the training data, with the known items and attributes.
            choice: items that may be ranked.
            explain: number of reasons for each.

        Returns:
            The ranking, and the number of unknown ids in each list of ``choice``.

        Raises:
            Unknown: a user or an item is unknown.
            Unsupported: the model has no field of a user's items, or none of attributes.
            Invalid: no user is described, or a field or value is unknown.
        """
        if user is None:
            self._check_described(items, attributes)
        elif user not in self._users:
            raise Unknown(user, self.name)
        elif items or attributes:
            raise Invalid("user is in the training data; leave items and attributes out")
        listed, unknown = self._listed_rows(choice)
        try:
            fields = self._attributes.encode(attributes) if attributes else None
            fixed = self._encoder.fixed_context({**self._fixed, **context}) if context else None
            sets = item_sets(self._filters, self._catalogue, [choice.where], [listed["allow"]])
        except ConfigError as error:
            raise Invalid(str(error).replace("recommend.context", "context")) from None
        row = np.zeros(1, np.int32)
        theirs = _bag([self._rows[item] for item in items])
        masked = [(row, theirs), (row, _bag(listed["block"]))]
        rate = self._rate
        if user is not None:
            row = np.array([self._users[user]], np.int32)
            masked += [(row, bags) for bags in self._positives]
            batch = self._ranker.encoder.user_batch(row, context=fixed)
        else:
            rate = rate and rate.for_histories(theirs)
            batch = self._ranker.encoder.user_batch(row, theirs, fields, fixed)
        log_rate = 0.0 if rate is None else float(rate.log_of_user[row[0]])
        seen = self._catalogue.seen_in(masked)(0, 1)
        ranking = self._best(self._ranker.encoder.user_sides(batch), seen, k, log_rate, sets)
        return self._with_explanations(ranking, batch, explain), unknown

    def _with_explanations(self, ranking: list[Scored], user: Batch, most: int) -> list[Scored]:
        """A user's ranking with reasons for each item."""
        if not most:
            return ranking
        rows = np.array([self._rows[str(scored.card.id)] for scored in ranking], np.int32)
        items = Jagged(np.array([0, len(rows)]), rows)
        explained = self._explainer.explain([(None, user)], items, most)
        return [s._replace(explanation=e) for s, e in zip(ranking, explained, strict=True)]

    def card_of(self, row: int) -> Card:
        """Display data of an item row."""
        return self._cards(row)

    def _listed_rows(
        self, choice: ItemChoice
    ) -> tuple[dict[str, Int32Array | None], dict[str, int]]:
        """Item rows of a choice's lists, and the number of unknown ids in each."""
        rows: dict[str, Int32Array | None] = {}
        unknown = {}
        for name, ids in (("allow", choice.allow), ("block", choice.block)):
            known = [self._all_items[id_] for id_ in ids or () if id_ in self._all_items]
            rows[name] = None if ids is None else np.array(known, np.int32)
            if missing := len(ids or ()) - len(known):
                unknown[name] = missing
        return rows, unknown

    def _check_described(self, items: Sequence[str], attributes: Mapping[str, Cell] | None) -> None:
        """Refuses a description that the model cannot use; see `recommend_for`."""
        for item in items:
            if item not in self._rows:
                raise Unknown(item, self.name)
        if not self.knows_users_by_items and (items or not self._attributes.names):
            raise Unsupported(
                f"the model of run {self.name} knows its users by id, not by their items; ask for "
                f"a user of the training data (/users), or for what is similar to an item "
                f"(/items/ID/similar), or train one with a field of history: item"
            )
        if attributes and not self._attributes.names:
            raise Unsupported(
                f"the model of run {self.name} knows no attributes of users; leave attributes out, "
                f"or train one with a field of entity: user and a column"
            )
        if not items and not attributes:
            known = ["items"] if self.knows_users_by_items else []
            known += ["attributes"] if self._attributes.names else []
            cure = "items, attributes or both" if len(known) == 2 else known[0]
            raise Invalid(f"{known[0]} is missing or empty; give {cure}, or a user")

    @torch.no_grad()
    def predict(self, objects: Sequence[dict[str, Any]]) -> tuple[list[Prediction], dict[str, int]]:
        """Scores rows like the command ``predict``.

        Args:
            objects: JSON values by the names of the log's columns.

        Returns:
            A score for each row, and the number of unknown values by field, which are scored as
            unknown.

        Raises:
            Invalid: a field is missing or unknown, or a value cannot be read.
        """
        before = {name: unseen.count for name, unseen in self._encoder.unknown.items()}
        try:
            table = read_objects(objects, self._encoder.pair_columns, "rows")
            context = self._encoder.encode_context(table)
        except DataError as error:
            raise Invalid(str(error)) from None
        counts = {name: u.count - before[name] for name, u in self._encoder.unknown.items()}
        users, items = (
            np.array(
                [rows.get(id_, OUT_OF_VOCABULARY) for id_ in table[name].to_pylist()], np.int32
            )
            for name, rows in (("user", self._users), ("item", self._all_items))
        )
        counts["user"] = int((users == OUT_OF_VOCABULARY).sum())
        counts["item"] = int((items == OUT_OF_VOCABULARY).sum())
        n = len(objects)
        batch = collate_rows(self._collate, Rows(users, items, None, context, n), 0, n, n)
        logits = self._model(batch.sparse, batch.dense).numpy()
        rates = 0.0 if self._rate is None else self._rate.log_rates(users, items)
        predictions = self._predictions(logits, rates)
        return predictions, {name: count for name, count in counts.items() if count}

    def _predictions(
        self, logits: npt.NDArray[np.float32], rates: float | npt.NDArray[np.float64]
    ) -> list[Prediction]:
        """Converts ``[n]`` or ``[n, T]`` logits to predictions."""
        if logits.ndim == 2:
            by_target = [self._predictions(column, rates) for column in logits.T]
            scores = self._predictions(logits @ np.array([*self._targets.values()]), rates)
            return [
                Prediction(
                    together.score,
                    together.probability if self._ranks_by_one else None,
                    dict(zip(self._targets, each, strict=True)),
                )
                for together, *each in zip(scores, *by_target, strict=True)
            ]
        return [
            Prediction(score, probability if self._has_probabilities else None)
            if math.isfinite(score)
            else Prediction(None, None)
            for score, probability in zip(
                logits.tolist(), probabilities(logits + rates).tolist(), strict=True
            )
        ]

    def similar(self, item: str, k: int) -> list[Scored]:
        """The items most similar to one by cosine, like the command ``similar``.

        Raises:
            Unknown: the item is unknown.
            Unsupported: the model has no pairwise part.
        """
        if item not in self._rows:
            raise Unknown(item, self.name)
        if self._vectors is None:
            raise Unsupported(
                "similar items compare the vectors of the pairwise part, which this model "
                "does not have; train one with model.fm=true"
            )
        place = self._places[self._rows[item]]
        scores = (self._vectors @ self._vectors[place])[None]
        scores[0, place] = float("-inf")
        positions, best = top_k(scores, k)
        return self._shown(positions[0].numpy(), best[0].numpy())

    def history(self, user: str, n: int) -> tuple[list[Card], int]:
        """A user's training items, latest first, and their total number.

        Raises:
            Unknown: the user is unknown.
        """
        if user not in self._users:
            raise Unknown(user, self.name)
        row = self._users[user]
        items = self._history.values[self._history.offsets[row] : self._history.offsets[row + 1]]
        known = items[items != OUT_OF_VOCABULARY]
        return [self._cards(int(i)) for i in known[::-1][:n]], len(items)

    def find(self, text: str, n: int) -> list[Card]:
        """Items with a text in their title (or id), sorted by id."""
        there = pc.match_substring(self._names, text, ignore_case=True)
        places = np.flatnonzero(np.asarray(there))[:n]
        return [self._cards(int(row)) for row in self._catalogue.rows[places]]

    def find_users(self, beginning: str, n: int) -> list[str]:
        """Users by prefix of their id, sorted by id."""
        there = np.asarray(pc.starts_with(self._user_ids, beginning))
        ids: list[str] = self._user_ids.take(pa.array(np.flatnonzero(there)[:n])).to_pylist()
        return ids

    def _best(
        self,
        user: Sequence[Side],
        seen: Jagged,
        k: int,
        log_rate: float,
        sets: ItemSets | None = None,
    ) -> list[Scored]:
        """A user's ranking.

        Args:
            user: the user's side.
            seen: masked positions.
            k: number of items.
            log_rate: `NegativeRate` of the user.
            sets: items that are ranked; None: all.
        """
        ranker: Ranker = self._ranker
        users: Any = UserChunk(user, 1, 1)
        if sets is not None:
            ranker, users = SubsetRanker(self._ranker, sets), (sets.number, users)
        if self._reranking is not None:
            ranker = RerankingRanker(ranker, self._reranking)
        [positions], [scores] = ranker.best(users, seen, k)
        ranking = self._shown(positions, scores)
        if not (self._has_probabilities and self._ranks_by_one):
            return ranking
        logits, rows = scores + log_rate, self._catalogue.rows[positions]
        if self._rate is not None:
            logits = logits + self._rate.log_of_item[rows]
        if self._ranker.encoder.penalties is not None:
            logits = logits + self._ranker.encoder.penalties[rows]
        # The ranking ends at the first NO_ITEM.
        pairs = zip(ranking, probabilities(logits).tolist(), strict=False)
        return [scored._replace(probability=probability) for scored, probability in pairs]

    def _shown(self, positions: np.ndarray, scores: np.ndarray) -> list[Scored]:
        rows = self._catalogue.rows
        return [
            Scored(self._cards(int(rows[position])), float(score))
            for position, score in zip(positions.tolist(), scores.tolist(), strict=True)
            if position != NO_ITEM
        ]


def _bag(rows: Sequence[int] | Int32Array | None) -> Jagged:
    """One list of distinct item rows, keeping last occurrences."""
    rows = [] if rows is None else [*map(int, rows)]
    distinct = np.array([*dict.fromkeys(reversed(rows))][::-1], np.int32)
    return Jagged(np.array([0, len(distinct)]), distinct)


def _all_users(encoder: SideEncoder, n: int, memory_bytes: int) -> Side | None:
    """The side of user rows 1 to n; None if it does not fit into memory."""
    [first] = encoder.users(np.ones(1, np.int32))
    if n * sum(t.nbytes for t in first.tensors) > memory_bytes:
        return None
    rows = np.arange(1, n + 1, dtype=np.int32)
    blocks = [
        encoder.users(padded(rows[b : b + USER_BLOCK], USER_BLOCK, ABSENT))[0]
        for b in range(0, n, USER_BLOCK)
    ]
    return Side(*(torch.cat(parts)[:n] for parts in zip(*(b.tensors for b in blocks), strict=True)))


def exported_model(run: RunOnDisk, export: Path, world: World) -> DeepFM:
    """The model of an export, unsharded, in eval mode.

    Args:
        run: the run it was exported from.
        export: folder of the export.
        world: a world of one rank.

    Raises:
        CheckpointError: the export is of another checkpoint, or incomplete.
    """
    if not is_export_of(run, export):
        raise CheckpointError(f"{export}: not of {run.checkpoint}; export it again")
    config = run.config
    model = build_model(config.model, run.dataset.manifest, world, config.run.seed).model
    weights = read_weights(export)
    bags = model.embedding_arch.ebc.to_empty(device="cpu").embedding_bags
    try:
        for name, bag in bags.items():
            table = weights.pop(f"tables.{name}")
            bag.weight.data.zero_()
            bag.weight.data[:, : table.shape[1]] = table
        model.interaction_arch.load_state_dict(weights)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{export}: does not fit the run's model: {brief(error)}") from None
    return model.eval()
