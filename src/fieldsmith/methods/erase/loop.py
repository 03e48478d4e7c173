"""The run: states -> loss -> training.fit, for GEM and for every baseline.

In: a model, a configuration, a run directory (or None). Out: the model, trained in place, and a Result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fieldsmith import preflight, processes
from fieldsmith.errors import InputError
from fieldsmith.methods.erase import losses as L
from fieldsmith.methods.erase import states as S
from fieldsmith.methods.erase.config import EraseConfig, check, pairs
from fieldsmith.models.core import Condition, LoraSpec, Model, Nfe
from fieldsmith.paths import Kind, Prediction, RectifiedFlow, noised
from fieldsmith.runs import Run
from fieldsmith.samplers import flow_sde_step, gaussian_step
from fieldsmith.training import Fit, Losses, Optimisation, fit, step_generator

Callback = Callable[[int, dict[str, float]], "str | None"]


@dataclass(frozen=True)
class Result:
    """What a run did: optimiser steps, seconds, forward-equivalents, why it stopped."""

    steps: int
    seconds: float
    forward_equivalents: int
    stopped: str


@dataclass(frozen=True)
class Pair:
    """A target and its anchor, encoded."""

    name: str
    target: Condition
    anchor: Condition


def erase(
    model: Model,
    config: EraseConfig,
    run: Run | None = None,
    callback: Callback | None = None,
    optimizer: str = "adamw",
) -> Result:
    """Erase config.targets from the model, in place. `probe(step, log)` is called before step 0 and after each step;
    a reason that it returns ends the run.

    Raises InputError before anything is trained (settings, prompts, preflight), RunError if training breaks.
    """
    check(config)
    processes.check_share(config.batch, "batch")
    check_model(model, config)
    encoded = [Pair(f"{t} -> {a}", model.encode([t]), model.encode([a])) for t, a in pairs(config)]
    model.encode(config.keep or [""])  # unknown words are refused now
    if config.method in ("uce", "projection"):
        return _untrained(model, config, encoded, run, callback)
    with model.count_nfe() as nfe:
        return _erase(model, config, encoded, run, callback, optimizer, nfe)


def _erase(
    model: Model,
    config: EraseConfig,
    encoded: list[Pair],
    run: Run | None,
    callback: Callback | None,
    optimizer: str,
    nfe: Nfe,
) -> Result:
    with model.uncounted():
        base = _prepare(model, config, encoded)
    parameters = model.trainable()
    losses, extra = LOSSES[config.method](model, config, encoded)
    parameters = {**parameters, **extra}
    try:
        with model.uncounted():
            _first_look(model, config, encoded, losses, base, quiet=run is None)
    except BaseException:
        model.remove_training()  # refused before anything was trained: the model can be used again
        raise
    if run:
        run.begin()
    per_step = _states_per_step(config)
    with model.uncounted():  # diagnostics are not the method's cost
        kept = S.kept_states(model, config, step_generator(config.seed, 0, stream=2))
    if config.retain:
        model.add_nfe(len(kept.t))

    carried: list[int] = []  # what an interrupted run had spent before this process took over

    def watched(step: int, generator: torch.Generator, log: dict[str, float]) -> Iterator[Tensor]:
        if not carried:
            earlier = run.history() if run else []
            carried.append(int(earlier[-1]["forwards"]) - nfe.total if earlier else 0)
        yield from losses(step, generator, log)
        if config.retain:
            some = kept[torch.randint(len(kept.t), (per_step // 4 or 1,), generator=generator)]
            pred = model.predict(some.x, some.t, some.condition, config.loss_guidance)
            apart = L.norm(S.field_of(pred) - some.field).mean()
            log["retain"] = apart.item()
            yield config.retain * (config.gamma if config.method == "gem" else 1.0) * apart
        if step % 5 == 0:
            log["drift"] = drift(model, kept, config)
        log["forwards"] = carried[0] + nfe.total

    def stop(done: int, log: dict[str, float]) -> str | None:
        reason = callback(done, log) if callback else None
        if reason:
            return reason
        if config.stop_active is not None and log.get("active", 1.0) < config.stop_active:
            return "active fraction"
        if config.stop_lambda is not None and log.get("lambda", 0.0) > config.stop_lambda:
            return "lambda"
        if config.stop_drift is not None and log.get("drift", 0.0) > config.stop_drift:
            return "drift"
        return None

    if callback:
        callback(0, {})
    steps = -(-config.budget // per_step)
    model.dropout(config.dropout > 0)
    try:
        done: Fit = fit(
            parameters, watched,
            Optimisation(
                steps, config.lr, config.weight_decay, checkpoint_every=10, seed=config.seed, optimizer=optimizer
            ),
            run, stop,
        )  # fmt: skip
    finally:
        model.dropout(False)
    history = run.history() if run else []
    cost = int(history[-1]["forwards"]) if history else nfe.total
    return Result(done.steps, done.seconds, cost, done.stopped)


def check_model(model: Model, config: EraseConfig) -> None:
    """Raises InputError where the method has no meaning on the model's path, or no place in its network."""
    flow = isinstance(model.path, RectifiedFlow)
    for setting, asked in (("method", config.method), ("timestep_weight", config.timestep_weight)):
        if not flow and asked in ("eraseflow", "tb"):
            raise InputError(f"{setting} '{asked}' needs a rectified flow, which {model.name} is not; choose another")
    if config.method in ("uce", "eraseanything"):
        from fieldsmith.models.text_layers import check_text_layers

        check_text_layers(model, config.method, attention=config.method == "eraseanything")


