"""Sources of the histories: what a tree of pictures, files of arrays or tars holds, what happens to it, and which samples it means.

Each keeps in memory what it has written, and says which samples a dataset of it has (`rows`) by rules of its own: keys, labels, splits
and bags are derived here from names and values, not by aecore. Pictures are 8 x 8, gray and not deflated, so all of a format have the
same size. Names are made of `[a-z0-9/]`, whose keys are themselves.
"""

import fnmatch
import hashlib
import io
import json
import random
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from tests.chaos.places import Place

SIDE = 8
CLASSES = ("ant", "bee", "cat")
Step = Callable[[], bool]  # what happened: False if there was nothing to do it to


@dataclass(frozen=True)
class Row:
    """A sample: the file (or row, or member) that it is from, where it belongs, and what it holds."""

    source: str
    split: str
    label: str
    group: str
    columns: Mapping[str, Any]  # any: numbers and texts
    value: str  # sha256 of its bytes, or of its pixels
    good: bool

    def place(self) -> tuple[Any, ...]:
        """Return all but the source: what a dataset has of it."""
        return self.split, self.label, self.group, tuple(sorted(self.columns.items())), self.value


@dataclass(frozen=True)
class Options:
    """How a history shards: `by` is none, hash, folders or column; `bags` is "", parent, regex or array."""

    kind: str  # folder, arrays, tars, adopted
    by: str = "none"
    bags: str = ""
    val: float = 0.0
    decode: bool = False
    resize: bool = False
    max_samples: int = 8
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def split(self, key: str, group: str) -> str:
        """Return the split by hash."""
        if self.by != "hash":
            return "train"
        digest = hashlib.blake2b(b"split 0\0" + (group or key).encode(), digest_size=8).digest()
        return "val" if int.from_bytes(digest, "little") / 2.0**64 < self.val else "train"

    def takes(self, path: str) -> bool:
        """Return whether the filter takes a path: patterns are `<folder>/*` or `*.<ext>`."""

        def matches(pattern: str) -> bool:
            return fnmatch.fnmatchcase(path, pattern) if "/" in pattern else fnmatch.fnmatchcase(path.rpartition("/")[2], pattern)

        return not any(map(matches, self.exclude)) and (not self.include or any(map(matches, self.include)))


def pixels(number: int) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    return np.random.default_rng(number).integers(0, 256, (SIDE, SIDE), dtype=np.uint8)


def picture(number: int, ext: str = "png") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(number)).save(file, {"png": "PNG", "bmp": "BMP"}[ext], **({"compress_level": 0} if ext == "png" else {}))
    return file.getvalue()


def undecodable(number: int) -> bytes:
    """Return a PNG of the usual size whose headers and checksums are right, and whose pixels do not inflate."""
    head = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", b"no pixels: %d" % number), (b"IEND", b""))
    packed = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Source:
    """A source below `name` at a place; `numbers` gives pictures that nobody has had."""

    place: Place
    name: str
    options: Options
    rng: random.Random
    files: dict[str, bytes] = field(default_factory=dict)
    drawn: int = 0
    origin: str = ""  # source.name, of one that moved
    bad: set[str] = field(default_factory=set)  # sha256 of bytes that are no picture
    opaque: set[str] = field(default_factory=set)  # and of those that pass all checks and do not decode
    spare: dict[str, bytes] = field(default_factory=dict)  # what was damaged, as it was
    seen: dict[str, bytes] = field(default_factory=dict)  # sha256 -> all that files ever held

    @property
    def url(self) -> str:
        return self.place.url(self.name)

    def number(self) -> int:
        self.drawn += 1
        return self.rng.randrange(1 << 20)

    def put(self, path: str, data: bytes, **how: Any) -> None:
        """Write a file; see `Place.write`."""
        self.place.write(f"{self.name}/{path}", data, **how)
        self.files[path] = self.seen[sha256(data)] = data

    def remove(self, path: str) -> None:
        self.place.remove(f"{self.name}/{path}")
        del self.files[path]

    def move(self, old: str, new: str) -> None:
        self.place.rename(f"{self.name}/{old}", f"{self.name}/{new}")
        self.files[new] = self.files.pop(old)

    def arguments(self) -> list[str]:
        """Return the settings of the source and of the splits."""
        options = self.options
        words = [f"splits.by={options.by}", f"shards.max_samples={options.max_samples}", "shards.max_bad=1.0"]
        words += [f"splits.val={options.val}"] if options.by == "hash" else []
        words += ["splits.column=factor_part"] if options.by == "column" else []
        words += ["shards.check=decode"] if options.decode else []
        words += [f"shards.resize={SIDE // 2}"] if options.resize else []
        words += [f"source.name={self.origin}"] if self.origin else []
        words += [f"source.include={json.dumps(list(options.include))}"] if options.include else []
        words += [f"source.exclude={json.dumps(list(options.exclude))}"] if options.exclude else []
        return words

    def steps(self) -> dict[str, Step]:
        """Return what may happen, by name."""
        raise NotImplementedError

    def rows(self) -> dict[str, Row]:
        """Return the samples that it lists now, by key."""
        raise NotImplementedError


