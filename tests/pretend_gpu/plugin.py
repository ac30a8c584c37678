"""Pytest plugin: another device is the default one, and nothing of ours mixes it with the host.

``TEST_DEVICE`` names it; without, it is the pretended one.

Tests that are about the CPU itself carry the mark ``cpu``, with a reason, and are skipped, as are
those that use what the device lacks, and those that start workers: a fork leaves a device's thread
behind, and who waits for it waits for ever.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from multiprocessing import Process
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretend_gpu import NAME, register

DEVICE = os.environ.get("TEST_DEVICE", NAME)
if DEVICE == NAME:
    register()
torch.set_default_device(DEVICE)
torch.backends.cudnn.allow_tf32 = False  # a card's float32 is compared with a loop's


def pytest_configure(config: pytest.Config) -> None:
    """What torch says of operations that the CPU does for a device."""
    for text in ("An output with one or more elements was resized", ".*appears to be a view"):
        config.addinivalue_line("filterwarnings", f"ignore:{text}:UserWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is about the CPU."""
    for item in items:
        mark = item.get_closest_marker("cpu")
        if mark is not None:
            item.add_marker(pytest.mark.skip(reason=mark.args[0]))


LACKS = {
    "Sparsepretend": "sparse tensors",
    "SparseCsrpretend": "sparse tensors",
    "should be a 1D CPU int64 tensor": "lengths in the host's memory",
}
"""What operations say that nobody has written for it, or that want the host."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Skip what needs more than the device has."""
    try:
        yield
    except Exception as error:  # a test may have met it in a check of its own
        for sign, what in LACKS.items():
            if sign in str(error):
                pytest.skip(f"the pretended device has no {what}")
        raise


@pytest.fixture(autouse=True)
def _no_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(process: Process) -> None:
        pytest.skip("its workers are forked, and a device's thread is not")

    monkeypatch.setattr(Process, "start", refuse)


class Mixes(TorchDispatchMode):
    """Collects operations that the library calls with tensors, or a generator, of both devices.

    Numbers (0-dim) may be on either, and indices are copied by torch itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = function._schema.name.removeprefix("aten::")
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        kinds = {t.device.type for t in tensors if t.ndim or t.device.type != "cpu"}
        copies = name in ("copy_", "_copy_from", "_to_copy") or "index" in name
        copies |= name == "_pack_padded_sequence"  # its lengths are the host's
        if {"cpu", DEVICE} <= kinds and not copies and (where := _line_of_ours()):
            self.found.append(f"{name} at {where}")
        result = function(*args, **kwargs)
        generator = kwargs.get("generator")
        astray = isinstance(result, Tensor) and generator is not None
        if astray and generator.device.type != result.device.type and (where := _line_below()):
            self.found.append(f"{name} with a generator of another device at {where}")
        return result


BETWEEN = ("torch/utils/_device.py", "torch/_compile.py", "torch/_dynamo/eval_frame.py")
"""Torch's own frames between a call and its dispatch."""


def _line_below() -> str:
    """The line that called the operation, if it is ours: torch's own samplers go astray, too."""
    frame: Any = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.endswith(BETWEEN):
        frame = frame.f_back
    path = "" if frame is None else frame.f_code.co_filename
    return f"{path}:{frame.f_lineno}" if "/irw_optim/" in path else ""


def _line_of_ours() -> str:
    """The innermost line of ours that led to the operation."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if "/irw_optim/" in path:
            return f"{path}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


@pytest.fixture(autouse=True)
def _no_mixed_devices() -> Iterator[None]:
    with Mixes() as mixes:
        yield
    assert not mixes.found
