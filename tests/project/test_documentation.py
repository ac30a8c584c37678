"""What README and docs say must be so. Their other examples run with `make docs`."""

import pkgutil
import pydoc
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import irw_optim
import irw_optim.alpha
import irw_optim.metrics
import irw_optim.monitor
import irw_optim.privacy
import irw_optim.remedies
import irw_optim.schemes
import irw_optim.sklearn

ROOT = Path(__file__).parents[2]
PACKAGES = [
    irw_optim,
    irw_optim.metrics,
    irw_optim.privacy,
    irw_optim.remedies,
    irw_optim.schemes,
    irw_optim.sklearn,
]
# Rooms of the house: what a user needs of them is in `irw_optim`, and what who extends them needs
# is in CONTRIBUTING.md.
ROOMS = {
    "arguments",
    "attachments",
    "backward",
    "criterion",
    "distributed",
    "gradients",
    "model_check",
    "notebook",
    "optimizer",
    "restored",
    "torch_internals",
    "weighting",
}
PAGES_WITH_THE_DIFF = ["README.md", "docs/index.md"]


def the_diff(page: str) -> list[str]:
    match = re.search(r"```diff\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert match, f"{page} no longer shows the change as a diff"
    return match[1].splitlines()


@pytest.mark.parametrize("page", PAGES_WITH_THE_DIFF)
@pytest.mark.parametrize(("sign", "wrapped"), [("-", False), ("+", True)])
def test_the_script_runs_before_and_after_the_diff(page: str, sign: str, wrapped: bool) -> None:
    kept = [line[2:] for line in the_diff(page) if line[:1] in (" ", sign, "")]
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    names = {
        "torch": torch,
        "model": model,
        "criterion": nn.CrossEntropyLoss(),
        "loader": [(torch.randn(8, 3), torch.randint(0, 2, (8,)))],
    }
    exec("\n".join(kept), names)
    assert isinstance(names["optimizer"], irw_optim.IRWOptimizer) == wrapped
    assert not torch.equal(model.weight, before)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_on_the_api_page(package: ModuleType) -> None:
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    directive = rf"^\.\. auto\w+:: {re.escape(package.__name__)}\.(\w+)$"
    assert set(re.findall(directive, page, re.MULTILINE)) == set(package.__all__)


def on_the_api_page() -> set[object]:
    """The objects behind the directives of the page."""
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    names = re.findall(r"^\.\. auto\w+:: ([\w.]+)$", page, re.MULTILINE)
    return {pydoc.locate(name) for name in names}


def test_names_of_modules_are_on_the_api_page_too() -> None:
    module = irw_optim.alpha
    own = [
        value
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    documented = on_the_api_page()
    assert None not in documented
    assert set(own) <= documented
    assert {getattr(irw_optim.monitor, name) for name in irw_optim.monitor.__all__} <= documented


def test_no_module_is_forgotten() -> None:
    found = {module.name for module in pkgutil.iter_modules(irw_optim.__path__)}
    public = {package.__name__.rpartition(".")[2] for package in PACKAGES} - {"irw_optim"}
    assert found == ROOMS | public | {"alpha", "monitor"}


def test_the_changelog_names_the_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = [line for line in changelog.splitlines() if line.startswith("## ")]
    released = [line for line in headings if line != "## [Unreleased]"]
    assert irw_optim.__version__ in released[0]
    assert headings.index(released[0]) <= 1
