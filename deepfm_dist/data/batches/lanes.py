"""Training rows read from disk in lanes: shuffled streams of groups of rows.

Group g of the training rows belongs to lane g mod L. In every epoch a lane goes through its groups
in another order, and through the rows of a group in another order. All lanes advance together, and
a global batch takes its share from each. It is ordered lane by lane and sliced by rank, so that a
rank reads about L / ranks lanes and the batch is the same at any number of ranks.

Quality of the shuffle: a batch mixes L groups from all over the data, of up to 2**22 / L rows each.
Two rows of one group come within about 2**22 rows of each other; any other two rows can be any
distance apart.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deepfm_dist.compiled import compiled
from deepfm_dist.data.jagged import Int64Array, Jagged, Values, from_arrow, joined, taken
from deepfm_dist.data.layout import DatasetFiles
from deepfm_dist.data.manifest import Manifest
from deepfm_dist.seeding import derive_seed, permute, permuted_range

_OPEN_FILES = 32


def consumed(rows: int, lanes: int, copies: int, total: int) -> Int64Array:
    """Rows that each lane has supplied after ``total`` rows of an epoch, one row per lane in turn.

    Args:
        rows: rows over all lanes; the first ``rows mod lanes`` lanes have one more.
        lanes: number of lanes.
        copies: occurrences of each row, counting its negatives.
        total: rows taken, counting copies.

    Returns:
        ``[lanes]`` int64, adding up to ``total``.
    """
    lane = np.arange(lanes)
    common, longer = divmod(rows, lanes)
    together = min(total, common * copies * lanes)
    turns, first = divmod(together, lanes)
    far = turns + (lane < first)
    if longer:  # the rest belongs to the longer lanes
        turns, first = divmod(total - together, longer)
        far = far + np.where(lane < longer, turns + (lane < first), 0)
    return far


@dataclass(frozen=True)
class SelectedRows:
    """Selected rows of a batch.

    Attributes:
        columns: columns as read from the files.
        index: ``[m]`` selected rows of these.
        row: ``[m]`` int64: number among all training rows.
        slot: ``[m]`` int64: 0 for the row itself, k for its k-th negative.
    """

    columns: Mapping[str, Values]
    index: Int64Array
    row: Int64Array
    slot: Int64Array


@dataclass(frozen=True)
class _Order:
    """A lane's groups in an epoch's order, their ends in the lane's stream, and their seeds."""

    groups: list[int]
    ends: list[int]
    seeds: list[int]


