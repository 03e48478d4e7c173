"""The one training loop: accumulation, clipping, EMA, checkpoints, exact resume, logging.

In: named parameters and `losses(step, generator, log)`, which yields the step's losses in chunks and fills `log`.
Out: trained parameters (EMA weights where asked for). Each step draws from a generator seeded by (seed, step), and so
does dropout, so a run that resumes repeats the uninterrupted one exactly and no random state needs saving. Of several
processes each yields the losses of its own groups, as parts of one sum: gradients are added up once a step.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import pathlib
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from fieldsmith import processes
from fieldsmith.config import FitConfig
from fieldsmith.errors import RunError
from fieldsmith.optimizers import adamw
from fieldsmith.run import Run

FILE = "model-00001-of-00001.safetensors"  # in a checkpoint; the name that torch's own writer has for it


class Log(dict[str, float]):
    """What a step reports, by name. An item that is set is alike in all processes; `mean` and `count` are joined.

    Both add up over the chunks of a step: means over all rows of all processes, counts as sums.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sums: dict[str, tuple[float, int | None]] = {}  # sum and rows; None: a count

    def mean(self, name: str, values: Tensor) -> None:
        """Rows (n,) of this process, whose mean over all rows is reported."""
        total, rows = self._sums.get(name, (0, 0))
        self._sums[name] = total + values.detach().double().sum().item(), (rows or 0) + values.numel()

    def count(self, name: str, n: float) -> None:
        """This process's part of a sum."""
        self._sums[name] = self._sums.get(name, (0, None))[0] + n, None

    def add(self, other: Log) -> None:
        """Enter what another log holds, too."""
        self.update(other)
        for name, (total, rows) in other._sums.items():
            before, earlier = self._sums.get(name, (0, None))
            self._sums[name] = before + total, None if rows is None else rows + (earlier or 0)

    def join(self) -> None:
        """Turn what was added up into items, over all processes."""
        joined = Log()
        for sums in processes.exchange(self._sums):
            one = Log()
            one._sums = sums
            joined.add(one)
        self._sums = {}
        for name, (total, rows) in joined._sums.items():
            if rows is None:
                self[name] = total
            elif rows:
                self[name] = total / rows


Losses = Callable[[int, torch.Generator, Log], Iterator[Tensor]]


@dataclass(frozen=True)
class Optimisation:
    """How parameters move: AdamW, optional warm-up and cosine decay, clipping and EMA."""

    steps: int
    lr: float
    weight_decay: float = 0.01
    warmup: int = 0
    cosine: bool = False  # decay to 0 over `steps`
    clip: float | None = None  # largest gradient norm
    ema: float | None = None  # decay of the weights that are kept
    ema_every: int = 1  # steps from one update of them to the next
    checkpoint_every: int = 50
    block: int = 1  # steps that share what the first of them drew: checkpoints fall between blocks only
    seed: int = 0
    optimizer: str = "adamw"  # a name in optimizers.OPTIMIZERS


