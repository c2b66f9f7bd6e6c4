"""What the experiments with images share: the data, the decoders, one budget for all of them, and the measures.

The budget: a tenth of the training images is set apart for validation, and their log likelihood, importance-weighted,
is measured after every 5 epochs. Adam takes steps of 128 images. When three measurements in a row are not the best, or
at the latest at an epoch that the data set has for it, training goes on from the best state at 0.3 of the learning
rate, and ends there the third time. Every decoder has this budget and starts from the data, and steps are taken as one
compiled graph.
"""

import copy
import functools
import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pyro
import torch
from _remedies import Remedy
from _sweep import SMOKE, Run, chosen
from pyro.infer import ELBO, TraceMeanField_ELBO
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from pyro_ilvae import (
    VAE,
    GraphSVI,
    HierarchicalVAE,
    InverseLipschitzDecoder,
    JointOptim,
    MixtureVAE,
    MLPDecoder,
    MLPEncoder,
    Nats,
    ProjectedDecoder,
    datasets,
    diagnostics,
    likelihoods,
    mlp,
)

LATENT_DIM, BATCH_SIZE = 16, 128
EVERY, PATIENCE = 5, 3  # epochs between measurements, measurements without a best
NUM_SAMPLES = chosen(smoke=5, short=100, full=100)
NUM_OWN, NUM_WEIGHTS = chosen(smoke=(100, 10), short=(500, 50), full=(500, 50))
NUM_JACOBIANS = chosen(smoke=20, short=1000, full=1000)

LIKELIHOODS: dict[str, Callable[[], nn.Module]] = {
    "Normal": lambda: likelihoods.Normal(0.3, estimate="learned"),
    "Bernoulli": likelihoods.Bernoulli,
    "Poisson": likelihoods.Poisson,
}


class Images(NamedTuple):
    """Images as a likelihood takes them, and the labels of those for training and testing."""

    train: Tensor
    train_labels: Tensor
    validation: Tensor
    test: Tensor
    test_labels: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.train.shape[1:])


@functools.cache
def loaded(data: str) -> datasets.ImageData:
    return datasets.digits() if data == "digits" else datasets.fashion_mnist()


@functools.cache
def images_of(data: str, likelihood: str) -> Images:
    """The images for a likelihood, of digits or Fashion-MNIST."""
    return images(loaded(data), likelihood)


