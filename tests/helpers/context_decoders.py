"""The decoders with a context over which the laws are parametrized, and backbones that take one."""

import torch
from helpers.decoders import EVENT, LATENT
from torch import nn

from pyro_ilvae import InverseLipschitzDecoder, MLPDecoder, ProjectedDecoder, mlp

CONTEXT = 6
SIZES = {"latent_dim": LATENT, "event_shape": EVENT, "context_dim": CONTEXT}


class ConcatenatingBackbone(nn.Module):
    """A backbone of a user's own, which takes z and context with exactly one batch dimension."""

    def __init__(self):
        super().__init__()
        self.network = mlp(LATENT + CONTEXT, (16,), 8)

    def forward(self, z, context):
        assert z.dim() == context.dim() == 2
        return self.network(torch.cat([z, context], dim=1))


class ConvContextBackbone(nn.Module):
    """A backbone of convolutions, which take exactly one batch dimension."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(LATENT, 4)
        self.from_context = nn.Linear(CONTEXT, 4)
        self.up = nn.ConvTranspose2d(2, 1, (2, 2), stride=(2, 2))

    def forward(self, z, context):
        features = torch.tanh(self.linear(z) + self.from_context(context))
        return self.up(features.reshape(-1, 2, 2, 1)).squeeze(1)


def matrix(columns=LATENT):
    return torch.linalg.qr(torch.randn(8, columns)).Q


def plain():
    return MLPDecoder(**SIZES, hidden_features=(16, 12))


def projected(backbone=plain, frame="random"):
    def build(c=0.7):
        chosen = matrix() if frame == "matrix" else frame
        return ProjectedDecoder(backbone(), **SIZES, inverse_lipschitz=c, map_features=(12, 8), frame=chosen)

    return build


def composition(frame="random", features=2):
    def build(c=0.7):
        chosen = matrix(LATENT + features) if frame == "matrix" else frame
        return InverseLipschitzDecoder(
            **SIZES, inverse_lipschitz=c, map_features=(12, 8), frame=chosen, context_features=features
        )

    return build


INVERSE_LIPSCHITZ_CONTEXT_DECODERS = {
    "projected-random": projected(),
    "projected-identity": projected(frame="identity"),
    "projected-centered": projected(frame="centered"),
    "projected-matrix": projected(frame="matrix"),
    "projected-concatenating": projected(ConcatenatingBackbone),
    "projected-conv": projected(ConvContextBackbone),
    "composition-random": composition(),
    "composition-identity": composition("identity"),
    "composition-centered": composition("centered", 1),
    "composition-matrix": composition("matrix"),
    "composition-widest": composition(features=None),
}
CONTEXT_DECODERS = {"plain": plain} | INVERSE_LIPSCHITZ_CONTEXT_DECODERS
