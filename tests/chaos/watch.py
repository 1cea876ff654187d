"""A second process beside the histories: it reads what they write while they write it, and writes to a source while they read that.

As a reader it opens the newest generation again and again, keeps a scan of an older one open, and notes whatever is not exactly one
generation: a file that is named and missing, a row twice, a table whose rows are not those of the generation of the dataset that it names,
latents of a sample that are not those of before.
"""

import contextlib
import hashlib
import json
import random
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from aecore.artifact.commit import newest_number
from aecore.data.dataset import Dataset, open_dataset
from aecore.store import Store, open_store
from aecore.table.table import LatentTable, open_table

PAUSE_S = 0.3  # between two looks
MOST = 5  # problems that are told of one history
NO_COLUMNS = {"key", "ordinal", "label", "label_name", "source", "sha256", "members", "width", "height", "mode", "group", "length"}


def live_rows(dataset: Dataset) -> list[dict[str, Any]]:
    """Return the rows of the live indexes of a generation, with the split of each."""
    found = []
    for shard in dataset.manifest.shards:
        if shard.live:
            found += [{**row, "split": shard.split} for row in dataset.index(shard).to_pylist()]
    return found


def columns_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a row of an index has beside the columns of every dataset."""
    return {name: value for name, value in row.items() if name not in NO_COLUMNS | {"split", "source_sha256"}}


def content_sha256(rows: list[dict[str, Any]]) -> str:
    """Return the content hash of samples, as DESIGN says it, without a line of aecore."""
    lines = []
    for row in rows:
        values = {name: int(value) if isinstance(value, float) and value.is_integer() else value for name, value in columns_of(row).items()}
        text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        columns = hashlib.sha256(text.encode()).hexdigest() if values else ""
        lines.append((row["split"], row["key"], f"{row['split']}\0{row['key']}\0{row['label_name'] or ''}\0{row['sha256']}\0{columns}\n"))
    return hashlib.sha256("".join(line for *_, line in sorted(lines)).encode()).hexdigest()


@dataclass
class Reader:
    """What is known of the artefacts of a history; `look` reads their newest generations. `bits`: sha256 of a sample -> its latents."""

    data: str
    table: str
    bytes_too: bool
    bits: dict[str, bytes] = field(default_factory=dict)
    looks: int = 0
    scans: int = 0
    problems: list[str] = field(default_factory=list)
    datasets: dict[int, tuple[str, frozenset[str]]] = field(default_factory=dict)  # number -> hash, keys
    tables: dict[int, frozenset[str]] = field(default_factory=dict)
    scan: tuple[int, Iterator[Any], list[str]] | None = None

    def look(self, rng: random.Random) -> None:
        """Read what there is now."""
        for what, url in ((self._look_at_dataset, self.data), (self._look_at_table, self.table), (self._scan_on, self.table)):
            if len(self.problems) >= MOST:
                return
            try:
                store = open_store(url)
                if newest_number(store, "dataset" if url == self.data else "table") is not None:
                    what(store, rng)
                    self.looks += 1
            except Exception:  # whatever a reader is told while others write is wrong
                self.problems.append(f"a reader of {url} at {time.time():.3f}: {traceback.format_exc()}")

    def _look_at_dataset(self, store: Store, rng: random.Random) -> None:
        dataset = open_dataset(store.url)
        keys = self._keys_of(dataset)
        shards = [shard for shard in dataset.manifest.shards if shard.live]
        for shard in rng.sample(shards, min(2, len(shards))) if self.bytes_too else ():
            reader = dataset.reader(shard)
            with contextlib.closing(reader):
                reader.read_rows(np.arange(shard.samples))
        del keys

    def _keys_of(self, dataset: Dataset) -> frozenset[str]:
        if dataset.number not in self.datasets:
            dataset.store.check_all(list(dataset.manifest.own_files))
            rows = live_rows(dataset)
            keys = frozenset(row["key"] for row in rows)
            if len(keys) != len(rows):
                raise AssertionError(f"generation {dataset.number} has keys twice")
            if (found := content_sha256(rows)) != dataset.manifest.content_sha256:
                raise AssertionError(f"generation {dataset.number} holds {found}, its manifest says {dataset.manifest.content_sha256}")
            self.datasets[dataset.number] = dataset.manifest.dataset_sha256, keys
        known, keys = self.datasets[dataset.number]
        if known != dataset.manifest.dataset_sha256:
            raise AssertionError(f"generation {dataset.number} was {known}, now it is {dataset.manifest.dataset_sha256}")
        return keys

    def _look_at_table(self, store: Store, rng: random.Random) -> None:
        table = open_table(store.url)
        files, number = table.files(), table.manifest.number
        if store.url.startswith("/"):
            rows = [row for path in files for row in pq.ParquetFile(path).read(["key", "sample_sha256", "mu"]).to_pylist()]
        else:
            columns = (table.keys.to_pylist(), table.arrow("sample_sha256").to_pylist(), table.numpy("mu"))
            rows = [dict(zip(("key", "sample_sha256", "mu"), row, strict=True)) for row in zip(*columns, strict=True)]
        keys = frozenset(row["key"] for row in rows)
        if len(keys) != len(rows):
            raise AssertionError(f"table generation {number} has keys twice")
        self._compare(table, keys)
        for row in rows:
            bits = np.asarray(row["mu"], np.float32).tobytes()
            if self.bits.setdefault(row["sample_sha256"], bits) != bits:
                raise AssertionError(f"{row['key']} of table generation {number} has other latents than the same sample had before")
        if self.scan is None:
            table = open_table(store.url)
            self.scan = number, iter(table.dataset().to_batches(["key"], batch_size=2)), []
            if table.manifest.number != number:
                self.scan = None

    def _compare(self, table: LatentTable, keys: frozenset[str]) -> None:
        number = table.manifest.number
        if self.tables.setdefault(number, keys) != keys:
            raise AssertionError(f"table generation {number} has other keys than before")
        lineage = table.manifest.lineage["dataset"]
        expected = self._keys_of(open_dataset(self.data, lineage["number"]))
        if not keys <= expected or len(expected) != len(keys) + table.manifest.quarantined:
            raise AssertionError(
                f"table generation {number} has {len(keys)} keys and {table.manifest.quarantined} refused ones, generation "
                f"{lineage['number']} of the dataset {len(expected)}: more {sorted(keys - expected)}, fewer {sorted(expected - keys)}"
            )

    def _scan_on(self, store: Store, rng: random.Random) -> None:
        if self.scan is None:
            return
        number, batches, keys = self.scan
        for _ in range(rng.randint(1, 4)):
            batch = next(batches, None)
            if batch is None:
                self.scan = None
                self.scans += 1
                if sorted(keys) != sorted(self.tables[number]):
                    raise AssertionError(
                        f"an open scan of table generation {number} gave {len(keys)} rows, {len(self.tables[number])} before"
                    )
                return
            keys += batch.column("key").to_pylist()


@dataclass
class Writer:
    """Writes versions of a file of a local source, one after the other and in pieces, as a program that is not done yet."""

    path: Path
    versions: list[bytes]

    def write(self, rng: random.Random) -> None:
        """Write the file once more."""
        data = rng.choice(self.versions)
        at = rng.randrange(len(data))
        with self.path.open("r+b") as file:
            file.write(data[:at])
            file.flush()
            time.sleep(rng.uniform(0, 0.002))
            file.write(data[at:])
            file.truncate()


def serve(connection: Connection, seed: str) -> None:
    """Do what the other end of the connection says, until it closes.

    `("watch", data, table, bytes_too)` begins to read, `("rest",)` is answered by `(looks, scans, problems)`; `("write", path, versions)`
    begins to write, `("written",)` ends that and is answered by the number of times.
    """
    rng = random.Random(seed)
    reader: Reader | None = None
    writer: Writer | None = None
    bits = dict[str, bytes]()
    written = 0
    while True:
        while connection.poll(0.0 if writer else PAUSE_S):
            try:
                what, *rest = connection.recv()
            except EOFError:
                return
            if what == "watch":
                reader = Reader(*rest, bits)
            elif what == "write":
                writer, written = Writer(Path(rest[0]), rest[1]), 0
            elif what == "written":
                writer = None
                connection.send(written)
            else:
                connection.send((reader.looks, reader.scans, reader.problems) if reader else (0, 0, []))
                reader = None
        if writer is not None:
            writer.write(rng)
            written += 1
        elif reader is not None:
            reader.look(rng)
