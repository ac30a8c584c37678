"""Training and validation data, checked before anything trains."""

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from irw_optim.criterion import PerSampleLosses
from irw_optim.metrics._groups import (
    as_array,
    as_classes,
    as_columns,
    as_rows,
    as_vector,
    check_lengths,
    check_numbers,
    intersect,
    kmeans,
)
from irw_optim.schemes.batch_losses import BatchLosses, Forward, eval_mode, inputs_and_target

Numbers = npt.NDArray[Any]

Data: TypeAlias = Dataset[Any] | tuple[Any, Any]
"""A map-style data set, or ``(X, y)``: NumPy arrays, tensors, lists or pandas."""


class Samples:
    """A data set, as a model and a criterion take it."""

    def __init__(
        self,
        name: str,
        data: Data,
        model: nn.Module,
        criterion: nn.Module,
        options: Mapping[str, Any],
        forward: Forward | None = None,
    ) -> None:
        self.name = name
        self.criterion, self.forward = criterion, forward
        if isinstance(data, tuple):
            data = _from_arrays(name, data, model, criterion)
        if isinstance(data, IterableDataset | DataLoader) or not hasattr(data, "__getitem__"):
            raise TypeError(
                f"{name} is a {type(data).__name__}: expected a map-style data set, or a tuple "
                "(X, y) of arrays"
            )
        self.dataset: Any = data
        if not len(self):
            raise ValueError(f"{name} is empty: expected at least one sample")
        try:
            self.options = dict(options)
            self.loader()
        except (TypeError, ValueError) as error:
            raise ValueError(f"loader_options={options!r}: {error}") from error

    def __len__(self) -> int:
        return len(self.dataset)

    def loader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset, **{"batch_size": 1024, **self.options})

    def batches(self, pieces: Iterable[Tensor]) -> Iterator[Any]:
        if type(self.dataset) is TensorDataset and "collate_fn" not in self.options:
            for piece in pieces:
                yield [tensor[piece] for tensor in self.dataset.tensors]
        else:
            drawn = (piece.tolist() for piece in pieces)
            options = {k: v for k, v in self.options.items() if k != "batch_size"}
            yield from DataLoader(self.dataset, batch_sampler=drawn, **options)

    def inputs(self, needed: bool) -> Tensor | None:
        """(N, ...), where they are at hand or ``needed`` for clusters."""
        if type(self.dataset) is TensorDataset:
            return self.dataset.tensors[0]
        found = []
        for batch in self.loader() if needed else ():
            if not isinstance(batch, list | tuple) or not isinstance(batch[0], Tensor):
                raise _cannot_be_clustered("they are no tensors")
            found.append(batch[0])
        return torch.cat(found) if found else None

    def read(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Outputs (N, ...) and classes (N,) in evaluation mode, on the CPU."""
        outputs, labels, losses_of = [], [], ClassLosses(model, self.criterion, self.forward)
        try:
            with eval_mode(model), torch.no_grad():
                for batch in self.batches(torch.arange(len(self)).split(1024)):
                    part = losses_of(batch)
                    outputs.append(losses_of.arguments[0].cpu())
                    labels.append(self._checked(part).cpu())
        except (RuntimeError, IndexError) as error:
            raise ValueError(
                f"{self.name}: model and criterion do not take a batch of it: {error}"
            ) from error
        return torch.cat(outputs), torch.cat(labels)

    def _checked(self, part: PerSampleLosses) -> Tensor:
        if part.labels is None:
            raise ValueError(
                f"{self.name}: the criterion's target is no class a sample: expected one such as "
                "CrossEntropyLoss or BCEWithLogitsLoss"
            )
        if part.counts is not None and not bool(part.counts.all()):
            raise ValueError(
                f"{self.name}: the criterion ignores {int((part.counts == 0).sum())} targets: "
                "leave them out"
            )
        return part.labels


class ClassLosses(BatchLosses):
    """With classes also of criteria that are not torch's, and ``arguments`` of the last call."""

    def __init__(self, model: nn.Module, criterion: nn.Module, forward: Forward | None) -> None:
        super().__init__(model, criterion, self._kept)
        self._arguments_of = forward or inputs_and_target
        self.arguments: tuple[Any, ...] = ()

    def _kept(self, model: nn.Module, batch: Any) -> tuple[Any, ...]:
        self.arguments = self._arguments_of(model, batch)
        return self.arguments

    def __call__(self, batch: Any) -> PerSampleLosses:
        part = super().__call__(batch)
        if part.labels is not None or type(self.criterion).__module__.startswith("torch.nn."):
            return part
        target = self.arguments[1] if len(self.arguments) > 1 else None
        if not isinstance(target, Tensor) or target.numel() != len(part.losses):
            return part
        classes = target.flatten().long()
        return part._replace(labels=classes) if torch.equal(classes, target.flatten()) else part


def _from_arrays(
    name: str, data: tuple[Any, ...], model: nn.Module, criterion: nn.Module
) -> TensorDataset:
    if len(data) != 2:
        raise ValueError(f"{name} is a tuple of {len(data)}: expected (X, y) or a data set")
    x = _inputs(name, data[0], model)
    y = as_array(data[1])
    y = as_classes(f"{name} y", y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y)
    if y.dtype.kind in "US":
        raise ValueError(
            f"{name} y has names, as {y[0]!r}: expected numbers, as by "
            "sklearn.preprocessing.LabelEncoder"
        )
    both: dict[str, Sized] = {f"{name} X": x, f"{name} y": y}
    check_lengths(**both)
    target = torch.from_numpy(y.astype(np.int64))
    if isinstance(criterion, nn.BCELoss | nn.BCEWithLogitsLoss | nn.SoftMarginLoss):
        with eval_mode(model), torch.no_grad():
            output = model(x[:2].to(next(model.parameters()).device))
        target = target.to(x.dtype).reshape(-1, *[1] * (output.ndim - 1))
    return TensorDataset(x, target)


def _inputs(name: str, values: Any, model: nn.Module) -> Tensor:
    if hasattr(values, "toarray"):
        raise TypeError(f"{name} X is sparse: expected a dense array, X.toarray()")
    array = as_array(values)
    if array.dtype == object:  # pandas, of columns of several kinds
        try:
            array = array.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{name} X has entries that are no numbers ({error}): encode categories, as by "
                "sklearn.preprocessing.OneHotEncoder"
            ) from error
    check_numbers(f"{name} X", array)
    if isinstance(values, Tensor):
        x = values
    else:  # pandas may hand out what nobody may write to, which torch does not share
        x = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    codes = any(isinstance(m, nn.Embedding | nn.EmbeddingBag) for m in model.modules())
    if codes and not x.is_floating_point():
        return x.long()
    parameter = next(model.parameters(), None)
    return x.to(torch.get_default_dtype() if parameter is None else parameter.dtype)


