"""Train on external tars without an index (`input.reader=webdataset`): webdataset's pipeline, our parser and decoder.

Guaranteed: nothing but allow-listed images, arrays and `.cls` is read, and nothing is executed; every step has its whole global batch,
and all ranks take the same number of steps, so shards of any sizes and fewer shards than ranks cannot hang a run; the
same seed, shards and number of ranks give the same batches, bit for bit.

What does not hold, unlike with our own shards (`adopt_shards` gives them all back without a copy):
- The batches depend on the number of ranks. Each rank reads tars of its own (samples of its own, where there are fewer tars than ranks).
- A pass is not exact: ranks begin their next pass when their own tars end, so uneven tars are seen unevenly often; with
  `input.resampled` tars are drawn with replacement. Hence the length is set in steps (`train.max_steps`) or in samples
  (`input.epoch_samples`).
- A resumed run draws its tars anew, by (seed, step): reproducibly, but not as the uninterrupted run would have.
- There are no hashes: the run's identity holds names and sizes of the tars. A sample that cannot be decoded stops the run.
- There is no validation split and no quarantine. Ordinals number the rows of the steps.
"""

import functools
import logging
import random
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from aecore._base.batch import Batch
from aecore.data.classes import UNKNOWN, numbers_of, quoted
from aecore.data.format.decode import DecodeError, Decoder
from aecore.data.format.image import BadSample, PixelsVersion
from aecore.data.format.record import IMAGE_EXTENSIONS, array_header, image_header
from aecore.data.format.sample_format import SampleFormat
from aecore.data.format.transform import TransformSpec
from aecore.data.read.loader import InputSpec
from aecore.data.read.order import TrainingOrder
from aecore.data.sources._external_tars import ExternalTars, TarFile, data_member
from aecore.data.sources._names import split_of
from aecore.errors import DataError, Hint
from aecore.store import sha256_json
from aecore.threads import prefetched

logger = logging.getLogger(__name__)
MAX_CLASS_BYTES, MAX_DIGITS = 1 << 10, 18
StreamSample = dict[str, Any]  # any: webdataset's own sample type: `__key__`, `__url__`, `data` and `cls`
REMEDY = "adopt_shards and shard_dataset (aecore.data.write.job) put such samples into a quarantine"


@dataclass(frozen=True, slots=True)
class StreamDataset:
    """The tars of one split: sizes in bytes by name below `url`, and the format of the first sample; a `TrainingData`."""

    url: str
    split: str
    tars: Mapping[str, int]
    sample_format: SampleFormat
    number = 0  # this and the next are no fields: the same for all tars without an index
    classes = None

    @property
    def dataset_sha256(self) -> str:
        """The hash of split, names and sizes."""
        return self.training_key(self.split)

    def training_key(self, split: str) -> str:
        """Return the hash of split, names and sizes; DataError if it is another split than the opened one."""
        if split != self.split:
            raise DataError(f"the tars of {self.url} were opened for split {self.split!r}, not {split!r}")
        # laid out like `manifest.content_sha256`, of shards without counts: it is in the claims of runs
        rows = [[split, name, 0, "", sha256_json({"name": name, "bytes": size})] for name, size in self.tars.items()]
        return sha256_json({"shards": rows, "classes": []})

    def input_shape(self, *, sequences: bool = False) -> tuple[int, ...]:
        """Return the shape of the first sample, images as `(C, H, W)`."""
        return self.sample_format.tensor_shape

    def num_samples(self, split: str) -> None:
        """Return None: the samples are not counted."""

    def num_groups(self, split: str) -> int:
        """Return 0: bags need an index."""
        return 0


