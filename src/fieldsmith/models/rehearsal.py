"""A run's own Python on tensors that are shapes alone, with the bytes counted that it would have alive.

In: networks whose weights are fake tensors (meta_model.py). Inside a `Rehearsal` every large tensor that follows from
them is a fake one too, with a shape and a type but no numbers, and costs nothing. Few numbers (losses, rewards, times,
norms: at most one dimension) are real, made up where they follow from fake ones, so that code that looks at them runs
as it is. What was seen once is not run again: of a network's equal blocks one is run and the others take as much
memory as it did, and so do calls that repeat, which makes 12 billion parameters a matter of seconds.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from fieldsmith.models.core import Condition
from fieldsmith.models.estimate_memory import GRADIENTS, SAVED, WORKING, Live

aten = torch.ops.aten
FEW = 2**16  # numbers in a tensor of one dimension that is real
BLOCKS = 6  # a network's list of as many equal blocks or more is run by one of them
DRAWS = (aten.randn.default, aten.randn.generator, aten.rand.default, aten.rand.generator)
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


class Shapes(TorchDispatchMode):
    """Few numbers are real, many are shapes alone."""

    def __init__(self, mode: FakeTensorMode):
        super().__init__()
        self.mode, self.generator = mode, torch.Generator().manual_seed(0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in DRAWS and math.prod(args[0]) > FEW:
            with self.mode:
                return func(*args, **kwargs)
        if not any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return self._real(args[0].new_empty(()), func).item()
        if func is aten.equal.default:
            return True
        if func is aten.nonzero.default:  # as many as there may be
            return torch.ones(args[0].shape, dtype=torch.bool).nonzero()
        if func in INDEXED:
            args = (args[0], _without_masks(args[1]), *args[2:])
        output = func(*args, **kwargs)
        if func.is_view or func._schema.is_mutable or torch._C._current_graph_task_id() != -1:
            return output
        return tree_map(lambda part: self._real(part, func), output)

    def _real(self, part: Any, func: Any) -> Any:
        """Made-up numbers in place of few fake ones: floats in (0.1, 1), yes unless it is asked for any, no counts."""
        if not isinstance(part, FakeTensor) or part.ndim > 1 or part.numel() > FEW:
            return part
        if part.dtype.is_floating_point:
            return (0.1 + 0.9 * torch.rand(part.shape, generator=self.generator)).to(part.dtype)
        yes = part.dtype is torch.bool and func.overloadpacket is not aten.any
        return torch.full(part.shape, yes, dtype=part.dtype)


def _without_masks(indices: Any) -> list[Any]:
    """Masks as the places that they pick; all places where nobody knows."""
    places: list[Any] = []
    for index in indices:
        if index is None or index.dtype is not torch.bool:
            places.append(index)
        else:
            known = torch.ones(index.shape, dtype=torch.bool) if isinstance(index, FakeTensor) else index
            places += known.nonzero().unbind(1)
    return places


@dataclass(frozen=True)
class Seen:
    """What a call took: its outputs, and bytes beyond them, while it ran, until its backward pass, and in that."""

    outputs: Any  # tensors as (shape, dtype)
    forward: int
    saved: int = 0
    backward: int = 0


class Rehearsal:
    """Open while a run is rehearsed: counts (`live`), makes up few numbers, recalls what calls took."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)  # schedulers and tables of ids are real
        self.live = Live()
        with self.mode:
            self._fake = torch.empty(())
        self._seen: dict[Any, Seen] = {}
        self._times: dict[Any, set[int]] = {}  # by call: in which graphs, or how often, it has been run
        self._graph = 0

    @contextlib.contextmanager
    def open(self) -> Iterator[Live]:
        with Shapes(self.mode), self.live:
            yield self.live

    def again(self) -> None:
        """Run calls in full again, since what waits beside them has changed, such as the optimiser's moments."""
        self._times = {}

    def fake(self, tensor: Tensor) -> Tensor:
        """A tensor's shape and type."""
        made: Tensor = self._fake.new_empty(tensor.shape, dtype=tensor.dtype)
        return made

    def watch(self, network: nn.Module) -> nn.Module:
        """The network, of whose long lists of blocks one of each kind will be run."""
        for blocks in (part for part in network.children() if isinstance(part, nn.ModuleList)):
            for block in blocks if len(blocks) >= BLOCKS else ():
                block.forward = functools.partial(self.block, block)  # type: ignore[method-assign]
        return network

    def bytes(self, n: int) -> Tensor:
        """A tensor of n bytes."""
        return self._fake.new_empty(n, dtype=torch.uint8)

    def call(self, name: str, network: nn.Module, off: bool, function: Callable[..., Any], *given: Any) -> Any:
        """function(*given) that asks the whole network; in full for its first two times, alone or in a graph."""
        if not _plain(network):
            return self._watched(function, *given)
        grads = torch.is_grad_enabled()
        key = (name, id(network), off, grads, _signature(given))
        if grads and not self.live.now.get(SAVED):
            self._graph += 1  # no activations wait: what this makes is a graph of its own
        times = self._times.setdefault(key, set())
        place = self._graph if grads else len(times)
        if len(times) < 2 or (grads and place in times):
            times.add(place)
            start = self._start()
            output = self._watched(function, *given)
            self._seen[key] = Seen(tree_map(_spec, output), self._beyond(start, output))
            return output
        seen = self._seen[key]
        self.bytes(seen.forward)
        anchor = sum((p.sum() * 0 for p in _leaves(given) if isinstance(p, Tensor) and p.requires_grad), ANCHOR)
        return self._make(seen.outputs, anchor if grads else None)

    def _watched(self, function: Callable[..., Any], *given: Any) -> Any:
        """With what its graph keeps counted as activations."""
        live = self.live
        live.settle()

        def keep(tensor: Tensor) -> Tensor:
            if live.kind(tensor) == WORKING:
                live.hold([tensor], SAVED)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            return function(*given)

    def block(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """One block's forward, run for the first of equal ones alone."""
        forward = type(block).forward
        if not _plain(block):
            return forward(block, *args, **kwargs)
        leaves, tree = tree_flatten((args, kwargs))
        own = list(block.parameters())
        state = tuple((p.shape, p.dtype, p.requires_grad) for p in own)
        modules = tuple((m.training, getattr(m, "_disable_adapters", False)) for m in block.modules())
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in (*own, *given))
        key = (type(block), state, modules, _signature(leaves), learns)

        def run(*given: Any) -> Any:
            left = iter(given)
            filled = [next(left) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            args, kwargs = tree_unflatten(filled, tree)
            return forward(block, *args, **kwargs)

        if not learns:
            if key in self._seen:
                self.bytes(self._seen[key].forward)
                return self._make(self._seen[key].outputs)
            start = self._start()
            output = run(*given)
            self._seen[key] = Seen(tree_map(_spec, output), self._beyond(start, output))
            return output
        if key not in self._seen:
            self._seen[key] = self._try(run, given, own)
        trained = [p for p in own if p.requires_grad]
        outputs = _Recalled.apply(self, self._seen[key], *trained, *given)
        return outputs if isinstance(self._seen[key].outputs, tuple) else outputs[0]

    def _try(self, run: Callable[..., Any], given: list[Tensor], own: list[Tensor]) -> Seen:
        """A block's forward and backward by itself."""
        inputs = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in given]
        start = self._start()
        output = run(*inputs)
        outputs = [part for part in tree_leaves(output) if isinstance(part, Tensor)]
        made = sum(part.numel() * part.element_size() for part in outputs)
        saved, forward = self.live.total - start - made, self._beyond(start, output)
        slopes = [torch.empty_like(part) for part in outputs]
        wanted = [tensor for tensor in (*inputs, *own) if tensor.requires_grad]
        begin = self._start()
        gradients = torch.autograd.grad(outputs, wanted, slopes, allow_unused=True)
        backward = self._beyond(begin, gradients)
        return Seen(tree_map(_spec, output), max(0, forward - saved), max(0, saved), backward)

    def _start(self) -> int:
        self.live.highest = self.live.total
        return self.live.total

    def _beyond(self, start: int, output: Any) -> int:
        """The most bytes alive since `start`, beyond the output."""
        made = sum(part.numel() * part.element_size() for part in tree_leaves(output) if isinstance(part, Tensor))
        return max(0, self.live.highest - start - made)

    def _make(self, specs: Any, anchor: Tensor | None = None) -> Any:
        """Outputs by their shapes, in a graph that leads to the anchor."""

        def make(spec: Any) -> Any:
            if not isinstance(spec, _Spec):
                return spec
            made = self._fake.new_empty(spec.shape, dtype=spec.dtype)
            return made if anchor is None else made + anchor.to(spec.dtype)

        return tree_map(make, specs)


