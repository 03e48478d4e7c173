"""The erasure run on a tiny random Flux: states at their times, budgets, costs, reproducibility, refusals, failures."""

from __future__ import annotations

import copy
import math
import pathlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fieldsmith.api import erase_inputs
from fieldsmith.errors import InputError, RunError
from fieldsmith.methods.erase import states, step
from fieldsmith.methods.erase.config import METHODS, EraseConfig
from fieldsmith.methods.erase.pairs import encoded
from fieldsmith.methods.erase.step import Projected
from fieldsmith.models import load
from fieldsmith.models.core import Model
from fieldsmith.run import Run
from fieldsmith.worlds import emoji_captions
from tests.drawn import seeded
from tests.trained import erase, weights_in

QUICK = EraseConfig(
    targets=("red circle",), anchors=("blue circle",), steps=6, window=(1, 3), budget=6, rollout_guidance=1.0,
    dropout=0.0, rank=2, chunk=8,
)  # fmt: skip
TEXT = {"subset": "text-inputs", "full": True}  # what UCE edits


@pytest.fixture(scope="module")
def untouched(small_flux_folder: pathlib.Path) -> Model:
    return load(small_flux_folder)


@pytest.fixture
def model(untouched: Model) -> Model:
    return copy.deepcopy(untouched)


@torch.no_grad()
def velocity(model: Any, prompt: str = "red circle") -> Tensor:
    x = model.noise(2, seeded(99))
    return model.predict(x, torch.tensor(0.8), model.encode([prompt])).velocity


def weights(model: Model) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.trainable().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def log_of(model: Model, config: EraseConfig) -> list[dict[str, float]]:
    """What each step logged."""
    rows: list[dict[str, float]] = []
    erase(model, config, callback=lambda step, log: rows.append(dict(log)) if step else None)
    return rows


# where the loss is evaluated


@torch.no_grad()
def by_hand(model: Model, config: EraseConfig, generator: torch.Generator) -> list[Tensor]:
    """x_0 .. x_last of an Euler rollout of the target prompt."""
    condition, grid = model.encode(["red circle"]), model.grid(config.steps)
    path = [model.noise(config.batch, generator)]
    for k in range(config.window[1]):
        path.append(path[k] + (grid[k + 1] - grid[k]) * model.predict(path[k], grid[k], condition).velocity)
    return path


@pytest.mark.parametrize("official", [False, True])
def test_states_of_a_window_stand_at_their_own_times(model, official):
    config = replace(QUICK, batch=2, official_pairing=official)
    found = states.window(model, model.encode(["red circle"]), config, seeded(4))
    path, grid = by_hand(model, config, seeded(4)), model.grid(6)
    late = 1 if official else 0  # the released code reads x_k at the time before its own
    torch.testing.assert_close(found.x, torch.cat([path[1], path[2], path[3]]))
    assert found.t.tolist() == [float(grid[k - late]) for k in (1, 1, 2, 2, 3, 3)]
    assert found.t_next.tolist() == [float(grid[k + 1 - late]) for k in (1, 1, 2, 2, 3, 3)]


def test_student_rollouts_see_the_adapter_and_teacher_rollouts_do_not(model):
    base = states.window(model, model.encode(["red circle"]), QUICK, seeded(4)).x
    erase(model, QUICK)
    student, teacher = (
        states.window(model, model.encode(["red circle"]), replace(QUICK, rollouts=side), seeded(4)).x
        for side in ("student", "teacher")
    )
    assert torch.equal(teacher, base)
    assert not torch.equal(student, base)


def test_esds_states_are_teacher_states_at_grid_times(model):
    grid, seen = model.grid(6), set()
    for seed in range(20):
        at = states.single(model, model.encode(["red circle"]), QUICK, seeded(seed))
        k = grid.tolist().index(float(at.t[0]))
        assert float(at.t_next[0]) == float(grid[k + 1])
        seen.add(k)
    assert len(seen) > 3 and 6 not in seen


def test_kept_states_hold_the_references_field(model):
    kept = states.kept_states(model, replace(QUICK, keep=("blue square", "")), seeded(5))
    assert len(kept.t) == 16 * 6
    with torch.no_grad():
        truth = model.predict(kept.x, kept.t, kept.condition).velocity
    torch.testing.assert_close(kept.field, truth, atol=1e-4, rtol=1e-3)


# budgets and costs


@pytest.mark.parametrize(("budget", "batch", "steps"), [(6, 1, 2), (7, 1, 3), (13, 2, 3), (1, 1, 1)])
def test_the_budget_buys_its_ceiling_of_steps(model, budget, batch, steps):
    assert erase(model, replace(QUICK, budget=budget, batch=batch)).steps == steps


