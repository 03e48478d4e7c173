"""What makes a large model fit: activations that are computed again, and parts that wait on the CPU.

In: a model, whose outputs stay the same. Weights in bf16 are `models.load(dtype=)`, where adapters stay float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import cpu_offload_with_hook
from torch import nn
from torch.utils.checkpoint import checkpoint

from fieldsmith import processes
from fieldsmith.errors import InputError
from fieldsmith.models.core import Model


def checkpoint_activations(model: Model) -> None:
    """Keep each block's input alone and compute the rest again in the backward pass: equal gradients, less memory.

    A block is computed again as it was, with the adapter on or off, wherever the backward runs. Raises InputError where
    the network has no blocks that can be.
    """
    network = model.network
    if not getattr(network, "_supports_gradient_checkpointing", False):
        raise InputError(
            f"{model.name} (family {model.family}) cannot compute its activations again; leave out --checkpointing"
        )

    def again(block: Any, *inputs: Any) -> Any:
        off = model._off
        return checkpoint(
            block.__call__, *inputs, use_reentrant=False,
            context_fn=lambda: (contextlib.nullcontext(), model._turned(off)),
        )  # fmt: skip

    network.enable_gradient_checkpointing(again)


def compile_blocks(model: Model, backend: str = "inductor") -> None:
    """Compile each kind of block once, by torch.compile; what comes out stays the same to rounding."""
    network = model.network
    if getattr(network, "_repeated_blocks", None):
        network.compile_repeated_blocks(dynamic=True, backend=backend)
    else:
        network.compile(dynamic=True, backend=backend)


def offload(model: Model, others: Sequence[nn.Module] = ()) -> list[str]:
    """Everything but the denoiser waits on the CPU: a part comes to the device when it is called, and goes back when
    the denoiser is called next, such as once prompts are encoded. So do `others`, such as a reward's networks, which
    who asks them brings. The names of the model's parts; none on a CPU-only machine, where nothing moves.
    """
    if model.device.type == "cpu":
        return []
    parts = {
        name: part
        for name, part in model.pipeline.components.items()
        if isinstance(part, nn.Module) and part is not model.network
    }
    # a decoder is called by another name than forward; diffusers runs accelerate's hooks there too
    waiting = [(part, cpu_offload_with_hook(part, model.device)[1]) for part in parts.values()]

    def leave(*_: Any) -> None:
        for part, hook in waiting:
            if next(part.parameters()).device.type != "cpu":
                hook.offload()
        for other in others:
            if next(other.parameters()).device.type != "cpu":
                other.to("cpu")

    model.network.register_forward_pre_hook(leave)
    leave()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return list(parts)


@contextlib.contextmanager
def mixed_precision(model: Model) -> Iterator[None]:
    """Inside, the network computes in the type that the launcher names: bf16 on GPUs unless it says otherwise."""
    before, model.precision = model.precision, processes.mixed_precision()
    try:
        yield
    finally:
        model.precision = before
