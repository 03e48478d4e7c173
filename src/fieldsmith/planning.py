"""What a run would take: its verb's own preparation and first updates, on shapes instead of weights.

In: a verb's name and its config. Out: a `Plan`. What judges images is stood in for by `Judged`, which counts; nothing
is downloaded but JSON, and nothing is trained or written.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor

from fieldsmith import api, processes, rewards, training, verb
from fieldsmith.config import ADAPTABLE
from fieldsmith.disk import size
from fieldsmith.errors import InputError
from fieldsmith.methods.align.verb import ALIGN
from fieldsmith.methods.distill.verb import DISTILL
from fieldsmith.methods.edit.verb import EDIT
from fieldsmith.methods.erase.verb import ERASE
from fieldsmith.methods.sharpen.verb import SHARPEN
from fieldsmith.models import load, pipeline_folder
from fieldsmith.models.core import free_memory
from fieldsmith.models.estimate_memory import (
    EMA,
    MOMENTS,
    REFERENCE,
    TRAINABLE,
    Component,
    Live,
    components,
    modules,
    moments_of,
    size_of,
    tensors,
)
from fieldsmith.models.memory import checkpoint_activations
from fieldsmith.models.meta_model import MetaModel, meta_model
from fieldsmith.models.rehearsal import count_gradients
from fieldsmith.training import Fit
from fieldsmith.verb import Job, Verb

ELSEWHERE = "parts that wait on the CPU"
SOME, SLOW = 32, 1.0  # states that are tried at once to see how long one takes; seconds from which once is enough
EQUAL, MOST = 5, 24  # collections that are rehearsed: until so many in a row cost the same, and at most


@dataclass(frozen=True)
class Plan:
    """What a run would take. Memory and disk in bytes."""

    verb: str
    model: str
    components: list[Component]  # of the model, and of a student or guide beside it
    trainable: int  # parameters
    memory: dict[str, int]  # by part, when most is alive
    peak: int
    nfe: float  # network evaluations: a forward of one state is 1, its backward 2
    reward_calls: int
    disk: dict[str, int]
    notes: list[str]
    seconds: float | None = None  # of the network evaluations, from one that was measured here; None: no weights here


class Judged:
    """Stands in for rewards: makes numbers up and counts the images that it is asked for."""

    def __init__(self) -> None:
        self.calls = 0
        self._generator = torch.Generator().manual_seed(0)

    def numbers(self, images: Tensor) -> Tensor:
        """One for each image."""
        self.calls += len(images)
        return torch.rand(len(images), generator=self._generator)

    def load(self, words: str, world: Any = None) -> Any:
        """In place of the reward that words name. Raises InputError where they name none; loads no large network."""
        free = any(name in rewards.FREE for _, name, _ in rewards.parse(words))
        return MadeUp(
            words, not words.startswith("remote") if free else rewards.load(words, world).differentiable, self
        )


@dataclass(frozen=True)
class MadeUp:
    """A reward in name."""

    name: str
    differentiable: bool
    judged: Judged

    def __call__(self, images: Tensor, prompts: Any) -> Tensor:
        numbers = self.judged.numbers(images)
        return images.flatten(1).mean(1) if images.requires_grad else numbers


@dataclass(frozen=True)
class Scores:
    """An edit's made-up scores, (n,) each."""

    following: Tensor
    consistency: Tensor


def edit_inputs(config: Any, judged: Judged) -> Any:
    def judge(sessions: Any, turn: int, before: Tensor, after: Tensor, first: Tensor) -> Scores:
        following = judged.numbers(after)
        return Scores(following, following.flip(0))

    return dataclasses.replace(api.edit_inputs(config.replace(judge="exact")), judge=judge)


# what a run of each verb is given beside its config, with what judges images stood in for
INPUTS: dict[str, tuple[Verb, Callable[[Any, Judged], tuple[Any, Any]]]] = {
    "align": (ALIGN, lambda config, judged: api.align_inputs(config, judged.load)),
    "distill": (DISTILL, lambda config, judged: (config, api.distill_inputs(config))),
    "edit": (EDIT, lambda config, judged: (config, edit_inputs(config, judged))),
    "erase": (
        ERASE,
        lambda config, judged: api.erase_inputs(config.replace(judge=None, attacks=False, attack_prompts=None)),
    ),
    "sharpen": (SHARPEN, lambda config, judged: (config, api.sharpen_inputs(config))),
}


