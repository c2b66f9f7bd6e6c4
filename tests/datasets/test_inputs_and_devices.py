"""Images and toy data: inputs that are converted or refused, and the default device."""

import math

import numpy as np
import pytest
import torch
from helpers.idx_files import FILES, idx, write

from pyro_ilvae import _checks, datasets
from pyro_ilvae.datasets import text

MIXTURE = {"num_data": 5, "scale": 1.0}


@pytest.fixture(autouse=True)
def _no_folder(monkeypatch):
    monkeypatch.delenv("PYRO_ILVAE_DATA", raising=False)


@pytest.fixture
def meta_device():
    """A default device that, as a GPU, takes no generator of the CPU and gives no arrays."""
    before = torch.get_default_device()
    torch.set_default_device("meta")
    yield
    torch.set_default_device(before)


def load_folder(folder):
    write(folder)
    return datasets.fashion_mnist(folder)


def load_texts(folder):
    (folder / "some.txt").write_text("a b\n" * 10)
    return text.from_files(train=folder / "some.txt", test=folder / "some.txt", validation=folder / "some.txt")


LOADERS = {
    "digits": lambda folder: datasets.digits(),
    "gaussian_mixture": lambda folder: datasets.gaussian_mixture(5, 1.0),
    "gaussian_mixture_of_a_tensor": lambda folder: datasets.gaussian_mixture(5, 1.0, torch.zeros(2, 3, device="cpu")),
    "fashion_mnist": load_folder,
    "text": load_texts,
    "words": lambda folder: text.words(),
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_data_are_on_the_default_device(load, meta_device, tmp_path):
    found = [value for value in load(tmp_path) if isinstance(value, torch.Tensor)]
    assert len(found) >= 2
    assert {value.device.type for value in found} == {"meta"}
    with torch.device("cpu"):
        expected = [value for value in load(tmp_path) if isinstance(value, torch.Tensor)]
    assert {value.device.type for value in expected} == {"cpu"}
    assert [(value.shape, value.dtype) for value in found] == [(value.shape, value.dtype) for value in expected]


def test_a_file_and_the_best_accuracy_under_another_default_device(meta_device, tmp_path):
    (tmp_path / "example").write_bytes(idx(np.ones((2, 3))))
    assert datasets.read_idx(tmp_path / "example").device.type == "meta"
    assert datasets.gaussian_mixture_accuracy(7.5) == pytest.approx(0.827, abs=1e-3)
    x = datasets.binarize(torch.tensor([0.0, 1.0], device="cpu"), seed=0)
    assert (x.device.type, x.tolist()) == ("cpu", [0.0, 1.0])


@pytest.mark.parametrize("name", [FILES[0], FILES[2]])
@pytest.mark.parametrize("shape", [(0, 4, 6), (5, 0, 6), (5, 4, 0)])
def test_folders_without_a_pixel_are_refused(tmp_path, name, shape):
    write(tmp_path)
    for path in tmp_path.glob(f"{name}*"):
        path.unlink()
    (tmp_path / name).write_bytes(idx(np.zeros(shape)))
    labels = name.replace("images-idx3", "labels-idx1")
    for path in tmp_path.glob(f"{labels}*"):
        path.unlink()
    (tmp_path / labels).write_bytes(idx(np.zeros(shape[0])))
    with pytest.raises(
        ValueError, match=rf"Expected images of shape .* in .*{name}, N, H, W >= 1, .* got \({shape[0]},"
    ):
        datasets.fashion_mnist(tmp_path)


@pytest.mark.parametrize(
    "x", [np.array([0.2, 0.7]), [0.2, 0.7], (0.2, 0.7), np.array([0.2, 0.7])[::-1], np.float32([0.2, 0.7])]
)
def test_intensities_in_arrays_and_lists(x):
    found = datasets.binarize(x, threshold=0.5)
    assert found.tolist() == [float(value > 0.5) for value in x]
    assert found.dtype == (torch.as_tensor(x.copy()).dtype if isinstance(x, np.ndarray) else torch.float32)


@pytest.mark.parametrize("centers", [np.array([[0.1, 0.0], [0.7, 1.0]]), [[0.1, 0.0], [0.7, 1.0]]])
def test_centers_keep_their_precision(centers):
    exact = datasets.gaussian_mixture_accuracy(0.5, torch.tensor([[0.1, 0.0], [0.7, 1.0]], dtype=torch.float64))
    assert datasets.gaussian_mixture_accuracy(np.float64(0.5), centers) == exact
    assert datasets.gaussian_mixture_accuracy(torch.tensor(0.5), centers) == exact
    data = datasets.gaussian_mixture(np.int64(9), torch.tensor(0.5), centers)
    torch.testing.assert_close(data.x, datasets.gaussian_mixture(9, 0.5, torch.tensor(centers)).x)


@pytest.mark.parametrize("value", [None, "abc", {0: [0.5]}, object(), torch.Tensor, [[0.1], [0.2, 0.3]], ["a"], {0.5}])
def test_what_is_no_tensor(value):
    with pytest.raises(TypeError, match="Expected x to be a tensor, an array or nested lists of numbers, got"):
        datasets.binarize(value)
    for call in (
        lambda: datasets.gaussian_mixture(5, 1.0, value),
        lambda: datasets.gaussian_mixture_accuracy(1, value),
    ):
        with pytest.raises(
            TypeError, match="Expected centers to be a tensor, an array or nested lists of numbers, got"
        ):
            call()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"num_data": n}, "num_data to be an int >= 1") for n in (0, -1, 2.5, "a", None, True, [5], math.nan)]
    + [({"scale": s}, "scale to be a finite number > 0") for s in (0, -1.0, math.nan, math.inf, "a", None, [1.0])]
    + [({"seed": s}, "seed to be an int or None") for s in ("a", 2.5, [1], True, 2**70)]
    + [
        ({"centers": torch.zeros(shape)}, r"centers of shape \(C, D\)")
        for shape in ((), (2,), (0, 2), (2, 0), (1, 2, 3))
    ]
    + [
        ({"centers": [[0.0, math.nan]]}, "centers to be finite"),
        ({"centers": torch.zeros(2, 2) * 1j}, "centers to be real"),
    ],
)
def test_what_the_mixture_refuses(arguments, message):
    with pytest.raises(ValueError, match=f"Expected {message}"):
        datasets.gaussian_mixture(**{**MIXTURE, **arguments})


