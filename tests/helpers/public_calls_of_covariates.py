"""Right calls with a context, an offset, a mask or a network of contexts, of models and of their parts."""

import torch
from helpers.public_calls import (
    LABELS,
    Call,
    D,
    K,
    N,
    V,
    encoder,
    history,
    mixture,
    plain_decoder,
    projected,
    tokens,
    vae,
    x,
    z,
)
from helpers.public_calls import sequential as plain_sequential
from helpers.public_calls_of_models import hierarchy, layer

import pyro_ilvae as ilvae
from pyro_ilvae import likelihoods

C = 3


def context():
    return torch.randn(N, C)


def offset():
    return torch.randn(N)


def mask():
    return torch.arange(N * D).reshape(N, D) % 3 > 0


def conditional_vae(**more):
    parts = projected(context_dim=C), encoder(context_dim=C, takes_mask=True), likelihoods.Normal(0.5)
    return ilvae.VAE(*parts, **more)


def conditional_mixture(**more):
    parts = projected(context_dim=C), encoder(context_dim=C, takes_mask=True), likelihoods.Normal(0.5)
    return ilvae.MixtureVAE(*parts, 3, **more)


def conditional_hierarchy(**more):
    parts = projected(context_dim=C), encoder(context_dim=C, takes_mask=True), likelihoods.Normal(0.5)
    return ilvae.HierarchicalVAE(*parts, [layer()], **more)


def sequence_decoder():
    own = history()
    readout = ilvae.MLPDecoder(latent_dim=K, event_shape=V, hidden_features=(4,), context_dim=4 + C)
    return ilvae.SequenceDecoder(own, readout, context_dim=C)


def sequence_encoder():
    widths = {"embedding_features": 4, "hidden_features": 4, "context_dim": C}
    return ilvae.SequenceEncoder(vocab_size=V, latent_dim=K, **widths)


def sequential(**more):
    return ilvae.SequentialVAE(sequence_decoder(), sequence_encoder(), end_token=0, max_length=5, **more)


def conv_encoder():
    return ilvae.ConvEncoder(event_shape=(4, 4), latent_dim=K, context_dim=C, takes_mask=True)


# A context that no model takes; one for all data is None in some calls.
CONTEXT = ["ab", None, torch.ones(3, 5), {"a": 1}, torch.full((N, C), 1j), torch.full((N, C), torch.nan), [0, 1, 2, 3]]
OFFSET = ["ab", {"a": 1}, torch.ones(3), torch.full((N,), torch.nan), torch.full((N,), -torch.inf), torch.ones(N, 2)]
MASK = ["ab", {"a": 1}, torch.ones(N, D), torch.ones(N, 2, dtype=torch.bool), torch.zeros(N, D, dtype=torch.bool)]
NETWORK = ["ab", 3, torch.nn.Embedding]
WRONG = {"context": CONTEXT, "target_context": CONTEXT[:1] + CONTEXT[2:], "offset": OFFSET, "mask": MASK, "x": []}
OF_ALL = {"context": CONTEXT[:1] + CONTEXT[2:]}


def call(build, name, *arguments, wrong=WRONG, **more):
    """A call of a method with arguments that this file has functions for, and others."""
    own = {"x": x, "context": context, "target_context": context, "offset": offset, "mask": mask}
    return Call(lambda: (getattr(build(), name), {key: own[key]() for key in arguments} | more), wrong)


