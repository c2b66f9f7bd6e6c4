"""What a measure contributes to the summary of collapse."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pyro_ilvae._programs import Arguments, ArgumentsInBatches, Program
from pyro_ilvae.diagnostics._engine.batch import Batch


class Call(NamedTuple):
    """What a summary is asked for: calling it with a diagnostic calls the diagnostic."""

    model: Program
    guide: Program
    arguments: Arguments | ArgumentsInBatches
    batch: Batch  #: model and guide on the first batch of the data
    options: Mapping[str, Any]  #: ``num_samples``, ``batch_size``, ``seed`` and ``plate``
    limits: Mapping[str, float]  #: ``epsilon``, ``delta``, ``threshold`` and the limits of the verdicts
    notes: list[str]  #: what could not be computed, and why

    def __call__(self, diagnostic: Callable[..., Any], **more: Any) -> Any:
        return diagnostic(
            self.model,
            self.guide,
            self.arguments.args,
            model_kwargs=self.arguments.kwargs,
            **(dict(self.options) | more),
        )


class OfSite(NamedTuple):
    """What a measure says about each latent site.

    ``compute`` returns the columns named in ``units`` and ``missing``, and may return "is_least" and "is_most" to say
    that its column "kl" holds no divergences but numbers that they are not below, or not above.
    """

    label: str  #: how notes name it
    compute: Callable[[Call, str], dict[str, Any]]  #: columns for a site; a ValueError says why there are none
    units: tuple[str, ...] = ()  #: the columns with a value for each unit of the site, tensors of the units' shape
    missing: Mapping[str, Any] = {}  #: the columns with a value for each site, and the value where there is none


class OfWhole(NamedTuple):
    """What a measure says about the model as a whole."""

    label: str  #: how notes name it
    #: variables, each a number or a pair of a number and its attributes; a ValueError says why there are none
    compute: Callable[[Call], dict[str, Any]]