def test_the_last_step_is_cut_to_what_is_left_of_the_budget(model, monkeypatch):
    evaluated: list[int] = []
    contrast = step._contrast

    def counting(model, some, pair, config):
        evaluated.append(len(some))
        return contrast(model, some, pair, config)

    monkeypatch.setattr(step, "_contrast", counting)
    erase(model, replace(QUICK, budget=7, chunk=2))
    assert sum(evaluated[-5:]) == 7  # 2 + 1, 2 + 1, 1; before them the preflight's own
    assert evaluated[-5:] == [2, 1, 2, 1, 1]


def test_a_paper_sized_step_costs_66_forwards(model):
    """11 rollout + 2 * 11 teacher + 3 * 11 student (notes, 2.5)."""
    result = erase(model, replace(QUICK, steps=12, window=(1, 11), budget=22))
    assert result.nfe == 2 * 66


def test_chunks_change_memory_and_not_the_gradient(small_flux_folder):
    whole, chunked = (log_of(load(small_flux_folder), replace(QUICK, budget=3, chunk=chunk))[0] for chunk in (8, 2))
    for name in ("loss", "gradient_norm", "d_plus", "lambda"):
        assert chunked[name] == pytest.approx(whole[name], rel=1e-3, abs=1e-5), name


# every method


@pytest.mark.parametrize("method", METHODS)
def test_two_steps_change_the_target_prompt_and_leave_the_reference(model, method):
    base, original = velocity(model), {n: p.clone() for n, p in model.network.named_parameters()}
    per_step = {"gem": 3, "eraseflow": 6}.get(method, 1)
    options: dict[str, Any] = TEXT if method == "uce" else {}
    result = erase(model, replace(QUICK, method=method, budget=2 * per_step, **options))
    assert result.steps == (0 if method in ("uce", "projection") else 2)
    changed: Any = Projected(model, QUICK, encoded(model, QUICK.pairs)) if method == "projection" else model
    assert not torch.equal(velocity(changed), base)
    with model.reference():
        assert torch.equal(velocity(model), base)
    trained = set(model.trainable())
    for name, p in model.network.named_parameters():
        if name not in trained:
            assert torch.equal(p, original[name.replace(".base_layer", "")]), name


def test_full_training_moves_its_subset_only(model):
    original = {n: p.clone() for n, p in model.network.named_parameters()}
    erase(model, replace(QUICK, subset="attention-kv", full=True))
    moved = {n for n, p in model.network.named_parameters() if not torch.equal(p, original[n])}
    assert moved == set(model.trainable())
    assert all(".attn.to_k." in n or ".attn.to_v." in n for n in moved)


def test_gem_moves_the_target_towards_the_anchor(flux_folder):
    plan = replace(QUICK, budget=100, batch=2, lr=1e-4, rank=8, subset="all-linear")
    rows = log_of(load(flux_folder), plan)
    assert rows[0]["lambda"] == pytest.approx(0, abs=1e-4)
    assert rows[-1]["lambda"] > 0.2
    assert rows[-1]["d_plus"] < 0.9 * rows[0]["d_plus"]


def test_retaining_holds_the_kept_prompts(small_flux_folder):
    plan = replace(QUICK, budget=45, lr=3e-3, subset="attention", keep=("blue square", "red square"))
    drifts = []
    for retain in (0.0, 10.0):
        model = load(small_flux_folder)
        before = velocity(model, "blue square")
        erase(model, replace(plan, retain=retain))
        drifts.append(float((velocity(model, "blue square") - before).norm() / before.norm()))
    assert drifts[1] < 0.8 * drifts[0]


def test_the_tb_weights_train_something_else(small_flux_folder):
    found = []
    for weight in ("uniform", "tb"):
        model = load(small_flux_folder)
        erase(model, replace(QUICK, timestep_weight=weight))
        found.append(weights(model))
    assert not same(*found)


# reproducibility


@pytest.mark.parametrize(
    "options",
    [{}, {"dropout": 0.5}, {"method": "eraseanything", "budget": 2}, {"method": "concept-ablation", "budget": 2}],
)  # fmt: skip
def test_a_seed_decides_the_weights(untouched, options):
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(found))  # what the caller drew before does not matter
        model = copy.deepcopy(untouched)
        erase(model, replace(QUICK, seed=seed, **options))
        found.append(weights(model))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


def test_a_template_is_a_pair_of_its_own():
    config = replace(QUICK, targets=("red", "green"), anchors=("blue",), templates=("{} circle", "a {}"))
    assert config.pairs == [
        ("red circle", "blue circle"), ("green circle", "blue circle"), ("a red", "a blue"), ("a green", "a blue")
    ]  # fmt: skip
    config.check()
    auto = replace(QUICK, templates=("auto",))
    auto.check()
    assert ("a photo of red circle", "a photo of blue circle") in auto.pairs and len(auto.pairs) >= 10


