"""A recurrent layer over a packed sequence, as one operation of our passes.

On the CPU torch takes some ten nodes a step, and sums up the weights' gradients step by step. Here
a layer of a stack is one node, and each of these gradients one product.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.utils.rnn import PackedSequence

from irw_optim.attachments import Attachment
from irw_optim.torch_internals import is_plain_autograd, uncompiled

from .compiling import KeptOut, on_forward
from .forward._tangents import Tangents, added
from .protocol import widened
from .recurrence import RECURRENT, Recurrence, Steps, linearized, steps_of


class Layer:
    """A layer that reads inputs (R, d), first states, an LSTM's first cells, and its weights."""

    def __init__(self, kind: str, has_biases: bool, directions: int, sizes: Tensor) -> None:
        self.kind, self.sizes = kind, sizes
        self.names = RECURRENT if has_biases else RECURRENT[:2]
        self.firsts = 2 if kind == "LSTM" else 1
        counts = tuple(sizes.tolist())
        self.steps = [steps_of(counts, reverse) for reverse in (False, True)[:directions]]

    def run(self, inputs: Tensor, *others: Tensor) -> Any:
        """The states, (R, directions H), and the last states and cells, by torch."""
        first: Any = others[:2] if self.firsts == 2 else others[0]
        options = self.names == RECURRENT, 1, 0.0, False, len(self.steps) == 2
        run = getattr(torch, self.kind.lower())
        return run(inputs, self.sizes, first, others[self.firsts :], *options)

    def ways(self, others: Sequence[Any]) -> list["Way"]:
        """Each direction, and its part of what is read besides inputs, or of its changes."""
        firsts, weights = others[: self.firsts], others[self.firsts :]
        found = []
        for number, steps in enumerate(self.steps):
            state, cell = (*(None if t is None else t[number] for t in firsts), None)[:2]
            values = weights[number * len(self.names) :]
            found.append(Way(steps, state, cell, dict(zip(self.names, values, strict=False))))
        return found


class Way(NamedTuple):
    """A direction of a layer."""

    steps: Steps
    state: Any  # the first one
    cell: Any
    values: dict[str, Any]


class _OneLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: Layer, *tensors: Tensor) -> Any:
        inputs, *others = tensors
        left = layer.run(*tensors)
        ctx.layer = layer
        linear: list[Tensor | None] = []
        if any(ctx.needs_input_grad):
            states = left[0].chunk(len(layer.steps), 1)
            for own, way in zip(states, layer.ways(others), strict=True):
                linear += linearized(layer.kind, inputs, own, *way)
        ctx.save_for_backward(*tensors, *linear)
        return left

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        layer: Layer = ctx.layer
        tensors, recurrences = _saved(ctx)
        if torch.is_grad_enabled():
            return None, *_again(layer, tensors, gradients)
        inputs, *others = tensors
        of_states, *of_last = gradients
        of_inputs: Any = None
        firsts, weights = [], []
        arriving = of_states.chunk(len(layer.steps), 1), zip(*of_last, strict=True)
        ways = zip(layer.ways(others), recurrences, *arriving, strict=True)
        for (steps, _, _, values), recurrence, own, last in ways:
            weight_ih, weight_hh = (widened(values[name]) for name in RECURRENT[:2])
            b, *totals = recurrence.back(steps, weight_hh, own, *last)
            by_inputs = b[:, recurrence.of_inputs].flatten(1)
            by_states = b.flatten(1)[:, : len(weight_hh)]
            of_inputs = added(of_inputs, by_inputs @ weight_ih)
            through = by_states[steps.first] @ weight_hh
            firsts.append(recurrence.back_to_first(steps, through, *totals))
            weights += [by_inputs.t() @ widened(inputs), by_states.t() @ recurrence.before]
            weights += [by_inputs.sum(0), by_states.sum(0)][: len(values) - 2]
        found = [of_inputs, *map(torch.stack, zip(*firsts, strict=True)), *weights]
        return None, *(g.to(t.dtype) for g, t in zip(found, tensors, strict=True))


