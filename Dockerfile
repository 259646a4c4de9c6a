# syntax=docker/dockerfile:1
# The command duet in a container, and the image that Ray's pods run.
#
#   docker build -t duet .
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/work" -u "$(id -u):$(id -g)" duet train dexp --data data --run run
#   docker build -t duet --build-arg EXTRAS=cuda12 --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126 .
#   docker build -t REGISTRY/duet:0.1 --target ray .     # for examples/deploy/rayjob.yaml
#
# torch and DALI bring the libraries of CUDA; the host has the driver, and NVIDIA's container toolkit.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS installed
# DALI by the driver: cuda13 from 580 on, cuda12 from 525 on (TORCH_INDEX then as above).
ARG EXTRAS=cuda13,http,s3,gs,tensorboard
# Where torch comes from: "" is PyPI, a build for CUDA 13.
ARG TORCH_INDEX=
# A compiler: for the kernels of a CPU, and for those that Triton launches.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /usr/src/duet
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
COPY pyproject.toml README.md LICENSE ./
COPY pipeline pipeline
COPY model model
COPY cluster cluster
RUN pip install --no-cache-dir -c constraints.txt ".[$EXTRAS]"

# A job brings its code with it (working_dir), which must win over any that is installed: so none is.
# Rebuild only when pyproject.toml changes. wget is for the probes of KubeRay.
FROM installed AS ray
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends wget \
    && rm -rf /var/lib/apt/lists/* \
    && pip uninstall -y duet-stream \
    && useradd --create-home --uid 1000 ray
USER 1000
WORKDIR /home/ray

FROM installed AS duet
RUN useradd --create-home --uid 1000 duet && install -d -o duet -g duet /work
USER 1000
# A user of another number, as in `docker run -u`, has no home and no name of its own.
ENV HOME=/tmp USER=duet
WORKDIR /work
HEALTHCHECK NONE
ENTRYPOINT ["duet"]
CMD ["--help"]
