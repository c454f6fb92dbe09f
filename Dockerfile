# docker build -t deepfm-dist:cpu .
# docker build -t deepfm-dist:cuda --build-arg VARIANT=cuda .
# torch's wheels bring CUDA along; the host needs NVIDIA's driver and container toolkit.
FROM python:3.12-slim

ARG VARIANT=cpu
# pip reads it: the index with PyTorch's CPU builds. Without it, pip installs the build with CUDA.
ARG PIP_EXTRA_INDEX_URL
# Extras of pyproject.toml, such as serve,s3.
ARG EXTRAS
# Triton compiles what launches its kernels, in C, when one is launched first.
# hadolint ignore=DL3008
RUN if [ "$VARIANT" = cuda ]; then apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*; fi
WORKDIR /deepfm_dist
COPY requirements requirements
RUN pip install --no-cache-dir -r "requirements/$VARIANT.txt" \
    && pip install --no-cache-dir --no-deps -r requirements/torchrec.txt
COPY . .
RUN pip install --no-cache-dir --no-deps -e . \
    && if [ -n "$EXTRAS" ]; then pip install --no-cache-dir -e ".[$EXTRAS]"; fi
# Any user may run the image (docker run --user): caches go to a home that all may write.
RUN useradd --no-log-init --create-home --uid 1000 deepfm \
    && chmod 1777 /home/deepfm && chown deepfm /deepfm_dist
ENV HOME=/home/deepfm USER=deepfm
USER 1000
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s \
    CMD ["python", "/deepfm_dist/launch/healthcheck.py"]
CMD ["launch/run_train.sh"]
