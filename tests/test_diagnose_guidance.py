"""Guidance fidelity: exact on hand-made branches, states that are what they say, the command and its page."""

from __future__ import annotations

import json
import math
import pathlib
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.tiny import unet_pipeline
from fieldsmith.cli import main
from fieldsmith.diagnoses.run import diagnose
from fieldsmith.errors import InputError
from fieldsmith.measure.guidance import (
    Guidance,
    ask,
    liveness,
    measure,
    noised_tuples,
    path_tuples,
)
from fieldsmith.models import load
from fieldsmith.models.branches import Branches
from fieldsmith.models.unet import UNet
from tests.drawn import seeded

N, D = 400, 12
DIGITS = tuple(str(i) for i in range(10))


def drawn(seed: int, n: int = N) -> Tensor:
    return torch.randn(n, D, generator=seeded(seed), dtype=torch.float64)


TIMES = (torch.arange(N, dtype=torch.float64) + 0.5) / N
TEACHER = Branches(drawn(0), drawn(1))


def of_gap(gap: Tensor, unconditional: Tensor = TEACHER.unconditional) -> Branches:
    """A student with this gap over the given null branch."""
    return Branches(unconditional + gap, unconditional)


def noisy(size: float = 0.3) -> Branches:
    return Branches(TEACHER.conditional + size * drawn(2), TEACHER.unconditional + size * drawn(3))


def asked(student: Branches, **more: Any) -> Guidance:
    return measure(student, TEACHER, TIMES, **more)


# verdicts


def test_a_model_is_exactly_faithful_to_itself():
    found = asked(Branches(TEACHER.conditional.clone(), TEACHER.unconditional.clone()))
    for one in (found.pooled, *found.bins):
        assert (one.rho, one.cosine, one.weighted_cosine, one.gain, one.recalibration) == (1, 1, 1, 1, 1)
        assert (one.gap_mse, one.e_c, one.e_u, one.common, one.difference) == (0, 0, 0, 0, 0)
        assert (one.relative_gap_error, one.residual, one.correlation, one.guided_error(4)) == (0, 0, 0, 0)
    assert found.verdict == "healthy" and found.worst_rho == 1 and "healthy" in found.words
    assert len(found.bins) == 10 and sum(one.share for one in found.bins) == pytest.approx(1)


@pytest.mark.parametrize(("factor", "verdict"), [(0.05, "collapse"), (2.5, "blow-up"), (0.6, "distorted")])
def test_a_gap_of_the_wrong_size(factor, verdict):
    found = asked(of_gap(factor * TEACHER.gap))
    one = found.pooled
    assert found.verdict == verdict and found.worst_rho == pytest.approx(factor)
    assert one.cosine == pytest.approx(1) and one.gain == pytest.approx(factor) and one.residual < 1e-12
    assert one.relative_gap_error == pytest.approx((1 - factor) ** 2)
    assert one.recalibration == pytest.approx(1 / factor)
    assert one.e_u == 0 and one.e_c == pytest.approx(one.gap_mse)
    assert ("--objective dash" in found.words) == (verdict != "distorted")


def test_a_student_that_learned_neither_branch_is_told_to_train_longer():
    noise = torch.Generator().manual_seed(3)
    far = Branches(*(3 * torch.randn(TEACHER.gap.shape, generator=noise).to(TEACHER.gap) for _ in range(2)))
    found = asked(far)
    assert found.verdict == "blow-up" and "train longer" in found.words and "--objective" not in found.words


def test_a_gap_that_turned_is_distorted_and_no_recalibration_fixes_it():
    turned = of_gap(torch.roll(TEACHER.gap, 1, dims=1))
    assert asked(turned).verdict == "distorted" and asked(turned).pooled.residual > 0.9


