"""DiT: class-conditional transformers on latents (Peebles and Xie 2023), over diffusers' DiTPipeline and its own parts.

States are latents (batch, channels, height, width). Every class embedder has one row more than classes: the null class.
DiTPipeline itself reads row 1000 as the null class whatever the network's rows, so the plain pipeline guides networks
of 1000 classes only; `predict` guides all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from fieldsmith.errors import InputError
from fieldsmith.models.ddpm import CLASSES_FILE, ClassDDPM


class DiT(ClassDDPM):
    """`classes` are the class names; None takes the pipeline's labels, and numbers where it has none.

    `scales` are the guidance scales that the network takes itself, one embedding row for each class and scale; the row
    that diffusers adds for a null class then lies idle.
    """

    family = "dit"
    SUBSETS: ClassVar[dict[str, str]] = {
        "attention": r"transformer_blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)",
        "all-linear": r".*",
    }

    def __init__(
        self,
        pipeline: Any,  # DiTPipeline
        name: str,
        resolution: int | None = None,
        classes: Sequence[str] | None = None,
        scales: Sequence[float] | None = None,
    ):
        shape = pipeline.transformer.config
        scale = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)  # pixels a side of a latent
        side = resolution // scale if resolution else shape.sample_size
        if side % shape.patch_size or (resolution and resolution % scale):
            raise InputError(f"resolution {resolution} is not a multiple of {scale * shape.patch_size} for {name}")
        embedded = shape.num_embeds_ada_norm
        self.aliases: Mapping[str, int] = dict(pipeline.labels)
        if classes is None:
            first = {row: word for word, row in reversed(self.aliases.items())}  # one word of each class's synonyms
            classes = [first.get(row, str(row)) for row in range(embedded)]
        if not scales and len(classes) != embedded:
            raise InputError(f"{CLASSES_FILE} of {name} names {len(classes)} classes but its network has {embedded}")
        rows = embedded if scales else embedded + 1
        super().__init__(pipeline, pipeline.transformer, name, (side, side), rows, classes, scales)
        self.resolution = side * scale
        for block in self.network.transformer_blocks:
            # each block would drop labels for itself in train mode; the extra row stays, since it exists already
            block.norm1.emb.class_embedder.dropout_prob = 0.0