def logits_of(outputs: Tensor, criterion: nn.Module) -> Tensor:
    """Outputs (N,), (N, 1) or (N, C) as logits (N, C), C >= 2."""
    if outputs.ndim == 2 and outputs.shape[1] > 1:
        return outputs.float()
    if outputs.ndim not in (1, 2) or outputs.numel() != len(outputs):
        raise ValueError(
            f"the model's outputs have shape {tuple(outputs.shape)}: expected (N, classes), or "
            "(N,) for two"
        )
    one = outputs.float().flatten()
    if isinstance(criterion, nn.BCELoss):
        one = one.clamp(1e-7, 1 - 1e-7).logit()
    return torch.stack([torch.zeros_like(one), one], 1)


def group_names(groups: Any, people: Sized) -> Numbers:
    """(N,): all columns' values, numbers with the column's name."""
    columns = as_columns(groups)
    for name, column in columns.items():
        check_lengths(**{"validation": people, f"groups[{name!r}]": column})
    texts = [
        [str(v) if column.dtype.kind in "US" else f"{name} {v}" for v in column]
        for name, column in columns.items()
    ]
    return np.array([", ".join(values) for values in zip(*texts, strict=True)])


def cluster_numbers(inputs: Any, clusters: Any, n_clusters: int, people: Sized) -> Numbers:
    """(N,): as given, or by k-means."""
    if clusters is not None:
        numbers = as_vector("clusters", clusters, "cluster")
        check_lengths(validation=people, clusters=numbers)
        return intersect({"cluster": numbers})[1]
    try:
        rows = as_rows(as_array(inputs))
    except (TypeError, ValueError) as error:
        raise _cannot_be_clustered(error) from error
    return kmeans(rows, min(n_clusters, len(rows)), 0)


def _cannot_be_clustered(why: object) -> ValueError:
    return ValueError(
        f"validation inputs cannot be clustered ({why}): give clusters=, (N,) numbers of any "
        "clustering of the people"
    )
