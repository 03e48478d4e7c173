"""`erase` prepared: pairs encoded, what trains attached, and each method's losses, GEM's and the baselines'.

In: a model, a configuration. Out: a Job for verb.py. A method is a function (model, config, pairs) -> Method; one of
your own has the same form (docs/extend.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from fieldsmith import preflight, processes
from fieldsmith.errors import InputError
from fieldsmith.methods.erase import losses as L
from fieldsmith.methods.erase import states as S
from fieldsmith.methods.erase.config import EraseConfig
from fieldsmith.methods.erase.judged import Judged, watched
from fieldsmith.methods.erase.pairs import Pair, encoded
from fieldsmith.models.core import Condition, Model
from fieldsmith.models.text_layers import attention_maps, check_text_layers, text_inputs, word_positions
from fieldsmith.paths import Kind, Prediction, RectifiedFlow, noised
from fieldsmith.preflight import Check
from fieldsmith.samplers import flow_sde_step, gaussian_step
from fieldsmith.training import Log, Losses, Optimisation, step_generator
from fieldsmith.verb import Job, attach

CHECKED = 16  # pairs, about, whose separation is looked at before the first step
WATCHED = 15  # the drift is told by every so many of the kept states


@dataclass(frozen=True)
class Method:
    """What a method trains on: its losses, how many states a step evaluates, and parameters of its own."""

    losses: Losses
    states_per_step: int
    extra: dict[str, Tensor] = field(default_factory=dict)


Build = Callable[[Model, EraseConfig, "list[Pair]"], Method]


@dataclass(frozen=True)
class Inputs:
    """What a run is given beside its settings: who judges its images, a method of the user's own, (target, anchor)
    prompts, where the model's world has the templates, and attackers' prompts with their seeds."""

    judged: Judged | None = None
    method: Build | None = None
    pairs: Sequence[tuple[str, str]] = ()
    attacks: Sequence[tuple[str, int]] = ()


def prepare(model: Model, config: EraseConfig, inputs: Inputs) -> Job:
    """Erase config.targets from the model, in place.

    Raises InputError where prompts or method do not fit the model, before anything is attached.
    """
    if inputs.judged:
        inputs.judged.check_prompts(model, config)
        model.check_prompts([words for words, _ in inputs.attacks])
    job = _prepare(model, config, inputs)
    return watched(job, inputs.judged, config) if inputs.judged else job


def _prepare(model: Model, config: EraseConfig, inputs: Inputs) -> Job:
    _check_model(model, config)
    pairs = encoded(model, inputs.pairs or config.pairs)
    model.encode(config.keep or [""])  # unknown words are refused now
    config = config.replace(subset=config.subset or model.ERASE_SUBSET)
    if config.method in ("uce", "projection"):
        return _untrained(model, config, pairs, inputs)

    x = model.noise(min(config.batch, 4), step_generator(config.seed, 0, stream=1))
    t = model.grid(config.steps)[min(config.window[0], config.steps - 1)]
    attached = attach(model, config, lambda: model.predict(x, t, pairs[0].target).velocity, config.dropout, config.seed)
    with model.uncounted():
        separations = _separations(model, config, pairs, x, t)
    method = (inputs.method or METHODS[config.method])(model, config, pairs)
    # kept states are for the log alone unless they are trained on
    with contextlib.nullcontext() if config.retain else model.uncounted():
        kept = S.kept_states(model, config, step_generator(config.seed, 0, stream=2))
    watched = kept[torch.arange(0, len(kept), WATCHED)]
    kept = kept if config.retain else watched

    def losses(step: int, generator: torch.Generator, log: Log) -> Iterator[Tensor]:
        yield from method.losses(step, generator, log)
        if config.retain:
            states = torch.randint(len(kept), (method.states_per_step // 4 or 1,), generator=generator)
            own = states[processes.owned(len(states))]
            for at, weight in processes.chunks(own, config.chunk):  # some processes may have none
                some = kept[at].to(model.device)
                distance = L.norm(_field(model, some.x, some.t, some.condition, config) - some.field)
                if weight:
                    log.mean("retain", distance)
                strength = weight * config.retain * (config.gamma if config.method == "gem" else 1.0)
                yield strength * distance.sum() / len(states)
        if step % 5 == 0:
            log.mean("drift", drift(model, watched, config))

    def checks(resumes: bool) -> list[Check]:
        first = next(iter(method.losses(0, step_generator(config.seed, 0), Log())))
        states = min(config.chunk, method.states_per_step)
        return [attached, *separations, *preflight.gradients(model, first), preflight.memory(model, states)]

    def stop(done: int, log: dict[str, float]) -> str | None:
        if config.stop_active is not None and log.get("active", 1.0) < config.stop_active:
            return "active fraction"
        if config.stop_lambda is not None and log.get("lambda", 0.0) > config.stop_lambda:
            return "lambda"
        if config.stop_drift is not None and log.get("drift", 0.0) > config.stop_drift:
            return "drift"
        return None

    @contextlib.contextmanager
    def dropout() -> Iterator[None]:
        model.dropout(config.dropout > 0)
        try:
            yield
        finally:
            model.dropout(False)

    steps = -(-config.budget // method.states_per_step)
    optimisation = Optimisation(
        steps, config.lr, config.weight_decay, checkpoint_every=10, seed=config.seed, optimizer=config.optimizer
    )
    parameters = {**model.trainable(), **method.extra}
    return Job(model, losses, optimisation, parameters, checks, stop, inputs=inputs, around=dropout)


def _check_model(model: Model, config: EraseConfig) -> None:
    """Raises InputError where the method has no meaning on the model's path, or no place in its network."""
    flow = isinstance(model.path, RectifiedFlow)
    for setting, asked in (("method", config.method), ("timestep_weight", config.timestep_weight)):
        if not flow and asked in ("eraseflow", "tb"):
            raise InputError(f"{setting} '{asked}' needs a rectified flow, which {model.name} is not; choose another")
    if config.method == "eraseanything" and processes.count() > 1:
        raise InputError(
            "method 'eraseanything' takes norms over a batch's attention, which several processes would split; launch "
            "one process, or choose another method"
        )
    if config.method == "uce" and processes.sharded():
        raise InputError("method 'uce' edits whole weights, which FSDP leaves in no process; launch one process")
    if config.method in ("uce", "eraseanything"):
        check_text_layers(model, config.method, attention=config.method == "eraseanything")


