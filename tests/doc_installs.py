# SPDX-License-Identifier: Apache-2.0
"""`pip install` of documents: the real pip, which may download nothing and change nothing."""

from __future__ import annotations

import importlib.metadata
import re
import zipfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version


def arguments(words: list[str], notes: Path) -> list[str]:
    """The words of a rehearsal of `pip install WORDS`: packages that are not installed are empty ones of that name.

    Raises:
        SystemExit: not an installation, or an extra that the package does not have.
    """
    if words[0] != "install":
        raise SystemExit(f"only installations are run: pip {' '.join(words)}")
    wheels = notes / "wheels"
    wheels.mkdir(exist_ok=True)
    for requirement in _requirements(words[1:]):
        if not _installed(requirement):
            _empty_wheel(requirement, wheels)
    short = ["--dry-run", "--no-deps", "--no-index", "--no-build-isolation", "--find-links", str(wheels)]
    return [*words, *(word for word in short if word not in words)]


def _requirements(words: list[str]) -> list[Requirement]:
    """What is named, in words and in files of requirements; the extras of what lies in a folder are checked."""
    found, skip = [], ""
    for word in words:
        if skip == "-r":
            found += _file(Path(word))
        elif not skip and (word.startswith(".") or Path(word).is_dir()):
            _check_extras("vtprune", re.findall(r"\[([\w,-]+)\]", word))
        elif not skip and not word.startswith("-"):
            requirement = Requirement(word)
            _check_extras(requirement.name, [",".join(requirement.extras)] if requirement.extras else [])
            found.append(requirement)
        skip = word if word in ("-r", "-c", "--target", "--find-links", "--index-url", "--extra-index-url") else ""
    return found


def _file(path: Path) -> list[Requirement]:
    lines = (line.split(" #")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    found = []
    for line in lines:
        if line.startswith("-r"):
            found += _file(path.parent / line[2:].strip())
        elif line and not line.startswith(("#", "-")):
            found.append(Requirement(line))
    return found


def _check_extras(name: str, groups: list[str]) -> None:
    """pip only warns, or not even that."""
    if canonicalize_name(name) == "vtprune":
        project = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text(encoding="utf-8")
        table = project.split("[project.optional-dependencies]")[1].split("\n[")[0]  # Python 3.10 has no tomllib
        known = set(re.findall(r"^(\w+) = ", table, re.M))
    elif _version(name) is None:
        return
    else:
        known = set(importlib.metadata.metadata(name).get_all("Provides-Extra") or [])
    for extra in (extra for group in groups for extra in group.split(",")):
        if extra not in known:
            raise SystemExit(f"{name} has no extra {extra}; it has {', '.join(sorted(known))}")


def _version(name: str) -> Version | None:
    try:
        return Version(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return None


def _installed(requirement: Requirement) -> bool:
    version = _version(requirement.name)
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def _empty_wheel(requirement: Requirement, folder: Path) -> None:
    """A package without content, of a version that is asked for."""
    versions = [*(spec.version.removesuffix(".*") for spec in requirement.specifier), "1"]
    version = next(version for version in versions if requirement.specifier.contains(version))
    name = canonicalize_name(requirement.name).replace("-", "_")
    info = f"{name}-{version}.dist-info"
    extras = "".join(f"Provides-Extra: {extra}\n" for extra in requirement.extras)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{extras}")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
