"""One coloured shape on grey: a captioned world whose judge reads pixels alone (GEM notes, section 5.1).

Six shapes in four colours, continuous place, size, shade and background, captions with synonyms, and one composition
(yellow cross) that no training caption names. The judge compares the foreground with a bank of rendered silhouettes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fieldsmith.errors import InputError, check_word

SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
PALETTE = {  # RGB in [0, 1]
    "red": (0.86, 0.15, 0.15),
    "green": (0.15, 0.66, 0.27),
    "blue": (0.18, 0.32, 0.86),
    "yellow": (0.93, 0.78, 0.12),
}
COLOURS = tuple(PALETTE)
SYNONYMS = {
    "circle": "disc", "square": "quadrate", "triangle": "trigon", "cross": "plus", "ring": "hoop", "star": "pentagram",
    "red": "crimson", "green": "emerald", "blue": "azure", "yellow": "golden",
}  # fmt: skip
HELD_OUT = ("yellow", "cross")
VOCABULARY = ("a", "colored", "shape", *SHAPES, *COLOURS, *SYNONYMS.values())
NOTHING = -1  # the judge's answer where it sees no shape


@dataclass(frozen=True)
class Shapes:
    """A batch from the world: images (n, 3, size, size) in [0, 1], one caption each, labels as indices (n,)."""

    images: Tensor
    captions: list[str]
    shape: Tensor
    colour: Tensor


@dataclass(frozen=True)
class Verdicts:
    """The judge's reading of each image: shape and colour indices (NOTHING where invalid), silhouette IoU in [0, 1]."""

    shape: Tensor
    colour: Tensor
    iou: Tensor

    @property
    def valid(self) -> Tensor:
        return self.shape != NOTHING

    def shows(self, concept: Concept) -> Tensor:
        """Whether each image shows the concept: all the attributes that it names; (n,) bool."""
        seen = self.valid.clone()
        if concept.shape is not None:
            seen &= self.shape == SHAPES.index(concept.shape)
        if concept.colour is not None:
            seen &= self.colour == COLOURS.index(concept.colour)
        return seen

    def names(self) -> list[str]:
        """What the judge saw in each image, in words."""
        pairs = zip(self.shape.tolist(), self.colour.tolist(), strict=True)
        return ["nothing" if shape == NOTHING else f"{COLOURS[colour]} {SHAPES[shape]}" for shape, colour in pairs]

    def labels(self) -> Tensor:
        """One label an image, (n,): its composition, or the last label where it is invalid."""
        return torch.where(self.valid, self.shape * len(COLOURS) + self.colour, len(SHAPES) * len(COLOURS))


@dataclass(frozen=True)
class Concept:
    """What a prompt asks for; None where it leaves the attribute open."""

    colour: str | None = None
    shape: str | None = None

    def __str__(self) -> str:
        return " ".join(word for word in (self.colour, self.shape) if word) or "colored shape"

    def contains(self, other: Concept) -> bool:
        """Whether everything that shows `other` shows this concept too."""
        return self.colour in (None, other.colour) and self.shape in (None, other.shape)


def parse(prompt: str) -> Concept:
    """The concept that a prompt names. Raises InputError, with the nearest known word, at an unknown one."""
    plain = {synonym: word for word, synonym in SYNONYMS.items()}
    colour = shape = None
    for word in prompt.lower().split():
        check_word(word, VOCABULARY, "the shapes world")
        word = plain.get(word, word)
        colour = word if word in COLOURS else colour
        shape = word if word in SHAPES else shape
    return Concept(colour, shape)


def concepts() -> list[Concept]:
    """All 24 compositions, the held-out one included."""
    return [Concept(colour, shape) for colour in COLOURS for shape in SHAPES]


def caption(concept: Concept, synonyms: bool = False) -> str:
    """'a red triangle', or 'a crimson trigon' with synonyms; an open attribute reads 'colored' or 'shape'."""
    words = (concept.colour or "colored", concept.shape or "shape")
    return "a " + " ".join(SYNONYMS.get(word, word) if synonyms else word for word in words)


def training_captions() -> tuple[str, ...]:
    """The caption of every composition but the one that training leaves out."""
    return tuple(caption(c) for c in concepts() if (c.colour, c.shape) != HELD_OUT)


