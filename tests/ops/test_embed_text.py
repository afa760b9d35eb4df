"""Embeddings of everything but the placeholders."""

import pytest
import torch

from ivl_kernels.ops import embed_text, pack_tokens
from ivl_kernels.testing import poisoned
from tests.simulator.gpu import backends, simulated_gpu

BACKENDS = backends("cpu", "cuda", "triton", "reference")
TOKEN = 7


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape, width", [((2, 9), 5), ((1, 300), 64), ((0, 4), 3), ((3, 0), 3)])
def test_equals_embedding(backend, dtype, shape, width):
    ids, table = torch.randint(0, 12, shape), torch.randn(12, width).to(dtype)
    with poisoned():
        got = embed_text(ids, table, TOKEN, backend=backend)
    text = ids != TOKEN
    assert got.shape == (*shape, width) and torch.equal(got[text], table[ids[text]])
    if backend != "reference":
        assert got[~text].isnan().all()


@BACKENDS
def test_strided_table_and_large_placeholder_id(backend):
    ids = torch.tensor([[1, 9999, 0], [9999, 2, 2]])
    table = torch.randn(3, 16)[:, ::2]
    got = embed_text(ids.t(), table, 9999, backend=backend)
    assert torch.equal(got[ids.t() != 9999], table[ids.t()[ids.t() != 9999]])


@BACKENDS
def test_opcheck(backend):
    ids, table = torch.randint(0, 6, (2, 9)), torch.randn(12, 8)
    torch.library.opcheck(torch.ops.ivl.embed_text.default, (ids, table, TOKEN, backend))


def test_wrong_input():
    ids, table = torch.tensor([[1, 12]]), torch.randn(12, 4)
    for wrong in (ids, -ids):
        with pytest.raises(IndexError, match="expected 0 to 11"):
            embed_text(wrong, table, TOKEN)
    with pytest.raises(TypeError, match="ids"):
        embed_text(ids.float(), table, TOKEN)
    with pytest.raises(ValueError, match="table"):
        embed_text(ids, table[0], TOKEN)
    with pytest.raises(ValueError, match="no rows"):
        embed_text(ids, table[:0], TOKEN)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("width", [64, 3])
def test_an_id_outside_the_table_is_nan_on_a_gpu(backend, width):
    ids, table = torch.tensor([[1, 12, -1, 2**40, 11]]), torch.randn(12, width)
    with simulated_gpu():  # which raises where an address is outside of every tensor
        got = embed_text(ids, table, TOKEN, backend=backend)[0]
    assert got[1:4].isnan().all() and torch.equal(got[[0, 4]], table[[1, 11]])


@pytest.mark.parametrize("backend, target", [("cuda", 80), ("triton", 80), ("triton", 90), ("triton", 100)])
def test_counters(backend, target):
    """Text rows move once, 16 bytes a lane."""
    ids, table = torch.randint(0, 12, (1, 200)), torch.randn(12, 256)
    with simulated_gpu(target=target) as log:
        embed_text(ids, table, TOKEN, backend=backend)
    assert log[0].global_store_bytes == int((ids != TOKEN).sum()) * 1024 and log[0].store_efficiency == 1


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_an_id_outside_the_table_in_capacity_mode(backend):
    """Nobody has read the ids when the text is embedded: a bad one is NaN, and the check names it."""
    ids = torch.tensor([[1, 2**40, 3, -5, 11, 2]])
    table, none = torch.randn(12, 16), torch.zeros(0, dtype=torch.bool)
    with simulated_gpu():
        packed = pack_tokens(ids, none, TOKEN, embedding=table, capacity=True, backend=backend)
        text = [0, 2, 4, 5]
        assert torch.equal(packed.embeds[0, text], table[ids[0, text]])
        assert packed.embeds[0, [1, 3]].isnan().all()
        with pytest.raises(ValueError, match=f"row 0 has id {2**40} at column 1, expected 0 to 11"):
            packed.check()
