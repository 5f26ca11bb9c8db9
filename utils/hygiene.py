"""Whether notebooks are fit to be committed: executed, clean, and of one form.

    python -m utils.hygiene [notebooks/02_….ipynb …]

Looks at files only and executes nothing. `make lint`, and so CI, calls it; so does the
pre-commit hook. What it finds is printed a line each, with file, cell and what to do.
"""

import argparse
import base64
import io
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import nbformat
from PIL import Image

from utils.colab import REPOSITORY
from utils.config import IMAGES, ROOT, display_path
from utils.walk import WIDGET

NOTEBOOKS = ROOT / "notebooks"
AGAIN = "run `make notebooks`, which executes all six and saves them clean"
COLUMNS = 88
SET_UP_LINES = 10  # of code
MACHINE_PATH = re.compile(
    r"(?<![\w.])/(?:root|home|tmp|work|content)(?:/|\b)|[A-Za-z]:\\+Users"
)
TOKEN = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bgh[opsu]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}"
    r"|\bsk-[A-Za-z0-9_-]{20,}|\bAKIA[0-9A-Z]{16}\b"
)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|!?\[[^\]]*\]\([^)]*\))*)\]\(([^)\s]+)\)")
IMAGE_TAG = re.compile(r"<img\b[^>]*>")
FREE_OF_COLUMNS = re.compile(r"\s*\||.*(?:\]\(|https?://\S{20,})")  # tables and links
RECORDS = (
    *("*.md", "data/results/**/*", "data/pocket_llama/**/*.json*"),
    *("data/published/*", "data/colab/*", "imgs/tables/*"),
)


def check_notebook(path: Path) -> list[str]:
    """What is wrong with the notebook at `path`, a sentence each; empty if nothing.

    Raises:
        OSError: it cannot be read.
    """
    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except (nbformat.reader.NotJSONError, nbformat.ValidationError) as error:
        first = str(error).splitlines()[0]
        return [f"{display_path(path)}: not a valid notebook ({first}); restore it"]
    checks = (_heading, _set_up, _executed, _outputs, _columns, _links, _secrets)
    return [
        f"{display_path(path)}{f', cell {cell}' if cell else ''}: {said}"
        for check in checks
        for cell, said in check(notebook, path)
    ]


def check_set_up_cells(paths: Sequence[Path]) -> list[str]:
    """Whether the set-up cell is the same, and short, in all of `paths`."""
    cells: dict[str, list[Path]] = {}
    for path in paths:
        cells.setdefault(_cell(path, 1), []).append(path)
    if len(cells) < 2:
        return []
    usual = max(cells, key=lambda text: len(cells[text]))
    return [
        f"{display_path(path)}, cell 2: another set-up cell than the other notebooks "
        "have; copy theirs"
        for text, those in cells.items()
        if text != usual
        for path in those
    ]


def check_records(root: Path = ROOT) -> list[str]:
    """Whether results or what is written into figures hold a token or a machine's path.

    Args:
        root: of the project.
    """
    found = []
    for pattern in RECORDS:
        for path in sorted(root.glob(pattern)):
            if path.is_file():
                found += _texts(path, path.read_text("utf-8", errors="replace"))
    for path in sorted((root / IMAGES.relative_to(ROOT)).rglob("*.png")):
        found += _texts(path, _notes(path))
    return found


def check_readme(root: Path = ROOT) -> list[str]:
    """Whether the README's links lead somewhere, and its images say what they show.

    Args:
        root: of the project.
    """
    path = root / "README.md"
    said = _wrong_links(path.read_text("utf-8"), path)
    return [f"{display_path(path)}: {wrong}" for wrong in said]


def _notes(picture: Path | io.BytesIO) -> str:
    """What is written into a picture beside what it shows."""
    with Image.open(picture) as image:
        return json.dumps(image.info, default=str)