def _untrained(
    model: Model, config: EraseConfig, encoded: list[Pair], run: Run | None, callback: Callback | None
) -> Result:
    """UCE and the projection: no steps, and no forwards of the network."""
    with model.uncounted():
        _separations(model, config, encoded)
    if run:
        run.begin()
    if config.method == "uce":
        _closed_form(model, config)
    if callback:
        callback(0, {})
    return Result(0, 0.0, 0, "closed form" if config.method == "uce" else "training-free")


def _states_per_step(config: EraseConfig) -> int:
    first, last = config.window
    per_rollout = {"gem": last - first + 1, "eraseflow": config.steps}
    return config.batch * per_rollout.get(config.method, 1)


@torch.no_grad()
def drift(model: Model, kept: S.Kept, config: EraseConfig, every: int = 15) -> float:
    """Mean relative distance of the field to the reference's on kept prompts; not counted as cost."""
    some = kept[torch.arange(0, len(kept.t), every)]
    with model.uncounted():
        pred = model.predict(some.x, some.t, some.condition, config.loss_guidance)
    change = (S.field_of(pred) - some.field).flatten(1).norm(dim=1) / some.field.flatten(1).norm(dim=1)
    return change.mean().item()


def _field(model: Model, x: Tensor, t: Tensor, condition: Condition, config: EraseConfig) -> Tensor:
    return S.field_of(model.predict(x, t, condition, config.loss_guidance))


def _probe_point(model: Model, config: EraseConfig) -> tuple[Tensor, Tensor]:
    x = model.noise(min(config.batch, 4), step_generator(config.seed, 0, stream=1))
    return x, model.grid(config.steps)[min(config.window[0], config.steps - 1)]


@torch.no_grad()
def _separations(model: Model, config: EraseConfig, encoded: list[Pair]) -> list[preflight.Check]:
    x, t = _probe_point(model, config)
    output = [[_field(model, x, t, c, config) for c in (p.anchor, p.target)] for p in encoded]
    checks = [preflight.separation(a, n, pair.name) for (a, n), pair in zip(output, encoded, strict=True)]
    preflight.require(checks, quiet=True)
    return checks


@torch.no_grad()
def _prepare(model: Model, config: EraseConfig, encoded: list[Pair]) -> Tensor:
    """Attach what trains; the base's velocity at a probe point, from before."""
    x, t = _probe_point(model, config)
    base = model.predict(x, t, encoded[0].target).velocity
    if config.full:
        model.unfreeze(config.subset)
    else:
        model.adapt(LoraSpec(config.subset, config.rank, config.alpha, config.dropout, config.seed))
    return base


def _first_look(
    model: Model, config: EraseConfig, encoded: list[Pair], losses: Losses, base: Tensor, quiet: bool
) -> None:
    """The preflight, on the first step's own draws."""
    x, t = _probe_point(model, config)
    checks = [preflight.adapter_off(model, x, t, encoded[0].target, base), *_separations(model, config, encoded)]
    first = next(iter(losses(0, step_generator(config.seed, 0), {})))
    checks += [*preflight.gradients(model, first), preflight.memory(model, min(config.chunk, _states_per_step(config)))]
    preflight.require(checks, quiet)


def _pick(encoded: list[Pair], generator: torch.Generator) -> Pair:
    return encoded[int(torch.randint(len(encoded), (1,), generator=generator))]


