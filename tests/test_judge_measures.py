"""A judge against known truth: every number where it can be worked out, and the simulated judges."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from experiments.edit.arms import coarse, lenient
from fieldsmith.measure.intervals import Interval
from fieldsmith.measure.judges import JudgeMeasures, measure_judge, recommend


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def truth_of(groups: int, items: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, (groups, items), generator=draws(seed)).double() / 2


def test_a_perfect_judge():
    truth = truth_of(20, 6)
    found = measure_judge(truth, truth.expand(2, 20, 6), draws())
    assert found.bias == Interval(0, 0, 0, 20)
    assert {at: part.value for at, part in found.bias_at.items()} == {0: 0, 0.5: 0, 1: 0}
    assert found.variance.value == 0 and found.calls == 1
    for part in (found.correlation, found.correlation_within, found.slope_within):
        assert (part.value, part.low, part.high) == pytest.approx((1, 1, 1))
    assert found.false_done is not None and found.false_done.value == 0 and 0 < found.false_done.high < 0.2
    assert found.truth_variance == pytest.approx(float(truth.var(1).mean()))
    assert found.replies_needed() == 1 and found.correlation_within_at(8) == pytest.approx(1)


def test_every_number_of_a_case_worked_by_hand():
    truth = torch.tensor([[0.0, 1.0], [0.0, 0.4]])
    scores = torch.tensor([[[0.5, 0.9], [0.1, 0.3]], [[0.7, 0.9], [0.1, 0.5]]])
    found = measure_judge(truth, scores, draws(), calls=3)
    assert found.bias.value == pytest.approx(4.0 / 8 - 0.35)
    assert found.bias_at[0.0].value == pytest.approx((0.5 + 0.7 + 0.1 + 0.1) / 4)
    assert found.bias_at[0.5].value == pytest.approx((-0.1 + 0.1) / 2)  # 0.4 lies nearest to 0.5
    assert found.bias_at[1.0].value == pytest.approx(-0.1) and set(found.bias_at) == {0, 0.5, 1}
    assert found.variance.value == pytest.approx((0.02 + 0.02) / 4)  # of (.5, .7) and of (.3, .5)
    assert found.false_done is not None
    assert (found.false_done.value, found.false_done.n, found.false_done.unit) == (0.5, 2, "%")
    s, f = scores.double().flatten(), truth.double().expand(2, 2, 2).flatten()
    assert found.correlation.value == pytest.approx(float(torch.corrcoef(torch.stack([s, f]))[0, 1]))
    # half differences within groups: truth .5, .2; scores .2, .1 and .1, .2
    sf, ff, ss = 0.5 * 0.2 + 0.2 * 0.1 + 0.5 * 0.1 + 0.2 * 0.2, 2 * (0.25 + 0.04), 0.04 + 0.01 + 0.01 + 0.04
    assert found.correlation_within.value == pytest.approx(sf / math.sqrt(ff * ss))
    assert found.slope_within.value == pytest.approx(sf / ff)
    assert found.truth_variance == pytest.approx((0.5 + 0.08) / 2)
    assert found.calls == 3


def test_a_bias_shared_by_a_group_costs_nothing_within_it():
    truth = truth_of(60, 8)
    shift = 3 * torch.randn(60, 1, generator=draws(1)).double()
    found = measure_judge(truth, (truth + shift).expand(2, 60, 8), draws())
    assert found.correlation_within.value == pytest.approx(1) and found.correlation.value < 0.5
    assert found.correlation.low < found.correlation.value < found.correlation.high


def test_a_judge_that_says_one_thing_has_no_correlation():
    truth = truth_of(5, 4)
    found = measure_judge(truth, torch.full((2, 5, 4), 0.7), draws())
    assert found.correlation.value == found.correlation_within.value == found.correlation_within_at(4) == 0
    assert found.false_done is not None and found.false_done.value == 1 and found.false_done.low < 1
    assert measure_judge(truth.clamp(min=0.5), truth.expand(2, 5, 4), draws()).false_done is None


def test_intervals_cover_the_number_that_is_meant():
    covered = 0
    for seed in range(40):
        truth = truth_of(30, 5, seed)
        found = measure_judge(truth, truth + 0.1 + torch.randn(2, 30, 5, generator=draws(seed)), draws(), draws=300)
        covered += found.bias.low <= 0.1 <= found.bias.high
    assert covered >= 34


def test_the_correlation_of_averaged_replies_is_foretold():
    truth, noise = truth_of(400, 8), torch.randn(8, 400, 8, generator=draws(2)).double()
    scores = 0.3 + 0.5 * truth + 0.4 * noise
    one = measure_judge(truth, scores, draws(), draws=20)
    four = measure_judge(truth, scores.unflatten(0, (2, 4)).mean(1), draws(), draws=20)
    assert one.correlation_within_at(1) == pytest.approx(one.correlation_within.value)
    assert one.correlation_within_at(4) == pytest.approx(four.correlation_within.value, abs=0.01)
    assert one.variance.value == pytest.approx(0.16, rel=0.05)
    backwards = measure_judge(truth, -scores, draws(), draws=20)
    assert backwards.correlation_within_at(4) == pytest.approx(-one.correlation_within_at(4))


@pytest.mark.parametrize(
    ("truth", "scores", "message"),
    [
        (torch.zeros(3), torch.zeros(2, 3), "expected"),
        (torch.rand(3, 4), torch.zeros(2, 4, 3), r"scores \(2, 4, 3\) for truth \(3, 4\); expected"),
        (torch.rand(3, 4), torch.zeros(1, 3, 4), "at least 2 of each"),
        (torch.rand(1, 4), torch.zeros(2, 1, 4), "at least 2 of each"),
        (torch.rand(3, 4), torch.full((2, 3, 4), torch.nan), "NaN"),
        (torch.rand(3, 4) + 1, torch.zeros(2, 3, 4), "outside"),
        (torch.rand(3, 1).expand(3, 4), torch.zeros(2, 3, 4), "does not vary within any of 3 groups"),
    ],
)
def test_what_cannot_be_measured_is_refused(truth, scores, message):
    with pytest.raises(ValueError, match=message):
        measure_judge(truth, scores, draws())


# which mode, how often


def measures(correlation: float, variance: float, slope: float = 1.0, calls: float = 1.0) -> JudgeMeasures:
    def plain(value: float) -> Interval:
        return Interval(value, value, value, 10)

    return JudgeMeasures(
        bias=plain(0), bias_at={}, variance=plain(variance), correlation=plain(correlation),
        correlation_within=plain(correlation), slope_within=plain(slope), truth_variance=0.1, false_done=None,
        calls=calls,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("variance", "slope", "n"),
    [(0, 1, 1), (0.01, 1, 1), (0.011, 1, 2), (0.05, 1, 5), (0.05, 0.5, 16), (0.02, 0.5, 8), (0.02, -0.5, 8), (9, 1, 16),
     (1, 0, 16), (0, 0, 1)],
)  # fmt: skip
def test_replies_leave_a_tenth_of_the_variance_to_noise(variance, slope, n):
    assert measures(0.5, variance, slope).replies_needed() == n


def test_a_noisy_judge_wins_where_replies_can_be_averaged_and_a_quiet_one_where_not():
    # quiet: .7 whatever n; noisy: variance .1 + .3 in one reply, so 1 / sqrt(1 + 3 / n)
    modes = {"quiet": measures(0.7, 0.0), "noisy": measures(0.5, 0.3)}
    assert modes["noisy"].correlation_within_at(16) == pytest.approx(1 / math.sqrt(1 + 3 / 16))
    one, many = recommend(modes, 1), recommend(modes, 100)
    assert (one.mode, one.n) == ("quiet", 1) and (many.mode, many.n) == ("noisy", 16)
    assert many.why == (
        "noisy with n=16 correlates 0.92 with the truth within groups (quiet 0.70 with n=1) for 16 of 100 calls an "
        "edit, and its noise is 19% of the variance that it ranks"
    )
    dear = {**modes, "noisy": dataclasses.replace(modes["noisy"], calls=10)}
    assert recommend(dear, 20).mode == "quiet"  # two replies of .63
    assert recommend(dear, 50) == recommend(dict(reversed(dear.items())), 50)
    assert (recommend(dear, 50).mode, recommend(dear, 50).n) == ("noisy", 5)


def test_equal_modes_go_to_the_cheaper():
    assert recommend({"dear": measures(0.8, 0, calls=3), "cheap": measures(0.8, 0)}, 9).mode == "cheap"


def test_nothing_to_recommend_is_refused():
    with pytest.raises(ValueError, match=r"calls_per_edit=2 pays for no mode \(slow 3\); give more"):
        recommend({"slow": measures(0.8, 0, calls=3)}, 2)
    with pytest.raises(ValueError, match="none measured"):
        recommend({}, 2)
    with pytest.raises(ValueError, match="no mode of a, b ranks edits as the truth does"):
        recommend({"a": measures(0, 0, 0), "b": measures(-0.5, 0.1, -1)}, 2)


# simulated judges


def test_the_lenient_judge():
    f = torch.linspace(0, 1, 5).expand(20_000, 5)
    given = lenient(f, draws())
    assert given.shape == f.shape and given.max() <= 1
    torch.testing.assert_close(given.mean(0), torch.tensor([0.45, 0.575, 0.7, 0.825, 0.95]), atol=2e-3, rtol=0)
    assert given[:, 0].std() == pytest.approx(0.03, rel=0.03)
    assert torch.equal(lenient(f, draws(), a=0, b=1, s=0), f)
    assert lenient(f, draws(), a=2).min() == 1  # clipped
    assert torch.equal(lenient(f, draws(3)), lenient(f, draws(3)))


def test_the_coarse_judge():
    f = torch.tensor([0.0, 0.5, 1.0]).expand(40_000, 3)
    given = coarse(f, draws())
    assert given.unique().tolist() == [0, 0.5, 1] and given.dtype == f.dtype
    p = torch.tensor([0.05, 0.5, 0.95])
    torch.testing.assert_close(given.mean(0), p, atol=6e-3, rtol=0)
    torch.testing.assert_close(given.var(0), p * (1 - p) / 2, atol=3e-3, rtol=0)


def test_simulated_judges_are_measured_as_they_were_made():
    truth = truth_of(200, 8)
    repeated = truth.expand(4, 200, 8)
    kind = measure_judge(truth, lenient(repeated, draws()), draws(), draws=100)
    hard = measure_judge(truth, coarse(repeated, draws()), draws(), draws=100)
    assert kind.bias_at[0.0].value == pytest.approx(0.45, abs=0.01)
    assert kind.bias_at[1.0].value == pytest.approx(-0.05, abs=0.01)
    assert kind.slope_within.value == pytest.approx(0.5, abs=0.01)
    assert kind.variance.value == pytest.approx(0.0009, rel=0.1)
    assert hard.slope_within.value == pytest.approx(0.9, abs=0.02)
    assert hard.variance.value == pytest.approx((2 * 0.05 * 0.95 + 0.25) / 6, rel=0.05)
    assert hard.false_done is not None and hard.false_done.value == pytest.approx(1 - 0.95**2, abs=0.02)
    assert kind.correlation_within.low > hard.correlation_within.high
    assert kind.replies_needed() == 1 and hard.replies_needed() > 2
