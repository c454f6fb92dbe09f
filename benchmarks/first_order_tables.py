"""One table per field for factors and first-order weight together, against two separate ones.

Trains the same configuration with both layouts, in turn for each seed, and prints figures on the
validation rows and the speed of each. The separate first-order tables are 4 floats wide, FBGEMM's
least: 3 are padding, and row-wise Adagrad takes the mean of a row's squared gradients over all 4.

    python benchmarks/first_order_tables.py --config aistages trainer.epochs=3
"""

import argparse
import json
import platform
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence

import torch
import torchrec
from machine import cpu_model
from torch import Tensor
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor

from deepfm_dist import train
from deepfm_dist.config import load_config
from deepfm_dist.events import TrainEvent, ValidEvent, read_events
from deepfm_dist.model import deepfm

LAYOUTS = {"one": deepfm.EmbeddingArch}


class SeparateTables(deepfm.EmbeddingArch):
    """The factors of a field in one table, its first-order weights in another, 4 floats wide."""

    def __init__(
        self,
        tables: Mapping[str, deepfm.Table],
        features: Sequence[str],
        embedding_dim: int,
        pooling: Mapping[str, str] | None = None,
        device: torch.device | None = None,
        half: bool = False,
    ) -> None:
        """Replaces the collection of the one-table layout; pooling stays as it is."""
        super().__init__(tables, features, embedding_dim, pooling, device, half)
        self.factors_width = -(-embedding_dim // 4) * 4
        configs = []
        for config in self.ebc.embedding_bag_configs():
            for suffix, width in (("", self.factors_width), ("_first_order", 4)):
                configs.append(
                    EmbeddingBagConfig(
                        name=config.name + suffix,
                        num_embeddings=config.num_embeddings,
                        embedding_dim=width,
                        feature_names=config.feature_names,
                        pooling=config.pooling,
                    )
                )
        table_of = {f: c.name for c in configs[::2] for f in c.feature_names}
        self.factor_keys = [f"{f}@{table_of[f]}" for f in self.features]
        self.first_order_keys = [f"{key}_first_order" for key in self.factor_keys]
        self.ebc = EmbeddingBagCollection(device=device, tables=configs)

    def sums(self, sparse: KeyedJaggedTensor) -> Tensor:
        """``[B, F, row_width]``, as the one-table layout's."""
        keys = [self.factor_keys, self.first_order_keys]
        pooled = KeyedTensor.regroup([self.ebc(sparse)], keys)  # traced: no iterating over it
        factors = pooled[0].view(-1, len(self.features), self.factors_width)
        first_order = pooled[1].view(-1, len(self.features), 4)
        rows = torch.cat([factors[:, :, : self.embedding_dim], first_order[:, :, :1]], 2)
        return torch.nn.functional.pad(rows, (0, self.row_width - self.embedding_dim - 1))


LAYOUTS["separate"] = SeparateTables


def trained(layout: str, arguments: Sequence[str]) -> dict[str, float]:
    """Trains with one layout: the best validation AUC with its epoch's log loss, and rows/s."""
    deepfm.EmbeddingArch = LAYOUTS[layout]  # type: ignore[misc]
    if code := train.main(arguments):
        sys.exit(code)
    config = load_config(arguments[1], arguments[2:])
    events = read_events(config.run_dir / "metrics.jsonl")
    valid = [e.values() for e in events if isinstance(e, ValidEvent)]
    best = max(valid, key=lambda figures: figures["auc"])
    speed = statistics.median(e.rows_per_s or 0.0 for e in events if isinstance(e, TrainEvent))
    return {
        "auc": best["auc"],
        "log_loss": best["log_loss"],
        "epoch": best["epoch"],
        "rows_per_s": speed,
    }


def main() -> None:
    """Prints a line per layout and seed, and a JSON object of the means."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="sample")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args()
    print(f"machine: {cpu_model()}, 1 thread")
    print(
        f"versions: python {platform.python_version()}, torch {torch.__version__}, "
        f"torchrec {torchrec.__version__}"
    )
    print(f"command: {shlex.join(['python', *sys.argv])}", flush=True)
    figures: dict[str, list[dict[str, float]]] = {layout: [] for layout in LAYOUTS}
    for seed in range(1, args.seeds + 1):
        for layout in LAYOUTS:
            name = f"first_order_{layout}_{seed}"
            overrides = ["trainer.loss=bce", *args.overrides]
            overrides += [f"run.seed={seed}", f"run.name={name}"]
            overrides += [f"data.name=first_order_{seed}", "checkpoint.resume=never"]
            arguments = ["--config", args.config, *overrides]
            found = trained(layout, arguments)
            figures[layout].append(found)
            shown = "  ".join(f"{k} {v:.5g}" for k, v in found.items())
            print(f"seed {seed}, {layout} table(s): {shown}", flush=True)
    result = {}
    for layout, runs in figures.items():
        for key in ("auc", "log_loss", "rows_per_s"):
            result[f"{key}_{layout}"] = statistics.mean(run[key] for run in runs)
    result["auc_difference"] = result["auc_one"] - result["auc_separate"]
    result["speedup"] = result["rows_per_s_one"] / result["rows_per_s_separate"]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