def _untrained(model: Model, config: EraseConfig, pairs: list[Pair], inputs: Inputs) -> Job:
    """UCE and the projection: no steps, and no forwards of the network but the preflight's."""

    def checks(resumes: bool) -> list[Check]:
        x = model.noise(min(config.batch, 4), step_generator(config.seed, 0, stream=1))
        return _separations(model, config, pairs, x, model.grid(config.steps)[min(config.window[0], config.steps - 1)])

    none = Optimisation(0, config.lr, seed=config.seed)
    if config.method == "uce":
        edit = partial(closed_form, model, config, pairs)
        return Job(model, _no_losses, none, {}, checks, inputs=inputs, stopped="closed form", begin=edit)
    projected = Projected(model, config, pairs)
    return Job(
        model, _no_losses, none, {}, checks, inputs=inputs, stopped="training-free", trained=projected,
        ship=lambda model, folder: "none: the projection acts while sampling",
    )  # fmt: skip


def _no_losses(step: int, generator: torch.Generator, log: Log) -> Iterator[Tensor]:
    yield from ()


@torch.no_grad()
def drift(model: Model, kept: S.Kept, config: EraseConfig) -> Tensor:
    """Relative distance of the field to the reference's at this process's part of kept states, (n,); not counted as
    cost."""
    some = kept[processes.owned(len(kept))].to(model.device)
    with model.uncounted():
        change = (_field(model, some.x, some.t, some.condition, config) - some.field).flatten(1).norm(dim=1)
    return change / some.field.flatten(1).norm(dim=1)


def _field(model: Model, x: Tensor, t: Tensor, condition: Condition, config: EraseConfig) -> Tensor:
    return S.field_of(model.predict(x, t, condition, config.loss_guidance))


