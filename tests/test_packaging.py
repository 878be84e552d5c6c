"""What wheels hold, with and without native kernels, and that imports are of declared packages."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from imports import PACKAGES, ROOT, all_imports
from packaging.requirements import Requirement

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# name imported -> name installed, where they differ
DISTRIBUTIONS = {
    "PIL": "pillow",
    "pynvml": "nvidia-ml-py",
    "torch.utils.tensorboard": "tensorboard",
}
# built where the loader looks for it, beside the package's __init__.py
LIBRARY = re.compile(r"fastscore_kernels/lib/libfastscore_native\.(so|dylib|dll)")
NAME = f"fastscore-{PROJECT['project']['version']}"
PURE = f"{NAME}-0_without_native_kernels-py3-none-any.whl"
NO_COMPILER = {"CXX": "/nonexistent/c++"}
compiler = pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))),
    reason="no C++ compiler to build the native kernels with",
)

# calls a hook of the build backend as installers do, and prints its result last
HOOK = """
import sys
from scikit_build_core import build
print(getattr(build, sys.argv[1])(*sys.argv[2:]))
"""
# no .pth file is read but in the folder tested: the installation we run from would be found first
PATHS = """
import site, sys
sys.path[:0] = sys.argv[1:2]
site.addsitedir(sys.argv[1])
sys.path += sys.argv[2:]
"""
PROBLEM = """
import fastscore_kernels
from fastscore_kernels import library
assert fastscore_kernels.__file__.startswith(sys.argv[1]), fastscore_kernels.__file__
print(library.problem())
"""
SERVED = """
import fastscore, fastscore_kernels.written_later
print(fastscore_kernels.written_later.VALUE, fastscore_kernels.__file__, fastscore.__file__)
"""


@dataclass(frozen=True)
class Built:
    """A wheel, what was printed while it was built, and the tree it was built in."""

    path: Path
    output: str
    tree: Path

    @property
    def files(self) -> set[str]:
        with zipfile.ZipFile(self.path) as archive:
            return {n for n in archive.namelist() if ".dist-info/" not in n}


def hook(name: str, tree: Path, *arguments: Path, **env: str) -> subprocess.CompletedProcess[str]:
    # without optimisation the library is built in a quarter of the time, from the same files
    env = os.environ | {"CMAKE_BUILD_TYPE": "Debug", "FASTSCORE_NATIVE": "auto"} | env
    command = [sys.executable, "-c", HOOK, name, *map(str, arguments)]
    return subprocess.run(
        command, cwd=tree, env=env, capture_output=True, text=True, errors="replace", check=False
    )


def build(kind: str, tree: Path, out: Path, **env: str) -> Built:
    run = hook(f"build_{kind}", tree, out, **env)
    assert run.returncode == 0, run.stdout + run.stderr
    return Built(out / run.stdout.split()[-1], run.stdout + run.stderr, tree)


def files_of_packages(source: Path) -> dict[str, Path]:
    """Every file of the packages by its name in an installation, but for the library."""
    files = {}
    for folder, name in PACKAGES.items():
        for path in filter(Path.is_file, (source / folder).rglob("*")):
            parts = path.relative_to(source / folder).parts
            if folder != "kernels" or parts[0] not in {"native", "lib"}:
                files["/".join((name, *parts))] = path
    return files


def run_isolated(script: str, wheel: Built, folder: Path) -> str:
    """What a script prints in an interpreter where a wheel is unpacked into ``folder``."""
    with zipfile.ZipFile(wheel.path) as archive:
        archive.extractall(folder)
    command = [sys.executable, "-S", "-c", PATHS + script, str(folder), *filter(None, sys.path)]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of this tree, as somebody clones it."""
    source = tmp_path_factory.mktemp("packaging") / "source"
    for name in (*PACKAGES, "bench", "docs", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "lib")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    # left by somebody's build for another machine: nothing may take it along
    (source / "kernels" / "lib").mkdir()
    (source / "kernels" / "lib" / "libfastscore_native.so").write_bytes(b"stale")
    return source


