"""A monitor of collapse during the training: the diagnostics on held-out data, every so many steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from pyro.poutine.messenger import unwrap

from pyro_ilvae import _checks
from pyro_ilvae._programs import ModelArgs, Program
from pyro_ilvae.diagnostics._engine.calls import check_programs
from pyro_ilvae.diagnostics._engine.sites import site_names
from pyro_ilvae.monitoring._losses import Losses
from pyro_ilvae.monitoring._measures import Measures, current_beta
from pyro_ilvae.monitoring._progress import Progress, in_words
from pyro_ilvae.monitoring._undisturbed import is_set_up, undisturbed

__all__ = ["CollapseMonitor"]

_T = TypeVar("_T")


class CollapseMonitor:
    r"""How collapsed the posterior is while it is trained, in any training loop, for any Pyro model and guide.

    A record is measured on the same held-out data before the first step and after every ``every`` steps. Measuring does
    not disturb the training: parameters, buffers, modes, random states and the names in Pyro's param store are as they
    would be without it, so that the parameters of a run are the same with and without a monitor. All records have the
    same draws, so that they differ by the fit alone.

    A record is a plain dictionary of numbers, lists of numbers and None, where there is nothing to measure or the
    measure is not available; then :attr:`reasons` says why. Its keys, with divergences and information in nats:

    - ``step``: the number of steps taken.
    - ``loss``: the mean of the losses since the last record, as they were given. It has the annealed KL, if any.
    - ``loss_per_datum``: the same divided by ``data_size``, in nats per datum; None if that is not known.
    - ``non_finite_losses``: how many of these losses are NaN or infinite.
    - ``elbo``: the ELBO of the held-out data at beta = 1, in nats per datum; sampled.
    - ``kl``: the mean KL divergence of a datum's posterior from the prior, in nats: of the site, or with several sites
      of all together.
    - ``kl_per_dimension``: a list of the mean divergence of each dimension (each unit of a site), in nats.
    - ``active_units``: the number of units whose posterior mean has a variance over the data above ``threshold``.
    - ``num_units``: the number of units of the site.
    - ``mutual_information``: :math:`I_q(x; z)` of the held-out data and the site, in nats; sampled, exact for a
      discrete site. See :func:`~pyro_ilvae.diagnostics.mutual_information`. At most ``mutual_information_limit``.
    - ``mutual_information_limit``: the log of the number of data, in nats. Many nats need many data.
    - ``guaranteed_floor``: the nats about z that L, the noise and the prior guarantee on the model's own data, see
      :func:`~pyro_ilvae.diagnostics.guaranteed_information`.
    - ``guaranteed_nats``: the same by the Jacobian of the decoder, at least the floor; sampled.
    - ``inverse_lipschitz``: the constant L of the decoder, in units of the natural
      parameters (of x for Normal noise) per unit of z.
    - ``nats``: the nats per dimension from which L follows, of a decoder whose constant is given in ``Nats``.
    - ``noise_scale``: the scale of the likelihood's noise in units of x, a geometric mean if there are several.
    - ``beta``: the weight of the KL.

    With several sites, the keys from ``kl`` to ``noise_scale`` are there for each site, as in ``"z2/kl"``, and so are
    the weights of a ``beta`` for each site. With layers, what is guaranteed is about the site below. Where data share
    a latent site, ``elbo`` and ``kl`` are of all data together.

    With ``GraphSVI`` on a GPU losses are read when a record is due, and steps that the host has not looked at are in
    it: call ``svi.synchronize()`` before a step whose record should be exact.

    Args:
        model: the model.
        guide: its guide.
        model_args: the held-out data: what model and guide are called with, in one of the forms of
            :func:`~pyro_ilvae.diagnostics.collapse_summary`. Some hundred data are enough, and take some tenths of a
            second.
        model_kwargs: keyword arguments of the same calls.
        every: the number of steps from one record to the next; call :meth:`measure` after the training for a last one.
        decoder: the decoder whose L and nats are recorded, or a model that has it as an attribute; if None, it is found
            in the model. With layers, each site has its own.
        beta: the weight of the KL, as the training has it: a number, a tensor, a
            :class:`~pyro_ilvae.infer.Schedule` or another object with a ``value``, or a mapping from sites to these.
        sites: the names of the latent sites; if None, all that the guide samples for each datum.
        log: a function that is called with each record, such as the logger of an experiment.
        num_samples: the number of draws for each datum where there is no formula, and in all of the prior.
        threshold: the variance above which ``active_units`` counts a unit, in squared units of z.
        data_size: the number of data that a loss is a sum over; if None, the number that the plate of the data stands
            for, where the model says it.
        batch_size: the number of held-out data treated at a time; all at once if None.
        seed: the seed of all draws of the monitor.
        plate: the name of the plate over the data; if None, the only plate whose size is the number of data.

    The first record is measured at once, so that wrong arguments are found before the training. Where a first run would
    draw the start of a guide, as of an ``AutoGuide``, it is measured after the first step.

    Raises:
        ValueError: for sites that model and guide do not have, and for numbers out of range.
        TypeError: for a ``log`` that is no function, and for data that model and guide do not take.

    Example:
        >>> import pyro, torch
        >>> from pyro.infer import SVI, TraceMeanField_ELBO
        >>> from pyro_ilvae import VAE, MLPDecoder, MLPEncoder, likelihoods
        >>> sizes = {"latent_dim": 2, "event_shape": 4}
        >>> vae = VAE(MLPDecoder(**sizes), MLPEncoder(**sizes), likelihoods.Normal(0.5), data_size=100)
        >>> x = torch.randn(100, 4)
        >>> svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), TraceMeanField_ELBO())
        >>> monitor = CollapseMonitor(vae.model, vae.guide, x[:50], every=10)
        >>> for _ in monitor.track(range(20), quiet=True):
        ...     record = monitor.step(svi.step(x))
        >>> [record["step"] for record in monitor.history], len(monitor.history[-1]["kl_per_dimension"])
        ([0, 10, 20], 2)
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        model_args: ModelArgs = (),
        *,
        model_kwargs: Mapping[str, Any] | None = None,
        every: int = 100,
        decoder: Any = None,
        beta: Any = None,
        sites: Sequence[str] | None = None,
        log: Callable[[dict[str, Any]], object] | None = None,
        num_samples: int = 10,
        threshold: float = 0.01,
        data_size: int | None = None,
        batch_size: int | None = None,
        seed: int = 0,
        plate: str | None = None,
    ) -> None:
        check_programs(model, guide)
        self.every = _checks.positive_int("every", every)
        self.log = None if log is None else _checks.takes("log", _checks.function("log", log), "a record")
        if seed is None:
            raise ValueError("Expected seed to be an int, got None: draws from the global state change the training")
        self._seed = int(_checks.seed(seed) or 0)
        if batch_size is not None:
            _checks.positive_int("batch_size", batch_size)
        for name, value in beta.items() if isinstance(beta, Mapping) else [("beta", beta)]:
            current_beta("beta" if name == "beta" else f"beta[{name!r}]", value)
        self._measures = Measures(
            (model, guide),
            model_args,
            model_kwargs,
            decoder=_decoder(decoder),
            sites=None if sites is None else _checked_sites(sites),
            beta=beta,
            threshold=_checks.non_negative("threshold", threshold),
            options={
                "num_samples": _checks.positive_int("num_samples", num_samples),
                "batch_size": batch_size,
                "seed": self._seed,
                "plate": plate,
            },
        )
        self._data_size = None if data_size is None else _checks.positive_int("data_size", data_size)
        self.num_steps_taken = 0
        self.history: list[dict[str, Any]] = []  #: all records
        self._losses, self._progress = Losses(), Progress()
        self._warned: set[Any] = set()
        self._num_logged = 0
        self._is_prepared = False
        if is_set_up(model, guide):
            self._record()

    def __repr__(self) -> str:
        words = f": {self._words()}" if self.history else ""
        return f"{type(self).__name__}({self._description()} at step {self.num_steps_taken}{words})"

    @property
    def data_size(self) -> int | None:
        """The number of data that a loss is a sum over; None if it is not known."""
        return self._measures.data_size if self._data_size is None else self._data_size

    @property
    def reasons(self) -> dict[str, str]:
        """Why measures of the last record are None, by their keys."""
        return dict(self._measures.reasons)

    def step(self, loss: Any = None) -> dict[str, Any] | None:
        """Count a step of the training, and measure a record at every ``every``-th one.

        Args:
            loss: the loss of the step, a number or a tensor of one number, which is not read before the next record.

        Returns:
            The record if one is due, otherwise None.

        Raises:
            ValueError: for a tensor of several numbers.
            TypeError: for a loss that is no number.
        """
        if loss is not None:
            self._losses.add(loss)
        # Counted before anything is logged: a log may raise.
        self.num_steps_taken += 1
        if not self.history or self.num_steps_taken % self.every == 0:
            return self.measure()
        self._log()
        return None

    def measure(self) -> dict[str, Any]:
        """Measure a record now, as after the last step; a step that has a record keeps it."""
        if not self.history or self.history[-1]["step"] != self.num_steps_taken:
            self._record()
        self._log()
        self._progress.show(self._words())
        return self.history[-1]

    def track(self, iterable: Iterable[_T], *, description: str | None = None, quiet: bool = False) -> Iterator[_T]:
        """Go through an iterable, with a progress bar of tqdm that shows the last record.

        Args:
            iterable: the steps, or the batches.
            description: what stands before the bar; if None, the names of the model and the decoder.
            quiet: whether there is no bar.

        Returns:
            An iterator over the same items.

        Raises:
            TypeError: for what cannot be iterated over.
        """
        if not isinstance(iterable, Iterable):
            raise TypeError(f"Expected iterable to be an iterable, such as range(5000), got {iterable!r}")
        if description is not None and not isinstance(description, str):
            raise TypeError(f"Expected description to be a string or None, got {description!r}")
        if _checks.boolean("quiet", quiet):
            return iter(iterable)
        words = self._words() if self.history else ""
        return self._progress.over(iterable, self._description() if description is None else description, words)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Each key's values in all records: shape (R,), or (R, K) for lists; NaN stands for None."""
        keys = dict.fromkeys(key for record in self.history for key in record)
        return {key: _stacked([record.get(key) for record in self.history]) for key in keys}

    def state_dict(self) -> dict[str, Any]:
        """The records, and where the monitor stands, in plain numbers, for a checkpoint."""
        return {
            "num_steps_taken": self.num_steps_taken,
            "num_logged": self._num_logged,
            "losses": self._losses.state_dict(),
            "history": copy.deepcopy(self.history),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; what was measured before is forgotten.

        Args:
            state: what :meth:`state_dict` returned.

        Raises:
            ValueError: for another state.
        """
        expected = {"num_steps_taken", "num_logged", "losses", "history"}
        if not isinstance(state, Mapping) or not expected <= state.keys():
            raise ValueError(f"Expected state to be a dictionary with {sorted(expected)}, got {state!r}")
        history = state["history"]
        if not isinstance(history, list | tuple) or not all(isinstance(record, Mapping) for record in history):
            raise ValueError(f"Expected state['history'] to be a list of records, got {history!r}")
        keys = {"step", "loss", "loss_per_datum", "non_finite_losses", "elbo", "kl"}
        if any(missing := keys - record.keys() for record in history):
            raise ValueError(
                f"Expected state['history'] to have records of a monitor, got one without {sorted(missing)}"
            )
        steps, num_logged = (
            _checks.positive_int(f"state['{name}']", state[name], at_least=0)
            for name in ("num_steps_taken", "num_logged")
        )
        # The last that may raise: a state that is none changes nothing.
        self._losses.load_state_dict(state["losses"])
        self.num_steps_taken, self._num_logged = steps, num_logged
        self.history = copy.deepcopy(list(history))

    def _record(self) -> None:
        """Add a record of what model and guide are now."""
        measures = self._measures
        with undisturbed(*measures.programs, seed=self._seed, warned=self._warned):
            if not self._is_prepared:
                measures.prepare()
                self._is_prepared = True
            measured = measures.take() | measures.betas()
        loss, num_non_finite = self._losses.take()
        size = self.data_size
        self.history.append(
            {
                "step": self.num_steps_taken,
                "loss": loss,
                "loss_per_datum": None if loss is None or size is None else loss / size,
                "non_finite_losses": num_non_finite,
                **measured,
            }
        )

    def _log(self) -> None:
        """Pass on the records that have not been passed on: the first one not before the training goes on."""
        for record in self.history[self._num_logged :] if self.log is not None else ():
            self._num_logged += 1
            self.log(copy.deepcopy(record))  # type: ignore[misc]

    def _words(self) -> str:
        return in_words(self.history[-1], self._measures.sites)

    def _description(self) -> str:
        """The names of the model and of its decoders."""
        function: Any = unwrap(self._measures.programs[0])
        owner = getattr(function, "__self__", function)
        name = getattr(owner, "__name__", type(owner).__name__)
        decoders = [type(decoder).__name__ for decoder in self._measures.decoders.values() if decoder is not None]
        return f"{name} with {', '.join(dict.fromkeys(decoders))}" if decoders else name


def _decoder(decoder: Any) -> Any:
    """The decoder, or the decoder of a model."""
    if decoder is None:
        return None
    _checks.function("decoder", decoder, "a decoder or a model")
    if not hasattr(decoder, "inverse_lipschitz") and hasattr(decoder, "decoder"):
        return decoder.decoder
    return decoder


def _checked_sites(sites: Any) -> list[str]:
    names = site_names(sites)
    if not names:
        raise ValueError("Expected sites to be the names of latent sites, at least one, got none")
    return names


def _stacked(values: list[Any]) -> npt.NDArray[Any]:
    size = next((len(value) for value in values if isinstance(value, list)), None)
    missing = np.nan if size is None else np.full(size, np.nan)
    return np.array([missing if value is None else value for value in values])
