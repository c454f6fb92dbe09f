"""One rival trains a DeepFM on given rows; benchmarks/training.py runs it in the rivals' venv.

A rival gets labelled rows, negatives drawn already, and uses the loader it ships, in one process.
The first rows warm up; the last line is one JSON object.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

Columns = dict[str, np.ndarray]
Epoch = Callable[[], object]
FIELDS = ("user", "item", "genre")


def recbole(
    rows: Columns, sizes: dict[str, int], dim: int, layers: list[int], batch_size: int
) -> tuple[Epoch, int]:
    """Returns a pass over the rows, and how many it trains on."""
    import pandas as pd
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.model.context_aware_recommender.deepfm import DeepFM
    from recbole.trainer import Trainer

    folder = Path(tempfile.mkdtemp()) / "rows"
    folder.mkdir()
    names = {"user": "user_id:token", "item": "item_id:token", "genre": "genre:token"}
    frame = pd.DataFrame({named: rows[name] for name, named in names.items()})
    frame["label:float"] = rows["label"]
    frame.to_csv(folder / "rows.inter", sep="\t", index=False)
    config = Config(
        model="DeepFM",
        dataset="rows",
        config_dict={
            "data_path": str(folder.parent),
            "load_col": {"inter": ["user_id", "item_id", "genre", "label"]},
            "embedding_size": dim,
            "mlp_hidden_size": layers,
            "dropout_prob": 0.0,
            "train_batch_size": batch_size,
            "train_neg_sample_args": None,
            "eval_args": {
                "split": {"RS": [0.998, 0.001, 0.001]},
                "order": "RO",
                "group_by": None,
                "mode": "labeled",
            },
            "metrics": ["AUC"],
            "valid_metric": "AUC",
            "use_gpu": False,
            "show_progress": False,
            "checkpoint_dir": str(folder),
        },
    )
    dataset = create_dataset(config)
    train, _, _ = data_preparation(config, dataset)
    model = DeepFM(config, train.dataset)
    trainer = Trainer(config, model)
    return lambda: trainer._train_epoch(train, 0), len(train.dataset)


def fuxictr(
    rows: Columns, sizes: dict[str, int], dim: int, layers: list[int], batch_size: int
) -> tuple[Epoch, int]:
    """Returns a pass over the rows, and how many it trains on; the model is its model zoo's."""
    from fuxictr.pytorch.dataloaders.npz_dataloader import NpzDataLoader
    from fuxictr_deepfm import DeepFM, feature_map

    fields = feature_map({name: sizes[name] + 1 for name in FIELDS}, dim)
    path = Path(tempfile.mkdtemp()) / "rows.npz"
    np.savez(path, **rows)
    loader = NpzDataLoader(fields, str(path), batch_size, shuffle=True, num_workers=0)
    model = DeepFM(fields, dim, layers, metrics=["AUC"])
    model._max_gradient_norm = 10.0  # what fit() sets
    model.train()

    def epoch() -> None:  # train_epoch without the evaluation that needs a validation set
        for batch in loader:
            model.train_step(batch).item()

    return epoch, len(rows["label"])


def torch_rechub(
    rows: Columns, sizes: dict[str, int], dim: int, layers: list[int], batch_size: int
) -> tuple[Epoch, int]:
    """Returns a pass over the rows, and how many it trains on."""
    from torch_rechub.basic.features import SparseFeature
    from torch_rechub.models.ranking import DeepFM
    from torch_rechub.trainers import CTRTrainer
    from torch_rechub.utils.data import DataGenerator

    fields = [SparseFeature(name, sizes[name] + 1, embed_dim=dim) for name in FIELDS]
    model = DeepFM(fields, fields, {"dims": layers, "activation": "relu", "dropout": 0.0})
    x, y = {name: rows[name] for name in FIELDS}, rows["label"]
    few = {name: column[:1] for name, column in x.items()}
    loader, _, _ = DataGenerator(x, y).generate_dataloader(
        few, y[:1], few, y[:1], batch_size=batch_size
    )
    trainer = CTRTrainer(model, device="cpu", model_path=tempfile.mkdtemp())
    return lambda: trainer.train_one_epoch(loader, log_interval=1000), len(y)


def deepctr_torch(
    rows: Columns, sizes: dict[str, int], dim: int, layers: list[int], batch_size: int
) -> tuple[Epoch, int]:
    """Returns a pass over the rows, and how many it trains on."""
    from deepctr_torch.inputs import SparseFeat
    from deepctr_torch.models import DeepFM

    fields = [SparseFeat(name, sizes[name] + 1, embedding_dim=dim) for name in FIELDS]
    model = DeepFM(
        fields, fields, dnn_hidden_units=tuple(layers), l2_reg_linear=0, l2_reg_embedding=0
    )
    model.compile("adam", "binary_crossentropy")
    x, y = {name: rows[name] for name in FIELDS}, rows["label"]
    return lambda: model.fit(x, y, batch_size=batch_size, epochs=1, verbose=0), len(y)


RIVALS = {
    "recbole": recbole,
    "fuxictr": fuxictr,
    "torch-rechub": torch_rechub,
    "deepctr-torch": deepctr_torch,
}


def main() -> None:
    """Warms up on the first rows, then trains on all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rival", choices=RIVALS)
    parser.add_argument("--rows", type=Path, required=True, help="npz: user, item, genre, label")
    parser.add_argument("--limit", type=int, required=True, help="rows of the timed pass")
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--layers", type=lambda text: [int(n) for n in text.split("-")])
    parser.add_argument("--dim", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    rows = dict(np.load(args.rows))
    sizes = {name: int(rows[name].max()) + 1 for name in FIELDS}
    first = min(4 * args.batch_size, args.limit)
    with contextlib.redirect_stdout(sys.stderr):
        for n in (first, args.limit):
            part = {name: column[:n] for name, column in rows.items()}
            epoch, n_rows = RIVALS[args.rival](part, sizes, args.dim, args.layers, args.batch_size)
            begun, cpu = time.perf_counter(), time.process_time()
            epoch()
            seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
    print(
        json.dumps(
            {"rival": args.rival, "rows_per_s": n_rows / seconds, "rows_per_cpu_s": n_rows / cpu}
        )
    )


if __name__ == "__main__":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    main()
