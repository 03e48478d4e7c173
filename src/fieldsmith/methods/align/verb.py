"""`align` as data for verb.py."""

from fieldsmith.methods.align.config import AlignConfig
from fieldsmith.methods.align.measure import measure, preview
from fieldsmith.methods.align.report import report
from fieldsmith.methods.align.step import prepare
from fieldsmith.verb import Verb

ALIGN = Verb(
    "align", AlignConfig, prepare, measure, report, preview,
    groups=lambda config: (min(config.prompts_per_epoch, len(config.prompts) or 1), "prompts_per_epoch"),
    states=lambda config: {
        f"prompts_per_epoch={config.prompts_per_epoch} x rollouts={config.rollouts}": config.prompts_per_epoch
        * config.rollouts
    },
)  # fmt: skip
