"""What every diagnostic of a model and a guide refuses, by the name of the argument."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.identity_decoder import DECODER, model
from torch import nn

from pyro_ilvae.diagnostics import (
    active_units,
    collapse_summary,
    evidence,
    fisher_bound,
    guide_fisher_divergence,
    kl_divergence,
    kl_per_dimension,
    mutual_information,
    posterior_fisher_divergence,
    posterior_fisher_divergence_of_draws,
)

X = torch.linspace(-1.0, 1.0, 5)


def guide(x, shift=0.0):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.5))


def nothing(*_, **__):
    pass


class Program(nn.Module):
    def forward(self, x):
        return model(x)


def with_draws(model, guide, *args, **options):
    return posterior_fisher_divergence_of_draws(model, {"z": torch.randn(6, 5)}, *args, **options)


def with_decoder(model, guide, *args, **options):
    return fisher_bound(model, guide, *args, decoder=DECODER, **options)


OF_PAIRS = (
    active_units,
    collapse_summary,
    evidence,
    guide_fisher_divergence,
    kl_divergence,
    kl_per_dimension,
    mutual_information,
    posterior_fisher_divergence,
    with_decoder,
)
ALL = (*OF_PAIRS, with_draws)
IN_PASSES = (evidence, posterior_fisher_divergence, with_decoder, mutual_information, with_draws)


def refused(cases, diagnostics):
    return [
        pytest.param(diagnostic, args, options, message, id=f"{diagnostic.__name__}-{message}-{i}")
        for diagnostic in diagnostics
        for i, (args, options, message) in enumerate(cases)
    ]


@pytest.mark.parametrize(
    ("diagnostic", "args", "options", "message"),
    [
        *refused([((model, guide, X), {"batch_size": size}, "batch_size") for size in (0, -1, 2.5, "a", True)], ALL),
        *refused([((model, guide, X), {"plate": plate}, "plate") for plate in (3, ["data"], "rows", b"data")], ALL),
        *refused([((program, guide, X), {}, "model") for program in (None, "m", Program, X, (model, guide))], ALL),
        *refused([((model, program, X), {}, "guide") for program in (None, "m", Program, X)], OF_PAIRS),
        *refused([((guide, model, X), {}, "model and guide in this order")], OF_PAIRS),
        *refused([((model, guide), {}, "model_args"), ((lambda x, w: model(x), guide, X), {}, "model_args")], ALL),
        *refused([((model, guide, args), {}, "model_args") for args in ((X, X, X), (None,), ("a",))], ALL),
        *refused([((model, guide, torch.tensor(1.0)), {}, "model_args")], ALL),
        *refused([((model, guide, X), {"model_kwargs": k}, "model_kwargs") for k in ({"q": 1}, [1], {1: 2}, X)], ALL),
        *refused([((model, guide, X), {"model_kwargs": {"x": X}}, "model_kwargs")], ALL),
        *refused([((nothing, nothing, X), {}, "model"), ((nothing, guide, X), {}, "model")], OF_PAIRS),
        *refused([((model, nothing, X), {}, "guide")], OF_PAIRS),
        *refused([((model, guide, X), {"seed": seed}, "seed") for seed in ("a", 2.5, True, X)], OF_PAIRS),
        *refused([((model, guide, X), {"num_samples": n}, "num_samples") for n in (0, -3, 2.5, "a", None)], OF_PAIRS),
        *refused([((model, guide, X), {"samples_per_pass": n}, "samples_per_pass") for n in (0, "a", 2.5)], IN_PASSES),
        *refused(
            [((model, guide, X), {"site": site}, "site") for site in (5, 0, "", ["z"], "x", b"z")],
            (active_units, guide_fisher_divergence, kl_divergence, kl_per_dimension, mutual_information),
        ),
        *refused(
            [((model, guide, X), {"sites": sites}, "sites") for sites in ("z", 5, [5], ["y"], [], ["z", "z"])],
            (posterior_fisher_divergence, with_draws),
        ),
    ],
)
def test_refuses(diagnostic, args, options, message):
    with pytest.raises((ValueError, TypeError), match=rf"Expected .*{message}"):
        diagnostic(*args, **options)


@pytest.mark.parametrize("diagnostic", OF_PAIRS)
def test_an_error_of_the_model_itself_stays(diagnostic):
    def broken(x):
        raise TypeError("a mistake in the model")

    with pytest.raises(TypeError, match=r"^a mistake in the model"):
        diagnostic(broken, guide, X)
