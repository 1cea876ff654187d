"""Members of an external tar become samples: links are resolved inside the tar, names are grouped, one member is the image or array.

The key of a member ends at the first dot of its last component, as in webdataset, and what follows is its extension. Where that gives no
image although the name ends in an image's extension (`track 2.1.jpg`), the dot belongs to the name: the key then ends at the last one.
`0.left.png` stays a member of sample `0` if `left` is a word that other samples have too, or if the sample has members without it.
The case of letters belongs to a name (`x.B1.png` and `x.b1.png` are two samples) and not to an extension (`x.PNG`).

A sample that cannot be used is returned with a reason, for the quarantine; what is no sample is counted (`Skipped`). The rules of version 1
(`rules=1`, for datasets and runs that began with it) know neither links nor such names, and leave out what cannot be used.
"""

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Literal, NamedTuple

from aecore.data.classes import MAX_CLASS_BYTES
from aecore.data.format.bad_sample import BadSample
from aecore.data.format.record import ALLOWED_EXTENSIONS, DATA_EXTENSIONS
from aecore.data.sources._inflate import ALLOWED_BYTES
from aecore.data.sources._labels import bad_label
from aecore.data.sources._other_files import OF_SYSTEM, is_of_system, kind_of_file
from aecore.data.sources._skipped import Skipped
from aecore.data.sources._tar_file import FILES, SPARSE, UNREADABLE, BrokenTar, Entry, Member, TarFile

MEMBER_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)  # webdataset's: the key ends at the first dot of the last component
MAX_LINKED = 1_000_000  # members that links to folders add to one tar
MAX_HOPS, MAX_DETOURS = 32, 20_000  # links that lead to links; all in a tar, but the first two of each: a second
MAX_NAME_BYTES, MAX_LEVELS = 4096, 128  # of a member's name, as Linux has them for a path
LONGEST_TARGET = MAX_NAME_BYTES + 1  # letters that are kept of what a link leads to: a longer one leads nowhere
ARCHIVED = "npz"  # read like the array in it
_SIDE_EXTENSIONS = ALLOWED_EXTENSIONS - DATA_EXTENSIONS
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_-]*(?:\.[A-Za-z][A-Za-z0-9_-]*)*")
_DOCUMENT = re.compile(r"(?:.*/)?(?:readme|licen[cs]e|copying|notice|citation|changelog)", re.IGNORECASE | re.DOTALL)
_END = re.compile(r"/|\Z")  # of a beginning of a path
_HARD, _SYMBOLIC = _LINKS = b"1", b"2"
_DEVICE = "device(s)"
_KINDS = {_HARD: "hard link(s)", _SYMBOLIC: "symbolic link(s)", b"3": _DEVICE, b"4": _DEVICE, b"6": "pipe(s)", SPARSE: "sparse file(s)"}
UNSAFE = "member(s) whose name leaves the archive (.. or /)"
NO_KEY = "file(s) without a key and an extension"
NO_DATA = "sample(s) without an image or array"
UNREAD = "unread member(s)"
AGAIN = "member(s) whose name comes again"
DOCUMENTS = "document(s)"


@dataclass(frozen=True, slots=True)
class TarReading:
    """How members become samples.

    Attributes
    ----------
    member : str
        Extension to take (`seg.png`; its last part is the codec), "" for the only image or array.
    option : str
        The name of that option in messages.
    rules : int
        1: those of version 1.
    """

    member: str = ""
    option: str = "source.member"
    rules: Literal[1, 2] = 2


class TarSample(NamedTuple):
    """Members of one key by extension (its last part in lower case), at any positions in the tar; `part` numbers joined tars.

    `data` is the image or array. `bad` says why the sample cannot be used; then `data` may be any of its members.
    """

    key: str
    part: int
    members: Mapping[str, Member]
    data: Member
    bad: BadSample | None = None


