"""Every covered layer: dot, combine, gram and p.grad against a loop over the samples."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import products
import pytest
import torch
from torch import Tensor, nn

from irw_optim import IRWOptimizer

B = 5


class Case(NamedTuple):
    """A layer, and a maker of its inputs."""

    layer: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    keywords: Mapping[str, Any] = MappingProxyType({})


def normal(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(B, *shape),)


def indices(*shape: int, below: int = 7) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randint(below, (B, *shape)),)


def bags() -> tuple[Tensor, ...]:
    return torch.randint(7, (11,)), torch.tensor([0, 3, 3, 4, 9])  # the second bag is empty


def bags_with_end() -> tuple[Tensor, ...]:
    return torch.randint(7, (11,)), torch.tensor([0, 3, 3, 4, 9, 11])


def weighted_bags() -> tuple[Tensor, ...]:
    return torch.randint(7, (B, 3)), None, torch.randn(B, 3)  # type: ignore[return-value]


def attention(width: int, *others: int) -> Callable[[], tuple[Tensor, ...]]:
    """Query, key and value of (B, T, d); the query alone for self-attention."""

    def make() -> tuple[Tensor, ...]:
        if not others:
            return (torch.randn(B, 4, width),) * 3
        return tuple(torch.randn(B, 4 if d is width else 6, d) for d in (width, *others))

    return make


def trained(layer: nn.Module) -> nn.Module:
    """The layer in eval mode with statistics and an affine map that are not the initial ones."""
    with torch.no_grad():
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
        layer.weight.normal_()
        layer.bias.normal_()
    return layer.eval()


CASES = {
    "Linear": Case(lambda: nn.Linear(4, 3), normal(4)),
    "Linear, sequence": Case(lambda: nn.Linear(4, 3), normal(6, 4)),
    "Linear, two sequence dims": Case(lambda: nn.Linear(4, 3), normal(2, 3, 4)),
    "Linear, sequence as long as the batch": Case(lambda: nn.Linear(4, 3), normal(B, 4)),
    "Linear, long sequence": Case(lambda: nn.Linear(2, 2), normal(40, 2)),
    "Linear, wide": Case(lambda: nn.Linear(40, 30), normal(3, 40)),
    "Linear, no bias": Case(lambda: nn.Linear(4, 3, bias=False), normal(4)),
    "Linear, many numbers": Case(lambda: nn.Linear(128, 2), normal(128, 128)),
    "Conv1d": Case(lambda: nn.Conv1d(2, 4, 3), normal(2, 8)),
    "Conv1d, no bias": Case(lambda: nn.Conv1d(2, 4, 3, bias=False), normal(2, 8)),
    "Conv1d, same": Case(lambda: nn.Conv1d(2, 4, 4, padding="same", dilation=2), normal(2, 8)),
    "Conv2d": Case(
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2),
        normal(4, 6, 7),
    ),
    "Conv2d, depthwise": Case(lambda: nn.Conv2d(3, 6, 3, groups=3, padding=1), normal(3, 5, 5)),
    "Conv2d, same": Case(
        lambda: nn.Conv2d(2, 3, (2, 3), padding="same", dilation=(2, 1)), normal(2, 5, 4)
    ),
    "Conv2d, valid": Case(lambda: nn.Conv2d(2, 3, 3, padding="valid"), normal(2, 5, 4)),
    "Conv2d, stride beyond the kernel": Case(lambda: nn.Conv2d(2, 3, 2, stride=3), normal(2, 9, 8)),
    "Conv2d, many numbers": Case(lambda: nn.Conv2d(8, 2, 3), normal(8, 48, 48)),
    "Conv3d": Case(
        lambda: nn.Conv3d(2, 4, 2, stride=2, padding=1, dilation=2, groups=2), normal(2, 5, 4, 5)
    ),
    **{
        f"Conv2d, {mode}": Case(
            lambda mode=mode: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode=mode), normal(2, 5, 4)
        )
        for mode in ("reflect", "replicate", "circular")
    },
    "Conv1d, circular": Case(
        lambda: nn.Conv1d(2, 3, 3, padding=2, padding_mode="circular", stride=2), normal(2, 6)
    ),
    "ConvTranspose1d": Case(
        lambda: nn.ConvTranspose1d(2, 4, 3, stride=2, padding=1, output_padding=1), normal(2, 5)
    ),
    "ConvTranspose1d, padded beyond its stride": Case(
        lambda: nn.ConvTranspose1d(2, 4, 2, dilation=2, output_padding=1), normal(2, 5)
    ),
    "ConvTranspose2d": Case(
        lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=2, dilation=2, groups=2), normal(4, 3, 4)
    ),
    "ConvTranspose2d, output_size": Case(
        lambda: nn.ConvTranspose2d(2, 3, 3, stride=2), normal(2, 3, 3), {"output_size": [8, 8]}
    ),
    "ConvTranspose3d": Case(
        lambda: nn.ConvTranspose3d(2, 2, 2, stride=2, bias=False), normal(2, 2, 3, 2)
    ),
    "Embedding": Case(lambda: nn.Embedding(7, 3), indices(6)),
    "Embedding, one index": Case(lambda: nn.Embedding(7, 3), indices()),
    "Embedding, two dims": Case(lambda: nn.Embedding(7, 3), indices(2, 3)),
    "Embedding, padding_idx": Case(lambda: nn.Embedding(7, 3, padding_idx=2), indices(6, below=4)),
    "Embedding, sparse": Case(lambda: nn.Embedding(7, 3, sparse=True), indices(6)),
    "EmbeddingBag, sum": Case(lambda: nn.EmbeddingBag(7, 3, mode="sum"), indices(4)),
    "EmbeddingBag, mean": Case(lambda: nn.EmbeddingBag(7, 3), indices(4)),
    "EmbeddingBag, offsets": Case(lambda: nn.EmbeddingBag(7, 3), bags),
    "EmbeddingBag, sum with offsets": Case(lambda: nn.EmbeddingBag(7, 3, mode="sum"), bags),
    "EmbeddingBag, include_last_offset": Case(
        lambda: nn.EmbeddingBag(7, 3, include_last_offset=True), bags_with_end
    ),
    "EmbeddingBag, padding_idx": Case(
        lambda: nn.EmbeddingBag(7, 3, padding_idx=1), indices(4, below=3)
    ),
    "EmbeddingBag, per_sample_weights": Case(
        lambda: nn.EmbeddingBag(7, 3, mode="sum"), weighted_bags
    ),
    "EmbeddingBag, sparse": Case(lambda: nn.EmbeddingBag(7, 3, sparse=True), indices(4)),
    "LayerNorm": Case(lambda: nn.LayerNorm(4), normal(4)),
    "LayerNorm, sequence": Case(lambda: nn.LayerNorm(4), normal(6, 4)),
    "LayerNorm, several dims": Case(lambda: nn.LayerNorm((3, 4)), normal(2, 3, 4)),
    "LayerNorm, no bias": Case(lambda: nn.LayerNorm(4, bias=False), normal(6, 4)),
    "GroupNorm": Case(lambda: nn.GroupNorm(2, 4), normal(4, 3, 3)),
    "GroupNorm, flat": Case(lambda: nn.GroupNorm(2, 6), normal(6)),
    "InstanceNorm1d": Case(lambda: nn.InstanceNorm1d(3, affine=True), normal(3, 5)),
    "InstanceNorm2d": Case(lambda: nn.InstanceNorm2d(3, affine=True), normal(3, 4, 4)),
    "InstanceNorm3d": Case(lambda: nn.InstanceNorm3d(3, affine=True), normal(3, 2, 3, 2)),
    "InstanceNorm2d, running, train": Case(
        lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True), normal(3, 4, 4)
    ),
    "InstanceNorm2d, running, eval": Case(
        lambda: trained(nn.InstanceNorm2d(3, affine=True, track_running_stats=True)),
        normal(3, 4, 4),
    ),
    "RMSNorm": Case(lambda: nn.RMSNorm(4), normal(4)),
    "RMSNorm, sequence": Case(lambda: nn.RMSNorm(4, eps=1e-3), normal(6, 4)),
    "RMSNorm, several dims": Case(lambda: nn.RMSNorm((3, 4)), normal(2, 3, 4)),
    "BatchNorm1d, eval": Case(lambda: trained(nn.BatchNorm1d(4)), normal(4)),
    "BatchNorm1d, eval, sequence": Case(lambda: trained(nn.BatchNorm1d(4)), normal(4, 3)),
    "BatchNorm2d, eval": Case(lambda: trained(nn.BatchNorm2d(3)), normal(3, 4, 4)),
    "BatchNorm3d, eval": Case(lambda: trained(nn.BatchNorm3d(2)), normal(2, 2, 3, 2)),
    "BatchNorm1d, eval, no epsilon": Case(lambda: trained(nn.BatchNorm1d(4, eps=0.0)), normal(4)),
    "MultiheadAttention": Case(lambda: nn.MultiheadAttention(4, 2, batch_first=True), attention(4)),
    "MultiheadAttention, no weights": Case(
        lambda: nn.MultiheadAttention(4, 2, batch_first=True), attention(4), {"need_weights": False}
    ),
    "MultiheadAttention, no bias": Case(
        lambda: nn.MultiheadAttention(4, 2, bias=False, batch_first=True), attention(4)
    ),
    "MultiheadAttention, cross": Case(
        lambda: nn.MultiheadAttention(4, 2, batch_first=True), attention(4, 4, 4)
    ),
    "MultiheadAttention, kdim and vdim": Case(
        lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5, batch_first=True), attention(4, 3, 5)
    ),
    "MultiheadAttention, key_padding_mask": Case(
        lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        attention(4),
        {"key_padding_mask": torch.arange(4) >= torch.tensor([[4], [2], [3], [1], [4]])},
    ),
}


class Uses(nn.Module):
    """Calls the layer once or twice, and changes what it returned in place where told to."""

    def __init__(self, case: Case, times: int = 1, in_place: bool = False) -> None:
        super().__init__()
        self.layer = case.layer()
        self.keywords = case.keywords
        self.in_place = in_place
        self.calls = [case.inputs() for _ in range(times)]

    def forward(self) -> Tensor:
        outputs = []
        for inputs in self.calls:
            output = self.layer(*map(self._cast, inputs), **self.keywords)
            output = output[0] if isinstance(output, tuple) else output
            if self.in_place:
                output += 0.5
                output.mul_(2).relu_()
            outputs.append(output.float() if output.dtype == torch.bfloat16 else output)
        return outputs[0] if len(outputs) == 1 else outputs[0] * outputs[1].sin()

    def _cast(self, input: Tensor | None) -> Tensor | None:
        if input is None or not input.is_floating_point():
            return input
        return input.to(next(self.layer.parameters()).dtype)


def losses_of(model: nn.Module) -> Tensor:
    """Each sample's loss is another function of its output."""
    output = model()
    pattern = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output).cos()
    return ((output + pattern) * pattern).square().flatten(1).sum(1)


