"""`fieldsmith plan VERB ...`: what a run would cost, before a weight is downloaded or a step is taken.

In: a verb and the words that it takes itself. Out: parameters, peak memory by part, forward-equivalents, reward calls
and disk, printed as tables or as JSON. Networks are built from their configs as shapes alone (models/blueprint.py) and
an update is rehearsed on them (models/footprint.py), so that 12 billion parameters take seconds.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fieldsmith.commands import memory
from fieldsmith.commands.memory import Memory
from fieldsmith.errors import InputError, check_word

if TYPE_CHECKING:
    from fieldsmith.commands.costs import Cost
    from fieldsmith.models.core import Model
    from fieldsmith.models.footprint import Component, Footprint, Update

PLANNED = ("align", "edit", "erase", "distill", "sharpen")


@dataclass(frozen=True)
class Plan:
    """What a run would take. Memory and disk in bytes."""

    verb: str
    model: str
    components: list[Component]  # of the model, and of a student or guide beside it
    trainable: int  # parameters
    memory: dict[str, int]  # by part, when most is alive
    peak: int
    forward_equivalents: float
    reward_calls: int
    disk: dict[str, int]
    notes: list[str]


def plan(words: Sequence[str]) -> None:
    rest = list(words)
    as_json = "--json" in rest
    if as_json:
        rest.remove("--json")
    if not rest:
        raise InputError(f"no verb given after `fieldsmith plan`; verbs that are planned: {', '.join(PLANNED)}")
    if rest[0] in ("-h", "--help"):
        print(f"usage: fieldsmith plan VERB [the verb's own flags] [--json]; verbs: {', '.join(PLANNED)}")
        raise SystemExit(0)
    verb = rest.pop(0)
    check_word(verb, PLANNED, "the verbs that are planned")
    command = importlib.import_module(f"fieldsmith.commands.{verb}")
    found = planned(verb, *command.settings(rest))
    if as_json:
        print(json.dumps(dataclasses.asdict(found), indent=1))
    else:
        _print(found)


@dataclass(frozen=True)
class Case:
    """A run's models with training attached, its update and its cost."""

    learner: Model
    update: Update
    cost: Cost
    teacher: Model | None = None
    ema: bool = False
    disk: dict[str, int] = dataclasses.field(default_factory=dict)


def planned(verb: str, config: Any, fits: Memory = memory.DEFAULT) -> Plan:
    """The plan of a run with these settings. Raises InputError as the verb itself does before it starts."""
    import torch

    from fieldsmith.models.blueprint import blueprint
    from fieldsmith.models.footprint import components

    CHECKS[verb](config, fits)
    name = config.teacher if verb == "distill" else config.model
    dtype = torch.bfloat16 if fits.dtype == "bf16" else None
    drawn = blueprint(name, getattr(config, "resolution", None), dtype)
    parts = components(drawn.model)
    case = CASES[verb](drawn.model, config)
    found = rehearsal(case, fits)
    if case.learner is not drawn.model:
        own = components(case.learner)[0]
        parts.append(dataclasses.replace(own, name=f"{own.name} that trains"))
    kept = found.trainable_bytes + found.moment_bytes + found.ema_bytes
    disk = {"download": drawn.downloads, "a checkpoint (two for a moment)": kept, **case.disk}
    shipped = f"{'adapter' if case.learner.spec else 'model'}/"
    disk[shipped] = found.trainable_bytes if case.learner.spec else sum(part.bytes for part in components(case.learner))
    return Plan(
        verb, name, parts, found.trainable, found.parts, found.peak, case.cost.forward_equivalents,
        case.cost.reward_calls, disk, _notes(case, fits),
    )  # fmt: skip


def rehearsal(case: Case, fits: Memory = memory.DEFAULT) -> Footprint:
    """Memory by part over a case's update."""
    from fieldsmith.models.footprint import footprint
    from fieldsmith.models.memory import checkpoint_activations

    if fits.checkpointing:
        checkpoint_activations(case.learner)
    eight = fits.optimizer == "adamw8bit"
    return footprint(case.learner, case.update, case.teacher, case.ema, eight, fits.offload)


def _notes(case: Case, fits: Memory) -> list[str]:
    import torch

    notes = [f"forward-equivalents depend on {case.cost.hangs_on}"] if case.cost.hangs_on else []
    if fits.offload and not torch.cuda.is_available():
        notes.append("offload moves nothing on this machine, which has no GPU; the peak is that of one")
    return notes


def _attached(model: Model, config: Any) -> None:
    """A LoRA, or full weights, as the settings of erase, align and edit say."""
    from fieldsmith.models.blueprint import adapt
    from fieldsmith.models.core import LoraSpec

    if config.full:
        model.unfreeze(config.subset)
    else:
        dropout = getattr(config, "dropout", 0.0)
        adapt(model, LoraSpec(config.subset, config.rank, config.alpha, dropout))
        model.dropout(dropout > 0)


def erase_case(model: Model, config: Any) -> Case:
    from fieldsmith.commands import costs, updates
    from fieldsmith.methods.erase.loop import check_model

    check_model(model, config)
    if config.method in ("uce", "projection"):
        raise InputError(f"method '{config.method}' trains nothing, so there is nothing to plan")
    cost = costs.erase(model, config)
    _attached(model, config)
    return Case(model, updates.erase(model, config), cost)


def align_case(model: Model, config: Any) -> Case:
    from fieldsmith.commands import costs, updates
    from fieldsmith.commands.align import _captions
    from fieldsmith.read import read_prompts
    from fieldsmith.worlds.model_cards import world_of

    prompts = read_prompts(config.prompts) or _captions(world_of(config.model))
    config = dataclasses.replace(config, prompts=prompts)
    cost = costs.align(model, config)
    _attached(model, config)
    return Case(model, updates.align(model, config), cost, ema=bool(config.ema))


