"""What each verb's update asks of memory, for `footprint` to rehearse: its forwards, its largest graph, what it keeps.

In: a model with training attached (a blueprint will do) and a verb's settings. Out: an `Update`. States are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fieldsmith.commands import costs
from fieldsmith.methods.align.config import FIRST_ORDER, REGRESSIONS, AlignConfig
from fieldsmith.methods.distill.bank import SHARD, place
from fieldsmith.methods.distill.config import DistillConfig
from fieldsmith.methods.distill.loop import fitted
from fieldsmith.methods.edit.config import EditConfig
from fieldsmith.methods.erase.config import EraseConfig
from fieldsmith.methods.sharpen.config import JACOBIAN, SharpenConfig
from fieldsmith.models.core import Condition, Model
from fieldsmith.models.footprint import Update, asked, row_bytes
from fieldsmith.models.jacobians import jvp

Forward = Callable[[], Tensor]


def state_bytes(model: Model) -> int:
    return 4 * model.noise(1, torch.Generator().manual_seed(0)).numel()


def _said(model: Model, n: int, guidance: float | None = None, seen: bool = False) -> Forward:
    """What the network says at n states; `seen`: with a source image each."""

    def forward() -> Tensor:
        what = asked(model, n)
        condition = _with_sources(model, what.condition, what.x) if seen else what.condition
        return model.predict(what.x, what.t, condition, guidance).value

    return forward


def _with_sources(model: Any, condition: Condition, x: Tensor) -> Condition:
    found: Condition = model.with_latents(condition, torch.zeros_like(x))
    return found


def _decoded(model: Model, n: int) -> Forward:
    return lambda: model.decode(asked(model, n).x)


def _regressed(model: Model, n: int, guidance: float | None, references: int, seen: bool = False) -> Forward:
    """A loss at n states against what the reference says there, `references` times."""

    def loss() -> Tensor:
        with torch.no_grad(), model.reference():
            first = _said(model, n, guidance, seen)() if references else None
            targets = [] if first is None else [first, *(first.clone() for _ in range(references - 1))]
        said = _said(model, n, guidance, seen)()
        apart = [(said - target).square().flatten(1).sum(1) for target in targets or [torch.zeros_like(said)]]
        return torch.stack(apart).mean()

    return loss


def _chain(model: Model, n: int, guidance: float | None, links: int, then: Callable[[Tensor], Tensor]) -> Forward:
    """A loss through `links` steps of a sampler and what comes then."""

    def loss() -> Tensor:
        what = asked(model, n)
        x = what.x
        for _ in range(links):
            x = x + 0.1 * model.predict(x, what.t, what.condition, guidance).value
        return then(x).square().mean()

    return loss


def _pulled(model: Model, n: int, guidance: float | None, links: int) -> Forward:
    """The gradient of a reward in n states, through `links` forwards and the decoder."""

    def gradient() -> Tensor:
        what = asked(model, n)
        x = what.x.requires_grad_(True)
        with torch.enable_grad():
            x_0 = x * 1.0
            for _ in range(links):
                x_0 = x_0 + 0.1 * model.predict(x_0, what.t, what.condition, guidance).value
            (found,) = torch.autograd.grad(model.decode(x_0, grad=True).sum(), x)
        return found

    return gradient


def erase(model: Model, config: EraseConfig) -> Update:
    first, last = config.window
    B, K = config.batch, config.steps
    rows = B * {"gem": last - first + 1, "eraseflow": K}.get(config.method, 1)
    chunk = min(config.chunk, rows) if config.method == "gem" else B
    starts = max(16, len(config.keep or ("",)))
    kept, state = starts * K, state_bytes(model)
    # kept states with the reference's word at each, and the prompt of each beside them
    stored = kept * (2 * state + row_bytes(model.blank())) + 2 * B * (K + 1) * state
    drifted = -(-kept // 15)  # states at which the drift on kept prompts is measured
    plain = [_said(model, drifted, config.loss_guidance)]
    rolled, compared = (costs.forwards_of_one(model, w) for w in (config.rollout_guidance, config.loss_guidance))
    if B * rolled > drifted * compared:
        plain = [_said(model, B, config.rollout_guidance)]
    starting = [_said(model, starts, config.loss_guidance)] if starts > drifted else []
    references = {"gem": 2, "esd": 2, "eraseanything": 2}.get(config.method, 1)
    graph = _regressed(model, chunk, config.loss_guidance, references)
    if config.method == "eraseflow":
        graph = _chain(model, B, config.rollout_guidance, K, lambda x: x)
    retained = max(1, rows // 4) if config.retain else 0
    if retained > chunk:
        graph = _regressed(model, retained, config.loss_guidance, 1)
    return Update(plain, graph, rows > chunk or bool(retained), stored, starting)


def align(model: Model, config: AlignConfig) -> Update:
    roots, state = config.prompts_per_epoch * config.rollouts, state_bytes(model)
    texts = len(config.prompts) * row_bytes(model.blank())
    n = min(config.chunk, roots)
    plain: list[Callable[[], object]] = [_said(model, n, config.guidance), _decoded(model, n)]
    if config.estimator == "pathwise":
        links = 1 if config.random_stop else config.truncate
        graph = _chain(model, n, config.guidance, links, lambda x: model.decode(x, grad=True))
        return Update(plain, graph, roots > n, texts + roots * state)
    setting = costs.align_context(model, config)
    rollout, _ = costs.rehearsed(setting, roots)
    rows = len(rollout.transitions)
    if config.estimator in ("nft", "awm"):
        rows = len(rollout.x_0) * min(config.renoise, config.steps)
    share = -(-rows // config.updates)
    chunk = min(config.chunk, share)
    if config.estimator in FIRST_ORDER:
        links = {"tweedie": 1 + config.lookahead, "terminal": 0}.get(config.estimator, 1)
        plain.append(_pulled(model, min(config.chunk, roots), config.guidance, links))
    compared = bool(config.kl) or config.estimator in REGRESSIONS or config.estimator == "balance"
    graph = _regressed(model, chunk, config.guidance, int(compared))
    each = 4 + (config.estimator in REGRESSIONS)
    waits = config.trajectories == "cpu" and model.device.type != "cpu"
    stored = texts + (0 if waits else (rows * each + len(rollout.x_0)) * state)
    return Update(plain, graph, share > chunk, stored)


def edit(model: Any, config: EditConfig) -> Update:
    sessions, state = config.groups * config.rollouts, state_bytes(model)
    edits = sessions * config.turns
    drawn = int(costs.edit_setting(model, config).drawn.sum())
    per_edit = drawn if config.objective == "grpo" else min(config.renoise, config.steps)
    image = 4 * 3 * model.resolution**2
    stored = edits * (2 + 4 * per_edit) * state + 4 * sessions * image
    stored += config.groups * config.turns * row_bytes(model.blank())
    if config.old != "fresh":
        stored += sum(p.numel() * p.element_size() for p in model.trainable().values())
    n, share = min(config.chunk, sessions), -(-edits * per_edit // config.updates)
    chunk = min(config.chunk, share)
    size = model.resolution

    def encoded() -> Tensor:
        return model.encode_images(asked(model, n).x.new_zeros(n, 3, size, size))

    plain = [encoded, _said(model, n, config.guidance, seen=True), _decoded(model, n)]
    graph = _regressed(model, chunk, config.guidance, int(bool(config.kl)), seen=True)
    return Update(plain, graph, share > chunk or bool(config.identity), stored)


def distill(teacher: Model, student: Model, config: DistillConfig, data: int = 0) -> Update:
    """`data`: clean states that wait, if they are known."""
    feed, state = costs.feed_of(teacher, config), state_bytes(teacher)
    each = feed.rows * (2 if feed.paired and not feed.objective.guided_input else 1)
    plain = [_said(teacher, 512 if config.bank else each)]
    if fitted(config):
        plain.append(_said(teacher, 256))
    guided = student.scales[0] if getattr(student, "scales", None) else None  # type: ignore[attr-defined]
    stored = data * state
    if config.bank:  # shards as they were read, and in order of time
        _, count = place(0, feed.rows, config.bank, config.reuse)
        stored += 2 * 4 * count * SHARD * state
    return Update(plain, _regressed_whole(student, each, guided), False, stored)


def sharpen(model: Model, config: SharpenConfig, data: int = 0) -> Update:
    """`data`: clean states that wait."""
    guided = model.scales[0] if getattr(model, "scales", None) else None  # type: ignore[attr-defined]
    base = _regressed_whole(model, config.batch, guided)
    probed = max(1, round(config.probes * config.batch)) if config.method in JACOBIAN else 0

    def with_term() -> Tensor:
        what = asked(model, probed)

        def field(x: Tensor) -> Tensor:
            return model.predict(x, what.t, what.condition, guided).value

        with torch.set_grad_enabled(config.method != "covariance"):
            along = jvp(field, what.x, torch.zeros_like(what.x)).along
        return base() + along.square().mean()

    return Update([], with_term if probed else base, False, data * state_bytes(model))


def _regressed_whole(model: Model, n: int, guidance: float | None) -> Forward:
    """The mean error of n states' predictions."""
    return lambda: _said(model, n, guidance)().square().flatten(1).mean(1).mean()