class Folder(Source):
    """A tree `[train|val/]class/[bag/]name.ext`."""

    def begin(self, count: int) -> None:
        for number in range(count):
            self.put(self._new(CLASSES[number % 3], f"{number:03d}"), picture(self.number()))

    def arguments(self) -> list[str]:
        group = {"parent": ["source.group=parent"], "regex": [r"source.group=regex:^(.*/\wb\d)/"], "": []}[self.options.bags]
        return ["source.kind=folder", *super().arguments(), *group]

    def _new(self, label: str, stem: str, ext: str = "png") -> str:
        top = self.rng.choice(("train/", "train/", "val/")) if self.options.by == "folders" else ""
        bag = f"{self.prefix}b{self.rng.randrange(3)}/" if self.options.bags else ""
        return f"{top}{label}/{bag}{self.prefix}{stem}.{ext}"

    @property
    def prefix(self) -> str:
        return self.name.rpartition("/")[2][0]  # also where it moved

    def rows(self) -> dict[str, Row]:
        taken = [path for path in sorted(self.files) if self.options.takes(path)]
        shared = Counter(path.rpartition(".")[0] for path in taken)
        found = {}
        for path in taken:
            stem = path.rpartition(".")[0]
            key = stem if shared[stem] == 1 else path.replace(".", "%2E")
            label, bag = stem.rpartition("/")[0], ""
            if self.options.bags == "parent":
                bag, label = label, label.rpartition("/")[0]
            elif self.options.bags:
                bag = label
            split = self.options.split(key, bag)
            if self.options.by == "folders":
                split, _, label = label.partition("/")
            data = self.files[path]
            found[key] = Row(path, split, label, bag, {}, sha256(data), self.good(data))
        return found

    def good(self, data: bytes) -> bool:
        return sha256(data) not in self.bad

    def any(self) -> str:
        return self.rng.choice(sorted(self.files))

    def steps(self) -> dict[str, Step]:
        return {
            "add": self.add,
            "change, same size and mtime": self.change,
            "change by replacing the file": self.replace,
            "relabel": self.relabel,
            "rename": self.rename,
            "delete": self.delete,
            "damage": self.damage,
            "damage that no check finds": self.obscure,
            "repair": self.repair,
            "duplicate": self.duplicate,
            "touch": self.touch,
            "same stem, other format": self.twin,
            "swap two files": self.swap,
            "delete and write again": self.again,
        } | ({"bag grows": self.grow, "bag shrinks": self.shrink, "bag goes": self.ungroup} if self.options.bags else {})

    def add(self) -> bool:
        ext = self.rng.choice(("png", "png", "bmp"))
        self.put(self._new(self.rng.choice(CLASSES), f"n{self.number()}", ext), picture(self.number(), ext))
        return True

    def change(self) -> bool:
        path = self.any()
        data = picture(self.number(), path.rpartition(".")[2])
        self.put(path, data, same_mtime=True)
        return True

    def replace(self) -> bool:
        path = self.any()
        self.put(path, picture(self.number(), path.rpartition(".")[2]), new_inode=True)
        return True

    def relabel(self) -> bool:
        old = self.any()
        new = self._new(self.rng.choice(CLASSES), "")
        new = f"{new.rpartition('/')[0]}/{old.rpartition('/')[2]}"
        if new in self.files:
            return False
        self.move(old, new)
        return True

    def rename(self) -> bool:
        old = self.any()
        self.move(old, f"{old.rpartition('/')[0]}/{self.prefix}r{self.number()}.{old.rpartition('.')[2]}")
        return True

    def delete(self) -> bool:
        path = self.any()
        if not self.spares(path):
            return False
        self.remove(path)
        return True

    def spares(self, *paths: str) -> bool:
        """Return whether there are good samples left without these."""
        bad = self.bad | self.opaque
        return sum(sha256(data) not in bad for path, data in self.files.items() if path not in paths) >= 4

    def obscure(self) -> bool:
        path = self.any()
        if not path.endswith("png") or not self.spares(path):
            return False
        data = undecodable(self.number())
        (self.bad if self.options.decode or self.options.resize else self.opaque).add(sha256(data))
        self.spare[path] = self.files[path]
        self.put(path, data)
        return True

    def damage(self) -> bool:
        path = self.any()
        data, kind = self.files[path], self.rng.choice(("cut", "cut", "flip", "empty", "zeros"))
        if not self.spares(path) or not self.good(data):
            return False
        self.spare[path] = data
        broken = bytearray(data)
        if kind == "cut":
            broken = broken[: self.rng.choice((7, 30, len(data) - 5))]
        elif kind == "empty":
            broken = bytearray()
        elif kind == "flip" and path.endswith("png"):
            broken[60] ^= 4  # a checksum does not fit any more
        else:
            broken = bytearray(len(data))
        self.bad.add(sha256(bytes(broken)))
        self.put(path, bytes(broken), same_mtime=self.rng.random() < 0.5)
        return True

    def repair(self) -> bool:
        broken = sorted(path for path, data in self.files.items() if sha256(data) in self.bad | self.opaque)
        if not broken:
            return False
        path = self.rng.choice(broken)
        old = self.spare.get(path) if self.rng.random() < 0.5 else None
        self.put(path, old or picture(self.number(), path.rpartition(".")[2]))
        return True

    def duplicate(self) -> bool:
        old = self.any()
        self.put(self._new(self.rng.choice(CLASSES), f"c{self.number()}", old.rpartition(".")[2]), self.files[old])
        return True

    def touch(self) -> bool:
        self.place.touch(f"{self.name}/{self.any()}")
        return True

    def twin(self) -> bool:
        path = self.any()
        stem, _, ext = path.rpartition(".")
        other = f"{stem}.{'bmp' if ext == 'png' else 'png'}"
        if other in self.files:
            return False
        self.put(other, picture(self.number(), other.rpartition(".")[2]))
        return True

    def swap(self) -> bool:
        one, two = self.any(), self.any()
        if one == two or one.rpartition(".")[2] != two.rpartition(".")[2]:
            return False
        spare = f"{one}x"
        self.move(one, spare)
        self.move(two, one)
        self.move(spare, two)
        return True

    def again(self) -> bool:
        path = self.any()
        data = self.files[path]
        self.remove(path)
        self.put(path, data)
        return True

    def _bag(self, path: str) -> str:
        return path.rpartition("/")[0]

    def grow(self) -> bool:
        bag = self._bag(self.any())
        self.put(f"{bag}/{self.prefix}g{self.number()}.png", picture(self.number()))
        return True

    def shrink(self) -> bool:
        return self.delete()

    def ungroup(self) -> bool:
        bag = self._bag(self.any())
        inside = [path for path in self.files if self._bag(path) == bag]
        if not self.spares(*inside):
            return False
        for path in inside:
            self.remove(path)
        return True


