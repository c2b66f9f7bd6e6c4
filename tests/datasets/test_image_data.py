"""Sets of images: where they are found, and no data set in another's place without a word."""

import gzip
import http.client
import math
import os
import socket
import sys
import urllib.error
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.idx_files import FILES, idx, write
from sklearn.datasets import fetch_openml, load_digits

from pyro_ilvae import datasets

REAL_FOLDER = os.environ.get("PYRO_ILVAE_DATA")
SUBFOLDERS = (".", "fashion-mnist", "fashion-mnist-subset", "FashionMNIST/raw")


@pytest.fixture(autouse=True)
def fetched(monkeypatch):
    """No folder and no network but what a test sets: the calls of ``fetch_openml``, which fail."""
    calls = []

    def fetch(*args, **kwargs):
        calls.append((args, kwargs, socket.getdefaulttimeout()))
        raise urllib.error.URLError("no network")

    monkeypatch.delenv("PYRO_ILVAE_DATA", raising=False)
    monkeypatch.setattr("sklearn.datasets.fetch_openml", fetch)
    return calls


def same(data, arrays):
    expected = [arrays[0] / 255, arrays[1], arrays[2] / 255, arrays[3]]
    types = [torch.float32, torch.int64] * 2
    return all(
        tensor.dtype == dtype
        and tensor.shape == array.shape
        and np.allclose(tensor.numpy(force=True), array, rtol=0, atol=1e-7)
        for tensor, array, dtype in zip(data[1:], expected, types, strict=True)
    )


def equal(a, b):
    return a.name == b.name and all(torch.equal(x, y) for x, y in zip(a[1:], b[1:], strict=True))


# Fashion-MNIST.


@pytest.mark.parametrize("subfolder", SUBFOLDERS)
@pytest.mark.parametrize("compress", [(True,) * 4, (False,) * 4, (True, False, False, True)])
def test_folder_by_the_argument_and_by_the_variable(tmp_path, monkeypatch, fetched, subfolder, compress):
    arrays = write(tmp_path / subfolder, compress=compress)
    for folder in (tmp_path, str(tmp_path)):
        assert same(datasets.fashion_mnist(folder), arrays)
    monkeypatch.setenv("PYRO_ILVAE_DATA", str(tmp_path))
    for offline in (False, True):
        data = datasets.fashion_mnist(offline=offline)
        assert same(data, arrays)
        assert data.name == "Fashion-MNIST subset"
    assert not fetched


def test_argument_goes_before_the_variable_and_the_folder_before_its_subfolders(tmp_path, monkeypatch):
    arrays = {name: write(tmp_path / name, seed=seed) for seed, name in enumerate(["a", "b", "b/fashion-mnist"])}
    monkeypatch.setenv("PYRO_ILVAE_DATA", str(tmp_path / "a"))
    assert same(datasets.fashion_mnist(tmp_path / "b"), arrays["b"])
    assert same(datasets.fashion_mnist(), arrays["a"])


@pytest.mark.parametrize(("train", "test"), [(60_000, 10_000), (60_000, 9_999), (59_999, 10_000), (10_000, 60_000)])
def test_name_tells_the_whole_from_a_subset(tmp_path, train, test):
    write(tmp_path, sizes=(train, test), image=(1, 1), compress=(False,) * 4)
    whole = (train, test) == (60_000, 10_000)
    assert datasets.fashion_mnist(tmp_path).name == ("Fashion-MNIST" if whole else "Fashion-MNIST subset")


