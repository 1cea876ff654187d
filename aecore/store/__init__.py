"""URL in, bytes out; put-if-absent. The only module that touches storage.

Every file of an artefact appears under its final name in one step and complete, or not at all. On a disk: written to a temporary file
under `<artefact>/.tmp/`, fsynced, hard-linked to the final name (which fails if the name is taken), folder fsynced. In a bucket: staged
on this machine, sent by one conditional create. Nothing is ever overwritten: a name that is taken by the same bytes is success (an
earlier attempt wrote them), by other bytes it is `AlreadyExists`. No locks and no mutable pointers. A process killed at any instant
leaves at most a file under `.tmp/`, or an upload that was not completed, which no reader looks at.

`Store` is the interface for the rest of the code; `open_store` chooses the implementation by the URL, in the table `SCHEMES`. A store does
its work without a memory; that of a bucket is wrapped in `CachedStore`, which keeps copies on this machine.
Tests kill the process at named fault points: `AECORE_FAULT=record.linked:3` ends it by SIGKILL at the third record linked.
"""

from aecore.store._again import cannot_read, read_again
from aecore.store._base import (
    LEFT_BEHIND,
    SKEW_S,
    AlreadyExists,
    FileRef,
    Files,
    Store,
    ahead_s,
    canonical_json,
    fault_point,
    open_regular,
    sha256_file,
    sha256_json,
)
from aecore.store._buckets import unchecked_bodies
from aecore.store._cache import cache_turn, trim_cache
from aecore.store._cleanup import close_read
from aecore.store._environment import check_environment, environment_value
from aecore.store._links import LinkedFolders, leads_nowhere
from aecore.store._local import LocalFiles, LocalStore, remove_staging
from aecore.store._open import (
    SCHEMES,
    TAR_ENDINGS,
    Scheme,
    absolute_url,
    is_remote,
    is_tar,
    open_files,
    open_store,
    recorded_url,
    resolve_url,
    split_urls,
)
from aecore.store._private import keep_torch_cache_private, make_private, name_torch_cache, named_folder, own_folder, private_folder
from aecore.store._race import RACERS, ROUNDS, race
from aecore.store._scratch import new_path as scratch_path
from aecore.store._scratch import pid_namespace
from aecore.store._states import STATE_BYTES, Seen, local_seen, local_state, settled_ns

__all__ = [
    "LEFT_BEHIND",
    "RACERS",
    "ROUNDS",
    "SCHEMES",
    "SKEW_S",
    "STATE_BYTES",
    "TAR_ENDINGS",
    "AlreadyExists",
    "FileRef",
    "Files",
    "LinkedFolders",
    "LocalFiles",
    "LocalStore",
    "Scheme",
    "Seen",
    "Store",
    "absolute_url",
    "ahead_s",
    "cache_turn",
    "cannot_read",
    "canonical_json",
    "check_environment",
    "close_read",
    "environment_value",
    "fault_point",
    "is_remote",
    "is_tar",
    "keep_torch_cache_private",
    "leads_nowhere",
    "local_seen",
    "local_state",
    "make_private",
    "name_torch_cache",
    "named_folder",
    "open_files",
    "open_regular",
    "open_store",
    "own_folder",
    "pid_namespace",
    "private_folder",
    "race",
    "read_again",
    "recorded_url",
    "remove_staging",
    "resolve_url",
    "scratch_path",
    "settled_ns",
    "sha256_file",
    "sha256_json",
    "split_urls",
    "trim_cache",
    "unchecked_bodies",
]