ALL = ("x", "context", "offset", "mask")
DENSE = {"VAE": conditional_vae, "MixtureVAE": conditional_mixture, "HierarchicalVAE": conditional_hierarchy}
CALLS = {
    **{
        f"{kind}.{name} with covariates": call(build, name, *ALL)
        for kind, build in DENSE.items()
        for name in ("guide", "create_plates", "initialize", *(["model"] if kind != "MixtureVAE" else []))
    },
    **{
        f"{kind}.{name} with covariates": call(build, name, "x", "context", "mask")
        for kind, build in DENSE.items()
        for name in ("encode", *(["predict_component", "initialize_components"] if kind == "MixtureVAE" else []))
    },
    **{
        f"{kind}.reconstruct with covariates": call(build, "reconstruct", *ALL, "target_context")
        for kind, build in DENSE.items()
    },
    **{
        f"{kind}.{name} with covariates": call(build, name, "context", "offset", num_samples=N, **more)
        for kind, build, name, more in (
            *((kind, build, "sample_prior", {}) for kind, build in DENSE.items()),
            ("MixtureVAE", conditional_mixture, "sample_component", {"component": 1}),
        )
    },
    "MixtureVAE.model with covariates": call(
        conditional_mixture, "model", "context", "offset", mask=None, num_data=N, wrong={**WRONG, "mask": []}
    ),
    "VAE with a network of contexts": Call(
        lambda: (
            ilvae.VAE,
            {
                "decoder": projected(context_dim=C),
                "encoder": encoder(context_dim=C, takes_mask=True),
                "likelihood": likelihoods.Normal(0.5),
                "context_network": torch.nn.Embedding(4, C),
                "missing": "ignore",
            },
        ),
        {"context_network": NETWORK, "encoder": [encoder(context_dim=2)]},
    ),
    "MixtureVAE with a network of contexts": Call(
        lambda: (
            ilvae.MixtureVAE,
            {
                "decoder": projected(context_dim=C),
                "encoder": encoder(context_dim=C, takes_mask=True),
                "likelihood": likelihoods.Normal(0.5),
                "num_components": 3,
                "context_network": torch.nn.Embedding(4, C),
                "missing": "raise",
            },
        ),
        {"context_network": NETWORK, "encoder": [encoder(context_dim=2)]},
    ),
    "HierarchicalVAE with a network of contexts": Call(
        lambda: (
            ilvae.HierarchicalVAE,
            {
                "decoder": projected(context_dim=C),
                "encoder": encoder(context_dim=C, takes_mask=True),
                "likelihood": likelihoods.Normal(0.5),
                "layers": [layer()],
                "context_network": torch.nn.Embedding(4, C),
                "missing": "ignore",
            },
        ),
        {"context_network": NETWORK, "encoder": [encoder(context_dim=2)], "layers": []},
    ),
    "MLPEncoder with a context": Call(
        lambda: (ilvae.MLPEncoder, {"event_shape": D, "latent_dim": K, "context_dim": C, "takes_mask": True}),
    ),
    "ConvEncoder with a context": Call(
        lambda: (ilvae.ConvEncoder, {"event_shape": (4, 4), "latent_dim": K, "context_dim": C, "takes_mask": True}),
    ),
    "MLPEncoder.forward with a context": Call(
        lambda: (encoder(context_dim=C, takes_mask=True).forward, {"x": x(), "context": context(), "mask": mask()}),
        {"context": ["ab", None, torch.ones(3, 5), torch.ones(3, C)], "mask": ["ab", torch.ones(N, D), torch.ones(3)]},
    ),
    "ConvEncoder.forward with a context": Call(
        lambda: (
            conv_encoder().forward,
            {"x": torch.randn(N, 4, 4), "context": context(), "mask": torch.ones(N, 4, 4, dtype=torch.bool)},
        ),
        {"context": ["ab", None, torch.ones(3, 5), torch.ones(3, C)], "mask": ["ab", torch.ones(N, D), torch.ones(3)]},
    ),
    **{
        f"{kind}.given an offset": Call(
            lambda build=build: (build().given, {"context": torch.zeros(C), "offset": torch.zeros(D)}),
            {"context": ["ab", None, torch.ones(5), torch.ones(1, C)], "offset": ["ab", torch.ones(5), torch.nan]},
        )
        for kind, build in (
            ("MLPDecoder", lambda: plain_decoder(context_dim=C)),
            ("ProjectedDecoder", lambda: projected(context_dim=C)),
            (
                "InverseLipschitzDecoder",
                lambda: ilvae.InverseLipschitzDecoder(latent_dim=K, event_shape=D, map_features=(4,), context_dim=C),
            ),
        )
    },
    "Normal.forward with missing entries": Call(
        lambda: (likelihoods.Normal(0.5, "optimal").forward, {"eta": x(), "x": x(), "mask": mask()}),
        {"x": [], "mask": MASK[:4]},
    ),
    "SequenceEncoder with a context": Call(
        lambda: (ilvae.SequenceEncoder, {"vocab_size": V, "latent_dim": K, "context_dim": C}),
    ),
    "SequenceEncoder.forward with a context": Call(
        lambda: (sequence_encoder().forward, {"x": tokens(), "context": context()}),
        {"x": [], "context": ["ab", None, torch.ones(3, 5)]},
    ),
    "SequenceDecoder with a context": Call(
        lambda: (
            ilvae.SequenceDecoder,
            {
                "history": history(),
                "decoder": ilvae.MLPDecoder(latent_dim=K, event_shape=V, context_dim=4 + C),
                "context_dim": C,
            },
        ),
        {"history": [], "decoder": [plain_decoder()], "context_dim": [0, "a", 2.5, 7]},
    ),
    **{
        f"SequenceDecoder.{name} with a context": Call(
            lambda name=name, more=more: (
                getattr(sequence_decoder(), name),
                {own: value() for own, value in more.items()},
            ),
            {"x": [], "z": [], "context": ["ab", None, torch.ones(2, 5)]},
        )
        for name, more in (
            ("forward", {"z": z, "x": tokens, "context": context}),
            ("begin", {"z": z, "context": context}),
            ("given", {"x": lambda: torch.tensor([1, 2, 3]), "context": lambda: torch.zeros(C)}),
        )
    },
    "SequentialVAE with a network of contexts": Call(
        lambda: (
            ilvae.SequentialVAE,
            {
                "decoder": sequence_decoder(),
                "encoder": sequence_encoder(),
                "context_network": torch.nn.Embedding(4, C),
            },
        ),
        {"context_network": NETWORK},
    ),
    **{
        f"SequentialVAE.{name} with a context": Call(
            lambda name=name: (getattr(sequential(), name), {"x": tokens(), "context": context()}), WRONG
        )
        for name in ("model", "guide", "create_plates", "encode")
    },
    "SequentialVAE.reconstruct with a context": Call(
        lambda: (
            sequential().reconstruct,
            {"x": tokens(), "context": context(), "target_context": context(), "max_length": 3},
        ),
        WRONG,
    ),
    **{
        f"SequentialVAE.{name} with a context": Call(
            lambda name=name: (getattr(sequential(), name), {"z": z(), "context": context(), "max_length": 3}),
            {"z": [], "context": CONTEXT},
        )
        for name in ("sample", "search")
    },
    "SequentialVAE.sample_prior with a context": Call(
        lambda: (sequential().sample_prior, {"num_samples": N, "context": context(), "max_length": 3}), WRONG
    ),
    "SequentialVAE.interpolate with a context": Call(
        lambda: (
            sequential().interpolate,
            {"start": tokens()[0], "end": tokens()[1], "context": torch.zeros(C), "max_length": 3},
        ),
        {"start": [], "end": [], "context": ["ab", None, torch.ones(5), 7]},
    ),
    "VAE.create_plates of a batch": call(lambda: vae(data_size=10), "create_plates", "x", index=[0, 3, 5, 9]),
    "HierarchicalVAE.create_plates of a batch": call(
        lambda: hierarchy(data_size=10), "create_plates", "x", index=[0, 3, 5, 9]
    ),
    "MixtureVAE.create_plates of a batch": call(
        lambda: mixture(data_size=10), "create_plates", "x", index=[0, 3, 5, 9]
    ),
    "MixtureVAE.guide of a batch": call(lambda: mixture(data_size=10), "guide", "x", index=[0, 3, 5, 9]),
    **{
        f"SequentialVAE.{name} of a batch": Call(
            lambda name=name: (
                getattr(sequential(data_size=10), name),
                {"x": tokens(), "context": context(), "index": [0, 3, 5, 9]},
            ),
            {"x": [], "context": []},
        )
        for name in ("guide", "create_plates")
    },
    **{
        f"{kind}.{name} without data": Call(lambda build=build, name=name: (getattr(build(), name), {"num_data": 2}))
        for kind, build, names in (
            ("VAE", vae, ["create_plates"]),
            ("MixtureVAE", mixture, ["create_plates", "guide"]),
            ("HierarchicalVAE", hierarchy, ["create_plates"]),
            ("SequentialVAE", plain_sequential, ["create_plates", "guide"]),
        )
        for name in names
    },
    **{
        f"MixtureVAE.{name} with labels": Call(
            lambda name=name: (getattr(mixture(), name), {"x": x(), "y": [0, 1, 2, -1]}), {"x": [], "y": wrong}
        )
        for name, wrong in (("guide", LABELS), ("create_plates", []), ("initialize_components", LABELS))
    },
}
