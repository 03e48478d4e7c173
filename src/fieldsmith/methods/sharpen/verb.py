"""`sharpen` as data for verb.py."""

from fieldsmith.methods.sharpen.config import SharpenConfig
from fieldsmith.methods.sharpen.measure import measure, preview
from fieldsmith.methods.sharpen.report import report
from fieldsmith.methods.sharpen.step import prepare
from fieldsmith.verb import Verb

SHARPEN = Verb(
    "sharpen", SharpenConfig, prepare, measure, report, preview, evaluated="samples",
    fsdp=False, frozen=lambda config: config.method == "guide",
)  # fmt: skip
