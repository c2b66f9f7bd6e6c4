"""Covariates: the same as by hand, the guarantee in each context, counterfactuals, and what is refused."""

import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.context_decoders import CONTEXT_DECODERS, INVERSE_LIPSCHITZ_CONTEXT_DECODERS
from helpers.decoders import EVENT, LATENT, perturb
from helpers.models import FORMS, NUM_COMPONENTS, enumerated_in
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.poutine.messenger import unwrap
from torch.utils.data import DataLoader, TensorDataset

from pyro_ilvae import (
    VAE,
    AnnealedELBO,
    ConvEncoder,
    GraphSVI,
    JointOptim,
    MixtureVAE,
    MLPDecoder,
    MLPEncoder,
    ProjectedDecoder,
    from_pyro_svi,
    likelihoods,
)
from pyro_ilvae.diagnostics import (
    collapse_summary,
    evidence,
    fisher_bound,
    guaranteed_information,
    kl_per_dimension,
    lipschitz_audit,
    posterior_fisher_divergence,
)

N, C = 10, 6
SIZES = {"latent_dim": LATENT, "event_shape": EVENT}
X = torch.randn(N, *EVENT, generator=torch.Generator().manual_seed(0))
CONTEXT = torch.randn(N, C, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(N) % C


def encoder(**options):
    return MLPEncoder(**SIZES, hidden_features=(8,), **{"context_dim": C} | options)


def plain(**options):
    return MLPDecoder(**SIZES, hidden_features=(8,), **{"context_dim": C} | options)


def projected(**options):
    return ProjectedDecoder(plain(), **SIZES, context_dim=C, map_features=(8,), **options)


def vae(decoder=None, own_encoder=None, **options):
    likelihood = options.pop("likelihood", None) or likelihoods.Normal(0.5, "learned")
    return VAE(decoder or projected(), own_encoder or encoder(), likelihood, **options)


def mixture(form, **options):
    own = NUM_COMPONENTS if form == "components" else None
    parts = projected(), encoder(num_components=own), likelihoods.Normal(0.5)
    return MixtureVAE(*parts, NUM_COMPONENTS, enumerate_in=enumerated_in(form), **options)


def loss_and_gradients(model, guide, parameters, *args, beta=1.0, **kwargs):
    pyro.set_rng_seed(0)
    loss = AnnealedELBO(Trace_ELBO(), beta=beta).differentiable_loss(model, guide, *args, **kwargs)
    return loss, torch.autograd.grad(loss, parameters)


# The same as by hand.


@pytest.mark.parametrize("encoder_reads", [True, False])
@pytest.mark.parametrize("name", CONTEXT_DECODERS)
def test_elbo_and_gradients_are_those_of_the_model_by_hand(name, encoder_reads):
    own = perturb(CONTEXT_DECODERS[name]())
    own_encoder = encoder(context_dim=C if encoder_reads else None)
    model = vae(own, own_encoder, likelihood=likelihoods.Normal(0.7)).double()

    def by_hand(x, context):
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(own(z, context), float(model.likelihood.scale)).to_event(2), obs=x)

    def guide(x, context):
        loc, scale = model.encoder(x, context) if encoder_reads else model.encoder(x)
        with pyro.plate("data", N):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    parameters = [*model.decoder.parameters(), *model.encoder.parameters()]
    for beta in (1.0, 0.3):
        results = [
            loss_and_gradients(*programs, parameters, X.double(), context=CONTEXT.double(), beta=beta)
            for programs in ((model.model, model.guide), (by_hand, guide))
        ]
        for one, other in zip(results[0][1], results[1][1], strict=True):
            torch.testing.assert_close(one, other)
        torch.testing.assert_close(results[0][0], results[1][0])


def test_labels_are_their_indicators():
    model = vae()
    indicators = torch.nn.functional.one_hot(LABELS, C)
    found = [model.encode(X, context)[0] for context in (LABELS, LABELS.int(), indicators, indicators.float())]
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert torch.equal(model.encode(X, LABELS.numpy())[0], found[0])


