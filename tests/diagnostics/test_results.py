"""Results of diagnostics print in one line: as means with their standard errors, however many numbers they hold."""

import ast
import inspect
import math
import re

import pytest
import torch
from helpers.factor_models import exact_guide, linear_model, mean_field_guide, sum_model

from pyro_ilvae import VAE, InverseLipschitzDecoder, MLPEncoder, diagnostics, likelihoods

TYPES = {
    name: value
    for name, value in vars(diagnostics).items()
    if isinstance(value, type) and issubclass(value, tuple) and name in diagnostics.__all__
}


@pytest.fixture(scope="module")
def results():
    torch.manual_seed(0)
    decoder = InverseLipschitzDecoder(latent_dim=2, event_shape=8, inverse_lipschitz=0.5, map_features=(8,))
    likelihood = likelihoods.Normal(1.0)
    vae = VAE(decoder, MLPEncoder(event_shape=8, latent_dim=2, hidden_features=(8,)), likelihood)
    x, y = torch.randn(40), torch.randn(40, 8)
    draws = {"z": torch.randn(50, 40, 2)}
    kl = diagnostics.kl_per_dimension(sum_model, mean_field_guide, x)
    probs = torch.rand(40, 5).softmax(-1)
    return [
        kl,
        diagnostics.kl_divergence(linear_model, exact_guide, torch.randn(40, 3), num_samples=20),
        diagnostics.active_units(sum_model, mean_field_guide, x),
        diagnostics.collapsed_fraction(kl.values),
        diagnostics.evidence(vae.model, vae.guide, y, num_samples=20),
        diagnostics.mutual_information(sum_model, mean_field_guide, x),
        diagnostics.guide_fisher_divergence(sum_model, mean_field_guide, x),
        diagnostics.posterior_fisher_divergence(vae.model, vae.guide, y, num_samples=40),
        diagnostics.posterior_fisher_divergence_of_draws(vae.model, draws, y),
        diagnostics.fisher_bound(vae.model, vae.guide, y, num_samples=40),
        diagnostics.mean_fisher_divergence(decoder, likelihood, num_samples=20),
        diagnostics.separation(decoder, likelihood, num_pairs=20),
        diagnostics.lipschitz_audit(decoder, num_samples=20, steps=2),
        diagnostics.guaranteed_information(vae.model, num_samples=20),
        diagnostics.linear_reference(y, 1.0, nats=0.3),
        diagnostics.component_usage(probs),
        diagnostics.coinciding_components(torch.randn(5, 2), torch.ones(5, 2)),
        diagnostics.match_components(probs, probs.flip(1)),
        diagnostics.cluster_agreement(probs.argmax(1), probs),
    ]


def test_every_type_prints_in_one_short_line(results):
    assert {type(result) for result in results} == set(TYPES.values())
    for result in results:
        text = repr(result)
        assert text.startswith(f"{type(result).__name__}(")
        assert text.endswith(")")
        assert "tensor" not in text
        assert "\n" not in text
        assert len(text) <= 200, text


def test_estimates_print_with_their_standard_errors(results):
    for result in results:
        if any("standard_error" in field or field.endswith("_se") for field in result._fields):
            assert re.search(r"-?[\d.e-]+ \+- [\d.e-]+", repr(result)), result


def test_what_is_printed_is_the_mean_over_the_data():
    values = torch.tensor([[1.0, 3.0], [2.0, 4.0], [3.0, 8.0]])
    per_dimension = diagnostics.KLDivergence(values, "analytic", torch.zeros(3, 2))
    rows = values.mean(1)
    mean, error = float(rows.mean()), float(rows.std()) / math.sqrt(3)
    assert repr(per_dimension) == (
        f"KLDivergence(mean {mean:.4g} +- {error:.2g} nats over 3 data x 2 dimensions, analytic)"
    )
    # A single datum has no spread over data, only the error of its draws.
    single = diagnostics.KLDivergence(torch.tensor([1.25]), "sampled", torch.tensor([0.125]))
    assert repr(single) == "KLDivergence(mean 1.25 +- 0.12 nats over 1 datum, sampled)"
    infinite = diagnostics.KLDivergence(torch.tensor([math.inf, 0.0]), "analytic", torch.zeros(2))
    assert repr(infinite) == "KLDivergence(mean inf +- nan nats over 2 data, analytic)"


@pytest.mark.parametrize("name", TYPES)
def test_every_field_says_what_it_is(name):
    # A comment "#:" stands behind the field, or on the lines before.
    source = inspect.getsource(TYPES[name])
    lines = source.splitlines()
    fields = [node for node in ast.parse(source).body[0].body if isinstance(node, ast.AnnAssign)]
    assert [field.target.id for field in fields] == list(TYPES[name]._fields)
    for field in fields:
        behind, before = lines[field.lineno - 1], lines[field.lineno - 2].strip()
        assert "  #: " in behind or before.startswith("#: "), behind
