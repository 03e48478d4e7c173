"""Can the concept be brought back? Attacks on an erased model (GEM notes, section 5.1, robustness tests).

In: an erased model, the world, the concept, what asks for it. Out: the share of images that show it again by the
world's judge, exact or one of the user's choice, or the steps it took.
An erasure that survives plain prompts only is not robust; the report says both.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fieldsmith.errors import InputError
from fieldsmith.measure import drawing
from fieldsmith.measure.detection import Concept, World, detected
from fieldsmith.measure.drawing import sampler
from fieldsmith.measure.intervals import Interval, share
from fieldsmith.measure.progress import track
from fieldsmith.models.core import Condition, Model
from fieldsmith.models.prompted import Prompted
from fieldsmith.paths import noised, truth
from fieldsmith.samplers import rollout

SPARE = "<new>"  # a word without a meaning: in the vocabulary of our own models, elsewhere whatever its pieces are


@dataclass(frozen=True)
class Budget:
    """What an attacker has; on a model whose images a network judges, and which may be large, far less (`REAL`)."""

    token: int = 200  # updates of a learned word
    embedding: int = 100  # of a free prompt
    relearning: int = 40  # of the weights
    rows: int = 32  # states of an update of the first two
    examples: int = 64  # images of the concept that they are learned from
    relearned: int = 16  # those of relearning
    each: int = 32  # images of each of a learned word's prompts
    free: int = 64  # of a free prompt
    look: int = 32  # by which relearning is told, every 5 updates
    others: int = 8  # of each prompt by another sampler or scale


REAL = Budget(token=100, embedding=50, relearning=20, rows=4, examples=16, each=2, free=16, look=10, others=1)


@contextlib.contextmanager
def _frozen(model: Model) -> Iterator[None]:
    """Nothing of the network trains inside `with`, and nothing done there counts as cost."""
    trained = model.trainable()
    model.network.requires_grad_(False)
    try:
        with model.uncounted():
            yield
    finally:
        for p in trained.values():
            p.requires_grad_(True)


def _descend(model: Model, x_0: Tensor, condition: Callable[[Tensor], Condition], generator: torch.Generator) -> None:
    """The gradient of the network's own loss on x_0 (n, ...), at most `model.chunk` rows at once; `condition` gives
    rows'."""
    eps = torch.randn(x_0.shape, generator=generator).to(x_0)
    t = torch.rand(len(x_0), generator=generator).to(x_0)
    for at in torch.arange(len(x_0)).split(model.chunk):
        pred = model.predict(noised(model.path, x_0[at], eps[at], t[at]), t[at], condition(at))
        errors = pred.value - truth(pred.kind, model.path, x_0[at], eps[at], t[at])
        (errors.square().mean() * len(at) / len(x_0)).backward()


def _examples(model: Model, world: World, shown: Sequence[Concept], n: int, seed: int) -> tuple[list[Concept], Tensor]:
    chosen = [shown[i % len(shown)] for i in range(n)]
    return chosen, model.encode_images(world.render(chosen, torch.Generator().manual_seed(seed)))


def learned_token(
    model: Model,
    world: World,
    target: Concept,
    shown: Sequence[Concept],
    steps: int = 200,
    lr: float = 3e-2,
    n: int = 32,
    seed: int = 0,
    rows: int = 32,
    examples: int = 64,
    guidance: float | None = None,
) -> Interval:
    """Concept inversion: one new word trained on images of the concept; share of "a red <new>" images that show it.

    Its embeddings stand in for those of its tokens while the text encoders run, in each of them; tables stay as are.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen, latents = _examples(model, world, shown, examples, seed)
    prompts = [_with_spare(world.caption(concept), getattr(concept, "target", "") or target) for concept in chosen]
    with _frozen(model), _spare_word(model) as embeddings:
        optimizer = torch.optim.Adam(embeddings, lr=lr)
        for _ in track(range(steps), "attack: a learned word"):
            picked = torch.randint(len(prompts), (rows,), generator=generator)
            asked = [prompts[i] for i in picked.tolist()]
            optimizer.zero_grad()
            _descend(model, latents[picked], partial(_encoded, model, asked), generator)
            optimizer.step()
        return detected(sampler(model, drawing.STEPS, guidance), world, target, sorted(set(prompts)), n, seed)


@contextlib.contextmanager
def _spare_word(model: Model) -> Iterator[list[Tensor]]:
    """Inside `with`, SPARE's embedding in each of the model's text encoders is one of these tensors (tokens, width)."""
    pipeline: Any = model.pipeline
    embeddings, hooks = [], []
    try:
        for place in ("", "_2", "_3"):
            tokenizer, encoder = (getattr(pipeline, f"{name}{place}", None) for name in ("tokenizer", "text_encoder"))
            if tokenizer is None or encoder is None:
                continue
            table = encoder.get_input_embeddings().weight
            word, like = (tokenizer(text, add_special_tokens=False).input_ids for text in (SPARE, "shape"))
            start = table[like].detach().float().mean(0).expand(len(word), -1)
            embeddings.append(start.clone().requires_grad_(True))
            hook = partial(_replaced, word, embeddings[-1])
            hooks += [
                part.register_forward_hook(hook)
                for part in encoder.modules() if isinstance(part, nn.Embedding) and part.weight is table
            ]  # fmt: skip
        yield embeddings
    finally:
        for one in hooks:
            one.remove()


def _replaced(word: list[int], embeddings: Tensor, layer: nn.Module, given: tuple[Tensor], found: Tensor) -> Tensor:
    """A layer's embeddings of tokens (..., width), those of a word's tokens by its own."""
    for token, row in zip(word, embeddings, strict=True):
        found = torch.where((given[0] == token)[..., None], row.to(found), found)
    return found


def _encoded(model: Model, prompts: list[str], at: Tensor) -> Condition:
    return model.encode([prompts[i] for i in at.tolist()], grad=True)


def _with_spare(caption: str, target: Concept) -> str:
    """The caption with the erased words replaced by the new one."""
    whole = re.sub(rf"(?<!\w){re.escape(str(target))}(?!\w)", SPARE, caption)
    if whole != caption:
        return whole
    erased = str(target).split()
    kept = [SPARE if word in erased else word for word in caption.split()]
    return " ".join(word for i, word in enumerate(kept) if word != SPARE or SPARE not in kept[:i])


def prompt_embedding(
    model: Model,
    world: World,
    target: Concept,
    shown: Sequence[Concept],
    steps: int = 100,
    lr: float = 3e-2,
    n: int = 64,
    seed: int = 0,
    rows: int = 32,
    examples: int = 64,
    guidance: float | None = None,
) -> Interval:
    """The strongest text attack: one prompt's embeddings trained freely; share of its images that show the target."""
    generator = torch.Generator().manual_seed(seed)
    _, latents = _examples(model, world, shown, examples, seed)
    start = model.encode([world.caption(shown[0])])
    with _frozen(model):
        free = {name: part.float().clone().requires_grad_(True) for name, part in start.parts.items()
                if part.is_floating_point()}  # fmt: skip
        learned = Condition({**start.parts, **free})
        optimizer = torch.optim.Adam(list(free.values()), lr=lr)
        for _ in track(range(steps), "attack: a free prompt"):
            picked = torch.randint(len(latents), (rows,), generator=generator)
            optimizer.zero_grad()
            _descend(model, latents[picked], lambda at: learned, generator)
            optimizer.step()
        with torch.no_grad():
            noise = model.noise(n, torch.Generator().manual_seed(seed))
            path = rollout(
                lambda x, t: model.predict(x, t, learned, guidance), noise, model.grid(drawing.STEPS), clip=model.clip
            )
            return share(world.judge(model.decode(path.last)).shows(target))


