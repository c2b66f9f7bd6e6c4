"""Diagnostics of mixture components: usage, overlap and matching, against enumeration, quadrature and draws."""

import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm

from pyro_ilvae.diagnostics.coinciding_components import coinciding_components
from pyro_ilvae.diagnostics.component_usage import component_usage
from pyro_ilvae.diagnostics.match_components import match_components

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 5), st.integers(0, 2**32 - 1))


def random_probabilities(*shape, seed, dtype=torch.float64, zeros=False):
    """Rows from nearly uniform to nearly certain."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    sharpness = 10 ** (3 * torch.rand(*shape[:-1], 1, generator=generator, dtype=torch.float64) - 1)
    probs = (sharpness * torch.randn(*shape, generator=generator, dtype=torch.float64)).softmax(-1)
    if zeros:
        probs = torch.where(probs < 0.5 / shape[-1], 0.0, probs)
    return (probs / probs.sum(-1, keepdim=True)).to(dtype)


def random_gaussians(components, dim, seed, spread=1.0, dtype=torch.float64):
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    loc, log_scale = torch.randn(2, components, dim, generator=generator, dtype=torch.float64)
    return (spread * loc).to(dtype), (0.5 * log_scale).exp().to(dtype)


def mean_kl(probs, weights):
    """The mean of KL(q(y | x_n) || pi), one term at a time."""
    terms = [
        p * math.log(p / w) if w > 0 else math.inf
        for row in probs.tolist()
        for p, w in zip(row, weights.tolist(), strict=True)
        if p > 0
    ]
    return sum(terms) / len(probs)


@given(SHAPES, st.booleans(), st.booleans())
def test_mean_divergence_is_that_of_the_usage_plus_the_mutual_information(shape, zeros, uniform):
    size, components, seed = shape
    probs = random_probabilities(size, components, seed=seed, zeros=zeros)
    weights = torch.ones(components).double() / components if uniform else random_probabilities(components, seed=1)
    result = component_usage(probs, None if uniform else weights)
    assert result.kl + result.mutual_information == pytest.approx(mean_kl(probs, weights), abs=1e-9)
    assert result.kl == pytest.approx(mean_kl(probs.mean(0, keepdim=True), weights), abs=1e-9)
    assert result.mutual_information == pytest.approx(mean_kl(probs, probs.mean(0)), abs=1e-9)
    assert result.assignment_entropy + result.mutual_information == pytest.approx(
        math.log(result.effective_number), abs=1e-9
    )


@given(SHAPES, st.booleans())
def test_ranges_of_usage(shape, zeros):
    size, components, seed = shape
    result = component_usage(random_probabilities(size, components, seed=seed, zeros=zeros))
    assert result.usage.sum().item() == pytest.approx(1)
    assert 1 <= result.effective_number <= components + 1e-9
    assert result.kl == pytest.approx(math.log(components / result.effective_number), abs=1e-9)
    assert 0 <= result.mutual_information <= math.log(min(size, components)) + 1e-9
    assert 0 <= result.assignment_entropy <= math.log(components) + 1e-9
    assert min(result.kl, result.mutual_information, result.assignment_entropy) >= 0


@given(SHAPES, st.randoms(use_true_random=False))
def test_usage_follows_the_names_of_components_and_ignores_the_order_of_data(shape, random):
    size, components, seed = shape
    probs, weights = random_probabilities(size, components, seed=seed), random_probabilities(components, seed=1)
    order, names = random.sample(range(size), size), random.sample(range(components), components)
    result = component_usage(probs, weights, threshold=0.2)
    renamed = component_usage(probs[order][:, names], weights[names], threshold=0.2)
    torch.testing.assert_close(renamed.usage, result.usage[names])
    assert renamed.empty.tolist() == result.empty[names].tolist()
    for name in ("kl", "effective_number", "assignment_entropy", "mutual_information"):
        assert getattr(renamed, name) == pytest.approx(getattr(result, name), abs=1e-9)


@given(SHAPES, st.integers(2, 4))
def test_repeated_data_change_nothing(shape, times):
    size, components, seed = shape
    probs = random_probabilities(size, components, seed=seed)
    once, often = component_usage(probs), component_usage(probs.repeat(times, 1))
    torch.testing.assert_close(often.usage, once.usage)
    assert often.mutual_information == pytest.approx(once.mutual_information, abs=1e-9)
    alike = component_usage(probs[:1].expand(7, -1))
    assert 0 <= alike.mutual_information < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("components", [1, 2, 7])
def test_a_dead_mixture_has_one_component(components, dtype):
    probs = torch.nn.functional.one_hot(torch.full((5,), components - 1), components).to(dtype)
    result = component_usage(probs)
    assert (result.effective_number, result.assignment_entropy, result.mutual_information) == (1.0, 0.0, 0.0)
    assert result.kl == pytest.approx(math.log(components))
    assert result.empty.tolist() == [True] * (components - 1) + [False]
    assert math.copysign(1, result.assignment_entropy) == math.copysign(1, result.kl) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("components", [2, 3, 7, 100])
def test_extremes_of_equal_usage(components, dtype):
    threshold = 1 / components
    certain = component_usage(torch.eye(components, dtype=dtype).repeat(3, 1), threshold=threshold)
    uniform = component_usage(torch.zeros(100, components, dtype=dtype).softmax(-1), threshold=threshold)
    for result in (certain, uniform):
        assert result.effective_number == pytest.approx(components)
        assert result.kl == pytest.approx(0, abs=1e-12)
        assert not result.empty.any()
    assert certain.mutual_information == pytest.approx(math.log(components))
    assert certain.assignment_entropy == 0
    assert uniform.mutual_information == pytest.approx(0, abs=1e-12)
    assert uniform.assignment_entropy == pytest.approx(math.log(components))


def test_components_without_prior_weight():
    probs = torch.tensor([[0.5, 0.5, 0.0], [0.75, 0.25, 0.0]])
    assert component_usage(probs, [1.0, 0.0, 0.0]).kl == math.inf
    finite = component_usage(probs, [0.625, 0.375, 0.0])
    assert finite.kl == pytest.approx(0, abs=1e-12)
    assert finite.mutual_information > 0


@pytest.mark.parametrize(("threshold", "empty"), [(0, 0), (0.1, 1), (0.25, 1), (0.26, 2), (1, 3)])
def test_threshold_of_empty_components(threshold, empty):
    probs = torch.tensor([[0.7, 0.25, 0.05]])
    assert component_usage(probs, threshold=threshold).empty.sum() == empty


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32 - 1), st.floats(0, 3))
def test_overlap_is_that_of_normal_densities(components, dim, seed, spread):
    loc, scale = random_gaussians(components, dim, seed, spread)
    overlap = coinciding_components(loc, scale).overlap
    assert (overlap.diagonal() == 1).all()
    assert ((overlap >= 0) & (overlap <= 1)).all()
    torch.testing.assert_close(overlap, overlap.T, rtol=1e-12, atol=0)
    totals = scale[:, None].square() + scale.square()
    factors = (2 * scale[:, None] * scale / totals).sqrt() * (-(loc[:, None] - loc).square() / (4 * totals)).exp()
    torch.testing.assert_close(overlap, factors.prod(-1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_overlap_against_quadrature_and_the_error_of_the_best_guess(seed):
    loc, scale = random_gaussians(2, 1, seed, spread=1.5)
    first, second = (norm(m, s) for m, s in zip(loc[:, 0].tolist(), scale[:, 0].tolist(), strict=True))
    center, width = loc.mean().item(), 10 * scale.max().item() + loc.abs().max().item()
    limits = {"a": center - width, "b": center + width, "limit": 500, "points": loc[:, 0].tolist()}
    integral, _ = quad(lambda z: math.sqrt(first.pdf(z) * second.pdf(z)), **limits)
    overlap = coinciding_components(loc, scale).overlap[0, 1].item()
    assert overlap == pytest.approx(integral, abs=1e-7)
    error, _ = quad(lambda z: 0.5 * min(first.pdf(z), second.pdf(z)), **limits)
    assert 0.5 * (1 - math.sqrt(1 - overlap**2)) - 1e-6 <= error <= 0.5 * overlap + 1e-6


@pytest.mark.parametrize("dim", [1, 3, 6])
def test_overlap_against_draws(dim):
    loc, scale = random_gaussians(3, dim, seed=dim, spread=0.5)
    overlap = coinciding_components(loc, scale).overlap
    torch.manual_seed(0)
    normals = [torch.distributions.Normal(loc[i], scale[i]) for i in range(3)]
    for i, j in itertools.permutations(range(3), 2):
        z = normals[i].sample((20_000,))
        ratios = (0.5 * (normals[j].log_prob(z) - normals[i].log_prob(z)).sum(1)).exp()
        assert abs(ratios.mean() - overlap[i, j]) < 5 * ratios.std() / len(ratios) ** 0.5


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_overlap_ignores_where_and_in_which_unit(components, dim, seed):
    loc, scale = random_gaussians(components, dim, seed)
    unit = torch.logspace(-3, 3, dim, dtype=torch.float64)
    moved = coinciding_components(7 - unit * loc, unit * scale).overlap
    torch.testing.assert_close(moved, coinciding_components(loc, scale).overlap, rtol=1e-6, atol=1e-9)


@given(st.integers(1, 8), st.integers(0, 2**32 - 1), st.floats(0, 1), st.randoms(use_true_random=False))
def test_groups_are_chains_of_pairs_above_the_threshold(components, seed, threshold, random):
    loc, scale = random_gaussians(components, 1, seed)
    result = coinciding_components(loc, scale, threshold=threshold)
    reached = (result.overlap > threshold).double().matrix_power(components) > 0
    expected = {tuple(row.nonzero()[:, 0].tolist()) for row in reached | torch.eye(components).bool()}
    assert set(result.groups) == {group for group in expected if len(group) > 1}
    assert len(set(result.groups)) == len(result.groups)
    names = random.sample(range(components), components)
    renamed = coinciding_components(loc[names], scale[names], threshold=threshold)
    assert {tuple(sorted(names[i] for i in group)) for group in renamed.groups} == set(result.groups)
    torch.testing.assert_close(renamed.overlap, result.overlap[names][:, names])


def test_groups_at_the_default_threshold():
    loc = torch.tensor([0.0, 50.0, 0.9, 50.93, 1.8])[:, None]  # a chain of three, and a pair just too far apart
    assert coinciding_components(loc, torch.ones(5, 1)).groups == ((0, 2, 4),)
    assert coinciding_components(torch.zeros(4, 3), torch.ones(4, 3)).groups == ((0, 1, 2, 3),)
    assert coinciding_components(torch.zeros(1, 3), torch.ones(1, 3)).groups == ()


@pytest.mark.parametrize(
    ("loc", "scale", "expected"),
    [
        ([[0.0], [0.0]], [[1e-200], [1e200]], 0.0),
        ([[0.0], [0.0]], [[1e-200], [1e-200]], 1.0),
        ([[0.0], [2e-200]], [[1e-200], [1e-200]], math.exp(-0.5)),
        ([[0.0], [2e200]], [[1e200], [1e200]], math.exp(-0.5)),
        ([[-1e300], [1e300]], [[1.0], [1.0]], 0.0),
        ([[1e8], [1e8 + 2]], [[1.0], [1.0]], math.exp(-0.5)),
        ([[0.0] * 5000, [0.0] * 5000], [[1.0] * 5000, [10.0] * 5000], 0.0),
    ],
)
def test_overlap_of_extreme_components(loc, scale, expected):
    overlap = coinciding_components(loc, scale).overlap
    assert overlap[0, 1].item() == pytest.approx(expected, abs=1e-12)


@given(SHAPES, st.integers(0, 2**32 - 1), st.booleans())
def test_matching_is_the_best_of_all_permutations(shape, other_seed, zeros):
    size, components, seed = shape
    first = random_probabilities(size, components, seed=seed, zeros=zeros)
    second = random_probabilities(size, components, seed=other_seed)
    permutation, agreement = match_components(first, second)
    agreements = {
        names: (first * second[:, list(names)]).sum().item() / size
        for names in itertools.permutations(range(components))
    }
    assert agreement == pytest.approx(max(agreements.values()), abs=1e-12)
    assert agreements[tuple(permutation.tolist())] == pytest.approx(agreement, abs=1e-12)
    distances = [(first - second[:, list(names)]).square().sum().item() for names in agreements]
    assert (first - second[:, permutation]).square().sum().item() == pytest.approx(min(distances), abs=1e-9)
    # No worse than chance, because the mean over all permutations is 1 / C.
    assert 1 / components - 1e-12 <= agreement <= 1


@given(SHAPES, st.randoms(use_true_random=False))
def test_matching_undoes_a_renaming(shape, random):
    _, components, seed = shape
    probs = random_probabilities(20, components, seed=seed)
    names = random.sample(range(components), components)
    permutation, agreement = match_components(probs, probs[:, names])
    torch.testing.assert_close(probs[:, names][:, permutation], probs, rtol=0, atol=1e-6)
    assert agreement == pytest.approx(probs.square().sum(1).mean().item())


@given(SHAPES, st.integers(0, 2**32 - 1), st.randoms(use_true_random=False))
def test_matching_follows_the_names_of_both(shape, other_seed, random):
    size, components, seed = shape
    first = random_probabilities(size, components, seed=seed)
    second = random_probabilities(size, components, seed=other_seed)
    names, others = (random.sample(range(components), components) for _ in range(2))
    match, renamed = match_components(first, second), match_components(first[:, names], second[:, others])
    swapped = match_components(second, first)
    assert match.agreement == pytest.approx(renamed.agreement) == pytest.approx(swapped.agreement)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30))
def test_labels_are_certain_probabilities(pairs):
    first, second = torch.tensor(pairs).T
    size = int(torch.tensor(pairs).max()) + 1
    eye = torch.eye(size)
    match = match_components(first, second)
    assert len(match.permutation) == size
    for others in [(eye[first], eye[second]), (first, eye[second]), (eye[first], second)]:
        other = match_components(*others)
        assert other.agreement == match.agreement
        assert other.permutation.tolist() == match.permutation.tolist()
    assert match.agreement == (first == match.permutation.argsort()[second]).double().mean().item()


@pytest.mark.parametrize("components", [1, 2, 5])
def test_extremes_of_matching(components):
    certain, uniform = torch.eye(components), torch.full((components, components), 1 / components)
    permutation, agreement = match_components(certain, certain.flip(1))
    assert (permutation.tolist(), agreement) == (list(range(components))[::-1], 1.0)
    assert match_components(certain, uniform).agreement == pytest.approx(1 / components)
    assert match_components(uniform, uniform).agreement == pytest.approx(1 / components)


FUNCTIONS = {
    "usage": lambda convert: component_usage(
        convert(random_probabilities(6, 3, seed=0)), convert(random_probabilities(3, seed=1))
    ),
    "coinciding": lambda convert: coinciding_components(*map(convert, random_gaussians(4, 2, seed=0)), threshold=0.5),
    "match": lambda convert: match_components(
        convert(random_probabilities(6, 3, seed=0)), convert(random_probabilities(6, 3, seed=1))
    ),
}


def assert_same(result, expected):
    assert type(result) is type(expected)
    for value, other in zip(result, expected, strict=True):
        if isinstance(other, torch.Tensor):
            torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6, check_dtype=False)
        else:
            assert value == (other if isinstance(other, tuple) else pytest.approx(other, rel=1e-5, abs=1e-6))


def read_only(value):
    array = value.numpy(force=True)
    array.flags.writeable = False
    return array


CONVERSIONS = {
    "float32": torch.Tensor.float,
    "requires grad": lambda value: value.clone().requires_grad_(),
    "numpy": lambda value: value.numpy(force=True),
    "numpy float32": lambda value: value.float().numpy(force=True),
    "numpy read-only": read_only,
    "numpy negative strides": lambda value: value.flip(0).numpy(force=True)[::-1],
    "numpy big-endian": lambda value: value.numpy(force=True).astype(">f8"),
    "lists": torch.Tensor.tolist,
}


@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_kinds_of_input(function, conversion):
    expected, result = FUNCTIONS[function](lambda value: value), FUNCTIONS[function](CONVERSIONS[conversion])
    assert_same(result, expected)
    for value in result:
        assert not (isinstance(value, torch.Tensor) and value.requires_grad)
        assert isinstance(value, (torch.Tensor, float, tuple))
    dtype = torch.float32 if conversion == "float32" else torch.float64
    assert all(v.dtype == dtype for v in result if isinstance(v, torch.Tensor) and v.is_floating_point())


@pytest.mark.parametrize("function", FUNCTIONS)
def test_results_can_be_pickled(function):
    result = FUNCTIONS[function](lambda value: value)
    assert_same(pickle.loads(pickle.dumps(result)), result)


@pytest.mark.parametrize("noise", [1e-6, 1e-4])
def test_rounded_probabilities_are_normalized(noise):
    probs = random_probabilities(50, 4, seed=0)
    rounded = component_usage(
        probs * (1 + noise * torch.randn(50, 1, generator=torch.Generator(torch.get_default_device()).manual_seed(0)))
    )
    assert_same(rounded, component_usage(probs))


PROBABILITIES = [
    (torch.tensor([[0.5, math.nan], [0.5, 0.5]]), "{} to be probabilities, got nan"),
    (torch.tensor([[1.5, -0.5], [0.5, 0.5]]), "{} to be probabilities, got -0.5"),
    (torch.tensor([[0.5, 0.5], [0.5, 0.25]]), "{} to sum to 1 over components, got a sum of 0.75"),
    (torch.tensor([[0.5, 0.5], [0.5, math.inf]]), "{} to sum to 1 over components, got a sum of inf"),
    (np.array([["a", "b"], ["c", "d"]]), "{} to be numbers, got <U1"),
    (torch.ones(2, 1, dtype=torch.complex64), "{} to be real, got torch.complex64"),
    (torch.ones(2, 1, 1), r"{} of shape .*\(N, C\), got \(2, 1, 1\)"),
    (torch.ones(2, 0), r"{} of shape .*\(N, C\), got \(2, 0\)"),
    (torch.ones(0, 2), r"{} of shape .*\(N, C\), got \(0, 2\)"),
    (torch.tensor(1.0), r"{} of shape .*\(N, C\), got \(\)"),
]


@pytest.mark.parametrize(("probs", "message"), PROBABILITIES)
def test_refuses_what_are_no_probabilities(probs, message):
    uniform = torch.full((2, 2), 0.5)
    with pytest.raises(ValueError, match="Expected " + message.format("probs")):
        component_usage(probs)
    with pytest.raises(ValueError, match="Expected " + message.format("reference")):
        match_components(probs, uniform)
    with pytest.raises(ValueError, match="Expected " + message.format("other")):
        match_components(uniform, probs)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, 0.25, 0.25], r"weights of shape \(2,\), got \(3,\)"),
        ([[0.5, 0.5]], r"weights of shape \(C,\), got \(1, 2\)"),
        ([], r"weights of shape \(C,\), got \(0,\)"),
        ([0.5, 0.6], "weights to sum to 1 over components, got a sum of 1.1"),
        ([1.5, -0.5], "weights to be probabilities, got -0.5"),
        ([math.nan, 0.5], "weights to be probabilities, got nan"),
    ],
)
def test_refuses_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        component_usage(torch.full((4, 2), 0.5), weights)
    with pytest.raises(ValueError, match="Expected probs of shape"):
        component_usage([0.5, 0.5])


@pytest.mark.parametrize("threshold", [-0.1, 1.1, math.nan, math.inf, "0.1", True])
def test_refuses_thresholds(threshold):
    with pytest.raises(ValueError, match="Expected threshold"):
        component_usage([[0.5, 0.5]], threshold=threshold)
    with pytest.raises(ValueError, match="Expected threshold"):
        coinciding_components([[0.0]], [[1.0]], threshold=threshold)


@pytest.mark.parametrize(
    ("loc", "scale", "message"),
    [
        (torch.zeros(2), torch.ones(2), r"loc of shape \(C, K\), got \(2,\)"),
        (torch.zeros(2, 0), torch.ones(2, 0), r"loc of shape \(C, K\), got \(2, 0\)"),
        (torch.zeros(0, 2), torch.ones(0, 2), r"loc of shape \(C, K\), got \(0, 2\)"),
        (torch.zeros(2, 3), torch.ones(2, 1), r"scale of the shape \(2, 3\) of loc, got \(2, 1\)"),
        ([[0.0], [math.nan]], torch.ones(2, 1), "loc to be finite, got 1 NaN"),
        ([[0.0], [math.inf]], torch.ones(2, 1), "loc to be finite, got 1 NaN"),
        (torch.zeros(2, 1), [[1.0], [0.0]], "scale to be finite and > 0, got 0.0"),
        (torch.zeros(2, 1), [[1.0], [-1.0]], "scale to be finite and > 0, got -1.0"),
        (torch.zeros(2, 1), [[1.0], [math.nan]], "scale to be finite and > 0, got nan"),
        (torch.zeros(2, 1), [[1.0], [math.inf]], "scale to be finite and > 0, got inf"),
    ],
)
def test_refuses_gaussians(loc, scale, message):
    with pytest.raises(ValueError, match=message):
        coinciding_components(loc, scale)


@pytest.mark.parametrize(
    ("reference", "other", "message"),
    [
        ([0, 1], [0, 1, 1], "of one length, got 2 and 3"),
        (torch.full((2, 2), 0.5), torch.full((3, 2), 0.5), "of one length, got 2 and 3"),
        (torch.full((3, 2), 0.5), torch.ones(3, 1), "of one number of components, got 2 and 1"),
        (torch.full((2, 2), 0.5), [0, 2], "other to be labels from 0 to 1, got 2"),
        ([2, 0], torch.full((2, 2), 0.5), "reference to be labels from 0 to 1, got 2"),
        ([0, -1], [0, 1], "reference to be labels from 0 to C - 1, got -1"),
        ([0, 1], [0, 0.5], "other to be labels from 0 to C - 1, got 0.5"),
        ([0, 1], [0, math.nan], "other to be labels from 0 to C - 1, got nan"),
        ([0, 1], [0, math.inf], "other to be labels from 0 to C - 1, got inf"),
        ([], [], r"reference of shape \(N,\) or \(N, C\), got \(0,\)"),
    ],
)
def test_refuses_to_match(reference, other, message):
    with pytest.raises(ValueError, match=message):
        match_components(reference, other)
