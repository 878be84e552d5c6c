"""What a wheel holds, and that every package imported is one the metadata asks for."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from imports import PACKAGES, ROOT, all_imports, source_files
from packaging.requirements import Requirement

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# name imported -> name installed, where they differ
DISTRIBUTIONS = {
    "PIL": "pillow",
    "pynvml": "nvidia-ml-py",
    "torch.utils.tensorboard": "tensorboard",
}

BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, f"build_{sys.argv[2]}")(sys.argv[1]))
"""


def build(kind: str, source: Path, out: Path) -> Path:
    command = [sys.executable, "-c", BUILD, str(out), kind]
    run = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return out / run.stdout.split()[-1]


def files_in_tree() -> set[str]:
    """Every file of the packages as an installation should have it."""
    names = set()
    for folder, name in PACKAGES.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix != ".pyc":
                names.add(f"{name}/{path.relative_to(ROOT / folder).as_posix()}")
    return names


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from the unpacked source distribution, as an installer would without ours."""
    work = tmp_path_factory.mktemp("packaging")
    tree = work / "tree"
    tree.mkdir()
    for name in (*PACKAGES, "bench", "docs", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    archive = build("sdist", tree, work)
    with tarfile.open(archive) as sdist:
        sdist.extractall(work, filter="data")
    return build("wheel", work / archive.name.removesuffix(".tar.gz"), work)


def test_wheel_holds_all_of_the_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
        assert names == files_in_tree()
        for name in names:
            folder = "kernels" if name.startswith("fastscore_kernels/") else "fastscore"
            path = ROOT / folder / name.partition("/")[2]
            assert archive.read(name) == path.read_bytes(), name


def test_wheel_carries_license_and_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        info = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        folder = info.rpartition("/")[0]
        assert "MIT License" in archive.read(f"{folder}/licenses/LICENSE").decode()
        scripts = archive.read(f"{folder}/entry_points.txt").decode()
        assert "fastscore = fastscore.cli:main" in scripts
        assert "License-Expression: MIT" in archive.read(info).decode()


def test_packages_listed_are_those_that_exist():
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    files = source_files()
    assert listed == {name for name, path in files.items() if path.name == "__init__.py"}


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