@torch.no_grad()
def _separations(model: Model, config: EraseConfig, pairs: list[Pair], x: Tensor, t: Tensor) -> list[Check]:
    """Every target differs from its anchor, or there is nothing to learn; of very many pairs some are asked."""
    some = pairs[:: -(-len(pairs) // CHECKED)]
    fields = [(_field(model, x, t, pair.anchor, config), _field(model, x, t, pair.target, config)) for pair in some]
    return [preflight.separation(*both, pair.name) for both, pair in zip(fields, some, strict=True)]


def _pick(pairs: list[Pair], generator: torch.Generator) -> Pair:
    return pairs[int(torch.randint(len(pairs), (1,), generator=generator))]


def gem(model: Model, config: EraseConfig, pairs: list[Pair]) -> Method:
    """GEM (section 2.4 of the notes): a window of states of a target rollout, contrasted with two frozen velocities."""

    def losses(step: int, generator: torch.Generator, log: Log) -> Iterator[Tensor]:
        pair = _pick(pairs, generator)
        states = S.window(model, pair.target, config, generator)
        left = config.budget - step * batch
        # of the batch's states, all rollouts' first ones come first; the last step may have a budget for some alone
        place = torch.arange(last - first + 1)[:, None] * config.batch + processes.owned(config.batch)
        paid = int((place < left).sum())
        weights = torch.ones_like(states.t)
        if config.timestep_weight == "tb":
            weights = L.balance_weights(states.t, states.t_next, config.noise_level)
            weights = weights / weights.mean()
        for start in range(0, paid, config.chunk):
            some = states[slice(start, min(start + config.chunk, paid))]
            v, p, n = _contrast(model, some, pair, config)
            hinge = L.erase_loss(v, p, n, config.eta, config.margin)
            for name, values in (("d_plus", L.norm(v - p)), ("d_minus", L.norm(v - n)),
                                 ("lambda", L.progress(v, p, n)), ("active", hinge > 0)):  # fmt: skip
                log.mean(name, values)
            yield config.gamma * (weights[start : start + len(some)] * hinge).sum() / batch

    first, last = config.window
    batch = config.batch * (last - first + 1)  # states of a step, over all processes
    return Method(losses, batch)


def _contrast(model: Model, some: S.States, pair: Pair, config: EraseConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Student, anchor and target fields at shared states."""
    with torch.no_grad(), model.reference():
        p = _field(model, some.x, some.t, pair.anchor, config)
        n = _field(model, some.x, some.t, pair.target, config)
    return _field(model, some.x, some.t, pair.target, config), p, n


def esd(model: Model, config: EraseConfig, pairs: list[Pair]) -> Method:
    """ESD: one teacher state a rollout, regressed to negative guidance (section 3.1)."""
    from_nothing = encoded(model, [(pair.words[0], "") for pair in pairs])

    def losses(step: int, generator: torch.Generator, log: Log) -> Iterator[Tensor]:
        pair = _pick(from_nothing, generator)
        at = S.single(model, pair.target, config, generator)
        v, u, n = _contrast(model, at, pair, config)
        yield S.share(config) * L.square_loss(v, L.esd_target(n, u, config.eta))

    return Method(losses, config.batch)


def concept_ablation(model: Model, config: EraseConfig, pairs: list[Pair]) -> Method:
    """Concept ablation, model-based: on noised anchor images the target prompt follows the anchor prompt (3.3)."""
    generator = step_generator(config.seed, 0, stream=3)
    images = []
    with model.reference():
        images = [
            [processes.gather(S.roll(model, pair.anchor, config, generator).last) for _ in range(4)] for pair in pairs
        ]
    bank = {id(pair): torch.cat(part) for pair, part in zip(pairs, images, strict=True)}

    def losses(step: int, generator: torch.Generator, log: Log) -> Iterator[Tensor]:
        pair = _pick(pairs, generator)
        x_0 = bank[id(pair)]
        x_0 = x_0[torch.randint(len(x_0), (config.batch,), generator=generator)]
        eps = torch.randn(x_0.shape, generator=generator).to(x_0)
        t = S.uniform_times(model, len(x_0), generator).to(x_0)
        own = processes.owned(config.batch)
        x_0, eps, t = x_0[own], eps[own], t[own]
        x_t = noised(model.path, x_0, eps, t)
        with torch.no_grad():  # the moving target is the current network, as released
            goal = _field(model, x_t, t, pair.anchor, config)
        yield S.share(config) * L.square_loss(_field(model, x_t, t, pair.target, config), goal)
        if config.prior:
            output = _field(model, x_t, t, pair.anchor, config)
            truth = eps - x_0 if isinstance(model.path, RectifiedFlow) else eps
            yield S.share(config) * config.prior * L.square_loss(output, truth)

    return Method(losses, config.batch)


LOG_Z, LOG_Z_LR = -0.1953, 5e-4  # where EraseFlow's log Z starts and its learning rate, as released


def eraseflow(model: Model, config: EraseConfig, pairs: list[Pair]) -> Method:
    """EraseFlow: trajectory balance on the student's own anchor trajectories (1.3); memory grows with `steps`."""
    # log Z = LOG_Z + (LOG_Z_LR / lr) moved: one optimiser, in whose steps it moves at the rate of its own
    moved, rate = torch.zeros((), requires_grad=True), LOG_Z_LR / config.lr
    grid = model.grid(config.steps)

    def log_prob(pred: Prediction, after: Tensor, t_next: Tensor) -> Tensor:
        step = flow_sde_step(pred, t_next, config.noise_level, grid[1])
        return step.log_prob(after) / after[0].numel()

    def losses(step: int, generator: torch.Generator, log: Log) -> Iterator[Tensor]:
        pair = _pick(pairs, generator)
        own = processes.owned(config.batch)
        x = model.noise(config.batch, generator)[own]
        states, on_anchor = [x], []
        with torch.no_grad():
            for t, t_next in zip(grid[:-1], grid[1:], strict=True):
                pred = model.predict(x, t, pair.anchor, config.rollout_guidance)
                after = gaussian_step("flow-sde", pred, t_next, config.noise_level, grid[1])
                noise = torch.randn(config.batch, *x.shape[1:], generator=generator, dtype=x.dtype)[own]
                x = after.mean + after.deviation * noise.to(x)
                on_anchor.append(log_prob(pred, x, t_next))
                states.append(x)
        on_target = []
        for k, (t, t_next) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
            pred = model.predict(states[k], t, pair.target, config.rollout_guidance)  # as the anchor's, to cancel
            on_target.append(log_prob(pred, states[k + 1], t_next))
        log_z = LOG_Z + rate * moved
        loss = L.flow_balance(torch.stack(on_target), torch.stack(on_anchor), log_z, config.beta)
        log["log_z"] = log_z.item()
        yield loss.sum() / config.batch

    return Method(losses, config.batch * config.steps, {"eraseflow.log_z": moved})


def eraseanything(model: Model, config: EraseConfig, pairs: list[Pair]) -> Method:
    """EraseAnything: negative guidance and attention on even steps, preservation on odd ones (3.4).

    Fixed: the teacher is frozen, states match their times, irrelevant words are the kept prompts, and preservation
    regresses the reference's velocity on kept prompts, the mean of flow matching on its images (on images of the
    concept, as released, it would teach the concept back). The keyword is the whole target prompt.
    """
    names = [pair.words[0] for pair in pairs]
    kept = S.kept_states(model, config, step_generator(config.seed, 0, stream=3))
    irrelevant = list(config.keep[:3] or ("",))

    def column(prompt: str, states: S.States) -> tuple[Tensor, list[Tensor]]:
        words = word_positions(model, [prompt])[0] or [0]
        with attention_maps(model) as maps:
            velocity = _field(model, states.x, states.t, model.encode([prompt]), config)
        return maps[0][:, 0, :, words].mean(-1), [velocity, maps[0]]

    def losses(step: int, generator: torch.Generator, log: Log) -> Iterator[Tensor]:
        which = int(torch.randint(len(pairs), (1,), generator=generator))
        pair = pairs[which]
        at = S.single(model, pair.target, config, generator)
        if step % 2 == 0:
            with torch.no_grad(), model.reference():
                u = _field(model, at.x, at.t, pair.anchor, config)
                n = _field(model, at.x, at.t, pair.target, config)
            _, (v, maps) = column(names[which], at)
            words = word_positions(model, [names[which]])[0]
            # the released negative guidance from the anchor sentence: u - eta (n - u)
            erased = L.square_loss(v, u - config.eta * (n - u))
            yield S.share(config) * (erased + config.attention_weight * L.attention_loss(maps, words))
        else:
            picked = torch.randint(len(kept), (config.batch,), generator=generator)
            some = kept[picked[processes.owned(config.batch)]].to(model.device)
            output = _field(model, some.x, some.t, some.condition, config)
            yield S.share(config) * config.preserve_weight * L.square_loss(output, some.field)
            synonym = column((config.synonyms or (names[which],))[0], at)[0]
            others = torch.stack([column(word, at)[0] for word in irrelevant])
            contrast = L.contrast_loss(synonym, column(names[which], at)[0], others)
            yield S.share(config) * config.preserve_weight * contrast

    return Method(losses, config.batch)


METHODS: dict[str, Build] = {
    "gem": gem,
    "esd": esd,
    "concept-ablation": concept_ablation,
    "eraseflow": eraseflow,
    "eraseanything": eraseanything,
}


def closed_form(model: Model, config: EraseConfig, pairs: list[Pair]) -> None:
    """UCE on the layers where text enters."""
    targets, anchors = (text_inputs(model, side) for side in zip(*(pair.words for pair in pairs), strict=True))
    kept = text_inputs(model, config.keep or ("",))
    model.unfreeze("text-inputs")
    for name, erased in targets.items():
        weight = model.network.get_submodule(name).weight
        edited = L.closed_form_edit(weight.data, erased, anchors[name], kept[name], config.uce_lambda)
        weight.data.copy_(edited)


class Projected:
    """The training-free baseline: a model whose field is projected off the concept's direction, at every prompt."""

    def __init__(self, model: Model, config: EraseConfig, pairs: list[Pair]):
        self.model, self.config, self.pairs = model, config, pairs

    def __getattr__(self, name: str) -> object:
        return getattr(self.__dict__["model"], name)

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition, guidance: float | None = None) -> Prediction:
        pred = self.model.predict(x_t, t, condition, guidance)
        field = S.field_of(pred)
        for pair in self.pairs:
            n = S.field_of(self.model.predict(x_t, t, pair.target, guidance))
            p = S.field_of(self.model.predict(x_t, t, pair.anchor, guidance))
            field = L.project(field, p, n)
        kind: Kind = "velocity" if isinstance(pred.path, RectifiedFlow) else "eps"
        return Prediction(kind, field, x_t, pred.t, pred.path)
