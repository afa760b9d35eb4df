"""vLLM on the CPU and our vision side: the same tokens as the patched whole model. Run by `make test-vllm`."""

import json
import logging
import os
import subprocess
import sys

import pytest
from torch import nn

pytest.importorskip("vllm")
from ivl_kernels import VisionSide, VisualFeatures, ops
from ivl_kernels.integrations import vllm as plugin
from tests.engines import checkpoints
from tests.engines.checkpoints import FAMILIES, OPTIONS, ROOT, TOKENS, answer_of, ids_of, model_of, pictures, tiles_of

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the model is in this process, to be looked at


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return checkpoints.save(tmp_path_factory.mktemp(family), family)


@pytest.fixture(scope="module")
def engine(family, folder):
    from vllm import LLM

    limits = {"image": 4, "video": 0}
    engine = LLM(
        str(folder), limit_mm_per_prompt=limits, enable_mm_embeds=True, trust_remote_code=family == "chat", **OPTIONS
    )
    yield engine
    engine.llm_engine.engine_core.shutdown()


def ask(engine, family, images):
    """The tokens of an answer, and how many the prompt had. Images are pictures, or their rows."""
    from vllm import SamplingParams

    given = {"prompt": checkpoints.prompt_of(family, images)}
    if images:
        given["multi_modal_data"] = {"image": images}
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    (output,) = engine.generate([given], sampling, use_tqdm=False)
    return list(output.outputs[0].token_ids), len(output.prompt_token_ids)


def cases():
    return [[picture] for picture in pictures()] + [pictures()[1:], []]


@pytest.mark.parametrize("flash", [False, True], ids=["plain", "flash"])
def test_rows_of_the_vision_side(engine, family, folder, flash):
    model, seen = model_of(folder, flash), set()
    side = VisionSide(model)
    full = checkpoints.tokens_a_tile(model)
    for images in cases():
        (features,) = side.encode([tiles_of(images)])
        features = VisualFeatures.from_bytes(features.to_bytes())
        tokens, length = ask(engine, family, features.images())
        assert tokens == answer_of(model, images)
        assert length == ids_of(model, images).shape[1] - sum(full - n for n in features.tokens)
        seen |= set(features.tokens)
    assert seen == ({full, full // 4} if flash else {full}), "the case must have tiles of both kinds"


def answer_to_pixels(folder, image):
    """With the pixels that vLLM makes of it: a native checkpoint's processor resizes in another way."""
    from transformers import AutoProcessor

    pixels = None
    if checkpoints.family_of(folder) == "native":
        processor = AutoProcessor.from_pretrained(folder).image_processor
        pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
    return answer_of(model_of(folder, flash=False), [image], pixels=pixels)


def test_plugin_serves_the_encoder(engine, family, folder, monkeypatch):
    from ivl_kernels.integrations import _vllm_models

    assert engine.apply_model(lambda model: type(model).__module__) == [_vllm_models.__name__]
    seen, projector = [], ops.pixel_shuffle_mlp
    monkeypatch.setattr(ops, "pixel_shuffle_mlp", lambda x, *a, **o: seen.append(len(x)) or projector(x, *a, **o))
    for image in pictures():
        assert ask(engine, family, [image])[0] == answer_to_pixels(folder, image)
    assert seen == [1, 7, 5], "one call for the tiles of each picture"


def test_plugin_leaves_an_unknown_projector_to_vllm(engine, family, folder, monkeypatch, caplog):
    class Unknown(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    def change(model):
        setattr(model, model._projector, Unknown(getattr(model, model._projector)))
        model._ivl_checked = None

    def restore(model):
        setattr(model, model._projector, getattr(model, model._projector).inner)
        model._ivl_checked = None

    image = pictures()[0].rotate(90)  # one that vLLM has not encoded yet
    monkeypatch.setattr(ops, "pixel_shuffle_mlp", lambda *a, **o: pytest.fail("the op served"))
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    engine.apply_model(change)
    try:
        with caplog.at_level(logging.WARNING):
            got = ask(engine, family, [image])[0]
    finally:
        engine.apply_model(restore)
    assert got == answer_to_pixels(folder, image)
    assert "ivl_kernels: vLLM's own projector serves: " in caplog.text


CODE = """
import json
from vllm import ModelRegistry
from vllm.plugins import load_general_plugins
from ivl_kernels.integrations import vllm as plugin
load_general_plugins()
load_general_plugins()
plugin.register()
print(json.dumps({n: getattr(ModelRegistry.models[n], "module_name", "") for n in plugin.ARCHITECTURES}))
"""


@pytest.mark.parametrize(
    "variables, ours",
    [({}, True), ({"IVL_VLLM": "0"}, False), ({"VLLM_PLUGINS": "another"}, None)],
    ids=["on", "off", "left out"],
)
def test_plugin_in_a_process(variables, ours):
    """As vLLM loads it, several times over. Left out of VLLM_PLUGINS it is not called by vLLM, only here."""
    code = CODE if ours is not None else CODE.replace("plugin.register()\n", "")
    environment = checkpoints.environment(**variables)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    modules = json.loads(done.stdout.splitlines()[-1])
    expected = "ivl_kernels.integrations._vllm_models" if ours else "vllm.model_executor.models."
    assert set(modules) == set(plugin.ARCHITECTURES)
    assert all(module.startswith(expected) for module in modules.values()), modules


APART = """
import json, sys
from tests.engines import checkpoints
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    from vllm.config import ECTransferConfig
    from ivl_kernels import ops

    folder, role, store = sys.argv[1:]
    seen, projector = [], ops.pixel_shuffle_mlp
    ops.pixel_shuffle_mlp = lambda x, *a, **o: seen.append(len(x)) or projector(x, *a, **o)
    apart = ECTransferConfig(
        ec_connector="ECExampleConnector", ec_role=role, ec_connector_extra_config={"shared_storage_path": store}
    )
    limits = {"image": 1, "video": 0}
    engine = LLM(folder, limit_mm_per_prompt=limits, ec_transfer_config=apart, **checkpoints.OPTIONS)
    seen.clear()  # of the engine's start
    tokens = 1 if role == "ec_producer" else checkpoints.TOKENS
    sampling, found = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True), []
    for picture in checkpoints.pictures():
        given = {"prompt": checkpoints.prompt_of("native", [picture]), "multi_modal_data": {"image": [picture]}}
        (output,) = engine.generate([given], sampling, use_tqdm=False)
        found.append(list(output.outputs[0].token_ids) if output.outputs else [])
    print(json.dumps([seen, found]))
"""


def test_plugin_in_encoder_separation(tmp_path):
    """vLLM's own: an encoder instance with our op, and an instance that answers from what that one stored."""
    folder = checkpoints.save(tmp_path / "native", "native")
    (tmp_path / "apart.py").write_text(APART)
    results = []
    for role in ("ec_producer", "ec_consumer"):
        done = subprocess.run(
            [sys.executable, str(tmp_path / "apart.py"), str(folder), role, str(tmp_path / "store")], cwd=ROOT,
            env=checkpoints.environment(), capture_output=True, text=True, timeout=400,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(json.loads(done.stdout.splitlines()[-1]))
    (encoded, _), (encoded_again, answers) = results
    assert encoded == [1, 7, 5] and encoded_again == []
    assert answers == [answer_to_pixels(folder, picture) for picture in pictures()]