def test_common_drift_is_invisible_to_gap_metrics():
    shift = 2.0 * torch.ones(D, dtype=torch.float64)
    found = asked(Branches(TEACHER.conditional + shift, TEACHER.unconditional + shift))
    one = found.pooled
    assert one.rho == pytest.approx(1) and one.cosine == pytest.approx(1) and one.gap_mse < 1e-24
    assert one.e_c == pytest.approx(4) and one.e_u == pytest.approx(4) and one.common == pytest.approx(4)
    assert one.correlation == pytest.approx(1)
    assert found.verdict == "drift" and "conditional term" in found.words and "teacher's own" in found.words
    assert asked(noisy(0.01)).verdict == "healthy"
    held = asked(Branches(TEACHER.conditional + shift, TEACHER.unconditional + shift), reference=5.0)
    assert held.verdict == "healthy" and "the reference given" in held.words and held.branch_error == pytest.approx(8)


def test_only_bins_with_a_gap_decide():
    quiet = (TIMES <= 0.3)[:, None]
    teacher = Branches(torch.where(quiet, TEACHER.unconditional + 1e-3, TEACHER.conditional), TEACHER.unconditional)
    student = Branches(torch.where(quiet, TEACHER.unconditional, TEACHER.conditional), TEACHER.unconditional)
    found = measure(student, teacher, TIMES)
    assert [one.rho for one in found.bins[:3]] == [0, 0, 0] and len(found.matter) == 7
    assert found.verdict == "healthy" and found.worst_rho == 1
    late = Branches(torch.where((TIMES > 0.9)[:, None], TEACHER.unconditional, TEACHER.conditional),
                    TEACHER.unconditional)  # fmt: skip
    assert asked(late).verdict == "collapse" and asked(late).worst.t_high == 1 and asked(late).pooled.rho > 0.85


# numbers


@pytest.mark.parametrize("w", [0.0, 0.5, 1.0, 2.0, 4.0, 6.0])
def test_guided_error_is_the_mean_square_of_the_guided_difference(w):
    student = noisy()
    direct = (student.guided(w) - TEACHER.guided(w)).square().mean()
    found = asked(student)
    assert found.pooled.guided_error(w) == pytest.approx(float(direct), rel=1e-9)
    ends = {0.0: found.pooled.e_u, 1.0: found.pooled.e_c}
    assert found.pooled.guided_error(w) == pytest.approx(ends.get(w, float(direct)))


def test_recalibration_minimises_the_gap_error_and_the_error_splits():
    student = noisy(0.7)
    one = asked(student).pooled

    def error(a: float) -> float:
        return float((a * student.gap - TEACHER.gap).square().mean())

    best = one.recalibration
    assert all(error(best) < error(best + step) for step in (-0.1, -0.01, 0.01, 0.1))
    assert one.relative_gap_error == pytest.approx((1 - one.gain) ** 2 + one.residual)
    assert one.relative_gap_error == pytest.approx(one.gap_mse / one.energy)
    assert one.difference == one.gap_mse
    e_c, e_u = student.conditional - TEACHER.conditional, student.unconditional - TEACHER.unconditional
    assert one.common == pytest.approx(float(((e_c + e_u) / 2).square().mean()))
    assert one.e_c + one.e_u == pytest.approx(2 * one.common + one.difference / 2)
    assert one.correlation == pytest.approx(float((e_c * e_u).mean() / (e_c.norm() * e_u.norm()) * N * D))
    rho = student.gap.norm(dim=1).mean() / TEACHER.gap.norm(dim=1).mean()
    assert one.rho == pytest.approx(float(rho))
    assert one.cosine == pytest.approx(float(torch.cosine_similarity(student.gap, TEACHER.gap).mean()))


def test_pooled_is_the_mean_of_the_bins_by_their_states():
    t = TIMES**2  # unequal bins
    found = measure(noisy(), TEACHER, t)
    assert len({one.n for one in found.bins}) > 1 and sum(one.n for one in found.bins) == N
    for name in ("cosine", "gap_mse", "e_c", "e_u", "cross", "common", "energy"):
        mean = sum(one.n * getattr(one, name) for one in found.bins) / N
        assert mean == pytest.approx(getattr(found.pooled, name)), name


