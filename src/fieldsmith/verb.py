"""What every verb does, written once: check, load, prepare, preflight, train, ship, measure, write the page.

A verb gives four functions (`Verb`): `prepare` makes a `Job` of a model and a config, `measure` looks at the model
before and after, `report` compares the two. Everything else about a run is here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import pathlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from fieldsmith import checkpoints, optimizers, origins, preflight, previews, processes, shipping
from fieldsmith.config import Config, LoraConfig
from fieldsmith.errors import InputError, NotFiniteError, RunError, is_short_of_memory
from fieldsmith.models import load, load_adapter, lora_file, pipeline_folder
from fieldsmith.models.core import LoraSpec, Model, check_kept, check_resolution
from fieldsmith.models.memory import checkpoint_activations, compile_blocks, mixed_precision, offload
from fieldsmith.preflight import Check
from fieldsmith.previews import Preview
from fieldsmith.report.page import Page
from fieldsmith.result import Result, save_samples
from fieldsmith.run import Run, plain
from fieldsmith.trackers import tracked
from fieldsmith.training import Fit, Log, Losses, Optimisation, fit, told

CURVES = 1000  # points of a curve on a page, and at most twice as many

Side = Literal["before", "after"]
Callback = Callable[[int, dict[str, float]], "str | None"]  # steps done, the step's log -> a reason to stop, or None


@dataclass
class Job:
    """What a verb prepared: which tensors train, on which losses, how it is checked, what is looked at afterwards."""

    model: Model  # whose weights train: the model itself, a student, a guide
    losses: Losses
    optimisation: Optimisation
    parameters: dict[str, Tensor]  # all that moves, or that a checkpoint must hold
    checks: Callable[[bool], list[Check]]  # preflight; told whether the run resumes, when rollouts are not repeated
    stop: Callback | None = None
    inputs: Any = None  # what the run was given beside its settings: a world, a judge, data
    context: Any = None  # what `prepare` made that `measure` reads
    begin: Callable[[], None] = lambda: None  # called once all is checked, before the first step
    stopped: str = ""  # why no step is taken, where none is
    trained: Any = None  # what is measured after training; None: the model
    base: Any = None  # what is measured before; None: the model under `reference()`
    ship: Callable[[Model, pathlib.Path], str] = shipping.ship
    cost: Callable[[Fit, int], dict[str, Any]] = lambda done, nfe: {"nfe": nfe}  # for metrics.json
    facts: Callable[[], dict[str, Any]] = dict  # more for metrics.json, asked after training
    advice: Callable[[Fit], list[str]] = lambda done: []  # sentences to print after training
    around: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext  # open in a step, such as dropout
    note: Callable[[], str] = str  # a sentence to print before the first step, such as what measuring will cost

    @contextlib.contextmanager
    def reference(self) -> Iterator[Any]:
        """What the run started from."""
        if self.base is not None:
            yield self.base
            return
        with self.model.reference():
            yield self.model


@dataclass(frozen=True)
class Trained:
    """What training did: steps in all, seconds in this process, why it stopped, network evaluations in all."""

    steps: int
    seconds: float
    stopped: str
    nfe: int
    cost: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What a verb's report is made from."""

    config: Any
    job: Job
    before: Any  # what `measure` gave for the reference
    after: Any
    metrics: dict[str, Any]  # so far: cost, steps, seconds
    history: list[dict[str, float]]  # lines of metrics.jsonl, thinned where there are very many
    run: Run | None


@dataclass(frozen=True)
class Verb:
    """A verb as data; methods/*/verb.py has one each."""

    name: str
    config: type[Config]
    prepare: Callable[[Model, Any, Any], Job]  # model, config, inputs; refuses bad input before it attaches anything
    measure: Callable[[Any, Any, Job, Side], Any]  # a model, config, job, side -> what `report` compares; equal seeds
    report: Callable[[Page, Outcome], dict[str, Any]]  # fills the page; what goes into metrics.json
    preview: Callable[[Any, Job], Preview] | None = None  # config, job -> what is drawn while it trains
    source: str = "model"  # the config's field that names what is loaded
    # how many groups the processes share, and the field that says so
    groups: Callable[[Any], tuple[int, str]] = lambda config: (config.batch, "batch")
    # how many states a run keeps at once, by the settings that say so
    states: Callable[[Any], dict[str, int]] = lambda config: {f"batch={config.batch}": config.batch}
    evaluated: str = "evaluate"  # the config's field that says how much is measured; 0: nothing
    fsdp: bool = True  # whether the network may be held in parts
    frozen: Callable[[Any], bool] = lambda config: not config.full  # whether some weights of the network stay as are