def _saved(node: Any) -> tuple[Sequence[Tensor], list[Recurrence]]:
    """What the layer read, and the derivative of each direction."""
    layer: Layer = node.layer
    saved = node.saved_tensors
    count = 1 + layer.firsts + len(layer.steps) * len(layer.names)
    size = len(Recurrence._fields)
    found = range(count, len(saved), size)
    return saved[:count], [Recurrence(*saved[n : n + size]) for n in found]


def _again(
    layer: Layer, tensors: Sequence[Tensor], gradients: Sequence[Tensor]
) -> list[Tensor | None]:
    """The gradients with a derivative of their own, of torch's own steps."""
    read = [tensor for tensor in tensors if tensor.requires_grad]
    made = layer.run(*tensors)
    found = iter(torch.autograd.grad(made, read, gradients, create_graph=True, allow_unused=True))
    return [next(found) if tensor.requires_grad else None for tensor in tensors]


ONE_LAYER: type[Node] = _OneLayer._backward_cls
"""The node of a layer."""


def push_layer(node: Any, changes: Tangents) -> Tangents:
    """What leaves a layer, for changes of what entered."""
    layer: Layer = node.layer
    tensors, recurrences = _saved(node)
    inputs, *others = tensors
    change, *of_others = changes
    states, lasts = [], []
    for way, moved, recurrence in zip(
        layer.ways(others), layer.ways(of_others), recurrences, strict=True
    ):
        own, cells = recurrence.forward(inputs, way.values, change, *moved)
        states.append(own)
        lasts.append([own[way.steps.last], cells[way.steps.last]][: layer.firsts])
    return [torch.cat(states, 1), *map(torch.stack, zip(*lasts, strict=True))]


class _AsOne(KeptOut):
    @uncompiled
    def __call__(self, input: Any, hx: Any = None) -> Any:
        layer: Any = self.module
        if not _is_one(layer, input):
            return self.__wrapped__(input, hx)
        data, sizes, to_sorted, from_sorted = input
        number, count = layer.num_layers, 1 + layer.bidirectional
        if hx is None:
            zeros = data.new_zeros(number * count, int(sizes[0]), layer.hidden_size)
            hx = (zeros, zeros) if layer.mode == "LSTM" else zeros
        else:
            hx = layer.permute_hidden(hx, to_sorted)
        layer.check_forward_args(data, hx, sizes)
        firsts = hx if isinstance(hx, tuple) else (hx,)
        call, lasts = Layer(layer.mode, layer.bias, count, sizes), []
        names = len(call.names)
        for first in range(0, number * count, count):
            if first and layer.dropout and layer.training:
                data = torch.dropout(data, layer.dropout, True)
            own = layer._flat_weights[first * names : (first + count) * names]
            read = [t[first : first + count] for t in firsts]
            data, *last = _OneLayer.apply(call, data, *read, *own)  # type: ignore[no-untyped-call]
            lasts.append(last)
        last = tuple(map(torch.cat, zip(*lasts, strict=True)))
        sequence = PackedSequence(data, sizes, to_sorted, from_sorted)
        hidden = last if layer.mode == "LSTM" else last[0]
        return sequence, layer.permute_hidden(hidden, from_sorted)


PackedAsOne = on_forward(_AsOne)


def packed_as_one(model: nn.Module) -> list[Attachment]:
    """For a model's recurrent layers."""
    kinds = nn.RNN, nn.LSTM, nn.GRU
    return [PackedAsOne.on(layer) for layer in model.modules() if type(layer) in kinds]


def _is_one(layer: Any, input: Any) -> bool:
    return (
        isinstance(input, PackedSequence)
        and not layer.proj_size
        and torch.is_grad_enabled()
        and input.data.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and all(weight.is_leaf for weight in layer._flat_weights)
        and is_plain_autograd()
    )
