# The trainer, for TPUs, GPUs or CPUs:
#
#   docker build --build-arg=EXTRA=tpu --tag=IMAGE .
#
# EXTRA is tpu, cuda or nothing; cuda,gcs for workdirs on gs://. JAX's wheels bring CUDA's libraries; the host needs
# NVIDIA's driver and container toolkit.
FROM python:3.12-slim

ARG EXTRA=""
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1

RUN useradd --create-home --uid=1000 trainer
WORKDIR /walt_jax
COPY pyproject.toml setup.py README.md LICENSE ./
COPY walt_jax walt_jax
COPY configs configs
RUN pip install --editable ".${EXTRA:+[$EXTRA]}"

USER 1000
ENTRYPOINT []
CMD ["python", "-m", "walt_jax.main", "--help"]