class TarSamples(NamedTuple):
    """The samples of one tar by the place of their data, and the error that makes them unusable if the tar is broken."""

    samples: list[TarSample]
    broken: BrokenTar | None


def tar_samples(tar: TarFile, reading: TarReading, skipped: Skipped) -> TarSamples:
    """Return the samples of a tar; what is no sample is counted in `skipped`. StoreError if it cannot be read."""
    entries, broken, groups = list[Entry](), None, _Groups(tar, reading, skipped)
    try:
        for entry in tar.entries(skipped, joined=reading.rules > 1):  # those before an error count
            if reading.rules > 1 and _is_too_long(entry.name):
                groups.add(entry)  # which keeps the beginning of its name: a thousand of 1 MiB may be in one compressed tar
            elif reading.rules > 1 and len(entry.target) > LONGEST_TARGET:
                entries.append(entry._replace(target=entry.target[:LONGEST_TARGET]))
            else:
                entries.append(entry)
    except BrokenTar as error:
        broken = error
    if reading.rules > 1 and not {entry.kind for entry in entries}.isdisjoint(_LINKS):
        parts = [list(joined) for _, joined in itertools.groupby(entries, key=lambda entry: entry.part)]
        detours = itertools.repeat(None, MAX_DETOURS)
        entries = [entry for joined in parts for entry in _resolved(joined, detours, groups.unusable)]
    for entry in entries:
        groups.add(entry)
    found = sorted(groups.samples(), key=lambda sample: sample.data.offset)
    return TarSamples(found if reading.rules == 1 else _within(found, tar), broken)


def _within(samples: list[TarSample], tar: TarFile) -> list[TarSample]:
    """Return the samples; of those that have more bytes together than the tar may inflate to, by holes and links, the last are unusable."""
    total = sum(sample.data.size for sample in samples if sample.bad is None)
    if total <= max(ALLOWED_BYTES, tar.size):  # no limit is less, but one that is configured
        return samples
    limit, held, found = tar.limit(), 0, list[TarSample]()
    most = max(limit.most, tar.size)
    for sample in samples:
        if sample.bad is None and held + sample.data.size > most:
            why = f"with it, the holes and links of the tar would become {held + sample.data.size} bytes, more than {limit.why}"
            sample = sample._replace(
                bad=BadSample("member", f"{why}: pack the tar without --sparse (-S), and several links into several tars")
            )
        else:
            held += sample.data.size if sample.bad is None else 0
        found.append(sample)
    return found


def stated_class(tar: TarFile, member: Member | None) -> str:
    """Return the class that the text of a member names, "" without a member; BadSample if it is none, see `stated_text`."""
    return text_of_class(stated_text(tar, member, MAX_CLASS_BYTES, "label"))


def stated_text(tar: TarFile, member: Member | None, limit: int, reason: str) -> str:
    """Return the text of a member, "" without a member; a byte-order mark is no part of it.

    BadSample if it is too large, or no UTF-8 (for this `reason`): then two texts could become one.
    """
    data = small_member(tar, member, limit)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        shown = repr(data[: error.end][-20:])
        raise BadSample(reason, f"{member.name if member else ''!r} is no UTF-8 (it has {shown}): save the text as UTF-8") from error


def text_of_class(text: str) -> str:
    """Return a class as it is stored; BadSample if it cannot be one (`bad_label`)."""
    text = text.removeprefix("\ufeff").strip()
    if (bad := bad_label(text)) is not None:
        raise bad
    return text


def small_member(tar: TarFile, member: Member | None, limit: int) -> bytes:
    """Return the bytes of a member, none without one; BadSample if it has more than `limit`."""
    if member is None:
        return b""
    if member.size > limit:
        raise BadSample("metadata", f"{member.name!r} has {member.size} bytes, at most {limit} are read of such a member")
    return tar.read(member)


