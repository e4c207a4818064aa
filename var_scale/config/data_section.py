"""The section `data`: where images and tokens come from."""

from __future__ import annotations

from typing import Literal

from var_scale.config.fields import Grid, Place, Positive, Section, setting


class ShapesConfig(Section):
    """The embedded image set: pictures of ten kinds of shapes and textures."""

    size: Grid = setting(32, "image side in pixels, or [height, width]")
    num_classes: Positive = setting(10, "number of classes, at most 10", le=10)
    looks: Positive = setting(32, "number of pairs of colours")
    zipf: float = setting(1.0, "exponent of the Zipf law of their frequencies", ge=0)
    seed: int = setting(0, "seed of the generator", ge=0)
    train_images: Positive = setting(65536, "number of training images to generate")
    val_images: Positive = setting(8192, "number of validation images to generate")

    @property
    def train_samples(self) -> int:
        """Number of training samples, as the other embedded sets call it."""
        return self.train_images

    @property
    def val_samples(self) -> int:
        """Number of validation samples."""
        return self.val_images


class TeacherConfig(Section):
    """The embedded token set `teacher`: tokens drawn from random functions of VAR's own input,
    whose lowest possible loss is known to any precision.

    The codebook is random. The tokenizer's patch_nums, vocab_size and latent_channels are those of
    the set.
    """

    num_classes: Positive = setting(10, "number of classes")
    features: Positive = setting(1024, "cosine features of the function of each scale")
    freedom: float = setting(
        3.0,
        "degrees of freedom of Student's t distribution of the frequencies; the smaller, the more "
        "of the function is hard to learn",
        ge=1,
    )
    gain: float = setting(
        3.0, "standard deviation of the logits; the larger, the lower the lowest loss", gt=0, le=30
    )
    seed: int = setting(0, "seed of the functions, the codebook and the samples", ge=0)
    train_samples: Positive = setting(65536, "number of training samples to generate")
    val_samples: Positive = setting(8192, "number of validation samples to generate")
    floor_precision: float = setting(
        1e-4,
        "standard error of the lowest possible loss, as a share of it",
        identity=False,
        gt=0,
        lt=1,
    )


class DataConfig(Section):
    """Token shards (`tokens_*`), image shards (`images_*`) or an embedded set."""

    shapes: ShapesConfig | None = setting(None, "generate the embedded image set")
    teacher: TeacherConfig | None = setting(None, "generate the embedded token set of a teacher")
    # A moved folder holds the same data. The digest of its manifest identifies it.
    images_train: Place | None = setting(
        None, "folder of image shards for training", identity=False
    )
    images_val: Place | None = setting(
        None, "folder of image shards for validation", identity=False
    )
    tokens_train: Place | None = setting(
        None, "folder of token shards for training", identity=False
    )
    tokens_val: Place | None = setting(
        None, "folder of token shards for validation", identity=False
    )
    fraction: float | None = setting(None, "fraction of the training samples to use", gt=0, le=1)
    num_classes: Positive | None = setting(
        None,
        "number of classes; must match the shards; default: that of the embedded set or of the "
        "shards, else 1000",
    )
    views: Positive = setting(
        1, "random crops of each training image to tokenise; 1: the centre crop"
    )
    flip: bool = setting(False, "mirrored images: twice as many views, or half of them if `online`")
    resize: Literal["auto", "torch", "pillow"] = setting(
        "auto",
        "library that resizes images: PyTorch's Lanczos filter (2.12 and later; fast, within 2 "
        "grey levels of Pillow's), or Pillow as in the official code; auto: PyTorch where it can",
    )
    online: bool = setting(
        False,
        "train from images_train and images_val and tokenise inside the training step, instead of "
        "reading token shards",
    )
    decoders: int = setting(
        0,
        "threads per process that decode images; 0: the process's share of the cores, at most 8",
        ge=0,
        identity=False,
    )
    train_samples: Positive | None = setting(
        None,
        "number of training samples, for plans made before the shards exist; from then on their "
        "manifest counts; default: ImageNet's",
        identity=False,
    )
    cache: Place | None = setting(
        None,
        "folder on a local disk for shards from URLs; default: $VAR_SCALE_CACHE or ~/.cache",
        identity=False,
    )
    cache_gb: float = setting(
        500.0,
        "largest size of the cache in GB; shards of other data sets are deleted to make room",
        gt=0,
        identity=False,
    )
    check: Literal["sha256", "size"] = setting(
        "sha256",
        "what is compared with the manifest before a run begins: the checksum of every shard (the "
        "ranks share the work), or only its size",
        identity=False,
    )
    samples_per_shard: Positive = setting(4096, "samples in each new shard", identity=False)

    @property
    def embedded(self) -> ShapesConfig | TeacherConfig | None:
        """The embedded set, where one is used."""
        return self.shapes or self.teacher
