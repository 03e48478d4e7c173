"""The emoji world: captions with a grammar, pairs that never meet in training, pictures that hold what they say."""

from __future__ import annotations

import itertools
import random
import re

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from experiments.tiny import flux_pipeline
from fieldsmith import cli
from fieldsmith.errors import InputError
from fieldsmith.models.flux import Flux
from fieldsmith.worlds import asked, emoji, emoji_groups
from fieldsmith.worlds.emoji import KINDS, EmojiWorld, _lay_out, neighbours, never_met, prompts
from fieldsmith.worlds.emoji_captions import (
    BACKGROUNDS,
    GROUPS,
    LONGEST,
    NUMBERS,
    OBJECTS,
    PLURALS,
    RELATIONS,
    VOCABULARY,
    Group,
    Scene,
    parse,
)
from fieldsmith.worlds.emoji_glyphs import ATLAS, LARGE, SIDE, SMALL, USUAL, glyph, ground
from fieldsmith.worlds.emoji_judge import Thing

WORLD = EmojiWorld()
DRAWN = WORLD.sample(400, seed=0)
UNSEEN = WORLD.sample(100, seed=0, held_out=True)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def render(*captions: str, seed: int = 0) -> torch.Tensor:
    return WORLD.render([parse(caption) for caption in captions], seeded(seed))


# captions


@pytest.mark.parametrize(
    ("caption", "scene"),
    [
        ("a cat on blue", Scene((Group("cat"),), None, "blue")),
        ("an apple", Scene((Group("apple"),))),
        ("a cat and a dog on white", Scene((Group("cat"), Group("dog")), None, "white")),
        ("three apples on grey", Scene((Group("apple", 3),), None, "grey")),
        ("a cat left of a dog", Scene((Group("cat"), Group("dog")), "left of")),
        ("a small star above a bus", Scene((Group("star", small=True), Group("bus")), "above")),
        ("two lemons and a car", Scene((Group("lemon", 2), Group("car")))),
        ("two small mice", Scene((Group("mouse", 2, True),))),
        ("a Cat AND an umbrella and a fox", Scene((Group("cat"), Group("umbrella"), Group("fox")))),
        ("", Scene()),
    ],
)
def test_a_caption_says_what_the_scene_holds(caption, scene):
    assert parse(caption) == scene
    assert str(scene) == caption.lower()


GROUP = st.builds(Group, st.sampled_from(OBJECTS), st.integers(1, 3), st.booleans())


@hypothesis.given(
    st.lists(GROUP, min_size=1, max_size=3),
    st.none() | st.sampled_from(RELATIONS),
    st.none() | st.sampled_from(tuple(BACKGROUNDS)),
)
def test_every_scene_is_read_back_from_its_words_or_refused_in_a_sentence(groups, relation, background):
    scene = Scene(tuple(groups), relation, background)
    names, count = [group.name for group in groups], sum(group.count for group in groups)
    known = (
        len(set(names)) == len(names)
        and count <= 3
        and not (count == 3 and any(group.small for group in groups))
        and (relation is None or (len(groups) == 2 and count == 2) or len(groups) == 1)
    )
    if known:
        assert parse(str(scene)) == (Scene(scene.groups, None, background) if len(groups) == 1 else scene)
    else:
        with pytest.raises(InputError):
            parse(str(scene))


@pytest.mark.parametrize(
    ("caption", "fix"),
    [
        ("a cta on blue", "'cta' .* did you mean 'cat'"),
        ("a zebra", "'zebra' .* known words: apple"),
        ("a cat on bleu", "'bleu' .* did you mean 'blue'"),
        ("a blue cat", "'blue' is not in the vocabulary of the emoji world's objects"),
        ("cat", "write 'a cat'"),
        ("a apple", "write 'an apple'"),
        ("two cat", "write 'two cats'"),
        ("a cats on grey", "write 'a cat on grey'"),
        ("a cat with a dog", "'with' joins no objects"),
        ("a cat left a dog", "'left' joins no objects"),
        ("a cat above", "it ends where an object should follow"),
        ("a cat on", "'on' ends a caption with one background: white"),
        ("a cat on blue on grey", "'on' ends a caption"),
        ("a cat and a dog and a cat", "it names 'cat' twice; say 'two cats'"),
        ("three cats and a dog", "too many objects"),
        ("two cats above a dog", "too many objects"),
        ("a cat above a dog left of a fox", "one joint too many"),
        ("a small cat and a dog and a fox", "of three objects none is small"),
    ],
)
def test_what_the_grammar_lacks_is_refused_with_its_fix(caption, fix):
    with pytest.raises(InputError, match=fix) as refused:
        parse(caption)
    assert "\n" not in str(refused.value)


