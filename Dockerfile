# unbraid in a container. CPU:   docker build -t unbraid .
# NVIDIA cards (PyPI's torch, which brings CUDA's libraries along; the host needs the NVIDIA Container Toolkit):
#   docker build -t unbraid:cuda --build-arg TORCH_INDEX=https://pypi.org/simple .
#   docker run --rm --gpus all -v "$PWD:/work" unbraid:cuda split my.png --subject dog --style ink
FROM python:3.13-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

COPY constraints.txt /source/
RUN pip install --no-cache-dir -c /source/constraints.txt torch --index-url "$TORCH_INDEX" --extra-index-url https://pypi.org/simple

COPY pyproject.toml README.md LICENSE /source/
COPY src /source/src
RUN pip install --no-cache-dir -c /source/constraints.txt "/source[studio]" && rm -rf /source

# Runs, downloads and caches belong to the user who runs the container, and not to root.
RUN useradd --create-home --uid 1000 unbraid
USER unbraid
ENV HF_HOME=/home/unbraid/.cache/huggingface
WORKDIR /work
EXPOSE 7860
ENTRYPOINT ["unbraid"]
CMD ["--help"]
