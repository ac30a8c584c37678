"""What an installation has is enough: every other package that is installed here is hidden."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

requirements = pytest.importorskip("packaging.requirements")

ROOT = Path(__file__).parents[2]
PREAMBLE = """
import sys
sys.path.insert(0, {root!r})

class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *more):
        hidden = name.partition(".")[0] in {hidden!r}
        return None if hidden else self.finder.find_spec(name, *more)

sys.meta_path[:] = map(Without, sys.meta_path)
import torch
from torch import nn
torch.manual_seed(0)
x, y = torch.randn(120, 3), torch.arange(120) % 2
"""
A_STEP = """
from irw_optim import IRWMonitor, IRWOptimizer, verify
model, criterion = nn.Linear(3, 2), nn.CrossEntropyLoss()
optimizer = IRWOptimizer(
    torch.optim.SGD(model.parameters(), lr=0.1), alpha=0.3, model=model, criterion=criterion
)
monitor = IRWMonitor(optimizer)
criterion(model(x), y).backward()
optimizer.step()
assert monitor.rows()
assert verify(nn.Linear(3, 2), x, y, nn.CrossEntropyLoss()).exact
"""
A_COMPARISON = """
from irw_optim import compare_remedies
result = compare_remedies(
    lambda: nn.Linear(3, 2), nn.CrossEntropyLoss(), (x, y), (x, y), groups=y, seeds=2, epochs=1
)
assert "<svg" in result.to_html()
assert str(result)
assert len(result.by_group(y)) == 2
"""
AN_ESTIMATOR = """
from irw_optim.sklearn import IRWClassifier
assert IRWClassifier(alpha=0.3).fit(x.numpy(), y.numpy()).predict(x.numpy()).shape == (120,)
"""


def name_of(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def brought_by(distribution: str, extras: tuple[str, ...] = ()) -> set[str]:
    """The distributions that come with it, itself included."""
    found: set[str] = set()
    ahead = {(distribution, extra) for extra in ("", *extras)}
    seen = set()
    while ahead:
        name, extra = one = ahead.pop()
        seen.add(one)
        try:
            needed = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # for another system, or a newer Python
            continue
        found.add(name_of(name))
        for requirement in map(requirements.Requirement, needed):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                ahead |= {(requirement.name, e) for e in ("", *requirement.extras)} - seen
    return found


def hidden_from(*extras: str) -> list[str]:
    """The modules of everything that an installation with these extras does not bring."""
    there = brought_by("irw-optim", extras)
    return sorted(
        module
        for module, distributions in metadata.packages_distributions().items()
        if module not in sys.stdlib_module_names
        and module.isidentifier()
        and not there & set(map(name_of, distributions))
    )


def runs(code: str, *extras: str) -> str:
    """What Python says of it, with no other extras than these."""
    preamble = PREAMBLE.format(root=str(ROOT), hidden=hidden_from(*extras))
    command = [sys.executable, "-c", preamble + code]
    return subprocess.run(command, capture_output=True, text=True).stderr


def test_other_packages_are_hidden() -> None:
    assert "pytest" in hidden_from()
    assert "torch" not in hidden_from()
    assert "matplotlib" not in hidden_from("report")


@pytest.mark.slow
def test_training_needs_no_extra() -> None:
    assert "Traceback" not in runs(A_STEP)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extra", "code", "library"),
    [("report", A_COMPARISON, "fairlearn"), ("sklearn", AN_ESTIMATOR, "skorch")],
)
def test_an_extra_is_all_that_is_needed(extra: str, code: str, library: str) -> None:
    pytest.importorskip(library, reason=f"needs the extra {extra}")
    assert "Traceback" not in runs(code, extra)
    assert f"irw-optim[{extra}]" in runs(code)  # what to install, where it is not


def test_what_the_comparison_asks_for_is_what_the_extra_brings() -> None:
    source = (ROOT / "irw_optim/remedies/__init__.py").read_text(encoding="utf-8")
    asked = re.search(r"for needed in \((.*?)\):", source)
    definition = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extra = re.search(r"^report = \[\n(.*?)^\]", definition, re.MULTILINE | re.DOTALL)
    assert asked
    assert extra
    assert set(re.findall(r'"(\w+)"', asked[1])) == set(re.findall(r'"(\w+)>=', extra[1]))
