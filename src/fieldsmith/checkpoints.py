"""Checkpoints: written beside, synced, sealed with checksums and renamed; the newest two are kept, damaged ones named.

checkpoints/step-N holds safetensors files, which any number of processes reads, and state.json: steps done, why the run
stopped, the SHA-256 of every file. What happened to a checkpoint on the disk is seen before anything is loaded from it,
and the one before it is used.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pathlib
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fieldsmith import disk, processes
from fieldsmith.errors import InputError
from fieldsmith.run import Run

# torch.distributed.checkpoint takes most of a second to import, which only runs that write or resume pay
if TYPE_CHECKING:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

FILE = "model-00001-of-00001.safetensors"  # in a checkpoint; the name that torch's own writer has for it
STATE = "state.json"
KEPT = 2


def find(run: Run) -> pathlib.Path | None:
    """The newest checkpoint that is as it was written; None where there is none. All processes ask together.

    Damaged ones that are newer are named in a line each. Raises InputError where all are damaged, and where the log
    lacks steps.
    """
    if run.good is None:
        with processes.together():
            found = _find(run) if processes.is_main() else None
        run.good = (processes.exchange(found)[0],)
    return run.good[0]


def newest(run: Run) -> list[pathlib.Path]:
    """All that have their names, from the newest on."""
    return sorted((run.folder / "checkpoints").glob("step-*"), reverse=True)


def _find(run: Run) -> pathlib.Path | None:
    damage: list[str] = []
    for checkpoint in newest(run):
        wrong = damage_of(checkpoint)
        if wrong is None:
            run.log_before(int(checkpoint.name.removeprefix("step-")))
            for sentence in damage:
                print(f"fieldsmith: {sentence}; going on from '{checkpoint.name}'", file=sys.stderr)
            return checkpoint
        damage.append(wrong)
    if damage:
        raise InputError(f"no checkpoint can be used: {'; '.join(damage)}; restore one, or begin in a new folder")
    return None


def damage_of(checkpoint: pathlib.Path) -> str | None:
    """What is wrong with a checkpoint's files, by name; None where they are as they were written."""
    path = checkpoint / STATE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if "files" in state and state["seal"] != _seal(state):
            return f"checkpoint '{path}' is damaged"
        if int(state["done"]) != int(checkpoint.name.removeprefix("step-")):
            return f"checkpoint '{path}' is of another step"
        for name, expected in state.get("files", {}).items():  # absent in those of fieldsmith 0.2.0
            if disk.checksum(checkpoint / name) != expected:
                return f"checkpoint '{checkpoint / name}' is damaged"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"checkpoint '{getattr(error, 'filename', None) or path}' cannot be read"
    return None


def _seal(state: dict[str, Any]) -> str:
    """A checksum of the state itself."""
    rest = {key: value for key, value in state.items() if key != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def save_step(
    run: Run,
    done: int,
    parameters: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    ema: list[Tensor] | None,
    stopped: str | None,
) -> None:
    """Write checkpoints/step-N beside and rename it, then delete those before the newest two; of several processes one
    writes. Under FSDP each writes its parts; any number of processes reads them again.

    An error of the system leaves earlier checkpoints as they are and nothing of this one.
    """
    sharded = processes.sharded()
    if not (sharded or processes.is_main()):
        return
    folder = run.folder / "checkpoints"
    target = folder / f"step-{done:08d}"
    beside = folder / (f".{target.name}" if sharded else f".{target.name}.{os.getpid()}")
    if target.exists():
        return
    tensors = _tensors(parameters, optimizer, ema)
    with disk.writing(target):
        try:
            if processes.is_main():
                for old in folder.glob(".step-*"):  # of a process that was killed while it wrote
                    shutil.rmtree(old)
                beside.mkdir(parents=True)
            if sharded:
                from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
                from torch.distributed.checkpoint.state_dict_saver import save

                processes.wait()
                save(tensors, storage_writer=HuggingFaceStorageWriter(str(beside), save_distributed=True))
            else:
                _write({name: tensor.contiguous() for name, tensor in tensors.items()}, beside / FILE)
            files = _sync(beside, sharded)
            if processes.is_main():
                state = {"done": done, "stopped": stopped, "files": files}
                (beside / STATE).write_text(json.dumps({**state, "seal": _seal(state)}), encoding="utf-8")
                disk.sync(beside / STATE)
                disk.sync(beside)
                run.sync()  # a checkpoint's steps are in the log
                os.replace(beside, target)
                disk.sync(folder)
        except OSError:
            shutil.rmtree(beside, ignore_errors=True)  # half a checkpoint would keep a full disk full
            raise
        run.good = None
        if processes.is_main():
            for old in sorted(folder.glob("step-*"))[:-KEPT]:
                shutil.rmtree(old)


def _write(tensors: dict[str, Tensor], path: pathlib.Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # how safetensors reports a full disk
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number) if found else str(error), str(path)) from error


