"""The seeded generator of data sets whose best ranking is known.

A `Population` describes users and items by a dozen numbers; `generate` draws it and
`write` lays it out as the files the pipeline reads. Every pair has a true log-odds

    logit(u, i) = log-popularity(i) + <p_u, q_i>

where the item vector q_i is part the vectors of its genres and part its own. A user's items are
drawn without replacement with probability proportional to exp(logit), so no ranking of the items
a user has not yet taken can be expected to beat the ranking by logit: it is the ceiling against
which a trained model is measured.

The same population gives the same data everywhere. Vectors and log-popularities are rounded to
multiples of 1/256, so that a float64 dot product is exact in any order of summation, and
only numpy's elementary draws (uniform, normal, exponential) are used, which releases keep stable.

    python benchmarks/synthetic.py OUT --preset sample
"""

import argparse
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray
from tqdm import tqdm

from deepfm_dist.errors import DataError, DeepFMError

GENRES = (
    "Drama",
    "Comedy",
    "Thriller",
    "Action",
    "Romance",
    "Crime",
    "Adventure",
    "Sci-Fi",
    "Horror",
    "Fantasy",
    "Children",
    "Mystery",
    "War",
    "Animation",
    "Musical",
    "Documentary",
    "Western",
    "Film-Noir",
)
"""Genre names, the most common first."""

MAX_GENRES_PER_ITEM = 4
FACTOR_STEP = 1 / 256
LOGIT_STEP = 1 / 64
BLOCK_USERS = 256

_ADJECTIVES = (
    "Amber Ancient Bitter Blue Borrowed Brave Broken Burning Crimson Crooked Distant Electric "
    "Empty Endless Fading Falling Forgotten Frozen Gentle Golden Hidden Hollow Iron Last Little "
    "Lonely Long Lost Lucky Midnight Paper Patient Quiet Restless Scarlet Second Secret Silent "
    "Silver Velvet Wandering Wild"
)
_NOUNS = (
    "Bell Bridge Captain Carnival City Clock Country Daughter Doctor Door Empire Garden Ghost "
    "Harbor Heart Horizon Hotel House Island Journey King Lantern Letter Lighthouse Machine "
    "Mirror Moon Mountain Orchard Painter Promise Rain Rider River Road Season Shadow Stranger "
    "Summer Thief Train Winter"
)
_TAILS = (
    "",
    " at Dawn",
    " by the Sea",
    " in the Snow",
    " of the North",
    " Returns",
    " under Glass",
    " without a Name",
)

# The span of the invented calendar: a user's first interaction falls in the ten years from
# 2005-01-01 00:00 UTC, and an item came out in one of the hundred years up to 2014.
_FIRST_SECOND = 1_104_537_600
_SPAN_SECONDS = 10 * 365 * 86_400
_LAST_YEAR = 2014
_REPEAT_AFTER_SECONDS = 3_600

SCORES_FILE = "best_possible.parquet"