@pytest.mark.parametrize("kind", ["vae", *FORMS])
@pytest.mark.parametrize("size", [0.0, 1.0, 10.0])
def test_a_constant_context_is_the_model_without_one(kind, size):
    """What a constant context adds are biases: of the decoder, and of the first layers of backbone and encoder."""
    model = perturb(vae() if kind == "vae" else mixture(kind)).double()
    pyro.clear_param_store()
    own = {"context_dim": None}
    without = ProjectedDecoder(plain(**own), **SIZES, map_features=(8,))
    parts = without, encoder(**own, num_components=NUM_COMPONENTS if kind == "components" else None)
    if kind == "vae":
        other = VAE(*parts, likelihoods.Normal(0.5, "learned")).double()
    else:
        other = MixtureVAE(*parts, likelihoods.Normal(0.5), NUM_COMPONENTS, enumerate_in=enumerated_in(kind)).double()
    context = size * torch.randn(C, dtype=torch.float64)
    state = {name: value for name, value in model.state_dict().items() if "from_context" not in name}
    decoder, weight = model.decoder, model.encoder.network[0].weight.detach()
    with torch.no_grad():
        state["decoder.bias"] = state["decoder.bias"] + decoder.frame.embed(decoder.from_context(context))
        state["decoder.backbone.network.0.bias"] = state[
            "decoder.backbone.network.0.bias"
        ] + decoder.backbone.from_context(context)
    state["encoder.network.0.weight"] = weight[:, :-C]
    state["encoder.network.0.bias"] = state["encoder.network.0.bias"] + weight[:, -C:] @ context
    other.load_state_dict(state)
    x, contexts = X.double(), context.expand(N, -1)
    for one, two in zip(model.encode(x, contexts), other.encode(x), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.reconstruct(x, contexts), other.reconstruct(x), rtol=1e-10, atol=1e-10)


def test_an_embedding_is_trained_with_the_other_parts():
    model = vae(context_network=torch.nn.Embedding(4, C), data_size=N)
    svi = SVI(model.model, model.guide, pyro.optim.Adam({"lr": 1e-2}), TraceMeanField_ELBO())
    before = model.context_network.weight.clone()
    labels = torch.arange(N) % 3
    svi.step(X, labels)
    moved = (model.context_network.weight != before).any(1)
    assert moved.tolist() == [True, True, True, False]
    by_hand = model.encoder(X, model.context_network(labels))[0]
    assert torch.equal(model.encode(X, labels)[0], by_hand)
    assert model.sample_prior(3, 2).shape == (3, *EVENT)


def test_handlers_of_pyro_pass_the_context_on_as_a_keyword():
    model = vae(data_size=N)
    for elbo in (Trace_ELBO(), TraceMeanField_ELBO(num_particles=2, vectorize_particles=True)):
        svi = SVI(model.model, model.guide, pyro.optim.Adam({"lr": 1e-2}), elbo)
        assert svi.step(X, context=LABELS) > 0 < svi.evaluate_loss(X, context=LABELS)
    posterior = Predictive(model.model, guide=model.guide, num_samples=3, parallel=True)
    assert posterior(X, context=LABELS)["x"].shape == (3, N, *EVENT)
    wrapped = pickle.loads(pickle.dumps(poutine.block(dict, hide=["a"])))
    assert wrapped(context=1, fn=2) == {"context": 1, "fn": 2}
    assert unwrap(poutine.block(dict)) is dict


# The guarantee.


@pytest.mark.parametrize("name", INVERSE_LIPSCHITZ_CONTEXT_DECODERS)
@settings(max_examples=10)
@given(seed=st.integers(0, 2**31), size=st.sampled_from([0.1, 1.0, 30.0]))
def test_inverse_lipschitz_in_each_context_of_a_model(name, seed, size):
    torch.manual_seed(seed)
    model = vae(perturb(CONTEXT_DECODERS[name](0.7)), encoder()).double()
    contexts, z = size * torch.randn(5, C).double(), torch.randn(2, 7, LATENT).double()
    for context in contexts:
        traces = [
            poutine.trace(poutine.condition(model.model, {"z": part})).get_trace(context=context.expand(7, C))
            for part in z
        ]
        means = [trace.nodes["x"]["fn"].base_dist.loc.flatten(1) for trace in traces]
        assert ((means[0] - means[1]).norm(dim=1) >= 0.7 * (z[0] - z[1]).norm(dim=1) * (1 - 1e-9)).all()


