"""What a run is told: settings with bounds on their fields, the groups that verbs share, TOML files.

A verb's config is a frozen pydantic dataclass made by `@config`; groups such as `LoraConfig` are inherited, so that
every setting is one flat name in Python, on the command line and in a file. A bad value raises InputError in one
sentence. Importing this costs no torch: the command line parses from it before anything heavy loads.
"""

from __future__ import annotations

import dataclasses
import difflib
import pathlib
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, dataclass_transform

import pydantic
from pydantic import BeforeValidator, ConfigDict, Field

from fieldsmith.errors import InputError, check_word
from fieldsmith.read import read_toml

T = TypeVar("T")

MOST = 10**12  # of anything that is counted; what a machine can hold is asked once the model is known
Count = Annotated[int, Field(ge=1, le=MOST)]
Natural = Annotated[int, Field(ge=0, le=MOST)]
SamplerSteps = Annotated[int, Field(ge=1, le=10_000)]
Pixels = Annotated[int, Field(ge=1, le=16_384)]  # a side
Threads = Annotated[int, Field(ge=1, le=1_024)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Words = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]

# how much is computed at once, and where things wait: a run may go on with others, whose sums are the same in another
# order. What is drawn (but for dropout's masks), learned and measured hangs on none of them
ADAPTABLE = ("chunk", "checkpointing", "offload", "trajectories")

GIVEN = "given:"  # how a config names data that were handed over as objects in Python

TYPES = {
    "int_type": "a whole number", "int_parsing": "a whole number", "int_from_float": "a whole number",
    "float_type": "a number", "float_parsing": "a number", "finite_number": "a finite number",
    "bool_type": "true or false", "bool_parsing": "true or false", "string_type": "text",
    "tuple_type": "a list", "path_type": "a path",
}  # fmt: skip


@dataclass_transform(kw_only_default=True, frozen_default=True)
def config(cls: type[T]) -> type[T]:
    """A frozen pydantic dataclass with keyword arguments, whose mistakes are InputErrors of one sentence."""
    options = ConfigDict(allow_inf_nan=False, strict=True)  # '3' and true are no numbers
    made: Any = pydantic.dataclasses.dataclass(cls, frozen=True, kw_only=True, config=options)
    validated = made.__init__

    def __init__(self: Any, **given: Any) -> None:
        fields = {field.name: str(field.type) for field in dataclasses.fields(made)}
        for name in given:
            check_word(name, tuple(fields), f"{made.__name__}'s settings")
        try:
            validated(self, **{name: _stored(value, fields[name]) for name, value in given.items()})
        except pydantic.ValidationError as error:
            raise InputError(_sentence(error)) from None

    made.__init__ = __init__
    return made


def _stored(value: Any, kind: str) -> Any:
    """Lists as tuples, names of paths as paths, numpy's numbers as Python's."""
    if isinstance(value, list):
        return tuple(tuple(part) if isinstance(part, list) else part for part in value)
    if isinstance(value, str) and "Path" in kind:
        return pathlib.Path(value)
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0 else value


def _sentence(error: pydantic.ValidationError) -> str:
    """The first mistake, by the field's name and value and what it should be."""
    first = error.errors()[0]
    name, value, limits = str(first["loc"][0]), first["input"], first.get("ctx", {})
    match first["type"]:
        case "greater_than_equal":
            return f"{name}={value} must be at least {limits['ge']:g}"
        case "greater_than":
            return f"{name}={value} must be above {limits['gt']:g}"
        case "less_than_equal":
            return f"{name}={value} must be at most {limits['le']:g}"
        case "less_than":
            return f"{name}={value} must be below {limits['lt']:g}"
        case "literal_error":
            known = re.findall(r"'([^']*)'", limits["expected"])
            near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
            return f"{name} '{value}' is unknown; {hint}"
        case kind if kind in TYPES:
            return f"{name}={value!r} should be {TYPES[kind]}"
    return f"{name}={value!r}: {first['msg']}"


