"""What keeps a notebook out of a commit; each fault is put into a copy and found."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
from PIL import Image, PngImagePlugin

from utils import hygiene
from utils.config import ROOT

SIX = sorted(hygiene.NOTEBOOKS.glob("*.ipynb"))
NAME = "02_fine_tune_on_first_aid.ipynb"
TOKEN = "hf_" + "aB3" * 11


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A notebook that may be spoilt, in a project of its own with the same README."""
    monkeypatch.setattr(hygiene, "ROOT", tmp_path)
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    shutil.copyfile(ROOT / "README.md", tmp_path / "README.md")
    shutil.copytree(ROOT / "imgs", tmp_path / "imgs")
    return tmp_path / "notebooks" / NAME


def spoil(path, change):
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    return hygiene.check_notebook(path)


def code_cell(content, with_outputs=False):
    return next(
        cell
        for cell in content["cells"][2:]
        if cell["cell_type"] == "code" and (cell["outputs"] or not with_outputs)
    )


def put(content, **output):
    code_cell(content, with_outputs=True)["outputs"].append(output)


def say(content, text):
    content["cells"].append(
        {"cell_type": "markdown", "id": "said", "metadata": {}, "source": text}
    )


def shown(content, kind, text):
    put(content, output_type="display_data", metadata={}, data={kind: text})


def put_picture(content):
    """A figure into which a token was noted, as matplotlib notes its software."""
    note, file = PngImagePlugin.PngInfo(), io.BytesIO()
    note.add_text("Comment", TOKEN)
    Image.new("L", (1, 1)).save(file, "png", pnginfo=note)
    shown(content, "image/png", base64.b64encode(file.getvalue()).decode())


FAULTS = {
    "the title is": lambda c: c["cells"][0].update(source="# Fine-tune"),
    "goes the badge": lambda c: c["cells"][0].update(source="# 02 · Fine-tune\n\nx"),
    "leads to notebooks/03_x.ipynb": lambda c: say(c, "blob/main/notebooks/03_x.ipynb"),
    "a second title": lambda c: say(c, "# Another"),
    "no set-up cell": lambda c: c["cells"][1].update(source="import sys"),
    "lines of code": lambda c: c["cells"][1].update(
        source="".join(c["cells"][1]["source"]) + "\nx = 1"
    ),
    "not executed once": lambda c: code_cell(c).update(execution_count=99),
    "no outputs": lambda c: [
        cell.update(outputs=[]) for cell in c["cells"] if cell["cell_type"] == "code"
    ],
    "metadata": lambda c: c["metadata"].update(widgets={}),
    "not called python3": lambda c: c["metadata"]["kernelspec"].update(name="mine"),
    "times of execution": lambda c: code_cell(c)["metadata"].update(execution={}),
    "ZeroDivisionError was saved": lambda c: put(
        c, output_type="error", ename="ZeroDivisionError", evalue="", traceback=[]
    ),
    "stderr": lambda c: put(c, output_type="stream", name="stderr", text="warning"),
    "widget or progress bar": lambda c: put(
        c, output_type="stream", name="stdout", text=" 45%|████ | 9/20"
    ),
    "local server": lambda c: shown(c, "text/html", "<iframe src=http://127.0.0.1:1>"),
    "a line of 89 columns": lambda c: say(c, "x " * 44 + "x"),
    "leads nowhere": lambda c: say(c, "see [this](../nowhere.md)"),
    "has no heading": lambda c: say(c, "see [this](../README.md#not-there)"),
    "is not https": lambda c: say(c, "see [this](http://example.org)"),
    "has the alt text": lambda c: say(c, "![](../README.md)"),
    "no alt text": lambda c: shown(c, "text/markdown", "<img src='x.png'>"),
    "what looks like a token": lambda c: put_picture(c),
    "looks like a token": lambda c: put(
        c, output_type="stream", name="stdout", text=f"token {TOKEN}"
    ),
    "folder of this machine": lambda c: put(
        c, output_type="stream", name="stdout", text="saved in /home/ann/x"
    ),
}


@pytest.mark.parametrize("path", SIX, ids=lambda path: path.name[:2])
def test_the_committed_notebooks_are_fit(path):
    assert hygiene.check_notebook(path) == []


