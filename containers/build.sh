#!/usr/bin/env bash
# Build the image, its archive and the SIF of this checkout: containers/build.sh. See containers/README.md.
#
#   DEVICE       cpu or cuda (default cpu; on arm64, cuda, whose packages run without a GPU as well)
#   ENGINE       docker, podman or buildah (default: the first that works; buildah needs no daemon)
#   BASE_IMAGE   any Debian 12 (default debian:bookworm-slim); `debootstrap` makes one from Debian's packages
#   APPTAINER    the program (default apptainer; containers/apptainer.sh where it is not installed)
#   SRI24_SHA256 checksum of the NITRC package in containers/atlas, or at SRI24_URL
set -euo pipefail
cd "$(dirname "$0")/.."

machine=$(uname -m)
if [ "$machine" = arm64 ]; then machine=aarch64; fi
if [ "$machine" = aarch64 ]; then DEVICE=${DEVICE:-cuda}; fi
DEVICE=${DEVICE:-cpu}
BASE_IMAGE=${BASE_IMAGE:-debian:bookworm-slim}
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' bids_uad/__init__.py)
if [ "$DEVICE" = cuda ]; then version=$version-cuda; fi
image=bids_uad:$version
archive=dist/bids_uad-$version.tar

if [ -z "${ENGINE:-}" ]; then
    if docker info >/dev/null 2>&1; then ENGINE=docker; else ENGINE=buildah; fi
fi
case $ENGINE in
    docker) build=(docker build) ;;
    podman) build=(podman build) ;;
    buildah) build=(buildah bud --isolation chroot) ;;
    *) echo "ENGINE is docker, podman or buildah, not $ENGINE" >&2; exit 2 ;;
esac

# Python packages come through this machine's own pip settings (proxies, mirrors, certificates), so that none of
# them ends up in the image, which checks the hashes again and installs without a network.
python3 -m pip download --quiet --no-deps --require-hashes --dest containers/wheels --python-version 3.11 \
    --platform "manylinux_2_28_$machine" --platform "manylinux_2_27_$machine" \
    --platform "manylinux_2_17_$machine" --platform "manylinux2014_$machine" \
    --platform manylinux1_x86_64 --platform any \
    --requirement containers/requirements-build.txt --requirement "containers/requirements-$DEVICE.txt"

if [ "$BASE_IMAGE" = debootstrap ]; then
    BASE_IMAGE=localhost/debian:bookworm
    if ! buildah inspect --type image $BASE_IMAGE >/dev/null 2>&1; then
        root=$(mktemp -d)
        debootstrap --variant=minbase bookworm "$root"
        container=$(buildah from scratch)
        buildah add --quiet "$container" "$root" /
        buildah commit --quiet --rm "$container" $BASE_IMAGE
        rm -rf "$root"
    fi
fi

# A clean environment: in a chroot, settings such as the path of a certificate file would leak into the build.
env -i PATH="$PATH" HOME="$HOME" ${DOCKER_HOST:+DOCKER_HOST="$DOCKER_HOST"} \
    ${STORAGE_DRIVER:+STORAGE_DRIVER="$STORAGE_DRIVER"} "${build[@]}" --tag "$image" \
    --build-arg BASE_IMAGE="$BASE_IMAGE" --build-arg DEVICE="$DEVICE" --build-arg PIP_NO_INDEX=1 \
    --build-arg VERSION="$version" --build-arg REVISION="$(git rev-parse HEAD)" \
    --build-arg CREATED="$(git show --no-patch --format=%cI HEAD)" \
    --build-arg SRI24_URL="${SRI24_URL:-}" --build-arg SRI24_SHA256="${SRI24_SHA256:-}" .

mkdir -p dist
rm -f "$archive"
case $ENGINE in
    docker) docker save --output "$archive" "$image" ;;
    podman) podman save --output "$archive" "$image" ;;
    buildah) buildah push "$image" "docker-archive:$archive:$image" ;;
esac
ls -sh "$archive"

apptainer=${APPTAINER:-apptainer}
if command -v "$apptainer" >/dev/null; then
    scratch=$(mktemp -d)
    chmod 777 "$scratch"  # containers/apptainer.sh works as another user
    "$apptainer" build --build-arg ARCHIVE="$archive" "$scratch/image.sif" Singularity.def
    "$apptainer" test "$scratch/image.sif"
    mv "$scratch/image.sif" "dist/bids_uad-$version.sif"
    rm -r "$scratch"
    ls -sh "dist/bids_uad-$version.sif"
fi
