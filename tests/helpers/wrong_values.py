"""Wrong values for the arguments of public functions, by what an argument is called."""

import math
from pathlib import Path

import pyro
import torch

import pyro_ilvae as ilvae

NAN, INF = math.nan, math.inf


class Other:
    """An object of no use."""

    def __repr__(self):
        return "Other()"


def too_wide(n):
    return torch.ones(n, 9)


def no_tensor(n):
    return 3


def with_nan():
    return torch.full((4, 6), NAN)


NUMBERS_ONLY = ["a", NAN, [1.0], Other()]
INT = [0, -1, 2.5, *NUMBERS_ONLY, True]
OPTIONAL = [value for value in INT if value is not None]
POSITIVE = [0.0, -1.0, INF, *NUMBERS_ONLY]
NON_NEGATIVE = [-1.0, INF, *NUMBERS_ONLY]
FRACTION = [-0.5, 1.5, *NUMBERS_ONLY]
SEED = ["a", 2.5, NAN, [1], Other()]
WIDTHS = [(), (0,), (-2,), (2.5,), "ab", 3, Other()]
EVENT_SHAPE = [(), 0, -1, (2.5,), "ab", Other()]
CHOICE = ["typo", 3, Other()]
ACTIVATION = ["typo", 3, torch.nn.Softplus, torch.nn.Softplus()]
FLAG = ["yes", 3, Other()]
# A tensor may also be given as an array, a data frame or nested lists of numbers.
TENSOR = ["ab", None, Other(), torch.Tensor, [["a"]], {"a": 1}, torch.full((4, 6), 1j)]
FUNCTION = ["ab", 3, None, Other()]
MODULE = [*FUNCTION, torch.nn.Linear]
PATH = [3.5, Other(), "no/such/file"]
MAPPING = [3, "ab", Other(), {3: torch.ones(4)}]
AXES = ["ab", 3, Other()]

