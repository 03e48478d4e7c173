"""Where pipelines become fields: between the samplers and the methods, and the only place that imports diffusers.

In: a diffusers pipeline folder, a hub id or a zoo name, and LoRA files. Out: a `Model` with encode, predict, decode,
adapters and a frozen reference. Commands import this to refuse a name that is none, so torch, and what brings it, is
imported where a model is loaded (marked `late`).
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import pathlib
import re
import socket
import sys
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fieldsmith import processes
from fieldsmith.errors import InputError
from fieldsmith.models import folders
from fieldsmith.models.families import FAMILIES, Family, named, nearest
from fieldsmith.models.single_file import SUFFIX, check_file, parts, single_file
from fieldsmith.run import base_of

if TYPE_CHECKING:
    import torch

    from fieldsmith.models.core import Model

# transformers tells every importer that it has no torchvision, which nothing here needs
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision" not in record.getMessage()
)

ZOO = pathlib.Path(__file__).parent.parent / "zoo"
CONNECT = 3.0  # seconds for a first word with the hub
WEIGHTS = re.compile(r"(?:diffusion_pytorch_)?model(?:\.(\w+))?(?:-\d+-of-\d+)?\.safetensors")  # 1: the variant


def load(
    name: str | pathlib.Path,
    resolution: int | None = None,
    dtype: torch.dtype | None = None,
    adapter: str | pathlib.Path | Sequence[str | pathlib.Path] = (),
    config_from: str | pathlib.Path = "",
) -> Model:
    """The model in a pipeline folder, under a hub id ('org/name'), in the zoo ('zoo:shapes-flux') or of a finished run,
    or in one .safetensors file, of which `config_from`, a folder or hub id, has the config, tokenizers and what else it
    lacks.

    `resolution` is the side of its images where it is not the family's default, `dtype` that of its weights (float32).
    It comes on the GPU where there is one. Each `adapter`, 'FILE' or 'FILE:scale', becomes part of its frozen weights.
    Raises InputError, in a sentence with the fix, at anything that is not a whole pipeline of a known family in
    safetensors.
    """
    name = str(name)
    sources: list[str | pathlib.Path] = [adapter] if isinstance(adapter, (str, pathlib.Path)) else list(adapter)
    if found := base_of(name):
        name, sources, config_from = found.model, [*found.adapter, *sources], found.config_from
    file = single_file(name, str(config_from))
    source = str(config_from) if file else name
    folder = pipeline_folder(source) or offline_copy(source)
    with _quiet():  # before anything of transformers is imported: it tells every importer about torchvision
        index = _index(source, folder)
        family = _family(source, index)
        if file:
            check_file(file, family.name, source)
        if sources:
            check_adapters(family.name, name, *sources)  # before gigabytes are read
        import diffusers  # late
        import torch

        from fieldsmith.models.core import check_size

        folders.check_index(source, index)
        made_by = family.model_class()
        if folder:
            rest = {part: kind for part, kind in index.items() if not (file and part == made_by.PART)}
            folders.check_components(source, folder, rest)
        variant = _variant(source, folder, index) if folder else None
        try:
            network = {}
            if file:
                options = {"config": str(folder or source), "local_files_only": folder is not None}
                network = parts(file, index, made_by.PART, torch_dtype=dtype or torch.float32, **options)
            elif processes.sharded():
                # fsdp is imported where it is asked for
                from fieldsmith.models.sharding import load_sharded

                folder = folder or pathlib.Path(diffusers.DiffusionPipeline.download(name, use_safetensors=True))
                kind = getattr(diffusers, index[made_by.PART][1])
                network = {made_by.PART: load_sharded(kind, folder / made_by.PART, dtype or torch.float32, variant)}
            pipeline = getattr(diffusers, index["_class_name"]).from_pretrained(
                folder or source,
                use_safetensors=True,
                local_files_only=folder is not None,
                torch_dtype=dtype or torch.float32,
                variant=variant,
                **network,
                **_absent(index),
                **made_by.components(str(folder or source), local_files_only=folder is not None),
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
    merge_adapters(model, sources)
    return model


def load_adapter(model: Model, source: str | pathlib.Path, start: bool = False) -> None:
    """Attach a saved LoRA of the denoiser, of any trainer's keys, as if `model.adapt` had made it.

    `source` is a folder that holds pytorch_lora_weights.safetensors or one other safetensors file, or that file. With
    `start` training goes on from it, and `model.reference()` is the model with it as it is now. Raises InputError where
    there is none, where it does not fit the model, or is no plain LoRA.
    """
    from fieldsmith.models import adapters, changes, export  # late

    check_adapters(model.family, model.name, source)
    model._refuse_second_training()
    file, sizes = lora_file(pathlib.Path(source)), export.sizes_of(model.network)
    with adapters.real():
        contents = adapters.read(file, model.family, sizes, model.name, _by_diffusers(model))
    use = "; as part of the base it goes in with --adapter (load(..., adapter=...))"
    if contents.encoders:
        raise InputError(f"'{file}' trains {' and '.join(contents.encoders)} too, of which nothing trains here{use}")
    with adapters.real():
        adapter = changes.low_rank(contents, sizes, use)
    model.attach(adapter, start)


def merge_adapters(model: Model, adapter: str | pathlib.Path | Sequence[str | pathlib.Path]) -> None:
    """Make adapters part of a model's frozen weights, one after the other: 'FILE' or 'FILE:scale' each.

    Of any trainer's keys and of the kinds LoRA, LoCon, DoRA, LoHa and LoKr; text encoders' layers too. What was taken
    is said on stderr. Raises InputError as `load_adapter`, before any weight changes.
    """
    from fieldsmith.models import adapters, changes, export  # late

    sources = [adapter] if isinstance(adapter, (str, pathlib.Path)) else list(adapter)
    if not sources:
        return
    check_adapters(model.family, model.name, *sources)
    model._refuse_second_training()
    sizes, convert = export.sizes_of(model.network), _by_diffusers(model)
    parsed = [adapters.parse(source) for source in sources]
    read = [adapters.read(lora_file(path), model.family, sizes, model.name, convert) for path, _ in parsed]
    for contents, (_, scale) in zip(read, parsed, strict=True):
        said = changes.merge(model, contents, scale)
        if processes.is_main():
            print(f"adapter {said}", file=sys.stderr)
    model.adapters = (*model.adapters, *map(str, sources))


def check_adapters(family: str, name: str, *sources: str | pathlib.Path) -> None:
    """Raises InputError where the family has no adapters, or where names and headers tell that one does not fit: it is
    no file, has a scale that is no number, or keys of another family."""
    from safetensors import SafetensorError, safe_open  # late

    from fieldsmith.models import adapters

    for source in sources:
        path = adapters.parse(source)[0]
        if not named(family).adapters:
            raise InputError(f"family {family} has no adapter files: its models are saved whole, so load '{source}'")
        file = lora_file(path)
        try:
            with safe_open(file, "pt") as weights:
                foreign = adapters.of_another_family(weights.keys(), family, name, file)
        except (OSError, SafetensorError) as error:
            raise InputError(f"'{file}' could not be read as a LoRA ({error}); give a safetensors file") from error
        if foreign:
            raise InputError(foreign)


def _by_diffusers(model: Model) -> Callable[[pathlib.Path], dict[str, Any]]:
    """What reads a file in any format that diffusers knows: weights and alphas under diffusers' keys."""

    def convert(file: pathlib.Path) -> dict[str, Any]:
        import torch  # late

        with _quiet():
            read = model.pipeline.lora_state_dict(
                str(file.parent), weight_name=file.name, use_safetensors=True, local_files_only=True,
                return_alphas=True, return_lora_metadata=True,
            )  # fmt: skip
        alphas = (read[1] or {}) if len(read) == 3 else {}  # not all know of alphas
        return {**read[0], **{key: torch.tensor(float(alpha)) for key, alpha in alphas.items()}}

    return convert


