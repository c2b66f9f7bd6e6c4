"""The Lipschitz audit: never below a certificate, exact where the constant is known, and able to find the worst."""

import math

import pytest
import torch
from helpers.decoders import DECODERS, INVERSE_LIPSCHITZ_DECODERS, LATENT, ConvBackbone, jacobian, perturb

from pyro_ilvae import BrenierMap, MLPDecoder
from pyro_ilvae.diagnostics.lipschitz_audit import lipschitz_audit

NAMES = list(INVERSE_LIPSCHITZ_DECODERS)
QUICK = {"num_samples": 60, "num_worst": 5, "steps": 20}


@pytest.mark.slow
@pytest.mark.parametrize("perturbation", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_measured_is_below_the_certificate(name, perturbation):
    decoder = perturb(INVERSE_LIPSCHITZ_DECODERS[name]().double(), perturbation)
    audit = lipschitz_audit(decoder, num_samples=60, num_worst=10, steps=40)
    assert audit.certified == pytest.approx(0.7)
    assert audit.smallest >= 0.7 * (1 - 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_nothing_measured_is_below_the_certificate_in_single_precision(name):
    decoder = perturb(INVERSE_LIPSCHITZ_DECODERS[name]())
    audit = lipschitz_audit(decoder, num_samples=60, num_worst=10, steps=40)
    # Rounding of values, of which differences over distances of at least eps^(1/4) are taken.
    size = max(float(decoder(pair).detach().norm()) for pair in (audit.prior_pair, audit.worst_pair))
    assert audit.smallest >= 0.7 * (1 - 1e-5) - torch.finfo(torch.float32).eps ** 0.75 * size


def test_a_false_certificate_is_refuted():
    decoder = MLPDecoder(latent_dim=LATENT, event_shape=8, hidden_features=(16,)).double()
    decoder.inverse_lipschitz = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    audit = lipschitz_audit(decoder, **QUICK)
    assert audit.certified == 1.0
    assert audit.smallest < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", DECODERS)
def test_values_are_those_of_the_places_reported(name, dtype):
    decoder = perturb(DECODERS[name]().to(dtype))
    audit = lipschitz_audit(decoder, **QUICK)
    tolerance = 50 * torch.finfo(dtype).eps ** 0.75
    for pair, ratio in ((audit.prior_pair, audit.prior_ratio), (audit.worst_pair, audit.worst_ratio)):
        assert pair.shape == (2, LATENT)
        assert pair.dtype == dtype
        eta = decoder(pair).detach().flatten(1)
        assert float((eta[0] - eta[1]).norm() / (pair[0] - pair[1]).norm()) == pytest.approx(ratio, rel=tolerance)
    point = audit.singular_point
    values = torch.linalg.svdvals(jacobian(lambda z: decoder(z[None])[0].flatten(), point[None])[0])
    assert float(values[-1].detach()) == pytest.approx(audit.singular_value, rel=tolerance)
    assert not any(value.requires_grad for value in audit if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("latent_dim", [1, 3])
def test_prior_draws_against_all_pairs_and_jacobians_one_by_one(latent_dim):
    decoder = perturb(MLPDecoder(latent_dim=latent_dim, event_shape=6, hidden_features=(8,)).double())
    z = torch.randn(40, latent_dim, dtype=torch.float64)
    audit = lipschitz_audit(decoder, sampler=lambda n: z[:n], num_samples=40, num_worst=3, steps=0)
    i, j = torch.triu_indices(40, 40, offset=1)
    with torch.no_grad():
        ratios = (decoder(z[i]) - decoder(z[j])).norm(dim=-1) / (z[i] - z[j]).norm(dim=-1)
    assert audit.prior_ratio == pytest.approx(float(ratios.min()), rel=1e-9)
    values = torch.linalg.svdvals(jacobian(decoder, z).detach())
    assert audit.singular_value == pytest.approx(float(values.min()), rel=1e-9)


@pytest.mark.parametrize("latent_dim", [1, 4])
def test_scaled_isometries_have_one_constant(latent_dim):
    frame = torch.linalg.qr(torch.randn(9, latent_dim, dtype=torch.float64)).Q
    audit = lipschitz_audit(lambda z: 0.3 * z @ frame.mT, sampler=normal(latent_dim), **QUICK)
    assert audit.certified is None
    assert [audit.prior_ratio, audit.worst_ratio, audit.singular_value] == pytest.approx([0.3] * 3, rel=1e-9)


def normal(latent_dim, scale=1.0):
    return lambda n: scale * torch.randn(n, latent_dim, dtype=torch.float64)


@pytest.mark.parametrize("width", [5, 9])
def test_linear_maps_stretch_least_along_the_last_singular_vector(width):
    matrix = torch.randn(width, 5, dtype=torch.float64)
    _, values, directions = torch.linalg.svd(matrix)
    audit = lipschitz_audit(lambda z: z @ matrix.mT + 3, sampler=normal(5), **QUICK)
    assert audit.singular_value == pytest.approx(float(values[-1]), rel=1e-9)
    assert audit.worst_ratio == pytest.approx(float(values[-1]), rel=1e-6)
    assert audit.prior_ratio >= float(values[-1])
    gap = audit.worst_pair[0] - audit.worst_pair[1]
    assert abs(float(gap @ directions[-1] / gap.norm())) == pytest.approx(1, abs=1e-6)


def points(*values):
    return {"sampler": lambda n: torch.tensor(values, dtype=torch.float64)[:, None], "num_samples": len(values)}


def test_descent_finds_far_pairs_that_no_jacobian_shows():
    def helix(z):  # a turn of it takes 2 pi, along which it rises by a little
        return torch.cat([z.cos(), z.sin(), 0.05 * z], -1)

    audit = lipschitz_audit(helix, **points(-0.7, 0.0, 0.5))
    assert audit.singular_value == pytest.approx(math.sqrt(1 + 0.05**2))
    assert audit.prior_ratio > 0.9
    assert audit.worst_ratio == pytest.approx(0.05, rel=1e-3)
    assert float((audit.worst_pair[0] - audit.worst_pair[1]).norm()) == pytest.approx(2 * math.pi, abs=1e-2)


def test_descent_finds_the_critical_point_between_the_draws():
    audit = lipschitz_audit(lambda z: z**3 / 3 + 0.1 * z, **points(-1.1, -0.6, 0.5, 0.8))
    assert audit.prior_ratio > 0.15
    assert audit.singular_value > 0.3
    assert audit.worst_ratio == pytest.approx(0.1, rel=1e-3)
    # Nearer pairs would be better still, but for rounding.
    nearest = torch.finfo(torch.float64).eps ** 0.25 * float(torch.tensor([-1.1, -0.6, 0.5, 0.8]).std())
    assert float((audit.worst_pair[0] - audit.worst_pair[1]).norm()) >= nearest * (1 - 1e-6)


def test_descent_stops_where_rounding_would_begin():
    audit = lipschitz_audit(lambda z: z**3 / 3 + 0.1 * z, latent_dim=1, num_samples=20, steps=200)
    assert audit.worst_pair.dtype == torch.float32
    assert float((audit.worst_pair[0] - audit.worst_pair[1]).norm()) > 0.005
    assert audit.worst_ratio == pytest.approx(0.1, rel=1e-2)


def test_two_draws_are_one_pair():
    audit = lipschitz_audit(lambda z: z**3, **points(1.0, 2.0), steps=0, num_worst=3)
    assert audit.prior_ratio == pytest.approx(7)
    assert audit.prior_pair.flatten().tolist() == [1.0, 2.0]
    assert audit.singular_value == pytest.approx(3)


@pytest.mark.parametrize("steps", [0, 1, 30])
def test_descent_never_ends_above_where_it_starts(steps):
    audit = lipschitz_audit(perturb(DECODERS["plain"]().double()), num_samples=50, steps=steps)
    assert audit.worst_ratio <= audit.prior_ratio * (1 + 1e-9)


def test_an_ignored_dimension_is_found():
    decoder = MLPDecoder(latent_dim=3, event_shape=8, hidden_features=(16,))
    with torch.no_grad():
        decoder.network[0].weight[:, 1] = 0.0
    audit = lipschitz_audit(decoder, num_samples=100)
    assert audit.certified is None
    assert audit.singular_value < 1e-6
    assert audit.worst_ratio < 1e-4
    gap = audit.worst_pair[0] - audit.worst_pair[1]
    assert float(gap.abs().argmax()) == 1


@pytest.mark.parametrize(
    ("decoder", "latent_dim"),
    [(lambda z: torch.zeros(len(z), 4), 2), (lambda z: 0 * z, 2), (torch.nn.Linear(5, 3), 5)],
    ids=["constant", "zero", "more-latent-dimensions-than-outputs"],
)
def test_maps_that_lose_dimensions_have_constant_zero(decoder, latent_dim):
    audit = lipschitz_audit(decoder, latent_dim=latent_dim, **QUICK)
    assert audit.singular_value == 0
    assert audit.worst_ratio < 1e-4


class OwnBackward(torch.autograd.Function):
    """A function without a forward derivative."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def recurrent():
    network = torch.nn.GRU(2, 3, batch_first=True)
    return lambda z: network(z[:, None].expand(-1, 4, -1))[0]


@pytest.mark.parametrize(
    ("decoder", "latent_dim"),
    [
        (ConvBackbone(), LATENT),
        (lambda z: OwnBackward.apply(z), 3),
        (lambda z: 2 * z[:, 0], 1),
        (recurrent(), 2),
        (BrenierMap(2, 0.5, (8,)), 2),
        (torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.ReLU(inplace=True), torch.nn.Linear(8, 4)), 2),
    ],
    ids=["convolutions", "no-forward-derivative", "scalar-event", "recurrent", "map", "in-place"],
)
def test_any_function_of_rows(decoder, latent_dim):
    audit = lipschitz_audit(decoder, latent_dim=latent_dim, **QUICK)
    assert 0 <= audit.smallest < math.inf
    assert audit.worst_ratio <= audit.prior_ratio * (1 + 1e-3)


def test_functions_without_a_forward_derivative_have_the_same_jacobian():
    audit = lipschitz_audit(lambda z: OwnBackward.apply(z), sampler=normal(3), **QUICK)
    assert [audit.prior_ratio, audit.worst_ratio, audit.singular_value] == pytest.approx([2.0] * 3, rel=1e-9)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradients_are_neither_needed_nor_left(context, local_params):
    decoder = DECODERS["projected-mlp"]()
    expected = lipschitz_audit(decoder, **QUICK, seed=1)
    with context():
        audit = lipschitz_audit(decoder, **QUICK, seed=1)
    assert audit.smallest == expected.smallest
    assert all(parameter.grad is None for parameter in decoder.parameters())


def test_modules_are_audited_in_evaluation_mode_and_left_as_they_were():
    layers = torch.nn.Linear(2, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(), torch.nn.Linear(8, 4)
    decoder = torch.nn.Sequential(*layers).train()
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    lipschitz_audit(decoder, latent_dim=2, **QUICK)
    assert all(module.training for module in decoder.modules())
    assert all(torch.equal(value, before[name]) for name, value in decoder.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("samples_per_pass", [1, 7, 1000])
def test_batches_bound_the_memory_and_change_nothing(samples_per_pass):
    decoder, most = DECODERS["projected-conv"]().double(), []

    def decode(z):
        most.append(len(z))
        return decoder(z)

    options = {"latent_dim": LATENT, "sampler": normal(LATENT), **QUICK, "steps": 3, "seed": 2}
    expected = lipschitz_audit(decode, **options)
    most.clear()
    audit = lipschitz_audit(decode, **options, samples_per_pass=samples_per_pass)
    assert max(most) <= max(2, 2 * samples_per_pass)
    for value, other in zip(audit, expected, strict=True):
        if value is not None:
            torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-6)


def test_memory_is_bounded_by_default(monkeypatch):
    most = []

    def decode(z):
        most.append(z.numel() * 8)
        return z @ torch.ones(2, 8)

    monkeypatch.setattr("pyro_ilvae.diagnostics._engine.decoding._MOST_NUMBERS", 100)
    lipschitz_audit(decode, latent_dim=2, num_samples=50, steps=3)
    assert max(most) <= 200


def test_seed():
    decoder = DECODERS["plain"]()
    state = torch.get_rng_state()
    audit = lipschitz_audit(decoder, **QUICK, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert lipschitz_audit(decoder, **QUICK, seed=3).prior_ratio == audit.prior_ratio
    assert lipschitz_audit(decoder, **QUICK, seed=4).prior_ratio != audit.prior_ratio


def test_scale_is_that_of_the_draws():
    def decoder(z):  # flatter the further from 0
        return torch.asinh(z)

    near, far = (lipschitz_audit(decoder, latent_dim=1, scale=scale, **QUICK) for scale in (0.01, 100.0))
    assert near.singular_value > 0.99
    assert far.singular_value < 0.05
    assert far.singular_point.abs() > 10


LINEAR = torch.nn.Linear(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lipschitz_audit(LINEAR), "Expected latent_dim or a sampler"),
        (lambda: lipschitz_audit(LINEAR, latent_dim=0), "latent_dim to be an int >= 1"),
        (lambda: lipschitz_audit(LINEAR, latent_dim=2, num_samples=1), "num_samples to be an int >= 2, got 1"),
        (lambda: lipschitz_audit(LINEAR, latent_dim=2, num_worst=0), "num_worst"),
        (lambda: lipschitz_audit(LINEAR, latent_dim=2, steps=-1), "steps"),
        (lambda: lipschitz_audit(LINEAR, latent_dim=2, samples_per_pass=0), "samples_per_pass"),
        (lambda: lipschitz_audit(LINEAR, latent_dim=2, scale=0.0), "scale to be a finite number > 0, got 0"),
        (lambda: lipschitz_audit(LINEAR, latent_dim=2, scale=-1.0), "scale to be a finite number > 0"),
        (lambda: lipschitz_audit(LINEAR, sampler=lambda n: torch.zeros(n)), r"shape \(1000, K\), got \(1000,\)"),
        (lambda: lipschitz_audit(LINEAR, sampler=lambda n: torch.zeros(n, 2)), "draws that differ, got one point"),
        (lambda: lipschitz_audit(lambda z: z + torch.randn_like(z), latent_dim=2), "decoder to be one function"),
        (lambda: lipschitz_audit(lambda z: z.sum(), latent_dim=2), r"shape \(2, \*event_shape\), got \(\)"),
        (lambda: lipschitz_audit(lambda z: z.log(), latent_dim=2), "finite values, got NaN"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_pairs_that_only_rounding_compares_are_left_out():
    audit = lipschitz_audit(lambda z: 2 * z + 1, **points(0.0, 5e-17, 1.0))
    assert audit.prior_ratio == pytest.approx(2.0)
