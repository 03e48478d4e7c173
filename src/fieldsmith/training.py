"""The one training loop: accumulation, clipping, EMA, checkpoints, exact resume, logging.

In: named parameters and `losses(step, generator, log)`, which yields the step's losses in chunks and fills `log`.
Out: trained parameters (EMA weights where asked for). Each step draws from a generator seeded by (seed, step), and so
does dropout, so a run that resumes repeats the uninterrupted one exactly and no random state needs saving. Of several
processes each yields the losses of its own groups, as parts of one sum: gradients are added up once a step.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.distributed.tensor import DTensor

from fieldsmith import checkpoints, interrupts, processes
from fieldsmith.config import FitConfig
from fieldsmith.errors import InputError, NotFiniteError, RunError, ShortOfMemoryError, is_short_of_memory
from fieldsmith.optimizers import adamw
from fieldsmith.run import Run

LONGEST = 200  # characters of a library's words that a message shows
ASKED = "asked to end"  # in a step's log, until it is joined


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
    asked: Callable[[], str] = str,
) -> Fit:
    """Minimise the sum of each step's losses. `stop(steps done, log)` may name a reason to end early; `asked()` says of
    what a network was asked last, for messages.

    With a run directory, SIGINT and SIGTERM end it after the step (where steps share what the first of them drew, after
    the last of these) with a checkpoint and KeyboardInterrupt; a second signal ends it at once, at the last checkpoint.
    Raises RunError where a step fails, with the step and the checkpoint that stays: NotFiniteError at a loss, gradient
    or weight that is not finite, of which no checkpoint is made; ShortOfMemoryError.
    """
    params = list(parameters.values())
    optimizer = adamw(params, optimisation.lr, optimisation.weight_decay, optimisation.optimizer)
    ema = [p.detach().clone() for p in params] if optimisation.ema else None
    first, stopped = checkpoints.resume(run, parameters, optimizer, ema) if run else (0, None)
    began, done, whole, ending = time.monotonic(), first, True, False
    main = processes.is_main()
    columns = (*Progress.get_default_columns()[:3], TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    screen = Console(stderr=True)
    with (
        interrupts.listening(run is not None, main) as signals,
        Progress(*columns, console=screen, transient=True, disable=not (main and sys.stderr.isatty())) as progress,
    ):
        bar = progress.add_task("training", total=optimisation.steps, completed=first, note="")
        try:
            while done < optimisation.steps and not stopped:
                log = _gradient(done, parameters, losses, optimizer, optimisation, signals, asked)
                ending = bool(log.pop(ASKED, 0)) or ending
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
                ending = ending or (signals.end and processes.count() == 1)  # several hear of it in the next step's log
                now = ending and done % optimisation.block == 0
                if run and (stopped or now or done % optimisation.checkpoint_every == 0 or done == optimisation.steps):
                    with processes.together():
                        _check_weights(parameters)
                    checkpoints.save_step(run, done, parameters, optimizer, ema, stopped)
                if now:
                    raise KeyboardInterrupt
        except BaseException as error:  # whatever a reward raises comes before parameters move
            # not under FSDP, where all would have to save together and some may be gone; and not where numbers have
            # diverged, since the same step would fail again
            savable = whole and not signals.at_once and done > first and done % optimisation.block == 0
            if run and savable and not processes.sharded() and not isinstance(error, NotFiniteError):
                checkpoints.save_step(run, done, parameters, optimizer, ema, stopped)
            if isinstance(error, (InputError, RunError)) or is_short_of_memory(error):
                raise told(error, f"step {done}", run, optimisation.lr if done else None) from (
                    error.__cause__ if isinstance(error, RunError) else error
                )
            raise
    if signals.end:  # in the last step
        raise KeyboardInterrupt
    if ema:
        torch._foreach_copy_([p.data for p in params], ema)
    processes.wait()  # until the last line is written
    return Fit(done, time.monotonic() - began, stopped or "steps")


def told(error: BaseException, where: str, run: Run | None, lr: float | None) -> RunError:
    """What ended a run, as a RunError of its kind that says where it ended, what to change and which checkpoint stays;
    `lr` is the learning rate of the updates that were made, None where there were none."""
    kind: type[RunError]
    if is_short_of_memory(error):
        words = " ".join(str(error).split())[:LONGEST]
        kind, sentence = ShortOfMemoryError, f"out of memory at {where}{words and f' ({words})'}"
    else:
        kind = type(error) if isinstance(error, RunError) else RunError
        sentence = f"{error}, at {where}" if isinstance(error, NotFiniteError) else f"{where}: {error}"
    if isinstance(error, NotFiniteError):
        sentence += (
            f"; the weights have diverged: begin in a new folder with a lower lr than {lr:g}"
            if lr is not None
            else "; no update was made yet, so it comes from the model or the data: look at both, or use float32"
        )
    found = next(iter(checkpoints.newest(run)), None) if run else None
    if found:
        sentence += f"; the last good checkpoint is '{found}'"
        if not isinstance(error, NotFiniteError):
            sentence += ", and the same command goes on from it"
    elif run:
        sentence += "; there is no checkpoint yet"
    new = kind(sentence)
    new.known = getattr(error, "known", False)  # type: ignore[attr-defined]  # to all processes
    return new


def _check_weights(parameters: dict[str, Tensor]) -> None:
    """Raises NotFiniteError where an update, whose gradient was finite, made weights that are not."""
    for name, p in parameters.items():
        part: Tensor = p.to_local().detach() if isinstance(p, DTensor) else p.detach()  # type: ignore[attr-defined]
        if not bool(part.isfinite().all()):
            raise NotFiniteError(f"the weight '{name}' holds {part[~part.isfinite()][0].item()}")


def _gradient(
    step: int,
    parameters: dict[str, Tensor],
    losses: Losses,
    optimizer: torch.optim.Optimizer,
    optimisation: Optimisation,
    signals: interrupts.Asked,
    asked: Callable[[], str],
) -> dict[str, float]:
    """Set the learning rate and every parameter's gradient for one step; what to log. Moves no parameter."""
    for group in optimizer.param_groups:
        group["lr"] = optimisation.lr * _schedule(step, optimisation)
    optimizer.zero_grad(set_to_none=True)
    log, total, params = Log(), 0.0, list(parameters.values())
    generator = step_generator(optimisation.seed, step)
    # dropout differs between processes, whose rows are different ones
    seed = generator.initial_seed() + processes.rank()
    with processes.together(), global_randomness(seed, params[0].device):
        for loss in losses(step, generator, log):
            total += loss.item()
            if not math.isfinite(total):
                raise NotFiniteError(f"the loss became {total}{asked()}")
            if loss.requires_grad:
                loss.backward()
        log.count("loss", total)
        if signals.end:  # all processes end at the same step
            log.count(ASKED, 1)
        log.join()
    processes.add_gradients(params)
    norm = _clip(params, optimisation.clip)
    if not math.isfinite(norm):
        bad = (name for name, p in parameters.items() if p.grad is not None and not bool(p.grad.isfinite().all()))
        raise NotFiniteError(f"the gradient of '{next(bad, 'all weights together')}' became {norm}{asked()}")
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
