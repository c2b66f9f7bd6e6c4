"""Right calls of the classes and functions that models are made and trained with, and of their methods."""

from types import MappingProxyType
from typing import Any, NamedTuple

import pyro
import torch
from helpers.wrong_values import TENSOR
from pyro.infer import JitTrace_ELBO, Trace_ELBO, TraceMeanField_ELBO

import pyro_ilvae as ilvae
from pyro_ilvae import likelihoods, schedules

K, D, N, V = 2, 6, 4, 5


def x():
    return torch.randn(N, D)


def z():
    return torch.randn(N, K)


def tokens():
    return torch.tensor([[1, 2, 0], [3, 3, 0], [4, 1, 0], [2, 0, -1]])


def plain_decoder(**more):
    return ilvae.MLPDecoder(latent_dim=K, event_shape=D, hidden_features=(4,), **more)


def projected(inverse_lipschitz=1.0, **more):
    backbone = plain_decoder(**more)
    sizes = {"latent_dim": K, "event_shape": D, "map_features": (4,)}
    return ilvae.ProjectedDecoder(backbone, inverse_lipschitz=inverse_lipschitz, **sizes, **more)


def composition(**more):
    return ilvae.InverseLipschitzDecoder(latent_dim=K, event_shape=D, map_features=(4,), **more)


def encoder(**more):
    return ilvae.MLPEncoder(event_shape=D, latent_dim=K, hidden_features=(4,), **more)


def vae(decoder=projected, **more):
    return ilvae.VAE(decoder(), encoder(), likelihoods.Normal(0.5), **more)


def mixture(**more):
    return ilvae.MixtureVAE(projected(), encoder(), likelihoods.Normal(0.5), 3, **more)


def history():
    return ilvae.RecurrentHistory(V, embedding_features=4, hidden_features=4)


def sequence_decoder():
    own = history()
    readout = ilvae.MLPDecoder(latent_dim=K, event_shape=V, hidden_features=(4,), context_dim=4)
    return ilvae.SequenceDecoder(own, readout)


def sequence_encoder():
    return ilvae.SequenceEncoder(vocab_size=V, latent_dim=K, embedding_features=4, hidden_features=4)


def sequential(**more):
    return ilvae.SequentialVAE(sequence_decoder(), sequence_encoder(), end_token=0, max_length=5, **more)


def bilipschitz():
    return ilvae.BiLipschitzMap(K, 0.5, 2.0, hidden_features=4, num_layers=2)


def brenier():
    return ilvae.BrenierMap(K, 0.5, (4,))


class Call(NamedTuple):
    """A right call, and what is different about its arguments."""

    make: Any  #: returns the function and its right arguments by name
    wrong: Any = MappingProxyType({})  #: by argument, wrong values in place of those that its name has elsewhere
    skip: frozenset = frozenset()  #: arguments for which every value is right


_DATA = [value for value in TENSOR if value is not None]  # without data, models draw from the prior predictive
LABELS = ["ab", [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, -2], [0.0, 1.0, 2.0, 1.0], torch.zeros(4, 1, dtype=torch.int64)]
_LIMITS = {"min_length": 1, "exclude": [2]}
_BONUS = {"num_beams": 2, "length_bonus": 0.5}
_TOKENS = ["ab", None, [["a"]], torch.full((N, 3), 99), torch.full((N, 3), 0.5), torch.tensor(1)]

