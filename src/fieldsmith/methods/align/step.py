"""`align` prepared: rollouts -> rewards -> advantages or guidance -> the recipe's loss, one update after the other.

In: a model, a configuration, a reward or preference pairs. Out: a Job for verb.py, the same for every recipe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from fieldsmith import preflight, processes
from fieldsmith.errors import InputError
from fieldsmith.methods.align.collect import Batch, choose, collect, owned
from fieldsmith.methods.align.config import FIRST_ORDER, AlignConfig
from fieldsmith.methods.align.context import AlignContext
from fieldsmith.methods.align.dpo import PairUpdates
from fieldsmith.methods.align.objectives import anchor_losses, transition_losses
from fieldsmith.methods.policy.checks import rounding
from fieldsmith.methods.policy.collections import Collections
from fieldsmith.methods.policy.old import copies, follow, in_place
from fieldsmith.methods.policy.rollouts import here
from fieldsmith.models.core import Model
from fieldsmith.preferences import Preferences
from fieldsmith.preflight import Check
from fieldsmith.rewards.reward import Reward
from fieldsmith.samplers import euler
from fieldsmith.training import Log, Losses, Optimisation, step_generator
from fieldsmith.verb import Job, attach


@dataclass(frozen=True)
class Inputs:
    """What a run is given beside its settings."""

    reward: Reward | None = None  # None where `pairs` are what is learned from
    held_out: Mapping[str, Reward] = field(default_factory=dict)  # only measured, before and after
    other_prompts: tuple[str, ...] = ()  # what the run does not aim at, for its side effects; empty: no prompt
    pairs: Preferences | None = None

    @property
    def rewards(self) -> dict[str, Reward]:
        """All by name, the one that is trained on first."""
        return ({self.reward.name: self.reward} if self.reward else {}) | dict(self.held_out)

    @property
    def networks(self) -> list[nn.Module]:
        """What rewards ask; with `offload` they wait on the CPU."""
        return [network for reward in self.rewards.values() for network in reward.networks]


def prepare(model: Model, config: AlignConfig, inputs: Inputs) -> Job:
    """Raise the reward of images of config.prompts, or learn the preferences that pairs show, in place.

    Raises InputError where settings, prompts and reward do not fit the model, before anything is attached.
    """
    reward = inputs.reward
    if reward and config.estimator in FIRST_ORDER and not reward.differentiable:
        raise InputError(
            f"reward '{reward.name}' is a black box, but estimator '{config.estimator}' needs its gradient; use "
            "a zeroth-order preset such as rsm-branch-sd35 or nft, or a differentiable reward"
        )
    context = AlignContext.of(model, config, reward, inputs.pairs)
    x = model.noise(2, step_generator(config.seed, 0, stream=1))
    t = context.schedule.times[0].to(x)
    first = context.condition[torch.tensor([0])]
    attached = attach(model, config, lambda: model.predict(x, t, first, config.guidance).velocity, seed=config.seed)
    old = copies(model, config.old)
    updates: PairUpdates | Pathwise | Updates = Updates(context, old)
    if context.pairs:
        updates = PairUpdates(context)
    elif config.estimator == "pathwise":
        updates = Pathwise(context)

    def checks(resumes: bool) -> list[Check]:
        memory = preflight.memory(model, config.chunk)
        preflight.require([memory], quiet=True)  # before anything large runs
        return [attached, *([] if resumes else updates.checks()), memory]

    def stop(done: int, log: dict[str, float]) -> None:
        if done % config.updates == 0:
            follow(model, old, config.old, done)  # here, so that a checkpoint holds what makes the next collection

    optimisation = Optimisation(
        config.epochs * config.updates, config.lr, config.weight_decay, clip=config.gradient_clip, ema=config.ema,
        ema_every=config.ema_every, checkpoint_every=10 * config.updates, block=updates.block, seed=config.seed,
        optimizer=config.optimizer,
    )  # fmt: skip
    helper = {f"auxiliary.{name}": p for name, p in context.helper.named_parameters()} if context.helper else {}
    parameters = {**model.trainable(), **helper, **old}
    return Job(model, updates.losses, optimisation, parameters, checks, stop, inputs=inputs, context=context)


class Updates:
    """Updates on collections: what all recipes but the pathwise ones do."""

    def __init__(self, context: AlignContext, old: dict[str, Tensor] | None = None):
        self.context, self.old = context, old or {}
        self.block = context.config.updates  # updates that share a collection
        self.collections = Collections(context.model, self._collect)
        self.rounding = rounding(context.config.trust, context.config.clip, context.schedule, context.model)

    def losses(self, step: int, generator: torch.Generator, log: Log) -> Iterator[Tensor]:
        """The losses of one update, in chunks; this process's part of them."""
        context, config = self.context, self.context.config
        epoch, update = divmod(step, config.updates)
        batch = self.collections.at(epoch, log)
        rows = self._rows(batch, epoch, update)
        if not len(rows):
            log["rows"] = 0.0
            yield torch.zeros(())
            return
        for at, real in self._chunks(batch, rows):
            losses = transition_losses(context, batch[at], log if real else Log())
            weight = real * batch.rollout.transitions.weight[at]
            yield (losses * weight.to(losses)).sum() / len(rows)
        states = batch.rollout.ode_states
        if config.anchor and context.plan.has_ode_states:
            yield from anchor_losses(context, states, len(rows), generator)

    def _rows(self, batch: Batch, epoch: int, update: int) -> Tensor:
        """An update's rows, by their number over all processes."""
        config = self.context.config
        assert batch.teaches is not None
        order = torch.randperm(len(batch.teaches), generator=step_generator(config.seed, epoch, stream=6))
        rows = order.tensor_split(config.updates)[update]
        if config.estimator in ("reverse-noise", "nft", "awm"):  # rows of advantage 0 teach nothing but staying
            rows = rows if config.kl else rows[batch.teaches[rows]]
        return rows

    def _chunks(self, batch: Batch, rows: Tensor) -> Iterator[tuple[Tensor, float]]:
        assert batch.teaches is not None
        _, own = here(batch.rollout.transitions.row, rows, len(batch.teaches))
        return processes.chunks(own, self.context.config.chunk)

    def _collect(self, epoch: int, log: Log) -> Batch:
        with in_place(self.context.model, self.old):
            batch = collect(self.context, epoch, log)
        config, rollout = self.context.config, batch.rollout
        if config.estimator not in ("reverse-noise", "balance"):
            return batch
        rows = rollout.transitions

        def output(at: Tensor) -> Tensor:
            return self.context.output(rows.x[at], rows.step[at], rows.prompt[at])

        def chunks(update: int) -> Iterator[tuple[Tensor, float]]:
            return self._chunks(batch, self._rows(batch, epoch, update))

        rows = self.rounding.settled(rows, output, chunks, config.updates)
        return replace(batch, rollout=replace(rollout, transitions=rows))

    def checks(self) -> list[Check]:
        """Collection 0, which the first update uses, and the gradient of its rows of largest advantage or guidance."""
        context, config = self.context, self.context.config
        batch = self.collections.first()
        checks = self.rounding.checks()
        if config.estimator in ("reverse-noise", "nft", "awm"):
            checks.append(_varies(context, batch))
        most = min(config.chunk, max(1, len(self._rows(batch, 0, 0))))  # an update has no more
        size = batch.advantage.abs()
        if batch.guidance is not None:  # a regression's, whose advantage is 0; some steps have no strength
            step = batch.rollout.transitions.step
            size = batch.guidance.flatten(1).norm(dim=1).cpu() * context.strength.gamma.cpu()[step.cpu()]
        some = size.argsort(descending=True)[:most]
        loss = transition_losses(context, batch[some], Log()).mean()
        checks += preflight.gradients(context.model, loss)
        for p in context.helper.parameters() if context.helper else ():
            p.grad = None
        return checks