@config
class Config:
    """What every verb is told."""

    FIRST: ClassVar[tuple[str, ...]] = ()  # the settings that matter, which --help shows; --help-all has them all
    NOTES: ClassVar[str] = ""  # of --help: presets and how flags, files and presets go together

    out: pathlib.Path | None = None
    """The run directory to write (new, empty, or this same run interrupted)."""
    resume_changed: bool = False
    """Go on with an interrupted run although its code, data or weights are no longer those that it began with."""
    seed: Seed = 0
    """Everything random follows from it."""
    previews: Annotated[int, Field(ge=0, le=1_000)] = 3
    """How often a run directory gets a strip of pictures while the model trains, beside one before it; 0: none."""
    adapter: Words = ()
    """Adapters (of any trainer) that become part of the base: FILE or FILE:scale, --adapter again for each."""
    config_from: str = ""
    """Of a model in one .safetensors file: the pipeline folder or hub id that its config and tokenizers come from."""
    log_with: Literal["tensorboard", "wandb", "trackio"] | None = None
    """Where else the training's numbers go while it runs, beside metrics.jsonl."""

    @classmethod
    def preset_of(cls, name: str | None, scale: str | None, given: Mapping[str, Any]) -> Self:
        """The settings to start from; `given` are those that a file, flags or keyword arguments set on top.

        Raises InputError at a name or scale that the verb does not know.
        """
        raise NotImplementedError

    def check(self) -> None:
        """Refuse settings that do not go together; needs no model. Raises InputError with the value and the fix."""

    def replace(self, **changes: Any) -> Self:
        """A copy with other values. Raises InputError as the constructor does."""
        return dataclasses.replace(self, **changes)


@config
class LoraConfig:
    """Which weights train: a low-rank adapter on a subset of the layers, or the layers' full weights."""

    subset: str | None = "attention"
    """Which layers train: a subset of the family (attention, all-linear, ...); None: the family's own."""
    full: bool = False
    """Train full weights of the subset ('all': every weight) instead of a LoRA."""
    rank: Count = 16
    """LoRA rank."""
    alpha: Positive | None = None
    """LoRA alpha; None: equal to the rank."""
    continue_from: pathlib.Path | None = None
    """--continue: a LoRA that training goes on from, in its rank, alpha and layers; the reference has it too."""


@config
class OptimConfig:
    """How weights move."""

    lr: Positive = 1e-3
    """AdamW's learning rate."""
    weight_decay: NonNegative = 0.0
    """AdamW's weight decay."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit keeps AdamW's moments in 8 bits; it comes with `pip install fieldsmith[8bit]`."""


@config
class FitConfig(Config, OptimConfig):
    """How a network is fitted to data: AdamW with a warm-up and a cosine decay, clipped gradients, averaged weights."""

    steps: Count = 400
    """Updates."""
    batch: Count = 32
    """Rows of an update."""
    lr: Positive = 1e-3
    """AdamW's learning rate, decayed by a cosine."""
    warmup: Natural = 0
    """Updates over which the learning rate rises."""
    clip: Positive = 1.0
    """Largest gradient norm."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the averaged weights that are kept; 0: none."""
    threads: Threads | None = None
    """Torch threads; None: as many as torch wants."""


@config
class DataConfig:
    """How images of the user's own become square and opaque."""

    fit: Literal["crop", "squash", "pad"] = "crop"
    """Of images that are not square: their centre, both sides scaled apart, or bars beside them."""
    background: str = "white"
    """What shows through transparent images, and the colour of bars: a name or #rrggbb."""


@config
class MemoryConfig:
    """How a run is made to fit."""

    dtype: Literal["float32", "bf16"] = "float32"
    """Of frozen weights. bf16 halves them; LoRA weights, students, states and losses stay float32."""
    checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: equal gradients for a third more work."""
    compile: bool = False
    """Compile the denoiser's blocks with torch.compile: a minute at the start, faster steps on GPUs."""
    offload: bool = False
    """Text encoders and autoencoder wait on the CPU while the denoiser works; on a CPU-only machine nothing moves."""


def configure(kind: type[Any], settings: Mapping[str, Any], preset: str | None = None, scale: str | None = None) -> Any:
    """A config from a preset and the settings on top of it. Raises InputError at an unknown name or a bad value."""
    base = kind.preset_of(preset, scale, settings)
    for name in settings:
        check_word(name, [field.name for field in dataclasses.fields(kind)], f"{kind.__name__}'s settings")
    return base.replace(**settings)


def from_file(path: str | pathlib.Path, kind: type[Any], verb: str) -> dict[str, Any]:
    """Settings of a TOML file, such as a run's config.toml, by field name.

    Raises InputError at unknown keys, another verb's file and bad TOML; values are checked once the config is made.
    """
    settings = read_toml(path)
    if settings.pop("verb", verb) != verb:
        raise InputError(f"config file '{path}' is of another verb; this is `fieldsmith {verb}`")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    settings.pop("origins", None)
    if settings.pop("versions", None):  # a run's own record, which leaves out what was None
        settings = {name: None for name, field in fields.items() if field.default is None} | settings
    for name in settings:
        check_word(name, tuple(fields), f"{verb}'s settings (in '{path}')")
    return settings
