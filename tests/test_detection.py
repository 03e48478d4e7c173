"""Concept presence and attacks: which prompts are asked, how verdicts are counted, and that nothing stays changed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fieldsmith.errors import InputError
from fieldsmith.measure import attacks
from fieldsmith.measure.detection import Asked, ask, ask_groups, detected, erasure, right_by_group
from fieldsmith.measure.drawing import sampler
from fieldsmith.measure.intervals import Interval
from fieldsmith.models import load
from fieldsmith.models.core import LoraSpec, Model
from fieldsmith.worlds.model_cards import card_of, world_of
from fieldsmith.worlds.shapes import COLOURS, HELD_OUT, SHAPES, VOCABULARY, Concept, ShapesWorld, Verdicts, parse
from fieldsmith.worlds.shapes import concepts as compositions
from fieldsmith.worlds.shapes_groups import attributes, erased_concepts, groups, neighbours, paraphrases

ZOO = "zoo:shapes-flux"
TRIANGLE, RED, RED_TRIANGLE = Concept(shape="triangle"), Concept(colour="red"), Concept("red", "triangle")
WORLD = ShapesWorld(32)
SHOWN = groups(TRIANGLE)["target"]


@pytest.fixture(scope="module")
def base() -> Model:
    """The zoo's model, for tests that only draw."""
    return load(ZOO)


@pytest.fixture
def adapted() -> Iterator[Model]:
    """The zoo's model with a LoRA that changes something."""
    model = load(ZOO)
    model.adapt(LoraSpec("text-inputs", 2))
    with torch.no_grad():
        for p in model.trainable().values():
            p.add_(0.01)
    yield model


def rendered(prompts: Any, seed: int) -> Tensor:
    """A perfect model: the world's own renderings."""
    return WORLD.render([parse(prompt) for prompt in prompts], torch.Generator().manual_seed(seed))


def verdicts(*seen: str) -> Verdicts:
    """The judge's answers in words, '' where it saw nothing."""
    pairs = [word.split() for word in seen]
    shape = torch.tensor([SHAPES.index(pair[1]) if pair else -1 for pair in pairs])
    colour = torch.tensor([COLOURS.index(pair[0]) if pair else -1 for pair in pairs])
    return Verdicts(shape, colour, torch.ones(len(seen)))


# what is asked


@pytest.mark.parametrize(
    ("target", "sizes"), [(TRIANGLE, (4, 8, 11)), (RED, (6, 5, 12)), (RED_TRIANGLE, (1, 8, 14))], ids=str
)
def test_groups_part_the_trained_compositions(target, sizes):
    sides = groups(target)
    every = [concept for side in sides.values() for concept in side]
    assert len(set(every)) == len(every) == 23
    assert Concept(*HELD_OUT) not in every
    assert all(target.contains(c) for c in sides["target"])
    assert not any(target.contains(c) for name in ("neighbours", "unrelated") for c in sides[name])
    assert tuple(len(sides[name]) for name in ("target", "neighbours", "unrelated")) == sizes


def test_what_else_is_erased_is_in_no_group_but_the_targets():
    sides = groups(TRIANGLE, others=[RED])
    assert len(sides["target"]) == 4
    assert not any(RED.contains(c) for name in ("neighbours", "unrelated") for c in sides[name])


def test_the_held_out_composition_can_be_a_target():
    assert groups(Concept(*HELD_OUT))["target"] == [Concept(*HELD_OUT)]


def test_neighbours_of_a_shape_a_colour_and_a_pair():
    assert len({c.shape for c in neighbours(TRIANGLE)}) == 2
    assert len({c.colour for c in neighbours(RED)}) == 1
    assert all((c.colour == "red") != (c.shape == "triangle") for c in neighbours(RED_TRIANGLE))
    assert not any(t.contains(c) for t in (TRIANGLE, RED, RED_TRIANGLE) for c in neighbours(t))


@pytest.mark.parametrize("target", [TRIANGLE, RED, RED_TRIANGLE], ids=str)
def test_paraphrases_use_known_words_and_name_the_target(target):
    found = paraphrases(target)
    assert {word for prompt in found for word in prompt.split()} <= set(VOCABULARY)
    assert all(target.contains(parse(prompt)) for prompt in found)
    assert not set(found) & {WORLD.caption(c) for c in groups(target)["target"]} - {f"a {target}"}


