"""Run first_steps.ipynb, and keep what its cells show now.

    python examples/notebook.py    # half a minute on one core; needs the extras "dev" and "report"

The documentation shows the notebook as it is kept, so run this when what it shows has changed, on a
machine that does nothing else: one cell measures time.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

NOTEBOOK = Path(__file__).with_name("first_steps.ipynb")


def read() -> NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def run(notebook: NotebookNode) -> None:
    """Fill in the outputs of every cell.

    Raises:
        CellExecutionError: a cell raised.
    """
    folder = {"metadata": {"path": str(NOTEBOOK.parent)}}
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources=folder, record_timing=False
    )
    client.execute()


def tidy(notebook: NotebookNode) -> None:
    """What is the same for every machine, and small."""
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        # torch's profiler talks on stderr; a progress bar that is gone leaves an empty output
        cell.outputs = [
            output
            for output in cell.outputs
            if output.get("name") != "stderr" and output.get("data", {}).get("text/html") != ""
        ]
        for output in cell.outputs:
            data = output.get("data", {})
            if len(data) > 1:  # the text stands in for what every reader can show
                data.pop("text/plain", None)
            if "image/png" in data:
                data["image/png"] = smaller(data["image/png"])


def smaller(png: str) -> str:
    """The picture in 128 colours; in base64, as it was."""
    file = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(png)))
    picture.convert("RGB").quantize(128).save(file, format="png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    notebook = read()
    run(notebook)
    tidy(notebook)
    nbformat.write(notebook, NOTEBOOK)