def _varies(context: AlignContext, batch: Batch) -> Check:
    assert batch.teaches is not None
    lively = batch.teaches.float().mean().item()
    rewards = processes.gather(batch.rewards)
    every = bool((rewards == rewards[0]).all())
    fix = (
        f"reward '{context.reward.name}' gave {rewards[0].item():.4g} to all {len(rewards)} images; choose "
        "another reward or harder prompts"
        if every
        else "no reward differs between the rollouts of one prompt; raise rollouts or noise_level"
    )
    return Check("share of rows with a signal", lively, "above 0", lively > 0, fix)


class Pathwise:
    """Updates through the sampler: DRaFT-K by its last K steps, ReFL by x_0_hat at a random late step."""

    def __init__(self, context: AlignContext):
        self.context = context
        self.block = 1
        self._begun: Losses | None = None  # step 0, of which the preflight did a chunk

    def losses(self, step: int, generator: torch.Generator, log: Log) -> Iterator[Tensor]:
        """Minus the rewards of fresh rollouts, in chunks; what the preflight did of step 0 is not done again."""
        begun, self._begun = self._begun, None
        yield from (begun or partial(pathwise_losses, self.context))(step, generator, log)

    def checks(self) -> list[Check]:
        """The gradient of step 0's first chunk, which is kept."""
        context, model = self.context, self.context.model
        log = Log()
        with model.count_nfe() as nfe:
            left = pathwise_losses(context, 0, step_generator(context.config.seed, 0), log)
            loss = next(left)
        params = list(model.trainable().values())
        slopes = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)

        def begun(step: int, generator: torch.Generator, entered: Log) -> Iterator[Tensor]:
            model.add_nfe(nfe.total)
            # the loss that was computed, with its gradient
            pairs = [(p, slope) for p, slope in zip(params, slopes, strict=True) if slope is not None]
            yield loss.detach() + sum(((p - p.detach()) * slope).sum() for p, slope in pairs)
            yield from left
            entered.add(log)

        self._begun = begun
        return preflight.gradients(model, loss)


def pathwise_losses(context: AlignContext, step: int, generator: torch.Generator, log: Log) -> Iterator[Tensor]:
    """-r of rollouts a chunk, with the gradient through their last steps, over the dimension of a state."""
    config, s = context.config, context.schedule
    prompt = choose(context, generator)
    x_1 = context.model.noise(len(prompt), generator)
    K = len(s)
    stop = K - config.truncate
    if config.random_stop:
        stop = int(torch.randint(2 * K // 3, K, (1,), generator=generator))
    for at in owned(prompt).split(config.chunk):
        x, p, grid = x_1[at], prompt[at], s.times.to(x_1)
        with torch.no_grad():
            for k in range(stop):
                x = euler(context.predict(x, grid[k], p), grid[k + 1])
        for k in range(stop, K):
            pred = context.predict(x, grid[k], p)
            x = pred.x_0 if config.random_stop else euler(pred, grid[k + 1])
            if config.random_stop:
                break
        reward = context.value(p)(x)
        log.mean("reward", reward * config.temperature)
        yield -reward.sum() / len(prompt) / x[0].numel()
    log["reward calls"] = float(len(prompt))
