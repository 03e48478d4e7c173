"""The families of pipelines that fieldsmith reads, and which verb trains which; a table that imports nothing heavy.

A family is one kind of denoiser with its text encoders, autoencoder and scheduler, in a file of its own. The methods
refuse models in this file's words, and a test runs every verb on every family to see that they and it agree.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from fieldsmith.errors import check_word

Way = Literal["LoRA", "full"]


@dataclass(frozen=True)
class Family:
    """A name, the diffusers pipelines that it reads, 'module:class' inside fieldsmith.models, and what it is."""

    name: str
    pipelines: tuple[str, ...]
    made_by: str
    condition: tuple[Literal["words", "classes", "nothing"], ...] = ("words",)
    """What a model may be asked for by."""
    sources: Literal["none", "optional", "required"] = "none"
    """Source images beside the words: what makes it an editor."""
    path: Literal["flow", "variance-preserving"] = "flow"
    adapters: bool = True
    """Whether diffusers loads LoRA files for it; where not, an adapter ships merged into a whole pipeline."""
    exports: tuple[str, ...] = ()
    """Key formats beside diffusers' own in which other tools read its LoRAs."""
    words_enter: Literal["nowhere", "inputs", "attention"] = "nowhere"
    """Where erase's methods inside text layers find words: in no layer of their own, in some layers' inputs (uce), in
    dual-stream attention too (eraseanything)."""
    shrinks: bool = False
    """Whether models/shrink.py can build a smaller network of its kind."""

    def model_class(self) -> Any:
        """The family's class, which imports torch and diffusers."""
        module, _, kind = self.made_by.partition(":")
        return getattr(importlib.import_module(f"fieldsmith.models.{module}"), kind)


FAMILIES = (
    Family("flux", ("FluxPipeline",), "flux:Flux", exports=("kohya", "comfyui"), words_enter="attention",
           shrinks=True),
    Family(
        "flux-kontext", ("FluxKontextPipeline",), "flux_kontext:FluxKontext", sources="optional",
        exports=("kohya", "comfyui"), words_enter="attention", shrinks=True,
    ),
    Family("chroma", ("ChromaPipeline",), "chroma:Chroma", exports=("kohya", "comfyui"), words_enter="attention",
           shrinks=True),
    Family("sd15", ("StableDiffusionPipeline",), "sd15:SD15", path="variance-preserving", exports=("kohya", "comfyui"),
           words_enter="inputs", shrinks=True),
    Family("sdxl", ("StableDiffusionXLPipeline",), "sdxl:SDXL", path="variance-preserving",
           exports=("kohya", "comfyui"), words_enter="inputs", shrinks=True),
    Family("sd3", ("StableDiffusion3Pipeline",), "sd3:SD3", exports=("kohya", "comfyui"), words_enter="attention",
           shrinks=True),
    Family("flux2-klein", ("Flux2KleinPipeline",), "flux2_klein:Flux2Klein", sources="optional",
           exports=("kohya", "comfyui"), shrinks=True),
    Family("flux2-dev", ("Flux2Pipeline",), "flux2_dev:Flux2Dev", sources="optional",
           exports=("kohya", "comfyui"), shrinks=True),
    Family("z-image", ("ZImagePipeline",), "z_image:ZImage", exports=("kohya", "comfyui")),
    Family("qwen-image", ("QwenImagePipeline",), "qwen_image:QwenImage", exports=("kohya", "comfyui"), shrinks=True),
    Family("qwen-image-edit", ("QwenImageEditPipeline", "QwenImageEditPlusPipeline"), "qwen_image_edit:QwenImageEdit",
           sources="required", exports=("kohya", "comfyui")),
    Family("dit", ("DiTPipeline",), "dit:DiT", condition=("classes",), path="variance-preserving", adapters=False,
           shrinks=True),
    Family("unet", ("DDPMPipeline", "DDIMPipeline"), "unet:UNet", condition=("classes", "nothing"),
           path="variance-preserving", adapters=False, shrinks=True),
)  # fmt: skip

# the ids under which pipelines of a family are published on the hub; messages name the nearest where one is misspelt
PUBLISHED: dict[str, tuple[str, ...]] = {
    "flux": ("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell"),
    "flux-kontext": ("black-forest-labs/FLUX.1-Kontext-dev",),
    "chroma": ("lodestones/Chroma1-HD", "lodestones/Chroma1-Base"),
    "sd15": ("stable-diffusion-v1-5/stable-diffusion-v1-5",),
    "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0",),
    "sd3": ("stabilityai/stable-diffusion-3-medium-diffusers", "stabilityai/stable-diffusion-3.5-medium",
            "stabilityai/stable-diffusion-3.5-large"),
    "flux2-klein": ("black-forest-labs/FLUX.2-klein-4B", "black-forest-labs/FLUX.2-klein-9B"),
    "flux2-dev": ("black-forest-labs/FLUX.2-dev",),
    "z-image": ("Tongyi-MAI/Z-Image-Turbo", "Tongyi-MAI/Z-Image"),
    "qwen-image": ("Qwen/Qwen-Image",),
    "qwen-image-edit": ("Qwen/Qwen-Image-Edit", "Qwen/Qwen-Image-Edit-2509"),
    "dit": ("facebook/DiT-XL-2-256", "facebook/DiT-XL-2-512"),
    "unet": ("google/ddpm-cifar10-32", "google/ddpm-celebahq-256"),
}  # fmt: skip

