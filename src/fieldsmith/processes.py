"""Several processes that train one model: who this one is, which groups it owns, and the little that travels.

Every process owns whole groups (a prompt with its rollouts, a pair, a session, rows of a batch) and does everything for
them itself. All make the same draws and take their part. What travels: gradients once a step, numbers for the log, and
rewards where a recipe normalises over the batch. Started by `accelerate launch` or `torchrun`, which say in the
environment how many there are. Importing this costs no torch.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fieldsmith.errors import InputError, RunError

if TYPE_CHECKING:
    from torch import Tensor

BUCKET = 2**26  # numbers that travel at once
PATIENCE = datetime.timedelta(hours=2)  # how long a process waits for another, such as one whose judge is slow


def count() -> int:
    """How many processes run this program."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Which of them this one is, from 0."""
    return int(os.environ.get("RANK", 0))


def is_main() -> bool:
    """Whether this is the process that writes files and speaks."""
    return rank() == 0


def sharded() -> bool:
    """Whether the launcher asks for FSDP: each process holds a part of every weight, or one process all."""
    return "RANK" in os.environ and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def begin() -> None:
    """Meet the others, before the first tensor. Raises InputError at a launcher's option that has no use here."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise InputError(
            "DeepSpeed wants to own the optimiser and the loop; to spread a large network over processes, launch with "
            "FSDP2 instead (docs/scale.md)"
        )
    if os.environ.get("ACCELERATE_USE_MEGATRON_LM", "false").lower() == "true":
        raise InputError("Megatron-LM has no use here; to spread a large network over processes, launch with FSDP2")
    if sharded() and os.environ.get("FSDP_VERSION", "1") == "1":
        raise InputError("this launch asks for FSDP1, which has no use here; set fsdp_version: 2 in its config file")
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16"):
        raise InputError(f"mixed_precision={precision} has no use here; launch with 'no' or 'bf16'")
    if count() > 1 or sharded():
        import torch
        from accelerate import PartialState

        signal.signal(signal.SIGTERM, _terminated)
        # `accelerate launch` and torchrun both set what this reads; gloo carries what lives on the CPU
        PartialState(backend="gloo" if not torch.cuda.is_available() else None, timeout=PATIENCE)
        atexit.register(_end)


def _end() -> None:
    """Part from the others: threads that still listen would abort an interpreter that ends."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _terminated(*_: Any) -> None:
    raise KeyboardInterrupt  # the launcher ends this process, such as where another one is gone


def wait() -> None:
    """Until all processes are here."""
    exchange(None)


def device() -> Any:
    """The torch device of this process: its own GPU where there is one."""
    import torch

    if count() > 1:
        from accelerate import PartialState

        return PartialState().device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def exchange(value: Any, error: Exception | None = None) -> list[Any]:
    """What each process gave, in order of rank; small things only.

    Where one of them gives an error instead, all raise it (marked `known`), so that nobody waits for a process that
    cannot go on. Raises RunError where another process is gone.
    """
    if count() == 1:
        if error is not None:
            raise error
        return [value]
    import torch

    given: list[Any] = [None] * count()
    with _others_here():
        torch.distributed.all_gather_object(given, (None if error is None else (type(error), str(error)), value))
    for place, (failure, _) in enumerate(given):
        if failure is not None:
            kind, sentence = failure
            raised: Any = error if error is not None and place == rank() else kind(sentence)
            raised.known = True
            raise raised
    return [value for _, value in given]


