"""A run's own Python on tensors that are shapes alone, with the bytes counted that it would have alive.

In: networks whose weights are fake tensors (meta_model.py). Inside a `Rehearsal` every large tensor that follows from
them is a fake one too, with a shape and a type but no numbers, and costs nothing. Few numbers (losses, rewards, times,
norms: at most one dimension) are real, made up where they follow from fake ones, so that code that looks at them runs
as it is. What was seen once is not run again: of a network's equal blocks one is run, and of equal calls of the whole
the first; the others take as much memory as those did, which makes 12 billion parameters a matter of seconds.
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
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.hooks import RemovableHandle

from fieldsmith.models.core import Condition
from fieldsmith.models.estimate_memory import GRADIENTS, SAVED, Live, size_of

aten = torch.ops.aten
FEW = 2**16  # numbers in a tensor of one dimension that is real
BLOCKS = 4  # a network's list of as many blocks or more is run by one of each kind
DRAWS = (aten.randn.default, aten.randn.generator, aten.rand.default, aten.rand.generator)
BY_NUMBERS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}  # results hang on more than shapes
MADE: dict[Any, Any] = {}  # by operation and what it was given: the layout of its results, in every rehearsal the same
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


@dataclass(frozen=True)
class Layout:
    """What a tensor is without its numbers."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


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
        if not _any_fake(args) and not _any_fake(tuple(kwargs.values())):
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return self._real(args[0].new_empty(()), func).item()
        if func is aten.equal.default:
            return True
        if func is aten.nonzero.default:  # as many as there may be
            return torch.ones(args[0].shape, dtype=torch.bool).nonzero()
        if func in INDEXED:
            args = (args[0], _without_masks(args[1]), *args[2:])
        output = self._shapes(func, args, kwargs)
        if func.is_view or func._schema.is_mutable or torch._C._current_graph_task_id() != -1:
            return output
        return _each(output, Tensor, lambda part: self._real(part, func))

    def _shapes(self, func: Any, args: Any, kwargs: Any) -> Any:
        """func(*args, **kwargs), remembered by what its results hang on: torch takes ten times as long to say it."""
        if func.is_view and not kwargs:  # to(device=...) may leave the shapes
            with in_kernel_invocation_manager(self.mode):
                views = func(*args, **kwargs)
            return _each(views, Tensor, lambda view: FakeTensor(self.mode, view, args[0].device))
        if func._schema.is_mutable or not BY_NUMBERS.isdisjoint(func.tags):
            return func(*args, **kwargs)
        key = func, _key(args), _key(tuple(kwargs.items())), torch.get_default_dtype()
        if key not in MADE:
            output = func(*args, **kwargs)
            if _is_new(output, (args, kwargs)):
                MADE[key] = _each(output, Tensor, _layout)
            return output
        return _each(MADE[key], Layout, self._empty)

    def _empty(self, layout: Layout) -> Tensor:
        with in_kernel_invocation_manager(self.mode):
            empty = torch.empty_strided(layout.shape, layout.stride, dtype=layout.dtype, device="meta")
        return FakeTensor(self.mode, empty, layout.device)

    def _real(self, part: Any, func: Any) -> Any:
        """Made-up numbers in place of few fake ones: floats in (0.1, 1), yes unless it is asked for any, no counts."""
        if not isinstance(part, FakeTensor) or part.ndim > 1 or part.numel() > FEW:
            return part
        if part.dtype.is_floating_point:
            return (0.1 + 0.9 * torch.rand(part.shape, generator=self.generator)).to(part.dtype)
        yes = part.dtype is torch.bool and func.overloadpacket is not aten.any
        return torch.full(part.shape, yes, dtype=part.dtype)


def _any_fake(given: Any) -> bool:
    return any(isinstance(part, FakeTensor) or (isinstance(part, (list, tuple)) and _any_fake(part)) for part in given)


def _key(part: Any) -> Any:
    """What an operation's results hang on, of one of its arguments."""
    if isinstance(part, Tensor):
        return _layout(part), isinstance(part, FakeTensor), part._is_zerotensor()
    return tuple(map(_key, part)) if isinstance(part, (list, tuple)) else (type(part), part)


