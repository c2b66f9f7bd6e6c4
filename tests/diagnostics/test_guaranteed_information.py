"""Guaranteed information: below the information itself, equal to it where it has to be, or absent with the reason."""

import math

import pyro.distributions as dist
import pytest
import torch
from helpers.decoders import perturb
from helpers.informations import Frame, Whitened, information, information_of_coordinate, information_on_the_line
from pyro.nn import PyroSample

from pyro_ilvae import BrenierMap, InverseLipschitzDecoder, MLPDecoder, ProjectedDecoder, likelihoods, mlp
from pyro_ilvae.diagnostics import guaranteed_information


def projected(latent_dim, features, constant=0.7, **more):
    backbone = mlp(latent_dim, (16,), features)
    if more:
        backbone = MLPDecoder(latent_dim=latent_dim, event_shape=features, hidden_features=(16,), **more)
    return ProjectedDecoder(
        backbone, latent_dim=latent_dim, event_shape=features, inverse_lipschitz=constant, map_features=(16,), **more
    )


def composition(latent_dim, features, constant=0.7, **more):
    return InverseLipschitzDecoder(
        latent_dim=latent_dim, event_shape=features, inverse_lipschitz=constant, map_features=(16, 12), **more
    )


CONSTRUCTIONS = {"projected": projected, "composition": composition}
SIZES = [(1, 1), (1, 4), (2, 2), (2, 6)]


def standard(latent_dim, dtype=torch.float64):
    return dist.Normal(torch.zeros(latent_dim, dtype=dtype), torch.ones((), dtype=dtype)).to_event(1)


def mixture(weights, loc, scale):
    weights, loc, scale = (torch.tensor(value, dtype=torch.float64) for value in (weights, loc, scale))
    return dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(loc, scale).to_event(1))


SEPARATE = mixture([0.3, 0.7], [[-2.0, 0.0], [2.0, 1.0]], [[0.3, 0.5], [0.6, 0.4]])
OVERLAPPING = mixture([0.5, 0.5], [[0.0, 0.0], [0.1, 0.0]], [[1.2, 1.0], [0.15, 0.1]])
CORRELATED = dist.MultivariateNormal(
    torch.zeros(2, dtype=torch.float64), torch.tensor([[1.0, 0.6], [0.6, 0.8]], dtype=torch.float64)
)


def check(result, found):
    """The chain of inequalities, up to rounding and errors of draws."""
    assert result.reason is None
    assert 0 <= result.floor <= result.by_jacobian + 1e-6 + 4 * result.floor_se
    assert result.nats_per_dimension > 0 or result.floor == 0
    assert result.by_jacobian <= found.value + 4 * math.hypot(found.error, result.by_jacobian_se)


# Below the information


@pytest.mark.parametrize("perturbation", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("latent_dim", "features"), SIZES)
@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_is_below_the_information_for_random_weights(name, latent_dim, features, perturbation):
    decoder = perturb(CONSTRUCTIONS[name](latent_dim, features).double(), perturbation)
    result = guaranteed_information(decoder, likelihoods.Normal(0.8), num_samples=500)
    check(result, information(decoder, 0.8, standard(latent_dim)))
    assert result.floor == pytest.approx(latent_dim / 2 * math.log(1 + 0.7**2 / 0.8**2), rel=1e-6)
    assert (result.entropy_power, result.entropy_power_se) == (pytest.approx(1, abs=1e-6), 0)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("perturbation", [0.0, 1.0])
@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_is_close_below_the_information_on_the_line(name, perturbation, sigma):
    decoder = perturb(CONSTRUCTIONS[name](1, 1).double(), perturbation)
    exact = information_on_the_line(decoder, sigma)
    result = guaranteed_information(decoder, likelihoods.Normal(sigma), num_samples=4000)
    assert result.floor <= exact
    assert result.by_jacobian <= exact + 4 * result.by_jacobian_se
    assert result.by_jacobian >= 0.6 * exact  # a half of it would be below too


