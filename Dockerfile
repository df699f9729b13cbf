# diffkd for NVIDIA's GPUs: the command is the entry point, /work the folder that it works in.
#   docker build -t diffkd .
#   docker run --rm --gpus all --ipc host --user "$(id -u):$(id -g)" -v "$PWD:/work" diffkd distill mine.yaml
# The wheels of torch bring the libraries of CUDA; of the base image the driver's side is needed.
FROM nvidia/cuda:12.8.1-base-ubuntu24.04

# gcc and Python's headers: kernels of training.compile and --mode compile are built when they are first used
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/diffkd/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/diffkd

# torch in a layer of its own, which a change of diffkd leaves as it is
WORKDIR /src
COPY constraints.txt ./
RUN pip install --constraint constraints.txt torch

ARG EXTRAS=digits,datasets,report,dino,text,lora,quant
COPY pyproject.toml README.md LICENSE ./
COPY diffkd diffkd
RUN pip install --constraint constraints.txt ".[$EXTRAS]"
COPY configs /opt/diffkd/configs

# Whoever it runs as (--user) may write into the home and /work; libraries ask for the name of their user
ENV HOME=/home/diffkd USER=diffkd
RUN useradd --create-home --uid 10001 diffkd && mkdir /work && chmod 1777 /home/diffkd /work
USER 10001
WORKDIR /work
ENTRYPOINT ["diffkd"]
CMD ["--help"]
