"""`distill` as data for verb.py."""

from fieldsmith.methods.distill.config import DistillConfig
from fieldsmith.methods.distill.measure import measure, preview
from fieldsmith.methods.distill.report import report
from fieldsmith.methods.distill.step import prepare
from fieldsmith.verb import Verb

# the teacher is frozen, whatever the student trains
DISTILL = Verb(
    "distill",
    DistillConfig,
    prepare,
    measure,
    report,
    preview,
    source="teacher",
    fsdp=False,
    frozen=lambda config: True,
)
