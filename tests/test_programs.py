"""What a model and its guide are called with, and runs of several draws at once."""

import numpy as np
import pyro
import pytest
import torch
from helpers.plain_pyro_models import hierarchical_model
from pyro import distributions as dist
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from pyro_ilvae._programs import Arguments, Runs, drawn, sample_sites, site_log_prob, site_shape

# Arguments

X = torch.arange(10.0).reshape(5, 2)
SHARED = [
    0.5,
    3,
    True,
    None,
    "mean",
    b"raw",
    nn.Linear(2, 5),
    torch.tensor(1.0),
    np.float64(2.0),
    np.array(2.0),
    {},
    {5},
]


def some_arguments():
    return Arguments.of((X, X.long()[:, 0], torch.zeros(2, 5), 0.5), {"y": -X, "scale": torch.tensor(2.0), "name": "a"})


@pytest.mark.parametrize("batch_size", [1, 2, 4, 5, 6, None])
def test_batches_together_are_the_whole(batch_size):
    whole = some_arguments()
    parts = list(whole.batches(batch_size))
    assert [part.num_data for part in parts[:-1]] == [batch_size] * (len(parts) - 1)
    assert 0 < parts[-1].num_data <= (batch_size or 5)
    for i in (0, 1):
        assert torch.equal(torch.cat([part.args[i] for part in parts]), whole.args[i])
    assert torch.equal(torch.cat([part.kwargs["y"] for part in parts]), whole.kwargs["y"])
    for part in parts:
        assert part.args[2:] == whole.args[2:]
        assert {name: part.kwargs[name] for name in ("scale", "name")} == {"scale": whole.kwargs["scale"], "name": "a"}


@pytest.mark.parametrize("shared", SHARED, ids=lambda value: type(value).__name__)
def test_what_all_data_share_is_passed_as_it_is(shared):
    for part in Arguments.of((X, shared), {"other": shared}).batches(2):
        assert part.args[1] is shared
        assert part.kwargs["other"] is shared
    assert Arguments.of((shared, X), None).num_data == 5


def test_a_tensor_is_short_for_a_tuple():
    assert Arguments.of(X, None) == Arguments.of((X,), {}) == ((X,), {}, None)
    assert Arguments.of((), {"x": X}).num_data == 5


@pytest.mark.parametrize(
    "index", [slice(1, 3), torch.tensor([4, 0, 4]), torch.tensor([True, False, True, False, False])]
)
def test_selected_data(index):
    assert Arguments.of((X,), {})._replace(size=5).select(index).num_data == len(X[index])
    selected = some_arguments().select(index)
    assert torch.equal(selected.args[0], X[index])
    assert torch.equal(selected.kwargs["y"], -X[index])
    assert torch.equal(selected.args[2], torch.zeros(2, 5))


PACKED = pack_sequence([torch.zeros(n) for n in (3, 3, 2, 1, 1)])
OVER_DATA = [list(range(5)), tuple(X), range(5), X.numpy(force=True), np.arange(5), PACKED]


@pytest.mark.parametrize("value", OVER_DATA, ids=lambda value: type(value).__name__)
def test_values_of_the_data_that_are_no_tensor_are_named(value):
    kind = type(value).__name__
    for arguments, name in [
        (Arguments.of((X, value), None), r"model_args\[1\]"),
        (Arguments.of((value, X), None), r"model_args\[0\]"),
        (Arguments.of((X,), {"lengths": value}), r"model_kwargs\['lengths'\]"),
    ]:
        match = rf"Expected {name} to be a tensor over the 5 data .*got {kind} of 5 values"
        with pytest.raises(TypeError, match=match):
            list(arguments.batches(2))
        if value is PACKED:
            with pytest.raises(TypeError, match=match):
                list(arguments.batches(None))
        else:
            assert list(arguments.batches(None)) == [arguments]
    with pytest.raises(TypeError, match=rf"Expected model_args\[0\] to be a tensor over the data .*got {kind} of 5"):
        list(Arguments.of((value,), None).batches(2))


