"""The projector as a module, with the parameter names of what it replaces."""

from __future__ import annotations

import torch
from torch import nn

from ..models.plain import linear_stack
from ..ops import pixel_shuffle_mlp

# Names of the LayerNorm and the linears: transformers' `multi_modal_projector`, and the Sequentials `mlp1` and `mlp2`
# of the remote code (GELU, and in mlp2 dropout, have indices but no parameters).
NAMES = {
    "transformers": ("layer_norm", "linear_1", "linear_2"),
    "mlp1": ("0", "1", "3"),
    "mlp2": ("0", "1", "4", "7"),
}


class PixelShuffleProjector(nn.Module):
    """Pixel shuffle, LayerNorm and the linear layers of `ops.pixel_shuffle_mlp`.

    Args:
        vision: C, width of the vision tokens.
        hidden: H, width of the language model.
        names: which parameter names: "transformers" (`layer_norm`, `linear_1`, `linear_2`), "mlp1" (`0`, `1`, `3`) or
            "mlp2" (`0`, `1`, `4`, `7`; two hidden layers of 2 H).
        merge: patches merged along each side; None: 4 for "mlp2", else 2.
        skip: leading tokens of each tile that are no patches (1: the CLS token).
        order: "v2" or "v1", as `ps_version`.
        eps: of the LayerNorm.
        dropout: probability after each hidden GELU while training (mlp2). Must be 0 in train mode: the fused op has
            none; ignored in eval mode.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        vision: int,
        hidden: int,
        *,
        names: str = "transformers",
        merge: int | None = None,
        skip: int = 0,
        order: str = "v2",
        eps: float = 1e-5,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._set_names(names)
        self.merge = (4 if names == "mlp2" else 2) if merge is None else merge
        self.skip, self.order, self.dropout = skip, order, dropout
        inside = (2 * hidden, 2 * hidden) if names == "mlp2" else (hidden,)
        widths = (vision * self.merge**2, *inside, hidden)
        norm, *linears = self._names
        self.add_module(norm, nn.LayerNorm(widths[0], eps=eps, device=device, dtype=dtype))
        for name, before, after in zip(linears, widths, widths[1:]):
            self.add_module(name, nn.Linear(before, after, device=device, dtype=dtype))

    def _set_names(self, names: str) -> None:
        if names not in NAMES:
            raise ValueError(f"names: got {names!r}, expected one of {', '.join(NAMES)}")
        self._names = NAMES[names]

    @classmethod
    def from_module(
        cls, module: nn.Module, *, merge: int | None = None, skip: int = 0, order: str = "v2"
    ) -> PixelShuffleProjector:
        """A projector that shares the LayerNorm and linears of a `multi_modal_projector`, `mlp1` or `mlp2`.

        Raises:
            ValueError: the module has other names, or its parameters cannot be read instead of calling it (another
                activation than the exact GELU, no bias, hooks, quantised or LoRA layers), with the reason.
        """
        stack = linear_stack(module, live_dropout=True)
        if isinstance(stack, str):
            raise ValueError(f"module: {stack}")
        children = dict(module.named_children())
        paths = {id(child): name for name, child in children.items()}
        found = tuple(paths[id(layer)] for layer in (stack.norm, *stack.linears))
        names = next((name for name, known in NAMES.items() if known == found), None)
        if names is None:
            raise ValueError(f"module: got layers {', '.join(found)}, expected those of {' or '.join(NAMES)}")
        dropout = max((child.p for child in children.values() if isinstance(child, nn.Dropout)), default=0.0)
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._set_names(names)
        self.merge = (4 if names == "mlp2" else 2) if merge is None else merge
        self.skip, self.order, self.dropout = skip, order, dropout
        for name in self._names:
            self.add_module(name, children[name])
        self.train(module.training)
        return self

    def forward(
        self,
        x: torch.Tensor,
        *,
        grid: tuple[int, int] | None = None,
        tile_indices: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        out_rows: torch.Tensor | None = None,
        backend: str = "",
    ) -> torch.Tensor:
        """x [T, skip + h * w, C] -> [T, h * w / merge^2, H]; the keywords are those of `ops.pixel_shuffle_mlp`."""
        if self.training and self.dropout > 0:
            raise RuntimeError(f"dropout: got {self.dropout} in train mode, expected 0 or a module in eval mode")
        norm, *linears = (getattr(self, name) for name in self._names)
        return pixel_shuffle_mlp(
            x,
            norm.weight,
            norm.bias,
            [linear.weight for linear in linears],
            [linear.bias for linear in linears],
            merge=self.merge,
            grid=grid,
            skip=self.skip,
            order=self.order,
            eps=norm.eps,
            tile_indices=tile_indices,
            out=out,
            out_rows=out_rows,
            backend=backend,
        )

    def extra_repr(self) -> str:
        return f"merge={self.merge}, skip={self.skip}, order={self.order!r}"
