"""Which parameters' gradients make the scores (the paper's "key layers"); the update covers all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from torch import Tensor, nn

ScoreParameters: TypeAlias = str | Sequence[str] | Callable[[str, Tensor], bool] | None
"""``"last"``, names or prefixes of names, a predicate on (name, parameter), or None for all."""


def select_parameters(model: nn.Module, chosen: ScoreParameters) -> set[Tensor]:
    """The parameters that ``chosen`` means.

    Args:
        model: whose named parameters to choose from; a tied one by any of its names.
        chosen: ``"last"`` for the last layer with trainable parameters; a sequence of parameter
            or module names; a predicate ``(name, parameter) -> bool``; None for all.

    Raises:
        ValueError: nothing trainable is chosen, or a name is not the model's.
        TypeError: anything else.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> sorted(p.numel() for p in select_parameters(model, "last"))
    [1, 3]
    """
    # A tied parameter has several names, and may be chosen by any of them.
    named = dict(model.named_parameters(remove_duplicate=False))
    trainable = {name: p for name, p in named.items() if p.requires_grad}
    if chosen is None:
        selected: set[Tensor] = set(trainable.values())
    elif chosen == "last":
        owners = [name.rpartition(".")[0] for name in trainable]
        selected = {p for name, p in trainable.items() if name.rpartition(".")[0] == owners[-1]}
    elif callable(chosen):
        selected = {p for name, p in trainable.items() if chosen(name, p)}
    elif isinstance(chosen, Sequence) and not isinstance(chosen, str):
        names, meant = list(named), set[str]()
        for wanted in chosen:
            found = {name for name in names if name == wanted or name.startswith(f"{wanted}.")}
            if not found:
                raise ValueError(
                    f"score_parameters names {wanted!r}, which the model does not have; it has "
                    f"{', '.join(names[:6])}{', ...' if len(names) > 6 else ''}"
                )
            meant |= found
        selected = {p for name, p in trainable.items() if name in meant}
    else:
        raise TypeError(
            f"score_parameters={chosen!r}: expected None, 'last', a list of parameter or module "
            "names, or a predicate on (name, parameter)"
        )
    if not selected:
        raise ValueError(
            f"score_parameters={chosen!r} chooses no trainable parameter: there would be no scores"
        )
    return selected
