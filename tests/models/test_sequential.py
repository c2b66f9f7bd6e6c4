"""The sequential VAE as a Pyro program: the contract of model and guide."""

import copy
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.decoders import perturb
from helpers.sequence_decoders import DECODERS, INVERSE_LIPSCHITZ_DECODERS, LATENT, VOCAB, tokens
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroSample
from pyro.poutine.util import prune_subsample_sites

from pyro_ilvae import AnnealedELBO, InverseLipschitzScheduler, SequenceEncoder, SequentialVAE, from_pyro_svi, schedules
from pyro_ilvae.diagnostics import collapse_summary, evidence

LENGTH = 6
X = tokens(12, LENGTH)
GRU = [name for name in DECODERS if "gru" in name]


def vae_with(name=GRU[0], data_size=None, **options):
    encoder = SequenceEncoder(vocab_size=VOCAB, latent_dim=LATENT, embedding_features=4, hidden_features=8)
    options = {"end_token": 0, "max_length": LENGTH} | options
    return SequentialVAE(DECODERS[name](), encoder, data_size, **options)


def moved(vae, before):
    return [key for key, value in vae.named_parameters() if torch.equal(before[key], value)]


@pytest.mark.parametrize("name", DECODERS)
def test_sites_and_plates(name):
    vae = vae_with(name, data_size=30)
    guide_trace = poutine.trace(vae.guide).get_trace(X)
    trace = prune_subsample_sites(poutine.trace(poutine.replay(vae.model, trace=guide_trace)).get_trace(X))
    trace.compute_log_prob()
    assert {node for node in trace.nodes if trace.nodes[node]["type"] == "sample"} == {"z", "x"}
    for site, event_shape in (("z", (LATENT,)), ("x", (LENGTH,))):
        assert trace.nodes[site]["fn"].event_shape == event_shape
        assert [(frame.name, frame.full_size) for frame in trace.nodes[site]["cond_indep_stack"]] == [("data", 30)]
        assert trace.nodes[site]["log_prob"].shape == (12,)
        assert trace.nodes[site]["scale"] == 30 / 12
    assert trace.nodes["x"]["is_observed"]


@pytest.mark.parametrize("name", DECODERS)
def test_every_parameter_is_trained_and_evaluation_needs_no_gradients(name):
    vae = vae_with(name, data_size=len(X))
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), TraceMeanField_ELBO())
    before = {key: value.clone() for key, value in vae.named_parameters()}
    for _ in range(3):
        svi.step(X)
    assert not moved(vae, before)
    with torch.inference_mode():
        assert svi.evaluate_loss(X) > 0


@pytest.mark.parametrize("name", DECODERS)
def test_torch_optimizer_trains_with_global_and_local_parameters(name, local_params):
    vae = vae_with(name)
    loss_fn = AnnealedELBO(Trace_ELBO(), beta=0.5)(vae.model, vae.guide)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2)
    before = {key: value.clone() for key, value in vae.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        loss_fn(X).backward()
        optimizer.step()
    assert not moved(vae, before)
    assert bool(pyro.get_param_store()) != local_params


@pytest.mark.parametrize("name", INVERSE_LIPSCHITZ_DECODERS)
def test_constant_and_kl_are_annealed_in_training(name):
    vae = vae_with(name)
    beta = schedules.linear(0.0, 1.0, num_steps=4)
    scheduler = InverseLipschitzScheduler(vae.decoder, schedules.linear(4.0, 1.0, num_steps=4))
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), AnnealedELBO(TraceMeanField_ELBO(), beta=beta))
    for _ in range(4):
        assert svi.step(X) > 0
        beta.step()
        scheduler.step()
    assert (beta.value, round(vae.decoder.inverse_lipschitz, 9)) == (1.0, 1.0)


