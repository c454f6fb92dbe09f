"""Transfers a model's weights to a model with different or reordered fields."""

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Self

from deepfm_dist.model.deepfm import VECTOR_FACTORS, VECTOR_FIRST_ORDER

Order = tuple[Sequence[str], Sequence[str], Sequence[str]]
"""Names of a model's categorical, numeric and vector fields, each in order."""
Places = tuple[tuple[int, ...], tuple[int, ...]]
"""Indices of the same things before and after."""


@dataclass(frozen=True)
class Transfer:
    """The mapping of a trained model's weights to another model, by field name.

    Attributes:
        tables: embedding tables to take over; others are initialised.
        moves: whether a field is moved, new or left out.
        fields: indices of the common fields among all, categorical ones first.
        numeric: indices of the common numeric fields among the numeric ones.
        n_fields: number of fields of the trained model.
        first_layers: first layers of the over-arch, with columns by field; empty without an
            over-arch.
    """

    tables: frozenset[str]
    moves: bool
    fields: Places
    numeric: Places
    n_fields: int
    first_layers: tuple[str, ...]

    @classmethod
    def between(
        cls, tables: Collection[str], before: Order, after: Order, first_layers: Sequence[str]
    ) -> Self:
        """The transfer between two models; arguments as the attributes."""
        names = [tuple(itertools.chain(*order)) for order in (before, after)]
        return cls(
            frozenset(tables),
            tuple(map(tuple, before)) != tuple(map(tuple, after)),
            _places(*names),
            _places(before[1], after[1]),
            len(names[0]),
            tuple(first_layers),
        )

    def is_fresh(self, name: str) -> bool:
        """Whether a tensor of the model's state belongs to a table that is not taken over."""
        _, inside, table = name.partition(".embedding_bags.")
        return bool(inside) and table.partition(".")[0] not in self.tables

    def may_be_new(self, name: str) -> bool:
        """Whether a parameter belongs to kinds of fields that the trained model may lack."""
        _, _, own = name.partition("interaction_arch.")
        return self.moves and own.startswith(("dense_", VECTOR_FACTORS, VECTOR_FIRST_ORDER))

    def by_field(self, name: str) -> bool:
        """Whether a parameter is transferred field by field."""
        return self.moves and (
            name.endswith(("interaction_arch.dense_factors", "interaction_arch.dense_first_order"))
            or name.endswith(
                tuple(f"interaction_arch.over_arch.{layer}.weight" for layer in self.first_layers)
            )
        )

    def places(self, name: str, columns: int) -> tuple[int, Places]:
        """How a parameter is transferred field by field.

        Args:
            name: the name of the parameter.
            columns: last dimension of the trained parameter.

        Returns:
            The dimension, and the indices along it.
        """
        if "over_arch" not in name:
            return 0, self.numeric
        width = columns // self.n_fields
        before, after = (
            tuple(place * width + i for place in places for i in range(width))
            for places in self.fields
        )
        return 1, (before, after)


def _places(before: Sequence[str], after: Sequence[str]) -> Places:
    shared = [name for name in before if name in after]
    return tuple(map(before.index, shared)), tuple(map(after.index, shared))
