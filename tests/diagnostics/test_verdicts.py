"""What the summary calls collapsed, weak and active, from nats that are known."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.estimates import assert_near
from helpers.latent_structures import chain_guide, chain_model, gmvae_guide_without_y, gmvae_model
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from pyro_ilvae import InverseLipschitzDecoder, MixtureVAE, MLPEncoder, diagnostics, likelihoods
from pyro_ilvae.diagnostics import collapse_summary

N = 400


def pair(nats, scale=1.0):
    """A posterior whose mean KL in each dimension is known, from the shift of its mean; the prior has a scale."""
    shift = torch.as_tensor(nats).mul(2).sqrt() * scale
    signs = torch.ones(N, 1)
    signs[::2] = -1

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("code", dist.Normal(torch.zeros(len(shift)), scale).to_event(1))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("code", dist.Normal(signs * shift, scale).to_event(1))

    return model, guide, torch.zeros(N)


WORDS = {0.0: "collapsed", 0.004: "collapsed", 0.02: "weak", 0.09: "weak", 0.11: "active", 30.0: "active"}


@pytest.mark.parametrize("scale", [1.0, 0.02, 50.0])
def test_words_follow_the_nats_whatever_the_scale_of_the_prior(scale):
    summary = collapse_summary(*pair([*WORDS, 1e9], scale), measures=["kl"])
    assert summary.verdict.values.tolist() == [*WORDS.values(), "off scale"]


@pytest.mark.parametrize(
    ("nats", "sentence"),
    [
        ([0.006] * 16, "collapsed: 16 of 16 units hold less than 0.01 nats; 0.096 nats in all"),
        ([0.0] * 14 + [2.0] * 2, "partly collapsed: 14 of 16 units hold less than 0.01 nats, 2 active; 4 nats in all"),
        (
            [0.0, 0.05, 1.0],
            "partly collapsed: 1 of 3 units hold less than 0.01 nats, 1 weak (0.01 to 0.1), 1 active; 1.05",
        ),
        ([0.05, 0.05], "weak: 0 of 2 units hold less than 0.01 nats, 2 weak (0.01 to 0.1); 0.1 nats in all"),
        ([1.0, 0.05], "active: 0 of 2 units"),
        ([0.006] * 13 + [0.012] * 3, "collapsed: 13 of 16 units hold less than 0.01 nats, 3 weak (0.01 to 0.1); 0.114"),
        ([0.008] * 200, "weak: 200 of 200 units hold less than 0.01 nats; 1.6 nats in all"),
        ([1e9, 0.0], "off scale: 1 of 2 units hold less than 0.01 nats, 1 off scale; 1e+09 nats in all"),
    ],
)
def test_one_sentence_about_the_model(nats, sentence):
    assert collapse_summary(*pair(nats), measures=["kl"]).attrs["verdict"].startswith(sentence)


def test_limits_are_arguments():
    call = pair([0.004, 0.02, 0.5])
    summary = collapse_summary(*call, measures=["kl"], collapsed_below=0.001, active_from=0.01)
    assert summary.verdict.values.tolist() == ["weak", "active", "active"]
    assert (summary.attrs["collapsed_below"], summary.attrs["active_from"]) == (0.001, 0.01)
    assert collapse_summary(*call, measures=["active_units"]).verdict.values.tolist() == ["unknown"] * 3


def test_counts_units_whose_error_spans_a_limit():
    model, _, x = pair([0.0])

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("code", dist.Normal(torch.linspace(0.0, 0.3, N)[:, None], 1.0).to_event(1))

    near = collapse_summary(model, guide, x[:], measures=["kl"], collapsed_below=0.015)  # its mean KL is 0.015
    assert near.attrs["verdict"].endswith("(1 within two standard errors of a limit)")
    assert "limit" not in collapse_summary(model, guide, x, measures=["kl"]).attrs["verdict"]


def test_a_site_without_dimensions_of_its_own_is_judged_by_its_nats_for_each_dimension():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Dirichlet(torch.ones(3)))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide_with(concentration):
        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Dirichlet(concentration).expand([len(x)]))

        return guide

    x = torch.zeros(5)
    for concentration, word in ((1.0, "collapsed"), (1.5, "weak"), (9.0, "active")):
        summary = collapse_summary(model, guide_with(concentration * torch.ones(3)), x, measures=["kl"])
        assert summary.verdict.values.tolist() == [word]
        assert "factorize" in summary.note.item()


@pytest.mark.parametrize("form", ["guide", "model"])
def test_a_mixture_has_verdicts_in_either_form(form):
    decoder = InverseLipschitzDecoder(latent_dim=2, event_shape=5, inverse_lipschitz=0.5, map_features=(8,))
    encoder = MLPEncoder(event_shape=5, latent_dim=2, hidden_features=(8,))
    mixture = MixtureVAE(decoder, encoder, likelihoods.Normal(1.0), 3, enumerate_in=form)
    summary = collapse_summary(mixture.model, mixture.guide, torch.randn(20, 5), num_samples=50, seed=0)
    words = dict(zip(summary.unit.values.tolist(), summary.verdict.values.tolist(), strict=True))
    assert (words["y"] == "unknown") == (form == "model")
    assert {words["z[0]"], words["z[1]"]} <= {"collapsed", "weak", "active"}
    assert not summary.attrs["verdict"].startswith("unknown")


def test_the_mixtures_nats_in_a_dimension_are_those_of_its_marginal():
    x = torch.randn(6)
    kl = diagnostics.kl_per_dimension(gmvae_model, gmvae_guide_without_y, x, num_samples=20_000, seed=0)
    joint = diagnostics.kl_divergence(gmvae_model, gmvae_guide_without_y, x, num_samples=20_000, seed=1)
    for value, other, *errors in zip(kl.values, joint.values, kl.standard_errors, joint.standard_errors, strict=True):
        assert_near(float(value), math.hypot(*errors), float(other))


def from_the_data_up(x):
    """The prior as a posterior, drawn in the other order."""
    with pyro.plate("data", len(x)):
        z1 = pyro.sample("z1", dist.Normal(torch.zeros(len(x)), 1.0))
        pyro.sample("z2", dist.Normal(0.8 * z1, 0.6))


def test_parts_of_a_joint_divergence_have_no_verdict():
    x = torch.randn(50)
    summary = collapse_summary(chain_model, from_the_data_up, x, num_samples=500, measures=["kl"], seed=0)
    # The posterior is the prior, and the parts are minus and plus the information of z1 and z2.
    information = -math.log(0.6)
    kl = dict(zip(summary.unit.values.tolist(), summary.kl.values.tolist(), strict=True))
    assert kl["z1"] == pytest.approx(-information, abs=0.05)
    assert kl["z2"] == pytest.approx(information, abs=0.05)
    assert summary.verdict.values.tolist() == ["unknown", "unknown"]
    assert all("a part of the joint divergence" in note for note in summary.note.values.tolist())
    down = collapse_summary(chain_model, chain_guide, x, num_samples=100, measures=["kl"])
    assert "unknown" not in down.verdict


def test_sites_that_do_not_depend_on_each_other_have_verdicts_in_any_order():
    def model(x):
        with pyro.plate("data", len(x)):
            a, b = (pyro.sample(name, dist.Normal(0.0, 1.0)) for name in "ab")
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Normal(x, 0.5))
            pyro.sample("a", dist.Normal(b / 2, 1.0))

    summary = collapse_summary(model, guide, torch.randn(20), measures=["kl"], num_samples=20)
    assert summary.verdict.values.tolist() == ["active", "active"]


def whole_chain_model(x):
    """As ``chain_model``, of all data: a joint guide has no values for a part of them."""
    with pyro.plate("data", len(x)):
        z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
        z1 = pyro.sample("z1", dist.Normal(0.8 * z2, 0.6))
        pyro.sample("x", dist.Normal(z1, 0.5), obs=x)


@pytest.mark.parametrize("build", [AutoMultivariateNormal, AutoNormal])
def test_joint_guides_of_layers(build):
    x = torch.randn(20)
    guide = build(whole_chain_model)
    guide(x)
    # The parts of a joint draw are at most the divergences, which are active if their parts are.
    summary = collapse_summary(whole_chain_model, guide, x, measures=["kl"], num_samples=20)
    assert summary.verdict.values.tolist() == ["active", "active"]


def test_a_joint_guide_that_is_the_prior():
    guide = AutoMultivariateNormal(whole_chain_model)
    guide(torch.zeros(1))
    guide.loc.data.zero_()
    guide.scale = torch.tensor([1.0, 0.6])
    guide.scale_tril = torch.tensor([[1.0, 0.0], [0.8 / 0.6, 1.0]])
    summary = collapse_summary(whole_chain_model, guide, torch.zeros(1), measures=["kl"], num_samples=3000, seed=0)
    assert summary.kl.sel(unit="z1").item() == pytest.approx(math.log(0.6), abs=0.1)
    assert summary.verdict.values.tolist() == ["collapsed", "unknown"]
