"""External WebDataset shards as a source: image by image, with their labels, captions and other fields as columns.

Members are grouped by key as `_tar_samples` says, wherever they are in their tar. It reads the one image (or array) of each
sample, its `.cls`, and the `.json` and `.txt` that were asked for; everything else (`.pyd`, `.pickle`, ...) is left where it is, and
counted. The headers of all tars are walked once, when listing; a worker then reads by offset. A compressed tar is inflated once by
each worker that reads from it: unpack large ones first. To index tars in place, without a copy: `adopt_shards`.

A sample that cannot be used (no image, several images, a link that leads nowhere, no label by the rule that was asked for) is listed
with the reason, for the quarantine; so is every sample of a tar that is broken, if `source.bad_tars=skip`.
"""

import contextlib
import itertools
import json
import math
import re
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aecore.artifact.documents import parse_json
from aecore.data.classes import MAX_CLASS_BYTES
from aecore.data.format.bad_sample import BadSample
from aecore.data.format.index import INDEX_SCHEMA, SOURCE_SHA256
from aecore.data.format.record import DATA_EXTENSIONS, encode_keys
from aecore.data.sources import NAME_HELP, Listing, require_name
from aecore.data.sources._external_tars import ExternalTars
from aecore.data.sources._filter import PathFilter, globs, with_limit
from aecore.data.sources._frames import FrameReader, with_frames
from aecore.data.sources._labels import JSON, json_field, require_rule
from aecore.data.sources._names import file_of, split_of
from aecore.data.sources._npz import only_array
from aecore.data.sources._skipped import Skipped, of_kind
from aecore.data.sources._tar_file import BrokenTar, Member, TarFile
from aecore.data.sources._tar_samples import (
    ARCHIVED,
    TarReading,
    TarSample,
    small_member,
    stated_class,
    stated_text,
    tar_samples,
    text_of_class,
)
from aecore.data.sources._unpack import START_BYTES, compression
from aecore.errors import ConfigError, DataError, counted, did_you_mean
from aecore.registry import SOURCES, flatten, knob, spec
from aecore.store import TAR_ENDINGS, Seen, trim_cache

MAX_TEXT_BYTES, MAX_OPEN = 1 << 20, 64
MOST_PATHS = 1000  # to values of json members, for an error
MAX_JSON_DEPTH = 500  # so deep JSON can also be written again
MAX_EXACT = 1 << 53  # whole numbers up to here are exact in float64
_ENDINGS = "|".join(map(re.escape, sorted(TAR_ENDINGS, key=len, reverse=True)))
_SOURCE = re.compile(rf"(.*?(?i:{_ENDINGS}))#(\d+)\+(\d+)(s?)#(.*)", re.DOTALL)
_STEM = re.compile(rf"(?i:{_ENDINGS})$")
_OF_JSON = "json_"
Field = str | int | float | bool | None


