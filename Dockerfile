# Images to run `compress` in: docs/running.md. Built with --target cpu or --target cuda.
FROM python:3.12-slim AS base
# Users without a home, whoever they are: caches lie in /tmp, and torch finds a name for them.
ENV HOME=/nonexistent USER=compress XDG_CACHE_HOME=/tmp/cache HF_HOME=/tmp/cache/huggingface TORCH_HOME=/tmp/cache/torch \
    MPLCONFIGDIR=/tmp/cache/matplotlib PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
ARG PIP_EXTRA_INDEX_URL
WORKDIR /opt/compress
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY compress compress
COPY export export
COPY recipes recipes
RUN HOME=/tmp pip install --no-cache-dir --no-compile -c constraints.txt ".[shards]"

FROM base AS cpu
WORKDIR /srv
USER 10001:10001
ENTRYPOINT ["compress"]

FROM base AS cuda
RUN pip uninstall -y onnxruntime && HOME=/tmp pip install --no-cache-dir --no-compile -c constraints.txt onnxruntime-gpu
WORKDIR /srv
USER 10001:10001
ENTRYPOINT ["compress"]
