"""BARS's recipe for DeepFM on Frappe_x1 by FuxiCTR, on the rows that configs/frappe.yaml names.

    benchmarks/rivals/build.sh
    DEEPFM_DATA=/path/to/data .venv-rivals/bin/python benchmarks/rivals/frappe.py --seeds 1 2 3

A line per seed, and as the last one a JSON object: ``auc``, ``log_loss`` (validation rows, of the
epoch with the best AUC) and ``seconds``, lists in the order of the seeds.
"""

import argparse
import gzip
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from fuxictr.pytorch.dataloaders.npz_dataloader import NpzDataLoader
from fuxictr.pytorch.torch_utils import seed_everything
from fuxictr_deepfm import DeepFM, feature_map

CONTEXT = ["daytime", "weekday", "isweekend", "homework", "cost", "weather", "country", "city"]
FIELDS = ["user", "item", *CONTEXT]
BATCH_SIZE = 4096


def libsvm(path: Path) -> np.ndarray:
    """Returns int64 [rows, 1 + fields]: the label, then each field's feature number."""
    with gzip.open(path, "rt") as lines:
        rows = [[int(cell.partition(":")[0]) for cell in line.split()] for line in lines]
    return np.asarray(rows)


def coded(train: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Feature numbers become 1, 2, ... within a field; those unseen in training share the last."""
    train, valid, sizes = train.copy(), valid.copy(), {}
    for place, name in enumerate(FIELDS, start=1):
        known = np.unique(train[:, place])
        train[:, place] = np.searchsorted(known, train[:, place]) + 1
        found = np.minimum(np.searchsorted(known, valid[:, place]), len(known) - 1)
        seen = known[found] == valid[:, place]
        valid[:, place] = np.where(seen, found, len(known)) + 1
        sizes[name] = len(known) + 2  # the padding row, and the one for the unseen
    return train, valid, sizes


def main() -> None:
    """Trains once per seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(os.environ["DEEPFM_DATA"]) / "frappe-x1"
    parts = [libsvm(next(folder.glob(f"{name}*.libsvm.gz"))) for name in ("train", "valid")]
    train, valid, sizes = coded(*parts)
    fields = feature_map(sizes, dim=10)
    found: dict[str, list[float]] = {"auc": [], "log_loss": [], "seconds": []}
    with tempfile.TemporaryDirectory() as work:
        for name, rows in (("train", train), ("valid", valid)):
            columns = dict(zip(["label", *FIELDS], rows.T, strict=True))
            np.savez(Path(work) / f"{name}.npz", **columns)
        for seed in args.seeds:
            seed_everything(seed)
            begun = time.perf_counter()
            batches = [
                NpzDataLoader(fields, f"{work}/{name}.npz", BATCH_SIZE, shuffle, num_workers=0)
                for name, shuffle in (("train", True), ("valid", False))
            ]
            model = DeepFM(
                fields,
                dim=10,
                layers=[400, 400, 400],
                dropout=0.2,
                batch_norm=True,
                embedding_regularizer=0.05,
                model_root=work,
                metrics=["AUC", "logloss"],
            )
            os.makedirs(model.model_dir, exist_ok=True)
            model.fit(batches[0], epochs=100, validation_data=batches[1])
            best = model.evaluate(batches[1])
            found["auc"].append(best["AUC"])
            found["log_loss"].append(best["logloss"])
            found["seconds"].append(time.perf_counter() - begun)
            figures = {name: values[-1] for name, values in found.items()}
            print(f"seed {seed}: " + ", ".join(f"{n} {v:.5f}" for n, v in figures.items()))
    if len(args.seeds) > 1:
        mean, sd = statistics.mean(found["auc"]), statistics.stdev(found["auc"])
        print(f"AUC {mean:.5f} +- {sd:.5f}, log loss {statistics.mean(found['log_loss']):.5f}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
