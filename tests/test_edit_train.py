"""Training an editor on its own sessions, on a tiny random Kontext pipeline: what a turn sees, what is learned, costs,
runs that resume to the bit, and judges that fail."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from experiments.tiny import flux_pipeline, kontext_pipeline
from fieldsmith import checkpoints
from fieldsmith.errors import InputError, NotFiniteError, RewardError, RunError
from fieldsmith.methods.edit import batch, rollouts
from fieldsmith.methods.edit.config import EditConfig
from fieldsmith.methods.edit.rollouts import Collection, EditContext, Inputs, World, collect
from fieldsmith.methods.edit.step import NO_VARIANCE
from fieldsmith.models.editing import edit as edited
from fieldsmith.models.editing import encode_unique, quantised
from fieldsmith.models.flux import Flux
from fieldsmith.models.flux_kontext import FluxKontext
from fieldsmith.rewards.sessions import Exact, load
from fieldsmith.run import Run
from fieldsmith.verb import Trained
from fieldsmith.worlds import scenes_judge
from fieldsmith.worlds.scenes import NOTHING, VOCABULARY, SceneSessions, ScenesWorld
from fieldsmith.worlds.scenes_judge import Channel
from tests import trained as train

WORLD = ScenesWorld(24)
TINY = {"vae_channels": (8, 8, 8), "latent_channels": 4, "layers": 1, "single_layers": 1, "heads": 1, "text_length": 10}
SHORT = EditConfig(
    epochs=2, groups=2, rollouts=2, turns=2, steps=2, updates=1, rank=4, dependency=0.5, lr=1e-3, max_mean=1.0
)  # fmt: skip
EDITS = 2 * 2 * 2  # P G T
Weights = dict[str, Tensor]


def editor() -> FluxKontext:
    return FluxKontext(kontext_pipeline(VOCABULARY, size=24, **TINY), "tiny")  # type: ignore[arg-type]


@dataclass(frozen=True)
class Scored:
    following: Tensor
    consistency: Tensor


def bright(sessions: Any, turn: int, before: Tensor, after: Tensor, first: Tensor) -> Scored:
    """A judge that no gradient goes through: brightness, and distance to the first image."""
    return Scored(after.mean((1, 2, 3)), 1 - (after - first).abs().mean((1, 2, 3)))


def inputs_of(config: EditConfig, judge: rollouts.Judge = bright) -> Inputs:
    """Of the scenes' world."""
    plan = World(scenes_judge.judge, partial(scenes_judge.likeness, WORLD), NOTHING)
    channel = Channel(config.contrast, config.blur, config.noise)
    return Inputs(lambda n, seed, turns: WORLD.sessions(n, turns, seed, config.dependency), judge, channel, plan)


def weights(model: FluxKontext) -> Weights:
    return {name: p.detach().clone() for name, p in model.trainable().items()}


def same(ours: Weights, theirs: Weights) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def trained(config: EditConfig, judge: rollouts.Judge = bright, run: Run | None = None) -> tuple[FluxKontext, Trained]:
    model = editor()
    return model, train.edit(model, config, inputs_of(config, judge), run)


@cache
def weights_of(config: EditConfig, judge: rollouts.Judge = bright) -> Weights:
    return weights(trained(config, judge)[0])


def moved(found: Weights) -> bool:
    """Whether any layer's adapter does something: one half of each starts at 0."""
    return any(bool(p.any()) for name, p in found.items() if "lora_B" in name)


# every objective


