"""Where pipelines become fields: between the samplers and the methods, and the only place that imports diffusers.

In: a diffusers pipeline folder, a hub id or a zoo name, and LoRA files. Out: a `Model` with encode, predict, decode,
adapters and a frozen reference. Commands import this to refuse a name that is none, so torch, and what brings it, is
imported where a model is loaded (marked `late`).
"""

from __future__ import annotations

import contextlib
import logging
import pathlib
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fieldsmith import processes
from fieldsmith.errors import InputError
from fieldsmith.models import folders
from fieldsmith.models.families import FAMILIES, Family, family_of_lora

if TYPE_CHECKING:
    import torch

    from fieldsmith.models.core import Model

# transformers tells every importer that it has no torchvision, which nothing here needs
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision" not in record.getMessage()
)

ZOO = pathlib.Path(__file__).parent.parent / "zoo"
WEIGHTS = re.compile(r"(?:diffusion_pytorch_)?model(?:\.(\w+))?(?:-\d+-of-\d+)?\.safetensors")  # 1: the variant


def load(name: str | pathlib.Path, resolution: int | None = None, dtype: torch.dtype | None = None) -> Model:
    """The model in a pipeline folder, under a hub id ('org/name') or in the zoo ('zoo:shapes-flux').

    `resolution` is the side of its images where it is not the family's default, `dtype` that of its weights (float32).
    It comes on the GPU where there is one.
    Raises InputError, in a sentence with the fix, at anything that is not a whole pipeline of a known family in
    safetensors.
    """
    name = str(name)
    folder = pipeline_folder(name)
    with _quiet():  # before anything of transformers is imported: it tells every importer about torchvision
        index = _index(name, folder)
        family = _family(name, index)
        import diffusers  # late
        import torch

        from fieldsmith.models.core import check_size

        folders.check_index(name, index)
        if folder:
            folders.check_components(name, folder, index)
        made_by = family.model_class()
        variant = _variant(name, folder, index) if folder else None
        try:
            network = {}
            if processes.sharded():
                # fsdp is imported where it is asked for
                from fieldsmith.models.sharding import load_sharded

                folder = folder or pathlib.Path(diffusers.DiffusionPipeline.download(name, use_safetensors=True))
                kind = getattr(diffusers, index[made_by.PART][1])
                network = {made_by.PART: load_sharded(kind, folder / made_by.PART, dtype or torch.float32, variant)}
            pipeline = getattr(diffusers, index["_class_name"]).from_pretrained(
                folder or name,
                use_safetensors=True,
                local_files_only=folder is not None,
                torch_dtype=dtype or torch.float32,
                variant=variant,
                **network,
                **_absent(index),
                **made_by.components(str(folder or name), local_files_only=folder is not None),
            )
            pipeline.to(processes.device())
        except Exception as error:  # diffusers, transformers and safetensors each have their own
            raise InputError(f"'{name}' could not be loaded, is it whole? ({_first_line(error)})") from error
    with processes.together():
        folders.check_sound(name, pipeline.components)
    try:
        model: Model = made_by.of_folder(pipeline, name, resolution, folder)
    except InputError:
        raise
    except Exception as error:  # what our families make of entries that no pipeline has
        raise InputError(f"the configs of '{name}' make no model ({_first_line(error)}); save it again") from error
    check_size(model)
    return model


def load_adapter(model: Model, source: str | pathlib.Path) -> None:
    """Attach a saved LoRA, of ours, kohya's, ComfyUI's or any that diffusers reads, as if `model.adapt` had made it.

    `source` is a folder that holds pytorch_lora_weights.safetensors or one other safetensors file, or that file. Raises
    InputError where there is none, or where it does not fit the model.
    """
    from fieldsmith.models import export  # late

    if not hasattr(model.pipeline, "load_lora_weights"):
        raise InputError(f"family {model.family} has no adapter files: its models are saved whole, so load '{source}'")
    model._refuse_second_training()
    file = lora_file(pathlib.Path(source))
    sizes, tensors = export.sizes_of(model.network), export.read_file(file)[0]
    alphas = None
    if export.speaks_original(tensors, model.family, sizes):
        # here and not by diffusers, which takes fused layers for those of full-size FLUX.1, loses what lies outside of
        # its blocks and knows no such keys of SD3
        adapter = export.imported(tensors, model.family, sizes, model.name)
        state, metadata = export.to_diffusers(adapter, model.PART)
    else:
        state, alphas, metadata = _read_by_diffusers(model, file, sizes)
    _attach(model, state, alphas, metadata)


