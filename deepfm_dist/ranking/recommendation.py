"""Writes every user's top-K items to files."""

import logging
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from deepfm_dist.data.batches.collation import ABSENT
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.jagged import Int32Array, Int64Array, Jagged
from deepfm_dist.data.lookup import RowEncoder
from deepfm_dist.data.manifest import SPLITS
from deepfm_dist.data.negative_rate import NegativeRate
from deepfm_dist.data.sources import column_names, read_table
from deepfm_dist.data.vocabulary import external
from deepfm_dist.distributed.checkpoint import fingerprint_of
from deepfm_dist.distributed.inference import probabilities
from deepfm_dist.distributed.world import World
from deepfm_dist.errors import DataError
from deepfm_dist.messages import plural
from deepfm_dist.model.deepfm import DeepFM
from deepfm_dist.ranking.chunks import gather_ranked, rank_users
from deepfm_dist.ranking.items import Catalogue, Seen, in_id_order
from deepfm_dist.ranking.nearest import NearestItems
from deepfm_dist.ranking.new_users import (
    how_to_know_users_by_items,
    id_column,
    read_new_users,
    spelling_hint,
)
from deepfm_dist.ranking.output import (
    MatrixKind,
    RankingFiles,
    ResumableOutput,
    hash_of,
)
from deepfm_dist.ranking.ranker import ModelRanker, Ranker, Users
from deepfm_dist.ranking.reasons import Explainer, ExplainingRanker
from deepfm_dist.ranking.requests import Requests, read_requests
from deepfm_dist.ranking.settings import RecommendConfig
from deepfm_dist.ranking.steering import popularity_penalties, with_reranking
from deepfm_dist.ranking.subsets import SubsetRanker

log = logging.getLogger(__name__)

SAMPLE_PAIRS, SAMPLE_USERS = 2_000_000, (16, 512)
"""Number of pairs scored to measure what a short list misses; fewest and most users for it."""

Ids = str | Sequence[str]
"""A file with a column of ids, or the ids themselves."""


def recommend(
    model: DeepFM,
    world: World,
    dataset: PreparedDataset,
    config: RecommendConfig,
    folder: Path,
    checkpoint: Path | None = None,
    name: str = "recommendations",
    in_parts: bool = False,
    rate: NegativeRate | None = None,
) -> RankingFiles | None:
    """Ranks the catalogue for every user. All ranks.

    Writes ``recommendations.parquet`` (``user_id, item_id, score, rank``; score: logit; rank from
    1) and ``recommendations.csv`` (``user,item``), by user, then rank; of requests both begin with
    ``request``; where asked for, also ``score_matrix.parquet`` (``user_id, scores``; see
    `ResumableOutput.write_matrix`), with the seen items. In parts, folders without a CSV file.

    Args:
        model: the DeepFM, sharded, in eval mode.
        world: the ranks.
        dataset: the prepared dataset.
        config: what to recommend to whom.
        folder: where the files go.
        checkpoint: the checkpoint of the weights; an interrupted command is resumed if they have
            not changed.
        name: the name of the files, without suffix. The matrix is called ``score_matrix`` plus what
            follows ``recommendations`` in the name, or plus the name.
        in_parts: whether to keep each rank's parts, in a folder of that name.
        rate: rate of drawn negatives, to correct probabilities; None: no correction.

    Returns:
        On rank 0 what was written, with the figures of `_speed` and, for a short list, those of
        `_compare`; None elsewhere.

    Raises:
        DataError: a list has no known id, or has unknown users; or histories are given to a model
            that has no field for them.
        ConfigError: the device or model lacks the precision, or the index does not exist.
    """
    catalogue = _catalogue(dataset, config)
    asked = _selected_users(dataset, catalogue, config, rate)
    ranker, figures = _ranker(model, world, dataset, catalogue, asked, config)
    key = None
    if checkpoint is not None:
        key = _key(dataset, catalogue, asked, config)
        key |= {"weights": fingerprint_of(checkpoint), "engine": ranker.engine.name}
    output = partial(ResumableOutput, n_users=len(asked.ids), world=world, in_parts=in_parts)
    ending = "" if in_parts else ".parquet"
    parts = output(folder / f"{name}{ending}", inputs=key, content="recommendations")
    seconds = _write_ranked(parts, ranker, asked, catalogue, config, world=world, dataset=dataset)
    if config.matrix is not None:
        # Before anything is merged, so that an interrupted run resumes with both files' parts.
        matrix_key = key and {**key, "matrix": config.matrix}
        file = f"score_matrix{f'-{name}'.removeprefix('-recommendations')}{ending}"
        matrix = output(folder / file, inputs=matrix_key, content="a score matrix")
        _write_matrix(matrix, ranker, asked, catalogue, config.matrix)
    files = parts.finish_ranked(asked.csv_columns)
    figures |= _speed(asked.n_pairs(catalogue), seconds, world)
    return None if files is None else _with_figures(files, figures, asked, config)