def _is_new(output: Any, given: Any) -> bool:
    """Whether all that came out are shapes with bytes of their own."""
    parts = output if isinstance(output, (list, tuple)) else [output]
    taken = {leaf.untyped_storage()._cdata for leaf in tree_leaves(given) if isinstance(leaf, Tensor)}
    return all(
        isinstance(part, FakeTensor)
        and not part._is_zerotensor()
        and part.constant is None
        and part.untyped_storage()._cdata not in taken
        for part in parts
    )


def _layout(tensor: Tensor) -> Layout:
    return Layout(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)


def _each(output: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """The function of every result of that kind."""
    if isinstance(output, (list, tuple)):
        return type(output)(_each(part, kind, function) for part in output)
    return function(output) if isinstance(output, kind) else output


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
    """What a call took: its outputs, and bytes beyond them while it ran, until its backward pass, and in that."""

    outputs: Any  # tensors as Spec
    forward: int
    saved: int = 0
    backward: int = 0


@dataclass(frozen=True)
class Spec:
    """A tensor's shape and type."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Rehearsal:
    """Open while a run is rehearsed: counts bytes (`live`), makes few numbers up, recalls what calls took."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)  # schedulers and tables of ids are real
        self.live = Live()
        with self.mode:
            self._fake = torch.empty(())
        self._seen: dict[Any, Seen] = {}
        self._unhooked: dict[nn.Module, int] = {}
        self._nothing: dict[Any, Tensor] = {}
        self._states: dict[Any, tuple[list[nn.Parameter], Any]] = {}

    @contextlib.contextmanager
    def open(self) -> Iterator[Live]:
        with Shapes(self.mode), self.live:
            yield self.live

    def fake(self, tensor: Tensor) -> Tensor:
        """A tensor's shape and type."""
        made: Tensor = self._fake.new_empty(tensor.shape, dtype=tensor.dtype)
        return made

    def watch(self, network: nn.Module) -> nn.Module:
        """The network, of whose long lists of blocks one of each kind will be run."""
        for blocks in (part for part in network.children() if isinstance(part, nn.ModuleList)):
            for block in blocks if len(blocks) >= BLOCKS else ():
                block.forward = functools.partial(self._block, block)  # type: ignore[method-assign]
        return network

    def _block(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.call(functools.partial(type(block).forward, block), block, args, kwargs)

    def call(
        self, function: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any = None, state: Any = None
    ) -> Any:
        """function(*args, **kwargs), which asks the module: run once for all calls that are alike.

        `state` stands for what the call depends on beside its inputs, where its owner can tell; it is slow to read off.
        """
        if not self._plain(module):
            return function(*args, **(kwargs or {}))
        leaves, tree = tree_flatten(_opened((args, kwargs or {})))
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if state is None or state not in self._states:
            found = list(module.parameters()), _state(module)
            state = state or found[1]
            self._states[state] = found
        own, alike = self._states[state]
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in (*own, *given))

        def run(*given: Tensor) -> Any:
            left = iter(given)
            filled = [next(left) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            args, kwargs = _closed(tree_unflatten(filled, tree))
            return function(*args, **kwargs)

        key = (getattr(function, "func", function).__qualname__, alike, _signature(leaves), learns)
        if key not in self._seen:
            with self.live.paused():
                self._seen[key] = self._try(run, given, own if learns else None)
        self.live.settle()
        seen = self._seen[key]
        if not learns:
            self.live.spike(seen.forward)
            return self.make(seen.outputs)
        outputs = _Recalled.apply(self, seen, *(p for p in own if p.requires_grad), *given)
        return outputs if isinstance(seen.outputs, tuple) else outputs[0]

    def _try(self, run: Callable[..., Any], given: list[Tensor], own: list[nn.Parameter] | None) -> Seen:
        """A call by itself, and its backward pass where it has one (`own`: the module's parameters)."""
        live = self.live
        if own is None:
            with live.highest() as most:
                output = run(*given)
            return Seen(tree_map(_spec, output), most.beyond - _bytes(output))
        inputs = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in given]
        with live.highest() as most, saved_tensors_hooks(_itself, _itself):  # not a checkpoint's around it
            output = run(*inputs)
        outputs = [part for part in tree_leaves(output) if isinstance(part, Tensor)]
        saved = max(0, most.left - _bytes(output))
        slopes = [torch.empty_like(part) for part in outputs]
        wanted = [tensor for tensor in (*inputs, *own) if tensor.requires_grad]
        with live.highest() as back:
            gradients = torch.autograd.grad(outputs, wanted, slopes, allow_unused=True)
        forward = max(0, most.beyond - _bytes(output) - saved)
        return Seen(tree_map(_spec, output), forward, saved, max(0, back.beyond - _bytes(gradients)))

    def _plain(self, module: nn.Module) -> bool:
        """Whether nobody looks inside, and no derivative but the usual backward pass is taken."""
        if torch._C._len_torch_function_stack() or torch._C._functorch.maybe_current_level() is not None:
            return False
        hooks = RemovableHandle.next_id  # counts up with each hook that is registered anywhere
        if self._unhooked.get(module) != hooks:
            if any(m._forward_hooks or m._forward_pre_hooks for m in module.modules()):
                return False
            self._unhooked[module] = hooks
        return True

    def make(self, specs: Any) -> Any:
        """Outputs by their shapes."""
        return tree_map(
            lambda spec: self._fake.new_empty(spec.shape, dtype=spec.dtype) if isinstance(spec, Spec) else spec, specs
        )

    def nothing(self, like: Tensor) -> Tensor:
        """A gradient of the tensor's shape that has no bytes of its own."""
        key = like.shape, like.dtype
        if key not in self._nothing:
            self._nothing[key] = self._fake.new_empty((), dtype=like.dtype).expand(like.shape)
        return self._nothing[key]


class _Recalled(torch.autograd.Function):
    """A call as one that was tried: memory alone."""

    @staticmethod
    def forward(ctx: Any, rehearsal: Rehearsal, seen: Seen, *tensors: Tensor) -> Any:
        saved = rehearsal.make(Spec((seen.saved,), torch.uint8))
        rehearsal.live.hold([saved], SAVED)
        rehearsal.live.spike(seen.forward)
        ctx.rehearsal, ctx.seen = rehearsal, seen
        ctx.save_for_backward(saved, *tensors)
        outputs = rehearsal.make(seen.outputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        _, *tensors = ctx.saved_tensors
        ctx.rehearsal.live.spike(ctx.seen.backward)
        needed = zip(tensors, ctx.needs_input_grad[2:], strict=True)
        return None, None, *(ctx.rehearsal.nothing(tensor) if needs else None for tensor, needs in needed)


def _state(module: nn.Module) -> Any:
    """What a call depends on beside its inputs; equal for blocks that are alike."""
    weights = tuple((p.shape, p.dtype, p.requires_grad) for p in module.parameters())
    return weights, tuple((type(m), m.training, getattr(m, "_disable_adapters", False)) for m in module.modules())


def _signature(leaves: list[Any]) -> Any:
    return tuple(
        (tuple(leaf.shape), leaf.dtype, leaf.requires_grad) if isinstance(leaf, Tensor) else repr(leaf)
        for leaf in leaves
    )


def _opened(given: Any) -> Any:
    """Conditions as dicts, into which torch's trees lead."""
    return tree_map(lambda leaf: {CONDITION: leaf.parts} if isinstance(leaf, Condition) else leaf, given)


def _closed(given: Any) -> Any:
    def close(node: Any) -> Any:
        return Condition(node[CONDITION]) if isinstance(node, dict) and CONDITION in node else node

    return tree_map(close, given, is_leaf=lambda node: isinstance(node, dict) and CONDITION in node)


CONDITION = "a condition's parts"


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _spec(part: Any) -> Any:
    return Spec(tuple(part.shape), part.dtype) if isinstance(part, Tensor) else part


def _bytes(tree: Any) -> int:
    return size_of(part for part in tree_leaves(tree) if isinstance(part, Tensor))


def count_gradients(live: Live, parameters: list[Tensor]) -> list[Any]:
    """Hooks under which gradients are counted as such once they arrive."""

    def arrive(p: Tensor) -> None:
        if p.grad is not None:
            live.hold([p.grad], GRADIENTS)

    return [p.register_post_accumulate_grad_hook(arrive) for p in parameters]