def test_guaranteed_information_is_the_same_in_each_context():
    model = perturb(vae(projected(inverse_lipschitz=0.8), likelihood=likelihoods.Normal(0.5)))
    whole = guaranteed_information(model, seed=0)
    assert whole.floor == pytest.approx(LATENT / 2 * torch.tensor(1 + 0.64 / 0.25).log().item(), rel=1e-5)
    for context in 5 * torch.randn(3, C):
        at_one = guaranteed_information(model.decoder.given(context), model.likelihood, seed=0)
        assert at_one.by_jacobian == pytest.approx(whole.by_jacobian, rel=1e-5)
    summary = collapse_summary(model.model, model.guide, (X, CONTEXT), model_kwargs={"offset": X[:, 0, 0]}, seed=0)
    assert summary["guaranteed_floor"].item() == pytest.approx(whole.floor, rel=1e-5)
    composition = CONTEXT_DECODERS["composition-random"]()
    assert "given" in guaranteed_information(composition, likelihoods.Normal(0.5)).reason


def test_a_shift_that_depends_on_z_is_no_offset():
    """A second path from z to the data makes the certificate void, and is not taken for a known shift."""

    class Skip(VAE):
        def _natural_parameters(self, z, given):
            return super()._natural_parameters(z, given) - self.decoder(z)

    decoder = ProjectedDecoder(plain(context_dim=None), **SIZES, map_features=(8,))
    model = Skip(decoder, encoder(context_dim=None), likelihoods.Normal(0.5))
    summary = collapse_summary(model.model, model.guide, X, seed=0)
    assert summary["guaranteed_floor"].isnull().all()


def test_bound_of_the_fisher_divergence_in_each_datums_own_context():
    decoder = MLPDecoder(latent_dim=LATENT, event_shape=LATENT, hidden_features=(8,), context_dim=C)
    decoder = ProjectedDecoder(decoder, latent_dim=LATENT, event_shape=LATENT, context_dim=C, map_features=(8,))
    own = MLPEncoder(event_shape=LATENT, latent_dim=LATENT, hidden_features=(8,), context_dim=C)
    model = perturb(VAE(decoder, own, likelihoods.Normal(1.0)))
    x = torch.randn(N, LATENT)
    bound = fisher_bound(model.model, model.guide, (x, CONTEXT), num_samples=500, seed=0)
    assert (bound.ratio >= 1 - 1e-4).all()
    alone = fisher_bound(model.model, model.guide, (x[3:4], CONTEXT[3:4]), num_samples=4000, seed=0)
    error = 5 * (bound.divergence.standard_errors[3] + alone.divergence.standard_errors[0])
    assert abs(bound.divergence.values[3] - alone.divergence.values[0]) < error
    assert lipschitz_audit(decoder.given(CONTEXT[0]), num_samples=20, steps=2, seed=0).smallest >= 1 - 1e-4


# Methods.


@pytest.mark.parametrize("kind", ["vae", *FORMS])
def test_counterfactuals_decode_the_same_z_in_another_context(kind):
    model = perturb(vae() if kind == "vae" else mixture(kind))
    same = model.reconstruct(X, LABELS)
    torch.testing.assert_close(model.reconstruct(X, LABELS, LABELS), same)
    other = model.reconstruct(X, LABELS, (LABELS + 1) % C, batch_size=3)
    assert not torch.allclose(other, same)
    for target in (2, torch.tensor(2), torch.full((N,), 2), torch.eye(C)[2], torch.eye(C)[2].expand(N, C)):
        torch.testing.assert_close(model.reconstruct(X, LABELS, target), model.reconstruct(X, LABELS, [2] * N))
    if kind == "vae":
        z = model.encode(X, LABELS)[0]
        torch.testing.assert_close(other, model.decoder(z, torch.eye(C)[(LABELS + 1) % C]))


@pytest.mark.parametrize("kind", ["vae", *FORMS])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_batches_give_what_all_data_give(kind, batch_size):
    model = vae() if kind == "vae" else mixture(kind)
    loaders = {
        "tuples": DataLoader(TensorDataset(X, CONTEXT), batch_size=4),
        "mappings": [{"x": X[i : i + 4], "context": CONTEXT[i : i + 4]} for i in range(0, N, 4)],
    }
    for name in ("encode", "reconstruct"):
        expected = torch.stack([*getattr(model, name)(X, CONTEXT)])
        for loader in loaders.values():
            found = getattr(model, name)(loader, batch_size=batch_size)
            torch.testing.assert_close(torch.stack([*found]), expected)


def test_a_label_is_no_target_where_the_context_holds_numbers_too():
    """It would set all other columns to 0."""
    model, target = vae(), CONTEXT.clone()
    for label in (2, LABELS, [2] * N):
        refused(lambda label=label: model.reconstruct(X, CONTEXT, label), "target_context to hold numbers")
    target[:, 0] = 1.0
    assert model.reconstruct(X, CONTEXT, target).shape == model.reconstruct(X, CONTEXT, torch.eye(C)[0]).shape


