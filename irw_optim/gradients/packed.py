"""A recurrent layer over a packed sequence, as one operation of our passes.

On the CPU torch takes some ten nodes a step. Autograd's engine pulls back through all at once, and
dual numbers push forwards.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn.utils.rnn import PackedSequence

from irw_optim.attachments import Attachment
from irw_optim.gradients.compiling import KeptOut, OnForward
from irw_optim.gradients.forward._tangents import Tangents
from irw_optim.torch_internals import is_plain_autograd, load_dual_numbers, silent, uncompiled

Forward = Callable[..., tuple[PackedSequence, Any]]


class Run:
    """One call of a layer, and how to repeat it."""

    def __init__(self, layer: Any, forward: Forward, entered: Sequence[Tensor], given: Any) -> None:
        self.layer, self.forward, self.given = layer, forward, given
        self.values = [tensor.detach() for tensor in entered]
        self.weights: list[Tensor] = list(layer._flat_weights)
        self.edges = [_edge(tensor) for tensor in (*entered, *self.weights)]
        self.training: bool = layer.training
        draws = layer.training and layer.dropout and layer.num_layers > 1
        self.random = torch.get_rng_state() if draws else None

    @contextmanager
    def as_it_was(self, weights: list[Tensor]) -> Iterator[None]:
        """The layer as when it ran, with other weights."""
        layer = self.layer
        before, training = layer._flat_weights, layer.training
        with torch.random.fork_rng(devices=[], enabled=self.random is not None):
            if self.random is not None:
                torch.set_rng_state(self.random)
            layer._flat_weights, layer.training = weights, self.training
            try:
                yield
            finally:
                layer._flat_weights, layer.training = before, training


def _edge(tensor: Tensor) -> tuple[Node | None, int]:
    if not tensor.requires_grad:
        return None, 0
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def push_run(end: Any, changes: Tangents) -> Tangents:
    """What left, for changes of what entered and of the weights."""
    run: Run = end.run
    values = [*run.values, *(weight.detach() for weight in run.weights)]
    load_dual_numbers()
    with torch.no_grad(), forward_ad.dual_level():
        dual = [
            value if change is None else forward_ad.make_dual(value, change)
            for value, change in zip(values, changes, strict=True)
        ]
        count = len(run.values)
        sequence, states = _with(dual[:count], *run.given)
        if states is None:  # but dual from the first step on
            zeros = [values[0].new_zeros(tuple(m.shape)) for m in end._input_metadata[1:]]
            first = [forward_ad.make_dual(zero, zero.clone()) for zero in zeros]
            states = tuple(first) if len(first) > 1 else first[0]
        with run.as_it_was(dual[count:]):
            left = run.forward(sequence, states)
        return [forward_ad.unpack_dual(tensor).tangent for tensor in _tensors(*left)]


def pull_run(end: Any, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """What entered and the weights get, for gradients of what left."""
    run: Run = end.run
    arriving = [
        (GradientEdge(parent, number), gradient)
        for (parent, number), gradient in zip(end.next_functions, gradients, strict=True)
        if gradient is not None and parent is not None
    ]
    edges, values = zip(*arriving, strict=True)
    wanted = [GradientEdge(node, number) for node, number in run.edges if node is not None]
    with silent(run.weights):
        found = torch.autograd.grad(edges, wanted, values, retain_graph=True, allow_unused=True)
    gradient_of = iter(found)
    return [None if node is None else next(gradient_of) for node, _ in run.edges]


class _Leave(torch.autograd.Function):
    """By copies, into which users may write."""

    @staticmethod
    def forward(ctx: Any, run: Run, *tensors: Tensor) -> Any:
        ctx.run = run
        ctx.set_materialize_grads(False)
        return tuple(tensor.clone() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return None, *gradients


ENDS_RUN: type[Node] = _Leave._backward_cls
"""The node at the end of its ``run``."""


class _AsOne(KeptOut):
    @uncompiled
    def __call__(self, input: Any, hx: Any = None) -> Any:
        forward, layer = self.__wrapped__, self.module
        if not _is_one(layer, input):
            return forward(input, hx)
        tensors = _tensors(input, hx)
        entered = [t.view_as(t) if t.requires_grad else t for t in tensors]  # without hooks
        run = Run(layer, forward, entered, (input, hx))
        left = forward(*_with(entered, input, hx))
        leaving = _tensors(*left)
        if not leaving[0].requires_grad:
            return left
        return _with(_Leave.apply(run, *leaving), *left)  # type: ignore[no-untyped-call]


class PackedAsOne(OnForward):
    """Makes a recurrent layer's call one operation."""

    stands_in = _AsOne


def packed_as_one(model: nn.Module) -> list[Attachment]:
    """For a model's recurrent layers."""
    kinds = nn.RNN, nn.LSTM, nn.GRU
    return [PackedAsOne.on(layer) for layer in model.modules() if type(layer) in kinds]


def _is_one(layer: Any, input: Any) -> bool:
    return (
        isinstance(input, PackedSequence)
        and torch.is_grad_enabled()
        and input.data.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and all(weight.is_leaf for weight in layer._flat_weights)
        and is_plain_autograd()
    )


def _tensors(sequence: PackedSequence, states: Any) -> list[Tensor]:
    if states is None:
        return [sequence.data]
    return [sequence.data, *([states] if isinstance(states, Tensor) else states)]


def _with(tensors: Sequence[Tensor], sequence: PackedSequence, states: Any) -> tuple[Any, Any]:
    """The same with other `_tensors`."""
    data, *others = tensors
    if states is not None:
        states = others[0] if isinstance(states, Tensor) else tuple(others)
    return sequence._replace(data=data), states
