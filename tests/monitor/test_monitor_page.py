"""What the page on diagnostics says must be so."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from monitored_runs import majority_and_minority, mlp, train
from torch import nn

from irw_optim import DBSCANFilter, IRWMonitor
from irw_optim.monitor import signatures

PAGE = (Path(__file__).parents[2] / "docs/diagnostics.md").read_text(encoding="utf-8")


def test_the_script_runs_before_and_after_the_diff(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    match = re.search(r"```diff\n(.*?)```", PAGE, re.DOTALL)
    assert match
    trained = []
    for sign in "-+":
        lines = [line[2:] for line in match[1].splitlines() if line[:1] in (" ", sign, "")]
        x, y, _ = majority_and_minority(100)
        model = mlp()
        loader = list(zip(x.split(20), y.split(20), strict=True))
        names = {"torch": torch, "model": model, "criterion": nn.CrossEntropyLoss()}
        exec("\n".join(lines), {**names, "loader": loader, "path": tmp_path / "training.svg"})
        trained.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *trained)), "the monitor changes nothing"
    assert (tmp_path / "training.svg").stat().st_size > 0


def test_the_table_has_every_finding_and_no_other() -> None:
    table = PAGE[PAGE.index("## The findings") :]
    named = {name for row in re.findall(r"^\| (`.*?) \|", table, re.M) for name in row.split("`")}
    source = inspect.getsource(signatures)
    expected = set(re.findall(r'Finding\(\s*f?"(\w+)"', source))
    expected |= {f"filter_removes_one_{kind}" for kind in ("class", "group")}
    assert named - {"", ", "} == expected


def test_the_table_has_every_column() -> None:
    monitor: IRWMonitor = train(
        epochs=1, outliers=DBSCANFilter(), scheme={"refresh": 5, "unit": "steps"}
    )
    table = PAGE[PAGE.index("## The columns") : PAGE.index("## The findings")]
    named = set(re.findall(r"`([\w/]+)", table))
    columns = {name for name in monitor.rows()[0] if "group" not in name}
    assert {name for name in columns if "/" not in name} <= named
    assert {name.split("/")[0] for name in columns if "/" in name} <= {
        name.split("/")[0] for name in named
    }