def data_extension(ext: str) -> str:
    """Return the last part of an extension if it is that of an image or array, else ""."""
    codec = ext.rpartition(".")[2]
    return codec if codec in DATA_EXTENSIONS or codec == ARCHIVED else ""


class _Groups:
    """The members of a tar by part and key."""

    def __init__(self, tar: TarFile, reading: TarReading, skipped: Skipped) -> None:
        self._tar, self._reading, self._skipped = tar, reading, skipped
        self._found: dict[tuple[int, str], dict[str, Member]] = {}
        self._bad: dict[tuple[int, str], BadSample] = {}  # by part and name: members that cannot be read, or come twice
        self._others = list[TarSample]()  # links that are named like no sample, and lead to what may be many

    def unusable(self, entry: Entry, why: BadSample, what: str) -> None:
        """Take an entry without bytes of its own as a sample that cannot be used; count it if it is no link and not named like a sample."""
        match = MEMBER_NAME.fullmatch(entry.name)
        if match is not None and not _is_hidden(entry.name) and _is_named_like_a_sample(match[2].lower()) and self._reading.rules > 1:
            self._put(entry, match[1], match[2], why)
        elif entry.kind in (_HARD, _SYMBOLIC) and self._reading.rules > 1:
            place = Member(entry.name, entry.offset, 0)
            self._others.append(TarSample(entry.name, entry.part, {}, place, why))
        else:
            self._skipped.add(what, entry.name)

    def add(self, entry: Entry) -> None:
        """Take a header's file; everything else is counted."""
        name = entry.name
        if self._reading.rules > 1 and is_of_system(name):
            self._skipped.add(OF_SYSTEM, name)
        elif self._reading.rules > 1 and _is_too_long(name):
            short = f"{name[:64]}... (at byte {entry.offset})"
            levels = name.count("/") + 1
            most = f"at most {MAX_NAME_BYTES} bytes and {MAX_LEVELS} levels are read"
            what = f"{short!r} has a name of {len(name)} characters in {levels} levels, {most}"
            place = Member(short, entry.offset, 0)
            self._others.append(TarSample(short, entry.part, {}, place, BadSample("name", f"{what}: pack it with a shorter name")))
        elif entry.kind == UNREADABLE:
            why = f"{name!r} is a sparse file that cannot be read ({entry.target}): pack it without --sparse (-S)"
            self.unusable(entry, BadSample("member", why), "sparse file(s) that cannot be read")
        elif not (entry.kind in FILES or (entry.kind == SPARSE and self._reading.rules > 1)):
            what = _KINDS.get(entry.kind, f"member(s) of type {entry.kind!r}")
            why = f"{name!r} is one of the {what.replace('(s)', 's')}, which have no bytes that can be read"
            self.unusable(entry, BadSample("member", why), what)
        elif name.startswith("/") or "\0" in name or (".." in name and ".." in name.split("/")):
            self.unusable(entry, BadSample("name", f"the name {name!r} leaves the archive: pack it with a relative name"), UNSAFE)
        else:
            match = MEMBER_NAME.fullmatch(name)
            is_reserved = name[:2] == "__" and name.endswith("__")
            if match is None or is_reserved or (match[1][-1] == "/" and self._reading.rules > 1):  # the last: a hidden file
                self._skipped.add(OF_SYSTEM if is_of_system(name) else NO_KEY, name)
            else:
                self._put(entry, match[1], match[2])

    def _put(self, entry: Entry, key: str, ext: str, bad: BadSample | None = None) -> None:
        """Take a member; `bad` says why it cannot be used. Of members with one name the last is listed, and the others are counted."""
        ext = _extension(ext, self._reading.rules)
        members = self._found.get((entry.part, key))
        if members is None:
            members = self._found[entry.part, key] = {}
        elif ext in members:
            first = members[ext].name
            what = f"{entry.name!r} twice" if first == entry.name else f"both {first!r} and {entry.name!r}"
            why = f"the tar has {what}, and it is not known which one is meant: write the tar again"
            bad = BadSample("twice", why)
            if self._reading.rules > 1:
                self._skipped.add(AGAIN, first)
        members[ext] = Member(entry.name, entry.offset, entry.size, entry.kind == SPARSE)
        if bad is not None:
            self._bad[entry.part, entry.name] = bad

    def samples(self) -> list[TarSample]:
        """Return the samples, with a member chosen."""
        found = list[TarSample]()
        words = None if self._reading.rules == 1 else self._words()
        for (part, key), members in self._found.items():
            if words is None or not any("." in ext for ext in members):
                found += self._sample(part, key, members)
                continue
            apart = _by_name(members, words, self._reading.member)
            for below, those in apart.items():
                if below is not None:
                    found += self._sample(part, f"{key}.{below}", those)
                elif len(apart) == 1 or any(map(data_extension, those)):
                    found += self._sample(part, key, those)
                else:  # what samples of their own leave over, such as a description of them all
                    for member in those.values():
                        self._skipped.add(UNREAD, member.name)
        return found + self._others

    def _words(self) -> Counter[str]:
        """Return how many keys have each of the words before the extension of an image, as in `left.png`, in addition to another one."""
        counts = Counter[str]()
        for members in self._found.values():
            if sum("." in ext for ext in members) > 1:
                counts.update({ext.rpartition(".")[0].lower() for ext in members if "." in ext and data_extension(ext)})
        return counts

    def _sample(self, part: int, key: str, members: dict[str, Member]) -> Iterable[TarSample]:
        reading = self._reading
        chosen = _chosen(members, reading)
        for ext, member in members.items():
            if ext not in ALLOWED_EXTENSIONS and ext != chosen:
                self._skipped.add(UNREAD, member.name)
        if not chosen and (reading.rules == 1 or _DOCUMENT.fullmatch(key)):
            self._skipped.add(NO_DATA if reading.rules == 1 else DOCUMENTS, key)
            return
        bad: BadSample | None = None
        if self._bad:
            bad = next((bad for member in members.values() if (bad := self._bad.get((part, member.name)))), None)
        if isinstance(chosen, str):
            yield TarSample(key, part, members, members[chosen], bad)
        else:
            yield TarSample(key, part, members, next(iter(members.values())), bad or _without_data(key, members, chosen, reading))