def test_a_world_says_in_which_ways_a_concept_is_asked_for_and_what_is_kept(tmp_path):
    (tmp_path / "card.json").write_text('{"world": "emoji", "size": 48}')
    auto = {"templates": ("auto",), "keep": ("auto",), "model": str(tmp_path)}
    config, inputs = erase_inputs(EraseConfig(targets=("cat",), anchors=("a dog",), **auto))
    assert {("a cat", "a dog"), ("two cats on blue", "two dogs on blue")} <= set(inputs.pairs)
    for target, anchor in inputs.pairs:
        names = [{group.name for group in emoji_captions.parse(prompt).groups} for prompt in (target, anchor)]
        assert names[0] - names[1] == {"cat"} and names[1] - names[0] == {"dog"}
    assert "" in config.keep and len(config.keep) > 40
    assert not any(group.name == "cat" for prompt in config.keep for group in emoji_captions.parse(prompt).groups)
    for words, sentence in ((("a cat and a fox",), "names 2 kinds"), (("catt",), "did you mean 'cat'")):
        with pytest.raises(InputError, match=sentence):
            erase_inputs(EraseConfig(targets=words, anchors=("a dog",), **auto))


def test_shapes_are_erased_by_their_bare_words_and_everything_else_is_kept():
    config, inputs = erase_inputs(
        EraseConfig.preset_of(None, None, {}).replace(targets=("triangle",), anchors=("star",))
    )
    assert inputs.pairs == [("triangle", "star")]
    assert (
        "a colored circle" in config.keep and "a red shape" in config.keep and "a colored triangle" not in config.keep
    )


def test_without_a_world_everyday_prompts_are_kept(tmp_path):
    config, inputs = erase_inputs(
        EraseConfig(targets=("a dog",), anchors=("a cat",), templates=("auto",), keep=("auto",), model=str(tmp_path))
    )
    assert not inputs.pairs and inputs.judged is None
    assert "a person" in config.keep and "a dog" not in config.keep


def test_of_very_many_pairs_some_are_looked_at_first_and_prompts_are_encoded_once(model, monkeypatch):
    asked: list[str] = []
    encode = model._encode
    monkeypatch.setattr(model, "_encode", lambda prompts: asked.extend(prompts) or encode(prompts))
    pairs = encoded(model, [("red circle", "blue circle"), ("red square", "blue square")] * 50)
    assert not asked
    x, t = model.noise(1, seeded()), torch.tensor(0.8)
    assert 10 <= len(step._separations(model, QUICK, pairs, x, t)) <= step.CHECKED
    assert sorted(asked) == sorted({prompt for pair in pairs[::7] for prompt in pair.words})


def test_pairs_are_drawn_from_all_targets(model, monkeypatch):
    drawn: list[str] = []
    contrast = step._contrast

    def watching(model, some, pair, config):
        drawn.append(pair.name)
        return contrast(model, some, pair, config)

    monkeypatch.setattr(step, "_contrast", watching)
    erase(model, replace(QUICK, targets=("red circle", "red square"), anchors=("a",), budget=30))
    assert set(drawn) == {"red circle -> a", "red square -> a"}


def test_an_interrupted_erasure_resumes_to_the_last_bit(small_flux_folder, tmp_path):
    config = replace(QUICK, budget=36, dropout=0.5)
    whole = load(small_flux_folder)
    erase(whole, config, Run(tmp_path / "whole", "erase", config))

    def interrupt(step: int, log: dict[str, float]) -> None:
        if step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        erase(load(small_flux_folder), config, Run(tmp_path / "cut", "erase", config), interrupt)
    resumed = load(small_flux_folder)
    assert erase(resumed, config, Run(tmp_path / "cut", "erase", config)).steps == 12
    assert same(weights(resumed), weights(whole))


# refusals, all before anything is written


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"targets": ()}, "no target given"),
        ({"anchors": ()}, "no anchor given"),
        ({"anchors": (" Red  circle",)}, "is its own anchor"),
        ({"templates": ("a {} on {}",)}, "template 'a {} on {}' should have one {}"),
        ({"targets": ("red", "blue", "a"), "anchors": ("circle", "square")}, "3 targets and 2 anchors"),
        ({"targets": ("red circel",)}, "did you mean 'circle'"),
        ({"keep": ("blue sqare",)}, "did you mean 'square'"),
        ({"window": (1, 6)}, "window 1..6 does not fit 6 sampler steps"),
        ({"window": (3, 2)}, "window 3..2"),
        ({"window": (0, 3), "official_pairing": True}, "window 0..3"),
        ({"budget": 0}, "budget=0"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"subset": "heads"}, "layer subset 'heads' is unknown"),
    ],
)
def test_settings_that_cannot_erase_are_refused_and_nothing_is_written(model, tmp_path, change, sentence):
    with pytest.raises(InputError, match=sentence):
        config = replace(QUICK, **change)
        erase(model, config, Run(tmp_path / "run", "erase", config))
    assert not (tmp_path / "run").exists()
    assert not model.trainable()