@pytest.mark.parametrize("lost", FILES)
@pytest.mark.parametrize("offline", [False, True])
def test_folder_without_a_file_is_an_error_and_never_another_data_set(tmp_path, monkeypatch, fetched, lost, offline):
    write(tmp_path)
    # Neither the same file beside the others nor MNIST in a folder of its own makes up for it.
    (tmp_path / "fashion-mnist").mkdir()
    (tmp_path / f"{lost}.gz").rename(tmp_path / "fashion-mnist" / f"{lost}.gz")
    write(tmp_path / "mnist")
    with pytest.raises(ValueError, match="Expected folder to hold") as error:
        datasets.fashion_mnist(tmp_path, offline=offline)
    assert all(name in str(error.value) for name in (*FILES, *SUBFOLDERS[1:], str(tmp_path), "not all four"))
    monkeypatch.setenv("PYRO_ILVAE_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(ValueError, match=r"Expected PYRO_ILVAE_DATA to hold .*elsewhere', which is no folder"):
        datasets.fashion_mnist(offline=offline)
    assert not fetched


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("shape", [(4,), (6,), (), (5, 4), (5, 4, 5), (5, 4, 6, 1), (4, 4, 6)])
def test_files_that_do_not_fit_together_are_an_error(tmp_path, name, shape):
    write(tmp_path, sizes=(5, 5))
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(idx(np.zeros(shape))))
    with pytest.raises(ValueError, match=r"Expected (training|images).*, got \("):
        datasets.fashion_mnist(tmp_path)


@pytest.mark.parametrize("image", [(), (24,), (4, 6, 1)])
def test_images_of_other_dimensions_are_an_error(tmp_path, image):
    write(tmp_path, image=image)
    with pytest.raises(ValueError, match=r"Expected images of shape \(N, H, W\) in .*train-images.*, got \(5,"):
        datasets.fashion_mnist(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_broken_file_is_named(tmp_path, name):
    write(tmp_path)
    path = tmp_path / f"{name}.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{name}.gz to be a whole gzip file"):
        datasets.fashion_mnist(tmp_path)


@pytest.mark.skipif(not REAL_FOLDER, reason="PYRO_ILVAE_DATA is not set")
def test_real_files():
    data = datasets.fashion_mnist(REAL_FOLDER)
    sizes = len(data.train), len(data.test)
    assert data.name == ("Fashion-MNIST" if sizes == (60_000, 10_000) else "Fashion-MNIST subset")
    for images, labels in (data[1:3], data[3:5]):
        assert images.shape[1:] == (28, 28)
        assert labels.shape == images.shape[:1]
        assert (images.min(), images.max()) == (0, 1)
        # Ten kinds of clothes, each a tenth of the whole and about a tenth of a random part.
        shares = torch.bincount(labels, minlength=10).double() / len(labels)
        assert ((shares - 0.1).abs() < 5 * math.sqrt(0.09 / len(labels))).all()
        # Trousers (1) are narrower than the image and bags (8) are not: labels belong to their images.
        edge = images[:, :, :4].mean((1, 2))
        assert edge[labels == 1].mean() < 0.1 * edge[labels == 8].mean()


# OpenML and where there is none.


