"""The models over which the contract is parametrized: each with its data, its sites and its objectives."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from helpers import sequence_decoders
from helpers.decoders import DECODERS, EVENT, LATENT
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from pyro_ilvae import (
    VAE,
    HierarchicalVAE,
    Layer,
    MixtureVAE,
    MLPDecoder,
    MLPEncoder,
    Nats,
    ProjectedDecoder,
    SequenceDecoder,
    SequenceEncoder,
    SequentialVAE,
    likelihoods,
    mlp,
)

NUM_DATA, NUM_COMPONENTS, LENGTH = 12, 3, 6
X = torch.randn(NUM_DATA, *EVENT, generator=torch.Generator(torch.get_default_device()).manual_seed(0))
TOKENS = sequence_decoders.tokens(NUM_DATA, LENGTH)

# What a mixture's encoder gives (a factor, or each component's own posterior), or y summed out of the model.
FORMS = ["factor", "components", "summed-out"]
ENUMERATED = ["factor", "components"]


def vae_with(name="projected-mlp", *, kind=VAE, decoder=None, encoder=None, likelihood=None, **options):
    return kind(
        decoder or DECODERS[name](),
        encoder or MLPEncoder(event_shape=EVENT, latent_dim=LATENT, hidden_features=(16,)),
        likelihood or likelihoods.Normal(0.5, "learned"),
        **options,
    )


def mixture_encoder(form, event_shape=EVENT, latent_dim=LATENT, num_components=NUM_COMPONENTS):
    """An encoder that gives what the form needs."""
    own = num_components if form == "components" else None
    return MLPEncoder(event_shape=event_shape, latent_dim=latent_dim, hidden_features=(8,), num_components=own)


def enumerated_in(form):
    return "model" if form == "summed-out" else "guide"


def mixture_with(
    form,
    name="projected-mlp",
    num_components=NUM_COMPONENTS,
    *,
    kind=MixtureVAE,
    decoder=None,
    encoder=None,
    likelihood=None,
    **options,
):
    return kind(
        decoder or DECODERS[name](),
        encoder or mixture_encoder(form, num_components=num_components),
        likelihood or likelihoods.Normal(0.5, "learned"),
        num_components,
        enumerate_in=enumerated_in(form),
        **options,
    )


def sequence_encoder(latent_dim=LATENT, **options):
    options = {"embedding_features": 4, "hidden_features": 8} | options
    return SequenceEncoder(vocab_size=sequence_decoders.VOCAB, latent_dim=latent_dim, **options)


def sequential_with(name="plain-gru", *, kind=SequentialVAE, encoder=None, decoder=None, **options):
    options = {"end_token": 0, "max_length": LENGTH} | options
    return kind(decoder or sequence_decoders.DECODERS[name](), encoder or sequence_encoder(), **options)


def layer_of(below, above, *, kappa=0.5, scale=0.6, estimate="learned", event_dim=0):
    """A layer with a constant in nats that follows its noise, or with a plain decoder for kappa=None."""
    noise = likelihoods.Normal(torch.full((below,), scale) if event_dim else scale, estimate)
    decoder = MLPDecoder(latent_dim=above, event_shape=below, hidden_features=(8,))
    if kappa is not None:
        decoder = ProjectedDecoder(
            mlp(above, (8,), below), latent_dim=above, event_shape=below, inverse_lipschitz=Nats(kappa, noise)
        )
    return Layer(decoder, MLPEncoder(event_shape=below, latent_dim=above, hidden_features=(8,)), noise)


def hierarchy_with(
    inference,
    name="projected-mlp",
    dims=(LATENT, 2),
    *,
    kind=HierarchicalVAE,
    decoder=None,
    encoder=None,
    likelihood=None,
    **options,
):
    layers = options.pop("layers", None) or [layer_of(*pair) for pair in pairwise(dims)]
    return kind(
        decoder or DECODERS[name](),
        encoder or MLPEncoder(event_shape=EVENT, latent_dim=LATENT, hidden_features=(16,)),
        likelihood or likelihoods.Normal(0.5, "learned"),
        layers,
        inference=inference,
        **options,
    )


class Model(NamedTuple):
    """A model and what is known of it."""

    build: Callable[..., nn.Module]
    encoder: Callable[..., nn.Module]  # from a latent dimension, and the shape of a datum, to an encoder that suits
    x: Tensor
    sites: dict[str, tuple[int, ...]]  # of the model, with the event shape of each
    guide_sites: tuple[str, ...]
    objectives: tuple[type[ELBO], ...]

    def data(self, dtype: torch.dtype) -> Tensor:
        """The data, in another dtype unless they are tokens."""
        return self.x.to(dtype) if self.x.is_floating_point() else self.x

    def latent_values(self, *batch_shape: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Values of the latent sites, and of the component of a mixture in any case."""
        continuous = {name: shape for name, shape in self.sites.items() if name.startswith("z")}
        values = {name: torch.randn(*batch_shape, *shape, dtype=dtype) for name, shape in continuous.items()}
        return values | {"y": torch.randint(3, batch_shape)}