@dataclass(frozen=True)
class Population:
    """A population of users and items, and how strongly it prefers.

    Attributes:
        n_users: Users, each with at least `min_per_user` interactions.
        n_items: Items, each with at least one interaction.
        n_genres: Genres in use, at most 18.
        n_interactions: Distinct (user, item) pairs, exactly.
        latent_dim: Length of the user and item vectors.
        seed: Seed of every draw, at least 0.
        min_per_user: Fewest distinct items of a user.
        max_per_user: Most distinct items of a user.
        activity_sigma: Standard deviation of a user's log-activity before it is clipped.
        popularity_exponent: Popularity falls as (rank + shift) to the minus this power.
        popularity_shift: Flattens the head of the power law; 1, the least, leaves it pure.
        affinity: Standard deviation of <p_u, q_i>, in units of log-odds.
        genre_share: Part of the variance of q_i that its genres explain, 0 to 1.
        n_items_without_genre: Items that `genres.tsv` leaves out.
        n_unknown_items: Items that only `genres.tsv` names, in one row each.
        n_repeats: Rows of `train_ratings.csv` that repeat an earlier pair at a later time.
        with_scores: Whether `write` adds the true logit of every pair.

    Raises:
        DataError: If the numbers contradict each other.
    """

    n_users: int
    n_items: int
    n_genres: int
    n_interactions: int
    latent_dim: int
    seed: int
    min_per_user: int
    max_per_user: int
    activity_sigma: float = 0.9
    popularity_exponent: float = 1.3
    popularity_shift: float = 20.0
    affinity: float = 1.5
    genre_share: float = 0.5
    n_items_without_genre: int = 0
    n_unknown_items: int = 0
    n_repeats: int = 0
    with_scores: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers that no population can have."""
        lowest = max(self.n_items, self.n_users * self.min_per_user)
        bounds = {
            "n_users": (1, math.inf),
            "n_items": (1, math.inf),
            "n_genres": (1, len(GENRES)),
            "latent_dim": (1, math.inf),
            "seed": (0, math.inf),
            "max_per_user": (1, self.n_items),
            "min_per_user": (1, self.max_per_user),
            "n_interactions": (lowest, self.n_users * self.max_per_user),
            "popularity_shift": (1, math.inf),
            "genre_share": (0, 1),
            "n_items_without_genre": (0, self.n_items),
            "n_unknown_items": (0, math.inf),
            "n_repeats": (0, self.n_interactions),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise DataError(
                    f"impossible synthetic population: {name} is {value}; give {low} to {high}"
                )


SAMPLE = Population(
    n_users=700,
    n_items=400,
    n_genres=18,
    n_interactions=36_000,
    latent_dim=8,
    seed=20240,
    min_per_user=12,
    max_per_user=220,
    activity_sigma=0.8,
    popularity_exponent=1.4,
    popularity_shift=12.0,
    affinity=2.2,
    n_items_without_genre=3,
    n_unknown_items=2,
    n_repeats=5,
    with_scores=True,
)
"""A population for tests and first runs, small enough to live in the repository."""

NOTEBOOK = Population(
    n_users=31_360,
    n_items=6_807,
    n_genres=18,
    n_interactions=5_154_471,
    latent_dim=16,
    seed=20240,
    min_per_user=16,
    max_per_user=2_900,
)
"""A population of the size of the AI Stages movie data, for timings and full-size runs."""

PRESETS = {"sample": SAMPLE, "notebook": NOTEBOOK}


@dataclass(frozen=True)
class Generated:
    """What was drawn; users and items are numbered 0, 1, ... in the order of their external ids.

    Attributes:
        population: What was drawn.
        user_ids: (n_users,) int64, ascending external ids with gaps.
        item_ids: (n_items,) int64, ascending external ids with gaps.
        user: (n_interactions + n_repeats,) int32, the user of each row, ascending.
        item: (n_interactions + n_repeats,) int32, the item of each row.
        time: (n_interactions + n_repeats,) int64, Unix seconds, ascending within a user.
        genres: (n_items, 4) int8, genres of each item, main one first; -1 fills the rest, and
            the whole row of an item without genre.
        titles: n_items distinct titles, each ending in its year.
        years: (n_items,) int16, year of each item.
        unknown_item_ids: (n_unknown_items,) int64, external ids only `genres.tsv` names.
        item_bias: (n_items,) float64, log-popularity, of mean about 0.
        user_factors: (n_users, latent_dim) float64, the vectors p_u.
        item_factors: (n_items, latent_dim) float64, the vectors q_i.
    """

    population: Population
    user_ids: NDArray[np.int64]
    item_ids: NDArray[np.int64]
    user: NDArray[np.int32]
    item: NDArray[np.int32]
    time: NDArray[np.int64]
    genres: NDArray[np.int8]
    titles: list[str]
    years: NDArray[np.int16]
    unknown_item_ids: NDArray[np.int64]
    item_bias: NDArray[np.float64]
    user_factors: NDArray[np.float64]
    item_factors: NDArray[np.float64]

    def logits(self, users: slice = slice(None)) -> NDArray[np.float64]:
        """Return the true log-odds, up to a constant per user, of some users and all items.

        Args:
            users: Which users, by number.

        Returns:
            (users, n_items) float64, multiples of 1/64.
        """
        return _logits(self.user_factors[users], self.item_factors, self.item_bias)


def generate(population: Population, progress: bool = False) -> Generated:
    """Draw a population.

    Args:
        population: What to draw.
        progress: Whether to show a progress bar where standard error is a terminal.

    Returns:
        The population's users, items, interactions and true preferences.
    """
    # A stream for each part, so that a change to one part leaves the draws of the others alone.
    streams = np.random.SeedSequence(population.seed).spawn(6)
    ids, tastes, activity, choices, calendar, names = map(np.random.default_rng, streams)

    user_ids = _external_ids(population.n_users, 4, ids)
    listed_ids = _external_ids(population.n_items + population.n_unknown_items, 16, ids)
    unknown = np.sort(_sample(len(listed_ids), population.n_unknown_items, ids))
    item_ids = np.delete(listed_ids, unknown)

    genres = _draw_genres(population, tastes)
    item_factors = _draw_item_factors(population, genres, tastes)
    user_factors = _round_to(
        FACTOR_STEP,
        population.affinity * tastes.standard_normal((population.n_users, population.latent_dim)),
    )
    rank = np.argsort(tastes.random(population.n_items))
    bias = -population.popularity_exponent * np.log(rank + population.popularity_shift)
    item_bias = _round_to(FACTOR_STEP, bias - bias.mean())
    genres[_sample(population.n_items, population.n_items_without_genre, tastes)] = -1

    counts = _draw_activity(population, activity)
    item = _draw_items(user_factors, item_factors, item_bias, counts, choices, progress)
    _place_missing_items(item, population.n_items, choices)
    user = np.repeat(np.arange(population.n_users, dtype=np.int32), counts)
    user, item, time = _draw_times(population, user, item, counts, calendar)

    # Squared, an age is mostly small: recent years have the most films.
    years = _LAST_YEAR - (100 * names.random(population.n_items) ** 2).astype(np.int16)
    return Generated(
        population=population,
        user_ids=user_ids,
        item_ids=item_ids,
        user=user,
        item=item,
        time=time,
        genres=genres,
        titles=_draw_titles(years, names),
        years=years,
        unknown_item_ids=listed_ids[unknown],
        item_bias=item_bias,
        user_factors=user_factors,
        item_factors=item_factors,
    )


def write(
    population: Population, folder: str | os.PathLike[str], progress: bool = False
) -> Generated:
    """Draw a population and write it in the layout of the AI Stages movie data.

    The files are finished in a temporary folder next to `folder` and then renamed into it, so a
    reader never meets half a file. Files of the same names are replaced; others are left alone.

    Args:
        population: What to draw.
        folder: Where the files go; created if missing.
        progress: Whether to show a progress bar where standard error is a terminal.

    Returns:
        The population as drawn.

    Raises:
        DataError: If the files cannot be written.
    """
    target = Path(folder).absolute()
    drawn = generate(population, progress)
    try:
        target.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            _write_files(drawn, staging)
            if not population.with_scores:
                # Scores of an earlier population would be taken for those of this one.
                (target / SCORES_FILE).unlink(missing_ok=True)
            for path in sorted(staging.iterdir()):
                os.replace(path, target / path.name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"cannot write the data set to {target}: {error.strerror or error}; "
            "give a folder that can be written"
        ) from error
    return drawn


def _round_to(step: float, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Round to multiples of a power of two, so that later sums and products are exact."""
    rounded: NDArray[np.float64] = np.rint(values / step) * step
    return rounded