@pytest.mark.parametrize("name", DECODERS)
def test_vectorized_particles_agree_with_a_loop(name):
    vae = vae_with(name)
    losses = {}
    for vectorize in (True, False):
        elbo = Trace_ELBO(num_particles=20, vectorize_particles=vectorize)
        draws = torch.tensor([elbo.loss(vae.model, vae.guide, X) for _ in range(8)])
        losses[vectorize] = draws.mean(), draws.var() / 8
    difference = abs(losses[True][0] - losses[False][0])
    assert difference < 5 * (losses[True][1] + losses[False][1]).sqrt()


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(name, parallel):
    vae = vae_with(name)
    draws = Predictive(vae.model, guide=vae.guide, num_samples=7, parallel=parallel)(X)
    assert draws["x"].numel() == 7 * X.numel()
    given = {"z": torch.randn(7, 5, LATENT)}
    for source in ({"num_samples": 7}, {"posterior_samples": given}):
        draws = Predictive(vae.model, **source, parallel=parallel)(num_data=5)
        assert draws["x"].shape[-3:] == (7, 5, LENGTH)
        vae.eval()
        # What is drawn is data, and its density is that of the data.
        x = draws["x"].reshape(35, LENGTH)
        trace = poutine.trace(poutine.condition(vae.model, data={"z": torch.zeros(35, LATENT)})).get_trace(x)
        assert trace.log_prob_sum().isfinite()


@pytest.mark.parametrize("name", GRU)
@pytest.mark.parametrize("parallel", [False, True])
def test_draws_are_those_of_the_given_z(name, parallel):
    vae, num_samples = perturb(vae_with(name, max_length=1)), 2000 if parallel else 200
    z = 2 * torch.randn(3, LATENT)
    predictive = Predictive(vae.model, {"z": z.expand(num_samples, 3, LATENT)}, parallel=parallel)
    drawn = predictive(num_data=3)["x"].reshape(num_samples, 3)
    with torch.no_grad():
        probs = vae.decoder.begin(z)[0].softmax(-1)
    frequencies = torch.nn.functional.one_hot(drawn, VOCAB).float().mean(0)
    assert ((frequencies - probs).abs() < 5 * (probs * (1 - probs) / num_samples).sqrt() + 1 / num_samples).all()


@pytest.mark.parametrize("name", DECODERS)
def test_draws_in_place_of_data(name):
    vae, x = perturb(vae_with(name)), X.repeat(20, 1)
    trace = poutine.trace(poutine.uncondition(vae.model)).get_trace(x)
    drawn = trace.nodes["x"]["value"]
    assert drawn.shape == x.shape
    assert (drawn != x).any(-1).float().mean() > 0.5
    again = poutine.trace(poutine.condition(vae.model, data={"z": trace.nodes["z"]["value"]})).get_trace(drawn)
    torch.testing.assert_close(trace.log_prob_sum(), again.log_prob_sum())
    for parallel in (False, True):
        draws = Predictive(poutine.uncondition(vae.model), num_samples=3, parallel=parallel)(X)["x"]
        assert draws.reshape(3, *X.shape).float().std(0).max() > 0


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_data_from_a_handler_are_data(name):
    vae, z = vae_with(name).double(), torch.randn(12, LATENT, dtype=torch.float64)
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
    vae = vae_with()
    vae.decoder.readout.output.bias = PyroSample(dist.Normal(torch.zeros(VOCAB), 1.0).to_event(1))
    with pytest.raises(ValueError, match="Expected data as the argument x of a model whose decoder has a prior"):
        poutine.trace(poutine.condition(vae.model, data={"x": X})).get_trace(num_data=12).log_prob_sum()
    assert poutine.trace(vae.model).get_trace(X).log_prob_sum().isfinite()


def test_draws_are_of_the_model_as_it_is_evaluated():
    encoder = SequenceEncoder(vocab_size=VOCAB, latent_dim=LATENT, embedding_features=4, hidden_features=8)
    decoder = DECODERS[GRU[0]](word_dropout=0.9)
    vae = perturb(SequentialVAE(decoder, encoder, end_token=0, max_length=LENGTH)).double()
    trace = poutine.trace(vae.model).get_trace(num_data=12)
    assert decoder.training
    again = poutine.condition(vae.eval().model, data={"z": trace.nodes["z"]["value"]})
    drawn = trace.nodes["x"]["value"]
    torch.testing.assert_close(trace.log_prob_sum(), poutine.trace(again).get_trace(drawn).log_prob_sum())