@dataclass(frozen=True)
class Rehearsed:
    """What was seen: bytes by part when most are alive, network evaluations and reward calls of the whole run."""

    job: Job
    memory: dict[str, int]
    kept: int  # bytes of a checkpoint
    nfe: float
    cost: dict[str, Any]
    reward_calls: int
    varies: bool  # whether collections cost more or less by chance


def plan(name: str, config: Any) -> Plan:
    """The plan of a run with these settings. Raises InputError as the verb itself does before it starts."""
    config, source, meta, parts, seen = _rehearsed(name, config)
    dtype = torch.bfloat16 if config.dtype == "bf16" else None
    learner = seen.job.model
    if learner.network is not meta.model.network:
        own = components(learner)[0]
        parts.append(dataclasses.replace(own, name=f"{own.name} that trains"))
    trained = list(learner.trainable().values())
    whole = sum(part.bytes for part in components(learner))
    disk = {
        "download": meta.downloads, "a checkpoint (three for a moment)": seen.kept,
        f"{'adapter' if learner.spec else 'model'}/": size_of(trained) if learner.spec else whole,
    }  # fmt: skip
    if getattr(config, "bank", 0) and "teacher forwards" in seen.cost:  # each is a state of fp16 numbers
        disk["bank/"] = 2 * learner.noise(1, torch.Generator()).numel() * seen.cost["teacher forwards"]
    each = evaluation_seconds(source, config, dtype, min(SOME, learner.chunk))
    if each and learner.network is not meta.model.network:  # a student's or guide's, whose evaluations are counted
        each *= count(learner) / count(meta.model)
    return Plan(
        name, source, parts, sum(p.numel() for p in trained), seen.memory, sum(seen.memory.values()), seen.nfe,
        seen.reward_calls, disk, _notes(seen, config), each and each * seen.nfe,
    )  # fmt: skip


def _rehearsed(name: str, config: Any) -> tuple[Any, str, MetaModel, list[Component], Rehearsed]:
    """The config as a run has it, whose shapes the model's are, the model, its parts before anything trains, and what
    was seen."""
    config.check()
    config = config.replace(**{key: None for key in ("out", "bank_folder") if hasattr(config, key)})
    judged = Judged()
    of, inputs_of = INPUTS[name]
    config, inputs = inputs_of(config, judged)
    verb.check_memory(of, config)
    source = config.config_from or getattr(config, of.source)
    dtype = torch.bfloat16 if config.dtype == "bf16" else None
    meta = meta_model(source, getattr(config, "resolution", None), dtype)
    parts = components(meta.model)
    return config, source, meta, parts, rehearse(of, meta, config, inputs, lambda: judged.calls)


# what makes a run take less memory; the first keep what it computes (config.ADAPTABLE), the others make another run
LESS = ("chunk", "trajectories", "offload", "checkpointing", "batch", "groups", "resolution")
SPARE = 0.9  # of what is there: allocators cut it in pieces


def less_memory(name: str, config: Any, there: float) -> str:
    """Which settings a run that was short of memory, where so many bytes are there, would fit with, and what it takes
    then; each is tried alone, in a plan, and all that a run can go on with together.

    '' where nothing can be planned.
    """
    try:
        now = _peak(name, config)
    except InputError:
        return ""
    most = SPARE * min(there, now)  # where the plan would have fitted, it is too low by that much at least
    free: list[str] = []
    other: list[str] = []
    together: dict[str, Any] = {}
    for field in LESS:
        for value in _smaller(field, getattr(config, field, None)):
            try:
                peak = _peak(name, config.replace(**{field: value}))
            except (InputError, NotImplementedError):  # a smaller one that does not go with the rest, or a family
                continue
            if field in ADAPTABLE and peak < now:
                together[field] = value
            if peak <= most:
                known = f"{flag(field, value)} ({size(peak)})"
                (free if field in ADAPTABLE else other).append(known)
                break
    if not free and len(together) > 1 and (peak := _peak(name, config.replace(**together))) <= most:
        free.append(f"{' '.join(flag(*one) for one in together.items())} ({size(peak)})")
    said = f"the plan is {size(now)} of {size(there)} that are there"
    if free:
        said += f"; it goes on with {' or '.join(free)}"
    if other:
        said += f"; as another run it fits with {' or '.join(other)}"
    return said if free or other else f"{said}, and no setting makes it fit; use a smaller model or a larger device"


