"""Features of images, from a network given by path; reference statistics and their files.

`tok:MODEL`: the tokenizer's encoder, embedded, so that the embedded data can be measured; its distance is named FD-tok, never FID.
`script:FILE`: a TorchScript file such as NVIDIA's inception-2015-12-05.pt, called with uint8 (B, 3, H, W): net(x, return_features=True)
gives the 2048 pooled features, net(x, no_output_bias=True) the class probabilities. `fidelity:FILE`: torch-fidelity's Inception with its
weights file, which has the spatial features of sFID too (the first convolution of mixed_6, seven channels).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from var_scale.errors import UserError
from var_scale.evaluate.generate import read_images
from var_scale.evaluate.measures import SPLIT, inception_score, precision_recall
from var_scale.evaluate.source import load_source
from var_scale.files import atomic_file, sha256_file
from var_scale.model.frechet import Moments, frechet_distance
from var_scale.progress import progress, say

KEPT = 10_000
"""features of the reference that are kept for precision and recall, as the ADM evaluator does"""


@dataclass(frozen=True)
class Features:
    """Of a batch."""

    pool_ND: Tensor
    spatial_NE: Tensor | None = None
    probability_NK: Tensor | None = None


@dataclass(frozen=True)
class Extractor:
    """A network and the name of its distance."""

    name: str
    """identity: kind and checksum of the weights"""
    distance: str
    """FID of Inception features alone; FD-tok of the tokenizer's"""
    run: Callable[[Tensor], Features]
    """uint8 (B, 3, H, W) on the CPU -> features on the CPU"""


def load_extractor(text: str, device: torch.device) -> Extractor:
    """An extractor by `tok:MODEL`, `script:FILE` or `fidelity:FILE`."""
    kind, _, place = text.partition(":")
    makers = {"tok": _tokenizer, "script": _script, "fidelity": _fidelity}
    if kind not in makers or not place:
        raise UserError(f"extractor {text}: give tok:MODEL, script:FILE.pt or fidelity:FILE.pth")
    if kind != "tok" and not Path(place).is_file():
        raise UserError(f"extractor {text}: {place} does not exist; Inception's weights cannot be shipped (docs/evaluation.md)")
    return makers[kind](place, device)


def _tokenizer(model: str, device: torch.device) -> Extractor:
    vae = load_source(model, device).var.vae_proxy[0]

    @torch.no_grad()
    def run(images_B3HW: Tensor) -> Features:
        f_BChw = vae.encode(images_B3HW.to(device).float() / 127.5 - 1)
        pooled = [F.adaptive_avg_pool2d(f_BChw, size).flatten(1) for size in (1, 2)]  # the picture as a whole, and its quarters
        return Features(torch.cat(pooled, 1).cpu())

    weights = torch.cat([p.detach().flatten()[:64].cpu().float() for p in vae.encoder.parameters()])
    return Extractor(f"tok:{hash_of(weights)}", "FD-tok", run)


def last_line(error: Exception) -> str:
    """The last line that says something: TorchScript begins with its own call stack."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


def hash_of(values: Tensor) -> str:
    """A short name of numbers."""
    import hashlib

    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]


def _script(file: str, device: torch.device) -> Extractor:
    try:
        net = torch.jit.load(file, map_location=device).eval()
    except RuntimeError as error:
        raise UserError(f"extractor script:{file}: is not a TorchScript file ({str(error).splitlines()[0]})") from None

    @torch.no_grad()
    def run(images_B3HW: Tensor) -> Features:
        x = images_B3HW.to(device)
        try:
            return Features(net(x, return_features=True).float().cpu(), None, net(x, no_output_bias=True).float().cpu())
        except RuntimeError as error:
            raise UserError(f"extractor script:{file}: cannot be called as NVIDIA's inception-2015-12-05.pt is, net(uint8 images (B, 3, H, "
                            f"W), return_features=True) and no_output_bias=True ({last_line(error)})") from None  # fmt: skip

    return Extractor(f"script:{sha256_file(Path(file))[:16]}", "FID", run)


def _fidelity(file: str, device: torch.device) -> Extractor:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except Exception as error:  # torchvision beside another torch fails in its own ways
        raise UserError(f'extractor fidelity:{file}: needs torch-fidelity, `pip install "var-scale[eval]"` ({error})') from None
    try:  # torch-fidelity itself would run whatever a pickle says
        torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"extractor fidelity:{file}: is not a file of plain weights ({str(error).splitlines()[0]})") from None
    net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=file).to(device)
    spatial: list[Tensor] = []
    net.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, out: spatial.append(out))

    @torch.no_grad()
    def run(images_B3HW: Tensor) -> Features:
        spatial.clear()
        pool_ND, logits_NK = net(images_B3HW.to(device))
        spatial_Nhwc = spatial[-1][:, :7].permute(0, 2, 3, 1)  # the order of ADM's reference statistics
        return Features(pool_ND.float().cpu(), spatial_Nhwc.flatten(1).float().cpu(), logits_NK.softmax(-1).float().cpu())

    return Extractor(f"fidelity:{sha256_file(Path(file))[:16]}", "FID", run)


@dataclass
class Statistics:
    """What a set of images is compared by."""

    count: int
    mean_D: Tensor
    covariance_DD: Tensor
    spatial_mean_E: Tensor | None = None
    spatial_covariance_EE: Tensor | None = None
    pool_ND: Tensor | None = None
    """features for precision and recall: of a reference the first KEPT"""
    probability_NK: Tensor | None = None

    def save(self, path: Path, name: str) -> None:
        """In the ADM form (mu, sigma, mu_s, sigma_s), with the features of precision and recall and the extractor's name."""
        arrays: dict[str, Any] = {"mu": self.mean_D.numpy(), "sigma": self.covariance_DD.numpy(), "count": self.count, "extractor": name}
        if self.spatial_mean_E is not None and self.spatial_covariance_EE is not None:
            arrays |= {"mu_s": self.spatial_mean_E.numpy(), "sigma_s": self.spatial_covariance_EE.numpy()}
        if self.pool_ND is not None:
            arrays["features"] = self.pool_ND[:KEPT].numpy()
        with atomic_file(path) as file:
            np.savez(file, **arrays)


