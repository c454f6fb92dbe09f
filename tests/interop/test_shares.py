"""Shares of a model's parts, by the likelihood of labelled rows."""

import numpy as np
import pytest

from deepfm_dist.interop.shares import log_loss, mean_shares


def test_a_share_is_the_posterior_mean_under_a_uniform_prior() -> None:
    rng = np.random.default_rng(1)
    base, part = rng.normal(size=60), rng.normal(size=60)
    labels = (rng.random(60) < 0.4).astype(float)
    weights = rng.uniform(0.5, 1.5, 60)
    weights *= 60 / weights.sum()
    shares = np.linspace(0, 1, 2_001)
    probabilities = 1 / (1 + np.exp(-(base + shares[:, None] * part)))
    likelihoods = (np.where(labels == 1, probabilities, 1 - probabilities) ** weights).prod(1)
    expected = np.trapezoid(likelihoods * shares, shares) / np.trapezoid(likelihoods, shares)
    assert mean_shares(base, [part], labels, weights) == pytest.approx([expected], abs=1e-6)
    assert mean_shares(base, [part], labels, 7 * weights) == pytest.approx([expected], abs=1e-6)


def test_many_rows_find_the_true_shares_and_none_are_split_evenly() -> None:
    rng = np.random.default_rng(2)
    base, first, second = rng.normal(size=(3, 20_000))
    logits = base + 0.3 * first + 0.8 * second
    labels = (rng.random(20_000) < 1 / (1 + np.exp(-logits))).astype(float)
    shares = mean_shares(base, [first, second], labels, np.ones(20_000))
    assert shares == pytest.approx([0.3, 0.8], abs=0.05)
    nothing = np.zeros(20_000)
    assert mean_shares(base, [nothing], labels, np.ones(20_000)) == pytest.approx([0.5])
    assert mean_shares(base, [], labels, np.ones(20_000)) == []


@pytest.mark.parametrize("share", [0.0, 0.29])
def test_shares_of_many_rows_are_as_exact_as_those_of_few(share: float) -> None:
    rng = np.random.default_rng(3)
    base, part = rng.normal(size=(2, 100_000))
    labels = (rng.random(100_000) < 1 / (1 + np.exp(-base - share * part))).astype(float)
    shares = np.linspace(max(0, share - 0.05), min(1, share + 0.05), 201)
    losses = np.array([log_loss(base + s * part, labels, np.ones(100_000)) for s in shares])
    likelihoods = np.exp(-100_000 * (losses - losses.min()))
    expected = np.trapezoid(likelihoods * shares, shares) / np.trapezoid(likelihoods, shares)
    assert mean_shares(base, [part], labels, np.ones(100_000)) == pytest.approx(
        [expected], abs=2e-4
    )


def test_four_shares_that_depend_on_each_other_are_found() -> None:
    rng = np.random.default_rng(4)
    base, *parts = rng.normal(size=(5, 10_000))
    parts[1] = 0.8 * parts[0] + 0.6 * parts[1]
    logits = base + 0.9 * parts[0] + 0.1 * parts[1] + 0.5 * parts[2]
    labels = (rng.random(10_000) < 1 / (1 + np.exp(-logits))).astype(float)
    shares = mean_shares(base, parts, labels, np.ones(10_000))
    assert shares == pytest.approx([0.9, 0.1, 0.5, 0], abs=0.08)
    assert shares[0] + 0.8 * shares[1] == pytest.approx(0.98, abs=0.05)


def test_log_loss_is_a_weighted_mean() -> None:
    logits, labels = np.array([0.0, 2.0]), np.array([1.0, 0.0])
    expected = (np.log(2) + 3 * np.log(1 + np.exp(2))) / 4
    assert log_loss(logits, labels, np.array([1.0, 3.0])) == pytest.approx(expected)
