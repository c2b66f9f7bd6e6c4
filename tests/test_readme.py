"""The README's examples run as written, and the first one in 25 lines."""

import re
from pathlib import Path

import matplotlib.pyplot
import pytest

README = Path(__file__).parent.parent / "README.md"


DOCS = sorted((README.parent / "docs").glob("*.md"))


def blocks_of(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_examples_of_pages_run(page):
    variables = {}
    for block in blocks_of(page):
        exec(compile(block, page.name, "exec"), variables)
    assert variables


@pytest.mark.slow
def test_examples_run(capsys):
    example, monitored, own, autoguide, graph, mixture, covariates, sequences, controlled, resumed, layers = blocks_of(
        README
    )
    assert len([line for line in example.splitlines() if line.strip()]) <= 25
    variables = {}
    exec(compile(example, README.name, "exec"), variables)
    printed = capsys.readouterr().out
    assert "verdict" in printed
    exec(compile(monitored, README.name, "exec"), variables)
    assert [record["active_units"] for record in variables["monitor"].history] == [4, 4, 4]
    matplotlib.pyplot.close("all")
    exec(compile(own, README.name, "exec"), variables)
    assert "active" in capsys.readouterr().out
    exec(compile(autoguide, README.name, "exec"), variables)
    assert variables["guide"].prototype_trace.nodes["z"]["fn"].batch_shape == (100,)
    exec(compile(graph, README.name, "exec"), variables)
    assert variables["svi"].runs == "graph"
    exec(compile(mixture, README.name, "exec"), variables)
    assert 1 <= variables["usage"].effective_number <= 3
    exec(compile(covariates, README.name, "exec"), variables)
    assert variables["in_batch_0"].shape == (1000, 20)
    exec(compile(sequences, README.name, "exec"), variables)
    assert variables["sequential"].reconstruct(variables["data"].test[:2]).shape == (2, 20)
    exec(compile(controlled, README.name, "exec"), variables)
    assert variables["controller"].frozen
    assert variables["controller"].on_target
    exec(compile(resumed, README.name, "exec"), variables)
    capsys.readouterr()
    assert variables["fit"]["posterior"]["z"].shape == (1, 200, 10, 4)
    exec(compile(layers, README.name, "exec"), variables)
    assert capsys.readouterr().out.endswith("entropy power of the prior 1)\n")


def test_paths_exist():
    text = README.read_text()
    paths = re.findall(r"(?:tutorials|experiments|benchmarks|docs)/[\w./]+\.(?:py|png|md)", text)
    assert len(paths) > 8
    assert not [path for path in paths if not (README.parent / path).exists()]
    named = set(re.findall(r"`(\w+\.py)`", text))
    tutorials = {path.stem for path in (README.parent / "tutorials").glob("*.py")}
    assert {name.removesuffix(".py") for name in named} | {"quickstart"} == tutorials
    makefile = (README.parent / "Makefile").read_text()
    assert set(re.search(r"TUTORIALS := (.*)", makefile)[1].split()) == tutorials
