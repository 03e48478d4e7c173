"""Images from a model as it stands: what every measurement before and after a run looks at.

In: a model, prompts, a seed. Out: images (n, 3, h, w) in [0, 1]; equal seeds give equal noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fieldsmith import processes
from fieldsmith.measure.progress import progress
from fieldsmith.models.core import Condition, Model
from fieldsmith.paths import Prediction
from fieldsmith.samplers import Field, rollout

STEPS = 28  # of the sampler by which models are compared; a run that samples in more is drawn with its own

# prompts, a seed of all or one of each -> images (n, 3, h, w) in [0, 1]
Sampler = Callable[[Sequence[str], int | Sequence[int]], Tensor]
Guidance = float | None | Callable[[Tensor], float]  # a scale, or a schedule of scales: the time of a step () -> scale


def sampler(model: Model, steps: int = 28, guidance: Guidance = None) -> Sampler:
    """Draw images with the model as it stands, at most `model.chunk` at once; equal seeds give equal noise. Not counted
    as training cost. Of several processes each draws its part, and all get all images.

    Predicted x_0 is clipped where the model's own pipeline clips it.
    """

    @torch.no_grad()
    def draw(prompts: Sequence[str], seed: int | Sequence[int]) -> Tensor:
        images = []
        names = sorted(set(prompts))
        encoded = model.encode(names)
        if isinstance(seed, int):
            noise = model.noise(len(prompts), torch.Generator().manual_seed(seed))
        else:
            noise = torch.cat([model.noise(1, torch.Generator().manual_seed(one)) for one in seed])
        rows = torch.tensor([names.index(prompt) for prompt in prompts])
        parts = list(processes.chunks(processes.owned(len(prompts)), model.chunk))
        with model.uncounted(), progress(f"drawing {len(prompts)} images", len(parts) * steps) as advance:
            for part, real in parts:
                field = guided_field(model, encoded[rows[part]], guidance, advance)
                drawn = model.decode(rollout(field, noise[part], model.grid(steps), clip=model.clip).last)
                if real:
                    images.append(drawn)
        return processes.gather(torch.cat(images) if images else torch.zeros(0))

    return draw


def guided_field(
    model: Model, condition: Condition, guidance: Guidance, advance: Callable[[], None] = lambda: None
) -> Field:
    """The model's field under one condition, at a scale that may change with time; `advance` is called each time."""

    def field(x_t: Tensor, t: Tensor) -> Prediction:
        advance()
        return model.predict(x_t, t, condition, guidance(t) if callable(guidance) else guidance)

    return field
