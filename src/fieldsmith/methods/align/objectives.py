"""What each recipe's loss asks of the network at transitions: the equations of losses.py with a model beneath them.

In: an AlignContext, a Batch of n transitions. Out: losses (n,); what is to be known of them goes into the log.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fieldsmith import processes
from fieldsmith.methods.align.collect import Batch, carry, log_ratio_slope
from fieldsmith.methods.align.config import REGRESSIONS
from fieldsmith.methods.align.context import AlignContext
from fieldsmith.methods.align.losses import balance_loss, rsm_loss
from fieldsmith.methods.policy import losses as L
from fieldsmith.methods.policy.advantages import NORMALISED, optimality
from fieldsmith.methods.policy.rollouts import OdeStates, Transitions, here
from fieldsmith.training import Log


def transition_losses(context: AlignContext, batch: Batch, log: Log) -> Tensor:
    """The recipe's loss of each transition, (n,)."""
    config, s = context.config, context.schedule
    rows = batch.rollout.transitions.to(context.model.device)
    reference: Tensor | None = None
    if config.kl or config.estimator in REGRESSIONS or config.estimator == "balance":
        with torch.no_grad(), context.model.reference():  # before f, whose graph takes memory
            reference = context.output(rows.x, rows.step, rows.prompt)
    f = context.output(rows.x, rows.step, rows.prompt)
    dim = f[0].numel()
    if config.estimator in REGRESSIONS:
        assert reference is not None
        loss = _regression(context, f, reference, rows, batch, log)
    elif config.estimator in ("nft", "awm"):
        loss = _renoised(context, f, rows, batch.advantage.to(f))
    elif config.estimator == "balance":
        assert reference is not None
        loss = _balance(context, f, reference, rows, batch) / dim
    else:
        loss = _policy(context, f, rows, batch.advantage.to(f), log) / dim
        if context.helper and batch.returns is not None:
            value = context.helper(rows.x, s.times[rows.step].to(f), rows.prompt)
            loss = loss + (value - batch.returns.to(f)).square()
    if config.kl and reference is not None and config.estimator not in ("terminal", "adjoint"):
        # on re-noised rows there is no step to take the KL of: a distance of outputs, as released
        distance = config.estimator in ("nft", "awm")
        kl = L.square(f - reference) if distance else L.gaussian_kl(f, reference, s.w[rows.step].to(f))
        log.mean("kl to reference", kl)
        if config.kl_scale == "dt" and not distance:
            kl = kl * s.dt[rows.step].to(kl)
        loss = loss + config.kl * kl / dim
    return loss


def _policy(context: AlignContext, f: Tensor, rows: Transitions, advantage: Tensor, log: Log) -> Tensor:
    """The policy gradient under its trust region."""
    config, s, dim = context.config, context.schedule, f[0].numel()
    w, sigma = s.w[rows.step].to(f), s.sigma[rows.step].to(f)
    log_rho = L.trust_log_ratio(config.trust, f, rows.output_old, rows.noise, w)
    outside = L.clipped(log_rho.detach(), advantage, config.trust, config.clip, sigma, dim)
    log.mean("clip_fraction", outside)
    strength = context.multiplier[rows.step].to(f)
    return L.policy_loss(log_rho, advantage, strength, config.trust, config.clip, sigma, dim)


def _renoised(context: AlignContext, f: Tensor, rows: Transitions, advantage: Tensor) -> Tensor:
    """NFT and AWM, in whatever form the network predicts."""
    config, s = context.config, context.schedule
    target = s.target(rows.x_next, rows.noise, rows.step)
    if config.estimator == "awm":
        t = s.t[rows.step] if config.awm_weight == "ghuber" else None
        if config.advantage in NORMALISED:
            advantage = advantage / config.advantage_clip
        return L.awm_loss(f, rows.output_old, target, advantage, config.clip, t)
    gain = s.gain[rows.step].abs() if config.adaptive else None
    r = optimality(advantage, config.advantage_clip)
    scale = config.advantage_clip / config.nft_beta  # what the weight of the distance to the reference is against
    return scale * L.nft_loss(f, rows.output_old, target, r, config.nft_beta, gain)