def test_a_model_of_the_world_takes_its_longest_caption_and_refuses_unknown_words():
    model = Flux(flux_pipeline(VOCABULARY, heads=1, layers=1, single_layers=1, text_length=LONGEST + 2), "tiny")
    longest = "a small strawberry left of a small watermelon on yellow"
    assert max(len(caption.split()) for caption in (*DRAWN.captions, longest)) == LONGEST
    assert len(model.encode([longest])) == 1
    with pytest.raises(InputError, match="did you mean 'cat'"):
        model.encode(["a cta"])


# what there is


def test_objects_have_groups_plurals_and_neighbours():
    assert len(OBJECTS) == len(set(OBJECTS)) == 48
    assert len(set(PLURALS.values()) | set(OBJECTS)) == 96
    assert set(neighbours("cat")) == set(GROUPS["animals"]) - {"cat"}
    with pytest.raises(InputError, match="did you mean 'cat'"):
        neighbours("catt")


def test_the_pictures_are_small_and_come_with_their_licence():
    assert ATLAS.stat().st_size < 300_000
    licence = ATLAS.with_name("emoji-OFL.txt").read_text(encoding="utf-8")
    assert "SIL OPEN FONT LICENSE Version 1.1" in licence and "Copyright" in licence


@pytest.mark.parametrize("side", (min(LARGE), min(SMALL)))
def test_no_two_objects_look_alike(side):
    flat = torch.stack([torch.from_numpy(glyph(name, side)[0] * glyph(name, side)[1]).flatten() for name in OBJECTS])
    distance = torch.cdist(flat, flat) / side
    assert (distance + torch.eye(48)).min() > 0.25  # RMS over three channels, of 1.7


def test_a_fifth_of_the_pairs_never_meets_in_training():
    pairs = [never_met(a, b) for a, b in itertools.combinations(OBJECTS, 2)]
    assert 0.17 < sum(pairs) / len(pairs) < 0.23
    assert all(never_met(a, b) == never_met(b, a) for a, b in itertools.combinations(OBJECTS[:20], 2))

    def meets(scene: Scene) -> bool:
        names = sorted({group.name for group in scene.groups})
        return any(never_met(a, b) for a, b in itertools.combinations(names, 2))

    assert not any(map(meets, DRAWN.scenes))
    assert all(map(meets, UNSEEN.scenes))


# prompts


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_a_kind_are_different_known_and_repeatable(kind):
    found = prompts(kind, 40)
    assert len(set(found)) == 40 and found == prompts(kind, 40) != prompts(kind, 40, seed=1)
    for scene in map(parse, found):
        counts = sorted(group.count for group in scene.groups)
        assert (scene.relation is not None) == (kind in ("position", "both"))
        assert (scene.background is not None) == (kind in ("background", "both"))
        assert sum(group.small for group in scene.groups) == (kind == "both")
        assert {"single object": [1], "background": [1], "counted pairs": [1, 2], "three objects": [1, 1, 1]}.get(
            kind, [*NUMBERS.values()] if kind == "counting" else [1, 1]
        ) in (counts, [2, 3] if kind == "counting" else counts)


def test_prompts_can_be_of_pairs_that_never_meet():
    for scene in map(parse, prompts("position", 30, held_out=True)):
        assert never_met(*(group.name for group in scene.groups))
    with pytest.raises(InputError, match="no pair is held out"):
        prompts("counting", held_out=True)
    with pytest.raises(InputError, match="did you mean 'counting'"):
        prompts("countin")


# pictures


def test_equal_seeds_give_equal_pictures_and_captions():
    again = WORLD.sample(400, seed=0)
    assert torch.equal(again.images, DRAWN.images) and again.captions == DRAWN.captions
    assert WORLD.sample(400, seed=1).captions != DRAWN.captions
    assert DRAWN.images.shape == (400, 3, 48, 48) and DRAWN.images.min() >= 0 and DRAWN.images.max() <= 1
    assert DRAWN.captions == [WORLD.caption(scene) for scene in DRAWN.scenes]


def test_a_picture_has_the_background_that_it_says():
    for name in BACKGROUNDS:
        corner = render(f"a pizza on {name}")[0, :, :2, :2]
        torch.testing.assert_close(corner, torch.from_numpy(ground(name))[:, None, None].expand(3, 2, 2))


def test_an_object_covers_as_many_pixels_as_its_size_and_number_say():
    def ink(caption: str) -> float:
        images = render(*[caption] * 20)
        return float(((images - images[:, :, :1, :1]).abs().sum(1) > 0.05).float().mean())

    single, small, two, three = (
        ink(f"{words} on white") for words in ("a ball", "a small ball", "two balls", "three balls")
    )
    assert small < 0.25 * single and 1.4 < three / two < 1.6 and two < single


