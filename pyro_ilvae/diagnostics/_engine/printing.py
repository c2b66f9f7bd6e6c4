"""How results of diagnostics print: as means with their standard errors, in one line."""

from collections.abc import Sequence

from torch import Tensor

from pyro_ilvae.diagnostics._engine.moments import mean_over_data


def described(result: object, *parts: str | None) -> str:
    """The type of a result with what there is to say about it."""
    return f"{type(result).__name__}({', '.join(part for part in parts if part is not None)})"


def number(value: float | Tensor | None, error: float | Tensor | None = None) -> str:
    """A number, with its standard error if it has one."""
    if value is None:
        return "None"
    text = f"{float(value):.4g}"
    return text if error is None else f"{text} +- {float(error):.2g}"


def mean(values: Tensor, errors: Tensor) -> str:
    r"""The mean of values of shape (N, \*unit) over data and dimensions, with its standard error.

    The errors of the dimensions of one datum may be correlated, so that their mean stands for the error of the mean.
    """
    rows, row_errors = (part.reshape(len(part), -1).double().mean(1) for part in (values, errors))
    return f"mean {number(*mean_over_data(rows, row_errors))}"


def sizes(shape: Sequence[int], first: str = "data") -> str:
    """How many values a mean is over, such as "100 data x 8 dimensions"."""
    single = {"data": "datum"}.get(first, first.removesuffix("s"))
    count = f"{shape[0]} {single if shape[0] == 1 else first}"
    return " x ".join([count, *map(str, shape[1:])]) + (" dimensions" if len(shape) > 1 else "")