def _peak(name: str, config: Any) -> int:
    return sum(_rehearsed(name, config)[4].memory.values())


def _smaller(field: str, value: Any) -> list[Any]:
    """Values of a setting that take less, the nearest first."""
    if field == "trajectories":
        return ["cpu"] if value == "device" else []
    if isinstance(value, bool):
        moves = field != "offload" or torch.cuda.is_available()
        return [True] if moves and not value else []
    halves = [value >> n for n in range(1, value.bit_length())] if isinstance(value, int) else []
    return [half for half in halves if half >= (64 if field == "resolution" else 1)]


def flag(field: str, value: Any) -> str:
    """A setting as the command line has it."""
    return f"--{field.replace('_', '-')}" + ("" if value is True else f" {value}")


def memory_there() -> float:
    """Bytes of this process's device that are free, and those that it has itself."""
    device = processes.device()
    if device.type == "cuda":
        return free_memory(device) + torch.cuda.memory_reserved(device)
    return free_memory(device) + psutil.Process().memory_info().rss


def count(model: Any) -> int:
    """Parameters of its network, whose number its time follows."""
    return sum(p.numel() for p in model.network.parameters())


@torch.no_grad()
def evaluation_seconds(source: str, config: Any, dtype: torch.dtype | None, states: int) -> float | None:
    """Of one state, among so many, on this machine; None where the network's weights are not here or do not fit.

    A run takes longer: it decodes, asks judges and measures, too.
    """
    folder = pipeline_folder(source)
    files = list(folder.rglob("*.safetensors")) if folder else []
    if not files or sum(file.stat().st_size for file in files) > free_memory(processes.device()):
        return None
    try:
        model: Any = load(source, getattr(config, "resolution", None), dtype)
    except InputError:  # such as files without numbers, which a plan does without
        return None
    model.precision = processes.mixed_precision()
    words = (*getattr(config, "targets", ()), *getattr(config, "prompts", ()), *getattr(model, "classes", ()), "")
    x = model.noise(states, torch.Generator().manual_seed(0))
    condition = model.encode([words[0]] * states)
    if hasattr(model, "with_latents"):
        condition = model.with_latents(condition, x)
    best = math.inf
    for _ in range(3):
        began = time.perf_counter()
        float(model.predict(x, torch.tensor(0.5), condition).value.sum())  # waits for a GPU
        best = min(best, time.perf_counter() - began)
        if best > SLOW:
            break
    return best / states


def _notes(seen: Rehearsed, config: Any) -> list[str]:
    notes = []
    if seen.varies:
        notes.append("network evaluations are a mean: what a collection takes hangs on chance")
    if seen.reward_calls:
        notes.append("rewards are taken to differ between all images: rows without a signal cost less")
    if config.offload and not torch.cuda.is_available():
        notes.append("offload moves nothing on this machine, which has no GPU; the peak is that of one")
    return notes


