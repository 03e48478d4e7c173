"""`edit` as data for verb.py."""

from fieldsmith.methods.edit.config import EditConfig
from fieldsmith.methods.edit.measure import measure, preview
from fieldsmith.methods.edit.report import report
from fieldsmith.methods.edit.step import prepare
from fieldsmith.verb import Verb

EDIT = Verb(
    "edit", EditConfig, prepare, measure, report, preview, groups=lambda config: (config.groups, "groups"),
    states=lambda config: {f"groups={config.groups} x rollouts={config.rollouts}": config.groups * config.rollouts},
)  # fmt: skip
