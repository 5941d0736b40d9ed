"""The fields of a configuration that say where the training data is and how it is read."""

from dataclasses import dataclass, field
from typing import Literal

from ds_linclip.config.paths import PATH

__all__ = [
    "CacheConfig",
    "CaptionSource",
    "DataConfig",
    "NetworkConfig",
    "Resolution",
    "Source",
]


@dataclass(kw_only=True)
class Source:
    """One set of training shards.

    In `data.train` a plain string means a source with that pattern and the defaults below.
    """

    #: Required. Brace pattern of tar files, such as `/data/laion400m/{00000..41455}.tar`: a local
    #: path, `http(s)://`, `s3://`, `gs://` or another URL that fsspec knows.
    shards: str = field(default="", metadata=PATH)
    #: Share of the training samples, relative to the other sources. Set it for all sources or for
    #: none.
    weight: float | None = None
    #: Times that every sample comes per epoch; 0.5 takes half of the samples in every epoch.
    upsampling: float = 1.0
    #: Number of samples in all shards of the source; required if no file beside the shards has it.
    num_samples: int | None = None


@dataclass(kw_only=True)
class CaptionSource:
    """One place where the captions of a sample are.

    In `data.captions` a plain string means a source with that member and the defaults below.
    """

    #: Member of the sample, by what follows the key in its name: `txt`, `syn.txt`, `caption2`. A
    #: name that ends in `json` holds JSON, any other holds one caption.
    member: str = "txt"
    #: Entry of the JSON, a text or a list of texts; a dotted path such as `meta.captions` for a
    #: nested one. Null: the JSON itself.
    field: str | None = None
    #: Text around the caption, such as `a photo of {caption}`. Another name in braces is an entry
    #: of the JSON (that of `json`, if the member holds none); `{{` and `}}` are plain braces.
    template: str = "{caption}"
    #: Probability of this source, relative to the others that the sample has.
    weight: float = 1.0


@dataclass(kw_only=True)
class Resolution:
    """Size of the training images from one step on."""

    #: First step that trains at this size, counted from 0.
    from_step: int = 0
    #: (height, width) in pixels, or a single number for a square; positional embeddings are
    #: interpolated.
    image_size: tuple[int, int] = (224, 224)


@dataclass(kw_only=True)
class CacheConfig:
    """Local copies of remote shards, shared by all processes of a node."""

    #: Folder on a local disk; required when a source is remote.
    dir: str | None = field(default=None, metadata=PATH)
    #: Maximum total size in GiB. Shards in use are never evicted, so it must hold about three pools
    #: (`data.shuffle_shards`) for every lane that the node reads.
    max_gib: float = 100.0


@dataclass(kw_only=True)
class NetworkConfig:
    """Downloads of remote shards."""

    #: Timeout in seconds for opening a connection.
    connect_timeout: float = 10.0
    #: Seconds without a byte after which a transfer counts as stalled.
    read_timeout: float = 30.0
    #: Failed tries after which a shard counts as unreachable, which ends the run.
    max_tries: int = 10
    #: Upper bound of the pause before the second try, in seconds; it doubles with every further
    #: try.
    backoff: float = 0.5
    #: Longest pause between two tries, in seconds.
    max_backoff: float = 60.0
    #: Parallel downloads per worker.
    downloads: int = 2


@dataclass(kw_only=True)
class DataConfig:
    """Training shards in the img2dataset layout of LAION-400M."""

    #: Sources or patterns, such as `data.train=['/data/laion400m/{00000..41455}.tar']`; a single
    #: pattern needs no list. Required.
    train: list[Source] = field(default_factory=list)
    #: `shuffled`: every sample once per epoch (times `upsampling`). `replacement`: shards are drawn
    #: with replacement.
    sampling: Literal["shuffled", "replacement"] = "shuffled"
    #: Number of independent lanes (streams) that the shards of a source are distributed over. With
    #: a multiple of ranks x workers every worker reads its own shards. Changing it changes the
    #: order of the samples.
    num_lanes: int = 1
    #: Shards of one lane whose samples are shuffled together. Changing it changes the order.
    shuffle_shards: int = 8
    #: Decoding processes per rank. The order does not depend on it.
    num_workers: int = 2
    #: Batches per rank that are decoded ahead.
    prefetch_batches: int = 4
    #: Where the captions of a sample are, such as `[{member: txt, weight: 0.5}, {member: json,
    #: field: syn_captions, weight: 0.5}]`. A source is drawn by its weight, then one of its
    #: captions, again in every epoch. Empty: the member `txt`.
    captions: list[CaptionSource] = field(default_factory=list)
    #: Area of the random resized crop as a (smallest, largest) fraction of the image.
    crop_scale: tuple[float, float] = (0.9, 1.0)
    #: Image sizes over the run, by increasing `from_step`; empty: always `model.vision.image_size`.
    resolutions: list[Resolution] = field(default_factory=list)
    cache: CacheConfig = field(default_factory=CacheConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    #: Fraction of bad samples (they are replaced) above which the run ends with an error. All
    #: samples of a lost shard count.
    max_bad_samples: float = 0.1
    #: Number of bad samples in a row that ends the run with an error. A lost shard counts as one.
    max_bad_in_a_row: int = 100