def _with_figures(
    files: RankingFiles,
    figures: Mapping[str, Any],
    asked: "_SelectedUsers",
    config: RecommendConfig,
) -> RankingFiles:
    if files.none:
        owners = plural(files.owners, "user" if asked.requests is None else "request")
        text = "no item left to recommend to %s of %s: all are seen, blocked or filtered out"
        log.warning(text, f"{files.none:,}", owners)
    if short := files.owners - files.full - files.none:
        if config.at_most:
            log.warning(
                "recommend.at_most: %s of %s get fewer items than asked for; raise "
                "recommend.rerank=%d, the number that they are chosen from, or the limits",
                f"{short:,}",
                plural(files.owners, "user" if asked.requests is None else "request"),
                config.rerank,
            )
        elif asked.requests is None:
            candidates, users = plural(files.k, "candidate"), plural(short, "user")
            log.info("fewer than %s to recommend to %s", candidates, users)
        else:
            log.info("fewer items than asked for: %s", plural(short, "request"))
    return replace(files, figures=figures)


def _catalogue(dataset: PreparedDataset, config: RecommendConfig) -> Catalogue:
    """The items that can be recommended.

    Raises:
        DataError: no item may be recommended.
    """
    cold_items = config.cold_items or "exclude"
    rows = _items(dataset, config.allow_items, config.block_items)
    catalogue = Catalogue(dataset, rows, cold_items)
    left_out = 0 if rows is None else len(rows) - len(catalogue)
    if config.allow_items is not None and left_out:
        log.warning(
            "recommend.allow_items: left out %s by recommend.cold_items=%s",
            plural(left_out, "item"),
            cold_items,
        )
    if len(catalogue) == 0:
        raise DataError(
            f"recommend.cold_items={cold_items}: with recommend.allow_items and "
            f"recommend.block_items it leaves no item of the catalogue"
        )
    return catalogue


@dataclass(frozen=True)
class _SelectedUsers:
    """The users to recommend for.

    Attributes:
        users: the users, in ranking order.
        ids: their external ids, or those of their requests.
        masked: lists of items not to recommend, each with the users' rows in it.
        rate: rate at which training draws their pairs as negatives, by index in ``users``; None: it
            draws none.
        requests: the requests; None: all users get the same.
    """

    users: Users
    ids: pa.Array
    masked: list[tuple[Int32Array, Jagged]]
    rate: NegativeRate | None
    requests: Requests | None = None

    @property
    def csv_columns(self) -> dict[str, str]:
        """Columns by their name in the CSV file."""
        columns = {"user": "user_id", "item": "item_id"}
        return columns if self.requests is None else {"request": "request", **columns}

    def n_pairs(self, catalogue: Catalogue) -> int:
        """Number of scored pairs."""
        if self.requests is None:
            return len(self.ids) * len(catalogue)
        return int(self.requests.sets.sizes(len(catalogue)).sum())


def _selected_users(
    dataset: PreparedDataset,
    catalogue: Catalogue,
    config: RecommendConfig,
    rate: NegativeRate | None,
) -> _SelectedUsers:
    if config.requests is not None:
        return _users_of_requests(dataset, catalogue, config, rate)
    if config.histories is not None:
        new = read_new_users(dataset, Path(config.histories))
        rows = np.arange(len(new.ids), dtype=np.int32)
        users = Users(rows, new.histories, new.attributes)
        rate = rate and rate.for_histories(new.histories, [new.seen])
        masked = [(rows, bags) for bags in (new.histories, new.seen)]
        return _SelectedUsers(users, new.ids, masked, rate)
    rows, ids = in_id_order(dataset, "user", _users(dataset, config.users))
    rate = rate and replace(rate, log_of_user=rate.log_of_user[rows])
    return _SelectedUsers(Users(rows), ids, _masked(dataset, config, rows), rate)