@dataclass(frozen=True)
class _Spec:
    shape: tuple[int, ...]
    dtype: torch.dtype


def _spec(part: Any) -> Any:
    return _Spec(tuple(part.shape), part.dtype) if isinstance(part, Tensor) else part


def _signature(given: Any) -> tuple[Any, ...]:
    return tuple(
        (tuple(leaf.shape), leaf.dtype, leaf.requires_grad) if isinstance(leaf, Tensor) else repr(leaf)
        for leaf in _leaves(given)
    )


def _leaves(given: Any) -> list[Any]:
    """Tensors and numbers, those of conditions too."""
    return tree_leaves(tree_map(lambda leaf: leaf.parts if isinstance(leaf, Condition) else leaf, given))


ANCHOR = torch.zeros((), requires_grad=True)  # where recalled graphs end


class _Recalled(torch.autograd.Function):
    """A block as one that was tried: memory alone."""

    @staticmethod
    def forward(ctx: Any, rehearsal: Rehearsal, seen: Seen, *tensors: Tensor) -> Any:
        rehearsal.bytes(seen.saved + seen.forward)
        ctx.rehearsal, ctx.seen = rehearsal, seen
        ctx.save_for_backward(rehearsal.bytes(seen.saved), *tensors)
        outputs = rehearsal._make(seen.outputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        _, *tensors = ctx.saved_tensors
        ctx.rehearsal.bytes(ctx.seen.backward)
        needed = ctx.needs_input_grad[2:]
        return None, None, *(torch.empty_like(t) if n else None for t, n in zip(tensors, needed, strict=True))


def _plain(module: nn.Module) -> bool:
    """Whether nobody looks inside, and no derivative but the usual backward pass is taken."""
    if torch._C._len_torch_function_stack() or torch._C._functorch.maybe_current_level() is not None:
        return False
    return not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def count_gradients(live: Live, parameters: list[Tensor]) -> list[Any]:
    """Hooks under which gradients are counted as such once they arrive."""

    def arrive(p: Tensor) -> None:
        if p.grad is not None:
            live.hold([p.grad], GRADIENTS)

    return [p.register_post_accumulate_grad_hook(arrive) for p in parameters]
