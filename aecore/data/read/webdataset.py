"""The shards of a dataset as a `webdataset` pipeline, for code that is written for webdataset.

The pipeline starts with `ShardReader` instead of webdataset's opener and tar reader (every byte is verified before a sample is handed
out, several times faster) and decodes with `Decoder`, which executes nothing. webdataset's own `.decode()` is never used: it
unpickles some members. Everything after that (`shuffle`, `batched`, `map`, `WebLoader`) is webdataset's.
"""

import functools
import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from aecore.data.dataset import Dataset, open_dataset
from aecore.data.format.bad_sample import BadSample
from aecore.data.format.decode import Decoder, Reading
from aecore.data.format.image import PixelsVersion, image_header
from aecore.data.format.record import IMAGE_EXTENSIONS, array_header, require_allowed
from aecore.data.format.sample_format import SampleFormat
from aecore.data.manifest import ShardRef
from aecore.data.removal import live_rows
from aecore.errors import DataError

if TYPE_CHECKING:
    from webdataset import FluidWrapper

ANY_PIXELS = 1 << 32  # the dataset was written with a limit of its own
WebSample = dict[str, Any]  # any: webdataset's own sample type, member name -> bytes or decoded value


def as_webdataset(url: str, split: str = "train", *, number: int | None = None, decode: bool = True) -> "FluidWrapper":
    """Return a webdataset pipeline over one split: dicts with `__key__`, `__url__` and the members by extension.

    With `decode`, images are `[H, W, C]` arrays, `npy` arrays, `cls` int, `txt` str, `json` plain data; else bytes. The order is that of
    the shards (shuffled once, when they were written): add `.shuffle(n)`. DataLoader workers share the shards; more than one
    training process is refused by webdataset (`aecore`'s own loader is for that). `number` picks a generation.
    """
    from webdataset import FluidWrapper, shardlists

    dataset = open_dataset(url, number)
    pixels: PixelsVersion = dataset.pixels
    shards = functools.partial(_shards, dataset.manifest.split(split))
    stages = [shardlists.single_node_only, shardlists.split_by_worker, functools.partial(_samples, dataset)]
    if decode:
        stages.append(functools.partial(_decoded, pixels=pixels))
    return FluidWrapper(shards).compose(*stages)


def decode_members(sample: WebSample, pixels: PixelsVersion = 2) -> WebSample:
    """Return the sample with every member decoded by its extension; DataError for one that is damaged or not on the allow-list."""
    return {name: value if name.startswith("__") else _decode(sample["__key__"], name, value, pixels) for name, value in sample.items()}


def _shards(shards: tuple[ShardRef, ...]) -> Iterator[ShardRef]:
    yield from shards


def _samples(dataset: Dataset, shards: Iterable[ShardRef]) -> Iterator[WebSample]:
    for shard in shards:
        if not shard.live:  # its tar, if it is adopted, may be another one now
            continue
        reader = dataset.reader(shard)
        rows = live_rows(dataset.store, shard, reader.index)
        live = None if rows is None else {*rows.tolist()}
        for row, sample in enumerate(reader.iterate()):
            if live is None or row in live:
                yield {"__key__": sample.key, "__url__": f"{dataset.tars(shard).url}/{shard.tar.name}", **sample.members}
        reader.close()


def _decoded(samples: Iterable[WebSample], pixels: PixelsVersion) -> Iterator[WebSample]:
    return (decode_members(sample, pixels) for sample in samples)


def _decode(key: str, ext: str, data: bytes, pixels: PixelsVersion) -> Any:  # any: the extension decides
    require_allowed(ext, f"a member of sample {key!r}")
    try:
        if ext in IMAGE_EXTENSIONS:
            return _decoder(image_header(data, ext, pixels=pixels, max_pixels=ANY_PIXELS).format_text, pixels).batch([data])[0]
        if ext == "npy":
            return _decoder(array_header(data, pixels=pixels, layout="chw").format_text, pixels).batch([data])[0]
        if ext == "json":
            return json.loads(data)
        return int(data) if ext == "cls" else data.decode()
    except (BadSample, ValueError, RecursionError) as error:
        raise DataError(f"the {ext} member of sample {key!r} cannot be decoded: {error}") from error


@functools.lru_cache(256)
def _decoder(format_text: str, pixels: PixelsVersion) -> Decoder:
    return Decoder(Reading(pixels=pixels), SampleFormat.parse(format_text))