OBJECTIVES: dict[str, dict[str, Any]] = {
    "nft": {},
    "nft, each turn its own": {"credit": "turn", "adaptive": False},
    "nft, to go": {"credit": "to-go", "discount": 0.9, "fusion": "gdpo"},
    "nft, last alone": {"scoring": "last", "fusion": "reward", "kl": 0.1},
    "nft, product": {"aggregate": "product", "old": "ramp"},
    "nft, late": {"aggregate": "prefix", "old": "late"},
    "nft, slow": {"aggregate": "min", "old": "slow", "ema": 0.9},
    "nft, clean sources": {"sources": "clean", "credit": "turn"},
    "nft with both branches": {"identity": 0.5, "steady": 0.5, "noise": 0.05, "blur": 0.2},
    "nft, two updates, chunks": {"updates": 2, "chunk": 3, "identity": 0.5},
    "grpo": {"objective": "grpo"},
    "grpo, flow-sde": {"objective": "grpo", "sde": "flow-sde", "trust": "guard-hinge", "kl": 0.01},
    "grpo, dance-sde": {"objective": "grpo", "sde": "dance-sde", "trust": "fair-hinge", "window": (1, 1), "updates": 2},
    "grpo, clean sources": {"objective": "grpo", "sources": "clean", "credit": "turn", "chunk": 3},
    "supervised": {"objective": "supervised", "sources": "clean"},
    "supervised, own sources": {"objective": "supervised", "sources": "own"},
    "identity": {"objective": "none", "identity": 1.0},
    "steady": {"objective": "none", "steady": 1.0, "noise": 0.05},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_recipe_moves_the_adapter_and_repeats_to_the_bit(name: str) -> None:
    config = replace(SHORT, **OBJECTIVES[name])
    model, result = trained(config)
    assert (result.steps, result.stopped) == (config.updates * 2, "steps")
    assert result.nfe > 0
    found = weights(model)
    assert moved(found) and same(found, weights_of(config))
    if name in ("nft", "grpo", "supervised"):
        assert not same(found, weights_of(replace(config, seed=1)))
    with model.reference():
        assert all(torch.equal(p, q) for p, q in zip(base_of(model), base_of(editor()), strict=True))


def base_of(model: FluxKontext) -> list[Tensor]:
    return [p for name, p in model.network.named_parameters() if "lora" not in name]


def test_recipes_differ() -> None:
    """No setting of credit, fusion, aggregate or old policy is idle."""
    variants: list[dict[str, Any]] = [
        {}, {"credit": "turn"}, {"credit": "to-go"}, {"credit": "to-go", "discount": 0.5}, {"scoring": "last"},
        {"aggregate": "product"}, {"aggregate": "prefix"}, {"fusion": "reward"}, {"fusion": "gdpo"}, {"old": "slow"},
        {"sources": "clean"}, {"identity": 0.1}, {"against": "first", "consistency": 0.0}, {"kl": 1.0},
        {"contrast": 0.8}, {"nft_beta": 0.5}, {"adaptive": False},
    ]  # fmt: skip
    found = [weights_of(replace(SHORT, **variant)) for variant in variants]
    for i, one in enumerate(found):
        assert not any(same(one, other) for other in found[:i]), variants[i]


def test_full_weights_can_be_trained() -> None:
    model, _ = trained(replace(SHORT, full=True, lr=1e-4))
    assert not any("lora" in name for name in model.trainable())
    untouched = dict(editor().network.named_parameters())
    assert any(not torch.equal(p, untouched[name]) for name, p in model.trainable().items())


@pytest.mark.parametrize("objective", ["nft", "grpo"])
def test_of_one_turn_broadcast_is_the_turns_own_credit_to_the_bit(objective: Any) -> None:
    config = replace(SHORT, objective=objective, turns=1, rollouts=3)
    found = weights_of(config)
    for settings in ({"credit": "turn"}, {"credit": "to-go"}, {"aggregate": "product"}, {"scoring": "last"}):
        assert same(weights_of(replace(config, **settings)), found)  # type: ignore[arg-type]


# what a turn sees


class Spy:
    """A judge that keeps what it was shown, and scores edits by their place."""

    def __init__(self) -> None:
        self.shown: list[tuple[SceneSessions, int, Tensor, Tensor, Tensor]] = []

    def __call__(self, sessions: SceneSessions, turn: int, before: Tensor, after: Tensor, first: Tensor) -> Scored:
        self.shown.append((sessions, turn, before, after, first))
        n = torch.arange(len(after))
        return Scored(n / 100 + turn / 10, 1 - n / 100 - turn / 10)


@dataclass(frozen=True)
class Watched:
    model: FluxKontext
    spy: Spy
    sources: list[Tensor]
    found: Collection


def watched(config: EditConfig, monkeypatch: pytest.MonkeyPatch) -> Watched:
    """One collection, and every batch of source images that the model was given."""
    model, spy, sources = editor(), Spy(), []

    def states_of(given: FluxKontext, images: Tensor) -> Tensor:
        sources.append(images.clone())
        return given.encode_images(images)

    monkeypatch.setattr(rollouts, "states_of", states_of)
    context = EditContext.of(model, config, inputs_of(config, spy))
    return Watched(model, spy, sources, collect(context, 3))


THREE = replace(SHORT, groups=3, rollouts=2, turns=3)


@pytest.mark.parametrize("objective", ["nft", "grpo"])
@pytest.mark.parametrize("sources", ["own", "clean"])
def test_a_turn_edits_what_the_turn_before_made_as_the_channel_left_it(
    objective: Any, sources: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(THREE, objective=objective, sources=sources, contrast=0.8, blur=0.3)
    seen = watched(config, monkeypatch)
    sessions = seen.spy.shown[0][0]
    starts = [plan.start for plan in sessions.plans]
    assert len(starts) == 6 and starts[0::2] == starts[1::2] and starts[0] != starts[2] != starts[4]
    made = [quantised(seen.model.decode(x_0)) for x_0 in seen.found.x_0.chunk(3)]
    assert (made[0][0] - made[0][1]).abs().max() > 0.01  # siblings differ by their noise
    for turn in (1, 2, 3):
        planned = quantised(sessions.clean(turn - 1))
        if turn == 1 or sources == "clean":
            source, before = planned, planned
        else:
            source, before = Channel(contrast=0.8, blur=0.3)(made[turn - 2]), made[turn - 2]
        torch.testing.assert_close(seen.sources[turn - 1], source, atol=1e-6, rtol=0)
        assert torch.equal(quantised(seen.sources[turn - 1]), seen.sources[turn - 1])
        given, number, shown_before, shown_after, first = seen.spy.shown[turn - 1]
        assert number == turn and given.plans == sessions.plans
        torch.testing.assert_close(shown_before, before, atol=1e-6, rtol=0)
        torch.testing.assert_close(shown_after, made[turn - 1], atol=1e-6, rtol=0)
        torch.testing.assert_close(first, quantised(sessions.clean(0)), atol=1e-6, rtol=0)


def test_a_collection_keeps_each_edits_source_words_and_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """m = T P G edits turn by turn: the score of group p, run g, turn t is at (p, g, t)."""
    seen = watched(THREE, monkeypatch)
    found, sessions = seen.found, seen.spy.shown[0][0]
    assert found.turn.tolist() == [0] * 6 + [1] * 6 + [2] * 6 and found.unit.tolist() == list(range(6)) * 3
    assert found.following.shape == (3, 2, 3)
    for p, g, t in ((0, 0, 0), (2, 1, 0), (1, 0, 2)):
        assert float(found.following[p, g, t]) == pytest.approx((2 * p + g) / 100 + (t + 1) / 10)
        assert float(found.consistency[p, g, t]) == pytest.approx(1 - (2 * p + g) / 100 - (t + 1) / 10)
    for at in (0, 5, 7, 12, 17):
        turn, unit = divmod(at, 6)
        words = seen.model.encode([sessions.prompts(turn + 1)[unit]])
        kept = found.condition(torch.tensor([at]))
        assert all(torch.equal(kept.parts[name], words.parts[name]) for name in words.parts)
        latents = seen.model.encode_images(seen.sources[turn][unit : unit + 1])
        torch.testing.assert_close(found.source[at : at + 1], latents)
    assert len(found.texts) == 3 * 3  # a group's words are kept once a turn


def test_chunks_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = (watched(replace(THREE, chunk=chunk), monkeypatch).found for chunk in (256, 4))
    torch.testing.assert_close(parts.x_0, whole.x_0, atol=2e-3, rtol=0)  # a level of 8 bits may tip over
    torch.testing.assert_close(parts.following, whole.following)


def test_grpo_rows_are_the_steps_of_their_own_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row's words and source lead the network to what it said when the row was drawn."""
    config = replace(THREE, objective="grpo", steps=4, chunk=4)
    seen = watched(config, monkeypatch)
    rows = seen.found.transitions
    assert rows is not None and len(rows) == 18 * 3  # the last step of CPS is certain
    assert torch.bincount(rows.prompt, minlength=18).tolist() == [3] * 18
    context = EditContext.of(seen.model, config, inputs_of(config))
    with torch.no_grad():
        at = rows.prompt
        output = context.output(rows.x, rows.step, seen.found.condition(at), seen.found.source[at])
        astray = context.output(rows.x, rows.step, seen.found.condition(at), seen.found.source[at.roll(3)])
    torch.testing.assert_close(output, rows.output_old, atol=1e-5, rtol=0)
    assert (astray - rows.output_old).abs().max() > 1e-3


def test_the_exact_judge_reads_a_collection() -> None:
    for against in ("first", "previous"):
        config = replace(THREE, against=against)  # type: ignore[arg-type]
        context = EditContext.of(editor(), config, inputs_of(config, Exact(config.against)))
        found = collect(context, 0)
        for part in (found.following, found.consistency):
            assert part.shape == (3, 2, 3) and part.min() >= 0 and part.max() <= 1


# interrupted runs


RESUMED: dict[str, dict[str, Any]] = {
    "nft": {"identity": 0.1, "steady": 0.1, "noise": 0.02},
    "nft, slow": {"old": "slow", "lr": 1e-2},
    "grpo": {"objective": "grpo", "updates": 2, "ema": 0.9},
}


def breaking(at: int, error: BaseException) -> Callable[..., Collection]:
    """A collection that breaks off at an epoch."""

    def broken(context: EditContext, epoch: int) -> Collection:
        if epoch == at:
            raise error
        return collect(context, epoch)

    return broken


def resumed(config: EditConfig, cut: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Break off at an epoch, go on, and end as a whole run does; where the checkpoint in between is."""
    run = Run(tmp_path / "whole", "edit", config)
    whole, result = trained(config, run=run)
    folder = tmp_path / "cut" / "checkpoints"
    with monkeypatch.context() as patch:
        patch.setattr(batch, "collect", breaking(cut, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            trained(config, run=Run(tmp_path / "cut", "edit", config))
    *_, kept = sorted(folder.iterdir())
    shutil.copytree(kept, tmp_path / kept.name)
    again = Run(tmp_path / "cut", "edit", config)
    model, ours = trained(config, run=again)
    assert same(weights(model), weights(whole))
    assert (ours.steps, ours.nfe) == (result.steps, result.nfe)
    assert again.history() == run.history()
    return tmp_path / kept.name


@pytest.mark.parametrize("name", RESUMED)
def test_an_interrupted_run_ends_with_the_weights_of_a_whole_one(
    name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(SHORT, epochs=4, **RESUMED[name])
    assert resumed(config, 3, tmp_path, monkeypatch).name == f"step-{3 * config.updates:08d}"


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log is longer than the checkpoint, which holds the old policy: the present one would end elsewhere."""
    save = checkpoints.save_step
    monkeypatch.setattr(checkpoints, "save_step", lambda run, done, *rest: done != 11 and save(run, done, *rest))
    kept = resumed(replace(SHORT, epochs=12, old="slow", lr=1e-2), 11, tmp_path, monkeypatch)
    saved = train.weights_in(kept)
    apart = [(saved[name] - saved[f"old.{name}"]).abs().max() for name in saved if not name.startswith("old.")]
    assert kept.name == "step-00000010" and len(saved) == 2 * len(apart) and max(apart) > 1e-4


# costs


def cost(config: EditConfig, **more: Any) -> int:
    return trained(replace(config, **more))[1].nfe


def test_forward_equivalents_are_counted_by_the_network_call() -> None:
    """P G T (K + R + 3 R) of NFT, (K + 3 K') of GRPO; branches 3, and 4 after the first turn; a reference 1 more."""
    one = replace(SHORT, epochs=1, turns=3, steps=4, renoise=2)
    edits = 2 * 2 * 3
    nft = edits * (4 + 2 + 3 * 2)
    assert cost(one) == nft and cost(one, epochs=3) == 3 * nft and cost(one, updates=2, chunk=5) == nft
    assert cost(one, renoise=9) == edits * (4 + 4 + 3 * 4)  # there are four times to noise at
    assert cost(one, kl=0.1) == nft + edits * 2
    assert cost(one, identity=1.0) == nft + 3 * edits
    assert cost(one, steady=1.0, noise=0.1) == nft + 4 * (edits - 4) and cost(one, steady=1.0) == nft
    assert cost(one, objective="grpo") == edits * (4 + 3 * 3)
    assert cost(one, objective="grpo", sde="dance-sde") == edits * (4 + 3 * 4)
    assert cost(one, objective="grpo", window=(1, 2)) == edits * (4 + 3 * 2)
    assert cost(one, objective="supervised", sources="clean") == edits * 3 * 2
    assert cost(one, objective="supervised") == edits * (4 + 3 * 2)
    assert cost(one, objective="none", identity=1.0) == edits * (4 + 3)


def test_edits_that_teach_nothing_are_not_paid_for_twice() -> None:
    """One group's sessions all score alike: it is rolled out and noised again, but not learned from."""

    def half(sessions: Any, turn: int, before: Tensor, after: Tensor, first: Tensor) -> Scored:
        score = after.mean((1, 2, 3))
        score[:2] = 0.5
        return Scored(score, torch.full_like(score, 0.5))

    config = replace(SHORT, epochs=1)
    assert trained(config, half)[1].nfe == EDITS * (2 + 2) + EDITS // 2 * 3 * 2


def test_a_budget_ends_the_run_after_the_collection_that_reaches_it() -> None:
    each = EDITS * (2 + 2 + 3 * 2)
    config = replace(SHORT, epochs=9)
    for budget, epochs in ((1, 1), (each, 1), (each + 1, 2), (3 * each, 3)):
        _, result = trained(replace(config, budget=budget))
        assert (result.steps, result.nfe, result.stopped) == (epochs, epochs * each, "budget")
    _, result = trained(replace(config, updates=2, budget=each + 1))
    assert (result.steps, result.stopped) == (4, "budget")  # never between the updates on one collection


# judges that fail


def constant(sessions: Any, turn: int, before: Tensor, after: Tensor, first: Tensor) -> Scored:
    return Scored(torch.full((len(after),), 0.4), torch.full((len(after),), 0.6))


@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize("objective", ["nft", "grpo"])
def test_a_judge_that_says_the_same_of_all_is_refused_before_training(
    objective: Any, turns: int, tmp_path: Any
) -> None:
    config = replace(SHORT, objective=objective, turns=turns)
    model, run = editor(), Run(tmp_path / "run", "edit", config)
    with pytest.raises(InputError, match=r"groups with a signal is 0, .*raise rollouts"):
        train.edit(model, config, inputs_of(config, constant), run)
    assert not run.folder.exists() and model.spec is None and not model.trainable()
    train.edit(model, config, inputs_of(config))  # it can be used again
    assert same(weights(model), weights_of(config))


def test_groups_that_are_easy_are_left_out() -> None:
    def easy(sessions: Any, turn: int, before: Tensor, after: Tensor, first: Tensor) -> Scored:
        score = 0.95 + 0.04 * after.mean((1, 2, 3))
        return Scored(score, score)

    with pytest.raises(InputError, match="groups with a signal"):
        trained(replace(SHORT, max_mean=0.9), easy)
    assert moved(weights_of(replace(SHORT, max_mean=1.0), easy))


class Changing:
    """Brightness for so many calls, then something else."""

    def __init__(self, calls: int, then: rollouts.Judge):
        self.left, self.then = calls, then

    def __call__(self, *shown: Any) -> Any:
        self.left -= 1
        return bright(*shown) if self.left >= 0 else self.then(*shown)


def calls(epochs: int, config: EditConfig) -> int:
    """Of the judge, in as many epochs; the preflight's collection is the first epoch's."""
    return epochs * config.turns


@pytest.mark.parametrize("objective", ["nft", "grpo"])
def test_a_judge_that_goes_silent_stops_the_run_with_advice(objective: Any) -> None:
    config = replace(SHORT, objective=objective, epochs=30, patience=3)
    model, result = trained(config, Changing(calls(2, config), constant))
    assert (result.steps, result.stopped) == (2 + 3, NO_VARIANCE)
    assert same(weights(model), weights_of(replace(config, epochs=2)))  # nothing is learned from silence


def test_silence_is_forgiven_where_a_signal_comes_back() -> None:
    config = replace(SHORT, epochs=6, patience=2)
    silent = {2, 4, 5}  # epochs
    asked = iter(epoch in silent for epoch in range(6) for _ in range(config.turns))
    model, result = trained(config, lambda *shown: (constant if next(asked) else bright)(*shown))
    assert (result.steps, result.stopped) == (6, NO_VARIANCE) and moved(weights(model))


def dead(*shown: Any) -> Scored:
    raise RunError("the judge does not answer")


def broken(before: Tensor, after: Tensor, instructions: list[str]) -> Any:
    raise KeyError("following")


def not_a_number(before: Tensor, after: Tensor, instructions: list[str]) -> Any:
    return [0.5] * len(after), [0.5] * (len(after) - 1) + [float("nan")]


def too_few(before: Tensor, after: Tensor, instructions: list[str]) -> Any:
    return torch.rand(len(after) - 1), torch.rand(len(after))


BAD = [
    (dead, RunError, "does not answer"),
    (load(broken), RewardError, r"judge 'broken' raised KeyError: 'following' .*fix the function"),
    (load(not_a_number), RewardError, r"judge 'not_a_number' \(consistency\) returned nan for image 4 of 4"),
    (load(too_few), RewardError, r"judge 'too_few' \(following\) returned .* of shape \(3,\)"),
]


@pytest.mark.parametrize(("judge", "error", "text"), BAD)
def test_a_judge_that_fails_at_once_leaves_the_model_as_it_was(
    judge: Any, error: Any, text: str, tmp_path: Any
) -> None:
    model, run = editor(), Run(tmp_path / "run", "edit", SHORT)
    with pytest.raises(error, match=text):
        train.edit(model, SHORT, inputs_of(SHORT, judge), run)
    assert not run.folder.exists() and model.spec is None


def test_after_a_failure_no_further_turn_is_judged() -> None:
    asked: list[int] = []

    def failing(before: Tensor, after: Tensor, instructions: list[str]) -> Any:
        asked.append(len(after))
        raise KeyError("key")

    with pytest.raises(RewardError, match="KeyError"):
        trained(replace(SHORT, turns=3), load(failing))
    assert asked == [4]


@pytest.mark.parametrize(("judge", "error", "text"), BAD[:3])
def test_a_judge_that_fails_later_leaves_a_checkpoint_to_go_on_from(
    judge: Any, error: Any, text: str, tmp_path: Any
) -> None:
    """What goes on judges what is left and nothing else: neither runs nor judges in its preflight."""
    config = replace(SHORT, epochs=4)
    with pytest.raises(error, match=text):
        trained(config, Changing(calls(2, config), judge), Run(tmp_path / "run", "edit", config))
    *_, kept = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert kept.name == "step-00000002"
    rest = Changing(calls(2, config), dead)
    model, result = trained(config, rest, Run(tmp_path / "run", "edit", config))
    whole = Changing(calls(4, config), dead)
    assert result.steps == 4 and same(weights(model), weights_of(config, whole))
    assert rest.left == whole.left == 0  # every collection is judged once, the preflight's too


def test_a_judge_may_change_the_images_that_it_is_shown() -> None:
    def greedy(before: Tensor, after: Tensor, instructions: list[str]) -> Any:
        scores = after.mean((1, 2, 3)), 1 - (after - before).abs().mean((1, 2, 3))
        before.zero_()
        after.zero_()
        return scores

    def modest(before: Tensor, after: Tensor, instructions: list[str]) -> Any:
        return greedy(before.clone(), after.clone(), instructions)

    assert same(*(weights(trained(SHORT, load(judge))[0]) for judge in (greedy, modest)))


def test_images_that_are_not_finite_are_the_models_fault() -> None:
    model = Flat(kontext_pipeline(VOCABULARY, size=24, **TINY), "tiny")  # type: ignore[arg-type]
    config = replace(SHORT, epochs=3)

    def poison(done: int, log: dict[str, float]) -> None:
        for p in model.trainable().values():
            p.data.mul_(torch.nan if done == 2 else 1)

    sentence = r"network's output holds nan in \d+ of \d+ rows, at t=1 under '.*', at step 2; .*lower lr than 0\.001"
    with pytest.raises(NotFiniteError, match=sentence):
        train.edit(model, config, inputs_of(config), callback=poison)


# bad input


def test_turns_beyond_memory_are_refused_with_how_many_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(SHORT, turns=8, groups=10, rollouts=10)
    state = 9 * 16 * 4  # tokens, channels, bytes

    def room(turns: float, kept: int) -> None:
        free = turns * 100 * (2 + 4 * kept + 9) * state
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=int(free)))

    for settings, kept in (({}, 3), ({"renoise": 5}, 5), ({"objective": "grpo", "steps": 5}, 4)):
        room(3.5, kept)
        with pytest.raises(InputError, match=r"turns=8 of 10 x 10 sessions need .* 3 turns fit, or lower groups"):
            trained(replace(config, **settings))  # type: ignore[arg-type]


def test_a_model_that_draws_from_words_alone_is_refused() -> None:
    flux = Flux(flux_pipeline(VOCABULARY, text_length=10), "tiny")
    with pytest.raises(InputError, match=r"tiny \(family flux\) draws from words alone"):
        train.edit(flux, SHORT, inputs_of(SHORT))


def test_sessions_without_planned_images_cannot_supervise() -> None:
    inputs = replace(inputs_of(SHORT), world=None)
    for settings in ({"objective": "supervised"}, {"sources": "clean"}):
        with pytest.raises(InputError, match="need planned images"):
            train.edit(editor(), replace(SHORT, **settings), inputs)  # type: ignore[arg-type]
    train.edit(editor(), SHORT, inputs)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"turns": 0}, "turns=0"), ({"rollouts": 1}, "use at least 2"), ({"evaluate": -1}, "evaluate=-1"),
        ({"steps": 1}, "steps=1"), ({"identity": -1.0}, "identity=-1.0"),
        ({"lr": 0.0}, "lr=0.0"), ({"floor": float("nan")}, "floor=nan"), ({"noise": -0.1}, "noise=-0.1"),
        ({"blur": 1.1}, "blur=1.1"), ({"budget": 0}, "budget=0"), ({"ema": 1.0}, "ema=1.0"),
        ({"objective": "none"}, "trains nothing"), ({"objective": "none", "steady": 1.0}, "teaches nothing"),
        ({"steady": 1.0, "turns": 1}, "turns=2 or more"), ({"following": 0.0, "consistency": 0.0}, "nothing to reward"),
        ({"objective": "grpo", "old": "slow"}, "is NFT's"), ({"credit": "turn", "scoring": "last"}, "needs every turn"),
        ({"objective": "grpo", "window": (3, 6)}, "window=3 6"),
        ({"objective": "grpo", "window": (2, 1)}, "window=2 1"),
        ({"objective": "grpo", "window": (3, 6), "sources": "clean"}, "window=3 6"),
    ],
)  # fmt: skip
def test_settings_that_cannot_learn_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        replace(EditConfig(), **settings).check()


