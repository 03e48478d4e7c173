"""Four different playing cards on a table, 2 x 2, and a judge that reads pips, index and colour (VSM notes, 4.2).

In: a size, 128, 64 or 32, and the share of hands to hold out. Out: RGB images of hands out of 40 cards (ace to 10 in
four suits), and a judge that compares the pips and the index of each quadrant with every card, apart from each other.
"""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fieldsmith.errors import InputError
from fieldsmith.pictures import pixels
from fieldsmith.worlds.judged import GRAIN, UNREADABLE, Verdicts, generator_of, nearest, place, readable, residual

RANKS = ("A", "2", "3", "4", "5", "6", "7", "8", "9", "10")
SUITS = "♥♦♠♣"  # two red, then two black; a card's id is 10 suit + rank
CARDS = tuple(rank + suit for suit in SUITS for rank in RANKS)
RED, BLACK, FRAME = (205, 20, 30), (15, 15, 20), (150, 150, 150)
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
SIDES, MIDDLE = (0.3, 0.7), 0.5
DEFECT = 0.25  # largest RMS distance from the card in a window; noise of 0.04 reaches 0.09
LEAN = 0.25  # how far pips may lie on the way to another card's; a blend lies at 0.5
BATCH = 32  # images judged at once: few enough that their pixels stay in fast memory

Box = tuple[float, float, float, float]  # left, top, right, bottom, as shares of the card's side


@dataclass(frozen=True)
class Layout:
    """Where things are on a card; small cards have no turned index, but a large suit beside small pips."""

    index: Box
    suit: Box | None
    columns: tuple[float, float]  # where the pips' left and right columns are
    pip: float  # side
    turned: bool
    window: int  # of the judge, pixels


LAYOUTS = {  # by the pixels of a card
    64: Layout((0.05, 0.05, 0.2, 0.23), None, SIDES, 0.165, True, 7),
    32: Layout((0.08, 0.08, 0.4, 0.46), (0.08, 0.56, 0.4, 0.92), (0.53, 0.87), 0.15, False, 5),
    16: Layout((0.07, 0.09, 0.45, 0.49), (0.08, 0.55, 0.43, 0.92), (0.53, 0.87), 0.15, False, 3),
}


def spots(rank: int) -> list[tuple[float, float]]:
    """Where the pips of rank 0 (ace) to 9 (ten) are on a unit card."""
    count = rank + 1
    rows: tuple[float, ...] = ()
    if count >= 4:
        rows = (0.18, 0.82) if count < 6 else (0.18, 0.5, 0.82) if count < 9 else (0.18, 0.39, 0.61, 0.82)
    centre = {1: (0.5,), 2: (0.18, 0.82), 3: (0.18, 0.5, 0.82), 5: (0.5,), 7: (0.34,), 8: (0.34, 0.66), 9: (0.5,)}
    middle = (0.285, 0.715) if count == 10 else centre.get(count, ())
    return [(x, y) for y in rows for x in SIDES] + [(MIDDLE, y) for y in middle]


