"""`make chaos ARGS="inputs count=1000 seed=0"`: damaged, forged and hostile input files, each for a command with 2 GB and 20 s.

The corpus has every kind of file that is read: images, arrays, tars, recipes, and the files of datasets, runs and tables, small JSON with
its hash made to fit. Files take turns; each is changed by one or two of: bits, a cut, zeros, a repeated block, huge lengths, and in text
numbers and nesting. A command must end by itself with a known exit status, without a traceback, and without running what a file holds.
"""

import io
import json
import os
import random
import re
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from aecore.artifact.documents import sealed
from tests.chaos.counts import count_and_seed, print_counts, turns
from tests.chaos.places import Local
from tests.chaos.rounds import Bench
from tests.chaos.work import RECIPE, WORKS
from tests.processes import WARM, run

MOST_BYTES, MOST_S = 2 << 30, 20.0
EXIT_CODES = range(6)  # all but that of an interrupt
CHILD = """
import json, resource, sys, time
from pathlib import Path
from pipelines.cli.main import main
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + {most}, resource.RLIM_INFINITY))
before = Path("/proc/self/clear_refs").write_text("5") and int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])
began = time.process_time()
code = main(sys.argv[1:])
peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
print("\\n" + json.dumps([code, time.process_time() - began, (peak - before) << 10]))
"""
COLUMNS = ("inputs", "taken", "refused", "executed", "crashed", "hung", "too_much")
Change = Callable[[bytes, random.Random], bytes]


class _Canary:
    """A pickle that would create a file if it was executed."""

    def __init__(self, path: Path) -> None:
        self._command = f"touch {path}"

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self._command,)


def main(words: list[str]) -> int:
    """Try inputs, print counts for each kind of file, and return 1 if one was executed, crashed, hung or took too much."""
    if (asked := count_and_seed("inputs", words)) is None:
        return 2
    count, seed = asked
    rng, base = random.Random(seed), Path(tempfile.mkdtemp(prefix="aecore-inputs-"))
    try:
        (base / "data").mkdir()
        bench = Bench(base, Local(base / "data"))
        bench.prepare(WORKS[:3])
        canary = base / "executed"
        tallies: dict[str, Counter[str]] = {}
        for number, (kind, path, command) in enumerate(turns(rng, count, _corpus(base, canary))):
            found, said = _try(base, bench, path, command, canary, rng)
            tally = tallies.setdefault(kind, Counter())
            tally.update(["inputs", found])
            if found not in ("taken", "refused"):
                print(f"input {number} of seed {seed}: {kind}, {path.name}: {found}\n{said}", flush=True)
        every = print_counts("input", COLUMNS, dict(sorted(tallies.items())))
        return int(any(every[column] for column in COLUMNS[3:]))
    finally:
        shutil.rmtree(base, ignore_errors=True)


