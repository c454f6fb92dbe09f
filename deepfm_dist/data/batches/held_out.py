"""Reads held-out rows by row number."""

from collections import OrderedDict

import numpy as np

from deepfm_dist.data.dataset import PreparedDataset, Rows
from deepfm_dist.data.jagged import Values, from_arrow, joined, offsets_of, taken


class SplitReader:
    """Reads the rows of a split in order, a range at a time.

    Keeps in memory what fits the dataset's ``memory_bytes``, at least one row group.

    Args:
        dataset: the prepared dataset.
        split: valid or test.

    Attributes:
        n: number of rows.
    """

    def __init__(self, dataset: PreparedDataset, split: str) -> None:
        self._dataset, self._columns = dataset, dataset.row_columns(split)
        self._groups: list[tuple[str, int]] = []
        sizes: list[int] = []
        for p in range(dataset.manifest.files):
            name = f"{split}/part-{p:05d}.parquet"
            group_sizes = dataset.group_rows(name)
            self._groups += [(name, g) for g, rows in enumerate(group_sizes) if rows]
            sizes += [rows for rows in group_sizes if rows]
        self._offsets = offsets_of(sizes)
        self.n = int(self._offsets[-1])
        fits = dataset.manifest.splits[split].size_bytes <= dataset.memory_bytes
        self._most = len(sizes) if fits else 1
        self._held: OrderedDict[int, dict[str, Values]] = OrderedDict()

    def read(self, begin: int, end: int) -> Rows:
        """Rows ``begin`` to ``end`` (excluded).

        Raises:
            DataError: a file is damaged.
        """
        first = int(np.searchsorted(self._offsets, begin, "right")) - 1
        last = int(np.searchsorted(self._offsets, end, "left"))
        pieces = []
        for g in range(min(first, len(self._groups) - 1), max(last, 1)):
            low, high = np.clip((begin, end), *self._offsets[g : g + 2]) - self._offsets[g]
            pieces.append({n: taken(v, np.arange(low, high)) for n, v in self._group(g).items()})
        return Rows.of({name: joined([p[name] for p in pieces]) for name in self._columns})

    def _group(self, g: int) -> dict[str, Values]:
        if g not in self._held:
            table = self._dataset.read_group(*self._groups[g], self._columns)
            self._held[g] = {name: from_arrow(table[name]) for name in self._columns}
            if len(self._held) > self._most:
                self._held.popitem(last=False)
        return self._held[g]
