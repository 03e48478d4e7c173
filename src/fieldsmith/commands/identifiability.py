"""`fieldsmith distill --identifiability`: what each objective leaves undetermined; nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from fieldsmith.commands import arguments
from fieldsmith.methods.distill.config import DistillConfig, objective_of
from fieldsmith.methods.distill.identifiability import identifiability, unseen_error
from fieldsmith.methods.distill.objectives import OBJECTIVES

HEADERS = ("objective", "rank", "costs nothing", "so at w=3 the guided error is", "condition number")


def show(words: Sequence[str]) -> None:
    """Rank, what costs nothing, and condition number of every objective, or of the one named with its settings."""
    config = arguments.parse(DistillConfig(), words, "distill --identifiability")
    names = (config.objective,) if arguments.peek(words, "--objective") else tuple(OBJECTIVES)
    title = "what an objective determines of the branch errors (e_c, e_u) at one input"
    table = Table(*HEADERS, title=title, title_justify="left")
    for name in names:
        recipe = config.replace(objective=name) if words else DistillConfig.preset_of(name, None, {})
        objective = objective_of(recipe)
        determined = identifiability(objective)
        lost, error = "-", "-"
        if determined.null_direction is not None:
            lost = "({:.2f}, {:.2f})".format(*determined.null_direction)
            error = f"{unseen_error(objective, 3.0):+.2f}"
        rank = f"{determined.rank}"
        if determined.rank != determined.each_time:
            rank += f", {determined.each_time} at each time"
        table.add_row(name, rank, lost, error, f"{determined.condition:.3g}")
    Console().print(table)
