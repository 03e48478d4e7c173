"""A reward as all of fieldsmith asks it: one class, which is the only place where a judge's results are checked.

Whatever a user's function does or returns becomes n finite numbers, or a RewardError that names the function and the
prompt or image at fault. Also sums of rewards, and judging in a thread.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from fieldsmith.errors import InputError, NotFiniteError, RewardError
from fieldsmith.functions import call


@dataclass(frozen=True)
class Reward:
    """A function of images and prompts under a name; calling this calls it and checks what it returns.

    The function may return a tensor, an array or a list of n numbers. It is given a copy of the images, through which
    gradients flow if it is `differentiable`, so that it may change them. `networks` are what it asks, which it takes to
    the images' device itself; with `offload` they wait on the CPU between two judgements.
    """

    name: str
    differentiable: bool
    function: Callable[[Tensor, list[str]], Any]
    networks: tuple[nn.Module, ...] = ()

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images (n, 3, h, w) in [0, 1], or points (n, d) of a toy model, and n prompts -> (n,) on the images' device,
        float32 (float64 where the images are).

        Raises InputError where images and prompts do not fit each other, NotFiniteError where images hold NaN or
        infinity, RewardError where the function raises, returns anything but n finite numbers, or gives no gradient
        although it is said to.
        """
        shape = tuple(images.shape)
        if len(shape) not in (2, 4) or (len(shape) == 4 and shape[1] != 3) or len(images) != len(prompts):
            raise InputError(
                f"images of shape {shape} and {len(prompts)} prompts; a reward reads (n, 3, h, w) and n prompts"
            )
        if not len(images):
            return images.new_zeros(0, dtype=_dtype(images))
        check_images(images)
        what = f"reward '{self.name}'"
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            copy = images.clone() if self.differentiable else images.detach().clone()
            output = call(self.function, what, images_of(prompts), copy, list(prompts))
            values = as_numbers(output, what, prompts).to(images.device, _dtype(images), copy=True)
            if self.differentiable and images.requires_grad and torch.is_grad_enabled() and not values.requires_grad:
                raise RewardError(
                    f"{what} is said to be differentiable but gave no gradient; set differentiable = False"
                )
        return values if self.differentiable else values.detach()


def _dtype(images: Tensor) -> torch.dtype:
    return torch.float64 if images.dtype == torch.float64 else torch.float32


def check_images(images: Tensor) -> None:
    """Raise NotFiniteError if images (n, ...) hold NaN or infinity, which is the model's fault and not the judge's."""
    bad = int((~images.detach().isfinite()).flatten(1).any(1).sum())
    if bad:
        raise NotFiniteError(
            f"{bad} of {len(images)} images hold NaN or infinity, which comes from the model and not from its judge"
        )


def as_numbers(output: Any, what: str, prompts: Sequence[str]) -> Tensor:
    """What a function returned for n prompts as a tensor (n,) of real, finite numbers; a tensor keeps its gradient.

    `what` names the function in messages: "reward 'f'". Raises RewardError at anything else.
    """
    fix = "return one finite number an image"
    if isinstance(output, (list, tuple)) and len(output) == len(prompts):
        for row, value in enumerate(output):
            if not _is_number(value):
                raise RewardError(f"{what} returned {_shown(value)} for {_image(row, prompts)}; {fix}")
    try:
        values = _tensor(output)
        if values.shape != (len(prompts),):
            raise ValueError(f"its shape is {tuple(values.shape)}")
        bad = (~values.detach().float().isfinite()).nonzero().flatten().tolist()
    except Exception as error:  # a stranger's object may raise anything
        raise RewardError(f"{what} returned {_shown(output)} for {images_of(prompts)}; {fix}") from error
    if bad:
        others = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise RewardError(f"{what} returned {values[bad[0]].item()} for {_image(bad[0], prompts)}{others}; {fix}")
    return values


def _tensor(output: Any) -> Tensor:
    """Numbers as a real tensor. Raises TypeError or ValueError at what holds anything else."""
    if isinstance(output, (list, tuple)) and output and all(isinstance(value, Tensor) for value in output):
        output = torch.stack(list(output))  # keeps their gradients
    if isinstance(output, Tensor):
        if output.is_complex():
            raise TypeError("complex numbers")
        return output
    array = numpy.asarray(output)
    if array.dtype.kind not in "biuf" and not all(map(_is_number, array.flat)):
        raise TypeError("not numbers")
    return torch.from_numpy(array.astype(numpy.float64))


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 0 and not value.is_complex()
    if isinstance(value, numpy.ndarray):
        return value.ndim == 0 and value.dtype.kind in "biuf"
    return isinstance(value, (numbers.Real, numpy.bool_))


def _shown(value: Any) -> str:
    """A returned value in a few words."""
    if value is None or isinstance(value, (str, bytes, bool, numbers.Number)):
        return repr(value)[:80]
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple):
        kind = str(getattr(value, "dtype", "")).removeprefix("torch.")
        return f"{kind} of shape {tuple(shape)}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}" + (f" that begins with {_shown(value[0])}" if value else "")
    return f"a value of type {type(value).__name__}"


def _image(row: int, prompts: Sequence[str]) -> str:
    return f"image {row + 1} of {len(prompts)}, prompt '{prompts[row][:80]}'"


def images_of(prompts: Sequence[str]) -> str:
    """n images in words, for messages."""
    if len(prompts) == 1:
        return f"an image of prompt '{prompts[0][:80]}'"
    only = len(set(prompts)) == 1
    return f"{len(prompts)} images{'' if only else ', the first'} of prompt '{prompts[0][:80]}'"


def weighted(terms: Sequence[tuple[float, Reward]]) -> Reward:
    """sum_i weight_i * reward_i; differentiable only if all parts are. Raises InputError at no part or a weight of 0.

    The part with the widest range rules the sum whatever its weight says.
    """
    if not terms:
        raise InputError("a sum of no rewards; give at least one, e.g. 0.7*right+0.3*brightness")
    for weight, reward in terms:
        if weight == 0 or not math.isfinite(weight):
            raise InputError(
                f"weight {weight:g} of reward '{reward.name}'; give a number other than 0, or leave it out"
            )

    def total(images: Tensor, prompts: list[str]) -> Tensor:
        return torch.stack([weight * reward(images, prompts) for weight, reward in terms]).sum(0)

    name = "+".join(f"{weight:g}*{reward.name}" for weight, reward in terms)
    networks = tuple(network for _, reward in terms for network in reward.networks)
    return Reward(name, all(reward.differentiable for _, reward in terms), total, networks)


@torch.no_grad()
def score_batches(reward: Reward, batches: Iterable[tuple[Tensor, Sequence[str]]]) -> Tensor:
    """The rewards of batches of images and prompts, one after the other, on the CPU and without gradient; (total,).

    A black box judges a batch in a thread while `batches` makes the next one (decodes it, say). Raises as `Reward`.
    """
    if reward.differentiable:
        return torch.cat([reward(images, prompts).cpu() for images, prompts in batches])
    with ThreadPoolExecutor(1, thread_name_prefix="reward") as pool:
        try:
            futures = [pool.submit(reward, images, prompts) for images, prompts in batches]
            return torch.cat([future.result().cpu() for future in futures])
        except BaseException:
            pool.shutdown(cancel_futures=True)  # what has not begun is not asked
            raise
