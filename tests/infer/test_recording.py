"""What a part computes while a graph is recorded: the same, from tensors that may change."""

import pyro
import pytest
import torch
from helpers.decoders import DECODERS, LATENT

from pyro_ilvae import BrenierMap, Nats, SequenceEncoder, likelihoods
from pyro_ilvae._recording import is_recording, recording
from pyro_ilvae.infer.recording import record
from pyro_ilvae.infer.value_reads import NotRecordableError


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", DECODERS)
def test_decoders_are_the_same_while_recording(name, dtype):
    decoder = DECODERS[name]().to(dtype)
    z = torch.randn(7, LATENT, dtype=dtype)
    expected = decoder(z)
    with recording():
        assert is_recording()
        torch.testing.assert_close(decoder(z), expected)
    assert not is_recording()


@pytest.mark.parametrize("likelihood", [likelihoods.Normal(0.5, "learned"), likelihoods.Bernoulli()])
def test_a_recorded_constant_is_the_constant_of_now(likelihood):
    brenier = BrenierMap(3, 1e-3)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.float64):
        brenier.to(dtype)
    for value in (
        0.1,
        Nats(0.3, likelihood),
        Nats(0.3, likelihood, unit=2.0) if likelihood_is_reference(likelihood) else 7,
    ):
        brenier.inverse_lipschitz = value
        if isinstance(value, Nats):
            brenier.nats = 0.7
        with recording():
            assert brenier._constant.item() == pytest.approx(brenier.inverse_lipschitz, rel=1e-6)


def likelihood_is_reference(likelihood):
    return isinstance(likelihood, likelihoods.Bernoulli)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_sequences_are_encoded_the_same_while_recording(num_layers):
    encoder = SequenceEncoder(
        vocab_size=5, latent_dim=2, embedding_features=3, hidden_features=4, num_layers=num_layers
    )
    x = torch.randint(0, 5, (2, 6, 7))
    for row in x.flatten(0, 1)[1:]:
        row[int(torch.randint(1, 8, ())) :] = -1
    expected = encoder(x)
    with recording():
        torch.testing.assert_close(encoder(x), expected)


def test_a_graph_leaves_random_state_and_inputs_as_they_were():
    x, weight = torch.ones(3), torch.ones(3, requires_grad=True)
    state = torch.get_rng_state()

    def loss():
        x.add_(1.0)
        return (weight * torch.randn(3) * x).sum()

    recorded = record(loss, [x], [weight])
    assert torch.equal(x, torch.ones(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert recorded.written == [0]
    value, holds, gradient = recorded.graph(x, weight, *recorded.constants)
    assert torch.equal(x, torch.full((3,), 2.0))
    torch.set_rng_state(state)
    torch.testing.assert_close(gradient, 2 * torch.randn(3))
    torch.testing.assert_close(value, gradient.sum())
    assert holds


@pytest.mark.parametrize(
    "loss", [lambda x: x[x > 0].sum(), lambda x: x.nonzero().sum() + x.sum(), lambda x: x.masked_select(x > 0).sum()]
)
def test_shapes_that_depend_on_values_are_refused(loss):
    x = torch.tensor([1.0, -1.0, 2.0], requires_grad=True)
    with pytest.raises(NotRecordableError, match="depends on values"):
        record(lambda: loss(x), [], [x])


def test_numbers_that_pyro_sums_stay_tensors():
    x, weight = torch.tensor([1.0, 2.0]), torch.ones((), requires_grad=True)
    elbo = pyro.infer.Trace_ELBO()

    def model():
        pyro.sample("x", pyro.distributions.Normal(weight, 1.0).expand([2]).to_event(1), obs=x)

    recorded = record(lambda: elbo.differentiable_loss(model, lambda: None), [x], [weight])
    for value in (1.0, 5.0):
        x.fill_(value)
        loss, holds, _ = recorded.graph(x, weight, *recorded.constants)
        assert holds
        assert loss.item() == pytest.approx(elbo.loss(model, lambda: None))
