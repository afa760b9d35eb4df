"""An unmodified vLLM on the CPU and our vision side: the same tokens as the patched model. Run by `make test-vllm`."""

import asyncio
import base64
import contextlib
import importlib.util
import io
import json
import os
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy
import pytest
import torch

pytest.importorskip("vllm")
os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
)
OPTIONS = dict(dtype="float32", max_model_len=1024, max_num_seqs=4, enforce_eager=True, enable_prefix_caching=False)
PROMPT = "w1 w2 {}w3 w4"


def load_example(name):
    path = Path(__file__).resolve().parents[2] / "docs" / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random transformers-native checkpoint with Flash, a tokenizer of words and a processor."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    from ivl_kernels.nn import FlashVision
    from ivl_kernels.testing import tiny

    marks = ["<pad>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<image>", "<video>", "<unk>"]
    words = {word: i for i, word in enumerate([*(f"w{i}" for i in range(292)), *marks])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<|im_end|>",
        additional_special_tokens=marks[2:7],
        extra_special_tokens={"start_image_token": "<img>", "end_image_token": "</img>",
                              "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"},
    )  # fmt: skip
    text = transformers.Qwen3Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        intermediate_size=96, vocab_size=320, max_position_embeddings=2048, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=words["<|im_end|>"], pad_token_id=words["<pad>"],
    )  # fmt: skip
    vision = tiny.vision_config(hidden_size=64, intermediate_size=128)
    config = transformers.InternVLConfig(
        vision_config=vision, text_config=text, image_token_id=words["<IMG_CONTEXT>"], image_seq_length=16,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = tiny.randomize(transformers.InternVLForConditionalGeneration(config)).eval()
    model.generation_config.eos_token_id = None
    side = {"height": 64, "width": 64}
    images = transformers.GotOcr2ImageProcessor(size=side, crop_to_patches=True, min_patches=1, max_patches=6)
    processor = transformers.InternVLProcessor(
        image_processor=images, tokenizer=fast, video_processor=transformers.InternVLVideoProcessor(size=side),
        image_seq_length=16,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("vllm") / "tiny"
    model.save_pretrained(path)
    processor.save_pretrained(path)
    flash = tiny.randomize(FlashVision(64, 64, 0.5, 0.0, heads=2), 1)
    torch.save(flash.state_dict(), path.parent / "flash.pt")
    return path


@pytest.fixture(scope="module")
def whole(folder):
    import transformers

    return transformers.InternVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def flash(folder):
    """The whole model with Flash, patched."""
    import transformers

    import ivl_kernels
    from ivl_kernels.nn import FlashVision

    model = transformers.InternVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    half = FlashVision(64, 64, 0.5, 0.0, heads=2)
    half.load_state_dict(torch.load(folder.parent / "flash.pt"))
    half.eval().attach(model)
    ivl_kernels.patch(model)
    return model


@pytest.fixture(scope="module")
def pictures():
    from PIL import Image

    draw = numpy.random.default_rng(0)
    sizes = ((64, 64), (128, 192), (64, 256))
    return [Image.fromarray(draw.integers(0, 255, (*size, 3), dtype=numpy.uint8)) for size in sizes]


def batch_of(folder, images):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    return processor(images=images or None, text=PROMPT.format("<IMG_CONTEXT> w5 " * len(images)), return_tensors="pt")


def answer_of(model, batch):
    made = model.generate(**batch, max_new_tokens=12, do_sample=False)
    return made[0, batch["input_ids"].shape[1] :].tolist()


def requests_of(folder, images):
    counts = [len(batch_of(folder, [image])["pixel_values"]) for image in images]
    return list(batch_of(folder, images)["pixel_values"].split(counts))


@pytest.fixture(scope="module")
def engine(folder):
    from vllm import LLM

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    limits = {"image": 4, "video": 0}
    return LLM(str(folder), limit_mm_per_prompt=limits, enable_mm_embeds=True, **OPTIONS)


def ask(engine, images):
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    given = {"prompt": PROMPT.format("<IMG_CONTEXT> w5 " * len(images)), "multi_modal_data": {"image": images}}
    (output,) = engine.generate([given], sampling, use_tqdm=False)
    return list(output.outputs[0].token_ids), len(output.prompt_token_ids)


def test_rows_of_the_plain_side(engine, folder, whole, pictures):
    from ivl_kernels import VisionSide

    side = VisionSide(whole)
    for image in pictures:
        (features,) = side.encode([requests_of(folder, [image])])
        assert ask(engine, features.images())[0] == answer_of(whole, batch_of(folder, [image]))


def test_rows_of_the_flash_side(engine, folder, flash, pictures):
    from ivl_kernels import VisionSide, VisualFeatures

    side, lengths = VisionSide(flash), set()
    for images in ([pictures[0]], [pictures[1]], [pictures[2]], pictures[1:]):
        (features,) = side.encode([requests_of(folder, images)])
        features = VisualFeatures.from_bytes(features.to_bytes())
        batch = batch_of(folder, images)
        tokens, length = ask(engine, features.images())
        assert tokens == answer_of(flash, batch)
        assert length == batch["input_ids"].shape[1] - sum(16 - n for n in features.tokens)
        lengths |= set(features.tokens)
    assert lengths == {16, 4}, "the case must have tiles of both kinds"


def test_plugin_serves_the_encoder(engine, folder, whole, pictures):
    from ivl_kernels import ops
    from ivl_kernels.integrations import _vllm_models

    kinds = engine.apply_model(lambda model: type(model).__module__)
    assert kinds == [_vllm_models.__name__]
    seen, projector = [], ops.pixel_shuffle_mlp
    ops.pixel_shuffle_mlp = lambda x, *rest, **options: seen.append(len(x)) or projector(x, *rest, **options)
    try:
        for image in pictures:
            assert ask(engine, [image])[0] == answer_of(whole, batch_of(folder, [image]))
    finally:
        ops.pixel_shuffle_mlp = projector
    assert seen == [1, 7, 5], "one call for the tiles of each picture"


@pytest.fixture(scope="module")
def served(folder, flash):
    """The front with vLLM's engine, language model alone, on a port of the loopback interface."""
    import uvicorn

    from ivl_kernels import VisionSide

    os.environ.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    front_module = load_example("dvd_front")
    ready, stop, found = threading.Event(), threading.Event(), {}

    async def serve():
        engine = front_module.VLLM(str(folder), **OPTIONS)
        template = "w1 w2 {images}{prompt}"
        front = front_module.Front(
            VisionSide(flash), engine, front_module.Rules(tiles=6, pixels=1 << 20), template=template,
            placeholder="<IMG_CONTEXT> w5",
        )  # fmt: skip
        server = uvicorn.Server(uvicorn.Config(front_module.app_of(front), host="127.0.0.1", port=0, log_level="error"))
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.05)
        found["port"] = server.servers[0].sockets[0].getsockname()[1]
        ready.set()
        while not stop.is_set():
            await asyncio.sleep(0.1)
        server.should_exit = True
        await task
        engine.engine.shutdown()

    def run():
        with contextlib.suppress(Exception):
            asyncio.run(serve())
        ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(300) and "port" in found
    yield f"http://127.0.0.1:{found['port']}"
    stop.set()
    thread.join(60)


def post(url, body):
    request = urllib.request.Request(
        f"{url}/v1/answer", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        lines = [line[6:] for line in response.read().decode().split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return "".join(json.loads(line)["text"] for line in lines[:-1])


def encoded(image):
    data = io.BytesIO()
    image.save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def test_over_http(served, folder, flash, pictures):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for images in ([pictures[1]], pictures[1:], []):
        batch = batch_of(folder, images)
        want = tokenizer.decode(answer_of(flash, batch), skip_special_tokens=True)
        got = post(served, {"prompt": "w3 w4", "images": list(map(encoded, images)), "max_tokens": 12})
        assert got.split() == want.split()
    metrics = urllib.request.urlopen(f"{served}/metrics", timeout=30).read().decode()
    assert 'ivl_requests_total{end="answered"} 3.0' in metrics and "ivl_tiles_total" in metrics


@pytest.mark.parametrize(
    "body, status, text",
    [
        ({"prompt": "w3", "image_embeds": "AAAA"}, 400, "image_embeds"),
        ({"prompt": "w3", "images": ["AAAA"]}, 400, "not a picture"),
        ({"prompt": "w3", "images": ["AAAA"] * 9}, 400, "images"),
        ({"images": []}, 400, "prompt"),
    ],
)
def test_refused(served, body, status, text):
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(served, body)
    assert caught.value.code == status and text in caught.value.read().decode()
