"""The maps and decoders over which the laws are parametrized."""

import torch
from torch.func import jacrev, vmap

from pyro_ilvae import (
    BrenierMap,
    InverseLipschitzDecoder,
    MLPDecoder,
    ProjectedDecoder,
    likelihoods,
    mlp,
    principal_frame,
)

LATENT, EVENT = 3, (4, 2)


class ConvBackbone(torch.nn.Module):
    """A backbone that takes exactly one batch dimension."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(LATENT, 2 * 2 * 1)
        self.up = torch.nn.ConvTranspose2d(2, 1, (2, 2), stride=(2, 2))

    def forward(self, z):
        return self.up(self.linear(z).reshape(-1, 2, 2, 1)).squeeze(1)


def frame():
    return principal_frame(torch.randn(50, *EVENT), LATENT)


def started(decoder):
    """The decoder, started from data."""
    decoder.initialize(torch.randn(50, *EVENT), likelihoods.Normal(0.5))
    return decoder


INVERSE_LIPSCHITZ_DECODERS = {
    "composition-identity": lambda c=0.7: InverseLipschitzDecoder(
        latent_dim=LATENT, event_shape=EVENT, inverse_lipschitz=c, map_features=(16, 12), frame="identity"
    ),
    "composition-random": lambda c=0.7: InverseLipschitzDecoder(
        latent_dim=LATENT, event_shape=EVENT, inverse_lipschitz=c, map_features=(16, 12)
    ),
    "composition-principal": lambda c=0.7: InverseLipschitzDecoder(
        latent_dim=LATENT, event_shape=EVENT, inverse_lipschitz=c, map_features=(16,), frame=frame()
    ),
    "composition-no-skips": lambda c=0.7: InverseLipschitzDecoder(
        latent_dim=LATENT, event_shape=EVENT, inverse_lipschitz=c, map_features=(16, 12), input_skips=False
    ),
    "projected-mlp": lambda c=0.7: ProjectedDecoder(
        mlp(LATENT, (16,), 8), latent_dim=LATENT, event_shape=EVENT, inverse_lipschitz=c
    ),
    "projected-conv": lambda c=0.7: ProjectedDecoder(
        ConvBackbone(), latent_dim=LATENT, event_shape=EVENT, inverse_lipschitz=c, frame=frame()
    ),
    "projected-identity": lambda c=0.7: ProjectedDecoder(
        mlp(LATENT, (16,), 8), latent_dim=LATENT, event_shape=EVENT, inverse_lipschitz=c, frame="identity"
    ),
    "projected-started": lambda c=0.7: started(
        ProjectedDecoder(
            mlp(LATENT, (16,), 8), latent_dim=LATENT, event_shape=EVENT, inverse_lipschitz=c, linear_path=False
        )
    ),
}
DECODERS = INVERSE_LIPSCHITZ_DECODERS | {
    "plain": lambda: MLPDecoder(latent_dim=LATENT, event_shape=EVENT, hidden_features=(16,)),
    "plain-linear": lambda: started(
        MLPDecoder(latent_dim=LATENT, event_shape=EVENT, hidden_features=(16,), linear_path=True)
    ),
}
MAPS = {
    "brenier": lambda c=0.7: BrenierMap(LATENT, c, (16, 12)),
    "brenier-no-skips": lambda c=0.7: BrenierMap(LATENT, c, (16, 12, 8), input_skips=False),
    "brenier-one-layer": lambda c=0.7: BrenierMap(LATENT, c, (16,), "gaussian_softplus"),
}


def jacobian(fn, z):
    """The Jacobian of ``fn`` at each row of ``z``, by reverse-mode differentiation."""
    fn(z)  # Pyro's global store cannot take its first sight of a parameter inside a transform.
    return vmap(jacrev(fn))(z)


def perturb(module, scale=1.0):
    """Move every parameter, so that a law is not one of the initialization."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module
