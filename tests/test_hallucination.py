"""Rates, detectors' scores and the feature likelihood, against closed forms and counts by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from experiments.oracles.likelihood import feature_likelihood, fitted_log_variances
from experiments.sharpen.hallucination import detectable_difference, hallucination, threshold
from fieldsmith.measure.hallucination import auroc, coverage, tpr_at
from fieldsmith.measure.intervals import wilson
from tests.drawn import seeded


def flagged(k: int, n: int) -> Tensor:
    return torch.arange(n) < k


def test_the_pooled_rate_is_wilsons_and_the_clustered_one_is_wider_where_seeds_differ():
    alike = hallucination([flagged(30, 100)] * 6, seeded())
    assert alike.pooled == wilson(180, 600)
    assert alike.by_seed == (0.3,) * 6 and alike.images == (100,) * 6
    apart = hallucination([flagged(k, 100) for k in (5, 10, 25, 35, 45, 60)], seeded())
    assert apart.pooled == alike.pooled
    assert alike.clustered is not None and apart.clustered is not None
    wide, narrow = (c.high - c.low for c in (apart.clustered, alike.clustered))
    assert wide > 2.5 * narrow
    assert narrow == pytest.approx(alike.pooled.high - alike.pooled.low, rel=0.1)
    assert apart.clustered.n == 6 and str(apart.clustered).startswith("30.0% [")
    assert apart.detectable > 2 * alike.detectable
    json.dumps(apart.to_json())


def test_six_hundred_images_cannot_tell_small_differences():
    found = hallucination([flagged(30, 100)] * 6, seeded())
    assert detectable_difference(math.sqrt(0.3 * 0.7 / 600)) == pytest.approx(0.0741, abs=1e-4)
    assert found.detectable == pytest.approx(0.0741, rel=0.05)
    none = hallucination([flagged(0, 100)], seeded())
    assert none.clustered is None and none.pooled.value == 0 and none.detectable > 0.02


def test_the_clustered_interval_covers_the_rate_of_a_population_of_seeds():
    generator, covered, seeds, pooled = seeded(1), 0, 12, 0
    for trial in range(200):
        rates = (0.2 + 0.08 * torch.randn(seeds, generator=generator)).clamp(0.01, 0.99)
        flags = [torch.rand(100, generator=generator) < rate for rate in rates]
        found = hallucination(flags, seeded(trial), draws=300)
        assert found.clustered is not None
        covered += found.clustered.low <= 0.2 <= found.clustered.high
        pooled += found.pooled.low <= 0.2 <= found.pooled.high
    assert 0.88 <= covered / 200 <= 0.99
    assert pooled < covered - 20  # images of one seed are not independent


def test_unreadable_images_count_as_hallucinated():
    found = hallucination([flagged(10, 50)], seeded(), [flagged(4, 50)])
    assert found.unreadable == wilson(4, 50)
    with pytest.raises(ValueError, match="unreadable"):
        hallucination([flagged(10, 50)], seeded(), [flagged(14, 50)])
    with pytest.raises(ValueError, match="every seed"):
        hallucination([], seeded())


def test_contents_of_valid_images():
    assert coverage("aabbc", 4).share == 0.75
    many = torch.randint(10_000, (5000,), generator=seeded()).tolist()
    assert coverage(many, 10_000).relative == pytest.approx(1, abs=0.03)
    assert coverage([i // 2 for i in range(5000)], 10_000).relative == pytest.approx(0.635, abs=0.01)
    assert coverage([1, 1], 1).relative == 1
    with pytest.raises(ValueError, match="valid images only"):
        coverage("abc", 2)


def test_a_detectors_scores_with_ties_are_counted_by_hand():
    scores = torch.tensor([3.0, 2.0, 2.0, 1.0, 0.0, 0.0])
    labels = torch.tensor([True, True, False, False, True, False])
    assert auroc(scores, labels) == pytest.approx((3 + 2.5 + 0.5) / 9)
    assert tpr_at(scores, labels, 0.0) == pytest.approx(1 / 3)
    assert tpr_at(scores, labels, 0.34) == pytest.approx(2 / 3)


def test_curves_need_both_labels_and_numbers():
    with pytest.raises(ValueError, match="same label"):
        auroc(torch.zeros(3), torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="NaN"):
        auroc(torch.tensor([0.0, math.nan]), torch.tensor([True, False]))
    with pytest.raises(ValueError, match="bool"):
        auroc(torch.zeros(3), torch.zeros(3))
    assert tpr_at(torch.tensor([0.0, 1.0]), torch.tensor([True, False])) == 0


def test_the_conformal_threshold_holds_its_false_alarms_on_average():
    generator, alarms = seeded(), []
    for _ in range(3000):
        scores = torch.rand(60, generator=generator, dtype=torch.float64)
        alarms.append(1 - threshold(scores, 0.05))  # of uniform scores
    rate = torch.tensor(alarms)
    assert float(rate.mean()) <= 0.05 + 4 * float(rate.std()) / math.sqrt(3000)
    assert float(rate.mean()) == pytest.approx(1 - 58 / 61, abs=0.003)
    assert threshold(torch.arange(19.0), 0.05) == 18
    with pytest.raises(ValueError, match="19 or more"):
        threshold(torch.arange(18.0), 0.05)


# feature likelihood


def cloud(n: int, seed: int, deviation: float = 1.0, shift: float = 0.0, d: int = 8) -> Tensor:
    return deviation * torch.randn(n, d, generator=seeded(seed), dtype=torch.float64) + shift


def clusters(n: int, seed: int, kept: int = 4) -> Tensor:
    """The first `kept` of four clusters."""
    places = torch.eye(4, 8, dtype=torch.float64) * 4
    return places[torch.arange(n) % kept] + cloud(n, seed)


def test_the_feature_likelihood_orders_generators():
    train, test = clusters(600, 0), clusters(300, 1)

    def value(made: Tensor) -> float:
        return feature_likelihood(train, test, made, seeded(9)).value

    good = value(clusters(300, 2))
    assert abs(good) < 5
    assert value(clusters(300, 2) + cloud(300, 4, 2.0)) > good + 1  # blurred
    assert good + 5 < value(clusters(300, 2, kept=3)) < value(clusters(300, 2, kept=2))  # modes are missing
    assert value(clusters(300, 2) + 3) > good + 10  # moved
    assert value(train[:300]) > good + 10  # copied


def test_the_feature_likelihood_keeps_its_counts_and_repeats():
    train, test, made = cloud(101, 0), cloud(40, 1), cloud(70, 2)
    found = feature_likelihood(train, test, made, seeded())
    assert (found.train, found.test, found.centres) == (101, 40, 70)
    assert found == feature_likelihood(train, test, made, seeded())
    assert found.value == pytest.approx(100 * (found.nll - found.baseline))
    moved = feature_likelihood(3 * train + 1, 3 * test + 1, 3 * made + 1, seeded())
    assert moved.value == pytest.approx(found.value, rel=1e-6)  # features are normalised by the test set
    constant = [torch.cat((rows, torch.ones(len(rows), 1)), 1) for rows in (train, test, made)]
    assert math.isfinite(feature_likelihood(*constant, seeded()).value)
    with pytest.raises(ValueError, match="made features"):
        feature_likelihood(train, test, made[:1], seeded())
    with pytest.raises(ValueError, match="NaN"):
        feature_likelihood(train, test, made * math.nan, seeded())


def test_fitted_widths_are_the_likeliest():
    x, centre = cloud(4000, 0, 0.7, d=3), torch.zeros(1, 3, dtype=torch.float64)
    found = fitted_log_variances(x, centre, epochs=200)
    assert float(found) < 0.5  # shared with the broad density, which takes the far rows
    copies = fitted_log_variances(x[:50], x[:50])
    assert bool((copies < -5).all())  # a copy of a training row is explained by a spike
