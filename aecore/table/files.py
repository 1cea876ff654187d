"""The parts of a table as a pyarrow file system: downloaded at the first read, readable as long as they are open."""

from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from aecore.data.format.parquet import read_metadata
from aecore.errors import StoreError
from aecore.store import FileRef, Store, close_read
from aecore.table.part import again_if_corrupt, damage_named


class PartFiles(pafs.FileSystemHandler):
    """Files of a store by address (`<url>/<name>`); read-only.

    A file of a bucket is opened in the local cache: an eviction removes its name, an open file stays readable. `footers` are the hashes of
    their footers, which pyarrow reads by itself: they are compared whenever a file is opened. `read` is called with the function that
    opens one.
    """

    def __init__(
        self,
        store: Store,
        refs: Mapping[str, FileRef],
        footers: Mapping[str, str],
        *,
        read: Callable[[Callable[[], pa.NativeFile]], pa.NativeFile] = lambda once: once(),
    ) -> None:
        self._store, self._refs, self._footers, self._read = store, refs, footers, read

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PartFiles) and (self._store.url, self._refs) == (other._store.url, other._refs)

    __hash__ = object.__hash__

    def get_type_name(self) -> str:
        """Return the name of this kind of file system."""
        return "aecore"

    def normalize_path(self, path: str) -> str:
        """Return the path as it is."""
        return path

    def get_file_info(self, paths: str | list[str]) -> list[pafs.FileInfo]:
        """Return size and kind of these paths, without I/O: the manifest has the sizes."""
        known = {path: self._refs.get(path) for path in ([paths] if isinstance(paths, str) else paths)}
        return [
            pafs.FileInfo(path, pafs.FileType.NotFound) if ref is None else pafs.FileInfo(path, pafs.FileType.File, size=ref.bytes)
            for path, ref in known.items()
        ]

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        """Return size and kind of the files below a folder."""
        inside = [path for path in self._refs if path.startswith(f"{selector.base_dir.rstrip('/')}/")]
        return self.get_file_info(inside)

    def open_input_file(self, path: str) -> pa.NativeFile:
        """Open a file; an object is downloaded first.

        A scan raises the typed error of a file that is missing, cannot be opened, or has another footer than the table was opened with.
        """
        ref = self._refs[path]

        def opened() -> pa.NativeFile:
            descriptor = self._store.open(ref)
            try:
                with damage_named(path), open(descriptor, "rb", closefd=False) as file:
                    read_metadata(file, self._footers[path])
                return pa.OSFile(f"/dev/fd/{descriptor}", "rb")  # OSFile gets its own descriptor of the same file
            finally:
                close_read(descriptor)

        return self._read(lambda: again_if_corrupt(self._store, ref, opened, path))

    open_input_stream = open_input_file

    def _refused(self, *_: Any) -> None:  # any: the arguments of the operation
        raise StoreError("a latent table is read-only: write to another URL")

    create_dir = delete_dir = delete_dir_contents = delete_root_dir_contents = delete_file = _refused  # type: ignore[assignment]
    move = copy_file = open_output_stream = open_append_stream = _refused  # type: ignore[assignment]