@pytest.mark.parametrize("seed", ["a", 2.5, [1], True, 2**70])
def test_seeds_that_are_refused(seed, tmp_path):
    (tmp_path / "some.txt").write_text("a\n" * 10)
    for call in (
        lambda: datasets.binarize(torch.rand(3), seed=seed),
        lambda: text.from_file(tmp_path / "some.txt", seed=seed),
    ):
        with pytest.raises(ValueError, match="Expected seed to be an int or None"):
            call()


@pytest.mark.parametrize("path", [3, ["folder"], b"folder", object()])
def test_what_is_no_path(path):
    with pytest.raises(TypeError, match="Expected folder to be a path, got"):
        datasets.fashion_mnist(path)
    with pytest.raises(TypeError, match="Expected path to be a path, got"):
        datasets.read_idx(path)


@pytest.mark.parametrize("offline", ["yes", None, 1])
def test_offline_is_true_or_false(offline):
    with pytest.raises(TypeError, match="Expected offline to be True or False"):
        datasets.fashion_mnist(offline=offline)


@pytest.mark.parametrize("value", [[0.5, 0.5], np.array([0.5, 0.5]), np.array([1, 0])])
def test_arrays_become_tensors_on_the_default_device(value, meta_device):
    assert _checks.tensor("x", value).device.type == "meta"