def gem(model: Model, config: EraseConfig, encoded: list[Pair]) -> tuple[Losses, dict[str, Tensor]]:
    """GEM (section 2.4 of the notes): a window of states of a target rollout, contrasted with two frozen velocities."""

    def losses(step: int, generator: torch.Generator, log: dict[str, float]) -> Iterator[Tensor]:
        pair = _pick(encoded, generator)
        states = S.window(model, pair.target, config, generator)
        left = config.budget - step * len(states)
        weights = torch.ones_like(states.t)
        if config.timestep_weight == "tb":
            weights = L.balance_weights(states.t, states.t_next, config.noise_level)
            weights = weights / weights.mean()
        seen: list[Tensor] = []
        for start in range(0, min(left, len(states)), config.chunk):
            some = states[slice(start, min(start + config.chunk, left))]
            v, p, n = _contrast(model, some, pair, config)
            hinge = L.erase_loss(v, p, n, config.eta, config.margin)
            seen.append(torch.stack((L.norm(v - p), L.norm(v - n), L.progress(v, p, n), (hinge > 0).float())).detach())
            yield config.gamma * (weights[start : start + len(some)] * hinge).sum() / len(states)
        means = torch.cat(seen, 1).mean(1).tolist()
        log |= dict(zip(("d_plus", "d_minus", "lambda", "active"), means, strict=True))

    return losses, {}