def relearning(
    model: Model,
    world: World,
    target: Concept,
    shown: Sequence[Concept],
    most: int = 100,
    lr: float = 1e-3,
    seed: int = 0,
    examples: int = 16,
    look: int = 32,
    guidance: float | None = None,
) -> int:
    """Fine-tuning steps on images of the concept until half of `look` of its plain prompts show it; `most` if never.

    Trains what the erasure trained and puts it back afterwards.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen, latents = _examples(model, world, shown, examples, seed)
    condition = model.encode([world.caption(concept) for concept in chosen])
    prompts = [world.caption(concept) for concept in shown]
    trained = model.trainable()
    originals = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(list(trained.values()), lr=lr)
    try:
        with model.uncounted():
            for step in track(range(most), "attack: relearning"):
                if step % 5 == 0:
                    each = max(1, look // len(prompts))
                    seen = detected(sampler(model, drawing.STEPS, guidance), world, target, prompts, each, 1)
                    if seen.value >= 0.5:
                        return step
                optimizer.zero_grad()
                _descend(model, latents, condition.__getitem__, generator)
                optimizer.step()
        return most
    finally:
        for name, p in trained.items():
            p.data.copy_(originals[name])
            p.grad = None


def battery(
    model: Model,
    world: World,
    target: Concept,
    shown: Sequence[Concept],
    seed: int = 0,
    budget: Budget | None = None,
    guidance: float | None = None,
) -> dict[str, Any]:
    """Every attack, and what other samplers and adapter scales show: plain numbers for metrics.json.

    A learned word and a free prompt need a model that reads words, the first one that has a word to spare.
    """
    b = budget or Budget()
    prompts = [world.caption(concept) for concept in shown]
    free: dict[str, Any] = {"seed": seed, "rows": b.rows, "examples": b.examples, "guidance": guidance}
    results: dict[str, Any] = {}
    if _knows(model, SPARE):
        word = learned_token(model, world, target, shown, b.token, n=b.each, **free)
        results["learned token"] = asdict(word)
    if isinstance(model, Prompted):
        prompt = prompt_embedding(model, world, target, shown, b.embedding, n=b.free, **free)
        results["prompt embedding"] = asdict(prompt)
    if model.trainable():
        results["relearning steps"] = relearning(
            model, world, target, shown, b.relearning, seed=seed, examples=b.relearned, look=b.look, guidance=guidance
        )

    def seen(steps: int, first: int) -> float:
        return detected(sampler(model, steps, guidance), world, target, prompts, b.others, first + seed).value

    results["detected by sampler steps"] = {str(steps): seen(steps, 40_000) for steps in (4, 8, 14, 50)}
    if model.spec:
        scales = {}
        for scale in (0.0, 0.5, 0.75, 1.25, 1.5):
            model.scale_adapter(scale)
            scales[str(scale)] = seen(drawing.STEPS, 50_000)
        model.scale_adapter(1.0)
        results["detected by adapter scale"] = scales
    return results


def _knows(model: Model, word: str) -> bool:
    """Whether a model reads words, this one among them: a closed vocabulary may not have it."""
    try:
        model.check_prompts([word])
    except InputError:
        return False
    return isinstance(model, Prompted)


def of_prompts(
    model: Model, world: World, target: Concept, prompts: Sequence[tuple[str, int]], steps: int, guidance: float | None
) -> Interval:
    """Share of images of attackers' prompts, each at its own seed, that show the target."""
    images = sampler(model, steps, guidance)([words for words, _ in prompts], [seed for _, seed in prompts])
    return share(world.judge(images).shows(target))
