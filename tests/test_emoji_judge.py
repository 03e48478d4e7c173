"""The emoji judge reads pixels alone: right on renders and what blurs them, and hard to fool."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from fieldsmith.errors import InputError
from fieldsmith.rewards import load
from fieldsmith.worlds import asked
from fieldsmith.worlds.emoji import EmojiWorld
from fieldsmith.worlds.emoji_captions import BACKGROUNDS, GROUPS, OBJECTS, Group, Scene, parse
from fieldsmith.worlds.emoji_glyphs import glyph
from fieldsmith.worlds.emoji_judge import Seen, Thing, Verdicts

WORLD = EmojiWorld()
ANYWHERE = EmojiWorld(anywhere=True)
DRAWN = ANYWHERE.sample(192, seed=5)  # what is read need not stand where the world puts it
REFUSED = 0.03  # share of corrupted pictures that may pass: those that the corruption hardly changes


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def right(seen: Verdicts, scenes: list[Scene]) -> float:
    """Share of pictures that show what was asked."""
    found = [one is not None and one.shows(scene) for one, scene in zip(seen.seen, scenes, strict=True)]
    return sum(found) / len(found)


def blurred(images: Tensor, radius: float) -> Tensor:
    """A Gaussian blur, of a standard deviation in pixels."""
    line = torch.exp(-(torch.arange(-3, 4.0) ** 2) / (2 * radius**2))
    kernel = (line / line.sum())[None, None, None]
    rows = conv2d(pad(images.flatten(0, 1)[:, None], (3, 3, 3, 3), "replicate"), kernel)
    return conv2d(rows, kernel.transpose(2, 3)).view_as(images)


def twins(n: int, group: str | None = None, small: bool = False) -> tuple[Tensor, Tensor]:
    """n pictures, and the same with another object of the group (None: of all) at the same place and side."""
    draw = random.Random(0)
    first, second = [], []
    for _ in range(n):
        a, b, other = draw.sample(GROUPS[group] if group else OBJECTS, 3)
        ground = draw.choice(tuple(BACKGROUNDS))
        beside = (Group(other),) if small else ()
        for found, name in ((first, a), (second, b)):
            found.append(Scene((Group(name, small=small), *beside), "left of" if small else None, ground))
    one, two = WORLD.render(first, seeded(3)), WORLD.render(second, seeded(3))
    return one, two


ONE, TWO = twins(96)
GROUND = ONE[:, :, :1, :1]


def passed(images: Tensor) -> float:
    return float(WORLD.judge(images).valid.float().mean())


# what is as it should be


def test_judge_reads_its_own_renders():
    assert right(WORLD.judge(DRAWN.images), DRAWN.scenes) > 0.99


def test_judge_reads_pairs_that_never_meet_in_training():
    unseen = WORLD.sample(96, seed=6, held_out=True)
    assert right(WORLD.judge(unseen.images), unseen.scenes) > 0.99


def test_judge_reads_through_blur_and_slight_noise():
    noise = 0.03 * torch.randn(DRAWN.images.shape, generator=seeded(1))
    assert right(WORLD.judge(blurred(DRAWN.images, 0.6)), DRAWN.scenes) > 0.99
    assert right(WORLD.judge((DRAWN.images + noise).clamp(0, 1)), DRAWN.scenes) > 0.99


def test_judge_tells_names_sizes_and_places():
    asked_for = parse("a small star above a bus on pink")
    (seen,) = WORLD.judge(ANYWHERE.render([asked_for], seeded(0))).seen
    assert seen and {thing.name: thing.side < 18 for thing in seen.things} == {"star": True, "bus": False}
    star, bus = sorted(seen.things, key=lambda thing: thing.y)
    assert (star.name, bus.name) == ("star", "bus") and 20 < bus.y - star.y < 28 and abs(star.x - bus.x) <= 4
    assert seen.background == "pink" and str(seen) == "1 bus and 1 star on pink"


# what a reading shows


def test_a_reading_shows_what_is_asked_and_nothing_else():
    seen = Seen((Thing("cat", 16, 12, 24), Thing("dog", 21, 36, 25)), "blue")
    for yes in ("a cat and a dog", "a dog and a cat on blue", "a cat left of a dog", "a small cat and a dog", ""):
        assert seen.shows(parse(yes)), yes
    for no in ("a cat", "a cat and a fox", "two cats", "a cat right of a dog", "a cat above a dog", "a dog below a cat",
               "a cat and a small dog", "a cat and a dog on pink", "two cats and a dog"):  # fmt: skip
        assert not seen.shows(parse(no)), no
    assert seen.shows("cat") and seen.shows("dog") and not seen.shows("fox")


def test_labels_are_equal_where_the_objects_are():
    images = WORLD.render(
        [parse(words) for words in ("a cat on blue", "a small cat on pink", "two cats", "a dog")], seeded(1)
    )
    one, small, two, dog = WORLD.judge(images).labels().tolist()
    assert one == small and len({one, two, dog}) == 3
    nothing = WORLD.judge(torch.rand(2, 3, 48, 48, generator=seeded(0)))
    assert nothing.labels().tolist() == [49**3 + 1] * 2 and nothing.names() == ["nothing"] * 2


# what is not as it should be


def test_noise_is_nothing():
    assert passed(torch.rand(32, 3, 48, 48, generator=seeded(0))) == 0
    assert passed((ONE + 48 / 255 * torch.randn(ONE.shape, generator=seeded(1))).clamp(0, 1)) == 0


def test_an_empty_ground_and_unknown_grounds_are_nothing():
    empty = GROUND.expand(-1, -1, 48, 48)
    assert set(WORLD.judge(empty[:8]).reasons) == {"no object"}
    foreign = ONE + torch.tensor([-0.4, 0.0, -0.3])[:, None, None] * (ONE == GROUND).all(1, keepdim=True)
    reasons = WORLD.judge(foreign.clamp(0, 1)).reasons
    assert "" not in reasons and reasons.count("no known background") > 0.9 * len(reasons)


@pytest.mark.parametrize("group", [None, "animals", "vehicles"])
def test_blends_of_two_objects_are_refused(group):
    a, b = twins(64, group)
    assert passed((a + b) / 2) <= REFUSED


def test_blends_of_small_objects_are_refused():
    a, b = twins(64, small=True)
    assert passed((a + b) / 2) <= REFUSED


def test_halves_of_two_objects_are_refused():
    assert passed(torch.cat((ONE[:, :, :24], TWO[:, :, 24:]), 2)) <= REFUSED
    assert passed(torch.cat((ONE[..., :24], TWO[..., 24:]), 3)) <= REFUSED


def test_half_an_object_is_refused():
    for half in (slice(0, 24), slice(24, 48)):
        images = ONE.clone()
        images[..., half] = GROUND
        assert passed(images) <= REFUSED


def test_faded_objects_are_refused():
    assert passed(GROUND + (ONE - GROUND) / 2) <= REFUSED


def test_objects_in_wrong_colours_are_refused():
    """Of the objects that have a colour: greys stay what they are when channels are exchanged."""
    ink = torch.stack([torch.from_numpy(glyph(name, 36)[0] * glyph(name, 36)[1]) for name in OBJECTS])
    changed = (ink - ink[..., [1, 2, 0]]).square().mean((1, 2, 3)).sqrt()
    coloured = [name for name, change in zip(OBJECTS, changed.tolist(), strict=True) if change > 0.15]
    assert len(coloured) > 30
    images = WORLD.render([parse(str(Scene((Group(name),), None, "white"))) for name in coloured], seeded(2))
    ground = images[:, :, :1, :1]
    assert passed((ground + (images - ground)[:, [1, 2, 0]]).clamp(0, 1)) <= REFUSED


def test_two_grounds_in_one_picture_are_refused():
    a, b = (
        WORLD.render([Scene((Group(name),), None, g) for name in OBJECTS[:24]], seeded(4)) for g in ("blue", "pink")
    )
    assert passed(torch.cat((a[:, :, :16], b[:, :, 16:]), 2)) == 0


def test_an_object_painted_over_another_is_refused():
    ink, cover = (torch.from_numpy(part).permute(2, 0, 1) for part in glyph("panda", 16))
    images = ONE.clone()
    images[:, :, 16:32, 16:32] += cover * (ink - images[:, :, 16:32, 16:32])
    assert passed(images) <= REFUSED


def test_what_is_not_finite_or_not_a_picture():
    images = ONE[:2].clone()
    images[0, 0, 3, 3] = torch.nan
    assert WORLD.judge(images).reasons == ("not finite", "")
    with pytest.raises(InputError, match="reads floats"):
        WORLD.judge(torch.zeros(2, 3, 32, 32))


# rewards


def test_rewards_are_the_judges_verdicts():
    world = asked.load("emoji", 48)
    images = WORLD.render([parse("two cats on blue"), parse("a dog above a fox on pink")], seeded(0))
    words = ["two cats on pink", "a dog below a fox on pink"]
    assert load("right", world)(images, words).tolist() == [0, 0]
    assert load("count", world)(images, words).tolist() == [1, 1]
    assert load("valid", world)(torch.cat((images[:1], torch.zeros(1, 3, 48, 48))), words).tolist() == [1, 0]
    assert load("right", world)(images, ["two cats on blue", "a dog above a fox"]).tolist() == [1, 1]
    with pytest.raises(InputError, match="the emoji world has right, count, valid"):
        load("shape", world)
    with pytest.raises(InputError, match=r"'catt' .* did you mean"):
        load("right", world)(images, ["a catt", "a dog"])