def _contrast(model: Model, some: S.States, pair: Pair, config: EraseConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Student, anchor and target fields at shared states."""
    with torch.no_grad(), model.reference():
        p = _field(model, some.x, some.t, pair.anchor, config)
        n = _field(model, some.x, some.t, pair.target, config)
    return _field(model, some.x, some.t, pair.target, config), p, n


def esd(model: Model, config: EraseConfig, encoded: list[Pair]) -> tuple[Losses, dict[str, Tensor]]:
    """ESD: one teacher state a rollout, regressed to negative guidance (section 3.1)."""
    null = model.encode([""])

    def losses(step: int, generator: torch.Generator, log: dict[str, float]) -> Iterator[Tensor]:
        pair = _pick(encoded, generator)
        at = S.single(model, pair.target, config, generator)
        v, u, n = _contrast(model, at, Pair("", pair.target, null), config)
        yield L.square_loss(v, L.esd_target(n, u, config.eta))

    return losses, {}


def concept_ablation(model: Model, config: EraseConfig, encoded: list[Pair]) -> tuple[Losses, dict[str, Tensor]]:
    """Concept ablation, model-based: on noised anchor images the target prompt follows the anchor prompt (3.3)."""
    generator = step_generator(config.seed, 0, stream=3)
    images = []
    with model.reference():
        images = [[S.roll(model, pair.anchor, config, generator).last for _ in range(4)] for pair in encoded]
    bank = {id(pair): torch.cat(part) for pair, part in zip(encoded, images, strict=True)}

    def losses(step: int, generator: torch.Generator, log: dict[str, float]) -> Iterator[Tensor]:
        pair = _pick(encoded, generator)
        x_0 = bank[id(pair)]
        x_0 = x_0[torch.randint(len(x_0), (config.batch,), generator=generator)]
        eps = torch.randn(x_0.shape, generator=generator).to(x_0)
        t = S.uniform_times(model, len(x_0), generator).to(x_0)
        x_t = noised(model.path, x_0, eps, t)
        with torch.no_grad():  # the moving target is the current network, as released
            goal = _field(model, x_t, t, pair.anchor, config)
        yield L.square_loss(_field(model, x_t, t, pair.target, config), goal)
        if config.prior:
            output = _field(model, x_t, t, pair.anchor, config)
            yield config.prior * L.square_loss(output, eps - x_0 if isinstance(model.path, RectifiedFlow) else eps)

    return losses, {}


def eraseflow(model: Model, config: EraseConfig, encoded: list[Pair]) -> tuple[Losses, dict[str, Tensor]]:
    """EraseFlow: trajectory balance on the student's own anchor trajectories (1.3); memory grows with `steps`."""
    log_z = torch.zeros((), requires_grad=True)
    grid = model.grid(config.steps)

    def log_prob(pred: Prediction, after: Tensor, t_next: Tensor) -> Tensor:
        step = flow_sde_step(pred, t_next, config.noise_level, grid[1])
        return step.log_prob(after) / after[0].numel()

    def losses(step: int, generator: torch.Generator, log: dict[str, float]) -> Iterator[Tensor]:
        pair = _pick(encoded, generator)
        x = model.noise(config.batch, generator)
        states, on_anchor = [x], []
        with torch.no_grad():
            for t, t_next in zip(grid[:-1], grid[1:], strict=True):
                pred = model.predict(x, t, pair.anchor, config.rollout_guidance)
                x = gaussian_step("flow-sde", pred, t_next, config.noise_level, grid[1]).sample(generator)
                on_anchor.append(log_prob(pred, x, t_next))
                states.append(x)
        on_target = []
        for k, (t, t_next) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
            pred = model.predict(states[k], t, pair.target, config.rollout_guidance)  # as the anchor's, to cancel
            on_target.append(log_prob(pred, states[k + 1], t_next))
        loss = L.flow_balance(torch.stack(on_target), torch.stack(on_anchor), log_z, config.beta).mean()
        log["log_z"] = log_z.item()
        yield loss

    return losses, {"eraseflow.log_z": log_z}


def eraseanything(model: Model, config: EraseConfig, encoded: list[Pair]) -> tuple[Losses, dict[str, Tensor]]:
    """EraseAnything: negative guidance and attention on even steps, preservation on odd ones (3.4).

    Fixed: the teacher is frozen, states match their times, irrelevant words are the kept prompts, and preservation
    regresses the reference's velocity on kept prompts, the mean of flow matching on its images (on images of the
    concept, as released, it would teach the concept back). The keyword is the whole target prompt.
    """
    from fieldsmith.models.text_layers import attention_maps, word_positions

    names = [target for target, _ in pairs(config)]
    kept = S.kept_states(model, config, step_generator(config.seed, 0, stream=3))
    irrelevant = list(config.keep[:3] or ("",))

    def column(prompt: str, states: S.States) -> tuple[Tensor, list[Tensor]]:
        words = word_positions(model, [prompt])[0] or [0]
        with attention_maps(model) as maps:
            velocity = _field(model, states.x, states.t, model.encode([prompt]), config)
        return maps[0][:, 0, :, words].mean(-1), [velocity, maps[0]]

    def losses(step: int, generator: torch.Generator, log: dict[str, float]) -> Iterator[Tensor]:
        which = int(torch.randint(len(encoded), (1,), generator=generator))
        pair = encoded[which]
        at = S.single(model, pair.target, config, generator)
        if step % 2 == 0:
            with torch.no_grad(), model.reference():
                u = _field(model, at.x, at.t, pair.anchor, config)
                n = _field(model, at.x, at.t, pair.target, config)
            _, (v, maps) = column(names[which], at)
            words = word_positions(model, [names[which]])[0]
            # the released negative guidance from the anchor sentence: u - eta (n - u)
            yield L.square_loss(v, u - config.eta * (n - u)) + config.attention_weight * L.attention_loss(maps, words)
        else:
            some = kept[torch.randint(len(kept.t), (config.batch,), generator=generator)]
            output = _field(model, some.x, some.t, some.condition, config)
            yield config.preserve_weight * L.square_loss(output, some.field)
            synonym = column((config.synonyms or (names[which],))[0], at)[0]
            others = torch.stack([column(word, at)[0] for word in irrelevant])
            yield config.preserve_weight * L.contrast_loss(synonym, column(names[which], at)[0], others)

    return losses, {}


LOSSES: dict[str, Callable[[Model, EraseConfig, list[Pair]], tuple[Losses, dict[str, Tensor]]]] = {
    "gem": gem,
    "esd": esd,
    "concept-ablation": concept_ablation,
    "eraseflow": eraseflow,
    "eraseanything": eraseanything,
}


def _closed_form(model: Model, config: EraseConfig) -> None:
    """UCE on the layers where text enters."""
    from fieldsmith.models.text_layers import text_inputs

    targets, anchors = (text_inputs(model, side) for side in zip(*pairs(config), strict=True))
    kept = text_inputs(model, config.keep or ("",))
    model.unfreeze("text-inputs")
    for name, erased in targets.items():
        weight = model.network.get_submodule(name).weight
        edited = L.closed_form_edit(weight.data, erased, anchors[name], kept[name], config.uce_lambda)
        weight.data.copy_(edited)


class Projected:
    """The training-free baseline: a model whose field is projected off the concept's direction, at every prompt."""

    def __init__(self, model: Model, config: EraseConfig):
        self.model, self.config = model, config
        self.pairs = [(model.encode([t]), model.encode([a])) for t, a in pairs(config)]

    def __getattr__(self, name: str) -> object:
        return getattr(self.__dict__["model"], name)

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition, guidance: float | None = None) -> Prediction:
        pred = self.model.predict(x_t, t, condition, guidance)
        field = S.field_of(pred)
        for target, anchor in self.pairs:
            n = S.field_of(self.model.predict(x_t, t, target, guidance))
            p = S.field_of(self.model.predict(x_t, t, anchor, guidance))
            field = L.project(field, p, n)
        kind: Kind = "velocity" if isinstance(pred.path, RectifiedFlow) else "eps"
        return Prediction(kind, field, x_t, pred.t, pred.path)