def test_prior_predictive_in_given_contexts():
    model = vae()
    assert Predictive(model.model, num_samples=4, parallel=True)(None, CONTEXT)["x"].shape == (4, N, *EVENT)
    assert model.sample_prior(N, CONTEXT).shape == model.sample_prior(N, 1, batch_size=3).shape == (N, *EVENT)
    one, many = model.sample_prior(6, 2, mean=True, seed=0), model.sample_prior(6, [2] * 6, mean=True, seed=0)
    torch.testing.assert_close(one, many)
    assert not torch.allclose(one, model.sample_prior(6, 3, mean=True, seed=0))


def test_a_context_of_the_encoder_alone():
    decoder = ProjectedDecoder(plain(context_dim=None), **SIZES, map_features=(8,))
    model = VAE(decoder, encoder(), likelihoods.Normal(0.5))
    model.initialize(X, CONTEXT)
    assert model.reconstruct(X, CONTEXT).shape == model.sample_prior(N).shape == X.shape
    assert model.model(num_data=3).shape == (3, *EVENT)
    refused(lambda: model.reconstruct(X, CONTEXT, CONTEXT), "target_context=None")


def test_embedded_labels_of_other_data_are_refused():
    model = vae(context_network=torch.nn.Embedding(4, C))
    for call in (
        lambda: model.sample_prior(10, torch.tensor([2])),
        lambda: model.reconstruct(X, LABELS % 4, torch.tensor([1])),
        lambda: model.encode(X, (LABELS % 4)[:, None]),
        lambda: model.encode(X, LABELS),  # from 0 to 5, of an embedding of four
        lambda: model.encode(X, (LABELS % 4).float()),
    ):
        refused(call, "context")
    assert model.sample_prior(10, torch.tensor(2)).shape == model.sample_prior(10, [2] * 10).shape == (10, *EVENT)
    for dtype in (torch.int8, torch.uint8, torch.int32):
        assert torch.equal(model.encode(X, (LABELS % 4).to(dtype))[0], model.encode(X, LABELS % 4)[0])


def test_a_vector_is_the_same_for_any_number_of_data():
    """Numbers of shape (C,) are one context, ints of shape (N,) are labels, and a network takes rows."""

    class Powers(torch.nn.Module):
        def forward(self, age):
            return torch.stack([age**i for i in range(C)], -1)

    model, one = vae(), torch.eye(C)[1]
    for n in (2, C, 9):
        expected = model.sample_prior(n, 1, mean=True, seed=0)
        torch.testing.assert_close(model.sample_prior(n, one, mean=True, seed=0), expected)
        if n != C:
            refused(lambda n=n: model.sample_prior(n, one.long()), "context of shape")
    pyro.clear_param_store()
    of_ages, ages = vae(context_network=Powers()), torch.randn(N)
    expected = of_ages.reconstruct(X, ages)
    torch.testing.assert_close(of_ages.reconstruct(X, ages, ages), expected)
    assert of_ages.sample_prior(N, ages).shape == X.shape
    refused(lambda: of_ages.sample_prior(3, ages), "context of shape")


@pytest.mark.parametrize("network", [None, torch.nn.Embedding(C, C)], ids=["none", "embedding"])
def test_graph_steps_are_those_of_svi_and_see_other_contexts(network):
    def run(kind, **options):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model = vae(context_network=network, data_size=30)
        optimizer = JointOptim(torch.optim.Adam, {"lr": 1e-2})
        svi = kind(model.model, model.guide, optimizer, TraceMeanField_ELBO(), **options)
        losses = [float(svi.step(X, LABELS.roll(i), offset=0.1 * X[:, :1, :1].roll(i, 0))) for i in range(8)]
        return torch.tensor(losses), getattr(svi, "runs", None)

    expected, _ = run(SVI)
    if network is not None:
        network.reset_parameters()
    torch.manual_seed(0)
    found, runs = run(GraphSVI, compile=False)
    assert runs == "graph"
    if network is None:
        torch.testing.assert_close(found, expected)


