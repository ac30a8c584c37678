"""How operations move the batch: for each, from its place in the output to that in the inputs.

A rule is asked where the batch lies in what a node computed, and answers for every tensor that the
node reads: a stride, `SHARED` for what all samples have in common (a weight), or `MIXES` for all
where the operation works along the batch, or may.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from irw_optim.gradients.place import MIXES, SHARED, UNREAD, Output, Rule


def elementwise(output: Output) -> Sequence[int]:
    """Inputs broadcast to the output."""
    found = []
    for shape in output.inputs:
        if len(shape) == len(output.shape) and tuple(shape) == tuple(output.shape):
            found.append(output.stride)
            continue
        if output.located is None:
            return MIXES
        dim = output.located[0] - len(output.shape) + len(shape)
        if dim < 0 or shape[dim] == 1:
            found.append(SHARED)
            continue
        place = output.at(shape, dim)
        if place is None:
            return MIXES
        found.append(place)
    return found


def unreduced(output: Output) -> Sequence[int]:
    """A loss of every element."""
    return MIXES if output.node._saved_reduction else elementwise(output)


def reshaped(output: Output) -> Sequence[int]:
    """The same numbers in the same order."""
    return [output.stride] * len(output.inputs)


def along(name: str) -> Rule:
    """Works along remembered dimensions, and keeps the others where they are."""

    def rule(output: Output) -> Sequence[int]:
        touched = output.saved_dims(name)
        if output.located is None or not touched or output.located[0] in touched:
            return MIXES
        return output.all_at(output.located[0])

    return rule


def sliced(output: Output) -> Sequence[int]:
    """A part along a remembered dimension, or all of it, as ``x[0:]`` is."""
    whole = tuple(output.inputs[0]) == tuple(output.shape)
    return reshaped(output) if whole else along("_saved_dim")(output)


def along_last(count: int) -> Rule:
    """Works along the last dimensions."""

    def rule(output: Output) -> Sequence[int]:
        if output.located is None or output.located[0] >= len(output.shape) - count:
            return MIXES
        return output.all_at(output.located[0])

    return rule


def reducing(output: Output) -> Sequence[int]:
    """Sums, means, norms and the like over remembered dimensions."""
    (shape,) = output.inputs[:1]
    dims = output.saved_dims(ndim=len(shape))
    if not dims or output.located is None:
        return MIXES
    dim = output.located[0]
    if not getattr(output.node, "_saved_keepdim", False):
        kept = [d for d in range(len(shape)) if d not in dims]
        if dim >= len(kept):
            return MIXES
        dim = kept[dim]
    return MIXES if dim in dims else output.all_at(dim)


def inserting(output: Output) -> Sequence[int]:
    """The output has a dimension more than the inputs (stack)."""
    if output.located is None:
        return MIXES
    dim, (new,) = output.located[0], output.saved_dims()
    return MIXES if dim == new else output.all_at(dim - (dim > new))


def removing(output: Output) -> Sequence[int]:
    """The output has a dimension less than the input (select, unbind)."""
    if output.located is None:
        return MIXES
    (gone,) = output.saved_dims(ndim=len(output.shape) + 1)
    dim = output.located[0]
    return output.all_at(dim + (dim >= gone))


def swapping(output: Output) -> Sequence[int]:
    """Two dimensions change places."""
    if output.located is None:
        return MIXES
    dim, ndim = output.located[0], len(output.shape)
    names = [n for n in ("_saved_dim0", "_saved_dim1") if hasattr(output.node, n)]
    a, b = [d for n in names for d in output.saved_dims(n)] if names else (0, ndim - 1)
    return output.all_at({a: b, b: a}.get(dim, dim))


def permuting(output: Output) -> Sequence[int]:
    """All dimensions change places."""
    if output.located is None:
        return MIXES
    return output.all_at(output.saved_dims("_saved_dims")[output.located[0]])


def multiplying(output: Output) -> Sequence[int]:
    """Matrix products: with a summand first, or without; with leading batch dimensions, or not."""
    if output.located is None:
        return MIXES
    dim, ndim = output.located[0], len(output.shape)
    *summand, left, right = output.inputs
    found: list[int | None] = []
    for shape in summand:
        front = dim - ndim + len(shape)
        none = not shape or front < 0 or shape[front] == 1
        found.append(SHARED if none else output.at(shape, front))
    if dim < ndim - 2:
        both = [output.at(shape, dim) if shape else SHARED for shape in (left, right)]
        found += both
    elif dim == ndim - 2:
        found += [output.at(left, dim) if left else SHARED, SHARED]
    else:
        found += [SHARED, output.at(right, dim) if right else SHARED]
    return MIXES if None in found else found  # type: ignore[return-value]


def matrix_by_vector(output: Output) -> Sequence[int]:
    """A product of a matrix of samples with a weight."""
    left, _ = output.inputs
    place = output.at(left, 0) if left and output.located is not None else SHARED
    return MIXES if place is None or output.located is None else [place, SHARED]


def with_weights(*, leading: int = 1) -> Rule:
    """The first input holds the batch among its leading dimensions; the others are weights."""

    def rule(output: Output) -> Sequence[int]:
        if output.located is None or output.located[0] >= leading:
            return MIXES
        shape, *weights = output.inputs
        place = output.at(shape, output.located[0]) if shape else SHARED
        return MIXES if place is None else [place, *[SHARED] * len(weights)]

    return rule


def linear(output: Output) -> Sequence[int]:
    """A map of the last dimension."""
    return with_weights(leading=len(output.shape) - 1)(output)


def layer_norm(output: Output) -> Sequence[int]:
    """Normalises the last dimensions."""
    over = len(output.node._saved_normalized_shape)
    return with_weights(leading=len(output.shape) - over)(output)


def batch_norm(output: Output) -> Sequence[int]:
    """With statistics of the batch it mixes; in channels, as an instance norm has them, not."""
    training = output.node._saved_training
    if output.located is None or (training and output.located[0] != 1):
        return MIXES
    shape, *weights = output.inputs
    places = [output.at(shape, output.located[0]) if shape else SHARED]
    in_channels = output.located[0] == 1  # each sample has its own copy of the weights
    places += [output.at(w, 0) if w and in_channels else SHARED for w in weights]
    return MIXES if None in places else places  # type: ignore[return-value]


def of_shared_tables(output: Output) -> Sequence[int]:
    """Lookups: all that is read with a gradient is the table."""
    return [SHARED] * len(output.inputs)


def of_classes(output: Output) -> Sequence[int]:
    """A loss of every element, whose input has the classes as dimension 1."""
    if output.node._saved_reduction or output.located is None:
        return MIXES
    dim = output.located[0]
    return output.all_at(dim + (dim >= 1))


def of_rows(dim: int) -> Rule:
    """A loss of every row, which reads the batch in this dimension."""

    def rule(output: Output) -> Sequence[int]:
        if getattr(output.node, "_saved_reduction", 0) or output.located != (0, 1):
            return MIXES
        return output.all_at(dim)

    return rule


def padding(output: Output) -> Sequence[int]:
    """Pads the last dimensions."""
    return along_last(len(output.node._saved_pad) // 2)(output)


def repeating(output: Output) -> Sequence[int]:
    """Tiles: a shared tensor for all samples, or a batch along other dimensions."""
    if output.located is None:
        return MIXES
    (dim, step), shape = output.located, output.inputs[0]
    front = dim - len(output.shape) + len(shape)
    repeats = output.node._saved_repeats[dim]
    if front < 0 or shape[front] == 1 or (step == shape[front] and repeats == output.batch_size):
        return [SHARED]
    return MIXES if repeats != 1 else output.all_at(front)


def picking(output: Output) -> Sequence[int]:
    """Advanced indices: behind the batch, or with every sample its own row."""
    kinds = picks_of(output.node)
    if output.located is None or output.located[0] != 0 or not kinds:
        return MIXES
    if kinds[0] == "whole":  # several indices with a gap put their dimension in front
        return output.all_at(0) if kinds.count("whole") == len(kinds) - 1 else MIXES
    own = (output.all_at(dim) for dim, kind in enumerate(kinds) if kind == "every row")
    return next((found for found in own if found is not MIXES), MIXES)


def picks_of(node: Any) -> tuple[str, ...]:
    """What advanced indices take of each dimension."""
    rows = node._input_metadata[0].shape[:1]
    indices = node._saved_indices
    ndim = max((index.ndim for index in indices if index is not None), default=0)
    kinds = []
    for index in indices:
        if index is None:
            kinds.append("whole")
        elif index.ndim == ndim and _is_every_row(index, rows[0] if rows else 0):
            kinds.append("every row")
        else:
            kinds.append("index")
    return tuple(kinds)


def _is_every_row(index: torch.Tensor, rows: int) -> bool:
    if index.dtype == torch.bool or index.ndim < 1 or index.shape[0] != rows:
        return False
    column = torch.arange(rows, device=index.device).view(-1, *[1] * (index.ndim - 1))
    return bool((index == column).all())


def recurrent(output: Output) -> Sequence[int]:
    """A layer over time, time first: input, four weights, states (B, width)."""
    dim = 0 if output.number else 1
    if output.located is None or output.located[0] != dim or output.node._saved_batch_sizes:
        return MIXES
    read, *weights_and_states = output.inputs
    weights, states = weights_and_states[:4], weights_and_states[4:]
    found = [output.at(read, 1) if read else SHARED, *[SHARED] * len(weights)]
    found += [output.at(shape, len(shape) - 2) if shape else SHARED for shape in states]
    return MIXES if None in found else found  # type: ignore[return-value]


def strided(output: Output) -> Sequence[int]:
    """Another view of the storage; as the strides of 1 x 1 pictures are put right, the same."""
    if not output.inputs[0] or tuple(output.inputs[0]) != tuple(output.shape):
        return MIXES
    metadata = output.node._input_metadata[output.number]
    numbers = torch.arange(torch.Size(output.shape).numel(), device=metadata.device)
    numbers = (numbers % 2**11).to(metadata.dtype).view(tuple(output.shape))
    pulled = output.node(numbers)
    return [output.stride] if pulled is not None and torch.equal(pulled, numbers) else MIXES


def handed_on(output: Output) -> Sequence[int]:
    """Each output is one of the inputs."""
    numbers = range(len(output.inputs))
    return [output.stride if number == output.number else UNREAD for number in numbers]


def mixing(output: Output) -> Sequence[int]:
    """Of an operation without a rule nothing is known."""
    return MIXES