def _masked(
    dataset: PreparedDataset, config: RecommendConfig, rows: Int32Array
) -> list[tuple[Int32Array, Jagged]]:
    """The items that known users have interacted with, as `_SelectedUsers.masked`."""
    splits = masked_splits(dataset, config.mask)
    return [(rows, bags) for split in splits for bags in dataset.met(split)]


def _users_of_requests(
    dataset: PreparedDataset,
    catalogue: Catalogue,
    config: RecommendConfig,
    rate: NegativeRate | None,
) -> _SelectedUsers:
    """The users of a file of requests."""
    assert config.requests is not None
    requests = read_requests(dataset, catalogue, Path(config.requests), config)
    users, places = requests.users, np.arange(len(requests.ids), dtype=np.int32)
    masked, known = [(places, requests.blocked)], users.rows
    if users.histories is not None:
        masked.append((places, users.histories))
        is_known = np.zeros(len(places), bool) if users.is_known is None else users.is_known
        known = np.where(is_known, users.rows, ABSENT).astype(np.int32)
        if rate is not None:
            log_rates = rate.for_histories(users.histories).log_of_user
            log_rates[is_known] = rate.log_of_user[known[is_known]]
            rate = replace(rate, log_of_user=log_rates)
    elif rate is not None:
        rate = replace(rate, log_of_user=rate.log_of_user[known])
    masked += _masked(dataset, config, known)
    return _SelectedUsers(users, requests.ids, masked, rate, requests)


def _ranker(
    model: DeepFM,
    world: World,
    dataset: PreparedDataset,
    catalogue: Catalogue,
    asked: _SelectedUsers,
    config: RecommendConfig,
) -> tuple[ModelRanker, dict[str, Any]]:
    """The model's ranker, and figures of its short list if it uses one. All ranks."""
    ranker = ModelRanker.from_model(
        model,
        world,
        dataset,
        catalogue,
        asked.users,
        {} if asked.requests else RowEncoder(dataset).fixed_context(config.context),
        memory_bytes=config.memory_bytes,
        precision=config.precision,
        penalties=popularity_penalties(dataset, config.popularity_penalty),
    )
    return _with_short_list(ranker, asked, catalogue, config, world)