def rehearse(of: Verb, meta: MetaModel, config: Any, inputs: Any, calls: Callable[[], int] = lambda: 0) -> Rehearsed:
    """Prepare the verb on a model of shapes and take its first updates; `calls` tells the reward calls so far.

    Raises InputError as the verb does, and where the method trains nothing.
    """
    model, rehearsal = meta.model, meta.rehearsal
    with ExitStack() as stack:
        live = stack.enter_context(rehearsal.open())
        nfe = stack.enter_context(model.count_nfe())
        for name, part in modules(model).items():
            waits = config.offload and part is not model.network
            live.hold(tensors(part), ELSEWHERE if waits else f"frozen weights: {name}")
        model.chunk = getattr(config, "chunk", None) or max(getattr(config, "batch", 1), model.chunk)  # as a run has it
        job = of.prepare(model, config, inputs)
        job.model.chunk = model.chunk
        if not job.optimisation.steps:
            raise InputError(f"method '{config.method}' trains nothing, so there is nothing to plan")
        if job.model is not model:  # a student or a guide has a count of its own
            nfe = stack.enter_context(job.model.count_nfe())
            live.hold(tensors(job.model.network), "frozen weights: the student's")
        if config.checkpointing:
            checkpoint_activations(job.model)
        live.hold(job.model._base.values(), REFERENCE)
        live.hold(job.parameters.values(), TRAINABLE)
        with job.model.uncounted():
            job.checks(False)  # for the memory that it takes: what it finds in made-up numbers means nothing
        job.begin()
        stack.enter_context(job.around())
        updates = Updates(job, live)
        stack.callback(lambda: [hook.remove() for hook in updates.hooks])
        costs = [(nfe.total, calls())]

        def collect(at: int) -> tuple[int, int]:
            before = nfe.total, calls()
            updates.collection(at)
            return nfe.total - before[0], calls() - before[1]

        every = -(-job.optimisation.steps // job.optimisation.block)
        prepared = costs.pop()
        while len(costs) < min(every, MOST) and not _settled(costs):
            costs.append(collect(len(costs)))
        last = collect(every - 1) if every > len(costs) else costs[-1]
        spent, asked, taken = _extrapolated(job, prepared, costs, last, every)
        varies = every > len(costs) and not _settled(costs)
        cost = job.cost(Fit(taken, 0.0, "steps"), round(spent))
    memory = {kind: size for kind, size in live.peak.items() if size and kind != ELSEWHERE}
    if job.model is not model:
        names = {f"frozen weights: {name}": name for name, part in modules(model).items() if part is model.network}
        whose = {kind: f"frozen weights: the teacher's {name}" for kind, name in names.items()}
        memory = {whose.get(kind, kind): size for kind, size in memory.items()}
    kept = size_of(job.parameters.values()) + size_of(updates.moments) + size_of(updates.averages)
    return Rehearsed(job, memory, kept, cost["nfe"], cost, asked, varies)


def _settled(costs: list[tuple[int, int]]) -> bool:
    return len(costs) >= EQUAL and len(set(costs[-EQUAL:])) == 1


def _extrapolated(
    job: Job, prepared: tuple[int, int], costs: list[tuple[int, int]], last: tuple[int, int], every: int
) -> tuple[float, int, int]:
    """Network evaluations, reward calls and steps of the whole run, which may stop early at its budget."""
    block = job.optimisation.block
    some = costs[-EQUAL:] if _settled(costs) else costs
    mean = [sum(part) / len(some) for part in zip(*some, strict=True)]
    nfe, calls = map(float, prepared)
    for at in range(every):
        cost = costs[at] if at < len(costs) else last if at == every - 1 else mean
        nfe, calls = nfe + cost[0], calls + cost[1]
        done = min((at + 1) * block, job.optimisation.steps)
        if job.stop and job.stop(done, {"nfe": nfe}):
            break
    return nfe, round(calls), done


class Updates:
    """A job's updates as `training.fit` takes them, rehearsed; a step moves nothing, since it is never the peak."""

    def __init__(self, job: Job, live: Live):
        self.job, self.live = job, live
        self.params = [p for p in job.parameters.values() if p.requires_grad]
        self.moments: list[Tensor] = []
        self.averages = [p.detach().clone() for p in job.parameters.values()] if job.optimisation.ema else []
        self.live.hold(self.averages, EMA)
        self.hooks = count_gradients(self.live, self.params)

    def collection(self, at: int) -> None:
        """The updates that share collection `at`. Whole are those that may be the peak: the first, without moments, the
        next, with them, and the first after one more collection; of the others the evaluations are counted."""
        block, steps = self.job.optimisation.block, self.job.optimisation.steps
        for step in range(at * block, min((at + 1) * block, steps)):
            generator = training.step_generator(self.job.optimisation.seed, step)
            losses = self.job.losses(step, generator, training.Log())
            with training.global_randomness(generator.initial_seed(), torch.device("cpu")):
                if step in (0, 1, block):
                    self._update(losses)
                else:
                    with self.live.paused():
                        for _ in losses:
                            pass

    def _update(self, losses: Iterator[Tensor]) -> None:
        for chunk, loss in enumerate(losses):
            if not loss.requires_grad:
                continue
            if chunk < 2:  # the second finds the first one's gradients
                loss.backward()
            else:  # frees the graph as a backward does, in less time
                torch.autograd.grad(loss, self.params[:1], allow_unused=True)
        self.moments = self.moments or moments_of(self.params, self.job.optimisation.optimizer)
        self.live.hold(self.moments, MOMENTS)
        if self.averages:
            torch._foreach_lerp_(self.averages, [p.detach() for p in self.job.parameters.values()], 0.5)
        for p in self.params:
            p.grad = None
