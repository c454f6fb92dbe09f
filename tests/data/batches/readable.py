"""Batches as plain Python, to compare them."""

from deepfm_dist.data.batches.batch import Batch


def rows_of(batch: Batch) -> list[tuple[object, ...]]:
    """(user bag, item bag, genre bag, label) of the rows that count."""
    bags = [[tuple(b.tolist()) for b in j.to_dense()] for j in batch.sparse.to_dict().values()]
    real = int(batch.weights.sum())
    assert batch.weights.tolist() == [1.0] * real + [0.0] * (len(batch.weights) - real)
    assert all(bag == () for of_key in bags for bag in of_key[real:])
    return list(zip(*bags, batch.labels.tolist(), strict=True))[:real]