def test_data_outside_of_the_arguments_are_in_no_part():
    outside = Arguments.of((torch.zeros(2), 0.5), None)._replace(size=5)
    assert list(outside.batches(None)) == [outside]
    with pytest.raises(
        ValueError, match=r"Expected the 5 data in model_args .* got tensors with first dimensions \[2\]"
    ):
        list(outside.batches(2))


def test_sequences_of_another_length_are_passed_as_they_are():
    widths = [64, 64]
    assert all(part.args[1] is widths for part in Arguments.of((X, widths), None).batches(2))
    assert next(Arguments.of((X[:1], [0.1]), None).batches(1)).args[1] == [0.1]


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "match"),
    [
        ([X], None, TypeError, "Expected model_args to be a tensor or a tuple, got list"),
        (X.numpy(), [X], TypeError, "Expected model_kwargs to be a mapping from names, got list"),
        (X, {1: X}, TypeError, "Expected model_kwargs to be a mapping from names, got the key 1"),
        (PACKED, None, TypeError, "Expected model_args to be a tensor or a tuple, got PackedSequence"),
        (X, [X], TypeError, "Expected model_kwargs to be a mapping from names, got list"),
        ((), None, TypeError, "Expected a tensor with data along its first dimension .* got no arguments"),
        ((0.5,), {"a": None}, TypeError, r"got model_args\[0\] = float, model_kwargs\['a'\] = NoneType"),
        (torch.tensor(1.0), None, TypeError, r"got model_args\[0\] = Tensor"),
        (X[:0], None, ValueError, "Expected at least one datum in model_args, got none"),
    ],
)
def test_arguments_without_data(args, kwargs, error, match):
    with pytest.raises(error, match=match):
        list(Arguments.of(args, kwargs).batches(2))


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, True])
def test_batch_size_is_checked(batch_size):
    with pytest.raises(ValueError, match="Expected batch_size to be an int >= 1"):
        list(Arguments.of(X, None).batches(batch_size))


# Runs


def runs_of(model, guide, *args, **options):
    return Runs(model, guide, Arguments.of(args, None), **options)


