"""The monitor of collapse: its records are what the diagnostics say, in plain numbers, whatever the model."""

import json
import math
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.models import EVERY_KIND, ONE_OF_EACH, X, hierarchy_with, mixture_with, vae_with
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_ilvae import CollapseMonitor, InverseLipschitzDecoder, Nats, likelihoods, schedules
from pyro_ilvae import diagnostics as d

NAN = math.nan
SETTINGS = {"num_samples": 5, "seed": 3}


def every(models):
    return pytest.mark.parametrize("model", models.values(), ids=models.keys())


def own_model(x):
    with pyro.plate("data", 60, subsample_size=len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def own_guide(x):
    loc = pyro.param("loc", lambda: torch.randn(2))
    with pyro.plate("data", 60, subsample_size=len(x)):
        pyro.sample("z", dist.Normal(x[:, None] * loc, 0.5).to_event(1))


def own(**options):
    return CollapseMonitor(own_model, own_guide, X.flatten(1)[:, 0], **SETTINGS | options)


# What is recorded


@every(ONE_OF_EACH)
def test_a_record_is_what_the_diagnostics_say(model):
    vae = model.build()
    call = (vae.model, vae.guide, model.x)
    monitor = CollapseMonitor(*call, **SETTINGS)
    [record] = monitor.history
    sites = list(model.guide_sites)
    prefixes = {site: f"{site}/" if len(sites) > 1 else "" for site in sites}
    assert record["elbo"] == pytest.approx(d.evidence(*call, **SETTINGS).elbo.double().mean())
    assert record["kl"] == pytest.approx(d.kl_divergence(*call, **SETTINGS).values.double().mean())
    for site, prefix in prefixes.items():
        kl = d.kl_per_dimension(*call, site=site, **SETTINGS)
        means = kl.values.double().mean(0).reshape(-1).tolist()
        assert record[f"{prefix}kl_per_dimension"] == pytest.approx(means)
        total = d.kl_divergence(*call, site=site, **SETTINGS).values.double().mean()
        assert record[f"{prefix}kl"] == pytest.approx(total)
        assert record[f"{prefix}num_units"] == len(means)
        if record[f"{prefix}mutual_information"] is None:
            with pytest.raises(d.UnavailableError, match=re.escape(monitor.reasons[f"{prefix}mutual_information"])):
                d.mutual_information(*call, site=site, **SETTINGS)
        else:
            information = d.mutual_information(*call, site=site, **SETTINGS)
            assert record[f"{prefix}mutual_information"] == information.mutual_information
            assert record[f"{prefix}mutual_information_limit"] == information.limit
        if site == "y":
            assert record["y/active_units"] is record["y/inverse_lipschitz"] is record["y/guaranteed_floor"] is None
            assert "categories" in monitor.reasons["y/active_units"]
            continue
        assert record[f"{prefix}active_units"] == d.active_units(*call, site=site, **SETTINGS).num_active
        layered = {"site": site} if site != "z" else {}
        guaranteed = d.guaranteed_information(vae, **SETTINGS, **layered)
        assert (guaranteed.reason is None) == (record[f"{prefix}guaranteed_floor"] is not None)
        if guaranteed.reason is None:
            assert record[f"{prefix}guaranteed_floor"] == pytest.approx(guaranteed.floor)
            assert record[f"{prefix}guaranteed_nats"] == pytest.approx(guaranteed.by_jacobian)
        part = vae.decoder if site in ("z", "z1") else vae.layers[int(site[1:]) - 2].decoder
        assert record[f"{prefix}inverse_lipschitz"] == getattr(part, "inverse_lipschitz", None)
        assert record[f"{prefix}nats"] == getattr(part, "nats", None)
    noise = getattr(getattr(vae, "likelihood", None), "noise_scale", None)
    first = prefixes["z" if "z" in prefixes else "z1"]
    assert record[f"{first}noise_scale"] == (None if noise is None else pytest.approx(noise.item()))


@every(EVERY_KIND)
def test_records_are_plain_and_have_the_same_keys(model):
    vae = model.build(data_size=40)
    monitor = CollapseMonitor(vae.model, vae.guide, model.x, every=1, beta=torch.tensor(0.5), num_samples=2)
    monitor.step(torch.tensor(3.0))
    assert json.loads(json.dumps(monitor.history)) == monitor.history
    before, after = monitor.history
    assert list(before) == list(after)
    assert after["step"] == 1
    assert after["loss_per_datum"] == 3.0 / 40
    assert after["beta"] == 0.5
    plain = (int, float, list, type(None))
    assert all(type(value) in plain for record in monitor.history for value in record.values())
    assert "at step 1: loss" in repr(monitor)


def test_sites_are_what_is_asked_for():
    vae = mixture_with("factor")
    one = CollapseMonitor(vae.model, vae.guide, X, sites=["z"], **SETTINGS).history[0]
    both = CollapseMonitor(vae.model, vae.guide, X, **SETTINGS).history[0]
    assert not any("/" in key for key in one)
    assert one["kl"] == both["z/kl"]
    assert one["kl_per_dimension"] == both["z/kl_per_dimension"]


def test_the_numbers_follow_the_training():
    monitor = own(every=2, threshold=0.2)
    data = X.flatten(1)[:, 0]
    pyro.get_param_store()["loc"] = torch.tensor([2.0, 0.0])
    assert monitor.step() is None
    record = monitor.step()
    kl = ((data[:, None] * torch.tensor([2.0, 0.0])) ** 2 + 0.25 - 1) / 2 - math.log(0.5)
    assert record["kl_per_dimension"] == pytest.approx(kl.double().mean(0).tolist(), rel=1e-5)
    assert record["active_units"] == 1
    assert record["num_units"] == 2
    assert record is monitor.history[-1]
    assert own(threshold=1000.0).history[0]["active_units"] == 0
    assert own(threshold=0.0).history[0]["active_units"] == 1


def test_draws_are_the_same_in_all_records():
    monitor = own(every=1)
    pyro.get_param_store()["loc"] = torch.tensor([0.3, 0.1])
    first, second = monitor.step(), monitor.step()
    assert first | {"step": 2} == second
    other = own(seed=4).measure()
    assert other["elbo"] != first["elbo"]


def test_a_large_data_set_is_compared_with_a_part_of_the_posteriors():
    x = torch.randn(2000)
    record = CollapseMonitor(own_model_of_any_size, own_guide_of_any_size, x, num_samples=10).history[0]
    assert record["mutual_information_limit"] == pytest.approx(math.log(500))


def own_model_of_any_size(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def own_guide_of_any_size(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))


# Losses


def test_losses_are_means_since_the_last_record():
    monitor = own(every=3)
    assert monitor.data_size == 60
    for loss in (60.0, torch.tensor(120.0), np.float32(180.0), 6.0, 6, torch.tensor([6.0], requires_grad=True)):
        monitor.step(loss)
    assert [record["loss"] for record in monitor.history] == [None, 120.0, 6.0]
    assert [record["loss_per_datum"] for record in monitor.history] == [None, 2.0, 0.1]
    assert [record["non_finite_losses"] for record in monitor.history] == [0, 0, 0]


def test_losses_that_are_not_finite_are_counted_and_not_hidden():
    monitor = own(every=2)
    for loss in (1.0, torch.tensor(NAN), 2.0, math.inf, 1.0, 1.0):
        monitor.step(loss)
    assert math.isnan(monitor.history[1]["loss"])
    assert monitor.history[2]["loss"] == math.inf
    assert [record["non_finite_losses"] for record in monitor.history] == [0, 1, 1, 0]
    assert monitor.history[3]["loss"] == 1.0


def test_many_losses_need_no_memory():
    monitor = own(every=10_000)
    for step in range(3001):
        monitor.step(torch.tensor(float(step)))
    assert len(monitor._losses._kept) <= 1000
    assert monitor.measure()["loss"] == 1500.0


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: own(), 60),
        (lambda: own(batch_size=5), 60),
        (lambda: own(data_size=7), 7),
        (lambda: CollapseMonitor(own_model_of_any_size, own_guide_of_any_size, torch.randn(9)), None),
    ],
)
def test_the_number_of_data_of_a_loss(build, expected):
    monitor = build()
    assert monitor.data_size == expected
    monitor.step(42.0)
    record = monitor.measure()
    assert record["loss"] == 42.0
    assert record["loss_per_datum"] == (None if expected is None else 42.0 / expected)