@pytest.mark.parametrize("settings", [{"steps": 3, "window": (2, 2)}, {"noise_level": 0.0}], ids=["window", "noise"])
def test_grpo_without_a_step_that_has_a_density_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="no step with a density"):
        trained(replace(SHORT, objective="grpo", **settings))


# learning


class Flat(FluxKontext):
    """Each token is a grey cell, its channels' mean: the random autoencoder's images are of equal brightness."""

    def _decode(self, latents: Tensor) -> Tensor:
        cells = (0.5 + 0.5 * latents.mean(-1)).clamp(0, 1).reshape(-1, 1, 3, 3)
        return cells.repeat_interleave(8, 2).repeat_interleave(8, 3).expand(-1, 3, -1, -1)


def brightness(model: FluxKontext) -> float:
    """Of what the editor makes of 64 held-out sessions in two turns on its own results."""
    sessions = WORLD.sessions(64, 2, 999)
    images = quantised(sessions.clean(0))
    generator = torch.Generator().manual_seed(7)
    for turn in (1, 2):
        images = edited(model, encode_unique(model, sessions.prompts(turn)), images, generator, 3)
    return float(images.mean())


def dark(*shown: Any) -> Scored:
    found = bright(*shown)
    return replace(found, following=1 - found.following)


LEARNING = EditConfig(
    epochs=8, groups=4, rollouts=8, turns=2, steps=3, updates=1, rank=8, subset="all-linear", lr=1e-2, consistency=0.0,
    max_mean=1.0, floor=1e-4,
)  # fmt: skip