def edit_case(model: Model, config: Any) -> Case:
    from fieldsmith.commands import costs, updates
    from fieldsmith.models.editing import check_editor

    check_editor(model)
    cost = costs.edit(model, config)
    _attached(model, config)
    return Case(model, updates.edit(model, config), cost, ema=bool(config.ema))


def distill_case(teacher: Model, config: Any, data: int | None = None) -> Case:
    """`data`: how many clean states there are, if that is known."""
    from fieldsmith.commands import costs, updates
    from fieldsmith.commands.distill import check_sampled, student_fields, student_scales
    from fieldsmith.methods.distill.bank import SHARD, place
    from fieldsmith.models.blueprint import learner
    from fieldsmith.models.shrink import fields_for

    check_sampled(teacher, config.sampler_steps)
    own, scales = student_fields(config), student_scales(config)
    fields = fields_for(teacher, config.shrink if own is None else None, own, scales)
    student = learner(teacher, fields, scales)
    cost = costs.distill(teacher, student, config)
    student.unfreeze("all")
    update = updates.distill(teacher, student, config, _states(config.teacher, config.data) if data is None else data)
    disk = {}
    if config.bank:
        first, count = place(max(0, config.steps - 1), costs.feed_of(teacher, config).rows, config.bank, config.reuse)
        disk["bank/"] = (first + count) * SHARD * 2 * updates.state_bytes(teacher) // 2  # two answers in fp16
    return Case(student, update, cost, teacher, bool(config.ema), disk)


def sharpen_case(model: Any, config: Any, data: int | None = None) -> Case:
    """`data` as in `distill_case`."""
    import torch

    from fieldsmith.commands import costs, updates
    from fieldsmith.commands.distill import check_sampled
    from fieldsmith.commands.sharpen import POOL
    from fieldsmith.methods.sharpen.config import NEEDS_HEAD
    from fieldsmith.methods.sharpen.loop import check_model, check_path
    from fieldsmith.models.blueprint import headed, learner
    from fieldsmith.models.shrink import fields_for

    check_path(model)
    check_sampled(model, config.sampler_steps)
    if config.method in NEEDS_HEAD and config.add_head and not model.learns_variance:
        model = headed(model)
    check_model(model, model.noise(1, torch.Generator().manual_seed(0)), config)
    teacher = None
    if config.method == "guide":
        teacher, model = model, learner(model, fields_for(model, config.guide_size, None, None))
        config = dataclasses.replace(config, method="plain")
    model.unfreeze("all")
    update = updates.sharpen(model, config, POOL if data is None else data)
    return Case(model, update, costs.sharpen(config), teacher, bool(config.ema))


def _states(name: str, data: str) -> int:
    """Clean states of a data set; 0 where only a look at the folder would tell."""
    from fieldsmith.worlds.classes import POOL
    from fieldsmith.worlds.model_cards import card_of

    card = card_of(name)
    source = str(card.get("data") or card.get("world")) if data == "auto" else data
    return {"digits": 1_500, "shapes": POOL}.get(source, 0)


def _check(verb: str) -> Any:
    """What the verb refuses before it looks at a model."""

    def check(config: Any, fits: Memory) -> None:
        importlib.import_module(f"fieldsmith.methods.{verb}.config").check(config)
        if verb == "sharpen":
            from fieldsmith.commands.sharpen import check_memory

            check_memory(config, fits)
        else:
            memory.check(fits, verb == "distill" or not config.full, "--full")

    return check


CHECKS = {verb: _check(verb) for verb in PLANNED}
CASES: dict[str, Any] = {
    "align": align_case, "edit": edit_case, "erase": erase_case, "distill": distill_case, "sharpen": sharpen_case,
}  # fmt: skip


def _print(found: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    total = sum(part.parameters for part in found.components)
    weights = Table(title=f"fieldsmith {found.verb} on {found.model}", title_justify="left")
    for header in ("component", "parameters", "type", "weights"):
        weights.add_column(header, justify="left" if header in ("component", "type") else "right")
    for part in found.components:
        weights.add_row(part.name, f"{part.parameters:,}", part.dtype, size(part.bytes))
    weights.add_row("trainable", f"{found.trainable:,}", "", f"{100 * found.trainable / total:.2g}% of all")
    console.print(weights)
    peak = Table(title="memory when most is alive (training)", title_justify="left")
    peak.add_column("part")
    peak.add_column("size", justify="right")
    for part_, bytes_ in sorted(found.memory.items(), key=lambda item: -item[1]):
        peak.add_row(part_, size(bytes_))
    peak.add_section()
    peak.add_row("peak", size(found.peak))
    console.print(peak)
    calls = f", {found.reward_calls:,} reward calls" if found.reward_calls else ""
    console.print(f"cost: {found.forward_equivalents:,.0f} forward-equivalents{calls}", highlight=False)
    disk = ", ".join(f"{name} {size(bytes_)}" for name, bytes_ in found.disk.items() if bytes_)
    console.print(f"disk: {disk}", highlight=False)
    for note in found.notes:
        console.print(f"note: {note}", highlight=False)


def size(bytes_: float) -> str:
    """Bytes in the unit that suits them, of powers of 1,000."""
    for unit in ("B", "kB", "MB"):
        if abs(bytes_) < 1000:
            return f"{bytes_:.3g} {unit}"
        bytes_ /= 1000
    return f"{bytes_:,.1f} GB"