def run(
    verb: Verb,
    config: Any,
    inputs: Any = None,
    model: Model | None = None,
    callback: Callback | None = None,
    quiet: bool = False,
) -> Result:
    """The whole verb. A run directory that holds this run already is not run again.

    Raises InputError before anything is written, RunError where training or measuring breaks.
    """
    config.check()
    check_memory(verb, config)
    processes.check_groups(*verb.groups(config))
    console = Console(stderr=True, quiet=quiet)
    with processes.together():
        folder = Run(config.out, verb.name, config) if config.out else None
    if folder and folder.finished:
        console.print(f"this run is complete: {folder.folder / 'report.html'}")
        return Result.open(folder.folder)
    try:
        if folder:
            with processes.together():
                weights = weights_of(verb, config) if model is None else {}  # an object may have any name
                folder.compare(origins.of(config, inputs, callback) | weights)
            if folder.changes:
                console.print(folder.changes)
        return _run(verb, config, inputs, model, callback, quiet, folder, console)
    finally:
        if folder:
            folder.end()


def weights_of(verb: Verb, config: Any) -> dict[str, str]:
    """A digest of the weights that the config names; {} where they are not on this machine yet."""
    source = getattr(config, verb.source)
    folder = (pipeline_folder(source) or origins.snapshot(source)) if source else None
    return {verb.source: origins.weights(folder, content=source.startswith("zoo:"))} if folder else {}


def _run(
    verb: Verb,
    config: Any,
    inputs: Any,
    model: Model | None,
    callback: Callback | None,
    quiet: bool,
    folder: Run | None,
    console: Console,
) -> Result:
    if model is None:
        model = load_model(verb, config, inputs)
        if folder:
            folder.compare(weights_of(verb, config))  # what a hub's id means may be known only now
    else:
        check_resolution(model, getattr(config, "resolution", None))
        if model.adapters != config.adapter:
            raise InputError(
                f"adapter={config.adapter} goes with the name of a model; this one is loaded, with {model.adapters}; "
                "use load(name, adapter=...)"
            )
    job, trained = train(verb, model, config, inputs, folder, callback, quiet, shows=True)
    shipped = job.ship(job.model, folder.folder) if folder else ""
    for sentence in job.advice(Fit(trained.steps, trained.seconds, trained.stopped)):
        console.print(sentence)
    metrics: dict[str, Any] = {
        "seconds": trained.seconds, "steps": trained.steps, "stopped": trained.stopped, "adapter": shipped,
        **trained.cost, **job.facts(),
    }  # fmt: skip
    did = f"{trained.steps} step{'' if trained.steps == 1 else 's'} in {trained.seconds:.0f} s ({trained.stopped})"
    console.print(f"{did}; measuring what changed" if getattr(config, verb.evaluated) else did)
    return measured(verb, config, job, metrics, folder, console)


def measured(
    verb: Verb, config: Any, job: Job, metrics: dict[str, Any], folder: Run | None, console: Console
) -> Result:
    """The result of what is trained, whose page and metrics.json are written; `metrics` are those of the training.

    What cannot be measured, because a judge fails, is named there as 'missing' and costs nothing else.
    """
    page = Page("")
    if getattr(config, verb.evaluated):
        try:
            metrics = metrics | _compared(verb, config, job, metrics, folder, page)
        except (InputError, RunError, OSError, RuntimeError, MemoryError) as error:
            if isinstance(error, RuntimeError) and not (isinstance(error, RunError) or is_short_of_memory(error)):
                raise
            page, metrics = Page(f"{verb.name}: {getattr(config, verb.source)}"), {**metrics, "missing": str(error)}
            again = f" `fieldsmith measure {folder.folder}` completes it." if folder else ""
            page.verdict(f"Trained, but not measured: {error}.{again}", None, "Incomplete")
            console.print(f"trained, but not measured: {error}", markup=False)
    else:
        page.title = f"{verb.name}: {getattr(config, verb.source)}"
        page.text("", f"{verb.evaluated} is 0: nothing was measured.")
    if page.answer:
        metrics["verdict"] = page.answer
    metrics = plain(metrics)  # as metrics.json has them
    result = Result(verb.name, config, metrics, tuple(page.pairs), folder.folder if folder else None, job.model)
    if folder:
        lines = shipping.repeat(
            verb.name, getattr(config, verb.source), config.adapter, folder.folder, metrics["adapter"]
        )
        page.command("Repeat it, load it", lines)
        page.write(folder.folder / "report.html")
        save_samples(result.pairs, folder.folder / "samples")
        folder.finish(metrics)
        console.print(f"page: {folder.folder / 'report.html'}")
    return result