def _sync(folder: pathlib.Path, sharded: bool) -> dict[str, str]:
    """Until the files of a folder are on the disk; their checksums. Under FSDP each process does its share."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    own = files[processes.rank() :: processes.count()] if sharded else files
    sums = {}
    for path in own:
        disk.sync(path)
        sums[path.name] = disk.checksum(path)
    return {name: one for part in (processes.exchange(sums) if sharded else [sums]) for name, one in part.items()}


def resume(
    run: Run, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer, ema: list[Tensor] | None
) -> tuple[int, str | None]:
    """Load the newest good checkpoint into everything, delete damaged ones and rewind the log to it; (steps done, stop
    reason), (0, None) where there is none. Raises InputError as `find`."""
    found = find(run)
    if found is None:
        run.rewind(0)
        return 0, None
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    state = json.loads((found / STATE).read_text(encoding="utf-8"))
    reader = HuggingFaceStorageReader(str(found))
    with torch.no_grad():
        for name, size, dtype in _moments(reader):
            key, _, of = name.rpartition("/")
            p = parameters[key]
            if size == p.shape and of != "step":
                optimizer.state[p][of] = torch.zeros_like(p, dtype=dtype)  # in parts where the weight is
            else:
                place = torch.device("cpu") if of == "step" and not optimizer.defaults.get("fused") else p.device
                optimizer.state[p][of] = torch.zeros(size, dtype=dtype, device=place)
        wanted = _tensors(parameters, optimizer, ema)
        with warnings.catch_warnings():  # that one process reads alone is meant
            warnings.simplefilter("ignore")
            load(wanted, storage_reader=reader, no_dist=not processes.sharded())
    processes.wait()  # all have read the history
    if processes.is_main():
        for other in newest(run):
            if other.name > found.name:  # damaged: its step comes again
                shutil.rmtree(other, ignore_errors=True)
    run.rewind(state["done"])
    return state["done"], state["stopped"]


def restore(run: Run, parameters: dict[str, Tensor], averaged: bool) -> int:
    """Load what was trained, or its averages, from the newest good checkpoint, and nothing else; its steps.

    Raises InputError where there is none, and as `find`."""
    found = find(run)
    if found is None:
        raise InputError(
            f"'{run.folder}' has no checkpoint any more, from which its weights are loaded; train it again"
        )
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    kind = "ema" if averaged else "weights"
    wanted = {f"{kind}/{name}": p.detach() for name, p in parameters.items()}
    with torch.no_grad(), warnings.catch_warnings():  # that one process reads alone is meant
        warnings.simplefilter("ignore")
        load(wanted, storage_reader=HuggingFaceStorageReader(str(found)), no_dist=not processes.sharded())
    return int(found.name.removeprefix("step-"))


def _tensors(
    parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer, ema: list[Tensor] | None
) -> dict[str, Tensor]:
    """All that a checkpoint holds, by name; FSDP's parts as they are."""
    weights = {f"weights/{name}": p.detach() for name, p in parameters.items()}
    averages = {f"ema/{name}": p for name, p in zip(parameters, ema or (), strict=False)}
    moments = {
        f"moments/{name}/{key}": value
        for name, p in parameters.items()
        for key, value in optimizer.state.get(p, {}).items()
    }
    return weights | averages | moments


def _moments(reader: HuggingFaceStorageReader) -> Iterator[tuple[str, torch.Size, torch.dtype]]:
    """The optimiser's tensors in a checkpoint: 'parameter/key', shape and type."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    for name, stored in reader.read_metadata().state_dict_metadata.items():
        if name.startswith("moments/") and isinstance(stored, TensorStorageMetadata):
            yield name.removeprefix("moments/"), stored.size, stored.properties.dtype


def bytes_of(parameters: dict[str, Tensor], ema: bool, optimizer: str) -> int:
    """About what a checkpoint takes: weights, AdamW's two moments of those that move, averages."""
    moment = 1 if optimizer == "adamw8bit" else 4
    return sum(
        p.numel() * (p.element_size() * (2 if ema else 1) + (2 * moment if p.requires_grad else 0))
        for p in parameters.values()
    )


def check_space(run: Run, needed: int) -> None:
    """Raises InputError where three checkpoints of so many bytes, two kept and one being written, have no room."""
    there = sum(path.stat().st_size for path in (run.folder / "checkpoints").glob("step-*/*"))
    free = disk.free(run.folder)
    most = (KEPT + 1) * needed
    if free is not None and free + there < most:
        raise InputError(
            f"out folder '{run.folder}' has {disk.size(free)} free, but checkpoints take {disk.size(most)} ({KEPT + 1} "
            f"of {disk.size(needed)}); free some, or name a folder on another disk"
        )
