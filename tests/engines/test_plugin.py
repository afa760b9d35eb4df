"""vLLM's plugin where there is no vLLM, and against stand-ins of it."""

import logging
import sys
import types
from importlib.metadata import entry_points

import pytest

from ivl_kernels.integrations import vllm as plugin


@pytest.fixture
def fake(monkeypatch):
    """A vLLM of which there is only the registry."""
    made = {}
    registry = types.SimpleNamespace(
        get_supported_archs=lambda: ["InternVLChatModel", "LlamaForCausalLM"], register_model=made.__setitem__
    )
    module = types.ModuleType("vllm")
    module.ModelRegistry = registry
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(plugin.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(plugin, "_done", [])
    return made


def test_is_an_entry_point():
    found = [point for point in entry_points(group="vllm.general_plugins") if point.name == "ivl_kernels"]
    if not found:
        pytest.skip("the package was installed before it had entry points")
    assert found[0].load() is plugin.register


def test_does_nothing_without_vllm(monkeypatch):
    monkeypatch.setattr(plugin.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(plugin, "_done", [])
    before = set(sys.modules)
    assert plugin.register() == [] and set(sys.modules) == before


def test_registers_once_what_this_vllm_has(fake, caplog):
    with caplog.at_level(logging.WARNING):
        assert plugin.register() == ["InternVLChatModel"]
    assert fake == {"InternVLChatModel": "ivl_kernels.integrations._vllm_models:InternVLChatModel"}
    assert "has no InternVLForConditionalGeneration" in caplog.text
    fake.clear()
    assert plugin.register() == ["InternVLChatModel"] and not fake


def test_off_by_a_variable(fake, monkeypatch):
    monkeypatch.setenv("IVL_VLLM", "0")
    assert plugin.register() == [] and not fake


def test_never_raises(fake, monkeypatch, caplog):
    sys.modules["vllm"].ModelRegistry.get_supported_archs = lambda: 1 / 0
    assert plugin.register() == []
    assert "not registered: ZeroDivisionError" in caplog.text
