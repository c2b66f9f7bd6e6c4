"""The README's example runs as written, and in 25 lines."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_example_runs(capsys):
    [example] = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 25
    variables = {}
    exec(compile(example, README.name, "exec"), variables)
    printed = capsys.readouterr().out
    assert "verdict" in printed
    assert variables["fit"]["posterior"]["z"].shape == (1, 200, 10, 4)
