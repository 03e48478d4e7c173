"""Diagnosis 'concepts': whether a model draws what it is asked for, read from pixels alone.

In: a model, a world with captions and a judge, its concepts, and groups of them. Out: shares by group, images by
concept.
"""

from __future__ import annotations

from collections.abc import Sequence

from fieldsmith.diagnoses import Diagnosis
from fieldsmith.diagnoses.config import ConceptsConfig
from fieldsmith.measure.detection import Asked, Concept, Groups, World, ask, right_by_group
from fieldsmith.measure.drawing import sampler
from fieldsmith.models.core import Model
from fieldsmith.report.page import Caption, Page

SHOWN = 8  # images of each concept on the page


def diagnosis(
    model: Model, config: ConceptsConfig, world: World, concepts: Sequence[Concept], groups: Groups
) -> Diagnosis:
    """`each` images of every concept's caption, judged; the first of `groups` is what the verdict is about."""
    asked = ask(sampler(model, config.steps, config.guidance), world, concepts, config.each, config.seed)
    rows = right_by_group(asked, groups)
    first = next(iter(groups))
    weakest = min(groups, key=lambda name: rows[name].value)
    words = (
        f"{rows[first].short()} of images show all that was asked ({first}); weakest: {weakest}, "
        f"{rows[weakest].short()}; {rows['valid'].short()} are valid."
    )
    cost = len(asked.asked) * config.steps * (1 if config.guidance in (None, 1) else 2)
    numbers = {"nfe": cost, "right": {name: one.to_json() for name, one in rows.items()}}
    page = Page(f"What {model.name} draws", f"{config.steps} steps, {config.each} images a prompt, seed {config.seed}")
    page.verdict(words, None, "Judged")
    page.table("Judged right", ("prompts", "share [95%]", "n"), [(k, one.short(), one.n) for k, one in rows.items()])
    _images(page, asked, world, config.each)
    return Diagnosis(numbers, words, page)


def _images(page: Page, asked: Asked, world: World, each: int) -> None:
    names, right = asked.seen.names(), asked.right().tolist()
    rows, captions = [], []
    for concept in dict.fromkeys(asked.asked):
        places = [i for i, one in enumerate(asked.asked) if one == concept][:SHOWN]
        rows.append((world.caption(concept), asked.images[places]))
        captions.append([Caption(names[i], right[i]) for i in places])
    page.images("By prompt, with what the judge sees", [""] * min(each, SHOWN), rows, captions)