def test_their_set_up_cells_are_the_same_and_their_records_clean():
    assert len(SIX) == 6
    assert hygiene.check_set_up_cells(SIX) == []
    assert hygiene.check_records() == []
    assert hygiene.check_readme() == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_named_with_its_file(copy, fault):
    assert hygiene.check_notebook(copy) == []
    (said, *_) = spoil(copy, FAULTS[fault])
    assert said.startswith(f"notebooks/{NAME}") or NAME in said
    assert fault in said


def test_a_file_that_is_no_notebook_is_named(copy):
    copy.write_text("{", encoding="utf-8")
    (said,) = hygiene.check_notebook(copy)
    assert "not a valid notebook" in said


def test_a_set_up_cell_of_its_own_is_found(copy):
    spoil(copy, lambda c: c["cells"][1].update(source="import sys  # mine"))
    (said,) = hygiene.check_set_up_cells(sorted(copy.parent.glob("*.ipynb")))
    assert NAME in said and "copy theirs" in said


def test_tables_and_addresses_may_be_wide(copy):
    wide = f"| {'x' * 100} |\n\nhttps://example.org/{'y' * 100}"
    assert spoil(copy, lambda c: say(c, wide)) == []


@pytest.mark.parametrize(
    "text",
    ["in /tmp", "'/home/ann/x'", "C:\\\\Users\\\\ann", "(/tmp/x)"],
)
def test_a_machine_path_would_be_seen(text):
    assert hygiene.MACHINE_PATH.search(text)


@pytest.mark.parametrize("text", ["https://x.org/home/y", "a/tmp/b", "data/runs", "/s"])
def test_an_address_is_no_machine_path(text):
    assert not hygiene.MACHINE_PATH.search(text)


@pytest.mark.parametrize(
    "where", ["README.md", "data/results/pocket/run.json", "imgs/tables/rouge.csv"]
)
def test_a_token_in_a_record_is_found(tmp_path, where):
    file = tmp_path / where
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'"token": "{TOKEN}"', encoding="utf-8")
    (said,) = hygiene.check_records(tmp_path)
    assert "looks like a token" in said


def test_a_path_in_a_figures_metadata_is_found(tmp_path):
    note = PngImagePlugin.PngInfo()
    note.add_text("Source", "/home/ann/figure.py")
    (tmp_path / "imgs").mkdir()
    Image.new("L", (1, 1)).save(tmp_path / "imgs" / "x.png", pnginfo=note)
    (said,) = hygiene.check_records(tmp_path)
    assert "a folder of this machine" in said


def test_a_link_of_the_readme_that_leads_nowhere_is_found(copy, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("# A\n[a](#a) [b](#b) [c](c.md) ![](imgs) [d](https://d.org)\n")
    found = hygiene.check_readme(tmp_path)
    assert [said.partition(": ")[2] for said in found] == [
        " has no heading #b",
        "the link to c.md leads nowhere in the project",
        "imgs has the alt text ''; say what it shows",
    ]


def test_an_address_may_end_a_wide_line_of_code(copy):
    wide = f'PLACE = "https://example.org/{"y" * 100}"'
    assert spoil(copy, lambda c: code_cell(c).update(source=wide)) == []
    (said,) = spoil(copy, lambda c: code_cell(c).update(source=f"{wide}.strip() + x"))
    assert "columns; 88 at most" in said


def run_hygiene(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "utils.hygiene", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_the_command_says_what_is_wrong_and_fails(tmp_path):
    path = tmp_path / NAME
    notebook = nbformat.read(SIX[1], as_version=4)
    notebook.cells[2].execution_count = 7
    nbformat.write(notebook, path)
    done = run_hygiene(str(path))
    assert done.returncode == 1 and "not executed once" in done.stderr
    done = run_hygiene(str(tmp_path / "away.ipynb"))
    assert done.returncode == 1 and re.search("away.ipynb cannot be read", done.stderr)


def test_the_hook_and_make_lint_call_it():
    assert "utils.hygiene" in (ROOT / ".pre-commit-config.yaml").read_text("utf-8")
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert "utils.hygiene" in makefile.split("\nlint:")[1].split("\n\n")[0]