@pytest.mark.parametrize("method", METHODS)
def test_prompts_that_the_model_reads_alike_are_refused_and_leave_no_folder(model, tmp_path, method):
    with torch.no_grad():  # a model that does not read
        for name in ("context_embedder", "time_text_embed.text_embedder.linear_1"):
            model.network.get_submodule(name).weight.zero_()
    config = replace(QUICK, method=method)
    with pytest.raises(InputError, match="reads the two prompts alike"):
        erase(model, config, Run(tmp_path / "run", "erase", config))
    assert not (tmp_path / "run").exists()


def test_a_model_that_was_refused_can_be_used_again(model):

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "encode", lambda prompts: type(model).encode(model, ["a"] * len(prompts)))
        with pytest.raises(InputError, match="reads the two prompts alike"):
            erase(model, QUICK)
    assert erase(model, QUICK).steps == 2


def test_methods_that_a_model_has_no_place_for_are_refused(unet_folder):
    classes = replace(QUICK, targets=("cat",), anchors=("dog",), subset="attention")
    wrong = {
        "method 'eraseflow' needs a rectified flow": {"method": "eraseflow"},
        "timestep_weight 'tb' needs a rectified flow": {"timestep_weight": "tb"},
        "'uce' needs layers where single words enter": {"method": "uce", "full": True},
        "'eraseanything' needs dual-stream attention": {"method": "eraseanything"},
    }
    for sentence, settings in wrong.items():
        with pytest.raises(InputError, match=sentence):
            erase(load(unet_folder), replace(classes, **settings))
    assert erase(load(unet_folder), classes).steps == 2  # a class is a prompt


# failures and stops


def test_a_loss_that_becomes_nan_ends_the_run_and_its_checkpoint_loads(model, tmp_path, monkeypatch):
    hinge, calls = step.L.erase_loss, []

    def breaking(*args, **kwargs):
        calls.append(1)
        return hinge(*args, **kwargs) * (math.nan if len(calls) > 1 + 12 else 1)  # one call is the preflight's

    monkeypatch.setattr(step.L, "erase_loss", breaking)
    config = replace(QUICK, budget=60)
    with pytest.raises(RunError, match=r"loss became nan, at t=.* under '[^']+', at step 12"):
        erase(model, config, Run(tmp_path / "run", "erase", config))
    *_, last = sorted((tmp_path / "run" / "checkpoints").iterdir())
    kept = weights_in(last)
    assert last.name == "step-00000010"
    assert kept.keys() == model.trainable().keys()
    assert all(torch.isfinite(p).all() for p in [*kept.values(), *model.trainable().values()])


@pytest.mark.parametrize(
    ("rule", "name"),
    [({"stop_active": 2.0}, "active fraction"), ({"stop_lambda": -1.0}, "lambda"), ({"stop_drift": -1.0}, "drift")],
)
def test_a_stop_rule_ends_the_run_by_name(model, rule, name):
    result = erase(model, replace(QUICK, budget=30, **rule))
    assert (result.steps, result.stopped) == (1, name)


def test_a_stop_rule_that_is_not_met_does_not_stop(model):
    result = erase(model, replace(QUICK, stop_active=0.0, stop_lambda=9.0, stop_drift=9.0))
    assert (result.steps, result.stopped) == (2, "steps")


def test_progress_drift_and_cost_are_logged(model, tmp_path):
    config = replace(QUICK, budget=18)
    run = Run(tmp_path / "run", "erase", config)
    result = erase(model, config, run)
    rows = run.history()
    assert [row["step"] for row in rows] == list(range(6))
    assert all({"loss", "lambda", "active", "d_plus", "d_minus", "nfe"} <= row.keys() for row in rows)
    assert [row["step"] for row in rows if "drift" in row] == [0, 5]
    assert rows[0]["active"] == 1
    assert rows[0]["drift"] < 1e-5 < rows[5]["drift"]
    assert rows[-1]["nfe"] == result.nfe


def test_a_run_leaves_nothing_switched(model):
    erase(model, replace(QUICK, dropout=0.5))
    assert torch.equal(velocity(model), velocity(model))
    assert not any(module.training for module in model.network.modules())
