"""The shapes world: prompts, captions, and a judge that reads pixels alone and is hard to fool."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from fieldsmith.errors import InputError
from fieldsmith.worlds.shapes import (
    COLOURS,
    HELD_OUT,
    NOTHING,
    PALETTE,
    SHAPES,
    SYNONYMS,
    Concept,
    ShapesWorld,
    Verdicts,
    _bank,
    caption,
    concepts,
    parse,
    silhouettes,
)
from tests.drawn import seeded

WORLDS = {size: ShapesWorld(size) for size in (16, 32)}
SIZES = pytest.mark.parametrize("size", [16, 32])


def drawn(size: int, copies: int = 10, seed: int = 0) -> tuple[list[Concept], Tensor]:
    """`copies` renders of each of the 24 compositions."""
    asked = concepts() * copies
    return asked, WORLDS[size].render(asked, seeded(seed))


def right(seen: Verdicts, asked: list[Concept]) -> Tensor:
    shape = torch.tensor([SHAPES.index(c.shape) for c in asked])
    colour = torch.tensor([COLOURS.index(c.colour) for c in asked])
    return (seen.shape == shape) & (seen.colour == colour)


def rate(flags: Tensor) -> float:
    return float(flags.double().mean())


# the judge on its own renders


@SIZES
def test_a_silhouette_that_is_cut_out_is_one_that_is_drawn_in_its_place(size):
    bank, shape = _bank(size)
    rows = torch.arange(0, len(bank), 37)  # every shape, radius, row and column of the grid
    radius = size / 32 * (7 + 0.5 * (rows // 100 % 14))
    centre = size / 32 * (11.5 + torch.stack((rows // 10 % 10, rows % 10), 1))
    assert len(bank) == len(SHAPES) * 14 * 100
    drawn = silhouettes(shape[rows], centre, radius, size) >= 0.5
    assert torch.equal(bank[rows], drawn.flatten(1).float())


@SIZES
def test_judge_reads_its_own_renders(size):
    asked, images = drawn(size, copies=40)
    assert rate(right(WORLDS[size].judge(images), asked)) > 0.99


@SIZES
def test_judge_reads_the_held_out_composition(size):
    asked = [Concept(*HELD_OUT)] * 200
    assert rate(right(WORLDS[size].judge(WORLDS[size].render(asked, seeded(1))), asked)) > 0.99


@SIZES
def test_judge_agrees_with_the_labels_of_samples(size):
    batch = WORLDS[size].sample(300, seed=2)
    seen = WORLDS[size].judge(batch.images)
    assert rate((seen.shape == batch.shape) & (seen.colour == batch.colour)) > 0.99


def test_judge_withstands_slight_noise():
    asked, images = drawn(32)
    noise = 0.05 * torch.randn(images.shape, generator=seeded(3))
    assert rate(right(WORLDS[32].judge(images + noise), asked)) > 0.99


# the judge on corrupted images


def test_a_recoloured_shape_is_read_in_its_new_colour():
    asked, images = drawn(32)
    swapped = WORLDS[32].judge(images.flip(1))  # red and blue change places
    reds = torch.tensor([c.colour == "red" for c in asked])
    assert rate(swapped.colour[reds] == COLOURS.index("blue")) > 0.99
    assert torch.equal(swapped.shape[reds], WORLDS[32].judge(images).shape[reds])


def test_a_shape_of_two_colours_is_invalid():
    asked = [Concept("red", shape) for shape in SHAPES] * 10
    red = WORLDS[32].render(asked, seeded(4))
    blue = WORLDS[32].render([Concept("blue", c.shape) for c in asked], seeded(4))  # the same places and sizes
    rows = torch.arange(32).reshape(32, 1)
    middle = torch.stack([_middle(image) for image in red]).reshape(-1, 1, 1, 1)
    assert rate(WORLDS[32].judge(torch.where(rows < middle, red, blue)).valid) < 0.05


def _middle(image: Tensor) -> Tensor:
    """The row that halves the shape's ink."""
    ink = (image.max(0).values - image.min(0).values > 0.3).sum(1)
    return (ink.cumsum(0) < ink.sum() / 2).sum()


def test_two_shapes_side_by_side_are_invalid():
    _, images = drawn(32)
    small = interpolate(images, size=(32, 16), mode="area")
    seen = WORLDS[32].judge(torch.cat((small, small.flip(3)), dim=3))
    assert rate(seen.valid) < 0.02


def test_a_shape_that_is_blotted_out_is_invalid():
    asked, images = drawn(32)
    blotted = images.clone()
    blotted[:, :, 10:22, 10:22] = images[:, :, :1, :1]  # its own background
    assert rate(right(WORLDS[32].judge(blotted), asked)) < 0.1


def test_the_left_half_of_a_shape_is_not_that_shape():
    asked, images = drawn(32)
    columns = torch.arange(32)
    middle = torch.stack([_middle(image.mT) for image in images]).reshape(-1, 1, 1, 1)
    halved = torch.where(columns < middle, images, images[:, :, :1, :1])
    assert rate(right(WORLDS[32].judge(halved), asked)) < 0.05


