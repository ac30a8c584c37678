"""What README and docs say must be so. Their other examples run with `make docs`."""

import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import irw_optim
import irw_optim.metrics
import irw_optim.privacy
import irw_optim.schemes

ROOT = Path(__file__).parents[1]
PACKAGES = [irw_optim, irw_optim.metrics, irw_optim.privacy, irw_optim.schemes]
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


def test_the_changelog_names_the_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = next(line for line in changelog.splitlines() if line.startswith("## "))
    assert irw_optim.__version__ in newest