@pytest.mark.parametrize("uncondition", [False, True])
def test_draws_at_one_z_are_independent(uncondition):
    vae, z = vae_with(), torch.zeros(12, LATENT)
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
    vae = vae_with()
    bias = vae.decoder.readout.output
    drawn = []

    def prior(module):
        drawn.append(torch.randn(()))
        return dist.Normal(drawn[-1] * torch.ones(VOCAB), 0.1).to_event(1)

    bias.bias = PyroSample(prior)
    for method in (vae.sample, vae.search):
        drawn.clear()
        method(torch.zeros(3, LATENT))
        assert len(drawn) == 1


def test_without_data_guide_is_the_prior():
    vae = vae_with()
    fn = poutine.trace(vae.guide).get_trace(num_data=4).nodes["z"]["fn"]
    torch.testing.assert_close(fn.mean, torch.zeros(4, LATENT))
    torch.testing.assert_close(fn.variance, torch.ones(4, LATENT))
    assert vae.model().shape == (1, LENGTH)


@pytest.mark.parametrize("name", DECODERS)
def test_state_dict_pickle_and_copy_restore_the_fitted_model(name, local_params):
    vae = vae_with(name)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2)
    Trace_ELBO()(vae.model, vae.guide)(X).backward()
    optimizer.step()
    z = torch.randn(4, LATENT)
    restored = vae_with(name)
    restored.load_state_dict(vae.state_dict())
    vae.eval()
    expected = vae.encode(X)[0], vae.decoder(z, X[:4])
    for other in (restored, copy.deepcopy(vae), pickle.loads(pickle.dumps(vae))):
        pyro.clear_param_store()
        other.eval()
        assert torch.equal(other.encode(X)[0], expected[0])
        assert torch.equal(other.decoder(z, X[:4]), expected[1])


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes(name, dtype):
    vae = vae_with(name).to(dtype)
    assert Trace_ELBO().differentiable_loss(vae.model, vae.guide, X).dtype == dtype
    assert all(value.dtype == dtype for value in vae.encode(X))
    assert vae.reconstruct(X).dtype == vae.sample_prior(3).dtype == torch.long


def elbo_at(vae, x, z):
    """The ELBO's terms as Pyro scales them, at given latent values."""
    model_trace = poutine.trace(poutine.condition(vae.model, data={"z": z})).get_trace(x)
    guide_trace = poutine.trace(poutine.condition(vae.guide, data={"z": z})).get_trace(x)
    return model_trace.log_prob_sum() - guide_trace.log_prob_sum()


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("batch_size", [1, 3, 4])
@torch.no_grad()
def test_minibatch_elbo_is_unbiased_for_the_data_set(name, batch_size):
    """Exactly so over all batches with the same latent values, each of which is cut to its own longest sequence."""
    vae = vae_with(name, data_size=len(X)).double()
    z = torch.randn(12, LATENT, dtype=torch.float64)
    batches = [elbo_at(vae, *batch) for batch in zip(X.split(batch_size), z.split(batch_size), strict=True)]
    torch.testing.assert_close(torch.stack(batches).mean(), elbo_at(vae, X, z))


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_more_padding_changes_nothing(name):
    vae = vae_with(name).double()
    wider = torch.cat([X, torch.full((12, 5), -1)], dim=1)
    z = torch.randn(12, LATENT, dtype=torch.float64)
    torch.testing.assert_close(elbo_at(vae, wider, z), elbo_at(vae, X, z))
    for narrow, wide in zip(vae.encode(X), vae.encode(wider), strict=True):
        torch.testing.assert_close(narrow, wide)