def test_the_number_of_data_is_the_models_own():
    vae = vae_with(data_size=12)
    assert CollapseMonitor(vae.model, vae.guide, X).data_size == 12 == len(X)


# Weights and constants


class Controller:
    value = 0.25


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        (None, None),
        (0.5, 0.5),
        (torch.tensor(0.5, requires_grad=True), 0.5),
        (schedules.linear(0.25, 1.0, num_steps=3), 0.25),
        (Controller(), 0.25),
        ({"z": Controller()}, 0.25),
    ],
)
def test_beta_is_read_at_each_record(beta, expected):
    assert own(beta=beta).history[0]["beta"] == expected


def test_beta_moves_with_its_schedule():
    beta = schedules.linear(0.0, 1.0, num_steps=4)
    monitor = own(beta=beta, every=1)
    for _ in range(3):
        beta.step()
        monitor.step()
    assert [record["beta"] for record in monitor.history] == [0.0, 0.25, 0.5, 0.75]


def test_each_site_has_its_beta():
    vae = mixture_with("factor")
    record = CollapseMonitor(vae.model, vae.guide, X, beta={"y": 5.0, "z": Controller()}).history[0]
    assert (record["y/beta"], record["z/beta"]) == (5.0, 0.25)
    assert "beta" not in record


def test_constants_and_noise_follow_the_decoder():
    noise = likelihoods.Normal(0.5, estimate="learned")
    vae = vae_with(likelihood=noise)
    vae.decoder.inverse_lipschitz = Nats(0.5, noise)
    monitor = CollapseMonitor(vae.model, vae.guide, X, every=1)
    vae.decoder.nats = 1.0
    with torch.no_grad():
        next(iter(noise.parameters())).add_(0.3)
    record = monitor.step()
    assert record["nats"] == 1.0
    assert record["noise_scale"] == pytest.approx(noise.noise_scale.item()) != 0.5
    assert record["inverse_lipschitz"] == vae.decoder.inverse_lipschitz
    assert record["guaranteed_floor"] == pytest.approx(4.0 * vae.latent_dim / 4)