def _chosen(members: Mapping[str, Member], reading: TarReading) -> str | list[str]:
    """Return the extension of the sample's image or array; those that could be it if there is not one."""
    if reading.member:
        asked = [reading.member] if reading.member in members else []
        if not asked and reading.rules > 1:
            asked = [ext for ext in members if ext.lower() == reading.member.lower()]
        return asked[0] if len(asked) == 1 else asked
    found = [ext for ext in members if ext in DATA_EXTENSIONS]
    if not found and reading.rules > 1:
        found = [ext for ext in members if data_extension(ext) in DATA_EXTENSIONS] or [ext for ext in members if data_extension(ext)]
    return found[0] if len(found) == 1 else found


def _without_data(key: str, members: Mapping[str, Member], found: list[str], reading: TarReading) -> BadSample:
    """Return why a sample with none or several images has no data."""
    if found:
        why = f"sample {key!r} has the images {', '.join(found[:8])}: choose one with {reading.option}=<extension>"
        return BadSample("ambiguous", why)
    held = ", ".join(sorted(members)[:8]) + (", ..." if len(members) > 8 else "")
    asked = f"member .{reading.member}, which {reading.option} asks for" if reading.member else "image or array that is read"
    other = next((member.name for ext, member in members.items() if ext.rpartition(".")[2] not in ALLOWED_EXTENSIONS), None)
    what, remedy = ("", "") if other is None or reading.member else kind_of_file(other)
    return BadSample("no_data", f"sample {key!r} has no {asked}, only {held}" + (f" ({what}: {remedy})" if remedy else ""))


