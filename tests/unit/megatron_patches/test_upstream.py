"""The upstream functions of the patches: which sources are accepted, and how another one is refused."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_profit import megatron_patches
from megatron_profit.megatron_patches.__main__ import main
from megatron_profit.megatron_patches.patch import (
    UnsupportedVersionError,
    check_upstream,
    functions_of,
)
from megatron_profit.megatron_patches.upstream import sources
from megatron_profit.megatron_patches.upstream.sources import (
    DIGESTS,
    installed_path,
    known_digests,
    source_digest,
    version_of_tests,
)

FUNCTIONS = functions_of(megatron_patches.all_patches())
MODULE = '''
LIMIT = 1

@decorated
def function(
    a, b  # two
):
    """Return the sum.

def not_a_function(): ...
    """
    return a + b


class Class(Base):
    limit: int = 2

    def method(self):
        return [
    1, 2]

    @property
    def other(self):
        return 3


def method(self):
    return 4

try:
    import fast
    HAVE = True
except ImportError:
    HAVE = False
'''


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=600)


@pytest.fixture
def copied_megatron(tmp_path, monkeypatch):
    """Another copy of the patched files of Megatron, which is found in place of the installed one."""
    for file in {function.partition(":")[0] for function in FUNCTIONS}:
        if file.startswith("megatron/"):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(installed_path(file), tmp_path / file)
    for cached in (sources._source, sources.installed_version):
        monkeypatch.setattr(sources, cached.__name__, cached.__wrapped__)
    monkeypatch.setattr(
        sources,
        "installed_path",
        lambda f: tmp_path / f if f.startswith("megatron/") else installed_path(f),
    )
    return tmp_path


def set_version(folder: Path, version: str) -> None:
    (folder / "megatron" / "core" / "package_info.py").write_text(f"__version__ = {version!r}")


def change_evaluate(folder: Path) -> None:
    file = folder / "megatron" / "training" / "training.py"
    source = file.read_text()
    file.write_text(source.replace("def evaluate(\n", "def evaluate(\n    more=1,\n"))
    assert file.read_text() != source


def test_every_function_has_a_digest_of_the_tested_versions():
    """`constraints.txt` pins what the tests run with."""
    for package in ("megatron-core", "torch"):
        version = importlib.metadata.version(package).partition("+")[0]
        assert version_of_tests(f"{package} 0.0") == f"{package} {version}"
        assert f"{package} {version}" in known_digests()
        assert f"{package}=={version}" in Path("constraints.txt").read_text().splitlines()
    known = {f for digests in known_digests().values() for f in digests}
    assert known == set(FUNCTIONS), "run python -m megatron_profit.megatron_patches --accept"


def test_the_installed_functions_are_the_known_ones(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["", "--check"])
    main()
    for line in capsys.readouterr().out.splitlines():
        found, of = line.partition(": ")[2].removesuffix(" functions are known").split(" of ")
        assert int(found) == int(of) > 10


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("function", "a + b", "a - b"),
        ("function", "@decorated", "@decorated(1)"),
        ("function", "    a, b ", "    a, b=0 "),
        ("Class.method", "1, 2]", "1, 3]"),
        ("Class.other", "@property", "@cached_property"),
        ("Class", "limit: int = 2", "limit: int = 3"),
        ("Class.limit", "limit: int = 2", "limit: int = 3"),
        ("LIMIT", "LIMIT = 1", "LIMIT = 2"),
        ("HAVE", "HAVE = False", "HAVE = None"),
        ("method", "return 4", "return 5"),
    ],
)
def test_a_digest_changes_with_its_definition_only(name, old, new):
    names = ("function", "Class.method", "Class.other", "Class.limit", "LIMIT", "HAVE", "method")
    changed = MODULE.replace(old, new)
    assert changed != MODULE
    assert source_digest(MODULE, name)
    assert source_digest(changed, name) != source_digest(MODULE, name)
    for other in {*names} - {name, name.partition(".")[0] + ".limit"}:
        assert source_digest(changed, other) == source_digest(MODULE, other)


def test_comments_docstrings_and_layout_do_not_count():
    same = (
        MODULE.replace("# two", "# three").replace("the sum", "a sum").replace("a + b", "a  +  b")
    )
    same = same.replace("(\n    a, b", "(a,\n    b")
    assert source_digest(same, "function") == source_digest(MODULE, "function")


@pytest.mark.parametrize("name", ["not_a_function", "Class.function", "functio", "Missing.method"])
def test_what_a_module_does_not_define_has_no_digest(name):
    assert name == "not_a_function" or source_digest(MODULE, name) == ""


def test_another_version_with_the_same_functions_is_accepted(copied_megatron):
    set_version(copied_megatron, "0.19.7+local")
    assert check_upstream(megatron_patches.all_patches()) == [
        "megatron-core 0.19.7 is not the version that the tests ran with (megatron-core 0.19.2); its "
        "functions that are changed here are known"
    ]


def test_a_changed_function_is_refused_by_name(copied_megatron):
    set_version(copied_megatron, "0.19.7")
    change_evaluate(copied_megatron)
    with pytest.raises(UnsupportedVersionError) as refused:
        check_upstream(megatron_patches.all_patches())
    message = str(refused.value)
    for part in (
        f"megatron-core 0.19.7 in {copied_megatron / 'megatron' / 'core'}",
        "evaluate in megatron/training/training.py (patch before-evaluation)",
        *("megatron-core 0.19.2", "megatron-core[training]==0.19.2", "--accept"),
    ):
        assert part in message
    assert "train_step" not in message
    assert "torch" not in message


@pytest.mark.parametrize("found", ["0.17.0", "0.20.0"])
def test_a_version_without_the_functions_is_refused_before_it_is_imported(tmp_path, found):
    """Also one that only lies on PYTHONPATH, as Megatron-LM's checkout does for many."""
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (tmp_path / "megatron" / "__init__.py").touch()
    (core / "__init__.py").write_text("raise SystemExit('imported')")
    set_version(tmp_path, found)
    result = run_python(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from megatron_profit.megatron_patches import activate\nactivate('cpu')\n"
    )
    assert result.returncode != 0
    message = result.stderr.splitlines()[-1]
    for part in (found, str(core), "0.19.2", "pip install"):
        assert part in message


def test_a_missing_megatron_is_refused():
    result = run_python(
        "import sys; sys.modules['megatron'] = None\n"
        "from megatron_profit.megatron_patches import activate\nactivate('cpu')\n"
    )
    message = result.stderr.splitlines()[-1]
    assert "megatron-core none" in message
    assert "pip install 'megatron-core[training]==0.19.2'" in message


def test_reviewed_functions_are_accepted_next_to_the_known_ones(
    copied_megatron, tmp_path, monkeypatch, capsys
):
    set_version(copied_megatron, "0.19.7")
    change_evaluate(copied_megatron)
    shutil.copy(DIGESTS, tmp_path / "digests.json")
    monkeypatch.setattr(sources, "DIGESTS", tmp_path / "digests.json")
    before = known_digests()
    for flag, is_named in (("--accept", True), ("--check", False)):
        monkeypatch.setattr(sys, "argv", ["", flag])
        main()
        named = "megatron/training/training.py:evaluate is " in capsys.readouterr().out
        assert named == is_named
    assert len(check_upstream(megatron_patches.all_patches())) == 1  # it is not the tested version
    written = json.loads((tmp_path / "digests.json").read_text())
    assert written.keys() - before.keys() == {"megatron-core 0.19.7"}
    assert {version: written[version] for version in before} == before