def _vae(name):
    return Model(
        build=lambda **options: vae_with(name, **options),
        encoder=lambda latent_dim, event_shape=EVENT: MLPEncoder(
            event_shape=event_shape, latent_dim=latent_dim, hidden_features=(8,)
        ),
        x=X,
        sites={"z": (LATENT,), "x": EVENT},
        guide_sites=("z",),
        objectives=(TraceMeanField_ELBO, Trace_ELBO),
    )


def _mixture(form, name="projected-mlp"):
    return Model(
        build=lambda **options: mixture_with(form, name, **{"weights": "learned"} | options),
        encoder=lambda latent_dim, event_shape=EVENT: mixture_encoder(form, event_shape, latent_dim),
        x=X,
        sites={"y": (), "z": (LATENT,), "x": EVENT},
        guide_sites=("z",) if form == "summed-out" else ("y", "z"),
        objectives=(TraceEnum_ELBO,),
    )


def _hierarchy(inference, dims=(LATENT, 2)):
    vae = _vae("projected-mlp")
    return vae._replace(
        build=lambda **options: hierarchy_with(inference, dims=dims, **options),
        sites={f"z{t}": (size,) for t, size in enumerate(dims, start=1)} | {"x": EVENT},
        guide_sites=tuple(f"z{t}" for t in range(1, len(dims) + 1)),
        objectives=(TraceMeanField_ELBO, Trace_ELBO) if inference == "top_down" else (Trace_ELBO,),
    )


def _sequential(name):
    return Model(
        build=lambda **options: sequential_with(name, **options),
        encoder=sequence_encoder,
        x=TOKENS,
        sites={"z": (LATENT,), "x": (LENGTH,)},
        guide_sites=("z",),
        objectives=(TraceMeanField_ELBO, Trace_ELBO),
    )


def _vae_in_nats():
    def build(**options):
        likelihood = options.pop("likelihood", None) or likelihoods.Normal(0.5, "learned")
        vae = vae_with("projected-mlp", likelihood=likelihood, **options)
        vae.decoder.inverse_lipschitz = Nats(0.5, likelihood)
        vae.initialize(X)
        return vae

    return _vae("projected-mlp")._replace(build=build)


class WithCovariates:
    """Gives the class that comes after it a context, offset and mask that follow from the data."""

    def _given(self, x, context=None, *, mask=None, offset=None, num_data=1):
        if x is not None and (not isinstance(x, torch.Tensor) or x.dim() < 2 or len(x) == 0 or x.is_complex()):
            return super()._given(x, context)  # which says what is wrong with the data
        count = len(x) if x is not None else num_data if type(num_data) is int and num_data > 0 else 1
        like = self._prior_loc
        first = like.new_zeros(count) if x is None else x.flatten(1)[:, 0].to(like).nan_to_num(0, 0, 0)
        context = first[:, None].expand(-1, COVARIATES)
        if isinstance(self, SequentialVAE):
            return super()._given(x, context, num_data=num_data)
        if x is not None:
            mask = ~(x >= 0.5)
            mask.flatten(1)[:, 0] = True
        return super()._given(x, context, mask=mask, offset=0.1 * first, num_data=num_data)

    def _given_to_decode(self, context, batch_shape):
        if context is None:
            context = self._prior_loc.new_zeros(*batch_shape, COVARIATES)
        return super()._given_to_decode(context, batch_shape)


