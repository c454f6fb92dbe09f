"""What people look at: tables in plain text."""

from collections.abc import Mapping

import pandas as pd
import pyarrow.parquet as pq

from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.vocabulary import external
from deepfm_dist.ranking.output import Written

SHOWN_OWNERS, SHOWN_ITEMS = 3, 10


def metrics_table(
    split: str, rows: Mapping[str, float], rankings: Mapping[str, Mapping[str, float]]
) -> str:
    """Figures on rows, and rankings side by side."""
    figures = pd.Series(dict(rows)).map("{:.4f}".format)
    text = f"{split} rows\n{figures.to_string()}"
    if rankings:
        frame = pd.DataFrame(rankings).T.map("{:.4f}".format)
        text += f"\n\n{split} rankings, whole catalogue\n{frame.to_string()}"
    return text


def ranking_table(written: Written, dataset: PreparedDataset) -> str:
    """The first users' (or items') items by title, and the files."""
    shown = pq.read_table(written.parquet).slice(0, SHOWN_OWNERS * written.k).to_pandas()
    owner, item = shown.columns[:2]
    titles = dataset.titles()
    if titles is not None:
        ids = external(dataset.entity_ids("item").slice(1)).to_pylist()
        by_id = dict(zip(ids, titles.slice(1).to_pylist(), strict=True))
        shown["title"] = shown[item].map(by_id)
    kind = owner.removesuffix("_id")
    blocks = []
    for one in shown[owner].drop_duplicates().head(SHOWN_OWNERS):
        rows = shown[shown[owner] == one].head(SHOWN_ITEMS)
        rows = rows.drop(columns=owner).set_index("rank")
        blocks.append(f"{kind} {one}\n{rows.to_string(float_format='{:.4f}'.format)}")
    total = f"{written.owners:,} {kind}s, {written.rows:,} rows"
    files = f"written: {written.csv}\nwritten: {written.parquet}"
    return "\n\n".join([*blocks, f"{total}\n{files}"])
