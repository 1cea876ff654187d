"""External WebDataset shards as a source: image by image, with their labels, captions and other fields as columns.

Members are grouped by key as webdataset does it, wherever they are in their tar. It reads the one image (or array) of each
sample, its `.cls`, and the `.json` and `.txt` that were asked for; everything else (`.pyd`, `.pickle`, ...) is left where it is, counted
by extension. The headers of all tars are walked once, when listing; a worker then reads by offset. A gzip'ed tar is inflated once by
each worker that reads from it: unpack large ones first. To index tars in place, without a copy: `adopt_shards`.
"""

import json
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from aecore.data.format.index import INDEX_SCHEMA
from aecore.data.format.record import ALLOWED_EXTENSIONS, DATA_EXTENSIONS, encode_keys
from aecore.data.sources import Listing
from aecore.data.sources._external_tars import ExternalSample, ExternalTars, Member, TarFile, data_member
from aecore.data.sources._frames import read_frame, with_frames
from aecore.data.sources._labels import JSON, json_field, require_rule
from aecore.data.sources._names import split_of
from aecore.errors import ConfigError, DataError, did_you_mean
from aecore.registry import SOURCES, knob, spec

MAX_CLASS_BYTES, MAX_TEXT_BYTES, MAX_OPEN = 1 << 10, 1 << 20, 64
_ENDING = re.compile(r"\.(?:tar|tar\.gz|tgz)$")
_SOURCE = re.compile(r"(.*?\.(?:tar|tar\.gz|tgz))#(\d+)\+(\d+)#(.*)", re.DOTALL)
Field = str | int | float | bool | None


@spec
class WebdatasetSpec:
    """External WebDataset shards: tars of images with .cls, .json or .txt members."""

    kind: Literal["webdataset"] = "webdataset"
    url: str = knob("", "folder of .tar, .tar.gz or .tgz files, one of them, or a pattern like shards/{00000..00009}.tar", identity=False)
    member: str = knob("", "extension of the member that is the sample, for example seg.png; empty: the only image or array")
    label: str = knob(
        "auto",
        "cls; json:<field>, also json:ann.class; tar: the tar's name; path: the folders in the tar; leaf: the last of them; "
        "regex:<expression> over the member's name: its first group; none; auto: cls where there is one",
    )
    columns: tuple[str, ...] = knob((), "fields of the .json member that become columns of the index; txt is the .txt member")
    keys: Literal["member", "shard"] = knob("member", "member: keys as in the tars; shard: with the tar's name before them")
    frames: Literal["first", "all", "refuse"] = knob("first", "of pages and animations: first, all as samples, or refuse the file", since=2)
    group: str | None = knob(
        None, "samples that stay whole in one split and shard: regex:<expression>: those in whose keys it finds the same", since=2
    )
    classes: tuple[str | int, ...] | str = knob((), "names of all classes in their order, or a file with one name a line", since=2)
    max_inflated_bytes: int = knob(0, "bytes that one gzip'ed tar may inflate to; 0: 1 GiB, or 128 times its own", ge=0, identity=False)

    def __post_init__(self) -> None:
        codec = self.member.rpartition(".")[2]
        if self.member and codec not in DATA_EXTENSIONS:
            raise ConfigError(f"source.member={self.member} ends in {codec!r}, which is not read{did_you_mean(codec, DATA_EXTENSIONS)}")
        require_rule("source.label", self.label, ("auto", "cls", "json:<field>", "tar", "path", "leaf", "none"))
        require_rule("source.group", self.group, ())


class _Columns:
    """The listed samples, by column."""

    def __init__(self, fields: tuple[str, ...]) -> None:
        self.keys, self.sources, self.labels, self.splits = list[str](), list[str](), list[str](), list[str]()
        self.tars, self.members = list[str](), list[str]()
        self.sizes = list[int]()
        self.fields: dict[str, list[Field]] = {name: [] for name in fields}
        self.skipped: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()  # fields of the json members


