"""Right calls of controllers, their measures, and learned constants."""

from functools import wraps

import torch
from helpers.public_calls import Call, plain_decoder, projected, vae, x
from helpers.wrong_values import INF, NAN

import pyro_ilvae as ilvae
from pyro_ilvae import likelihoods, measures

_LIMITS = {"num_steps": 20, "every": 2, "window": 5, "planned_steps": 100}
_BY_TARGET = {"tolerance": 0.05, "at_least": True}
_BOUNDS = [(1.0, 0.5), (-1.0, 2.0), 3, "ab", (0.1, NAN), (0.1, INF), (1.0,), (50.0, 60.0)]
_MEASURE = {"measure": ["ab", 3, None, ilvae.VAE]}
_WRONG = {"bounds": _BOUNDS, "target": [0.0, -1.0, NAN, "a", None], **_MEASURE}
_ANY_TARGET = {"bounds": _BOUNDS, "target": [NAN, INF, "a", None]}


def _in_nats():
    return projected(inverse_lipschitz=ilvae.Nats(0.5, likelihoods.Normal()))


def _of_models(**options):
    model = vae()
    return {"model": model.model, "guide": model.guide, **options}


def measured(make):
    """The measure of a batch, because names of sites and plates are looked up there."""

    @wraps(make)
    def function(**arguments):
        return make(**arguments)(x())

    return function


CALLS = {
    "InverseLipschitzController": Call(
        lambda: (
            ilvae.InverseLipschitzController,
            {"decoder": projected(), "measure": torch.mean, "target": 0.5, "bounds": (0.0, 10.0), "largest_beta": 2.0}
            | _LIMITS
            | _BY_TARGET,
        ),
        _WRONG | {"decoder": ["ab", 3, None, plain_decoder(), _in_nats(), ilvae.ProjectedDecoder]},
    ),
    "NatsController": Call(
        lambda: (
            ilvae.NatsController,
            {"decoder": _in_nats(), "measure": torch.mean, "target": 0.5, "bounds": (0.0, 10.0), "largest_beta": 2.0}
            | _LIMITS
            | _BY_TARGET,
        ),
        _WRONG | {"decoder": ["ab", 3, None, plain_decoder(), projected(), ilvae.ProjectedDecoder]},
    ),
    "BetaController": Call(
        lambda: (
            ilvae.BetaController,
            {"measure": torch.mean, "target": 0.5, "bounds": (0.1, 10.0), "start": 2.0} | _LIMITS | _BY_TARGET,
        ),
        _WRONG | {"start": [-1.0, 20.0, NAN, "a"]},
    ),
    "GECO": Call(
        lambda: (
            ilvae.GECO,
            {
                "measure": measures.distortion(**_of_models()),
                "target": 50.0,
                "bounds": (0.1, 10.0),
                "start": 2.0,
                "rate": 0.01,
            }
            | _LIMITS,
        ),
        _ANY_TARGET
        | {"measure": [*_MEASURE["measure"], measures.total_kl(**_of_models())], "start": [0.0, -1.0, 20.0, NAN, "a"]},
    ),
    "PIController": Call(
        lambda: (
            ilvae.PIController,
            {
                "measure": measures.total_kl(**_of_models()),
                "target": 5.0,
                "bounds": (0.1, 10.0),
                "proportional": 0.1,
                "integral": 0.01,
            }
            | _LIMITS,
        ),
        _ANY_TARGET
        | {
            "measure": [*_MEASURE["measure"], measures.distortion(**_of_models())],
            "bounds": _BOUNDS[:-1],
            "integral": [0.0, -1.0, NAN, "a"],
            "proportional": [-1.0, NAN, "a"],
        },
    ),
    "measures.Measure": Call(
        lambda: (
            measures.Measure,
            {"function": torch.mean, "name": "mean", "unit": "nats", "summary": torch.min, "rises": False},
        ),
        {"summary": ["ab", 3], "rises": ["yes", 3], "unit": [], "name": []},
    ),
    "measures.smallest_kl": Call(
        lambda: (measured(measures.smallest_kl), _of_models(site="z", num_samples=2, plate="data"))
    ),
    "measures.total_kl": Call(lambda: (measured(measures.total_kl), _of_models(site="z", num_samples=2, plate="data"))),
    "measures.fisher_divergence": Call(
        lambda: (measured(measures.fisher_divergence), _of_models(site="z", num_samples=2, plate="data"))
    ),
    "measures.distortion": Call(lambda: (measured(measures.distortion), _of_models(num_samples=2, plate="data"))),
    "LearnedConstant": Call(
        lambda: (ilvae.LearnedConstant, {"minimum": 0.5, "excess": 0.1}),
        {"minimum": [-1.0, NAN, INF, "a", None], "excess": [0.0, -1.0, NAN, "a", None]},
    ),
}
