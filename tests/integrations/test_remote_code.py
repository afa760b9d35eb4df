"""Loading remote-code checkpoints: a folder that brings its own code, as published ones do."""

import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from packaging.version import Version

from ivl_kernels import enable_remote_code, patch
from tests.models import chat_hub, chat_inputs, chat_model


def save(folder, **changes):
    model = chat_model("hub", **changes)
    for kind, auto in ((type(model), "AutoModel"), (type(model.config), "AutoConfig")):
        kind.register_for_auto_class(auto)
    try:
        model.save_pretrained(folder)
    finally:
        for kind in (type(model), type(model.config)):
            kind._auto_class = None
    for name in ("chat_hub", "chat_common", "intern_vit", "configuration"):
        shutil.copy(f"{chat_hub.__file__.rsplit('/', 1)[0]}/{name}.py", folder)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loads_and_generates(tmp_path, dtype):
    original = save(tmp_path).to(dtype)
    kind = enable_remote_code(tmp_path)
    assert kind.__module__.startswith("transformers_modules") and enable_remote_code(kind) is kind
    for loaded in (
        kind.from_pretrained(tmp_path, dtype=dtype),
        transformers.AutoModel.from_pretrained(tmp_path, dtype=dtype, trust_remote_code=True),
    ):
        state, expected = loaded.state_dict(), original.state_dict()
        assert list(state) == list(expected) and all(torch.equal(state[k], expected[k]) for k in state)
        loaded.img_context_token_id = original.img_context_token_id
        batch = chat_inputs(original, dtype=dtype)
        options = dict(max_new_tokens=4, do_sample=False, eos_token_id=None)
        tokens = original.generate(**batch, **options)
        assert torch.equal(loaded.generate(**batch, **options), tokens)
        handle = patch(loaded, projector=True, packing=True)
        assert {row.state for row in handle.report().rows if row.feature == "projector"} == {"patched"}
        assert torch.equal(loaded.generate(**batch, **options), tokens)


def test_tied_embeddings_stay_tied(tmp_path):
    """The short cut of an empty `all_tied_weights_keys` would leave a random lm_head here."""
    save(tmp_path, llm=dict(tie_word_embeddings=True))
    loaded = enable_remote_code(tmp_path).from_pretrained(tmp_path)
    language = loaded.language_model
    assert language.lm_head.weight.data_ptr() == language.model.embed_tokens.weight.data_ptr()


@pytest.mark.skipif(Version(transformers.__version__) < Version("5"), reason="only transformers 5 needs the helper")
def test_without_the_helper(tmp_path):
    """When this starts to load, the helper has become unnecessary."""
    save(tmp_path)
    code = (
        f"import sys, transformers\ntransformers.AutoModel.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode and "all_tied_weights_keys" in done.stderr


def test_a_folder_without_code(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "internvl"}')
    with pytest.raises(ValueError, match="no auto_map entry for AutoModel"):
        enable_remote_code(tmp_path)
