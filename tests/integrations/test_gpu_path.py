"""A patched tiny model on its GPU path: backends chosen as on a GPU, kernels run from PTX in the simulator."""

import pytest
import torch
from gpu import simulated_gpu
from models import chat_inputs, chat_model, inputs, native_model

from ivl_kernels import patched


@pytest.mark.parametrize("name", ["native", "repo", "flash"])
def test_tokens(name):
    if name == "native":
        model, batch = native_model(), inputs(((2, 1), ()))
    elif name == "repo":
        model = chat_model("repo")
        batch = chat_inputs(model, ((2, 1), ()))
    else:
        model = chat_model("hub", flash=(0.3, 0.1))
        batch = chat_inputs(model, ((2,),))
    options = dict(max_new_tokens=3, do_sample=False)
    plain = model.generate(**batch, **options)
    with simulated_gpu(preferred=True) as launches, patched(model, strict=True, projector=True, packing=True) as handle:
        rows = {row.feature: row.detail for row in handle.report().patched}
        assert rows["projector"].startswith("triton") and rows["packing"].startswith("cuda")
        assert torch.equal(model.generate(**batch, **options), plain)
    assert launches
