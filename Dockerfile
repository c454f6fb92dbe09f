# docker build -t deepfm-dist:cpu .
# docker build -t deepfm-dist:cuda --build-arg VARIANT=cuda .
# torch's wheels bring CUDA along; the host needs NVIDIA's driver and container toolkit.
FROM python:3.12-slim

ARG VARIANT=cpu
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
RUN pip install --no-cache-dir --no-deps -e .
CMD ["launch/run_train.sh"]
