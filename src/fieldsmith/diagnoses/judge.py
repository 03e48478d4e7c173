"""Diagnosis 'judge': how far to trust a judge of edits, which way of asking, how many replies; or a judge of images.

In: the judge in each mode, and edits of graded quality, made without a model, whose truth is known. Out: bias, noise
and correlation with the truth by mode and question, what to use at each cost. Of a judge of images (measure/detect.py)
and a world: how often it and the world's exact judge agree.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fieldsmith.diagnoses import Diagnosis
from fieldsmith.diagnoses.config import JudgeConfig
from fieldsmith.errors import InputError, RunError
from fieldsmith.measure.detect import Detector, Pictures, Prompt, agreement
from fieldsmith.measure.intervals import Interval
from fieldsmith.measure.judges import JudgeMeasures, Recommendation, measure_judge, recommend
from fieldsmith.measure.progress import CONSOLE, track
from fieldsmith.models.core import Model
from fieldsmith.report.page import Caption, Page
from fieldsmith.rewards.edits import EditJudge
from fieldsmith.worlds.asked import Asked
from fieldsmith.worlds.scenes_graded import Graded

UPSCALE = 8  # the side of each of the scenes' pixels as the judge sees it
BUDGETS, BUDGET = (1, 4, 16), 4  # replies to each question of an edit that one may pay for; the verdict's
GOOD, FAIR = 0.7, 0.4  # correlations within groups from which a judge is to be trusted, or with care
SHOWN = 4  # instructions on the page
QUESTIONS = ("following", "consistency")
AGREES, ERRS = 0.9, 0.75  # shares of questions from which a judge of images is to be trusted, or with care
HOW = (
    "An advantage compares the edits of one instruction, so a bias that they share costs nothing: what counts is the "
    "correlation within groups. Noise costs, but replies can be averaged: n is how many leave noise a tenth of the "
    "variance. Variance is that of single replies about one edit; false done is the share of replies from 0.5 on about "
    "edits whose truth is 0; seconds are what one reply took here.",
    "Truth of following: 1 where the turn is done, else how far its cells have come from the source to the plan. Truth "
    "of consistency: how like the source the cells are that the instruction does not name. Both are read from pixels.",
    "In the advice a reply costs the same in every mode, though one that reasons is longer.",
)

OF_IMAGES = (
    "Pictures are the world's own, so that what each shows is known; each is asked about that and about another thing "
    "of the world. A judge made for photographs may see them worse than those: what it errs here it may not err there.",
)


@dataclass(frozen=True)
class Scores:
    """A judge's scores of single replies in one mode, (replies, g, k) to each question, and seconds a reply."""

    following: Tensor
    consistency: Tensor
    seconds: float


@dataclass(frozen=True)
class Advice:
    """What to use for a number of replies, and the correlation within groups that it reaches by question."""

    use: Recommendation
    reached: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self.use) | {"correlation_within": self.reached}


def diagnosis(model: Model | None, config: JudgeConfig, **judged: Any) -> Diagnosis:
    """Of edits, or of images where a detector is given. `model` is not used: a judge stands alone.

    Raises RunError where no mode of a judge of edits answers.
    """
    return (of_images if "detector" in judged else of_edits)(config, **judged)


