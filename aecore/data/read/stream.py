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
- There are no hashes: the run's identity holds names and sizes of the tars.
- There is no validation split and no quarantine. Ordinals number the rows of the steps. A sample that cannot be used is left out, logged
  and counted; the run stops when more than `input.max_bad` of the samples that a rank has read are of that kind.
"""

import contextlib
import functools
import logging
import math
import random
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch

from aecore._base.batch import Batch
from aecore.data.classes import MAX_CLASS_BYTES, UNKNOWN, numbers_of, quoted
from aecore.data.format.bad_sample import BadSample
from aecore.data.format.decode import DecodeError, Decoder, Pixels
from aecore.data.format.foreign import explained
from aecore.data.format.image import MAX_PIXELS, PixelsVersion
from aecore.data.format.record import IMAGE_EXTENSIONS, array_header, image_header
from aecore.data.format.sample_format import SampleFormat, common_formats, remedy_of
from aecore.data.format.transform import TransformSpec
from aecore.data.read.loader import InputSpec
from aecore.data.read.order import TrainingOrder
from aecore.data.sources._external_tars import ExternalTars
from aecore.data.sources._names import split_of
from aecore.data.sources._npz import only_array
from aecore.data.sources._skipped import Skipped, of_kind
from aecore.data.sources._tar_file import Member, TarFile
from aecore.data.sources._tar_samples import ARCHIVED, TarReading, TarSample, stated_class, tar_samples
from aecore.errors import ConfigError, DataError, Hint, counted
from aecore.store import sha256_json
from aecore.threads import prefetched

logger = logging.getLogger(__name__)
MAX_DIGITS = 18
TRIED, TRIED_BYTES = 16, 1 << 24  # samples whose formats are compared when a stream is opened, and their bytes at most after the first one
MOST_REMEMBERED = 100_000  # different bad samples, which are not read again, and samples of tars that are not listed again
LOGGED = 3  # bad samples that are logged one by one
PASSES = 20  # of nothing but bad samples end a run whatever share may be bad: tars that are drawn with replacement may miss the good ones
FEWEST = 1000  # samples that the share of bad ones is of, at least: the first one of ten is no tenth of the data
StreamSample = dict[str, Any]  # any: webdataset's own sample type: `__key__`, `__url__`, `ext`, `data`, `cls`, `place` and `bad`
Place = tuple[str, str, int]  # of a sample: the tar, the name and the offset of its data


@dataclass(frozen=True, slots=True)
class StreamDataset:
    """The tars of one split: sizes in bytes by name below `url`, and the format of their samples; a `TrainingData`.

    `rules` are those by which members become samples (see `_tar_samples`): 1 in a run that version 1 began.
    """

    url: str
    split: str
    tars: Mapping[str, int]
    sample_format: SampleFormat
    rules: Literal[1, 2] = 1
    number = 0  # this and the next are no fields: the same for all tars without an index
    classes = None

    @property
    def dataset_sha256(self) -> str:
        """The hash of split, names, sizes and rules."""
        return self.training_key(self.split)

    def training_key(self, split: str) -> str:
        """Return the hash of split, names, sizes and rules; DataError if it is another split than the opened one."""
        if split != self.split:
            raise DataError(f"the tars of {self.url} were opened for split {self.split!r}, not {split!r}")
        # laid out like `manifest.shards_sha256`, of shards without counts: it is in the claims of runs
        rows = [[split, name, 0, "", sha256_json({"name": name, "bytes": size})] for name, size in self.tars.items()]
        return sha256_json({"shards": rows, "classes": []} | ({} if self.rules == 1 else {"rules": self.rules}))

    def input_shape(self, *, sequences: bool = False) -> tuple[int, ...]:
        """Return the shape of a sample, images as `(C, H, W)`."""
        return self.sample_format.tensor_shape

    def num_samples(self, split: str) -> None:
        """Return None: the samples are not counted."""

    def num_groups(self, split: str) -> int:
        """Return 0: bags need an index."""
        return 0


def open_stream(
    url: str,
    split: str,
    member: str = "",
    split_in_name: Callable[[str], str] = split_of,
    rules: Literal[1, 2] = 2,
    pixels: PixelsVersion = 2,
    max_pixels: int = MAX_PIXELS,
) -> StreamDataset:
    """Open the tars of `split`: lists them and reads the first samples. Most of them decide the format (by `rules=1`: the first one).

    `split_in_name` returns the split that a tar's name contains; if no name contains one, all tars belong to `split`. Images of more than
    `max_pixels` are not read.

    Raises
    ------
    DataError
        If there are no tars (of that split), or none of the first samples can be read.
    """
    tars = ExternalTars.at(url, "data", rules)
    sizes = tars.sizes()
    splits = {name: split_in_name(name) for name in tars.names}
    names = [name for name in tars.names if splits[name] in ("", split)] if any(splits.values()) else list(tars.names)
    if not names:
        raise DataError(f"{tars.files.url} has no tars of split {split!r} (their names have {', '.join(sorted(set(splits.values())))})")
    sample_format = _format(tars, names, TarReading(member, "input.member", rules), pixels, max_pixels)
    return StreamDataset(tars.files.url, split, {name: sizes[name] for name in names}, sample_format, rules)


def _format(tars: ExternalTars, names: list[str], reading: TarReading, pixels: PixelsVersion, max_pixels: int) -> SampleFormat:
    """Return the most frequent format of the first samples that can be read; DataError if none of the first `FEWEST` can."""
    found, nbytes, tried, why = Counter[str](), 0, 0, ""
    for name in names:
        with contextlib.closing(TarFile(tars.files, name)) as tar:
            for listed in _listed(tar, reading, Skipped()):
                sample, tried = _read(tar, listed, reading), tried + 1
                try:
                    text = _format_of(sample, pixels, max_pixels)
                except BadSample as bad:
                    why = why or f"; the first of them is {sample['__key__']!r} of {sample['__url__']}: {bad}"
                else:
                    nbytes += len(sample["data"]) if found else 0
                    found[text] += 1
                if found and (reading.rules == 1 or found.total() >= TRIED or nbytes > TRIED_BYTES):
                    return _most_common(found)
                if not found and tried >= FEWEST:
                    break
        if not found and tried >= FEWEST:
            break
    if not found:
        first = f"none of the first {tried} samples can be read{why}" if tried else f"no sample in {counted(len(names), 'tar', 'tars')}"
        raise DataError(f"{tars.files.url} holds no image or array that can be trained on: {first}: check data, or set input.member")
    return _most_common(found)


def _most_common(found: Counter[str]) -> SampleFormat:
    """Return the one format that all have, whether with alpha or without, or else that of most."""
    common = common_formats(map(SampleFormat.parse, found))
    return common.pop() if len(common) == 1 else SampleFormat.parse(found.most_common(1)[0][0])


def _format_of(sample: StreamSample, pixels: PixelsVersion, max_pixels: int) -> str:
    """Return the format of a sample; BadSample if it has none that is decoded."""
    if sample["bad"] is not None:
        raise sample["bad"].bare()
    data, ext = sample["data"], sample["ext"]
    try:
        is_image = ext in IMAGE_EXTENSIONS
        header = image_header(data, ext, pixels=pixels, max_pixels=max_pixels) if is_image else array_header(data, pixels=pixels)
    except BadSample as bad:
        if bad.reason == "too_large":  # the limit of images that are read is another one than that of images that are written
            text = bad.message.replace("shards.max_pixels", "input.max_pixels")
            raise BadSample("too_large", f"{text}: raise that limit, or make the image smaller") from bad
        raise explained(data, ext, bad) from bad
    except ConfigError as error:
        text = "an array whose axes may be [H, W, C] or [C, H, W]: save it with the channels as the shortest axis, or shard the tars, where"
        raise BadSample("layout", f"{text} shards.layout tells") from error
    try:
        SampleFormat.parse(header.format_text)
    except DataError as error:
        raise BadSample("unsupported", str(error)) from error
    return header.format_text


def _listed(tar: TarFile, reading: TarReading, skipped: Skipped) -> list[TarSample]:
    """Return the samples of a tar; DataError if it is broken."""
    samples, broken = tar_samples(tar, reading, skipped)
    if broken is not None:
        remedy = "or use shard_dataset or adopt_shards with source.bad_tars=skip, which put what is known of it into a quarantine"
        raise DataError(f"{broken}; {remedy}") from broken
    return samples


def _read(tar: TarFile, sample: TarSample, reading: TarReading) -> StreamSample:
    """Return a sample with its bytes, unless it cannot be used (`bad`); `cls` is the class that is stated ("": none)."""
    bad, data, text = sample.bad, b"", ""
    ext = sample.data.name.lower().rpartition(".")[2]
    if bad is None:
        try:
            text = _class(tar, sample.members.get("cls"), reading)
            data = tar.read(sample.data)
            ext, data = ("npy", only_array(data)) if ext == ARCHIVED else (ext, data)
        except BadSample as error:
            bad = error.bare()
    place = _place(tar, sample)
    return {"__key__": sample.key, "__url__": tar.where, "ext": ext, "data": data, "cls": text, "place": place, "bad": bad}


def _with_class(sample: TarSample) -> TarSample:
    """Return a sample with no other members than are read of it."""
    return sample._replace(members={ext: member for ext, member in sample.members.items() if ext == "cls"})


def _place(tar: TarFile, sample: TarSample) -> Place:
    return tar.where, sample.data.name, sample.data.offset


def _class(tar: TarFile, member: Member | None, reading: TarReading) -> str:
    if reading.rules > 1:
        return stated_class(tar, member)
    return "" if member is None or member.size > MAX_CLASS_BYTES else tar.read(member).strip().decode("utf-8", "replace")


class _Tally:
    """The samples that one rank has used or left out; DataError when too many are bad.

    `in_pass` is the number of samples that this rank reads of all tars, once it is known; `known` are the bad ones.
    """

    def __init__(self, most: float, expected: SampleFormat) -> None:
        self._most, self._expected = most, expected
        self.judged = self.bad = self.in_pass = 0
        self.in_vain = 0  # bad ones since the last one that went on to the decoder
        self.known = set[Place]()
        self._text = ""  # about the last sample that was found to be bad
        self._damaged, self._formats = False, {expected.without_alpha}  # what the bad samples are: damaged, or of other formats

    def add(self, sample: StreamSample, why: BadSample, other: SampleFormat | None = None) -> None:
        """Count a bad sample, damaged or of an `other` format: log the first, the tenth, the hundredth, ..."""
        if sample["place"] in self.known:
            self.again(1)
            return
        self._count(1)
        self._damaged |= other is None
        self._formats |= set() if other is None else {other}
        if len(self.known) < MOST_REMEMBERED:
            self.known.add(sample["place"])
        self._text = text = f"{sample['__url__']}: sample {sample['__key__']!r} cannot be trained on ({why})"
        if self.bad <= self._most * self._total and not self._nothing_else:
            if self.bad <= LOGGED or str(self.bad).strip("0") == "1":
                logger.warning("%s and is left out: %d of %d samples so far", text, self.bad, self.judged)
            return
        self._end()

    def again(self, count: int) -> None:
        """Count bad samples that were judged in an earlier pass, of which samples may still be on their way to the decoder."""
        self._count(count)
        if count and self._nothing_else:
            self._end()

    def _count(self, bad: int) -> None:
        self.judged += bad
        self.bad += bad
        self.in_vain += bad

    @property
    def _nothing_else(self) -> bool:
        """Whether passes over all tars found only bad samples: then no next one will come."""
        return bool(self.in_pass) and self.in_vain >= max(FEWEST, PASSES * self.in_pass)

    @property
    def _total(self) -> int:
        """The samples that the share of bad ones is of."""
        return max(self.judged, min(FEWEST, self.in_pass or FEWEST))

    def _end(self) -> NoReturn:
        # twice the share so far, since what has not been read may be worse: advice is not to be refused in the next attempt
        found = max(self.bad / self.judged, len(self.known) / self.in_pass if self.in_pass else 0)
        share = min(1.0, math.ceil(2000 * found) / 1000)
        alike = remedy_of(self._formats) if len(self._formats) > 1 else ""
        decode = f"shard the tars with shards.check=decode and shards.max_bad={share:g}" if self._damaged else ""
        known = self._expected
        expected = f"{'images' if known.image else 'arrays'} of shape {known.shape} and dtype {known.dtype}"
        more = f"more than input.max_bad={self._most:g} allows", f"set input.max_bad={share:g} to leave them out"
        over, leave_out = ("none of a whole pass over the tars can be used", "") if self._nothing_else else more
        remedies = "; and to have one format: ".join(filter(None, (decode, alike)))
        remedy = ", or ".join(filter(None, (leave_out, remedies))) or "check that these are the right tars"
        raise DataError(
            f"{self._text}: {self.bad} of {self._total} samples are bad, {over} (expected: {expected}). {remedy[0].upper()}{remedy[1:]}",
            hint=Hint("bad-sample", {"share": f"{share:g}"}) if self._damaged else Hint("shard-instead"),
        )


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
        self._reading, self._pixels_version = TarReading(spec.member, "input.member", dataset.rules), transform.pixels
        self._decoder = Decoder(transform.reading, self._sample)
        self._order, self._spec = order, spec
        self._seed = f"{dataset.dataset_sha256}|{order.seed}"

    def batches(self, start_step: int = 0, stop_step: int | None = None) -> Generator[Batch, None, None]:
        """Yield this rank's part of the global batches [start_step, stop_step), on and on if `stop_step` is None.

        A sample that does not decode to the format of the others is left out, and the next one takes its place. DataError if there
        are too many of them, or a tar is broken.
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
        tally = _Tally(self._spec.max_bad, self._sample)
        samples, step = iter(self._pipeline(start, tally)), start
        while stop is None or step < stop:
            yield self._batch(samples, positions, step * size, tally)
            step += 1

    def _batch(self, samples: Iterator[StreamSample], positions: torch.Tensor, first: int, tally: _Tally) -> Batch:
        rows = [next(samples) for _ in range(len(positions))]
        pixels, at = self._pixels(rows, range(len(rows)), tally)
        while at:  # a bad sample's place is taken by the next one
            for row in at:
                rows[row] = next(samples)
            pixels[at], at = self._pixels([rows[row] for row in at], at, tally)
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

    def _pixels(self, rows: Sequence[StreamSample], at: Sequence[int], tally: _Tally) -> tuple[Pixels, list[int]]:
        """Return the decoded samples, whose rows in the batch are `at`, and the rows of those that do not decode."""
        found = list[DecodeError]()
        pixels = self._decoder.batch([row["data"] for row in rows], found.append)
        tally.judged += len(rows) - len(found)
        for error in found:
            tally.add(rows[error.row], *self._why(rows[error.row], error))
        return pixels, [at[error.row] for error in found]

    def _why(self, row: StreamSample, error: DecodeError) -> tuple[BadSample, SampleFormat | None]:
        """Return why a sample did not decode: what the decoder says, or its format if that is another one than the others have."""
        try:
            text = _format_of(row, self._pixels_version, self._spec.max_pixels)
        except BadSample as bad:
            return bad, None
        if (other := SampleFormat.parse(text).without_alpha) != self._sample.without_alpha:
            return BadSample("format", f"its format is {text}"), other
        return BadSample(error.reason, str(error)), None

    def _pipeline(self, start: int, tally: _Tally) -> Iterable[StreamSample]:
        """Return the endless webdataset pipeline of this rank from step `start` on: tars, samples, shuffle."""
        from webdataset import FluidWrapper, filters

        rank = f"{self._order.rank} of {self._order.world_size}"
        stages = [functools.partial(self._samples, tally)]
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

    def _samples(self, tally: _Tally, drawn: Iterable[tuple[str, int, int]]) -> Iterator[StreamSample]:
        """Yield the samples of the drawn tars that can be read.

        A tar is listed once, unless it was written again or more samples than `MOST_REMEMBERED` are in others; what was found to be bad is
        not read again.
        """
        empty, logged, total, num_tars = 0, set[str](), 0, 0
        listings = dict[str, tuple[object, int, list[TarSample]]]()  # by tar: its state, how many are bad, the others
        room = MOST_REMEMBERED
        rank, world_size = self._order.rank, self._order.world_size
        per_pass = len(self._names[rank::world_size]) if len(self._names) >= world_size else len(self._names)
        for name, first, step in drawn:
            skipped, good = Skipped(), list[TarSample]()
            with contextlib.closing(TarFile(self._tars.files, name)) as tar:
                state, bad, listed = listings.pop(name, (None, 0, []))
                room += len(listed)
                if state == tar.stamp:
                    tally.again(bad)
                else:
                    bad, listed = 0, [_with_class(sample) for sample in _listed(tar, self._reading, skipped)[first::step]]
                count = bad + len(listed)
                for known in listed:
                    if _place(tar, known) in tally.known:
                        tally.again(1)
                        bad += 1
                        continue
                    sample = _read(tar, known, self._reading)
                    if sample["bad"] is not None:
                        tally.add(sample, sample["bad"])
                        bad += 1
                        continue
                    good.append(known)
                    tally.in_vain = 0
                    yield sample
                if len(good) <= room:
                    listings[name] = tar.stamp, bad, good
                    room -= len(good)
            self._log_skipped(name, skipped, logged)
            num_tars, total = num_tars + 1, total + count
            if num_tars == per_pass:
                tally.in_pass = total
            empty = 0 if count else empty + 1
            if empty > 2 * len(self._names) + 100:
                raise DataError(f"{self._tars.files.url}: rank {self._order.rank} found no sample in {empty} tars: use fewer workers")

    def _log_skipped(self, name: str, skipped: Skipped, logged: set[str]) -> None:
        """Log each kind of skipped members once."""
        for what, count, examples in skipped.kinds():
            if what not in logged and self._order.rank == 0:
                text = "%s/%s: skipped %s, %s (logged once, not for every tar)"
                logger.warning(text, self._tars.files.url, name, of_kind(count, what), examples)
            logged.add(what)
