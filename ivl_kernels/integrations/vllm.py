"""The vLLM plugin: our projector in vLLM's InternVL encoders, of language servers and of encoder instances alike.

Installed as an entry point of `vllm.general_plugins`, which vLLM calls in each of its processes. Without vLLM, with
`IVL_VLLM=0`, or called again it does nothing; what it does not recognise it leaves to vLLM, and says so in the log.
"""

from __future__ import annotations

import importlib.util
import logging

from .. import _env

# By the architecture that vLLM reads in config.json: the class in `_vllm_models`.
ARCHITECTURES = {
    "InternVLChatModel": "InternVLChatModel",
    "InternVLForConditionalGeneration": "InternS1ForConditionalGeneration",
}
_log = logging.getLogger("vllm.ivl_kernels")
_done: list[str] = []


def register() -> list[str]:
    """Register our subclasses of vLLM's InternVL models.

    Returns:
        The architectures that are ours now.
    """
    if _done or _env.VLLM.get() == "0" or importlib.util.find_spec("vllm") is None:
        return list(_done)
    try:
        from vllm import ModelRegistry

        known = set(ModelRegistry.get_supported_archs())
        for name, kind in ARCHITECTURES.items():
            if name not in known:
                _log.warning("ivl_kernels: this vLLM has no %s, so nothing is put into it", name)
                continue
            # By name: the class is imported where a model is made of it, and only there.
            ModelRegistry.register_model(name, f"{__package__}._vllm_models:{kind}")
            _done.append(name)
    except Exception as error:  # a plugin that raises would stop the engine
        _log.warning("ivl_kernels: not registered: %s: %s", type(error).__name__, error)
    return list(_done)
