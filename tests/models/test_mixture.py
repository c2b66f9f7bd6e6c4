"""The mixture VAE against sums, quadrature and closed forms: bounds, gradients and exact posteriors."""

import pytest
import torch
from helpers.conjugate_mixtures import conjugate
from helpers.decoders import DECODERS, EVENT, LATENT, perturb
from helpers.mixtures_by_hand import bound_at, bound_by_hand, drawn, posterior_by_hand
from helpers.models import ENUMERATED, FORMS, enumerated_in, mixture_encoder, mixture_with
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from torch.distributions import Normal

from pyro_ilvae import VAE, AnnealedELBO, MixtureVAE, MLPDecoder, likelihoods

X = torch.randn(5, *EVENT, generator=torch.Generator(torch.get_default_device()).manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("betas", [(1.0, 1.0), (0.3, 2.0), (0.0, 1.5), (2.0, 0.0)])
@pytest.mark.parametrize("data_size", [None, 5, 15])
def test_bound_is_the_sum_over_components(form, betas, data_size):
    mixture = perturb(mixture_with(form, data_size=data_size, weights="learned"), 0.3).double()
    scale = (data_size or len(X)) / len(X)
    annealed = AnnealedELBO(TraceEnum_ELBO(max_plate_nesting=1), beta=dict(zip("yz", betas, strict=True)))
    z = drawn(mixture, X, 1)
    if form == "summed-out" and betas[0] != betas[1]:
        with pytest.raises(ValueError, match="to have the scale of the sites that depend on them"):
            bound_at(annealed, mixture, X, 1)
        annealed = AnnealedELBO(TraceEnum_ELBO(max_plate_nesting=1), beta=betas[1])
    expected = scale * bound_by_hand(mixture, X, z, *betas).sum()
    torch.testing.assert_close(bound_at(annealed, mixture, X, 1), expected)
    expected = scale * bound_by_hand(mixture, X, z).sum()
    torch.testing.assert_close(bound_at(annealed, mixture, X, 1, "loss"), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_components", [1, 2, 50])
def test_any_number_of_components(form, num_components):
    mixture = perturb(mixture_with(form, num_components=num_components), 0.3).double()
    z = drawn(mixture, X, 2)
    bound = bound_at(TraceEnum_ELBO(max_plate_nesting=1), mixture, X, 2)
    torch.testing.assert_close(bound, bound_by_hand(mixture, X, z).sum())


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("form", FORMS)
def test_one_call_of_the_decoder_is_a_loop_over_components(name, form):
    mixture = mixture_with(form, name).double()
    shapes = []
    mixture.decoder.register_forward_hook(lambda module, args, output: shapes.append(args[0].shape[:-1]))
    bound = bound_at(TraceEnum_ELBO(max_plate_nesting=1), mixture, X, 3)
    assert shapes == [(5,) if form == "summed-out" else (3, 5)]
    torch.testing.assert_close(bound, bound_by_hand(mixture, X, drawn(mixture, X, 3)).sum())


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_bound_is_the_sum_over_conditioned_traces(form):
    """Model and guide as Pyro runs them for one value of y at a time."""
    mixture = perturb(mixture_with(form, weights="learned"), 0.3).double()
    z = drawn(mixture, X, 4)
    densities = {"p": [], "q": []}
    for c in range(3):
        values = {"y": torch.full((5,), c), "z": z[c]}
        for key, function in (("p", mixture.model), ("q", mixture.guide)):
            trace = poutine.trace(poutine.condition(function, data=values)).get_trace(X)
            trace.compute_log_prob()
            nodes = {name: trace.nodes[name]["log_prob"] for name in ("y", "z", "x") if name in trace.nodes}
            assert all(value.shape == (5,) for value in nodes.values())
            densities[key].append(nodes)
    joint, guide = (torch.stack([sum(nodes.values()) for nodes in densities[key]]) for key in "pq")
    if form == "summed-out":
        expected = joint.logsumexp(0) - guide[0]
    else:
        weights = torch.stack([nodes["y"] for nodes in densities["q"]]).exp()
        expected = (weights * (joint - guide)).sum(0)
    bound = bound_at(TraceEnum_ELBO(max_plate_nesting=1), mixture, X, 4, "loss")
    torch.testing.assert_close(bound, expected.sum())


@pytest.mark.parametrize("form", ["components", "summed-out"])
@pytest.mark.parametrize("data_size", [None, 15])
def test_one_standard_normal_component_is_a_vae(form, data_size):
    mixture = mixture_with(form, num_components=1, scales="fixed", data_size=data_size).double()
    torch.nn.init.zeros_(mixture.component_loc)

    class Encoder(torch.nn.Module):
        def forward(self, x):
            *_, loc, scale = mixture.encoder(x)
            return loc.reshape(-1, LATENT), scale.reshape(-1, LATENT)

    vae = VAE(mixture.decoder, Encoder(), mixture.likelihood, data_size=data_size).double()
    expected = bound_at(Trace_ELBO(), vae, X, 5)
    torch.testing.assert_close(bound_at(TraceEnum_ELBO(max_plate_nesting=1), mixture, X, 5), expected)


def tiny(form):
    """One latent dimension, for quadrature."""
    mixture = MixtureVAE(
        MLPDecoder(latent_dim=1, event_shape=1, hidden_features=(4,)),
        mixture_encoder(form, event_shape=1, latent_dim=1, num_components=2),
        likelihoods.Normal(0.7, "learned"),
        num_components=2,
        enumerate_in=enumerated_in(form),
    )
    return perturb(mixture, 0.3).double()


def gradients(mixture):
    return torch.cat([parameter.grad.flatten() for parameter in mixture.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "elbo"),
    [*((form, TraceEnum_ELBO) for form in FORMS), *((form, Trace_ELBO) for form in ENUMERATED)],
)
def test_loss_and_gradient_are_unbiased(form, elbo):
    mixture, x = tiny(form), torch.tensor([[0.8], [-0.5]], dtype=torch.float64)
    noise, step = torch.linspace(-8, 8, 161, dtype=torch.float64), 0.1
    _, loc, scale = posterior_by_hand(mixture, x)
    u = noise[:, None, None, None].expand(-1, *loc.shape)
    z = (loc + scale * u).flatten(0, 1).movedim(1, 0)
    weights = (step * Normal(0.0, 1.0).log_prob(noise).exp()).repeat_interleave(2)
    expected = -(weights * bound_by_hand(mixture, x.repeat(161, 1), z)).sum()
    expected.backward()
    exact = torch.cat([gradients(mixture), expected.detach()[None]])
    options = {"num_particles": 50, "vectorize_particles": True, "max_plate_nesting": 1}
    objective, guide = elbo(**options), mixture.guide
    if elbo is Trace_ELBO:  # which warns of sites that it does not enumerate
        guide = poutine.infer_config(guide, lambda site: {"enumerate": None})
    estimates = []
    for _ in range(50):
        mixture.zero_grad()
        loss = objective.loss_and_grads(mixture.model, guide, x)
        estimates.append(torch.cat([gradients(mixture), torch.tensor([loss], dtype=torch.float64)]))
    estimates = torch.stack(estimates)
    errors = estimates.std(0) / 50**0.5
    assert ((estimates.mean(0) - exact).abs() <= 5 * errors + 1e-8).all()


@torch.no_grad()
def joint_of(mixture, x, noise):
    """log p(x, y) of shape (N, C)."""
    m, s = mixture.component_loc.double(), mixture.component_log_scale.double().exp()
    density = Normal(m, (s**2 + noise**2).sqrt()).log_prob(x.double()[:, None]).sum(-1)
    return mixture.component_logits.double().log_softmax(-1) + density


@pytest.mark.parametrize("prior_scale", [1e-3, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("noise", [1e-3, 0.5, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_guide_of_a_conjugate_model_is_the_posterior(prior_scale, noise, dtype):
    mixture = conjugate(noise, prior_scale, dtype=dtype)
    x = mixture.sample_prior(7)
    tolerance = {"rtol": 1e-3, "atol": 2e-2} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-7}
    joint = joint_of(mixture, x, noise)
    for _ in range(5):  # the same for every draw
        bound = -TraceEnum_ELBO().loss(mixture.model, mixture.guide, x)
        torch.testing.assert_close(bound, float(joint.logsumexp(-1).sum()), **tolerance)
    probs = mixture.predict_component(x)
    torch.testing.assert_close(probs.double(), joint.softmax(-1), **tolerance)
    m, s = mixture.component_loc.double(), mixture.component_log_scale.double().exp()
    variance = 1 / (s**-2 + noise**-2)
    means = variance * (m / s**2 + x.double()[:, None] / noise**2)
    mean, scale = mixture.encode(x)
    expected = (joint.softmax(-1)[..., None] * means).sum(1)
    spread = variance + (means - expected[:, None]).square()
    rounding = 4 * torch.finfo(dtype).eps * float(x.abs().max() + m.abs().max())
    torch.testing.assert_close(mean.double(), expected, rtol=1e-5, atol=rounding)
    expected_scale = (joint.softmax(-1)[..., None] * spread).sum(1).sqrt()
    torch.testing.assert_close(scale.double(), expected_scale, rtol=1e-4, atol=rounding)
    best = means[range(7), joint.argmax(-1)]
    torch.testing.assert_close(mixture.reconstruct(x).double(), best, rtol=1e-5, atol=rounding)


@pytest.mark.parametrize("form", FORMS)
def test_bound_is_below_the_log_likelihood(form):
    encoder = mixture_encoder(form, event_shape=2, latent_dim=2)
    mixture = conjugate(encoder=encoder, enumerate_in=enumerated_in(form))
    perturb(encoder, 0.3)
    x = mixture.sample_prior(5)
    elbo = TraceEnum_ELBO(num_particles=100, vectorize_particles=True)
    draws = -torch.tensor([elbo.loss(mixture.model, mixture.guide, x) for _ in range(20)])
    assert draws.mean() < joint_of(mixture, x, 0.5).logsumexp(-1).sum() + 5 * draws.std() / 20**0.5
