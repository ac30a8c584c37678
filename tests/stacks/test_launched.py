"""Two processes, started as the frameworks' users do, train like one on both their batches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import ALPHA, BATCH, make_data, make_model, sgd
from launched import EPOCHS
from torch import nn

from irw_optim import IRWOptimizer

pytestmark = pytest.mark.slow

SCRIPT = str(Path(__file__).with_name("launched.py"))
LAUNCHERS = {
    "accelerate": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "lightning": [],  # starts the second process itself
}


def one_process() -> nn.Module:
    model, criterion = make_model(), nn.CrossEntropyLoss()
    optimizer = IRWOptimizer(sgd(model), alpha=ALPHA, model=model, criterion=criterion)
    for _ in range(EPOCHS):
        for x, y in zip(*(part.split(2 * BATCH) for part in make_data()), strict=True):
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
    return model


@pytest.mark.parametrize("framework", LAUNCHERS)
def test_two_launched_processes_train_like_one(framework: str, tmp_path: Path) -> None:
    pytest.importorskip(framework)
    done = subprocess.run(
        [sys.executable, *LAUNCHERS[framework], SCRIPT, framework, str(tmp_path / "rank")],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"rank.{rank}") for rank in range(2)]
    expected = list(one_process().parameters())
    for rank in ranks:
        assert rank["ranks"] == 2
        assert rank["samples"] == 2 * BATCH
        torch.testing.assert_close(rank["parameters"], expected, rtol=1e-4, atol=1e-5)
        assert all(map(torch.equal, rank["parameters"], ranks[0]["parameters"]))
