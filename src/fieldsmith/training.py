"""The one training loop: accumulation, clipping, EMA, checkpoints, exact resume, logging.

In: named parameters and `losses(step, generator, log)`, which yields the step's losses in chunks and fills `log`.
Out: trained parameters (EMA weights where asked for). Each step draws from a generator seeded by (seed, step), and so
does dropout, so a run that resumes repeats the uninterrupted one exactly and no random state needs saving. Of several
processes each takes the same steps: gradients are averaged, losses are the same everywhere (models/parts.py).
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from fieldsmith import processes
from fieldsmith.config import FitConfig
from fieldsmith.errors import RunError
from fieldsmith.optimizers import adamw
from fieldsmith.run import Run

Losses = Callable[[int, torch.Generator, dict[str, float]], Iterator[Tensor]]


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
    first, stopped = _resume(run, parameters, optimizer, ema, optimisation) if run else (0, None)
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
                if ema and optimisation.ema:
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
            if run and whole and done > first and done % optimisation.block == 0:
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
    log: dict[str, float] = {}
    total = 0.0
    generator = step_generator(optimisation.seed, step)
    with global_randomness(generator.initial_seed(), params[0].device):
        for loss in losses(step, generator, log):
            total += loss.item()
            if not math.isfinite(total):
                raise RunError(f"the loss became {total} at step {step}; lower the learning rate ({optimisation.lr:g})")
            if loss.requires_grad:
                loss.backward()
    if processes.count() > 1:
        _average(params)
    norm = processes.full(torch.nn.utils.clip_grad_norm_(params, optimisation.clip or math.inf))
    if not torch.isfinite(norm):
        raise RunError(
            f"the gradient became {norm.item()} at step {step}; lower the learning rate ({optimisation.lr:g})"
        )
    return {"loss": total, "gradient_norm": norm.item(), **log}


def _average(params: list[Tensor]) -> None:
    """Each gradient's mean over processes; what FSDP holds parts of it has averaged itself."""
    for p in params:
        if p.requires_grad and not isinstance(p, DTensor):  # others are only kept in checkpoints
            p.grad = processes.mean(torch.zeros_like(p) if p.grad is None else p.grad)


@contextlib.contextmanager
def global_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators, which dropout draws from, and put them back."""
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(seed)
        yield


def _schedule(step: int, optimisation: Optimisation) -> float:
    warm = min(1.0, (step + 1) / optimisation.warmup) if optimisation.warmup else 1.0
    return warm * (0.5 * (1 + math.cos(math.pi * step / optimisation.steps)) if optimisation.cosine else 1.0)


def _save(
    run: Run,
    done: int,
    parameters: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    ema: list[Tensor] | None,
    stopped: str | None,
) -> None:
    """Write checkpoints/step-N beside and rename it, then delete the older ones; of several processes one writes."""
    whole = processes.full  # FSDP's parts are put together by all processes
    weights = {name: whole(p.detach()).contiguous() for name, p in parameters.items()}
    averages = {name: whole(p) for name, p in zip(parameters, ema or (), strict=False)}
    moments = {
        f"{name}/{key}": whole(value).contiguous()
        for name, p in parameters.items()
        for key, value in optimizer.state.get(p, {}).items()
    }
    if not processes.is_main():
        return
    folder = run.folder / "checkpoints"
    target, beside = folder / f"step-{done:08d}", folder / f".step-{done:08d}.{os.getpid()}"
    if target.exists():
        return
    shutil.rmtree(beside, ignore_errors=True)  # of an earlier process with this id
    try:
        beside.mkdir(parents=True)
        _write(weights, beside / "weights.safetensors")
        _write(moments, beside / "optimizer.safetensors")
        if ema:
            _write(averages, beside / "ema.safetensors")
        (beside / "state.json").write_text(json.dumps({"done": done, "stopped": stopped}))
        os.replace(beside, target)
    except OSError:
        shutil.rmtree(beside, ignore_errors=True)  # half a checkpoint would keep a full disk full
        raise
    for old in folder.glob("*step-*"):
        if old != target:
            shutil.rmtree(old)


def _write(tensors: dict[str, Tensor], path: pathlib.Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(errno.EIO, str(error), str(path)) from error


def _resume(
    run: Run,
    parameters: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    ema: list[Tensor] | None,
    optimisation: Optimisation,
) -> tuple[int, str | None]:
    """Load the newest checkpoint into everything; (steps done, stop reason), (0, None) where there is none."""
    found = sorted((run.folder / "checkpoints").glob("step-*"))
    if not found:
        run.rewind(0)
        return 0, None
    newest: pathlib.Path = found[-1]
    state = json.loads((newest / "state.json").read_text())
    weights, moments = load_file(newest / "weights.safetensors"), load_file(newest / "optimizer.safetensors")
    averages = load_file(newest / "ema.safetensors") if ema else {}
    with torch.no_grad():
        for place, (name, p) in enumerate(parameters.items()):
            p.copy_(_like(p, weights[name]))
            if ema:
                ema[place].copy_(_like(p, averages[name]))
            kept = {key.rpartition("/")[2]: v for key, v in moments.items() if key.rpartition("/")[0] == name}
            if kept:
                optimizer.state[p] = {k: v if k == "step" else _like(p, v.to(p.device)) for k, v in kept.items()}
    processes.wait()  # all have read the history
    run.rewind(state["done"])
    return state["done"], state["stopped"]


def _like(p: Tensor, value: Tensor) -> Tensor:
    """The value, in parts where p is."""
    return distribute_tensor(value.to(p.device), p.device_mesh, p.placements) if isinstance(p, DTensor) else value
