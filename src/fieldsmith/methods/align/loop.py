"""The run: rollouts -> rewards -> guidance -> loss -> training.fit, one loop for every recipe.

In: a model, a configuration, a reward, a run directory (or None). Out: the model, trained in place, and a Result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor

from fieldsmith import preflight, processes
from fieldsmith.errors import InputError
from fieldsmith.methods.align import losses as L
from fieldsmith.methods.align.auxiliary import Auxiliary
from fieldsmith.methods.align.collect import Batch, carry, choose, collect, log_ratio_slope
from fieldsmith.methods.align.config import FIRST_ORDER, REGRESSIONS, AlignConfig, check
from fieldsmith.methods.align.rollouts import Rollout, Rows
from fieldsmith.methods.align.schedule import effective_strength, multiplier, strength
from fieldsmith.methods.align.setting import Setting
from fieldsmith.models.core import LoraSpec, Model, Nfe
from fieldsmith.rewards import Reward
from fieldsmith.run import Run
from fieldsmith.samplers import euler
from fieldsmith.training import Optimisation, fit, step_generator

Callback = Callable[[int, dict[str, float]], "str | None"]


@dataclass(frozen=True)
class Result:
    """What a run did: optimiser steps, seconds, forward-equivalents, why it stopped."""

    steps: int
    seconds: float
    forward_equivalents: int
    stopped: str
    h: tuple[float, ...] | None = None  # the recipe's strength by step, on its own schedule


def align(
    model: Model,
    config: AlignConfig,
    reward: Reward,
    run: Run | None = None,
    callback: Callback | None = None,
    optimizer: str = "adamw",
) -> Result:
    """Raise the reward of config.prompts' images, in place. `probe(step, log)` is called before step 0 and after each
    step; a reason that it returns ends the run.

    Raises InputError before anything is trained (settings, prompts, preflight), RunError if training or a judge breaks.
    """
    check(config)
    processes.check_share(config.prompts_per_epoch * config.rollouts, "prompts_per_epoch x rollouts")
    _check_reward(config, reward)
    with model.count_nfe() as nfe:
        return _align(model, config, reward, run, callback, optimizer, nfe)


def _align(
    model: Model,
    config: AlignConfig,
    reward: Reward,
    run: Run | None,
    callback: Callback | None,
    optimizer: str,
    nfe: Nfe,
) -> Result:
    setting = Setting.of(model, config, reward)
    x = model.noise(2, step_generator(config.seed, 0, stream=1))
    t = setting.s.times[0].to(x)
    with torch.no_grad(), model.uncounted():
        base = model.predict(x, t, setting.condition[:1], config.guidance).velocity
    if config.full:
        model.unfreeze(config.subset)
    else:
        model.adapt(LoraSpec(config.subset, config.rank, config.alpha, seed=config.seed))
    try:
        method = Method(setting)
        with model.uncounted():
            method.look(base, x, t, quiet=run is None)
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

    if callback:
        callback(0, {})
    optimisation = Optimisation(
        config.epochs * config.updates, config.lr, config.weight_decay, clip=config.gradient_clip, ema=config.ema,
        checkpoint_every=10 * config.updates, block=config.updates, seed=config.seed,
        optimizer=optimizer,
    )  # fmt: skip
    done = fit({**model.trainable(), **method.extra()}, losses, optimisation, run, callback)
    history = run.history() if run else []
    cost = int(history[-1]["forwards"]) if history else nfe.total
    return Result(done.steps, done.seconds, cost, done.stopped, method.effective_strength())


def _check_reward(config: AlignConfig, reward: Reward) -> None:
    if config.estimator in FIRST_ORDER and not reward.differentiable:
        raise InputError(
            f"reward '{reward.name}' is a black box, but estimator '{config.estimator}' needs its gradient; use a "
            "zeroth-order preset such as rsm-branch-sd35 or nft, or a differentiable reward"
        )


class Method:
    """Collections and their losses, for one run of one recipe."""

    def __init__(self, setting: Setting):
        self.setting, self.config, self.model = setting, setting.config, setting.model
        config, s = self.config, setting.s
        self.batch: tuple[int, Batch] | None = None
        self.helper: Auxiliary | None = None
        if config.auxiliary != "none":
            like = self.model.noise(1, torch.Generator().manual_seed(0))
            field = config.auxiliary in ("residual", "value")
            self.helper = Auxiliary(like, len(setting.prompts), field, config.seed)
        policy = config.estimator in ("reverse-noise", "balance")
        self.multiplier = multiplier(config.strength, s) if policy else None
        self.strength = strength(config.strength, s, setting.prior)

    def extra(self) -> dict[str, Tensor]:
        return {f"auxiliary.{name}": p for name, p in self.helper.named_parameters()} if self.helper else {}

    def effective_strength(self) -> tuple[float, ...] | None:
        """h by step: the push on the network's output per unit of the value's gradient; None where nothing has it."""
        config, s = self.config, self.setting.s
        if config.estimator not in ("reverse-noise", *REGRESSIONS):
            return None
        normaliser = s.omega if config.estimator == "reverse-noise" or config.state == "next" else 1.0
        return tuple(effective_strength(self.strength, s, normaliser).tolist())

    def losses(self, step: int, generator: torch.Generator, log: dict[str, float]) -> Iterator[Tensor]:
        config, setting = self.config, self.setting
        epoch, update = divmod(step, config.updates)
        if config.estimator == "pathwise":
            yield from self.pathwise(generator, log)
            return
        if self.batch is None or self.batch[0] != epoch:
            self.batch = (epoch, collect(setting, self.helper, epoch, log))
        batch = self.batch[1]
        order = torch.randperm(len(batch.advantage), generator=step_generator(config.seed, epoch, stream=6))
        mine = order.tensor_split(config.updates)[update]
        if config.estimator in ("reverse-noise", "nft", "awm"):  # rows of advantage 0 teach nothing but staying
            mine = mine if config.kl else mine[batch.advantage[mine] != 0]
        if not len(mine):
            log["rows"] = 0.0
            yield torch.zeros(())
            return
        sums: dict[str, float] = {}
        for at in mine.split(config.chunk):
            some = batch[at]
            part, numbers = self.loss(some)
            for name, value in numbers.items():
                sums[name] = sums.get(name, 0.0) + value * len(at) / len(mine)
            yield (part * some.rollout.rows.weight.to(part)).sum() / len(mine)
        log |= sums
        if config.anchor and len(batch.rollout.idle.step):
            yield from self.anchored(batch.rollout, len(mine), generator)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """The loss of rows, (n,), and what to log of it."""
        config, s, rows = self.config, self.setting.s, batch.rollout.rows.to(self.model.device)
        f = self.setting.output(rows.x, rows.step, rows.prompt)
        numbers = f[0].numel()
        reference: Tensor | None = None
        if config.kl or config.estimator in REGRESSIONS or config.estimator == "balance":
            with torch.no_grad(), self.model.reference():
                reference = self.setting.output(rows.x, rows.step, rows.prompt)
        w = s.w[rows.step].to(f)
        log: dict[str, float] = {}
        if config.estimator in REGRESSIONS:
            assert reference is not None and batch.guidance is not None
            kappa = L.over(s.kappa[rows.step], f)
            guidance = batch.guidance.to(f)
            extra = torch.zeros(len(f)).to(f)
            if self.helper:
                guidance, extra = self.helped(batch, guidance)
            given = self.strength
            loss = extra + L.rsm_loss(
                kappa * f,
                kappa * reference,
                kappa * rows.output_old,
                guidance,
                given.weight[rows.step],
                given.pull[rows.step],
            )
            loss = loss + config.proximal * L.square(f - rows.output_old) / numbers
            log["guidance"] = guidance.square().mean().sqrt().item()
        elif config.estimator in ("nft", "awm"):
            loss = self.forward_loss(f, rows, batch.advantage.to(f))
        elif config.estimator == "balance":
            assert reference is not None
            loss = self.balance(f, reference, batch) / numbers
        else:
            loss = self.policy_loss(f, rows, batch.advantage.to(f), log) / numbers
            if self.helper and batch.returns is not None:
                value = self.helper(rows.x, s.times[rows.step].to(f), rows.prompt)
                loss = loss + (value - batch.returns.to(f)).square()
        if config.kl and reference is not None and config.estimator not in ("terminal", "adjoint"):
            # on forward rows there is no step to take the KL of: a distance of outputs, as released
            forward = config.estimator in ("nft", "awm")
            kl = L.square(f - reference) if forward else L.gaussian_kl(f, reference, w)
            log["kl to reference"] = kl.mean().item()
            loss = loss + config.kl * kl / numbers
        return loss, log

    def policy_loss(self, f: Tensor, rows: Rows, advantage: Tensor, log: dict[str, float]) -> Tensor:
        config, s = self.config, self.setting.s
        assert self.multiplier is not None
        w, sigma = s.w[rows.step].to(f), s.sigma[rows.step].to(f)
        log_rho = L.log_ratio(f, rows.output_old, rows.noise, w)
        if config.trust == "guard-hinge":
            log_rho = w * L.dot(f - rows.output_old, rows.noise)
        log["held"] = (
            L.held(log_rho.detach(), advantage, config.trust, config.clip, sigma, f[0].numel()).float().mean().item()
        )
        strength_ = self.multiplier[rows.step].to(f)
        return L.policy_loss(log_rho, advantage, strength_, config.trust, config.clip, sigma, f[0].numel())

    def forward_loss(self, f: Tensor, rows: Rows, advantage: Tensor) -> Tensor:
        """NFT and AWM, in whatever form the network speaks."""
        s = self.setting.s
        target = s.target(rows.after, rows.noise, rows.step)
        if self.config.estimator == "awm":
            return L.awm_loss(f, rows.output_old, target, advantage, self.config.clip)
        optimality = 0.5 + 0.5 * (advantage / self.config.advantage_clip).clamp(-1, 1)
        gain = s.gain[rows.step].abs() if self.config.adaptive else None
        return L.nft_loss(f, rows.output_old, target, optimality, self.config.nft_beta, gain)

    def balance(self, f: Tensor, reference: Tensor, batch: Batch) -> Tensor:
        """DAG's detailed balance; the flow at clean data is the reward itself."""
        s, rows, helper = self.setting.s, batch.rollout.rows.to(self.model.device), self.helper
        assert helper is not None and batch.returns is not None
        w, times = s.w[rows.step].to(f), s.times.to(f)
        log_rho = L.log_ratio(f, rows.output_old, rows.noise, w) - L.log_ratio(
            reference, rows.output_old, rows.noise, w
        )
        end = (rows.step == int(s.noisy.nonzero().max())).to(f.device)
        value_next = torch.where(end, batch.returns.to(f), helper(rows.after, times[rows.step + 1], rows.prompt))
        return L.balance_loss(helper(rows.x, times[rows.step], rows.prompt), value_next, log_rho)

    def helped(self, batch: Batch, guidance: Tensor) -> tuple[Tensor, Tensor]:
        """Guidance with the learned field added, and the field's own loss by row."""
        config, s, rows, helper = self.config, self.setting.s, batch.rollout.rows.to(self.model.device), self.helper
        assert helper is not None and batch.beside is not None and batch.ends is not None
        times, numbers = s.times.to(guidance), guidance[0].numel()
        pull = L.over(self.strength.pull[rows.step], guidance)
        if config.auxiliary == "residual":  # forward loss through the target, reverse loss for the field alone
            omega = L.over(s.omega[rows.step], guidance)
            ahead = omega * helper(rows.after, times[rows.step + 1], rows.prompt) / pull.clamp(min=1e-6)
            slope = log_ratio_slope(self.setting, rows)
            own = helper(rows.x, times[rows.step], rows.prompt) + batch.beside.to(guidance)
            return guidance + ahead, L.square(own + slope) / numbers
        eta = L.over(self.setting.eta[rows.step], guidance)
        ahead = helper(rows.x, times[rows.step], rows.prompt)
        with torch.no_grad():
            after = helper(rows.after, times[rows.step + 1], rows.prompt) + batch.beside.to(guidance)
        carried = torch.empty_like(ahead)
        for k in rows.step.unique().tolist():  # a value's gradient is carried by the flow that it rides on
            at = (rows.step == k).nonzero().squeeze(1)
            carried[at] = carry(self.setting, rows.x[at], k, rows.prompt[at], after[at], drawn=False)
        end = helper(batch.ends.to(ahead), torch.zeros(len(ahead)).to(ahead), rows.prompt)
        own_loss = (L.square(eta * guidance + ahead - carried) + 1000 * L.square(end)) / numbers
        return guidance + ahead.detach() / eta.clamp(min=1e-6), own_loss

    def anchored(self, rollout: Rollout, rows: int, generator: torch.Generator) -> Iterator[Tensor]:
        """KL to the reference on ODE states where nothing branched: at most a tenth of the update's rows."""
        idle, config = rollout.idle, self.config
        chosen = torch.randperm(len(idle.step), generator=generator)[: max(1, rows // 10)]
        for at in chosen.split(config.chunk):
            f = self.setting.output(idle.x[at], idle.step[at], idle.prompt[at])
            with torch.no_grad(), self.model.reference():
                reference = self.setting.output(idle.x[at], idle.step[at], idle.prompt[at])
            kl = L.gaussian_kl(f, reference, self.setting.s.w[idle.step[at]])
            yield config.anchor * kl.sum() / len(chosen) / f[0].numel()

    def pathwise(self, generator: torch.Generator, log: dict[str, float]) -> Iterator[Tensor]:
        """DRaFT-K: the reward's gradient through the sampler's last K steps; ReFL: through x_0_hat at a late step."""
        config, setting, s = self.config, self.setting, self.setting.s
        prompt = choose(setting, generator)
        x_1 = self.model.noise(len(prompt), generator)
        K = len(s)
        stop = K - config.truncate
        if config.random_stop:
            stop = int(torch.randint(2 * K // 3, K, (1,), generator=generator))
        total = 0.0
        for at in torch.arange(len(prompt)).split(config.chunk):
            x, p, grid = x_1[at], prompt[at], s.times.to(x_1)
            with torch.no_grad():
                for k in range(stop):
                    x = euler(setting.predict(x, grid[k], p), grid[k + 1])
            for k in range(stop, K):
                pred = setting.predict(x, grid[k], p)
                x = pred.x_0 if config.random_stop else euler(pred, grid[k + 1])
                if config.random_stop:
                    break
            reward = setting.value(p)(x)
            total += reward.detach().sum().item() * config.temperature
            yield -reward.sum() / len(prompt) / x[0].numel()
        log["reward"], log["reward calls"] = total / len(prompt), float(len(prompt))

    # the preflight

    def look(self, base: Tensor, x: Tensor, t: Tensor, quiet: bool) -> None:
        """One small collection and its loss, before anything moves."""
        config, setting = self.config, self.setting
        condition = setting.condition[:1]  # type: ignore[index]
        with torch.no_grad(), self.model.reference():
            gap = (self.model.predict(x, t, condition, config.guidance).velocity - base).abs().max().item()
        preflight.require([preflight.memory(self.model, config.chunk)], quiet=True)  # before anything large runs
        fix = "this is a defect of fieldsmith: please report it"
        checks = [preflight.Check("adapter off against base", gap, "0", gap == 0, fix)]
        log: dict[str, float] = {}
        if config.estimator == "pathwise":
            first = next(iter(self.pathwise(step_generator(config.seed, 0), log)))
        else:
            batch = collect(setting, self.helper, 0, log)
            if config.estimator in ("reverse-noise", "balance"):
                checks.append(self.on_policy(batch))
            if config.estimator in ("reverse-noise", "nft", "awm"):
                checks.append(self.varies(batch))
            some = batch.advantage.abs().argsort(descending=True)[: config.chunk]
            first = self.loss(batch[some])[0].mean()
        checks += [*preflight.gradients(self.model, first), preflight.memory(self.model, config.chunk)]
        for p in self.extra().values():
            p.grad = None
        preflight.require(checks, quiet)
        if not quiet:
            roots, plan = config.prompts_per_epoch * config.rollouts, setting.plan
            words = f"a collection: {roots * plan.forwards():,} forwards, {roots * plan.endpoints():,} reward calls"
            h = " ".join(f"{push:.3g}" for push in self.effective_strength() or ())
            words += f"; strength h by step, from noise to data: {h}" if h else ""
            Console(stderr=True).print(words, highlight=False)

    def on_policy(self, batch: Batch) -> preflight.Check:
        some = torch.arange(min(len(batch.advantage), self.config.chunk))
        rows = batch.rollout.rows[some].to(self.model.device)
        with torch.no_grad():
            f = self.setting.output(rows.x, rows.step, rows.prompt)
            off = L.log_ratio(f, rows.output_old, rows.noise, self.setting.s.w[rows.step].to(f)).abs().max().item()
        limit = 1e-3 * max(1.0, f[0].numel() / 512) ** 0.5  # rounding adds up over a state's numbers
        return preflight.Check(
            "log-ratio of the policy to itself", off, f"below {limit:.2g}", off < limit,
            "rollout and training disagree: is dropout on, or the network in half precision?",
        )  # fmt: skip

    def varies(self, batch: Batch) -> preflight.Check:
        lively = (batch.advantage != 0).float().mean().item()
        first = batch.rewards[0].item()
        every = bool((batch.rewards == batch.rewards[0]).all())
        fix = (
            f"reward '{self.setting.reward.name}' gave {first:.4g} to all {len(batch.rewards)} images; choose another "
            "reward or harder prompts"
            if every
            else "no reward differs between the rollouts of one prompt; raise rollouts or noise_level"
        )
        return preflight.Check("share of rows with a signal", lively, "above 0", lively > 0, fix)
