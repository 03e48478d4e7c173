"""`edit` prepared: what trains attached, collections of sessions made into each update's losses, the preflight.

In: an editing model, a configuration, sessions and their judge. Out: a Job for verb.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fieldsmith import preflight, processes
from fieldsmith.errors import InputError
from fieldsmith.methods.edit.batch import Batch, planned_batch, rollout_batch
from fieldsmith.methods.edit.config import EditConfig
from fieldsmith.methods.edit.rollouts import Collection, EditContext, Inputs
from fieldsmith.methods.policy import losses as L
from fieldsmith.methods.policy.advantages import optimality
from fieldsmith.methods.policy.checks import Rounding, rounding
from fieldsmith.methods.policy.collections import Collections
from fieldsmith.methods.policy.old import copies, follow, in_place
from fieldsmith.methods.policy.rollouts import Transitions, here
from fieldsmith.models.core import Model
from fieldsmith.models.editing import check_editor
from fieldsmith.paths import noised
from fieldsmith.preflight import Check
from fieldsmith.training import Fit, Log, Optimisation, step_generator
from fieldsmith.verb import Job, attach

NO_VARIANCE = "no group's scores differ"


def prepare(model: Model, config: EditConfig, inputs: Inputs) -> Job:
    """Train the editor on its own sessions, in place.

    Raises InputError where model, sessions and settings do not fit, before anything is attached.
    """
    check_editor(model)
    context = EditContext.of(model, config, inputs)
    check_memory(context)
    x, step = model.noise(1, step_generator(config.seed, 0, stream=1)), torch.zeros(1, dtype=torch.long)
    source = torch.zeros_like(x)
    attached = attach(model, config, lambda: context.output(x, step, context.nothing, source), seed=config.seed)
    old = copies(model, config.old)
    silent = 0  # collections in a row without a signal
    noise = rounding(config.trust, config.clip, context.schedule, model)

    def collect(epoch: int, log: Log) -> Batch:
        nonlocal silent
        with in_place(model, old):
            batch = (rollout_batch if config.rolls else planned_batch)(context, epoch, log)
            if config.objective == "grpo" and batch.everyone:
                batch = _settled(context, batch, epoch, noise)
        if config.objective in ("nft", "grpo"):
            silent = 0 if batch.everyone else silent + 1
        return batch

    collections = Collections(model, collect)

    def losses(step: int, generator: torch.Generator, log: Log) -> Iterator[Tensor]:
        epoch, update = divmod(step, config.updates)
        batch = collections.at(epoch, log)
        yield torch.zeros(())
        if len(rows := _rows(batch, config, epoch, update)):
            for at, real in _chunks(batch, rows, config):
                yield real * row_losses(context, batch, batch.rows[at]).sum() / len(rows)
        if config.identity:
            yield from identity_losses(context, batch.collection, step, generator, log)
        if config.steady and config.lossy:
            yield from steady_losses(context, batch.collection, step, generator, log)

    def checks(resumes: bool) -> list[Check]:
        memory = preflight.memory(model, config.chunk)
        preflight.require([memory], quiet=True)  # before anything large runs
        return [attached, *([] if resumes else _check_batch(context, collections.first(), noise)), memory]

    def stop(done: int, log: dict[str, float]) -> str | None:
        if done % config.updates:
            return None
        follow(model, old, config.old, done)  # here, so that a checkpoint holds what makes the next collection
        if silent >= config.patience:
            return NO_VARIANCE
        return "budget" if config.budget and log["nfe"] >= config.budget else None

    optimisation = Optimisation(
        config.epochs * config.updates, config.lr, config.weight_decay, clip=config.gradient_clip, ema=config.ema,
        checkpoint_every=10 * config.updates, block=config.updates, seed=config.seed, optimizer=config.optimizer,
    )  # fmt: skip
    return Job(
        model, losses, optimisation, {**model.trainable(), **old}, checks, stop, inputs=inputs,
        facts=lambda: {"method": config.preset or config.objective}, advice=lambda done: _advice(config, done),
    )  # fmt: skip


def check_memory(context: EditContext) -> None:
    """Raises InputError where a collection's states do not fit beside the model, and says how many turns would."""
    config, model = context.config, context.model
    state = model.noise(1, torch.Generator().manual_seed(0)).numel() * 4
    rows = int(context.plan.is_stochastic.sum()) if config.objective == "grpo" else config.renoise
    # source and result, four states a row, and three images of the size of states
    each = config.groups * config.rollouts * ((2 + 4 * rows) * state + 3 * 3 * state)
    free = model.free_memory()
    if each * config.turns > free:
        raise InputError(
            f"turns={config.turns} of {config.groups} x {config.rollouts} sessions need "
            f"{each * config.turns / 1e9:.1f} GB for their states, {free / 1e9:.1f} GB are free; "
            f"{int(free // each)} turns fit, or lower groups"
        )