@dataclass(frozen=True)
class Denoiser:
    """What a pipeline's index and its denoiser's config tell: the family, and the sizes of every layer."""

    family: Family
    sizes: Mapping[str, tuple[int, ...]]


def denoiser_of(name: str | pathlib.Path) -> Denoiser:
    """A pipeline's denoiser without its weights, neither read nor fetched; `name` as `load` takes it.

    Raises InputError as `load` does.
    """
    name = str(name)
    folder = pipeline_folder(name) or offline_copy(name)
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
    """Where the pipeline, or the file of a whole model, lies on this machine; None for a hub id."""
    if name.startswith("zoo:"):
        known = zoo_names()
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known) or 'none, this zoo is empty'}"
            raise InputError(f"'{name}' is not in the zoo; {hint}")
        return ZOO / name.removeprefix("zoo:")
    folder = pathlib.Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() and name.endswith(SUFFIX):  # a whole model in one file
        return folder
    if folder.exists():
        raise InputError(f"'{name}' is a file, not a diffusers pipeline folder; give the folder with model_index.json")
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return None
    raise InputError(
        f"the folder '{name}' does not exist{_meant(name)}; give a diffusers pipeline folder, a hub id (org/name) or "
        "zoo:NAME"
    )


def zoo_names() -> list[str]:
    return sorted(f"zoo:{index.parent.name}" for index in ZOO.glob("*/model_index.json"))


