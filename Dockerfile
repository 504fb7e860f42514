# syntax=docker/dockerfile:1
# The contract of TGI's image: port 80, models in /data, arguments go to text-generation-launcher.
#
#     docker build -t tgi-server .                            # GPUs of ARCHS, and CPUs
#     docker build -t tgi-server --build-arg ARCHS= --build-arg BUILD_IMAGE=ubuntu:24.04 .    # CPUs
#     docker run --gpus all -p 8080:80 -v "$PWD/data:/data" --user "$(id -u)" tgi-server --model-id OWNER/NAME
#
# The user needs to write to /data: give your own id, as above, or a folder that user 1000 owns. Docker lets any
# user listen on port 80; where that is not so, pass -e PORT=8080. Where there is IPv6 alone, add --hostname ::
# The root may be read-only; nothing but /data is written. BUILD_IMAGE must be of the last stage's release: the virtual
# environment is moved as it is.

ARG BUILD_IMAGE=nvidia/cuda:13.0.1-devel-ubuntu24.04

FROM ${BUILD_IMAGE} AS build
ARG ARCHS=90a
RUN apt-get update && apt-get install -y --no-install-recommends g++ make python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/tgi && /opt/tgi/bin/pip install --no-cache-dir "torch>=2.10" numpy
ENV PATH=/opt/tgi/bin:$PATH
WORKDIR /build
COPY . .
# torch is there already: the build takes its headers instead of downloading it a second time.
RUN TGI_CUDA_ARCHS="${ARCHS}" pip install --no-cache-dir ".[otel]"

FROM ubuntu:24.04
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/* \
    && install -d -o 1000 -g 1000 /data
COPY --from=build /opt/tgi /opt/tgi
ENV PATH=/opt/tgi/bin:$PATH \
    HF_HOME=/data \
    HUGGINGFACE_HUB_CACHE=/data \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PORT=80 \
    PYTHONUNBUFFERED=1
USER 1000:1000
WORKDIR /tmp
VOLUME /data
EXPOSE 80
STOPSIGNAL SIGTERM
ENTRYPOINT ["text-generation-launcher"]