class CardsWorld:
    """The world at 128, 64 or 32 pixels. A hand is the sorted ids of its four cards; the order on the table varies."""

    name = "cards"
    channels = 3

    def __init__(self, size: int = 128, held_out_share: float = 0.1):
        if size % 2 or size // 2 not in LAYOUTS:
            raise InputError(f"size={size}: the cards are drawn and judged at 128, 64 or 32 pixels")
        if not 0 <= held_out_share < 1:
            raise InputError(f"held_out_share={held_out_share}: give a share from 0 to below 1")
        self.size, self.held_out_share = size, held_out_share
        self.side, self._layout = size // 2, LAYOUTS[size // 2]

    @cached_property
    def hands(self) -> tuple[Tensor, Tensor]:
        """All hands of training and all held out, (m, 4) each."""
        every = list(itertools.combinations(range(len(CARDS)), 4))
        out = torch.tensor([self.novel(hand) for hand in every])
        together = torch.tensor(every)
        return together[~out], together[out]

    @property
    def support(self) -> int:
        return len(self.hands[0])

    def novel(self, content: Hashable) -> bool:
        """Whether a hand is held out, by its hash."""
        return place(str(content)) < self.held_out_share

    # drawing

    @cached_property
    def tiles(self) -> Tensor:
        """The 40 cards and the same with their suits in the other colour, (80, 3, side, side)."""
        return torch.stack([self.draw(card, other) for other in (False, True) for card in range(len(CARDS))])

    def draw(self, card: int, other_colour: bool = False, missing: int | None = None) -> Tensor:
        """One card, (3, side, side), at 8 times its side and down; maybe recoloured, or without one of its pips."""
        layout, side, scale = self._layout, self.side * 8, 8
        suit, rank = divmod(card, 10)
        ink = (BLACK, RED)[(suit < 2) != other_colour]
        image = Image.new("RGB", (side, side), "white")
        _put(image, RANKS[rank], layout.index, ink)
        if layout.turned:
            image = image.rotate(180)
            _put(image, RANKS[rank], layout.index, ink)
        if layout.suit is not None:
            _put(image, SUITS[suit], layout.suit, ink)
        left, right = layout.columns
        for i, (x, y) in enumerate(spots(rank)):
            if i != missing:
                x, half = left + (x - SIDES[0]) / (SIDES[1] - SIDES[0]) * (right - left), layout.pip / 2
                _put(image, SUITS[suit], (x - half, y - half, x + half, y + half), ink)
        ImageDraw.Draw(image).rectangle((0, 0, side - 1, side - 1), outline=FRAME, width=scale)
        return pixels(image.resize((self.side, self.side), Image.Resampling.LANCZOS))

    def sample(self, n: int, seed: int, held_out: bool = False) -> Tensor:
        """Raises InputError at held_out=True where no hand is held out."""
        return table(self.tiles[self.draw_hands(n, generator_of(seed, held_out), held_out)])

    def draw_hands(self, n: int, generator: torch.Generator, held_out: bool = False) -> Tensor:
        """Ids in their order on the table, (n, 4)."""
        pool = self.hands[held_out]
        if not len(pool):
            raise InputError("held_out=True, but no hand of cards is held out; make the world with held_out_share=")
        hands = pool[torch.randint(len(pool), (n,), generator=generator)]
        return hands.gather(1, torch.rand(n, 4, generator=generator).argsort(1))

    # judging

    @cached_property
    def index_region(self) -> Tensor:
        """Which pixels show the index, (side, side); the others show the pips."""
        left, top, right, bottom = (round(self.side * share) for share in self._layout.index)
        region = torch.zeros(self.side, self.side, dtype=torch.bool)
        region[top - 1 : bottom + 1, left - 1 : right + 1] = True
        return region | region.flip(0, 1) if self._layout.turned else region

    def judge(self, images: Tensor) -> Verdicts:
        """Four different cards, each legible in its pips and in its index, which agree, in its suit's colour."""
        images, finite = readable(images, self)
        seen = [self._read(part) for part in images.split(BATCH)]
        cards, recoloured, disagree, bad_pips, bad_index = (
            torch.cat([getattr(part, name) for part in seen]).tolist() for name in _Reading.__dataclass_fields__
        )
        reasons: list[tuple[str, ...]] = []
        contents: list[tuple[int, ...] | None] = []
        clear = finite.clone()
        for i in range(len(images)):
            said: list[str] = []
            for q, where in enumerate(QUADRANTS):
                if bad_pips[i][q]:
                    said.append(f"unreadable pips, {where}")
                if bad_index[i][q]:
                    said.append(f"unreadable index, {where}")
                if not bad_pips[i][q] and recoloured[i][q]:
                    said.append(f"wrong colour, {where}")
                if not bad_pips[i][q] and not bad_index[i][q] and disagree[i][q]:
                    said.append(f"index disagrees with pips, {where}")
            legible = [card for card, bad in zip(cards[i], bad_pips[i], strict=True) if not bad]
            if len(set(legible)) < len(legible):
                said.append("duplicate card")
            if not finite[i] or len(legible) < 2:
                clear[i], said = False, [UNREADABLE]
            reasons.append(tuple(said))
            contents.append(None if said else tuple(sorted(cards[i])))
        valid = torch.tensor([not said for said in reasons], dtype=torch.bool)
        return Verdicts(valid, clear, tuple(reasons), tuple(contents))

    def _read(self, images: Tensor) -> _Reading:
        quadrants = _quadrants(images).flatten(0, 1)  # (4 n, 3, side, side)
        region, tiles = self.index_region, self.tiles
        (pips, lean), (index, _) = (
            nearest((quadrants * part).flatten(1), (tiles * part).flatten(1)) for part in (~region, region)
        )
        drawn = torch.where(region, tiles[index], tiles[pips])
        defect = residual(quadrants, drawn, self._layout.window) > DEFECT
        grain = (quadrants - drawn).square().mean((1, 2, 3)).sqrt() > GRAIN
        disagree = (pips % 10 != index % 10) | (_red(pips) != _red(index))
        bad_pips = (defect & ~region).flatten(1).any(1) | grain | (lean > LEAN)
        bad_index = (defect & region).flatten(1).any(1) | grain
        findings = (pips % 40, pips >= 40, disagree, bad_pips, bad_index)
        return _Reading(*(finding.reshape(-1, 4) for finding in findings))


@dataclass(frozen=True)
class _Reading:
    """Per image and quadrant, (n, 4): the card by its pips, and what is wrong with it."""

    cards: Tensor
    recoloured: Tensor
    disagree: Tensor
    bad_pips: Tensor
    bad_index: Tensor


def _red(tile: Tensor) -> Tensor:
    """Whether tiles 0 to 79 are red: hearts, diamonds, and the black suits recoloured."""
    return (tile % 40 < 20) != (tile >= 40)


def _quadrants(images: Tensor) -> Tensor:
    """(n, 3, 2 side, 2 side) to (n, 4, 3, side, side)."""
    n, _, size, _ = images.shape
    return images.reshape(n, 3, 2, size // 2, 2, size // 2).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def table(quadrants: Tensor) -> Tensor:
    """(n, 4, 3, side, side) to (n, 3, 2 side, 2 side)."""
    return quadrants.unflatten(1, (2, 2)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def _put(image: Image.Image, text: str, box: Box, ink: tuple[int, int, int]) -> None:
    """A glyph that fills the height of the box, centred, and narrowed where it is too wide."""
    left, top, right, bottom = (round(image.width * share) for share in box)
    mask = _glyph(text)
    width = min(right - left, round(mask.width * (bottom - top) / mask.height))
    corner = ((left + right - width) // 2, top)
    image.paste(ink, corner, mask.resize((width, bottom - top), Image.Resampling.LANCZOS))


@lru_cache
def _glyph(text: str) -> Image.Image:
    """Its ink alone, without margins."""
    import matplotlib  # for its font alone, and only where cards are drawn

    font_file = pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    font, bold = ImageFont.truetype(str(font_file), 160), 4
    left, top, right, bottom = font.getbbox(text, stroke_width=bold)
    mask = Image.new("L", (round(right - left), round(bottom - top)))
    ImageDraw.Draw(mask).text((-left, -top), text, 255, font, stroke_width=bold)
    return mask
