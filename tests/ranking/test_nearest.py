"""Short lists from an index: against a look at all items."""

import numpy as np
import pytest
import torch

from deepfm_dist.data.jagged import Jagged
from deepfm_dist.ranking.nearest import NearestItems
from tests.ranks import run_alone

N_ITEMS, N_USERS, LISTS = 600, 40, 12


def _share_found(kind: str, probes: int) -> float:
    """Of every user's ten best items, by inner product."""
    rng = np.random.default_rng(2)
    points = rng.normal(size=(N_ITEMS, 9)).astype(np.float32)
    users = torch.from_numpy(rng.normal(size=(N_USERS, 8)).astype(np.float32))
    nothing = Jagged(np.zeros(N_USERS + 1, np.int64), np.zeros(0, np.int32))
    actual = NearestItems(points, kind, probes).candidates([users], N_USERS, nothing, 10)
    scores = users @ torch.from_numpy(points[:, :8]).T + torch.from_numpy(points[:, 8])
    best = scores.topk(10).indices
    return float((actual[:, :, None] == best[:, None]).any(1).double().mean())


@pytest.mark.parametrize("kind", ["IVF{},Flat", "RR9,IVF{},Flat", "IVF{},SQ8,RFlat"])
def test_probes_apply_to_nested_inverted_files(kind: str) -> None:
    pytest.importorskip("faiss")
    index = kind.format(LISTS)
    assert run_alone(_share_found, index, LISTS) > 0.95
    assert run_alone(_share_found, index, 1) < 0.7
