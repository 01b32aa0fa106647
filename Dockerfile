# Thaw in a container: JupyterLab by default, `thaw ...` for batch. docs/docker.md has the commands.
#
# The lock decides what the image is: requirements-gpu.lock brings CUDA and cuDNN as wheels, so that the base can be any
# plain Debian or Ubuntu whose Python suits pyproject.toml; with LOCK=requirements.lock the same file makes the image
# without GPU, half the size. Layers stand in the order in which they change: system, packages, weights, code.
ARG BASE=debian:bookworm-slim
FROM ${BASE}

# cv2 loads libGL and GLib; the weights of Keras are downloaded over the system's certificates. Debian deletes old
# versions of its packages from its mirrors, so none is pinned.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates libgl1 libglib2.0-0 python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

# Behind a mirror, build with `--secret id=pip.conf,src=pip.conf`; no trace of it stays in the image.
ENV PATH=/opt/venv/bin:$PATH
ARG LOCK=requirements-gpu.lock
COPY ${LOCK} /opt/requirements.lock
RUN --mount=type=secret,id=pip.conf --mount=type=cache,target=/root/.cache/pip \
    export PIP_CONFIG_FILE=/run/secrets/pip.conf PIP_DISABLE_PIP_VERSION_CHECK=1 \
    && python3 -m venv /opt/venv \
    && pip install --quiet --require-hashes --requirement /opt/requirements.lock

# NVIDIA's wheels keep their libraries where only TensorFlow looks: ldconfig shows them to all programs. The project
# belongs to root and is only read; any user of the container, by `--user` with any uid, may write to data and runs, to
# the home folder and to the weights.
RUN find /opt/venv/lib -type d -path '*/site-packages/nvidia/*/lib' > /etc/ld.so.conf.d/nvidia-wheels.conf \
    && ldconfig \
    && useradd --non-unique --uid 1000 --create-home thaw \
    && install -d -m 1777 /home/thaw /opt/keras /thaw/data /thaw/runs
ENV KERAS_HOME=/opt/keras NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /thaw

COPY helpers helpers
ARG PREFETCH=""
# hadolint ignore=SC2086
RUN if [ -n "${PREFETCH}" ]; then python -m helpers.cli.main prefetch ${PREFETCH} && chmod -R a+rwX /opt/keras; fi

COPY pyproject.toml README.md LICENSE ./
RUN pip install --quiet --no-deps --no-build-isolation --no-cache-dir --editable .
COPY notebooks notebooks
COPY recipes recipes

ENV HOME=/home/thaw
USER 1000:1000
EXPOSE 8888
# /api answers without a token, and with nothing but a version. Batch runs have no Lab: start them with --no-healthcheck.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8888/api', timeout=9)"]
# Lab asks for a token: that of $JUPYTER_TOKEN, or one that it makes and prints. It refuses to run as root. It listens on
# every interface of the container; publish the port on the host's loopback only.
CMD ["jupyter", "lab", "--no-browser", "--ServerApp.ip=0.0.0.0", "--ServerApp.port=8888", "--ServerApp.port_retries=0"]