def open_captions() -> tuple[str, ...]:
    """Captions that leave the colour, the shape or both open, each also with synonyms."""
    open_ = [*(Concept(colour) for colour in COLOURS), *(Concept(shape=shape) for shape in SHAPES), Concept()]
    return tuple(dict.fromkeys(caption(concept, synonyms) for concept in open_ for synonyms in (False, True)))


def _inside(shape: str, u: Tensor, v: Tensor) -> Tensor:
    """Whether points lie in the unit silhouette; u to the right, v down, both in units of the radius."""
    if shape == "circle":
        return u**2 + v**2 <= 0.85
    if shape == "square":
        return torch.maximum(u.abs(), v.abs()) <= 0.82
    if shape == "triangle":
        return (v <= 0.75) & (v >= -1) & (u.abs() <= (v + 1) * 0.57)
    if shape == "cross":
        thick, long = 0.34, 1.0
        return ((u.abs() <= thick) & (v.abs() <= long)) | ((v.abs() <= thick) & (u.abs() <= long))
    if shape == "ring":
        return (u**2 + v**2 <= 1) & (u**2 + v**2 >= 0.55**2)
    turn = 2 * torch.pi / 5  # star: five straight-edged points, outer radius 1.08, inner 0.45
    angle = torch.remainder(torch.atan2(u, -v), turn)
    angle = torch.minimum(angle, turn - angle)
    outer, inner = torch.tensor(1.08), torch.tensor(0.45)
    half = torch.tensor(turn / 2)
    edge = outer * inner * half.sin() / (outer * angle.sin() + inner * (half - angle).sin())
    return u**2 + v**2 <= edge**2


