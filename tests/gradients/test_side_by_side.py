"""Small products put together give what each call gives by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import irw_optim.gradients.side_by_side as package
from irw_optim.gradients.layers import (
    FIRST,
    ConvolutionCall,
    LayerCall,
    LinearCall,
    RowsCall,
    RowWeights,
)
from irw_optim.gradients.side_by_side import Columns, side_by_side, steps_as_one

B = 5


def numbers(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def maps(dtype: torch.dtype = torch.float64) -> list[LinearCall]:
    torch.manual_seed(0)
    calls = []
    for width_in, width_out, with_bias, transposed in [
        (4, 3, True, False), (3, 1, False, False), (2, 6, True, True), (1, 2, False, True)
    ]:  # fmt: skip
        shape = (width_in, width_out) if transposed else (width_out, width_in)
        bias = nn.Parameter(numbers(width_out, dtype=dtype)) if with_bias else None
        call = LinearCall(
            numbers(B, width_in, dtype=dtype),
            nn.Parameter(numbers(*shape, dtype=dtype)),
            bias,
            transposed=transposed,
        )
        call.settle(FIRST, B)
        call.set_output_gradient(numbers(B, width_out, dtype=dtype))
        calls.append(call)
    return calls


def rows_of(calls: list[LayerCall]) -> dict[Tensor, Tensor]:
    return {p: block for call in calls for p, block in call.rows().items()}


def product_with(rows: dict[Tensor, Tensor], direction: dict[Tensor, Tensor]) -> Tensor:
    each = [(rows[p].flatten(1) * v.flatten()).sum(1) for p, v in direction.items()]
    return torch.stack(each).sum(0)


def without_biases(calls: list[LinearCall]) -> list[LinearCall]:
    for call in calls:
        call.parameters.pop("bias", None)
    return calls


@pytest.mark.parametrize("kind", ["one map", "maps", "rows"])
def test_the_products_are_those_of_the_rows(kind):
    calls = maps() if kind == "rows" else without_biases(maps())[: 1 if kind == "one map" else 4]
    rows = rows_of(calls)
    part = Columns(rows) if kind == "rows" else Columns({}, calls)
    weights = numbers(B)
    combined = part.combine(RowWeights(weights))
    assert combined.keys() == rows.keys()
    for p, block in rows.items():
        torch.testing.assert_close(combined[p], torch.einsum("b,b...->...", weights, block))
    torch.testing.assert_close(part.align(RowWeights(weights)), product_with(rows, combined))
    some = dict(list(combined.items())[1:4])
    for direction in (combined, some or combined):
        torch.testing.assert_close(part.dot(direction), product_with(rows, direction))


@pytest.mark.cpu("a device makes the rows that it is compared with in bfloat16")
def test_half_precision_is_widened():
    calls = without_biases(maps(torch.bfloat16))
    part = Columns({}, calls)
    aligned = part.align(RowWeights(torch.ones(B)))
    assert aligned.dtype == torch.float32
    rows = {p: block.float() for p, block in rows_of(calls).items()}
    combined = {p: block.sum(0) for p, block in rows.items()}
    torch.testing.assert_close(aligned, product_with(rows, combined), rtol=1e-4, atol=1e-4)


def a_convolution() -> ConvolutionCall:
    settings = {"stride": [1], "padding": [0], "dilation": [1], "transposed": False}
    weight, bias = nn.Parameter(numbers(3, 2, 2)), nn.Parameter(numbers(3))
    call = ConvolutionCall(numbers(B, 2, 6), weight, bias, **settings, output_padding=[0], groups=1)
    call.settle(FIRST, B)
    call.set_output_gradient(numbers(B, 3, 5))
    return call


def test_what_is_small_is_joined_and_what_meets_stays():
    torch.manual_seed(0)
    convolution, other = a_convolution(), RowsCall(a_convolution())
    tied = [a_convolution()] * 2
    alone, meeting = side_by_side([convolution, other, *tied])
    assert meeting == tied
    joined = [part for part in alone if isinstance(part, Columns)]
    assert len(joined) == 1
    rows = rows_of([convolution, other])
    # On a device the rows of its weight are few numbers, too.
    own = ["bias"] if convolution.input.is_cpu else ["bias", "weight"]
    assert {*joined[0].parameters} == {
        *map(convolution.parameters.get, own),
        *other.parameters.values(),
    }
    weights = RowWeights(numbers(B))
    combined = {p: g for part in alone for p, g in part.combine(weights).items()}
    assert combined.keys() == rows.keys()
    aligned = torch.stack([part.align(weights) for part in alone]).sum(0)
    torch.testing.assert_close(aligned, product_with(rows, combined))


@pytest.mark.parametrize("few", [2, 2**5, 2**20])
def test_maps_are_rows_together_or_alone_as_large_as_they_are(few, monkeypatch):
    monkeypatch.setattr(package, "FEW", {torch.get_default_device().type: few})
    calls = maps()
    rows, weights = rows_of(calls), RowWeights(numbers(B))
    parts, _ = side_by_side(calls)
    combined = {p: g for part in parts for p, g in part.combine(weights).items()}
    assert combined.keys() == rows.keys()
    for p, block in rows.items():
        torch.testing.assert_close(combined[p], torch.einsum("b,b...->...", weights.values, block))
    aligned = torch.stack([part.align(weights) for part in parts]).sum(0)
    torch.testing.assert_close(aligned, product_with(rows, combined))


def test_maps_with_and_without_the_rows_of_a_bias():
    calls = maps()
    rows, weights = rows_of(calls), RowWeights(numbers(B))
    biases = {call.parameters["bias"] for call in calls if "bias" in call.parameters}
    part = Columns({p: rows[p] for p in reversed([*biases])}, without_biases(calls))
    combined = part.combine(weights)
    assert combined.keys() == rows.keys()
    for p, block in rows.items():
        torch.testing.assert_close(combined[p], torch.einsum("b,b...->...", weights.values, block))
    torch.testing.assert_close(part.align(weights), product_with(rows, combined))
    torch.testing.assert_close(part.dot(combined), product_with(rows, combined))


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_steps_of_one_map_are_one_call(which):
    """A recurrent layer's: what they share is in one call then, and meets no other."""
    first = maps()[which]
    steps = [first]
    for _ in range(3):
        step = first.copy()
        step.recorded = numbers(*first.input.shape)
        step.settle(first.layout, B)
        step.set_output_gradient(numbers(*first.output_gradient.shape))
        steps.append(step)
    rows = {p: sum(step.rows()[p] for step in steps) for p in first.parameters.values()}
    parts, meeting = side_by_side(steps_as_one(steps))
    assert not meeting
    assert not any(step.input.numel() or step.output_gradient.numel() for step in steps)
    weights = RowWeights(numbers(B))
    combined = {p: t for part in parts for p, t in part.combine(weights).items()}
    for p, block in rows.items():
        torch.testing.assert_close(combined[p], torch.einsum("b,b...->...", weights.values, block))
    aligned = torch.stack([part.align(weights) for part in parts]).sum(0)
    torch.testing.assert_close(aligned, product_with(rows, combined))


def test_maps_of_other_widths_that_share_a_bias_are_no_steps():
    first, other = maps()[:2]
    other.parameters = first.parameters = {"bias": first.parameters["bias"]}
    other.set_output_gradient(numbers(*first.output_gradient.shape))
    assert steps_as_one([first, other]) == [first, other]


def test_what_is_large_is_not_copied_for_its_steps(monkeypatch):
    steps = [maps()[0] for _ in range(2)]
    for step in steps[1:]:
        step.parameters = steps[0].parameters
    monkeypatch.setattr(package, "FEW", {torch.get_default_device().type: 1})
    assert steps_as_one(steps) == steps
