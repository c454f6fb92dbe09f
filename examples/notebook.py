"""From a notebook: data frames in, data frames out, in ten lines.

    python examples/notebook.py

Cells are what `# %%` separates: editors that know them run this file cell by cell.
"""

# %% The bundled sample; any frames with users and items will do.
import pandas as pd

from deepfm_dist import fit

ratings = pd.read_csv("data/sample/train_ratings.csv")
films = pd.read_csv("data/sample/titles.tsv", sep="\t").set_index("item")
films["genre"] = pd.read_csv("data/sample/genres.tsv", sep="\t").groupby("item")["genre"].agg(list)

# %% Train: held-out rows, negatives and vocabularies are taken care of.
small = {"over_arch_layer_sizes": [64, 32]}
model = fit(ratings, time="time", items=films.reset_index(), model=small)

# %% Is it any good? Figures of the rows, and of the ranking next to popularity's.
evaluation = model.evaluate(k=[10])
print(evaluation.rows[["auc", "log_loss", "ne"]])
print(evaluation.rankings[["recall@10", "ndcg@10"]])
print(*evaluation.verdicts, sep="\n")

# %% What to watch next; model.report is the page with everything else.
best = model.recommend(k=3, users=[4, 6]).merge(films["title"], left_on="item_id", right_index=True)
print(best.sort_values(["user_id", "rank"]))
print(f"look at {model.report}")