def open_stream(
    url: str, split: str, member: str = "", split_in_name: Callable[[str], str] = split_of, pixels: PixelsVersion = 2
) -> StreamDataset:
    """Open the tars of `split`: lists them and reads the first sample.

    `split_in_name` returns the split that a tar's name contains; if no name contains one, all tars belong to `split`.

    Raises
    ------
    DataError
        If there are no tars (of that split), or the first one holds no sample that can be read.
    """
    tars = ExternalTars.at(url, "data")
    sizes = tars.sizes()
    splits = {name: split_in_name(name) for name in tars.names}
    names = [name for name in tars.names if splits[name] in ("", split)] if any(splits.values()) else list(tars.names)
    if not names:
        raise DataError(f"{tars.files.url} has no tars of split {split!r} (their names have {', '.join(sorted(set(splits.values())))})")
    where, (ext, data, _) = _first(tars, names, member)
    try:
        header = image_header(data, ext, pixels=pixels) if ext in IMAGE_EXTENSIONS else array_header(data, pixels=pixels)
        format_text = header.format_text
    except BadSample as bad:
        raise DataError(f"the first sample of {where} cannot be read ({bad}): {REMEDY}", hint=Hint("bad-sample")) from bad
    return StreamDataset(tars.files.url, split, {name: sizes[name] for name in names}, SampleFormat.parse(format_text))


def _first(tars: ExternalTars, names: list[str], member: str) -> tuple[str, tuple[str, bytes, str]]:
    for name in names:
        for _, found in _read(tars, name, member, Counter()):
            return f"{tars.files.url}/{name}", found
    raise DataError(f"{tars.files.url} holds no sample with an image or array in {len(names)} tars: check data, or set input.member")


def _read(tars: ExternalTars, name: str, member: str, skipped: Counter[str]) -> Iterator[tuple[str, tuple[str, bytes, str]]]:
    """Yield key, and codec, bytes and class ("": none) of each sample of one tar."""
    tar = TarFile(tars.files, name)
    try:
        for sample in tar.samples(skipped):
            chosen = data_member(sample, member, tar.where, "input.member")
            if chosen is None:
                skipped["samples without an image or array"] += 1
                continue
            cls = sample.members.get("cls")
            text = tar.read(cls).strip() if cls is not None and cls.size <= MAX_CLASS_BYTES else b""
            yield sample.key, (chosen[0], tar.read(chosen[1]), text.decode("utf-8", "replace"))
    finally:
        tar.close()


