"""Ways to corrupt the images of a world, each of which its judge must notice (VSM notes, section 8.4).

In: a world of cards, columns or chess. Out: by name, a function (n, seed) -> n corrupted images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from fieldsmith.worlds.cards import CARDS, CardsWorld, table
from fieldsmith.worlds.columns import ColumnsWorld
from fieldsmith.worlds.judged import JudgedWorld, generator_of, nearest

Corruption = Callable[[int, int], Tensor]  # (n, seed) -> n corrupted images
COLUMNS = range(3)


def corruptions_of(world: JudgedWorld) -> Mapping[str, Corruption]:
    """Of a world of cards or columns, or of one that knows its own."""
    if isinstance(world, CardsWorld):
        return of_cards(world)
    if isinstance(world, ColumnsWorld):
        return of_columns(world)
    found: Mapping[str, Corruption] = world.corruptions  # type: ignore[attr-defined]
    return found


def noise(world: JudgedWorld) -> Corruption:
    """Images under noise of 48 grey levels, three times what the published judge of cards lets pass."""

    def noisy(n: int, seed: int) -> Tensor:
        images = world.sample(n, seed)
        eps = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
        return (images + 48 / 255 * eps).clamp(0, 1)

    return noisy


# cards


def of_cards(world: CardsWorld) -> dict[str, Corruption]:
    """One card of each hand is spoilt, or two are the same."""
    spoilt = {
        "recoloured suit": recoloured, "wrong index": wrong_index, "missing pip": missing_pip, "chimera": chimera,
        "blend": blend, "scrambled quadrant": scrambled,
        "blank quadrant": lambda world, n, seed: torch.ones(n, 3, world.side, world.side),
    }  # fmt: skip

    def spoil(n: int, seed: int, make: Callable[[CardsWorld, int, int], Tensor]) -> Tensor:
        """Hands of the training set with one quadrant of each replaced by an image (n, 3, side, side)."""
        generator = generator_of(seed)
        quadrants = world.tiles[world.draw_hands(n, generator)]
        quadrants[torch.arange(n), torch.randint(4, (n,), generator=generator)] = make(world, n, seed)
        return table(quadrants)

    return {
        "duplicate card": partial(duplicate, world),
        **{name: partial(spoil, make=make) for name, make in spoilt.items()},
        "noise": noise(world),
    }


def two_cards(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two different cards each, (n,)."""
    generator, cards = torch.Generator().manual_seed(seed + 10**9), len(CARDS)
    a = torch.randint(cards, (n,), generator=generator)
    return a, (a + torch.randint(1, cards, (n,), generator=generator)) % cards


def duplicate(world: CardsWorld, n: int, seed: int) -> Tensor:
    generator = generator_of(seed)
    hands = world.draw_hands(n, generator)
    places = torch.rand(n, 4, generator=generator).argsort(1)
    hands[torch.arange(n), places[:, 0]] = hands[torch.arange(n), places[:, 1]]
    return table(world.tiles[hands])


def recoloured(world: CardsWorld, n: int, seed: int) -> Tensor:
    """A black heart or diamond, a red spade or club, in index and pips."""
    return world.tiles[len(CARDS) + two_cards(n, seed)[0]]


def wrong_index(world: CardsWorld, n: int, seed: int) -> Tensor:
    """Right pips with the index of another rank of the suit."""
    a, b = two_cards(n, seed)
    b = a // 10 * 10 + (a + 1 + b % 9) % 10
    return torch.where(world.index_region, world.tiles[b], world.tiles[a])


def missing_pip(world: CardsWorld, n: int, seed: int) -> Tensor:
    pips = [(card, pip % (card % 10 + 1)) for card, pip in torch.stack(two_cards(n, seed), 1).tolist()]
    drawn = {(card, pip): world.draw(card, missing=pip) for card, pip in sorted(set(pips))}
    return torch.stack([drawn[one] for one in pips])


def chimera(world: CardsWorld, n: int, seed: int) -> Tensor:
    """The top of one card on the bottom of another, unless they all but make a card (a 7 on a 6 at small sizes)."""
    half, cards = world.side // 2, torch.arange(len(CARDS))
    a, b = torch.cartesian_prod(cards, cards).unbind(1)
    made = torch.cat((world.tiles[a, :, :half], world.tiles[b, :, half:]), 2)
    like = world.tiles[nearest(made.flatten(1), world.tiles.flatten(1))[0]]
    pairs = ((made - like).square().mean((1, 2, 3)).sqrt() > 0.06).nonzero()[:, 0]
    return made[pairs[torch.randint(len(pairs), (n,), generator=generator_of(seed))]]


