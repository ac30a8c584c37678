"""Normalisations with an affine map."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from irw_optim.gradients.layers._call import LayerCall
from irw_optim.gradients.layers._layout import Layout
from irw_optim.gradients.materialized import widened


class NormCall(LayerCall):
    """An affine map after a normalisation: few parameters, and few numbers in their rows.

    Args:
        input: what the layer read.
        normalised: the input after normalisation, before the affine map.
        dims: the dimensions of the output that the parameters span; negative ones are counted
            from the end and leave the layout of the others free.
    """

    def __init__(
        self,
        input: Tensor,
        normalise: Callable[[Tensor], Tensor],
        dims: tuple[int, ...],
        weight: Tensor | None,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__(input, weight=weight, bias=bias)
        self.normalise = normalise
        self.dims = dims
        self.is_sequence = min(dims) < 0
        self.features = len(dims)

    def makes_rows(self, output_shape: torch.Size) -> bool:
        return True

    def rows(self, samples: slice = slice(None)) -> dict[Tensor, Tensor]:
        b = self.b[samples]
        spanned = {d % b.ndim for d in self.dims}
        others = [d for d in range(1, b.ndim) if d not in spanned]
        blocks = {}
        if "weight" in self.parameters:
            blocks[self.parameters["weight"]] = self.normalised(samples).mul_(b)
        if "bias" in self.parameters:
            blocks[self.parameters["bias"]] = b
        return {p: t.sum(others) if others else t for p, t in blocks.items()}

    def normalised(self, samples: slice) -> Tensor:
        """The input after normalisation, as a tensor of its own."""
        return self.normalise(widened(self.input[samples]))


class SampleNormCall(NormCall):
    """A norm of each sample, with the statistics that it took.

    Args:
        mean, scale: subtracted from the input, and what the difference is multiplied by; of as many
            dimensions as the input.
    """

    def __init__(
        self,
        input: Tensor,
        mean: Tensor,
        scale: Tensor,
        dims: tuple[int, ...],
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> None:
        super().__init__(input, torch.clone, dims, weight, bias)
        self.taken = self.mean, self.scale = mean, scale

    def normalised(self, samples: slice) -> Tensor:
        return (widened(self.input[samples]) - self.mean[samples]).mul_(self.scale[samples])

    def settle(self, layout: Layout | None, batch_size: int) -> None:
        super().settle(layout, batch_size)
        if layout is not None:
            self.mean, self.scale = (layout.bring(t, batch_size) for t in self.taken)