def _by_name(members: dict[str, Member], words: Counter[str], wanted: str) -> dict[str | None, dict[str, Member]]:
    """Return the members of one key, apart by what a name has between its first and its last dot where that belongs to the name.

    None is for the rest. It does not where it is a word that tells members of a sample apart (`left` of `0.left.png`), and where it has
    no image of its own.
    """
    plain = {ext: member for ext, member in members.items() if "." not in ext}
    below: dict[str, dict[str, Member]] = defaultdict(dict)
    for ext, member in members.items():
        if "." in ext:
            below[ext.rpartition(".")[0]][ext.rpartition(".")[2]] = member
    apart: dict[str | None, dict[str, Member]] = {None: plain.copy()}
    rest_has_data = any(map(data_extension, plain))
    for name in sorted(below, key=lambda name: not any(map(data_extension, below[name]))):  # those with an image first
        those = below[name]
        side = bool(_SIDE_EXTENSIONS & those.keys())
        tells_apart = _WORD.fullmatch(name) is not None and (bool(plain) or words[name.lower()] > 1)
        if any(map(data_extension, those)):
            is_own = side or not tells_apart
        else:  # labels whose image is missing, unless they are further ones of a sample with an image
            is_own = side and not tells_apart and not rest_has_data
        if is_own and not any(f"{name}.{ext}".lower() == wanted.lower() for ext in those):
            apart[name] = those
        else:
            apart[None] |= {f"{name}.{ext}": member for ext, member in those.items()}
            rest_has_data |= any(map(data_extension, those))
    return apart if apart[None] else {name: those for name, those in apart.items() if name is not None}


def _extension(text: str, rules: int) -> str:
    """Return what follows a key; its last part, which names the codec, in lower case (by the rules of version 1 all of it)."""
    above, dot, codec = ("", "", text) if rules == 1 else text.rpartition(".")
    return f"{above}{dot}{codec.lower()}"


def _is_named_like_a_sample(ext: str) -> bool:
    return bool(data_extension(ext)) or ext.rpartition(".")[2] in ALLOWED_EXTENSIONS


def _is_hidden(name: str) -> bool:
    return name[name.rfind("/") + 1 :].startswith(".")


def _resolved(entries: list[Entry], detours: Iterator[None], unusable: Callable[[Entry, BadSample, str], None]) -> Iterable[Entry]:
    """Yield all entries, links to files and folders of the tar with the place of what they lead to; others are given to `unusable`.

    They lead where they do when the tar is unpacked: a hard link to the file that has its target's name when the link is made, whatever
    gets that name later; a symbolic one, which is relative to its folder, to the last file of a name.
    """
    lengths = frozenset(len(path) for entry in entries if entry.kind in _LINKS and (path := _normal(entry.name)) is not None)
    made, files, links = _unpacked(entries, lengths, detours)
    targets = {name: _target(link, links, lengths, detours) for name, link in links.items()}
    for name, link in links.items():  # before those to folders, which may hold them
        if (target := targets[name]) is not None and (there := files.get(target)) is not None:
            files[name] = link._replace(offset=there.offset, size=there.size, kind=there.kind)
    below, left = _by_folder(files, frozenset(targets.values())), MAX_LINKED
    for entry in made:
        if entry.kind not in _LINKS:
            yield entry
            continue
        path, what = _normal(entry.name), _KINDS[entry.kind]
        target = None if path is None else targets[path] if path in targets else _target(entry, links, lengths, detours)
        inside: Sequence[str] = ()
        if entry.kind == _SYMBOLIC and target is not None:
            if (there := files.get(target)) is not None:
                yield entry._replace(offset=there.offset, size=there.size, kind=there.kind)
                continue
            if not f"{path}/".startswith(f"{target}/"):  # else it would lead into itself
                inside = below.get(target, ())
        left -= len(inside)
        if not inside or left < 0:
            of_tar = "file that comes before it in this tar" if entry.kind == _HARD else "file or folder of this tar"
            why = "a loop, too long, or out of the archive" if target is None else f"{target!r}, which is no {of_tar}"
            why = f"{entry.name!r} is a link to {entry.target[:MAX_NAME_BYTES]!r}, that is {why}: pack with `tar -h`"
            unusable(entry, BadSample("link", why), what)
            continue
        for name in inside:
            there = files[name]
            yield there._replace(name=entry.name + name[len(target or "") :], part=entry.part)