class Lanes:
    """The training rows as lanes; keeps the groups in use in memory, and reads ahead.

    Args:
        files: opens the files of the prepared dataset.
        manifest: the dataset's manifest.
        columns: which to read.
        copies: occurrences of each row: once, and once per negative.
        share: largest share of a batch that is requested at once, such as 1 / ranks.
        batch_size: rows of a batch over all ranks, counting copies.
        seed: the seed of the order.

    Raises:
        DataError: a file is missing, damaged or has the wrong layout; `take` raises it, too.
    """

    def __init__(
        self,
        files: DatasetFiles,
        manifest: Manifest,
        columns: list[str],
        copies: int,
        share: float,
        batch_size: int,
        seed: int,
    ) -> None:
        self._lanes, self._copies, self._seed = manifest.lanes, copies, seed
        self._rows = manifest.splits["train"].rows
        self._cuts = manifest.cuts
        self._per_lane = manifest.groups // manifest.lanes
        self._files = _GroupFiles(files, manifest, columns)
        height = int(np.diff(self._cuts).max())
        least = max(1, int(np.diff(self._cuts).min()) * copies)
        # Groups of a lane that one batch may need: the one it leaves, some inside, one it enters.
        rows_per_lane = -(-batch_size // self._lanes) + copies
        self._depth = 1 + -(-rows_per_lane // least)
        self._here: OrderedDict[int, int] = OrderedDict()  # lane -> its first slot
        # An epoch's short last batch may need more lanes of a rank: it takes several turns.
        self._width = min(self._lanes, int(np.ceil(self._lanes * share)) + 3)
        self._free = list(range(self._width))
        self._height = height
        self._holds = np.full(len(self._free) * self._depth, -1, np.int64)
        self._coming: dict[int, Future[None]] = {}
        self._columns: dict[str, Any] = {}  # one flat array each, with a section per slot
        self._lists: dict[str, list[Jagged]] = {}
        self._allocate(columns)
        self._orders: OrderedDict[tuple[int, int], _Order] = OrderedDict()
        self._reader = ThreadPoolExecutor(1)

    def _allocate(self, columns: list[str]) -> None:
        size = len(self._holds)
        empty = self._files.read(0, 0)
        for name in columns:
            values = empty[name]
            if isinstance(values, Jagged):
                self._lists[name] = [values] * size
            else:
                self._columns[name] = np.zeros(size * self._height, values.dtype)

    def take(self, epoch: int, begin: int, end: int, first: int, last: int) -> SelectedRows:
        """Rows ``first`` to ``last`` (excluded) of the batch of rows ``begin`` to ``end``."""
        before = consumed(self._rows, self._lanes, self._copies, begin)
        after = consumed(self._rows, self._lanes, self._copies, end)
        stops = np.cumsum(after - before)
        starts = stops - (after - before)
        low = before + np.maximum(0, first - starts)
        high = after - np.maximum(0, stops - last)
        lanes = np.flatnonzero(low < high)
        parts = [
            self._lane_rows(epoch, lanes[at : at + self._width], low, high)
            for at in range(0, max(1, len(lanes)), self._width)
        ]
        if len(parts) == 1:
            return parts[0]
        return SelectedRows(
            {name: joined([p.columns[name] for p in parts]) for name in parts[0].columns},
            np.arange(last - first),
            np.concatenate([p.row for p in parts]),
            np.concatenate([p.slot for p in parts]),
        )

    def _lane_rows(
        self, epoch: int, lanes: Int64Array, low: Int64Array, high: Int64Array
    ) -> SelectedRows:
        """Rows ``low[l]`` to ``high[l]`` of the streams of as many lanes as fit at once."""
        pieces = [
            piece
            for lane in lanes
            for piece in self._pieces(epoch, int(lane), int(low[lane]), int(high[lane]))
        ]
        table = np.array(pieces, np.int64).reshape(-1, 5)
        total = int((table[:, 3] - table[:, 2]).sum())
        index, row, slot = _gather(table, self._cuts, self._height, self._copies, total)
        columns = {name: taken(values, index) for name, values in self._columns.items()}
        for name, bags in self._lists.items():
            columns[name] = self._bags(bags, table, index)
        self._read_ahead(epoch, table)
        return SelectedRows(columns, np.arange(total), row, slot)

    def _pieces(
        self, epoch: int, lane: int, low: int, high: int
    ) -> list[tuple[int, int, int, int, int]]:
        """(slot, group, low, high, seed) of rows ``low`` to ``high`` of a lane's stream."""
        pieces = []
        order = self._order(epoch, lane)
        ordinal = bisect_right(order.ends, low)
        while low < high:
            group, begin = order.groups[ordinal], order.ends[ordinal - 1] if ordinal else 0
            stop = min(high, order.ends[ordinal])
            if low < stop:
                place = self._place(epoch, lane, ordinal)
                self._hold(place, group)
                pieces.append((place, group, low - begin, stop - begin, order.seeds[ordinal]))
            low = stop
            ordinal += 1
        return pieces

    def _order(self, epoch: int, lane: int) -> "_Order":
        key = (epoch, lane)
        if key not in self._orders:
            seed = derive_seed(self._seed, "groups", epoch, lane)
            order = permute(np.arange(self._per_lane), self._per_lane, seed)
            groups = lane + self._lanes * order
            ends = np.cumsum(self._cuts[groups + 1] - self._cuts[groups]) * self._copies
            seeds = [derive_seed(self._seed, "rows", epoch, int(group)) for group in groups]
            self._orders[key] = _Order(groups.tolist(), ends.tolist(), seeds)
            if len(self._orders) > 3 * self._lanes:
                self._orders.popitem(last=False)
        return self._orders[key]

    def _place(self, epoch: int, lane: int, ordinal: int) -> int:
        in_lane = (epoch * self._per_lane + ordinal) % self._depth
        if lane not in self._here:
            if not self._free:  # evict the least recently used lane
                self._free.append(self._here.popitem(last=False)[1])
            self._here[lane] = self._free.pop()
        self._here.move_to_end(lane)
        return self._here[lane] * self._depth + in_lane

    def _hold(self, place: int, group: int) -> None:
        """Loads a group into a slot unless it is there."""
        coming = self._coming.pop(place, None)
        if coming is not None:
            coming.result()
        if self._holds[place] != group:
            self._load(place, group)

    def _load(self, place: int, group: int) -> None:
        self._holds[place] = -1
        begin, end = int(self._cuts[group]), int(self._cuts[group + 1])
        first = place * self._height
        for name, values in self._files.read(begin, end).items():
            if isinstance(values, Jagged):
                self._lists[name][place] = values
            else:
                self._columns[name][first : first + end - begin] = values
        self._holds[place] = group

    def _read_ahead(self, epoch: int, table: Int64Array) -> None:
        """Starts to read a lane's next group once half of the current one is used."""
        for _, group, low, high, _ in table:
            size = int(self._cuts[group + 1] - self._cuts[group]) * self._copies
            if not low <= size // 2 < high:
                continue
            lane = int(group) % self._lanes
            ordinal = self._order(epoch, lane).groups.index(int(group)) + 1
            next_epoch, ordinal = epoch + ordinal // self._per_lane, ordinal % self._per_lane
            place = self._place(next_epoch, lane, ordinal)
            wanted = self._order(next_epoch, lane).groups[ordinal]
            if self._holds[place] != wanted and place not in self._coming:
                self._coming[place] = self._reader.submit(self._load, place, wanted)

    def _bags(self, bags: list[Jagged], table: Int64Array, index: Int64Array) -> Values:
        parts: list[Values] = [taken(bags[0], np.zeros(0, np.int64))]  # a rank may have no rows
        at = 0
        for place, _, low, high, _ in table:
            inside = index[at : at + high - low] - place * self._height
            parts.append(taken(bags[place], inside))
            at += high - low
        return joined(parts)


@compiled
def _gather(
    table: Int64Array, cuts: Int64Array, height: int, copies: int, total: int
) -> tuple[Int64Array, Int64Array, Int64Array]:
    index = np.empty(total, np.int64)
    row = np.empty(total, np.int64)
    slot = np.empty(total, np.int64)
    at = 0
    for t in range(len(table)):
        place, group, low, high, seed = table[t]
        shuffled = permuted_range(low, high, (cuts[group + 1] - cuts[group]) * copies, seed)
        for i in range(len(shuffled)):
            inside = shuffled[i] // copies
            index[at] = place * height + inside
            row[at] = cuts[group] + inside
            slot[at] = shuffled[i] - inside * copies
            at += 1
    return index, row, slot


class _GroupFiles:
    """The files of the training rows, read by row number."""

    def __init__(self, files: DatasetFiles, manifest: Manifest, columns: list[str]) -> None:
        self._dataset, self._columns = files, columns
        self._open: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._one_at_a_time = Lock()  # Arrow's file reader is not thread-safe
        of_groups: list[tuple[int, int, int]] = []
        for number in range(manifest.files):
            metadata = self._file(number).metadata
            of_groups += [
                (number, g, metadata.row_group(g).num_rows) for g in range(metadata.num_row_groups)
            ]
        self._groups = of_groups
        self._ends = np.cumsum([n for *_, n in of_groups])
        self._dataset.agree("train", "rows", int(self._ends[-1]), manifest.splits["train"].rows)
        if not np.isin(manifest.cuts, [0, *self._ends]).all():
            raise self._dataset.wrong("train", "a row group crosses a cut")
        self._schema = self._file(0).schema_arrow

    def _file(self, number: int) -> pq.ParquetFile:
        if number not in self._open:
            self._open[number] = self._dataset.open(_name(number))
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    def read(self, begin: int, end: int) -> dict[str, Values]:
        """Training rows ``begin`` to ``end``, which are between two cuts."""
        first, last = np.searchsorted(self._ends, [begin, end - 1], side="right")
        wanted = self._groups[first : last + 1] if end > begin else []
        tables = [pa.schema([self._schema.field(c) for c in self._columns]).empty_table()]
        with self._one_at_a_time:
            tables += [self._read_group(number, group) for number, group, _ in wanted]
        table = pa.concat_tables(tables)
        return {name: from_arrow(table[name]) for name in self._columns}

    def _read_group(self, number: int, group: int) -> pa.Table:
        try:
            table = self._file(number).read_row_group(group, self._columns, use_threads=False)
        except (OSError, pa.ArrowInvalid) as error:
            raise self._dataset.damaged(_name(number), error) from None
        return self._dataset.check(_name(number), table)


def _name(number: int) -> str:
    return f"train/part-{number:05d}.parquet"