def _texts(path: Path, text: str) -> list[str]:
    where = display_path(path)
    if TOKEN.search(text):
        return [f"{where}: holds what looks like a token; revoke it, and make it anew"]
    if match := MACHINE_PATH.search(text):
        near = text[max(0, match.start() - 30) : match.end() + 30].strip()
        return [f"{where}: names a folder of this machine (… {near} …); make it anew"]
    return []


Found = Iterator[tuple[int, str]]  # number of the cell (0: the file), and a sentence


def _heading(notebook, path: Path) -> Found:
    first = notebook.cells[0] if notebook.cells else None
    if first is None or first.cell_type != "markdown":
        yield 1, "begin with a Markdown cell: title, badge, neighbours"
        return
    title, _, rest = first.source.partition("\n")
    if not re.match(rf"# {path.name[:2]} · \w", title):
        yield 1, f"the title is {title!r}; write `# {path.name[:2]} · …`"
    target = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/"
    badge = (
        "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
        f"({target}notebooks/{path.name})"
    )
    if not rest.strip().startswith(badge):
        yield 1, f"below the title goes the badge: {badge}"
    whole = nbformat.writes(notebook)
    for other in sorted(set(re.findall(r"blob/main/([\w./]+)", whole))):
        if other != f"notebooks/{path.name}":
            yield 1, f"an address of Colab leads to {other}, not here"
    titles = [
        number
        for number, text in _markdown(notebook)
        for line in text.splitlines()
        if line.startswith("# ")
    ]
    if len(titles) > 1:
        yield titles[1], "a second title; sections begin with ##"


def _set_up(notebook, path: Path) -> Found:
    cells = notebook.cells
    source = cells[1].source if len(cells) > 1 else ""
    if "colab.set_up()" not in source or REPOSITORY not in source:
        yield 2, f"no set-up cell for {REPOSITORY}; copy another notebook's"
    lines = [
        line for line in source.splitlines() if line.strip() and line.strip()[0] != "#"
    ]
    if len(lines) > SET_UP_LINES:
        yield 2, f"the set-up has {len(lines)} lines of code; {SET_UP_LINES} at most"


def _executed(notebook, path: Path) -> Found:
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in cells]
    if counts != list(range(1, len(cells) + 1)):
        yield 0, f"not executed once from top to bottom ({counts}); {AGAIN}"
    if not any(cell.outputs for cell in cells):
        yield 0, f"no outputs are kept; {AGAIN}"


def _outputs(notebook, path: Path) -> Found:
    extra = set(notebook.metadata) - {"kernelspec", "language_info", "colab"}
    if extra:
        yield 0, f"metadata {sorted(extra)} of one machine or of widgets; {AGAIN}"
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        yield 0, f"the kernel is not called python3; {AGAIN}"
    for number, cell in enumerate(notebook.cells, start=1):
        if cell.cell_type != "code":
            continue
        if "execution" in cell.metadata:
            yield number, f"times of execution are kept; {AGAIN}"
        for output in cell.outputs:
            data = output.get("data", {})
            text = output.get("text", "") or str(data.get("text/plain", ""))
            if output.output_type == "error":
                yield number, f"{output.ename} was saved; mend the cell and {AGAIN}"
            elif output.get("name") == "stderr":
                yield number, f"what went to stderr was saved; {AGAIN}"
            elif WIDGET in data or re.search(r"\d+%\|", text):
                yield number, f"a widget or progress bar was saved; {AGAIN}"
            elif "127.0.0.1" in str(data):
                yield number, f"a frame onto a local server was saved; {AGAIN}"


def _columns(notebook, path: Path) -> Found:
    for number, cell in enumerate(notebook.cells, start=1):
        for line in cell.source.splitlines():
            free = cell.cell_type == "markdown" and FREE_OF_COLUMNS.match(line)
            # As for ruff: an address that ends a line of code cannot be broken.
            address = "://" in line.split(" ")[-1]
            if len(line) > COLUMNS and not (free or address):
                yield number, f"a line of {len(line)} columns; {COLUMNS} at most"


def _links(notebook, path: Path) -> Found:
    for number, text in _markdown(notebook):
        for wrong in _wrong_links(text, path):
            yield number, wrong