@pytest.mark.parametrize("name", GRU)
def test_prior_on_a_weight(name):
    vae = vae_with(name)
    module = getattr(vae.decoder, "map", None) or getattr(vae.decoder, "composition", None)
    owner, attribute = (vae.decoder.readout.output, "bias") if module is None else (module, None)
    if attribute is None:
        owner, attribute = (module.icnn if hasattr(module, "icnn") else module.outer.icnn), "slope"
    shape = getattr(owner, attribute).shape
    setattr(owner, attribute, PyroSample(dist.Normal(0.0, 1.0).expand(shape).to_event(len(shape))))
    guide = AutoNormal(vae.model)
    svi = SVI(vae.model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    assert torch.tensor([svi.step(X) for _ in range(3)]).isfinite().all()
    [site] = [key for key in guide.median(X) if key.endswith(attribute)]
    assert guide.median(X)[site].shape == shape


@torch.no_grad()
def test_diagnostics_and_arviz_take_sequences():
    vae = vae_with()
    summary = collapse_summary(vae.model, vae.guide, X, num_samples=20, batch_size=5)
    assert summary.sizes["unit"] == LATENT
    assert summary.elbo < 0
    assert "reads the data before each position" in str(summary.attrs["notes"])
    whole, batched = (evidence(vae.model, vae.guide, X, num_samples=200, batch_size=size, seed=0) for size in (None, 5))
    error = (whole.log_likelihood_standard_errors.square() + batched.log_likelihood_standard_errors.square()).sqrt()
    assert ((whole.log_likelihood - batched.log_likelihood).abs() < 5 * error + 1e-4).all()
    fit = from_pyro_svi((vae.model, vae.guide), model_args=(X,), num_samples=4)
    assert fit["posterior"]["z"].shape == (1, 4, 12, LATENT)


def test_a_second_model_under_the_names_of_the_first_is_told():
    for expectation in (warnings.catch_warnings(), pytest.warns(UserWarning, match="another model's 'decoder")):
        vae = vae_with()
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
        with expectation:
            svi.step(X)


def changed(row, column, value):
    x = X.clone()
    x[row, column] = value
    return x


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X.float(), "Expected data at site 'x' of dtype torch.int64, got torch.float32"),
        (X[0], r"of tokens of shape \(N, T\) with N >= 1, got \(6,\)"),
        (X[:0], "with N >= 1"),
        (X.tolist(), "got list"),
        (changed(3, 0, VOCAB), f"from 0 to {VOCAB - 1}, or -1 as padding, got values from -1 to {VOCAB}"),
        (changed(3, 0, -2), "got values from -2"),
        (changed(0, 0, -1), "padding only after its last token, got 1 other rows, first row 0"),
        (changed(5, slice(None), -1), "row 5"),
        (torch.tensor([[3, 4, 0], [3, 0, 0]]), r"only padding \(-1\) after the end token 0 .* row 1"),
        (torch.cat([X, X]), "Expected at most data_size = 12 data at site 'x', got 24"),
    ],
)
def test_refuses_data(x, message):
    vae = vae_with(data_size=12)
    with pytest.raises(ValueError, match=message):
        Trace_ELBO().loss(vae.model, vae.guide, x)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: vae_with(end_token=VOCAB), f"Expected end_token to be None or a token below {VOCAB}, got {VOCAB}"),
        (lambda: vae_with(end_token=True), "end_token"),
        (lambda: vae_with(end_token=0.0), "end_token"),
        (lambda: vae_with(max_length=0), "max_length"),
        (lambda: vae_with(data_size=0), "data_size"),
        (
            lambda: SequentialVAE(DECODERS[GRU[0]](), SequenceEncoder(vocab_size=VOCAB, latent_dim=2)),
            "Expected one latent_dim",
        ),
        (
            lambda: SequentialVAE(DECODERS[GRU[0]](), SequenceEncoder(vocab_size=VOCAB + 1, latent_dim=LATENT)),
            "Expected one vocab_size",
        ),
        (lambda: vae_with().model(num_data=0), "num_data"),
    ],
)
def test_refuses(build, message):
    with pytest.raises(ValueError, match=message):
        build()
