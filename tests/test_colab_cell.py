"""The notebooks' set-up cell, executed as Colab would, with real git and real pip.

A small project lies in a local repository, to which git is told to go instead of to
GitHub; a folder of wheels stands in for the package index, and a module of that name
for `google.colab`. Nothing else is pretended.
"""

import http.server
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import zipfile
from pathlib import Path

import nbformat
import pytest

from utils import colab
from utils.config import ROOT

SECRET = "hf_" + "s3cR" * 9
UNSET = "OWNER/llama-first-aid"
RUN = """
import json, os, sys, types
module = types.ModuleType("google.colab")
secrets = json.loads(os.environ.pop("SECRETS", "null"))
if secrets is not None:
    class SecretNotFoundError(Exception):
        pass
    class NotebookAccessError(Exception):
        pass
    def get(name):
        if name not in secrets:
            raise SecretNotFoundError(name)
        if secrets[name] is None:
            raise NotebookAccessError(name)
        return secrets[name]
    module.userdata = types.SimpleNamespace(get=get)
package = types.ModuleType("google")
package.colab = module
if os.environ.pop("ON_COLAB"):
    sys.modules.update({"google": package, "google.colab": module})
for name in os.environ.pop("LOADED").split():
    __import__(name)
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.showtraceback = lambda *_, **__: print("SAID", sys.exc_info()[1])
with open("cell.py") as file:
    cell = file.read()
done = shell.run_cell(cell)
if not done.success:
    print("SAID", done.error_in_exec or done.error_before_exec)
print("TOKEN OF", len(os.environ.get("HF_TOKEN", "")))
try:
    import brought_along
    print("IMPORTED")
except ImportError:
    pass
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
        names = [*archive.namelist(), f"{info}/RECORD"]
        archive.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in names))


def repository(folder: Path, requirements: str) -> None:
    """The least that the set-up cell needs of the project, as a git repository."""
    (folder / "utils").mkdir(parents=True)
    for file in ("__init__.py", "colab.py"):
        shutil.copyfile(ROOT / "utils" / file, folder / "utils" / file)
    (folder / "requirements.txt").write_text(requirements)
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    commit(folder, "add", ".")


def commit(folder: Path, *command: str) -> None:
    """Run a command of git in `folder`, and commit what it did."""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(folder)]
    subprocess.run([*git, *command], check=True)
    subprocess.run([*git, "commit", "-qm", "as it is"], check=True)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A repository, an index and an environment with pip, as on a fresh Colab."""
    folder = tmp_path_factory.mktemp("colab")
    hub = folder / "hub"
    needs = "brought-along>=2.0  # to be installed\njupyter>=1.0  # never on Colab\n"
    repository(hub / "some" / "project", needs)
    repository(hub / UNSET, needs)  # which is somebody else's, whoever that is
    repository(hub / "some" / "newer", "datasets>=4.7\n")
    repository(hub / "some" / "ready", "# nothing\n")
    big = hub / "some" / "big"
    big.mkdir()
    (big / "large").write_bytes(b"large" * 60_000)  # until checked out it is small
    repository(big, needs)
    subprocess.run(["git", "init", "-q", str(hub / "some" / "empty")], check=True)
    other = hub / "some" / "other"
    repository(other, "")
    commit(other, "rm", "-rq", "utils")
    index = folder / "index"
    index.mkdir()
    wheel(index, "brought_along", "2.1")
    wheel(index, "torchao", "0.10.0")
    wheel(index, "datasets", "4.0.0")
    wheel(index, "datasets", "5.0.1")
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

    def run(address="some/project", secrets=None, on_colab=True, loaded="", **environ):
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
                "LOADED": loaded,
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

    (packages,) = (scene / "environment").glob("lib/python*/site-packages")

    def put(name, version):
        """Have a package there before; a wheel need only be unpacked."""
        file = scene / "index" / f"{name}-{version}-py3-none-any.whl"
        zipfile.ZipFile(file).extractall(packages)
        return packages / f"{name}-{version}.dist-info"

    run.put, run.folder = put, folder
    yield run
    for name in ("brought_along", "torchao", "datasets"):
        (packages / f"{name}.py").unlink(missing_ok=True)
        for information in packages.glob(f"{name}-*.dist-info"):
            shutil.rmtree(information)


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
    colab_runtime.put("torchao", "0.10.0")
    text = colab_runtime()
    assert sentences(text) == [] and "IMPORTED" in text  # in the very same process
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
    inside = scene / "hub" / "some" / "project" / "notebooks" / "deep"
    inside.mkdir(parents=True, exist_ok=True)
    text = colab_runtime(on_colab=False, FOLDER=inside)
    assert sentences(text) == [] and "installing" not in text
    assert not (inside / "project").exists()


ASKED = " Is ADDRESS right and public?"
NO_PROJECT = "No project here: clone it or set its ADDRESS"


def test_alone_and_elsewhere_it_says_that_there_is_no_project(colab_runtime):
    assert sentences(colab_runtime(on_colab=False)) == [NO_PROJECT]