@pytest.mark.parametrize("objective", ["nft", "grpo"])
@pytest.mark.parametrize(("judge", "sign"), [(bright, 1), (dark, -1)])
def test_what_the_judge_likes_is_learned(objective: Any, judge: Any, sign: int) -> None:
    model = Flat(kontext_pipeline(VOCABULARY, size=24, **TINY), "tiny")  # type: ignore[arg-type]
    config = replace(LEARNING, objective=objective)
    train.edit(model, config, inputs_of(config, judge))
    after = brightness(model)
    with model.reference():
        before = brightness(model)
    assert sign * (after - before) > 0.08


def test_the_branches_and_the_supervised_objective_lower_their_losses(tmp_path: Any) -> None:
    """By the run's own log, last against first third."""
    for name, settings in (
        ("loss", {"objective": "supervised", "sources": "clean"}),
        ("identity", {"objective": "none", "identity": 1.0}),
    ):
        config = replace(LEARNING, epochs=12, rollouts=3, **settings)  # type: ignore[arg-type]
        run = Run(tmp_path / name, "edit", config)
        trained(config, run=run)
        losses = [line[name] for line in run.history()]
        assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


@pytest.mark.parametrize("settings", [{"objective": "none", "identity": 1.0}, {"steady": 1.0, "noise": 0.1}])
def test_more_updates_than_rows_leave_none_of_them_without_its_branch(settings: dict[str, Any]) -> None:
    config = replace(SHORT, epochs=1, groups=1, updates=8, **settings)
    assert trained(config)[1].steps == 8
