"""What a run spends, from its settings alone: forward-equivalents and calls of its reward, verb by verb.

In: a model (a blueprint will do) and a verb's settings. Out: what the verb's own loop counts, in its own units: a
forward of one state is 1, its backward 2. Where a number hangs on chance it is the mean, and where rows without a
signal are left out it is the most.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fieldsmith.methods.align.collect import thinned
from fieldsmith.methods.align.config import REGRESSIONS, AlignConfig
from fieldsmith.methods.align.context import AlignContext
from fieldsmith.methods.distill.bank import SHARD, Source, place
from fieldsmith.methods.distill.config import DistillConfig
from fieldsmith.methods.distill.loop import PROFILE, Feed, fitted, operations
from fieldsmith.methods.distill.objectives import objective_of
from fieldsmith.methods.edit.config import EditConfig
from fieldsmith.methods.edit.rollouts import Setting as EditSetting
from fieldsmith.methods.erase.config import EraseConfig
from fieldsmith.methods.policy.rollouts import Rollout, roll
from fieldsmith.methods.sharpen.config import JACOBIAN, SharpenConfig
from fieldsmith.models.core import Model
from fieldsmith.models.footprint import asked
from fieldsmith.paths import Prediction


@dataclass(frozen=True)
class Cost:
    """Forward-equivalents and reward calls of a run, and what they hang on ('' where they are certain)."""

    forward_equivalents: float
    reward_calls: int = 0
    hangs_on: str = ""


def forwards_of_one(model: Model, guidance: float | None) -> int:
    """Forwards that a prediction at one state takes: two where guidance has two branches."""
    if guidance in (None, 1.0) and not getattr(model, "scales", None):
        return 1
    one = asked(model, 1)
    with torch.no_grad(), model.count_nfe() as nfe:
        model.predict(one.x, one.t, one.condition, guidance)
    return nfe.total


def erase(model: Model, config: EraseConfig) -> Cost:
    if config.method in ("uce", "projection"):
        return Cost(0)
    rolled = forwards_of_one(model, config.rollout_guidance)
    asked_ = forwards_of_one(model, config.loss_guidance)
    first, last = config.window
    B, K = config.batch, config.steps
    per_step = B * {"gem": last - first + 1, "eraseflow": K}.get(config.method, 1)
    steps = -(-config.budget // per_step)
    kept = max(16, len(config.keep or ("",))) * K
    retain = kept + 3 * steps * (per_step // 4 or 1) * asked_ if config.retain else 0
    halfway = (K - 1) / 2 * B * rolled  # a rollout that stops at random
    words = "where rollouts stop, which is random"
    if config.method == "gem":
        return Cost(steps * last * B * rolled + 5 * config.budget * asked_ + retain)
    if config.method == "esd":
        return Cost(steps * (halfway + 5 * B * asked_) + retain, hangs_on=words)
    if config.method == "concept-ablation":
        bank = 4 * len(config.targets) * K * B * rolled
        return Cost(bank + steps * B * asked_ * (4 + (3 if config.prior else 0)) + retain)
    if config.method == "eraseflow":
        return Cost(4 * steps * K * B * rolled + retain)
    even, odd = -(-steps // 2), steps // 2
    words_seen = len(config.keep[:3] or ("",))
    each = even * 5 + odd * 3 * (3 + words_seen)
    return Cost(kept * asked_ + steps * halfway + each * B * asked_ + retain, hangs_on=words)


def align(model: Model, config: AlignConfig) -> Cost:
    unit, roots = forwards_of_one(model, config.guidance), config.prompts_per_epoch * config.rollouts
    if config.estimator == "pathwise":
        K, late = config.steps, 2 * config.steps // 3
        one = (late + K - 1) / 2 + 3 if config.random_stop else K + 2 * config.truncate
        steps = config.epochs * config.updates
        words = "the step where ReFL stops, which is random" if config.random_stop else ""
        return Cost(steps * roots * one * unit, steps * roots, words)
    setting = align_context(model, config)
    rollout, rolled = rehearsed(setting, roots)
    collected, rows = _estimated(setting, rollout)
    each = 3.0  # the loss's forward and backward
    if config.kl or config.estimator in REGRESSIONS or config.estimator == "balance":
        each += 1
    each += {"residual": 6, "value": 3}.get(config.auxiliary, 0)
    anchored = 0
    if config.anchor and len(rollout.ode_states.step):
        shares = [len(part) for part in torch.arange(rows).tensor_split(config.updates)]
        anchored = sum(4 * min(len(rollout.ode_states.step), max(1, n // 10)) for n in shares)
    prepared = 0
    if config.strength == "jacobian":
        each_prompt = max(2, 64 // len(config.prompts))
        prepared = each_prompt * min(len(config.prompts), 64 // each_prompt) * config.steps
    total = prepared + config.epochs * (rolled + collected + rows * each + anchored)
    drops = config.estimator in ("reverse-noise", "nft", "awm") and not config.kl
    words = "how many rewards differ: rows of advantage 0 are left out" if drops else ""
    return Cost(total * unit, config.epochs * len(rollout.x_0), words)


def align_context(model: Model, config: AlignConfig) -> AlignContext:
    """The run's schedule and plan, without a reward or the rollouts that measure its prior."""
    reward: Any = None
    return AlignContext.of(model, replace(config, strength="ratio"), reward)