@pytest.mark.slow
@pytest.mark.parametrize("prior", [SEPARATE, OVERLAPPING, CORRELATED], ids=["separate", "overlapping", "correlated"])
@pytest.mark.parametrize("features", [2, 5])
@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_is_below_the_information_for_other_priors(name, features, prior):
    decoder = perturb(CONSTRUCTIONS[name](2, features).double(), 0.5)
    result = guaranteed_information(decoder, likelihoods.Normal(0.5), prior=prior)
    check(result, information(decoder, 0.5, prior, nodes=201))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_follows_a_learned_scale(name, dtype):
    decoder, likelihood = CONSTRUCTIONS[name](2, 4).to(dtype), likelihoods.Normal(0.9, estimate="learned").to(dtype)
    perturb(decoder, 0.5)
    for sigma in (0.9, 0.4):
        likelihood.log_scale.data.fill_(math.log(sigma))
        result = guaranteed_information(decoder, likelihood)
        assert result.floor == pytest.approx(math.log(1 + 0.7**2 / sigma**2), rel=1e-5)
        check(result, information(decoder, sigma, standard(2, dtype), num_data=1000, nodes=201))


def scaled(scale):
    return lambda eta: dist.Normal(eta, scale.to(eta))


@pytest.mark.parametrize("features", [2, 5])
@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_is_below_the_information_for_a_scale_of_each_feature(name, features):
    decoder = perturb(CONSTRUCTIONS[name](2, features).double(), 0.5)
    scale = torch.linspace(0.3, 1.5, features, dtype=torch.float64)
    result = guaranteed_information(decoder, scaled(scale))
    check(result, information(decoder, scale, standard(2)))
    frame = decoder.frame.embed(torch.eye(2, dtype=torch.float64)).detach()
    determinant = torch.linalg.det(frame * scale.square() @ frame.mT)
    assert result.floor == pytest.approx(math.log(1 + 0.7**2 / float(determinant) ** 0.5), rel=1e-9)


def test_a_whitened_decoder_has_the_nats_of_its_dial():
    scale, kappa = torch.tensor([0.2, 0.5, 1.5, 0.7], dtype=torch.float64), 0.4
    decoder = Whitened(perturb(projected(2, 4, math.sqrt(math.expm1(2 * kappa))).double(), 0.5), scale)
    result = guaranteed_information(decoder, scaled(scale))
    assert result.nats_per_dimension == pytest.approx(kappa, rel=1e-9)
    torch.testing.assert_close(result.per_coordinate, torch.full((2,), kappa, dtype=torch.float64))
    check(result, information(decoder, scale, standard(2)))
    # The constant of the decoder itself, in the frame of the whitened decoder, would say less.
    assert decoder.inverse_lipschitz < decoder.channel_constant


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_without_a_constant_the_jacobian_still_guarantees(name):
    for features in (2, 5):
        decoder = perturb(CONSTRUCTIONS[name](2, features, 0.0).double(), 0.7)
        result = guaranteed_information(decoder, likelihoods.Normal(0.5))
        assert result.floor == result.nats_per_dimension == 0
        assert result.by_jacobian > 0.05
        check(result, information(decoder, 0.5, standard(2), nodes=201))


# Each coordinate given the others


@pytest.mark.slow
@pytest.mark.parametrize("prior", [standard(2), CORRELATED], ids=["standard", "correlated"])
@pytest.mark.parametrize("perturbation", [0.0, 0.7])
def test_each_coordinate_has_what_is_guaranteed_given_the_others(prior, perturbation):
    decoder = perturb(projected(2, 5).double(), perturbation)
    found = guaranteed_information(decoder, likelihoods.Normal(0.6), prior=prior).per_coordinate
    variances = 1 / torch.linalg.inv(getattr(prior, "covariance_matrix", torch.eye(2).double())).diagonal()
    torch.testing.assert_close(found, 0.5 * (1 + 0.7**2 * variances / 0.6**2).log())
    for j in range(2):
        measured = information_of_coordinate(decoder, 0.6, prior, j)
        assert found[j] <= measured.value + 4 * measured.error


def test_each_coordinate_of_a_linear_map_has_no_more_than_that():
    result = guaranteed_information(Frame(0.7 * torch.eye(2).double(), 4, symmetric=True), likelihoods.Normal(0.6))
    measured = information_of_coordinate(Frame(0.7 * torch.eye(2).double(), 4), 0.6, standard(2), 1)
    assert float(result.per_coordinate[1]) == pytest.approx(measured.value, abs=4 * measured.error)