@SOURCES.register(WebdatasetSpec)
class WebdatasetSource:
    """The samples of the tars at the `url` of a `WebdatasetSpec`; sources are `<tar>#<offset>+<size>#<member>`."""

    def __init__(self, shards: WebdatasetSpec) -> None:
        self._spec = shards
        self._open: OrderedDict[str, TarFile] = OrderedDict()
        self._found: ExternalTars | None = None

    @property
    def tars(self) -> ExternalTars:
        """The tars, listed at the first access."""
        self._found = self._found or ExternalTars.at(self._spec.url)
        return self._found

    def for_thread(self) -> "WebdatasetSource":
        """Return a source of the same tars with open files of its own, for another thread; `close` it."""
        other = WebdatasetSource(self._spec)
        other._found = self.tars
        return other

    def close(self) -> None:
        """Close all tars."""
        while self._open:
            self._open.popitem()[1].close()

    def listing(self) -> Listing:
        """List every sample, tar by tar, after parsing all headers.

        Raises
        ------
        DataError
            If there is no tar, one is damaged or truncated, a key comes twice, or it is ambiguous which member is the sample.
        """
        found = _Columns(self._spec.columns)
        for name in self.tars.files.ahead(self.tars.names):
            tar = self._tar(name)
            try:
                for sample, member in self._in_order(found, tar):
                    self._add(found, sample, member, tar, name)
            finally:
                tar.close()
        if not found.keys:
            left = "; ".join(f"{count} {what}" for what, count in sorted(found.skipped.items()))
            raise DataError(f"{self.tars.files.url} holds no sample in {len(self.tars.names)} tars ({left or 'they are empty'})")
        self._require_keys(found)
        self._require_fields(found)
        listing = Listing(
            encode_keys(found.keys),
            found.sources,
            np.array(found.sizes, np.int64),
            label_names=found.labels if any(found.labels) else None,
            splits=found.splits if any(found.splits) else None,
            columns={f"json_{name}" if name in INDEX_SCHEMA.names else name: _column(values) for name, values in found.fields.items()},
            notes=(*(f"skipped {count} {what}" for what, count in sorted(found.skipped.items())), *self._notes(found)),
            label_paths=False,
            paths=found.members,
        )
        return with_frames(listing, self._member) if self._spec.frames == "all" else listing

    def read(self, source: str) -> tuple[str, bytes]:
        """Return codec and bytes of one sample.

        Raises OSError if its tar is gone, StoreError if it cannot be read, DataError if it was truncated after listing.
        """
        return read_frame(source, self._member) if self._spec.frames == "all" else self._member(source)

    def _member(self, source: str) -> tuple[str, bytes]:
        tar, member = parse_source(source)
        if tar not in self._open:
            room, sizes = self.tars.files.room, [tar.size for tar in self._open.values()]
            while sizes and (len(sizes) >= MAX_OPEN or (room is not None and sum(sizes) + max(sizes) > room)):  # one more like the largest
                self._open.popitem(last=False)[1].close()
                del sizes[0]
            self._open[tar] = self._opened(tar)
        self._open.move_to_end(tar)
        return member.name.lower().rpartition(".")[2], self._open[tar].read(member)

    def prefetch(self, sources: Sequence[str]) -> Callable[[str], tuple[str, bytes]]:
        """Return a `read` for exactly these samples in this order.

        Of tars in a bucket that do not all fit into the cache each sample is downloaded by itself: else every shard would fetch every tar.
        """
        if self.tars.files.room is None:
            return self.read
        places = [parse_source(source) for source in sources]
        if not all(tar.endswith(".tar") for tar, _ in places):
            return self.read
        pieces = self.tars.files.pieces([(tar, member.offset, member.size) for tar, member in places])
        if pieces is None:
            return self.read
        rows = iter(range(len(places)))

        def read(source: str) -> tuple[str, bytes]:
            row = next(rows)
            assert sources[row] == source, "samples are read in the order of `sources`"
            return places[row][1].name.lower().rpartition(".")[2], pieces(row)

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

    def _in_order(self, found: _Columns, tar: TarFile) -> list[tuple[ExternalSample, Member]]:
        """Return the samples of a tar that have an image or array, in the order of their offsets."""
        chosen: list[tuple[ExternalSample, Member]] = []
        for sample in tar.samples(found.skipped):
            found.skipped.update(f".{ext} members" for ext in sample.members if ext not in ALLOWED_EXTENSIONS and ext != self._spec.member)
            member = data_member(sample, self._spec.member, tar.where)
            if member is None:
                found.skipped["samples without an image or array"] += 1
            else:
                chosen.append((sample, member[1]))
        return sorted(chosen, key=lambda pair: pair[1].offset)

    def _add(self, found: _Columns, sample: ExternalSample, member: Member, tar: TarFile, name: str) -> None:
        fields = self._fields(found, sample, tar)
        stem = name.removesuffix(".gz").removesuffix(".tar").removesuffix(".tgz")
        found.keys.append(f"{stem}/{sample.key}" if self._spec.keys == "shard" else sample.key)
        found.sources.append(f"{name}#{member.offset}+{member.size}#{member.name}")
        found.sizes.append(member.size)
        found.splits.append(split_of(name))
        found.tars.append(name)
        found.members.append(member.name)
        found.labels.append(self._label(found, sample, tar, fields))
        for column, values in found.fields.items():
            values.append(fields.get(column))

    def _fields(self, found: _Columns, sample: ExternalSample, tar: TarFile) -> dict[str, Field]:
        """Return the fields of the json and txt members, if configured; unreadable members are counted."""
        fields: dict[str, Field] = {}
        if self._spec.label.startswith("json:") or set(self._spec.columns) - {"txt"}:
            try:
                data = json.loads(_small(tar, sample.members.get("json"), MAX_TEXT_BYTES) or b"{}")
            except (ValueError, RecursionError):
                found.skipped[".json members that are not JSON"] += 1
                data = {}
            if isinstance(data, dict):
                fields = {key: value for key, value in data.items() if value is None or isinstance(value, str | int | float)}
                found.seen.update(data.keys())
            if self._spec.label.startswith(JSON):
                fields[self._spec.label] = self._json_label(found, data, tar, sample)
        if "txt" in self._spec.columns and "txt" in sample.members:
            fields["txt"] = _small(tar, sample.members["txt"], MAX_TEXT_BYTES).decode("utf-8", "replace")
        return fields

    def _json_label(self, found: _Columns, data: Any, tar: TarFile, sample: ExternalSample) -> Field:  # any: plain JSON data
        path = self._spec.label.removeprefix(JSON)
        value = json_field(data, path)
        found.seen.update([path] if value is not None else [])
        if isinstance(value, dict | list):
            below = next(iter(value), "name") if isinstance(value, dict) else 0
            raise DataError(
                f"{tar.where}: {self._spec.label} of sample {sample.key!r} is a {type(value).__name__}, expected a name or a number: give "
                f"the path to it, for example source.label={self._spec.label}.{below}"
            )
        return value if isinstance(value, str | int | float) else None

    def _label(self, found: _Columns, sample: ExternalSample, tar: TarFile, fields: dict[str, Field]) -> str:
        rule = self._spec.label
        if rule == "tar":
            return _clean(_ENDING.sub("", tar.where.rpartition("/")[2]))
        if rule not in ("auto", "cls") and not rule.startswith(JSON):
            return ""  # `by_rules` makes it of the path, or there is none
        if rule.startswith(JSON):
            value = fields.get(rule)
            text = "" if value is None else str(int(value) if isinstance(value, float) and value.is_integer() else value)
        else:
            text = _small(tar, sample.members.get("cls"), MAX_CLASS_BYTES).decode("utf-8", "replace").strip()
        if not text and self._spec.label != "auto":
            found.skipped[f"labels: samples without {self._spec.label}"] += 1
        return _clean(text)

    def _notes(self, found: _Columns) -> list[str]:
        if self._spec.label != "auto" or any(found.labels):
            return []
        return ["no sample has a label, since none has a .cls: set source.label=tar, path, leaf, json:<field> or regex:<expression>"]

    def _require_keys(self, found: _Columns) -> None:
        if len(set(found.keys)) == len(found.keys):
            return
        place: dict[str, str] = {}
        for key, tar in zip(found.keys, found.tars, strict=True):
            if key in place:
                raise DataError(f"{place[key]} and {tar} of {self.tars.files.url} both have the key {key!r}: use source.keys=shard")
            place[key] = tar

    def _require_fields(self, found: _Columns) -> None:
        asked = {*self._spec.columns} - {"txt"} | ({self._spec.label.removeprefix(JSON)} if self._spec.label.startswith(JSON) else set())
        for name in sorted(asked - found.seen.keys()):
            raise DataError(f"no .json member in {self.tars.files.url} has the field {name!r}{did_you_mean(name, found.seen)}")


