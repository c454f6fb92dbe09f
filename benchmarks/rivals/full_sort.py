"""RecBole ranks the whole catalogue by a DeepFM.

benchmarks/catalogue.py runs it in the rivals' environment. Its own trainer's full sort, as in its
evaluation: scores of a batch of users and all items, seen ones masked; then the best 10. Weights
are random. The last line is one JSON object.
"""

import argparse
import contextlib
import json
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch

K = 10


def main() -> None:
    """Times the best batch size's fastest runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=lambda text: [int(n) for n in text.split("-") if int(n)])
    parser.add_argument("--dim", type=int, required=True)
    parser.add_argument("--items", type=int, required=True)
    parser.add_argument("--seen", type=int, required=True, help="items that a user has seen")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    with contextlib.redirect_stdout(sys.stderr):
        rates = {size: pairs_per_s(args, size) for size in (1, 4, 32)}
    print(json.dumps({"pairs_per_s": max(rates.values()), "of_users_in_a_batch": rates}))


def pairs_per_s(args: argparse.Namespace, n_users: int) -> float:
    """For batches of this many users."""
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.model.context_aware_recommender.deepfm import DeepFM
    from recbole.trainer import Trainer

    rng = np.random.default_rng(0)
    # The first users between them have every item; each has one more, to be tested.
    every = np.array_split(rng.permutation(args.items), -(-args.items // args.seen))
    histories = [rng.choice(args.items, args.seen + 1, False) for _ in range(n_users)] + every
    users = np.repeat(np.arange(len(histories)), [len(items) for items in histories])
    items = np.concatenate(histories)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows"
        path.mkdir()
        pd.DataFrame({"user_id:token": users, "item_id:token": items}).to_csv(
            path / "rows.inter", sep="\t", index=False
        )
        pd.DataFrame(
            {
                "item_id:token": np.arange(args.items),
                "genre:token": rng.integers(0, 18, args.items),
            }
        ).to_csv(path / "rows.item", sep="\t", index=False)
        config = Config(
            model="DeepFM",
            dataset="rows",
            config_dict={
                "data_path": folder,
                "load_col": {"inter": ["user_id", "item_id"], "item": ["item_id", "genre"]},
                "embedding_size": args.dim,
                "mlp_hidden_size": args.layers,
                "dropout_prob": 0.0,
                "eval_batch_size": n_users * (args.items + 1),
                "eval_args": {
                    "split": {"LS": "test_only"},
                    "order": "RO",
                    "group_by": "user",
                    "mode": "full",
                },
                "metrics": ["Recall"],
                "topk": K,
                "valid_metric": f"Recall@{K}",
                "use_gpu": False,
                "show_progress": False,
                "checkpoint_dir": folder,
            },
        )
        dataset = create_dataset(config)
        train, _, test = data_preparation(config, dataset)
        trainer = Trainer(config, DeepFM(config, train.dataset).eval())
        trainer.item_tensor = dataset.get_item_feature()
        trainer.tot_item_num = dataset.item_num
        batch = next(iter(test))
        assert len(batch[0]) == n_users

        def run() -> None:
            _, scores, *_ = trainer._full_sort_batch_eval(batch)
            torch.topk(scores, K)

        clock = time.process_time if args.threads == 1 else time.perf_counter
        best, end = float("inf"), time.perf_counter() + args.seconds / 3
        with torch.no_grad():
            run()
            while time.perf_counter() < end:
                start = clock()
                run()
                best = min(best, clock() - start)
    return n_users * args.items / best


if __name__ == "__main__":
    main()