@spec
class WebdatasetSpec:
    """External WebDataset shards: tars of images with .cls, .json or .txt members."""

    kind: Literal["webdataset"] = "webdataset"
    url: str = knob(
        "",
        "folder of tars, plain or compressed (.tar.gz, .zst, .bz2, .xz); one of them; a pattern like shards/{00000..00009}.tar or "
        "shards/*.tar; several of these with :: between them",
        identity=False,
    )
    member: str = knob("", "extension of the member that is the sample, for example seg.png; empty: the only image or array")
    label: str = knob(
        "auto",
        "cls; txt; json:<field>, also json:ann.class; tar: the tar's name; path: the folders in the tar; leaf: the last of them; "
        "regex:<expression> over the member's name: its first group; none; auto: cls where there is one",
    )
    columns: tuple[str, ...] = knob((), "fields of the .json member that become columns of the index; txt is the .txt member")
    keys: Literal["member", "shard"] = knob("member", "member: keys as in the tars; shard: with the tar's name before them")
    frames: Literal["first", "all", "refuse"] = knob("first", "of pages and animations: first, all as samples, or refuse the file", since=2)
    group: str | None = knob(
        None, "samples that stay whole in one split and shard: regex:<expression>: those in whose keys it finds the same", since=2
    )
    classes: tuple[str | int, ...] | str = knob((), "names of all classes in their order, or a file with one name a line", since=2)
    max_inflated_bytes: int = knob(
        0,
        "bytes that one tar may become, compressed or with holes and links (or an .npz member); 0: 1 GiB, or 128 times its own",
        ge=0,
        identity=False,
    )
    bad_tars: Literal["refuse", "skip"] = knob(
        "refuse", "a tar that is damaged or truncated: refuse the source, or skip the tar, with all its samples in the quarantine", since=2
    )
    include: tuple[str, ...] | str = knob((), "globs of the members, their folders or the tars to take; none: all", since=2)
    exclude: tuple[str, ...] | str = knob((), "globs of the members, their folders or the tars to leave out, such as '*_mask.png'", since=2)
    min_size: int = knob(0, "bytes that the image or array of a sample has at least: smaller ones are left out", ge=0, since=2)
    limit: int | None = knob(None, "samples at most, chosen by a hash of their paths: spread over all tars", ge=1, since=2)
    name: str = knob("", NAME_HELP, identity=False, since=2)
    tars: Literal[1, 2] = knob(
        2, "rules by which members become samples; 1: those of datasets that were begun before there were others", since=2, absent=1
    )

    def __post_init__(self) -> None:
        codec = self.member.rpartition(".")[2]
        if self.member and codec not in DATA_EXTENSIONS | {ARCHIVED}:
            raise ConfigError(f"source.member={self.member} ends in {codec!r}, which is not read{did_you_mean(codec, DATA_EXTENSIONS)}")
        require_rule("source.label", self.label, ("auto", "cls", "txt", "json:<field>", "tar", "path", "leaf", "none"))
        require_rule("source.group", self.group, ())
        require_name(self.name)
        twice = [name for name, count in Counter(map(_title, dict.fromkeys(self.columns))).items() if count > 1]
        if twice:
            field = twice[0].removeprefix(_OF_JSON)
            raise ConfigError(
                f"source.columns has {field!r} and {twice[0]!r}, and both would be the column {twice[0]!r} of the index, which has a "
                f"column {field!r} of its own: leave one of them out"
            )
        object.__setattr__(self, "include", globs("source.include", self.include))
        object.__setattr__(self, "exclude", globs("source.exclude", self.exclude))


class _Place(NamedTuple):
    """A tar: its name, the name without its ending, the split in the name."""

    name: str
    stem: str
    split: str


class _Columns:
    """The listed samples, by column."""

    def __init__(self, fields: tuple[str, ...]) -> None:
        self.keys, self.sources, self.labels, self.splits = list[str](), list[str](), list[str](), list[str]()
        self.tars, self.members = list[str](), list[str]()
        self.sizes, self.states = list[int](), list[Seen | None]()
        self.unusable = list[BadSample | None]()
        self.fields: dict[str, list[Field]] = {name: [] for name in fields}
        self.skipped = Skipped()
        self.texts = 0  # samples with a .txt
        self.seen: Counter[str] = Counter()  # fields of the json members
        self.paths = dict[str, None]()  # to values in those that lack the label's, the first ones


