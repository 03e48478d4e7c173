"""UNet: pixel-space DDPM and DDIM pipelines around a UNet2DModel, unconditional or of named classes.

States are images (batch, channels, height, width) in [-1, 1]. A network may work on folded images: each square of fold
x fold pixels is then one place of the state with fold^2 channels, a change of axes under which noise stays noise.
Plain diffusers samples such states; torch.nn.functional.pixel_shuffle(states, fold) unfolds them. A scheduler with
`clip_sample=True` clips predicted x_0 inside its own step: `Model.clip` holds its radius, for samplers to do
the same. Its dynamic thresholding is not done here.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from fieldsmith.errors import InputError
from fieldsmith.models.ddpm import ClassDDPM, class_names

STATES_FILE = "states.json"  # beside model_index.json: {"fold": 4}


class UNet(ClassDDPM):
    """`classes` are the class names; None reads as '0', '1', ... for every embedding row.

    One embedding row more than classes: the last one is the null class, which '' encodes to. `scales` are the guidance
    scales that the network takes itself, one embedding row for each class and scale.
    """

    family = "unet"
    PART = "unet"
    SUBSETS: ClassVar[dict[str, str]] = {
        "attention": r".*\.attentions\.\d+\.(to_q|to_k|to_v|to_out\.0)",
        "all-linear": r".*",  # attention, and the projections of time; convolutions train only as full weights
    }

    def __init__(
        self,
        pipeline: Any,  # DDPMPipeline or DDIMPipeline
        name: str,
        resolution: int | None = None,
        classes: Sequence[str] | None = None,
        scales: Sequence[float] | None = None,
        fold: int = 1,
    ):
        self.fold = fold
        shape = pipeline.unet.config
        if shape.in_channels % fold**2:
            raise InputError(
                f"{STATES_FILE} of {name} folds by {fold}, but {shape.in_channels} channels unfold to none"
            )
        sizes = shape.sample_size if isinstance(shape.sample_size, (tuple, list)) else (shape.sample_size,) * 2
        if resolution and resolution % fold:
            raise InputError(f"resolution {resolution} is not a multiple of {fold}, which {name} folds its pixels by")
        size = (resolution // fold, resolution // fold) if resolution else (int(sizes[0]), int(sizes[1]))
        least = 2 ** (len(shape.block_out_channels) - 1)
        if any(side % least for side in size):
            raise InputError(f"resolution {size[0]} is not a multiple of {least} for {name}")
        if min(size) < 1:
            raise InputError(f"sample_size = {shape.sample_size} in the unet's config of {name} is no size of images")
        super().__init__(pipeline, pipeline.unet, name, size, shape.num_class_embeds or 0, classes, scales)
        self.resolution = size[0] * fold if size[0] == size[1] else None
        if self.learns_variance and self.variance not in ("learned", "learned_range"):
            raise InputError(
                f"{name} has twice as many output as input channels but its scheduler's variance_type is "
                f"'{self.variance}'; set it to 'learned_range' or 'learned'"
            )

    @classmethod
    def of_folder(cls, pipeline: Any, name: str, resolution: int | None, folder: pathlib.Path | None) -> UNet:
        return cls(pipeline, name, resolution, *class_names(name, folder), _fold(name, folder))

    def _decode(self, latents: Tensor) -> Tensor:
        return pixel_shuffle((latents / 2 + 0.5).clamp(0, 1), self.fold)

    def _encode_images(self, images: Tensor) -> Tensor:
        return pixel_unshuffle(images * 2 - 1, self.fold)

    def _options(self) -> dict[str, Any]:
        return {"fold": self.fold}

    def _save_pipeline(self, folder: pathlib.Path) -> None:
        super()._save_pipeline(folder)
        if self.fold > 1:
            (folder / STATES_FILE).write_text(json.dumps({"fold": self.fold}) + "\n", encoding="utf-8")


def _fold(name: str, folder: pathlib.Path | None) -> int:
    """By how much the network's states are folded images; 1 where it is not written."""
    file = folder / STATES_FILE if folder else None
    if file is None or not file.is_file():
        return 1
    try:
        fold = json.loads(file.read_text(encoding="utf-8"))["fold"]
    except (ValueError, KeyError, TypeError, RecursionError):
        fold = None
    if type(fold) is not int or fold < 1:
        raise InputError(f"states.json in '{name}' should hold {{\"fold\": a whole number from 1}}")
    return fold
