"""Plain PyTorch DeepFM after a notebook's recipe, as an independent accuracy and speed reference.

It shares no code with the package: it reads a prepared dataset's files itself, trains one
single-device model on the fields user, item and the item's genre, and reports test metrics.

    python benchmarks/notebook_reference.py --prepared DIR
"""

import argparse
import json
import platform
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import sklearn
import torch
from machine import cpu_model
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

FIELDS = ("user", "item", "genre")
HIDDEN = (30, 20, 10)
DROPOUT = 0.1


class InputError(Exception):
    """The prepared folder or an option cannot be used."""


class DeepFM(nn.Module):
    """First order + factorization machine + MLP over one embedding table shared by the fields."""

    offsets: Tensor

    def __init__(self, field_rows: list[int], dim: int, init_std: float) -> None:
        """Creates the tables; both embeddings start from N(0, init_std^2)."""
        super().__init__()
        self.register_buffer("offsets", torch.tensor([0, *field_rows[:-1]]).cumsum(0))
        self.embedding = nn.Embedding(sum(field_rows), dim)
        self.fc = nn.Embedding(sum(field_rows), 1)
        for table in (self.embedding, self.fc):
            nn.init.normal_(table.weight, std=init_std)
        self.bias = nn.Parameter(torch.zeros(1))
        layers: list[nn.Module] = []
        width = len(field_rows) * dim
        for hidden in HIDDEN:
            layers += [nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(DROPOUT)]
            width = hidden
        self.mlp = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Returns the logits (batch,) of field indices (batch, fields)."""
        index = features + self.offsets
        vectors = self.embedding(index)
        first = self.fc(index).sum(dim=(1, 2))
        second = 0.5 * (vectors.sum(1).square() - vectors.square().sum(1)).sum(1)
        deep: Tensor = self.mlp(vectors.flatten(1)).squeeze(1)
        return self.bias + first + second + deep


def read_columns(folder: Path, pattern: str, names: tuple[str, ...]) -> pa.Table:
    """Returns the named columns of the folder's parquet files that match the pattern."""
    files = sorted(folder.glob(pattern))
    if not files:
        raise InputError(f"{folder}: no file {pattern}")
    try:
        table = pads.dataset(files, format="parquet").to_table(columns=list(names))
    except pa.ArrowException as error:
        raise InputError(f"{folder}: {error}") from error
    if any(column.null_count for column in table.columns):
        raise InputError(f"{folder}: missing values in {', '.join(names)}")
    return table


def read_genres(prepared: Path) -> np.ndarray:
    """Returns the genre index of each item row: its only genre, or 0 where it has none."""
    column = read_columns(prepared / "entities", "item.parquet", ("genre",))["genre"]
    counts = pc.list_value_length(column).to_numpy()
    if counts.max(initial=0) > 1:
        raise InputError(f"{prepared}: this recipe takes at most one genre per item")
    genres = np.zeros(len(counts), dtype=np.int64)
    genres[counts > 0] = pc.list_flatten(column).to_numpy()
    return genres


def read_split(folder: Path, genres: np.ndarray, field_rows: list[int]) -> tuple[Tensor, Tensor]:
    """Returns a split's field indices (rows, fields) and labels (rows,)."""
    table = read_columns(folder, "*.parquet", ("user", "item", "label"))
    user, item, label = (column.to_numpy() for column in table.columns)
    if set(np.unique(label)) != {0, 1}:
        raise InputError(f"{folder}: column label must hold both 0 and 1 and nothing else")
    if item.min() < 0 or item.max() >= len(genres):
        raise InputError(f"{folder}: column item has indices outside [0, {len(genres)})")
    features = np.stack([user, item, genres[item]], axis=1).astype(np.int64)
    if features.min() < 0 or (features.max(axis=0) >= field_rows).any():
        raise InputError(f"{folder}: indices beyond the manifest's rows of user, item or genre")
    return torch.from_numpy(features), torch.from_numpy(label.astype(np.float32))


