import pytest

from bench.runner import find_ops, load_cases


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        cases = list(load_cases(find_ops(), quick=True))
        metafunc.parametrize("case", cases, ids=[f"{case.op}: {case.name}" for case in cases])


@pytest.fixture(autouse=True)
def _needs_the_plugin(request):
    if not request.config.pluginmanager.has_plugin("benchmark"):
        pytest.skip("pytest-benchmark is not installed")