def of_images(config: JudgeConfig, detector: Detector, world: Asked) -> Diagnosis:
    """A detector asked about pictures of a world, each of what it shows and of something else.

    Raises InputError where it knows nothing of what the world shows.
    """
    concepts = [one for one in world.concepts() if detector.find(world.world.caption(one))]
    if len(concepts) < 2:
        detector.known(world.world.caption(world.concepts()[0]))
        raise InputError(f"judge '{detector.name}' sees only {len(concepts)} thing that the {world.name} world shows")
    prompts = {one: Prompt(words, detector.known(words)) for one in concepts if (words := world.world.caption(one))}
    n, m = config.samples, len(concepts)
    places = torch.arange(n) * m // n if n < m else torch.arange(n) % m  # evenly from all
    shown = [concepts[i] for i in places.tolist()]
    others = [concepts[i] for i in ((places + 1 + torch.arange(n) % (m - 1)) % m).tolist()]
    images = world.world.render(shown, torch.Generator().manual_seed(config.seed))
    exact = world.world.judge(images)
    names = tuple(dict.fromkeys(one.concept for one in prompts.values()))
    seen = Pictures(detector, names).judge(_enlarged(images))
    said = torch.cat([seen.answers([prompts[one] for one in asked]) for asked in (shown, others)])
    every = [*shown, *others]
    truth = torch.stack([exact.shows(one)[i % n] for i, one in enumerate(every)])
    whole = agreement(said, truth)
    by_concept = {
        str(one): agreement(said[rows], truth[rows])
        for one in dict.fromkeys(every)
        if len(rows := torch.tensor([i for i, asked in enumerate(every) if asked == one]))
    }
    agrees, hits, false_alarms = (whole[name] for name in whole)
    words = (
        f"{detector.name} agrees with the exact judge in {agrees.short()} of {agrees.n} questions about the "
        f"{world.name} world: it sees {hits.short() if hits else 'none'} of what is there, and "
        f"{false_alarms.short() if false_alarms else 'none'} of what is not."
    )
    good = agrees.low >= AGREES
    word = "To be trusted" if good else "Not to be trusted" if agrees.high < ERRS else "With care"
    page = Page(
        f"The judge {detector.name}", f"{config.samples} pictures of the {world.name} world, seed {config.seed}"
    )
    page.verdict(words, good if good or agrees.high < ERRS else None, word)
    lines = [(name, *(part.short() if part else "-" for part in one.values())) for name, one in by_concept.items()]
    page.table(
        "By what was asked for", ("asked for", *whole), lines, note=f"{detector.origin}; from {detector.threshold:g}"
    )
    page.text("How to read it", OF_IMAGES)
    apart = {name: _plain(one) for name, one in by_concept.items()}
    numbers = {
        "nfe": 0, "judge": detector.name, "origin": detector.origin, "threshold": detector.threshold,
        "world": world.name, **_plain(whole), "concepts": apart,
    }  # fmt: skip
    return Diagnosis(numbers, words, page)


def _plain(shares: Mapping[str, Interval | None]) -> dict[str, Any]:
    return {name: one and one.to_json() for name, one in shares.items()}


def of_edits(
    config: JudgeConfig,
    judges: Mapping[str, EditJudge],
    edits: Graded,
    name: str,
    address: Callable[[str, int], str],
) -> Diagnosis:
    """`judges` by mode, each giving as many replies; address(mode, n) is what `fieldsmith edit --judge` takes for one.

    Raises RunError where no mode answers.
    """
    scores: dict[str, Scores] = {}
    refused: dict[str, str] = {}
    for mode, judge in track(list(judges.items()), f"asking {2 * edits.following.numel()} questions in each mode"):
        try:
            scores[mode] = _asked(judge, edits)
        except RunError as error:  # a server without log-probabilities still has the other modes
            refused[mode] = str(error)
            CONSOLE.print(f"mode {mode} failed: {error}", markup=False)
    if not scores:
        raise RunError(next(iter(refused.values())))
    measures = measured(edits, scores, config.seed)
    advice = {calls: _advice(measures, calls) for calls in BUDGETS}
    replies = len(next(iter(scores.values())).following)
    numbers = {
        "nfe": 0,
        "judge": name,
        "replies": replies,
        "refused": refused,
        "modes": {
            mode: {question: _json(one) for question, one in by_question.items()}
            | {"seconds_per_reply": scores[mode].seconds}
            for mode, by_question in measures.items()
        },
        "kinds": by_kind(edits, scores),
        "recommended": {calls: one and one.to_json() for calls, one in advice.items()},
    }
    words = words_of(name, measures, advice[BUDGET])
    page = Page(
        f"The judge of edits {name}",
        f"{config.samples} instructions with {len(edits.kinds)} edits each, {replies} replies to a question; seed "
        f"{config.seed}",
    )
    page.verdict(words, *verdict_of(advice[BUDGET]))
    _sections(page, measures, advice, scores, refused, edits)
    page.text("How to read it", HOW)
    if best := advice[BUDGET]:
        page.command("Train with it", f'fieldsmith edit --judge "{address(best.use.mode, best.use.n)}" ...')
    return Diagnosis(numbers, words, page)