def rehearsed(setting: AlignContext, roots: int) -> tuple[Rollout, int]:
    """A collection's rollout with states of one number and no network, and the forwards that it asks for."""
    spent = 0

    def nothing(x: Tensor, t: Tensor, prompt: Tensor) -> Prediction:
        nonlocal spent
        spent += len(x)
        return Prediction(setting.schedule.kind, torch.zeros_like(x), x, t.expand(len(x)), setting.model.path)

    generator = torch.Generator().manual_seed(0)
    x, prompt = torch.zeros(roots, 1), torch.zeros(roots, dtype=torch.long)
    return roll(nothing, x, prompt, setting.schedule, setting.plan, setting.sde, setting.noise_level, generator), spent


def _estimated(setting: AlignContext, rollout: Rollout) -> tuple[int, int]:
    """States that a collection asks for beyond its rollout, as forward-equivalents, and the rows that it gives."""
    config, ends, K = setting.config, len(rollout.x_0), len(setting.schedule)
    if config.estimator in ("nft", "awm"):
        again = ends * min(config.renoise, K)
        return again, again
    generator = torch.Generator().manual_seed(0)
    kept = (
        thinned(rollout, config.train_steps, generator)
        if config.train_steps
        else torch.arange(len(rollout.transitions))
    )
    spent = len(rollout.transitions) if config.soft else 0
    if config.estimator == "tweedie" or config.auxiliary in ("residual", "value"):
        some = rollout.transitions if config.auxiliary != "none" else rollout.transitions[kept]
        spent += sum(_tweedie(config, int(k), K) for k in some.step)
    elif config.estimator == "adjoint":
        spent += 3 * ends * _carried(rollout, K)
    return spent, len(kept)


def _tweedie(config: AlignConfig, k: int, K: int) -> int:
    """Forward-equivalents of the reward's gradient at one row of step k."""
    first = k if config.state == "current" else k + 1
    ahead = min(config.lookahead, K - first)
    if first + ahead == K:  # clean already: nothing is asked at the end
        return 3 * ahead
    return 3 * ahead + (3 if config.jacobian == "full" else 1)


def _carried(rollout: Rollout, K: int) -> int:
    """Steps over which the adjoint method carries a gradient back."""
    whole = [bool((rollout.lineage[:, k] >= 0).all()) for k in range(K)]
    steps = 0
    for k in reversed(range(1, K)):
        if not whole[k] and not whole[k - 1]:
            break
        steps += 1
    return steps


def edit(model: Model, config: EditConfig) -> Cost:
    setting = edit_setting(model, config)
    unit, K = forwards_of_one(model, config.guidance), config.steps
    edits = config.groups * config.rollouts * config.turns
    rolls = config.objective in ("nft", "grpo") or config.sources == "own" or config.identity or config.steady
    total = edits * K if rolls else 0
    many = min(config.renoise, K)
    rows = {"nft": edits * many, "supervised": edits * many, "grpo": edits * int(setting.drawn.sum())}
    n = rows.get(config.objective, 0)
    total += n * (4 if config.objective == "nft" else 3)  # the old policy is asked at re-noised rows
    total += n if config.kl and config.objective in ("nft", "grpo") else 0
    if config.identity:
        total += 3 * config.updates * max(1, edits // config.updates)
    if config.steady and (config.contrast != 1 or config.blur > 0 or config.noise > 0):
        later = edits - config.groups * config.rollouts
        total += 4 * config.updates * min(later, max(1, later // config.updates))
    epochs = config.epochs
    if config.budget:
        epochs = min(epochs, max(1, math.ceil(config.budget / (total * unit))))
    hangs = config.objective in ("nft", "grpo")
    words = "how many groups' scores differ: the others are left out" if hangs else ""
    return Cost(epochs * total * unit, epochs * edits if rolls else 0, words)


def edit_setting(model: Model, config: EditConfig) -> EditSetting:
    """The run's schedule, on sessions that nobody has drawn."""
    from fieldsmith.methods.edit.rollouts import Task

    nothing: Any = None
    return EditSetting.of(model, config, Task(nothing, nothing, config.sessions == "auto"), nothing)


def distill(teacher: Model, student: Model, config: DistillConfig) -> Cost:
    """In forwards of the student, as its run counts them."""
    feed = feed_of(teacher, config)
    evaluations = feed.rows * (2 if feed.paired and not feed.objective.guided_input else 1)
    asked_ = config.steps * feed.a_step()
    if config.bank:
        first, count = place(max(0, config.steps - 1), feed.rows, config.bank, config.reuse)
        asked_ = 2 * SHARD * (first + count)
    asked_ += PROFILE if fitted(config) else 0
    ratio = operations(teacher, asked(teacher, 1).condition) / operations(student, asked(student, 1).condition)
    return Cost(3 * config.steps * evaluations + ratio * asked_)


def feed_of(teacher: Model, config: DistillConfig) -> Feed:
    """What a step's rows are, without data."""
    none = torch.zeros(1, dtype=torch.long)
    return Feed(teacher, Source(torch.zeros(1, 1), none, ("",)), config, objective_of(config), None)


def sharpen(config: SharpenConfig) -> Cost:
    """In forwards of the network that trains: the model, or the guide. A forward-mode product counts one."""
    probed = max(1, round(config.probes * config.batch)) if config.method in JACOBIAN else 0
    return Cost(config.steps * (3 * config.batch + probed))
