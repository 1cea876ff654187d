"""Whether the data are to blame for a loss that is not finite: looked at once, when training has stopped."""

from collections.abc import Iterable
from typing import Any

import torch

from aecore._base.batch import Batch
from aecore.data.read.rows import SplitRows
from aecore.errors import DataError, Hint


def require_finite_samples(batches: Iterable[Batch], rows: SplitRows) -> None:
    """DataError that names the first sample of these batches that holds NaN or infinity; `rows` is the split that they were read from."""
    for batch in batches:
        instances = batch.x if batch.mask is None else batch.x[batch.mask.bool()]
        values = instances[: len(batch.ordinals)].flatten(1)
        wrong = (~torch.isfinite(values)).sum(1)
        bad = wrong.nonzero().flatten()
        if len(bad):
            ordinal, count = int(batch.ordinals[bad[0]]), int(wrong[bad[0]])
            raise DataError(
                f"{rows.dataset.url}: sample {_key(rows, ordinal)!r} (ordinal {ordinal} of split {rows.split!r}) holds NaN or infinity in "
                f"{count:,} of {values.shape[1]:,} values, as {len(bad):,} of {len(values):,} samples of its batch do: no loss of it is "
                "finite. Repair or leave out such samples and shard into another dataset; shards.check=decode puts them into the quarantine"
            )


def _key(rows: SplitRows, ordinal: int) -> str:
    for number in range(len(rows.shards)):
        index: Any = rows.reader(number).index  # any: pyarrow's stubs know no type of a column of a file
        found = (index["ordinal"].to_numpy() == ordinal).nonzero()[0]
        if len(found):
            return str(index["key"][int(found[0])].as_py())
    raise DataError(
        f"{rows.dataset.url}: split {rows.split!r} has no sample of ordinal {ordinal}: verify it (aecore.data.read.verify.verify_dataset)",
        hint=Hint("damaged-dataset", {"url": rows.dataset.url}),
    )
