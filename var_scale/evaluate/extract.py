"""Features of images from a network given by path; reference statistics and their files.

- `tok:MODEL`: the encoder of a model's tokenizer, for the embedded data. Its distance is called
  FD-tok, never FID.
- `script:FILE`: a TorchScript file such as NVIDIA's inception-2015-12-05.pt, called with uint8
  (B, 3, H, W): net(x, return_features=True) returns the 2048 pooled features, and
  net(x, no_output_bias=True) the class probabilities.
- `fidelity:FILE`: torch-fidelity's Inception with its weights file, which also has the spatial
  features of sFID (the first convolution of mixed_6, seven channels).
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from var_scale.data.image_sizes import Size
from var_scale.errors import UserError
from var_scale.evaluate.measures import NEIGHBOURS, SPLIT, inception_score, precision_recall
from var_scale.evaluate.read_images import open_set, require_size
from var_scale.evaluate.source import load_source
from var_scale.files import atomic_file, require_content, sha256_file
from var_scale.model.frechet import Moments, frechet_distance
from var_scale.progress import say

KEPT = 10_000
"""Number of reference features kept for precision and recall, as in the ADM evaluator."""


@dataclass(frozen=True)
class Features:
    """The features of a batch."""

    pool_ND: Tensor
    spatial_NE: Tensor | None = None
    probability_NK: Tensor | None = None


@dataclass(frozen=True)
class Extractor:
    """A network and the name of its distance."""

    name: str
    """identity: kind and checksum of the weights"""
    distance: str
    """FID for Inception features only, FD-tok for those of a tokenizer"""
    run: Callable[[Tensor], Features]
    """maps uint8 (B, 3, H, W) on the CPU to features on the CPU"""
    size: Size | None = None
    """of the images, (height, width); None: any"""


def load_extractor(text: str, device: torch.device) -> Extractor:
    """Load an extractor: `tok:MODEL`, `script:FILE` or `fidelity:FILE`.

    Raises:
        UserError: the text is malformed, or the file is missing or of another kind.
    """
    kind, _, place = text.partition(":")
    place = expanduser(place)
    makers = {"tok": _tokenizer, "script": _script, "fidelity": _fidelity}
    if kind not in makers or not place:
        raise UserError(
            f"extractor {text}: give tok:MODEL, script:FILE.pt or fidelity:FILE.pth",
            code="evaluate.extractor",
        )
    if kind != "tok" and not Path(place).is_file():
        raise UserError(
            f"extractor {text}: {place} does not exist; the weights of Inception cannot be shipped "
            "(docs/how-to/evaluate.md)",
            code="evaluate.extractor",
        )
    if kind != "tok":
        require_content(Path(place))
    return makers[kind](place, device)


def _tokenizer(model: str, device: torch.device) -> Extractor:
    """The encoder of the tokenizer of a model."""
    vae = load_source(model, device).var.vae_proxy[0]

    @torch.no_grad()
    def run(images_B3HW: Tensor) -> Features:
        f_BChw = vae.encode(images_B3HW.to(device).float() / 127.5 - 1)
        # The mean over the whole picture, and over its quarters.
        pooled = [F.adaptive_avg_pool2d(f_BChw, size).flatten(1) for size in (1, 2)]
        return Features(torch.cat(pooled, 1).cpu())

    weights = torch.cat([p.detach().flatten()[:64].cpu().float() for p in vae.encoder.parameters()])
    return Extractor(f"tok:{hash_of(weights)}", "FD-tok", run, vae.image_size)


def last_line(error: Exception) -> str:
    """The last line of a message that is not empty: TorchScript begins with its call stack."""
    return next(
        (line.strip() for line in reversed(str(error).splitlines()) if line.strip()),
        type(error).__name__,
    )


def hash_of(values: Tensor) -> str:
    """A short hash of numbers."""
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]


def _script(file: str, device: torch.device) -> Extractor:
    """A TorchScript file with the interface of NVIDIA's Inception."""
    try:
        net = torch.jit.load(file, map_location=device).eval()
    except RuntimeError as error:
        raise UserError(
            f"extractor script:{file}: is not a TorchScript file ({str(error).splitlines()[0]})",
            code="evaluate.extractor",
        ) from None

    @torch.no_grad()
    def run(images_B3HW: Tensor) -> Features:
        x = images_B3HW.to(device)
        try:
            return Features(
                net(x, return_features=True).float().cpu(),
                None,
                net(x, no_output_bias=True).float().cpu(),
            )
        except RuntimeError as error:
            raise UserError(
                f"extractor script:{file}: does not have the interface of NVIDIA's "
                "inception-2015-12-05.pt, net(uint8 images (B, 3, H, W), return_features=True) and "
                f"no_output_bias=True ({last_line(error)})",
                code="evaluate.extractor",
            ) from None

    return Extractor(f"script:{sha256_file(Path(file))[:16]}", "FID", run)


