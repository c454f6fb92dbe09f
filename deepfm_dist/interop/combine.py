"""Combines several models and EASE as columns of one wider model."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.jagged import Jagged, Values
from deepfm_dist.distributed.sharding import DistributedModelParallel, local_shards
from deepfm_dist.environment import available_bytes
from deepfm_dist.errors import ConfigError
from deepfm_dist.interop.linear import ease_weights, leading_vectors, standardized
from deepfm_dist.model.deepfm import VECTOR_FACTORS, VECTOR_FIRST_ORDER, InteractionArch
from deepfm_dist.model.over_arch import OverArch
from deepfm_dist.ranking.baselines import USABLE, Ease, co_counts, distinct

FACTORS_BYTES = 28
"""Bytes per cell of EASE's item-item matrix while it is factorised."""


@torch.no_grad()
def add_tables(
    source: DistributedModelParallel,
    target: DistributedModelParallel,
    dims: tuple[int, int],
    at: int,
    share: float,
) -> None:
    """Adds a model's tables to those of a wider one, which adds ``share`` times its logits.

    Args:
        source: a model.
        target: a model with the same placement of tables and more columns.
        dims: D of the source and of the target.
        at: first target column for the source's factors.
        share: the share of the logits; factors enter as products, so each is scaled by its square
            root.
    """
    dim, width = dims
    for (*_, narrow), (*_, wide) in zip(local_shards(source), local_shards(target), strict=True):
        wide[:, at : at + dim] += share**0.5 * narrow[:, :dim]
        wide[:, width] += share * narrow[:, dim]


@torch.no_grad()
def add_dense(source: InteractionArch, target: InteractionArch, at: int, share: float) -> None:
    """Adds a model's parameters above the tables, like `add_tables`; it must not have an over-arch.

    Args:
        source: the model's part above the tables.
        target: the wider one's, with the same fields.
        at: column of the target's factors that the source's first one becomes.
        share: the share of the logits.
    """
    target.bias.add_(share * source.bias)
    columns = slice(at, at + source.embedding_dim)
    wide = dict(target.named_parameters())
    for name, narrow in source.named_parameters():
        if name.startswith(("dense_factors", VECTOR_FACTORS)):
            wide[name][:, columns] += share**0.5 * narrow
        elif name.startswith(("dense_first_order", VECTOR_FIRST_ORDER)):
            wide[name].add_(share * narrow)


@torch.no_grad()
def add_over_arch(
    source: OverArch, target: OverArch, dims: tuple[int, int], at: int, share: float
) -> None:
    """Makes a model's over-arch some units of a wider one, which reads the wider tables.

    They are those that the column is as far from the first as. The weights between units of
    different models stay 0.

    Args:
        source: a model's over-arch.
        target: one of several times as many units in each hidden layer.
        dims: D of the source and of the target.
        at: column of the target's factors that the source's first one becomes.
        share: the share of the logits; the factors were multiplied by its square root
            (`add_tables`).
    """
    dim, width = dims
    place, last = at // dim, len(source.hidden)
    sizes = [len(linear.weight) for linear in source.layers[:last]]
    units = [slice(place * size, (place + 1) * size) for size in sizes]
    rows_of_layers = [*units, slice(None)]
    for number, (narrow, wide) in enumerate(zip(source.layers, target.layers, strict=True)):
        rows, of_output = rows_of_layers[number], share if number == last else 1.0
        if number:
            wide.weight[rows, units[number - 1]] = of_output * narrow.weight
        else:
            by_field = wide.weight.view(len(wide.weight), -1, width)
            values = narrow.weight.view(len(narrow.weight), -1, dim)
            by_field[rows, :, at : at + dim] = of_output * share**-0.5 * values
        if narrow.bias is not None:
            wide.bias[rows] += of_output * narrow.bias
    for rows, narrow_norm, wide_norm in zip(units, source.norms, target.norms, strict=True):
        state = wide_norm.state_dict()
        for name, values in narrow_norm.state_dict().items():
            state[name][rows] = values


def put_columns(target: DistributedModelParallel, at: int, values: Mapping[str, Tensor]) -> None:
    """Writes ``[rows, columns]`` by table into factors, from column ``at`` on."""
    for table, rows, _, shard in local_shards(target):
        if table in values:
            shard[:, at : at + values[table].shape[1]] = values[table][rows]