def _corpus(base: Path, canary: Path) -> list[tuple[str, Path, list[str]]]:
    """Return (kind, file, words of the command that reads it below the folder `{root}`) of every input."""
    raw, rng = base / "raw", np.random.default_rng(0)
    pixels = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
    cases: list[tuple[str, Path, list[str]]] = []
    shard, check = ["cluster.num_workers=0", "splits.by=none"], "shards.check=decode"
    for ending, options in {"png": {}, "jpg": {}, "gif": {}, "bmp": {}, "tif": {"compression": "tiff_lzw"}, "webp": {}}.items():
        for number in range(2):
            path = raw / "images" / "a" / f"{number}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path, **options)
        cases.append((f"image .{ending}", path, ["shard", "{root}/images", "{root}/out", check, *shard]))
    (raw / "arrays").mkdir()
    values = rng.standard_normal((40, 8)).astype(np.float32)
    np.save(raw / "arrays/x.npy", values)
    np.savez_compressed(raw / "arrays/x.npz", data=values, labels=np.arange(40))
    np.save(raw / "arrays/p.npy", np.array([_Canary(canary)], dtype=object), allow_pickle=True)
    np.savez(raw / "arrays/p.npz", data=np.array([_Canary(canary)], dtype=object))
    cases += [
        (f"array {path.suffix}", path, ["shard", f"{{root}}/arrays/{path.name}", "{root}/out", *shard])
        for path in sorted((raw / "arrays").iterdir())
    ]
    (raw / "tars").mkdir()
    for mode, name in (("w", "a.tar"), ("w:gz", "b.tar.gz")):
        with tarfile.open(raw / "tars" / name, mode) as tar:  # type: ignore[call-overload]
            for number in range(8):
                for ending, data in (("png", (raw / "images/a/0.png").read_bytes()), ("json", b'{"a": 1}'), ("cls", b"1")):
                    member = tarfile.TarInfo(f"{name[0]}{number}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        cases.append((f"tar {name[1:]}", raw / "tars" / name, ["shard", f"{{root}}/tars/{name}", "{root}/out", *shard]))
    (raw / "recipes").mkdir()
    (raw / "recipes/r.yaml").write_text(RECIPE.format(images=raw / "images"))
    cases.append(("recipe", raw / "recipes/r.yaml", ["run", "{root}/recipes/r.yaml", "out={root}/out", "--dry-run"]))
    shutil.copytree(base / "data/one", raw / "one")
    uses = {
        "dataset": ["encode", "{root}/one/run", "{root}/one/dataset", "{root}/out", *shard[:1]],
        "run": ["encode", "{root}/one/run", "{root}/one/dataset", "{root}/out", *shard[:1]],
        "table": ["verify", "{root}/one/table", "--read-data"],
    }
    for path in sorted((raw / "one").rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            kind = path.relative_to(raw / "one").parts[0]
            cases.append((f"{kind} {path.suffix}", path, uses[kind]))
            cases.append((f"{kind} {path.suffix}", path, ["verify", f"{{root}}/one/{kind}", "--read-data"]))
    return cases


def _try(base: Path, bench: Bench, path: Path, command: list[str], canary: Path, rng: random.Random) -> tuple[str, str]:
    """Change a copy of the file, run the command, and return what came of it and what it printed."""
    root, raw = base / "try", base / "raw"
    top = path.relative_to(raw).parts[0]
    shutil.copytree(raw / top, root / top)
    place = root / path.relative_to(raw)
    place.write_bytes(_changed(place, path.read_bytes(), rng))
    words = [word.format(root=root) for word in command]
    try:
        done = run([*WARM, "-c", CHILD.format(most=MOST_BYTES), *words], env=bench.environment, cwd=base, timeout_s=240)
    except AssertionError as error:
        return "hung", str(error)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    said = f"{' '.join(words)}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
    if canary.exists():
        canary.unlink()
        return "executed", said
    last = (done.stdout.splitlines() or [""])[-1]
    if done.returncode or not last.startswith("[") or "Traceback (most recent call last)" in done.stderr:
        return "crashed", f"exit status {done.returncode}: {said}"
    code, seconds, num_bytes = json.loads(last)
    if code not in EXIT_CODES:
        return "crashed", f"exit status {code}: {said}"
    if seconds > MOST_S or num_bytes > MOST_BYTES:
        return "too_much", f"{seconds:.0f} s, {num_bytes} bytes: {said}"
    return ("refused" if code else "taken"), said


def _changed(path: Path, data: bytes, rng: random.Random) -> bytes:
    if path.suffix == ".json" and rng.random() < 0.7:  # with a hash that fits
        text = _text(data, rng)
        try:
            content = json.loads(text)
            return sealed({name: value for name, value in content.items() if name not in ("format", "sha256")})
        except (ValueError, AttributeError, RecursionError, OverflowError):
            return text
    changes: list[Change] = [_bits, _cut, _zeros, _repeated, _lengths, *([_text] * 5 if path.suffix in (".json", ".yaml") else [])]
    for change in rng.sample(changes, rng.choice((1, 1, 2))):
        data = change(data, rng)
    return data


def _bits(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 2, 8)) if data else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _zeros(data: bytes, rng: random.Random) -> bytes:
    first, size = rng.randrange(len(data) + 1), rng.choice((4, 64, 512))
    return data[:first] + bytes(min(size, len(data) - first)) + data[first + size :]


def _repeated(data: bytes, rng: random.Random) -> bytes:
    first, size = rng.randrange(len(data) + 1), rng.choice((16, 512, 4096))
    return data[: first + size] + data[first:]


def _lengths(data: bytes, rng: random.Random) -> bytes:
    first, value = rng.randrange(len(data) + 1), rng.choice((b"\xff\xff\xff\x7f", b"\xff" * 8, b"77777777777", b"\x00\x00\x00\x80"))
    return data[:first] + value + data[first + len(value) :]


def _text(data: bytes, rng: random.Random) -> bytes:
    """Change one number, word or list of a text into something else, large or deep."""
    text = data.decode("utf-8", "replace")
    found = list(re.finditer(r"-?\d+(?:\.\d+)?|\"[^\"]*\"|\w+|\[|\{", text))
    if not found:
        return data
    match = rng.choice(found)
    other = rng.choice(
        ("-1", "0", "1000000000000", "1e308", "NaN", "null", "true", '""', '"../../x"', "[" * 200 + "]" * 200, "{}", '"\\u0000"')
    )
    return (text[: match.start()] + other + text[match.end() :]).encode()