def test_objects_begin_at_every_eighth_pixel_and_have_three_sides_unless_told_otherwise():
    def laid_out(anywhere: bool) -> list[tuple[str, int, int, int]]:
        draw = random.Random(0)
        return [thing for scene in DRAWN.scenes for thing in _lay_out(scene, draw, anywhere)]

    assert {side for _, side, _, _ in laid_out(False)} == set(USUAL.values())
    assert {at for _, _, *corner in laid_out(False) for at in corner} == {2, 10, 18, 26}
    assert {side for _, side, _, _ in laid_out(True)} == {side for sides in USUAL for side in sides}
    assert {at % 8 for _, _, *corner in laid_out(True) for at in corner} == {*range(8)}
    assert all(at >= 0 and at + side <= SIDE for _, side, *corner in laid_out(False) for at in corner)


def test_objects_stand_in_the_order_in_which_they_are_named():
    def seen(caption: str) -> list[tuple[Thing, ...]]:
        images = render(*[caption] * 12, seed=4)
        return [one.things for one in WORLD.judge(images).seen if one]

    for things in seen("a star and a ball on blue"):
        where = {thing.name: (thing.x, thing.y) for thing in things}
        across, down = (b - a for a, b in zip(where["star"], where["ball"], strict=True))
        assert max(across, down) > 20 and min(across, down) > -12  # the ball is on the right or below


def test_a_place_is_where_the_caption_says():
    star, ball = (
        WORLD.render([parse(f"a {a} left of a {b} on blue")], seeded(3))
        for a, b in (("star", "ball"), ("ball", "star"))
    )
    assert (star[..., :24] - ball[..., :24]).abs().mean() > 0.02
    above, below = (render(f"a {a} above a {b} on blue", seed=3) for a, b in (("star", "ball"), ("ball", "star")))
    assert (above[:, :, :24] - below[:, :, :24]).abs().mean() > 0.02
    aside = (star - star[:, :, :1, :1]).abs().sum((0, 1, 2)) > 0
    assert aside[:3].sum() + aside[23:25].sum() < 3  # between the two there is background


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(InputError, match="48 pixels"):
        EmojiWorld(32)
    with pytest.raises(InputError, match="name one"):
        WORLD.render([Scene()], seeded(0))


# what verbs ask of it


def test_the_world_is_known_by_its_name():
    found = asked.load("emoji", 48)
    assert found and found.world.size == 48 and asked.load("digits", 8) is None
    trained, others = found.training_captions(), found.other_captions()
    assert len(trained) == 24 * len(KINDS) and not set(trained) & set(others)
    assert all(found.parse(prompt) for prompt in (*trained, *others))
    assert set(found.concepts()) == {scene for group in found.kinds().values() for scene in group}


def test_groups_of_an_object_hold_it_its_neighbours_and_the_rest():
    groups = emoji_groups.groups("cat", ["dog"])
    names = {key: {group.name for scene in found for group in scene.groups} for key, found in groups.items()}
    assert all("cat" in str(scene) for scene in groups["target"]) and "dog" not in set().union(*names.values())
    assert names["neighbours"] == set(GROUPS["animals"]) - {"cat", "dog"}
    assert names["neighbours"] | names["unrelated"] == set(OBJECTS) - {"cat", "dog"}
    assert all("cat" in prompt and parse(prompt) for prompt in emoji_groups.paraphrases("cat"))


def test_a_target_names_one_kind_of_object():
    assert emoji_groups.erased_objects(["a cat", "two cats on blue", "a dog"]) == ["cat", "dog"]
    with pytest.raises(InputError, match="names 2 kinds of objects"):
        emoji_groups.erased_objects(["a cat and a dog"])
    assert set(emoji.GROUPS) == {"animals", "fruit", "food", "vehicles", "things"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["align", "--reward", "right", "--prompts", "a cat dog"], "'dog' joins no objects"),
        (["align", "--reward", "right", "--prompts", "a cta"], "'cta' .* did you mean 'cat'"),
        (["align", "--reward", "shape"], "the emoji world has right, count, valid"),
        (["erase", "--targets", "a catt", "--anchors", "a dog"], "'catt' .* did you mean 'cat'"),
        (["erase", "--targets", "a cat and a dog", "--anchors", "a fox"], "names 2 kinds of objects"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_bad_captions_are_one_sentence_before_anything_is_written(words, says, tiny_zoo, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main([*words, "--model", str(tiny_zoo / "emoji-flux"), "--out", str(out)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(says, error) and not out.exists()
