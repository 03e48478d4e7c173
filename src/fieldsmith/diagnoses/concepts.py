"""Diagnosis 'concepts': whether a model draws what it is asked for, and no more what should be gone; from pixels alone.

In: a model, a world with captions and a judge, its concepts, groups of them, targets. Out: shares by group, images by
concept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fieldsmith.diagnoses import Diagnosis
from fieldsmith.diagnoses.config import ConceptsConfig
from fieldsmith.measure.detection import Asked, Concept, Groups, World, ask, detected, right_by_group
from fieldsmith.measure.drawing import sampler
from fieldsmith.measure.intervals import Interval
from fieldsmith.models.core import Model
from fieldsmith.report.page import Caption, Page

SHOWN = 8  # images of each concept on the page
GONE, FOLLOWED = 0.02, 0.9  # shares: of images with a target that is called gone, of prompts that a good model follows


def diagnosis(
    model: Model,
    config: ConceptsConfig,
    world: World,
    concepts: Sequence[Concept],
    groups: Groups,
    targets: Mapping[Concept, Sequence[str]],
) -> Diagnosis:
    """`each` images of every concept's caption, judged; the first of `groups` is what the verdict is about.

    Where there are `targets`, it is about whether any of the prompts that ask for them, plainly or not, shows them.
    """
    draw = sampler(model, config.steps, config.guidance)
    present = {
        target: detected(draw, world, target, prompts, config.each, config.seed + 1 + place)
        for place, (target, prompts) in enumerate(targets.items())
    }
    asked = ask(draw, world, concepts, config.each, config.seed)
    rows = right_by_group(asked, groups)
    first = next(iter(groups))
    weakest = min(groups, key=lambda name: rows[name].value)
    words = (
        f"{rows[first].short()} of images show all that was asked ({first}); weakest: {weakest}, "
        f"{rows[weakest].short()}; {rows['valid'].short()} are valid."
    )
    shown = [f"{one.short()} of the images that should not show {name} do." for name, one in present.items()]
    words = " ".join((*shown, words))
    images = len(asked.asked) + config.each * sum(map(len, targets.values()))
    numbers = {
        "nfe": images * config.steps * (1 if config.guidance in (None, 1) else 2),
        "right": {name: one.to_json() for name, one in rows.items()},
        "targets": {str(name): one.to_json() for name, one in present.items()},
    }
    page = Page(f"What {model.name} draws", f"{config.steps} steps, {config.each} images a prompt, seed {config.seed}")
    page.verdict(words, *verdict_of(list(present.values()), rows[first]))
    page.table("Judged right", ("prompts", "share [95%]", "n"), [(k, one.short(), one.n) for k, one in rows.items()])
    _images(page, asked, world, config.each)
    return Diagnosis(numbers, words, page)


def verdict_of(present: Sequence[Interval], right: Interval) -> tuple[bool | None, str]:
    """Whether targets are gone, where there are some, else whether prompts are followed; and that in a few words."""
    if any(one.low > GONE for one in present):
        return False, "Still there"
    if present:
        return (True, "Gone") if all(one.high <= 2 * GONE for one in present) else (None, "Not shown to be gone")
    if right.low >= FOLLOWED:
        return True, "Draws what is asked"
    return (False, "Misreads prompts") if right.high < FOLLOWED else (None, "Between the two")


def _images(page: Page, asked: Asked, world: World, each: int) -> None:
    names, right = asked.seen.names(), asked.right().tolist()
    rows, captions = [], []
    for concept in dict.fromkeys(asked.asked):
        places = [i for i, one in enumerate(asked.asked) if one == concept][:SHOWN]
        rows.append((world.caption(concept), asked.images[places]))
        captions.append([Caption(names[i], right[i]) for i in places])
    page.images("By prompt, with what the judge sees", [""] * min(each, SHOWN), rows, captions)