def images(data: datasets.ImageData, likelihood: str) -> Images:
    """Intensities for Normal noise, binary pixels for Bernoulli, 16 levels of gray as counts for Poisson."""
    transforms: dict[str, Callable[[Tensor], Tensor]] = {
        "Normal": lambda x: x,
        "Bernoulli": lambda x: datasets.binarize(x, threshold=0.5),
        "Poisson": lambda x: (16 * x).round(),
    }
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    validation, train = order.tensor_split([len(order) // 10])
    transform = transforms[likelihood]
    return Images(
        transform(data.train[train]),
        data.train_labels[train],
        transform(data.train[validation]),
        transform(data.test),
        data.test_labels,
    )


# The composition is named by L1 = L2, as in the paper, or by kappa like the projected decoder. LIDVAE is the
# composition with L = 0. All decoders take their frame, if they have one, from the data, and one goes on to train it.
# The maps are as wide as the plain decoder.
Shape = tuple[int, ...]
Maker = Callable[[int, Shape, Shape, nn.Module], nn.Module]  # from latent dimension, image, widths and likelihood


def plain(linear_path: bool) -> Maker:
    return lambda latent_dim, shape, hidden, likelihood: MLPDecoder(
        latent_dim=latent_dim, event_shape=shape, hidden_features=hidden, linear_path=linear_path
    )


def composition(constant: float | None = None, *, kappa: float = 0.0) -> Maker:
    return lambda latent_dim, shape, hidden, likelihood: InverseLipschitzDecoder(
        latent_dim=latent_dim,
        event_shape=shape,
        inverse_lipschitz=Nats(kappa, likelihood) if constant is None else (constant, constant),
        map_features=hidden,
    )


def projected(kappa: float, *, train_frame: bool = False) -> Maker:
    return lambda latent_dim, shape, hidden, likelihood: ProjectedDecoder(
        mlp(latent_dim, hidden, math.prod(shape)),
        latent_dim=latent_dim,
        event_shape=shape,
        inverse_lipschitz=Nats(kappa, likelihood),
        map_features=hidden,
        train_frame=train_frame,
    )


KAPPAS = {f"projected, kappa = {kappa:g}": kappa for kappa in (0.0, 0.1, 0.25, 0.5, 1.0)}
DECODERS: dict[str, Maker] = {
    "plain": plain(linear_path=False),
    "plain, linear path": plain(linear_path=True),
    **{name: projected(kappa) for name, kappa in KAPPAS.items()},
    "projected, kappa = 0.5, trained frame": projected(0.5, train_frame=True),
    "LIDVAE": composition(0.0),
    "composition, kappa = 0.25": composition(kappa=0.25),
    "composition, L1 = L2 = 0.5": composition(0.5),
    "composition, L1 = L2 = 1.5": composition(1.5),
}


def build(
    decoder: str,
    likelihood: str | nn.Module,
    shape: Shape,
    hidden: Shape,
    data_size: int,
    wrap: Callable[[nn.Module], nn.Module] = lambda encoder: encoder,
) -> VAE:
    pyro.clear_param_store()  # it holds the parameters of an earlier model under the same names
    noise = LIKELIHOODS[likelihood]() if isinstance(likelihood, str) else likelihood
    encoder = MLPEncoder(event_shape=shape, latent_dim=LATENT_DIM, hidden_features=hidden)
    return VAE(DECODERS[decoder](LATENT_DIM, shape, hidden, noise), wrap(encoder), noise, data_size=data_size)


def train(
    vae: VAE | HierarchicalVAE,
    data: Images,
    ends: Sequence[int],
    learning_rate: float,
    objective: Callable[[], ELBO] = TraceMeanField_ELBO,
    remedy: Remedy | None = None,
) -> Run:
    """Fit ``vae`` within the budget, each learning rate until its end at the latest, and leave it in its best state."""
    remedy = remedy or Remedy(objective())
    optimizer = JointOptim(torch.optim.Adam, {"lr": learning_rate, "fused": True})
    model = remedy.model or vae.model
    svi = remedy.wrap(GraphSVI(model, vae.guide, optimizer, remedy.objective, compile=not SMOKE))
    best, best_epoch, state, waited, num_rates = -math.inf, 0, vae.state_dict(), 0, 1
    began = time.perf_counter()
    for epoch in range(1, ends[-1] + 1):
        for batch in data.train[torch.randperm(len(data.train))].split(BATCH_SIZE):
            svi.step(batch)
            remedy.after_step(batch)
        if epoch % EVERY and epoch not in ends:
            continue
        remedy.after_epochs()
        if epoch < remedy.begins_to_wait:
            continue
        bounds = diagnostics.evidence(vae.model, vae.guide, data.validation, num_samples=20, seed=0)
        value = float(bounds.log_likelihood.mean())
        if value > best:
            best, best_epoch, state, waited = value, epoch, copy.deepcopy(vae.state_dict()), 0
        else:
            waited += 1
        if (waited >= PATIENCE and not remedy.is_under_way()) or epoch >= ends[num_rates - 1]:
            if num_rates == len(ends):
                break
            num_rates, waited = num_rates + 1, 0
            vae.load_state_dict(state)
            for group in optimizer.optimizer.param_groups:
                group["lr"] *= 0.3
    vae.load_state_dict(state)
    return {
        "validation": best,
        "epochs": epoch,
        "best_epoch": best_epoch,
        "rates": num_rates,
        "seconds": time.perf_counter() - began,
    }


def measure(model: VAE | MixtureVAE, data: Images) -> Run:
    """Measures of held-out images.

    The k-NN accuracy classifies the codes (posterior means) of test images by codes and labels of training images.
    """
    pair = (model.model, model.guide, data.test)
    evidence = diagnostics.evidence(*pair, num_samples=NUM_SAMPLES, batch_size=100, seed=0)
    units = diagnostics.active_units(*pair, batch_size=200, seed=0)
    information = diagnostics.mutual_information(*pair, num_samples=4, batch_size=200, seed=0)
    codes = [model.encode(x, batch_size=500)[0].numpy(force=True) for x in (data.train, data.test)]
    classifier = KNeighborsClassifier(5).fit(codes[0], data.train_labels.numpy(force=True))
    return {
        "log_likelihood": float(evidence.log_likelihood.mean()),
        "elbo": float(evidence.elbo.mean()),
        "kl": information.mean_kl,
        "active": units.num_active,
        "information": information.mutual_information,
        "knn": float(classifier.score(codes[1], data.test_labels.numpy(force=True))),
    }


def kl_of_dimensions(vae: VAE, data: Images) -> Run:
    """The mean KL of held-out images in each dimension of the latent variable."""
    kl = diagnostics.kl_per_dimension(vae.model, vae.guide, data.test, batch_size=200).values.mean(0)
    return {"smallest_kl": float(kl.min()), "kl_of_dimensions": kl.tolist()}


def guaranteed(vae: VAE) -> Run:
    """The constant, the noise, and the nats that they guarantee for Normal noise by themselves and by the Jacobian."""
    noise_scale = getattr(vae.likelihood, "noise_scale", None)
    result = {
        "noise_scale": None if noise_scale is None else float(noise_scale.detach()),
        "constant": getattr(vae.decoder, "inverse_lipschitz", None),
        "kappa": getattr(vae.decoder, "nats", None),
    }
    if noise_scale is None or result["constant"] is None:
        return result
    floor = diagnostics.guaranteed_information(vae, num_samples=NUM_JACOBIANS, seed=0)
    assert floor.reason is None, floor.reason
    return result | {
        "floor": floor.floor,
        "floor_by_jacobian": floor.by_jacobian,
        "floor_by_jacobian_se": floor.by_jacobian_se,
    }


@torch.no_grad()
def own_information(vae: VAE) -> Run:
    r"""The information I(x; z) between the model's own data and their latent variable, in nats, between two bounds.

    .. math:: I(x; z) = E_{p(x, z)} \log p(x \mid z) - E_{p(x)} \log p(x).

    Importance sampling from an approximate posterior, which knows x alone, gives log p(x) too small on average, so that
    the information comes out too large. With the z from which x was drawn among the draws, log p(x) comes out too large
    on average, and the information too small [1].

    References:
        [1] Brekelmans et al. 2022, Improving mutual information estimation with annealed and energy-based bounds,
        https://arxiv.org/abs/2303.06992
    """
    with pyro.poutine.block(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        low, high = [], []
        for _ in range(NUM_OWN // 100):
            z = vae.prior.sample((100,))
            given = vae.likelihood(vae.decoder(z))
            x = given.sample()
            given = _summed(given.log_prob(x))
            posterior = laplace(vae, x)
            draws = torch.cat([z[None], posterior.sample((NUM_WEIGHTS,))])
            weights = _log_joint(vae, draws, x) - posterior.log_prob(draws)
            low.append(given - weights.logsumexp(0) + math.log(NUM_WEIGHTS + 1))
            high.append(given - weights[1:].logsumexp(0) + math.log(NUM_WEIGHTS))
    low, high = torch.cat(low), torch.cat(high)
    return {
        "own_information_low": float(low.mean()),
        "own_information_low_se": float(low.std()) / math.sqrt(len(low)),
        "own_information_high": float(high.mean()),
        "own_information_high_se": float(high.std()) / math.sqrt(len(high)),
    }


@torch.no_grad()
def laplace(vae: VAE, x: Tensor, num_steps: int = 10) -> MultivariateNormal:
    """The Normal approximation of p(z | x) at a mode, found from the encoder's location by steps of Fisher scoring."""
    z = vae.encoder(x)[0]
    step = torch.ones(len(x), 1)
    for _ in range(num_steps):
        gradient, precision = _score(vae, z, x)
        proposal = z + step * torch.linalg.solve(precision, gradient)
        better = (_log_joint(vae, proposal, x) > _log_joint(vae, z, x))[:, None]
        z = torch.where(better, proposal, z)
        step = torch.where(better, (2 * step).clamp(max=1.0), step / 4)
    # A little wider than the posterior, so that no weight is far too large.
    return MultivariateNormal(z, precision_matrix=_score(vae, z, x)[1] / 1.2)


def _log_joint(vae: VAE, z: Tensor, x: Tensor) -> Tensor:
    return _summed(vae.likelihood(vae.decoder(z)).log_prob(x), keep=z.dim() - 1) + vae.prior.log_prob(z)


def _score(vae: VAE, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of log p(z, x) in z, and the expected information J^T I J + 1."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(_log_joint(vae, z, x).sum(), z)
    z = z.detach()
    with warnings.catch_warnings():
        # The first forward derivative loads a part of PyTorch that warns about another part.
        warnings.filterwarnings("ignore", "`torch.jit")
        slopes = torch.func.vmap(torch.func.jacfwd(vae.decoder))(z).movedim(-1, 0)  # (K, N, *shape)
    product = vae.likelihood.information_product(vae.decoder(z), slopes)
    precision = torch.einsum("ind,jnd->nij", slopes.flatten(2), product.flatten(2))
    return gradient, precision + torch.eye(z.shape[-1])


def _summed(values: Tensor, keep: int = 1) -> Tensor:
    return values.flatten(keep).sum(-1)
