"""What is special to the sequential VAE: draws and data of different lengths, priors on weights, what is refused."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.decoders import perturb
from helpers.models import LENGTH, sequential_with
from helpers.models import TOKENS as X
from helpers.sequence_decoders import DECODERS, EVERY_DECODER, INVERSE_LIPSCHITZ_DECODERS, LATENT, VOCAB
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroSample

from pyro_ilvae import AnnealedELBO, InverseLipschitzScheduler, SequenceEncoder, SequentialVAE, from_pyro_svi, schedules
from pyro_ilvae.diagnostics import collapse_summary, evidence

GRU = [name for name in DECODERS if "gru" in name]


def output_layer(vae):
    """The last layer of a plain decoder."""
    return vae.decoder.decoder.network[-1]


@pytest.mark.parametrize("name", INVERSE_LIPSCHITZ_DECODERS)
def test_constant_and_kl_are_annealed_in_training(name):
    vae = sequential_with(name)
    beta = schedules.linear(0.0, 1.0, num_steps=4)
    scheduler = InverseLipschitzScheduler(vae.decoder, schedules.linear(4.0, 1.0, num_steps=4))
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), AnnealedELBO(TraceMeanField_ELBO(), beta=beta))
    for _ in range(4):
        assert svi.step(X) > 0
        beta.step()
        scheduler.step()
    assert (beta.value, round(vae.decoder.inverse_lipschitz, 9)) == (1.0, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY_DECODER)
@pytest.mark.parametrize("parallel", [False, True])
def test_given_codes_and_densities_of_draws(name, parallel):
    vae = sequential_with(name)
    given = {"z": torch.randn(7, 5, LATENT)}
    for source in ({"num_samples": 7}, {"posterior_samples": given}):
        draws = Predictive(vae.model, **source, parallel=parallel)(num_data=5)
        assert draws["x"].shape[-3:] == (7, 5, LENGTH)
        vae.eval()
        # What is drawn is data, and its density is that of the data.
        x = draws["x"].reshape(35, LENGTH)
        trace = poutine.trace(poutine.condition(vae.model, data={"z": torch.zeros(35, LATENT)})).get_trace(x)
        assert trace.log_prob_sum().isfinite()


@pytest.mark.slow
@pytest.mark.parametrize("name", GRU)
@pytest.mark.parametrize("parallel", [False, True])
def test_draws_are_those_of_the_given_z(name, parallel):
    vae, num_samples = perturb(sequential_with(name, max_length=1)), 2000 if parallel else 200
    z = 2 * torch.randn(3, LATENT)
    predictive = Predictive(vae.model, {"z": z.expand(num_samples, 3, LATENT)}, parallel=parallel)
    drawn = predictive(num_data=3)["x"].reshape(num_samples, 3)
    with torch.no_grad():
        probs = vae.decoder.begin(z)[0].softmax(-1)
    frequencies = torch.nn.functional.one_hot(drawn, VOCAB).float().mean(0)
    assert ((frequencies - probs).abs() < 5 * (probs * (1 - probs) / num_samples).sqrt() + 1 / num_samples).all()


@pytest.mark.parametrize("name", EVERY_DECODER)
def test_draws_in_place_of_data(name):
    # Perturbed less than elsewhere: with saturated logits all draws may be equal.
    vae, x = perturb(sequential_with(name), 0.3), X.repeat(20, 1)
    trace = poutine.trace(poutine.uncondition(vae.model)).get_trace(x)
    drawn = trace.nodes["x"]["value"]
    assert drawn.shape == x.shape
    assert (drawn != x).any(-1).float().mean() > 0.5
    again = poutine.trace(poutine.condition(vae.model, data={"z": trace.nodes["z"]["value"]})).get_trace(drawn)
    torch.testing.assert_close(trace.log_prob_sum(), again.log_prob_sum())
    for parallel in (False, True):
        draws = Predictive(poutine.uncondition(vae.model), num_samples=3, parallel=parallel)(X)["x"]
        assert draws.reshape(3, *X.shape).float().std(0).max() > 0


@pytest.mark.parametrize("name", EVERY_DECODER)
@torch.no_grad()
def test_data_from_a_handler_are_data(name):
    vae, z = sequential_with(name).double(), torch.randn(12, LATENT, dtype=torch.float64)
    expected = poutine.trace(poutine.condition(vae.model, data={"z": z})).get_trace(X).log_prob_sum()
    conditioned = poutine.condition(vae.model, data={"z": z, "x": X})
    for arguments in ({"num_data": 12}, {"x": X}, {"x": X.flip(0)}):
        trace = poutine.trace(conditioned).get_trace(**arguments)
        torch.testing.assert_close(trace.log_prob_sum(), expected)
    trace.nodes["x"]["fn"].sample()
    torch.testing.assert_close(trace.log_prob_sum(), expected)
    trace = poutine.trace(vae.model).get_trace(num_data=12)
    replayed = poutine.trace(poutine.replay(vae.model, trace=trace)).get_trace(num_data=12)
    torch.testing.assert_close(replayed.log_prob_sum(), trace.log_prob_sum())


def test_data_from_a_handler_are_refused_where_a_weight_was_drawn():
    vae = sequential_with()
    output_layer(vae).bias = PyroSample(dist.Normal(torch.zeros(VOCAB), 1.0).to_event(1))
    with pytest.raises(ValueError, match="Expected data as the argument x of a model whose decoder has a prior"):
        poutine.trace(poutine.condition(vae.model, data={"x": X})).get_trace(num_data=12).log_prob_sum()
    assert poutine.trace(vae.model).get_trace(X).log_prob_sum().isfinite()


def test_draws_are_of_the_model_as_it_is_evaluated():
    decoder = DECODERS[GRU[0]](word_dropout=0.9)
    vae = perturb(sequential_with(decoder=decoder)).double()
    trace = poutine.trace(vae.model).get_trace(num_data=12)
    assert decoder.training
    again = poutine.condition(vae.eval().model, data={"z": trace.nodes["z"]["value"]})
    drawn = trace.nodes["x"]["value"]
    torch.testing.assert_close(trace.log_prob_sum(), poutine.trace(again).get_trace(drawn).log_prob_sum())


@pytest.mark.parametrize("uncondition", [False, True])
def test_draws_at_one_z_are_independent(uncondition):
    vae, z = sequential_with(), torch.zeros(12, LATENT)
    model = poutine.condition(poutine.uncondition(vae.model) if uncondition else vae.model, data={"z": z})
    arguments = {"x": X} if uncondition else {"num_data": 12}
    for parallel in (False, True):
        draws = Predictive(model, num_samples=7, parallel=parallel)(**arguments)["x"].reshape(7, 12, LENGTH)
        assert len(draws.unique(dim=0)) == 7
        fn = poutine.trace(model).get_trace(**arguments).nodes["x"]["fn"]
        draws = fn.sample((5,))
        assert draws.shape == (5, 12, LENGTH)
        assert len(draws.unique(dim=0)) == 5
        assert fn.log_prob(draws).shape == (5, 12)
        assert not torch.equal(fn.sample(), fn.sample())


def test_one_sequence_has_one_draw_of_a_weight():
    vae = sequential_with()
    layer = output_layer(vae)
    drawn = []

    def prior(module):
        drawn.append(torch.randn(()))
        return dist.Normal(drawn[-1] * torch.ones(VOCAB), 0.1).to_event(1)

    layer.bias = PyroSample(prior)
    for method in (vae.sample, vae.search):
        drawn.clear()
        method(torch.zeros(3, LATENT))
        assert len(drawn) == 1


def elbo_at(vae, x, z):
    """The ELBO's terms as Pyro scales them, at given latent values."""
    model_trace = poutine.trace(poutine.condition(vae.model, data={"z": z})).get_trace(x)
    guide_trace = poutine.trace(poutine.condition(vae.guide, data={"z": z})).get_trace(x)
    return model_trace.log_prob_sum() - guide_trace.log_prob_sum()