def test_empty_bins_are_left_out_and_edges_belong_below():
    t = torch.tensor([0.1, 0.3, 0.7, 1.0]).repeat(N // 4)  # float32, whose 0.3 is above 3 / 10
    found = measure(TEACHER, TEACHER, t)
    assert [(one.t_low, one.t_high, one.n) for one in found.bins] == [
        (0.0, 0.1, 100), (0.2, 0.3, 100), (0.6, 0.7, 100), (0.9, 1.0, 100),
    ]  # fmt: skip


def test_nothing_is_divided_by_zero():
    nothing = of_gap(torch.zeros(N, D, dtype=torch.float64))
    both = measure(nothing, nothing, TIMES)
    assert both.verdict == "healthy" and both.pooled.rho == 1 and both.pooled.cosine == 1
    dead = asked(nothing)
    assert dead.verdict == "collapse" and dead.worst_rho == 0 and dead.pooled.cosine == 0
    assert dead.pooled.recalibration == 0 and dead.pooled.relative_gap_error == 1
    invented = measure(TEACHER, nothing, TIMES)
    assert invented.verdict == "blow-up" and invented.pooled.rho == math.inf
    for found in (both, dead, invented):
        json.dumps(found.to_json(), allow_nan=False)
        assert found.words


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="need one n"):
        measure(TEACHER, TEACHER, TIMES[:-1])
    broken = Branches(TEACHER.conditional.clone(), TEACHER.unconditional)
    broken.conditional[3, 0] = math.nan
    with pytest.raises(InputError, match="student says NaN"):
        measure(broken, TEACHER, TIMES)


def test_liveness_is_0_for_a_dead_knob_and_1_for_a_faithful_one():
    def sampler(strength: float) -> Any:
        return lambda prompts, seed, w: drawn(seed, len(prompts)) + strength * w

    assert liveness(sampler(0), sampler(1), ["a"] * 4, 0) == 0
    assert liveness(sampler(1), sampler(1), ["a"] * 4, 0) == 1
    assert liveness(sampler(0.5), sampler(1), ["a"] * 4, 0) == pytest.approx(0.5)
    assert liveness(sampler(0), sampler(0), ["a"] * 4, 0) == 1
    assert liveness(sampler(1), sampler(0), ["a"] * 4, 0) == math.inf


# states


@pytest.fixture(scope="module")
def tiny() -> UNet:
    return UNet(unet_pipeline(size=8, channels=1, class_rows=11), "tiny", classes=DIGITS)