def test_coordinates_of_a_mixture_are_those_of_its_components():
    result = guaranteed_information(projected(2, 5).double(), likelihoods.Normal(0.6), prior=SEPARATE)
    scales = torch.tensor([[0.3, 0.5], [0.6, 0.4]], dtype=torch.float64)
    expected = (torch.tensor([[0.3], [0.7]]).double() * 0.5 * (1 + 0.7**2 * scales**2 / 0.6**2).log()).sum(0)
    torch.testing.assert_close(result.per_coordinate, expected)


def test_a_composition_has_no_floor_for_coordinates():
    assert guaranteed_information(composition(2, 5), likelihoods.Normal(0.6)).per_coordinate is None


# Linear maps


@pytest.mark.parametrize("features", [3, 7])
@pytest.mark.parametrize("constant", [0.1, 1.0, 30.0])
def test_is_the_information_for_a_scaled_frame(constant, features):
    result = guaranteed_information(Frame(constant * torch.eye(3).double(), features), likelihoods.Normal(0.5))
    exact = 1.5 * math.log1p((constant / 0.5) ** 2)
    assert [result.floor, result.by_jacobian] == pytest.approx([exact, exact], rel=1e-6)
    assert result.by_jacobian_se < 1e-12


def test_is_the_entropy_power_bound_for_a_linear_map():
    matrix = torch.randn(3, 3, dtype=torch.float64)
    matrix = matrix @ matrix.mT + 0.3 * torch.eye(3, dtype=torch.float64)
    result = guaranteed_information(Frame(matrix, 5), likelihoods.Normal(0.5))
    by_hand = 1.5 * math.log1p(float(torch.linalg.det(matrix)) ** (2 / 3) / 0.25)
    assert result.by_jacobian == pytest.approx(by_hand, rel=1e-6)
    exact = 0.5 * float(torch.logdet(torch.eye(3).double() + matrix @ matrix.mT / 0.25))
    assert result.floor < result.by_jacobian < exact


def test_is_the_information_where_prior_and_map_make_one_scale():
    whitening = torch.linalg.inv(torch.linalg.cholesky(CORRELATED.covariance_matrix))
    result = guaranteed_information(Frame(2 * whitening, 4), likelihoods.Normal(0.5), prior=CORRELATED)
    assert result.by_jacobian == pytest.approx(math.log1p(16), rel=1e-6)
    assert result.entropy_power == pytest.approx(float(torch.linalg.det(CORRELATED.covariance_matrix)) ** 0.5, rel=1e-6)


def test_units_of_data_do_not_matter():
    decoder = perturb(projected(2, 5).double())
    results = [
        guaranteed_information(Whitened(decoder, torch.tensor(unit)), likelihoods.Normal(0.6 * unit), seed=0)
        for unit in (1.0, 100.0)
    ]
    assert results[0][:5] == pytest.approx(results[1][:5], rel=1e-6)


@pytest.mark.parametrize("kappa", [0.0, 0.1, 0.5, 2.0])
@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_a_constant_in_nats_has_these_nats(name, kappa):
    decoder = CONSTRUCTIONS[name](3, 6, 0.3 * math.sqrt(math.expm1(2 * kappa)))
    result = guaranteed_information(decoder, likelihoods.Normal(0.3), num_samples=20)
    assert result.nats_per_dimension == pytest.approx(kappa, rel=1e-5)
    assert result.floor == pytest.approx(3 * kappa, rel=1e-5)


# Priors


def test_mixtures_of_one_component_and_of_equal_ones_are_that_component():
    decoder = perturb(projected(2, 5).double(), 0.5)
    alone = guaranteed_information(decoder, likelihoods.Normal(0.5), prior=standard(2), num_samples=4000)
    for weights in ([1.0], [0.4, 0.6], [0.0, 1.0]):
        same = mixture(weights, [[0.0, 0.0]] * len(weights), [[1.0, 1.0]] * len(weights))
        result = guaranteed_information(decoder, likelihoods.Normal(0.5), prior=same, num_samples=4000)
        assert result.floor == pytest.approx(alone.floor, rel=1e-6)
        error = math.hypot(result.by_jacobian_se, alone.by_jacobian_se)
        assert result.by_jacobian == pytest.approx(alone.by_jacobian, abs=5 * error)
        assert result.entropy_power == pytest.approx(1, abs=1e-9 + 4 * result.entropy_power_se)