def _asked(judge: EditJudge, edits: Graded) -> Scores:
    """Both questions about every edit. Raises RunError where the server fails, or cannot be asked like this."""
    groups, kinds = edits.after.shape[:2]
    instructions = [words for words in edits.sessions.prompts(1) for _ in range(kinds)]
    before, after = _enlarged(edits.before.repeat_interleave(kinds, 0)), _enlarged(edits.after.flatten(0, 1))
    began = time.monotonic()
    following = judge.following(before, after, instructions)
    consistency = judge.consistency(before, after, [[one] for one in instructions])
    seconds = (time.monotonic() - began) / (2 * following.numel())
    first, second = (part.cpu().unflatten(1, (groups, kinds)) for part in (following, consistency))
    return Scores(first, second, seconds)


def _enlarged(images: Tensor) -> Tensor:
    """Each pixel as a square of UPSCALE pixels, so that a model made for photographs sees the shapes."""
    return images.repeat_interleave(UPSCALE, -1).repeat_interleave(UPSCALE, -2)


def measured(edits: Graded, scores: Mapping[str, Scores], seed: int) -> dict[str, dict[str, JudgeMeasures]]:
    """Every mode against the truth, by question and both together."""
    truth = {name: getattr(edits, name) for name in QUESTIONS}
    truth["both"] = torch.cat([truth[name] for name in QUESTIONS])
    measures = {}
    for mode, given in scores.items():
        of_mode = {name: getattr(given, name) for name in QUESTIONS}
        # a question about a group of edits is a group: a run's advantages are formed there
        of_mode["both"] = torch.cat([of_mode[name] for name in QUESTIONS], 1)
        measures[mode] = {
            name: measure_judge(truth[name], of_mode[name], torch.Generator().manual_seed(seed)) for name in truth
        }
    return measures


def by_kind(edits: Graded, scores: Mapping[str, Scores]) -> dict[str, dict[str, dict[str, float]]]:
    """By question and kind of edit: the mean truth, and the mean score of each mode."""
    return {
        name: {
            kind: {"truth": float(getattr(edits, name)[:, at].mean())}
            | {mode: float(getattr(given, name)[:, :, at].mean()) for mode, given in scores.items()}
            for at, kind in enumerate(edits.kinds)
        }
        for name in QUESTIONS
    }


def _advice(measures: Mapping[str, Mapping[str, JudgeMeasures]], calls: int) -> Advice | None:
    """The best mode for so many replies; None where none ranks edits as the truth does."""
    try:
        best = recommend({mode: every["both"] for mode, every in measures.items()}, calls)
    except ValueError:
        return None
    return Advice(best, {name: one.correlation_within_at(best.n) for name, one in measures[best.mode].items()})


def _json(measures: JudgeMeasures) -> dict[str, Any]:
    return dataclasses.asdict(measures) | {"replies_needed": measures.replies_needed()}


# the verdict


def verdict_of(advice: Advice | None) -> tuple[bool | None, str]:
    """Whether to trust the judge as recommended (None: with care), and that in two or three words.

    The question that it answers worse decides.
    """
    reached = min(advice.reached[name] for name in QUESTIONS) if advice else 0.0
    if reached >= GOOD:
        return True, "To be trusted"
    return (None, "Use with care") if reached >= FAIR else (False, "Not to be trusted")


