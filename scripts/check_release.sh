#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds what a release publishes into dist/, build/kernel and build/space, and checks it without a network.
#   scripts/check_release.sh PYTHON [TAG]     PYTHON has what requirements/release.txt and requirements/runtime.txt name
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1") tag=${2:-}  # absolute: one step runs in another folder
"$python" scripts/release_notes.py --check "$tag"
rm -rf dist build/lib build/try
"$python" -m build --no-isolation --outdir dist .
"$python" -m twine check --strict dist/*
# W002: both models have the same tokenizer and chat template.
"$python" -m check_wheel_contents --ignore W002 --toplevel vtprune,vtprune_kernels dist/*.whl
"$python" scripts/build_kernel.py --out build/kernel
"$python" scripts/build_space.py dist/*.whl --out build/space
# The wheel as a user has it, without this folder on the path.
"$python" -m pip --disable-pip-version-check install --quiet --no-deps --target build/try dist/*.whl
(cd build/try && PYTHONPATH=$PWD "$python" -P -c 'import sys, vtprune; sys.exit("build/try" not in vtprune.__file__)' &&
  PYTHONPATH=$PWD HF_HUB_OFFLINE=1 "$python" -P -m vtprune demo --repeats 1 --output ../demo.png)
rm -rf build/try
echo "release: $(ls dist | tr '\n' ' ')ok"