def _read_by_diffusers(model: Model, file: pathlib.Path, sizes: Mapping[str, tuple[int, int]]) -> tuple[Any, Any, Any]:
    """Weights, alphas and metadata of a LoRA in any format that diffusers knows; each has a layer of its size."""
    with _quiet():
        try:
            read = model.pipeline.lora_state_dict(
                str(file.parent), weight_name=file.name, use_safetensors=True, local_files_only=True,
                return_alphas=True, return_lora_metadata=True,
            )  # fmt: skip
        except Exception as error:
            unread = f"'{file}' could not be read as a LoRA ({_first_line(error)})"
            raise InputError(_of_another_family(model, file) or unread) from error
    state, alphas, metadata = read if len(read) == 3 else (read[0], None, read[1])  # not all know of alphas
    for key, weight in state.items():
        layer, _, half = key.removeprefix(f"{model.PART}.").partition(".lora")
        size = sizes.get(layer) if key.startswith(f"{model.PART}.") and half else None
        matrix = weight.ndim > 1
        wide = half.startswith("_A") and size is not None and matrix and weight.shape[1] != size[0]
        tall = half.startswith("_B") and size is not None and matrix and weight.shape[0] != size[1]
        if size is None or wide or tall or not (matrix or half == "_alpha"):
            raise InputError(
                _of_another_family(model, file)
                or f"the LoRA in '{file}' does not fit {model.name}: '{key}' {tuple(weight.shape)} has no layer "
                "of its size in the denoiser; load it on the model that it was trained on"
            )
    _check_pairs(file, state)
    if not state:
        raise InputError(_of_another_family(model, file) or f"the LoRA in '{file}' has no weights for any layer")
    return state, alphas, metadata


def _check_pairs(file: pathlib.Path, state: Any) -> None:
    """Raises InputError at a layer that has one of a LoRA's two weights, or two of different ranks."""
    for key, weight in state.items():
        half = next((half for half in (".lora_A", ".lora_B") if half in key), None)
        if half is None:
            continue
        other = state.get(key.replace(half, ".lora_B" if half == ".lora_A" else ".lora_A"))
        if other is None:
            raise InputError(
                f"the LoRA in '{file}' is not whole: '{key}' has no other half; download or export it again"
            )
        A, B = (weight, other) if half == ".lora_A" else (other, weight)
        if A.shape[0] != B.shape[1]:
            raise InputError(
                f"the LoRA in '{file}' is not whole: the halves of '{key}' are {tuple(B.shape)} and {tuple(A.shape)}, "
                "which do not multiply; download or export it again"
            )


def _attach(model: Model, state: Any, alphas: Any, metadata: Any) -> None:
    from torch import random  # late

    from fieldsmith.models.core import LoraSpec

    with _quiet(), random.fork_rng():  # weights are drawn before they are overwritten
        model.network.load_lora_adapter(
            state, network_alphas=alphas, metadata=metadata, adapter_name="default", prefix=model.PART
        )
    config: Any = model.network.peft_config["default"]
    model._adapter_attached(LoraSpec("loaded", config.r, config.lora_alpha, config.lora_dropout))


@dataclass(frozen=True)
class Denoiser:
    """What a pipeline's index and its denoiser's config tell: the family, and (in, out) of every linear layer."""

    family: Family
    sizes: Mapping[str, tuple[int, int]]


def denoiser_of(name: str | pathlib.Path) -> Denoiser:
    """A pipeline's denoiser without its weights, neither read nor fetched; `name` as `load` takes it.

    Raises InputError as `load` does.
    """
    name = str(name)
    folder = pipeline_folder(name)
    with _quiet():
        index = _index(name, folder)
        family = _family(name, index)
        import diffusers  # late
        import torch

        from fieldsmith.models.export import part_of, sizes_of

        part = part_of(family.name)
        try:
            kind = getattr(diffusers, index[part][1])
            config = kind.load_config(folder or name, subfolder=part, local_files_only=folder is not None)
            with torch.device("meta"):
                return Denoiser(family, sizes_of(kind.from_config(config)))
        except Exception as error:  # whatever diffusers and the hub raise at half a pipeline
            raise InputError(
                f"the {part} of '{name}' could not be read, is it whole? ({_first_line(error)})"
            ) from error


