"""The one engine that runs a model and its guide: what they are called with, and runs of several draws at once."""

from pyro_ilvae._programs.arguments import Arguments, ModelArgs, are_batches
from pyro_ilvae._programs.handlers import Release, Replay
from pyro_ilvae._programs.loaders import ArgumentsInBatches
from pyro_ilvae._programs.masks import within_event
from pyro_ilvae._programs.runs import MOST_PAIRS, Program, Runs, Values
from pyro_ilvae._programs.sites import (
    SiteShape,
    drawn,
    is_data,
    is_deterministic,
    is_variable,
    sample_sites,
    site_bytes,
    site_log_prob,
    site_numbers,
    site_shape,
)

__all__ = [
    "MOST_PAIRS",
    "Arguments",
    "ArgumentsInBatches",
    "ModelArgs",
    "Program",
    "Release",
    "Replay",
    "Runs",
    "SiteShape",
    "Values",
    "are_batches",
    "drawn",
    "is_data",
    "is_deterministic",
    "is_variable",
    "sample_sites",
    "site_bytes",
    "site_log_prob",
    "site_numbers",
    "site_shape",
    "within_event",
]
