"""The variational autoencoder: a Pyro model and its amortized guide in one PyroModule."""

import pyro
import torch
from pyro.nn import pyro_method
from torch import Tensor

from pyro_ilvae.models._autoencoder import DenseAutoencoder

__all__ = ["VAE"]


class VAE(DenseAutoencoder):
    r"""A variational autoencoder, whose decoder decides how far the posterior can collapse.

    .. math:: z_n \sim N(0, I_K), \qquad x_n \mid z_n \sim p(x \mid \eta = f(z_n)), \qquad
        q(z_n \mid x_n) = N(\mu(x_n), \operatorname{diag} \sigma(x_n)^2),

    for data :math:`n = 1, \dots, N` in the plate ``data``; the sites are ``z`` and ``x``. With a plain decoder this is
    an ordinary VAE, with an inverse Lipschitz decoder a LIDVAE (L = 0) or an IL-LIDVAE (L > 0).

    All models of one class share names in Pyro's global param store: call ``pyro.clear_param_store()`` before fitting
    the next model with SVI. A warning reminds of a call that was forgotten.

    Args:
        decoder: the map :math:`f`, from (..., K) to natural parameters (..., \*event_shape).
        encoder: a module from data (..., \*data shape) to the location and scale of z, each (..., K).
        likelihood: a function from natural parameters to a distribution, see :mod:`pyro_ilvae.likelihoods`.
        data_size: the number N of data in the data set. The ELBO of a batch is then scaled by N / batch size, so that
            for a random batch it is an unbiased estimate of the ELBO of the data set. If None, the batch is the data
            set.
        latent_dim: the dimension :math:`K`, if neither decoder nor encoder has this attribute.
        event_shape: the shape of the natural parameters of one datum, if the decoder lacks this attribute.

    Raises:
        ValueError: if the parts disagree on a dimension. ``model`` and ``guide`` raise it, naming the site, for data of
            another shape or dtype, for data outside the likelihood's support, and for more data than ``data_size``.

    References:
        Kinoshita et al. 2023, Controlling posterior collapse by an inverse Lipschitz constraint on the decoder network,
        https://arxiv.org/abs/2304.12770

    Example:
        >>> import pyro
        >>> from pyro.infer import SVI, TraceMeanField_ELBO
        >>> from pyro_ilvae import InverseLipschitzDecoder, MLPEncoder, likelihoods
        >>> x = torch.rand(100, 8)
        >>> vae = VAE(
        ...     decoder=InverseLipschitzDecoder(latent_dim=2, event_shape=8, inverse_lipschitz=0.5, map_features=(32,)),
        ...     encoder=MLPEncoder(event_shape=8, latent_dim=2, hidden_features=(32,)),
        ...     likelihood=likelihoods.Normal(0.1, estimate="learned"),
        ...     data_size=len(x),
        ... )
        >>> svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), TraceMeanField_ELBO())
        >>> losses = [svi.step(batch) for batch in x.split(20)]
        >>> vae.encode(x)[0].shape, vae.reconstruct(x).shape, vae.sample_prior(3).shape
        (torch.Size([100, 2]), torch.Size([100, 8]), torch.Size([3, 8]))
    """

    @pyro_method
    def model(self, x: Tensor | None = None, *, index: Tensor | None = None, num_data: int = 1) -> Tensor:
        r"""The generative model, conditioned on the data ``x`` if they are given.

        Args:
            x: a batch of data of shape (N, \*data shape), or None for a draw from the prior predictive. Arrays, data
                frames and lists are converted where that changes no value.
            index: the numbers of these data in the data set, different ints below ``data_size`` of shape (N,), at which
                the plate is then held. A guide with a value for each datum needs them; the guide of this model does
                not. If None, a batch of all data is taken to be in the order of the data set.
            num_data: the number of data to draw if ``x`` is None.

        Returns:
            The value of site ``x``: the data, or the draw.
        """
        x = self._checked(x)
        plate = self._data_plate(x, index, num_data)
        with plate:
            z = pyro.sample("z", self._prior())
        return self._sample_x(z, x, plate)

    @torch.no_grad()
    def reconstruct(self, x: Tensor, batch_size: int | None = None) -> Tensor:
        r"""The mean :math:`E[x \mid z]` at the posterior mean of z, for ``x`` of shape (N, \*data shape).

        For a categorical likelihood, the result holds probabilities, and has the categories as its last dimension.

        Args:
            x: the data, or an iterable of batches, as for :meth:`encode`.
            batch_size: the number of data treated at a time; all, or all of a batch, at once if None.
        """
        # Batch by batch, because a decoder takes more memory than its result.
        means = [self._decoded(self._code(batch)[0], None, mean=True) for batch in self._batches(x, batch_size)]
        return torch.cat(means)
