"""The demo command: its answers, pictures, and one-line errors."""

import json
import shutil

import pytest
import torch
from PIL import Image

from ivl_kernels import cli
from ivl_kernels.commands import subject
from ivl_kernels.testing import tiny
from tests.models import chat_model


@pytest.fixture(scope="module")
def tokenizer():
    return subject.random_tokenizer()


@pytest.fixture(scope="module")
def native_folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("native")
    token = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    model = tiny.native_model(text=tiny.text_config("qwen3", vocab_size=len(tokenizer)), image_token_id=token)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory, tokenizer):
    """A checkpoint with its own code, as the released ones have."""
    from tests.models import chat_hub

    folder = tmp_path_factory.mktemp("chat")
    model = chat_model("hub", llm=dict(vocab_size=len(tokenizer)), flash=(0.3, 0.1))
    for kind, auto in ((type(model), "AutoModel"), (type(model.config), "AutoConfig")):
        kind.register_for_auto_class(auto)
    try:
        model.save_pretrained(folder)
    finally:
        for kind in (type(model), type(model.config)):
            kind._auto_class = None
    tokenizer.save_pretrained(folder)
    source = chat_hub.__file__.rsplit("/", 1)[0]
    for name in ("chat_hub", "chat_common", "intern_vit", "configuration"):
        shutil.copy(f"{source}/{name}.py", folder)
    return folder


def run(tmp_path, *options):
    return cli.main(["demo", "--tokens", "3", "--rounds", "1", "--out", str(tmp_path / "out"), *map(str, options)])


def test_native_checkpoint(tmp_path, native_folder, capsys):
    assert run(tmp_path, "--model", native_folder, "--tiles", 2, "--prompt", "What is this?") == 0
    text = capsys.readouterr().out
    for expected in (
        "Q: What is this?",
        "A, patched:",
        "verify: PASSED",
        "shuffle, projector",
        "2 x 1 tiles and a thumb",
    ):
        assert expected in text
    assert "random" not in text.split("Q:")[1].split("A,")[0]
    for picture in ("tiles", "stages"):
        assert Image.open(tmp_path / "out" / f"{picture}.png").size[0] > 400
    assert json.loads((tmp_path / "out" / "demo.json").read_text())["passed"]


@pytest.mark.parametrize("folder", ["native_folder", "chat_folder"])
def test_against_torch_compile(tmp_path, folder, request, capsys, monkeypatch):
    real, names = torch.compile, []

    def compiled(module):
        names.append(type(module).__name__)
        return real(module, backend="eager")

    monkeypatch.setattr(torch, "compile", compiled)
    folder = request.getfixturevalue(folder)
    assert run(tmp_path, "--model", folder, "--tiles", 1, "--compare", "compile", "--trust-remote-code") == 0
    text = capsys.readouterr().out
    assert len(names) == 2 and "Vision" in names[0] and names[1] == "Qwen3Model"
    assert "under torch.compile" in text.splitlines()[-1]
    found = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert found["compiled"]["all"] > found["compiled"]["vision transformer"] > 0


def test_remote_code_flash_checkpoint(tmp_path, chat_folder, capsys):
    assert run(tmp_path, "--model", chat_folder) == 2
    assert "pass --trust-remote-code" in capsys.readouterr().err
    assert run(tmp_path, "--model", chat_folder, "--trust-remote-code", "--tiles", 3) == 0
    text = capsys.readouterr().out
    assert "verify: PASSED" in text and "tiles compressed to 64 tokens" in text and "InternVLChatModel" in text
    routed = json.loads((tmp_path / "out" / "demo.json").read_text())["flash"]
    assert sum(routed["compressed"]) > 0
    assert routed["tokens"][0] - routed["tokens"][1] == 192 * sum(routed["compressed"])


def test_verify_command(native_folder, capsys):
    options = ["verify", "--model", str(native_folder), "--tiles", "1", "--tokens", "2", "--rounds", "0", "--json"]
    assert cli.main(options) == 0
    assert json.loads(capsys.readouterr().out)["passed"]
    assert cli.main(["verify", "--image", "no/such.jpg"]) == 2


@pytest.mark.slow
def test_random_model(tmp_path, capsys):
    """What `make demo` runs, with one tile."""
    assert run(tmp_path, "--tiles", 1, "--flash") == 0
    assert "the words mean nothing" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        (("--image", "no/such.jpg"), "no/such.jpg: no such file"),
        (("--image", __file__), "not a picture"),
        (("--model", "no/such/folder"), "--model no/such/folder: "),
        (("--model", "."), "no config.json"),
        (("--tiles", "0"), "--tiles: got 0"),
        (("--device", "cuda:77"), "--device cuda:77: "),
    ],
)
def test_one_line_errors(tmp_path, capsys, options, message):
    assert run(tmp_path, *options) == 2
    error = capsys.readouterr().err.split("\r")[-1].strip().splitlines()
    assert len(error) == 1 and message in error[0], error


def test_wrong_model_type_and_no_memory(tmp_path, capsys, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert run(tmp_path, "--model", tmp_path) == 2
    assert "model_type 'bert', expected 'internvl'" in capsys.readouterr().err

    def no_memory(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    monkeypatch.setattr(subject, "random_subject", no_memory)
    assert run(tmp_path) == 2
    assert "out of memory: try fewer --tiles" in capsys.readouterr().err


def test_tokenizer_is_real(tokenizer):
    text = "A cup of coffee on a wooden table, naïve 咖啡."
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and len(ids) < len(text.encode())
    assert tokenizer.decode(tokenizer("<img>a")["input_ids"], skip_special_tokens=True) == "a"
    assert torch.tensor(ids).max() < len(tokenizer)