@SOURCES.register(WebdatasetSpec)
class WebdatasetSource:
    """The samples of the tars at the `url` of a `WebdatasetSpec`; sources are `<tar>#<offset>+<size>#<member>`, `s#` if it is sparse.

    `compressed` names the tars, of those that were listed, whose samples cannot be read by offset.
    """

    def __init__(self, shards: WebdatasetSpec) -> None:
        self._spec = shards
        self._reading = TarReading(shards.member, "source.member", shards.tars)
        self._filter = PathFilter(shards.include, shards.exclude, shards.min_size, "sample(s)")
        self._open: OrderedDict[str, TarFile] = OrderedDict()
        self._found: ExternalTars | None = None
        self._frame = FrameReader(self._member)
        self._states = dict[str, str | None]()  # of tars that were read and are not open any more, after that
        self.compressed: dict[str, str] = {}

    @property
    def tars(self) -> ExternalTars:
        """The tars, listed at the first access."""
        self._found = self._found or ExternalTars.at(self._spec.url, rules=self._spec.tars)
        return self._found

    def for_thread(self) -> "WebdatasetSource":
        """Return a source of the same tars with open files of its own, for another thread; `close` it."""
        other = WebdatasetSource(self._spec)
        other._found = self.tars
        return other

    def close(self) -> None:
        """Close all tars; their copies in the cache that are above its bound go."""
        while self._open:
            self._close_first()
        if self._found is not None and self._found.files.room is not None:
            trim_cache()

    def _close_first(self) -> None:
        name, tar = self._open.popitem(last=False)
        self._states[name] = None
        with contextlib.suppress(OSError):
            self._states[name] = tar.state()
        tar.close()

    def listing(self) -> Listing:
        """List every sample, tar by tar, after parsing all headers.

        Raises
        ------
        DataError
            If there is no tar or no sample, a key comes twice, or a tar is damaged or truncated and `bad_tars` is refuse.
        """
        found = _Columns(self._spec.columns)
        for name in self.tars.files.ahead([name for name in self.tars.names if self._filter.takes_tar(name, found.skipped)]):
            self._list(found, name)
        if not found.keys:
            kinds = (f"{of_kind(count, what)}, {examples}" for what, count, examples in found.skipped.kinds())
            left = "; ".join((*kinds, *self._filter.unused()))
            raise DataError(
                f"{self.tars.files.url} holds no sample in {counted(len(self.tars.names), 'tar', 'tars')} ({left or 'they are empty'})"
            )
        self._require_keys(found)
        self._require_fields(found)
        listing = Listing(
            encode_keys(found.keys),
            found.sources,
            np.array(found.sizes, np.int64),
            label_names=found.labels if any(found.labels) else None,
            splits=found.splits if any(found.splits) else None,
            columns={_title(name): _column(values, found.unusable, self._spec.tars) for name, values in found.fields.items()},
            notes=(*found.skipped.lines(), *self._filter.unused(), *self._notes(found)),
            label_paths=False,
            paths=found.members,
            unusable=found.unusable if any(found.unusable) else None,
        )
        listing = listing.with_states(found.states)
        names = [f"{tar}/{name}" for tar, name in zip(found.tars, found.members, strict=True)]
        listing = with_limit(listing, self._spec.limit, self._spec.group, names)
        if self._spec.frames != "all":
            return listing
        framed = with_frames(listing, self._member, self._frame.max_pixels)
        return with_limit(framed, self._spec.limit, self._spec.group, framed.sources)

    def read(self, source: str) -> tuple[str, bytes]:
        """Return codec and bytes of one sample; the array of an `.npz` as `.npy`.

        Raises OSError if its tar is gone, StoreError if it cannot be read, DataError if it was truncated after listing, BadSample for
        an `.npz` that holds no array, several ones, or Python objects.
        """
        return self._frame(source) if self._spec.frames == "all" else self._member(source)

    def read_states(self, sources: Sequence[str]) -> list[str | None]:
        """Return the states of the tars of these samples, which were read, as they are now (compressed: when inflated)."""
        names = map(file_of, sources) if self._spec.frames == "all" else sources
        tars = [parse_source(name)[0] for name in names]
        known = {tar: self._state(tar) for tar in set(tars)}
        return [known[tar] for tar in tars]

    def _state(self, tar: str) -> str | None:
        if tar in self._open:
            return self._open[tar].state()
        return self._states.get(tar) or self.tars.files.state(tar)

    def bound_pixels(self, most: int) -> None:
        """Decode no frame of more pixels."""
        self._frame.max_pixels = most

    def _member(self, source: str) -> tuple[str, bytes]:
        tar, member = parse_source(source)
        if tar not in self._open:
            room, sizes = self.tars.files.room, [tar.size for tar in self._open.values()]
            while sizes and (len(sizes) >= MAX_OPEN or (room is not None and sum(sizes) + max(sizes) > room)):  # one more like the largest
                self._close_first()
                del sizes[0]
            self._open[tar] = self._opened(tar)
        self._open.move_to_end(tar)
        return self._sample(member, self._open[tar].read(member))

    def _sample(self, member: Member, data: bytes) -> tuple[str, bytes]:
        codec = member.name.lower().rpartition(".")[2]
        return ("npy", only_array(data, self._spec.max_inflated_bytes, "source.max_inflated_bytes")) if codec == ARCHIVED else (codec, data)

    def prefetch(self, sources: Sequence[str]) -> Callable[[str], tuple[str, bytes]]:
        """Return a `read` for exactly these samples in this order.

        Of tars in a bucket that do not all fit into the cache each sample is downloaded by itself: else every shard would fetch every tar.
        What cannot be read by its offset (in a compressed tar, a sparse member, a frame of a file) is read from a copy of its tar.
        """
        files = self.tars.files
        if self._spec.frames == "all":
            self._frame.expect(sources)
            return self.read
        if files.room is None:
            return self.read
        places = [parse_source(source) for source in sources]
        names = list(dict.fromkeys(tar for tar, _ in places))
        starts = files.pieces([(name, 0, START_BYTES) for name in names])
        if starts is None:
            return self.read
        plain = {name: compression(starts(row)) is None for row, name in enumerate(names)}
        by_offset = [plain[tar] and not member.sparse for tar, member in places]
        pieces = files.pieces(
            [(tar, member.offset, member.size) for (tar, member), is_plain in zip(places, by_offset, strict=True) if is_plain]
        )
        if pieces is None:
            return self.read
        rows, at = iter(range(len(places))), iter(range(len(places)))

        def read(source: str) -> tuple[str, bytes]:
            row = next(rows)
            assert sources[row] == source, "samples are read in the order of `sources`"
            member = places[row][1]
            return self._sample(member, pieces(next(at))) if by_offset[row] else self._member(source)

        return read

    def _tar(self, name: str) -> TarFile:
        return TarFile(self.tars.files, name, self._spec.max_inflated_bytes, "source.max_inflated_bytes")

    def _opened(self, tar: str) -> TarFile:
        try:
            return self._tar(tar)
        except DataError as error:
            if isinstance(error.__cause__, OSError):  # not a wrong address: it was listed
                raise error.__cause__ from None
            raise

    def _list(self, found: _Columns, name: str) -> None:
        if parse_source(f"{name}#0+0#0.png")[0] != name:
            raise DataError(f"{self.tars.files.url}/{name!r} has a name like that of a sample in a tar: rename it")
        try:
            seen = self.tars.files.seen(name)
        except OSError:  # `_tar` says so
            seen = None
        tar = self._tar(name)
        try:
            if tar.compression is not None:
                self.compressed[name] = tar.compression
            samples, broken = tar_samples(tar, self._reading, found.skipped)
            if broken is not None and self._spec.bad_tars == "refuse":
                raise BrokenTar(f"{broken}; or set source.bad_tars=skip, which puts what is known of it into the quarantine") from broken
            is_class = self._spec.label == "tar" and self._spec.tars > 1  # its name is no split: the class `test_tube` is in all of them
            place = _Place(name, _STEM.sub("", name), split_of(name.rpartition("/")[0] if is_class else name))
            for sample in samples:
                size = self._spec.min_size if sample.bad is not None else sample.data.size
                if self._filter.is_set and not self._filter.takes(f"{name}/{sample.data.name}", size, found.skipped, sample.data.name):
                    continue
                bad = sample.bad if broken is None else BadSample("broken_tar", str(broken))
                self._add(found, sample, tar, place, bad)
            if broken is not None:
                rest = TarSample(name.rpartition("/")[2], 0, {}, Member("", 0, tar.size), BadSample("broken_tar", str(broken)))
                self._add(found, rest, tar, place, rest.bad)
            found.states += [seen] * (len(found.keys) - len(found.states))
        finally:
            tar.close()

    def _add(self, found: _Columns, sample: TarSample, tar: TarFile, place: _Place, bad: BadSample | None) -> None:
        fields, label = dict[str, Field](), ""
        if bad is None:
            try:
                fields = self._fields(found, sample, tar)
                label = self._label(found, sample, tar, fields)
            except BadSample as error:
                bad = error.bare()
        member = sample.data
        found.texts += "txt" in sample.members
        above = f"{place.stem}+{sample.part}" if sample.part else place.stem  # keys of joined tars may come again
        found.keys.append(f"{above}/{sample.key}" if self._spec.keys == "shard" else sample.key)
        found.sources.append(f"{place.name}#{member.offset}+{member.size}{'s' if member.sparse else ''}#{member.name}")
        found.sizes.append(member.size)
        found.splits.append(place.split)
        found.tars.append(place.name)
        found.members.append(member.name)
        found.labels.append(label)
        found.unusable.append(bad)
        for column, values in found.fields.items():
            values.append(fields.get(column))

    def _fields(self, found: _Columns, sample: TarSample, tar: TarFile) -> dict[str, Field]:
        """Return the fields of the json and txt members, if configured; BadSample for members that cannot be read."""
        fields: dict[str, Field] = {}
        if self._spec.label.startswith(JSON) or set(self._spec.columns) - {"txt"}:
            data = self._json(tar, sample.members.get("json"))
            if isinstance(data, dict):
                fields = {key: _field(value, self._spec.tars) for key, value in data.items()}
                found.seen.update(data.keys())
            if self._spec.label.startswith(JSON):
                fields[self._spec.label] = self._json_label(found, data)
        text = sample.members.get("txt")
        if "txt" in self._spec.columns and self._spec.tars == 1:
            fields |= {} if text is None else {"txt": small_member(tar, text, MAX_TEXT_BYTES).decode("utf-8", "replace")}
        elif "txt" in self._spec.columns:
            fields["txt"] = None if text is None else stated_text(tar, text, MAX_TEXT_BYTES, "metadata")
        for name in self._spec.columns if self._spec.tars > 1 else ():
            _require_text(name, fields.get(name))
        return fields

    def _json(self, tar: TarFile, member: Member | None) -> Any:  # any: plain JSON data
        try:
            data = parse_json(
                small_member(tar, member, MAX_TEXT_BYTES) or b"{}", depth=MAX_JSON_DEPTH if self._spec.tars > 1 else sys.maxsize
            )
        except ValueError as error:
            if self._spec.tars == 1:
                return {}
            raise BadSample("json", f"its .json member, whose fields are asked for, is no JSON: {error}") from error
        if isinstance(data, dict) or self._spec.tars == 1 or (isinstance(data, list) and not set(self._spec.columns) - {"txt"}):
            return data
        raise BadSample("json", f"its .json member, whose fields are asked for, is a {type(data).__name__}, expected an object")

    def _json_label(self, found: _Columns, data: Any) -> Field:  # any: plain JSON data
        """Return the field that is the label; BadSample if it is a list or an object."""
        path = self._spec.label.removeprefix(JSON)
        value = json_field(data, path)
        found.seen.update([path] if value is not None else [])
        if value is None and self._spec.tars > 1 and len(found.paths) < MOST_PATHS:
            found.paths |= dict.fromkeys(path for path, _ in itertools.islice(flatten(data, lists=True), MOST_PATHS))
        if isinstance(value, dict | list) and self._spec.tars > 1:
            below = next(iter(value), "name") if isinstance(value, dict) else 0
            raise BadSample(
                "label",
                f"{self._spec.label} is a {type(value).__name__}, expected a name or a number: give the path to it, for example "
                f"source.label={self._spec.label}.{below}",
            )
        return value if isinstance(value, str | int | float) else None

    def _label(self, found: _Columns, sample: TarSample, tar: TarFile, fields: dict[str, Field]) -> str:
        rule = self._spec.label
        if rule == "tar":
            name = _STEM.sub("", tar.where.rpartition("/")[2])
            return _clean(name) if self._spec.tars == 1 else name
        if rule not in ("auto", "cls", "txt") and not rule.startswith(JSON):
            return ""  # `by_rules` makes it of the path, or there is none
        if rule.startswith(JSON):
            value = fields.get(rule)
            if isinstance(value, float) and not math.isfinite(value) and self._spec.tars > 1:
                raise BadSample("label", f"{rule} is {value}, which may stand for any number: give a whole number or a name")
            text = "" if value is None else str(int(value) if isinstance(value, float) and value.is_integer() else value)
            text = text if self._spec.tars == 1 else text_of_class(text)
        else:
            member = sample.members.get("txt" if rule == "txt" else "cls")
            if self._spec.tars == 1:
                text = small_member(tar, member, MAX_CLASS_BYTES).decode("utf-8", "replace").strip()
            else:
                text = stated_class(tar, member)
        if not text and rule != "auto":
            if self._spec.tars > 1:
                raise BadSample("no_label", f"the sample has no {rule}, which source.label asks for: add it, or set source.label=auto")
            found.skipped.add(f"label(s): samples without {rule}", sample.key)
        return _clean(text)

    def _notes(self, found: _Columns) -> list[str]:
        if self._spec.label != "auto":
            return []
        if any(found.labels):
            without = [key for key, label, bad in zip(found.keys, found.labels, found.unusable, strict=True) if not label and bad is None]
            if not without:
                return []
            count = counted(len(without), "sample has", "samples have")
            return [f"{count} no .cls, as others have, and no label: {without[0]!r} for example; source.label=cls quarantines such samples"]
        texts = "txt (the .txt members, if they are no captions), " if found.texts else ""
        return [
            f"no sample has a label, since none has a .cls: set source.label={texts}tar, path, leaf, json:<field> or regex:<expression>"
        ]

    def _require_keys(self, found: _Columns) -> None:
        """Raise DataError if two samples have one key; those that cannot be used get another one."""
        if len(set(found.keys)) == len(found.keys):
            return
        place: dict[str, int] = {}  # the first usable sample of each key, or else the first one
        for row in sorted(range(len(found.keys)), key=lambda row: found.unusable[row] is not None):
            place.setdefault(found.keys[row], row)
        taken, again = set(found.keys), Counter[str]()
        for row, key in enumerate(found.keys):
            if place[key] == row:
                continue
            if found.unusable[row] is None:
                first, second = found.tars[place[key]], found.tars[row]
                if first != second:
                    where = f"{first} and {second} of {self.tars.files.url} both have"
                else:
                    where = f"two of the tars that were joined to {self.tars.files.url}/{first} have"
                remedy = "rename one of these tars, since keys have their names without .tar (or .tar.gz, ...) before them"
                raise DataError(f"{where} the key {key!r}: {remedy if self._spec.keys == 'shard' else 'use source.keys=shard'}")
            while found.keys[row] in taken:
                again[key] += 1
                found.keys[row] = f"{key}#{again[key] + 1}"
            taken.add(found.keys[row])

    def _require_fields(self, found: _Columns) -> None:
        asked = {*self._spec.columns} - {"txt"} | ({self._spec.label.removeprefix(JSON)} if self._spec.label.startswith(JSON) else set())
        judged = any(bad is None or bad.reason == "no_label" for bad in found.unusable)
        for name in sorted(asked - found.seen.keys()) if judged else ():
            known = found.paths if name == self._spec.label.removeprefix(JSON) else found.seen
            raise DataError(f"no .json member in {self.tars.files.url} has the field {name!r}{did_you_mean(name, known or found.seen)}")


