"""Images of clothes and digits, the IDX files in which they are published, and binary images."""

import gzip
import http.client
import math
import os
import socket
import urllib.error
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae._contexts import seeded
from pyro_ilvae.datasets._printing import names_and_shapes

__all__ = ["ImageData", "binarize", "digits", "fashion_mnist", "read_idx"]

FOLDER_VARIABLE = "PYRO_ILVAE_DATA"

_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

# A fixed list: a search could find MNIST, whose files have the same names.
_SUBFOLDERS = (".", "fashion-mnist", "fashion-mnist-subset", "FashionMNIST/raw")

_PATIENCE = 20.0  # seconds to wait for an answer before the network counts as missing


class ImageData(NamedTuple):
    """Images with intensities in [0, 1] and their labels, split into training and test data, on the default device."""

    name: str  #: the name of the data: "Fashion-MNIST", "Fashion-MNIST subset" or "digits"
    train: Tensor  #: float32 of shape (N, H, W)
    train_labels: Tensor  #: int64 of shape (N,)
    test: Tensor  #: float32 of shape (M, H, W)
    test_labels: Tensor  #: int64 of shape (M,)

    def __repr__(self) -> str:
        return names_and_shapes(self)


def fashion_mnist(folder: str | os.PathLike[str] | None = None, *, offline: bool = False) -> ImageData:
    """Fashion-MNIST [1] from a folder or from OpenML, or scikit-learn's digits if there is neither.

    The images come from the first source that is there:

    1. A folder with the four files of Fashion-MNIST under their official names, gzipped or not, directly in the folder
       or in its subfolder ``fashion-mnist``, ``fashion-mnist-subset`` or ``FashionMNIST/raw`` (torchvision's). The
       files may hold a subset. Files of MNIST have the same names and form, and are not told apart.
    2. The 70,000 images of OpenML, which scikit-learn downloads once and keeps.
    3. Without a network, :func:`digits`, with a warning.

    Args:
        folder: a folder to load from; None takes the folder that the environment variable ``PYRO_ILVAE_DATA`` names,
            or no folder if the variable is not set.
        offline: whether to skip OpenML and load :func:`digits`, without a warning, if there is no folder.

    Returns:
        Images of shape (N, H, W) and labels of shape (N,). Their ``name`` is "Fashion-MNIST" for 60,000 training and
        10,000 test images, "Fashion-MNIST subset" for other numbers of images, and "digits" for :func:`digits`.

    Raises:
        ValueError: for a folder without the four files, whether the argument or the variable names it, for files that
            :func:`read_idx` refuses or that hold no image, and for files that do not fit together.
        TypeError: for a folder that is no path, and for another value of ``offline`` than True and False.
        ImportError: if scikit-learn is needed and not installed.

    Warns:
        UserWarning: if the download failed, so that digits are returned.

    References:
        [1] Xiao, Rasul & Vollgraf 2017, Fashion-MNIST: a novel image dataset for benchmarking machine learning
        algorithms, https://arxiv.org/abs/1708.07747

    Example:
        >>> images = fashion_mnist(offline=True)
        >>> images.name in ("Fashion-MNIST", "Fashion-MNIST subset", "digits")
        True
    """
    _checks.boolean("offline", offline)
    if folder is not None:
        return _from_folder(_checks.path("folder", folder), "folder")
    if os.environ.get(FOLDER_VARIABLE):
        return _from_folder(Path(os.environ[FOLDER_VARIABLE]), FOLDER_VARIABLE)
    if offline:
        return digits()
    try:
        return _from_openml()
    # These errors mean a missing network. Other OSErrors do not: a full disk, for example.
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        warnings.warn(
            f"Fashion-MNIST could not be downloaded ({error}), so these are scikit-learn's digits. Name a folder with "
            f"the files of Fashion-MNIST by the argument or by {FOLDER_VARIABLE}, or ask for digits by offline=True.",
            stacklevel=2,
        )
        return digits()