def blend(world: CardsWorld, n: int, seed: int) -> Tensor:
    a, b = two_cards(n, seed)
    return (world.tiles[a] + world.tiles[b]) / 2


def scrambled(world: CardsWorld, n: int, seed: int) -> Tensor:
    """The pixels of a card in random order."""
    a, _ = two_cards(n, seed)
    order = torch.rand(n, 1, world.side**2, generator=generator_of(seed)).argsort(-1).expand(-1, 3, -1)
    return world.tiles[a].flatten(2).gather(2, order).reshape(n, 3, world.side, world.side)


# columns


def of_columns(world: ColumnsWorld) -> dict[str, Corruption]:
    """Every kind of wrong image that the published validator misses, and those that it sees."""
    return {
        "duplicate": partial(pairs, world, same=True),
        "duplicate beside a valid shape": partial(pairs, world, same=True, beside=True),
        "two shapes in a column": partial(pairs, world, same=False),
        "copy in another column": partial(misplaced, world, copy=True),
        "wrong column": partial(misplaced, world),
        "wrong column beside a valid shape": partial(misplaced, world, beside=True),
        "half eroded beside a valid shape": partial(eroded, world),
        "merged shapes": partial(overlaid, world, mix=torch.maximum),
        "blended shapes": partial(overlaid, world, mix=lambda a, b: (a + b) / 2),
        "blank": lambda n, seed: torch.zeros(n, 1, world.size, world.size),
        "noise": noise(world),
    }


def shuffled(n: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """The three columns in random order, (n,) each."""
    return torch.rand(n, 3, generator=generator).argsort(1).unbind(1)


def pairs(world: ColumnsWorld, n: int, seed: int, same: bool, beside: bool = False) -> Tensor:
    """Column k's shape in its upper half and the same or another in its lower; beside: a valid one elsewhere."""
    generator = generator_of(seed)
    k, j, other = shuffled(n, generator)
    low = k if same else j
    images = world.compose([(c, c, k == c) for c in COLUMNS], n, generator, "upper")
    lower = [(s, c, (k == c) & (low == s)) for c in COLUMNS for s in COLUMNS]
    images = torch.maximum(images, world.compose(lower, n, generator, "lower"))
    return torch.maximum(images, world.compose([(c, c, (other == c) & beside) for c in COLUMNS], n, generator))


def misplaced(world: ColumnsWorld, n: int, seed: int, copy: bool = False, beside: bool = False) -> Tensor:
    """Shape k in column j; copy: also in its own; beside: a valid one in the third."""
    generator = generator_of(seed)
    k, j, other = shuffled(n, generator)
    parts = [(s, c, (k == s) & (j == c)) for s in COLUMNS for c in COLUMNS if s != c]
    parts += [(c, c, (copy & (k == c)) | (beside & (other == c))) for c in COLUMNS]
    return world.compose(parts, n, generator)


def eroded(world: ColumnsWorld, n: int, seed: int) -> Tensor:
    """One shape with a random half of it cut off, one whole shape in another column."""
    generator = generator_of(seed)
    k, other, _ = shuffled(n, generator)
    broken = world.compose([(c, c, k == c) for c in COLUMNS], n, generator)[:, 0]
    along = torch.rand(n, generator=generator) < 0.5
    broken = torch.where(along[:, None, None], broken, broken.mT)
    rows = broken.sum(2)
    kept = rows.cumsum(1) <= rows.sum(1, keepdim=True) / 2
    broken = broken * kept[:, :, None]
    broken = torch.where(along[:, None, None], broken, broken.mT)[:, None]
    return torch.maximum(broken, world.compose([(c, c, other == c) for c in COLUMNS], n, generator))


def overlaid(world: ColumnsWorld, n: int, seed: int, mix: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Column k's shape mixed with another shape that overlaps it there."""
    generator, g = generator_of(seed), world.geometry
    k, j, _ = shuffled(n, generator)
    images = torch.zeros(n, 1, world.size, world.size)
    for at, (own, other) in enumerate(zip(k.tolist(), j.tolist(), strict=True)):
        a, bank = world.placed[own], world.bank[other]
        first = a[int(torch.randint(len(a), (1,), generator=generator))]
        shared = (bank * first).sum((1, 2)) / bank.sum((1, 2)).clamp(max=float(first.sum()))
        near = bank[(shared > 0.3) & (shared < 0.6)]
        second = near[int(torch.randint(len(near), (1,), generator=generator))]
        images[at, 0, : g.height, own * g.width : (own + 1) * g.width] = mix(first, second)
    return images