def read_field_rows(path: Path) -> list[int]:
    """Returns the table rows of each field from the manifest."""
    try:
        tables = json.loads(path.read_text(encoding="utf-8"))["tables"]
        return [int(tables[name]["rows"]) for name in FIELDS]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: bad manifest, {type(error).__name__}: {error}") from error


def train_epoch(
    model: DeepFM,
    optimizer: torch.optim.Optimizer,
    data: tuple[Tensor, Tensor],
    batch_size: int,
    generator: torch.Generator,
) -> float:
    """Trains on every row once, in a fresh random order, and returns the mean training loss."""
    features, labels = data
    model.train()
    total = 0.0
    for rows in torch.randperm(len(labels), generator=generator).split(batch_size):
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(model(features[rows]), labels[rows])
        loss.backward()
        optimizer.step()
        total += loss.item() * len(rows)
    return total / len(labels)


@torch.no_grad()
def evaluate(model: DeepFM, data: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Returns accuracy at probability 0.5, AUC, log loss and the majority class's rate."""
    features, labels = data
    model.eval()
    logits = torch.cat([model(part) for part in features.split(65536)]).double()
    log_loss = nn.functional.binary_cross_entropy_with_logits(logits, labels.double()).item()
    positive_rate = labels.double().mean().item()
    return {
        "test_accuracy": ((logits >= 0) == (labels > 0)).double().mean().item(),
        "test_auc": float(roc_auc_score(labels.numpy(), logits.numpy())),
        "test_log_loss": log_loss,
        "majority_rate": max(positive_rate, 1 - positive_rate),
    }


def parse_args() -> argparse.Namespace:
    """Parses and checks the command line."""
    parser = argparse.ArgumentParser(description="Plain PyTorch DeepFM reference run.")
    parser.add_argument("--prepared", type=Path, required=True, help="prepared dataset folder")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--embedding-dim", type=int, default=10)
    parser.add_argument("--init-std", type=float, default=1.0, help="of both embedding tables")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    for name in ("epochs", "batch_size", "lr", "embedding_dim", "init_std", "threads"):
        if not getattr(args, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} must be positive")
    return args


def run(args: argparse.Namespace) -> None:
    """Trains, evaluates and prints the report; its last line is one JSON object."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    field_rows = read_field_rows(args.prepared / "manifest.json")
    genres = read_genres(args.prepared)
    train, test = (read_split(args.prepared / n, genres, field_rows) for n in ("train", "test"))
    print(f"machine: {cpu_model()}, {args.threads} thread(s)")
    print(
        f"versions: python {platform.python_version()}, torch {torch.__version__}, "
        f"numpy {np.__version__}, pyarrow {pa.__version__}, scikit-learn {sklearn.__version__}"
    )
    print(f"command: {shlex.join(['python', *sys.argv])}")
    sizes = ", ".join(f"{name} {rows}" for name, rows in zip(FIELDS, field_rows, strict=True))
    print(f"data: {len(train[1])} train rows, {len(test[1])} test rows; fields {sizes}", flush=True)
    model = DeepFM(field_rows, args.embedding_dim, args.init_std)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)
    generator = torch.Generator().manual_seed(args.seed)
    seconds = 0.0
    for epoch in range(1, args.epochs + 1):
        start = time.perf_counter()
        loss = train_epoch(model, optimizer, train, args.batch_size, generator)
        spent = time.perf_counter() - start
        seconds += spent
        speed = len(train[1]) / spent
        print(f"epoch {epoch}: loss {loss:.5f}, {spent:.2f} s, {speed:.0f} rows/s", flush=True)
    report: dict[str, float] = {
        **evaluate(model, test),
        "epochs": args.epochs,
        "seconds": seconds,
        "rows_per_s": args.epochs * len(train[1]) / seconds,
        "seed": args.seed,
    }
    print(json.dumps(report))


def main() -> int:
    """Returns 0, or 2 after one line on stderr where the input cannot be used."""
    try:
        run(parse_args())
    except (InputError, OSError, ValueError, pa.ArrowException) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
