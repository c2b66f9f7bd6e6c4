"""Layers over data with covariates, offsets and gaps: one latent site more, and the same meaning of the arguments."""

import pyro
import pytest
import torch
from helpers.decoders import EVENT, LATENT, perturb
from helpers.models import layer_of
from pyro.infer import Trace_ELBO

from pyro_ilvae import (
    VAE,
    GraphSVI,
    HierarchicalVAE,
    JointOptim,
    MLPDecoder,
    MLPEncoder,
    ProjectedDecoder,
    from_pyro_svi,
    likelihoods,
)
from pyro_ilvae.diagnostics import collapse_summary, evidence, guaranteed_information

N, C = 10, 3
SIZES = {"latent_dim": LATENT, "event_shape": EVENT, "context_dim": C}
GUIDES = pytest.mark.parametrize("inference", ["bottom_up", "top_down"])
X = torch.randn(N, *EVENT, generator=torch.Generator().manual_seed(0))
MASK = torch.rand(N, *EVENT, generator=torch.Generator().manual_seed(1)) > 0.3
MASK[:, 0] = True
GAPS = torch.where(MASK, X, torch.nan)
LABELS = torch.arange(N) % C
OFFSET = torch.linspace(-1, 1, N)


def hierarchy(inference="top_down", **options):
    pyro.clear_param_store()
    decoder = ProjectedDecoder(MLPDecoder(**SIZES, hidden_features=(8,)), **SIZES, map_features=(8,))
    encoder = MLPEncoder(**SIZES, hidden_features=(8,), takes_mask=True)
    likelihood, layers = options.pop("likelihood", likelihoods.Normal(0.5)), [layer_of(LATENT, 2)]
    parts = decoder, encoder, likelihood, layers
    return perturb(HierarchicalVAE(*parts, inference=inference, missing="ignore", **options), 0.3)


@GUIDES
def test_methods_take_what_a_vae_takes(inference):
    model = hierarchy(inference)
    vae = VAE(model.decoder, model.encoder, model.likelihood, missing="ignore")
    if inference == "bottom_up":
        torch.testing.assert_close(model.encode(GAPS, LABELS)[0], vae.encode(GAPS, LABELS)[0])
        torch.testing.assert_close(model.reconstruct(GAPS, LABELS), vae.reconstruct(GAPS, LABELS))
    by_mask = model.encode(X, LABELS, mask=MASK, site="z2", batch_size=3)[0]
    torch.testing.assert_close(model.encode(GAPS, LABELS, site="z2")[0], by_mask)
    same = model.reconstruct(GAPS, LABELS, LABELS, site="z2")
    torch.testing.assert_close(same, model.reconstruct(GAPS, LABELS, site="z2"))
    shifted = model.reconstruct(GAPS, LABELS, 1, site="z2", offset=OFFSET, batch_size=4)
    torch.testing.assert_close(shifted, model.reconstruct(GAPS, LABELS, [1] * N, site="z2") + OFFSET[:, None, None])
    assert model.sample_prior(4, 1, offset=OFFSET[:4]).shape == (4, *EVENT)
    with pytest.raises(ValueError, match="Expected context of shape"):
        model.encode(X)


@GUIDES
def test_missing_entries_change_no_loss_and_graph_steps_are_those_of_svi(inference):
    model, losses = hierarchy(inference), []
    for x in (X, torch.where(MASK, X, 7.0)):
        pyro.set_rng_seed(0)
        losses.append(Trace_ELBO().loss(model.model, model.guide, x, LABELS, mask=MASK, offset=OFFSET))
    assert losses[0] == losses[1]
    svi = GraphSVI(model.model, model.guide, JointOptim(torch.optim.Adam, {"lr": 1e-3}), Trace_ELBO(), compile=False)
    for _ in range(3):
        assert svi.step(GAPS, LABELS, offset=OFFSET) > 0
    assert svi.runs == "graph"


@GUIDES
def test_floors_are_the_same_in_each_context_and_diagnostics_run(inference):
    model = hierarchy(inference)
    floors = {site: guaranteed_information(model, site=site, seed=0) for site in model.latent_sites}
    assert all(floor.reason is None and floor.floor > 0 for floor in floors.values())
    summary = collapse_summary(model.model, model.guide, (X, LABELS), model_kwargs={"offset": OFFSET}, seed=0)
    for site, floor in floors.items():
        assert summary["guaranteed_floor"].sel(site=site).item() == pytest.approx(floor.floor, rel=1e-4)
    call = (model.model, model.guide, (GAPS, LABELS))
    summary = collapse_summary(*call, measures=["guaranteed_information"], seed=0)
    assert summary["guaranteed_floor"].isnull().all()
    assert all("missing entries" in note for note in summary.note.values)
    assert evidence(*call, num_samples=20, seed=0).log_likelihood.isfinite().all()
    fit = from_pyro_svi(call[:2], (GAPS, LABELS), num_samples=5)
    assert fit["constant_data"]["context"].dims == ("data",)
    assert fit["observed_data"]["x"].isnull().any()


def test_layers_of_one_size_start_with_different_weights():
    decoder, encoder = MLPDecoder(latent_dim=3, event_shape=EVENT), MLPEncoder(event_shape=EVENT, latent_dim=3)
    model = HierarchicalVAE(decoder, encoder, likelihoods.Normal(0.5), [layer_of(3, 3), layer_of(3, 3)])
    starts = []
    for seed in (0, 0, 1):
        model.initialize(X, seed=seed)
        maps = [layer.decoder.map.icnn.state_dict().values() for layer in model.layers]
        starts.append([torch.cat([value.flatten() for value in one]) for one in maps])
    assert not torch.equal(*starts[0])
    assert all(map(torch.equal, starts[0], starts[1]))
    assert not torch.equal(starts[0][1], starts[2][1])


def test_counts_below_two_layers():
    model = hierarchy(likelihood=likelihoods.ZeroInflatedNegativeBinomial(torch.ones(EVENT), gate=0.2), data_size=N)
    counts = torch.poisson(3 * torch.rand(N, *EVENT))
    model.initialize(counts, LABELS, offset=counts.flatten(1).sum(1).log())
    svi = GraphSVI(model.model, model.guide, JointOptim(torch.optim.Adam, {"lr": 1e-3}), Trace_ELBO(), compile=False)
    losses = [float(svi.step(counts, LABELS, offset=counts.flatten(1).sum(1).log())) for _ in range(5)]
    assert torch.tensor(losses).isfinite().all()
    assert "Normal noise" in guaranteed_information(model, site="z1").reason
    assert guaranteed_information(model, site="z2").floor > 0
