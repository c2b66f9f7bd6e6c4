"""What one record of the monitor holds, measured by the diagnostics."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae._programs import Arguments, ModelArgs, Program
from pyro_ilvae.diagnostics._engine.batch import Batch
from pyro_ilvae.diagnostics._engine.batches import batches, data_arguments
from pyro_ilvae.diagnostics._engine.decoded_sites import decoded_site, part_of
from pyro_ilvae.diagnostics._engine.hierarchies import hierarchy_of
from pyro_ilvae.diagnostics._engine.posteriors import UnavailableError
from pyro_ilvae.diagnostics._engine.summaries import Call
from pyro_ilvae.diagnostics.active_units import SUMMARY as ACTIVE_UNITS
from pyro_ilvae.diagnostics.evidence import SUMMARY as EVIDENCE
from pyro_ilvae.diagnostics.guaranteed_information import information_of_site
from pyro_ilvae.diagnostics.kl_divergence import kl_divergence
from pyro_ilvae.diagnostics.kl_per_dimension import SUMMARY as KL_PER_DIMENSION
from pyro_ilvae.diagnostics.mutual_information import mutual_information

_MOST_PAIRS = 10_000_000  # of a draw and a datum's posterior that are compared, in about a second

#: the keys of each site, in order
OF_SITES = (
    "kl",
    "kl_per_dimension",
    "active_units",
    "num_units",
    "mutual_information",
    "mutual_information_limit",
    "guaranteed_floor",
    "guaranteed_nats",
    "inverse_lipschitz",
    "nats",
    "noise_scale",
)


class Measures:
    """Measures of one model and guide on the same data, again and again.

    Attributes:
        sites: the names of the sites that are measured.
        decoders: the decoder of each site that has one.
        data_size: the number of data that a loss is a sum over; None if it is not known.
        reasons: why a measure is None, by its key.
    """

    def __init__(
        self,
        programs: tuple[Program, Program],
        model_args: ModelArgs,
        model_kwargs: Mapping[str, Any] | None,
        *,
        decoder: Any,
        sites: Sequence[str] | None,
        beta: Any,
        threshold: float,
        options: Mapping[str, Any],
    ) -> None:
        self.programs, self.model_args, self.model_kwargs = programs, model_args, model_kwargs
        self.decoder, self._sites, self.beta = decoder, sites, beta
        self.limits = {"epsilon": 0.01, "delta": 0.01, "threshold": threshold}
        self.options = options
        self.sites: tuple[str, ...] = ()
        self.decoders: dict[str, Any] = {}
        self._noises: dict[str, Any] = {}
        self.data_size: int | None = None
        self.reasons: dict[str, str] = {}

    def prepare(self) -> None:
        """Find sites and decoders in a first run, and raise for what model, guide and arguments do not have."""
        call = self._call()
        latent = [*call.batch.latent_sites, *call.batch.enumerated_sites]
        sampled = call.batch.latent_sites
        nodes: Any = call.batch.model_trace.nodes
        if self._sites is None:
            self.sites = tuple(name for name in sampled if call.batch.is_local(nodes[name])) or tuple(sampled)
        else:
            self.sites = tuple(self._sites)
        if unknown := [name for name in self.sites if name not in sampled]:
            raise ValueError(f"Expected sites among the latent ones that the guide samples, {sampled}, got {unknown}")
        if isinstance(self.beta, Mapping) and (unknown := [name for name in self.beta if name not in latent]):
            raise ValueError(f"Expected beta to name latent sites, among {latent}, got {unknown}")
        self._find_decoders(call.batch)
        self.data_size = _data_size(call.batch)

    def take(self) -> dict[str, Any]:
        """The measures now; what cannot be measured is None, and ``reasons`` says why."""
        self.reasons = {}
        prefixes = [f"{site}/" for site in self.sites] if len(self.sites) > 1 else [""]
        keys = ["elbo", "kl", *(prefix + key for prefix in prefixes for key in OF_SITES)]
        record: dict[str, Any] = dict.fromkeys(keys)
        call = self._attempt(keys, lambda: {"call": self._call()}).get("call")
        if call is not None:
            record |= self._attempt(["elbo"], lambda: {"elbo": EVIDENCE.compute(call)["elbo"][0]})
            if len(self.sites) > 1:
                record |= self._attempt(["kl"], lambda: {"kl": _mean(call(kl_divergence).values)})
            for site, prefix in zip(self.sites, prefixes, strict=True):
                record |= self._of_site(call, site, prefix)
        for site, prefix in zip(self.sites, prefixes, strict=True):
            record |= self._of_parts(site, prefix)
        return record

    def betas(self) -> dict[str, float | None]:
        """The weight of the KL now, or of the KL of each site."""
        if not isinstance(self.beta, Mapping):
            return self._beta("beta", self.beta)
        if len(self.sites) < 2:
            return self._beta("beta", next((self.beta[site] for site in self.sites if site in self.beta), None))
        return {key: value for site in self.beta for key, value in self._beta(f"{site}/beta", self.beta[site]).items()}

    def _call(self) -> Call:
        options = self.options
        arguments = data_arguments(
            *self.programs, self.model_args, self.model_kwargs, options["plate"], options["batch_size"]
        )
        first = next(batches(*self.programs, arguments, options["batch_size"], options["plate"]))
        return Call(*self.programs, arguments, first, options, self.limits, notes=[])

    def _of_site(self, call: Call, site: str, prefix: str) -> dict[str, Any]:
        def attempt(keys: Sequence[str], compute: Callable[[], dict[str, Any]]) -> None:
            names = [prefix + key for key in keys]
            record.update({prefix + key: value for key, value in self._attempt(names, compute).items()})

        def kl_per_dimension() -> dict[str, Any]:
            kl = KL_PER_DIMENSION.compute(call, site)["kl"].reshape(-1).tolist()
            return {"kl_per_dimension": kl, "num_units": len(kl)}

        def active() -> dict[str, Any]:
            columns = ACTIVE_UNITS.compute(call, site)
            return {"active_units": int(columns["active_units"]), "num_units": columns["mean_variance"].numel()}

        def information() -> dict[str, Any]:
            result = call(mutual_information, site=site, aggregate_size=_aggregate_size(call))
            return {"mutual_information": result.mutual_information, "mutual_information_limit": result.limit}

        def guaranteed() -> dict[str, Any]:
            # All draws in one pass: to find out how many fit in memory would take longer than the draws.
            result = information_of_site(call, site, samples_per_pass=call.options["num_samples"])
            if result is None:
                raise UnavailableError(f"Expected a decoder of site '{site}' with a constant L, got none")
            return {"guaranteed_floor": result.floor, "guaranteed_nats": result.by_jacobian}

        record: dict[str, Any] = {}
        attempt(["kl"], lambda: {"kl": _mean(call(kl_divergence, site=site).values)})
        attempt(["kl_per_dimension"], kl_per_dimension)
        attempt(["active_units"], active)
        attempt(["mutual_information", "mutual_information_limit"], information)
        attempt(["guaranteed_floor", "guaranteed_nats"], guaranteed)
        return record

    def _of_parts(self, site: str, prefix: str) -> dict[str, Any]:
        """What decoder and likelihood of a site say about themselves."""
        decoder, noise = self.decoders.get(site), self._noises.get(site)
        attempts: dict[str, Callable[[], float | None]] = {
            "inverse_lipschitz": lambda: _constant(getattr(decoder, "inverse_lipschitz", None)),
            "nats": lambda: _constant(getattr(decoder, "nats", None)),
            "noise_scale": lambda: _noise_scale(noise),
        }
        record: dict[str, Any] = {}
        for key, compute in attempts.items():
            record |= self._attempt([prefix + key], lambda key=key, compute=compute: {prefix + key: compute()})  # type: ignore[misc]
        return record

    def _beta(self, key: str, beta: Any) -> dict[str, float | None]:
        return {key: None} | self._attempt([key], lambda: {key: current_beta(key, beta)})

    def _attempt(self, keys: Sequence[str], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What can be measured, or the reason why it cannot: no error of a measure ends the training."""
        try:
            return compute()
        except Exception as error:
            self.reasons |= dict.fromkeys(keys, str(error) or type(error).__name__)
            return {}

    def _find_decoders(self, batch: Batch) -> None:
        hierarchy = hierarchy_of(batch.model)
        if hierarchy is not None:
            channels = dict(zip(hierarchy.sites, hierarchy.channels, strict=True))
            self.decoders = {site: decoder for site, (decoder, _) in channels.items()}
            self.decoders[hierarchy.sites[0]] = part_of(batch.model, "decoder")
            self._noises = {site: noise for site, (_, noise) in channels.items()}
            return
        try:
            found = decoded_site(batch)
        except UnavailableError:
            found = None
        nodes: Any = batch.model_trace.nodes
        continuous = [site for site in self.sites if not nodes[site]["fn"].support.is_discrete]
        site = continuous[0] if len(continuous) == 1 else None
        if found is not None and found.site is not None:
            site = found.site
        if site is not None:
            self.decoders = {site: self.decoder if found is None or self.decoder is not None else found.decoder}
            self._noises = {site: part_of(batch.model, "likelihood") if found is None else found.likelihood}


