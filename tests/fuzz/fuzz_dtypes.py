"""Precisions, complex parameters, autocast, and losses that are tiny or huge in float32."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from fuzz_nets import CLASSES, STEADY, WIDTH, Mapped, Net, alone, make_batch
from fuzz_trials import Draw, Trial
from torch import Tensor, nn

from irw_optim import PerSampleLoss

FACTORS = (1e-24, 1e-18, 1e-12, 1e-6, 1e6, 1e12, 1e20)


def complex_of_default() -> torch.dtype:
    return torch.get_default_dtype().to_complex()


class Spectral(nn.Module):
    """A complex factor for each frequency."""

    def __init__(self, how: str) -> None:
        super().__init__()
        frequencies = WIDTH // 2 + 1
        shape = (frequencies, frequencies) if how == "matrix" else (frequencies,)
        self.w = nn.Parameter(torch.randn(shape, dtype=complex_of_default()))
        self.how = how

    def forward(self, x):
        h = torch.fft.rfft(x)
        if self.how == "matrix":
            h = h @ self.w
        elif self.how == "diagonal":
            h = h @ torch.diag(self.w)
        elif self.how == "added":
            h = h + self.w
        elif self.how == "conjugated":
            h = h * self.w.conj() + self.w.abs()
        else:
            h = h * self.w
        return torch.fft.irfft(h, n=WIDTH)


class ComplexLayer(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH, dtype=complex_of_default())
        self.how = how

    def forward(self, x):
        h = self.layer(x.to(self.layer.weight.dtype) * (1 + 0.5j))
        if self.how == "absolute":
            return h.abs()
        return torch.view_as_real(h)[..., 1] if self.how == "imaginary" else h.real


class AsComplex(nn.Module):
    """Real parameters in pairs."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.randn(WIDTH, 2))
        self.how = how

    def forward(self, x):
        return (
            (x * torch.view_as_complex(self.p)).abs() if self.how == "pairs" else x * self.p[:, 0]
        )


COMPLEX: dict[str, Callable[[], nn.Module]] = {
    **{how: partial(Spectral, how) for how in ("product", "matrix", "diagonal", "added")},
    "conjugated": partial(Spectral, "conjugated"),
    **{how: partial(ComplexLayer, how) for how in ("real", "imaginary", "absolute")},
    "pairs": partial(AsComplex, "pairs"),
}


def cross_entropy(out: Tensor, y: Tensor, factor: float = 1.0) -> Tensor:
    return factor * F.cross_entropy(out, y, reduction="none")


def precise(draw: Draw, name: str) -> Trial:
    """One kind of precision."""
    trunk = draw.pick(*STEADY, "batch norm", "LoRA")
    engine = draw.pick("auto", "auto", "auto", "autodiff")
    alpha = draw.pick(0.05, 0.3, 0.5)
    factor = draw.pick(*FACTORS)
    sizes = [draw.randint(2, 8) for _ in range(3)]
    complex_layer = draw.pick(*COMPLEX) if name == "complex" else ""
    story = complex_layer or f"trunk {trunk!r}"
    way = name.partition(", ")[2]
    model: Any = partial(Net, trunk)
    if complex_layer:
        made = COMPLEX[complex_layer]
        model = lambda: nn.Sequential(  # noqa: E731
            nn.Linear(WIDTH, WIDTH), made(), Mapped(torch.tanh), nn.Linear(WIDTH, CLASSES)
        )

    def run(user: Any, batch: Any) -> None:
        x = batch.x.to(next(user.net.parameters()).dtype)
        reduced = torch.autocast("cpu", torch.bfloat16) if name == "autocast" else nullcontext()
        with reduced:
            out = user.net(x)
            if way == "losses":
                losses = cross_entropy(out, batch.y, factor)
            else:
                loss = user.criterion(out, batch.y)
        if way == "losses":
            return user.of_each(losses)
        return user.backward(loss * factor if way == "a factor" else loss)

    dtype = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "autocast": torch.float32,
        "scaled": torch.float32,
    }.get(name.partition(",")[0], torch.float64)
    scaled, coarse = name.startswith("scaled"), name in ("bfloat16", "autocast")
    criterion: Any = nn.CrossEntropyLoss
    if way == "criterion":
        criterion = partial(PerSampleLoss, partial(cross_entropy, factor=factor))
    return Trial(
        story=f"{story}, factor {factor}, sizes {sizes}, engine {engine!r}, alpha {alpha}",
        world=partial(alone, model),
        batch=lambda number: make_batch(sizes[number], dtype),
        loop=run,
        criterion=criterion,
        options={"alpha": alpha, "engine": engine},
        seed=draw.seed_of_tensors,
        steps=draw.pick(1, 2, 3) if not scaled else 1,
        dtype=dtype,
        exact=torch.float64 if scaled else None,
        tolerance=5e-2 if coarse else None,
        compared=("weights", "gradients") if scaled else ("scores", "weights", "gradients"),
        by_link=coarse,
    )


PRECISIONS = (
    "float32",
    "float64",
    "bfloat16",
    "autocast",
    "complex",
    "scaled, a factor",
    "scaled, criterion",
    "scaled, losses",
)
