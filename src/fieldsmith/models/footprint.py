"""How much memory training takes, found out without any: a rehearsal on weights that are shapes alone.

In: a model, real or a blueprint, and what an update asks of it. Out: bytes by part at the moment when most are alive.

`Live` counts the bytes of storages that are alive, from the first operation that shows a storage to the end of the
last tensor on it. That number is exact, the same on each machine, and does not know what an allocator rounds up, keeps
for later or a kernel borrows inside; so an estimate can be held against a measurement to the byte. On an accelerator,
add its own context and the allocator's slack. The rehearsal runs forward, backward and optimiser step on fake tensors
(shapes and types, no numbers), so that 12 billion parameters take seconds and no memory; attention there is the fused
kernel, which keeps no square of the tokens. What a step keeps beside the network comes from its `Update`.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fieldsmith.models.core import Condition, Model

WORKING, SAVED, GRADIENTS = "working memory", "activations for the backward pass", "gradients"
STORED, MOMENTS, EMA = "stored states", "optimiser moments", "EMA weights"
TRAINABLE, REFERENCE = "trainable weights", "the reference's own weights"


class Live(TorchDispatchMode):
    """Inside, counts bytes alive by kind; `peak` is the count when their sum was largest."""

    def __init__(self) -> None:
        super().__init__()
        self.now: dict[str, int] = {}
        self.peak: dict[str, int] = {}
        self._total = 0
        self._known: dict[int, tuple[str, int, Any]] = {}  # by storage: kind, bytes, what tells of its end

    def hold(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count these under `kind`, wherever they were counted before."""
        for tensor in tensors:
            self._see(tensor, kind)
            key = tensor.untyped_storage()._cdata
            was, size, end = self._known[key]
            self.now[was] -= size
            self.now[kind] = self.now.get(kind, 0) + size
            self._known[key] = (kind, size, end)

    def restart(self) -> None:
        """Forget the largest sum so far."""
        self.peak = dict(self.now)

    def _see(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = (kind, size, weakref.ref(storage, functools.partial(self._ended, key)))
        self.now[kind] = self.now.get(kind, 0) + size
        self._total += size
        if self._total > sum(self.peak.values()):
            self.peak = dict(self.now)

    def _ended(self, key: int, _: Any) -> None:
        kind, size, _ = self._known.pop(key)
        self.now[kind] -= size
        self._total -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for part in tree_leaves(found):
            if isinstance(part, Tensor):
                self._see(part, WORKING)
        return found


def measured(model: Model, work: Callable[[], object]) -> int:
    """The most bytes that were alive at once while `work` ran, the model's own weights among them."""
    with Live() as live:
        for part in _modules(model).values():
            live.hold(_tensors(part), "weights")
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
    parts = _modules(model)
    order = sorted(parts, key=lambda name: parts[name] is not model.network)
    return [_component(name, parts[name]) for name in order]


def _component(name: str, part: nn.Module) -> Component:
    parameters = list(part.parameters())
    dtype = str(parameters[0].dtype).removeprefix("torch.") if parameters else "-"
    return Component(name, sum(p.numel() for p in parameters), dtype, sum(map(_bytes, _tensors(part))))


def _modules(model: Model) -> dict[str, nn.Module]:
    found = {name: part for name, part in model.pipeline.components.items() if isinstance(part, nn.Module)}
    return found if any(part is model.network for part in found.values()) else {"network": model.network, **found}


def _tensors(part: nn.Module) -> list[Tensor]:
    return [*part.parameters(), *part.buffers()]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@dataclass(frozen=True)
class Update:
    """What an update does. `plain`: forwards without a graph, one at a time. `graph`: the loss of its largest chunk.

    `first`: forwards before the first update, when there are no moments and nothing is stored. `waiting`: gradients of
    other chunks wait meanwhile. `stored`: bytes of states, targets and conditions that a run keeps beside the network.
    """

    plain: Sequence[Callable[[], object]]
    graph: Callable[[], Tensor]
    waiting: bool = False
    stored: int = 0
    first: Sequence[Callable[[], object]] = ()


@dataclass(frozen=True)
class Footprint:
    """Bytes by part when most are alive, and what never changes: numbers of parameters and bytes on disk."""

    parts: dict[str, int]
    trainable: int  # parameters
    trainable_bytes: int
    moment_bytes: int
    ema_bytes: int

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


def footprint(
    learner: Model,
    update: Update,
    teacher: Model | None = None,
    ema: bool = False,
    eight_bit: bool = False,
    waiting_elsewhere: bool = False,
) -> Footprint:
    """Rehearse one update of a model whose training has been attached (`adapt`, `unfreeze`).

    `teacher`: another model beside it. `waiting_elsewhere`: parts beside the denoisers lie on the CPU and do not count.
    """
    trained = learner.trainable()
    parameters = list(trained.values())
    mode = getattr(parameters[0], "fake_mode", None)
    with Live() as live:
        for model in (teacher, learner):
            for name, part in _modules(model).items() if model else ():
                if part is learner.network or (teacher and part is teacher.network) or not waiting_elsewhere:
                    live.hold(_tensors(part), f"frozen weights: {_named(name, model is teacher, teacher)}")
        live.hold(learner._base.values(), REFERENCE)
        live.hold(parameters, TRAINABLE)
        live.restart()
        with torch.no_grad():
            for forward in update.first:
                forward()
        averages = [p.detach().clone() for p in parameters] if ema else []
        live.hold(averages, EMA)
        with mode or torch.device("cpu"):
            stored = torch.empty(update.stored, dtype=torch.uint8)
        live.hold([stored], STORED)
        optimizer, moments = _moments(parameters, eight_bit)
        live.hold(moments, MOMENTS)
        with torch.no_grad():
            for forward in update.plain:
                forward()
        if update.waiting:
            for p in parameters:
                p.grad = torch.zeros_like(p)
                live.hold([p.grad], GRADIENTS)
        _backward(live, parameters, update.graph)
        torch.nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], math.inf)
        if optimizer:
            optimizer.step()
        if averages:
            torch._foreach_lerp_(averages, [p.detach() for p in parameters], 0.5)
        for p in parameters:
            p.grad = None
    parts = {kind: size for kind, size in live.peak.items() if size}
    own = sum(map(_bytes, parameters))
    return Footprint(parts, sum(p.numel() for p in parameters), own, sum(map(_bytes, moments)), own if ema else 0)