def _rows(batch: Batch, config: EditConfig, epoch: int, update: int) -> Tensor:
    """An update's rows, by their number over all processes."""
    order = torch.randperm(batch.everyone, generator=step_generator(config.seed, epoch, stream=6))
    return order.tensor_split(config.updates)[update]


def _chunks(batch: Batch, rows: Tensor, config: EditConfig) -> Iterator[tuple[Tensor, float]]:
    """This process's part of rows by their number, as places in batch.rows."""
    _, own = here(batch.rows.row, rows, batch.everyone)
    return processes.chunks(own, config.chunk)


def _settled(context: EditContext, batch: Batch, epoch: int, noise: Rounding) -> Batch:
    config, collection, rows = context.config, batch.collection, batch.rows

    def output(at: Tensor) -> Tensor:
        edit = rows.prompt[at]
        return context.output(rows.x[at], rows.step[at], collection.condition(edit), collection.source[edit])

    def chunks(update: int) -> Iterator[tuple[Tensor, float]]:
        return _chunks(batch, _rows(batch, config, epoch, update), config)

    return replace(batch, rows=noise.settled(rows, output, chunks, config.updates))


def _check_batch(context: EditContext, batch: Batch, noise: Rounding) -> list[Check]:
    """Groups teach, the policy agrees with itself, and gradients are where they should be and nowhere else."""
    config, collection, rows = context.config, batch.collection, batch.rows
    checks = []
    if config.objective in ("nft", "grpo"):
        share = batch.signal
        fix = "the judge gives all sessions of every group the same; raise rollouts or steps, or ask for harder turns"
        checks.append(Check("groups with a signal", share, "above 0", share > 0, fix))
        if not batch.everyone:
            return checks  # there is no gradient to look at
    checks += noise.checks()
    if len(rows):
        most = min(config.chunk, max(1, len(_rows(batch, config, 0, 0))))  # an update has no more
        some = batch.advantage[rows.prompt].abs().argsort(descending=True)[:most]
        loss = row_losses(context, batch, rows[some]).mean()
    elif batch.everyone:
        loss = torch.zeros(())  # others have rows
    else:
        branch = identity_losses if config.identity else steady_losses
        loss = next(iter(branch(context, collection, 0, step_generator(config.seed, 0, stream=8), Log())))
    return [*checks, *preflight.gradients(context.model, loss)]


def _advice(config: EditConfig, done: Fit) -> list[str]:
    if done.stopped != NO_VARIANCE:
        return []
    return [
        f"[bold]{config.patience} collections in a row taught nothing[/bold]: the judge gives every session of a group "
        "the same; raise --rollouts or --steps, ask for harder sessions, or lower --min-spread"
    ]


def row_losses(context: EditContext, batch: Batch, rows: Transitions) -> Tensor:
    """The objective's loss of each row, (n,), over a row's dimension."""
    config, collection, s = context.config, batch.collection, context.schedule
    rows = rows.to(context.model.device)
    condition, source = collection.condition(rows.prompt), collection.source[rows.prompt]
    if config.kl:
        with torch.no_grad(), context.model.reference():  # before f, whose graph takes memory
            reference = context.output(rows.x, rows.step, condition, source)
    f = context.output(rows.x, rows.step, condition, source)
    dim = f[0].numel()
    advantage = batch.advantage[rows.prompt].to(f)
    if config.objective == "supervised":
        return L.square(f - s.target(rows.x_next, rows.noise, rows.step)) / dim
    if config.objective == "nft":
        target = s.target(rows.x_next, rows.noise, rows.step)
        gain = s.gain[rows.step].abs() if config.adaptive else None
        r = optimality(advantage, config.advantage_clip)
        loss = L.nft_loss(f, rows.output_old, target, r, config.nft_beta, gain) / config.nft_beta
    else:
        w, sigma = s.w[rows.step], s.sigma[rows.step].to(f)
        log_rho = L.trust_log_ratio(config.trust, f, rows.output_old, rows.noise, w)
        strength = torch.ones_like(log_rho)
        loss = L.policy_loss(log_rho, advantage, strength, config.trust, config.clip, sigma, dim) / dim
    if config.kl:
        nft = config.objective == "nft"
        kl = L.square(f - reference) if nft else L.gaussian_kl(f, reference, s.w[rows.step])
        loss = loss + config.kl * kl / dim
    return loss


