"""Several processes that run one program: who this one is, who writes, and how all of them hear what one was told.

Every process runs the same lines with the same draws, and a network's work is shared out beneath them
(models/parts.py): so each of them holds every state, reward and loss, and a run is what one process would have made.
Started by `accelerate launch`, which says in the environment how many there are. Importing this costs no torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from fieldsmith.errors import InputError, RunError

T = TypeVar("T")


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
    """Whether the launcher asks for FSDP: each process holds a part of every weight."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def begin() -> None:
    """Meet the others, before the first tensor. Raises InputError at a launcher's plug-in that has no use here."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise InputError(
            "DeepSpeed wants to own the optimiser and the loop; to spread a large network over processes, launch with "
            "FSDP instead (docs/scale.md)"
        )
    if count() > 1:
        from accelerate import PartialState

        PartialState()


def wait() -> None:
    """Until all processes are here."""
    if count() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def device() -> Any:
    """The torch device of this process: its own GPU where there is one."""
    import torch

    if count() > 1:
        from accelerate import PartialState

        return PartialState().device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def once(ask: Callable[[], T]) -> T:
    """What the main process was told, in every process: for judges that cost money, or that never say it twice alike.

    What it raises is raised in all of them.
    """
    if count() == 1:
        return ask()
    import torch

    said: list[Any] = [None, None]
    if is_main():
        try:
            said[0] = ask()
        except (InputError, RunError) as error:
            said[1] = error
    torch.distributed.broadcast_object_list(said, src=0)
    if said[1] is not None:
        raise said[1]
    return said[0]


def full(tensor: Any) -> Any:
    """The whole of a tensor of which FSDP left a part here; all processes ask together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def mean(tensor: Any) -> Any:
    """The mean over processes, in all of them."""
    if count() == 1:
        return tensor
    import torch

    total = tensor.clone()
    torch.distributed.all_reduce(total)
    return total / count()


def check_share(rows: int, what: str) -> None:
    """Raises InputError where some processes would have nothing to do."""
    if rows < count():
        raise InputError(f"{count()} processes share {what}={rows}, so some idle; launch at most {rows}, or raise it")
