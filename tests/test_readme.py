"""The README's examples run as written, and the first one in 25 lines."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.slow
def test_examples_run(capsys):
    example, autoguide, graph, mixture, sequences, layers = re.findall(
        r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL
    )
    assert len([line for line in example.splitlines() if line.strip()]) <= 25
    variables = {}
    exec(compile(example, README.name, "exec"), variables)
    printed = capsys.readouterr().out
    assert "verdict" in printed
    exec(compile(autoguide, README.name, "exec"), variables)
    assert variables["guide"].prototype_trace.nodes["z"]["fn"].batch_shape == (100,)
    exec(compile(graph, README.name, "exec"), variables)
    assert variables["svi"].runs == "graph"
    exec(compile(mixture, README.name, "exec"), variables)
    assert 1 <= variables["usage"].effective_number <= 3
    exec(compile(sequences, README.name, "exec"), variables)
    assert variables["sequential"].reconstruct(variables["data"].test[:2]).shape == (2, 20)
    assert variables["fit"]["posterior"]["z"].shape == (1, 200, 10, 4)
    exec(compile(layers, README.name, "exec"), variables)
    assert capsys.readouterr().out.endswith("entropy power of the prior 1)\n")


def test_paths_exist():
    text = README.read_text()
    paths = re.findall(r"(?:tutorials|experiments|benchmarks)/[\w./]+\.(?:py|png|md)", text)
    assert len(paths) > 8
    assert not [path for path in paths if not (README.parent / path).exists()]
    named = set(re.findall(r"`(\w+\.py)`", text))
    assert named <= {path.name for path in (README.parent / "tutorials").glob("*.py")}
