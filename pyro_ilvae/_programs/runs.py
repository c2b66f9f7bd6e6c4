"""Runs of a model and its guide, of one draw or of several draws at once."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import pyro
import torch
from pyro import poutine
from pyro.infer import infer_discrete
from pyro.poutine import Trace
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae._contexts import evaluation_mode, seeded
from pyro_ilvae._programs.arguments import Arguments
from pyro_ilvae._programs.handlers import HoldSubsamples, Replay, without_table
from pyro_ilvae._programs.masks import mask_guide, move_masks, other_masks
from pyro_ilvae._programs.matching import check_match
from pyro_ilvae._programs.own_values import check_own_values
from pyro_ilvae._programs.plates import SizePlates
from pyro_ilvae._programs.sites import (
    SiteShape,
    drawn,
    is_delta,
    is_variable,
    same_draws,
    sample_sites,
    site_log_prob,
    site_shape,
)

Program: TypeAlias = Callable[..., Any]  # a model or a guide
Values: TypeAlias = Mapping[str, Tensor]  # of sites, by name

MOST_PAIRS = 100_000  # of a draw and a datum that are in memory at a time, unless a caller says otherwise


class Runs:
    """A model and its guide, run with the same arguments for any number of draws at once.

    In a run of one draw the program runs as it is written. In a run of S > 1 draws it runs in a plate of size S to
    the left of all batch dimensions of its sites, and enumerated values stand to the left of that plate. Every run
    holds each plate at the same indices, has the modules in evaluation mode, and is out of reach of handlers around
    the call: an annealing there neither sees nor changes the sites.

    Args:
        model: the model.
        guide: the guide. Latent sites of the model that it leaves out are enumerated by :meth:`traces`.
        arguments: what both are called with.
        given: values of one draw for latent sites that the guide does not draw, shaped as the model is written.
        free_plates: what other runs on as many data know of the guide; see :func:`check_own_values`.

    Attributes:
        nesting: the number of batch dimensions to the right of the draws.
        enumerated_sites: the names of the latent sites that the guide leaves out.
        guide_trace: the guide's trace of one draw.
        model_trace: the model's trace at that draw, with values from the prior at the sites that are left out.
        compared: functions whose runs decide whether draws can be made together; see :meth:`same_alone`.
        num_compared: the number of draws that are made together to find out.
        masked_sites: the names of the latent sites that the model masks where the guide does not, and that say nothing
            about anything else there.
        flat_sites: the names of those that other sites depend on there, so that they have a flat prior.
        known_to_vectorize: whether draws can be made together; None as long as that has not been found out.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        arguments: Arguments,
        given: Values | None = None,
        free_plates: set[str] | None = None,
    ) -> None:
        self.model, self.guide, self.arguments = model, guide, arguments
        self.nesting = 0
        self.enumerated_sites: list[str] = []
        self.masked_sites: list[str] = []
        self.flat_sites: list[str] = []
        self.compared: list[Callable[[int, Values], Sequence[Trace]]] = [self.traces]
        self.num_compared = 2
        self.known_to_vectorize: bool | None = None
        self._hold, self._sizes = HoldSubsamples(), SizePlates()
        state = torch.get_rng_state()
        with torch.no_grad():
            traces = self._first_traces(given)
            if self._sizes.learn(*traces, set(given or ())):
                torch.set_rng_state(state)  # so that all draws are those with the sizes written out
                traces = self._first_traces(given)
        check_match(*traces)
        check_own_values(
            guide,
            traces,
            arguments,
            indices=self.indices,
            chosen=self._hold.chosen,
            free=set() if free_plates is None else free_plates,
            run_guide=partial(self._trace_at, guide),
            run_model=partial(self._trace_at, model),
        )
        self.guide_trace, self.model_trace = traces
        self.nesting = max((len(site_shape(site).batch) for trace in traces for site in sample_sites(trace)), default=0)
        known = drawn(self.guide_trace).keys() | (given or {}).keys()
        self.enumerated_sites = [name for name in drawn(self.model_trace) if name not in known]
        self.align_masks(*traces)
        if names := other_masks(*traces):
            self.flat_sites = [name for name in names if self._is_flat(name, given or {})]
            self.masked_sites = [name for name in names if name not in self.flat_sites]
            self.align_masks(*traces)

    @property
    def indices(self) -> Mapping[str, Any]:
        """The indices that each plate is held at, by its name."""
        return {name: torch.arange(size) for name, size in self._sizes.sizes.items()} | self._hold.indices

    def trace(
        self, program: Program, num_draws: int, around: Callable[[Program], Program] = lambda program: program
    ) -> Trace:
        """Return the trace of a run; handlers that have to see the draws go ``around`` it."""
        with poutine.block(), evaluation_mode(self.model, self.guide), without_table():
            program = self._sizes(self._hold(program))
            if num_draws > 1:
                program = pyro.plate("_draws", num_draws, dim=-self.nesting - 1)(program)
            return poutine.trace(around(program)).get_trace(*self.arguments.args, **self.arguments.kwargs)

    def draw(
        self, num_draws: int, given: Values | None = None, guide: Program | None = None
    ) -> tuple[Trace, dict[str, Tensor]]:
        """Return a trace of the guide, and the values for the model: those given, and those that the guide drew.

        Given values also take the place of the guide's own draws. A ``guide`` takes the place of the guide itself.
        """
        guide, values = guide or self.guide, dict(given or {})
        trace = self.trace(Replay(values)(guide) if values else guide, num_draws)
        return trace, drawn(trace) | values

    def traces(self, num_draws: int, given: Values | None = None, guide: Program | None = None) -> tuple[Trace, Trace]:
        """Return the guide's trace, and the model's trace at the guide's draws, which enumerates other latent sites.

        Every enumerated site has a dimension of its own, also in a Markov chain.
        """
        guide_trace, values = self.draw(num_draws, given, guide)
        around = self._enumerate if self.enumerated_sites else lambda program: program
        model_trace = self.trace(Replay(values)(self.model), num_draws, around)
        self.align_masks(guide_trace, model_trace)
        return guide_trace, model_trace

    def align_masks(self, guide_trace: Trace, model_trace: Trace) -> None:
        """Mask the guide's sites where the model masks them, so that no density of theirs is without a prior."""
        move_masks((guide_trace, model_trace))
        if self.masked_sites:
            mask_guide(self.guide, guide_trace, model_trace, self.masked_sites)

    def _is_flat(self, name: str, given: Values) -> bool:
        """Whether densities that are not masked depend on the values of a site where it is masked."""
        with torch.no_grad(), seeded(0):
            node: Any = self.model_trace.nodes[name]
            mask = torch.as_tensor(node["mask"])
            mask = mask.reshape(mask.shape + (1,) * node["fn"].event_dim)
            values = drawn(self.guide_trace) | dict(given)
            before = self.traces(1, values)[1]
            for _ in range(2):
                other = self.draw(1, given)[1][name]
                after = self.traces(1, values | {name: torch.where(mask, values[name], other)})[1]
                for site, changed in zip(sample_sites(before), sample_sites(after), strict=False):
                    one, two = site_log_prob(site), site_log_prob(changed)
                    if site["name"] != name and not (one.shape == two.shape and same_draws(one[None], two[None])):
                        return True
        return False

    def factors(self, num_draws: int, values: Values) -> Trace:
        """Return a trace of the model that enumerates as the model's own marks say, at values of the other sites.

        In a Markov chain, sites take over each other's dimensions.
        """
        # Conditioned rather than replayed: enumeration has to see the sites that depend on enumerated ones.
        return self.trace(poutine.condition(self.model, data=dict(values)), num_draws, self._enum)

    def draw_enumerated(self, num_draws: int, values: Values) -> dict[str, Tensor]:
        """Return draws of the enumerated sites from their posterior given values of the other sites and the data."""
        around = partial(infer_discrete, first_available_dim=self._first_available_dim)
        nodes: Any = self.trace(poutine.condition(self.model, data=dict(values)), num_draws, around).nodes
        return {name: nodes[name]["value"] for name in self.enumerated_sites}

    def passes(self, num_samples: int, samples_per_pass: int | None, most: int) -> list[int]:
        """Return the number of draws of each pass: ``samples_per_pass``, or ``most`` if None; 1 if draws mix."""
        _checks.positive_int("num_samples", num_samples)
        step = max(1, most) if samples_per_pass is None else _checks.positive_int("samples_per_pass", samples_per_pass)
        if num_samples > 1 and step > 1 and not self._find_out(min(step, num_samples, self.num_compared)):
            step = 1
        return [min(step, num_samples - start) for start in range(0, num_samples, step)]

    @property
    def vectorizes(self) -> bool:
        """Whether draws can be made together, found out once."""
        return self._find_out(self.num_compared)

    def _find_out(self, num_draws: int) -> bool:
        if self.known_to_vectorize is None:
            self.known_to_vectorize = all(
                self.same_alone(run, num_draws=num_draws, thorough=num_draws > 2) for run in self.compared
            )
        return self.known_to_vectorize

    def same_alone(
        self,
        run: Callable[[int, Values], Sequence[Trace]],
        together: Sequence[Trace] | None = None,
        num_draws: int = 2,
        *,
        thorough: bool = False,
    ) -> bool:
        """Whether the first and the last of draws made together are what they are alone, in values and log densities.

        If ``thorough``, some others that lie far apart are compared as well, where branches on values show.

        A program that indexes its values from the left fails with an extra dimension there, or is silently wrong.
        ``run(num_draws, given)`` makes the traces; ``given`` holds the values of a draw. It also makes the traces of
        ``num_draws`` draws ``together`` if they are None.
        """
        try:
            with torch.no_grad(), seeded(0), pyro.validation_enabled(True):
                if together is None:
                    together = run(num_draws, {})
                others = _far_apart(together, num_draws) if thorough else set()
                draws = sorted({0, num_draws - 1} | others)
                alone = [run(1, self._one_draw(together, i, num_draws)) for i in draws]
                return all(self._alike(draws, num_draws, *traces) for traces in zip(together, *alone, strict=True))
        except Exception:
            return False

    def padded(self, value: Tensor, event_dim: int) -> Tensor:
        """Return a value of a run with a dimension for the draws, also where all draws share the value."""
        missing = self.nesting + 1 - (value.dim() - event_dim)
        return value.reshape((1,) * missing + value.shape)

    def spread(self, value: Tensor, shape: SiteShape, num_draws: int) -> Tensor:
        """Return a site's value in a run in the shape (draws, \\*nesting, \\*event)."""
        padding = (1,) * (self.nesting - len(shape.batch))
        return value.expand(num_draws, *padding, *shape.batch, *shape.event)

    def side_by_side(self, values: Tensor, shape: SiteShape) -> Tensor:
        """Return values of a site, each shaped as the model is written, in the shape of a run of so many draws."""
        if len(values) == 1:
            return values[0]
        missing = self.nesting - (values.dim() - 1 - len(shape.event))
        return values.reshape(len(values), *(1,) * missing, *values.shape[1:])

    def _first_traces(self, given: Values | None) -> tuple[Trace, Trace]:
        self._hold.moved = False
        try:
            try:
                traces = self.traces(1, given)
            except (RuntimeError, IndexError, ValueError):
                if not self._hold.moved:
                    raise
            if self._hold.moved:  # by the model, after the guide had run at other indices
                traces = self.traces(1, given)
        except (RuntimeError, IndexError) as error:
            if isinstance(error, NotImplementedError | torch.OutOfMemoryError):
                raise
            raise ValueError(
                f"Expected model_args that model and guide can be called with, got {self.arguments.described}, which "
                f"raise {type(error).__name__}: {error} (a guide that holds values for each datum takes the data that "
                "it was learned on, all together: batch_size=None)"
            ) from error
        return traces

    def _trace_at(self, program: Program, indices: Mapping[str, Tensor], values: Values) -> Trace:
        """Return a trace of one draw with some plates at other indices."""
        self._hold.instead = indices
        try:
            return self.trace(Replay(values)(program), 1)
        finally:
            self._hold.instead = {}

    @property
    def _first_available_dim(self) -> int:
        return -self.nesting - 2

    def _enum(self, program: Program) -> Program:
        return poutine.enum(program, first_available_dim=self._first_available_dim)  # type: ignore[no-any-return]

    def _enumerate(self, program: Program) -> Program:
        def config(site: Any) -> Any:
            # Without their scope, the sites of a Markov chain do not take over each other's dimensions.
            own = {"_markov_scope": None}
            return own | {"enumerate": "parallel"} if site["name"] in self.enumerated_sites else own

        return self._enum(poutine.infer_config(program, config))

    def _one_draw(self, together: Sequence[Trace], i: int, num_draws: int) -> dict[str, Tensor]:
        """The values of draw i, shaped as the programs are written, at the sites that are free to vary."""
        values: dict[str, Tensor | None] = {}
        for site in (site for trace in together for site in sample_sites(trace)):
            name = site["name"]
            if name in values or site["is_observed"] or "_enumerate_dim" in site["infer"]:
                continue
            if is_delta(site):
                # It follows from the other draws, which give it again, but not always to the last bit.
                values[name] = None
                continue
            plain: Any = (self.guide_trace if name in self.guide_trace else self.model_trace).nodes[name]
            value = site["value"].expand(num_draws, *site["value"].shape[1:])[i]
            values[name] = value.reshape(plain["fn"].shape())
        return {name: value for name, value in values.items() if value is not None}

    def _alike(self, draws: Sequence[int], num_draws: int, together: Trace, *alone: Trace) -> bool:
        """Whether a trace of draws made together has in some ``draws`` what the traces of these draws alone have."""
        sites = [sample_sites(trace) for trace in (together, *alone)]
        enumerates = any("_enumerate_dim" in site["infer"] for site in sites[0])
        for both, *each in zip(*sites, strict=True):
            if any(site["name"] != both["name"] for site in each):
                return False
            log_probs = [self.padded(site_log_prob(site), 0).movedim(-self.nesting - 1, 0) for site in (both, *each)]
            if len(log_probs[0]) == num_draws > 1:
                log_probs[0] = log_probs[0][list(draws)]
            if not same_draws(log_probs[0], torch.cat(log_probs[1:])):
                return False
            if is_variable(both) and not enumerates:
                shape = site_shape(each[0])
                value = self.spread(both["value"], shape, num_draws)[list(draws)]
                # Draws at other sites are the same as they were given. What follows from them need not be.
                if is_delta(both) and not same_draws(
                    value, torch.cat([self.spread(s["value"], shape, 1) for s in each])
                ):
                    return False
        return True


def _far_apart(together: Sequence[Trace], num_draws: int) -> set[int]:
    """The positions of some draws with the largest and the smallest values of the latent sites.

    These are the draws that are largest or smallest on the whole, and in all values of one of the first two sites.
    """
    values = {name: value for trace in together for name, value in drawn(trace).items()}
    rows = [
        value.detach().reshape(num_draws, -1).double().cpu()
        for value in values.values()
        if value.dim() and len(value) == num_draws and value.numel() > 0
    ]
    if not rows:
        return set()
    whole = torch.stack([((part - part.mean(0)) / part.std(0)).nan_to_num(0.0, 0.0, 0.0).sum(1) for part in rows]).sum(
        0
    )
    found = {int(whole.argmax()), int(whole.argmin())}
    for part in rows[:2]:
        found |= {int(part.min(1).values.argmax()), int(part.max(1).values.argmin())}
    return found
