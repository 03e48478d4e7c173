"""The run: sessions -> scores -> advantages -> loss -> training.fit; one loop for every objective and control.

In: an editing model, a configuration, a Task, a run directory (or None). Out: the model, trained in place, a Result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fieldsmith import preflight, processes
from fieldsmith.errors import InputError
from fieldsmith.methods.align import losses as L
from fieldsmith.methods.align.rollouts import Rows
from fieldsmith.methods.edit import credit
from fieldsmith.methods.edit.config import EditConfig, check
from fieldsmith.methods.edit.rollouts import Channel, Collection, Setting, Task, collect
from fieldsmith.models.core import LoraSpec, Model, Nfe, stack
from fieldsmith.models.editing import check_editor, encode_unique, quantised, states_of
from fieldsmith.paths import noised
from fieldsmith.run import Run
from fieldsmith.training import Optimisation, fit, step_generator

NO_VARIANCE = "no group's scores differ"


@dataclass(frozen=True)
class Result:
    """What a run did: optimiser steps, seconds, forward-equivalents, why it stopped ('steps', 'budget' or advice)."""

    steps: int
    seconds: float
    forward_equivalents: int
    stopped: str


def edit(
    model: Model,
    config: EditConfig,
    task: Task,
    channel: Channel,
    run: Run | None = None,
    optimizer: str = "adamw",
) -> Result:
    """Train the editor in place. Raises InputError before anything is trained, RunError where it breaks later."""
    check(config)
    processes.check_share(config.groups * config.rollouts, "groups x rollouts")
    check_editor(model)
    with model.count_nfe() as nfe:
        return _edit(model, config, task, channel, run, optimizer, nfe)


def _edit(
    model: Model, config: EditConfig, task: Task, channel: Channel, run: Run | None, optimizer: str, nfe: Nfe
) -> Result:
    setting = Setting.of(model, config, task, channel)
    check_memory(setting)
    x = model.noise(1, step_generator(config.seed, 0, stream=1))
    source = torch.zeros_like(x)
    with torch.no_grad(), model.uncounted():
        base = setting.output(x, torch.zeros(1, dtype=torch.long), setting.nothing, source)
    if config.full:
        model.unfreeze(config.subset)
    else:
        model.adapt(LoraSpec(config.subset, config.rank, config.alpha, seed=config.seed))
    try:
        method = Method(setting)
        with model.uncounted():
            method.look(base, x, source, quiet=run is None)
    except BaseException:
        model.remove_training()  # refused before anything was trained: the model can be used again
        raise
    if run:
        run.begin()
    carried: list[int] = []  # what an interrupted run had spent before this process took over

    def losses(step: int, generator: torch.Generator, log: dict[str, float]) -> Iterator[Tensor]:
        if not carried:
            earlier = run.history() if run else []
            carried.append(int(earlier[-1]["forwards"]) - nfe.total if earlier else 0)
        yield from method.losses(step, generator, log)
        log["forwards"] = carried[0] + nfe.total

    def over(done: int, log: dict[str, float]) -> str | None:
        if done % config.updates:
            return None
        method.follow_old(done)  # here, so that a checkpoint holds what the next collection is made with
        if method.silent >= config.patience:
            return NO_VARIANCE
        return "budget" if config.budget and log["forwards"] >= config.budget else None

    optimisation = Optimisation(
        config.epochs * config.updates, config.lr, config.weight_decay, clip=config.gradient_clip, ema=config.ema,
        checkpoint_every=10 * config.updates, block=config.updates, seed=config.seed,
        optimizer=optimizer,
    )  # fmt: skip
    done = fit({**model.trainable(), **method.old}, losses, optimisation, run, over)
    history = run.history() if run else []
    cost = int(history[-1]["forwards"]) if history else nfe.total
    return Result(done.steps, done.seconds, cost, done.stopped)


@dataclass(frozen=True)
class Batch:
    """What an update learns from: advantages (m,) of a collection's edits, which of its rows are left, and the old
    policy's word at re-noised results."""

    collection: Collection
    advantage: Tensor
    rows: Rows