def test_heavy_blur_leaves_no_cross_ring_or_star():
    asked, images = drawn(32)
    thin = torch.tensor([c.shape in ("cross", "ring", "star") for c in asked])
    seen = WORLDS[32].judge(avg_pool2d(images, 15, stride=1, padding=7, count_include_pad=False))
    assert rate(right(seen, asked)[thin]) < 0.1


def test_inverted_images_are_invalid():
    _, images = drawn(32)
    assert not WORLDS[32].judge(1 - images).valid.any()


@SIZES
@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_noise_shows_nothing(size, kind):
    shape = (1000, 3, size, size)
    noise = torch.rand(shape, generator=seeded(5)) if kind == "uniform" else torch.randn(shape, generator=seeded(5))
    seen = WORLDS[size].judge(noise)
    assert int(seen.valid.sum()) == 0
    assert (seen.colour == NOTHING).all()


@SIZES
def test_flat_images_show_nothing(size):
    greys = torch.linspace(0, 1, 21).reshape(21, 1, 1, 1).expand(21, 3, size, size)
    inks = torch.tensor(list(PALETTE.values())).reshape(4, 3, 1, 1).expand(4, 3, size, size)
    assert not WORLDS[size].judge(torch.cat((greys, inks))).valid.any()


def test_images_of_another_size_are_refused():
    with pytest.raises(InputError, match=r"\(n, 3, 32, 32\)"):
        WORLDS[32].judge(torch.zeros(1, 3, 16, 16))


def test_other_sizes_of_the_world_are_refused():
    with pytest.raises(InputError, match="size=24"):
        ShapesWorld(24)


def test_shows_asks_for_all_that_a_concept_names():
    seen = Verdicts(torch.tensor([0, 0, NOTHING]), torch.tensor([0, 1, NOTHING]), torch.ones(3))
    assert seen.shows(Concept("red", "circle")).tolist() == [True, False, False]
    assert seen.shows(Concept(shape="circle")).tolist() == [True, True, False]
    assert seen.shows(Concept()).tolist() == [True, True, False]


# prompts


@pytest.mark.parametrize("synonyms", [False, True])
def test_captions_of_all_concepts_parse_back(synonyms):
    open_ones = [Concept(shape=s) for s in SHAPES] + [Concept(colour=c) for c in COLOURS] + [Concept()]
    for concept in concepts() + open_ones:
        assert parse(caption(concept, synonyms)) == concept


def test_every_synonym_means_its_word():
    for word, synonym in SYNONYMS.items():
        assert parse(synonym) == parse(word) != Concept()


def test_prompts_are_read_in_any_case_and_order():
    assert parse("Trigon CRIMSON") == Concept("red", "triangle")


def test_an_unknown_word_is_refused_with_the_nearest_known_one():
    with pytest.raises(InputError, match=r"'triangel' is not in the vocabulary.*did you mean 'triangle'"):
        parse("a red triangel")


def test_a_concept_contains_what_is_narrower():
    red, red_circle = Concept(colour="red"), Concept("red", "circle")
    assert red.contains(red_circle) and not red_circle.contains(red)
    assert Concept().contains(red) and not red.contains(Concept("blue", "circle"))


# sampling


def test_the_held_out_composition_is_never_sampled():
    batch = WORLDS[16].sample(3000, seed=6)
    held_out = (batch.colour == COLOURS.index(HELD_OUT[0])) & (batch.shape == SHAPES.index(HELD_OUT[1]))
    assert not held_out.any()
    assert not any(parse(words) == Concept(*HELD_OUT) for words in batch.captions)


def test_the_held_out_composition_can_be_asked_for():
    batch = WORLDS[16].sample(500, seed=7, hold_out=False)
    assert ((batch.colour == COLOURS.index(HELD_OUT[0])) & (batch.shape == SHAPES.index(HELD_OUT[1]))).any()


def test_sampling_repeats_with_the_seed():
    one, same, other = (WORLDS[16].sample(20, seed=seed) for seed in (8, 8, 9))
    assert torch.equal(one.images, same.images) and one.captions == same.captions
    assert not torch.equal(one.images, other.images)


def test_captions_describe_their_images():
    batch = WORLDS[16].sample(500, seed=10)
    for words, shape, colour in zip(batch.captions, batch.shape, batch.colour, strict=True):
        assert parse(words).contains(Concept(COLOURS[colour], SHAPES[shape]))


def test_shares_of_open_captions():
    named = [parse(words) if words else None for words in WORLDS[16].sample(4000, seed=11).captions]
    shares = {
        "empty": sum(c is None for c in named),
        "colour open": sum(c is not None and c.colour is None and c.shape is not None for c in named),
        "shape open": sum(c is not None and c.shape is None and c.colour is not None for c in named),
        "both open": sum(c == Concept() for c in named),
    }
    for name, share in {"empty": 0.10, "colour open": 0.10, "shape open": 0.10, "both open": 0.05}.items():
        assert shares[name] / 4000 == pytest.approx(share, abs=4 * (share * (1 - share) / 4000) ** 0.5), name


def test_a_fifth_of_the_named_shapes_are_synonyms():
    shapes = [w for words in WORLDS[16].sample(4000, seed=12).captions for w in words.split() if parse(w).shape]
    share = sum(word not in SHAPES for word in shapes) / len(shapes)
    assert share == pytest.approx(0.2, abs=4 * (0.16 / len(shapes)) ** 0.5)
