"""The objective under which a model runs."""

import inspect

from pyro.infer import ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, TraceTMC_ELBO
from pyro.poutine.condition_messenger import ConditionMessenger
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.runtime import _PYRO_STACK


def refuse_without_enumeration(site: str, enumerate_in: str) -> None:
    """Raise if an ELBO that cannot enumerate runs a model whose ``site`` is enumerated in the guide or in the model.

    A site that the guide draws is a latent site like any other, except where the guide has to be reparameterized. A
    site that only the model has is right in no other objective.
    """
    if any(isinstance(handler, EnumMessenger) for handler in _PYRO_STACK):
        return
    traces = [handler.trace for handler in _PYRO_STACK if isinstance(handler, ReplayMessenger) and handler.trace]
    given = [handler.data for handler in _PYRO_STACK if isinstance(handler, ConditionMessenger)]
    if not traces or (enumerate_in == "model" and any(site in values for values in (*traces, *given))):
        return
    objective = _objective()
    # Those that enumerate run the model once without enumeration, to count its plates.
    enumerates = objective is None or isinstance(objective, TraceEnum_ELBO | TraceTMC_ELBO)
    if not enumerates and (enumerate_in == "model" or isinstance(objective, TraceMeanField_ELBO)):
        raise ValueError(
            f"Expected an objective that enumerates site '{site}', such as TraceEnum_ELBO, got "
            f"{type(objective).__name__}"
        )


def refuse_closed_form(guide: str, remedy: str) -> None:
    """Raise if the divergence of each site is taken in closed form, as if no other site depended on it in the guide.

    That is right where the guide draws no site before another one that is its parent in the model.
    """
    if isinstance(_objective(), TraceMeanField_ELBO):
        raise ValueError(
            f"Expected an objective that takes divergences from draws for {guide}, such as Trace_ELBO, got "
            f"{type(_objective()).__name__}; use Trace_ELBO or {remedy}"
        )


def _objective() -> ELBO | None:
    """The innermost ELBO that runs. Pyro's handlers do not know it, so it is read from the calls."""
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, ELBO):
            return owner
        frame = frame.f_back
    return None