def _unpacked(
    entries: Iterable[Entry], lengths: Set[int], detours: Iterator[None]
) -> tuple[list[Entry], dict[str, Entry], dict[str, Entry]]:
    """Return the entries, and the files and symbolic links that are there by path after all of them: hard links are what they lead to."""
    made, files, links = list[Entry](), dict[str, Entry](), dict[str, Entry]()
    for entry in entries:
        path = _normal(entry.name)
        if entry.kind == _HARD and path is not None:
            if (link := links.get(_normal(entry.target) or "")) is not None:  # a further name of a symbolic link
                entry = entry._replace(kind=_SYMBOLIC, target=link.target)
            elif (there := files.get(_target(entry, links, lengths, detours) or "")) is not None:
                entry = entry._replace(offset=there.offset, size=there.size, kind=there.kind)
        made.append(entry)
        if path is None or entry.kind == _HARD:
            continue
        files.pop(path, None)
        links.pop(path, None)
        if entry.is_file:
            files[path] = entry
        elif entry.kind == _SYMBOLIC:
            links[path] = entry
    return made, files, links


def _is_too_long(name: str) -> bool:
    if len(name) < MAX_LEVELS:  # nearly all
        return False
    return name.count("/") >= MAX_LEVELS or len(name.encode("utf-8", "surrogateescape")) > MAX_NAME_BYTES


def _by_folder(files: Iterable[str], folders: Set[str | None]) -> dict[str, list[str]]:
    """Return the files below each of these folders."""
    found: dict[str, list[str]] = defaultdict(list)
    lengths = {len(folder) for folder in folders if folder is not None}
    for name in files:
        at = name.find("/")
        while at >= 0:
            if at in lengths and name[:at] in folders:
                found[name[:at]].append(name)
            at = name.find("/", at + 1)
    return found


def _target(entry: Entry, links: Mapping[str, Entry], lengths: Set[int], detours: Iterator[None]) -> str | None:
    """Return the path in the tar that a link leads to after all links on the way; None if it leaves the tar or leads in a circle.

    `lengths` are those of the names of links: other beginnings of a path need not be looked up. `detours` has an item for each of the
    links on the way, after the first two, that are followed in this tar: then a path that needs more is too long.
    """
    path: str | None = entry.target if entry.kind == _HARD else f"{entry.name.rpartition('/')[0]}/{entry.target}".removeprefix("/")
    if entry.kind == _SYMBOLIC and entry.target.startswith("/"):
        return None
    for hop in range(MAX_HOPS):
        if hop > 2 and next(detours, True):
            return None
        path = None if path is None or _is_too_long(path) else _normal(path)
        if path is None:
            return None
        ends = (slash.start() for slash in _END.finditer(path))
        at = next((end for end in ends if end in lengths and path[:end] in links), None)
        if at is None:
            return path
        link = links[path[:at]]
        if link.kind == _SYMBOLIC and link.target.startswith("/"):
            return None
        start = link.target if link.kind == _HARD else f"{path[:at].rpartition('/')[0]}/{link.target}".removeprefix("/")
        path = start + path[at:]
    return None


def _normal(path: str) -> str | None:
    """Return a path in a tar without `.` and `..`; None if it leaves the tar."""
    parts = list[str]()
    for part in path.split("/"):
        if part == "..":
            if not parts:
                return None
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)