def test_floor_of_a_mixture_averages_its_components():
    for prior, scales, weights in (
        (SEPARATE, ([0.3, 0.5], [0.6, 0.4]), (0.3, 0.7)),
        (OVERLAPPING, ([1.2, 1.0], [0.15, 0.1]), (0.5, 0.5)),
    ):
        floors = [math.log1p((0.7 / 0.5) ** 2 * math.prod(scale)) for scale in scales]
        result = guaranteed_information(projected(2, 5).double(), likelihoods.Normal(0.5), prior=prior)
        assert result.floor == pytest.approx(sum(w * f for w, f in zip(weights, floors, strict=True)), rel=1e-9)
        assert (result.floor_se, result.entropy_power_se > 0) == (0, True)


def test_components_count_by_themselves_where_the_whole_says_less():
    unequal = mixture([0.5, 0.5], [[0.0, 0.0], [0.0, 0.0]], [[3.0, 3.0], [0.01, 0.01]])
    result = guaranteed_information(perturb(projected(2, 5).double(), 0.5), likelihoods.Normal(0.5), prior=unequal)
    whole = math.log1p(0.7**2 / 0.5**2 * result.entropy_power)
    assert 2 * whole < result.floor < result.by_jacobian


def test_entropy_power_of_a_mixture_against_a_grid():
    axis = torch.linspace(-7, 7, 701, dtype=torch.float64)
    log_density = SEPARATE.log_prob(torch.cartesian_prod(axis, axis))
    entropy = -(log_density.exp() * log_density).sum() * 0.02**2
    result = guaranteed_information(projected(2, 5), likelihoods.Normal(0.5), prior=SEPARATE, num_samples=20_000)
    exact = float(entropy.exp()) / (2 * math.pi * math.e)
    assert abs(result.entropy_power - exact) < 4 * result.entropy_power_se < 0.05 * exact


def flow():
    return dist.TransformedDistribution(
        standard(2), [dist.transforms.AffineTransform(1.0, torch.tensor([0.5, 2.0]).double())]
    )


def test_a_prior_without_a_formula_is_sampled():
    decoder = perturb(projected(2, 5).double(), 0.5)
    exact = dist.Normal(torch.ones(2).double(), torch.tensor([0.5, 2.0]).double()).to_event(1)
    known, sampled = (guaranteed_information(decoder, likelihoods.Normal(0.5), prior=p) for p in (exact, flow()))
    for name in ("floor", "by_jacobian", "entropy_power"):
        error = math.hypot(getattr(known, f"{name}_se"), getattr(sampled, f"{name}_se"))
        assert 0 < abs(getattr(sampled, name) - getattr(known, name)) < 4 * error
    assert sampled.floor <= sampled.by_jacobian
    assert sampled.per_coordinate is None


@pytest.mark.slow
@pytest.mark.parametrize("prior", [standard(2), SEPARATE, OVERLAPPING, flow()], ids=["one", "two", "over", "flow"])
def test_standard_errors_are_those_of_repeated_seeds(prior):
    decoder = perturb(projected(2, 5).double(), 1.0)
    results = [
        guaranteed_information(
            decoder, likelihoods.Normal(0.5), prior=prior, num_samples=200, samples_per_pass=200, seed=seed
        )
        for seed in range(60)
    ]
    for name in ("floor", "by_jacobian", "entropy_power"):
        values = torch.tensor([getattr(result, name) for result in results], dtype=torch.float64)
        errors = torch.tensor([getattr(result, f"{name}_se") for result in results], dtype=torch.float64)
        assert float(values.std()) == pytest.approx(float(errors.mean()), rel=0.35, abs=1e-9)


# Decoders of users


