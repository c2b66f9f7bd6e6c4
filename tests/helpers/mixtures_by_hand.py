"""The bound of a mixture VAE by hand, one component after the other."""

import pyro
import torch
from pyro import poutine
from torch.distributions import MultivariateNormal, Normal


def posterior_by_hand(mixture, x):
    """log q(y | x) of shape (N, C), location and scale of q(z | x, y) of shape (N, C, K), from precisions."""
    log_weights = mixture.component_logits.log_softmax(-1)
    output = mixture.encoder(x)
    if len(output) == 3:
        return output[0].log_softmax(-1), *output[1:]
    a, b = (part.unsqueeze(-2) for part in output)
    m, s = mixture.component_loc, mixture.component_log_scale.exp()
    if mixture.enumerate_in == "model":
        return log_weights.expand(len(x), -1), a + 0 * m, b + 0 * s
    precision = s**-2 + b**-2
    fit = MultivariateNormal(m, torch.diag_embed(s**2 + b**2)).log_prob(a)
    return (log_weights + fit).log_softmax(-1), (m * s**-2 + a * b**-2) / precision, precision**-0.5


def bound_by_hand(mixture, x, z, beta_y=1.0, beta_z=1.0, labels=None):
    """The annealed ELBO of each datum at draws z of shape (C, N, K), one component after the other.

    Data with a label that is not -1 are of this component.
    """
    log_q_y, q_loc, q_scale = posterior_by_hand(mixture, x)
    log_weights = mixture.component_logits.log_softmax(-1)
    likelihood, ratio = [], []
    for c in range(mixture.num_components):
        eta = mixture.decoder(z[c])
        likelihood.append(mixture.likelihood(eta).log_prob(x).flatten(1).sum(1))
        log_q = Normal(q_loc[:, c], q_scale[:, c]).log_prob(z[c]).sum(-1)
        prior = Normal(mixture.component_loc[c], mixture.component_log_scale[c].exp())
        ratio.append(prior.log_prob(z[c]).sum(-1) - log_q)
    likelihood, ratio = torch.stack(likelihood, -1), torch.stack(ratio, -1)
    if mixture.enumerate_in == "model":
        bound = likelihood[:, 0] + beta_z * (log_weights + ratio).logsumexp(-1)
    else:
        bound = (log_q_y.exp() * (likelihood + beta_z * ratio + beta_y * (log_weights - log_q_y))).sum(-1)
    if labels is None:
        return bound
    # Where y is summed out of the model, its weight and the weight of z are one.
    of_label = likelihood + beta_z * ratio + (beta_z if mixture.enumerate_in == "model" else beta_y) * log_weights
    of_label = of_label.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return torch.where(labels >= 0, of_label, bound)


def drawn(mixture, x, seed, **kwargs):
    """The guide's z at a seed: for each component, (C, N, K), or the same for all where y is summed out."""
    pyro.set_rng_seed(seed)
    z = poutine.trace(poutine.enum(mixture.guide, first_available_dim=-2)).get_trace(x, **kwargs).nodes["z"]["value"]
    return z.expand(mixture.num_components, *z.shape[-2:])


def bound_at(elbo, mixture, x, seed, loss="differentiable_loss", **kwargs):
    pyro.set_rng_seed(seed)
    return -torch.as_tensor(getattr(elbo, loss)(mixture.model, mixture.guide, x, **kwargs), dtype=x.dtype)