@pytest.fixture(scope="module")
def tree(source) -> Path:
    """The unpacked source distribution, in which an installer builds without our files."""
    work = source.parent
    archive = build("sdist", source, work).path
    with tarfile.open(archive) as sdist:
        sdist.extractall(work, filter="data")
    return work / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def without(tree, tmp_path_factory) -> Built:
    """A wheel built where no compiler is, from a tree where a library lies around."""
    copy = tmp_path_factory.mktemp("pure") / "tree"
    shutil.copytree(tree, copy)
    (copy / "kernels" / "lib").mkdir(exist_ok=True)
    (copy / "kernels" / "lib" / "libfastscore_native.so").write_bytes(b"stale")
    return build("wheel", copy, copy.parent, **NO_COMPILER)


@pytest.fixture(scope="module")
def native(tree) -> Built:
    """A wheel with the native kernels."""
    return build("wheel", tree, tree.parent, FASTSCORE_NATIVE="required")


def test_source_distribution_holds_all_that_is_built(source, tree):
    sources = [source / "CMakeLists.txt", *(source / "kernels" / "native").rglob("*")]
    for path in filter(Path.is_file, sources):
        copy = tree / path.relative_to(source)
        assert copy.read_bytes() == path.read_bytes(), path
    assert (tree / "tests" / Path(__file__).name).is_file()
    stale = tree / "kernels" / "lib" / "libfastscore_native.so"
    assert not stale.exists() or stale.read_bytes() != b"stale"


def assert_files(wheel: Built, source: Path, libraries: int) -> None:
    """All of the packages, as the sources have them, that many libraries, and nothing else."""
    found = {name for name in wheel.files if LIBRARY.fullmatch(name)}
    assert len(found) == libraries
    expected = files_of_packages(source)
    assert wheel.files - found == set(expected)
    with zipfile.ZipFile(wheel.path) as archive:
        for name, path in expected.items():
            assert archive.read(name) == path.read_bytes(), name


class TestWithoutCompiler:
    def test_wheel_holds_all_of_the_packages_and_no_library(self, source, without):
        assert without.path.name == PURE
        assert_files(without, source, libraries=0)

    def test_says_what_is_lost_and_how_to_get_it(self, without):
        assert "installed WITHOUT its native CPU kernels, whose build failed" in without.output
        assert "slower on a CPU" in without.output
        assert "install a C++17 compiler" in without.output
        assert "/nonexistent/c++" in without.output

    def test_package_works_and_says_so_again(self, without, tmp_path):
        found = run_isolated(PROBLEM, without, tmp_path)
        assert "native kernels were not built when fastscore was installed" in found

    def test_wheel_carries_license_and_command(self, without):
        with zipfile.ZipFile(without.path) as archive:
            info = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
            folder = info.rpartition("/")[0]
            assert "MIT License" in archive.read(f"{folder}/licenses/LICENSE").decode()
            scripts = archive.read(f"{folder}/entry_points.txt").decode()
            assert re.search(r"^fastscore *= *fastscore\.cli:main$", scripts, re.MULTILINE)
            assert "License-Expression: MIT" in archive.read(info).decode()

    def test_is_an_error_where_the_kernels_are_required(self, tree, tmp_path):
        env = NO_COMPILER | {"FASTSCORE_NATIVE": "required"}
        run = hook("build_wheel", tree, tmp_path, **env)
        assert run.returncode != 0
        assert "FASTSCORE_NATIVE=required: the native CPU kernels" in run.stdout
        assert not list(tmp_path.iterdir())

    def test_missing_cmake_is_asked_for_and_else_done_without(self, tree, tmp_path):
        path = {"PATH": "/nonexistent"}
        asked = hook("get_requires_for_build_wheel", tree, **path).stdout
        assert "cmake>=3.20" in asked
        assert "ninja>=1.11" in asked
        wheel = build("wheel", tree, tmp_path, **path)
        assert wheel.path.name == PURE
        assert "CMake 3.20 or later was not found" in wheel.output


