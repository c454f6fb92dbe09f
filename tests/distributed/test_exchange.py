"""Ids exchanged as TorchRec exchanges them, in fewer bytes."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torchrec import KeyedJaggedTensor
from torchrec.distributed.dist_data import KJTAllToAll

from deepfm_dist.distributed.exchange import IdExchange
from deepfm_dist.distributed.process_group import process_group
from tests.ranks import run_ranks

HEIGHT = 5
FIELDS = ["user", "genres", "item", "hour", "tags", "device"]
SINGLE = {"user", "item", "hour", "device"}
SPLITS = {2: [4, 2], 3: [3, 0, 3], 4: [1, 2, 2, 1]}

MORE_ROWS = "later ranks have more rows"
CASES: dict[str, tuple[list[str], set[str], set[tuple[int, str]]]] = {
    "every row has a value": (FIELDS, SINGLE, set()),
    "the last rank is padded": (FIELDS, SINGLE, {(-1, field) for field in SINGLE}),
    "a field lacks values on rank 0": (FIELDS, SINGLE, {(0, "hour")}),
    "only single-valued fields": (["a", "b", "c", "d", "e", "f"], set("abcdef"), set()),
    "which fields are single-valued is not known": (FIELDS, set(), set()),
    MORE_ROWS: (FIELDS, SINGLE, set()),
}
"""Fields, the single-valued ones, and (rank, field) in which a row has no value."""


def lengths_on(
    rank: int,
    size: int,
    height: int,
    fields: list[str],
    single: set[str],
    gaps: set[tuple[int, str]],
) -> torch.Tensor:
    random = torch.Generator().manual_seed(rank)
    lengths = torch.randint(0, 4, (len(fields), height), generator=random, dtype=torch.int32)
    for i, field in enumerate(fields):
        if field in single:
            lengths[i] = 1
        if (rank, field) in gaps or (rank - size, field) in gaps:
            lengths[i, -1] = 0
    return lengths


def exchanged(size: int) -> dict[str, Any]:
    """By case: what this rank received, what TorchRec gives it, and messages of lengths."""
    found = {}
    with process_group("cpu") as world:
        send = dist.all_to_all_single
        sent: list[int] = []

        def counting(*arguments: Any, **named: Any) -> Any:
            if named["input"].dtype == torch.int32:  # sizes are int64
                sent.append(named["input"].numel())
            return send(*arguments, **named)

        for case, (fields, single, gaps) in CASES.items():
            height = HEIGHT + world.rank * (case == MORE_ROWS)
            lengths = lengths_on(world.rank, size, height, fields, single, gaps)
            n = int(lengths.sum())
            values = torch.arange(n, dtype=torch.int32) + 1000 * world.rank
            ids = KeyedJaggedTensor(fields, values, lengths=lengths.flatten())
            expected = KJTAllToAll(dist.group.WORLD, SPLITS[size])(ids).wait().wait()
            sent.clear()
            dist.all_to_all_single = counting
            actual = IdExchange(dist.group.WORLD, SPLITS[size], 1, single)(ids).wait().wait()
            dist.all_to_all_single = send
            assert sent[-1] == n
            pairs = [
                [(kjt.keys(), kjt.lengths().tolist(), kjt.values().tolist(), kjt.stride())]
                + [bags.values().tolist() for bags in kjt.to_dict().values()]
                for kjt in (actual, expected)
            ]
            found[case] = (*pairs, [count // height for count in sent[:-1]])
    return found


@pytest.mark.parametrize("size", SPLITS)
def test_lengths_of_single_valued_fields_are_sent_only_if_a_rank_lacks_a_value(size: int) -> None:
    travelling = [[2], [6], [3], [], [6], [6]]  # fields whose lengths each rank sends
    for found in run_ranks(exchanged, size, size):
        for (actual, expected, sent), fields in zip(found.values(), travelling, strict=True):
            assert actual == expected
            assert sent == fields
