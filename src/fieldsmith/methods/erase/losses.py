"""The equations of GEM and its baselines on plain tensors (GEM notes, sections 1 to 3).

Velocities are (batch, ...) at shared states: `student` v under the target prompt, `anchor` p and `target` n of the
frozen teacher under the anchor and the target prompt, `null` u under the empty prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-6  # makes the norm smooth at 0


def norm(z: Tensor) -> Tensor:
    """Euclidean norm over all but the batch, (batch,), with gradient 0 at z = 0: sqrt(sum z^2 + eps^2).

    At step 0 the student is the teacher, so v = n exactly; a norm that adds eps to each entry would push there in the
    arbitrary direction (1, ..., 1) with full force.
    """
    return (z.flatten(1).square().sum(1) + TINY**2).sqrt()


def erase_loss(student: Tensor, anchor: Tensor, target: Tensor, eta: float = 1.0, margin: float = 0.0) -> Tensor:
    """GEM's hinge, (batch,): max(0, ||v - p|| - eta ||v - n|| + m), eqs. 13 and 14 of arXiv 2606.00140 at m = 0.

    m = margin * eta * ||p - n|| is ours: from v = n descent stops at v = n + lambda (p - n) with
    lambda = (1 + margin eta) / (1 + eta); the paper's own hinge at eta = 1 stops halfway.
    """
    pull, push = norm(student - anchor), norm(student - target)
    return torch.relu(pull - eta * push + margin * eta * norm(anchor - target))


def progress(student: Tensor, anchor: Tensor, target: Tensor) -> Tensor:
    """lambda, (batch,): how far the student has gone from target (0) to anchor (1), along the line between them."""
    way = (anchor - target).flatten(1)
    return ((student - target).flatten(1) * way).sum(1) / way.square().sum(1).clamp(min=1e-20)


def balance_weights(t: Tensor, t_next: Tensor, noise_level: float) -> Tensor:
    """Trajectory-likelihood weights w = (1 + a^2/2)^2 |dt| (1 - t) / (2 a^2 t) of ||v - p||^2 (proposition of 1.4)."""
    return (1 + noise_level**2 / 2) ** 2 * (t - t_next) * (1 - t) / (2 * noise_level**2 * t)


def esd_target(target: Tensor, null: Tensor, eta: float) -> Tensor:
    """ESD's negative guidance n - eta (n - u); eta = 2 is the classic u - (n - u)."""
    return target - eta * (target - null)


def square_loss(student: Tensor, goal: Tensor) -> Tensor:
    """Mean squared error to a fixed goal, a scalar: ESD, concept ablation, retention."""
    return (student - goal.detach()).square().mean()


def flow_balance(log_forward: Tensor, log_anchor: Tensor, log_z: Tensor, beta: float) -> Tensor:
    """EraseFlow's squared trajectory balance, (batch,): (sum_k [log p(c) - log p(anchor)] + log Z - beta)^2.

    Log-probabilities (steps, batch) are means over a state's numbers. The second term is our mend: the released Flux
    code has log p(c) alone, which leaves the Gaussians' constants in the residual and its sign to chance.
    """
    return ((log_forward - log_anchor).sum(0) + log_z - beta).square()


def attention_loss(maps: Tensor, words: list[int]) -> Tensor:
    """EraseAnything's attention term: sum over queries and keyword columns of the norm over batch and heads.

    maps (batch, heads, queries, text tokens); words: the keyword's token positions.
    """
    return maps[..., words].square().sum((0, 1)).add(TINY**2).sqrt().sum()


def contrast_loss(synonym: Tensor, target: Tensor, others: Tensor, temperature: float = 0.07) -> Tensor:
    """EraseAnything's reverse contrast of attention columns: synonym and target (b, q), irrelevant words (k, b, q).

    mean(log exp(s) - logsumexp(s, others)): small when the synonym is like the irrelevant words, not like the target.
    """
    unit = torch.nn.functional.normalize
    synonym = unit(synonym, dim=-1)
    near = (synonym * unit(target, dim=-1)).sum(-1)[None] / temperature  # (1, b)
    far = (synonym * unit(others, dim=-1)).sum(-1) / temperature  # (k, b)
    return (near[0] - torch.logsumexp(torch.cat((near, far)), 0)).mean()


def closed_form_edit(
    weight: Tensor, erased: Tensor, replacement: Tensor, kept: Tensor, keep_old: float = 0.5
) -> Tensor:
    """UCE: the W' (out, in) that sends erased inputs (k, in) to W replacement and kept inputs (m, in) where W did.

    W' = (l W + sum W c* c^T + sum W c_j c_j^T) (l I + sum c c^T + sum c_j c_j^T)^-1, in float64.
    """
    w, c, c_star, c_keep = (z.double() for z in (weight, erased, replacement, kept))
    eye = torch.eye(w.shape[1], dtype=w.dtype, device=w.device)
    left = keep_old * w + (w @ c_star.T) @ c + (w @ c_keep.T) @ c_keep
    right = keep_old * eye + c.T @ c + c_keep.T @ c_keep
    return torch.linalg.solve(right.T, left.T).T.to(weight.dtype)


def project(velocity: Tensor, anchor: Tensor, target: Tensor) -> Tensor:
    """Training-free: v minus its part beyond the anchor along the concept's direction d = (n - p) / ||n - p||."""
    direction = (target - anchor).flatten(1)
    direction = direction / direction.norm(dim=1, keepdim=True).clamp(min=TINY)
    along = ((velocity - anchor).flatten(1) * direction).sum(1, keepdim=True).clamp(min=0)
    return velocity - (along * direction).reshape(velocity.shape)
