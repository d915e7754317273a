# The image of bids_uad: `docker build -t bids_uad .`, or containers/build.sh (see containers/README.md).
ARG BASE_IMAGE=debian:bookworm-slim


FROM ${BASE_IMAGE} AS python
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/cache/apt/archives/*.deb


FROM python AS builder
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends python3-venv
# Packages are installed from containers/wheels, else from pip's index; PIP_NO_INDEX=1 disables the index.
ARG PIP_NO_INDEX=
ARG PIP_EXTRA_INDEX_URL=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_DEPS=1
WORKDIR /build

COPY containers/requirements-build.txt ./
RUN --mount=type=bind,source=containers/wheels,target=/wheels \
    python3 -m venv tools \
    && tools/bin/pip install --require-hashes --find-links /wheels --requirement requirements-build.txt

# Of the locked build of PyTorch for CPUs there are packages for x86-64 only: on arm64, DEVICE is cuda.
ARG DEVICE=cpu
COPY containers/requirements-${DEVICE}.txt requirements.txt
# For arm64, antspyx has no package. Its build downloads ITK and ANTs by Git, and takes about an hour.
RUN --mount=type=bind,source=containers/wheels,target=/wheels \
    if [ "$(dpkg --print-architecture)" = arm64 ]; then \
        DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
            ca-certificates cmake g++ git make python3-dev \
        && sed -n '/^antspyx==/,/[^\\]$/p' requirements.txt > antspyx.txt \
        && sed -i '/^antspyx==/,/[^\\]$/d' requirements.txt \
        && tools/bin/pip wheel --require-hashes --no-build-isolation --find-links /wheels --wheel-dir dist \
            --requirement antspyx.txt; \
    fi
RUN --mount=type=bind,source=containers/wheels,target=/wheels \
    python3 -m venv /opt/bids_uad \
    && /opt/bids_uad/bin/pip install --require-hashes --no-build-isolation --find-links /wheels \
        --requirement requirements.txt

COPY pyproject.toml README.md LICENSE ./
COPY boilerplate boilerplate
COPY bids_uad bids_uad
RUN tools/bin/pip wheel --no-build-isolation --wheel-dir dist . && /opt/bids_uad/bin/pip install dist/*.whl

# A TemplateFlow archive: empty but for a note (so that nothing is unpacked into it), or with the SRI24 atlas.
ARG SRI24_URL=
ARG SRI24_SHA256=
RUN --mount=type=bind,source=containers,target=/containers \
    /opt/bids_uad/bin/python /containers/bake_atlas.py /containers/atlas /opt/templateflow


FROM python
COPY --from=builder /opt/templateflow /opt/templateflow
COPY --from=builder /opt/bids_uad /opt/bids_uad
# Login shells, in which Boutiques and Nipoppy start the program, set PATH to the folders of the system.
RUN ln -s /opt/bids_uad/bin/bids_uad /usr/local/bin/bids_uad

ARG VERSION=
ARG REVISION=
ARG CREATED=
ARG BASE_IMAGE
# Nothing is written to the image or to HOME: caches go to /tmp, bytecode is there already, nothing is downloaded.
ENV PATH=/opt/bids_uad/bin:/usr/local/bin:/usr/bin:/bin \
    LANG=C.UTF-8 \
    PYTHONNOUSERSITE=1 PYTHONDONTWRITEBYTECODE=1 \
    TEMPLATEFLOW_HOME=/opt/templateflow TEMPLATEFLOW_AUTOUPDATE=0 TEMPLATEFLOW_USE_DATALAD=0 \
    MPLCONFIGDIR=/tmp/bids_uad-cache/matplotlib XDG_CACHE_HOME=/tmp/bids_uad-cache \
    NIPYPE_NO_ET=1 NO_ET=1 \
    BIDS_UAD_CONTAINER_TYPE=docker BIDS_UAD_CONTAINER_TAG=bids_uad${VERSION:+:${VERSION}}
LABEL org.opencontainers.image.title="bids_uad" \
    org.opencontainers.image.description="A BIDS App that detects anomalies in brain MRI. Not for clinical use." \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.created="${CREATED}" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.base.name="${BASE_IMAGE}"

COPY containers/smoke_test.py /opt/bids_uad/smoke_test.py
RUN python /opt/bids_uad/smoke_test.py && rm -rf /tmp/*
WORKDIR /tmp
ENTRYPOINT ["/opt/bids_uad/bin/bids_uad"]
