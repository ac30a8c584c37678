"""`make gpu`: its logic, where there is no card."""

from __future__ import annotations

import time
import warnings
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.__main__ import OURS, ZOO, Row, rows

CPU = torch.device("cpu")


def test_without_a_card_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu.main([])


def test_a_look_at_one_row(capsys, monkeypatch):
    kept = []
    monkeypatch.setattr(gpu.report, "store", lambda *what, **more: kept.append(what))
    gpu.main(["--device", "cpu", "--fast"])
    shown = capsys.readouterr().out
    assert "MLP 100-64-32-2, B = 64" in shown
    assert "does not run" not in shown
    assert not kept


def test_what_cannot_run_is_a_row_and_the_time_limit_holds(capsys):
    def fail():
        raise ValueError("not on this card")

    row = Row("net", "eager", {"plain": lambda: lambda: None, OURS: fail})
    found = list(gpu.measured_until(time.monotonic() + 60, [row], CPU, 1))
    assert [entry.get("fails") for entry in found] == ["ValueError: not on this card", None]
    assert not list(gpu.measured_until(time.monotonic() - 1, [row], CPU, 1))
    assert "the time is up before net, eager" in capsys.readouterr().out
    text = gpu.as_markdown(gpu.pd.DataFrame(found, columns=gpu.COLUMNS))
    assert "- does not run: ours, ghost: net: ValueError: not on this card" in text


def test_every_setting_has_a_plain_step_to_compare_with():
    everything = list(rows(CPU))
    assert {row.setting for row in everything} == {"eager", "autocast", "compiled"}
    assert all(next(iter(row.makers)) == "plain" and OURS in row.makers for row in everything)
    assert {row.work for row in everything} > set(ZOO)


def test_autocast_and_the_zoo_take_a_step():
    found = {(row.work, row.setting): row for row in rows(CPU)}
    for key in (("MLP 100-64-32-2, B = 64", "autocast"), ("LSTM", "eager")):
        for make in found[key].makers.values():
            make()()


def test_waits_and_kernels_are_counted():
    def waits_twice():
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation (Triggered ...)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    assert gpu.warned(waits_twice) == 2
    cuda, host = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    names = [("gemm", cuda), ("Memcpy HtoD", cuda), ("aten::mm", host), ("relu", cuda)]
    events = [SimpleNamespace(name=name, device_type=where) for name, where in names]
    assert gpu.on_device(events) == 2
    assert gpu.syncs(waits_twice, CPU) is None
    assert gpu.kernels(waits_twice, CPU) is None