class Method:
    """Collections and their losses, for one run of one recipe."""

    def __init__(self, setting: Setting):
        self.setting, self.config, self.model = setting, setting.config, setting.model
        self.batch: tuple[int, Batch] | None = None
        self.silent = 0  # collections in a row without a signal
        slow = self.config.old != "fresh"
        # as parameters without gradient, so that checkpoints hold them
        self.old = {f"old.{name}": p.detach().clone() for name, p in self.model.trainable().items()} if slow else {}

    def losses(self, step: int, generator: torch.Generator, log: dict[str, float]) -> Iterator[Tensor]:
        config = self.config
        epoch, update = divmod(step, config.updates)
        rolls = config.objective in ("nft", "grpo") or config.sources == "own" or config.identity or config.steady
        if self.batch is None or self.batch[0] != epoch:
            self.batch = (epoch, self.collected(epoch, log) if rolls else self.planned(epoch, log))
        batch = self.batch[1]
        order = torch.randperm(len(batch.rows), generator=step_generator(config.seed, epoch, stream=6))
        mine = order.tensor_split(config.updates)[update]
        yield torch.zeros(())
        for at in mine.split(config.chunk) if len(mine) else ():
            yield self.loss(batch, batch.rows[at]).sum() / len(mine)
        if config.identity:
            yield from self.stay(batch.collection, generator, log)
        if config.steady and self.lossy:
            yield from self.hold(batch.collection, generator, log)

    @property
    def lossy(self) -> bool:
        """Whether the channel does more than quantise; where it does not, the steady branch has nothing to teach."""
        config = self.config
        return config.contrast != 1 or config.blur > 0 or config.noise > 0

    def follow_old(self, step: int) -> None:
        """theta_old <- eta theta_old + (1 - eta) theta, after an epoch that ends with `step` steps done."""
        if not self.old:
            return
        eta = {"ramp": min(0.001 * step, 0.5), "late": min(max(0.0075 * (step - 75), 0.0), 0.999), "slow": 0.8}
        share = eta[self.config.old]
        with torch.no_grad():
            for name, p in self.model.trainable().items():
                old = self.old[f"old.{name}"]
                old.copy_(share * old + (1 - share) * p)

    def swap(self) -> None:
        """Exchange the present and the old policy."""
        with torch.no_grad():
            for name, p in self.model.trainable().items():
                old = self.old[f"old.{name}"]
                kept = p.detach().clone()
                p.copy_(old)
                old.copy_(kept)

    def collected(self, epoch: int, log: dict[str, float]) -> Batch:
        """Sessions by the old policy, their advantages, and the rows that teach."""
        config, setting = self.config, self.setting
        if self.old:
            self.swap()
        try:
            found = collect(setting, epoch)
            generator = step_generator(config.seed, epoch, stream=7)
            if config.objective == "supervised":
                rows = self.targets(found, epoch, generator)
                advantage = torch.ones(len(found.x_0))
            elif config.objective == "none":
                rows, advantage = _none(found), torch.zeros(len(found.x_0))
            else:
                advantage, live = self.advantages(found, log)
                rows = self.renoised(found, generator) if config.objective == "nft" else _known(found.rows)
                rows = rows[live[rows.prompt]]
                self.silent = self.silent + 1 if not len(rows) else 0
        finally:
            if self.old:
                self.swap()
        log["following"], log["consistency"] = found.following.mean().item(), found.consistency.mean().item()
        last = found.following[..., -1]
        log["following, last turn"], log["session"] = last.mean().item(), found.following.prod(-1).mean().item()
        log["rows"] = float(len(rows))
        return Batch(found, advantage, rows)

    def advantages(self, found: Collection, log: dict[str, float]) -> tuple[Tensor, Tensor]:
        """Of every edit, (m,), and which of them belong to a group that teaches, (m,) bool."""
        config = self.config
        rewards, weights = [], []
        for score, weight in ((found.following, config.following), (found.consistency, config.consistency)):
            if weight:
                rewards.append(
                    credit.returns(score, config.credit, config.aggregate, config.discount, config.scoring == "last")
                )
                weights.append(weight)
        advantage = credit.fuse(rewards, weights, config.fusion, config.floor)
        score = torch.stack((found.following, found.consistency)).mean(0)
        if config.credit != "turn":  # every turn answers for the session
            score = score.mean(2, keepdim=True).expand_as(score)
        live = credit.keep(advantage, score, config.min_spread, config.max_mean)
        log["groups with a signal"] = live.float().mean().item()
        log["deviation of following"] = found.following.std(1, correction=0).mean().item()
        log["deviation of consistency"] = found.consistency.std(1, correction=0).mean().item()
        advantage = advantage.clamp(-config.advantage_clip, config.advantage_clip)
        by_unit = advantage.flatten(0, 1)
        return by_unit[found.unit, found.turn], live[found.unit // config.rollouts, found.turn]

    def renoised(self, found: Collection, generator: torch.Generator) -> Rows:
        """Results noised again at the sampler's own times, the old policy's word beside them."""
        setting, m = self.setting, len(found.x_0)
        many = min(self.config.renoise, len(setting.s))
        steps = torch.stack([torch.randperm(len(setting.s), generator=generator)[:many] for _ in range(m)]).flatten()
        edit_ = torch.arange(m).repeat_interleave(many)
        x_0 = found.x_0[edit_]
        eps = torch.randn(x_0.shape, generator=generator).to(x_0)
        x_t = noised(self.model.path, x_0, eps, setting.s.times[steps].to(x_0))
        with torch.no_grad():
            output = setting.output(x_t, steps, found.condition(edit_), found.source[edit_])
        return Rows(x_t, x_0, eps, output, steps, edit_, edit_, torch.ones(len(edit_)))

    def targets(self, found: Collection, epoch: int, generator: torch.Generator) -> Rows:
        """Planned results noised anew, for supervised training on the model's own sources."""
        config, setting = self.config, self.setting
        sessions = setting.task.draw(config.groups, self.seed_of(epoch))
        index = torch.arange(config.groups).repeat_interleave(config.rollouts).tolist()
        planned = torch.cat([quantised(sessions.clean(turn))[index] for turn in range(1, config.turns + 1)])
        return self.noisy(self.latents(planned), generator)

    def planned(self, epoch: int, log: dict[str, float]) -> Batch:
        """As many clean pairs as a collection has edits, without rollouts."""
        config = self.config
        P, T = config.groups * config.rollouts, config.turns
        sessions = self.setting.task.draw(P, self.seed_of(epoch))
        states = [self.latents(quantised(sessions.clean(turn))) for turn in range(T + 1)]
        texts = [encode_unique(self.model, sessions.prompts(turn)) for turn in range(1, T + 1)]
        none = torch.zeros(config.groups, config.rollouts, T)
        found = Collection(
            torch.cat(states[:-1]), torch.cat(states[1:]), torch.arange(P * T), torch.arange(T).repeat_interleave(P),
            torch.arange(P).repeat(T), stack(texts), none, none, None,
        )  # fmt: skip
        log["rows"] = float(P * T * config.renoise)
        return Batch(found, torch.ones(P * T), self.noisy(found.x_0, step_generator(config.seed, epoch, stream=7)))

    def seed_of(self, epoch: int) -> int:
        """The seed of an epoch's sessions, as `collect` draws it."""
        generator = step_generator(self.config.seed, epoch, stream=5)
        return int(torch.randint(2**31, (1,), generator=generator))

    def latents(self, images: Tensor) -> Tensor:
        return torch.cat([states_of(self.model, part) for part in images.split(self.config.chunk)])

    def noisy(self, x_0: Tensor, generator: torch.Generator) -> Rows:
        """Each state noised at `renoise` of the sampler's times; nothing is said of them yet."""
        setting = self.setting
        many = min(self.config.renoise, len(setting.s))
        steps = torch.stack([torch.randperm(len(setting.s), generator=generator)[:many] for _ in x_0]).flatten()
        edit_ = torch.arange(len(x_0)).repeat_interleave(many)
        x_0 = x_0[edit_]
        eps = torch.randn(x_0.shape, generator=generator).to(x_0)
        x_t = noised(self.model.path, x_0, eps, setting.s.times[steps].to(x_0))
        return Rows(x_t, x_0, eps, torch.zeros_like(x_t), steps, edit_, edit_, torch.ones(len(edit_)))

    def loss(self, batch: Batch, rows: Rows) -> Tensor:
        """The objective's loss of rows, (n,)."""
        config, setting, found = self.config, self.setting, batch.collection
        rows = rows.to(self.model.device)
        at = rows.prompt
        condition, source = found.condition(at), found.source[at]
        f = setting.output(rows.x, rows.step, condition, source)
        numbers = f[0].numel()
        advantage = batch.advantage[at].to(f)
        if config.objective == "supervised":
            return L.square(f - setting.s.target(rows.after, rows.noise, rows.step)) / numbers
        if config.objective == "nft":
            optimality = 0.5 + 0.5 * (advantage / config.advantage_clip).clamp(-1, 1)
            target = setting.s.target(rows.after, rows.noise, rows.step)
            gain = setting.s.gain[rows.step].abs() if config.adaptive else None
            loss = L.nft_loss(f, rows.output_old, target, optimality, config.nft_beta, gain) / config.nft_beta
        else:
            w, sigma = setting.s.w[rows.step].to(f), setting.s.sigma[rows.step].to(f)
            log_rho = L.log_ratio(f, rows.output_old, rows.noise, w)
            if config.trust == "guard-hinge":
                log_rho = w * L.dot(f - rows.output_old, rows.noise)
            loss = L.policy_loss(log_rho, advantage, torch.ones_like(w), config.trust, config.clip, sigma, numbers)
            loss = loss / numbers
        if config.kl:
            with torch.no_grad(), self.model.reference():
                reference = setting.output(rows.x, rows.step, condition, source)
            apart = f - reference
            kl = L.square(apart) if config.objective == "nft" else L.gaussian_kl(f, reference, setting.s.w[rows.step])
            loss = loss + config.kl * kl / numbers
        return loss

    def stay(self, found: Collection, generator: torch.Generator, log: dict[str, float]) -> Iterator[Tensor]:
        """The identity branch: a result is the source, nothing asked, the result the target; every other source as the
        next turn sees it, through the channel, the rest whole, so that whole ones are still kept as they are."""
        config, setting = self.config, self.setting
        many = max(1, len(found.x_0) // config.updates)
        chosen = torch.randperm(len(found.x_0), generator=generator)[:many]
        total = 0.0
        for at in chosen.split(config.chunk):
            images = quantised(self.decoded(found.x_0[at]))
            whole = self.latents(images)
            half = len(at) // 2
            source = whole.clone()
            if half:
                source[:half] = self.latents(setting.channel(images[:half], generator))
            eps = torch.randn(whole.shape, generator=generator).to(whole)
            steps = torch.randint(len(setting.s), (len(at),), generator=generator)
            x_t = noised(self.model.path, whole, eps, setting.s.times[steps].to(whole))
            f = setting.output(x_t, steps, setting.nothing.repeat(len(at)), source)
            loss = L.square(f - setting.s.target(whole, eps, steps)).sum() / whole[0].numel() / many
            total += loss.item()
            yield config.identity * loss
        log["identity"] = total

    def hold(self, found: Collection, generator: torch.Generator, log: dict[str, float]) -> Iterator[Tensor]:
        """The steady branch, at results of turns after the first noised anew: the same instruction on the source as it
        came through the channel, and as it was; one time a result."""
        config, setting = self.config, self.setting
        each = config.groups * config.rollouts
        later = torch.arange(each, len(found.x_0))
        many = max(1, len(later) // config.updates)
        chosen = later[torch.randperm(len(later), generator=generator)[:many]]
        total = 0.0
        for at in chosen.split(config.chunk):
            images = quantised(self.decoded(found.x_0[at - each]))  # what the turn before made
            whole, source = self.latents(images), self.latents(setting.channel(images, generator))
            x_0 = found.x_0[at]
            eps = torch.randn(x_0.shape, generator=generator).to(x_0)
            steps = torch.randint(len(setting.s), (len(at),), generator=generator)
            x_t = noised(self.model.path, x_0, eps, setting.s.times[steps].to(x_0))
            with torch.no_grad():
                target = setting.output(x_t, steps, found.condition(at), whole)
            f = setting.output(x_t, steps, found.condition(at), source)
            loss = L.square(f - target).sum() / x_0[0].numel() / many
            total += loss.item()
            yield config.steady * loss
        log["steady"] = total

    def decoded(self, x_0: Tensor) -> Tensor:
        return self.model.decode(x_0).cpu()

    # the preflight

    def look(self, base: Tensor, x: Tensor, source: Tensor, quiet: bool) -> None:
        """One collection and its loss, before anything moves."""
        config, setting = self.config, self.setting
        step = torch.zeros(1, dtype=torch.long)
        with torch.no_grad(), self.model.reference():
            gap = (setting.output(x, step, setting.nothing, source) - base).abs().max().item()
        preflight.require([preflight.memory(self.model, config.chunk)], quiet=True)  # before anything large runs
        fix = "this is a defect of fieldsmith: please report it"
        checks = [preflight.Check("adapter off against base", gap, "0", gap == 0, fix)]
        log: dict[str, float] = {}
        rolls = config.objective in ("nft", "grpo") or config.sources == "own" or config.identity or config.steady
        batch = self.collected(0, log) if rolls else self.planned(0, log)
        self.silent = 0
        if config.objective in ("nft", "grpo"):
            checks.append(self.varies(log))
        if config.objective == "grpo" and len(batch.rows):
            checks.append(self.on_policy(batch))
        generator = step_generator(config.seed, 0, stream=8)
        if config.objective in ("nft", "grpo") and not len(batch.rows):
            preflight.require(checks, quiet)  # there is no gradient to look at
        if len(batch.rows):
            weight = batch.advantage[batch.rows.prompt].abs()
            some = weight.argsort(descending=True)[: config.chunk]
            first = self.loss(batch, batch.rows[some]).mean()
        else:
            branch = self.stay if config.identity else self.hold
            first = next(iter(branch(batch.collection, generator, {})))
        checks += [*preflight.gradients(self.model, first), preflight.memory(self.model, config.chunk)]
        preflight.require(checks, quiet)

    def varies(self, log: dict[str, float]) -> preflight.Check:
        live = log["groups with a signal"]
        fix = "the judge gives all sessions of every group the same; raise rollouts or steps, or ask for harder turns"
        return preflight.Check("groups with a signal", live, "above 0", live > 0, fix)

    def on_policy(self, batch: Batch) -> preflight.Check:
        some = torch.arange(min(len(batch.rows), self.config.chunk))
        rows, found = batch.rows[some].to(self.model.device), batch.collection
        with torch.no_grad():
            f = self.setting.output(rows.x, rows.step, found.condition(rows.prompt), found.source[rows.prompt])
            off = L.log_ratio(f, rows.output_old, rows.noise, self.setting.s.w[rows.step].to(f)).abs().max().item()
        limit = 1e-3 * max(1.0, f[0].numel() / 512) ** 0.5  # rounding adds up over a state's numbers
        return preflight.Check(
            "log-ratio of the policy to itself", off, f"below {limit:.2g}", off < limit,
            "rollout and training disagree: is dropout on, or the network in half precision?",
        )  # fmt: skip


def _known(rows: Rows | None) -> Rows:
    assert rows is not None
    return rows


def _none(found: Collection) -> Rows:
    nothing = torch.arange(0)
    empty = found.x_0[:0]
    return Rows(empty, empty, empty, empty, nothing, nothing, nothing, torch.ones(0))


def check_memory(setting: Setting) -> None:
    """Raises InputError where a collection's states do not fit beside the model, and says how many turns would."""
    import psutil

    config, model = setting.config, setting.model
    state = model.noise(1, torch.Generator().manual_seed(0)).numel() * 4
    kept = 2 + 4 * (int(setting.drawn.sum()) if config.objective == "grpo" else config.renoise)
    each = config.groups * config.rollouts * (kept * state + 3 * 3 * state)  # and three images of the size of states
    on_gpu = model.device.type == "cuda"
    free = torch.cuda.mem_get_info(model.device)[0] if on_gpu else psutil.virtual_memory().available
    if each * config.turns > free:
        raise InputError(
            f"turns={config.turns} of {config.groups} x {config.rollouts} sessions need "
            f"{each * config.turns / 1e9:.1f} GB for their states, {free / 1e9:.1f} GB are free; "
            f"{int(free // each)} turns fit, or lower groups"
        )
