"""How the six notebooks are built; `utils.hygiene` checks what holds for any."""

import re
from pathlib import Path

import nbformat
import pytest

from utils.config import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [
    "01_explore_the_data.ipynb",
    "02_fine_tune_on_first_aid.ipynb",
    "03_fine_tune_on_finetome.ipynb",
    "04_plot_loss_and_perplexity.ipynb",
    "05_compare_answers.ipynb",
    "06_chat_with_three_models.ipynb",
]
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name[:2])


def read(path: Path):
    return nbformat.read(path, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def markdown(notebook) -> list[str]:
    """What a reader sees as Markdown: cells, and sentences rendered from results."""
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    for cell in code(notebook):
        for output in cell.outputs:
            text = output.get("data", {}).get("text/markdown", "")
            texts.append(text if isinstance(text, str) else "".join(text))
    return texts


def test_there_are_these_six():
    assert [path.name for path in NOTEBOOKS] == NAMES


@each
def test_imports_stand_in_one_cell_after_the_set_up(path):
    for cell in code(read(path))[2:]:
        found = re.findall(r"^(?:import|from) .+$", cell.source, re.MULTILINE)
        assert not found, f"{found[0]!r} belongs into the cell with the imports"


@each
def test_neighbours_are_linked(path):
    first = read(path).cells[0].source
    number = NOTEBOOKS.index(path)
    for neighbour in (number - 1, number + 1):
        if 0 <= neighbour < len(NOTEBOOKS):
            assert f"({NAMES[neighbour]})" in first
    assert "(../README.md#" in first


@each
def test_what_we_learned_is_said_once(path):
    headings = [
        line
        for text in markdown(read(path))
        for line in text.splitlines()
        if line.startswith("#")
    ]
    assert headings.count("## What we learned") == 1


@each
def test_sections_are_numbered_in_order(path):
    text = "\n".join(markdown(read(path)))
    numbers = [int(n) for n in re.findall(r"^## (\d+)\. ", text, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1)) and numbers


@pytest.mark.parametrize("number", [0, 1, 4, 5])
def test_a_notebook_that_shows_first_aid_says_what_it_is_not(number):
    path = NOTEBOOKS[number]
    assert "Not medical advice" in "\n".join(markdown(read(path)))
