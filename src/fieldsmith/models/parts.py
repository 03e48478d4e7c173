"""A network asked by several processes, each with its share of the rows; every one of them hears the whole answer.

In: a batch that all processes hold. Out: the network's answer for all of it, with gradients: to states and conditions
in full in every process, to weights each process's share times their number, so that the mean over processes is right
for them as for anything that every process works out in full. To take one's rows and to join them are linear and each
other's transpose, so derivatives of any order pass.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fieldsmith import processes

_alone = False


@contextlib.contextmanager
def whole() -> Iterator[None]:
    """Inside, every process asks the network for all rows: where hooks read it from within, or forward-mode passes."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def by_rows(function: Callable[..., Any], x: Tensor, *rest: Any) -> Any:
    """function(x, *rest), which treats rows apart and gives a Tensor or a tuple of them and None; shared out by rows.

    Arguments with as many rows as x are shared out with it; all others are given as they are.
    """
    if processes.count() == 1 or _alone:
        return function(x, *rest)
    n = len(x)
    mine = functools.partial(_mine, n=n)
    with whole():  # a family's own parts may ask one another
        output = function(mine(x), *map(mine, rest))
    if isinstance(output, tuple):
        return tuple(None if part is None else _Join.apply(part, n) for part in output)
    return _Join.apply(output, n)


def _share(n: int) -> int:
    """Rows of each process, the last of them padded: all must take part in every exchange."""
    return -(-n // processes.count())


def _mine(value: Any, n: int) -> Any:
    if isinstance(value, Tensor):
        return _Take.apply(value) if value.ndim and len(value) == n else value
    if hasattr(value, "parts") and len(value) == n:  # a Condition
        return type(value)({name: _Take.apply(part) for name, part in value.parts.items()})
    return value


def _places(n: int) -> Tensor:
    share = _share(n)
    return torch.arange(share) + processes.rank() * share


class _Take(torch.autograd.Function):
    """This process's rows of what all hold, (n, ...) -> (share, ...); padding repeats the last row."""

    @staticmethod
    def forward(ctx: Any, everything: Tensor) -> Tensor:
        ctx.n = len(everything)
        return everything[_places(ctx.n).clamp(max=ctx.n - 1).to(everything.device)]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Join.apply(gradient, ctx.n) / processes.count()


class _Spread(torch.autograd.Function):
    """As `_Take`, with zeros as padding: the transpose of `_Join`."""

    @staticmethod
    def forward(ctx: Any, everything: Tensor) -> Tensor:
        ctx.n = len(everything)
        places = _places(ctx.n).to(everything.device)
        rows = everything[places.clamp(max=ctx.n - 1)]
        return torch.where((places < ctx.n).reshape(-1, *(1,) * (rows.ndim - 1)), rows, torch.zeros_like(rows))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Join.apply(gradient, ctx.n) / processes.count()


class _Join(torch.autograd.Function):
    """Everyone's rows, (share, ...) -> (n, ...) in every process."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, n: int) -> Tensor:
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(processes.count())]
        torch.distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)[:n]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Spread.apply(gradient) * processes.count(), None