def statistics(images: Iterator[np.ndarray], extractor: Extractor, total: int | None = None, label: str = "features") -> Statistics:
    """Means and covariances (float64) of images uint8 (b, H, W, 3), streamed; pooled features and probabilities are kept."""
    pool, spatial, kept, probabilities = None, None, [], []
    count = 0
    with progress(label, total or 0, "images", shown=total is not None) as bar:
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
            count += len(batch)
            bar.update(count)
    if pool is None or count < 2:
        raise UserError(f"{label}: {count} images; at least 2 are needed for a covariance")
    result = Statistics(count, pool.mean_D, pool.covariance_DD, pool_ND=torch.cat(kept))
    if spatial is not None:
        result.spatial_mean_E, result.spatial_covariance_EE = spatial.mean_D, spatial.covariance_DD
    if probabilities:
        result.probability_NK = torch.cat(probabilities)
    return result


def read_reference(path: Path, extractor: Extractor) -> Statistics:
    """Of images (npz with arr_0 alone, folder of PNGs, shards), or a file of statistics: ours, ADM's VIRTUAL_*.npz (whose arr_0 are the
    images of precision and recall), or MAR's with mu and sigma alone."""
    path = Path(path)
    if path.suffix == ".npz" and path.exists():
        with np.load(path) as file:
            if "mu" in file:
                return _stored(path, file, extractor)
    return statistics(read_images(path), extractor, label=f"features of {path.name}")


def _stored(path: Path, file: Any, extractor: Extractor) -> Statistics:
    if "extractor" in file and str(file["extractor"]) != extractor.name:
        raise UserError(f"{path}: statistics of {file['extractor']}, the samples are measured by {extractor.name}; use one extractor")
    tensors = {name: torch.from_numpy(file[name]).double() for name in ("mu", "sigma", "mu_s", "sigma_s") if name in file}
    for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if mean == "mu_s" and mean not in tensors:
            continue
        D = tensors[mean].numel()
        if tensors[mean].shape != (D,) or covariance not in tensors or tensors[covariance].shape != (D, D):
            shape = tuple(tensors[covariance].shape) if covariance in tensors else "none"
            raise UserError(f"{path}: {mean} is {tuple(tensors[mean].shape)} and {covariance} {shape}; a mean (D,) and a covariance (D, D) "
                            "are needed; make the statistics anew with `var-scale evaluate stats`")  # fmt: skip
        if not (tensors[mean].isfinite().all() and tensors[covariance].isfinite().all()):
            raise UserError(f"{path}: {mean} or {covariance} has values that are not finite; make the statistics anew")
    pool = torch.from_numpy(file["features"]) if "features" in file else None
    if pool is None and "arr_0" in file:
        pool = statistics(read_images(path), extractor, label=f"features of {path.name}").pool_ND
    count = int(file["count"]) if "count" in file else 0
    return Statistics(count, tensors["mu"], tensors["sigma"], tensors.get("mu_s"), tensors.get("sigma_s"), pool)


def say_if_few(samples: Statistics, extractor: Extractor) -> None:
    """A warning where the covariance has no full rank: the distance is then mostly that of having few samples."""
    if samples.count <= len(samples.mean_D):
        say(f"warning: {samples.count:,} samples for {len(samples.mean_D):,} features; {extractor.distance} of so few is much too high")


def compare_sets(reference: Statistics, samples: Statistics, extractor: Extractor) -> dict[str, Any]:
    """The measures that the features allow, with what they rest on."""
    if reference.mean_D.shape != samples.mean_D.shape:
        raise UserError(f"the reference has {len(reference.mean_D)} features an image, the samples {len(samples.mean_D)}; use one "
                        "extractor")  # fmt: skip
    found: dict[str, Any] = {
        extractor.distance: frechet_distance(reference.mean_D, reference.covariance_DD, samples.mean_D, samples.covariance_DD)}  # fmt: skip
    spread = (reference.spatial_mean_E, reference.spatial_covariance_EE, samples.spatial_mean_E, samples.spatial_covariance_EE)
    if all(part is not None for part in spread):
        found["sFID"] = frechet_distance(*spread)  # type: ignore[arg-type]
    if samples.probability_NK is not None:
        found["IS"], found["IS_sd"] = inception_score(samples.probability_NK)
        found["IS_split"] = SPLIT
    if reference.pool_ND is not None and samples.pool_ND is not None and min(len(reference.pool_ND), len(samples.pool_ND)) > 3:
        shares = precision_recall(reference.pool_ND[:KEPT], samples.pool_ND)
        found |= {"precision": shares.precision, "recall": shares.recall}
    return found | {"samples": samples.count, "reference": reference.count, "extractor": extractor.name}