@dataclass
class _Array:
    numbers: list[int]
    labels: list[int]
    sizes: list[float]
    parts: list[int]
    bags: list[int]

    def columns(self) -> tuple[list[Any], ...]:  # any: lists of numbers
        return self.numbers, self.labels, self.sizes, self.parts, self.bags


class Arrays(Source):
    """`.npz` files whose rows are samples: `x`, `y`, `factor_size`, `factor_part` and, with bags, `bags`."""

    arrays: dict[str, _Array]

    def begin(self, count: int) -> None:
        self.arrays = {}
        for name in ("one", "two"):
            self.arrays[f"{self.prefix}{name}.npz"] = _Array([], [], [], [], [])
            for _ in range(count // 2):
                self._append(f"{self.prefix}{name}.npz")
            self.save(f"{self.prefix}{name}.npz")

    prefix = Folder.prefix

    def _append(self, name: str, at: int | None = None) -> None:
        rng, array = self.rng, self.arrays[name]
        new = (self.number(), rng.randrange(3), rng.choice((1.0, 2.5)), rng.randrange(2), rng.randrange(4))
        for column, value in zip(array.columns(), new, strict=True):
            column.insert(len(column) if at is None else at, value)

    def save(self, name: str, **how: Any) -> None:
        array, file = self.arrays[name], io.BytesIO()
        bags = {"bags": np.array(array.bags)} if self.options.bags else {}
        x = np.stack([pixels(number) for number in array.numbers])
        np.savez(file, x=x, y=np.array(array.labels), factor_size=np.array(array.sizes), factor_part=np.array(array.parts), **bags)
        self.put(name, file.getvalue(), **how)

    def arguments(self) -> list[str]:
        return ["source.kind=arrays", *super().arguments(), *(["source.group=bags"] if self.options.bags else [])]

    def rows(self) -> dict[str, Row]:
        found = {}
        for name, array in sorted(self.arrays.items()):
            for row, (number, label, size, part, bag) in enumerate(zip(*array.columns(), strict=True)):
                key, stem = f"{name.removesuffix('.npz')}/{row:09d}", name.removesuffix(".npz")
                group = f"{stem}/{bag}" if self.options.bags else ""
                split = str(part) if self.options.by == "column" else self.options.split(key, group)
                columns = {"factor_size": size, "factor_part": part}
                found[key] = Row(f"{name}/x#{row}", split, str(label), group, columns, sha256(pixels(number).tobytes()), True)
        return found

    def any(self) -> tuple[str, _Array, int]:
        name = self.rng.choice(sorted(self.arrays))
        return name, self.arrays[name], self.rng.randrange(len(self.arrays[name].numbers))

    def steps(self) -> dict[str, Step]:
        return {
            "add": self.add,
            "insert a row": self.insert,
            "change, same size and mtime": self.change,
            "relabel": self.relabel,
            "change a column": self.column,
            "delete": self.delete,
            "duplicate": self.duplicate,
            "touch": self.touch,
            "swap two files": self.swap,
            "rename": self.rename,
        } | ({"bag grows": self.regroup, "bag shrinks": self.delete} if self.options.bags else {})

    def add(self) -> bool:
        name, _, _ = self.any()
        for _ in range(self.rng.randint(1, 4)):
            self._append(name)
        self.save(name)
        return True

    def insert(self) -> bool:
        name, _, row = self.any()
        self._append(name, row)
        self.save(name, new_inode=self.rng.random() < 0.5)
        return True

    def change(self) -> bool:
        name, array, row = self.any()
        array.numbers[row] = self.number()
        self.save(name, same_mtime=True)
        return True

    def relabel(self) -> bool:
        name, array, row = self.any()
        array.labels[row] = (array.labels[row] + 1) % 3
        self.save(name)
        return True

    def column(self) -> bool:
        name, array, row = self.any()
        if self.rng.random() < 0.5:
            array.sizes[row] += 0.5
        else:
            array.parts[row] = 1 - array.parts[row]
        self.save(name)
        return True

    def delete(self) -> bool:
        name, array, row = self.any()
        if len(array.numbers) < 4:
            return False
        for column in array.columns():
            del column[row]
        self.save(name)
        return True

    def duplicate(self) -> bool:
        name, array, row = self.any()
        self._append(name)
        array.numbers[-1] = array.numbers[row]
        self.save(name)
        return True

    def touch(self) -> bool:
        self.place.touch(f"{self.name}/{self.any()[0]}")
        return True

    def swap(self) -> bool:
        name, array, row = self.any()
        other = self.rng.randrange(len(array.numbers))
        for column in array.columns():
            column[row], column[other] = column[other], column[row]
        self.save(name, same_mtime=True)
        return row != other

    def rename(self) -> bool:
        name, array, _ = self.any()
        new = f"{self.prefix}r{self.number()}.npz"
        self.move(name, new)
        self.arrays[new] = self.arrays.pop(name)
        del array
        return True

    def regroup(self) -> bool:
        name, array, row = self.any()
        array.bags[row] = (array.bags[row] + 1) % 4
        self.save(name)
        return True


@dataclass
class _Member:
    stem: str
    data: bytes
    label: int
    score: float


class Tars(Source):
    """Tars of pictures with `.cls` and `.json` members."""

    tars: dict[str, list[_Member]]
    prefix = Folder.prefix
    good = Folder.good

    def begin(self, count: int) -> None:
        self.tars = {}
        for number in range(4):
            self.tars[f"{self.prefix}{number}.tar"] = [self._member() for _ in range(count // 4)]
            self.save(f"{self.prefix}{number}.tar")

    def _member(self) -> _Member:
        return _Member(f"m{self.number()}", picture(self.number()), self.rng.randrange(3), self.rng.randrange(9) / 2)

    def save(self, name: str, **how: Any) -> None:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            for member in self.tars[name]:
                parts = {"png": member.data, "cls": str(member.label).encode(), "json": json.dumps({"score": member.score}).encode()}
                for ext, data in parts.items():
                    info = tarfile.TarInfo(f"{member.stem}.{ext}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        self.put(name, file.getvalue(), **how)

    def arguments(self) -> list[str]:
        return ["source.kind=webdataset", "source.keys=shard", "source.columns=[score]", *super().arguments()]

    def rows(self) -> dict[str, Row]:
        found = {}
        for name, members in sorted(self.tars.items()):
            for member in members:
                key = f"{name.removesuffix('.tar')}/{member.stem}"
                good = self.good(member.data)
                found[key] = Row(
                    name, self.options.split(key, ""), str(member.label), "", {"score": member.score}, sha256(member.data), good
                )
        return found

    def any(self) -> tuple[str, list[_Member]]:
        name = self.rng.choice(sorted(self.tars))
        return name, self.tars[name]

    def steps(self) -> dict[str, Step]:
        return {
            "tar added": self.add,
            "tar changed, same size and mtime": self.change,
            "sample added to a tar": self.grow,
            "sample removed from a tar": self.shrink,
            "relabel": self.relabel,
            "change a column": self.column,
            "damage": self.damage,
            "repair": self.repair,
            "tar removed": self.delete,
            "tar renamed": self.rename,
            "duplicate": self.duplicate,
            "touch": self.touch,
            "tar rewritten with equal bytes": self.again,
            "tar in another order": self.shuffle,
        }

    def spares(self, without: str) -> bool:
        return sum(self.good(member.data) for name, some in self.tars.items() if name != without for member in some) >= 4

    def add(self) -> bool:
        name = f"{self.prefix}n{self.number()}.tar"
        self.tars[name] = [self._member() for _ in range(self.rng.randint(1, 6))]
        self.save(name)
        return True

    def change(self) -> bool:
        name, members = self.any()
        member = self.rng.choice(members)
        member.data = picture(self.number())
        self.save(name, same_mtime=True)
        return True

    def grow(self) -> bool:
        name, members = self.any()
        members.insert(self.rng.randint(0, len(members)), self._member())
        self.save(name)
        return True

    def shrink(self) -> bool:
        name, members = self.any()
        if len(members) < 2 or not self.spares(name):
            return False
        members.pop(self.rng.randrange(len(members)))
        self.save(name)
        return True

    def relabel(self) -> bool:
        name, members = self.any()
        member = self.rng.choice(members)
        member.label = (member.label + 1) % 3
        self.save(name, same_mtime=True)
        return True

    def column(self) -> bool:
        name, members = self.any()
        self.rng.choice(members).score += 1
        self.save(name)
        return True

    def damage(self) -> bool:
        name, members = self.any()
        member = self.rng.choice(members)
        if not self.spares(name) or not self.good(member.data):
            return False
        member.data = member.data[:30]
        self.bad.add(sha256(member.data))
        self.save(name)
        return True

    def repair(self) -> bool:
        broken = [(name, member) for name, some in sorted(self.tars.items()) for member in some if not self.good(member.data)]
        for name, member in broken[:1]:
            member.data = picture(self.number())
            self.save(name)
        return bool(broken)

    def delete(self) -> bool:
        name, _ = self.any()
        if not self.spares(name):
            return False
        self.remove(name)
        del self.tars[name]
        return True

    def rename(self) -> bool:
        name, _ = self.any()
        new = f"{self.prefix}r{self.number()}.tar"
        self.move(name, new)
        self.tars[new] = self.tars.pop(name)
        return True

    def duplicate(self) -> bool:
        _, members = self.any()
        new = f"{self.prefix}d{self.number()}.tar"
        self.tars[new] = [replace(member) for member in members]
        self.save(new)
        return True

    def touch(self) -> bool:
        self.place.touch(f"{self.name}/{self.any()[0]}")
        return True

    def again(self) -> bool:
        name, _ = self.any()
        self.put(name, self.files[name], new_inode=True)
        return True

    def shuffle(self) -> bool:
        name, members = self.any()
        before = list(members)
        self.rng.shuffle(members)
        self.save(name)
        return members != before


KINDS: dict[str, type[Folder | Arrays | Tars]] = {"folder": Folder, "arrays": Arrays, "tars": Tars, "adopted": Tars}