def optimisation_of(config: FitConfig) -> Optimisation:
    """How a network is fitted to data: a cosine after the warm-up, ten checkpoints or one every 100 steps."""
    return Optimisation(
        config.steps, config.lr, config.weight_decay, config.warmup, cosine=True, clip=config.clip,
        ema=config.ema or None, checkpoint_every=max(100, config.steps // 10), seed=config.seed,
        optimizer=config.optimizer,
    )  # fmt: skip


@dataclass(frozen=True)
class Fit:
    """What the loop did: steps taken in all, seconds in this process, why it stopped ('steps' or a rule's name)."""

    steps: int
    seconds: float
    stopped: str


def step_generator(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """A CPU generator for one step; different (seed, step, stream) give independent draws."""
    mixed = (seed * 1_000_003 + step) * 1_000_003 + stream
    return torch.Generator().manual_seed(mixed % (2**63 - 1))


def fit(
    parameters: dict[str, Tensor],
    losses: Losses,
    optimisation: Optimisation,
    run: Run | None = None,
    stop: Callable[[int, dict[str, float]], str | None] | None = None,
) -> Fit:
    """Minimise the sum of each step's losses. `stop(steps done, log)` may name a reason to end early.

    Raises RunError at a loss or gradient that is not finite: parameters and checkpoints stay at the last good step.
    """
    params = list(parameters.values())
    optimizer = adamw(params, optimisation.lr, optimisation.weight_decay, optimisation.optimizer)
    ema = [p.detach().clone() for p in params] if optimisation.ema else None
    first, stopped = _resume(run, parameters, optimizer, ema) if run else (0, None)
    began, done, whole = time.monotonic(), first, True
    main = processes.is_main()
    columns = (*Progress.get_default_columns()[:3], TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    screen = Console(stderr=True)
    with Progress(*columns, console=screen, transient=True, disable=not (main and sys.stderr.isatty())) as progress:
        bar = progress.add_task("training", total=optimisation.steps, completed=first, note="")
        try:
            while done < optimisation.steps and not stopped:
                log = _gradient(done, params, losses, optimizer, optimisation)
                whole = False  # an interrupt from here on finds parameters, averages and log at different steps
                optimizer.step()
                if ema and optimisation.ema and (done + 1) % optimisation.ema_every == 0:
                    # a short memory at first, so that the average forgets the random start
                    decay = min(optimisation.ema, (1 + done) / (10 + done))
                    torch._foreach_lerp_(ema, [p.detach() for p in params], 1 - decay)
                done += 1
                if run:
                    run.log(done - 1, log)
                whole = True
                stopped = stop(done, log) if stop else None
                progress.update(bar, completed=done, note=f"loss {log['loss']:.4g}")
                if run and (stopped or done % optimisation.checkpoint_every == 0 or done == optimisation.steps):
                    _save(run, done, parameters, optimizer, ema, stopped)
        except BaseException:  # whatever a reward raises, or a loss that is not finite, comes before parameters move
            # not under FSDP, where all would have to save together and some may be gone
            if run and whole and done > first and done % optimisation.block == 0 and not processes.sharded():
                _save(run, done, parameters, optimizer, ema, stopped)
            raise
    if ema:
        torch._foreach_copy_([p.data for p in params], ema)
    processes.wait()  # until the last line is written
    return Fit(done, time.monotonic() - began, stopped or "steps")


def _gradient(
    step: int,
    params: list[Tensor],
    losses: Losses,
    optimizer: torch.optim.Optimizer,
    optimisation: Optimisation,
) -> dict[str, float]:
    """Set the learning rate and every parameter's gradient for one step; what to log. Moves no parameter."""
    for group in optimizer.param_groups:
        group["lr"] = optimisation.lr * _schedule(step, optimisation)
    optimizer.zero_grad(set_to_none=True)
    log, total = Log(), 0.0
    generator = step_generator(optimisation.seed, step)
    # dropout differs between processes, whose rows are different ones
    seed = generator.initial_seed() + processes.rank()
    with processes.together(), global_randomness(seed, params[0].device):
        for loss in losses(step, generator, log):
            total += loss.item()
            if not math.isfinite(total):
                raise RunError(f"the loss became {total} at step {step}; lower the learning rate ({optimisation.lr:g})")
            if loss.requires_grad:
                loss.backward()
        log.count("loss", total)
        log.join()
    processes.add_gradients(params)
    norm = _clip(params, optimisation.clip)
    if not math.isfinite(norm):
        raise RunError(f"the gradient became {norm} at step {step}; lower the learning rate ({optimisation.lr:g})")
    return {"loss": log.pop("loss"), "gradient_norm": norm, **log}


def _clip(params: list[Tensor], largest: float | None) -> float:
    """Scale gradients down to a norm of at most `largest`; the norm that they had."""
    given = [p for p in params if p.grad is not None]
    in_parts: list[Tensor] = [p for p in given if isinstance(p, DTensor)]
    kinds = [in_parts, [p for p in given if not isinstance(p, DTensor)]]
    norms = [processes.full(torch.nn.utils.get_total_norm([p.grad for p in kind])) for kind in kinds if kind]  # type: ignore[misc]
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm() if norms else torch.zeros(())
    for kind in kinds:
        if kind and largest is not None:
            torch.nn.utils.clip_grads_with_norm_(kind, largest, norm)
    return float(norm)


@contextlib.contextmanager
def global_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators of the CPU and of the device, which dropout draws from, and put them back."""
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.default_generator.manual_seed(seed)
        if device.type != "cpu":
            torch.get_device_module(device).manual_seed(seed)
        yield


def _schedule(step: int, optimisation: Optimisation) -> float:
    warm = min(1.0, (step + 1) / optimisation.warmup) if optimisation.warmup else 1.0
    return warm * (0.5 * (1 + math.cos(math.pi * step / optimisation.steps)) if optimisation.cosine else 1.0)


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


def _save(
    run: Run,
    done: int,
    parameters: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    ema: list[Tensor] | None,
    stopped: str | None,
) -> None:
    """Write checkpoints/step-N beside and rename it, then delete the older ones; of several processes one writes.

    Under FSDP each writes its parts; any number of processes reads them again.
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
    try:
        if processes.is_main():
            shutil.rmtree(beside, ignore_errors=True)  # of an earlier process
            beside.mkdir(parents=True)
            (beside / "state.json").write_text(json.dumps({"done": done, "stopped": stopped}))
        if sharded:
            processes.wait()
            save(tensors, storage_writer=HuggingFaceStorageWriter(str(beside), save_distributed=True))
        else:
            _write({name: tensor.contiguous() for name, tensor in tensors.items()}, beside / FILE)
        if processes.is_main():
            os.replace(beside, target)
    except OSError:
        shutil.rmtree(beside, ignore_errors=True)  # half a checkpoint would keep a full disk full
        raise
    for old in folder.glob("*step-*") if processes.is_main() else ():
        if old != target:
            shutil.rmtree(old)


def _write(tensors: dict[str, Tensor], path: pathlib.Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(errno.EIO, str(error), str(path)) from error


def _resume(
    run: Run, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer, ema: list[Tensor] | None
) -> tuple[int, str | None]:
    """Load the newest checkpoint into everything; (steps done, stop reason), (0, None) where there is none."""
    found = sorted((run.folder / "checkpoints").glob("step-*"))
    if not found:
        run.rewind(0)
        return 0, None
    newest: pathlib.Path = found[-1]
    state = json.loads((newest / "state.json").read_text())
    reader = HuggingFaceStorageReader(str(newest))
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
    run.rewind(state["done"])
    return state["done"], state["stopped"]


def _moments(reader: HuggingFaceStorageReader) -> Iterator[tuple[str, torch.Size, torch.dtype]]:
    """The optimiser's tensors in a checkpoint: 'parameter/key', shape and type."""
    for name, stored in reader.read_metadata().state_dict_metadata.items():
        if name.startswith("moments/") and isinstance(stored, TensorStorageMetadata):
            yield name.removeprefix("moments/"), stored.size, stored.properties.dtype
