"""The packages that pyproject.toml lists are the folders that hold code."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings it there
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
# Top-level folders whose packages are imported, and their import name.
HOUSES = {
    "grafting": "grafting",
    "operators": "grafting.operators",
    "kernels": "grafting.kernels",
    "eval": "grafting.eval",
}


@pytest.fixture(scope="module")
def setuptools_table():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


def packages_on_disk():
    found = {}
    for house, name in HOUSES.items():
        for file in (ROOT / house).rglob("__init__.py"):
            inside = file.parent.relative_to(ROOT / house).parts
            found[".".join((name, *inside))] = file.parent.relative_to(ROOT)
    return found


def folder_of(package, package_dir):
    """As setuptools resolves it: the longest listed parent, then the rest of the dotted name."""
    parts, rest = package.split("."), []
    while parts and ".".join(parts) not in package_dir:
        rest.insert(0, parts.pop())
    return Path(package_dir.get(".".join(parts), ""), *rest)


def test_listed_packages_are_the_folders_with_code(setuptools_table):
    assert sorted(setuptools_table["packages"]) == sorted(packages_on_disk())


def test_listed_packages_map_to_their_folders(setuptools_table):
    on_disk = packages_on_disk()
    for package in setuptools_table["packages"]:
        assert folder_of(package, setuptools_table["package-dir"]) == on_disk[package]


def test_every_folder_with_code_is_a_package():
    for house in HOUSES:
        for file in (ROOT / house).rglob("*.py"):
            assert (file.parent / "__init__.py").exists(), file


def test_every_listed_package_imports_from_this_checkout(setuptools_table):
    for package in setuptools_table["packages"]:
        origin = importlib.import_module(package).__file__
        assert origin is not None
        if "site-packages" not in origin:  # an editable install, as in development
            assert Path(origin).resolve().is_relative_to(ROOT)


def test_every_data_file_is_shipped(setuptools_table):
    shipped = {
        file
        for package, patterns in setuptools_table["package-data"].items()
        for pattern in patterns
        for file in (ROOT / folder_of(package, setuptools_table["package-dir"])).glob(pattern)
        if file.is_file()
    }
    on_disk = {
        file
        for house in HOUSES
        for file in (ROOT / house).rglob("*")
        if file.is_file() and file.suffix not in (".py", ".pyc")
    }
    assert shipped == on_disk