@pytest.mark.parametrize("name", EVERY_DECODER)
@torch.no_grad()
def test_more_padding_changes_nothing(name):
    vae = sequential_with(name).double()
    wider = torch.cat([X, torch.full((12, 5), -1)], dim=1)
    z = torch.randn(12, LATENT, dtype=torch.float64)
    torch.testing.assert_close(elbo_at(vae, wider, z), elbo_at(vae, X, z))
    for narrow, wide in zip(vae.encode(X), vae.encode(wider), strict=True):
        torch.testing.assert_close(narrow, wide)


@pytest.mark.parametrize("name", GRU)
def test_prior_on_a_weight(name):
    vae = sequential_with(name)
    map_of = {"composition-gru": lambda: vae.decoder.decoder.outer, "projected-gru": lambda: vae.decoder.decoder.map}
    owner, attribute = (map_of[name]().icnn, "slope") if name in map_of else (output_layer(vae), "bias")
    shape = getattr(owner, attribute).shape
    setattr(owner, attribute, PyroSample(dist.Normal(0.0, 1.0).expand(shape).to_event(len(shape))))
    guide = AutoNormal(vae.model)
    svi = SVI(vae.model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    assert torch.tensor([svi.step(X) for _ in range(3)]).isfinite().all()
    [site] = [key for key in guide.median(X) if key.endswith(attribute)]
    assert guide.median(X)[site].shape == shape


@torch.no_grad()
def test_diagnostics_and_arviz_take_sequences():
    vae = sequential_with()
    summary = collapse_summary(vae.model, vae.guide, X, num_samples=20, batch_size=5)
    assert summary.sizes["unit"] == LATENT
    assert summary.elbo < 0
    # A function of z and the tokens before has no Jacobian of its own.
    assert "model_fisher" in str(summary.attrs["notes"])
    whole, batched = (evidence(vae.model, vae.guide, X, num_samples=200, batch_size=size, seed=0) for size in (None, 5))
    error = (whole.log_likelihood_standard_errors.square() + batched.log_likelihood_standard_errors.square()).sqrt()
    assert ((whole.log_likelihood - batched.log_likelihood).abs() < 5 * error + 1e-4).all()
    fit = from_pyro_svi((vae.model, vae.guide), model_args=(X,), num_samples=4)
    assert fit["posterior"]["z"].shape == (1, 4, 12, LATENT)


def changed(row, column, value):
    x = X.clone()
    x[row, column] = value
    return x


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X[0], r"of tokens of shape \(N, T\) with N >= 1, got \(6,\)"),
        (changed(3, 0, VOCAB), f"from 0 to {VOCAB - 1}, or -1 as padding, got values from -1 to {VOCAB}"),
        (changed(3, 0, -2), "got values from -2"),
        (changed(0, 0, -1), "padding only after its last token, got 1 other rows, first row 0"),
        (changed(5, slice(None), -1), "row 5"),
        (torch.tensor([[3, 4, 0], [3, 0, 0]]), r"only padding \(-1\) after the end token 0 .* row 1"),
    ],
)
def test_refuses_data(x, message):
    vae = sequential_with(data_size=12)
    with pytest.raises(ValueError, match=message):
        Trace_ELBO().loss(vae.model, vae.guide, x)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: sequential_with(end_token=VOCAB),
            f"end_token .*{VOCAB - 1}, got {VOCAB}",
        ),
        (lambda: sequential_with(end_token=True), "end_token"),
        (lambda: sequential_with(end_token=0.0), "end_token"),
        (lambda: sequential_with(max_length=0), "max_length"),
        (
            lambda: SequentialVAE(DECODERS[GRU[0]](), SequenceEncoder(vocab_size=VOCAB + 1, latent_dim=LATENT)),
            "Expected one vocab_size",
        ),
    ],
)
def test_refuses(build, message):
    with pytest.raises(ValueError, match=message):
        build()
