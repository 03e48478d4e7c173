"""A network that no process holds as a whole: FSDP2, under the settings of accelerate's plugin.

In: a folder of safetensors shards. Out: a network of which each process has its part of every weight; weights go from
the files straight to their places, so that a process needs memory for its part and what it reads at the moment.
"""

from __future__ import annotations

import json
import pathlib
import warnings
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from fieldsmith import processes


def load_sharded(kind: Any, folder: pathlib.Path, dtype: torch.dtype, variant: str | None = None) -> Any:
    """A denoiser of a diffusers class from its folder, a part of each weight in every process.

    Raises ValueError where the files lack a weight or hold one of another shape.
    """
    with init_empty_weights(include_buffers=False):
        network = kind.from_config(kind.load_config(str(folder))).to(dtype)
    network.eval().requires_grad_(False)
    shard(network)
    place = processes.device()
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    network.to_empty(device=place)
    with torch.no_grad():
        for name, buffer in network.named_buffers():
            buffer.copy_(buffers[name])
        _fill(dict(network.named_parameters()), _files(folder, variant))
    return network


def shard(network: nn.Module) -> None:
    """Each process keeps a part of every weight, and gathers a block's whole weights while the block runs."""
    # FSDP2 hands views on, which nothing here writes to
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    plugin = FullyShardedDataParallelPlugin()
    options: dict[str, Any] = {"reshard_after_forward": plugin.reshard_after_forward}
    if plugin.cpu_offload:
        options["offload_policy"] = plugin.cpu_offload
    for blocks in (part for part in network.children() if isinstance(part, nn.ModuleList)):
        for block in blocks:
            fully_shard(block, **options)
    fully_shard(network, **options)


def _files(folder: pathlib.Path, variant: str | None) -> list[pathlib.Path]:
    """Those that an index names, where there is one, as diffusers reads them; else all of the variant."""
    ending = f".safetensors.index.{variant}.json" if variant else ".safetensors.index.json"
    for index in folder.glob(f"*{ending}"):
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({folder / name for name in names})
    files = sorted(folder.glob("*.safetensors"))
    chosen = [file for file in files if (f".{variant}" in file.name if variant else file.name.count(".") == 1)]
    return chosen or files


def _fill(params: dict[str, Tensor], files: list[pathlib.Path]) -> None:
    """Read each weight's part that is kept here, and nothing else of it."""
    missing = set(params)
    for file in files:
        with safe_open(file, framework="pt") as shards:
            for name in shards.keys():  # noqa: SIM118  (not a mapping)
                if name not in params:
                    continue
                kept, stored = params[name], shards.get_slice(name)
                shapes = tuple(stored.get_shape()), tuple(kept.shape)
                if shapes[0] != shapes[1]:
                    raise ValueError(f"'{name}' has shape {shapes[0]} in {file.name}, not {shapes[1]}")
                if isinstance(kept, DTensor):
                    size, offset = compute_local_shape_and_global_offset(kept.shape, kept.device_mesh, kept.placements)
                    if size[0]:
                        kept.to_local().copy_(stored[offset[0] : offset[0] + size[0]])
                else:
                    kept.copy_(stored[:])
                missing.discard(name)
    if missing:
        raise ValueError(f"{len(missing)} weights are in no file, such as '{min(missing)}'")
