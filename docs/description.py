"""What the wheel says of itself: the first part of README.md.

Its pictures and sections are beside and below it, and what follows is for a checkout: an index of
packages has none of these.
"""

import re
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

ENDS_AT = "\nTwo commands, on a machine with"


class Description(MetadataHookInterface):
    def update(self, metadata: dict[str, Any]) -> None:
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        beginning, end, _ = text.partition(ENDS_AT)
        assert end, f"README.md has no {ENDS_AT!r}"
        beginning = re.sub(r"<img.*?>\s*|\s\[[^]]*\]\(#.*?\)\.?", "", beginning, flags=re.DOTALL)
        metadata["readme"] = {"content-type": "text/markdown", "text": beginning}


class Packed(BuildHookInterface):
    """Has the wheel compressed as far as zlib can."""

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if version != "standard":
            return
        with ZipFile(artifact_path) as wheel:
            files = [(info, wheel.read(info)) for info in wheel.infolist()]
        with ZipFile(artifact_path, "w") as wheel:
            for info, content in files:
                wheel.writestr(info, content, ZIP_DEFLATED, compresslevel=9)
