"""What a Space, conda and pip read: front matter, environment, lists of packages."""

import re
import subprocess
import sys
from importlib.metadata import version

import pytest
from huggingface_hub import metadata_load
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from utils import colab
from utils.config import DATA, OLDEST_PYTHON, ROOT, SAFETY_NOTICE

README = ROOT / "README.md"
COLOURS = ["red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"]


def requirements(name: str) -> list[Requirement]:
    lines = (ROOT / name).read_text("utf-8").splitlines()
    bare = (line.split("#")[0].strip() for line in lines)
    return [Requirement(line) for line in bare if line]


def pins() -> dict[str, Version]:
    """The versions in constraints.txt by normalised name."""
    found = {}
    for requirement in requirements("constraints.txt"):
        (pin,) = requirement.specifier
        assert pin.operator == "==", f"{requirement} is not exact"
        name = canonicalize_name(requirement.name)
        assert name not in found, f"{name} is pinned twice"
        found[name] = Version(pin.version)
    return found


@pytest.fixture
def card():
    """The README's front matter, which a Space is made from."""
    if not README.is_file():
        pytest.skip("README.md is not written yet")
    return metadata_load(README)


def test_the_card_has_what_a_space_needs(card):
    assert card["title"].strip()
    # One emoji: perhaps several code points, but none of them a letter or digit.
    assert 1 <= len(card["emoji"]) <= 4 and not re.search(r"\w", card["emoji"])
    assert card["colorFrom"] in COLOURS and card["colorTo"] in COLOURS
    assert card["sdk"] == "gradio"
    assert (ROOT / card["app_file"]).is_file()
    assert card["license"] == "mit" and (ROOT / "LICENSE").is_file()
    assert 0 < len(card["short_description"]) <= 60
    assert re.fullmatch(r"3\.\d+", str(card["python_version"]))


def test_the_space_gets_the_gradio_that_was_tested(card):
    assert Version(str(card["sdk_version"])) == pins()["gradio"]


def test_the_readme_is_safe_to_read(card):
    text = " ".join(README.read_text("utf-8").replace(">", " ").split())
    assert "Not medical advice" in text
    unfinished = "TO" + "DO"  # split, so that a search for the mark passes this file
    assert unfinished not in text
    assert not re.search(r"hf_[A-Za-z0-9]{8,}", text)  # a token
    assert not re.search(r"(?<![\w.])/(?:root|home|tmp|work)/", text)


def test_the_readme_shows_images_that_are_there_with_alt_text(card):
    images = re.findall(r"!\[([^\]]*)\]\(([^)\s]+)\)", README.read_text("utf-8"))
    assert images
    for alt, target in images:
        assert len(alt) >= 10, f"{target} has the alt text {alt!r}"
        if not target.startswith("https://"):
            assert (ROOT / target).is_file(), f"{target} is not there"


def test_constraints_pin_every_requirement_within_its_bound():
    pinned = pins()
    for requirement in requirements("requirements.txt") + requirements(
        "requirements-dev.txt"
    ):
        pin = pinned.get(canonicalize_name(requirement.name))
        assert pin, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(pin, prereleases=True), requirement
    assert pinned["torch"].base_version == "2.13.0"


def test_what_is_installed_is_what_was_tested():
    pinned = pins()
    for requirement in requirements("requirements.txt"):
        here = Version(version(requirement.name))
        assert here.public == pinned[canonicalize_name(requirement.name)].public


def test_every_requirement_has_a_reason_and_a_bound():
    for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement, _, reason = line.partition("#")
            assert reason.strip(), f"{requirement} has no reason"
            assert ">=" in requirement


def test_conda_takes_the_one_list():
    text = (ROOT / "environment.yml").read_text("utf-8")
    assert re.search(r"^name: llama-first-aid$", text, re.MULTILINE)
    assert re.search(r"^  - python\b", text, re.MULTILINE)
    assert re.search(r"^  - pip:\n      - -r requirements\.txt$", text, re.MULTILINE)


def test_space_conda_colab_and_make_ask_for_the_same(card):
    """One list of packages, one Python, one Gradio, wherever the project is set up."""
    conda = (ROOT / "environment.yml").read_text("utf-8")
    assert f"- python={card['python_version']}\n" in conda
    assert ".".join(map(str, OLDEST_PYTHON)) == card["python_version"]
    assert str(pins()["gradio"]) == card["sdk_version"]
    listed = [str(requirement) for requirement in requirements("requirements.txt")]
    assert [str(Requirement(line)) for line in colab.requirements()] == listed
    assert {Requirement(line).name for line in listed} >= colab.NOT_ON_COLAB
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert "-c constraints.txt" in makefile and "-r requirements.txt" in makefile


def test_the_app_says_in_one_line_why_it_cannot_start():
    """A base that is not there: a reason, an exit code, and no traceback."""
    done = subprocess.run(
        [sys.executable, "app.py"],
        cwd=ROOT,
        env={"PATH": "", "BASE_MODEL": "./no/such/folder", "PROFILE": "pocket"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "chat: BASE_MODEL=./no/such/folder: there is no such" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_notice_tells_whom_to_call():
    assert "112" in SAFETY_NOTICE and "Not medical advice" in SAFETY_NOTICE
    assert DATA.is_dir()