def test_erased_concepts_are_the_widest_that_the_prompts_name():
    named = erased_concepts(["triangle", "a red triangle", "a trigon", "blue", "a blue ring", "a green star"])
    assert named == [TRIANGLE, Concept(colour="blue"), Concept("green", "star")]
    with pytest.raises(InputError, match="did you mean 'triangle'"):
        erased_concepts(["triangel"])


# drawing


def test_equal_seeds_give_equal_images_whatever_was_drawn_before(base):
    draw = sampler(base, steps=3)
    prompts = ["a red circle", "a blue ring"]
    with base.count_nfe() as nfe:
        first = draw(prompts, 1)
    assert nfe.total == 0
    torch.manual_seed(9)
    assert torch.equal(draw(prompts, 1), first)
    assert not torch.equal(draw(prompts, 2), first)
    assert first.shape == (2, 3, 32, 32) and first.min() >= 0 and first.max() <= 1


def test_the_split_into_batches_does_not_show(base):
    prompts = ["a red circle", "a blue ring", "a red circle", "a green star", "a yellow square"]
    found = []
    for base.chunk in (8, 2):
        found.append(sampler(base, steps=3)(prompts, 0))
    whole, split = found
    torch.testing.assert_close(split, whole, atol=1e-4, rtol=1e-4)


# counting


def test_an_image_is_right_where_it_shows_all_that_was_asked():
    asked = [Concept("red", "circle"), TRIANGLE, RED, RED_TRIANGLE, TRIANGLE]
    judged = Asked(
        asked, torch.zeros(5, 3, 32, 32), verdicts("red circle", "blue triangle", "", "blue triangle", "red ring")
    )
    assert judged.right().tolist() == [True, True, False, False, False]
    assert judged.seen.names() == ["red circle", "blue triangle", "nothing", "blue triangle", "red ring"]
    last = len(SHAPES) * len(COLOURS)
    assert judged.seen.labels().tolist() == [0, 2 * 4 + 2, last, 2 * 4 + 2, 4 * 4]


def test_shares_by_attribute_leave_the_held_out_composition_apart():
    asked = compositions()
    seen = ["" if c.colour == "red" else f"{c.colour} {c.shape}" for c in asked]
    rows = right_by_group(Asked(asked, torch.zeros(24, 3, 32, 32), verdicts(*seen)), attributes())
    assert rows["all trained"].value == pytest.approx(17 / 23) and rows["all trained"].n == 23
    assert (rows["held out: yellow cross"].value, rows["held out: yellow cross"].n) == (1, 1)
    assert (rows["red"].value, rows["blue"].value) == (0, 1)
    assert (rows["yellow"].n, rows["cross"].n) == (5, 3)
    assert rows["valid"].value == pytest.approx(18 / 24)


def test_detection_and_asking_agree_with_the_world_itself():
    assert detected(rendered, WORLD, TRIANGLE, [WORLD.caption(c) for c in SHOWN], 4, 0).value > 0.9
    assert detected(rendered, WORLD, TRIANGLE, ["a red circle"], 8, 0).value == 0
    judged = ask(rendered, WORLD, [TRIANGLE, RED], 3, 0)
    assert judged.asked == [TRIANGLE] * 3 + [RED] * 3


def test_an_unchanged_model_has_lost_nothing():
    side = ask_groups(rendered, WORLD, groups(TRIANGLE), 2, 0)
    found = erasure(side, side, TRIANGLE)
    changes = {k: v for k, v in found.numbers.items() if k.endswith("points")}
    assert len(changes) == 3
    assert all((v.value, v.low, v.high) == (0, 0, 0) or v.value == 0 for v in changes.values())
    assert all(abs(distance) < 1e-4 for distance in found.distances.values())
    assert found.numbers["target detected"].value == found.numbers["target detected before"].value > 0.9
    assert found.composite < 0.1


