"""The compiled kernel against float64, full sorts and itself cut up differently."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfm_dist.data.jagged import Jagged
from deepfm_dist.model.pairs import Side
from deepfm_dist.ranking import kernel
from deepfm_dist.ranking.engine import Best, KernelEngine
from deepfm_dist.ranking.topk import NO_ITEM

pytestmark = pytest.mark.skipif(not kernel.HAS_FMA, reason="the kernel needs multiply-add")


@dataclass
class Case:
    """A random model's sides and layers, and masked positions."""

    users: Side
    items: Side
    layers: list[tuple[torch.Tensor, torch.Tensor]]
    seen: Jagged

    @classmethod
    def of(cls, n_users: int, n_items: int, dim: int, sizes: list[int], seed: int) -> "Case":
        generator = torch.Generator().manual_seed(seed)

        def side(n: int) -> Side:
            units = sizes[0] if sizes else 0
            # The item side comes in blocks of the ranker's, what pads them included.
            padded = -(-n // 1024) * 1024
            return Side(
                *(
                    torch.randn(padded, *shape, generator=generator)
                    for shape in ((), (dim,), (units,))
                )
            )

        layers = [
            (
                torch.randn(b, a, generator=generator, dtype=torch.float64) / a**0.5,
                torch.randn(b, generator=generator, dtype=torch.float64),
            )
            for a, b in itertools.pairwise([*sizes, 1])
        ]
        rng = np.random.default_rng(seed)
        lengths = rng.integers(0, n_items + 1, n_users)
        owners = np.repeat(np.arange(n_users), lengths)
        values = rng.integers(-1, n_items, len(owners))  # unordered, repeated, some unknown
        return cls(side(n_users), side(n_items), layers, Jagged.from_pairs(owners, values, n_users))

    def expected(self, n_users: int, n_items: int) -> torch.Tensor:
        """``[U, I]`` float64 scores."""
        users, items = (
            [t[:n].double() for t in side.tensors]
            for side, n in ((self.users, n_users), (self.items, n_items))
        )
        scores = users[0][:, None] + items[0] + users[1] @ items[1].T
        if self.layers:
            x = (users[2][:, None] + items[2]).relu()
            for weight, bias in self.layers[:-1]:
                x = (x @ weight.float().double().T + bias.float().double()).relu()
            scores += x @ self.layers[-1][0][0].float().double()
        return scores


class Ranking:
    """A case prepared for the kernel."""

    def __init__(self, case: Case, n_users: int, n_items: int, threads: int = 1) -> None:
        self.case, self.n_users, self.n_items = case, n_users, n_items
        self.engine = KernelEngine(case.layers, threads)
        self.users = self.engine.users([case.users])

    def items(self, begin: int, end: int) -> kernel.Items:
        packed = self.engine.allocate(end - begin, self.case.items)
        for at in range(begin, end, 1024):
            self.engine.fill(packed, at - begin, self.case.items[slice(at, at + 1024)])
        return packed

    def scores(self) -> torch.Tensor:
        return self.engine.scores(self.users, self.n_users, self.items(0, self.n_items))

    def top_k(self, k: int, cuts: tuple[int, ...] = ()) -> Best:
        best = Best.none(self.n_users, k, torch.device("cpu"))
        edges = [0, *cuts, self.n_items]
        for begin, end in itertools.pairwise(edges):
            self.engine.update(self.users, self.items(begin, end), begin, self.case.seen, best)
        return best


sizes = st.lists(st.integers(1, 37), max_size=4)


@settings(max_examples=60)
@given(st.integers(1, 33), st.integers(1, 90), st.integers(0, 19), sizes, st.integers(0, 2**31))
def test_scores_equal_float64(
    n_users: int, n_items: int, dim: int, sizes: list[int], seed: int
) -> None:
    case = Case.of(n_users, n_items, dim, sizes, seed)
    found = Ranking(case, n_users, n_items).scores().double()
    expected = case.expected(n_users, n_items)
    assert ((found - expected).abs() <= 1e-5 * expected.abs().clamp(min=1)).all()


def sorted_top_k(scores: torch.Tensor, candidates: list[list[int]], k: int) -> list[list[int]]:
    """By score, then position; `NO_ITEM` in empty places."""
    rows = []
    for row, mine in zip(scores.tolist(), candidates, strict=True):
        order = sorted(mine, key=lambda i: (-row[i], i))
        rows.append((order + [NO_ITEM] * k)[:k])
    return rows


@settings(max_examples=60)
@given(
    st.integers(1, 33),
    st.integers(1, 90),
    sizes,
    st.integers(1, 25),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_top_k_equals_a_full_sort_of_the_same_scores(
    n_users: int, n_items: int, sizes: list[int], k: int, ties: bool, seed: int
) -> None:
    case = Case.of(n_users, n_items, 3, sizes, seed)
    if ties:
        for tensor in case.items.tensors:
            tensor[:] = tensor[torch.arange(len(tensor)) % 3]
    ranking = Ranking(case, n_users, n_items)
    scores, best = ranking.scores(), ranking.top_k(k)
    unseen = []
    for user in range(n_users):
        seen = case.seen.values[case.seen.offsets[user] : case.seen.offsets[user + 1]]
        unseen.append(sorted(set(range(n_items)) - set(seen.tolist())))
    expected = sorted_top_k(scores, unseen, k)
    assert best.positions.tolist() == expected
    for row, positions, found in zip(scores.tolist(), expected, best.scores.tolist(), strict=True):
        assert found == [row[i] if i >= 0 else -float("inf") for i in positions]

    wanted = [mine[:: 2 + user % 3] for user, mine in enumerate(unseen)]
    width = max(1, *map(len, wanted))
    candidates = torch.tensor([[NO_ITEM] * (width - len(mine)) + mine for mine in wanted])
    of_candidates = Best.none(n_users, k, torch.device("cpu"))
    for begin, end in ((0, min(64, n_items)), (64, n_items)):
        if begin < end:
            items = ranking.items(begin, end)
            ranking.engine.update_of_candidates(
                ranking.users, items, begin, candidates, of_candidates
            )
    assert of_candidates.positions.tolist() == sorted_top_k(scores, wanted, k)


def test_cuts_of_the_catalogue_and_threads_change_no_bit() -> None:
    n_users, n_items = 300, 2500
    case = Case.of(n_users, n_items, 12, [33, 21, 10, 7], seed=1)
    alone = Ranking(case, n_users, n_items).top_k(17)
    for threads, cuts in ((1, (1024,)), (3, ()), (2, (1024, 2048))):
        again = Ranking(case, n_users, n_items, threads).top_k(17, cuts)
        assert again.positions.equal(alone.positions)
        assert again.scores.equal(alone.scores)
    few = Ranking(case, 7, n_items)
    few.case = Case(case.users, case.items, case.layers, Jagged.from_pairs([], [], 7))
    assert few.scores().equal(Ranking(case, n_users, n_items).scores()[:7])


def test_wide_layers_are_exact() -> None:
    case = Case.of(5, 50, 200, [400, 400, 400], seed=3)
    found, expected = Ranking(case, 5, 50).scores().double(), case.expected(5, 50)
    assert ((found - expected).abs() <= 1e-5 * expected.abs().clamp(min=1)).all()