def _compared(
    verb: Verb, config: Any, job: Job, metrics: dict[str, Any], folder: Run | None, page: Page
) -> dict[str, Any]:
    """What changed, measured and told on the page; for metrics.json."""
    with job.model.uncounted():
        with job.reference() as base:
            before = verb.measure(base, config, job, "before")
        after = verb.measure(job.trained if job.trained is not None else job.model, config, job, "after")
    history = folder.history(CURVES) if folder else []
    found = verb.report(page, Outcome(config, job, before, after, metrics, history, folder))
    if folder and config.previews and verb.preview:
        labels = verb.preview(config, job).labels
        page.images(
            "While it trained", labels, previews.found(folder.folder, len(labels)), note="The same noise each time."
        )
    return found


def train(
    verb: Verb,
    model: Model,
    config: Any,
    inputs: Any = None,
    run: Run | None = None,
    callback: Callback | None = None,
    quiet: bool = True,
    shows: bool = False,
) -> tuple[Job, Trained]:
    """Prepare, check and train, in place; `callback(steps, log)` is called before the first step and after each. With
    `shows` pictures are drawn into the run's folder meanwhile.

    Raises InputError before anything is trained or written, RunError where training breaks.
    """
    config.check()
    if getattr(config, "threads", None):
        torch.set_num_threads(config.threads)
    resumes = run is not None and checkpoints.find(run) is not None
    began_plain = not model.trains
    with contextlib.ExitStack() as stack:
        nfe = stack.enter_context(model.count_nfe())
        stack.enter_context(mixed_precision(model))
        job = None
        try:
            with processes.together():
                job = job_of(verb, model, config, inputs)
                if job.model is not model:  # a student or a guide has a count of its own
                    nfe = stack.enter_context(job.model.count_nfe())
                    stack.enter_context(mixed_precision(job.model))
                if config.checkpointing:
                    checkpoint_activations(job.model)
                if config.compile:
                    compile_blocks(job.model)
                with job.model.uncounted():
                    preflight.require(job.checks(resumes), quiet)
                    if not quiet and (note := job.note()):
                        Console(stderr=True).print(note)
                if run and job.parameters:
                    plan = job.optimisation
                    needed = checkpoints.bytes_of(job.parameters, plan.ema is not None, plan.optimizer)
                    checkpoints.check_space(run, needed)
                processes.wait()  # nobody writes before all have passed
                if run:
                    run.begin()
        except BaseException as error:
            # refused before anything was trained: the model, and a student that was handed in, can be used again
            if began_plain:
                model.remove_training()
            if job and job.model is not model:
                job.model.remove_training()
            if isinstance(error, NotFiniteError) or is_short_of_memory(error):
                lr = getattr(config, "lr", None) if resumes else None
                raise told(error, "the checks before training", run if resumes else None, lr) from error
            raise
        job.begin()
        carried: list[int] = []  # what an interrupted run had spent before this process took over
        if callback and processes.is_main():
            callback(0, {})
        shown = verb.preview(config, job) if shows and verb.preview and getattr(config, verb.evaluated) else None
        look = previews.looking(shown, run, config.previews if job.parameters else 0, job)
        if not resumes:
            look(0)

        def losses(step: int, generator: torch.Generator, log: Log) -> Iterator[Tensor]:
            if not carried:  # asked now that the log ends at the checkpoint; preparation is in there already
                before = run.last() if run and step and processes.is_main() else None
                carried.append((int(before["nfe"]) if before else 0) - prepared if run and step else 0)
            with job.around():
                yield from job.losses(step, generator, log)
            log.count("nfe", carried[0] + nfe.total)

        def stop(done: int, log: dict[str, float]) -> str | None:
            track(done - 1, log)
            look(done)
            # a user's function is called in one process, and all hear its reason
            said = callback(done, log) if callback and processes.is_main() else None
            reason = processes.exchange(said)[0] if callback else None
            return reason or (job.stop(done, log) if job.stop else None)

        prepared = nfe.total
        track = stack.enter_context(tracked(verb.name, config, run.folder if run else pathlib.Path(".")))
        nothing = Fit(0, 0.0, job.stopped)  # a closed form, or what acts while sampling
        asked = job.model.asked
        done = fit(job.parameters, losses, job.optimisation, run, stop, asked) if job.parameters else nothing
        last = run.last() if run else None
        spent = int(last["nfe"]) if last else sum(processes.exchange(nfe.total))
    return job, Trained(done.steps, done.seconds, done.stopped, spent, job.cost(done, spent))


