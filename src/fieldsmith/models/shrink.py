"""A student for a model: a smaller network of its family, in a pipeline that shares everything else with it.

In: a model, and how many times smaller or which config. Out: a `Model` with fresh or selected weights, and for class
families one that may take the guidance scale itself. Networks are counted on the meta device, where they cost nothing.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch.overrides import TorchFunctionMode

from fieldsmith.errors import InputError, check_word
from fieldsmith.models.core import Model
from fieldsmith.models.ddpm import ClassDDPM
from fieldsmith.models.families import nothing_smaller
from fieldsmith.models.selection import place_of, select_weights

Fields = dict[str, Any]  # of a network's config

COUNTED: dict[tuple[type, str], int] = {}  # parameters by class and config: a second student is found at once
EQUAL = 0.05  # counts whose logarithms are this near count as equal, so that shape decides


@dataclass(frozen=True)
class Family:
    """What config fields mean: `states` fix what comes in and goes out, `classes` the embedding rows (the first is
    their number), `depths` how many blocks there are, in which the parameter count is linear."""

    depths: tuple[str, ...]
    states: tuple[str, ...]
    classes: tuple[str, ...] = ()


TEXT_UNET = (
    "sample_size", "in_channels", "out_channels", "cross_attention_dim", "addition_embed_type",
    "addition_time_embed_dim", "projection_class_embeddings_input_dim",
)  # fmt: skip
FLUX = Family(
    ("num_layers", "num_single_layers"),
    ("patch_size", "in_channels", "out_channels", "joint_attention_dim", "pooled_projection_dim"),
)
OF_WORDS_ALONE = Family(
    ("num_layers", "num_single_layers"), ("patch_size", "in_channels", "out_channels", "joint_attention_dim")
)
FAMILIES = {
    "unet": Family(
        ("layers_per_block",), ("sample_size", "in_channels", "out_channels"),
        ("num_class_embeds", "class_embed_type"),
    ),
    "dit": Family(
        ("num_layers",), ("sample_size", "in_channels", "out_channels"), ("num_embeds_ada_norm",)
    ),
    "flux": FLUX,
    "flux-kontext": FLUX,
    "chroma": OF_WORDS_ALONE,
    "flux2-klein": OF_WORDS_ALONE,
    "flux2-dev": OF_WORDS_ALONE,
    "qwen-image": Family(("num_layers",), ("patch_size", "in_channels", "out_channels", "joint_attention_dim")),
    "sd15": Family(("layers_per_block",), TEXT_UNET),
    "sdxl": Family(("layers_per_block",), TEXT_UNET),
    "sd3": Family(
        ("num_layers",),
        ("sample_size", "patch_size", "in_channels", "out_channels", "joint_attention_dim", "pooled_projection_dim",
         "pos_embed_max_size"),
    ),
}  # fmt: skip


def shrink(
    model: Model,
    ratio: float | None = None,
    config: Mapping[str, Any] | None = None,
    init: Literal["fresh", "copied"] = "fresh",
    guidance_scales: Sequence[float] | None = None,
    seed: int = 0,
) -> Model:
    """A student of the model: frozen and in eval mode as every model, until something trains it.

    Either `ratio`, how many times fewer parameters (the nearest network of the teacher's shape), or `config`, fields of
    the network's diffusers config that differ from the teacher's. `init` 'copied' selects the teacher's weights where
    they fit. With `guidance_scales` the student takes the scale itself, one class row for each (class, scale), and has
    no null class. `seed` draws fresh weights; the global generator stays as it was.

    Raises InputError at a family of which nothing smaller is known and at a ratio or config that makes no smaller
    network for the same states and classes, ValueError where the model is being trained.
    """
    if init not in ("fresh", "copied"):
        raise InputError(f"init '{init}' is unknown; use 'fresh' or 'copied'")
    scales = None if guidance_scales is None else tuple(guidance_scales)
    fields = fields_for(model, ratio, config, scales)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # module constructors draw from the global generator
        network = model.make_network(fields)
    if init == "copied":
        select_weights(network, model.network, _origins(model, scales))
    network.to(model.device)
    if network.dtype != model.network.dtype:  # diffusers warns of a change of type even where there is none
        network.to(model.network.dtype)
    return student_of(model, network, scales)


def fields_for(
    model: Model, ratio: float | None, config: Mapping[str, Any] | None, scales: tuple[float, ...] | None
) -> Fields:
    """The config of a student's network. Raises as `shrink`."""
    if (ratio is None) == (config is None):
        raise InputError(f"a student needs either a ratio or a config, not {'neither' if ratio is None else 'both'}")
    model._refuse_second_training()
    if model.family not in FAMILIES:
        raise InputError(f"{model.name} {nothing_smaller()}")
    family = FAMILIES[model.family]
    rows = _rows(model, family, scales)
    fields = _fields(model) | rows
    with torch.random.fork_rng():
        fields |= _search(model, family, fields, ratio) if ratio is not None else _checked(model, family, config or {})
        fields |= rows
        _try(model, fields)
    return fields


def parameters(network: Any) -> int:
    """How many parameters a network has."""
    return sum(p.numel() for p in network.parameters())


def _fields(model: Model) -> Fields:
    """The teacher's config without diffusers' own notes."""
    known = inspect.signature(type(model.network).__init__).parameters
    return {name: value for name, value in model.network.config.items() if name in known}


def _rows(model: Model, family: Family, scales: tuple[float, ...] | None) -> Fields:
    """The config field of a network that takes these guidance scales itself; empty without them."""
    if scales is None:
        return {}
    if not isinstance(model, ClassDDPM):
        raise InputError(f"guidance_scales={scales} need class rows, which family {model.family} lacks; leave them out")
    model._null_label(f"guidance_scales={scales}")  # without it the teacher cannot be guided
    if not scales or len(set(scales)) < len(scales) or not all(math.isfinite(scale) for scale in scales):
        raise InputError(f"guidance_scales={scales} should be one or more different numbers; try 1.0, 2.0, 4.0")
    return {family.classes[0]: len(model.classes) * len(scales)}


def _origins(model: Model, scales: tuple[float, ...] | None) -> list[int] | None:
    """The teacher's class row for each row of a network with these scales; DiT's idle last row comes from the null."""
    if not scales or not isinstance(model, ClassDDPM):
        return None
    idle = [len(model.classes)] if model.family == "dit" else []
    return [row for row in range(len(model.classes)) for _ in scales] + idle


def _checked(model: Model, family: Family, config: Mapping[str, Any]) -> Fields:
    """The fields that a user asks for. Raises InputError at unknown ones, and where states or classes would change."""
    teacher, kind = _fields(model), type(model.network).__name__
    made_by = config.get("_class_name", kind)
    if made_by != kind:
        raise InputError(f"the config is of a {made_by} but {model.name} has a {kind}; give fields of a {kind}")
    wanted = {name: value for name, value in config.items() if not name.startswith("_")}
    for name, value in wanted.items():
        check_word(name, tuple(teacher), f"{kind}'s config")
        if name in (*family.states, *family.classes) and _plain(value) != _plain(teacher[name]):
            raise InputError(
                f"the config changes {name} from {teacher[name]} to {value}, but a student has its teacher's states "
                "and classes; leave it out"
            )
    return wanted


def _plain(value: Any) -> Any:
    """Lists of a JSON file as the tuples that they stand for."""
    return tuple(value) if isinstance(value, list) else value


def _try(model: Model, fields: Fields) -> None:
    """Raises InputError where these fields make no network for the model's states, or none that is smaller."""
    kind = type(model.network)
    try:
        with torch.device("meta"), torch.no_grad():
            network = kind(**fields).eval()
            network(**_inputs(model, network), return_dict=False)
    except Exception as error:  # whatever modules and kernels raise at sizes that do not go together
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise InputError(
            f"the config makes no {kind.__name__} that takes the states of {model.name} ({reason}); change fewer fields"
        ) from error
    student, teacher = parameters(network), parameters(model.network)
    if student >= teacher:
        raise InputError(
            f"the config gives {student:,} parameters, no fewer than the {teacher:,} of {model.name}; make it narrower "
            "or shallower"
        )


def _inputs(model: Model, network: Any) -> Fields:
    """One state and condition for a forward, of the right shapes and without values."""
    if isinstance(model, ClassDDPM):
        label = torch.zeros(1, dtype=torch.long) if model.conditional else None
        state = "sample" if model.family == "unet" else "hidden_states"
        return {state: torch.zeros(1, model.channels, *model.size), "timestep": torch.zeros(1), "class_labels": label}
    flux: Any = model
    if model.family in ("sd15", "sdxl", "sd3"):
        words = flux.dummy_condition().parts
        latent, usual = torch.zeros(1, *flux.latent_shape), {"timestep": torch.zeros(1)}
        usual["encoder_hidden_states"] = words["embeds"]
        if model.family == "sd3":
            return {**usual, "hidden_states": latent, "pooled_projections": words["pooled"]}
        size = {"text_embeds": words["pooled"], "time_ids": torch.zeros(1, 6)} if "pooled" in words else None
        return {**usual, "sample": latent, "added_cond_kwargs": size}
    given: Fields = {"hidden_states": torch.zeros(1, *flux.latent_shape), "timestep": torch.zeros(1)}
    text = torch.zeros(1, flux.text_length, network.config.joint_attention_dim)
    if model.family == "qwen-image":
        return {**given, "encoder_hidden_states": text, "img_shapes": [[(1, flux.side, flux.side)]]}
    axes = 4 if model.family in ("flux2-klein", "flux2-dev") else 3
    places = {"txt_ids": torch.zeros(flux.text_length, axes), "img_ids": torch.zeros(flux.tokens, axes)}
    given |= {**places, "encoder_hidden_states": text}
    if model.family != "chroma":
        given["guidance"] = torch.zeros(1) if network.config.guidance_embeds else None
    if "pooled_projection_dim" in network.config:
        given["pooled_projections"] = torch.zeros(1, network.config.pooled_projection_dim)
    return given


@dataclass(frozen=True)
class Candidate:
    """A network that a search may choose."""

    fields: Fields
    parameters: int
    widths: list[float]  # as shares of the teacher's
    depth: float

    @property
    def distortion(self) -> float:
        """0 where every width and the depth shrink alike."""
        logs = [math.log(share / self.depth) for share in self.widths]
        return max(logs) - min(logs) + abs(sum(logs) / len(logs))


def _search(model: Model, family: Family, fields: Fields, ratio: float) -> Fields:
    """Widths and depths of the network nearest to 1/ratio of the teacher's parameters.

    Among those that are equally near, the one whose width and depth shrink most alike, and then the deeper one.
    """
    if not 1 < ratio < math.inf:
        raise InputError(f"ratio={ratio:g} makes no smaller network; use a number above 1, such as 4")
    teacher = parameters(model.network)
    smaller = [c for c in candidates(model, fields) if c.parameters < teacher]
    if not smaller:
        raise InputError(
            f"{model.name} has no smaller network of its own shape; give a config instead of ratio={ratio:g}"
        )
    off = [abs(math.log(candidate.parameters * ratio / teacher)) for candidate in smaller]
    if min(off) > math.log(2):
        nearest = teacher / smaller[off.index(min(off))].parameters
        raise InputError(
            f"ratio={ratio:g} is out of reach for {model.name}, whose nearest network of its own shape is "
            f"{nearest:.3g} times smaller; ask for that, or give a config"
        )
    near = [candidate for candidate, far in zip(smaller, off, strict=True) if far <= min(off) + EQUAL]
    return min(near, key=lambda c: (round(c.distortion, 6), -c.depth)).fields


def candidates(model: Model, fields: Fields) -> Iterator[Candidate]:
    """Every network that a search for a student of the model looks at."""
    makers = {"sd15": _text_unets, "sdxl": _text_unets, "sd3": _sd3s}
    return makers.get(model.family, _even)(model, fields)


def _even(model: Model, fields: Fields) -> Iterator[Candidate]:
    """Every width at every depth. The count is linear in depths, so each width needs one network a depth and one."""
    family = FAMILIES[model.family]
    least = {name: min(1, fields[name]) for name in family.depths}
    most = max(fields[name] for name in family.depths)
    for width, shares in _widths(model, fields):
        base = _count(model, fields | width | least)
        slopes = {n: _count(model, fields | width | least | {n: least[n] + 1}) - base for n in family.depths}
        for step in range(1, most + 1):
            depth = {name: max(least[name], round(fields[name] * step / most)) for name in family.depths}
            more = sum(slopes[name] * (depth[name] - least[name]) for name in family.depths)
            yield Candidate(width | depth, base + more, shares, step / most)


def _text_unets(model: Model, fields: Fields) -> Iterator[Candidate]:
    """Every width with fewer layers a level and fewer transformer blocks a layer, in which the count is linear."""
    widths, heads, layers = (fields[name] for name in ("block_out_channels", "attention_head_dim", "layers_per_block"))
    given = fields["transformer_layers_per_block"]
    if not isinstance(layers, int) or fields["reverse_transformer_layers_per_block"] is not None:
        raise InputError(f"{model.name} has levels of different depths; give a config instead of a ratio")
    deep = [given] * len(widths) if isinstance(given, int) else list(given)
    # one number of heads stays, and they get narrower; heads by level stay as wide, and get fewer
    inside = [1] * len(widths) if isinstance(heads, int) else [w // n for w, n in zip(widths, heads, strict=True)]
    units = [math.lcm(fields["norm_num_groups"], heads if isinstance(heads, int) else one) for one in inside]
    seen = set()
    for k in range(1, max(widths) // min(units) + 1):
        scale = k * min(units) / max(widths)
        level = tuple(unit * max(1, round(w * scale / unit)) for w, unit in zip(widths, units, strict=True))
        if level in seen or any(a > b for a, b in zip(level, widths, strict=True)):
            continue
        seen.add(level)
        width: Fields = {"block_out_channels": level}
        if not isinstance(heads, int):
            width["attention_head_dim"] = tuple(w // one for w, one in zip(level, inside, strict=True))
        shares = [a / b for a, b in zip(level, widths, strict=True)]
        for count in range(1, layers + 1):
            one = width | {"layers_per_block": count}
            base = _count(model, fields | one | {"transformer_layers_per_block": (1,) * len(deep)})
            slopes = [0] * len(deep)
            for i in (i for i, n in enumerate(deep) if n > 1):
                more = tuple(1 + (i == j) for j in range(len(deep)))
                slopes[i] = _count(model, fields | one | {"transformer_layers_per_block": more}) - base
            for step in range(1, max(deep) + 1):
                blocks = tuple(max(1, round(n * step / max(deep))) for n in deep)
                more_ = sum(slope * (n - 1) for slope, n in zip(slopes, blocks, strict=True))
                depth = {"transformer_layers_per_block": blocks[0] if isinstance(given, int) else blocks}
                yield Candidate(one | depth, base + more_, shares, count * step / (layers * max(deep)))


def _sd3s(model: Model, fields: Fields) -> Iterator[Candidate]:
    """Every number of heads and of blocks; the second attention is in those blocks that come from blocks with one."""
    most, heads, dual = fields["num_layers"], fields["num_attention_heads"], set(fields["dual_attention_layers"])
    for n in range(1, heads + 1):
        width = {"num_attention_heads": n, "caption_projection_dim": n * fields["attention_head_dim"]}
        shallow = fields | width | {"num_layers": 2, "dual_attention_layers": ()}
        base = _count(model, shallow)
        slope = _count(model, shallow | {"num_layers": 3}) - base
        second = _count(model, shallow | {"dual_attention_layers": (0,)}) - base
        for layers in range(min(2, most), most + 1):
            kept = tuple(i for i in range(layers) if place_of(i, layers, most) in dual)
            count = base + (layers - 2) * slope + len(kept) * second
            yield Candidate(
                width | {"num_layers": layers, "dual_attention_layers": kept}, count, [n / heads], layers / most
            )


def _count(model: Model, fields: Fields) -> int:
    kind = type(model.network)
    key = kind, repr(sorted(fields.items()))
    if key not in COUNTED:
        with torch.device("meta"), Unfilled():
            COUNTED[key] = parameters(kind(**fields))
    return COUNTED[key]


class Unfilled(TorchFunctionMode):
    """Where weights are counted and never read, what fills them does nothing: half of a network's making."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("kaiming_uniform_", "uniform_", "normal_", "fill_", "zero_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _widths(model: Model, fields: Fields) -> Iterator[tuple[Fields, list[float]]]:
    """Widths up to the teacher's with their shares of it: heads of a transformer, channels of a UNet's levels."""
    if model.family != "unet":
        most = fields["num_attention_heads"]
        yield from (({"num_attention_heads": heads}, [heads / most]) for heads in range(1, most + 1))
        return
    widths, unit = tuple(fields["block_out_channels"]), fields["norm_num_groups"]
    least = max(unit, fields["attention_head_dim"] or 1)
    seen = set()
    for k in range(1, 2 * max(widths) // unit + 1):
        exact = [w * k * unit / (2 * max(widths)) for w in widths]
        # each level rounded down or up to whole groups, so that counts lie close to each other
        for level in itertools.product(*({unit * math.floor(w / unit), unit * math.ceil(w / unit)} for w in exact)):
            rises = all((a <= b) == (c <= d) for (a, b), (c, d) in zip(pairwise(level), pairwise(widths), strict=True))
            if min(level) >= least and rises and level not in seen:
                seen.add(level)
                yield {"block_out_channels": level}, [a / b for a, b in zip(level, widths, strict=True)]


def student_of(model: Model, network: Any, scales: tuple[float, ...] | None) -> Model:
    """The network in a pipeline of the teacher's class, with the teacher's other parts."""
    made_by = inspect.signature(type(model.pipeline).__init__).parameters
    # what a pipeline was told beside its parts, such as whether guidance leads away from zeros
    told = {k: v for k, v in model.pipeline.config.items() if k in made_by and k not in model.pipeline.components}
    pipeline = type(model.pipeline)(**{**told, **model.pipeline.components, model.PART: network})
    name = f"a student of {model.name}"
    if not isinstance(model, ClassDDPM):
        return type(model)(pipeline, name, model.resolution)  # type: ignore[arg-type]
    if model.family == "dit" and not scales:
        pipeline.labels = model.pipeline.labels  # no component; rows for scales would make it name wrong ones
    return model.of(pipeline, name, scales)
