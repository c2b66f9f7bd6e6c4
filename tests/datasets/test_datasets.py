"""Data: the laws of the draws, IDX files byte by byte, and no data set in another's place without a word."""

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
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import fetch_openml, load_digits

from pyro_ilvae import datasets

REAL_FOLDER = os.environ.get("PYRO_ILVAE_DATA")
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
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


def idx(array, code=0x08):
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, code, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def write(folder, sizes=(5, 3), image=(4, 6), seed=0, compress=(True,) * 4):
    """Four files of random images and labels; returns what they hold, in the order of FILES."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = []
    for size in sizes:
        arrays += [generator.integers(0, 256, (size, *image)), generator.integers(0, 10, size)]
    for name, array, zipped in zip(FILES, arrays, compress, strict=True):
        (folder / (name + ".gz" * zipped)).write_bytes(gzip.compress(idx(array)) if zipped else idx(array))
    return arrays


def same(data, arrays):
    expected = [arrays[0] / 255, arrays[1], arrays[2] / 255, arrays[3]]
    types = [torch.float32, torch.int64] * 2
    return all(
        tensor.dtype == dtype and tensor.shape == array.shape and np.allclose(tensor.numpy(), array, rtol=0, atol=1e-7)
        for tensor, array, dtype in zip(data[1:], expected, types, strict=True)
    )


def equal(a, b):
    return a.name == b.name and all(torch.equal(x, y) for x, y in zip(a[1:], b[1:], strict=True))


# The mixture.

CENTRES = [((0, 0), (10, 10)), ((0, 0), (3, 0), (0, 5)), ((-1.5, 2.0),), ((1, 2, 3), (3, 2, 1)), ((0.0,), (1.0,))]


@pytest.mark.parametrize("centers", CENTRES)
@pytest.mark.parametrize("scale", [0.3, 7.5])
def test_mixture_has_the_moments_of_its_components(centers, scale):
    count = 20_000
    x, labels = datasets.gaussian_mixture(count, scale, centers, seed=3)
    means = torch.tensor(centers, dtype=torch.float32)
    assert (x.shape, x.dtype) == ((count, means.shape[1]), torch.float32)
    assert (labels.shape, labels.dtype) == ((count,), torch.int64)
    share = 1 / len(means)
    noise = (x - means[labels]) / scale
    for label in range(len(means)):
        members = noise[labels == label].double()
        assert abs(len(members) / count - share) <= 5 * math.sqrt(share * (1 - share) / count)
        size = len(members)
        assert (members.mean(0).abs() < 5 / math.sqrt(size)).all()
        product = members.T @ members / size
        assert ((product - torch.eye(len(product))).abs() < 5 * math.sqrt(2 / size)).all()
        assert ((members**4).mean(0) - 3).abs().max() < 5 * math.sqrt(96 / size)  # Gaussian


def test_labels_are_independent_draws_and_not_exact_halves():
    counts = torch.stack([datasets.gaussian_mixture(100, 1.0, seed=seed).labels.sum() for seed in range(400)]).double()
    assert abs(counts.mean() - 50) < 5 * math.sqrt(25 / 400)
    assert abs(counts.var() - 25) < 5 * 25 * math.sqrt(2 / 400)


@given(st.integers(0, 2**31), st.integers(1, 20))
def test_mixture_depends_on_its_seed_only(seed, count):
    state = torch.get_rng_state()
    first = datasets.gaussian_mixture(count, 2.0, seed=seed)
    assert torch.equal(state, torch.get_rng_state())
    torch.randn(3)
    second, other = (datasets.gaussian_mixture(count, 2.0, seed=s) for s in (seed, seed + 1))
    assert torch.equal(first.x, second.x)
    assert torch.equal(first.labels, second.labels)
    assert not torch.equal(first.x, other.x)


def test_mixture_is_single_precision_whatever_the_default():
    expected = datasets.gaussian_mixture(10, 2.0)
    torch.set_default_dtype(torch.float64)
    try:
        found = datasets.gaussian_mixture(10, np.float64(2.0), torch.tensor([[0, 0], [10, 10]]))
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.x.dtype == torch.float32
    assert torch.equal(found.x, expected.x)


@pytest.mark.parametrize("scale", [1.0, 4.0, 7.5, 30.0])
@pytest.mark.parametrize("centers", [centers for centers in CENTRES if len(centers) == 2])
def test_accuracy_is_that_of_the_nearest_center(scale, centers):
    x, labels = datasets.gaussian_mixture(50_000, scale, centers, seed=7)
    nearest = torch.cdist(x, torch.tensor(centers, dtype=torch.float32)).argmin(1)
    accuracy = datasets.gaussian_mixture_accuracy(scale, centers)
    error = math.sqrt(accuracy * (1 - accuracy) / len(x))
    assert abs((nearest == labels).double().mean().item() - accuracy) <= 5 * error + 1e-12
    assert 0.5 < accuracy <= 1


@given(st.floats(0.1, 10), st.floats(0.1, 10), st.floats(-5, 5), st.floats(0, 2 * math.pi))
def test_accuracy_knows_only_the_distance_over_the_scale(scale, factor, shift, angle):
    centers = torch.tensor([[0.0, 1.0], [2.0, -1.0]], dtype=torch.float64)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    expected = datasets.gaussian_mixture_accuracy(scale, centers)
    moved = factor * (centers.flip(0) @ turn.T + shift)
    assert datasets.gaussian_mixture_accuracy(factor * scale, moved) == pytest.approx(expected)
    assert datasets.gaussian_mixture_accuracy(2 * scale, centers) < expected or expected == 1
    assert datasets.gaussian_mixture_accuracy(scale, torch.zeros(2, 3)) == 0.5


@pytest.mark.parametrize(
    ("name", "value"),
    [("scale", value) for value in (0, -1.0, math.nan, math.inf)]
    + [("centers", value) for value in ((), ((),), (0, 1), (((0.0, 1.0),),), ((math.nan, 0.0), (1.0, 1.0)))],
)
def test_what_mixture_and_accuracy_refuse(name, value):
    for function, arguments in ((datasets.gaussian_mixture, {"num_data": 3}), (datasets.gaussian_mixture_accuracy, {})):
        with pytest.raises(ValueError, match=rf"Expected {name} .*, got"):
            function(**{**arguments, "scale": 1.0, name: value})


@pytest.mark.parametrize("count", [0, -1, 1.5])
def test_numbers_of_data_that_are_refused(count):
    with pytest.raises(ValueError, match="Expected num_data to be an int >= 1"):
        datasets.gaussian_mixture(count, 1.0)


@pytest.mark.parametrize("count", [1, 3])
def test_accuracy_is_for_two_centers(count):
    with pytest.raises(ValueError, match=rf"Expected centers of shape \(2, D\), got \({count}, 2\)"):
        datasets.gaussian_mixture_accuracy(1.0, torch.randn(count, 2))


# IDX files.

shapes = st.lists(st.integers(0, 5), max_size=4)


@given(shapes, st.randoms(use_true_random=False), st.booleans(), st.sampled_from(["", ".gz"]))
def test_round_trip_of_any_shape(tmp_path_factory, shape, random, compress, suffix):
    array = np.array([random.randrange(256) for _ in range(math.prod(shape))], dtype=np.uint8).reshape(shape)
    path = tmp_path_factory.mktemp("idx") / f"example{suffix}"
    path.write_bytes(gzip.compress(idx(array)) if compress else idx(array))
    found = datasets.read_idx(str(path))
    assert found.dtype == torch.uint8
    assert found.shape == array.shape
    assert np.array_equal(found.numpy(), array)
    found.fill_(0)  # writable, without a warning


def test_sizes_are_big_endian_and_unsigned(tmp_path):
    path = tmp_path / "example"
    path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 1, 2]) + bytes(258))
    assert datasets.read_idx(path).shape == (258,)
    path.write_bytes(bytes([0, 0, 8, 1, 255, 255, 255, 255]))
    with pytest.raises(ValueError, match=rf"hold {2**32 - 1} entries"):
        datasets.read_idx(path)


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "gzipped"])
def test_every_truncation_and_every_extension_is_refused(tmp_path, compress):
    raw = idx(np.arange(24).reshape(2, 3, 4))
    path = tmp_path / "broken-file"
    for content in [raw[:length] for length in range(len(raw))] + [raw + bytes(more) for more in (1, 4, 24)]:
        path.write_bytes(gzip.compress(content) if compress else content)
        size = len(content)
        what = "start with" if size < 4 else "name 3 dimensions" if size < 16 else "hold 24 entries"
        with pytest.raises(ValueError, match=f"Expected .*broken-file to {what}.*, got"):
            datasets.read_idx(path)


def test_every_truncation_and_damage_of_gzip_is_refused(tmp_path):
    zipped = gzip.compress(idx(np.arange(24).reshape(2, 3, 4)))
    path = tmp_path / "broken-file.gz"
    damaged = [zipped[:i] + bytes([zipped[i] ^ 0xFF]) + zipped[i + 1 :] for i in (2, 10, 20, len(zipped) - 8)]
    for content in [zipped[:length] for length in range(len(zipped))] + [*damaged, zipped + b"more"]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"Expected .*broken-file.gz to .*, got"):
            datasets.read_idx(path)


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("byte", [1, 8, 255])
def test_wrong_magic_number_is_refused(tmp_path, position, byte):
    raw = bytearray(idx(np.zeros((2, 2))))
    raw[position] = byte
    (tmp_path / "no-idx").write_bytes(raw)
    with pytest.raises(ValueError, match=rf"no-idx to start with 0x0000 .*, got 0x{raw[:4].hex()}"):
        datasets.read_idx(tmp_path / "no-idx")


@pytest.mark.parametrize("code", [0x00, 0x07, 0x09, 0x0B, 0x0C, 0x0D, 0x0E, 0xFF])
def test_other_data_types_are_refused(tmp_path, code):
    (tmp_path / "no-bytes").write_bytes(idx(np.zeros((2, 2)), code))
    with pytest.raises(ValueError, match=rf"no-bytes to hold unsigned bytes, data type 0x08, got 0x{code:02x}"):
        datasets.read_idx(tmp_path / "no-bytes")


def test_missing_file_is_the_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        datasets.read_idx(tmp_path / "none")


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
        # Ten kinds of clothes, each a tenth of the whole and about that of a random part.
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
        assert np.array_equal(digits.T @ torch.tensor([1, 100, 10_000]), part)
        assert labels.dtype == torch.int64
        assert np.array_equal(labels.numpy(), part // 7 % 10)
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
    assert rows(images.numpy(), labels.numpy()) == rows(source.images, source.target)
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


# Binary data.

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_draws_have_the_intensities_as_probabilities(dtype):
    x = torch.tensor([0.0, 0.01, 0.25, 0.5, 0.9, 1.0], dtype=dtype)
    count = 20_000
    draws = datasets.binarize(x.expand(count, -1), seed=1)
    assert (draws.shape, draws.dtype) == ((count, 6), dtype)
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    error = (x * (1 - x)).double().div(count).sqrt()
    assert ((draws.double().mean(0) - x.double()).abs() <= 5 * error).all()
    # Entries are drawn independently.
    pairs = draws[:, 2:5].double().T.corrcoef().triu(1)
    assert pairs.abs().max() < 5 / math.sqrt(count)


@given(shapes, st.integers(0, 2**31))
def test_draws_by_seed_and_by_the_global_state(shape, seed):
    x = torch.rand(*shape, 40)
    state = torch.get_rng_state()
    seeded = datasets.binarize(x, seed=seed)
    assert torch.equal(state, torch.get_rng_state())
    assert seeded.shape == x.shape
    assert torch.equal(datasets.binarize(x, seed=seed), seeded)
    first = datasets.binarize(x)
    torch.set_rng_state(state)
    assert torch.equal(datasets.binarize(x), first)
    if x.numel():
        assert not torch.equal(torch.get_rng_state(), state)


@given(shapes, st.floats(0, 1), st.sampled_from(DTYPES))
def test_threshold_is_the_largest_intensity_that_is_zero(shape, threshold, dtype):
    x = torch.rand(shape, dtype=torch.float64).to(dtype)
    state = torch.get_rng_state()
    binary = datasets.binarize(x, threshold=threshold)
    assert torch.equal(state, torch.get_rng_state())
    assert (binary.shape, binary.dtype) == (x.shape, dtype)
    assert torch.equal(datasets.binarize(binary, threshold=0.5), binary)
    for value, bit in zip(x.flatten().tolist(), binary.flatten().tolist(), strict=True):
        at_value = datasets.binarize(x, threshold=value)
        assert not at_value[x <= value].any()
        assert at_value[x > value].all()
        assert bit == (value > threshold)


def test_binary_data_have_no_gradient_and_leave_the_intensities():
    x = torch.rand(5, requires_grad=True)
    before = x.detach().clone()
    for binary in (datasets.binarize(x), datasets.binarize(x, threshold=0.5)):
        assert not binary.requires_grad
    assert torch.equal(x.detach(), before)


@pytest.mark.parametrize(
    ("x", "arguments", "message"),
    [
        (torch.tensor([0.0, value, 1.0]), arguments, r"x in \[0, 1\], got values from")
        for value in (-1e-3, 1.001, 255.0, math.nan, math.inf)
        for arguments in ({}, {"seed": 0}, {"threshold": 0.5})
    ]
    + [(torch.rand(3), {"threshold": t}, r"threshold to be a number in \[0, 1\], got") for t in (-0.1, 1.1, 127, math.nan)]
    + [(torch.ones(3, dtype=t), {}, f"x to be a floating-point tensor, got {t}") for t in (torch.uint8, torch.bool)]
    + [(torch.rand(3), {"seed": 0, "threshold": 0.5}, r"a seed or a threshold, got seed=0 and threshold=0\.5")],
)
def test_what_binarize_refuses(x, arguments, message):
    with pytest.raises(ValueError, match=f"Expected {message}"):
        datasets.binarize(x, **arguments)
