"""measure: distances against closed forms, naive loops and torchmetrics; intervals against scipy; side effects."""

from __future__ import annotations

import io
import json
import warnings
from dataclasses import asdict

import pytest
import torch
from rich.console import Console
from scipy import stats
from torch import Tensor

from fieldsmith.measure.distances import (
    diversity,
    extractor_name,
    frechet_distance,
    kernel_distance,
    pixel_features,
    precision_recall,
    sliced_wasserstein,
    total_variation,
)
from fieldsmith.measure.intervals import Interval, bootstrap, mean_interval, paired_difference, share, wilson
from fieldsmith.measure.progress import track
from fieldsmith.measure.side_effects import Row, SideEffects, compare, image_statistics
from fieldsmith.run import plain
from fieldsmith.worlds.shapes import COLOURS, SHAPES, Concept, ShapesWorld, caption, concepts, parse
from tests.drawn import normal, seeded

# intervals


@pytest.mark.parametrize(("successes", "n"), [(0, 5), (5, 5), (3, 7), (47, 384), (999, 1000)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_wilson_is_scipys(successes: int, n: int, level: float) -> None:
    ours, theirs = wilson(successes, n, level), stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert ours.low <= ours.value <= ours.high


def test_intervals_read_well() -> None:
    assert str(wilson(47, 384)) == "12.2% [9.3, 15.9], n=384"
    assert str(Interval(-6.25, -9.1, -3.3, 384, "points")) == "-6.2 points [-9.1, -3.3], n=384"
    assert str(Interval(2.5, 2.0, 3.0, 8, "bits")) == "2.5 bits [2, 3], n=8"


@pytest.mark.parametrize(
    ("one", "short"),
    [
        (wilson(1, 1), "100.0%"),
        (share(torch.tensor([False])), "0.0%"),
        (mean_interval(torch.tensor([2.5]), unit="bits"), "2.5 bits"),
        (bootstrap(torch.tensor([2.5]), torch.mean, seeded(), draws=3), "2.5"),
        (paired_difference(torch.tensor([True]), torch.tensor([False])), "-100.0 points"),
    ],
)
def test_one_value_alone_has_no_interval(one: Interval, short: str) -> None:
    assert one.n == 1 and one.short() == short and not one.excludes_zero
    assert one.to_json()["low"] is None and one.to_json()["high"] is None
    assert json.dumps(one.to_json(), allow_nan=False) and plain(asdict(one)).keys() == {"value", "n", "unit"}


def test_mean_interval_is_students() -> None:
    values = normal(6)
    low, high = stats.t.interval(0.95, 5, loc=values.mean().item(), scale=stats.sem(values.numpy()))
    ours = mean_interval(values)
    assert (ours.low, ours.high) == pytest.approx((low, high))


def test_bootstrap_covers_the_mean() -> None:
    hits = 0
    for seed in range(100):
        found = bootstrap(normal(40, seed=seed), torch.mean, seeded(seed), draws=200)
        hits += found.low <= 0 <= found.high
    assert 86 <= hits <= 99


def test_paired_difference_covers_and_never_collapses() -> None:
    n, hits = 100, 0
    for seed in range(300):
        chance = torch.rand(n, generator=seeded(seed))
        before = chance < 0.8
        after = torch.where(torch.rand(n, generator=seeded(1000 + seed)) < 0.9, before, chance < 0.4)
        found = paired_difference(before, after)  # the truth is 10% x (40% - 80%) = -4 points
        hits += found.low <= -4 <= found.high
    assert 0.9 <= hits / 300 <= 0.995
    same = torch.ones(50, dtype=torch.bool)
    found = paired_difference(same, same)
    assert found.value == 0 and found.low < 0 < found.high
    assert paired_difference(same, ~same).value == paired_difference(same, ~same).low == -100


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: wilson(0, 0), "at least 1 trial"),
        (lambda: wilson(4, 3), "between 0 and n"),
        (lambda: wilson(1, 3, level=95), "confidence level"),
        (lambda: share(torch.zeros(0, dtype=torch.bool)), "n=0"),
        (lambda: share(torch.zeros(3)), "expected bool"),
        (lambda: mean_interval(torch.zeros(0)), "at least 1"),
        (lambda: bootstrap(torch.zeros(0), torch.mean, seeded()), "at least 1"),
        (lambda: paired_difference(torch.ones(3) > 0, torch.ones(4) > 0), "equal seeds"),
    ],
)
def test_intervals_refuse_with_a_sentence(call, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()


def test_progress_is_a_line_on_a_terminal_and_nothing_elsewhere(capsys, monkeypatch) -> None:
    assert list(track([1, 2, 3], "counting")) == [1, 2, 3]
    assert capsys.readouterr() == ("", "")
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr("fieldsmith.measure.progress.CONSOLE", terminal)
    for _ in track([1, 2], "outer"):
        assert list(track([3], "inner")) == [3]  # a line within a line
    assert "outer" in terminal.file.getvalue() and "2/2" in terminal.file.getvalue()


# distances


def whitened(x: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """x moved so that its sample mean and covariance are exactly these."""
    x = x - x.mean(0)
    root = torch.linalg.cholesky(x.T @ x / (len(x) - 1))
    return torch.linalg.solve_triangular(root, x.T, upper=False).T @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_of_gaussians_is_the_closed_form() -> None:
    d = 4
    factor_a, factor_b = normal(d, d, seed=1), normal(d, d, seed=2)
    s_a, s_b = factor_a @ factor_a.T + torch.eye(d), factor_b @ factor_b.T + torch.eye(d)
    mu_a, mu_b = normal(d, seed=3), normal(d, seed=4)
    a, b = whitened(normal(50, d, seed=5), mu_a, s_a), whitened(normal(70, d, seed=6), mu_b, s_b)
    values, vectors = torch.linalg.eigh(s_a)
    root = vectors @ values.sqrt().diag() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ s_b @ root).sqrt().sum()
    closed = (mu_a - mu_b).square().sum() + s_a.trace() + s_b.trace() - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(float(closed), rel=1e-10)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(a, a + mu_b) == pytest.approx(float(mu_b.square().sum()), rel=1e-10)
    few, wide = normal(5, 40, seed=7), normal(6, 40, seed=8)  # fewer rows than columns
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(few, wide) == pytest.approx(frechet_distance(wide, few), rel=1e-10)


class Flat(torch.nn.Module):
    """What torchmetrics takes for an extractor: images to their pixels."""

    num_features = 12

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def test_frechet_and_kernel_are_torchmetrics() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    a, b = normal(60, 12, seed=1), normal(60, 12, seed=2) * 1.3 + 0.2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fid = FrechetInceptionDistance(feature=Flat())
        kid = KernelInceptionDistance(feature=Flat(), subsets=1, subset_size=60)
    for metric in (fid, kid):
        metric.update(a.view(-1, 3, 2, 2), real=True)
        metric.update(b.view(-1, 3, 2, 2), real=False)
    assert frechet_distance(a, b) == pytest.approx(float(fid.compute()), rel=1e-6)
    assert kernel_distance(a, b) == pytest.approx(float(kid.compute()[0]), rel=1e-6)


def test_kernel_distance_is_the_naive_loop() -> None:
    a, b = normal(5, 3, seed=1), normal(7, 3, seed=2) + 1

    def k(x: Tensor, y: Tensor) -> Tensor:
        return (x.dot(y) / 3 + 1) ** 3

    within_a = sum(k(a[i], a[j]) for i in range(5) for j in range(5) if i != j) / 20
    within_b = sum(k(b[i], b[j]) for i in range(7) for j in range(7) if i != j) / 42
    between = sum(k(x, y) for x in a for y in b) / 35
    assert kernel_distance(a, b) == pytest.approx(float(within_a + within_b - 2 * between), rel=1e-12)


def test_kernel_distance_is_unbiased() -> None:
    drawn = torch.tensor([kernel_distance(normal(20, 4, seed=i), normal(30, 4, seed=10_000 + i)) for i in range(400)])
    mean = mean_interval(drawn, level=0.999)
    assert mean.low < 0 < mean.high
    assert mean_interval(torch.tensor([kernel_distance(normal(20, 4, seed=i), normal(30, 4, seed=10_000 + i) + 1)
                                       for i in range(20)])).low > 0  # fmt: skip


def test_precision_and_recall_of_nested_and_distant_clouds() -> None:
    wide = torch.rand(600, 2, generator=seeded(1)).double() * 2 - 1
    narrow = wide[:200] * 0.1
    found = precision_recall(wide, narrow, k=6)
    assert found.precision > 0.95 and found.recall < 0.1
    found = precision_recall(narrow, wide, k=6)
    assert found.precision < 0.1 and found.recall > 0.95
    assert precision_recall(wide, wide) == precision_recall(narrow, narrow)
    same, apart = precision_recall(wide, wide), precision_recall(wide, wide + 10)
    assert (same.precision, same.recall, apart.precision, apart.recall) == (1, 1, 0, 0)
    twins = torch.zeros(8, 3)  # every ball has radius 0 and still holds its twin
    assert precision_recall(twins, twins).precision == 1


def test_sliced_wasserstein_of_a_shift_is_the_closed_form() -> None:
    a, shift = normal(50, 5, seed=1), torch.tensor([3.0, 0, -1, 0.5, 2])
    found = sliced_wasserstein(a, a + shift, 10_000, seeded(2))
    assert found == pytest.approx(float(shift.norm()) / 5**0.5, rel=0.02)
    assert sliced_wasserstein(a, a, 10, seeded()) == 0
    assert sliced_wasserstein(a, a.repeat(3, 1), 10, seeded()) == pytest.approx(0, abs=1e-12)


def test_sliced_wasserstein_of_unequal_sizes_is_exact() -> None:
    one, other = normal(4, 1, seed=1), normal(6, 1, seed=2)
    assigned = (one.repeat_interleave(3, 0).sort(0).values - other.repeat_interleave(2, 0).sort(0).values).square()
    assert sliced_wasserstein(one, other, 3, seeded()) == pytest.approx(float(assigned.mean().sqrt()), rel=1e-12)


def test_total_variation_and_diversity() -> None:
    assert total_variation(torch.tensor([3, 1]), torch.tensor([6, 2])) == 0
    assert total_variation(torch.tensor([4, 0]), torch.tensor([0, 9])) == 1
    assert total_variation(torch.tensor([1, 1]), torch.tensor([3, 1])) == pytest.approx(0.25)
    points = torch.tensor([[0.0, 0], [3, 4], [7, 7], [0, 1], [0, 2], [0, 3]])
    assert diversity(points, ["a", "a", "alone", "b", "b", "b"]).tolist() == pytest.approx([5, 4 / 3])


def test_pixel_features_say_what_they_are() -> None:
    features = pixel_features(4)
    assert features(torch.rand(2, 3, 16, 16)).shape == (2, 48)
    assert extractor_name(features) == "pixels 4x4" and extractor_name(torch.flatten) == "flatten"


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: frechet_distance(torch.zeros(1, 2), torch.zeros(5, 2)), "at least 2"),
        (lambda: frechet_distance(torch.zeros(5, 3), torch.zeros(5, 2)), "expected"),
        (lambda: kernel_distance(torch.full((5, 2), torch.nan), torch.zeros(5, 2)), "NaN"),
        (lambda: precision_recall(torch.zeros(3, 2), torch.zeros(9, 2), k=3), "at least 4"),
        (lambda: sliced_wasserstein(torch.zeros(3, 2), torch.zeros(9, 2), 0, seeded()), "direction"),
        (lambda: total_variation(torch.zeros(2), torch.ones(2)), "at least 1 label"),
        (lambda: diversity(torch.zeros(3, 2), ["a"]), "one group a row"),
        (lambda: pixel_features(0), "at least 1"),
    ],
)
def test_distances_refuse_with_a_sentence(call, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()


# side effects


def test_statistics_of_constructed_images() -> None:
    flat = torch.full((1, 3, 8, 8), 0.5)
    board = (torch.arange(8)[:, None] + torch.arange(8)[None, :]).remainder(2).float().expand(1, 3, 8, 8)
    halves = torch.zeros(1, 3, 8, 8)
    halves[:, 0, :, 4:] = 1
    seen = image_statistics(torch.cat((flat, board, halves)))
    assert seen["brightness"].tolist() == pytest.approx([0.5, 0.5, 0.299 / 2])
    assert seen["contrast"].tolist() == pytest.approx([0, 0.5, 0.299 / 2], abs=1e-6)
    assert seen["edge density"].tolist() == pytest.approx([0, 1, 1 / 7])
    assert seen["colour entropy"].tolist() == pytest.approx([0, 1, 1])


WORLD = ShapesWorld(16)


def shapes_judge(images: Tensor, prompts) -> dict[str, Tensor]:
    seen, asked = WORLD.judge(images), [parse(prompt) for prompt in prompts]
    return {
        "shape right": seen.shape == torch.tensor([SHAPES.index(c.shape) for c in asked]),
        "colour right": seen.colour == torch.tensor([COLOURS.index(c.colour) for c in asked]),
        "valid": seen.valid,
    }


@pytest.fixture(scope="module")
def drawn() -> tuple[Tensor, list[str]]:
    chosen: list[Concept] = concepts() * 4
    return WORLD.render(chosen, seeded(1)), [caption(c) for c in chosen]


def compared(drawn, after: Tensor) -> SideEffects:
    before, prompts = drawn
    return compare(before, after, prompts, pixel_features(8), seeded(3), shapes_judge)


def named(found: SideEffects, name: str) -> Row:
    return next(row for row in found.rows + found.distances if row.name.startswith(name))


def test_identical_images_are_kept(drawn) -> None:
    effects = compared(drawn, drawn[0])
    assert effects.kept and effects.verdict.startswith("No side effects, as far as 96 pairs")
    assert len(effects.rows) == 8 and len(effects.distances) == 3
    assert all(row.change.value == 0 and row.verdict == "kept" for row in effects.rows + effects.distances)
    assert effects.drift.value == 0 and effects.redraw is not None and effects.redraw.value > 0.02


def test_a_fresh_draw_is_kept(drawn) -> None:
    """Other seeds of the same world: pixels differ a lot, the distribution does not."""
    effects = compared(drawn, WORLD.render(concepts() * 4, seeded(2)))
    assert effects.kept, effects.verdict
    assert effects.redraw is not None and effects.drift.value == pytest.approx(effects.redraw.value, rel=0.2)


def test_darkened_images_are_flagged(drawn) -> None:
    effects = compared(drawn, drawn[0] * 0.8)
    assert named(effects, "brightness").verdict == "changed"
    assert named(effects, "brightness").change.value == pytest.approx(-0.2 * named(effects, "brightness").before.value)
    assert "brightness fell 0.1" in effects.verdict and not effects.kept


def test_a_harmless_change_is_kept(drawn) -> None:
    effects = compared(drawn, (drawn[0] + 0.002).clamp(max=1))
    assert named(effects, "brightness").change.excludes_zero and named(effects, "brightness").verdict == "kept"
    assert effects.kept, effects.verdict


def test_the_judge_flags_swapped_colours(drawn) -> None:
    images = drawn[0].clone()
    images[::4] = images[::4].flip(1)  # red becomes blue in a quarter of the images, the shape stays
    effects = compared(drawn, images)
    row = named(effects, "colour right")
    assert row.verdict == "worse" and row.change.low < row.change.value < row.change.high < 0
    assert named(effects, "shape right").change.value > row.change.value
    assert f"colour right fell {-row.change.value:.1f} points [" in effects.verdict


def test_better_is_not_flagged() -> None:
    before = torch.rand(40, 3, 8, 8, generator=seeded())
    right = iter((torch.arange(40) < 10, torch.arange(40) < 30))
    effects = compare(before, before, ["a"] * 40, pixel_features(2), seeded(), lambda *_: {"right": next(right)})
    assert named(effects, "right").verdict == "better" and effects.kept


def test_destroyed_images_are_flagged_everywhere(drawn) -> None:
    effects = compared(drawn, torch.rand(drawn[0].shape, generator=seeded()))
    for name in ("shape right", "valid", "edge density", "colour entropy", "Frechet", "kernel", "sliced"):
        assert named(effects, name).flagged and f"{name}" in effects.verdict
    assert effects.verdict.startswith("Side effects: ") and "where before against itself gives" in effects.verdict


def test_collapse_within_a_prompt_is_flagged(drawn) -> None:
    first = drawn[0][:24].repeat(4, 1, 1, 1)  # the same image for every seed of a prompt
    row = named(compared(drawn, first), "diversity")
    assert row.verdict == "changed" and row.after.value == 0


def test_side_effects_are_plain_data(drawn) -> None:
    effects = compared(drawn, drawn[0] * 0.8)
    plain = json.loads(json.dumps(effects.to_json(), allow_nan=False))
    assert plain["verdict"] == effects.verdict and plain["rows"][0]["change"]["unit"] == "points"
    headers, lines = effects.table()
    assert len(lines) == 12 and all(len(line) == len(headers) for line in lines)
    assert lines[0][0] == "shape right" and lines[0][4] in ("kept", "worse", "better")
    assert compared(drawn, drawn[0] * 0.8) == effects  # the generator is the only chance in it


@pytest.mark.parametrize(
    ("before", "after", "prompts", "sentence"),
    [
        (torch.zeros(8, 3, 4, 4), torch.zeros(7, 3, 4, 4), ["a"] * 8, "equal seed"),
        (torch.zeros(8, 3, 4, 4), torch.zeros(8, 3, 4, 4), ["a"], "equal seed"),
        (torch.zeros(3, 3, 4, 4), torch.zeros(3, 3, 4, 4), ["a"] * 3, "at least 4"),
        (torch.zeros(8, 3, 4, 4), torch.full((8, 3, 4, 4), torch.nan), ["a"] * 8, "8 of 8 images in after hold NaN"),
        (torch.zeros(8, 1, 4, 4), torch.zeros(8, 1, 4, 4), ["a"] * 8, "expected"),
    ],
)
def test_compare_refuses_with_a_sentence(before: Tensor, after: Tensor, prompts: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        compare(before, after, prompts, pixel_features(2), seeded())


def test_compare_without_judge_or_groups() -> None:
    images = torch.rand(6, 3, 8, 8, generator=seeded())
    effects = compare(images, images, list("abcdef"), pixel_features(2), seeded())
    assert len(effects.rows) == 4 and effects.redraw is None and effects.kept