def test_a_map_of_as_many_numbers_needs_no_coordinates():
    brenier = perturb(BrenierMap(2, 0.7, (16,)).double(), 0.5)
    result = guaranteed_information(brenier, likelihoods.Normal(0.5), prior=standard(2))
    check(result, information(brenier, 0.5, standard(2)))
    turned = torch.nn.Sequential(brenier, torch.nn.Linear(2, 2, bias=False).double())
    turned[1].weight.data = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double()  # a determinant below zero
    turned.inverse_lipschitz = 0.7
    again = guaranteed_information(turned, likelihoods.Normal(0.5), prior=standard(2))
    assert again.by_jacobian == pytest.approx(result.by_jacobian, abs=5 * result.by_jacobian_se)


@pytest.mark.parametrize("features", [2, 5])
def test_a_context_is_given(features):
    decoder = perturb(projected(2, features, context_dim=3).double(), 0.5)
    given = decoder.given(torch.randn(3).double())
    result = guaranteed_information(given, likelihoods.Normal(0.8))
    check(result, information(given, 0.8, standard(2)))
    assert result.per_coordinate is not None


class Model:
    """What a model shows of itself."""

    def __init__(self, prior):
        self.decoder, self.likelihood, self.prior = projected(2, 5), likelihoods.Normal(0.5), prior

    def __call__(self, x=None):
        raise AssertionError("no run is needed")

    model = __call__


def test_of_a_model_is_that_of_its_parts():
    model = Model(standard(2, torch.float32))
    expected = guaranteed_information(model.decoder, model.likelihood, prior=model.prior, seed=1)
    for way in (model, model.model):
        result = guaranteed_information(way, seed=1)
        assert result[:5] == expected[:5]
    assert guaranteed_information(model.model, prior=SEPARATE, seed=1).floor != expected.floor


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_draws_modes_and_passes_leave_no_trace(mode):
    decoder = projected(2, 5)
    decoder.backbone.append(torch.nn.Dropout(0.5))
    state = torch.get_rng_state()
    with mode():
        one, two, three = (
            guaranteed_information(decoder, likelihoods.Normal(0.5), num_samples=50, samples_per_pass=size, seed=3)
            for size in (None, 50, 7)
        )
    assert torch.equal(state, torch.get_rng_state())
    assert decoder.backbone[-1].training
    assert one[:5] == pytest.approx(two[:5], rel=1e-6)
    assert one[:5] == pytest.approx(three[:5], rel=1e-6)
    assert not one.per_coordinate.requires_grad
    assert all(parameter.requires_grad and parameter.grad is None for parameter in decoder.parameters())


# Absent, with the reason


def broken(decoder, **attributes):
    for name, value in attributes.items():
        setattr(decoder, name, value)
    return decoder


def noise_from_a_prior():
    likelihood = likelihoods.Normal(0.5, estimate="learned")
    likelihood.log_scale = PyroSample(dist.Normal(0.0, 1.0))
    return likelihood


def slack(eta):
    return dist.Normal(eta, 1 + eta.square())


