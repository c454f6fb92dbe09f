"""The synthetic data: what its files hold, that it is reproducible, that the truth ranks best."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from benchmarks.synthetic import (
    GENRES,
    NOTEBOOK,
    SAMPLE,
    SCORES_FILE,
    Generated,
    Population,
    generate,
    main,
    write,
)
from deepfm_dist.errors import DataError

COMMITTED = Path(__file__).parents[1] / "data" / "sample"
TEXT_FILES = ("genres.tsv", "titles.tsv", "train_ratings.csv", "years.tsv")

SMALL = Population(
    n_users=60,
    n_items=50,
    n_genres=6,
    n_interactions=700,
    latent_dim=4,
    seed=3,
    min_per_user=5,
    max_per_user=30,
    n_items_without_genre=2,
    n_unknown_items=1,
    n_repeats=3,
    with_scores=True,
)


@pytest.fixture(scope="module")
def sample() -> Generated:
    """The sample as drawn now."""
    return generate(SAMPLE)


@pytest.fixture(scope="module")
def ratings() -> pd.DataFrame:
    """The committed interactions."""
    return pd.read_csv(COMMITTED / "train_ratings.csv")


@pytest.fixture(scope="module")
def genres() -> pd.DataFrame:
    """The committed genres."""
    return pd.read_csv(COMMITTED / "genres.tsv", sep="\t")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Reproducible


def test_same_seed_gives_same_bytes(tmp_path: Path) -> None:
    write(SMALL, tmp_path / "a")
    write(SMALL, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert set(contents(tmp_path / "a")) == {*TEXT_FILES, SCORES_FILE}


def test_another_seed_gives_another_world(tmp_path: Path) -> None:
    write(SMALL, tmp_path / "a")
    write(replace(SMALL, seed=4), tmp_path / "b")
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert all(a[name] != b[name] for name in a)


def test_logits_do_not_depend_on_the_order_of_summation(sample: Generated) -> None:
    backwards = replace(
        sample,
        user_factors=sample.user_factors[:, ::-1].copy(),
        item_factors=sample.item_factors[:, ::-1].copy(),
    )
    one_by_one = np.concatenate([sample.logits(slice(u, u + 1)) for u in range(SAMPLE.n_users)])
    np.testing.assert_array_equal(backwards.logits(), sample.logits())
    np.testing.assert_array_equal(one_by_one, sample.logits())


def test_committed_sample_is_what_the_preset_generates(tmp_path: Path) -> None:
    write(SAMPLE, tmp_path / "sample")
    for name in TEXT_FILES:
        assert (tmp_path / "sample" / name).read_bytes() == (COMMITTED / name).read_bytes(), name
    # The parquet bytes may differ by writer version; the table may not.
    assert pq.read_table(tmp_path / "sample" / SCORES_FILE).equals(
        pq.read_table(COMMITTED / SCORES_FILE)
    )


# The sample's files


def test_sample_is_small() -> None:
    assert sum(path.stat().st_size for path in COMMITTED.iterdir()) < 2_000_000


def test_rows_are_exact_and_in_order(ratings: pd.DataFrame) -> None:
    assert list(ratings.columns) == ["user", "item", "time"]
    assert len(ratings) == SAMPLE.n_interactions + SAMPLE.n_repeats
    assert len(ratings.drop_duplicates(["user", "item"])) == SAMPLE.n_interactions
    assert ratings["user"].nunique() == SAMPLE.n_users
    assert ratings["item"].nunique() == SAMPLE.n_items
    assert ratings.equals(ratings.sort_values(["user", "time"], kind="stable"))
    assert ratings["time"].between(1_104_537_600, 1_450_000_000).all()


def test_ids_have_gaps(ratings: pd.DataFrame) -> None:
    for name in ("user", "item"):
        assert ratings[name].max() > 2 * ratings[name].nunique(), name


def test_activity_and_popularity_are_skewed(ratings: pd.DataFrame) -> None:
    distinct = ratings.drop_duplicates(["user", "item"])
    activity = distinct["user"].value_counts()
    assert activity.min() >= SAMPLE.min_per_user
    assert activity.max() <= SAMPLE.max_per_user
    assert activity.mean() > 1.2 * activity.median()
    popularity = distinct["item"].value_counts()
    assert popularity.iloc[: SAMPLE.n_items // 10].sum() > 0.25 * len(distinct)


def test_genres_miss_some_items_and_name_unknown_ones(
    ratings: pd.DataFrame, genres: pd.DataFrame
) -> None:
    items, named = set(ratings["item"]), set(genres["item"])
    assert len(items - named) == SAMPLE.n_items_without_genre
    assert len(named - items) == SAMPLE.n_unknown_items
    assert set(genres["genre"]) == set(GENRES)
    assert not genres.duplicated().any()
    assert genres["item"].value_counts().between(1, 4).all()
    assert genres["item"].is_monotonic_increasing


def test_titles_and_years_agree(ratings: pd.DataFrame) -> None:
    titles = pd.read_csv(COMMITTED / "titles.tsv", sep="\t")
    years = pd.read_csv(COMMITTED / "years.tsv", sep="\t")
    assert list(titles["item"]) == list(years["item"]) == sorted(set(ratings["item"]))
    assert titles["title"].is_unique
    assert list(titles["title"].str[-5:-1].astype(int)) == list(years["year"])
    assert years["year"].between(1915, 2014).all()


def test_scores_hold_the_true_logit_of_every_pair(sample: Generated) -> None:
    scores = pq.read_table(COMMITTED / SCORES_FILE)
    assert [str(kind) for kind in scores.schema.types] == ["int32", "int32", "float"]
    shape = SAMPLE.n_users, SAMPLE.n_items
    user, item, score = (column.to_numpy().reshape(shape) for column in scores.columns)
    assert (user == sample.user_ids[:, None]).all()
    assert (item == sample.item_ids).all()
    np.testing.assert_array_equal(score, sample.logits())


# The best ranking


def recall_at_10(
    scores: NDArray[np.float64], train: NDArray[np.bool_], test: NDArray[np.bool_]
) -> float:
    """Mean over users of the share of their test items among the 10 best unseen ones."""
    best = np.argsort(-np.where(train, -np.inf, scores), axis=1, kind="stable")[:, :10]
    relevant = test.sum(axis=1)
    hits = np.take_along_axis(test, best, axis=1).sum(axis=1)
    return float(np.mean(hits[relevant > 0] / relevant[relevant > 0]))


def test_popularity_then_a_linear_model_then_the_truth(sample: Generated) -> None:
    taken = np.zeros((SAMPLE.n_users, SAMPLE.n_items), np.bool_)
    taken[sample.user, sample.item] = True
    test = taken & (np.random.default_rng(0).random(taken.shape) < 0.2)
    train = taken & ~test
    popularity = np.broadcast_to(train.sum(axis=0).astype(np.float64), taken.shape)
    # EASE: the item-to-item ridge regression without self-weights, in closed form.
    seen = train.astype(np.float64)
    inverse = np.linalg.inv(seen.T @ seen + 200 * np.eye(SAMPLE.n_items))
    weights = inverse / -np.diag(inverse)
    np.fill_diagonal(weights, 0)

    by_popularity = recall_at_10(popularity, train, test)
    by_model = recall_at_10(seen @ weights, train, test)
    by_truth = recall_at_10(sample.logits(), train, test)
    assert by_model > 1.5 * by_popularity
    assert by_truth > by_model + 0.05
    assert by_truth > 2 * by_popularity


def test_draws_are_proportional_to_exp_logit() -> None:
    population = Population(
        n_users=40_000,
        n_items=4,
        n_genres=1,
        n_interactions=40_000,
        latent_dim=1,
        seed=0,
        min_per_user=1,
        max_per_user=1,
        affinity=0.0,
        popularity_shift=1.0,
    )
    drawn = generate(population)
    expected = np.exp(drawn.item_bias) / np.exp(drawn.item_bias).sum()
    share = np.bincount(drawn.item, minlength=4) / population.n_users
    # Four standard errors of a share of one half are 0.01; the logits' rounding adds 0.004.
    np.testing.assert_allclose(share, expected, atol=0.014)


# Other worlds


def test_notebook_has_the_published_size() -> None:
    size = NOTEBOOK.n_users, NOTEBOOK.n_items, NOTEBOOK.n_genres, NOTEBOOK.n_interactions
    assert size == (31_360, 6_807, 18, 5_154_471)
    assert (NOTEBOOK.min_per_user, NOTEBOOK.max_per_user) == (16, 2_900)
    assert NOTEBOOK.n_repeats == 0
    assert not NOTEBOOK.with_scores


@pytest.mark.parametrize(
    "population",
    [
        pytest.param(replace(SMALL, n_interactions=60 * 5), id="least"),
        pytest.param(replace(SMALL, n_interactions=60 * 30), id="most"),
        pytest.param(replace(SMALL, max_per_user=50, n_interactions=60 * 50), id="all"),
        pytest.param(replace(SMALL, popularity_exponent=9.0), id="steep"),
        pytest.param(replace(SMALL, n_genres=1, genre_share=1.0), id="one-genre"),
    ],
)
def test_counts_are_exact_at_the_limits(population: Population) -> None:
    drawn = generate(population)
    distinct = pd.DataFrame({"user": drawn.user, "item": drawn.item}).drop_duplicates()
    assert len(drawn.user) == population.n_interactions + population.n_repeats
    assert len(distinct) == population.n_interactions
    assert distinct["item"].nunique() == population.n_items
    activity = distinct["user"].value_counts()
    assert len(activity) == population.n_users
    assert activity.between(population.min_per_user, population.max_per_user).all()


def test_titles_stay_distinct_beyond_the_number_of_combinations() -> None:
    population = replace(
        SMALL, n_users=500, n_items=15_000, n_interactions=15_000, n_repeats=0, with_scores=False
    )
    assert len(set(generate(population).titles)) == population.n_items


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", -1),
        ("n_users", 0),
        ("n_genres", 19),
        ("latent_dim", 0),
        ("genre_share", 1.5),
        ("max_per_user", 51),
        ("min_per_user", 31),
        ("n_interactions", 60 * 5 - 1),
        ("n_interactions", 60 * 30 + 1),
        ("n_items_without_genre", 51),
        ("n_repeats", -1),
    ],
)
def test_impossible_worlds_are_refused(field: str, value: Any) -> None:
    with pytest.raises(DataError, match=f"{field} is {value}; give"):
        replace(SMALL, **{field: value})


# Writing


def test_write_leaves_only_its_files_and_no_scores_of_another_world(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "data"
    write(SMALL, folder)
    (folder / "notes.txt").write_text("kept")
    write(replace(SMALL, with_scores=False), folder)
    assert set(contents(folder)) == {*TEXT_FILES, "notes.txt"}
    assert [path.name for path in folder.parent.iterdir()] == ["data"]


def test_write_refuses_a_file_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(DataError, match=r"cannot write the data set to .*taken"):
        write(SMALL, tmp_path / "taken")


def test_command_writes_a_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "out"), "--preset", "sample", "--seed", "1"]) == 0
    assert "700 users, 400 items, 36005 rows, seed 1" in capsys.readouterr().out
    assert set(contents(tmp_path / "out")) == {*TEXT_FILES, SCORES_FILE}


def test_commands_print_errors_on_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "out"), "--seed", "-1"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert not (tmp_path / "out").exists()
