"""The log densities of draws from a guide, under the model and under the guide."""

from typing import Any

import numpy as np
from pyro.poutine import Trace

from pyro_ilvae._programs import Runs, Values, drawn, sample_sites
from pyro_ilvae._programs.sites import is_delta
from pyro_ilvae.io_pyro._densities import log_density, with_density
from pyro_ilvae.io_pyro._integrated import IntegratedLikelihood, fixed_sites


class LogDensities:
    """log p(x, z) and log q(z) of draws z, and the same of the draws of shared sites with local sites integrated out.

    Attributes:
        without: why a density is left out, by its name.
    """

    def __init__(self, runs: Runs, integrated: IntegratedLikelihood) -> None:
        self.runs, self.integrated = runs, integrated
        self.without: dict[str, str] = {}
        model: Any = runs.model_trace.nodes
        points = fixed_sites(runs, [name for name in drawn(runs.guide_trace) if name in model], {})
        if points:
            self.without["lp_approx"] = f"the guide puts {points} at a point, where it has no density"
        shared_points = [name for name in points if not integrated.local(model[name])]
        own = [site for site in sample_sites(runs.guide_trace) if not is_delta(site)]
        first_local = next((i for i, site in enumerate(own) if integrated.local(site)), len(own))
        after = [site["name"] for site in own[first_local:] if not integrated.local(site)]
        enumerated = [name for name in runs.enumerated_sites if not integrated.local(model[name])]
        reason = None
        if shared_points:
            reason = f"the guide puts {shared_points} at a point, where it has no density"
        elif after:
            reason = f"the guide draws {after} after local sites"
        elif enumerated:
            reason = f"{enumerated} are drawn given the data, by no density of the guide"
        if reason:
            self.without["lp_global and lp_approx_global"] = reason

    def __call__(
        self, guide_trace: Trace, trace: Trace, factors: Trace, integrated: Values, size: int
    ) -> dict[str, np.ndarray]:
        """Return the densities, in nats, of a run of ``size`` draws; ``factors`` is the trace with enumeration."""
        own = with_density(guide_trace, trace.nodes)
        result = {}
        try:
            result["lp"] = log_density(self.runs, factors, with_density(factors), size)
        except (NotImplementedError, ValueError) as error:
            if not self.runs.enumerated_sites:
                raise
            self.without["lp"] = f"enumerated sites cannot be summed out: {error}".splitlines()[0]
        if "lp_approx" not in self.without:
            result["lp_approx"] = log_density(self.runs, guide_trace, own, size)
        if integrated and "lp_global and lp_approx_global" not in self.without:
            outside = [site for site in with_density(trace) if not self.integrated.local(site)]
            result["lp_global"] = log_density(self.runs, trace, outside, size)
            for value in integrated.values():
                result["lp_global"] = result["lp_global"] + value.reshape(size, -1).sum(1)
            shared = [site for site in own if not self.integrated.local(site)]
            result["lp_approx_global"] = log_density(self.runs, guide_trace, shared, size)
        return {name: np.array(value.double().cpu().numpy()) for name, value in result.items()}