class VAEWithCovariates(WithCovariates, VAE):
    pass


class MixtureWithCovariates(WithCovariates, MixtureVAE):
    pass


class SequentialWithCovariates(WithCovariates, SequentialVAE):
    pass


class HierarchicalWithCovariates(WithCovariates, HierarchicalVAE):
    pass


KINDS = {
    VAE: VAEWithCovariates,
    MixtureVAE: MixtureWithCovariates,
    HierarchicalVAE: HierarchicalWithCovariates,
    SequentialVAE: SequentialWithCovariates,
}


def of_covariates(model, kind, **parts):
    """A row of the contract whose models have covariates, offsets and missing entries."""

    def build(**options):
        own = {name: part() for name, part in parts.items()}
        return model.build(kind=KINDS[kind], **own | options)

    return model._replace(build=build, encoder=lambda latent_dim: parts["encoder"](latent_dim=latent_dim))


def covariate_encoder(**options):
    options = {"latent_dim": LATENT, "event_shape": EVENT, "hidden_features": (8,)} | options
    return MLPEncoder(context_dim=COVARIATES, takes_mask=True, **options)


def covariate_decoder():
    sizes = {"latent_dim": LATENT, "event_shape": EVENT, "context_dim": COVARIATES}
    return ProjectedDecoder(MLPDecoder(**sizes, hidden_features=(16,)), **sizes, map_features=(8,))


def covariate_sequence_decoder():
    sizes = {"latent_dim": LATENT, "event_shape": sequence_decoders.VOCAB, "context_dim": 8 + COVARIATES}
    return SequenceDecoder("gru", MLPDecoder(**sizes, hidden_features=(12,)), context_dim=COVARIATES)


COVARIATES = 2
OF_COVARIATES = {
    "vae-covariates": of_covariates(_vae("plain"), VAE, decoder=covariate_decoder, encoder=covariate_encoder),
    **{
        f"mixture-{form}-covariates": of_covariates(
            _mixture(form, "plain"),
            MixtureVAE,
            decoder=covariate_decoder,
            encoder=partial(covariate_encoder, num_components=NUM_COMPONENTS if form == "components" else None),
        )
        for form in FORMS
    },
    **{
        f"hierarchical-{inference}-covariates": of_covariates(
            _hierarchy(inference), HierarchicalVAE, decoder=covariate_decoder, encoder=covariate_encoder
        )
        for inference in ("bottom_up", "top_down")
    },
    "sequential-covariates": of_covariates(
        _sequential("plain-gru"),
        SequentialVAE,
        decoder=covariate_sequence_decoder,
        encoder=partial(sequence_encoder, context_dim=COVARIATES),
    ),
}

# With every decoder, for laws that a decoder could break.
MODELS = {
    **{f"vae-{name}": _vae(name) for name in DECODERS},
    "vae-in-nats": _vae_in_nats(),
    **{f"mixture-factor-{name}": _mixture("factor", name) for name in DECODERS if "started" not in name},
    **{f"mixture-{form}": _mixture(form) for form in FORMS[1:]},
    "hierarchical-bottom-up": _hierarchy("bottom_up"),
    "hierarchical-top-down": _hierarchy("top_down"),
    "hierarchical-three": _hierarchy("top_down", (LATENT, 2, 1)),
    **{f"sequential-{name}": _sequential(name) for name in sequence_decoders.DECODERS},
    **OF_COVARIATES,
}
ONE_OF_EACH = {
    "vae": MODELS["vae-projected-mlp"],
    "mixture-factor": MODELS["mixture-factor-projected-mlp"],
    "mixture-components": MODELS["mixture-components"],
    "mixture-summed-out": MODELS["mixture-summed-out"],
    "hierarchical-bottom-up": MODELS["hierarchical-bottom-up"],
    "hierarchical-top-down": MODELS["hierarchical-top-down"],
    "sequential": MODELS["sequential-plain-gru"],
}
EVERY_KIND = ONE_OF_EACH | OF_COVARIATES
