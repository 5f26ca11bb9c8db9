"""The structure of the six notebooks as they are committed; nothing is executed."""

import json
import re
from pathlib import Path

import nbformat
import pytest

from utils.colab import REPOSITORY
from utils.config import ROOT
from utils.walk import WIDGET

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [
    "01_explore_the_data.ipynb",
    "02_fine_tune_on_first_aid.ipynb",
    "03_fine_tune_on_finetome.ipynb",
    "04_plot_loss_and_perplexity.ipynb",
    "05_compare_answers.ipynb",
    "06_chat_with_three_models.ipynb",
]
MACHINE_PATH = re.compile(
    r"(?<![\w.])/(?:root|home|tmp|work|content)(?:/|\b)|[A-Za-z]:\\+Users"
)
TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")
LINK = re.compile(r"(!?)\[((?:[^\[\]]|!?\[[^\]]*\]\([^)]*\))*)\]\(([^)\s]+)\)")
IMAGE_TAG = re.compile(r"<img\b[^>]*>")

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


def without_images(notebook) -> str:
    """The whole notebook as text, less base64, in which anything may turn up."""
    content = json.loads(nbformat.writes(notebook))
    for cell in content["cells"]:
        for output in cell.get("outputs", []):
            for kind in list(output.get("data", {})):
                if kind.startswith("image/") and kind != "image/svg+xml":
                    del output["data"][kind]
    text = json.dumps(content, ensure_ascii=False)
    return re.sub(r"data:image/\w+;base64,[\w+/=]+", "", text)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


def test_there_are_these_six():
    assert [path.name for path in NOTEBOOKS] == NAMES


@each
def test_it_is_a_valid_notebook(path):
    nbformat.validate(read(path))


@each
def test_it_begins_with_its_title_and_its_badge(path):
    first = read(path).cells[0]
    assert first.cell_type == "markdown"
    title, _, rest = first.source.partition("\n")
    assert re.match(rf"# {path.name[:2]} · \w", title), title
    target = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/"
    badge = (
        "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
        f"({target}notebooks/{path.name})"
    )
    assert rest.strip().startswith(badge)
    # And no other notebook's, anywhere in it.
    whole = nbformat.writes(read(path))
    assert set(re.findall(r"blob/main/([\w./]+)", whole)) == {f"notebooks/{path.name}"}


def test_the_set_up_cell_is_the_same_in_all_six():
    cells = {read(path).cells[1].source for path in NOTEBOOKS}
    assert len(cells) == 1
    (cell,) = cells
    assert f'REPOSITORY = "{REPOSITORY}"' in cell
    assert "utils.colab" in cell and "set_up()" in cell
    assert all(read(path).cells[1].cell_type == "code" for path in NOTEBOOKS)


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
    titles = [line for line in headings if line.startswith("# ")]
    assert len(titles) == 1, titles


@each
def test_sections_are_numbered_in_order(path):
    text = "\n".join(markdown(read(path)))
    numbers = [int(n) for n in re.findall(r"^## (\d+)\. ", text, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1)) and numbers


@each
def test_it_was_executed_from_top_to_bottom(path):
    cells = code(read(path))
    counts = [cell.execution_count for cell in cells]
    assert counts == list(range(1, len(cells) + 1)), (
        f"execution counts {counts}: run `make notebooks`, which saves it executed"
    )
    assert any(cell.outputs for cell in cells)


@each
def test_no_error_was_saved(path):
    for number, cell in enumerate(read(path).cells, start=1):
        for output in cell.get("outputs", []):
            assert output.output_type != "error", f"cell {number}: {output.ename}"
            assert output.get("name") != "stderr", f"cell {number}: {output.text[:80]}"


@each
def test_no_widget_or_bar_was_saved(path):
    notebook = read(path)
    assert "widgets" not in notebook.metadata
    for cell in code(notebook):
        assert "execution" not in cell.metadata
        for output in cell.outputs:
            data = output.get("data", {})
            assert WIDGET not in data
            text = output.get("text", "") or str(data.get("text/plain", ""))
            assert not re.search(r"\d+%\|", text), text[:80]  # a progress bar
            assert "127.0.0.1" not in str(data)  # an iframe that shows nothing later


@each
def test_it_names_nobodys_folders_and_no_token(path):
    notebook = read(path)
    text = without_images(notebook)
    found = MACHINE_PATH.search(text)
    assert not found, text[max(0, found.start() - 60) : found.end() + 60]
    assert not TOKEN.search(nbformat.writes(notebook))
    assert set(notebook.metadata) <= {"kernelspec", "language_info", "colab"}
    assert notebook.metadata.kernelspec.name == "python3"


@pytest.mark.parametrize(
    "text",
    ["in /tmp", "'/home/ann/x'", "C:\\\\Users\\\\ann", "(/tmp/x)"],
)
def test_a_machine_path_would_be_seen(text):
    assert MACHINE_PATH.search(text)


@pytest.mark.parametrize("text", ["https://x.org/home/y", "a/tmp/b", "data/runs", "/s"])
def test_an_address_is_no_machine_path(text):
    assert not MACHINE_PATH.search(text)


@each
def test_code_is_short_enough_to_read(path):
    for number, cell in enumerate(read(path).cells, start=1):
        if cell.cell_type == "code":
            for line in cell.source.splitlines():
                assert len(line) <= 88, f"cell {number}: {line}"


@each
def test_links_lead_somewhere(path):
    for text in markdown(read(path)):
        for _, inner, target in LINK.findall(text):
            targets = [target, *(match[2] for match in LINK.findall(inner))]
            for place in targets:
                if re.match(r"[a-z]+:", place):
                    assert place.startswith("https://"), place
                    continue
                file, _, anchor = place.partition("#")
                there = (path.parent / file).resolve() if file else path
                assert there.exists(), f"{place} is not there"
                assert there.is_relative_to(ROOT)
                if anchor and there.suffix == ".md":
                    lines = re.findall(
                        r"^#+ (.+)$", there.read_text("utf-8"), re.MULTILINE
                    )
                    assert anchor in map(slug, lines), f"{place}: no such heading"


@each
def test_images_say_what_they_show(path):
    for text in markdown(read(path)):
        for bang, alt, target in LINK.findall(text):
            if bang:
                assert len(alt.strip()) >= 10, f"{target} has the alt text {alt!r}"
        for tag in IMAGE_TAG.findall(text):
            assert re.search(r"""\balt=["'][^"']{10,}["']""", tag), tag


@pytest.mark.parametrize("number", [0, 1, 4, 5])
def test_a_notebook_that_shows_first_aid_says_what_it_is_not(number):
    path = NOTEBOOKS[number]
    assert "Not medical advice" in "\n".join(markdown(read(path)))
