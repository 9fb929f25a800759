"""Writes tests/golden/fid.safetensors: images as FID's packages resize them, and metrics of random features.

    pip install torch torchvision torch-fidelity pytorch-fid safetensors && pip install --no-deps clean-fid requests \
        && python tests/golden/make_fid.py

pytorch-fid's resizing is PyTorch's `interpolate`, called here as it does. Of each image every 13th pixel is kept.
"""

import pathlib

import numpy as np

EVERY = 13


def images() -> np.ndarray:
    """In 0..255, uint8 [2, 40, 56, 3]: waves and noise."""
    rng = np.random.RandomState(0)
    y, x = np.meshgrid(np.arange(40), np.arange(56), indexing="ij")
    waves = np.stack([np.sin(0.2 * x + 0.13 * k * y) for k in range(3)], -1)[None]
    return np.clip(127 + 90 * waves + 20 * rng.normal(size=(2, 40, 56, 3)), 0, 255).astype(np.uint8)


def features() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two sets of 50 features of 12 dimensions, and 50 logits of 7 classes."""
    rng = np.random.RandomState(1)
    one, other = rng.normal(size=(50, 12)), 0.3 + 1.2 * rng.normal(size=(50, 12))
    return one.astype(np.float32), other.astype(np.float32), (2 * rng.normal(size=(50, 7))).astype(np.float32)


def main() -> None:
    import torch
    from cleanfid.resize import build_resizer
    from safetensors.numpy import save_file
    from torch_fidelity import metric_fid, metric_isc, metric_kid
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    pictures = images()
    tensor = torch.tensor(pictures).permute(0, 3, 1, 2).float()
    tf1 = (interpolate_bilinear_2d_like_tensorflow1x(tensor, size=(299, 299), align_corners=False) - 128) / 128
    torchs = 2 * torch.nn.functional.interpolate(tensor / 255, (299, 299), mode="bilinear", align_corners=False) - 1
    resizer = build_resizer("clean")
    clean = (np.stack([resizer(picture) for picture in pictures]) - 128) / 128
    answers = {
        "fid_tf1": tf1.permute(0, 2, 3, 1).numpy(),
        "fid_pytorch": torchs.permute(0, 2, 3, 1).numpy(),
        "fid_clean": clean,
    }
    answers = {k: np.ascontiguousarray(v[:, ::EVERY, ::EVERY].astype(np.float32)) for k, v in answers.items()}
    one, other, logits = map(torch.tensor, features())
    options = {"kid_subsets": 2, "kid_subset_size": 50, "kid_kernel": "poly", "kid_kernel_poly_degree": 3}
    options |= {"kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1, "rng_seed": 2020, "verbose": False}
    scores = metric_kid.kid_features_to_metric(one, other, **options)
    scores |= metric_isc.isc_features_to_metric(logits, splits=10, shuffle=True, rng_seed=2020)
    statistics = [metric_fid.fid_features_to_statistics(x) for x in (one, other)]
    scores |= metric_fid.fid_statistics_to_metric(*statistics, verbose=False)
    answers |= {name: np.array([value], np.float64) for name, value in scores.items()}
    save_file(answers, pathlib.Path(__file__).with_name("fid.safetensors"))
    print(scores)


if __name__ == "__main__":
    main()