CALLS = {
    "ICNN": Call(
        lambda: (ilvae.ICNN, {"in_features": K, "hidden_features": (4,), "activation": "softplus", "input_skips": True})
    ),
    "ICNN.forward": Call(lambda: (ilvae.ICNN(K, (4,)).forward, {"x": z()})),
    "ICNN.gradient": Call(lambda: (ilvae.ICNN(K, (4,)).gradient, {"x": z()})),
    "ICNN.hessian": Call(lambda: (ilvae.ICNN(K, (4,)).hessian, {"x": z()})),
    "BrenierMap": Call(
        lambda: (
            ilvae.BrenierMap,
            {
                "features": K,
                "inverse_lipschitz": 1.0,
                "hidden_features": (4,),
                "activation": "softplus",
                "input_skips": True,
                "gain": 2.0,
            },
        )
    ),
    "BrenierMap.forward": Call(lambda: (brenier().forward, {"z": z()})),
    "BrenierMap.inverse": Call(lambda: (brenier().inverse, {"y": z(), "tolerance": 1e-4, "max_iterations": 50})),
    "BrenierMap.jacobian": Call(lambda: (brenier().jacobian, {"z": z()})),
    "BrenierMap.potential": Call(lambda: (brenier().potential, {"z": z()})),
    "BiLipschitzMap": Call(
        lambda: (
            ilvae.BiLipschitzMap,
            {"latent_dim": K, "inverse_lipschitz": 0.5, "lipschitz": 2.0, "hidden_features": 4, "num_layers": 2},
        ),
        {"hidden_features": [1, 0, 2.5, "a"]},
    ),
    "BiLipschitzMap.forward": Call(lambda: (bilipschitz().forward, {"z": z()})),
    "BiLipschitzMap.given": Call(
        lambda: (bilipschitz().given, {"context": None, "offset": 1.0}), {"context": ["ab", torch.ones(K)]}
    ),
    "BiLipschitzMap.initialize": Call(
        lambda: (bilipschitz().initialize, {"x": z(), "likelihood": likelihoods.Normal(0.5), "seed": 0}),
        {"x": [*TENSOR, torch.ones(4, 5)], "likelihood": ["ab", 3, None, likelihoods.Normal]},
    ),
    "BiLipschitzMap.inverse": Call(
        lambda: (bilipschitz().inverse, {"y": z(), "tolerance": 1e-4, "max_iterations": 50})
    ),
    "BiLipschitzMap.jacobian": Call(lambda: (bilipschitz().jacobian, {"z": z()})),
    "BrenierTransform": Call(lambda: (ilvae.BrenierTransform, {"brenier_map": brenier()})),
    "InverseLipschitzDecoder": Call(
        lambda: (
            ilvae.InverseLipschitzDecoder,
            {
                "latent_dim": K,
                "event_shape": D,
                "inverse_lipschitz": 1.0,
                "map_features": (4,),
                "inner_map_features": (4,),
                "frame": "random",
                "context_dim": 3,
                "context_features": 1,
                "activation": "softplus",
                "input_skips": True,
                "train_frame": True,
            },
        )
    ),
    "ProjectedDecoder": Call(
        lambda: (
            ilvae.ProjectedDecoder,
            {
                "backbone": plain_decoder(context_dim=3),
                "latent_dim": K,
                "event_shape": D,
                "inverse_lipschitz": 1.0,
                "map_features": (4,),
                "frame": "random",
                "context_dim": 3,
                "activation": "softplus",
                "input_skips": True,
                "linear_path": True,
                "train_frame": True,
            },
        )
    ),
    "MLPDecoder": Call(
        lambda: (
            ilvae.MLPDecoder,
            {"latent_dim": K, "event_shape": D, "hidden_features": (4,), "context_dim": 3, "linear_path": True},
        )
    ),
    "Nats": Call(
        lambda: (ilvae.Nats, {"kappa": 0.5, "likelihood": likelihoods.Bernoulli(), "unit": 2.0}),
        {"likelihood": ["ab", 3, None, likelihoods.Normal, torch.nn.Linear(2, 2), lambda eta: eta]},
    ),
    "Nats of noise": Call(lambda: (ilvae.Nats, {"kappa": 0.5, "likelihood": likelihoods.Normal()})),
    **{
        f"{make.__name__}.coordinates": Call(
            lambda make=make: (make().coordinates, {"y": x()}), {"y": [*TENSOR, torch.ones(4, 5), torch.ones(())]}
        )
        for make in (projected, composition)
    },
    **{
        f"{make.__name__}.initialize": Call(
            lambda make=make: (make().initialize, {"x": x(), "likelihood": likelihoods.Normal(0.5), "seed": 0}),
            {
                "x": [*TENSOR, torch.tensor(1.0), torch.ones(4, 5), torch.full((N, D), torch.nan), []],
                "likelihood": ["ab", 3, None, likelihoods.Normal, torch.nn.Linear(2, 2), likelihoods.Bernoulli],
            },
        )
        for make in (plain_decoder, projected, composition)
    },
    **{
        f"{make.__name__}.{method}": Call(
            lambda make=make, method=method, more=more: (
                getattr(make(context_dim=3), method),
                {"context": torch.randn(N, 3), "z": z()} if more else {"context": torch.randn(3)},
            )
        )
        for make in (plain_decoder, projected, composition)
        for method, more in (("forward", True), ("given", False))
    },
    **{
        f"{make.__name__}.forward without context": Call(lambda make=make: (make().forward, {"z": z()}))
        for make in (plain_decoder, projected, composition)
    },
    "mlp": Call(
        lambda: (ilvae.mlp, {"in_features": K, "hidden_features": (4,), "out_features": D}),
        {"hidden_features": [(0,), (2.5,), "ab", 3]},
    ),
    "principal_frame": Call(
        lambda: (ilvae.principal_frame, {"x": x(), "latent_dim": K}),
        {"latent_dim": [0, -1, 2.5, "a", 7], "x": ["ab", None, torch.full((N, D), torch.nan), torch.ones(1, 1), 3]},
    ),
    "principal_token_frame": Call(
        lambda: (ilvae.principal_token_frame, {"x": tokens(), "vocab_size": V, "latent_dim": K}), {"x": _TOKENS}
    ),
    "MLPEncoder": Call(
        lambda: (
            ilvae.MLPEncoder,
            {
                "event_shape": D,
                "latent_dim": K,
                "hidden_features": (4,),
                "input_transform": torch.log1p,
                "num_components": 2,
            },
        )
    ),
    "MLPEncoder.forward": Call(lambda: (encoder().forward, {"x": x()})),
    "ConvEncoder": Call(
        lambda: (
            ilvae.ConvEncoder,
            {
                "event_shape": (8, 8),
                "latent_dim": K,
                "channels": (2,),
                "hidden_features": (4,),
                "input_transform": torch.log1p,
                "num_components": 2,
            },
        )
    ),
    "VAE": Call(
        lambda: (
            ilvae.VAE,
            {
                "decoder": projected(),
                "encoder": encoder(),
                "likelihood": likelihoods.Normal(0.5),
                "data_size": 10,
                "latent_dim": K,
                "event_shape": D,
            },
        ),
        {
            "decoder": ["ab", 3, None, ilvae.MLPDecoder, encoder()],
            "encoder": ["ab", 3, None, ilvae.MLPEncoder, projected()],
            "data_size": [0, -1, 2.5, "a"],
        },
    ),
    "VAE.model": Call(lambda: (vae().model, {"x": x()}), {"x": _DATA}),
    "VAE.guide": Call(lambda: (vae().guide, {"x": x()}), {"x": _DATA}),
    "VAE.model of a batch": Call(lambda: (vae(data_size=10).model, {"x": x(), "index": [0, 3, 5, 9]}), {"x": _DATA}),
    "VAE.guide of a batch": Call(lambda: (vae(data_size=10).guide, {"x": x(), "index": [0, 3, 5, 9]}), {"x": _DATA}),
    "MixtureVAE.model of a batch": Call(
        lambda: (mixture(data_size=10).model, {"x": x(), "index": [0, 3, 5, 9]}), {"x": []}
    ),
    "SequentialVAE.model of a batch": Call(
        lambda: (sequential(data_size=10).model, {"x": tokens(), "index": [0, 3, 5, 9]}), {"x": []}
    ),
    "MixtureVAE.model without data": Call(lambda: (mixture().model, {"num_data": 2})),
    "SequentialVAE.model without data": Call(lambda: (sequential().model, {"num_data": 2})),
    "VAE.guide without data": Call(lambda: (vae().guide, {"num_data": 2})),
    "VAE.model without data": Call(lambda: (vae().model, {"num_data": 2})),
    **{
        f"{make.__name__}.initialize": Call(
            lambda make=make, data=data: (make().initialize, {"x": data(), "seed": 0}), {"x": wrong}
        )
        for make, data, wrong in (
            (vae, x, [*TENSOR, torch.tensor(1.0), torch.ones(4, 5), torch.full((N, D), torch.nan)]),
            (mixture, x, [*TENSOR, torch.tensor(1.0), torch.ones(4, 5), torch.full((N, D), torch.nan)]),
            (sequential, tokens, _TOKENS),
            (sequence_decoder, tokens, _TOKENS),
        )
    },
    "VAE.encode": Call(lambda: (vae().encode, {"x": x(), "batch_size": 2})),
    "VAE.reconstruct": Call(lambda: (vae().reconstruct, {"x": x(), "batch_size": 2})),
    "VAE.sample_prior": Call(
        lambda: (vae().sample_prior, {"num_samples": 3, "batch_size": 2, "mean": False, "seed": 0}),
    ),
    "MixtureVAE": Call(
        lambda: (
            ilvae.MixtureVAE,
            {
                "decoder": projected(),
                "encoder": encoder(),
                "likelihood": likelihoods.Normal(0.5),
                "num_components": 3,
                "data_size": 10,
                "weights": "fixed",
                "scales": "learned",
                "enumerate_in": "guide",
                "latent_dim": K,
                "event_shape": D,
            },
        ),
        {"data_size": [0, -1, 2.5, "a"]},
    ),
    "MixtureVAE.model": Call(lambda: (mixture().model, {"x": x(), "y": [0, 1, 2, -1]}), {"x": _DATA, "y": LABELS}),
    "MixtureVAE.encode": Call(lambda: (mixture().encode, {"x": x(), "batch_size": 2})),
    "MixtureVAE.reconstruct": Call(lambda: (mixture().reconstruct, {"x": x(), "batch_size": 2})),
    "MixtureVAE.predict_component": Call(
        lambda: (mixture().predict_component, {"x": x(), "batch_size": 2, "num_samples": 5, "seed": 0})
    ),
    "MixtureVAE.initialize": Call(lambda: (mixture().initialize, {"x": x(), "seed": 0}), {"x": _DATA}),
    "MixtureVAE.initialize_components": Call(
        lambda: (mixture().initialize_components, {"x": x(), "batch_size": 2, "restarts": 2, "seed": 0})
    ),
    "MixtureVAE.sample_component": Call(
        lambda: (
            mixture().sample_component,
            {"component": 1, "num_samples": 3, "batch_size": 2, "mean": False, "seed": 0},
        )
    ),
    "MixtureVAE.sample_prior": Call(
        lambda: (mixture().sample_prior, {"num_samples": 3, "batch_size": 2, "mean": False, "seed": 0})
    ),
    "RecurrentHistory": Call(
        lambda: (
            ilvae.RecurrentHistory,
            {"vocab_size": V, "kind": "gru", "embedding_features": 4, "hidden_features": 4, "num_layers": 1},
        ),
        {"hidden_features": [0, -1, 2.5, "a"]},
    ),
    "TransformerHistory": Call(
        lambda: (
            ilvae.TransformerHistory,
            {"vocab_size": V, "hidden_features": 4, "num_heads": 2, "num_layers": 1, "dropout": 0.0},
        ),
        {"hidden_features": [0, -1, 2.5, "a"]},
    ),
    "RecurrentHistory.begin": Call(lambda: (history().begin, {"num_sequences": 2}), {"num_sequences": ["a", 2.5, -1]}),
    "SequenceDecoder": Call(
        lambda: (
            ilvae.SequenceDecoder,
            {
                "history": history(),
                "decoder": ilvae.MLPDecoder(latent_dim=K, event_shape=V, hidden_features=(4,), context_dim=4),
                "word_dropout": 0.0,
            },
        ),
        {"decoder": ["ab", 3, None, ilvae.MLPDecoder, projected()]},
    ),
    "SequenceDecoder.forward": Call(lambda: (sequence_decoder().forward, {"z": z(), "x": tokens()}), {"x": _TOKENS}),
    "SequenceDecoder.given": Call(lambda: (sequence_decoder().given, {"x": tokens()[0]}), {"x": _TOKENS}),
    "SequenceEncoder": Call(
        lambda: (
            ilvae.SequenceEncoder,
            {"vocab_size": V, "latent_dim": K, "embedding_features": 4, "hidden_features": 4, "num_layers": 1},
        ),
        {"hidden_features": [0, -1, 2.5, "a"]},
    ),
    "SequenceEncoder.forward": Call(
        lambda: (sequence_encoder().forward, {"x": tokens()}), {"x": [*_TOKENS, torch.tensor([[1, -1, 2]])]}
    ),
    "SequentialVAE": Call(
        lambda: (
            ilvae.SequentialVAE,
            {
                "decoder": sequence_decoder(),
                "encoder": sequence_encoder(),
                "data_size": 10,
                "end_token": 0,
                "max_length": 5,
            },
        ),
        {"data_size": [0, -1, 2.5, "a"], "decoder": ["ab", 3, None, ilvae.SequenceDecoder, projected()]},
    ),
    "SequentialVAE.model": Call(lambda: (sequential().model, {"x": tokens()}), {"x": _TOKENS[:1] + _TOKENS[2:]}),
    "SequentialVAE.encode": Call(lambda: (sequential().encode, {"x": tokens(), "batch_size": 2}), {"x": _TOKENS}),
    "SequentialVAE.reconstruct": Call(
        lambda: (
            sequential().reconstruct,
            {"x": tokens(), "batch_size": 2, "max_length": 3} | _LIMITS | _BONUS,
        ),
        {"x": _TOKENS},
    ),
    "SequentialVAE.sample": Call(
        lambda: (
            sequential().sample,
            {"z": z(), "batch_size": 2, "temperature": 1.0, "max_length": 3, "seed": 0} | _LIMITS,
        )
    ),
    "SequentialVAE.search": Call(
        lambda: (sequential().search, {"z": z(), "batch_size": 2, "max_length": 3} | _LIMITS | _BONUS)
    ),
    "SequentialVAE.sample_prior": Call(
        lambda: (
            sequential().sample_prior,
            {"num_samples": 3, "batch_size": 2, "temperature": 1.0, "max_length": 3, "seed": 0} | _LIMITS,
        )
    ),
    "SequentialVAE.interpolate": Call(
        lambda: (
            sequential().interpolate,
            {"start": tokens()[0], "end": tokens()[1], "num_steps": 3, "max_length": 3} | _LIMITS | _BONUS,
        ),
        {"num_steps": [0, -1, 2.5, "a"]},
    ),
    "AnnealedELBO": Call(
        lambda: (ilvae.AnnealedELBO, {"elbo": TraceMeanField_ELBO(), "beta": 0.5}),
        {"beta": [-1.0, "a", torch.nan, torch.ones(2), {}, {"z": -1.0}, ilvae.Schedule]},
    ),
    "anneal": Call(
        lambda: (ilvae.anneal, {"fn": vae().model, "beta": 0.5}),
        {"beta": [-1.0, "a", torch.nan, torch.ones(2), {}, {"z": -1.0}, ilvae.Schedule]},
    ),
    "InverseLipschitzScheduler": Call(
        lambda: (
            ilvae.InverseLipschitzScheduler,
            {"decoder": projected(), "schedule": schedules.linear(0.0, 1.0, num_steps=3)},
        ),
        {"decoder": ["ab", 3, None, plain_decoder()]},
    ),
    "NatsScheduler": Call(
        lambda: (
            ilvae.NatsScheduler,
            {
                "decoder": projected(inverse_lipschitz=ilvae.Nats(0.5, likelihoods.Normal())),
                "schedule": schedules.linear(0.0, 1.0, num_steps=3),
            },
        ),
        {
            "decoder": ["ab", 3, None, plain_decoder(), projected(), ilvae.ProjectedDecoder],
            "schedule": [3, "ab", None, ilvae.Schedule, schedules.constant(41.0), schedules.constant(-1.0)],
        },
    ),
    "JointOptim": Call(
        lambda: (
            ilvae.JointOptim,
            {"optim_constructor": torch.optim.Adam, "optim_args": {"lr": 0.1}, "clip_args": {"clip_norm": 1.0}},
        )
    ),
    "GraphSVI": Call(
        lambda: (
            ilvae.GraphSVI,
            {
                "model": vae().model,
                "guide": vae().guide,
                "optim": pyro.optim.Adam({"lr": 0.1}),
                "loss": Trace_ELBO(),
                "compile": False,
                "num_compared": 1,
                "num_graphs": 2,
                "device": "cpu",
                "check_every": 5,
            },
        ),
        {"loss": [Trace_ELBO, JitTrace_ELBO()]},
    ),
    "Schedule": Call(lambda: (ilvae.Schedule, {"function": lambda step: 1.0}), skip=frozenset({"name"})),
    "schedules.constant": Call(lambda: (schedules.constant, {"value": 1.0})),
    **{
        f"schedules.{name}": Call(
            lambda name=name, more=more: (
                getattr(schedules, name),
                dict(start=0.1, end=1.0, num_steps=4, planned_steps=9, **more),
            )
        )
        for name, more in (
            ("linear", {}),
            ("cosine", {}),
            ("exponential", {}),
            ("cyclical", {"num_cycles": 2, "ramp": 0.5}),
        )
    },
}
