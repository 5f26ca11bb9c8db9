"""Walking notebooks: small ones, in real kernels."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from utils import walk
from utils.config import SAFETY_NOTICE


def write(path, *cells):
    """A notebook of markdown (`# …`) and code cells at `path`."""
    kinds = [
        new_markdown_cell(text) if text.startswith("# ") else new_code_cell(text)
        for text in cells
    ]
    nbformat.write(new_notebook(cells=kinds), path)
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder in the place of notebooks/, and a run folder of its own."""
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    monkeypatch.setattr(walk, "NOTEBOOKS", notebooks)
    monkeypatch.setenv("PROFILE", "pocket")
    monkeypatch.setenv("RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("HEADLESS", "1")
    return notebooks


def test_a_walk_prints_its_progress_and_keeps_executed_copies(folder, tmp_path, capsys):
    write(folder / "01_one.ipynb", "# One", "x = 6 * 7", "print(x)")
    write(folder / "02_two.ipynb", "from pathlib import Path\nPath('seen').touch()")
    write(folder / "notes.ipynb", "1 / 0")  # none of the walk
    walk.main([])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("profile pocket, base data/pocket_llama, run folder")
    assert lines[1].split()[:2] == ["01_one.ipynb", "…"]
    assert lines[1].split()[2:4] == ["2", "cells"] and lines[1].endswith(" s")
    assert lines[2].split()[:4] == ["02_two.ipynb", "…", "1", "cells"]
    assert lines[3].startswith("2 notebooks in ")
    assert any(line.startswith("figures:") for line in lines)
    assert lines[-1] == SAFETY_NOTICE
    done = nbformat.read(tmp_path / "run" / "notebooks" / "01_one.ipynb", 4)
    assert done.cells[2].outputs[0].text == "42\n"
    assert [cell.get("execution_count") for cell in done.cells] == [None, 1, 2]
    assert (folder / "seen").is_file()  # a kernel starts beside its notebook
    original = nbformat.read(folder / "01_one.ipynb", 4)
    assert original.cells[2].outputs == []


def test_in_place_replaces_the_originals_and_only_picks(folder, tmp_path, capsys):
    write(folder / "01_one.ipynb", "1 / 0")
    write(folder / "02_two.ipynb", "print('done')")
    walk.main(["--in-place", "--only", "02"])
    done = nbformat.read(folder / "02_two.ipynb", 4)
    assert done.cells[0].outputs[0].text == "done\n"
    assert "01_one" not in capsys.readouterr().out
    assert not (tmp_path / "run" / "notebooks").exists()


def test_a_failing_cell_is_named_with_its_error(folder, tmp_path, capsys):
    write(folder / "01_good.ipynb", "print('kept')")
    bad = write(
        folder / "02_bad.ipynb", "# Two", "ok = 1", "# More", "1 / 0\nok", "ok = 2"
    )
    before = bad.read_bytes()
    write(folder / "03_never.ipynb", "print('never reached')")
    with pytest.raises(SystemExit) as caught:
        walk.main(["--in-place"])
    assert isinstance(caught.value.code, str)  # which Python turns into exit code 1
    assert (
        "02_bad.ipynb, cell 4 (1 / 0): ZeroDivisionError: division by zero"
        in caught.value.code
    )
    assert "What to do" in caught.value.code
    out = capsys.readouterr().out
    assert "failed" in out and "03_never" not in out
    assert bad.read_bytes() == before  # nothing half-done is saved
    kept = nbformat.read(folder / "01_good.ipynb", 4)
    assert kept.cells[0].outputs[0].text == "kept\n"


def test_a_cell_that_takes_too_long_is_named(tmp_path):
    """Also in a notebook that carries the counts of an earlier walk."""
    path = write(tmp_path / "01_slow.ipynb", "1", "import time; time.sleep(60)", "2")
    earlier = nbformat.read(path, 4)
    for count, cell in enumerate(earlier.cells, start=1):
        cell.execution_count = count
    nbformat.write(earlier, path)
    with pytest.raises(RuntimeError, match=r"01_slow.ipynb, cell 2 \(import time"):
        walk.execute(path, timeout=2)


def test_a_kernel_that_dies_is_said(tmp_path):
    path = write(tmp_path / "01_dead.ipynb", "1", "import os; os._exit(9)", "2")
    with pytest.raises(RuntimeError, match=r"cell 2 .*DeadKernelError.*kernel died"):
        walk.execute(path)


def test_only_that_matches_no_notebook_is_an_error(folder):
    write(folder / "01_one.ipynb", "1")
    with pytest.raises(SystemExit, match="07"):
        walk.main(["--only", "07"])


def test_wrong_settings_end_the_walk_before_it_begins(folder, monkeypatch):
    monkeypatch.setenv("PROFILE", "no_such")
    with pytest.raises(SystemExit, match="make run: PROFILE='no_such'.*PROFILE=pocket"):
        walk.main([])


def test_widgets_and_bars_leave_nothing_behind(tmp_path):
    path = write(
        tmp_path / "01_widgets.ipynb",
        "import sys, ipywidgets\nfrom IPython.display import display\n"
        "display(ipywidgets.IntSlider(description='slide'))\n"
        "print('a bar', file=sys.stderr)\nprint('kept')",
        "from tqdm.auto import tqdm\nfor _ in tqdm(range(3)): pass",
        "out = ipywidgets.Output()\nwith out: print('inside')\nout",
    )
    notebook = walk.execute(path)
    assert "widgets" not in notebook.metadata
    assert [output.text for output in notebook.cells[0].outputs] == ["kept\n"]
    assert notebook.cells[1].outputs == notebook.cells[2].outputs == []
    assert "widget" not in nbformat.writes(notebook).replace("01_widgets", "").replace(
        "ipywidgets", ""
    )
    nbformat.validate(notebook)


def test_clean_keeps_results_and_drops_machine_traces():
    cell = new_code_cell("x", execution_count=1)
    cell.metadata["execution"] = {"iopub.status.busy": "2026-11-24T02:00:00"}
    figure = new_output("display_data", data={"image/png": "aGk=", "text/plain": "fig"})
    both = {walk.WIDGET: {"model_id": "1"}, "text/plain": "FloatProgress(value=0.0)"}
    cell.outputs = [
        new_output("stream", name="stdout", text="printed"),
        new_output("stream", name="stderr", text="  0%|"),
        new_output("display_data", data=both),
        figure,
        new_output("execute_result", data={"text/plain": "42"}, execution_count=1),
    ]
    notebook = new_notebook(cells=[new_markdown_cell("# Title"), cell])
    notebook.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {}}
    notebook.metadata["kernelspec"] = {"name": "venv", "display_name": "mine"}
    cleaned = walk.clean(notebook)
    kinds = [output.output_type for output in cleaned.cells[1].outputs]
    assert kinds == ["stream", "display_data", "execute_result"]
    assert cleaned.cells[1].outputs[1] == figure
    assert "execution" not in cleaned.cells[1].metadata
    assert "widgets" not in cleaned.metadata
    assert cleaned.metadata.kernelspec.name == "python3"
