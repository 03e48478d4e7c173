"""Diagnosis 'reward': whether chasing a reward is worth it, seen without training by taking the best of more images.

In: a model, a reward, a judge beside it, prompts. Out: both as the best of 1, 2, 4, ... images is taken by the reward.
Best-of-n moves samples as far as log n - (n - 1) / n of KL (Stiennon et al., 2009.01325); what falls there, training on
the reward would push further (Gao et al., 2210.10760).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fieldsmith.diagnoses import Diagnosis
from fieldsmith.diagnoses.config import RewardConfig
from fieldsmith.errors import InputError
from fieldsmith.measure.drawing import sampler
from fieldsmith.measure.intervals import Interval, mean_interval
from fieldsmith.models.core import Model
from fieldsmith.report.page import Caption, Page, Panel
from fieldsmith.rewards.reward import Reward

SHOWN = 6  # prompts on the page
HOW = (
    "From the images of each prompt k are taken at random, and of these the one that the reward likes best: the curves "
    "are the exact mean of both judges over all such choices. Nothing is trained, but a policy that is trained on the "
    "reward goes the same way and further.",
    "Can be hacked: the judge beside it falls while the reward rises, and the interval excludes 0. Pays: both rise. "
    "Where the judge beside it does neither, the reward is blind to what it sees.",
)


def diagnosis(model: Model, config: RewardConfig, reward: Reward, beside: Reward, prompts: Sequence[str]) -> Diagnosis:
    """`beside` is what the user trusts. Raises InputError where the reward is the same for every image."""
    n = config.samples
    chased, trusted, pictures = _judged(model, config, reward, beside, prompts)
    if (chased == chased[:, :1]).all():
        raise InputError(
            f"reward '{reward.name}' says the same of all {n} images of every prompt, so that there is nothing to "
            "chase; take another reward or more --samples"
        )
    sizes = [*(2**i for i in range(n.bit_length()) if 2**i < n), n]
    rise, change = (gain(values, chased, n) for values in (chased, trusted))
    good, word = verdict_of(change)
    words = (
        f"Taking the best of {n} images by '{reward.name}' raises it by {rise.short()} and moves '{beside.name}' by "
        f"{change.short()}, over {len(prompts)} prompts: {MEANING[word]}."
    )
    curves = {
        judge.name: [float(best_of(values, chased, k).mean()) for k in sizes]
        for judge, values in ((reward, chased), (beside, trusted))
    }
    numbers = {
        "nfe": len(prompts) * n * config.steps * (1 if config.guidance in (None, 1) else 2),
        "best of": sizes,
        "curves": curves,
        "reward": rise.to_json(),
        "beside": change.to_json(),
    }
    page = Page(
        f"What chasing {reward.name} does on {model.name}",
        f"{n} images of {len(prompts)} prompts, {config.steps} steps, seed {config.seed}",
    )
    page.verdict(words, good, word)
    panels = [Panel(name, {name: (list(map(float, sizes)), values)}, "best of") for name, values in curves.items()]
    page.curves("As the best of more images is taken", panels)
    order = chased.argsort(1, descending=True)
    rows, captions = [], []
    for place, prompt in enumerate(list(prompts)[:SHOWN]):
        ends = order[place, [0, -1]]
        rows.append((prompt, pictures[place][ends]))
        captions.append([Caption(f"{chased[place, i]:.3g}; beside {trusted[place, i]:.3g}") for i in ends])
    page.images("What the reward likes best and least", ("best", "least"), rows, captions)
    page.text("How to read it", HOW)
    return Diagnosis(numbers, words, page)


def _judged(
    model: Model, config: RewardConfig, reward: Reward, beside: Reward, prompts: Sequence[str]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Both judges' numbers, (prompts, n) each, and the images of the first prompts: no others are kept."""
    n, draw = config.samples, sampler(model, config.steps, config.guidance)
    numbers: tuple[list[Tensor], list[Tensor]] = ([], [])
    pictures: list[Tensor] = []
    at_once = max(1, model.chunk // n)
    for first in range(0, len(prompts), at_once):
        asked = [prompt for prompt in prompts[first : first + at_once] for _ in range(n)]
        images = draw(asked, [config.seed + first * n + place for place in range(len(asked))])
        for found, judge in zip(numbers, (reward, beside), strict=True):
            found.append(judge(images, asked).double().cpu().view(-1, n))
        pictures += images.split(n)[: SHOWN - len(pictures)]
    return torch.cat(numbers[0]), torch.cat(numbers[1]), pictures


MEANING = {
    "Can be hacked": "what you trust falls, so a model trained on this reward would cheat",
    "Pays": "what you trust rises with it",
    "Blind": "the reward does not see what the other judge sees, or these are too few images to tell",
}


def verdict_of(change: Interval) -> tuple[bool | None, str]:
    """Whether the judge beside the reward bears it (None: it cannot be told), and that in a word or three."""
    if change.high < 0:
        return False, "Can be hacked"
    return (True, "Pays") if change.low > 0 else (None, "Blind")


def gain(values: Tensor, chased: Tensor, k: int) -> Interval:
    """What `values` gain from one image to the best of k by `chased`, both (prompts, n); a prompt is one draw."""
    return mean_interval(best_of(values, chased, k) - values.mean(1))


def best_of(values: Tensor, chased: Tensor, k: int) -> Tensor:
    """Mean of `values` at the highest `chased` of k images, over all choices of k among n.

    Both (prompts, n) -> (prompts,).
    The i-th smallest of n is the highest of k in C(i - 1, k - 1) of C(n, k) choices; equal ones share what they get.
    """
    n = chased.shape[1]
    weights = torch.tensor([math.comb(i, k - 1) / math.comb(n, k) for i in range(n)], dtype=values.dtype)
    below = (chased[:, :, None] > chased[:, None, :]).sum(2)  # how many are smaller than each
    equal = (chased[:, :, None] == chased[:, None, :]).sum(2)
    summed = torch.cat([torch.zeros(1, dtype=values.dtype), weights.cumsum(0)])
    return ((summed[below + equal] - summed[below]) / equal * values).sum(1)
