"""Rewards made of rewards: weighted sums, running normalisation, and judging in threads.

In: `Reward`s. Out: a `Reward`, or futures of one's results.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor

from fieldsmith.errors import InputError
from fieldsmith.rewards import Named, Reward, checked


def weighted(terms: Sequence[tuple[float, Reward]]) -> Named:
    """sum_i weight_i * reward_i; differentiable only if all parts are. Raises InputError at no part or a weight of 0.

    Without `normalised` parts, the part with the widest range rules the sum whatever its weight says.
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


class Normalised:
    """A reward less its running mean, over its running standard deviation (Welford), both of all it has given so far.

    The images at hand are counted in before they are normalised. Mean and deviation are constants to the gradient.
    """

    def __init__(self, reward: Reward):
        self.reward = checked(reward)
        self.name = f"normalised({reward.name})"
        self.differentiable = reward.differentiable
        self.count, self.mean, self.squares = 0, 0.0, 0.0  # squares: sum of squared distances from the mean
        self._lock = threading.Lock()

    @property
    def deviation(self) -> float:
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        values = self.reward(images, prompts)
        if not len(values):
            return values
        with self._lock:
            new = values.detach().double()
            n, mean = len(new), float(new.mean())
            step = mean - self.mean
            self.squares += float((new - mean).square().sum()) + step**2 * self.count * n / (self.count + n)
            self.mean += step * n / (self.count + n)
            self.count += n
            return (values - self.mean) / max(self.deviation, 1e-6)

    def state(self) -> dict[str, float]:
        """What `restore` takes, for a run's checkpoint."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from a saved state. Raises InputError at another dict."""
        if set(state) != set(self.state()):
            raise InputError(f"state of {self.name} has {sorted(state)}; it needs count, mean and squares")
        self.count, self.mean, self.squares = int(state["count"]), float(state["mean"]), float(state["squares"])


def normalised(reward: Reward) -> Normalised:
    """The reward with zero mean and unit deviation over what it has seen."""
    return Normalised(reward)


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
