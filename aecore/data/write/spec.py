"""The task of a worker that writes one shard: columns of its samples and specs, no sample bytes and no open files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from aecore.data.format.bad_sample import BadSample
from aecore.data.format.colour import background_of
from aecore.data.format.image import MAX_PIXELS
from aecore.data.sources import as_texts
from aecore.errors import ConfigError
from aecore.registry import knob, spec


@spec
class ShardSpec:
    """How samples become shards: how many per shard, in which order, in which format (`shards.*` of a recipe)."""

    max_samples: int = knob(10_000, "samples per shard at most", ge=1)
    max_bytes: int = knob(256 << 20, "source bytes per shard at most (one larger sample gets a shard of its own)", ge=1)
    resize: int | None = knob(None, "side of the square that images are stretched to; null keeps the original bytes", ge=1)
    mode: Literal["keep", "L", "RGB"] = knob("keep", "pixel mode that images are converted to; keep keeps the original bytes")
    shuffle: bool = knob(True, "shuffle the samples of a split before they are cut into shards")
    seed: int = knob(0, "seed of that shuffle", ge=0)
    check: Literal["header", "decode"] = knob(
        "header", "header: structure and checksums; decode: every image is decoded too, which finds JPEGs that lost a part of their pixels"
    )
    max_bad: float = knob(0.01, "share of the samples that may be quarantined before the run fails", ge=0.0, le=1.0, identity=False)
    removed: Literal["drop", "keep"] | None = knob(
        None,
        "what becomes of samples whose source is gone: drop or keep; null: what the dataset has, drop for a new one; a dataset that was "
        "begun before there was this choice only grows until it is made",
        identity=False,
        since=2,
    )
    max_removed: float = knob(
        0.1,
        "share of the samples of one source that a run may drop as gone (10 always may be); 1: all, also whole classes, folders and splits",
        ge=0.0,
        le=1.0,
        identity=False,
        since=2,
    )
    accept_filter: bool = knob(False, "drop known samples that a changed filter of the source leaves out", identity=False, since=2)
    checksum: bool = knob(
        False, "read all samples and compare their hashes, also where their files look unchanged", identity=False, since=2
    )
    duplicates: Literal["keep", "drop", "refuse"] | None = knob(
        None,
        "samples of equal bytes; drop: the smallest key stays, in whatever splits they are; refuse: no generation with any; null: what the "
        "dataset has, keep for a new one",
        since=2,
    )
    max_pixels: int = knob(
        MAX_PIXELS, "pixels of an image at most; its decoded values may take 16 bytes for each of them", ge=1, le=1 << 32, since=2
    )
    value_range: tuple[float, float] | None = knob(
        None, "values that become black and white, as [0, 4095] for 12 bits in 16: such images are stored with 16 bits", since=2
    )
    background: str = knob("white", "colour under alpha where images are resized or converted: a CSS name or #rrggbb", since=2)
    layout: Literal["auto", "hwc", "chw"] = knob(
        "auto", "axes of .npy arrays [a, b, c]: images [H, W, C], or as networks take them", since=2
    )
    pixels: Literal[1, 2] = knob(2, "2: pixels as files mean them (EXIF, alpha, TIFF values); 1: as version 1 read them", since=2, absent=1)

    def __post_init__(self) -> None:
        background_of(self.background, 3)
        if self.value_range is not None and self.value_range[0] >= self.value_range[1]:
            raise ConfigError(f"shards.value_range is {list(self.value_range)}, expected [black, white] with black below white")
        if self.pixels == 1 and (self.value_range is not None or self.background != "white" or self.layout != "auto"):
            raise ConfigError("shards.value_range, shards.background and shards.layout need shards.pixels=2: write to another URL with it")

    @property
    def keeps_bytes(self) -> bool:
        """Whether every good sample is stored unchanged, after a check of its header alone."""
        return not self.converts and self.check == "header"

    @property
    def converts(self) -> bool:
        """Whether samples may be stored with other bytes than the source's."""
        return self.resize is not None or self.mode != "keep" or self.value_range is not None


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One shard to write: n planned samples of one split, in order; picklable, and a pure function of the plan.

    Attributes
    ----------
    split, stem : str
        Names of the split and of the part (`train`, `train-000000`).
    source : spec
        Spec of the source that reads the bytes.
    keys, sources : sequence of str
        n encoded keys, and n names that the source reads from.
    sizes : `[n]` int64
        Bytes of each sample in the source when it was listed.
    ordinals : `[n]` int64
        Planned position of each sample in its split.
    labels, label_names : `[n]` int32, sequence of str
        Class ids and names, None if the data has no labels.
    groups : sequence of str
        n names of bags, None if there are none.
    columns : mapping of `[n]` arrays
        Further index columns (factors, metadata).
    shards : ShardSpec
        Resize, mode and check of the shards.
    unusable : list of BadSample or None
        Why each sample cannot be used, None for those that can; None if all of them can.
    states : sequence of str or None
        State of each sample's file when it was listed, None for those where it is not known; None if no state is.
    source_hashes : bool
        Whether an index of converted samples says what the source's bytes were (`source_sha256`): not where a claim of version 1 goes on.
    """

    split: str
    stem: str
    source: Any  # any: every source kind has its own spec class
    keys: Sequence[str]
    sources: Sequence[str]
    sizes: NDArray[np.int64]
    ordinals: NDArray[np.int64]
    labels: NDArray[np.int32] | None = None
    label_names: Sequence[str] | None = None
    groups: Sequence[str] | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)  # any: arrays of numpy or Arrow, each of its own type
    shards: ShardSpec = field(default_factory=ShardSpec)
    unusable: list[BadSample | None] | None = None
    states: Sequence[str | None] | None = None
    source_hashes: bool = True

    def __post_init__(self) -> None:
        for name in ("keys", "sources", "label_names", "groups", "states"):
            if (values := getattr(self, name)) is not None:
                object.__setattr__(self, name, as_texts(values, f"the task {self.stem} has {name}"))

    def __len__(self) -> int:
        return len(self.keys)

    def __getstate__(self) -> list[Any]:  # any: the values of all fields, in order
        """Return what a worker gets: of a slice of an Arrow array its own rows, where pickle would take the whole array."""
        own = dict(self.columns)
        for name, column in own.items():
            if isinstance(column, pa.Array | pa.ChunkedArray):
                own[name] = pa.concat_arrays(column.chunks if isinstance(column, pa.ChunkedArray) else [column])
        return [own if each.name == "columns" else getattr(self, each.name) for each in fields(self)]