def job_of(verb: Verb, model: Model, config: Any, inputs: Any) -> Job:
    """The verb's job, whose networks are asked for no more states at once than the config says."""
    n = getattr(config, verb.evaluated)
    check_kept(model, verb.states(config) | {f"{verb.evaluated}={n}": n})
    model.chunk = getattr(config, "chunk", None) or max(getattr(config, "batch", 1), model.chunk)
    job = verb.prepare(model, config, inputs)
    job.model.chunk = model.chunk
    return job


def attach(
    model: Model, config: LoraConfig, output: Callable[[], Tensor], dropout: float = 0.0, seed: int = 0
) -> Check:
    """Attach what trains, a new LoRA, one to go on from or full weights.

    Gives the check that the reference gives what `output` gave before."""
    subset = config.subset or model.DEFAULT_SUBSET
    with torch.no_grad(), model.uncounted():
        if config.continue_from:
            load_adapter(model, config.continue_from, start=True)
        base = output()
        if config.continue_from:
            pass
        elif config.full:
            model.unfreeze(subset)
        else:
            check_rank(model, config.rank, subset)
            model.adapt(LoraSpec(subset, config.rank, config.alpha, dropout, seed))
        with model.reference():
            gap = (output() - base).abs().max().item()
    fix = "this is a defect of fieldsmith: please report it"
    return Check("adapter off against base", gap, "0", gap == 0, fix)


def check_rank(model: Model, rank: int, subset: str) -> None:
    """Raises InputError where an adapter of that rank, its gradients and moments are more than memory holds."""
    layers = [model.network.get_submodule(name) for name in model._modules(subset)]
    need, free = 16 * rank * sum(layer.in_features + layer.out_features for layer in layers), model.free_memory()
    if need > free:
        raise InputError(
            f"rank={rank}: an adapter on the {len(layers)} layers of '{subset}' takes {need / 1e9:,.1f} GB to train, "
            f"and {free / 1e9:,.1f} GB are free; lower it"
        )


def load_model(verb: Verb, config: Any, inputs: Any = None) -> Model:
    """What the config names, with its frozen weights in their type and its other parts, and the networks that the
    inputs have, where they wait."""
    dtype = torch.bfloat16 if config.dtype == "bf16" else None
    size = getattr(config, "resolution", None)
    model = load(getattr(config, verb.source), size, dtype, config.adapter, config.config_from)
    if config.offload:
        parts = offload(model, getattr(inputs, "networks", ()))
        where = f"{', '.join(parts)} wait on the CPU" if parts else "nothing to do, the model is on the CPU already"
        Console(stderr=True).print(f"offload: {where}")
    return model


def check_memory(verb: Verb, config: Any) -> None:
    """Raises InputError where the memory options do not fit what trains, or need a package that is not there."""
    optimizers.check(config.optimizer)
    start = getattr(config, "continue_from", None)
    if start:
        lora_file(start)
        if config.full:
            raise InputError(f"continue_from '{start}' is a LoRA, but full weights train; leave out one of the two")
    if processes.sharded() and not verb.fsdp:
        raise InputError(f"{verb.name} needs the whole network in each process; launch it without FSDP (docs/scale.md)")
    if config.log_with and importlib.util.find_spec(config.log_with) is None:
        raise InputError(
            f"log_with '{config.log_with}' is not installed; pip install {config.log_with}, or leave it out"
        )
    if config.dtype == "bf16" and not verb.frozen(config):
        raise InputError(
            "dtype 'bf16' is for frozen weights, but this run trains full ones, which need float32; leave out --dtype, "
            "or train a LoRA"
        )
