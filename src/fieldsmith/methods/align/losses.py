"""The equations: reward score matching and detailed balance (RSM notes, 1.4), and Diffusion-DPO (arXiv 2311.12908).

Pure functions of tensors. Rows are (n, ...); per-row scalars (n,). Sums run over all but the first dimension and are
divided once, here, by the dimension of a row, so that a learning rate means the same at every resolution.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from fieldsmith.methods.policy.losses import dot, over, square


def rsm_loss(
    score: Tensor,
    reference: Tensor,
    old: Tensor,
    guidance: Tensor,
    C1: Tensor,
    gamma: Tensor,
    proximal: Tensor | float = 0.0,
) -> Tensor:
    """C1 (|s - (s_ref + gamma Psi)|^2 + C2 |s - s_old|^2) a row, (n,), over the dimension of a row (v2's equation).

    score, reference, old, guidance (n, ...) in score units; C1, gamma and proximal C2 (n,).
    """
    toward = square(score - reference - over(gamma, score) * guidance)
    return C1.to(score) * (toward + proximal * square(score - old)) / score[0].numel()


def balance_loss(value: Tensor, value_next: Tensor, log_rho_reference: Tensor) -> Tensor:
    """Detailed balance of the residual flow (DAG): (V(x_k) + log pi / pi_ref - V(x_{k+1}))^2; (n,).

    At the optimum V is the soft value log E_ref[exp(r / alpha) | x] and the bracket is 0 for every transition.
    """
    return (value + log_rho_reference - value_next).square()


def log_gain(output: Tensor, reference: Tensor, target: Tensor) -> Tensor:
    """(|f_ref - y|^2 - |f - y|^2) / 2, (n,): by how much the policy denoises better than the reference.

    output f, reference f_ref and target y (n, ...) in the network's own form: eps or v on DDPM, velocity on a flow. It
    stands for log p / p_ref of the clean image (2311.12908, eq. 13 and 14, with the weight of all times equal).
    """
    return dot(reference - output, (reference + output) / 2 - target)


def dpo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta (g_w - g_l)) of log gains (n,) of the chosen and the rejected images of pairs; (n,).

    Where p and p_ref were the images' own densities, it would be least at p_ref exp(r / beta), r being the reward by
    whose differences people choose (Bradley-Terry).
    """
    return -logsigmoid(beta * (chosen - rejected))
