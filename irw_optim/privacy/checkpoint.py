"""The public state of DP-IRW as a part of a state_dict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from .config import IRWDPConfig
from .mechanism import PublicState

__all__ = ["dump", "restore"]


def dump(state: PublicState, config: IRWDPConfig, parameters: Sequence[Tensor]) -> dict[str, Any]:
    """Plain numbers and tensors, the direction in the order of `parameters`.

    The noise generator's state is left out on purpose: it would give the noise away.

    Example:
        >>> config = IRWDPConfig(init_threshold=0.7)
        >>> saved = dump(PublicState(threshold=0.6, scale=0.1, steps=3), config, [])
        >>> restore(saved, config, [])
        PublicState(threshold=0.6, scale=0.1, direction={}, steps=3)
    """
    return {
        "config": asdict(config),
        "threshold": state.threshold,
        "scale": state.scale,
        "steps": state.steps,
        "direction": [state.direction.get(p) for p in parameters],
    }


def restore(saved: Any, config: IRWDPConfig, parameters: Sequence[Tensor]) -> PublicState:
    """The state that `dump` saved.

    Raises:
        ValueError: nothing saved, or saved under other DP-IRW parameters or for another model.
    """
    if saved is None:
        raise ValueError(
            "state_dict has no 'irw_dp' entry: it was not saved by an IRWDPOptimizer, so threshold "
            "and direction are missing"
        )
    differing = [
        f"{name}={value!r} here, {saved['config'].get(name)!r} saved"
        for name, value in asdict(config).items()
        if saved["config"].get(name) != value
    ]
    if differing:
        raise ValueError(
            f"state_dict was saved with other DP-IRW parameters ({'; '.join(differing)}): expected "
            "the same IRWDPConfig"
        )
    directions = saved["direction"]
    shapes = [None if v is None else v.shape for v in directions]
    wanted = [p.shape for p in parameters]
    fits = len(shapes) == len(wanted) and all(
        shape in (None, like) for shape, like in zip(shapes, wanted, strict=True)
    )
    if not fits:
        raise ValueError(
            f"state_dict's direction has tensors of shapes {shapes} but the parameters have "
            f"{wanted}: expected the same model"
        )
    return PublicState(
        threshold=saved["threshold"],
        scale=saved["scale"],
        steps=saved["steps"],
        direction={
            p: v.to(device=p.device, copy=True)
            for p, v in zip(parameters, directions, strict=True)
            if v is not None
        },
    )
