"""The notebooks' set-up cell, executed as Colab would, with real git and real pip.

A small project lies in a local repository, to which git is told to go instead of to
GitHub; a folder of wheels stands in for the package index, and a module of that name
for `google.colab`. Nothing else is pretended.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import nbformat
import pytest

from utils import colab
from utils.config import ROOT

SECRET = "hf_" + "s3cR" * 9
RUN = """
import json, os, sys, types
module = types.ModuleType("google.colab")
secrets = json.loads(os.environ.pop("SECRETS", "null"))
if secrets is not None:
    class SecretNotFoundError(Exception):
        pass
    def get(name):
        if name not in secrets:
            raise SecretNotFoundError(name)
        return secrets[name]
    module.userdata = types.SimpleNamespace(get=get)
package = types.ModuleType("google")
package.colab = module
if os.environ.pop("ON_COLAB"):
    sys.modules.update({"google": package, "google.colab": module})
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.showtraceback = lambda *_, **__: print("SAID", sys.exc_info()[1])
with open("cell.py") as file:
    cell = file.read()
done = shell.run_cell(cell)
if not done.success:
    print("SAID", done.error_in_exec or done.error_before_exec)
print("TOKEN", bool(os.environ.get("HF_TOKEN")))
"""


def wheel(folder: Path, name: str, version: str, padding: int = 0) -> None:
    """A package of one empty module, as small as a wheel can be, or of `padding`."""
    info = f"{name}-{version}.dist-info"
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", os.urandom(padding).hex())
        archive.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        )
        archive.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A repository, an index and an environment with pip, as on a fresh Colab."""
    folder = tmp_path_factory.mktemp("colab")
    project = folder / "hub" / "OWNER" / "llama-first-aid"
    (project / "utils").mkdir(parents=True)
    for file in ("__init__.py", "colab.py"):
        shutil.copyfile(ROOT / "utils" / file, project / "utils" / file)
    (project / "requirements.txt").write_text(
        "brought-along>=2.0  # to be installed\njupyter>=1.0  # never on Colab\n"
    )
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(project)]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    other = folder / "hub" / "OWNER" / "other"
    subprocess.run(["git", "init", "-q", str(other)], check=True)
    index = folder / "index"
    index.mkdir()
    wheel(index, "brought_along", "2.1")
    wheel(index, "torchao", "0.10.0")
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    # IPython, which runs the cell, is looked up where this test has it.
    (packages / "here.pth").write_text(sysconfig.get_paths()["purelib"])
    return folder


@pytest.fixture
def colab_runtime(scene, tmp_path):
    """Runs the notebooks' cell in a folder of its own; returns what was printed."""
    python = scene / "environment" / "bin" / "python"
    cell = nbformat.read(
        ROOT / "notebooks" / "01_explore_the_data.ipynb", as_version=4
    ).cells[1]
    folder = tmp_path / "content"
    folder.mkdir()

    def run(address="OWNER/llama-first-aid", secrets=None, on_colab=True, **environ):
        here = environ.pop("FOLDER", folder)
        (tmp_path / "cell.py").write_text(
            cell.source.replace(colab.REPOSITORY, address)
        )
        shutil.copyfile(tmp_path / "cell.py", here / "cell.py")
        cleared = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("PIP_", "GIT_", "HF_", "PYTHONPATH"))
        }
        done = subprocess.run(
            [str(python), "-c", RUN],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=300,
            env={
                **cleared,
                "HOME": str(tmp_path),
                "IPYTHONDIR": str(tmp_path / "ipython"),
                "ON_COLAB": "1" if on_colab else "",
                "SECRETS": json.dumps(secrets),
                "PIP_NO_INDEX": "1",
                "PIP_FIND_LINKS": str(scene / "index"),
                "PIP_CONFIG_FILE": os.devnull,
                "GIT_CONFIG_COUNT": "1",
                "GIT_CONFIG_KEY_0": f"url.{(scene / 'hub').as_uri()}/.insteadOf",
                "GIT_CONFIG_VALUE_0": "https://github.com/",
                **environ,
            },
        )
        return done.stdout + done.stderr

    def pip(*arguments):
        subprocess.run(
            [str(python), "-m", "pip", "-q", *arguments], check=True, cwd=tmp_path
        )

    run.pip, run.folder, run.index = pip, folder, scene / "index"
    yield run
    pip("uninstall", "-y", "brought_along", "torchao")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 200 kB."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(place)]
    if (
        not shutil.which("mount")
        or subprocess.run(mount, capture_output=True).returncode
    ):
        pytest.skip("only root can mount a small disk")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def sentences(text: str) -> list[str]:
    """What the cell ended with; each once, as IPython and the test both see it."""
    said = [line[5:] for line in text.splitlines() if line.startswith("SAID ")]
    return list(dict.fromkeys(said))


