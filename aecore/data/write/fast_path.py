"""The fast path for plain local images: from their files into a tar without a Python object for each of them.

The listed sizes determine the offset of each file in the tar, so a `TarBuilder` reads it directly into place. A block with anything
unexpected (another size, a damaged file, another format, a name that is too long) goes through `pack` instead.
"""

import contextlib
import itertools
import os
from collections.abc import Generator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aecore.data.format.limits import exclusive_cumsum, split_by_limits
from aecore.data.format.tar import BLANK, BLOCK, TarPacker, joined_names, plain_sizes, stored_size
from aecore.data.sources import Source, file_root
from aecore.data.write.spec import ShardTask
from aecore.native.bytes_column import BytesColumn
from aecore.native.loops import StreamHash
from aecore.native.tar_builder import TarBuilder, TarFiles, open_tar_builder
from aecore.native.texts import Texts
from aecore.store import STATE_BYTES, close_read, read_again

Int64s = NDArray[np.int64]
BLOCK_FILES, BLOCK_BYTES, MOST_BYTES = (
    1024,
    1 << 21,
    1 << 24,
)  # of a block: files, bytes; a larger single file is a block up to MOST_BYTES and not plain above
_ENDINGS = {".png": "png", ".PNG": "png", ".jpg": "jpg", ".JPG": "jpg", "jpeg": "jpeg", "JPEG": "jpeg"}


class PlainFiles:
    """The samples of a task as files, split into blocks; see `plain_files`.

    Attributes
    ----------
    blocks : `[B+1]` int64
        The first sample of each block, and their number.
    """

    def __init__(self, root: Path, task: ShardTask, exts: list[str], names: BytesColumn) -> None:
        self._root, self._exts = root, exts
        labelled = np.zeros(len(task), bool) if task.labels is None else task.labels >= 0
        self._labels = np.full(len(task), -1, np.int32) if task.labels is None else np.ascontiguousarray(task.labels)
        self._starts = exclusive_cumsum(stored_size(task.sizes) + 2 * BLOCK * labelled)
        self._begins = self._starts[:-1] + BLOCK + 2 * BLOCK * labelled  # `cls` sorts before all of these extensions
        self._ends = self._begins + task.sizes
        runs = split_by_limits((self._starts, BLOCK_BYTES), (np.arange(len(task) + 1), BLOCK_FILES))
        self.blocks = np.array([0, *(stop for _, stop in runs)], np.int64)
        plain = (np.diff(self._starts) <= MOST_BYTES) & (True if all(exts) else np.array([ext != "" for ext in exts]))
        self._other_blocks = np.flatnonzero(~np.logical_and.reduceat(plain, self.blocks[:-1]))
        self._paths = _paths(Texts.of(task.sources))
        self._names = names
        self._states = None if task.states is None else _state_texts(Texts.of(task.states))

    def exts_of(self, start: int, stop: int) -> list[str]:
        """Return the extension of each of these files that may be plain, "" for others."""
        return self._exts * (stop - start) if len(self._exts) == 1 else self._exts[start:stop]

    @contextlib.contextmanager
    def builder(self, block: int, most: int, packer: TarPacker, stream: StreamHash) -> Generator[TarBuilder | None, None, None]:
        """Yield a builder for at most `most` blocks from this one on, which follow the packed ones; None if this one cannot be plain."""
        later = self._other_blocks[self._other_blocks >= block]
        last = min(int(later[0]) if len(later) else len(self.blocks) - 1, block + most)
        if last == block:
            yield None
            return
        first, stop = int(self.blocks[block]), int(self.blocks[last])
        rows, move = slice(first, stop), packer.size - int(self._starts[first])
        places = self._starts[first : stop + 1] + move, self._begins[rows] + move, self._ends[rows] + move
        # relative to an open folder, since the kernel resolves shorter paths faster
        folder = read_again(lambda: os.open(self._root, os.O_RDONLY | os.O_DIRECTORY), str(self._root))
        try:
            texts, blocks = (self._paths[rows], self._names[rows]), self.blocks[block : last + 1] - first
            states = None if self._states is None else self._states[rows]
            files = TarFiles(folder, *texts, self._labels[rows], *places, blocks, BLANK, states)
            with open_tar_builder(files, stream, bytes(packer.rest)) as builder:
                yield builder
        finally:
            close_read(folder)


def _paths(sources: Texts) -> BytesColumn:
    """Return the names of files, as their bytes are, each with a zero byte after it."""
    if sources.is_utf8():
        return BytesColumn.concat([*sources.terminated()])
    return BytesColumn.from_texts(os.fsencode("\0".join(sources) + "\0"))


def _state_texts(states: Texts) -> NDArray[np.uint8]:
    """Return states as `[n, STATE_BYTES]` characters; one that is not known, or is none of a local file, as others than any file's."""
    columns = [*states.terminated("")]
    if all((column.sizes == STATE_BYTES).all() for column in columns):  # nearly always
        found = np.concatenate([column.data[column.begins[0] : column.ends[-1]] for column in columns])
        if found.max(initial=0) < 128:
            return found.reshape(-1, STATE_BYTES)
    joined = "".join(state if state and len(state) == STATE_BYTES and state.isascii() else "?" * STATE_BYTES for state in states)
    return np.frombuffer(joined.encode(), np.uint8).reshape(-1, STATE_BYTES)


def plain_files(source: Source, task: ShardTask) -> PlainFiles | None:
    """Return the samples as files, None if they may not be stored unchanged."""
    root = file_root(source) if task.shards.keeps_bytes and task.unusable is None and len(task) else None
    if root is None:
        return None
    ending = Texts.of(task.sources).ending(4)
    exts = list(map(_ENDINGS.get, (source[-4:] for source in task.sources), itertools.repeat(""))) if ending is None else []
    exts = exts if ending is None else [_ENDINGS.get(ending, "")]
    if not any(exts):
        return None
    keys = Texts.of(task.keys)
    if len({*exts}) == 1:
        names = BytesColumn.concat([*keys.terminated(f".{exts[0]}\0", inside=True)])
    else:
        names = BytesColumn.from_texts(joined_names([*keys], exts).encode())
    is_plain = keys.are_ascii() and np.count_nonzero(names.data == 0) == len(keys) and plain_sizes(names.sizes, exts)
    return PlainFiles(root, task, exts, names) if is_plain else None
