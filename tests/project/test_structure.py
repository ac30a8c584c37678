"""The house: which room stands on which, and how short the way of a plain step is."""

from __future__ import annotations

import ast
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import irw_optim
from irw_optim import IRWOptimizer

HOME = Path(irw_optim.__file__).parent
RARE = ("distributed", "privacy", "schemes", "monitor", "remedies", "sklearn")


def rooms_used_by(room: str) -> set[str]:
    """The rooms that a room imports, at whatever place in its files."""
    files = [HOME / f"{room}.py"] if (HOME / f"{room}.py").exists() else (HOME / room).rglob("*.py")
    used: set[str] = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("irw_optim."):
                used.add(node.module.split(".")[1])
    return used - {room}


ROOMS = sorted(
    path.stem for path in HOME.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
)


def test_no_room_stands_on_itself():
    reached = {room: rooms_used_by(room) for room in ROOMS}
    for _ in ROOMS:
        reached = {r: used.union(*(reached[u] for u in used)) for r, used in reached.items()}
    assert [room for room, used in reached.items() if room in used] == []


@pytest.mark.parametrize("room", ["criterion", "gradients", "weighting", "backward"])
def test_what_everybody_stands_on_knows_no_optimizer(room):
    assert rooms_used_by(room).isdisjoint({"optimizer", *RARE})


def test_the_way_of_a_plain_step():
    """No check is due in it, and one process trains the model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    criterion = nn.CrossEntropyLoss()
    sgd = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer = IRWOptimizer(sgd, alpha=0.2, model=model, criterion=criterion)
    x, y = torch.randn(16, 10), torch.randint(2, (16,))
    met: list[tuple[str, str]] = []

    def note(frame, event, argument):
        code = frame.f_code
        if event == "call" and Path(code.co_filename).is_relative_to(HOME):
            met.append((code.co_filename, f"{code.co_firstlineno} {code.co_name}"))

    def step():
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()

    for _ in range(20):
        step()
    sys.setprofile(note)
    threading.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    files = {Path(file).relative_to(HOME) for file, _ in met}
    assert not [file for file in files if file.parts[0] in RARE]
    assert 20 < len(met) <= 65
    assert len(set(met)) <= 53
    assert len(files) <= 12


def test_what_a_plain_training_loads():
    """The other rooms are loaded when they are used."""
    script = (
        "import sys, torch; from irw_optim import IRWOptimizer; model = torch.nn.Linear(2, 2);"
        "criterion = torch.nn.CrossEntropyLoss();"
        "o = IRWOptimizer(torch.optim.SGD(model.parameters(), lr=.1), alpha=.2, model=model,"
        " criterion=criterion);"
        "criterion(model(torch.randn(4, 2)), torch.tensor([0, 1, 0, 1])).backward(); o.step();"
        "print([n.split('.')[1] for n in sys.modules if n.startswith('irw_optim.')])"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert set(ast.literal_eval(told.stdout.decode())).isdisjoint(RARE)