def _named(name: str, of_teacher: bool, teacher: Model | None) -> str:
    if teacher is None:
        return name
    return f"the teacher's {name}" if of_teacher else f"the student's {name}"


def _moments(parameters: Sequence[Tensor], eight_bit: bool) -> tuple[torch.optim.Optimizer | None, list[Tensor]]:
    """AdamW after a step of nothing, and its moments; in 8 bits the moments alone, with their scales."""
    if eight_bit:
        return None, [part for p in parameters for _ in range(2) for part in _quantised(p)]
    optimizer = torch.optim.AdamW(parameters, lr=0.0)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p in parameters:
        p.grad = None
    return optimizer, [v for state in optimizer.state.values() for key, v in state.items() if key != "step"]


def _quantised(p: Tensor) -> list[Tensor]:
    """A moment as bitsandbytes keeps it: a byte a number and a scale a block of 2,048; small ones in 32 bits."""
    if p.numel() < 4096:
        return [torch.zeros_like(p, dtype=torch.float32)]
    return [torch.zeros_like(p, dtype=torch.uint8), p.new_zeros(-(-p.numel() // 2048), dtype=torch.float32)]


def _backward(live: Live, parameters: Sequence[Tensor], graph: Callable[[], Tensor]) -> None:
    fixed = {p.untyped_storage()._cdata for p in parameters}

    def keep(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in fixed and live._known.get(key, (WORKING,))[0] == WORKING:
            live.hold([tensor], SAVED)
        return tensor

    def arrive(p: Tensor) -> None:
        if p.grad is not None:
            live.hold([p.grad], GRADIENTS)

    hooks = [p.register_post_accumulate_grad_hook(arrive) for p in parameters]
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = graph()
        loss.backward()
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Asked:
    """n states, their times and a condition, without values."""

    x: Tensor
    t: Tensor
    condition: Condition


def asked(model: Model, n: int) -> Asked:
    """What a network is asked at n states: fake tensors where the network's weights are fake."""
    shape = model.noise(1, torch.Generator().manual_seed(0)).shape[1:]
    mode = getattr(next(model.network.parameters()), "fake_mode", None)
    dummy = model.dummy_condition()
    if mode is None:
        return Asked(torch.zeros(n, *shape), torch.full((n,), 0.5), dummy.repeat(n))
    with mode:
        x, t = torch.zeros(n, *shape), torch.full((n,), 0.5)
    parts = {name: mode.from_tensor(part) if part.is_floating_point() else part for name, part in dummy.parts.items()}
    return Asked(x, t, Condition(parts).repeat(n))


def row_bytes(condition: Condition) -> int:
    """Bytes of one row of a condition."""
    return sum(_bytes(part) // len(part) for part in condition.parts.values())
