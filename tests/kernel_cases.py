"""Random cases for the kernels that score and rank, against float64 and full sorts."""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from deepfm_dist.data.jagged import Jagged
from deepfm_dist.model.pairs import Side
from deepfm_dist.ranking.topk import NO_ITEM
from deepfm_dist.ranking.types import Best, Engine


@dataclass
class Case:
    """A random model's sides and layers, and masked positions."""

    users: Side
    items: Side
    layers: list[tuple[torch.Tensor, torch.Tensor]]
    seen: Jagged

    @classmethod
    def of(
        cls,
        n_users: int,
        n_items: int,
        dim: int,
        sizes: list[int],
        seed: int,
        ties: bool = False,
    ) -> "Case":
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
        users, items = side(n_users), side(n_items)
        if ties:
            items = Side(*(t[torch.arange(len(t)) % 3] for t in items.tensors))
        return cls(users, items, layers, Jagged.from_pairs(owners, values, n_users))

    def to(self, device: str) -> "Case":
        users, items = (
            Side(*(t.to(device) for t in side.tensors)) for side in (self.users, self.items)
        )
        return Case(users, items, self.layers, self.seen)

    def expected(self, n_users: int, n_items: int) -> torch.Tensor:
        """``[U, I]`` float64 scores."""
        users, items = (
            [t[:n].cpu().double() for t in side.tensors]
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
    """A case prepared for an engine."""

    def __init__(self, case: Case, n_users: int, n_items: int, engine: Engine) -> None:
        self.case, self.n_users, self.n_items, self.engine = case, n_users, n_items, engine
        self.users = engine.users([case.users])

    def items(self, begin: int, end: int) -> Any:
        packed = self.engine.allocate(end - begin, self.case.items)
        for at in range(begin, end, 1024):
            self.engine.fill(packed, at - begin, self.case.items[slice(at, at + 1024)])
        return packed

    def scores(self) -> torch.Tensor:
        return self.engine.scores(self.users, self.n_users, self.items(0, self.n_items)).cpu()

    def top_k(self, k: int, cuts: tuple[int, ...] = ()) -> Best:
        best = Best.none(self.n_users, k, self.case.users.constant.device)
        for begin, end in itertools.pairwise([0, *cuts, self.n_items]):
            self.engine.update(self.users, self.items(begin, end), begin, self.case.seen, best)
        return best

    def top_k_of(self, candidates: list[list[int]], k: int, cuts: tuple[int, ...] = ()) -> Best:
        width = max(1, *map(len, candidates))
        device = self.case.users.constant.device
        wanted = torch.tensor([[NO_ITEM] * (width - len(mine)) + mine for mine in candidates])
        best = Best.none(self.n_users, k, device)
        for begin, end in itertools.pairwise([0, *cuts, self.n_items]):
            items = self.items(begin, end)
            self.engine.update_of_candidates(self.users, items, begin, wanted.to(device), best)
        return best

    def check(self, k: int, cuts: tuple[int, ...] = ()) -> None:
        """Asserts that the best are those of a full sort of the same scores.

        The scores of some items alone are the same, too.
        """
        scores, unseen = self.scores(), self.unseen()
        places = np.arange(self.n_items - 1, -1, -3)[::-1].copy()
        some_items = self.engine.take(self.items(0, self.n_items), places)
        of_some = self.engine.scores(self.users, self.n_users, some_items).cpu()
        assert of_some.equal(scores[:, torch.from_numpy(places)])
        some = [mine[:: 2 + user % 3] for user, mine in enumerate(unseen)]
        for candidates, best in (
            (unseen, self.top_k(k, cuts)),
            (some, self.top_k_of(some, k, cuts)),
        ):
            expected = sorted_top_k(scores, candidates, k)
            assert best.positions.tolist() == expected
            for row, positions, found in zip(
                scores.tolist(), expected, best.scores.tolist(), strict=True
            ):
                assert found == [row[i] if i >= 0 else -float("inf") for i in positions]

    def unseen(self) -> list[list[int]]:
        """Each user's candidates, ascending."""
        found, seen = [], self.case.seen
        for user in range(self.n_users):
            mine = seen.values[seen.offsets[user] : seen.offsets[user + 1]].tolist()
            found.append(sorted(set(range(self.n_items)) - set(mine)))
        return found


def sorted_top_k(scores: torch.Tensor, candidates: list[list[int]], k: int) -> list[list[int]]:
    """By score, then position; `NO_ITEM` in empty places."""
    rows = []
    for row, mine in zip(scores.tolist(), candidates, strict=True):
        order = sorted(mine, key=lambda i: (-row[i], i))
        rows.append((order + [NO_ITEM] * k)[:k])
    return rows


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest, in units of max(1, |logit|)."""
    return float(((found.double() - expected).abs() / expected.abs().clamp(min=1)).max())