def pipeline_folder(name: str) -> pathlib.Path | None:
    """Where the pipeline lies on this machine; None for a hub id."""
    if name.startswith("zoo:"):
        known = sorted(f"zoo:{index.parent.name}" for index in ZOO.glob("*/model_index.json"))
        if name not in known:
            raise InputError(f"'{name}' is not in the zoo; known: {', '.join(known) or 'none, this zoo is empty'}")
        return ZOO / name.removeprefix("zoo:")
    folder = pathlib.Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"'{name}' is a file, not a diffusers pipeline folder; give the folder with model_index.json")
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return None
    raise InputError(
        f"the folder '{name}' does not exist; give a diffusers pipeline folder, a hub id (org/name) or zoo:NAME"
    )


def _index(name: str, folder: pathlib.Path | None) -> dict[str, Any]:
    if folder is None:
        from diffusers import DiffusionPipeline  # late

        try:
            return dict(DiffusionPipeline.load_config(name))
        except Exception as error:
            raise InputError(
                f"'{name}' is not a folder here, and no pipeline of that name could be fetched from the hub; check the "
                f"name and the network, or give a folder ({_first_line(error)})"
            ) from error
    return folders.read_index(name, folder)


def _family(name: str, index: dict[str, Any]) -> Family:
    kind = index.get("_class_name")
    for family in FAMILIES:
        if kind in family.pipelines:
            return family
    known = ", ".join(pipeline for family in FAMILIES for pipeline in family.pipelines)
    raise InputError(f"'{name}' is a {kind}, which is not supported; supported: {known}")


def _variant(name: str, folder: pathlib.Path, index: dict[str, Any]) -> str | None:
    """Which variant of the weights to read, such as fp16: the full ones where every component has them.

    Raises InputError where components without full weights share no variant.
    """
    variants: dict[str, set[str]] = {}
    for part in index:
        files = (folder / part).glob("*.safetensors") if isinstance(index[part], list) else ()
        known = {match[1] for file in files if (match := WEIGHTS.fullmatch(file.name))}
        if known and None not in known:
            variants[part] = known
    if not variants:
        return None
    common = set.intersection(*variants.values())
    if not common:
        listed = "; ".join(f"{part}: {', '.join(sorted(known))}" for part, known in variants.items())
        raise InputError(f"'{name}' has no variant of its weights that is whole ({listed}); download one again")
    return min(common)


def _absent(index: dict[str, Any]) -> dict[str, None]:
    """The components that a pipeline was saved without, which diffusers wants named again."""
    return {part: None for part, made_by in index.items() if isinstance(made_by, list) and not any(made_by)}


def lora_file(source: pathlib.Path) -> pathlib.Path:
    """The file of a LoRA folder, or the file itself. Raises InputError where there is none."""
    if source.is_file():
        return source
    if (source / "pytorch_lora_weights.safetensors").is_file():
        return source / "pytorch_lora_weights.safetensors"
    files = sorted(source.glob("*.safetensors"))
    if len(files) != 1:
        raise InputError(f"'{source}' holds no LoRA: it has no pytorch_lora_weights.safetensors; name the file itself")
    return files[0]


def _of_another_family(model: Model, file: pathlib.Path) -> str | None:
    """The message for a LoRA whose keys name layers of another family; None where they do not."""
    from safetensors import safe_open  # late

    try:
        with safe_open(file, "pt") as weights:  # type: ignore[no-untyped-call]
            family = family_of_lora(weights.keys())
    except Exception:  # safetensors has its own, and then there are no keys to tell from
        return None
    if family is None or any(f"{model.family}-".startswith(f"{name}-") for name in re.split(", | or ", family)):
        return None  # an editing family takes the LoRAs of the one that it is made from
    return (
        f"the LoRA in '{file}' seems to be made for family {family}, not for {model.family} as {model.name} is; "
        "load it on a model of its own family"
    )


_first_line = folders.first_sentence


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Only errors from the three libraries that load, and no bars but those of downloads; as it was afterwards."""
    from diffusers.utils import logging as of_diffusers  # late
    from huggingface_hub.utils import logging as of_hub
    from transformers.utils import logging as of_transformers

    libraries = (of_diffusers, of_hub, of_transformers)
    verbosity = [library.get_verbosity() for library in libraries]
    barred = [library for library in (of_diffusers, of_transformers) if library.is_progress_bar_enabled()]
    try:
        for library in libraries:
            library.set_verbosity(logging.ERROR)
        for library in barred:
            library.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations between those libraries
            yield
    finally:
        for library, level in zip(libraries, verbosity, strict=True):
            library.set_verbosity(level)
        for library in barred:
            library.enable_progress_bar()
