# syntax=docker/dockerfile:1
# Potstill's two programs with libtorch, for CPUs and NVIDIA GPUs:
#
#   docker build -t potstill:0.1.0 .
#   docker run --rm -v "$PWD:/data" --user "$(id -u):$(id -g)" potstill:0.1.0 launch RUN_FILE --workers 2
#
# The steps are scripts, so that they can be tried without a container builder (scripts/package/README.md).

FROM rust:1.95-slim-bookworm AS build
WORKDIR /potstill
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/potstill/target \
    scripts/package/image/build.sh

# The same Debian as above: programs need a glibc that is no older than the one they were linked with.
FROM debian:bookworm-slim
RUN --mount=type=bind,source=scripts/package/image,target=/image \
    --mount=type=bind,from=build,source=/potstill/dist,target=/dist \
    /image/install.sh /dist/*.whl
ENV PATH=/opt/potstill/bin:/usr/local/bin:/usr/bin:/bin \
    # NVIDIA's container runtime reads these; without it they mean nothing.
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
# By number: Kubernetes' runAsNonRoot cannot judge a name.
USER 1000:1000
# Runs are written to runs/ of this folder.
WORKDIR /data
ENTRYPOINT ["potstill"]