# clauses that messages add to a model's name
NO_STEPS = "is on rectified flow, whose steps have no variance to learn; use guide, jacobian-floor, or another method"
NO_SOURCES = (
    "draws from words alone; edit needs an editing model such as zoo:scenes-kontext or a FLUX.1 Kontext pipeline"
)
NOTHING_SMALLER = "has no smaller network that fieldsmith can build; use one of family "
NEVER_ALONE = "edits images and never draws from words alone, as {verb} would have it do; use `edit`, or another family"


@dataclass(frozen=True)
class Support:
    """How a verb trains a family, none of the ways where it does not; `note` says why not, or under what condition."""

    ways: tuple[Way, ...]
    note: str = ""


BOTH: tuple[Way, ...] = ("LoRA", "full")


def named(name: str) -> Family:
    """The family of this name. Raises InputError where there is none."""
    check_word(name, tuple(family.name for family in FAMILIES), "fieldsmith's families")
    return next(family for family in FAMILIES if family.name == name)


def nearest(name: str, zoo: Iterable[str] = ()) -> str | None:
    """The published id or zoo name that a name which is none may be meant for, with or without its 'org/' or 'zoo:'."""
    known = [*zoo, *(id for ids in PUBLISHED.values() for id in ids)]
    spelt = {one.lower(): one for one in known} | {re.split("[/:]", one.lower())[-1]: one for one in reversed(known)}
    near = difflib.get_close_matches(name.lower(), spelt, n=1, cutoff=0.8)
    return spelt[near[0]] if near and spelt[near[0]] != name else None


def supports(family: Family, verb: str) -> Support:
    """How `verb` trains models of this family, or a clause about such a model that says why it does not.

    Raises InputError at a verb that trains nothing.
    """
    check_word(verb, tuple(_RULES), "the verbs that train")
    if family.sources == "required" and verb != "edit":
        return Support((), NEVER_ALONE.format(verb=verb))
    return _RULES[verb](family)


def _align(family: Family) -> Support:
    return Support(BOTH, "without a source image" if family.sources == "optional" else "")


def _edit(family: Family) -> Support:
    return Support((), NO_SOURCES) if family.sources == "none" else Support(BOTH)


def _erase(family: Family) -> Support:
    notes = ["without a source image"] if family.sources == "optional" else []
    left_out = [] if family.path == "flow" else ["eraseflow"]
    left_out += {"nowhere": ["uce", "eraseanything"], "inputs": ["eraseanything"], "attention": []}[family.words_enter]
    if left_out:
        notes.append(f"by every method but {' and '.join(left_out)}")
    if "nothing" in family.condition:
        notes.append("a model of classes")
    return Support(BOTH, "; ".join(notes))


def _distill(family: Family) -> Support:
    if not family.shrinks:
        return Support((), nothing_smaller())
    note = "a student's every weight trains"
    if family.sources == "optional":
        note += ", without a source image"
    if "nothing" in family.condition:
        note += "; the teacher needs classes and a null class, since without them there is no guidance to keep"
    return Support(("full",), note)


def _sharpen(family: Family) -> Support:
    note = "every weight trains"
    if family.sources == "optional":
        note += ", without a source image"
    if "nothing" in family.condition:
        note += "; without classes, or with a null class"
    if "words" in family.condition:
        note += "; by the methods that need no learned variance"
    if not family.shrinks:
        note += ", but `guide`, which needs a smaller network"
    return Support(("full",), note)


def nothing_smaller() -> str:
    """Why a family that does not shrink has no students, and which families do."""
    return NOTHING_SMALLER + ", ".join(family.name for family in FAMILIES if family.shrinks)


_RULES: dict[str, Callable[[Family], Support]] = {
    "align": _align,
    "edit": _edit,
    "erase": _erase,
    "distill": _distill,
    "sharpen": _sharpen,
}
VERBS = tuple(_RULES)

# words in the keys of LoRA files, dots written as underscores, that only one family's layers have; most telling first
_BLOCK = r"(?<!single_)transformer_blocks_\d+_"
MARKS = (
    ("sd15 or sdxl", r"(down|up)_blocks_\d+_|mid_block_|(input|output)_blocks_\d+_|middle_block_"),
    ("z-image", r"(layers|refiner)_\d+_(attention_(to_|qkv|out)|feed_forward_w\d|adaLN_modulation)"),
    ("chroma", r"distilled_guidance_layer"),
    ("flux2-klein or flux2-dev", rf"to_qkv_mlp_proj|(double|single)_stream_modulation|{_BLOCK}ff(_context)?_linear_in"),
    ("qwen-image", rf"{_BLOCK}(img|txt)_(mlp|mod)"),
    ("flux", r"(img|txt)_mod_lin|modulation_lin|single_transformer_blocks_\d+_norm_linear|vector_in"),
    ("flux or chroma", r"single_transformer_blocks_\d+_(proj_mlp|attn_to_[qkv])"),
    ("flux, chroma, flux2-klein or flux2-dev", r"(double|single)_blocks_\d+_|single_transformer_blocks"),
    ("sd3", rf"{_BLOCK}attn2_|joint_blocks_\d+_"),
    ("flux, chroma, flux2-klein, flux2-dev, sd3 or qwen-image", rf"{_BLOCK}attn_add_[qkv]_proj"),
)


def family_of_lora(keys: Iterable[str]) -> str | None:
    """The family, or families, whose layers the keys of a LoRA file name; None where they do not tell."""
    words = "\n".join(keys).replace(".", "_")
    return next((name for name, mark in MARKS if re.search(mark, words)), None)


def same_family(family: str, named: str) -> bool:
    """Whether a family is one of those that `family_of_lora` names, or an editor that is made from one."""
    return any(f"{family}-".startswith(f"{name}-") for name in re.split(", | or ", named))
