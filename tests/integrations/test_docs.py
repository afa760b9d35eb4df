"""The code in docs/patching.md runs."""

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_patching_page(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "patching.md").read_text(), re.DOTALL)
    namespace = {"__name__": "docs"}
    for block in blocks:
        exec(compile(block, "docs/patching.md", "exec"), namespace)
    assert len(blocks) == 4 and "verify: PASSED" in capsys.readouterr().out
