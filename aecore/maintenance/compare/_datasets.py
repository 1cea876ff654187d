"""Compare two datasets by content: samples that were added, removed, changed, relabelled or moved; classes, splits, settings."""

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from aecore.data.dataset import Dataset, open_dataset
from aecore.data.format.index import INDEX_SCHEMA, SOURCE_SHA256
from aecore.data.manifest import DatasetManifest, ShardRef
from aecore.data.write.ledger import columns_sha256, read_ledger, samples_sha256
from aecore.maintenance.compare._fields import differing
from aecore.maintenance.compare._join import SHOWN, Keys, by_ranges, first_keys, keys_of

COLUMNS = ("key", "sha256", "label_name")
_CHANGES = {  # column -> its names in the result
    "sha256": ("changed_content", "changed"),
    "label_name": ("changed_class", "relabelled"),
    "split": ("moved_to_another_split", "moved"),
    "columns": ("changed_columns", "changed_columns"),
}


def compare_datasets(a: str, b: str, *, values: bool = False) -> dict[str, Any]:
    """Compare the newest generations of two datasets by their indexes. Shards that are equal in both are not read.

    `same_content` says whether both have one `content_sha256` (split, key, class, bytes and further columns of each sample); with `values`
    `same_values` whether their decoded samples are the same (`values_sha256`), for which all are read.
    """
    left, right = open_dataset(a), open_dataset(b)
    equal = {_content(shard) for shard in left.manifest.shards} & {_content(shard) for shard in right.manifest.shards}
    rest_a, rest_b = ([shard for shard in dataset.manifest.shards if _content(shard) not in equal] for dataset in (left, right))
    keys, changed = Keys(), _Changed()
    for rows_a, rows_b in by_ranges(rest_a, rest_b, functools.partial(_read, left), functools.partial(_read, right)):
        changed.add(*keys.join(rows_a, rows_b))
    keys.in_both += sum(shard.live for shard in left.manifest.shards if _content(shard) in equal)
    manifests = left.manifest, right.manifest
    contents = [_content_sha256(dataset) for dataset in (left, right)]
    return {
        "same_content": contents[0] == contents[1],
        "content_sha256": contents,
        **(_values(left, right) if values else {}),
        "differences": {
            "added": {"samples": keys.only_b, "first": keys.examples_b},
            "removed": {"samples": keys.only_a, "first": keys.examples_a},
            **changed.differences(),
        },
        "generation": [manifest.number for manifest in manifests],
        "dataset_sha256": [manifest.dataset_sha256 for manifest in manifests],
        "keys": keys.to_dict(),
        **changed.to_dict(),
        "equal_shards": len(equal),
        "shards": [len(manifest.shards) for manifest in manifests],
        "splits": _counts(*manifests),
        "quarantined": [manifest.quarantined for manifest in manifests],
        "classes": _classes(*manifests),
        "shapes": differing(manifests[0].sample.shapes, manifests[1].sample.shapes),
        "identity": differing(manifests[0].identity, manifests[1].identity),
    }


def _content_sha256(dataset: Dataset) -> str:
    """Return the hash of the live samples; of a dataset that only grew it is made of what is known of them."""
    return dataset.manifest.content_sha256 or samples_sha256(read_ledger(dataset.store, dataset.manifest))


def _values(left: Dataset, right: Dataset) -> dict[str, Any]:
    from aecore.data.read.values import values_sha256

    (a, bytes_a), (b, bytes_b) = values_sha256(left), values_sha256(right)
    return {"same_values": a == b, "values_sha256": [a, b], "samples_compared_by_bytes": [bytes_a, bytes_b]}


def _content(shard: ShardRef) -> tuple[str | None, ...]:
    removed = None if shard.removed is None else shard.removed.content_sha256
    return shard.split, shard.tar.sha256, shard.index_content_sha256, removed


def _read(dataset: Dataset, shard: ShardRef, columns: Sequence[str] | None) -> pa.Table:
    """Read the compared columns of an index, with the split as a column."""
    index = dataset.index(shard)
    wanted = [name for name in (COLUMNS if columns is None else columns) if name in index.column_names]
    rows = index.select(wanted)
    for name in wanted:
        if pa.types.is_dictionary(rows[name].type):
            rows = rows.set_column(rows.column_names.index(name), name, rows[name].cast(pa.string()))
    if columns is None:
        further = {name: index[name] for name in index.column_names if name not in INDEX_SCHEMA.names and name != SOURCE_SHA256}
        rows = rows.append_column("columns", columns_sha256(further, len(index)))
    return rows.append_column("split", pa.array([shard.split] * len(rows), pa.string()))


class _Changed:
    """Counts and examples of common keys whose content, class or split differs."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {name: [] for name in _CHANGES}

    def add(self, a: pa.Table, b: pa.Table) -> None:
        for name, examples in self.examples.items():
            if name not in a.column_names or name not in b.column_names:
                continue
            left: Any = a[name]  # any: pyarrow's stubs know no type of a column of a file
            right: Any = b[name]
            same: Any = pc.or_(pc.fill_null(pc.equal(left, right), False), pc.and_(pc.is_null(left), pc.is_null(right)))
            keys = first_keys(keys_of(a).filter(pc.invert(same)))
            self.counts[name] += len(keys)
            examples += keys.slice(0, max(0, SHOWN - len(examples))).to_pylist()

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {_CHANGES[name][0]: {"samples": self.counts[name], "examples": examples} for name, examples in self.examples.items()}

    def differences(self) -> dict[str, Any]:
        """Return the same by the words that `shard` has for them, plain JSON data."""
        return {_CHANGES[name][1]: {"samples": self.counts[name], "first": examples} for name, examples in self.examples.items()}


def _counts(a: DatasetManifest, b: DatasetManifest) -> dict[str, list[int | None]]:
    names = [*a.splits, *(name for name in b.splits if name not in a.splits)]
    return {name: [manifest.num_samples(name) if name in manifest.splits else None for manifest in (a, b)] for name in names}


def _classes(a: DatasetManifest, b: DatasetManifest) -> dict[str, Any]:
    return {
        "number": [len(a.classes), len(b.classes)],
        "only_in_a": [name for name in a.classes if name not in b.classes],
        "only_in_b": [name for name in b.classes if name not in a.classes],
        "same_order": list(a.classes[: len(b.classes)]) == list(b.classes[: len(a.classes)]),
    }
