"""The variational autoencoder: a Pyro model and its amortized guide in one PyroModule."""

import pyro
import torch
from pyro.nn import pyro_method
from torch import Tensor

from pyro_ilvae.models._dense import DenseAutoencoder

__all__ = ["VAE"]


class VAE(DenseAutoencoder):
    r"""A variational autoencoder, whose decoder decides how far the posterior can collapse.

    .. math:: z_n \sim N(0, I_K), \qquad x_n \mid z_n \sim p(x \mid \eta = f(z_n)), \qquad
        q(z_n \mid x_n) = N(\mu(x_n), \operatorname{diag} \sigma(x_n)^2),

    for data :math:`n = 1, \dots, N` in the plate ``data``; the sites are ``z`` and ``x``. With a plain decoder this is
    an ordinary VAE, with an inverse Lipschitz decoder a LIDVAE (L = 0) or an IL-LIDVAE (L > 0).

    Each datum may have a context c, such as covariates or the label of a batch, and an offset o, such as the log of a
    library size or an exposure. Entries may be missing. The model is then

    .. math:: x_n \mid z_n \sim p(x \mid \eta = f(z_n; c_n) + o_n), \qquad
        q(z_n \mid x_n, c_n) = N(\mu(x_n, c_n), \operatorname{diag} \sigma(x_n, c_n)^2),

    with the density of those entries alone that are there. L holds in z for each context. The decoder needs a
    ``context_dim``; the encoder reads the context and the mask of missing entries where it has ``context_dim`` and
    ``takes_mask``.

    All models of one class share names in Pyro's global param store: call ``pyro.clear_param_store()`` before fitting
    the next model with SVI. A warning reminds of a call that was forgotten.

    Args:
        decoder: the map :math:`f`, from (..., K) to natural parameters (..., \*event_shape).
        encoder: a module from data (..., \*data shape) to the location and scale of z, each (..., K).
        likelihood: a function from natural parameters to a distribution, see :mod:`pyro_ilvae.likelihoods`.
        data_size: the number N of data in the data set. The ELBO of a batch is then scaled by N / batch size, so that
            for a random batch it is an unbiased estimate of the ELBO of the data set. If None, the batch is the data
            set.
        context_network: a module from what is given as context to the context of decoder and encoder, of shape (N, C),
            such as ``torch.nn.Embedding`` for labels; trained with the other parts. If None, the context itself has
            this shape, or labels 0 ... C - 1 become indicators.
        missing: "raise" refuses NaN in the data, "ignore" takes them as missing entries.
        latent_dim: the dimension :math:`K`, if neither decoder nor encoder has this attribute.
        event_shape: the shape of the natural parameters of one datum, if the decoder lacks this attribute.

    Raises:
        ValueError: if the parts disagree on a dimension, and for ``missing="ignore"`` with an encoder that does not see
            what is missing. ``model`` and ``guide`` raise it, naming the site, for data of another shape or dtype, for
            data outside the likelihood's support, for more data than ``data_size``, for a context that is missing, of
            another shape or not finite, for labels out of range, and for data of which all entries are missing.

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
    def model(
        self,
        x: Tensor | None = None,
        context: Tensor | None = None,
        *,
        offset: Tensor | None = None,
        mask: Tensor | None = None,
        index: Tensor | None = None,
        num_data: int = 1,
    ) -> Tensor:
        r"""The generative model, conditioned on the data ``x`` if they are given.

        Args:
            x: a batch of data of shape (N, \*data shape), or None for a draw from the prior predictive. Arrays, data
                frames and lists are converted where that changes no value.
            context: the context of each datum, of shape (N, C), or labels of shape (N,), ints from 0 to C - 1.
            offset: known numbers that are added to the natural parameters, of shape (N,) for the same number in all
                entries of a datum, or of shape (N, \*event_shape), in which sizes of entries may be 1.
            mask: booleans of the shape of ``x``, False where an entry is missing. Its value then does not matter.
            index: the numbers of these data in the data set, different ints below ``data_size`` of shape (N,), at which
                the plate is then held. A guide with a value for each datum needs them; the guide of this model does
                not. If None, a batch of all data is taken to be in the order of the data set.
            num_data: the number of data to draw if ``x`` is None; as many as there are contexts if 1.

        Returns:
            The value of site ``x``: the data, with another value in place of missing entries, or the draw.
        """
        given = self._given(x, context, mask=mask, offset=offset, num_data=num_data)
        plate = self._data_plate(given, index)
        with plate:
            z = pyro.sample("z", self._prior())
        return self._sample_x(z, given, plate)

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
        r"""The mean :math:`E[x \mid z]` at the posterior mean of z, of the shape of ``x``, missing entries included.

        For a categorical likelihood, the result holds probabilities, and has the categories as its last dimension.

        Args:
            x: the data, or an iterable of batches, as for :meth:`encode`.
            context: as for the model.
            target_context: the context in which z is decoded, ``context`` if None: what a datum would be in another
                context. One for each datum, or one for all: a label, or numbers of shape (C,) without a
                ``context_network``.
            offset: as for the model; 0 if None, which for counts is the mean per unit of size.
            mask: as for the model.
            batch_size: the number of data treated at a time; all, or all of a batch, at once if None.
        """
        given = self._batches(
            x, context, mask=mask, offset=offset, target_context=target_context, batch_size=batch_size
        )
        # Batch by batch, because a decoder takes more memory than its result.
        return torch.cat([self._decoded(self._code(batch)[0], batch, mean=True) for batch in given])
