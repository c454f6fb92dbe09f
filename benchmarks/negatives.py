"""How fast negatives are drawn: the notebook's shape, one thread.

50 and 200 distinct negatives for each of 31,360 users, none of them one of the user's items, from
the generated notebook world; the fastest of several draws counts, and compiling does not. The
notebook's own way, a pandas filter, `np.random.choice` and a `concat` for each user, is timed on
the first users and extrapolated by its number of users, which flatters it: its `concat` slows down
with every user.

    python benchmarks/negatives.py
"""

import argparse
import json
import platform
import shlex
import sys
import time
from importlib.metadata import version

import numpy as np
import pandas as pd
from synthetic import PRESETS, generate

from deepfm_dist.data.jagged import Jagged
from deepfm_dist.data.negatives import draw_distinct

REPEATS = 7


def notebook_seconds(history: Jagged, n_items: int, users: int, per_user: int) -> float:
    """Seconds of the notebook's loop over the first users."""
    owners = np.repeat(np.arange(len(history)), history.lengths)
    ratings = pd.DataFrame({"user": owners, "item": history.values})
    everything = set(range(n_items))
    found = pd.DataFrame()
    begun = time.perf_counter()
    for user in range(users):
        mine = set(ratings[ratings["user"] == user]["item"])
        drawn = np.random.choice(list(everything - mine), per_user, replace=False)
        piece = pd.DataFrame({"user": [user] * per_user, "item": drawn, "rating": [0] * per_user})
        found = pd.concat([found, piece], axis=0, sort=False)
    assert len(found) == users * per_user
    return time.perf_counter() - begun


def fastest(per_user: int, history: Jagged, n_items: int) -> float:
    """Seconds of the quickest of several draws, after one that compiles; checks the result."""
    drawn = draw_distinct(per_user, history, n_items, seed=0)
    taken = np.zeros(n_items, bool)
    for user, items in enumerate(drawn):
        taken[:] = False
        taken[history.values[history.offsets[user] : history.offsets[user + 1]]] = True
        assert not taken[items].any()
        taken[items] = True
        assert taken.sum() == history.lengths[user] + per_user
    seconds = []
    for seed in range(1, REPEATS + 1):
        begun = time.perf_counter()
        draw_distinct(per_user, history, n_items, seed)
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--notebook-users", type=int, default=300, help="part of its loop to time")
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {platform.platform()}")
    print(f"python {platform.python_version()}, numpy {np.__version__}, numba {version('numba')}")
    print(f"command: {shlex.join(sys.argv)}")
    world = PRESETS["notebook"]
    drawn = generate(world)
    history = Jagged.from_pairs(drawn.user, drawn.item, world.n_users).sorted()
    part = notebook_seconds(history, world.n_items, arguments.notebook_users, 50)
    whole = part * world.n_users / arguments.notebook_users
    print(f"the notebook's loop: {part:.2f} s for {arguments.notebook_users} users")
    figures = {
        "seconds_50": round(fastest(50, history, world.n_items), 4),
        "seconds_200": round(fastest(200, history, world.n_items), 4),
        "notebook_seconds_50": round(whole, 1),
    }
    print(f"the notebook's loop takes {whole / figures['seconds_50']:,.0f} times as long")
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
