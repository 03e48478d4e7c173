"""`fieldsmith distill`: build a smaller network, train it on both branches of its teacher, measure what it kept.

In: the words after the verb. Out: a run directory with model/ (a diffusers pipeline), metrics.json and report.html.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fieldsmith.commands import arguments, memory
from fieldsmith.commands.memory import Memory
from fieldsmith.errors import InputError
from fieldsmith.methods.distill.config import OBJECTIVES, PRESETS, DistillConfig, check, preset
from fieldsmith.read import read_json

if TYPE_CHECKING:
    from fieldsmith.models.core import Model
    from fieldsmith.run import Run
    from fieldsmith.worlds.classes import Classes

NOTES = f"""--preset NAME picks a recipe (default: the objective's own, else fieldsmith): {", ".join(PRESETS)}.
--scale laptop|paper picks how long it trains (default: laptop for zoo teachers, else paper).
--config FILE.toml (such as a run's config.toml) sets fields again, and flags come last.
--identifiability prints, for every objective, what it leaves undetermined, and ends."""
SCALES = (1.0, 1.5, 2.0, 3.0)
TUPLES = 2_000  # states of each kind at which the page compares the branches


def distill(words: Sequence[str]) -> None:
    if "--identifiability" in words:
        print_identifiability([word for word in words if word != "--identifiability"])
        return
    run(*settings(list(words)))


def configure(words: list[str]) -> DistillConfig:
    """The settings without those of its memory."""
    return settings(words)[0]


def settings(words: list[str]) -> tuple[DistillConfig, Memory]:
    """Preset, then file, then flags."""
    name, path = arguments.take(words, "--preset"), arguments.take(words, "--config")
    objective = arguments.peek(words, "--objective")
    name = name or (objective if objective in PRESETS and not path else "fieldsmith")
    scale = arguments.take(words, "--scale")
    file = arguments.from_file(path, DistillConfig, "distill", Memory) if path else {}
    fits = memory.taken(file)
    teacher = str(arguments.peek(words, "--teacher") or file.get("teacher", DistillConfig.teacher))
    scale = scale or ("laptop" if path or teacher.startswith("zoo:") else "paper")
    if scale not in ("laptop", "paper"):
        raise InputError(f"scale '{scale}' is unknown; use laptop or paper")
    base = dataclasses.replace(preset(name, scale), **file)
    return arguments.parse_with(base, fits, words, "distill", NOTES)


def print_identifiability(words: list[str]) -> None:
    """A table: rank, what costs nothing, condition number of each objective, or of the one named."""
    from rich.console import Console
    from rich.table import Table

    from fieldsmith.methods.distill.objectives import identifiability, objective_of, unseen_error

    config = arguments.parse(DistillConfig(), words, "distill --identifiability")
    told = [word.partition("=")[0] for word in words if word.startswith("--")]
    names = (config.objective,) if "--objective" in told else OBJECTIVES
    table = Table(
        title="what an objective determines of the branch errors (e_c, e_u) at one input", title_justify="left"
    )
    for header in ("objective", "rank", "costs nothing", "so at w=3 the guided error is", "condition number"):
        table.add_column(header)
    for name in names:
        recipe = config if told else preset(name)
        objective = objective_of(dataclasses.replace(recipe, objective=name))
        found = identifiability(objective)
        lost = "-" if found.null_direction is None else "({:.2f}, {:.2f})".format(*found.null_direction)
        rank = str(found.rank) if found.rank == found.each_time else f"{found.rank}, {found.each_time} at each time"
        unseen = "-" if found.null_direction is None else f"{unseen_error(objective, 3.0):+.2f}"
        table.add_row(name, rank, lost, unseen, f"{found.condition:.3g}")
    Console().print(table)


def run(config: DistillConfig, fits: Memory = memory.DEFAULT) -> Run:
    """The whole verb; the finished run directory. Raises InputError before anything is written."""
    check(config)
    memory.check(fits, True, "")
    import torch
    from rich.console import Console

    from fieldsmith.commands.distill_page import page_of
    from fieldsmith.measure.guidance import ask, measure, noised_tuples, path_tuples
    from fieldsmith.measure.sweep import Sweep
    from fieldsmith.methods.distill import loop
    from fieldsmith.methods.distill.bank import Source
    from fieldsmith.methods.distill.objectives import identifiability, objective_of
    from fieldsmith.training import step_generator

    console = Console(stderr=True)
    objective = objective_of(config)
    directory = arguments.directory_of(config, "distill", fits)
    if directory.finished:
        console.print(f"this run is complete: {directory.folder / 'report.html'}")
        return directory
    if config.threads:
        torch.set_num_threads(config.threads)
    teacher = memory.loaded(fits, config.teacher)
    check_sampled(teacher, config.sampler_steps)
    student = student_for(teacher, config)
    student.network.float()
    data = data_for(teacher, config)
    source = Source(teacher.encode_images(data.images), data.labels, data.names)
    memory.prepare_training(fits, student)
    result = loop.distill(teacher, student, source, config, directory, data.name, optimizer=fits.optimizer)
    student.save(directory.folder / "model")
    console.print(f"{result.steps} steps in {result.seconds:.0f} s; measuring what the student kept")
    sweep = Sweep(data, teacher, config.evaluate, config.sampler_steps, config.seed)
    scales = config.guidance_scales if objective.guided_input else SCALES
    curves = {"teacher": sweep.curve(teacher, scales), "student": sweep.curve(student, scales)}
    fidelity = {}
    if not objective.guided_input:  # a student that takes w has no branches
        generator = step_generator(config.seed, 0, stream=9)
        prompts = list(data.names)
        for kind, tuples in {
            "noised data": noised_tuples(
                teacher, data.held_images, [prompts[i] for i in data.held_labels], TUPLES, generator
            ),
            "the teacher's guided path": path_tuples(teacher, prompts, config.sampler_steps, 2.0, generator, TUPLES),
        }.items():
            fidelity[kind] = measure(ask(student, tuples), ask(teacher, tuples), tuples.t)
    sizes = {
        name: sum(p.numel() for p in m.network.parameters()) for name, m in (("teacher", teacher), ("student", student))
    }
    metrics: dict[str, Any] = {
        "method": config.objective, "seconds": result.seconds, "steps": result.steps, "stopped": result.stopped,
        "forward_equivalents": result.forward_equivalents, "student forwards": result.student_forwards,
        "teacher forwards": result.teacher_forwards, "teacher cost": result.teacher_cost, "parameters": sizes,
        "identifiability": str(identifiability(objective)), "judge": sweep.judge.name, "curves": curves,
        "before": curves["teacher"], "after": curves["student"],
        "guidance": {kind: found.to_json() for kind, found in fidelity.items()},
    }  # fmt: skip
    page_of(config, metrics, sweep, student, directory).write(directory.folder / "report.html")
    directory.finish(metrics)
    console.print(f"page: {directory.folder / 'report.html'}")
    return directory


def check_sampled(model: Model, steps: int) -> None:
    """Raises InputError where the model has no null prompt, in its own words, or cannot be sampled in these steps."""
    model.encode([""])
    try:
        model.grid(steps)
    except ValueError as error:
        raise InputError(f"sampler_steps={steps}: {error}") from error


def data_for(teacher: Model, config: DistillConfig) -> Classes:
    """The data that the settings or the teacher's card name. Raises InputError where its classes are not the same."""
    from fieldsmith.worlds.classes import load as load_data
    from fieldsmith.worlds.model_cards import card_of

    source = config.data
    if source == "auto":
        card = card_of(config.teacher)
        source = str(card.get("data") or card.get("world") or "")
        if not source:
            raise InputError(
                f"'{config.teacher}' does not say what it was trained on; add --data digits, shapes or a folder"
            )
    size = teacher.decode(teacher.noise(1, _draws())).shape  # (1, channels, height, width)
    data = load_data(source, size[-1], size[1])
    classes = getattr(teacher, "classes", None)
    if classes is not None and set(classes) != set(data.names):
        odd = sorted(set(classes) ^ set(data.names))[0]
        raise InputError(
            f"data '{source}' has other classes than {teacher.name} ('{odd}' is in one only); name the folders as the "
            "classes are"
        )
    if classes is not None and tuple(classes) != data.names:  # folders come in alphabetical order
        import torch

        places = torch.tensor([list(classes).index(name) for name in data.names])
        labels, held = places[data.labels], places[data.held_labels]
        data = dataclasses.replace(data, names=tuple(classes), labels=labels, held_labels=held)
    teacher.encode(data.names)  # words that a text model does not know are refused here
    return data


def _draws() -> Any:
    import torch

    return torch.Generator().manual_seed(0)


def student_for(teacher: Model, config: DistillConfig) -> Model:
    """An untrained student. Raises InputError at a file that is no config, or a config that is no smaller network."""
    from fieldsmith.models.shrink import shrink

    fields = student_fields(config)
    ratio = config.shrink if fields is None else None
    return shrink(
        teacher, ratio, fields, init=config.init, guidance_scales=student_scales(config), seed=config.seed
    )  # fmt: skip


def student_scales(config: DistillConfig) -> tuple[float, ...] | None:
    """The guidance scales that the student takes itself."""
    return config.guidance_scales if config.objective == "w-conditioned" else None


def student_fields(config: DistillConfig) -> dict[str, Any] | None:
    """The config fields of the file that the settings name, if they do. Raises InputError where it is no such file."""
    if config.student is None:
        return None
    fields = read_json(config.student, "student config")
    if not isinstance(fields, dict):
        raise InputError(f"student config '{config.student}' is no mapping of config fields to values")
    return fields
