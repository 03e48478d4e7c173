"""Rewards made of rewards: weighted sums, and judging in threads.

In: `Reward`s. Out: a `Reward`, or futures of one's results.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor

from fieldsmith.errors import InputError
from fieldsmith.rewards import Named, Reward, checked


def weighted(terms: Sequence[tuple[float, Reward]]) -> Named:
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
    parts = [(weight, checked(reward)) for weight, reward in terms]
    differentiable = all(reward.differentiable for _, reward in terms)

    def judge(images: Tensor, prompts: Sequence[str]) -> Tensor:
        with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
            return torch.stack([weight * reward(images, prompts) for weight, reward in parts]).sum(0)

    return Named("+".join(f"{weight:g}*{reward.name}" for weight, reward in terms), differentiable, judge)


class Asynchronous:
    """Judges in threads, so that a judge works while the caller decodes or rolls out. No gradient flows.

    `submit` gives a future; `results` gives what was submitted, in that order, and raises again what the judge raised.
    Use it in a `with`; leaving it drops what has not begun.
    """

    def __init__(self, reward: Reward, workers: int = 1):
        if workers < 1:
            raise InputError(f"workers={workers}: judging needs at least 1 thread")
        self.reward = checked(reward)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="judge")
        self._waiting: deque[Future[Tensor]] = deque()

    def submit(self, images: Tensor, prompts: Sequence[str]) -> Future[Tensor]:
        """Begin to judge; the images are copied, so that the caller may overwrite them."""
        future = self._pool.submit(self._judge, images.detach().clone(), list(prompts))
        self._waiting.append(future)
        return future

    @torch.no_grad()
    def _judge(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.reward(images, prompts)

    def results(self) -> Iterator[Tensor]:
        """Wait for each submission in turn; those already given are not given again."""
        while self._waiting:
            yield self._waiting.popleft().result()

    def close(self) -> None:
        """Drop what has not begun and wait for what has."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Asynchronous:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
