"""Samples of a row do not see each other: bit-equal outputs and gradients when another sample changes."""

import pytest
import torch

import ivl_kernels
from ivl_kernels.integrations import packed as adapter
from ivl_kernels.integrations._patch import features
from ivl_kernels.models.packed import leak
from ivl_kernels.packing import Sample, collate, isolation_problem
from tests.models import FAMILIES, IMAGE_TOKEN, chat_model, inputs, native_model


def patch(model, **options):
    others = {n: False for n, f in features().items() if not f.option}
    return ivl_kernels.patch(model, strict=True, **{**others, "packed": True, **options})


def row_of(pad_to=0, pixels=True):
    samples = []
    for i, tiles in enumerate(((2,), (), (1,))):
        batch = inputs((tiles,), seed=i)
        ids = batch["input_ids"][0]
        labels = ids.clone()
        labels[:-4] = -100
        samples.append(Sample(ids, labels, batch.get("pixel_values")))
    return samples, collate(samples, pad_to=pad_to)


@pytest.mark.parametrize("family", FAMILIES)
def test_apart(family):
    model = native_model(family)
    samples, row = row_of(pad_to=100)
    patch(model)
    for sample in range(3):
        problem = isolation_problem(model, row, sample=sample)
        # Upstream's experts round by how many tokens of the row chose them, whoever's tokens these are.
        rounding = "moe" in family and problem and float(problem.rsplit(" ", 1)[1]) < 1e-5
        assert problem == "" or rounding, problem
    assert "moe" in family or leak(model.model.language_model) == ""


def test_the_check_has_teeth():
    """Transformers' own sdpa is right without mask and cache; a default cache or a mask of ones lets samples see."""
    model = native_model("qwen3")
    _, row = row_of()
    assert isolation_problem(model, row) == ""
    cached = {**row, "use_cache": True}
    assert "sample 0 changes logits of sample 1" in isolation_problem(model, cached)
    masked = {**row, "attention_mask": torch.ones_like(row["input_ids"])}
    assert "changes logits of sample 1" in isolation_problem(model, masked)
    patch(model)
    assert isolation_problem(model, cached) == "" and isolation_problem(model, masked) == ""
    with pytest.raises(ValueError, match="sample: got 3, expected one of 3"):
        isolation_problem(model, row, sample=3)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_samples_alone(family):
    """Logits and gradients, against every sample in a forward of its own on upstream's code."""
    model = native_model(family)
    samples, row = row_of(pad_to=100)
    given = {name: value for name, value in row.items() if name not in ("labels", "row_plan")}

    def grads():
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return found

    plain = []
    for s in samples:
        extra = {} if s.pixels is None else {"pixel_values": s.pixels}
        out = model(input_ids=s.ids[None], **extra).logits[0]
        out.square().sum().backward()
        plain.append(out.detach())
    expected = grads()
    with torch.no_grad():
        handle = patch(model)
    out = model(**given).logits[0]
    total = sum(s.tokens for s in samples)
    out[:total].square().sum().backward()
    torch.testing.assert_close(out[:total], torch.cat(plain), rtol=1e-4, atol=1e-4)
    for name, grad in grads().items():
        assert (grad - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-4, name
    # Positions alone say it too: what remote code, which takes no starts, hands on.
    bare = {name: value for name, value in given.items() if not name.startswith(("cu_", "max_"))}
    assert torch.equal(model(**bare).logits[0], out)
    handle.undo()
    assert model.model.language_model.config._attn_implementation != "ivl_packed"


@pytest.mark.parametrize("kind", ["hub", "repo"])
def test_remote_code(kind):
    model = chat_model(kind)
    _, row = row_of()
    flags = torch.ones(3, 1, dtype=torch.int64)
    names = ("input_ids", "position_ids", "pixel_values")
    given = {**{name: row[name] for name in names}, "image_flags": flags}
    plain = model(**given).logits
    patch(model)
    ids = row["input_ids"].clone()
    ids[0, 0] += 1
    out, changed = model(**given).logits, model(**{**given, "input_ids": ids}).logits
    second = int(row["cu_seq_lens_q"][1])
    assert torch.equal(out[0, second:], changed[0, second:]) and not torch.equal(out[0, :second], changed[0, :second])
    assert not torch.allclose(out, plain)  # upstream's own call, with its default cache


@pytest.mark.parametrize("kind", ["native", "hub"])
@torch.no_grad()
def test_v2pe_begins_anew_in_every_sample(kind):
    model = native_model("qwen3") if kind == "native" else chat_model("hub")
    samples, row = row_of()
    flags = {} if kind == "native" else {"image_flags": torch.ones(3, 1, dtype=torch.int64)}
    handle = ivl_kernels.patch(model, v2pe=1 / 4, packed=True, loss=True)
    out = model(**row, **flags, return_logits=True)
    assert len(handle.note("v2pe").report.tokens) == 1
    alone = []
    for s in samples:
        if s.pixels is not None:
            given = {"pixel_values": s.pixels} | {n: f[: len(s.pixels)] for n, f in flags.items()}
            alone.append(model(input_ids=s.ids[None], **given).logits[0])
    begins = row["cu_seq_lens_q"].tolist()
    for (begin, end), expected in zip((begins[:2], begins[2:]), alone):
        torch.testing.assert_close(out.logits[0, begin:end], expected, rtol=1e-4, atol=1e-4)
    integer = native_model("qwen3") if kind == "native" else chat_model("hub")
    patch(integer, loss=True)
    assert not torch.allclose(integer(**row, **flags).loss, out.loss, rtol=1e-4)


@torch.no_grad()
def test_padded_batches_and_generation():
    model = native_model("qwen3")
    for padding in ("left", "right"):
        batch = inputs(((2,), (1, 1), ()), padding=padding)
        plain = model(**batch).logits
        options = dict(max_new_tokens=5, do_sample=False)
        tokens = model.generate(**batch, **options) if padding == "left" else None
        handle = patch(model)
        kept = batch["attention_mask"] != 0
        torch.testing.assert_close(model(**batch).logits[kept], plain[kept], rtol=1e-4, atol=1e-4)
        if tokens is not None:
            assert torch.equal(model.generate(**batch, **options), tokens)
        handle.undo()


def test_gradient_checkpointing_and_undo():
    model = native_model("qwen3").train()
    before = model.model.language_model.config.__dict__.copy()
    _, row = row_of()
    handle = patch(model)
    given = {name: value for name, value in row.items() if name != "row_plan"}
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**given).loss.backward()
        grads.append(model.lm_head.weight.grad.clone())
    torch.testing.assert_close(*grads)
    model.gradient_checkpointing_disable()
    handle.undo()
    assert model.model.language_model.config.__dict__ == before


