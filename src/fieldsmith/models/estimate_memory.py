"""How many bytes are alive: counted by kind while work runs, for real or on tensors that are shapes alone.

`Live` counts the bytes of storages that are alive, from the first operation that shows a storage to the end of the
last tensor on it. That number is exact, the same on each machine, and does not know what an allocator rounds up, keeps
for later or a kernel borrows inside; so an estimate can be held against a measurement to the byte. On an accelerator,
add its own context and the allocator's slack.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fieldsmith.models.core import Model

WORKING, SAVED, GRADIENTS = "working memory", "activations for the backward pass", "gradients"
STORED, MOMENTS, EMA = "stored states", "optimiser moments", "EMA weights"
TRAINABLE, REFERENCE = "trainable weights", "the reference's own weights"


@dataclass
class Most:
    """Bytes: the most at once, and what was left."""

    beyond: int = 0
    left: int = 0


class Live(TorchDispatchMode):
    """Inside, counts bytes alive by kind; `peak` is the count when their sum was largest."""

    def __init__(self) -> None:
        super().__init__()
        self.now: dict[str, int] = {}
        self.peak: dict[str, int] = {}
        self._total = self._peak = self._highest = 0
        self._paused = False
        self._known: dict[int, tuple[str, int, Any]] = {}  # by storage: kind, bytes, what tells of its end

    def hold(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count these under `kind`, wherever they were counted before."""
        for tensor in tensors:
            self._see(tensor, kind)
            self._move(tensor.untyped_storage()._cdata, kind)

    def spike(self, size: int) -> None:
        """For a moment, `size` bytes of working memory."""
        if self._total + size > self._peak and not self._paused:
            self.peak, self._peak = self.now | {WORKING: self.now.get(WORKING, 0) + size}, self._total + size
        self._highest = max(self._highest, self._total + size)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, what is alive makes no peak."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    @contextlib.contextmanager
    def highest(self) -> Iterator[Most]:
        """Of what comes alive inside: the most bytes at once, and what is left at the end."""
        start, outside = self._total, self._highest
        self._highest = start
        most = Most()
        yield most
        most.beyond, most.left = self._highest - start, self._total - start
        self._highest = max(self._highest, outside)

    def settle(self) -> None:
        """What is alive as working memory now is counted as stored states from here on."""
        for key in [key for key, (kind, _, _) in self._known.items() if kind == WORKING]:
            self._move(key, STORED)

    def _move(self, key: int, kind: str) -> None:
        was, size, end = self._known[key]
        self.now[was] -= size
        self.now[kind] = self.now.get(kind, 0) + size
        self._known[key] = (kind, size, end)

    def _see(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = (kind, size, weakref.ref(storage, functools.partial(self._ended, key)))
        self.now[kind] = self.now.get(kind, 0) + size
        self._total += size
        self._highest = max(self._highest, self._total)
        if self._total > self._peak and not self._paused:
            self.peak, self._peak = dict(self.now), self._total

    def _ended(self, key: int, _: Any) -> None:
        kind, size, _ = self._known.pop(key)
        self.now[kind] -= size
        self._total -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # every other call on fake tensors
            return args[0].device
        output = func(*args, **(kwargs or {}))
        self._see_all(output)
        return output

    def _see_all(self, output: Any) -> None:
        if isinstance(output, Tensor):
            self._see(output, WORKING)
        elif isinstance(output, (list, tuple)):
            for part in output:
                self._see_all(part)


def measured(model: Model, work: Callable[[], object]) -> int:
    """The most bytes that were alive at once while `work` ran, the model's own weights among them."""
    with Live() as live:
        for part in modules(model).values():
            live.hold(tensors(part), "weights")
        work()
    return sum(live.peak.values())


@dataclass(frozen=True)
class Component:
    """One part of a pipeline."""

    name: str
    parameters: int
    dtype: str
    bytes: int


def components(model: Model) -> list[Component]:
    """The parts of a pipeline that hold weights, the denoiser first."""
    parts = modules(model)
    order = sorted(parts, key=lambda name: parts[name] is not model.network)
    return [_component(name, parts[name]) for name in order]


def _component(name: str, part: nn.Module) -> Component:
    parameters = list(part.parameters())
    dtype = str(parameters[0].dtype).removeprefix("torch.") if parameters else "-"
    return Component(name, sum(p.numel() for p in parameters), dtype, size_of(tensors(part)))


def modules(model: Model) -> dict[str, nn.Module]:
    """The parts of a model's pipeline that hold weights, by name."""
    parts = {name: part for name, part in model.pipeline.components.items() if isinstance(part, nn.Module)}
    return parts if any(part is model.network for part in parts.values()) else {"network": model.network, **parts}


def tensors(part: nn.Module) -> list[Tensor]:
    """A module's weights and buffers."""
    return [*part.parameters(), *part.buffers()]


def size_of(tensors: Iterable[Tensor]) -> int:
    """Their bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def moments_of(parameters: Sequence[Tensor], optimizer: str) -> list[Tensor]:
    """What an optimiser keeps after its first step, two tensors a parameter."""
    kept = _quantised if optimizer == "adamw8bit" else lambda p: [torch.zeros_like(p)]
    return [part for p in parameters for _ in range(2) for part in kept(p)]


def _quantised(p: Tensor) -> list[Tensor]:
    """A moment as bitsandbytes keeps it: a byte a number and a scale a block of 2,048; small ones in 32 bits."""
    if p.numel() < 4096:
        return [torch.zeros_like(p, dtype=torch.float32)]
    return [torch.zeros_like(p, dtype=torch.uint8), p.new_zeros(-(-p.numel() // 2048), dtype=torch.float32)]