class StreamLoader:
    """Training batches of external tars; a `TrainLoader`.

    `transform` names the decoder, `order` gives seed, global batch and rank; `steps_per_epoch` steps count as an epoch. With `classes`, the
    names that the model numbers, a `.cls` is the name of a class; None: labels are the numbers that are there.
    """

    def __init__(
        self,
        dataset: StreamDataset,
        *,
        transform: TransformSpec,
        order: TrainingOrder,
        steps_per_epoch: int,
        spec: InputSpec,
        classes: tuple[str, ...] | None = None,
    ) -> None:
        self._classes, self._labels = classes, dict[str, int]()
        self.steps_per_epoch = steps_per_epoch
        self._names = list(dataset.tars)
        self._tars = ExternalTars.named(dataset.url, tuple(self._names))
        self._sample = dataset.sample_format
        self._decoder = Decoder(transform.reading, self._sample)
        self._order, self._spec = order, spec
        self._seed = f"{dataset.dataset_sha256}|{order.seed}"

    def batches(self, start_step: int = 0, stop_step: int | None = None) -> Generator[Batch, None, None]:
        """Yield this rank's part of the global batches [start_step, stop_step), on and on if `stop_step` is None.

        DataError names the tar and the key of a sample that does not decode to the format of the first one.
        """
        return prefetched(self._batches(start_step, stop_step), self._spec.prefetch)

    @property
    def notes(self) -> tuple[str, ...]:
        """No messages."""
        return ()

    def reread(self, step: int) -> None:
        """Return None: tars without an index cannot be read again from a step on."""

    def close(self) -> None:
        """Do nothing: open files belong to the generator of `batches`."""

    def _batches(self, start: int, stop: int | None) -> Generator[Batch, None, None]:
        order, size = self._order, self._order.global_batch
        positions = torch.arange(order.rank * size // order.world_size, (order.rank + 1) * size // order.world_size)
        samples, step = iter(self._pipeline(start)), start
        while stop is None or step < stop:
            rows = [next(samples) for _ in range(len(positions))]
            yield self._batch(rows, positions, step * size)
            step += 1

    def _batch(self, rows: list[StreamSample], positions: torch.Tensor, first: int) -> Batch:
        try:
            pixels = self._decoder.batch([row["data"] for row in rows])
        except DecodeError as error:
            row = rows[error.row]
            raise DataError(
                f"{row['__url__']}: sample {row['__key__']!r} cannot be trained on ({error}): {REMEDY}", hint=Hint("bad-sample")
            ) from error
        x = torch.from_numpy(pixels)
        labels = [self._label(row) for row in rows]
        label = None if None in labels else torch.tensor(labels)
        x = x.permute(0, 3, 1, 2) if self._sample.image else x
        return Batch(x, first + positions, positions, self._order.global_batch, label=label)

    def _label(self, row: StreamSample) -> int | None:
        """Return the label that the `.cls` of a sample states, None if there is none; DataError for a class that the model lacks."""
        text: str = row["cls"]
        number = int(text) if text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS else None
        if self._classes is None or not text:
            return number
        if text not in self._labels:
            self._labels[text] = max(numbers_of({text, text if number is None else str(number)}, self._classes).values())
        if self._labels[text] == UNKNOWN:
            raise DataError(
                f"{row['__url__']}: sample {row['__key__']!r} is of class {text!r}, which the model does not have (it has "
                f"{quoted(self._classes)}): use tars of its classes, or shard them (shard_dataset) with labels of these names"
            )
        return self._labels[text]

    def _pipeline(self, start: int) -> Iterable[StreamSample]:
        """Return the endless webdataset pipeline of this rank from step `start` on: tars, samples, shuffle."""
        from webdataset import FluidWrapper, filters

        rank = f"{self._order.rank} of {self._order.world_size}"
        stages = [self._samples]
        if self._spec.shuffle > 1:
            rng = random.Random(f"{self._seed}|{start}|{rank}|samples")
            stages.append(filters.shuffle(self._spec.shuffle, initial=self._spec.shuffle, rng=rng))
        found: Iterable[StreamSample] = FluidWrapper(functools.partial(self._drawn, start)).compose(*stages)
        return found

    def _drawn(self, start: int) -> Iterator[tuple[str, int, int]]:
        """Yield tars without end, each with the samples that this rank reads: every `step`-th from the `first` on."""
        rank, world_size = self._order.rank, self._order.world_size
        if self._spec.resampled:
            rng = random.Random(f"{self._seed}|{start}|{rank} of {world_size}|tars")
            while True:
                yield rng.choice(self._names), 0, 1
        number = 0
        while True:
            names = sorted(self._names)
            random.Random(f"{self._seed}|{start}|pass {number}").shuffle(names)  # on all ranks the same
            yield from (
                ((name, 0, 1) for name in names[rank::world_size])
                if len(names) >= world_size
                else ((name, rank, world_size) for name in names)
            )
            number += 1

    def _samples(self, drawn: Iterable[tuple[str, int, int]]) -> Iterator[StreamSample]:
        empty, logged = 0, Counter[str]()
        for name, first, step in drawn:
            skipped, count = Counter[str](), 0
            for number, (key, (_, data, label)) in enumerate(_read(self._tars, name, self._spec.member, skipped)):
                if number % step == first:
                    count += 1
                    yield {"__key__": key, "__url__": f"{self._tars.files.url}/{name}", "data": data, "cls": label}
            self._log_skipped(name, skipped, logged)
            empty = 0 if count else empty + 1
            if empty > 2 * len(self._names) + 100:
                raise DataError(f"{self._tars.files.url}: rank {self._order.rank} found no sample in {empty} tars: use fewer workers")

    def _log_skipped(self, name: str, skipped: Counter[str], logged: Counter[str]) -> None:
        """Log each kind of skipped members once."""
        for what, count in skipped.items():
            if not logged[what] and self._order.rank == 0:
                logger.warning("%s/%s: skipped %d %s (logged once, not for every tar)", self._tars.files.url, name, count, what)
            logged[what] += count
