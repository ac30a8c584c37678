"""Which parameters' gradients make the scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from torch import Tensor, nn

ScoreParameters: TypeAlias = str | Sequence[str] | Callable[[str, Tensor], bool] | None


def select_parameters(model: nn.Module, chosen: ScoreParameters) -> set[Tensor]:
    """The parameters whose gradients make the scores (the paper's "key layers").

    A tied one goes by any of its names; ``"last"`` means the last layer that has trainable ones,
    None all of them.

    Raises:
        ValueError: nothing trainable is chosen, or a name is not the model's.
        TypeError: anything else.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> sorted(p.numel() for p in select_parameters(model, "last"))
    [1, 3]
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    trainable = {name: p for name, p in named.items() if p.requires_grad}
    selected: set[Tensor]
    if chosen is None:
        selected = set(trainable.values())
    elif chosen == "last":
        owners = [name.rpartition(".")[0] for name in trainable]
        selected = {p for name, p in trainable.items() if name.rpartition(".")[0] == owners[-1]}
    elif callable(chosen):
        selected = {p for name, p in trainable.items() if chosen(name, p)}
    elif isinstance(chosen, Sequence) and not isinstance(chosen, str):
        selected = set()
        for wanted in chosen:
            found = [name for name in named if name == wanted or name.startswith(f"{wanted}.")]
            if not found:
                raise ValueError(
                    f"score_parameters names {wanted!r}, which the model does not have; it has "
                    f"{', '.join([*named][:6])}{', ...' if len(named) > 6 else ''}"
                )
            selected.update(trainable[name] for name in found if name in trainable)
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