def mixture(x):
    shift = pyro.sample("shift", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        kind = pyro.sample("kind", dist.Categorical(torch.tensor([0.3, 0.5, 0.2])))
        pyro.sample("x", dist.Normal(shift + 2.0 * kind, 1.0), obs=x)


def shift_guide(x):
    pyro.sample("shift", dist.Normal(0.5, 1.5))


def test_a_run_has_its_draws_to_the_left():
    runs = runs_of(hierarchical_model, AutoNormal(hierarchical_model), torch.randn(4, 3, 2))
    assert runs.nesting == 2
    assert runs.enumerated_sites == []
    guide_trace, model_trace = runs.traces(7)
    shapes = {site["name"]: site_shape(site) for site in sample_sites(runs.model_trace)}
    assert shapes["loc"] == ((4, 1), ("group", None), (2,))
    assert shapes["shifted"] == ((4, 3), ("group", "datum"), (2,))
    for name in ("scale", "weight", "loc", "local"):
        value = model_trace.nodes[name]["value"]
        assert value is guide_trace.nodes[name]["value"]
        assert runs.spread(value, shapes[name], 7).shape == (7, *(1, 1, *shapes[name].batch)[-2:], *shapes[name].event)
    assert site_log_prob(model_trace.nodes["x"]).shape == (7, 4, 3)
    assert len(runs.traces(1)[1].nodes["scale"]["value"].shape) == 0


def test_a_site_has_the_batch_shape_of_its_distribution_and_its_plates():
    def model():
        pyro.sample("outside", dist.Normal(torch.zeros(3), 1.0), obs=torch.tensor(0.0))
        with pyro.plate("rows", 2, dim=-2):
            pyro.sample("inside", dist.Normal(torch.zeros(3), 1.0), obs=torch.tensor(0.0))
            pyro.deterministic("vector", torch.zeros(2, 1, 4))
            pyro.factor("penalty", torch.zeros(2, 1))

    nodes = runs_of(model, lambda: None).model_trace.nodes
    assert site_shape(nodes["outside"]) == ((3,), (None,), ())
    assert site_shape(nodes["inside"]) == ((2, 3), ("rows", None), ())
    assert site_shape(nodes["inside"]).kept == [("rows", 2), (None, 3)]
    assert site_shape(nodes["vector"]) == ((2, 1), ("rows", None), (4,))
    assert site_shape(nodes["vector"]).kept == [("rows", 2)]
    assert site_shape(nodes["penalty"]).batch == (2, 1)


def test_sites_that_the_guide_leaves_out_are_enumerated():
    x = torch.randn(4)
    runs = runs_of(mixture, shift_guide, x)
    assert runs.enumerated_sites == ["kind"]
    assert runs.model_trace.nodes["kind"]["value"].shape == (4,)
    _, trace = runs.traces(5)
    log_prob = site_log_prob(trace.nodes["x"])
    assert log_prob.shape == (3, 5, 4)
    shift = trace.nodes["shift"]["value"]
    expected = dist.Normal(shift + 2.0 * torch.arange(3.0)[:, None, None], 1.0).log_prob(x)
    torch.testing.assert_close(log_prob, expected)
    # Also where the model marks them; conditioned sites then count as observed.
    marked = runs_of(pyro.infer.config_enumerate(mixture), shift_guide, x)
    factors = marked.factors(5, {"shift": shift})
    torch.testing.assert_close(site_log_prob(factors.nodes["x"]), expected)
    draws = marked.draw_enumerated(5, {"shift": shift})
    assert {name: value.shape for name, value in draws.items()} == {"kind": (5, 4)}


def test_enumerated_sites_of_a_chain_have_dimensions_of_their_own():
    def chain():
        state = torch.tensor(0)
        for t in pyro.markov(range(5)):
            state = pyro.sample(
                f"state_{t}", dist.Categorical(torch.eye(2)[state] + 0.5), infer={"enumerate": "parallel"}
            )

    runs = runs_of(chain, lambda: None)
    own = {site["infer"]["_enumerate_dim"] for site in sample_sites(runs.traces(3)[1])}
    taken_over = {site["infer"]["_enumerate_dim"] for site in sample_sites(runs.factors(3, {}))}
    assert len(own) == 5
    assert len(taken_over) == 2


@pytest.mark.parametrize("num_draws", [1, 6])
def test_given_values_take_the_place_of_draws(num_draws):
    runs = runs_of(mixture, shift_guide, torch.randn(4))
    shift = torch.randn(num_draws, 1) if num_draws > 1 else torch.randn(())
    guide_trace, values = runs.draw(num_draws, {"shift": shift, "another": shift})
    assert guide_trace.nodes["shift"]["value"] is values["shift"] is values["another"] is shift
    assert runs.traces(num_draws, {"shift": shift})[1].nodes["shift"]["value"] is shift
    # A guide in place of the own one need not draw.
    guide_trace, values = runs.draw(num_draws, {"shift": shift}, lambda x: None)
    assert not sample_sites(guide_trace)
    assert values == {"shift": shift}


def test_runs_are_in_evaluation_mode_and_out_of_reach():
    class Model(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.modes = []

        def forward(self, x):
            self.modes.append(self.training)
            pyro.sample("z", dist.Normal(0.0, 1.0))

        def guide(self, x):
            self.forward(x)

    model = Model()
    with poutine.trace() as around, poutine.scale(scale=0.5), poutine.condition(data={"z": torch.tensor(3.0)}):
        runs = runs_of(model, model.guide, torch.zeros(2))
        _, trace = runs.traces(4)
    assert not around.trace.nodes
    assert trace.nodes["z"]["scale"] == 1.0
    assert not trace.nodes["z"]["is_observed"]
    assert model.modes == [False] * 4
    assert model.training


# Plates


def test_random_subsamples_are_held():
    seen = []

    def model():
        with pyro.plate("data", 100, subsample_size=5) as index:
            seen.append(index)
            pyro.sample("z", dist.Normal(0.0, 1.0))

    runs = runs_of(model, model)
    seen.clear()
    runs.traces(3)
    assert all(torch.equal(index, torch.arange(5)) for index in seen)
    assert len(seen) == 2
    assert torch.equal(runs.indices["data"], torch.arange(5))


def test_the_guide_follows_the_indices_that_the_model_chooses():
    chosen, seen = torch.tensor([40, 7, 99]), []

    def model():
        with pyro.plate("data", 100, subsample=chosen):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide():
        with pyro.plate("data", 100, subsample_size=3) as index:
            pyro.sample("z", dist.Normal(index.float(), 1e-4))
            seen.append(index)

    runs = runs_of(model, guide)
    runs.traces(2)
    assert all(torch.equal(index, chosen) for index in seen[1:])
    torch.testing.assert_close(drawn(runs.guide_trace)["z"], chosen.float(), atol=0.01, rtol=0.0)


# Whether draws can be made together


def uses(**change):
    """A model and its guide, which treat each draw on its own unless a ``change`` says otherwise."""
    change = {name: lambda z: z for name in ("scale", "site", "factor", "guide")} | change

    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.deterministic("site", change["site"](z.exp()))
        pyro.factor("penalty", change["factor"](-z.square().sum(-1)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(change["scale"](z[..., 0]), 1.0), obs=x)

    def guide(x):
        u = pyro.sample("u", dist.Normal(torch.zeros(2), 1.0).to_event(1), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(change["guide"](2 * u), event_dim=1))

    return model, guide


@pytest.mark.parametrize(
    ("change", "vectorizes"),
    [
        ({}, True),
        ({"scale": lambda z: z.mean()}, False),
        ({"scale": lambda z: z + torch.randn(())}, False),
        ({"site": lambda z: z.sum()}, False),
        ({"site": lambda z: z.flatten()[:2]}, False),
        ({"site": lambda z: torch.tensor(float("nan"))}, True),
        ({"factor": lambda f: f.sum()}, False),
        ({"guide": lambda u: u * (1 + 1e-6 * (u.dim() > 1))}, True),  # as rounding differs between shapes
        ({"guide": lambda u: u.flip(0)}, False),
        ({"guide": lambda u: u - u.mean(0)}, False),
        ({"guide": lambda u: u.view(2)}, False),
    ],
)
def test_draws_together_are_compared_with_draws_alone(change, vectorizes):
    before = torch.get_rng_state()
    model, guide = uses(**change)
    runs = runs_of(model, guide, torch.zeros(3))
    state = torch.get_rng_state()
    assert runs.vectorizes == vectorizes
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(state, before)
    assert runs.passes(10, None, 4) == ([4, 4, 2] if vectorizes else [1] * 10)
    assert runs.passes(10, 7, 4) == ([7, 3] if vectorizes else [1] * 10)


def test_enumerated_draws_are_compared():
    def wrong(x):
        locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            kind = pyro.sample("kind", dist.Categorical(torch.ones(2)))
            pyro.sample("x", dist.Normal(locs.reshape(-1)[kind], 1.0), obs=x)  # the components of the first draw

    def guide(x):
        pyro.sample("locs", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    assert runs_of(mixture, shift_guide, torch.zeros(3)).vectorizes
    assert not runs_of(wrong, guide, torch.zeros(3)).vectorizes


def test_passes_of_one_draw_need_no_comparison():
    runs = runs_of(*uses(), torch.zeros(3))
    runs.compared = [pytest.fail]
    assert runs.passes(3, 1, 100) == runs.passes(3, None, 0) == [1, 1, 1]
    assert runs.passes(1, None, 100) == [1]


def test_draws_are_compared_without_gradients_and_with_validation_whatever_the_caller_does():
    runs, seen = runs_of(hierarchical_model, AutoNormal(hierarchical_model), torch.randn(2, 3, 2)), []

    def watched(num_draws, given):
        seen.append((num_draws, torch.is_grad_enabled(), dist.Normal(0.0, 1.0)._validate_args))
        return runs.traces(num_draws, given)

    with pyro.validation_enabled(False):
        assert runs.same_alone(watched)
        assert runs.same_alone(watched, runs.traces(5), 5)
    assert {call[1:] for call in seen} == {(False, True)}
    assert seen[0][0] == 2
    assert {call[0] for call in seen[1:]} == {1}
    assert len(seen) <= 12