class TestChoice:
    def test_off_asks_for_nothing_and_builds_nothing(self, tree, tmp_path):
        off = {"PATH": "/nonexistent", "FASTSCORE_NATIVE": "off"}
        assert hook("get_requires_for_build_wheel", tree, **off).stdout.strip() == "[]"
        wheel = build("wheel", tree, tmp_path, FASTSCORE_NATIVE="off")
        assert wheel.path.name == PURE
        assert "CMake" not in wheel.output
        assert not any(map(LIBRARY.fullmatch, wheel.files))

    @pytest.mark.parametrize("value", ["on", "Off", "0", "requiredd"])
    def test_other_values_are_refused(self, tree, tmp_path, value):
        run = hook("build_wheel", tree, tmp_path, FASTSCORE_NATIVE=value)
        assert run.returncode != 0
        assert "FASTSCORE_NATIVE must be auto, required or off" in run.stdout
        assert not list(tmp_path.iterdir())

    def test_editable_installation_serves_the_tree(self, tree, tmp_path):
        served = tmp_path / "tree"
        shutil.copytree(tree, served)
        wheel = build("editable", served, tmp_path, FASTSCORE_NATIVE="off")
        # only the redirection is installed, no copies that would grow stale
        names = {"_editable_skbc_fastscore.py", "_editable_skbc_fastscore.pth"}
        assert wheel.files == names
        (served / "kernels" / "written_later.py").write_text("VALUE = 7\n")
        found = run_isolated(SERVED, wheel, tmp_path / "site")
        files = [str(served / folder / "__init__.py") for folder in ("kernels", "fastscore")]
        assert found.split() == ["7", *files]


@compiler
class TestWithCompiler:
    def test_wheel_holds_all_of_the_packages_and_one_library(self, source, native):
        assert re.fullmatch(re.escape(NAME) + r"-py3-none-(?!any)\w+\.whl", native.path.name)
        assert_files(native, source, libraries=1)

    def test_library_loads_beside_torch(self, native, tmp_path):
        assert run_isolated(PROBLEM, native, tmp_path) == ""

    def test_tree_has_the_library_where_an_editable_installation_looks(self, native):
        (library,) = (native.tree / "kernels" / "lib").iterdir()
        with zipfile.ZipFile(native.path) as archive:
            assert archive.read(f"fastscore_kernels/lib/{library.name}") == library.read_bytes()


def names_of(requirements: list[str]) -> set[str]:
    return {re.match(r"[A-Za-z0-9._-]+", r).group().lower() for r in requirements}


def test_every_import_is_of_a_declared_dependency():
    required = names_of(PROJECT["project"]["dependencies"])
    extras = PROJECT["project"]["optional-dependencies"]
    optional = set().union(*(names_of(v) for v in extras.values()))
    undeclared = []
    for i in all_imports():
        if i.ours or i.typing:
            continue
        package = DISTRIBUTIONS.get(i.target, DISTRIBUTIONS.get(i.root, i.root))
        package = package.lower().replace("_", "-")
        if package not in (required | optional if i.lazy else required):
            undeclared.append(f"{i.importer}, line {i.line}: {package}")
    assert not undeclared


def test_test_extra_installs_everything_optional():
    """In a fresh environment nothing is skipped for want of a package, except by choice."""
    extras = PROJECT["project"]["optional-dependencies"]
    listed = re.search(r"fastscore\[(.*?)\]", " ".join(extras["test"])).group(1).split(",")
    assert set(listed) == set(extras) - {"test", "bench"}
    for extra in (*listed, "test"):
        for requirement in map(Requirement, extras[extra]):
            installed = importlib.metadata.version(requirement.name)
            assert requirement.specifier.contains(installed), f"{requirement}: {installed} is here"