def digits() -> ImageData:
    """The 1,797 handwritten digits of 8 x 8 pixels [1] that come with scikit-learn.

    Intensities are the 17 shades of gray, 0 to 16, divided by 16. A random split that never changes makes 1,500
    training and 297 test images.

    Returns:
        Images of shape (N, 8, 8) and labels of shape (N,), with the name "digits".

    Raises:
        ImportError: if scikit-learn is not installed.

    References:
        [1] Alpaydin & Kaynak 1998, Optical recognition of handwritten digits, https://doi.org/10.24432/C50P49

    Example:
        >>> images = digits()
        >>> images.train.shape, images.test.shape
        (torch.Size([1500, 8, 8]), torch.Size([297, 8, 8]))
    """
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("digits needs scikit-learn: pip install scikit-learn") from error
    data = load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.float32)
    labels = torch.tensor(data.target, dtype=torch.int64)
    # On the CPU, so that the split is the same on all devices, and a generator of the CPU draws nowhere else.
    order = torch.randperm(len(images), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    train, test = order.to(images.device).split([1500, 297])
    return ImageData("digits", images[train], labels[train], images[test], labels[test])


def read_idx(path: str | os.PathLike[str]) -> Tensor:
    """The array in a file of unsigned bytes in the IDX format [1], the format of MNIST and Fashion-MNIST.

    A file consists of two bytes 0, the code of the data type (0x08 for unsigned bytes; other types are refused), the
    number of dimensions, the size of each dimension as a big-endian 32-bit integer, and the entries, with the last
    dimension fastest.

    Args:
        path: the file; it may be gzipped, with any suffix.

    Returns:
        A uint8 tensor with the dimensions of the file.

    Raises:
        ValueError: for a file in another format or with another data type, and for a file that is shorter or longer
            than its dimensions say. The message names the file.
        OSError: for a file that cannot be read.

    References:
        [1] LeCun, Cortes & Burges, The MNIST database of handwritten digits, http://yann.lecun.com/exdb/mnist/

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "example-idx2-ubyte"
        ...     _ = path.write_bytes(bytes([0, 0, 8, 2] + [0, 0, 0, 2] + [0, 0, 0, 3] + [1, 2, 3, 4, 5, 6]))
        ...     read_idx(path)
        tensor([[1, 2, 3],
                [4, 5, 6]], dtype=torch.uint8)
    """
    path = _checks.path("path", path)
    raw = path.read_bytes()
    # The content decides, because a browser that unpacks a download keeps the suffix .gz.
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"Expected {path} to be a whole gzip file, got {error}") from error
    if len(raw) < 4 or raw[:2] != b"\0\0":
        got = raw[:4].hex()
        raise ValueError(f"Expected path {path} to start with 0x0000 and two more bytes, as IDX does, got 0x{got}")
    if raw[2] != 0x08:
        raise ValueError(f"Expected {path} to hold unsigned bytes, data type 0x08, got 0x{raw[2]:02x}")
    start = 4 + 4 * raw[3]
    if len(raw) < start:
        raise ValueError(f"Expected {path} to name {raw[3]} dimensions in {start} bytes, got {len(raw)} bytes in all")
    shape = [int.from_bytes(raw[i : i + 4], "big") for i in range(4, start, 4)]
    if len(raw) - start != math.prod(shape):
        raise ValueError(
            f"Expected {path} to hold {math.prod(shape)} entries, for shape {tuple(shape)}, got {len(raw) - start}"
        )
    # A copy on the default device: NumPy's array is read-only, and PyTorch has no read-only tensors.
    return torch.tensor(np.frombuffer(raw, np.uint8)[start:]).reshape(shape)


