"""Derivatives of a field in its input: products with a Jacobian, its largest singular value, its least eigenvalue.

In: a function from states (batch, ...) to states, row by row, and the states. Out: products, and values for each row.
Forward-mode differentiation runs on the math attention kernel alone, and not through every layer: where it fails, the
same product comes from two reverse passes. Norms are written out: through torch's fused layer norm the gradient of a
product in a network's weights is silently wrong (2.13: its second derivative takes mean and deviation as fixed), and
its group norm has no forward mode behind an attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Product:
    """f(x) and the Jacobian's product with a direction there, both shaped as f(x)."""

    value: Tensor
    along: Tensor


def jvp(f: Function, x: Tensor, v: Tensor) -> Product:
    """f(x) and J v, v shaped as x; gradients flow to f's parameters where they are enabled."""
    with _differentiable():
        try:
            value, along = torch.func.jvp(f, (x,), (v,))[:2]
        except (
            NotImplementedError,
            RuntimeError,
        ):  # each layer words it differently; an error of f itself is raised again below
            return double_backward(f, x, v)
    return Product(value, along)


def double_backward(f: Function, x: Tensor, v: Tensor) -> Product:
    """The same by two reverse passes: J v is the gradient of <J^T u, v> in a dummy u, in which J^T u is linear."""
    keep = torch.is_grad_enabled()
    with _differentiable(), torch.enable_grad():
        x = x.detach().requires_grad_()
        value = f(x)
        u = torch.zeros_like(value, requires_grad=True)
        (back,) = torch.autograd.grad(value, x, u, create_graph=True)
        (along,) = torch.autograd.grad(back, u, v, create_graph=keep)
    return Product(value, along) if keep else Product(value.detach(), along.detach())


def vjp(f: Function, x: Tensor, u: Tensor) -> Tensor:
    """J^T u, u shaped as f(x)."""
    with _differentiable(), torch.enable_grad():
        x = x.detach().requires_grad_()
        (back,) = torch.autograd.grad(f(x), x, u)
    return back


def spectral_norm(f: Function, x: Tensor, generator: torch.Generator, iterations: int = 20, starts: int = 2) -> Tensor:
    """The largest singular value of each row's Jacobian, (batch,), by power iteration on J^T J: never above it."""
    best = x.new_zeros(len(x))
    for _ in range(starts):
        v = _unit(torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device))
        for step in range(iterations):
            with torch.no_grad():
                along = jvp(f, x, v).along
            best = torch.maximum(best, along.flatten(1).norm(dim=1))
            if step < iterations - 1:
                v = _unit(vjp(f, x, along))
    return best


def least_eigenvalue(f: Function, x: Tensor, generator: torch.Generator, above: Tensor, iterations: int = 20) -> Tensor:
    """The smallest eigenvalue of the symmetric part of each row's Jacobian, (batch,), whose norm is at most `above`."""
    shift = above.reshape(-1, *(1,) * (x.ndim - 1))
    v = _unit(torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device))
    value = x.new_zeros(len(x))
    for _ in range(iterations):
        with torch.no_grad():
            symmetric = (jvp(f, x, v).along + vjp(f, x, v)) / 2
        value = (v * symmetric).flatten(1).sum(1)
        v = _unit(shift * v - symmetric)
    return value


def rademacher(like: Tensor, generator: torch.Generator) -> Tensor:
    """Signs +1 and -1 of equal chance, shaped as `like`."""
    return (torch.randint(2, like.shape, generator=generator) * 2 - 1).to(like)


class _NormsWrittenOut(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _WRITTEN_OUT.get(func, func)(*args, **(kwargs or {}))


def _layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    y = _standardised(x, tuple(range(-len(normalized_shape), 0)), eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    y = _standardised(x.reshape(len(x), num_groups, -1), (2,), eps).reshape(x.shape)
    of_channels = (-1, *(1,) * (x.ndim - 2))
    y = y if weight is None else y * weight.reshape(of_channels)
    return y if bias is None else y + bias.reshape(of_channels)


def _standardised(x: Tensor, over: tuple[int, ...], eps: float) -> Tensor:
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x  # as torch's own norms sum
    away = wide - wide.mean(over, keepdim=True)
    return (away * (away.square().mean(over, keepdim=True) + eps).rsqrt()).to(x.dtype)


_WRITTEN_OUT: dict[Any, Any] = {
    torch.nn.functional.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    torch.nn.functional.group_norm: _group_norm,
    torch.group_norm: _group_norm,
}


@contextmanager
def _differentiable() -> Iterator[None]:
    with sdpa_kernel(SDPBackend.MATH), _NormsWrittenOut():
        yield


def _unit(v: Tensor) -> Tensor:
    norm = v.flatten(1).norm(dim=1).clamp(min=torch.finfo(v.dtype).tiny)
    return v / norm.reshape(-1, *(1,) * (v.ndim - 1))