def test_diagnostics_and_export_take_the_context_with_the_data():
    model = perturb(vae())
    args = X, LABELS
    kl = kl_per_dimension(model.model, model.guide, args).values
    loc, scale = model.encode(*args)
    torch.testing.assert_close(kl, 0.5 * (loc**2 + scale**2) - scale.log() - 0.5)
    halves = [kl_per_dimension(model.model, model.guide, (X[i : i + 5], LABELS[i : i + 5])).values for i in (0, 5)]
    torch.testing.assert_close(torch.cat(halves), kl)
    for measure in (evidence, posterior_fisher_divergence):
        measure(model.model, model.guide, args, num_samples=20, batch_size=4, seed=0)
    fit = from_pyro_svi((model.model, model.guide), args, model_kwargs={"offset": X[:, 0, 0]}, num_samples=5)
    assert fit["constant_data"]["context"].dims == ("data",)
    assert fit["constant_data"]["offset"].values.tolist() == X[:, 0, 0].tolist()
    named = from_pyro_svi((model.model, model.guide), args, num_samples=5, constant_data={"context": [1.0]})
    assert named["constant_data"]["context"].values.tolist() == [1.0]


# Encoders.


@pytest.mark.parametrize("kind", [MLPEncoder, ConvEncoder])
def test_encoders_read_context_and_mask_with_left_dimensions(kind):
    own = kind(event_shape=(4, 2), latent_dim=2, hidden_features=(8,), context_dim=3, takes_mask=True)
    x, context, mask = torch.randn(5, 4, 2), torch.randn(6, 1, 3), torch.rand(5, 4, 2) > 0.3
    together = own(x, context, mask=mask)[0]
    assert together.shape == (6, 5, 2)
    alone = torch.stack([own(x, one.expand(5, 3), mask=mask)[0] for one in context])
    torch.testing.assert_close(together, alone)
    spoilt = torch.where(mask, x, torch.nan)
    torch.testing.assert_close(own(spoilt, context, mask=mask)[0], together)
    torch.testing.assert_close(own(x, context)[0], own(x, context, mask=torch.ones_like(mask))[0])


# What is refused.


def refused(call, message):
    with pytest.raises((ValueError, TypeError), match=f"Expected.*{message}"):
        call()


NAN = CONTEXT.clone().fill_(torch.nan)
WRONG = {
    "none": None,
    "other length": CONTEXT[:3],
    "other width": CONTEXT[:, :2],
    "one dimension": CONTEXT[:, 0],
    "three dimensions": CONTEXT[..., None],
    "nan": NAN,
    "complex": CONTEXT * 1j,
    "sparse": CONTEXT.to_sparse(),
    "strings": ["a"] * N,
    "label above": LABELS + 1,
    "label below": LABELS - 1,
    "number": 0.5,
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("kind", ["vae", "summed-out"])
def test_wrong_contexts_name_the_argument(kind, wrong):
    model = vae() if kind == "vae" else mixture(kind)
    for name in ("model", "guide", "encode", "reconstruct", "create_plates", "initialize"):
        if name != "model" or kind == "vae":
            refused(lambda name=name: getattr(model, name)(X, wrong), "context")
    if wrong is not None:
        refused(lambda: model.reconstruct(X, CONTEXT, torch.full((3, 2), 0.5)), "target_context")


def test_contexts_where_there_is_none_and_parts_that_disagree():
    without = vae(plain(context_dim=None), encoder(context_dim=None))
    for call in (without.encode, without.model, without.guide, without.reconstruct):
        refused(lambda call=call: call(X, CONTEXT), "context=None")
    refused(lambda: without.sample_prior(2, CONTEXT[0]), "context=None")
    refused(lambda: vae(plain(), encoder(context_dim=C + 1)), "one context_dim")
    refused(
        lambda: vae(plain(context_dim=None), encoder(context_dim=None), context_network=torch.nn.Embedding(3, C)),
        "context_network=None",
    )
    refused(lambda: vae(context_network=lambda x: x), "context_network")
    refused(lambda: vae(context_network=torch.nn.Embedding(3, 2)).encode(X, LABELS % 3), "context_network")
    refused(lambda: vae().encode([(X, CONTEXT)], CONTEXT), "context=None for an iterable")
    refused(lambda: vae().encode([X, X]), "context")
    refused(lambda: vae().encode([{"context": CONTEXT}]), "each batch to have x")
    refused(lambda: vae().model(None, CONTEXT, num_data=3), "context of shape")
    refused(vae().model, "context")
    refused(lambda: vae(plain(context_dim=1), encoder(context_dim=1)).encode(X, LABELS), "labels from 0 to 0")
