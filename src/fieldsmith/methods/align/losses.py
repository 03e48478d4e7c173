"""The equations: reward score matching and detailed balance (RSM notes, 1.4).

Pure functions of tensors. Rows are (n, ...); per-row scalars (n,). Sums run over all but the first dimension and are
divided once, here, by the dimension of a row, so that a learning rate means the same at every resolution.
"""

from __future__ import annotations

from torch import Tensor

from fieldsmith.methods.policy.losses import over, square


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
