"""A device ``pretend`` that is none, for tests of device handling where there is no GPU.

Its memory is the host's, and every operation is done by the CPU; it tells what mixes devices, not
what is quick. `register` compiles it once (a C++ compiler and the headers of torch's wheel are all
that it takes) and makes it known to torch; ``PRETEND_DEVICES=2`` makes two of it.

    PYTHONPATH=tests pytest -p pretend_gpu.plugin tests/gradients    # as the default device
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils import cpp_extension

NAME = "pretend"
SOURCE = Path(__file__).with_name("device.cpp")


def register() -> None:
    """Make ``torch.device("pretend")`` usable in this process; again, it does nothing."""
    if hasattr(torch, NAME):
        return
    torch.ops.load_library(str(_built()))
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module())
    torch.utils.generate_methods_for_privateuse1_backend()


def _built() -> Path:
    """The compiled library, from this torch and this source."""
    mark = hashlib.sha256(f"{torch.__version__} {SOURCE.read_text()}".encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "irw_optim"
    library = folder / f"pretend_gpu_{mark}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        subprocess.run(_command(unfinished), check=True)
        unfinished.replace(library)  # at once, where several processes build it
    return library


def _command(output: Path) -> list[str]:
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    standard = "-std=c++20" if torch.__version__ >= (2, 9) else "-std=c++17"
    include = [f"-I{path}" for path in cpp_extension.include_paths()]
    link = [f"-L{path}" for path in cpp_extension.library_paths()]
    flags = ["-shared", "-fPIC", "-O1", "-w", standard, abi, *include]
    libraries = [*link, "-ltorch", "-ltorch_cpu", "-lc10"]
    return [os.environ.get("CXX", "c++"), str(SOURCE), *flags, *libraries, "-o", str(output)]


def _module() -> ModuleType:
    """What torch looks for at ``torch.pretend``; its random numbers are the CPU's."""
    module: Any = ModuleType(f"torch.{NAME}")
    module.is_available = module.is_initialized = lambda: True
    module.device_count = lambda: int(os.environ.get("PRETEND_DEVICES", "1"))
    module.current_device = lambda: 0
    module.device = lambda device=None: nullcontext()
    module.synchronize = module._lazy_init = lambda device=None: None
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.get_rng_state = lambda device=0: torch.get_rng_state()
    module.set_rng_state = lambda state, device=0: None
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    return module