def parse_source(source: str) -> tuple[str, Member]:
    """Return the tar and the member of a source name of this kind."""
    match = _SOURCE.fullmatch(source)
    if match is None:
        raise DataError(f"{source!r} is no sample of a tar (like 'a.tar#512+784#0001.png')")
    return match[1], Member(match[5], int(match[2]), int(match[3]), match[4] == "s")


def _title(name: str) -> str:
    """Return the column of the index that a field of the json member becomes."""
    return f"{_OF_JSON}{name}" if name in (*INDEX_SCHEMA.names, SOURCE_SHA256) else name


def _require_text(name: str, value: Field) -> None:
    """BadSample if a text has what no column can hold."""
    try:
        str(value).encode()
    except UnicodeEncodeError as error:
        raise BadSample("json", f"its field {name!r} is {ascii(value)[:80]}, which has half a surrogate pair: write it without") from error


def _clean(text: str) -> str:
    """Return the text without what UTF-8 and the listing's hash cannot hold."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "")


def _field(value: Any, rules: int) -> Field:  # any: plain JSON data
    """Return the value of a JSON field as a column holds it: lists and objects as JSON text (by the rules of version 1: as nothing)."""
    if value is None or isinstance(value, str | int | float):
        return value
    return None if rules == 1 else json.dumps(value, ensure_ascii=False)


def _column(values: list[Field], unusable: list[BadSample | None], rules: int) -> NDArray[Any]:  # any: every column has its own dtype
    """Return whole numbers as int64, numbers as float64 (NaN: none), everything else as text (None: none).

    Samples that cannot be used decide nothing: their values are zeros or none.
    """
    if any(unusable):
        rows = [row for row, bad in enumerate(unusable) if bad is None]
        known = _column([values[row] for row in rows], [], rules)
        column = np.full(len(values), None if known.dtype == object else 0, known.dtype)
        column[rows] = known
        return column
    kinds = {type(value) for value in values}
    if kinds == {bool}:
        return np.array(values, np.bool_)
    try:
        if kinds == {int}:
            return np.array(values, np.int64)
        if kinds <= {int, float, type(None)} and kinds != {type(None)} and (rules == 1 or _are_exact(values)):
            return np.array([np.nan if value is None else value for value in values], np.float64)
    except OverflowError:
        pass
    text: Callable[[Field], str] = str if rules > 1 else lambda value: _clean(str(value))
    return np.array([None if value is None else text(value) for value in values], dtype=object)


def _are_exact(values: list[Field]) -> bool:
    """Return whether no whole number changes as float64: an identifier of 64 bits would become another one."""
    return all(not isinstance(value, int) or abs(value) <= MAX_EXACT for value in values)