def silhouettes(
    shape: Tensor, centre: Tensor, radius: Tensor, size: int, oversample: int = 4, moves: int = 1
) -> Tensor:
    """Coverage in [0, 1] of each pixel, (n, size, size); centre (n, 2) as x, y and radius (n,) in pixels.

    `moves` > 1: of windows a pixel wide that begin so many times in each pixel.
    """
    fine = (torch.arange(size * oversample) + 0.5) / oversample
    u = (fine[None, None, :] - centre[:, 0, None, None]) / radius[:, None, None]  # (n, 1, fine)
    v = (fine[None, :, None] - centre[:, 1, None, None]) / radius[:, None, None]  # (n, fine, 1)
    covered = torch.zeros(len(shape), size * oversample, size * oversample)
    for index, name in enumerate(SHAPES):
        rows = shape == index
        if rows.any():
            covered[rows] = _inside(name, u[rows], v[rows]).float()
    return torch.nn.functional.avg_pool2d(covered[:, None], oversample, oversample // moves)[:, 0]


@lru_cache
def _bank(size: int) -> tuple[Tensor, Tensor]:
    """Binary silhouettes on a grid of radii and centres, (m, size * size), and the shape of each, (m,).

    Centres are a 32nd of an image apart, and a silhouette that is moved by that much is the same points moved: each
    shape and radius is drawn once, on a canvas with room for every move, and cut out of it.
    """
    centres, every = 10, 32 // size  # a pixel is `every` moves wide
    radii = size / 32 * torch.arange(7, 13.51, 0.5)
    shape = torch.arange(len(SHAPES)).repeat_interleave(len(radii))
    last = torch.full((len(shape), 2), 20.5 * size / 32)  # where the canvas begins with the image
    cover = silhouettes(shape, last, radii.repeat(len(SHAPES)), size + centres // every, moves=every) >= 0.5
    cut = cover.unfold(1, every * (size - 1) + 1, 1).unfold(2, every * (size - 1) + 1, 1)[..., ::every, ::every]
    cut = cut[:, :centres, :centres].flip(1, 2).transpose(1, 2)  # the grid's x before its y, from left and top
    return cut.reshape(-1, size * size).float(), shape.repeat_interleave(centres**2)


class ShapesWorld:
    """The world at 16 or 32 pixels."""

    def __init__(self, size: int = 32):
        if size not in (16, 32):
            raise InputError(f"size={size}: the shapes world is drawn and judged at 16 or 32 pixels")
        self.size = size

    def caption(self, concept: Concept) -> str:
        """The plain prompt that asks for the concept."""
        return caption(concept)

    def sample(self, n: int, seed: int, hold_out: bool = True) -> Shapes:
        """n captioned images; the held-out composition is absent unless hold_out=False."""
        generator = torch.Generator().manual_seed(seed)
        allowed = [c for c in concepts() if not hold_out or (c.colour, c.shape) != HELD_OUT]
        chosen = [allowed[i] for i in torch.randint(len(allowed), (n,), generator=generator).tolist()]
        images = self.render(chosen, generator)
        return Shapes(
            images,
            [
                _training_caption(c, r)
                for c, r in zip(chosen, torch.rand(n, 3, generator=generator).tolist(), strict=True)
            ],
            torch.tensor([SHAPES.index(c.shape) for c in chosen if c.shape]),
            torch.tensor([COLOURS.index(c.colour) for c in chosen if c.colour]),
        )

    def render(self, chosen: list[Concept], generator: torch.Generator) -> Tensor:
        """Images (n, 3, size, size) in [0, 1] of full compositions, everything left open drawn at random."""
        n, unit = len(chosen), self.size / 32
        shape = torch.tensor([SHAPES.index(c.shape or SHAPES[0]) for c in chosen])
        colour = torch.tensor([COLOURS.index(c.colour or COLOURS[0]) for c in chosen])
        radius = unit * (8 + 4 * torch.rand(n, generator=generator))
        centre = unit * (16 + 5 * (torch.rand(n, 2, generator=generator) - 0.5))
        shade = 1 + 0.1 * (torch.rand(n, 1, generator=generator) - 0.5)
        grey = 0.8 + 0.18 * torch.rand(n, 1, generator=generator)
        ink = (torch.tensor(list(PALETTE.values()))[colour] * shade).clamp(0, 1)  # (n, 3)
        cover = silhouettes(shape, centre, radius, self.size)[:, None]  # (n, 1, size, size)
        return cover * ink[:, :, None, None] + (1 - cover) * grey[:, :, None, None]

    def judge(self, images: Tensor, least_iou: float = 0.7) -> Verdicts:
        """Read images (n, 3, size, size) in [0, 1] from their pixels alone.

        Each pixel is the nearest of grey (any level) and the palette; a shape is valid if its foreground meets a bank
        silhouette with IoU above `least_iou` and if at least 70% of the foreground has one palette colour.
        Raises InputError on images of another size.
        """
        if images.shape[1:] != (3, self.size, self.size):
            raise InputError(f"images of shape {tuple(images.shape)}; the judge reads (n, 3, {self.size}, {self.size})")
        pixels = images.clamp(0, 1).permute(0, 2, 3, 1).flatten(1, 2)  # (n, p, 3)
        palette = torch.tensor(list(PALETTE.values()))
        grey = pixels.mean(-1, keepdim=True).clamp(0.62, 1).expand_as(pixels)
        to_grey = (pixels - grey).pow(2).sum(-1, keepdim=True)
        to_ink = (pixels[:, :, None] - palette).pow(2).sum(-1)  # (n, p, colours)
        nearest = torch.cat((to_ink, to_grey), -1).argmin(-1)  # (n, p)
        ink = nearest < len(palette)
        counts = torch.stack([(nearest == c).sum(1) for c in range(len(palette))], 1)  # (n, colours)
        area = ink.sum(1)
        bank, bank_shape = _bank(self.size)
        shared = ink.float() @ bank.T  # (n, m)
        iou = shared / (area[:, None] + bank.sum(1) - shared).clamp(min=1)
        best, where = iou.max(1)
        valid = (best > least_iou) & (counts.max(1).values >= 0.7 * area)
        nothing = torch.full_like(where, NOTHING)
        return Verdicts(
            torch.where(valid, bank_shape[where], nothing), torch.where(valid, counts.argmax(1), nothing), best
        )


def _training_caption(concept: Concept, draw: list[float]) -> str:
    """10% empty, 10% each with the colour or the shape left open, 5% both; synonyms in 20% of the rest."""
    openness, *synonym = draw
    if openness < 0.1:
        return ""
    words = [concept.colour or "", concept.shape or ""]
    words = [SYNONYMS[word] if chance < 0.2 else word for word, chance in zip(words, synonym, strict=True)]
    if openness < 0.2 or openness >= 0.95:
        words[0] = "colored"
    if 0.2 <= openness < 0.3 or openness >= 0.95:
        words[1] = "shape"
    return "a " + " ".join(words)
