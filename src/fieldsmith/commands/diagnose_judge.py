"""`fieldsmith diagnose --judge-of-edits`: how far to trust a judge of edits, which way of asking, how many replies.

In: a DiagnoseConfig with the server's address. Out: a run directory with metrics.json and report.html. The edits are
made without a model, of graded quality, in the scenes world, which knows the truth.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlencode

from fieldsmith.commands import arguments
from fieldsmith.errors import InputError, RunError

if TYPE_CHECKING:
    from torch import Tensor

    from fieldsmith.commands.diagnose import DiagnoseConfig
    from fieldsmith.metrics.judges import JudgeMeasures
    from fieldsmith.report.page import Page
    from fieldsmith.rewards.edits import EditJudge
    from fieldsmith.run import Run
    from fieldsmith.worlds.scenes_graded import Graded

SIZE, UPSCALE = 24, 8  # the scenes' pixels, and the side of each as the judge sees it
BUDGETS, BUDGET = (1, 4, 16), 4  # replies to each question of an edit that one may pay for; the verdict's
GOOD, FAIR = 0.7, 0.4  # correlations within groups from which a judge is to be trusted, or with care
SHOWN = 4  # instructions on the page
QUESTIONS = ("following", "consistency")
HOW = (
    "An advantage compares the edits of one instruction, so a bias that they share costs nothing: what counts is the "
    "correlation within groups. Noise costs, but replies can be averaged: n is how many leave noise a tenth of the "
    "variance. Variance is that of single replies about one edit; false done is the share of replies from 0.5 on about "
    "edits whose truth is 0; seconds are what one reply took here.",
    "Truth of following: 1 where the turn is done, else how far its cells have come from the source to the plan. Truth "
    "of consistency: how like the source the cells are that the instruction does not name. Both are read from pixels.",
    "In the advice a reply costs the same in every mode, though one that reasons is longer.",
)


@dataclass(frozen=True)
class OutputAndFeatures:
    """What a judge said in one mode: scores of single replies (replies, groups, kinds) to each question, and when."""

    following: Tensor
    consistency: Tensor
    seconds: float  # a reply


def run(config: DiagnoseConfig) -> Run:
    """The whole instrument; the finished run directory. Raises InputError before anything is written, and RunError
    where the server answers in no mode."""
    from rich.console import Console

    from fieldsmith.worlds.scenes import ScenesWorld
    from fieldsmith.worlds.scenes_graded import KINDS, graded

    console = Console(stderr=True)
    directory = arguments.directory_of(config, "diagnose")
    if directory.finished:
        console.print(f"this run is complete: {directory.folder / 'report.html'}")
        return directory
    began = time.monotonic()
    judges = judges_of(str(config.judge_of_edits))
    replies = next(iter(judges.values())).options.n
    edits = graded(ScenesWorld(SIZE), config.samples, config.seed)
    count = 2 * config.samples * len(KINDS)
    console.print(f"{count} questions, {replies} replies to each, in mode {', '.join(judges)}")
    heard: dict[str, OutputAndFeatures] = {}
    refused: dict[str, str] = {}
    for mode, judge in judges.items():
        with console.status(f"asking in mode {mode}"):
            try:
                heard[mode] = _asked(judge, edits)
            except RunError as error:  # a server without log-probabilities still has the other modes
                refused[mode] = str(error)
                console.print(f"mode {mode} failed: {error}", markup=False)
    if not heard:
        raise RunError(next(iter(refused.values())))
    directory.begin()
    metrics = {
        "method": "diagnose", "instrument": "judge of edits", "forward_equivalents": 0,
        "judge": next(iter(judges.values())).server.name, "replies": replies, "refused": refused,
        **measured(edits, heard, config.seed),
    }  # fmt: skip
    metrics["seconds"] = time.monotonic() - began
    metrics["words"] = words_of(metrics)
    _page(config, metrics, edits, heard, directory).write(directory.folder / "report.html")
    directory.finish(metrics)
    console.print(metrics["words"])
    console.print(f"page: {directory.folder / 'report.html'}")
    return directory


def judges_of(address: str) -> dict[str, EditJudge]:
    """A judge in each mode that the address names (none: all), with at least two replies.

    Raises InputError at another kind of judge, bad options, and where the server does not answer.
    """
    from fieldsmith.rewards.edits import MODES, edit_judge

    kind, _, rest = address.partition(":")
    if kind != "remote":
        raise InputError(f"judge '{address}' is unknown; use remote:http://HOST:PORT/v1?model=MODEL")
    base, _, query = rest.partition("?")
    options = parse_qsl(query, keep_blank_values=True)
    modes = tuple(dict.fromkeys(value for name, value in options if name == "mode")) or MODES
    given = {"n": "4", "temperature": "0.7"} | {name: value for name, value in options if name != "mode"}
    if given["n"] == "1":
        raise InputError("n=1 reply has no variance to measure; give n=2 or more, 4 is a good start")
    judges = {}
    for mode in modes:
        # checks are for the checklist, which is one of several modes here
        left_out = () if mode == "checklist" or len(modes) == 1 else ("checks",)
        mine = {name: value for name, value in given.items() if name not in left_out}
        judges[mode] = edit_judge(f"{base}?{urlencode({**mine, 'mode': mode})}")
    return judges


def _asked(judge: EditJudge, edits: Graded) -> OutputAndFeatures:
    """Both questions about every edit. Raises RunError where the server fails, or cannot be asked like this."""
    groups, kinds = edits.after.shape[:2]
    told = [words for words in edits.sessions.prompts(1) for _ in range(kinds)]
    before, after = _enlarged(edits.before.repeat_interleave(kinds, 0)), _enlarged(edits.after.flatten(0, 1))
    began = time.monotonic()
    following = judge.following(before, after, told)
    consistency = judge.consistency(before, after, [[one] for one in told])
    seconds = (time.monotonic() - began) / (2 * following.numel())
    first, second = (part.cpu().unflatten(1, (groups, kinds)) for part in (following, consistency))
    return OutputAndFeatures(first, second, seconds)


def _enlarged(images: Tensor) -> Tensor:
    """Each pixel as a square of UPSCALE pixels, so that a model made for photographs sees the shapes."""
    return images.repeat_interleave(UPSCALE, -1).repeat_interleave(UPSCALE, -2)


def measured(edits: Graded, heard: dict[str, OutputAndFeatures], seed: int) -> dict[str, Any]:
    """Every mode against the truth, by question and both together; scores by kind of edit; what to use at each cost."""
    import torch

    from fieldsmith.metrics.judges import measure_judge, recommend
    from fieldsmith.worlds.scenes_graded import KINDS

    truth = {name: getattr(edits, name) for name in QUESTIONS}
    truth["both"] = torch.cat([truth[name] for name in QUESTIONS])
    modes: dict[str, Any] = {}
    measures: dict[str, dict[str, JudgeMeasures]] = {}
    for mode, said in heard.items():
        scores = {name: getattr(said, name) for name in QUESTIONS}
        # a question about a group of edits is a group: a run's advantages are formed there
        scores["both"] = torch.cat([scores[name] for name in QUESTIONS], 1)
        measures[mode] = {
            name: measure_judge(truth[name], scores[name], torch.Generator().manual_seed(seed)) for name in truth
        }
        modes[mode] = {name: _json(one) for name, one in measures[mode].items()}
        modes[mode]["seconds_per_reply"] = said.seconds
    kinds = {
        name: {
            kind: {"truth": float(truth[name][:, at].mean())}
            | {mode: float(getattr(said, name)[:, :, at].mean()) for mode, said in heard.items()}
            for at, kind in enumerate(KINDS)
        }
        for name in QUESTIONS
    }
    advice: dict[int, Any] = {}
    for calls in BUDGETS:
        try:
            best = recommend({mode: every["both"] for mode, every in measures.items()}, calls)
        except ValueError:  # none ranks edits as the truth does
            advice[calls] = None
        else:
            reached = {name: one.correlation_within_at(best.n) for name, one in measures[best.mode].items()}
            advice[calls] = dataclasses.asdict(best) | {"correlation_within": reached}
    return {"modes": modes, "kinds": kinds, "recomfixed": advice}


def _json(measures: JudgeMeasures) -> dict[str, Any]:
    return dataclasses.asdict(measures) | {"replies_needed": measures.replies_needed()}


def verdict_of(metrics: dict[str, Any]) -> tuple[bool | None, str]:
    """Whether to trust the judge as recomfixed (None: with care), and that in two or three words.

    The question that it answers worse decides.
    """
    advice = metrics["recomfixed"][BUDGET]
    reached = min(advice["correlation_within"][name] for name in QUESTIONS) if advice else 0.0
    if reached >= GOOD:
        return True, "To be trusted"
    return (None, "Use with care") if reached >= FAIR else (False, "Not to be trusted")


def words_of(metrics: dict[str, Any]) -> str:
    """The recommendation in a few sentences."""
    advice = metrics["recomfixed"][BUDGET]
    if advice is None:
        return (
            f"{metrics['judge']} ranks edits of one instruction no better than chance in mode "
            f"{', '.join(metrics['modes'])}; take another model."
        )
    reached = " and ".join(f"{advice['correlation_within'][name]:.2f} in {name}" for name in QUESTIONS)
    said = f"Use mode={advice['mode']} and n={advice['n']}: {advice['why']}. By question that is {reached}."
    found = metrics["modes"][advice["mode"]]["following"]
    said += f" Its scores of following lie {found['bias']['value']:+.2f} from the truth"
    if found["false_done"]:
        said += f", and {100 * found['false_done']['value']:.0f}% of its replies call an edit done that is not"
    return said + "."


def _interval(one: dict[str, Any]) -> str:
    return f"{one['value']:.2f} [{one['low']:.2f}, {one['high']:.2f}]"


def _page(
    config: DiagnoseConfig, metrics: dict[str, Any], edits: Graded, heard: dict[str, OutputAndFeatures], directory: Run
) -> Page:
    from fieldsmith.report.page import Page

    kinds = edits.after.shape[1]
    page = Page(
        f"The judge of edits {metrics['judge']}",
        f"{config.samples} instructions with {kinds} edits each, {metrics['replies']} replies to a question; seed "
        f"{config.seed}",
    )
    page.verdict(metrics["words"], *verdict_of(metrics))
    advice = metrics["recomfixed"][BUDGET]
    best = advice["mode"] if advice else next(iter(heard))
    found = metrics["modes"][best]
    cards = [("use", f"{best}, n={advice['n']}", f"of {BUDGET} replies to a question")] if advice else []
    for name in QUESTIONS:
        one = found[name]["correlation_within"]
        span = _interval(one).partition(" ")[2]
        cards.append((name, f"{one['value']:.2f}", f"correlation within groups, one reply, {span}"))
    if found["following"]["false_done"]:
        one = found["following"]["false_done"]
        cards.append(("false done", f"{100 * one['value']:.0f}%", "of replies about edits that did nothing asked for"))
    page.numbers(cards)
    none = (None, None, "no mode ranks edits as the truth does")
    advised = [
        (calls, *((one["mode"], one["n"], one["why"]) if one else none)) for calls, one in metrics["recomfixed"].items()
    ]
    headers = ("replies you can pay for", "mode", "n", "why")
    page.table("What to use", headers, advised, highlight=[BUDGETS.index(BUDGET)])
    by_mode = [
        (mode, name, _interval(one[name]["correlation_within"]), _interval(one[name]["bias"]),
         f"{one[name]['variance']['value']:.3f}", one[name]["replies_needed"], _percent(one[name]["false_done"]),
         f"{one['seconds_per_reply']:.2g}")
        for mode, one in metrics["modes"].items() for name in QUESTIONS
    ]  # fmt: skip
    columns = ("mode", "question", "correlation within", "bias", "variance", "n", "false done", "seconds")
    note = "; ".join(f"mode {mode} failed: {why}" for mode, why in metrics["refused"].items())
    page.table("By mode, one reply, with 95% intervals", columns, by_mode, note=note)
    for name in QUESTIONS:
        by_kind = metrics["kinds"][name]
        rows = [(kind, *(f"{value:.2f}" for value in values.values())) for kind, values in by_kind.items()]
        page.table(f"Mean score of {name} by kind of edit", ("edit", "truth", *heard), rows)
    _edits(page, edits, heard[best], best)
    page.text("How to read it", HOW)
    commands = [f"fieldsmith diagnose --config {directory.folder}/config.toml --out ANOTHER-FOLDER"]
    if advice:
        commands.append(f'fieldsmith edit --judge "{_address(config, advice)}" ...')
    page.command("Repeat it, train with it", commands)
    return page


def _percent(one: dict[str, Any] | None) -> str | None:
    return None if one is None else f"{100 * one['value']:.0f}% [{100 * one['low']:.0f}, {100 * one['high']:.0f}]"


def _address(config: DiagnoseConfig, advice: dict[str, Any]) -> str:
    """The judge as recomfixed, as `fieldsmith edit` takes it."""
    base, _, query = str(config.judge_of_edits).partition("?")
    given = {"temperature": "0.7"} | dict(parse_qsl(query, keep_blank_values=True))
    if advice["mode"] != "checklist":
        given.pop("checks", None)
    return f"{base}?{urlencode({**given, 'mode': advice['mode'], 'n': advice['n']})}"


def _edits(page: Page, edits: Graded, said: OutputAndFeatures, mode: str) -> None:
    """A few instructions: the source, each kind of edit, what is true and what was said."""
    from fieldsmith.report.page import Caption
    from fieldsmith.worlds.scenes_graded import KINDS

    told = edits.sessions.prompts(1)[:SHOWN]
    rows = [(words, [edits.before[row], *edits.after[row]]) for row, words in enumerate(told)]
    means = {name: getattr(said, name).mean(0) for name in QUESTIONS}
    captions = []
    for row in range(len(told)):
        line = [Caption("")]
        for at in range(len(KINDS)):
            parts = [
                f"{name[0].upper()}\u00a0{means[name][row, at]:.2f}\u00a0({getattr(edits, name)[row, at]:.2f})"
                for name in QUESTIONS
            ]
            line.append(Caption(" ".join(parts)))
        captions.append(line)
    note = f"F: following, C: consistency, as mode {mode} scores them on average; the truth in brackets."
    page.images("Some of the edits", ("source", *KINDS), rows, captions, note)
