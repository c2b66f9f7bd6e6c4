"""Right calls of the remedies of posterior collapse, and of their methods."""

import pyro
import torch
from helpers.public_calls import Call, encoder, plain_decoder, vae, x, z
from helpers.wrong_values import CHOICE, FRACTION, INT, MAPPING, MODULE, NAN, NON_NEGATIVE, POSITIVE, Other
from pyro.infer import SVI, JitTrace_ELBO, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO

from pyro_ilvae import likelihoods, remedies

NAME = [3, None, Other()]


def svi():
    own = vae()
    return SVI(own.model, own.guide, pyro.optim.Adam({"lr": 0.1}), TraceMeanField_ELBO())


def aggressive():
    return remedies.AggressiveInference(svi(), max_inner=3)


CALLS = {
    "remedies.FreeBitsELBO": Call(
        lambda: (
            remedies.FreeBitsELBO,
            {"elbo": TraceMeanField_ELBO(), "nats": 0.5, "groups": 2, "sites": ["z"]},
        ),
        {
            "elbo": ["ab", 3, None, Trace_ELBO, JitTrace_ELBO(), RenyiELBO(), Other()],
            "nats": [*NON_NEGATIVE, {}, {"z": -1.0}, {3: 0.5}],
            "groups": ["typo", 0, -1, 2.5, NAN, Other(), None, True],
            "sites": ["z", [], 3, [3], Other()],
        },
    ),
    "remedies.FreeBitsELBO.__call__": Call(
        lambda: (remedies.FreeBitsELBO(Trace_ELBO(), 0.5).__call__, {"model": vae().model, "guide": vae().guide})
    ),
    "remedies.LatentReconstruction": Call(
        lambda: (
            remedies.LatentReconstruction,
            {"encoder": encoder(), "weight": 0.5, "latent": "z", "observed": "x"},
        ),
        {"weight": NON_NEGATIVE, "latent": NAME, "observed": NAME},
    ),
    "remedies.MinimumKLEncoder": Call(
        lambda: (
            remedies.MinimumKLEncoder,
            {"encoder": encoder(), "delta": 0.5, "prior": torch.distributions.Normal(torch.zeros(2), 1.0)},
        ),
        {
            "encoder": [*MODULE, encoder(num_components=3), plain_decoder()],
            "delta": NON_NEGATIVE,
            "prior": ["ab", 3, Other(), torch.distributions.Laplace(0.0, 1.0)],
        },
    ),
    "remedies.BatchNormEncoder": Call(
        lambda: (
            remedies.BatchNormEncoder,
            {"encoder": encoder(), "gamma": 0.5, "momentum": 0.2, "epsilon": 1e-4},
        ),
        {
            "encoder": [*MODULE, encoder(num_components=3), plain_decoder()],
            "gamma": POSITIVE,
            "momentum": FRACTION,
            "epsilon": POSITIVE,
        },
    ),
    "remedies.BatchNormEncoder.forward": Call(
        lambda: (
            remedies.BatchNormEncoder(encoder(context_dim=2, takes_mask=True), 0.5).forward,
            {"x": x(), "context": torch.randn(4, 2), "mask": torch.ones(4, 6, dtype=torch.bool)},
        ),
        {"mask": ["ab", Other(), torch.ones(4, 6)]},
    ),
    "remedies.AggressiveInference": Call(
        lambda: (
            remedies.AggressiveInference,
            {"svi": svi(), "max_inner": 3, "window": 2, "patience": 2, "information": lambda: 0.5},
        ),
        {
            "svi": ["ab", 3, None, SVI, Other()],
            "max_inner": [-1, 2.5, "a", NAN, Other()],
            "window": INT,
            "patience": INT,
            "information": ["ab", 3, Other()],
        },
    ),
    "remedies.AggressiveInference.update": Call(
        lambda: (aggressive().update, {"information": 0.5}), {"information": ["a", None, NAN, torch.inf, Other()]}
    ),
    "remedies.AggressiveInference.load_state_dict": Call(
        lambda: (aggressive().load_state_dict, {"state_dict": aggressive().state_dict()}),
        {"state_dict": [*MAPPING, None, {}]},
    ),
    "remedies.LinearPath": Call(
        lambda: (remedies.LinearPath, {"decoder": plain_decoder(), "start": "zeros"}),
        {"decoder": [*MODULE, encoder()], "start": [*CHOICE, None]},
    ),
    "remedies.LinearPath.forward": Call(
        lambda: (
            remedies.LinearPath(plain_decoder(context_dim=3)).forward,
            {"z": z(), "context": torch.randn(4, 3)},
        )
    ),
    "remedies.LinearPath.initialize": Call(
        lambda: (
            remedies.LinearPath(plain_decoder()).initialize,
            {"x": x(), "likelihood": likelihoods.Normal(0.5), "seed": 0},
        )
    ),
}