#: wrong values by the name of the argument
BY_NAME = {
    "active_from": NON_NEGATIVE,
    "activation": ACTIVATION,
    "aggregate_size": INT,
    "at_least": FLAG,
    "ax": AXES,
    "axes": AXES,
    "backbone": MODULE,
    "batch_size": INT,
    "beta": NON_NEGATIVE,
    "bounds": [(1.0, 0.5), (-1.0, 2.0), 3, "ab", (0.1, NAN), (1.0,)],
    "brenier_map": MODULE,
    "center": ["ab", Other(), torch.ones(7), [NAN, 0.0]],
    "centers": ["ab", None, Other(), [[NAN, 1.0]], 3],
    "channels": WIDTHS,
    "clip_args": [3, "ab", {"typo": 1.0}, {"clip_norm": -1.0}, {"clip_norm": 0.0}, {"clip_norm": NAN}],
    "collapsed_below": NON_NEGATIVE,
    "component": [3, -1, 2.5, "a", NAN],
    "constant_data": [3, "ab", {"z": torch.ones(3)}],
    "context": ["ab", None, torch.ones(3, 5), Other(), torch.full((4, 2), 1j)],
    "context_dim": INT,
    "context_features": INT,
    "coords": [3, "ab", {"typo": [1, 2]}, {"data": [1]}],
    "data_size": [*INT, 1],
    "decode": FUNCTION,
    "decoder": MODULE,
    "delta": FRACTION,
    "description": [3, Other()],
    "dims": [3, "ab", {"typo": ["a"]}, {"z": "ab"}, {"z": ["a", "b", "c", "d"]}],
    "divergence": TENSOR,
    "draws": [3, "ab", None, {"typo": torch.ones(3)}, {"z": "ab"}],
    "dropout": FRACTION,
    "elbo": ["ab", 3, None, pyro.infer.Trace_ELBO, Other()],
    "embedding_features": INT,
    "encoder": MODULE,
    "end": ["a", [0.5], [1.0], NAN, Other()],
    "end_token": [-1, 99, 2.5, "a"],
    "enumerate_in": CHOICE,
    "epsilon": NON_NEGATIVE,
    "epsilons": ["ab", [NAN], [], Other()],
    "errors": CHOICE,
    "estimate": CHOICE,
    "event_shape": EVENT_SHAPE,
    "excess": POSITIVE,
    "features": INT,
    "every": INT,
    "exclude": [3, None, "ab", [99], [-1], [1.5], [0, 1, 2, 3, 4]],
    "fn": ["ab", 3, Other()],
    "frame": ["typo", 3, Other(), torch.zeros(6, 2), torch.eye(3), torch.eye(6)[:, :2] * 2, with_nan()],
    "function": FUNCTION,
    "gain": POSITIVE,
    "gate": [*POSITIVE, 1.0],
    "guide": FUNCTION,
    "hidden_features": WIDTHS,
    "history": ["typo", 3, None, Other(), torch.nn.GRU, torch.nn.Linear(3, 3)],
    "images": [*TENSOR, torch.ones(3)],
    "in_features": INT,
    "inner_map_features": WIDTHS,
    "input_norm": POSITIVE,
    "input_skips": FLAG,
    "input_transform": ["ab", 3, Other()],
    "index": ["ab", 3, Other(), [0, 1], [0, 1, 2, 99], [0, 1, 2, -1], [0.5, 1, 2, 3]],
    "inputs": ["ab", None, Other(), torch.full((4, 3), 99), torch.full((4, 3), 0.5)],
    "inverse_lipschitz": NON_NEGATIVE,
    "iterable": [3, None, Other()],
    "join": ["ab", 3, Other()],
    "kappa": [*NON_NEGATIVE, 41.0],
    "kind": CHOICE,
    "kl": [*TENSOR, torch.full((4, 2), NAN)],
    "labels": [Other(), [1, 2, 3], 3],
    "largest_beta": [*POSITIVE, 0.5],
    "latent_dim": INT,
    "level": CHOICE,
    "linear_path": FLAG,
    "lipschitz": POSITIVE,
    "likelihood": [*FUNCTION, ilvae.likelihoods.Normal],
    "length_bonus": ["a", None, NAN, INF],
    "loc": [*TENSOR, torch.full((4, 2), NAN)],
    "log": ["ab", 3, Other(), dict, lambda: None],
    "log_likelihood": TENSOR,
    "loss": ["ab", [1.0, 2.0], Other(), torch.ones(2), torch.tensor(1j)],
    "training": [*TENSOR, []],
    "map_features": WIDTHS,
    "max_ellipses": [-1, 2.5, "a"],
    "max_iterations": INT,
    "max_length": INT,
    "max_size": INT,
    "max_vocabulary": INT,
    "mcmc": [3, "ab", None, Other(), pyro.infer.MCMC],
    "mean": FLAG,
    "measures": ["kl", ["typo"], 3, [3]],
    "min_length": [-1, 2.5, "a", None, 100],
    "missing": CHOICE,
    "model": FUNCTION,
    "model_args": ["ab", None, 3, Other(), [["a"]], {1, 2}, (x for x in [torch.ones(4, 6)])],
    "model_kwargs": [3, "ab", Other(), {3: torch.ones(4)}],
    "nats": [-1.0, NAN, "a", INF],
    "noise_scale": POSITIVE,
    "num_beams": INT,
    "num_chains": [*INT, 7],
    "num_columns": INT,
    "num_components": INT,
    "num_cycles": INT,
    "num_data": INT,
    "num_dimensions": INT,
    "num_importance_samples": INT,
    "num_heads": [*INT, 3],
    "num_layers": INT,
    "num_pairs": INT,
    "num_samples": INT,
    "num_sequences": INT,
    "num_steps": INT,
    "num_tokens": ["ab", None, Other(), torch.zeros(4), torch.full((4,), -1)],
    "num_worst": INT,
    "offline": FLAG,
    "optim_args": [3, "ab", None, Other()],
    "optim_constructor": ["ab", 3, None, Other(), torch.nn.Linear],
    "other": [*TENSOR, torch.ones(3, 3)],
    "out_features": INT,
    "path": PATH,
    "planned_steps": INT,
    "plate": [3, "typo", Other()],
    "posterior_predictive": FLAG,
    "predicted": [Other(), torch.ones(3), [[1, 2]]],
    "prior": FLAG,
    "probs": [*TENSOR, torch.ones(4, 3), torch.full((4, 3), NAN), -torch.eye(3)],
    "quiet": FLAG,
    "ramp": FRACTION,
    "rate": POSITIVE,
    "reconstruction": [*TENSOR, torch.ones(3)],
    "reference": [*TENSOR, torch.ones(3, 3)],
    "results": [3, "ab", None, {}, {"a": 3}, Other()],
    "restarts": INT,
    "sampler": ["ab", 3, Other(), too_wide, no_tensor],
    "samples_per_pass": INT,
    "scale": POSITIVE,
    "scales": CHOICE,
    "schedule": [3, "ab", None, Other(), ilvae.Schedule],
    "seed": SEED,
    "site": ["typo", 3, Other()],
    "sites": ["z", ["typo"], 3, [3]],
    "smoothing": INT,
    "sort": FLAG,
    "span": POSITIVE,
    "state": [3, "ab", None, {}, Other()],
    "standard_error": ["ab", Other(), torch.ones(9)],
    "start": ["a", [0.5], [1.0], NAN, Other()],
    "steps": [-1, 2.5, "a", NAN],
    "svi_or_pair": [3, "ab", None, Other(), (1, 2), pyro.infer.SVI, (lambda: None,)],
    "takes_mask": FLAG,
    "temperature": POSITIVE,
    "test_fraction": FRACTION,
    "threshold": NON_NEGATIVE,
    "tokens": ["ab", None, Other(), torch.full((4,), 99), torch.full((4,), 0.5)],
    "tolerance": POSITIVE,
    "too_long": CHOICE,
    "total_count": POSITIVE,
    "train_frame": FLAG,
    "unit": POSITIVE,
    "validation": [3.5, Other()],
    "value": [NAN, INF, "a"],
    "vocab_size": INT,
    "weights": CHOICE,
    "window": INT,
    "word_dropout": FRACTION,
    "x": [*TENSOR, torch.tensor(1.0)],
    "xlabel": [],
    "y": [*TENSOR, torch.ones(4, 5), torch.full((4, 2), NAN)],
    "z": [*TENSOR, torch.ones(4, 5), torch.tensor(1.0), torch.full((4, 2), 1 / 3, dtype=torch.double)],
}


def described(value):
    """A wrong value in a few words, of one line."""
    if isinstance(value, torch.Tensor):
        first = f" from {value.flatten()[0].item():.3g}" if value.numel() else ""
        return f"tensor{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}{first}"
    if isinstance(value, Path):
        return value.name
    return repr(value).replace("\n", " ").split(" at 0x")[0][:40]
