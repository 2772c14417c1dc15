# distseg and all that it needs, for CPUs and for NVIDIA GPUs. How to build and use it: docs/containers.md
#   docker build --tag distseg .                                          torch of pip's own index: with CUDA's libraries
#   docker build --tag distseg:cpu --build-arg TORCH_INDEX=URL .          torch of another index, such as the CPU builds'
#   docker build --build-arg BASE=IMAGE ...                               another Debian or Ubuntu with Python >= 3.10
ARG BASE=debian:bookworm-slim
# hadolint ignore=DL3006
FROM ${BASE}

# python3 is the base's own, so that any Debian or Ubuntu will do; versions are the base's as well
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/distseg
ENV PATH=/opt/distseg/bin:$PATH PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# torch by itself, before anything that changes oftener: of all layers it is the largest
ARG TORCH_INDEX=
# hadolint ignore=DL3013
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch>=2.8,<2.14"

# only what the wheel is made of: a change elsewhere builds nothing anew
ARG EXTRAS=pretrained,deepspeed
COPY pyproject.toml README.md LICENSE /tmp/distseg/
COPY distseg /tmp/distseg/distseg
COPY shards /tmp/distseg/shards
COPY launchers /tmp/distseg/launchers
# hadolint ignore=DL3013
RUN pip install "/tmp/distseg[$EXTRAS]" && python -c "import distseg, torch" && distseg --help >/dev/null

# nothing here needs root; --user of docker run, Apptainer and enroot set the caller's own id instead
RUN useradd --create-home --uid 1000 distseg && mkdir /work && chown 1000 /work
USER 1000
WORKDIR /work
CMD ["distseg", "--help"]