def test_the_decoder_can_be_given():
    vae = vae_with()
    given = InverseLipschitzDecoder(latent_dim=2, event_shape=4, inverse_lipschitz=(0.5, 4.0), map_features=(4,))
    assert own(decoder=given).history[0]["inverse_lipschitz"] == pytest.approx(2.0)
    assert own(decoder=vae).history[0]["inverse_lipschitz"] == vae.decoder.inverse_lipschitz

    class Pair:
        inverse_lipschitz = (0.5, 4.0)

        def __call__(self, z):
            return z

    assert own(decoder=Pair()).history[0]["inverse_lipschitz"] == 2.0
    assert own().history[0]["inverse_lipschitz"] is None


def test_several_scales_of_noise_are_one_number():
    vae = vae_with(likelihood=likelihoods.Normal(torch.full(X.shape[1:], 0.5).flatten().cumsum(0).reshape(X.shape[1:])))
    record = CollapseMonitor(vae.model, vae.guide, X).history[0]
    scales = 0.5 * np.arange(1, X[0].numel() + 1)
    assert record["noise_scale"] == pytest.approx(np.exp(np.log(scales).mean()))


# Logs, arrays and checkpoints


def test_each_record_is_logged_once_and_the_first_one_not_before_the_training():
    logged = []
    monitor = own(every=2, log=logged.append)
    assert logged == []
    monitor.step(0.0)
    assert [record["step"] for record in logged] == [0]
    for step in range(1, 5):
        monitor.step(float(step))
    assert logged == monitor.history
    assert [record["step"] for record in logged] == [0, 2, 4]
    monitor.measure()
    monitor.measure()
    assert [record["step"] for record in logged] == [0, 2, 4, 5]
    logged[0].clear()
    assert monitor.history[0]["step"] == 0


def test_arrays_have_nan_for_none():
    monitor = own(every=1)
    monitor.step(2.0)
    arrays = monitor.arrays()
    np.testing.assert_array_equal(arrays["loss"], [NAN, 2.0])
    assert arrays["kl_per_dimension"].shape == (2, 2)
    assert arrays["step"].tolist() == [0, 1]
    monitor.history[0]["kl_per_dimension"] = None
    assert np.isnan(monitor.arrays()["kl_per_dimension"][0]).all()


def fit(monitor, svi, beta, steps):
    for _ in range(steps):
        monitor.step(svi.step(X.flatten(1)[:, 0]))
        beta.step()


def test_a_resumed_run_goes_on_exactly(tmp_path):
    def start():
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        beta, logged = schedules.linear(0.0, 1.0, num_steps=8), []
        optimizer = pyro.optim.Adam({"lr": 0.05})
        svi = SVI(own_model, own_guide, optimizer, Trace_ELBO())
        return own(every=3, beta=beta, log=logged.append), svi, beta, optimizer, logged

    monitor, svi, beta, optimizer, logged = start()
    fit(monitor, svi, beta, 10)
    whole, all_logged = monitor.history, list(logged)

    monitor, svi, beta, optimizer, logged = start()
    fit(monitor, svi, beta, 4)
    path = tmp_path / "checkpoint.pt"
    saved = {
        "monitor": json.loads(json.dumps(monitor.state_dict())),
        "beta": beta.state_dict(),
        "store": pyro.get_param_store().get_state(),
        "optimizer": optimizer.get_state(),
        "rng": torch.get_rng_state(),
    }
    torch.save(saved, path)
    before = list(logged)
    monitor, svi, beta, optimizer, logged = start()
    saved = torch.load(path, weights_only=False)
    monitor.load_state_dict(saved["monitor"])
    beta.load_state_dict(saved["beta"])
    pyro.get_param_store().set_state(saved["store"])
    optimizer.set_state(saved["optimizer"])
    torch.set_rng_state(saved["rng"])
    fit(monitor, svi, beta, 6)
    assert monitor.history == whole
    assert before + logged == all_logged


