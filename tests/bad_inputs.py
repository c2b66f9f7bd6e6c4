"""Wrong inputs to every public function, class and method: ``python tests/bad_inputs.py`` prints what becomes of them.

Each argument of a right call is replaced by wrong values in turn. A wrong value has to end in a ValueError or TypeError
that names the argument.
"""

import re
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import matplotlib
import pyro
import torch
from helpers import (
    public_calls,
    public_calls_of_control,
    public_calls_of_covariates,
    public_calls_of_likelihoods,
    public_calls_of_models,
    public_calls_of_remedies,
    public_calls_of_results,
)
from helpers.wrong_values import BY_NAME, described

CALLS = (
    public_calls.CALLS
    | public_calls_of_control.CALLS
    | public_calls_of_covariates.CALLS
    | public_calls_of_likelihoods.CALLS
    | public_calls_of_models.CALLS
    | public_calls_of_remedies.CALLS
    | public_calls_of_results.CALLS
)


class Case(NamedTuple):
    """A wrong value of one argument of a public function."""

    call: str
    argument: str
    value: Any

    def __str__(self) -> str:
        return f"{self.call}({self.argument}={described(self.value)})"

    def outcome(self) -> str:
        """What the call with the wrong value does: "right", or what is wrong about it."""
        pyro.clear_param_store()
        torch.manual_seed(0)
        function, arguments = CALLS[self.call].make()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                function(**arguments | {self.argument: self.value})
        except (ValueError, TypeError) as error:
            if re.search(rf"\b{self.argument}\b", str(error)):
                return "right"
            return f"does not name the argument: {type(error).__name__}: {error}"
        except Exception as error:
            return f"foreign exception: {type(error).__name__}: {error}"
        return "accepted"


def cases() -> list[Case]:
    """All cases."""
    result = []
    for name, call in CALLS.items():
        _, arguments = call.make()
        for argument in arguments:
            if argument not in call.skip:
                values = call.wrong.get(argument, BY_NAME.get(argument, ()))
                result += [Case(name, argument, value) for value in values]
    return result


def main() -> None:
    """Prints each wrong input that is not treated as it should be, and the number of inputs of each kind."""
    matplotlib.use("agg")
    kinds: Counter[str] = Counter()
    for case in cases():
        outcome = case.outcome()
        kinds[outcome.split(":")[0]] += 1
        if outcome != "right":
            print(f"{case}\n    {outcome[:200]}")
    print({kind: kinds[kind] for kind in sorted(kinds)}, "of", kinds.total())


if __name__ == "__main__":
    main()