def _sample(n: int, k: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return k distinct numbers below n, in random order, (k,) int64."""
    return np.argsort(rng.random(n))[:k]


def _external_ids(n: int, mean_gap: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return n ascending ids with gaps, as a catalogue has after years of removals, (n,) int64."""
    gaps = 1 + np.floor((mean_gap - 1) * rng.standard_exponential(n))
    return np.cumsum(gaps.astype(np.int64))


def _draw_genres(population: Population, rng: np.random.Generator) -> NDArray[np.int8]:
    """Return 1 to 4 distinct genres of each item, main one first, (n_items, 4) int8, -1 padded."""
    how_many = 1 + np.searchsorted([0.35, 0.70, 0.90], rng.random(population.n_items), side="right")
    # The smallest of exponential variables divided by weights is a draw without replacement.
    # Taken by weight, common genres come first the more often, as they do in real catalogues.
    race = rng.standard_exponential((population.n_items, population.n_genres))
    race *= np.arange(population.n_genres) + 2.0
    genres = np.full((population.n_items, MAX_GENRES_PER_ITEM), -1, np.int8)
    drawn = np.argsort(race, axis=1)[:, :MAX_GENRES_PER_ITEM]
    kept = np.arange(drawn.shape[1]) < how_many[:, None]
    genres[:, : drawn.shape[1]] = np.where(kept, drawn, -1)
    return genres


def _draw_item_factors(
    population: Population, genres: NDArray[np.int8], rng: np.random.Generator
) -> NDArray[np.float64]:
    """Return item vectors of about unit length, (n_items, latent_dim) float64."""

    def unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
        scaled: NDArray[np.float64] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return scaled

    genre_vectors = unit(rng.standard_normal((population.n_genres, population.latent_dim)))
    # The main genre counts most: 1, 1/2, 1/3, 1/4.
    weights = (genres >= 0) / np.arange(1.0, MAX_GENRES_PER_ITEM + 1)
    shared = unit(np.einsum("ik,ikd->id", weights, genre_vectors[genres]))
    own = unit(rng.standard_normal((population.n_items, population.latent_dim)))
    share = population.genre_share
    return _round_to(FACTOR_STEP, np.sqrt(share) * shared + np.sqrt(1 - share) * own)


def _draw_activity(population: Population, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return the distinct items of each user, clipped log-normal with the exact total.

    Returns:
        (n_users,) int64 that sums to `n_interactions`.
    """
    shape = population.activity_sigma * rng.standard_normal(population.n_users)

    def counts_at(location: float) -> NDArray[np.int64]:
        counts = np.clip(np.exp(location + shape), population.min_per_user, population.max_per_user)
        return counts.astype(np.int64)

    # The total grows with the location, so halving finds the last location not above the target.
    low, high = -50.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        if counts_at(middle).sum() <= population.n_interactions:
            low = middle
        else:
            high = middle
    counts = counts_at(low)
    # Whole numbers leave a little over, or more where a tie jumps: one each to users with room.
    while missing := population.n_interactions - int(counts.sum()):
        counts[np.flatnonzero(counts < population.max_per_user)[:missing]] += 1
    return counts


def _logits(
    users: NDArray[np.float64], items: NDArray[np.float64], bias: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return log-popularity plus affinity, (users, items) float64.

    Rounded coarsely enough for a float32 to hold every value and a parquet dictionary to list
    them; since the draws use the rounded values, they are the truth and not a copy of it.
    """
    return _round_to(LOGIT_STEP, users @ items.T + bias)


def _draw_items(
    user_factors: NDArray[np.float64],
    item_factors: NDArray[np.float64],
    item_bias: NDArray[np.float64],
    counts: NDArray[np.int64],
    rng: np.random.Generator,
    progress: bool,
) -> NDArray[np.int32]:
    """Draw each user's items without replacement, with probability proportional to exp(logit).

    Returns:
        (sum of counts,) int32, user after user, ascending within a user.
    """
    chosen = np.empty(int(counts.sum()), np.int32)
    end = 0
    n_users = len(user_factors)
    # All users at once would need (n_users, n_items) floats; a block stays in the cache instead.
    blocks = range(0, n_users, BLOCK_USERS)
    for first in tqdm(blocks, "drawing", unit="block", disable=None if progress else True):
        block = slice(first, first + BLOCK_USERS)
        logits = _logits(user_factors[block], item_factors, item_bias)
        # Gumbel top-k as a race: the k first arrivals at rates exp(logit).
        arrivals = rng.standard_exponential(logits.shape) * np.exp(-logits)
        for row, count in zip(arrivals, counts[block], strict=True):
            begin, end = end, end + int(count)
            # Sorted, because the order in which a partition leaves its part differs by machine.
            chosen[begin:end] = np.sort(np.argpartition(row, count - 1)[:count])
    return chosen


def _place_missing_items(item: NDArray[np.int32], n_items: int, rng: np.random.Generator) -> None:
    """Give each undrawn item the place of a random row whose item occurs elsewhere, too.

    Args:
        item: (n_interactions,) int32, changed in place.
        n_items: How many items must appear.
        rng: Where the rows are drawn from.
    """
    counts = np.bincount(item, minlength=n_items)
    for missing in np.flatnonzero(counts == 0):
        row = int(rng.random() * len(item))
        while counts[item[row]] < 2:
            row = int(rng.random() * len(item))
        counts[item[row]] -= 1
        counts[missing] += 1
        item[row] = missing


def _draw_times(
    population: Population,
    user: NDArray[np.int32],
    item: NDArray[np.int32],
    counts: NDArray[np.int64],
    rng: np.random.Generator,
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]:
    """Put each user's items in a random order, date them, and add the repeated rows.

    Returns:
        user int32, item int32 and time int64 (Unix seconds), each of n_interactions + n_repeats
        rows, sorted by user and then time.
    """
    item = item[np.lexsort((rng.random(len(item)), user))]
    start = _FIRST_SECOND + (_SPAN_SECONDS * rng.random(population.n_users)).astype(np.int64)
    # Cubed, a gap is mostly seconds and now and then hours: people rate in bursts.
    gap = rng.standard_exponential(len(item))
    elapsed = np.cumsum(1 + (20 * gap * gap * gap).astype(np.int64))
    first_row = np.cumsum(counts) - counts
    time = elapsed + np.repeat(start - elapsed[first_row], counts)

    again = (
        _sample(len(item), population.n_repeats, rng)
        if population.n_repeats
        else np.empty(0, np.int64)
    )
    user = np.concatenate([user, user[again]])
    item = np.concatenate([item, item[again]])
    time = np.concatenate([time, time[again] + _REPEAT_AFTER_SECONDS])
    if population.n_repeats:
        order = np.lexsort((time, user))
        user, item, time = user[order], item[order], time[order]
    return user, item, time


def _draw_titles(years: NDArray[np.int16], rng: np.random.Generator) -> list[str]:
    """Return a distinct title for each year, such as `The Silent River at Dawn (1994)`."""
    adjectives, nouns = _ADJECTIVES.split(), _NOUNS.split()
    shape = len(adjectives), len(nouns), len(_TAILS)
    combinations = int(np.prod(shape))
    # Beyond the number of combinations come second parts, third parts and so on.
    parts = 1 + (len(years) - 1) // combinations
    titles = []
    drawn = _sample(parts * combinations, len(years), rng)
    for number, year in zip(drawn, years, strict=True):
        part, combination = divmod(int(number), combinations)
        adjective, noun, tail = np.unravel_index(combination, shape)
        title = f"The {adjectives[adjective]} {nouns[noun]}{_TAILS[tail]}"
        titles.append(f"{title} Part {part + 1} ({year})" if part else f"{title} ({year})")
    return titles


def _write_files(drawn: Generated, folder: Path) -> None:
    """Write every file of a drawn population into a folder.

    Raises:
        OSError: If a file cannot be written.
    """
    item_ids = drawn.item_ids
    ratings = {
        "user": drawn.user_ids[drawn.user],
        "item": item_ids[drawn.item],
        "time": drawn.time,
    }
    _write_text(folder / "train_ratings.csv", ",", ratings)

    # Row by row, so the main genre of an item comes first, and stays so in a stable sort.
    which, place = np.nonzero(drawn.genres >= 0)
    genre_items = np.concatenate([item_ids[which], drawn.unknown_item_ids])
    # Nothing more is known of an unknown item, so their genres are assigned in turn.
    unknown_genres = np.arange(len(drawn.unknown_item_ids)) % drawn.population.n_genres
    genre_codes = np.concatenate([drawn.genres[which, place], unknown_genres])
    by_item = np.argsort(genre_items, kind="stable")
    names = np.array(GENRES)[genre_codes[by_item]]
    _write_text(folder / "genres.tsv", "\t", {"item": genre_items[by_item], "genre": names})
    _write_text(folder / "titles.tsv", "\t", {"item": item_ids, "title": drawn.titles})
    _write_text(folder / "years.tsv", "\t", {"item": item_ids, "year": drawn.years})

    if drawn.population.with_scores:
        columns = {
            "user": np.repeat(drawn.user_ids, len(item_ids)).astype(np.int32),
            "item": np.tile(item_ids, len(drawn.user_ids)).astype(np.int32),
            "score": drawn.logits().ravel().astype(np.float32),
        }
        pa.parquet.write_table(
            pa.table(columns), folder / SCORES_FILE, compression="zstd", compression_level=19
        )


def _write_text(path: Path, delimiter: str, columns: dict[str, Any]) -> None:
    """Write columns of equal length as delimited text, unquoted and under a header line."""
    # The header by hand, because the writer quotes it in every quoting style.
    options = pa.csv.WriteOptions(include_header=False, delimiter=delimiter, quoting_style="none")
    with path.open("wb") as file:
        file.write(f"{delimiter.join(columns)}\n".encode())
        pa.csv.write_csv(pa.table(columns), file, options)


def main(argv: Sequence[str] | None = None) -> int:
    """Write a preset population to a folder, as the command line says.

    Args:
        argv: Arguments; those of the process if None.

    Returns:
        The exit status: 0, or 2 after an error, which takes one line.
    """
    parser = argparse.ArgumentParser(
        prog="python benchmarks/synthetic.py", description="Write a synthetic data set."
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write to")
    parser.add_argument("--preset", choices=PRESETS, default="sample", help="what to draw")
    parser.add_argument("--seed", type=int, help="another seed than the preset's")
    arguments = parser.parse_args(argv)
    try:
        population = PRESETS[arguments.preset]
        if arguments.seed is not None:
            population = replace(population, seed=arguments.seed)
        drawn = write(population, arguments.out, progress=True)
    except DeepFMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{arguments.out}: {population.n_users} users, {population.n_items} items, "
        f"{len(drawn.user)} rows, seed {population.seed}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