def parse_source(source: str) -> tuple[str, Member]:
    """Return the tar and the member of a source name of this kind."""
    match = _SOURCE.fullmatch(source)
    if match is None:
        raise DataError(f"{source!r} is no sample of a tar (like 'a.tar#512+784#0001.png')")
    return match[1], Member(match[4], int(match[2]), int(match[3]))


def _small(tar: TarFile, member: Member | None, limit: int) -> bytes:
    if member is None:
        return b""
    if member.size > limit:
        raise DataError(f"{tar.where}: {member.name!r} has {member.size} bytes, at most {limit} are read of such a member")
    return tar.read(member)


def _clean(text: str) -> str:
    """Return the text without what UTF-8 and the listing's hash cannot hold."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "")


def _column(values: list[Field]) -> NDArray[Any]:  # any: every column has its own dtype
    """Return whole numbers as int64, numbers as float64 (NaN: none), everything else as text (None: none)."""
    kinds = {type(value) for value in values}
    if kinds == {bool}:
        return np.array(values, np.bool_)
    try:
        if kinds == {int}:
            return np.array(values, np.int64)
        if kinds <= {int, float, type(None)} and kinds != {type(None)}:
            return np.array([np.nan if value is None else value for value in values], np.float64)
    except OverflowError:
        pass
    return np.array([None if value is None else _clean(str(value)) for value in values], dtype=object)