def test_what_does_not_fit():
    model = native_model("qwen3")
    _, row = row_of()
    model.model.language_model.layers[0].self_attn.attention_dropout = 0.1
    patch(model)
    with pytest.raises(ValueError, match="attention_dropout: got 0.1"):
        model.train()(input_ids=row["input_ids"])


def test_starts():
    positions = torch.tensor([[0, 1, 2, 0, 1], [4, 5, 0, 0, 1]])
    assert adapter.starts_of(positions).tolist() == [0, 3, 5, 7, 8, 10]
    assert IMAGE_TOKEN == 290


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["qwen3", "gpt_oss"])
def test_apart_in_padded_rows(family, side):
    """Samples end to end in rows of several lengths: every one as in a forward of its own; holes part nothing."""
    model = native_model(family).model.language_model
    lengths, width = [[4, 5], [12], [3, 1, 6]], 12
    rows = [[torch.randint(1, 280, (length,)) for length in row] for row in lengths]
    ids, mask = torch.zeros(3, width, dtype=torch.int64), torch.zeros(3, width, dtype=torch.int64)
    positions = torch.full((3, width), 7)
    for i, row in enumerate(rows):
        total = sum(map(len, row))
        here = slice(width - total, None) if side == "left" else slice(0, total)
        ids[i, here], mask[i, here] = torch.cat(row), 1
        positions[i, here] = torch.cat([torch.arange(len(sample)) for sample in row])
    whole = dict(input_ids=ids[1:2], attention_mask=torch.tensor([[1] * 5 + [0] + [1] * 6]), use_cache=False)
    hole = model(**whole).last_hidden_state
    alone = [model(input_ids=sample[None], use_cache=False).last_hidden_state[0] for row in rows for sample in row]
    model = native_model(family)
    patch(model)
    text = model.model.language_model
    given = dict(input_ids=ids, attention_mask=mask, position_ids=positions)
    got = text(**given, use_cache=False).last_hidden_state[mask.bool()]
    torch.testing.assert_close(got, torch.cat(alone), rtol=1e-4, atol=1e-4)
    kept = whole["attention_mask"].bool()
    torch.testing.assert_close(text(**whole).last_hidden_state[kept], hole[kept], rtol=1e-4, atol=1e-4)
    starts = torch.tensor([0, 4, 9, 36], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seq_lens_q: got packed samples beside padding"):
        text(**given, cu_seq_lens_q=starts[[0, 1, 2, 2, 3]], use_cache=False)