def _balance(context: AlignContext, f: Tensor, reference: Tensor, rows: Transitions, batch: Batch) -> Tensor:
    """DAG's detailed balance; the flow at clean data is the reward itself."""
    s, helper = context.schedule, context.helper
    assert helper is not None and batch.returns is not None
    w, times = s.w[rows.step].to(f), s.times.to(f)
    own, base = (L.log_ratio(output, rows.output_old, rows.noise, w) for output in (f, reference))
    end = (rows.step == int(s.noisy.nonzero().max())).to(f.device)
    value_next = torch.where(end, batch.returns.to(f), helper(rows.x_next, times[rows.step + 1], rows.prompt))
    return balance_loss(helper(rows.x, times[rows.step], rows.prompt), value_next, own - base)


def _regression(
    context: AlignContext, f: Tensor, reference: Tensor, rows: Transitions, batch: Batch, log: Log
) -> Tensor:
    """Reward score matching, with the learned field's own loss where there is one."""
    config, s, given = context.config, context.schedule, context.strength
    assert batch.guidance is not None
    kappa = L.over(s.kappa[rows.step], f)
    guidance, field_loss = batch.guidance.to(f), torch.zeros(len(f)).to(f)
    if context.helper:
        guidance, field_loss = _learned_field(context, rows, batch, guidance)
    old, C1, gamma = rows.output_old, given.C1[rows.step], given.gamma[rows.step]
    loss = field_loss + rsm_loss(kappa * f, kappa * reference, kappa * old, guidance, C1, gamma)
    log.mean("guidance", guidance.flatten(1).square().mean(1).sqrt())
    return loss + config.proximal * L.square(f - old) / f[0].numel()


def _learned_field(context: AlignContext, rows: Transitions, batch: Batch, guidance: Tensor) -> tuple[Tensor, Tensor]:
    """Guidance with the learned field added, and the field's own loss by row."""
    s, helper = context.schedule, context.helper
    assert helper is not None and batch.neighbour is not None and batch.ends is not None
    times, dim = s.times.to(guidance), guidance[0].numel()
    if context.config.auxiliary == "residual":  # forward loss through the target, reverse loss for the field alone
        gamma = L.over(context.strength.gamma[rows.step], guidance)
        omega = L.over(s.omega[rows.step], guidance)
        ahead = omega * helper(rows.x_next, times[rows.step + 1], rows.prompt) / gamma.clamp(min=1e-6)
        slope = log_ratio_slope(context, rows)
        own = helper(rows.x, times[rows.step], rows.prompt) + batch.neighbour.to(guidance)
        return guidance + ahead, L.square(own + slope) / dim
    eta = L.over(context.eta[rows.step], guidance)
    ahead = helper(rows.x, times[rows.step], rows.prompt)
    with torch.no_grad():
        after = helper(rows.x_next, times[rows.step + 1], rows.prompt) + batch.neighbour.to(guidance)
    carried = torch.empty_like(ahead)
    for k in rows.step.unique().tolist():  # a value's gradient is carried by the flow that it rides on
        at = (rows.step == k).nonzero().squeeze(1)
        carried[at] = carry(context, rows.x[at], k, rows.prompt[at], after[at], drawn=False)
    end = helper(batch.ends.to(ahead), torch.zeros(len(ahead)).to(ahead), rows.prompt)
    own_loss = (L.square(eta * guidance + ahead - carried) + 1000 * L.square(end)) / dim
    return guidance + ahead.detach() / eta.clamp(min=1e-6), own_loss


def anchor_losses(context: AlignContext, states: OdeStates, rows: int, generator: torch.Generator) -> Iterator[Tensor]:
    """KL to the reference on ODE states where nothing branched: at most a tenth of the update's `rows`, in chunks."""
    config = context.config
    everyone = sum(processes.exchange(len(states.row)))
    chosen = torch.randperm(everyone, generator=generator)[: max(1, rows // 10)]
    _, own = here(states.row, chosen, everyone)
    for at, real in processes.chunks(own, config.chunk):
        x, step, prompt = states.x[at], states.step[at], states.prompt[at]
        with torch.no_grad(), context.model.reference():
            reference = context.output(x, step, prompt)
        f = context.output(x, step, prompt)
        kl = L.gaussian_kl(f, reference, context.schedule.w[step])
        yield real * config.anchor * kl.sum() / len(chosen) / f[0].numel()