def test_without_an_address_it_says_so_and_fetches_nobody_elses_code(colab_runtime):
    """Whoever has the account OWNER could else run theirs in the reader's runtime."""
    assert sentences(colab_runtime(UNSET)) == [NO_PROJECT]
    assert not (colab_runtime.folder / "project").exists()


def test_without_a_network_it_gives_gits_reason(colab_runtime):
    (said,) = sentences(
        colab_runtime(GIT_CONFIG_COUNT="0", https_proxy="http://127.0.0.1:9")
    )
    assert said.startswith("fatal: unable to access 'https://github.com/some/project")
    assert "Failed to connect to 127.0.0.1" in said
    assert said.endswith(ASKED)
    assert not (colab_runtime.folder / "project").exists()
    again = colab_runtime("some/ready")  # for which nothing is in the way
    assert sentences(again) == []


def test_a_wrong_address_is_named(colab_runtime):
    (said,) = sentences(colab_runtime("some/misspelt"))
    assert "some/misspelt" in said and "does not" in said
    assert said.endswith(ASKED)
    assert not (colab_runtime.folder / "project").exists()


def test_a_private_repository_is_not_waited_for(colab_runtime):
    """GitHub asks for a name where a repository is private or is not there."""

    class Asks(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="GitHub"')
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Asks)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    there = f"url.http://127.0.0.1:{server.server_port}/.insteadOf"
    (said,) = sentences(colab_runtime(GIT_CONFIG_KEY_0=there))
    server.shutdown()
    server.server_close()
    assert "terminal prompts disabled" in said
    assert said.endswith(ASKED)


@pytest.mark.parametrize("address", ["some/other", "some/empty"])
def test_the_address_of_something_else_is_named_and_may_be_mended(
    colab_runtime, address
):
    (said,) = sentences(colab_runtime(address))
    assert "utils" in said and "No such file or directory" in said
    assert said.endswith(ASKED)
    assert sentences(colab_runtime("some/ready")) == []


def test_a_full_disk_stops_the_fetch_with_gits_reason(colab_runtime, small_disk):
    (small_disk / "filler").write_bytes(bytes(150_000))
    (said,) = sentences(colab_runtime(FOLDER=small_disk))
    assert "No space left on device" in said
    assert not (small_disk / "project").exists()


def test_what_a_full_disk_has_cut_short_is_not_in_the_way(colab_runtime, small_disk):
    """Git keeps what it fetched when only the check-out failed."""
    (said,) = sentences(colab_runtime("some/big", FOLDER=small_disk))
    assert "checkout" in said and not (small_disk / "project").exists()
    assert (small_disk / ".p").exists()
    grown = ["mount", "-o", "remount,size=2m", str(small_disk)]
    subprocess.run(grown, check=True)
    assert sentences(colab_runtime("some/big", FOLDER=small_disk)) == []
    assert (small_disk / "project" / "large").stat().st_size == 300_000
    assert not (small_disk / ".p").exists()


def test_what_may_move_moves_and_is_named(colab_runtime):
    colab_runtime.put("datasets", "4.0.0")
    text = colab_runtime("some/newer")
    assert sentences(text) == []
    assert "moved: datasets 4.0.0 -> 5.0.1" in text


def test_what_python_has_loaded_does_not_move_and_is_named(colab_runtime):
    colab_runtime.put("datasets", "4.0.0")
    (said,) = sentences(colab_runtime("some/newer", loaded="datasets"))
    assert said.startswith("datasets may be needed in another version than the one")
    assert "Restart session" in said
    assert "everything was there" not in said


def test_a_torchao_that_python_has_loaded_needs_a_restart(colab_runtime):
    colab_runtime.put("torchao", "0.10.0")
    (said,) = sentences(colab_runtime("some/ready", loaded="torchao"))
    assert said.startswith("Python had loaded torchao before this cell changed it")
    again = colab_runtime("some/ready")
    assert "set up: everything was there" in again and sentences(again) == []


def test_a_torchao_that_stays_is_named(colab_runtime):
    information = colab_runtime.put("torchao", "0.10.0")
    (information / "RECORD").unlink()  # pip cannot know what to remove
    (said,) = sentences(colab_runtime("some/ready"))
    assert said.startswith("torchao 0.10.0 could not be removed, and PEFT fails with")
    assert "RECORD" in said


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
        ({"HF_TOKEN": None}, {"HF_TOKEN": SECRET}, "HF_TOKEN of the environment"),
        ({}, {}, "none, and none is needed"),
    ],
)
def test_the_secret_comes_first_and_is_never_printed(
    colab_runtime, secrets, environ, said
):
    text = colab_runtime("some/ready", secrets=secrets, **environ)
    assert sentences(text) == []
    assert f"token: {said}" in text
    assert f"TOKEN OF {len(SECRET) if secrets or environ else 0}\n" in text
    hidden = secrets == {"HF_TOKEN": None}  # from this notebook, which has no access
    assert ("this notebook may not see" in text) == hidden
    assert SECRET not in text and "hf_other" not in text
