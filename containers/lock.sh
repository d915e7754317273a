#!/usr/bin/env bash
# Lock what goes into the image, with hashes: TORCH_CPU=WHERE containers/lock.sh. Needs uv (pip install uv).
# WHERE is a folder or a page of links that offers the CPU build of torch, which the default index does not have.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${TORCH_CPU:?a folder or a page of links that offers the CPU build of torch}"

lock() {
    uv pip compile --quiet --generate-hashes --no-annotate --no-header --constraint constraints.txt \
        --python-version 3.11 --python-platform x86_64-manylinux_2_28 "$@"
}

lock pyproject.toml --output-file containers/requirements-cuda.txt
echo 'torch==2.13.0+cpu' |
    lock pyproject.toml --overrides - --find-links "$TORCH_CPU" --output-file containers/requirements-cpu.txt
# scikit-build-core and nanobind build antspyx on arm64, in the versions that it requires.
printf '%s\n' hatchling scikit-build-core 'nanobind<2.6' | lock - --output-file containers/requirements-build.txt