def _meant(name: str) -> str:
    """What a message asks where a name is nearly one that is known."""
    near = nearest(name, zoo_names())
    return f" (did you mean '{near}'?)" if near else ""


def offline_copy(name: str) -> pathlib.Path | None:
    """Where an earlier download of a hub id lies, where the hub cannot be asked now; None where it can.

    Raises InputError, at once, where there is neither. huggingface_hub itself tries for half a minute.
    """
    from huggingface_hub import constants, snapshot_download  # late

    host = urllib.parse.urlsplit(constants.ENDPOINT)
    why = f"no network: {host.hostname} cannot be reached"
    if constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE is set"
    elif urllib.request.getproxies():
        return None  # whatever the proxy reaches
    else:
        try:
            socket.create_connection((str(host.hostname), host.port or 443), timeout=CONNECT).close()
            return None
        except OSError:
            pass
    try:
        return pathlib.Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError) as error:
        raise InputError(
            f"'{name}' is not a folder here and was not fetched before, and {why}; connect, or give a "
            f"folder{_meant(name)}"
        ) from error


def _index(name: str, folder: pathlib.Path | None) -> dict[str, Any]:
    if folder is None:
        from diffusers import DiffusionPipeline  # late
        from huggingface_hub import constants
        from huggingface_hub.errors import GatedRepoError

        try:
            return dict(DiffusionPipeline.load_config(name))
        except Exception as error:
            if isinstance(error.__context__, GatedRepoError):
                raise InputError(
                    f"'{name}' is gated: accept its licence at {constants.ENDPOINT}/{name}, then `hf auth login`"
                ) from error
            raise InputError(
                f"'{name}' is not a folder here, and no pipeline of that name could be fetched from the hub"
                f"{_meant(name)}; check the name and the network, or give a folder ({_first_line(error)})"
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
    if not source.exists():
        raise InputError(f"the adapter '{source}' does not exist; give a LoRA's safetensors file, or its folder")
    for usual in ("pytorch_lora_weights.safetensors", "adapter_model.safetensors"):  # diffusers' name, and peft's
        if (source / usual).is_file():
            return source / usual
    files = sorted(source.glob("*.safetensors"))
    if len(files) != 1:
        raise InputError(f"'{source}' holds no LoRA: it has no pytorch_lora_weights.safetensors; name the file itself")
    return files[0]


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
