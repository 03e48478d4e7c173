"""`align` as data for verb.py."""

from fieldsmith.methods.align.config import AlignConfig
from fieldsmith.methods.align.measure import measure, preview
from fieldsmith.methods.align.report import report
from fieldsmith.methods.align.step import prepare
from fieldsmith.verb import Verb


def _groups(config: AlignConfig) -> tuple[int, str]:
    n = config.prompts_per_epoch
    return n if config.estimator == "dpo" else min(n, len(config.prompts) or 1), "prompts_per_epoch"


def _states(config: AlignConfig) -> dict[str, int]:
    name = "renoise" if config.estimator == "dpo" else "rollouts"
    n = getattr(config, name)
    return {f"prompts_per_epoch={config.prompts_per_epoch} x {name}={n}": config.prompts_per_epoch * n}


ALIGN = Verb(
    "align", AlignConfig, prepare, measure, report, preview,
    groups=_groups, states=_states,
)  # fmt: skip