def losses_under_autocast(model: nn.Module) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return losses_of(model)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
class TestGhost:
    """``engine="ghost"`` raises where it does not cover: these layers are covered."""

    def test_float64(self, case: Case) -> None:
        products.check(Uses(case).double(), losses_of, "ghost", 1e-10, B)

    def test_float32(self, case: Case) -> None:
        products.check(Uses(case), losses_of, "ghost", 1e-5, B)

    def test_bfloat16_autocast(self, case: Case) -> None:
        # bfloat16 keeps 8 bits: one rounding is up to 2^-8 = 0.4 %. The loop rounds every gradient
        # of a sample to that, the engine none, and products in which large terms cancel show many
        # times as much. A product that is wrong is off by its own size.
        products.check(Uses(case), losses_under_autocast, "ghost", 1e-1, B)

    def test_an_empty_batch_has_no_gradient(self, case: Case) -> None:
        model = Uses(case)
        if len(model.calls[0][0]) != B:
            pytest.skip("bags of their own sizes")
        if isinstance(model.layer, nn.modules.instancenorm._InstanceNorm):
            pytest.skip("torch has none")
        model.calls = [tuple(None if i is None else i[:0] for i in model.calls[0])]
        model.keywords = {
            k: v[:0] if isinstance(v, Tensor) else v for k, v in model.keywords.items()
        }
        sgd = torch.optim.SGD(model.parameters(), lr=1.0)
        optimizer = IRWOptimizer(sgd, alpha=0.5, model=model)
        optimizer.backward(losses_of(model))
        assert not any(p.grad is not None and p.grad.to_dense().any() for p in model.parameters())
        assert optimizer.last_step.weights.shape == (0,)

    def test_called_twice(self, case: Case) -> None:
        products.check(Uses(case, times=2).double(), losses_of, "ghost", 1e-10, B)

    def test_changed_in_place(self, case: Case) -> None:
        products.check(Uses(case, in_place=True).double(), losses_of, "ghost", 1e-10, B)

    @pytest.mark.parametrize("frozen", ["weight", "bias"])
    def test_some_parameters_frozen(self, case: Case, frozen: str) -> None:
        model = Uses(case).double()
        for name, parameter in model.named_parameters():
            if frozen in name.rpartition(".")[2]:
                parameter.requires_grad_(False)
        if not products.trainable(model):
            pytest.skip("no other parameter")
        products.check(model, losses_of, "ghost", 1e-10, B)


