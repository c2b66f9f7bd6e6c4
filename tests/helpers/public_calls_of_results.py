"""Right calls of the public functions that look at fits: diagnostics, conversion to ArviZ, plots, and of data sets."""

import tempfile
from functools import cache
from pathlib import Path

import matplotlib.figure
import pyro
import pyro.distributions as dist
import torch
from helpers.public_calls import Call, D, K, N, composition, projected, vae, x
from helpers.wrong_values import Other
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO

import pyro_ilvae as ilvae
from pyro_ilvae import datasets, diagnostics, likelihoods, plots
from pyro_ilvae.datasets import text
from pyro_ilvae.datasets.vocabulary import Vocabulary


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(K), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True).expand(*z.shape[:-1], D), 1.0).to_event(1), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x[:, :K], 0.5).to_event(1))


def svi():
    return SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())


def prior(n):
    return torch.randn(n, K)


def monitor():
    return ilvae.CollapseMonitor(model, guide, x(), num_samples=2)


@cache
def chains():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mcmc = MCMC(NUTS(model), num_samples=4, warmup_steps=2, disable_progbar=True)
        mcmc.run(x())
    return mcmc


@cache
def documents():
    path = Path(tempfile.mkdtemp()) / "documents.txt"
    path.write_text("a b\n" * 20)
    return path


@cache
def images():
    path = Path(tempfile.mkdtemp()) / "images-idx1-ubyte"
    path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9]))
    return path


_PROGRAMS = {"model": model, "guide": guide, "model_kwargs": {}, "batch_size": 2, "seed": 0, "plate": "data"}
_LABELS = ["ab", None, [0, 1], [0.5, 1.0, 1.0, 1.0], [[0, 1], [1, 0]]]


def of_programs(name, **more):
    function = getattr(diagnostics, name)
    return Call(lambda: (function, _PROGRAMS | {"model_args": x()} | more))


def axes():
    return matplotlib.figure.Figure().subplots()


def of_plot(name, wrong=None, **arguments):
    return Call(lambda: (getattr(plots, name), {"ax": axes(), **arguments}), wrong or {})


def _fisher_bound():
    own = vae(composition)
    programs = {"model": own.model, "guide": own.guide, "model_args": x(), "decoder": own.decoder, "site": "z"}
    return diagnostics.fisher_bound, _PROGRAMS | programs | {"num_samples": 5, "samples_per_pass": 2}