def test_a_perfect_erasure_scores_one_and_a_broken_model_does_not():
    def circles(prompts: Any, seed: int) -> Tensor:
        return rendered([prompt.replace("triangle", "circle") for prompt in prompts], seed)

    def noise(prompts: Any, seed: int) -> Tensor:
        return torch.rand(len(prompts), 3, 32, 32, generator=torch.Generator().manual_seed(seed))

    before, *sides = (ask_groups(draw, WORLD, groups(TRIANGLE), 2, 0) for draw in (rendered, circles, noise))
    perfect, broken = (erasure(before, after, TRIANGLE) for after in sides)
    assert perfect.numbers["target detected"].value == 0 and perfect.composite > 0.95
    assert broken.numbers["target detected"].value == 0 and broken.numbers["target invalid"].value > 0.9
    assert broken.composite < 0.1


@pytest.mark.parametrize("target", [Concept(), Concept(*HELD_OUT)], ids=str)
def test_even_everything_and_the_held_out_composition_can_be_judged(target):
    side = ask_groups(rendered, WORLD, groups(target), 1, 0)
    found = erasure(side, side, target)
    assert found.numbers["target detected"].value > 0.9
    assert found.to_json()["composite (ours)"] == found.composite


# attacks


def state(model: Model) -> tuple[dict[str, Tensor], dict[str, bool]]:
    parts = {name: part for name, part in model.pipeline.components.items() if isinstance(part, torch.nn.Module)}
    named = {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}
    return (
        {name: p.detach().clone() for name, p in named.items()},
        {name: p.requires_grad for name, p in named.items()},
    )


@pytest.mark.parametrize(
    ("attack", "options"),
    [
        (attacks.learned_token, {"steps": 2, "n": 2}),
        (attacks.prompt_embedding, {"steps": 2, "n": 4}),
        (attacks.relearning, {"most": 2}),
    ],
    ids=lambda part: getattr(part, "__name__", ""),
)
def test_an_attack_leaves_the_model_as_it_was_to_the_last_bit(adapted, attack, options, monkeypatch):
    if attack is attacks.relearning:  # this model was not erased: without this it would be done at once
        monkeypatch.setattr(attacks, "detected", lambda *args: Interval(0.0, 0.0, 0.1, 32))
    weights, training = state(adapted)
    with adapted.count_nfe() as nfe:
        found = attack(adapted, WORLD, TRIANGLE, SHOWN, **options)
    again, training_after = state(adapted)
    assert weights.keys() == again.keys()
    assert [name for name in weights if not torch.equal(weights[name], again[name])] == []
    assert training_after == training and nfe.total == 0
    assert all(p.grad is None for p in adapted.network.parameters())
    if attack is attacks.relearning:
        assert found == 2
    else:
        assert isinstance(found, Interval) and 0 <= found.low <= found.value <= found.high <= 1


def test_an_attack_that_is_interrupted_puts_the_model_back(adapted, monkeypatch):
    def interrupt(*args: Any) -> Interval:
        raise KeyboardInterrupt

    monkeypatch.setattr(attacks, "detected", interrupt)
    weights, training = state(adapted)
    with pytest.raises(KeyboardInterrupt):
        attacks.learned_token(adapted, WORLD, TRIANGLE, SHOWN, steps=1)
    again, training_after = state(adapted)
    assert all(torch.equal(weights[name], again[name]) for name in weights) and training_after == training


def test_relearning_counts_no_steps_where_the_concept_is_still_there(adapted):
    adapted.scale_adapter(0.0)
    assert attacks.relearning(adapted, WORLD, TRIANGLE, SHOWN, most=5) == 0


# which world judges which model


def test_the_zoos_card_names_its_world(tmp_path):
    assert world_of(ZOO).world.size == 32
    assert card_of(ZOO)["world"] == "shapes"
    assert world_of(str(tmp_path)) is None and world_of("org/name") is None


def test_one_image_that_should_stay_has_no_distances_and_is_counted():
    """A judge may know a single neighbour, of which one image is drawn."""
    red, blue = Concept("red", "star"), Concept("blue", "star")
    images = WORLD.render([red, blue], torch.Generator().manual_seed(0))
    groups = {
        "target": Asked([red], images[:1], WORLD.judge(images[:1])),
        "neighbours": Asked([blue], images[1:], WORLD.judge(images[1:])),
    }
    e = erasure(groups, groups, RED)
    assert e.distances == {} and e.numbers["neighbours right"].n == 1
