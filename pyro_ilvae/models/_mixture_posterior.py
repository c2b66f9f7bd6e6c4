"""What a mixture model tells about data: the posterior of component and z, and the means and draws that follow."""

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae._contexts import evaluation_mode, seeded
from pyro_ilvae.models._components import checked, mean_and_scale, of_component, responsibilities, times_factor
from pyro_ilvae.models._given import Given
from pyro_ilvae.models._mixture_prior import MixturePrior


class MixturePosterior(MixturePrior):
    """A mixture model with the posterior that its encoder gives."""

    @torch.no_grad()
    def encode(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        batch_size: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        r"""Mean and standard deviation of :math:`q(z \mid x)`, over all components, each of shape (N, K).

        Args:
            x: the data, of shape (N, \*data shape), or an iterable of batches, as for :meth:`~pyro_ilvae.VAE.encode`.
            context: as for the model.
            mask: as for the model.
            batch_size: the number of data encoded at a time; all at once if None.
        """
        given = self._batches(x, context, mask=mask, batch_size=batch_size)
        moments = [mean_and_scale(*self._posterior_of(batch)) for batch in given]
        return torch.cat([mean for mean, _ in moments]), torch.cat([scale for _, scale in moments])

    @torch.no_grad()
    def predict_component(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        num_samples: int = 100,
        batch_size: int | None = None,
        seed: int | None = None,
    ) -> Tensor:
        r"""The probability of each component, :math:`q(y \mid x)`, of shape (N, C).

        If y is enumerated in the model, the probability is :math:`E_{q(z \mid x)}\, p(y \mid z)`, an average over
        draws of z. Otherwise it needs no draws.

        Args:
            x: the data, of shape (N, \*data shape), or an iterable of batches, as for :meth:`~pyro_ilvae.VAE.encode`.
            context: as for the model.
            mask: as for the model.
            num_samples: the number of draws of z for each datum.
            batch_size: the number of data treated at a time; all at once if None.
            seed: a seed for the draws; the global random state if None.
        """
        _checks.positive_int("num_samples", num_samples)
        probs = []
        with evaluation_mode(self), seeded(seed):
            for batch in self._batches(x, context, mask=mask, batch_size=batch_size):
                if self.enumerate_in == "guide":
                    probs.append(self._posterior_of(batch)[0])
                else:
                    q = dist.Normal(*self._code(batch))
                    # One draw at a time, because each becomes C times as many numbers.
                    draws = (responsibilities(q(), *self._components()) for _ in range(num_samples))
                    probs.append(sum(draws, start=q.loc.new_zeros(())) / num_samples)
        return torch.cat(probs)

    @torch.no_grad()
    def reconstruct(
        self,
        x: Tensor,
        context: Tensor | None = None,
        target_context: Tensor | None = None,
        *,
        offset: Tensor | None = None,
        mask: Tensor | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        r"""The mean :math:`E[x \mid z]` at the posterior mean of z under each datum's most probable component.

        If y is enumerated in the model, z is its posterior mean over all components instead. The arguments and the
        value are as for :meth:`~pyro_ilvae.VAE.reconstruct`.
        """
        means = []
        for batch in self._batches(
            x, context, mask=mask, offset=offset, target_context=target_context, batch_size=batch_size
        ):
            probs, loc, _ = self._posterior_of(batch)
            means.append(self._decoded(of_component(loc, probs.argmax(-1)), batch, mean=True))
        return torch.cat(means)

    @torch.no_grad()
    def sample_component(
        self,
        component: int,
        num_samples: int = 1,
        context: Tensor | None = None,
        *,
        offset: Tensor | None = None,
        mean: bool = False,
        batch_size: int | None = None,
        seed: int | None = None,
    ) -> Tensor:
        r"""Draws from one component of the prior predictive, :math:`p(x \mid y)`, of shape (num_samples, \*data shape).

        Args:
            component: the number y of the component, from 0 to C - 1.
            num_samples: the number of data to draw.
            context: as for :meth:`sample_prior`.
            offset: as for :meth:`sample_prior`.
            mean: whether to return :math:`E[x \mid z]` for each drawn z instead of a draw of x.
            batch_size: the number of data drawn at a time; all at once if None.
            seed: a seed for the draws; the global random state if None.
        """
        component = _checks.index_below("component", component, self.num_components)
        given = self._to_decode(num_samples, context, offset)
        _checks.boolean("mean", mean)
        _, loc, scale = self._components()
        with seeded(seed):
            z = dist.Normal(loc[component], scale[component]).sample((given.num_data,))
            return self._decoded(z, given, batch_size, mean=mean)

    def _posterior(self, given: Given) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of q(y | x), of shape (..., C); locations and scales of q(z | x, y), each of shape (..., C, K)."""
        output = self._encoder_output(given)
        if isinstance(output, tuple | list) and len(output) == 3:
            return checked(tuple(output), self.num_components, self.latent_dim)
        self._check_no_prior("a guide whose encoder gives a factor")
        return times_factor(*self._components(), *self._location_and_scale(output))

    def _posterior_of(self, given: Given) -> tuple[Tensor, Tensor, Tensor]:
        """A batch's q(y | x), of shape (N, C), and location and scale of q(z | x, y), each of shape (N, C, K).

        If y is enumerated in the model, C is 1, and the only component is q(z | x).
        """
        if self.enumerate_in == "model":
            loc, scale = (part.unsqueeze(-2) for part in self._code(given))
            return torch.ones_like(loc[..., 0]), loc, scale
        with evaluation_mode(self):
            logits, loc, scale = self._posterior(given)
        if loc.shape[:-2] != (given.num_data,):
            raise ValueError(
                f"Expected encoder to return one posterior for each of {given.num_data} data, got {loc.shape[:-2]}"
            )
        return logits.softmax(-1), loc, scale
