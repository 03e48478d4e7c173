"""`erase` as data for verb.py."""

from fieldsmith.methods.erase.config import EraseConfig
from fieldsmith.methods.erase.measure import measure, preview
from fieldsmith.methods.erase.report import report
from fieldsmith.methods.erase.step import prepare
from fieldsmith.verb import Verb

ERASE = Verb("erase", EraseConfig, prepare, measure, report, preview)