def test_noised_states_are_stratified_and_carry_their_labels(tiny):
    images, labels = torch.rand(7, 1, 8, 8, generator=seeded()), torch.arange(7)
    with tiny.count_nfe() as nfe:
        tuples = noised_tuples(tiny, images, labels, 50, seeded())
    index = (tuples.t * 1000).round().long() - 1
    assert (index // 20).tolist() == list(range(50)) and tuples.x_t.shape == (50, 1, 8, 8) and len(tuples) == 50
    label = tuples.condition.parts["label"]
    assert label.bincount(minlength=7).min() >= 7  # every image as often as another
    early = noised_tuples(tiny, images, [DIGITS[i] for i in range(7)], 2000, seeded())
    first = early.x_t[0] - tiny.encode_images(images)[early.condition.parts["label"][0]]
    assert float(first.abs().max()) < 0.1  # t = 1/1000: the image that its label names
    assert nfe.total == 0


def test_flow_states_lie_inside_the_path(flux_folder):
    model = load(flux_folder)
    tuples = noised_tuples(model, torch.rand(2, 3, 32, 32), ["red circle", "blue circle"], 10, seeded())
    assert ((tuples.t * 10).floor().long()).tolist() == list(range(10)) and float(tuples.t.min()) > 0
    with pytest.raises(InputError, match="knows no classes"):
        noised_tuples(model, torch.rand(2, 3, 32, 32), torch.arange(2), 10, seeded())
    with model.count_nfe() as nfe:
        output = ask(model, path_tuples(model, ["red circle"], 3, 2.0, seeded(), 5), batch=2)
    assert output.gap.shape == (5, 16, 32) and nfe.total == 0


def test_path_states_follow_the_models_guided_steps(tiny):
    with tiny.count_nfe() as nfe:
        tuples = path_tuples(tiny, ["3", "5"], 4, 2.0, seeded(), 10, batch=2)
    grid = tiny.grid(4)
    assert torch.equal(tuples.t, grid[:-1].repeat(3)[:10])
    assert tuples.condition.parts["label"].tolist() == [3] * 4 + [5] * 4 + [3] * 2
    assert torch.equal(tuples.x_t[[0, 4, 8]], tiny.noise(3, seeded()))
    assert nfe.total == 0


def test_asking_in_batches_changes_nothing_and_costs_no_training(tiny):
    tuples = path_tuples(tiny, DIGITS, 5, 1.0, seeded(), 20)
    with tiny.count_nfe() as nfe:
        whole, parts = ask(tiny, tuples), ask(tiny, tuples, batch=7)
    assert torch.allclose(whole.conditional, parts.conditional, atol=1e-5) and not whole.gap.requires_grad
    assert torch.allclose(whole.unconditional, parts.unconditional, atol=1e-5) and nfe.total == 0
    assert measure(whole, whole, tuples.t).verdict == "healthy"


# the command

SMALL = ["--tuples", "40", "--steps", "4", "--samples", "4", "--chunk", "64"]


def saved(folder: pathlib.Path, classes: tuple[str, ...] | None = DIGITS, **more: Any) -> str:
    options = {"size": 8, "channels": 1, "class_rows": len(classes) + 1 if classes else None, **more}
    UNet(unet_pipeline(**options), "tiny", classes=classes).save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A student and a teacher of the digits, untrained."""
    folder = tmp_path_factory.mktemp("pair")
    return saved(folder / "student", widths=(8, 16), seed=1), saved(folder / "teacher", seed=0)


def test_the_command_measures_both_kinds_of_states_and_writes_a_page(tmp_path, pair, capsys):
    words = ["diagnose", "guidance", "--model", pair[0], "--teacher", pair[1], "--data", "digits", *SMALL]
    out = tmp_path / "run"
    assert main([*words, "--out", str(out)]) == 0
    assert {f.name for f in out.iterdir()} == {"config.toml", "metrics.json", "report.html"}
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["method"] == "diagnose" and metrics["verdict"] in ("collapse", "blow-up", "distorted")
    assert list(metrics["states"]) == ["noised data", "the teacher's guided path"] and metrics["liveness"] > 0
    for found in metrics["states"].values():
        assert found["pooled"]["n"] == 40 and len(found["bins"]) <= 10 and len(found["guided_error"]) == 7
        assert found["guided_error"]["1"] == pytest.approx(found["pooled"]["e_c"])
    assert metrics["nfe"] == 2 * 40 * 4 + 40 * 2 + 4 * 4 * 6
    page = (out / "report.html").read_text()
    assert metrics["words"][:40] in page.replace("&#39;", "'") and page.count("<svg") == 8 and "a*(t)" in page
    assert "Guidance" in capsys.readouterr().err
    assert main([*words, "--out", str(out)]) == 0 and "is complete" in " ".join(capsys.readouterr().err.split())


def test_a_teacher_against_itself_is_healthy_and_text_models_are_measured_on_their_path(tmp_path, pair, flux_folder):
    words = ["diagnose", "guidance", *SMALL]
    same = ["--model", pair[1], "--teacher", pair[1], "--data", "digits", "--out", str(tmp_path / "a")]
    assert main([*words, *same]) == 0
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert metrics["verdict"] == "healthy" and metrics["liveness"] == 1
    text = ["--model", str(flux_folder), "--teacher", str(flux_folder), "--prompts", "red circle"]
    assert main([*words, *text, "--samples", "0", "--out", str(tmp_path / "b")]) == 0
    metrics = json.loads((tmp_path / "b" / "metrics.json").read_text())
    assert list(metrics["states"]) == ["the teacher's guided path"] and "liveness" not in metrics


def test_from_python_an_object_will_do_for_a_name_and_nothing_need_be_written(pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = {"tuples": 10, "steps": 2, "samples": 0, "data": "digits"}
    found = diagnose(load(pair[0]), "guidance", teacher=pair[1], **small)
    assert found.numbers["instrument"] == "guidance" and found.numbers["words"] == found.words
    assert found.page is not None and found.words[:20] in found.page.html() and not list(tmp_path.iterdir())
    written = diagnose(load(pair[0]), "guidance", teacher=load(pair[1]), out=str(tmp_path / "run"), **small)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["words"] == written.words
    assert f"teacher = '{pair[1]}'" in (tmp_path / "run" / "config.toml").read_text().replace('"', "'")
    with pytest.raises(InputError, match=r"'tupels'.*did you mean 'tuples'"):
        diagnose(None, "guidance", tupels=3)
    with pytest.raises(InputError, match=r"'guidanse'.*did you mean 'guidance'"):
        diagnose(None, "guidanse")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"--teacher": None}, "no teacher given; add --teacher"),
        ({"--model": None}, "no model given; add --model"),
        ({"--data": None}, "no data given.*add --data digits"),
        ({"--data": "nowhere"}, "'nowhere' is no folder"),
        ({"--data": "shapes"}, "3 channels"),
        ({"--model": "nowhere"}, "nowhere"),
        ({"--model": "no-null"}, "no null class.*one embedding row more"),
        ({"--model": "plain"}, "is unconditional, so it has no guidance"),
        ({"--model": "three"}, "knows 3 classes .cat, dog, owl.* the teacher 10 classes"),
        ({"--model": "large"}, r"states are \(1, 16, 16\), the teacher's \(1, 8, 8\)"),
        ({"--model": "x_0"}, "predicts x_0 and the teacher eps"),
        ({"--model": "schedule"}, "different noise schedules"),
        ({"--model": "three", "--teacher": "three"}, "data 'digits' has 10 classes"),
        ({"--prompts": "owl"}, "'owl' is not in the vocabulary"),
        ({"--tuples": "0"}, "tuples=0 must be at least 1"),
        ({"--reference": "0"}, "reference=0.0 must be above 0"),
    ],
    ids=lambda part: " ".join(map(str, (x for item in part.items() for x in item))) if isinstance(part, dict) else "",
)
def test_bad_input_is_one_sentence_and_nothing_is_written(tmp_path, pair, capsys, change, says):
    made: dict[str, dict[str, Any]] = {
        "no-null": {"class_rows": 10}, "plain": {"classes": None}, "three": {"classes": ("cat", "dog", "owl")},
        "large": {"size": 16}, "x_0": {"prediction_type": "sample"}, "schedule": {"beta_schedule": "squaredcos_cap_v2"},
    }  # fmt: skip
    settings: dict[str, str | None] = {"--model": pair[0], "--teacher": pair[1], "--data": "digits"}
    for flag, value in change.items():
        settings[flag] = saved(tmp_path / "odd", **made[value]) if value in made else value
    words = [word for flag, value in settings.items() if value is not None for word in (flag, value) if word]
    small = [] if "--tuples" in change else SMALL
    assert main(["diagnose", "guidance", *words, *small, "--out", str(tmp_path / "run")]) == 2
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(says, sentence), sentence
    assert not re.search(r"[.!] [A-Z]|Traceback", sentence), sentence
    assert not (tmp_path / "run").exists()


def test_models_that_read_text_refuse_data_and_need_prompts(tmp_path, flux_folder, capsys):
    words = ["diagnose", "guidance", "--model", str(flux_folder), "--teacher", str(flux_folder), *SMALL]
    assert main([*words, "--out", str(tmp_path / "run")]) == 2 and "--prompts" in capsys.readouterr().err
    assert main([*words, "--data", "digits", "--out", str(tmp_path / "run")]) == 2
    assert "leave out --data" in capsys.readouterr().err