def words_of(name: str, measures: Mapping[str, Mapping[str, JudgeMeasures]], advice: Advice | None) -> str:
    """The recommendation in a few sentences."""
    if advice is None:
        return (
            f"{name} ranks edits of one instruction no better than chance in mode {', '.join(measures)}; take another "
            "model."
        )
    use, following = advice.use, measures[advice.use.mode]["following"]
    reached = " and ".join(f"{advice.reached[question]:.2f} in {question}" for question in QUESTIONS)
    words = f"Use mode={use.mode} and n={use.n}: {use.why}. By question that is {reached}."
    words += f" Its scores of following lie {following.bias.value:+.2f} from the truth"
    if following.false_done:
        words += f", and {100 * following.false_done.value:.0f}% of its replies call an edit done that is not"
    return words + "."


# the page


def _sections(
    page: Page, measures: Mapping[str, Mapping[str, JudgeMeasures]], advice: Mapping[int, Advice | None],
    scores: Mapping[str, Scores], refused: Mapping[str, str], edits: Graded,
) -> None:  # fmt: skip
    chosen = advice[BUDGET]
    best = chosen.use.mode if chosen else next(iter(scores))
    cards = [("use", f"{best}, n={chosen.use.n}", f"of {BUDGET} replies to a question")] if chosen else []
    for name in QUESTIONS:
        one = measures[best][name].correlation_within
        cards.append((name, f"{one.value:.2f}", f"correlation within groups, one reply,{one.bounds('.2f')}"))
    false_done = measures[best]["following"].false_done
    if false_done:
        what = "of replies about edits that did nothing asked for"
        cards.append(("false done", f"{100 * false_done.value:.0f}%", what))
    page.numbers(cards)
    none = (None, None, "no mode ranks edits as the truth does")
    advised = [(calls, *((one.use.mode, one.use.n, one.use.why) if one else none)) for calls, one in advice.items()]
    headers = ("replies you can pay for", "mode", "n", "why")
    page.table("What to use", headers, advised, highlight=[BUDGETS.index(BUDGET)])
    by_mode = [
        (mode, name, _cell(one.correlation_within), _cell(one.bias), f"{one.variance.value:.3f}", one.replies_needed(),
         _percent(one.false_done), f"{scores[mode].seconds:.2g}")
        for mode, by_question in measures.items() for name in QUESTIONS for one in (by_question[name],)
    ]  # fmt: skip
    columns = ("mode", "question", "correlation within", "bias", "variance", "n", "false done", "seconds")
    note = "; ".join(f"mode {mode} failed: {why}" for mode, why in refused.items())
    page.table("By mode, one reply, with 95% intervals", columns, by_mode, note=note)
    for name, kinds in by_kind(edits, scores).items():
        rows = [(kind, *(f"{value:.2f}" for value in values.values())) for kind, values in kinds.items()]
        page.table(f"Mean score of {name} by kind of edit", ("edit", "truth", *scores), rows)
    _images(page, edits, scores[best], best)


def _cell(one: Interval) -> str:
    return f"{one.value:.2f}{one.bounds('.2f')}"


def _percent(one: Interval | None) -> str | None:
    return None if one is None else f"{100 * one.value:.0f}%{one.bounds('.0f', 100)}"


def _images(page: Page, edits: Graded, scores: Scores, mode: str) -> None:
    """A few instructions: the source, each kind of edit, what is true and what was scored."""
    instructions = edits.sessions.prompts(1)[:SHOWN]
    rows = [(words, [edits.before[row], *edits.after[row]]) for row, words in enumerate(instructions)]
    means = {name: getattr(scores, name).mean(0) for name in QUESTIONS}
    captions = []
    for row in range(len(instructions)):
        line = [Caption("")]
        for at in range(len(edits.kinds)):
            parts = [
                f"{name[0].upper()}\u00a0{means[name][row, at]:.2f}\u00a0({getattr(edits, name)[row, at]:.2f})"
                for name in QUESTIONS
            ]
            line.append(Caption(" ".join(parts)))
        captions.append(line)
    note = f"F: following, C: consistency, as mode {mode} scores them on average; the truth in brackets."
    page.images("Some of the edits", ("source", *edits.kinds), rows, captions, note)
