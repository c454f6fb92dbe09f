"""Random rankings and what another library says of them, for `test_ranking.py` to compare.

Neither library can stand among the development dependencies: they ask for other versions of numpy
and pandas. So this runs in an environment of the library's own, and what it writes is committed:

    pip install lenskit==2025.8.1 && python tests/oracles/ranking_metrics.py lenskit
    pip install rectools==0.19.0 && python tests/oracles/ranking_metrics.py rectools
"""

import argparse
import json
import random
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

CUTOFFS = (1, 3, 5, 10)
N_CASES, N_ITEMS = 12, 20


def draw(rng: random.Random) -> dict[str, Any]:
    """Some users' rankings of the longest cut-off, the items that were right, and who had which."""
    n_users = rng.randint(1, 8)
    items = range(N_ITEMS)
    seen = [rng.sample(items, rng.randint(1, N_ITEMS // 2)) for _ in range(n_users)]
    ranked = [rng.sample(items, max(CUTOFFS)) for _ in range(n_users)]
    relevant = [rng.sample(items, rng.choice([1, 2, 3, 5, 12])) for _ in range(n_users)]
    return {"ranked": ranked, "relevant": relevant, "seen": seen}


def by_lenskit(case: dict[str, Any]) -> dict[str, Any]:
    """Every user's figure by LensKit."""
    from lenskit.data import ItemList
    from lenskit.metrics import NDCG, Hit, LogRankWeight, Precision, Recall, RecipRank

    kinds = {
        "recall": Recall,
        # Its default gives the first two ranks the same weight, as the paper of 2002 does.
        "ndcg": partial(NDCG, weight=LogRankWeight(offset=1)),
        "hit_rate": Hit,
        "precision": Precision,
        "mrr": RecipRank,
    }
    users = list(zip(case["ranked"], case["relevant"], strict=True))
    return {
        f"{name}@{k}": [
            float(kind(k).measure_list(ItemList(ranked, ordered=True), ItemList(relevant)))
            for ranked, relevant in users
        ]
        for name, kind in kinds.items()
        for k in CUTOFFS
    }


def by_rectools(case: dict[str, Any]) -> dict[str, Any]:
    """Every user's figure by RecTools, and the coverage of the catalogue."""
    import pandas as pd
    from rectools import metrics

    def table(lists: list[list[int]]) -> Any:
        pairs = [(user, item) for user, items in enumerate(lists) for item in items]
        return pd.DataFrame(pairs, columns=["user_id", "item_id"])

    ranked, relevant, seen = (table(case[name]) for name in ("ranked", "relevant", "seen"))
    ranked["rank"] = ranked.groupby("user_id").cumcount() + 1
    actual: dict[str, Any] = {}
    for k in CUTOFFS:
        references = {
            "recall": metrics.Recall(k),
            "precision": metrics.Precision(k),
            "hit_rate": metrics.HitRate(k),
            "map": metrics.MAP(k),
            "ndcg": metrics.NDCG(k, divide_by_achievable=True),
            "mrr": metrics.MRR(k),
        }
        of_history = {
            "popularity": metrics.AvgRecPopularity(k),
            "novelty": metrics.MeanInvUserFreq(k),
        }
        for name, metric in references.items():
            actual[f"{name}@{k}"] = metric.calc_per_user(ranked, relevant).sort_index().tolist()
        for name, metric in of_history.items():
            actual[f"{name}@{k}"] = metric.calc_per_user(ranked, seen).sort_index().tolist()
        coverage = metrics.CatalogCoverage(k, normalize=True)
        actual[f"coverage@{k}"] = float(coverage.calc(ranked, list(range(N_ITEMS))))
    return actual


LIBRARIES = {"lenskit": by_lenskit, "rectools": by_rectools}


def main() -> None:
    """Writes the cases and the library's figures beside this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", choices=LIBRARIES)
    package = parser.parse_args().package
    rng = random.Random(7)
    cases = [draw(rng) for _ in range(N_CASES)]
    for case in cases:
        case["figures"] = LIBRARIES[package](case)
    written = {"library": f"{package} {version(package)}", "items": N_ITEMS, "cases": cases}
    Path(__file__).with_name(f"{package}.json").write_text(json.dumps(written) + "\n")


if __name__ == "__main__":
    main()