def ease_tables(
    dataset: PreparedDataset,
    columns: int,
    l2: float,
    weight: float,
    field_weight: float = 0.0,
    is_standardized: bool = False,
) -> dict[str, Tensor]:
    """Fits EASE on the training positives; returns it as columns of two tables.

    Args:
        dataset: the prepared dataset.
        columns: number of columns.
        l2: L2 regularisation of EASE.
        weight: the weight of its scores.
        field_weight: each value of an item's field counts as this many users with all of its items.
        is_standardized: see `ease_factors`.

    Returns:
        ``[rows, columns]`` by table, whose products are ``weight`` times EASE's scores, up to the
        pooling of the history.

    Raises:
        ConfigError: there is no table of items or of histories of them.
    """
    n_items = dataset.manifest.entities["item"]
    fields = dataset.manifest.item_fields_of_closed_form
    if fields is None:
        raise ConfigError(
            "combine: EASE needs the items' own id and an item history with its own table "
            "among data.features: {name: item, entity: item}, {name: seen, entity: user, history: "
            "item}"
        )
    groups = groups_of_items(dataset) if field_weight else None
    first, second = ease_factors(
        Ease(l2),
        distinct(dataset.training_history),
        n_items,
        columns,
        groups,
        group_weight=field_weight,
        is_standardized=is_standardized,
    )
    if dataset.manifest.cold:  # an unknown item is average, not below all others
        second[0] = second[1:].mean(0)
    history, item = fields
    return {history.table_name: weight * first, item.table_name: second}


def groups_of_items(dataset: PreparedDataset) -> Jagged | None:
    """The items with each value of each item field; None without fields."""
    item_columns = [f for f in dataset.manifest.categorical if f.entity == "item" and not f.is_id]
    groups = [_items_by_value(dataset.entity_fields[f.name]) for f in item_columns]
    return Jagged.concatenated(groups) if groups else None


def _items_by_value(values: Values) -> Jagged:
    """The items with each known value of an item field."""
    items = np.arange(len(values))
    if isinstance(values, Jagged):
        items, values = np.repeat(items, values.lengths), values.values
    flat = values.astype(np.int32, copy=False)
    known = flat > 0
    n = int(flat.max(initial=0)) + 1
    return distinct(Jagged.from_pairs(flat[known], items[known], n))


def ease_factors(
    ease: Ease,
    train: Jagged,
    n_items: int,
    n_factors: int,
    groups: Jagged | None = None,
    group_weight: float = 0.0,
    is_standardized: bool = False,
) -> tuple[Tensor, Tensor]:
    """Two vectors per item that approximate EASE's scores.

    Of all rankings whose scores are ``<sum of the user's items' first vectors, second vector>``,
    this one's are nearest to EASE's for the training users, in squares: with B the item-item matrix
    and V the leading right singular vectors of XB, they are BV and V. With few users, EASE
    truncated this way ranks unseen items better than complete EASE.

    Args:
        ease: the EASE to approximate.
        train: each user's distinct training items, numbers below ``n_items``.
        n_items: I.
        n_factors: length of a vector.
        groups: items that share a property, such as a genre; each group counts as ``group_weight``
            users with all of its items.
        group_weight: see ``groups``.
        is_standardized: see `deepfm_dist.interop.linear.standardized`.

    Returns:
        ``[I, n_factors]`` float32 each; what exceeds the items is 0.

    Source: Izenman, "Reduced-rank regression for the multivariate linear model", 1975;
    singular vectors by Halko, Martinsson, Tropp, "Finding structure with randomness", 2011;
    groups by Jeunen, Van Balen, Goethals, "Closed-form models for collaborative filtering with
    side-information", 2020.
    """
    needed, room = FACTORS_BYTES * n_items**2, available_bytes()
    if needed > USABLE * room:
        raise ConfigError(
            f"EASE of {n_items:,} items takes {needed / 1e9:,.1f} GB of memory to factorise, "
            f"and {room / 1e9:,.1f} GB are available; use a machine with more memory, or raise "
            f"min_count of the items"
        )
    together = torch.from_numpy(co_counts(train, n_items))
    group_gram = None
    if groups is not None and group_weight:
        group_gram = torch.from_numpy(co_counts(groups, n_items))
    weights, deviations = ease_weights(together, ease.l2, group_gram, group_weight)
    if is_standardized:
        weights = standardized(weights, deviations)
    del group_gram
    leading = leading_vectors(weights, together.float(), n_factors)
    return weights @ leading, leading