CALLS = {
    "kl_divergence": of_programs("kl_divergence", site="z", num_samples=5),
    "kl_per_dimension": of_programs("kl_per_dimension", site="z", num_samples=5),
    "active_units": of_programs("active_units", site="z", threshold=0.01, num_samples=5),
    "mutual_information": of_programs(
        "mutual_information", site="z", num_samples=5, aggregate_size=3, samples_per_pass=2
    ),
    "guide_fisher_divergence": of_programs("guide_fisher_divergence", site="z", num_samples=5),
    "posterior_fisher_divergence": of_programs(
        "posterior_fisher_divergence", sites=["z"], num_samples=5, samples_per_pass=2
    ),
    "fisher_bound": Call(_fisher_bound, {"decoder": ["ab", 3, ilvae.MLPDecoder]}),
    "posterior_fisher_divergence_of_draws": Call(
        lambda: (
            diagnostics.posterior_fisher_divergence_of_draws,
            {
                "model": model,
                "draws": {"z": torch.randn(6, N, K)},
                "model_args": x(),
                "model_kwargs": {},
                "sites": ["z"],
                "num_chains": 2,
                "batch_size": 2,
                "samples_per_pass": 2,
                "plate": "data",
            },
        )
    ),
    "evidence": of_programs("evidence", num_samples=5, samples_per_pass=2),
    "collapse_summary": of_programs(
        "collapse_summary",
        sites=["z"],
        measures=["kl", "active_units"],
        collapsed_below=0.01,
        active_from=0.1,
        epsilon=0.01,
        delta=0.01,
        threshold=0.01,
        num_samples=5,
    ),
    "mean_fisher_divergence": Call(
        lambda: (
            diagnostics.mean_fisher_divergence,
            {
                "decoder": projected(),
                "likelihood": likelihoods.Normal(0.5),
                "latent_dim": K,
                "num_samples": 5,
                "scale": 1.0,
            }
            | {"samples_per_pass": 2, "seed": 0},
        ),
        {"decoder": ["ab", 3, None, ilvae.MLPDecoder, projected(context_dim=3)]},
    ),
    "separation": Call(
        lambda: (
            diagnostics.separation,
            {
                "decoder": projected(),
                "likelihood": likelihoods.Normal(0.5),
                "latent_dim": K,
                "num_pairs": 5,
                "num_samples": 5,
            }
            | {"scale": 1.0, "samples_per_pass": 2, "seed": 0},
        ),
        {"decoder": ["ab", 3, None, ilvae.MLPDecoder, projected(context_dim=3)]},
    ),
    "guaranteed_information": Call(
        lambda: (
            diagnostics.guaranteed_information,
            {"model_or_decoder": projected(), "likelihood": likelihoods.Normal(0.5), "num_samples": 5}
            | {"prior": dist.Normal(torch.zeros(K), 1.0).to_event(1), "samples_per_pass": 2, "seed": 0},
        ),
        {"model_or_decoder": ["ab", 3, None, ilvae.MLPDecoder], "prior": ["ab", 3, dist.Normal, dist.Normal(0.0, 1.0)]},
    ),
    "guaranteed_information of a model": Call(
        lambda: (diagnostics.guaranteed_information, {"model_or_decoder": vae(projected), "num_samples": 5}),
        {"model_or_decoder": ["ab", ilvae.VAE]},
    ),
    "lipschitz_audit": Call(
        lambda: (
            diagnostics.lipschitz_audit,
            {"decoder": projected(), "latent_dim": K, "num_samples": 5, "num_worst": 2, "steps": 2, "scale": 1.0}
            | {"samples_per_pass": 2, "seed": 0},
        ),
        {"decoder": ["ab", 3, None, ilvae.MLPDecoder, projected(context_dim=3)]},
    ),
    **{
        f"{function.__name__} with a sampler": Call(
            lambda function=function: (
                function,
                {"decoder": projected(), "likelihood": likelihoods.Normal(0.5), "sampler": prior},
            )
        )
        for function in (diagnostics.mean_fisher_divergence, diagnostics.separation)
    },
    "lipschitz_audit with a sampler": Call(
        lambda: (
            diagnostics.lipschitz_audit,
            {
                "decoder": projected(),
                "sampler": prior,
                "num_samples": 5,
                "num_worst": 2,
                "steps": 2,
            },
        ),
        {"decoder": ["ab", 3, None]},
    ),
    "active_units_of_draws": Call(
        lambda: (diagnostics.active_units_of_draws, {"draws": torch.randn(5, N, K), "threshold": 0.01}),
        {"draws": ["ab", None, 3, torch.ones(5), torch.full((5, N, K), torch.nan)]},
    ),
    "bits_per_dimension": Call(
        lambda: (diagnostics.bits_per_dimension, {"log_likelihood": torch.randn(N), "num_dimensions": 3})
    ),
    "perplexity": Call(
        lambda: (diagnostics.perplexity, {"log_likelihood": -torch.rand(N), "num_tokens": torch.full((N,), 3)})
    ),
    "cluster_agreement": Call(
        lambda: (diagnostics.cluster_agreement, {"labels": [0, 1, 1, 0], "predicted": [1, 0, 0, 1]}),
        {"labels": _LABELS, "predicted": _LABELS},
    ),
    "match_components": Call(
        lambda: (diagnostics.match_components, {"reference": [0, 1, 1, 0], "other": [1, 0, 0, 1]}),
        {"reference": _LABELS, "other": _LABELS},
    ),
    "component_usage": Call(
        lambda: (
            diagnostics.component_usage,
            {"probs": torch.ones(N, 3) / 3, "weights": torch.ones(3) / 3, "threshold": 0.01},
        ),
        {"weights": ["ab", torch.ones(3), torch.ones(2) / 2, [torch.nan] * 3, [-1.0, 1.0, 1.0]]},
    ),
    "coinciding_components": Call(
        lambda: (
            diagnostics.coinciding_components,
            {"loc": torch.randn(3, K), "scale": torch.ones(3, K), "threshold": 0.5},
        ),
        {
            "loc": ["ab", None, torch.ones(3), torch.full((3, K), torch.nan)],
            "scale": ["ab", None, -torch.ones(3, K), torch.zeros(3, K), [1.0], torch.full((3, K), torch.nan)],
            "threshold": [-0.5, 1.5, "a", torch.nan],
        },
    ),
    "collapsed_dimensions": Call(
        lambda: (diagnostics.collapsed_dimensions, {"kl": torch.rand(N, K), "epsilon": 0.01, "delta": 0.01})
    ),
    "collapsed_fraction": Call(lambda: (diagnostics.collapsed_fraction, {"kl": torch.rand(N), "epsilons": [0.1]})),
    "linear_reference": Call(
        lambda: (
            diagnostics.linear_reference,
            {"x": x(), "noise_scale": 0.5, "latent_dim": K, "inverse_lipschitz": 1.0, "nats": None},
        ),
        {"latent_dim": [0, -1, 2.5, "a", 7], "x": ["ab", None, torch.full((N, D), torch.nan), 3], "nats": []},
    ),
    "linear_reference in nats": Call(
        lambda: (diagnostics.linear_reference, {"x": x(), "noise_scale": 0.5, "latent_dim": K, "nats": 1.0}),
        {"latent_dim": [0], "x": ["ab"]},
    ),
    "from_pyro_svi": Call(
        lambda: (
            ilvae.from_pyro_svi,
            {
                "svi_or_pair": svi(),
                "model_args": x(),
                "model_kwargs": {},
                "num_samples": 3,
                "samples_per_pass": 2,
                "prior": True,
                "posterior_predictive": True,
                "log_likelihood": "integrated",
                "num_importance_samples": 5,
                "plate": "data",
                "coords": {"data": [1, 2, 3, 4]},
                "dims": {"z": ["k"]},
                "constant_data": {"c": torch.ones(N)},
                "seed": 0,
            },
        ),
        {"log_likelihood": ["typo", 3, Other()]},
    ),
    "from_pyro_mcmc": Call(
        lambda: (
            ilvae.from_pyro_mcmc,
            {
                "mcmc": chains(),
                "model_args": x(),
                "model_kwargs": {},
                "model": model,
                "samples_per_pass": 2,
                "prior": True,
                "posterior_predictive": True,
                "log_likelihood": False,
                "plate": "data",
                "coords": {"data": [1, 2, 3, 4]},
                "dims": {"z": ["k"]},
                "constant_data": {"c": torch.ones(N)},
                "seed": 0,
            },
        ),
        {"model": ["ab", 3], "log_likelihood": ["typo", 3, Other()]},
    ),
    "binarize": Call(
        lambda: (datasets.binarize, {"x": torch.rand(N, D), "seed": 0}), {"x": ["ab", None, torch.full((N, D), 2.0)]}
    ),
    "binarize by a threshold": Call(
        lambda: (datasets.binarize, {"x": torch.rand(N, D), "threshold": 0.5}), {"x": [], "threshold": [-1.0, "a", 2.0]}
    ),
    "gaussian_mixture": Call(
        lambda: (
            datasets.gaussian_mixture,
            {"num_data": 4, "scale": 1.0, "centers": [(0.0, 0.0), (1.0, 1.0)], "seed": 0},
        )
    ),
    "gaussian_mixture_accuracy": Call(
        lambda: (datasets.gaussian_mixture_accuracy, {"scale": 1.0, "centers": [(0.0, 0.0), (1.0, 1.0)]})
    ),
    "read_idx": Call(lambda: (datasets.read_idx, {"path": images()}), {"path": [3.5, documents()]}),
    "text.from_file": Call(
        lambda: (
            text.from_file,
            {"path": documents(), "level": "words", "max_vocabulary": 5, "max_length": 3, "too_long": "truncate"}
            | {"test_fraction": 0.2, "seed": 0, "errors": "strict"},
        ),
        {"path": [3.5], "errors": ["typo", 3]},
    ),
    "text.from_files": Call(
        lambda: (
            text.from_files,
            {
                "train": documents(),
                "test": documents(),
                "validation": documents(),
                "level": "words",
                "max_vocabulary": 5,
                "max_length": 3,
            }
            | {"too_long": "truncate", "errors": "strict"},
        ),
        {"train": [3.5, None], "test": [3.5, None], "errors": ["typo", 3]},
    ),
    "text.read_documents": Call(
        lambda: (text.read_documents, {"path": documents(), "errors": "strict"}), {"path": [3.5], "errors": ["typo", 3]}
    ),
    "text.Vocabulary": Call(
        lambda: (Vocabulary, {"level": "words", "tokens": ("<end>", "<unk>", "a")}),
        {"tokens": ["ab", None, 3, ("a", "a"), (3, 4)]},
    ),
    "Vocabulary.of": Call(
        lambda: (Vocabulary.of, {"documents": ["a b"], "level": "words", "max_size": 3, "join": " ".join}),
        {"documents": ["a b", None, 3, [3]]},
    ),
    "Vocabulary.encode": Call(
        lambda: (
            Vocabulary.of(["a b"], "words").encode,
            {"documents": ["a b"], "max_length": 3, "too_long": "truncate", "unknown": "replace"},
        ),
        {"documents": ["a b", None, 3, [3]], "unknown": ["typo", 3]},
    ),
    "Vocabulary.decode": Call(
        lambda: (Vocabulary.of(["a b"], "words").decode, {"x": torch.tensor([[1, 2, 0]])}),
        {"x": ["ab", None, torch.full((2, 3), 99), torch.full((2, 3), 0.5)]},
    ),
    "plot_images": of_plot("plot_images", images=torch.rand(4, 3, 3), num_columns=2, labels=["a"] * 4, cmap="gray"),
    "plot_class_samples": of_plot("plot_class_samples", images=torch.rand(2, 4, 3, 3), labels=["a", "b"]),
    "plot_reconstructions": of_plot(
        "plot_reconstructions",
        {"x": ["ab", None, torch.ones(3)]},
        x=torch.rand(4, 3, 3),
        reconstruction=torch.rand(4, 3, 3),
    ),
    "plot_divergence_bound": of_plot(
        "plot_divergence_bound",
        {"divergence": ["ab", None, torch.ones(3, 3)], "bound": ["ab", None, torch.ones(9)]},
        divergence=torch.rand(4),
        bound=torch.rand(4),
        standard_error=torch.rand(4),
    ),
    "plot_epsilon_curve": of_plot(
        "plot_epsilon_curve", {"kl_total": ["ab", None, 3, {}, torch.full((4,), torch.nan)]}, kl_total=torch.rand(4)
    ),
    "plot_kl_per_dimension": of_plot(
        "plot_kl_per_dimension",
        {"kl": ["ab", None, {}, torch.full((4, 2), torch.nan)], "active": ["ab", torch.ones(9)]},
        kl=torch.rand(4, 2),
        active=torch.tensor([True, False]),
        epsilon=0.01,
        sort=True,
    ),
    "plot_guaranteed_information": of_plot(
        "plot_guaranteed_information",
        {
            "guaranteed": ["ab", 3, None, [], {"floor": [1.0]}, torch.ones(2)],
            "kappas": ["ab", None, [[1.0]], [torch.inf]],
        }
        | {"information": ["ab", [1.0, 2.0, 3.0]], "kl": ["ab", [[[1.0]]], 3.0]},
        kappas=[0.0, 1.0],
        guaranteed={"floor": [0.0, 1.0], "by_jacobian": [[0.5, 1.5], [0.4, 1.4]]},
        information=[1.0, 2.0],
        kl=[1.0, 2.0],
    ),
    "plot_posteriors": of_plot(
        "plot_posteriors",
        {
            "loc": ["ab", None, torch.ones(4, 3), torch.ones(4)],
            "scale": ["ab", None, -torch.ones(4, 2), torch.ones(3, 2)],
        }
        | {"prior": ["ab", 3, (1,)], "labels": [[1, 2], 3]},
        loc=torch.randn(4, 2),
        scale=torch.ones(4, 2),
        labels=[0, 1, 0, 1],
        prior=True,
        max_ellipses=3,
    ),
    "plot_training": of_plot(
        "plot_training",
        {"beta": ["ab", torch.ones(9)], "inverse_lipschitz": ["ab", torch.ones(9)]},
        training=torch.rand(4),
        beta=torch.rand(4),
        inverse_lipschitz=torch.rand(4),
        smoothing=2,
    ),
    "plot_traversals": of_plot(
        "plot_traversals",
        {"dims": ["ab", [5], [-1], [0.5], 3]},
        decode=lambda z: torch.rand(len(z), 3, 3),
        latent_dim=2,
        dims=[0],
        center=torch.zeros(2),
        span=2.0,
        num_steps=3,
    ),
    "CollapseMonitor": Call(
        lambda: (
            ilvae.CollapseMonitor,
            {
                "model": model,
                "guide": guide,
                "model_args": x(),
                "model_kwargs": {},
                "every": 2,
                "decoder": projected(),
                "beta": {"z": ilvae.schedules.constant(0.5)},
                "sites": ["z"],
                "log": lambda record: None,
                "num_samples": 2,
                "threshold": 0.01,
                "data_size": 100,
                "batch_size": 2,
                "seed": 1,
                "plate": "data",
            },
        ),
        {
            "beta": [-1.0, "a", torch.nan, torch.ones(2), {"typo": 1.0}, {"z": -1.0}, Other()],
            "data_size": [0, -1, 2.5, "a"],
            "decoder": ["ab", 3, Other(), torch.nn.Linear],
            "seed": ["a", 2.5, torch.nan, None],
            "sites": ["z", ["typo"], 3, [3], []],
        },
    ),
    "CollapseMonitor.step": Call(lambda: (monitor().step, {"loss": torch.tensor(1.0)})),
    "CollapseMonitor.measure": Call(lambda: (monitor().measure, {})),
    "CollapseMonitor.track": Call(
        lambda: (monitor().track, {"iterable": range(2), "description": "a fit", "quiet": False})
    ),
    "CollapseMonitor.load_state_dict": Call(
        lambda: (monitor().load_state_dict, {"state": monitor().state_dict()}),
        {"state": [3, "ab", None, {}, Other(), {"history": []}]},
    ),
    "plot_sweep": Call(
        lambda: (
            plots.plot_sweep,
            {"x": [0.0, 1.0], "results": {"a": {"s": [[1.0, 2.0]]}}, "ylabels": ["a"], "axes": axes()},
        ),
        {"x": ["ab", None, [[1.0, 2.0]]], "ylabels": [3, ["a", "b", "c"]]},
    ),
}