def current_beta(name: str, beta: Any) -> float | None:
    """The value now of a number, a tensor of one number, or an object with a ``value``; None for None."""
    # A controller takes note of an objective that reads its beta, which a monitor is not.
    number = beta._shown if hasattr(beta, "_shown") else getattr(beta, "value", beta)
    return None if number is None else _checks.non_negative(name, number)


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def _aggregate_size(call: Call) -> int | None:
    """How many posteriors each draw is compared with, so that a record takes no longer than a second or so."""
    size, draws = call.arguments.num_data, call.options["num_samples"]
    most = _MOST_PAIRS // (size * draws)
    return max(2, most) if most < size and isinstance(call.arguments, Arguments) else None


def _data_size(batch: Batch) -> int | None:
    """The number of data that a loss is a sum over, as the model says or as the scale of its plate says."""
    named = part_of(batch.model, "data_size")
    if _checks.is_int(named) and named > 0:
        return int(named)
    scales = {float(torch.as_tensor(site["scale"]).max()) for site in batch.observed}
    # Without a scale, the loss is a sum over the batch of the step, whose size is not known.
    if len(scales) != 1 or (scale := scales.pop()) == 1.0 or not math.isfinite(scale):
        return None
    return max(1, round(scale * batch.num_data))


def _constant(value: Any) -> float | None:
    """A constant as one number: a pair is the pair of a composition, whose constants multiply."""
    if value is None:
        return None
    return math.prod(map(float, value)) if isinstance(value, list | tuple) else float(value)


def _noise_scale(likelihood: Any) -> float | None:
    """The scale of the noise, a geometric mean if there are several; None for a likelihood without one fixed scale."""
    if likelihood is None or getattr(likelihood, "_pyro_samples", None):
        return None
    scale = getattr(likelihood, "noise_scale", None)
    return None if scale is None else float(torch.as_tensor(scale).detach().double().log().mean().exp())
