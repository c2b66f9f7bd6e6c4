"""Whether a model, a guide and their arguments are what a diagnostic expects, in words that name them."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from pyro_ilvae import _checks
from pyro_ilvae._programs import Program, Runs, is_data, is_variable, sample_sites

# Python's words for arguments that do not fit the parameters of a function.
_OTHER_ARGUMENTS = re.compile(r"missing \d+ required|positional argument|keyword argument|multiple values for")


def check_programs(model: Program, guide: Program) -> None:
    """Raise unless model and guide can be called."""
    _checks.function("model", model, "a function or a module")
    _checks.function("guide", guide, "a function or a module")


@contextmanager
def naming_arguments(*, any_error: bool = False) -> Iterator[None]:
    """Names the arguments in a TypeError of a call that does not fit model or guide, or in any TypeError."""
    try:
        yield
    except TypeError as error:
        if any_error or _OTHER_ARGUMENTS.search(str(error)):
            raise TypeError(
                f"Expected model_args and model_kwargs that model and guide can be called with, got others: {error}"
            ) from error
        raise


def check_order(runs: Runs) -> None:
    """Raise for a guide and a model in each other's place, where only the first observes data."""
    observed = {site["name"] for site in sample_sites(runs.model_trace) if is_data(site)}
    data = [site["name"] for site in sample_sites(runs.guide_trace) if is_data(site) and is_variable(site)]
    if data and not observed:
        raise ValueError(f"Expected model and guide in this order, got a model without data and a guide with {data}")
