"""What `make colab-check` compares, and the list of versions that it installs."""

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from utils import colab, colab_versions
from utils import colab_check as check

BEFORE = {"numpy": "2.1.3", "pyarrow": "18.1.0", "torchao": "0.10.0"}
AFTER = {"numpy": "2.1.3", "pyarrow": "26.0.1", "trl": "1.16.0"}


def judged(after=AFTER, named=("trl",), before=BEFORE, conflicts=((), ())):
    return check.judge(before, after, named, *conflicts)


def test_versions_are_read_by_normalised_name(tmp_path):
    file = tmp_path / "versions.txt"
    file.write_text("# about\nRouge_Score==0.1.2  # why\n\ntorch==2.11.0+cu128\n")
    assert check.read_versions(file) == {
        "rouge-score": "0.1.2",
        "torch": "2.11.0+cu128",
    }


@pytest.mark.parametrize("line", ["numpy", "numpy>=2", "a b==1", "=="])
def test_a_line_that_is_no_version_is_named(tmp_path, line):
    file = tmp_path / "versions.txt"
    file.write_text(f"a==1\n{line}\n")
    with pytest.raises(ValueError, match=r"versions.txt, line 2: .* no name==version"):
        check.read_versions(file)


def test_changes_say_from_what_to_what():
    assert check.changes(BEFORE, AFTER) == {
        "pyarrow": "18.1.0 -> 26.0.1",
        "torchao": "gone (0.10.0)",
        "trl": "new 1.16.0",
    }


def test_what_the_set_up_cell_names_may_change():
    assert judged() == []
    assert (
        judged(AFTER | {"datasets": "5.0.1"}, before=BEFORE | {"datasets": "4"}) == []
    )


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (AFTER | {"numpy": "2.4.0"}, "numpy changed (2.1.3 -> 2.4.0)"),
        ({"trl": "1.16.0"}, "numpy changed (gone (2.1.3))"),
        (AFTER | {"torchao": "0.10.0"}, "torchao 0.10.0 is still there"),
    ],
)
def test_anything_else_that_changes_is_wrong(after, said):
    assert any(said in line for line in judged(after))


def test_only_new_conflicts_count():
    old = ["a 1 requires b"]
    assert judged(conflicts=(old, old)) == []
    (said,) = judged(conflicts=(old, [*old, "trl 1 requires c"]))
    assert said == "a new conflict: trl 1 requires c"


def test_the_list_covers_what_our_requirements_touch():
    """Nothing of Colab's list that our requirements touch is left out."""
    listed = check.read_versions(check.VERSIONS)
    head = check.VERSIONS.read_text("utf-8").splitlines()[0]
    assert head.startswith("# Colab GPU runtime, ") and "Python 3." in head
    # On Colab since ever; what is not there yet, the set-up cell installs.
    for name in ("torch", "numpy", "pandas", "pyarrow", "datasets", "transformers"):
        assert name in listed
    assert listed["torchao"] == "0.10.0"
    ours = colab_versions.tree(colab.requirements()) | set(colab_versions.BESIDES)
    assert set(listed) <= ours, "run utils.colab_versions again with Colab's list"
    for line in colab.requirements():
        requirement = Requirement(line)
        have = listed.get(canonicalize_name(requirement.name))
        if have and requirement.name not in colab.MAY_MOVE:
            assert requirement.specifier.contains(have.split("+")[0]), line


def test_the_tree_follows_what_is_needed_here():
    found = colab_versions.tree(["datasets>=4"])
    assert {"datasets", "pyarrow", "numpy", "python-dateutil"} <= found
    assert "trl" not in found
    assert "no-such-package" in colab_versions.tree(["no-such-package"])


def test_only_what_is_needed_is_selected():
    freeze = {"pyarrow": "18.1.0", "torchao": "0.10.0", "geopandas": "1.0"}
    kept = colab_versions.select(freeze, ["datasets"])
    assert kept == {"pyarrow": "18.1.0", "torchao": "0.10.0"}
