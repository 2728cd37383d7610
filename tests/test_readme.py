"""The README's Python examples run as they stand, one after the other."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_examples_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "qk    12     32/64" in printed  # the summary's rows
    assert printed.count("exact") == 4 and "NOT EXACT" not in printed
    assert "8 under Frobenius decay (decoupled, 0.01, 4 products)" in printed