def _fidelity(file: str, device: torch.device) -> Extractor:
    """The Inception of torch-fidelity."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except Exception as error:  # torchvision built for another torch raises many kinds of errors
        raise UserError(
            f'extractor fidelity:{file}: needs torch-fidelity, `pip install "var-scale[eval]"` '
            f"({error})",
            code="evaluate.extractor",
        ) from None
    try:  # torch-fidelity itself would execute any pickle
        torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"extractor fidelity:{file}: is not a file of plain weights "
            f"({str(error).splitlines()[0]})",
            code="evaluate.extractor",
        ) from None
    net = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=file
    ).to(device)
    spatial: list[Tensor] = []
    net.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, out: spatial.append(out))

    @torch.no_grad()
    def run(images_B3HW: Tensor) -> Features:
        spatial.clear()
        pool_ND, logits_NK = net(images_B3HW.to(device))
        # The order of ADM's reference statistics.
        spatial_Nhwc = spatial[-1][:, :7].permute(0, 2, 3, 1)
        return Features(
            pool_ND.float().cpu(),
            spatial_Nhwc.flatten(1).float().cpu(),
            logits_NK.softmax(-1).float().cpu(),
        )

    return Extractor(f"fidelity:{sha256_file(Path(file))[:16]}", "FID", run)


@dataclass
class Statistics:
    """The statistics of a set of images."""

    count: int
    mean_D: Tensor
    covariance_DD: Tensor
    spatial_mean_E: Tensor | None = None
    spatial_covariance_EE: Tensor | None = None
    pool_ND: Tensor | None = None
    """features for precision and recall; of a reference the first KEPT"""
    probability_NK: Tensor | None = None
    size: Size | None = None
    """of the images, (height, width), if known"""

    def save(self, path: Path, name: str) -> None:
        """Write in the ADM format (mu, sigma, mu_s, sigma_s), with the features for precision and
        recall, the name of the extractor, and the size of the images."""
        arrays: dict[str, Any] = {
            "mu": self.mean_D.numpy(),
            "sigma": self.covariance_DD.numpy(),
            "count": self.count,
            "extractor": name,
        }
        if self.spatial_mean_E is not None and self.spatial_covariance_EE is not None:
            arrays |= {
                "mu_s": self.spatial_mean_E.numpy(),
                "sigma_s": self.spatial_covariance_EE.numpy(),
            }
        if self.size is not None:
            arrays["image_size"] = self.size
        if self.pool_ND is not None:
            arrays["features"] = self.pool_ND[:KEPT].numpy()
        with atomic_file(path) as file:
            np.savez(file, **arrays)


def statistics(
    images: Iterator[np.ndarray], extractor: Extractor, label: str = "features"
) -> Statistics:
    """Means and covariances in float64 of streamed images uint8 (b, H, W, 3); pooled features and
    probabilities are kept.

    Raises:
        UserError: fewer than 2 images.
    """
    pool, spatial, kept, probabilities = None, None, [], []
    count, size = 0, None
    for batch in images:
        found = extractor.run(torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2))))
        pool = pool or Moments(found.pool_ND.shape[1])
        pool.add(found.pool_ND)
        if found.spatial_NE is not None:
            spatial = spatial or Moments(found.spatial_NE.shape[1])
            spatial.add(found.spatial_NE)
        kept.append(found.pool_ND)
        if found.probability_NK is not None:
            probabilities.append(found.probability_NK)
        count, size = count + len(batch), (batch.shape[1], batch.shape[2])
    if pool is None or count < 2:
        raise UserError(
            f"{label}: {count} images; at least 2 are needed for a covariance",
            code="evaluate.too-few",
        )
    result = Statistics(count, pool.mean_D, pool.covariance_DD, pool_ND=torch.cat(kept), size=size)
    if spatial is not None:
        result.spatial_mean_E, result.spatial_covariance_EE = spatial.mean_D, spatial.covariance_DD
    if probabilities:
        result.probability_NK = torch.cat(probabilities)
    return result


def read_reference(path: Path, extractor: Extractor, size: Size | None = None) -> Statistics:
    """The statistics of a reference: images (an npz with only arr_0, a folder of PNGs, or shards),
    or a file of statistics: ours, ADM's VIRTUAL_*.npz (whose arr_0 holds the images for precision
    and recall), or MAR's with only mu and sigma.

    Args:
        size: of the samples (height, width), which are compared with the reference.

    Raises:
        UserError: the file is malformed or comes from another extractor; or, before any work, the
            images have another size than the extractor takes or the samples have.
    """
    path = Path(path)
    if path.suffix == ".npz" and zipfile.is_zipfile(path):
        with np.load(path) as file:
            if "mu" in file:
                return _stored(path, file, extractor, size)
    return features_of(path, extractor, size)


def features_of(path: Path, extractor: Extractor, size: Size | None = None) -> Statistics:
    """The statistics of a set of images.

    Args:
        size: of the samples, if these are their reference.

    Raises:
        UserError: as `read_images`; or, before any work, the images have another size than `size`
            or than the extractor takes.
    """
    found, images = open_set(path)
    require_size(path, found, extractor.size, f"the extractor {extractor.name} takes")
    require_size(path, found, size, "the samples have")
    return statistics(images, extractor, label=f"features of {path.name}")


def _stored(path: Path, file: Any, extractor: Extractor, size: Size | None) -> Statistics:
    """The statistics in an open npz `file`: ours, ADM's or MAR's. Only ours and ADM's record the
    size of the images."""
    if "image_size" in file:
        height, width = (int(side) for side in file["image_size"])
        require_size(path, (height, width), size, "the samples have")
    if "extractor" in file and str(file["extractor"]) != extractor.name:
        raise UserError(
            f"{path}: holds statistics of {file['extractor']}, but the samples are measured with "
            f"{extractor.name}; use the same extractor",
            code="evaluate.extractors-differ",
        )
    tensors = {
        name: torch.from_numpy(file[name]).double()
        for name in ("mu", "sigma", "mu_s", "sigma_s")
        if name in file
    }
    for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if mean == "mu_s" and mean not in tensors:
            continue
        D = tensors[mean].numel()
        if (
            tensors[mean].shape != (D,)
            or covariance not in tensors
            or tensors[covariance].shape != (D, D)
        ):
            shape = tuple(tensors[covariance].shape) if covariance in tensors else "none"
            raise UserError(
                f"{path}: {mean} is {tuple(tensors[mean].shape)} and {covariance} {shape}, but a "
                "mean (D,) and a covariance (D, D) are needed; rewrite the statistics with "
                "`var-scale evaluate stats`",
                code="evaluate.statistics",
            )
        if not (tensors[mean].isfinite().all() and tensors[covariance].isfinite().all()):
            raise UserError(
                f"{path}: {mean} or {covariance} has values that are not finite; rewrite the "
                "statistics",
                code="evaluate.statistics",
            )
    pool = torch.from_numpy(file["features"]) if "features" in file else None
    if pool is None and "arr_0" in file:
        pool = features_of(path, extractor, size).pool_ND
    count = int(file["count"]) if "count" in file else 0
    return Statistics(
        count, tensors["mu"], tensors["sigma"], tensors.get("mu_s"), tensors.get("sigma_s"), pool
    )


def say_if_few(samples: Statistics, extractor: Extractor) -> None:
    """Warn if the covariance does not have full rank: the distance then mostly measures how few
    samples there are."""
    if samples.count <= len(samples.mean_D):
        say(
            f"warning: {samples.count:,} samples for {len(samples.mean_D):,} features; "
            f"{extractor.distance} of so few samples is much too high"
        )


def compare_sets(
    reference: Statistics, samples: Statistics, extractor: Extractor
) -> dict[str, Any]:
    """The metrics that the features allow, with their basis.

    Raises:
        UserError: reference and samples have different numbers of features.
    """
    if reference.mean_D.shape != samples.mean_D.shape:
        raise UserError(
            f"the reference has {len(reference.mean_D)} features per image, the samples "
            f"{len(samples.mean_D)}; use the same extractor",
            code="evaluate.extractors-differ",
        )
    found: dict[str, Any] = {
        extractor.distance: frechet_distance(
            reference.mean_D, reference.covariance_DD, samples.mean_D, samples.covariance_DD
        )
    }
    spread = (
        reference.spatial_mean_E,
        reference.spatial_covariance_EE,
        samples.spatial_mean_E,
        samples.spatial_covariance_EE,
    )
    if all(part is not None for part in spread):
        found["sFID"] = frechet_distance(*spread)  # type: ignore[arg-type]
    if samples.probability_NK is not None:
        found["IS"], found["IS_sd"] = inception_score(samples.probability_NK)
        found["IS_split"] = SPLIT
    if (
        reference.pool_ND is not None
        and samples.pool_ND is not None
        and min(len(reference.pool_ND), len(samples.pool_ND)) > NEIGHBOURS
    ):
        shares = precision_recall(reference.pool_ND[:KEPT], samples.pool_ND)
        found |= {"precision": shares.precision, "recall": shares.recall}
    return found | {
        "samples": samples.count,
        "reference": reference.count,
        "extractor": extractor.name,
    }
