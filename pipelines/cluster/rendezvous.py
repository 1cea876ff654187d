"""Rendezvous of the ranks of a training on a local Ray: through a file in a private folder.

torch's TCP store listens on all interfaces, without a password, and has no option to bind to one.
"""

import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend


@dataclass
class FileTorchConfig(TorchConfig):
    """Ray's settings of the process group, and the folder that all ranks share."""

    folder: str = ""

    @property
    def backend_cls(self) -> type["FileBackend"]:
        """Return the class that starts the process group."""
        return FileBackend


class FileBackend(_TorchBackend):
    """Ray's backend with `init_method=file://...`, a new file for each start of the group."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:  # any: Ray's worker group, a `FileTorchConfig`
        """Set up the process group on all workers."""
        worker_group.execute(_set_torch_distributed_env_vars)
        settings = {"backend": backend_config.backend, "world_size": len(worker_group), "timeout_s": backend_config.timeout_s}
        settings["init_method"] = f"file://{Path(backend_config.folder, f'ranks-{uuid.uuid4().hex}')}"
        ray.get(
            [
                worker_group.execute_single_async(rank, _setup_torch_process_group, world_rank=rank, **settings)
                for rank in range(len(worker_group))
            ]
        )
