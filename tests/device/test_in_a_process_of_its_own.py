"""The tests of this folder on the pretended device, which a process can't take back."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "pytest", "-q", "-p", "pretend_gpu.plugin"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(torch.get_default_device().type != "cpu", reason="is run by this one"),
]


def on_the_device(*command: str, **more: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, **more}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_on_the_pretended_device() -> None:
    finished = on_the_device(*COMMAND, str(TESTS / "device"))
    assert finished.returncode == 0, finished.stdout[-3000:]


def test_two_devices_are_refused_by_name() -> None:
    script = """
import torch, pretend_gpu
from torch import nn
from irw_optim import IRWOptimizer
pretend_gpu.register()
model = nn.Sequential(nn.Linear(2, 3).to("pretend:0"), nn.Linear(3, 2).to("pretend:1"))
sgd = torch.optim.SGD(model.parameters(), lr=0.1)
IRWOptimizer(sgd, alpha=0.3, model=model, criterion=nn.CrossEntropyLoss())
"""
    finished = on_the_device(sys.executable, "-c", script, PRETEND_DEVICES="2")
    assert "on several devices (pretend:0, pretend:1)" in finished.stderr
