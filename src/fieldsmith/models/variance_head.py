"""A variance head for a network that lacks one: twice the output channels, which start at the middle of the range.

In: a class-conditional or unconditional DDPM model. Out: the same model, its prediction unchanged, with v beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler
from torch import Tensor

from fieldsmith.errors import InputError
from fieldsmith.models.core import Model
from fieldsmith.models.ddpm import ClassDDPM

LAST = {"unet": "conv_out", "dit": "proj_out_2"}  # the layer whose outputs are doubled


def with_variance_head(model: Model) -> ClassDDPM:
    """A new model with the same weights and v = 0; its scheduler's variance_type is 'learned_range'.

    A UNet comes in a DDPMPipeline, since a DDIMPipeline cannot draw from a network with a head; a DiTPipeline can.
    Raises InputError where the family knows no such head or the model has one, ValueError where it is being trained.
    """
    if not isinstance(model, ClassDDPM) or model.family not in LAST:
        raise InputError(
            f"{model.name} is of family {model.family}, which has no variance head; use a DDPM UNet or DiT"
        )
    if model.learns_variance:
        raise InputError(f"{model.name} has a variance head already")
    model._refuse_second_training()
    fields = {k: v for k, v in model.network.config.items() if not k.startswith("_")}
    with torch.random.fork_rng():
        network = model.make_network(fields | {"out_channels": 2 * model.channels})
    state, last = model.network.state_dict(), LAST[model.family]
    for name in (f"{last}.weight", f"{last}.bias"):
        state[name] = _doubled(state[name], model)
    network.load_state_dict(state)
    network.to(model.device).eval()
    if network.dtype != model.network.dtype:  # diffusers warns of a change of type even where there is none
        network.to(model.network.dtype)
    return model.of(pipeline_with(model, network))


def pipeline_with(model: ClassDDPM, network: Any) -> Any:
    """The model's pipeline around a network that learns variances."""
    pipeline: Any = model.pipeline
    config = pipeline.scheduler.config
    if model.family == "unet":
        return DDPMPipeline(network, DDPMScheduler.from_config(config, variance_type="learned_range"))
    scheduler = type(pipeline.scheduler).from_config(config)
    scheduler.register_to_config(variance_type="learned_range")  # DDIM knows no such field, but keeps it
    whole = type(pipeline)(**pipeline.components | {"transformer": network, "scheduler": scheduler})
    whole.labels = pipeline.labels  # no component
    return whole


def _doubled(weight: Tensor, model: ClassDDPM) -> Tensor:
    """Rows of zeros after the mean's channels; a transformer's rows are patches of channels, so they interleave."""
    channels = model.channels
    patches = weight.reshape(-1, channels, *weight.shape[1:])  # (patch pixels or 1, channels, ...)
    return torch.cat((patches, torch.zeros_like(patches)), 1).reshape(-1, *weight.shape[1:])
