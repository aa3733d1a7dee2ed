# SPDX-License-Identifier: Apache-2.0
"""Builds a Kernel Hub repository from `kernels/`: `build/torch-BACKEND/` with sources and metadata.

    python scripts/build_kernel.py [--out build/kernel]

The sources are Python and Triton, which Hugging Face's kernel-builder only copies; this script does the same without
the builder. `get_local_kernel` of the package `kernels` loads the result.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROJECT = ROOT / "kernels"


def read_config() -> dict[str, object]:
    """Name, version, license and backends from build.toml, parsed without tomllib (Python 3.11)."""
    text = (PROJECT / "build.toml").read_text(encoding="utf-8")
    found: dict[str, object] = dict(re.findall(r'^(\w+) = "([^"]*)"', text, re.M))
    found["version"] = int(re.search(r"^version = (\d+)", text, re.M)[1])  # type: ignore[index]
    found["backends"] = re.findall(r'"(\w+)"', re.search(r"^backends = \[(.*?)\]", text, re.M)[1])  # type: ignore[index]
    return found


def digest(folder: Path) -> dict[str, object]:
    """Digests of all files of a build, with which `kernels` detects changes."""
    files = {
        path.relative_to(folder).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    return {"algorithm": "sha256", "files": files}


def build(out: Path) -> list[Path]:
    """Empties `out`, writes the repository to it, and returns the folders of its builds."""
    config = read_config()
    package = str(config["name"]).replace("-", "_")
    source = PROJECT / "torch-ext" / package
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for name in ("README.md", "build.toml"):
        shutil.copy2(PROJECT / name, out)
    shutil.copy2(ROOT / "LICENSE", out)
    builds = []
    for backend in config["backends"]:  # type: ignore[attr-defined]
        folder = out / "build" / f"torch-{backend}"
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("__pycache__"))
        found = digest(folder)
        unique = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:12]
        metadata = {
            "name": config["name"],
            "id": f"_{package}_{backend}_{unique}",
            "version": config["version"],
            "license": config["license"],
            "python-depends": [],
            "backend": {"type": backend},
            "digest": found,
        }
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
        builds.append(folder)
    return builds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "kernel", metavar="FOLDER")
    args = parser.parse_args()
    for folder in build(args.out):
        print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