@contextlib.contextmanager
def _others_here() -> Iterator[None]:
    try:
        yield
    except RuntimeError as gone:  # what gloo and NCCL raise where a process has died
        lost = RunError("another process of this run is gone. The last good checkpoint stays")
        lost.known = True  # type: ignore[attr-defined]
        raise lost from gone


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What goes wrong inside in one process is raised in all of them, in one sentence.

    Under FSDP the others may wait for this process inside of a network, so there it ends, and the launcher ends them.
    """
    try:
        yield
    except (InputError, RunError) as error:
        if count() > 1 and not getattr(error, "known", False):
            if not sharded():
                exchange(None, error)
            elif not is_main():
                print(f"fieldsmith: {error}", file=sys.__stderr__)
        raise


def owned(groups: int) -> Tensor:
    """Which of so many groups this process owns: consecutive ones, numbers that differ by at most one."""
    import torch

    return torch.arange(groups).tensor_split(count())[rank()]


def chunks(rows: Tensor, size: int) -> Iterator[tuple[Tensor, float]]:
    """Rows (n,) at most `size` at a time, with their weight 1.

    Under FSDP processes go through the network together: who has fewer chunks gets row 0 with weight 0 instead.
    """
    import torch

    own = rows.split(size) if len(rows) else ()
    most = max(exchange(len(own))) if sharded() else len(own)
    for part in own:
        yield part, 1.0
    for _ in range(most - len(own)):
        yield torch.zeros(1, dtype=torch.long), 0.0


def gather(rows: Tensor) -> Tensor:
    """Every process's rows (n_p, ...), one below the other in order of rank; on the device that they came from."""
    if count() == 1:
        return rows
    import torch

    given = exchange((rows.shape, rows.dtype))
    shape, dtype = max(given, key=lambda one: one[0].numel())  # who has no rows may not know what they look like
    padded = torch.zeros(shape.numel() * dtype.itemsize, dtype=torch.uint8, device=device())
    own = rows.detach().contiguous().flatten().view(torch.uint8)  # bytes, which every backend carries
    padded[: len(own)] = own.to(padded.device)
    parts = [torch.empty_like(padded) for _ in given]
    with _others_here():
        torch.distributed.all_gather(parts, padded)
    rows_of = [
        part[: size.numel() * dtype.itemsize].view(dtype).reshape(size)
        for part, (size, _) in zip(parts, given, strict=True)
    ]
    return torch.cat(rows_of).to(rows.device)


def total(tensor: Tensor) -> Tensor:
    """The sum over processes, in all of them."""
    if count() == 1:
        return tensor
    import torch

    summed = tensor.clone() if tensor.device == device() else tensor.to(device())  # where processes reach each other
    with _others_here():
        torch.distributed.all_reduce(summed)
    return summed.to(tensor.device)


def add_gradients(params: Sequence[Tensor]) -> None:
    """Each gradient becomes its sum over processes; of weights that FSDP holds in parts it has made the mean."""
    if count() == 1:
        return
    import torch

    grads = []
    for p in params:
        if not p.requires_grad:  # only kept in checkpoints
            continue
        if hasattr(p, "full_tensor"):
            if p.grad is not None:
                p.grad.mul_(count())
        else:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            grads.append(p.grad)
    while grads:
        bucket, size = [grads.pop()], 0
        while grads and grads[-1].dtype == bucket[0].dtype and (size := size + bucket[-1].numel()) < BUCKET:
            bucket.append(grads.pop())
        summed = total(torch.cat([grad.flatten() for grad in bucket]))
        for grad, part in zip(bucket, summed.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(part.view_as(grad))


def full(tensor: Any) -> Any:
    """The whole of a tensor of which FSDP left a part here; all processes ask together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def check_groups(groups: int, what: str) -> None:
    """Raises InputError where some processes would have nothing to do, or, under FSDP, more than others.

    `what` names the groups in the message: "batch", "prompts_per_epoch".
    """
    n = count()
    if groups < n:
        raise InputError(f"{n} processes share {what}={groups}, so some idle; launch at most {groups}, or raise it")
    if sharded() and groups % n:
        raise InputError(
            f"{n} processes under FSDP go through the network together, so {what}={groups} must be a multiple of {n}; "
            f"use {groups // n * n} or {(groups // n + 1) * n}"
        )


def mixed_precision() -> Any:
    """The type that the network computes in while it trains, or None for that of its weights: bf16 on GPUs."""
    import torch

    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "bf16" if torch.cuda.is_available() else "no")
    return torch.bfloat16 if asked == "bf16" else None
