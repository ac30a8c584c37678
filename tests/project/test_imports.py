"""What `import irw_optim` costs: torch, and nothing else that is large."""

from __future__ import annotations

import subprocess
import sys

# Run-time dependencies that only some functions need, the extras, and what is slow in torch itself.
FOR_LATER = {
    *("opacus", "scipy", "sklearn"),
    *("fairlearn", "jinja2", "matplotlib", "pandas", "tqdm"),
    *("accelerate", "lightning", "peft", "skorch", "tensorboard", "transformers"),
    *("torch._dynamo", "torch._inductor", "torch.distributed.fsdp", "torch.distributed.tensor"),
}


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return set(done.stdout.split())


def test_the_package_loads_torch_and_little_else() -> None:
    loaded = loaded_by("import irw_optim")
    assert "irw_optim" in loaded
    assert not FOR_LATER & loaded - loaded_by("import torch")


def test_no_other_package_comes_with_it() -> None:
    more = loaded_by("import irw_optim") - loaded_by("import torch")
    assert {name.partition(".")[0] for name in more} - sys.stdlib_module_names == {"irw_optim"}


def test_its_parts_that_need_no_opacus_load_none() -> None:
    loaded = loaded_by("import irw_optim.alpha, irw_optim.metrics, irw_optim.schemes")
    assert not {"opacus", "sklearn", "matplotlib", "pandas"} & loaded