def binarize(x: Tensor, *, seed: int | None = None, threshold: float | None = None) -> Tensor:
    r"""Binary data from intensities, by draws [1] or by a threshold t.

    .. math:: b_d \sim \operatorname{Bernoulli}(x_d) \qquad\text{or}\qquad b_d = 1[x_d > t].

    Args:
        x: intensities in [0, 1], of any shape and floating-point dtype.
        seed: a seed for the draws; the global random state if None.
        threshold: the intensity :math:`t` in [0, 1] above which an entry becomes 1; entries are drawn if None.

    Returns:
        Zeros and ones of the shape and dtype of ``x``.

    Raises:
        ValueError: for intensities or a threshold that are NaN or outside [0, 1], for another dtype, and for a seed
            together with a threshold.
        TypeError: for an ``x`` that is neither a tensor nor an array.

    References:
        [1] Salakhutdinov & Murray 2008, On the quantitative analysis of deep belief networks, ICML

    Example:
        >>> binarize(torch.tensor([0.0, 0.4, 0.6, 1.0]), threshold=0.5)
        tensor([0., 0., 1., 1.])
    """
    x = _checks.tensor("x", x)
    if not x.is_floating_point():
        raise ValueError(f"Expected x to be a floating-point tensor, got {x.dtype}")
    # NaN fails these comparisons too.
    if not ((x >= 0) & (x <= 1)).all():
        raise ValueError(f"Expected x in [0, 1], got values from {float(x.min()):g} to {float(x.max()):g}")
    if threshold is None:
        with seeded(seed):
            return torch.bernoulli(x.detach())
    if seed is not None:
        raise ValueError(f"Expected a seed or a threshold, got seed={seed!r} and threshold={threshold!r}")
    _checks.fraction("threshold", threshold)
    return (x > threshold).to(x.dtype)


def _from_folder(folder: Path, source: str) -> ImageData:
    """The images in the folder or in one of its known subfolders. ``source`` named the folder."""
    candidates = [[_plain_or_gzipped(folder / subfolder / name) for name in _FILES] for subfolder in _SUBFOLDERS]
    paths = next((paths for paths in candidates if all(path.is_file() for path in paths)), None)
    if paths is None:
        raise ValueError(
            f"Expected {source} to hold {', '.join(_FILES)}, each with or without .gz, directly or in one of its "
            f"subfolders {', '.join(_SUBFOLDERS[1:])}, got {str(folder)!r}, which "
            + ("has not all four of them in one place" if folder.is_dir() else "is no folder")
        )
    train, test = (_labeled_images(*pair) for pair in (paths[:2], paths[2:]))
    if train[0].shape[1:] != test[0].shape[1:]:
        sizes = f"{tuple(train[0].shape[1:])} and {tuple(test[0].shape[1:])}"
        raise ValueError(f"Expected training and test images of one size in {paths[0].parent}, got {sizes}")
    whole = len(train[0]) == 60_000 and len(test[0]) == 10_000
    return ImageData("Fashion-MNIST" if whole else "Fashion-MNIST subset", *train, *test)


def _plain_or_gzipped(path: Path) -> Path:
    return path if path.is_file() else path.with_name(f"{path.name}.gz")


def _labeled_images(images_path: Path, labels_path: Path) -> tuple[Tensor, Tensor]:
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.dim() != 3 or images.numel() == 0 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"Expected images of shape (N, H, W) in {images_path}, N, H, W >= 1, and labels of shape (N,) in "
            f"{labels_path.name}, got {tuple(images.shape)} and {tuple(labels.shape)}"
        )
    return images.float().div_(255), labels.long()


def _from_openml() -> ImageData:
    try:
        from sklearn.datasets import fetch_openml  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("fashion_mnist without a folder needs scikit-learn: pip install scikit-learn") from error
    patience = socket.getdefaulttimeout()
    # Without a timeout, a firewall that swallows packets would hold the call for minutes.
    socket.setdefaulttimeout(_PATIENCE if patience is None else patience)
    try:
        with warnings.catch_warnings():
            # scikit-learn makes at least one retry and warns of each failure; the caller warns once.
            warnings.filterwarnings("ignore", "A network error occurred", UserWarning)
            data = fetch_openml("Fashion-MNIST", version=1, as_frame=False, parser="auto", n_retries=1)
    finally:
        socket.setdefaulttimeout(patience)
    images = torch.tensor(data.data.astype(np.float32)).reshape(-1, 28, 28).div_(255)
    labels = torch.tensor(data.target.astype(np.int64))
    return ImageData("Fashion-MNIST", images[:60_000], labels[:60_000], images[60_000:], labels[60_000:])
