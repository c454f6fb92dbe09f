"""One model of clicks and purchases against a model of purchases alone, on a generated log.

Users and items have hidden vectors. A click is likely where they agree, and a purchase is rare: it
needs a click and, mostly, the same taste. Every log is split into training, validation and test
rows, and three models are trained on it: of purchases alone, of both, and of both with a shared
layer. The odds of the generator are the best possible scores.

    python benchmarks/targets.py --rows 40000 --seeds 3
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from deepfm_dist.config import Config, config_from
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.jobs.evaluate import evaluate_on
from deepfm_dist.jobs.train import train_on
from deepfm_dist.training.metrics import AreaUnderCurve, Tally

MODELS: dict[str, dict[str, Any]] = {
    "buy alone": {"interactions": {"label": "buy"}},
    "click and buy": {"interactions": {"labels": ["click", "buy"]}},
    "click and buy, one shared layer": {
        "interactions": {"labels": ["click", "buy"]},
        "model": {"shared_layers": 1},
    },
}


def generate(n: int, seed: int) -> pd.DataFrame:
    """``n`` rows with a click in a fifth and a purchase in 1.4 % of them."""
    rng = np.random.default_rng(seed)
    n_users, n_items = n // 20, n // 80
    taste, kind = rng.normal(size=(n_users, 4)), rng.normal(size=(n_items, 4))
    rows = pd.DataFrame({"user": rng.integers(0, n_users, n), "item": rng.integers(0, n_items, n)})
    agree = (taste[rows["user"]] * kind[rows["item"]]).sum(1)
    liked = rng.normal(size=n_items)[rows["item"]]
    clicks = 1 / (1 + np.exp(-(0.7 * agree + liked - 2)))
    buys = 1 / (1 + np.exp(-(0.5 * agree + 0.5 * liked - 4)))
    rows["click"] = (rng.random(n) < clicks).astype(int)
    rows["buy"] = rows["click"] * (rng.random(n) < buys).astype(int)
    rows["probability"] = clicks * buys
    rows["split"] = rng.choice(["train", "valid", "test"], n, p=[0.6, 0.2, 0.2])
    return rows


def area(labels: Any, scores: Any) -> float:
    """Area under the ROC curve."""
    curve, positive = AreaUnderCurve(), np.asarray(labels, float)
    curve.add(Tally.of(np.zeros(len(positive), int), np.asarray(scores), positive, 1 - positive))
    return curve.value


def config_of(folder: Path, name: str, seed: int, settings: list[str]) -> Config:
    """The settings of one of `MODELS` by its name; all else is chosen from the data."""
    changes = MODELS[name]
    columns = {"file": "log.csv", "user": "user", "item": "item", "split": "split"}
    roots = {"prepared_root": str(folder / "prepared"), "runs_root": str(folder / "runs")}
    run = {"name": name.replace(" ", "-").replace(",", ""), "seed": seed, "loggers": [], **roots}
    trainer = {setting.partition("=")[0]: int(setting.partition("=")[2]) for setting in settings}
    return config_from(
        {
            "run": run,
            "data": {
                "root": str(folder),
                "task": "ctr",
                "interactions": {**columns, **changes["interactions"]},
                "features": [
                    {"name": "user", "entity": "user"},
                    {"name": "item", "entity": "item"},
                ],
            },
            "model": {"linear": "none", **changes.get("model", {})},
            "trainer": trainer,
        }
    )


def main() -> None:
    """Prints the areas as a table, and their means as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("trainer", nargs="*", help="settings of the trainer: max_steps=20")
    arguments = parser.parse_args()
    areas = pd.DataFrame(
        index=range(arguments.seeds), columns=[*MODELS, "best possible"], dtype=float
    )
    with process_group("cpu") as world:
        for seed in areas.index:
            log = generate(arguments.rows, seed)
            test = log[log["split"] == "test"]
            areas.loc[seed, "best possible"] = area(test["buy"], test["probability"])
            for name in MODELS:
                with tempfile.TemporaryDirectory() as folder:
                    log.drop(columns="probability").to_csv(Path(folder, "log.csv"), index=False)
                    config = config_of(Path(folder), name, seed, arguments.trainer)
                    train_on(config, world)
                    result = evaluate_on(config, (), world)
                    assert result is not None
                    figure = "auc" if name == "buy alone" else "buy.auc"
                    areas.loc[seed, name] = result.rows[figure]
    print(areas.to_string(float_format="{:.4f}".format))
    print(json.dumps(areas.mean().round(4).to_dict()))


if __name__ == "__main__":
    main()
