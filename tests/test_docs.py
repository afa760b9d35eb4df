"""The Python blocks of README and docs/ run as written, one page a namespace; generated parts are up to date."""

import re
from pathlib import Path

import pytest

from bench import readme
from ivl_kernels import _env, _library, ops

assert ops.__all__  # registered before `OPS` is replaced
ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page):
    """(line, code) of each ```python block; one that starts with `# not run: why` is only compiled."""
    text = page.read_text()
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text[: match.start()].count("\n") + 2, match.group(1)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_library, "OPS", dict(_library.OPS))  # ops of examples are not the package's
    namespace = {"__name__": "docs"}
    for line, code in blocks(page):
        compiled = compile("\n" * (line - 1) + code, str(page), "exec")
        if not code.startswith("# not run:"):
            exec(compiled, namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_variable_is_documented():
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    assert _env.markdown_table() in text


def test_performance_table_is_current():
    text = (ROOT / "README.md").read_text()
    assert readme.START not in text or readme.filled(text) == text