def test_openml_is_split_as_published(monkeypatch):
    number = np.arange(70_000)
    pixels = np.zeros((70_000, 784), dtype=np.uint8)
    pixels[:, 3], pixels[:, 28], pixels[:, 783] = number % 100, number // 100 % 100, number // 10_000  # its own number
    target = (number // 7 % 10).astype(str).astype(object)
    arguments = []

    def fetch(*args, **kwargs):
        arguments.append((args, kwargs))
        return SimpleNamespace(data=pixels, target=target)

    monkeypatch.setattr("sklearn.datasets.fetch_openml", fetch)
    data = datasets.fashion_mnist()
    assert data.name == "Fashion-MNIST"
    for images, labels, part in ((*data[1:3], number[:60_000]), (*data[3:], number[60_000:])):
        assert (images.shape, images.dtype) == ((len(part), 28, 28), torch.float32)
        digits = (255 * torch.stack([images[:, 0, 3], images[:, 1, 0], images[:, 27, 27]])).round().long()
        # Integers are multiplied on the CPU only.
        assert np.array_equal(digits.T.cpu() @ torch.tensor([1, 100, 10_000], device="cpu"), part)
        assert labels.dtype == torch.int64
        assert np.array_equal(labels.numpy(force=True), part // 7 % 10)
    known = {"version": 1, "as_frame": False, "parser": "auto", "n_retries": 1}
    assert arguments == [(("Fashion-MNIST",), known)]


@pytest.mark.parametrize(
    "error",
    [
        urllib.error.URLError("no route"),
        urllib.error.HTTPError("https://openml.org", 503, "unavailable", http.client.HTTPMessage(), None),
        TimeoutError("timed out"),
        ConnectionResetError("reset"),
        http.client.IncompleteRead(b"half"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_without_a_network_digits_come_with_a_warning(monkeypatch, error):
    monkeypatch.setattr("sklearn.datasets.fetch_openml", lambda *args, **kwargs: (_ for _ in ()).throw(error))
    with pytest.warns(UserWarning, match=r"could not be downloaded \(.*scikit-learn's digits.*PYRO_ILVAE_DATA") as seen:
        data = datasets.fashion_mnist()
    assert [warning.filename for warning in seen] == [__file__]
    assert equal(data, datasets.digits())


def test_scikit_learn_itself_without_a_network(monkeypatch, tmp_path):
    tried = []

    def refuse(*args, **kwargs):
        tried.append(args)
        raise socket.gaierror("no network")

    monkeypatch.setattr("sklearn.datasets.fetch_openml", fetch_openml)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path))  # not what an earlier download left
    with pytest.warns(UserWarning, match="could not be downloaded") as seen:
        data = datasets.fashion_mnist()
    assert len(seen) == 1
    assert equal(data, datasets.digits())
    assert tried


@pytest.mark.parametrize("error", [OSError(28, "disk full"), PermissionError("no"), ValueError("md5")])
def test_other_failures_are_not_taken_for_a_missing_network(monkeypatch, error):
    monkeypatch.setattr("sklearn.datasets.fetch_openml", lambda *args, **kwargs: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)) as caught:
        datasets.fashion_mnist()
    assert caught.value is error


def test_offline_takes_digits_without_a_word(fetched):
    assert equal(datasets.fashion_mnist(offline=True), datasets.digits())
    assert not fetched


def test_empty_variable_is_none(monkeypatch):
    monkeypatch.setenv("PYRO_ILVAE_DATA", "")
    assert datasets.fashion_mnist(offline=True).name == "digits"


@pytest.mark.parametrize("patience", [None, 3.0])
def test_download_waits_for_a_limited_time_and_puts_the_limit_back(monkeypatch, fetched, patience):
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(patience)
    try:
        with pytest.warns(UserWarning, match="could not be downloaded"):
            datasets.fashion_mnist()
        assert socket.getdefaulttimeout() == patience
    finally:
        socket.setdefaulttimeout(before)
    ((_, _, used),) = fetched
    assert used == (patience or 20.0)


def test_digits_are_all_of_scikit_learns_in_a_split_that_stays():
    state = torch.get_rng_state()
    data = datasets.digits()
    assert torch.equal(state, torch.get_rng_state())
    assert equal(data, datasets.digits())
    assert (data.train.shape, data.test.shape) == ((1500, 8, 8), (297, 8, 8))
    assert data.test_labels[:12].tolist() == [5, 7, 4, 5, 9, 5, 5, 8, 7, 7, 8, 9]
    assert (data.train.dtype, data.train_labels.dtype) == (torch.float32, torch.int64)
    source = load_digits()

    def rows(images, labels):
        return sorted(map(tuple, np.column_stack([images.reshape(len(images), -1), labels]).tolist()))

    images, labels = torch.cat([data.train, data.test]) * 16, torch.cat([data.train_labels, data.test_labels])
    assert rows(images.numpy(force=True), labels.numpy(force=True)) == rows(source.images, source.target)
    # Random: each label has its share of the test images.
    shares = torch.bincount(labels, minlength=10) / len(labels)
    errors = (torch.bincount(data.test_labels, minlength=10) / 297 - shares).abs()
    assert (errors < 5 * (shares * (1 - shares) / 297).sqrt()).all()


@pytest.mark.parametrize("call", [datasets.digits, datasets.fashion_mnist])
def test_says_what_to_install(monkeypatch, call):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=f"{call.__name__}.* needs scikit-learn: pip install scikit-learn"):
        call()


def test_folder_needs_no_scikit_learn(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    arrays = write(tmp_path)
    assert same(datasets.fashion_mnist(tmp_path), arrays)
