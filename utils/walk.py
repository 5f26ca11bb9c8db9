"""Walks the six notebooks from top to bottom: `make run` and `make notebooks`.

python -m utils.walk            executed copies go to the run's folder
python -m utils.walk --in-place they replace the notebooks, clean enough to commit
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

from utils import results
from utils.config import ROOT, SAFETY_NOTICE, display_path, load_settings

NOTEBOOKS = ROOT / "notebooks"
WIDGET = "application/vnd.jupyter.widget-view+json"


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Take out what only the running kernel can show: bars, widgets, their state.

    Saved results, tables, figures and printed text stay. GitHub refuses to render a
    notebook with widget metadata that has lost its state.
    """
    notebook.metadata.pop("widgets", None)
    notebook.metadata["kernelspec"] = {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    }
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        kept = []
        for output in cell.outputs:
            if output.output_type == "stream" and output.name == "stderr":
                continue  # progress bars and library chatter
            if WIDGET in output.get("data", {}):
                continue
            output.pop("transient", None)
            output.get("data", {}).pop(
                "application/vnd.jupyter.widget-state+json", None
            )
            kept.append(output)
        cell.outputs = kept
    return notebook


def execute(path: Path, *, timeout: int = 3600) -> nbformat.NotebookNode:
    """Execute a copy of the notebook at `path` and return it, cleaned.

    Raises:
        RuntimeError: a cell failed; the message names notebook, cell and error.
    """
    notebook = nbformat.read(path, as_version=4)
    begun = [0]

    def note(cell, cell_index):
        begun.append(cell_index)

    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        on_cell_execute=note,
        extra_arguments=["--log-level=ERROR"],
        store_widget_state=True,  # False crashes on Output widgets; `clean` strips it
    )
    try:
        client.execute()
    except CellExecutionError as error:
        raise RuntimeError(
            f"{path.name}, {_cell(notebook, begun[-1])}: {error.ename}: {error.evalue}"
        ) from error
    except (CellTimeoutError, DeadKernelError) as error:
        raise RuntimeError(
            f"{path.name}, {_cell(notebook, begun[-1])}: {type(error).__name__}, the "
            "kernel died or took too long. Check memory, or raise --timeout."
        ) from error
    return clean(notebook)


def _cell(notebook: nbformat.NotebookNode, index: int) -> str:
    """A cell by its number, counted from 1, and its first line."""
    first_line = notebook.cells[index].source.strip().partition("\n")[0]
    return f"cell {index + 1} ({first_line[:60]})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Walk the notebooks from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.walk", description="Execute the notebooks in order."
    )
    parser.add_argument(
        "--in-place", action="store_true", help="save over the originals"
    )
    parser.add_argument(
        "--only", nargs="+", default=[""], help="names that begin so: 04"
    )
    parser.add_argument(
        "--timeout", type=int, default=3600, help="seconds per cell (3600)"
    )
    options = parser.parse_args(arguments)
    os.environ.setdefault("HEADLESS", "1")  # notebook 06 closes its chat again
    try:
        settings = load_settings()
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"make run: {error}")
    base = results.describe_run(settings)["base_model"]
    print(
        f"profile {settings.profile}, base {base}, "
        f"run folder {display_path(settings.run_dir)}"
    )
    began = time.perf_counter()
    paths = [
        path
        for path in sorted(NOTEBOOKS.glob("0*.ipynb"))
        if any(path.name.startswith(name) for name in options.only)
    ]
    if not paths:
        sys.exit(f"make run: no notebook begins with {', '.join(options.only)}.")
    for path in paths:
        start = time.perf_counter()
        print(f"{path.name:36} …", end="", flush=True)
        try:
            notebook = execute(path, timeout=options.timeout)
        except RuntimeError as error:
            print(" failed")
            sys.exit(
                f"make run: {error}\nWhat to do: mend what the message names, then run "
                "`make run` again. The notebooks before this one are done and kept."
            )
        cells = sum(cell.cell_type == "code" for cell in notebook.cells)
        copy = settings.run_dir / "notebooks" / path.name
        target = path if options.in_place else copy
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, target)
        print(f" {cells:3} cells  {time.perf_counter() - start:6.1f} s", flush=True)
    print(f"{len(paths)} notebooks in {time.perf_counter() - began:.0f} s")
    print(f"figures:   {display_path(settings.figures_dir)}/")
    print(f"notebooks: {display_path(settings.run_dir / 'notebooks')}/")
    print(SAFETY_NOTICE)


if __name__ == "__main__":
    main()