def _write_ranked(
    output: ResumableOutput,
    ranker: ModelRanker,
    asked: _SelectedUsers,
    catalogue: Catalogue,
    config: RecommendConfig,
    world: World,
    dataset: PreparedDataset,
) -> float | None:
    """Writes the missing parts of the rankings. All ranks.

    Returns:
        Seconds taken; None if some parts existed already.
    """
    output.log_reuse()
    start = time.monotonic()
    seen, requests = catalogue.seen_in(asked.masked), asked.requests
    owners = {"user_id": asked.ids}
    k: int | Int32Array = config.k
    if requests is not None:
        k, owners = requests.k, {"request": asked.ids, "user_id": requests.user_ids}
    final = _final_ranker(ranker, asked, catalogue, config, dataset=dataset)
    most = int(np.max(k))
    ranked = rank_users(final, len(asked.ids), seen, most, world, output.missing)

    def probability(
        users: Int64Array, positions: Int64Array, scores: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        rows = catalogue.rows[positions]
        logits = scores if asked.rate is None else scores + asked.rate.log_rates(users, rows)
        if ranker.encoder.penalties is not None:
            logits = logits + ranker.encoder.penalties[rows]
        return probabilities(logits).astype(np.float32)

    output.write_ranked(
        ranked,
        owners,
        ("item_id", catalogue.ids),
        k,
        probability if config.probability else None,
        final.column if isinstance(final, ExplainingRanker) else None,
    )
    world.barrier()
    return None if output.reused else time.monotonic() - start


def _final_ranker(
    ranker: ModelRanker,
    asked: _SelectedUsers,
    catalogue: Catalogue,
    config: RecommendConfig,
    dataset: PreparedDataset,
) -> Ranker:
    """The model's ranking with the requested filters, steering and reasons. All ranks."""
    final, wanted = cast(Ranker, ranker), None
    if asked.requests is not None:
        final, wanted = SubsetRanker(ranker, asked.requests.sets), asked.requests.k
    final = with_reranking(final, ranker, dataset, catalogue, config, wanted)
    if not config.explain:
        return final
    explainer = Explainer(ranker, dataset)
    return ExplainingRanker(final, ranker, explainer, catalogue.rows, config.explain, wanted)


def _write_matrix(
    output: ResumableOutput,
    ranker: ModelRanker,
    asked: _SelectedUsers,
    catalogue: Catalogue,
    kind: MatrixKind,
) -> None:
    output.write_matrix(ranker.scores, asked.ids, catalogue.ids, kind)
    output.finish_matrix()
    log.info("written: %s", output.target)


def _key(
    dataset: PreparedDataset, catalogue: Catalogue, asked: _SelectedUsers, config: RecommendConfig
) -> dict[str, Any]:
    """Everything that rankings depend on besides weights and engine, as JSON values."""
    users: Any = hash_of(asked.users.rows)
    if asked.requests is not None:
        users = [external(ids).to_pylist() for ids in (asked.ids, asked.requests.user_ids)] + [
            hash_of(*asked.requests.arrays)
        ]
    elif asked.users.histories is not None:
        items: list[npt.NDArray[Any]] = []
        for _, bags in asked.masked:
            items += [bags.offsets, bags.values]
        for values in (asked.users.attributes or {}).values():
            items += [values.offsets, values.values] if isinstance(values, Jagged) else [values]
        users = [external(asked.ids).to_pylist(), hash_of(*items)]
    return {
        "data": [dataset.manifest.fingerprint, *dataset.past],
        "users": users,
        "items": hash_of(catalogue.rows),
        "mask": list(masked_splits(dataset, config.mask)),
        "context": dict(config.context),
        "k": config.k,
        "probability": config.probability,
        "explain": config.explain,
        "steering": [config.popularity_penalty, config.diversity, config.at_most, config.rerank],
        "candidates": [config.candidates, config.index, config.probes],
        "targets": config.weights_of(dataset.manifest.targets),
    }


def _with_short_list(
    ranker: ModelRanker,
    asked: _SelectedUsers,
    catalogue: Catalogue,
    config: RecommendConfig,
    world: World,
) -> tuple[ModelRanker, dict[str, Any]]:
    """A ranker that scores only candidates in full, if configured, and its figures."""
    if config.candidates is not None and not ranker.has_deep_part:
        log.info("recommend.candidates: without an over-arch every item is scored in full anyway")
        return ranker, {}
    if config.candidates is None or config.candidates >= len(catalogue):
        return ranker, {}
    rows = asked.users.rows
    places = _sample(len(rows), len(catalogue))
    sample = rows[places]
    seen = catalogue.seen_in([(user_rows[places], bags) for user_rows, bags in asked.masked])
    index = None if config.index is None else ranker.make_index(config.index, config.probes)
    compared = _compare(ranker, sample, seen, config.k, config.candidates, index=index, world=world)
    return ranker.for_users(rows, config.candidates, index), {"short_list": compared}


def _speed(pairs: int, seconds: float | None, world: World) -> dict[str, Any]:
    """``peak_memory_gib`` of each rank; ``pairs``, ``seconds`` and ``pairs_per_s``. All ranks.

    Args:
        pairs: number of scored pairs.
        seconds: time taken; None for a resumed run, which has no speed.
        world: the ranks.
    """
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    figures: dict[str, Any] = {"peak_memory_gib": world.gather_object(peak_gib)}
    if seconds is None:
        return figures
    if world.is_first:
        log.info(
            "%s in %.2f s: %s pairs/s; peak memory of rank 0: %.2f GiB",
            plural(pairs, "pair"),
            seconds,
            _rate(pairs / seconds),
            peak_gib,
        )
    return figures | {"pairs": pairs, "seconds": seconds, "pairs_per_s": pairs / seconds}


def _rate(per_s: float) -> str:
    return f"{per_s / 1e6:,.1f} M" if per_s >= 1e5 else f"{per_s:,.0f}"


def masked_splits(dataset: PreparedDataset, mask: Sequence[str] | None) -> Sequence[str]:
    """Splits whose items are not recommended to their users; None: depends on the data."""
    if mask is not None:
        return mask
    return SPLITS if dataset.manifest.data.seen_is_masked else ()


def _users(dataset: PreparedDataset, ids: Ids | None) -> Int32Array | None:
    if ids is None:
        return None
    rows, unknown = _rows_of(dataset, "user", ids, "recommend.users")
    if unknown:
        such = f"{unknown[0]!r}{spelling_hint(dataset, 'user', unknown)}"
        raise DataError(
            f"recommend.users: {len(unknown):,} of {len(unknown) + len(rows):,} are not in the "
            f"training data (such as {such}): leave them out, "
            + (
                "or give their items: recommend.histories=FILE"
                if dataset.manifest.has_history
                else f"or {how_to_know_users_by_items(dataset)}"
            )
        )
    return rows


def _items(dataset: PreparedDataset, allow: Ids | None, block: Ids | None) -> Int32Array | None:
    """Item rows that can be recommended; None: all."""
    if allow is None and block is None:
        return None
    kept = np.zeros(dataset.manifest.n_rows("item"), bool)
    if allow is None:
        kept[1:] = True
    for ids, option, value in ((allow, "allow_items", True), (block, "block_items", False)):
        if ids is None:
            continue
        rows, unknown = _rows_of(dataset, "item", ids, f"recommend.{option}")
        kept[rows] = value
        if unknown:
            text = "recommend.%s: not in the catalogue: %s (such as %r%s)"
            meant = spelling_hint(dataset, "item", unknown)
            level = logging.WARNING if meant else logging.INFO
            log.log(level, text, option, plural(len(unknown), "item"), unknown[0], meant)
    if not kept.any():
        raise DataError(
            "recommend.allow_items and recommend.block_items leave no item of the catalogue"
        )
    return np.flatnonzero(kept).astype(np.int32)


def _rows_of(
    dataset: PreparedDataset, entity: str, ids: Ids, option: str
) -> tuple[Int32Array, list[str]]:
    """Rows of the distinct known ids, and the unknown ids."""
    if isinstance(ids, str):
        if not Path(ids).exists():
            raise DataError(
                f"{option}={ids}: no such file; to name the {entity}s themselves, put them in "
                f"brackets: {option}=[{ids}]"
            )
        wanted = id_column(dataset, entity, column_names(ids))
        column = read_table(ids, [wanted])[entity]
    else:
        column = pa.chunked_array([pa.array([str(i) for i in ids], pa.string())])
    if len(column) == 0:
        raise DataError(f"{option}: the list is empty; leave it out, or name some {entity}s")
    column = column.unique()
    place = pc.index_in(column, value_set=dataset.entity_ids(entity, cold=True).slice(1))
    rows = np.asarray(place.drop_null(), np.int32) + np.int32(1)
    return rows, column.filter(pc.is_null(place)).to_pylist()


def _sample(n_users: int, n_items: int) -> npt.NDArray[np.int64]:
    """Evenly spaced users for comparing a short list with the whole catalogue."""
    fewest, most = SAMPLE_USERS
    n = min(n_users, max(fewest, min(most, SAMPLE_PAIRS // n_items)))
    return np.unique(np.linspace(0, n_users - 1, n).astype(np.int64))


def _compare(
    ranker: ModelRanker,
    users: Int32Array,
    seen: Seen,
    k: int,
    candidates: int,
    index: NearestItems | None,
    world: World,
) -> dict[str, float] | None:
    """Measures what the short list misses and saves and what the over-arch changes. All ranks.

    Returns:
        On rank 0 the number of ``candidates``; the number of ``users`` compared; ``overlap``, the
        share of the exact top K that they contain; ``times_as_fast``; ``deep_share``, the share of
        the pairwise part's top K that the over-arch replaces. None elsewhere.
    """
    ranked, took = {}, {}
    # With K candidates, the over-arch only orders them: the set is the pairwise part's.
    for name, n, of in (
        ("exact", None, None),
        ("short", candidates, index),
        ("pairwise", k, None),
    ):
        world.barrier()
        start = time.monotonic()
        ranked[name] = gather_ranked(
            rank_users(
                ranker.for_users(users, n, of), len(users), seen, k, world, description="compare"
            ),
            k,
            world,
        )
        took[name] = time.monotonic() - start
    exact, short, pairwise = ranked["exact"], ranked["short"], ranked["pairwise"]
    if exact is None or short is None or pairwise is None:
        return None
    return {
        "candidates": candidates,
        "users": len(users),
        "overlap": _overlap(exact, short),
        "times_as_fast": took["exact"] / took["short"],
        "deep_share": 1 - _overlap(exact, pairwise),
    }


def _overlap(wanted: npt.NDArray[np.int64], retrieved: npt.NDArray[np.int64]) -> float:
    """Share of items in some rankings, ``[n, K]``, that are also in others."""
    both = (wanted[:, :, None] == retrieved[:, None, :]) & (wanted >= 0)[:, :, None]
    return float(both.sum() / max(1, (wanted >= 0).sum()))
