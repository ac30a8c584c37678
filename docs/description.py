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
    """Has the wheel compressed as far as its format goes: each of a hundred files is by itself."""

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if version != "standard":
            return
        with ZipFile(artifact_path) as wheel:
            files = [(info, wheel.read(info)) for info in wheel.infolist()]
        with ZipFile(artifact_path, "w", ZIP_DEFLATED) as wheel:
            for info, content in files:
                info.compress_type = ZIP_DEFLATED
                with wheel.open(info, "w") as file:
                    file._compressor = Deflated()
                    file.write(content)


class Deflated:
    """A compressor of `zipfile`, by zopfli: 3 % smaller, and read by everybody."""

    def __init__(self) -> None:
        self.content = b""

    def compress(self, part: bytes) -> bytes:
        self.content += part
        return b""

    def flush(self) -> bytes:
        from zopfli.zlib import compress

        return compress(self.content, numiterations=5)[2:-4]  # without zlib's frame
