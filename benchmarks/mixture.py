"""A step on the mixture, with all components in one call, against a loop over the components."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from decoders import BATCH
from pyro import poutine
from pyro.infer import SVI, TraceEnum_ELBO
from pyro.nn import PyroModule
from timing import Line, Step, compare, faster
from torch.distributions import Categorical, Normal, kl_divergence

from pyro_ilvae import JointOptim, MixtureVAE, MLPEncoder, ProjectedDecoder, likelihoods, mlp

DATA_SIZE = 10_000
COMPONENTS = 10
ADAM = {"lr": 1e-4, "fused": True}

models = PyroModule("mixtures")
count = itertools.count()


def build(latent_dim: int, features: int, enumerate_in: Any = "guide") -> MixtureVAE:
    width = 512 if features > 100 else 32
    mixture = MixtureVAE(
        ProjectedDecoder(mlp(latent_dim, (width, width), features), latent_dim=latent_dim, event_shape=features),
        MLPEncoder(
            event_shape=features,
            latent_dim=latent_dim,
            hidden_features=(width, width),
            num_components=COMPONENTS if enumerate_in == "guide" else None,
        ),
        likelihoods.Normal(0.3, estimate="learned"),
        COMPONENTS,
        data_size=DATA_SIZE,
        enumerate_in=enumerate_in,
    )
    # As a part of a whole, under a number of its own, so that the param store keeps the models apart.
    setattr(models, f"mixture_{next(count)}", mixture)
    return mixture


def by_svi(mixture: MixtureVAE, x: torch.Tensor, sequential: bool = False) -> Step:
    guide = mixture.guide
    if sequential:
        # Pyro's own loop: the whole model and guide once for each component.
        guide = poutine.infer_config(guide, lambda site: {"enumerate": "sequential"} if site["name"] == "y" else {})
    svi = SVI(mixture.model, guide, JointOptim(torch.optim.Adam, ADAM), TraceEnum_ELBO(max_plate_nesting=1))
    return lambda: svi.step(x)


def by_hand(mixture: MixtureVAE, x: torch.Tensor) -> Step:
    """A loop written by hand: one call of the encoder, and for each component one of the decoder."""
    optimizer = torch.optim.Adam(mixture.parameters(), **ADAM)
    scale_up = DATA_SIZE / len(x)

    def step() -> float:
        logits, loc, scale = mixture.encoder(x)
        q_y = Categorical(logits=logits)
        prior_scale, log_noise = mixture.component_log_scale.exp(), mixture.likelihood.log_scale
        elbo = -kl_divergence(q_y, Categorical(logits=mixture.component_logits)).sum()
        for y in range(COMPONENTS):
            q_z = Normal(loc[:, y], scale[:, y])
            z = q_z.rsample()
            error = (
                0.5 * ((x - mixture.decoder(z)) / log_noise.exp()).square() + log_noise + 0.5 * math.log(2 * math.pi)
            )
            log_ratio = Normal(mixture.component_loc[y], prior_scale[y]).log_prob(z) - q_z.log_prob(z)
            elbo = elbo + (q_y.probs[:, y] * (log_ratio.sum(-1) - error.sum(-1))).sum()
        loss = -scale_up * elbo
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def mixture(row: str, latent_dim: int, features: int) -> list[Line]:
    x = torch.randn(BATCH, features)
    steps = {
        "all components at once": by_svi(build(latent_dim, features), x),
        "one after the other": by_svi(build(latent_dim, features), x, sequential=True),
        "a loop by hand": by_hand(build(latent_dim, features), x),
        "summed out of the model": by_svi(build(latent_dim, features, "model"), x),
    }
    at_once = compare(steps, "all components at once")
    lines = [
        faster(row, "all components at once", "one after the other", at_once, 2.0),
        faster(row, "all components at once", "a loop by hand", at_once, None),
    ]
    return [*lines, faster(row, "summed out of the model", "a loop by hand", compare(steps, "summed out of the model"))]


ROWS: dict[str, Callable[[str], list[Line]]] = {
    "mixture-784": lambda row: mixture(row, 32, 784),
    "mixture-2": lambda row: mixture(row, 2, 2),
}