def test_it_fetches_installs_and_says_so_and_again_does_nothing(colab_runtime):
    colab_runtime.pip(
        "install",
        "--no-index",
        f"{colab_runtime.index}/torchao-0.10.0-py3-none-any.whl",
    )
    text = colab_runtime()
    assert sentences(text) == []
    assert "no GPU: " in text or "GPU: " in text
    assert "installing: brought-along>=2.0" in text
    assert "removing torchao 0.10.0" in text
    assert "set up: installed" in text and "jupyter" not in text
    assert (colab_runtime.folder / "project" / "utils" / "colab.py").is_file()
    again = colab_runtime(GIT_CONFIG_COUNT="0", PIP_FIND_LINKS="")  # nothing to reach
    assert sentences(again) == []
    assert "set up: everything was there already" in again
    assert "installing" not in again and "removing" not in again


def test_elsewhere_it_finds_the_project_from_any_folder(colab_runtime, scene):
    inside = scene / "hub" / "OWNER" / "llama-first-aid" / "notebooks" / "deep"
    inside.mkdir(parents=True, exist_ok=True)
    text = colab_runtime(on_colab=False, FOLDER=inside)
    assert sentences(text) == [] and "installing" not in text
    assert not (inside / "project").exists()


def test_alone_and_elsewhere_it_says_that_there_is_no_project(colab_runtime):
    (said,) = sentences(colab_runtime(on_colab=False))
    assert said.startswith("No project here: no folder here holds it.")


def test_without_an_address_it_says_so(colab_runtime):
    unreached = {"GIT_CONFIG_COUNT": "0", "https_proxy": "http://127.0.0.1:9"}
    (said,) = sentences(colab_runtime(**unreached))
    assert "OWNER/llama-first-aid right (OWNER: unset)?" in said


def test_without_a_network_it_gives_gits_reason(colab_runtime):
    (said,) = sentences(
        colab_runtime(
            "some/one", GIT_CONFIG_COUNT="0", https_proxy="http://127.0.0.1:9"
        )
    )
    assert said.startswith("No project here: fatal: unable to access")
    assert "Failed to connect to 127.0.0.1" in said
    assert not (colab_runtime.folder / "project").exists()
    assert sentences(colab_runtime()) == []  # the second try is not in the way


def test_a_wrong_address_is_named(colab_runtime):
    (said,) = sentences(colab_runtime("OWNER/misspelt"))
    assert "does not" in said and "Is https://github.com/OWNER/misspelt right" in said
    assert not (colab_runtime.folder / "project").exists()


def test_the_address_of_something_else_is_named(colab_runtime):
    (said,) = sentences(colab_runtime("OWNER/other"))
    assert "Is https://github.com/OWNER/other right" in said


def test_a_full_disk_stops_the_fetch_with_gits_reason(colab_runtime, small_disk):
    (small_disk / "filler").write_bytes(bytes(150_000))
    (said,) = sentences(colab_runtime(FOLDER=small_disk))
    assert "No space left on device" in said
    assert not (small_disk / "project" / "utils").exists()


def test_a_full_disk_stops_the_installation(colab_runtime, small_disk, scene):
    big = scene / "big"
    big.mkdir(exist_ok=True)
    wheel(big, "brought_along", "2.2", padding=300_000)
    place = str(small_disk)
    full = {"PIP_FIND_LINKS": str(big), "TMPDIR": place, "PIP_TARGET": place}
    (said,) = sentences(colab_runtime(**full))
    assert said.startswith("The disk is full")
    (small_disk / "filler").write_bytes(bytes(195_000))  # not even pip's list fits
    (said,) = sentences(colab_runtime(**full))
    assert said.startswith("The disk is full")


def test_without_a_network_nothing_is_installed(colab_runtime):
    (said,) = sentences(
        colab_runtime(
            PIP_NO_INDEX="0",
            PIP_INDEX_URL="http://127.0.0.1:9/simple",
            PIP_FIND_LINKS="",
            PIP_RETRIES="1",
        )
    )
    assert said.startswith("There is no network")


def test_what_pip_cannot_find_is_said_with_its_reason(colab_runtime, tmp_path):
    (said,) = sentences(colab_runtime(PIP_FIND_LINKS=str(tmp_path)))
    assert said.startswith("pip could not install brought-along>=2.0 (ERROR: ")
    assert "run this cell again" in said


@pytest.mark.parametrize(
    ("secrets", "environ", "said"),
    [
        ({"HF_TOKEN": SECRET}, {"HF_TOKEN": "hf_other"}, "Colab's secret HF_TOKEN"),
        ({}, {"HF_TOKEN": SECRET}, "HF_TOKEN of the environment"),
        (None, {"HF_TOKEN": SECRET}, "HF_TOKEN of the environment"),
        ({}, {}, "none, and none is needed"),
    ],
)
def test_the_secret_comes_first_and_is_never_printed(
    colab_runtime, secrets, environ, said
):
    text = colab_runtime(secrets=secrets, **environ)
    assert sentences(text) == []
    assert f"token: {said}" in text
    assert f"TOKEN {bool(secrets or environ)}" in text
    assert SECRET not in text and "hf_other" not in text