def test_a_saved_state_does_not_change_with_the_monitor():
    monitor = own(every=1)
    state = monitor.state_dict()
    monitor.step(1.0)
    monitor.history[0]["kl_per_dimension"].append(0.0)
    assert len(state["history"]) == 1
    assert len(state["history"][0]["kl_per_dimension"]) == 2
    monitor.load_state_dict(state)
    assert monitor.step(2.0)["loss"] == 2.0
    other = own(every=2)
    other.step(99.0)
    other.load_state_dict(state)
    other.step(2.0)
    assert other.step(4.0)["loss"] == 3.0
    assert len(state["history"]) == 1


# What cannot be measured


def global_model(x):
    weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(weight, 1.0), obs=x)


def test_sites_that_data_share_have_what_they_can_have():
    monitor = CollapseMonitor(global_model, AutoNormal(global_model), torch.randn(6), **SETTINGS)
    assert monitor.history == []
    record = monitor.step(3.0)
    assert record["step"] == 1
    assert record["kl"] == pytest.approx(record["kl_per_dimension"][0], rel=0.5)
    assert record["active_units"] is record["mutual_information"] is None
    assert monitor.reasons.keys() >= {"active_units", "mutual_information", "mutual_information_limit"}
    assert "elbo" not in monitor.reasons


def test_no_error_of_a_measure_ends_the_training():
    vae = vae_with()
    monitor = CollapseMonitor(vae.model, vae.guide, X, every=1)
    with torch.no_grad():
        next(vae.encoder.parameters()).fill_(NAN)
    record = monitor.step(NAN)
    assert record.keys() == monitor.history[0].keys()
    assert record["elbo"] is record["kl"] is record["kl_per_dimension"] is record["guaranteed_floor"] is None
    assert record["inverse_lipschitz"] == vae.decoder.inverse_lipschitz
    assert record["non_finite_losses"] == 1
    assert monitor.reasons["elbo"]
    assert "1 losses not finite" in repr(monitor)


def test_foreign_errors_are_reasons_too():
    class Own:
        fails = False

        def __call__(self, x):
            if self.fails:
                raise ZeroDivisionError("a division")
            return own_model_of_any_size(x)

    model = Own()
    monitor = CollapseMonitor(model, own_guide_of_any_size, torch.randn(5), every=1)
    model.fails = True
    assert monitor.step()["kl"] is None
    assert monitor.reasons["kl"] == "a division"
    model.fails = False
    assert monitor.step()["kl"] == monitor.history[0]["kl"]
    assert "kl" not in monitor.reasons


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model_args": torch.randn(5, 7)}, Exception, "7"),
        ({"plate": "typo"}, ValueError, "plate"),
        ({"sites": ["x"]}, ValueError, "sites among"),
        ({"beta": {"typo": 1.0}}, ValueError, "beta to name latent sites"),
        ({"beta": Controller}, ValueError, "Expected beta"),
        ({"seed": None}, ValueError, "global state"),
        ({"log": lambda: None}, TypeError, "log"),
    ],
)
def test_wrong_arguments_raise_at_once(options, error, message):
    vae = hierarchy_with("top_down")
    arguments = {"model_args": X} | options
    if options.get("beta") is Controller:
        arguments["beta"] = type("Wrong", (), {"value": -1.0})()
    with pytest.raises(error, match=message):
        CollapseMonitor(vae.model, vae.guide, **arguments)


# The progress bar


def test_a_bar_shows_what_is_fitted_and_the_numbers_that_matter(capsys):
    vae = vae_with(data_size=12)
    monitor = CollapseMonitor(vae.model, vae.guide, X, every=2, beta=0.5)
    assert list(monitor.track(range(4))) == [0, 1, 2, 3]
    for _ in monitor.track("abcd"):
        monitor.step(1.2)
    shown = capsys.readouterr().err
    for part in ("VAE with ProjectedDecoder", "ELBO ", "loss 0.1 ", "KL ", "active ", "L 1", "nats", "β 0.5"):
        assert part in shown
    assert monitor._progress._bar is None


def test_a_quiet_bar_shows_nothing(capsys):
    monitor = own(every=1)
    for _ in monitor.track(range(3), quiet=True):
        monitor.step(1.0)
    assert capsys.readouterr() == ("", "")
    assert len(monitor.history) == 4


def test_a_bar_says_what_it_is_told(capsys):
    monitor = own()
    assert list(monitor.track([1], description="fit 3 of 7")) == [1]
    assert "fit 3 of 7" in capsys.readouterr().err
    assert list(monitor.track([1])) == [1]
    assert "own_model" in capsys.readouterr().err