def _wrong_links(text: str, path: Path) -> Iterator[str]:
    """What is wrong with links and images in the Markdown of the file at `path`."""
    for bang, inner, target in LINK.findall(text):
        for image, alt, place in [(bang, inner, target), *LINK.findall(inner)]:
            if image and len(alt.strip()) < 10:
                yield f"{place} has the alt text {alt!r}; say what it shows"
            if wrong := broken(place, path):
                yield wrong
    for tag in IMAGE_TAG.findall(text):
        if not re.search(r"""\balt=["'][^"']{10,}["']""", tag):
            yield f"{tag[:40]} has no alt text that says what it shows"


def broken(place: str, path: Path) -> str:
    """What is wrong with the link to `place` in the file at `path`; empty if nothing.

    Addresses on the web are not asked for, only looked at.
    """
    if re.match(r"[a-z]+:", place):
        return "" if place.startswith("https://") else f"{place} is not https"
    file, _, anchor = place.partition("#")
    there = (path.parent / file).resolve() if file else path
    if not there.exists() or not there.is_relative_to(ROOT):
        return f"the link to {place} leads nowhere in the project"
    if anchor and there.suffix == ".md":
        headings = re.findall(r"^#+ (.+)$", there.read_text("utf-8"), re.MULTILINE)
        if anchor not in map(slug, headings):
            return f"{file} has no heading #{anchor}"
    return ""


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


def _secrets(notebook, path: Path) -> Found:
    for number, cell in enumerate(notebook.cells, start=1):
        text = _without_pictures(cell)
        if TOKEN.search(text):
            yield number, f"holds what looks like a token; revoke it and {AGAIN}"
        if match := MACHINE_PATH.search(text):
            near = text[max(0, match.start() - 30) : match.end() + 30]
            yield number, f"names a folder of this machine (… {near} …)"


def _without_pictures(cell) -> str:
    """The cell as text; of pictures what is noted in them, less their base64.

    Anything may turn up in base64.
    """
    content = json.loads(json.dumps(cell))
    for output in content.get("outputs", []):
        for kind in list(output.get("data", {})):
            if kind.startswith("image/") and kind != "image/svg+xml":
                picture = "".join(output["data"].pop(kind))
                output[kind] = _notes(io.BytesIO(base64.b64decode(picture)))
    text = json.dumps(content, ensure_ascii=False)
    return re.sub(r"data:image/\w+;base64,[\w+/=]+", "", text)


def _markdown(notebook) -> Iterator[tuple[int, str]]:
    """What a reader sees as Markdown: cells, and sentences rendered from results."""
    for number, cell in enumerate(notebook.cells, start=1):
        if cell.cell_type == "markdown":
            yield number, cell.source
        for output in cell.get("outputs", []):
            text = output.get("data", {}).get("text/markdown", "")
            yield number, text if isinstance(text, str) else "".join(text)


def _cell(path: Path, place: int) -> str:
    cells = nbformat.read(path, as_version=4).cells
    return cells[place].source if len(cells) > place else ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Check notebooks from the command line; exit code 1 if anything is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.hygiene",
        description="Are the notebooks, results and figures fit to be committed?",
    )
    parser.add_argument(
        "notebooks", nargs="*", type=Path, help="notebooks to check (all six)"
    )
    six = sorted(NOTEBOOKS.glob("*.ipynb"))
    chosen = [path.resolve() for path in parser.parse_args(arguments).notebooks] or six
    try:
        found = [said for path in chosen for said in check_notebook(path)]
    except OSError as error:
        sys.exit(f"hygiene: {error.filename} cannot be read ({error.strerror})")
    if not found:  # cells can be compared only in notebooks that can be read
        found = check_set_up_cells(sorted({*six, *chosen}))
    found += check_readme() + check_records()
    if found:
        sys.exit("\n".join(found))
    print(f"{len(chosen)} notebooks, results and figures are fit to be committed")


if __name__ == "__main__":
    main()