@pytest.mark.parametrize("bound", [1, 40, 400])
@pytest.mark.parametrize("engine", ["ghost", "autodiff"])
@pytest.mark.parametrize(
    "name",
    [
        "Linear, sequence",
        "Linear, wide",
        "Conv2d",
        "Embedding",
        "EmbeddingBag, offsets",
        "LayerNorm, sequence",
        "MultiheadAttention",
    ],
)
@pytest.mark.parametrize("times", [1, 2])
def test_in_blocks(monkeypatch, name: str, engine: str, bound: int, times: int) -> None:
    """Products that would not fit are taken a block of samples or of columns at a time."""
    holders = [m for name, m in sys.modules.items() if name.startswith("irw_optim.")]
    for module in holders:
        if hasattr(module, "MEMORY_BOUND"):
            monkeypatch.setattr(module, "MEMORY_BOUND", bound)
    products.check(Uses(CASES[name], times).double(), losses_of, engine, 1e-10, B)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_autodiff(case: Case) -> None:
    products.check(Uses(case).double(), losses_of, "autodiff", 1e-10, B)


@pytest.mark.parametrize("size", [20, 127, 128, 200])
@pytest.mark.parametrize("length", [None, 1, 5])
@pytest.mark.parametrize("weightless", [1, 18], ids=["most rows count", "few rows count"])
def test_batches_large_and_small(size: int, length: int | None, weightless: int) -> None:
    """Which way is the shortest depends on the sizes; all of them are right."""
    model = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3, bias=False)).double()
    x = torch.randn(size, *([] if length is None else [length]), 16).double()
    pattern = torch.randn(*x.shape[:-1], 3).double()

    def run(net: nn.Module) -> Tensor:
        return (net(x) - pattern).square().flatten(1).sum(1)

    products.check(model, run, "ghost", 1e-10, size, every=20, but=weightless)