@dataclass(frozen=True)
class Picked:
    """Some of a collection's edits, a chunk of this process's: rows of the collection (n,), their places among those of
    all processes, whether a source goes through the channel, noise (n, ...) and steps (n,)."""

    row: Tensor
    edit: Tensor
    changed: Tensor
    eps: Tensor
    step: Tensor


def _picked(
    context: EditContext, collection: Collection, edits: Tensor, generator: torch.Generator
) -> Iterator[tuple[Picked, float]]:
    """Draws for edits (k,) of all processes; this process's part in chunks, with their weight."""
    eps = torch.randn(len(edits), *collection.x_0.shape[1:], generator=generator)
    steps = torch.randint(len(context.schedule), (len(edits),), generator=generator)
    place, row = here(collection.edit, edits, collection.following.numel())
    for at, real in processes.chunks(torch.arange(len(place)), context.config.chunk):
        some = place[at] if len(place) else at
        rows = row[at] if len(row) else at
        yield Picked(rows, edits[some], some < len(edits) // 2, eps[some].to(collection.x_0), steps[some]), real


def identity_losses(
    context: EditContext, collection: Collection, step: int, generator: torch.Generator, log: Log
) -> Iterator[Tensor]:
    """The identity branch (MT-OPSD): a result is the source, nothing is asked, the result is the target.

    Half of the sources are as the next turn gets them, through the channel, the others are whole, so that the model
    still learns to keep those as they are.
    """
    config, s = context.config, context.schedule
    everyone = collection.following.numel()
    n = max(1, everyone // config.updates)
    edits = torch.randperm(everyone, generator=generator)[:n]
    for at, real in _picked(context, collection, edits, generator):
        images = context.images(collection.x_0[at.row])
        whole = context.states(images)
        source = whole.clone()
        if at.changed.any():
            source[at.changed] = context.states(
                context.through_channel(images[at.changed], step, everyone * (config.turns + 1) + at.edit[at.changed])
            )
        x_t = noised(s.path, whole, at.eps, s.times[at.step].to(whole))
        f = context.output(x_t, at.step, context.nothing.repeat(len(at.row)), source)
        loss = real * L.square(f - s.target(whole, at.eps, at.step)).sum() / whole[0].numel() / n
        log.count("identity", loss.item())
        yield config.identity * loss


def steady_losses(
    context: EditContext, collection: Collection, step: int, generator: torch.Generator, log: Log
) -> Iterator[Tensor]:
    """The steady branch, at results of turns after the first, each noised anew at one time: the output on a source that
    the channel changed is drawn to the same model's output on the source as it was."""
    config, s = context.config, context.schedule
    sessions, everyone = config.groups * config.rollouts, collection.following.numel()
    own = len(collection.x_0) // config.turns  # this process's sessions
    later = torch.arange(sessions, everyone)
    n = max(1, len(later) // config.updates)
    edits = later[torch.randperm(len(later), generator=generator)[:n]]
    for at, real in _picked(context, collection, edits, generator):
        row = at.row.clamp(min=own)  # a row of weight 0 may be of the first turn
        images = context.images(collection.x_0[row - own])  # what the turn before made
        changed = context.through_channel(images, step, 2 * everyone * (config.turns + 1) + at.edit)
        whole, source = context.states(images), context.states(changed)
        x_0 = collection.x_0[row]
        x_t = noised(s.path, x_0, at.eps, s.times[at.step].to(x_0))
        with torch.no_grad():
            target = context.output(x_t, at.step, collection.condition(row), whole)
        f = context.output(x_t, at.step, collection.condition(row), source)
        loss = real * L.square(f - target).sum() / x_0[0].numel() / n
        log.count("steady", loss.item())
        yield config.steady * loss