NORMAL = likelihoods.Normal(0.5)
ABSENT = {
    "other noise": (
        lambda: projected(2, 5),
        likelihoods.Bernoulli(),
        {},
        "Normal noise, got Bernoulli, whose .* refere",
    ),
    "Student's": (
        lambda: projected(2, 5),
        lambda eta: dist.StudentT(3.0, eta, 1.0),
        {},
        "Normal noise .*got StudentT for",
    ),
    "log normal": (
        lambda: projected(2, 5),
        lambda eta: dist.LogNormal(eta, 1.0),
        {},
        "Normal noise .* got LogNormal for",
    ),
    "noise of z": (lambda: projected(2, 5), slack, {}, "a scale that is the same for all z, got another one from func"),
    "another mean": (lambda: projected(2, 5), lambda eta: dist.Normal(2 * eta, 1.0), {}, "Normal around the decoder's"),
    "prior on noise": (lambda: projected(2, 5), noise_from_a_prior(), {}, "got Normal, whose scale is drawn from a pr"),
    "no constant": (lambda: MLPDecoder(latent_dim=2, event_shape=5), NORMAL, {}, "carries inverse_lipschitz, got MLPD"),
    "no coordinates": (
        lambda: broken(MLPDecoder(latent_dim=2, event_shape=5), inverse_lipschitz=0.1),
        NORMAL,
        {},
        "K = D or the method coordinates, got MLPDecoder with K = 2 and D = 5",
    ),
    "not one to one": (
        lambda: broken(MLPDecoder(latent_dim=2, event_shape=2), inverse_lipschitz=0.0),
        NORMAL,
        {},
        "inverse_lipschitz > 0, or the method coordinates, got MLPDecoder with 0",
    ),
    "false constant": (
        lambda: broken(MLPDecoder(latent_dim=2, event_shape=2), inverse_lipschitz=3.0),
        NORMAL,
        {},
        "keeps the constant that it carries, got a Jacobian of MLPDecoder that is too small",
    ),
    "false slope": (
        lambda: Frame(torch.tensor([[0.5, 2.0], [-2.0, 0.5]]).double(), 4, symmetric=True),
        NORMAL,
        {},
        "keeps the constant that it carries",
    ),
    "a context": (lambda: composition(2, 5, context_dim=3), NORMAL, {}, r"pass decoder.given\(...\)"),
    "more coordinates": (
        lambda: composition(2, 5, context_dim=3).given(torch.zeros(3)),
        NORMAL,
        {},
        r"of shape \(..., 2\), got \(2, 5\) from DecoderGiven",
    ),
    "a point": (
        lambda: projected(2, 5),
        NORMAL,
        {"prior": dist.Delta(torch.zeros(2)).to_event(1)},
        r"density on R\^K, got Delta",
    ),
    "a simplex": (lambda: projected(2, 5), NORMAL, {"prior": dist.Dirichlet(torch.ones(2))}, "R.K, got Dirichlet"),
    "counts": (lambda: projected(2, 5), NORMAL, {"prior": dist.Poisson(torch.ones(2)).to_event(1)}, "R.K, got Poisson"),
}


@pytest.mark.parametrize(("decoder", "likelihood", "more", "message"), ABSENT.values(), ids=ABSENT)
def test_says_why_nothing_is_guaranteed(decoder, likelihood, more, message):
    result = guaranteed_information(decoder(), likelihood, **more)
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(result.reason)
    assert all(math.isnan(number) for number in (*result[:5], *result[6:8]))
    assert result.per_coordinate is None
    assert result.reason in repr(result)


def test_says_so_of_a_prior_with_a_prior():
    class Drawn(Model):
        prior = property(lambda self: dist.Normal(torch.randn(2), 1.0).to_event(1))

        def __init__(self):
            self.decoder, self.likelihood = projected(2, 5), NORMAL

    assert "parameters are fixed" in guaranteed_information(Drawn().model).reason


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((projected(2, 5),), TypeError, "likelihood"),
        ((Model(None).model,), ValueError, "Expected prior=..., or a model with the attribute prior"),
        ((Model(lambda: standard(2)).model,), ValueError, "Expected prior=..., or a model with the attribute prior"),
        ((Model(standard(2)).model, NORMAL), ValueError, "likelihood=None for a model"),
        ((torch.nn.Linear(2, 2), NORMAL), ValueError, "prior=..., or a decoder with the attribute latent_dim"),
        ((projected(2, 5), NORMAL, {"prior": standard(3)}), ValueError, r"event shape \(2,\), got \(\) and \(3,\)"),
        ((projected(2, 5), NORMAL, {"prior": dist.Normal(0.0, 1.0)}), ValueError, "prior with batch shape"),
        ((projected(2, 5), NORMAL, {"prior": "normal"}), TypeError, "prior to be a distribution"),
        ((projected(2, 5), NORMAL, {"num_samples": 0}), ValueError, "num_samples"),
        ((projected(2, 5), NORMAL, {"samples_per_pass": 0}), ValueError, "samples_per_pass"),
        ((projected(2, 5), NORMAL, {"seed": "a"}), ValueError, "seed"),
        ((3, NORMAL), TypeError, "model_or_decoder to be a model or a decoder"),
        ((ProjectedDecoder, NORMAL), TypeError, "model_or_decoder"),
        ((lambda z: torch.randn(len(z), 2), NORMAL, {"prior": standard(2)}), ValueError, "one function"),
    ],
)
def test_refuses(arguments, error, message):
    *parts, more = (*arguments, {}) if not isinstance(arguments[-1], dict) else arguments
    decoder = parts[0]
    if message == "one function":
        decoder.inverse_lipschitz = 1.0
    with pytest.raises(error, match=message):
        guaranteed_information(*parts, **more)
