"""Right calls of models with layers and of their methods."""

import torch
from helpers.public_calls import _DATA, Call, D, K, N, encoder, projected, x
from helpers.wrong_values import TENSOR

import pyro_ilvae as ilvae
from pyro_ilvae import diagnostics, likelihoods

UPPER = 1


def layer(**more):
    return ilvae.Layer(**parts_of_layer() | more)


def parts_of_layer():
    return {
        "decoder": ilvae.MLPDecoder(latent_dim=UPPER, event_shape=K, hidden_features=(4,)),
        "encoder": ilvae.MLPEncoder(event_shape=K, latent_dim=UPPER, hidden_features=(4,)),
        "noise": likelihoods.Normal(0.5),
    }


def hierarchy(**more):
    return ilvae.HierarchicalVAE(projected(), encoder(), likelihoods.Normal(0.5), [layer()], **more)


_NO_SITE = ["z", "typo", 3, None]

CALLS = {
    "Layer": Call(
        lambda: (ilvae.Layer, parts_of_layer() | {"latent_dim": UPPER}),
        {
            "decoder": ["ab", 3, None, ilvae.MLPDecoder, encoder(), projected(context_dim=3)],
            "encoder": ["ab", 3, None, ilvae.MLPEncoder, projected()],
            "noise": ["ab", 0.5, None, likelihoods.Normal, likelihoods.Bernoulli(), likelihoods.Normal(1.0, "optimal")],
            "latent_dim": [0, -1, 2.5, "a"],
        },
    ),
    "Layer.forward": Call(lambda: (layer().forward, {"z": torch.zeros(N, UPPER)})),
    "Layer.factor": Call(lambda: (layer().factor, {"z": torch.zeros(N, K)}), {"z": []}),
    "HierarchicalVAE": Call(
        lambda: (
            ilvae.HierarchicalVAE,
            {
                "decoder": projected(),
                "encoder": encoder(),
                "likelihood": likelihoods.Normal(0.5),
                "layers": [layer()],
                "inference": "top_down",
                "data_size": 10,
                "latent_dim": K,
                "event_shape": D,
            },
        ),
        {
            "decoder": ["ab", 3, None, ilvae.MLPDecoder, encoder()],
            "encoder": ["ab", 3, None, ilvae.MLPEncoder, projected()],
            "layers": [3, "ab", None, [], [3], layer(), ilvae.Layer, [projected()]],
            "inference": ["typo", 3, None],
            "data_size": [0, -1, 2.5, "a"],
        },
    ),
    **{
        f"HierarchicalVAE.{name}": Call(lambda name=name: (getattr(hierarchy(), name), {"x": x()}), {"x": _DATA})
        for name in ("model", "guide")
    },
    "HierarchicalVAE.model of a batch": Call(
        lambda: (hierarchy(data_size=10).model, {"x": x(), "index": [0, 3, 5, 9]}), {"x": []}
    ),
    **{
        f"HierarchicalVAE.{name} without data": Call(lambda name=name: (getattr(hierarchy(), name), {"num_data": 2}))
        for name in ("model", "guide")
    },
    "HierarchicalVAE.guide of a batch": Call(
        lambda: (hierarchy(data_size=10).guide, {"x": x(), "index": [0, 3, 5, 9]}), {"x": []}
    ),
    "HierarchicalVAE.initialize": Call(
        lambda: (hierarchy().initialize, {"x": x(), "seed": 0}),
        {"x": [*TENSOR, torch.tensor(1.0), torch.ones(4, 5), torch.full((N, D), torch.nan)]},
    ),
    **{
        f"HierarchicalVAE.{name}": Call(
            lambda name=name: (getattr(hierarchy(), name), {"x": x(), "site": "z2", "batch_size": 2}),
            {"site": _NO_SITE},
        )
        for name in ("encode", "reconstruct")
    },
    "HierarchicalVAE.sample_prior": Call(
        lambda: (hierarchy().sample_prior, {"num_samples": 3, "batch_size": 2, "mean": False, "seed": 0})
    ),
    "guaranteed_information of a layer": Call(
        lambda: (
            diagnostics.guaranteed_information,
            {"model_or_decoder": hierarchy(), "site": "z1", "num_samples": 5, "samples_per_pass": 2, "seed": 0},
        ),
        {"model_or_decoder": ["ab", ilvae.HierarchicalVAE], "site": _NO_SITE},
    ),
}
