"""A model in one .safetensors file, in the layout of its first release, which sd-scripts and ComfyUI keep.

In: the file, and the pipeline folder or hub id that its config, tokenizers and whatever it does not hold come from.
Out: the parts of a pipeline that are in the file. The names of its weights tell its family before they are read.
"""

from __future__ import annotations

import importlib
import pathlib
from collections.abc import Mapping
from typing import Any

from fieldsmith.errors import InputError
from fieldsmith.models.families import family_of_lora, same_family

SUFFIX = ".safetensors"
AUTOENCODER = ("first_stage_model.", "vae.")  # what its weights' names begin with
ENCODERS = ("cond_stage_model.", "conditioner.embedders.", "text_encoders.")


def single_file(name: str, config_from: str) -> pathlib.Path | None:
    """The file that a name is, None where it is a pipeline. Raises InputError where it lacks `config_from`, or where
    that goes with no file."""
    path = pathlib.Path(name).expanduser()
    if name.endswith(SUFFIX) and path.is_file():
        if not config_from:
            raise InputError(
                f"'{name}' is one file, without config and tokenizer; add --config-from FOLDER_OR_ID, a pipeline of "
                "its family"
            )
        return path
    if config_from:
        raise InputError(f"config_from '{config_from}' goes with a {SUFFIX} file, and '{name}' is none; leave it out")
    return None


def check_file(file: pathlib.Path, family: str, config_from: str) -> list[str]:
    """The names of its weights. Raises InputError where they cannot be read, or are of another family."""
    from safetensors import SafetensorError, safe_open  # late

    try:
        with safe_open(file, "pt") as weights:
            keys = list(weights.keys())
    except (OSError, SafetensorError) as error:
        raise InputError(f"'{file}' is no safetensors file, or was cut short ({error}); download it again") from error
    found = family_of_lora(key for key in keys if not key.startswith((*AUTOENCODER, *ENCODERS)))
    if found == "sd15 or sdxl":
        found = "sdxl" if any(".label_emb." in key for key in keys) else "sd15"
    if found is None or not same_family(family, found):
        what = f"is of family {found}" if found else "holds no denoiser of a known family"
        raise InputError(f"'{file}' {what}, and '{config_from}' is of family {family}; give a pipeline of its family")
    return keys


def parts(file: pathlib.Path, index: Mapping[str, Any], denoiser: str, **options: Any) -> dict[str, Any]:
    """The modules that the file holds, by their names in the pipeline; `options` are diffusers' from_single_file's.

    Encoders of words that are not in the file are left to the pipeline. Raises InputError where they are there unread.
    """
    import diffusers  # late
    from diffusers.loaders import single_file_utils as by_diffusers
    from safetensors.torch import load_file

    weights = load_file(file)
    found = {}
    for part, made_by in index.items():
        if part.startswith("_") or not isinstance(made_by, list) or not all(made_by):
            continue
        if part == denoiser or (part == "vae" and any(key.startswith(AUTOENCODER) for key in weights)):
            kind = getattr(diffusers, made_by[1])
            found[part] = kind.from_single_file(dict(weights), subfolder=part, **options)
        elif part.startswith("text_encoder"):
            kind = getattr(importlib.import_module(made_by[0]), made_by[1])
            create: Any = None
            if by_diffusers.is_clip_model_in_single_file(kind, weights):
                create = by_diffusers.create_diffusers_clip_model_from_ldm
            elif part == "text_encoder_3" and by_diffusers.is_t5_in_single_file(weights):
                create = by_diffusers.create_diffusers_t5_model_from_checkpoint
            if create:
                found[part] = create(kind, checkpoint=dict(weights), subfolder=part, **options).eval()
    if any(key.startswith(ENCODERS) for key in weights) and not any(part.startswith("text_encoder") for part in found):
        raise InputError("its encoder of words is in no layout that diffusers reads; save the denoiser alone")
    return found
