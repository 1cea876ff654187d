"""How the ranks of a training on this machine's own Ray find each other: through a file in a private folder.

torch's usual store listens on all interfaces, without a password, and has no option for one of them.
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
    """Ray's settings of the process group, and the folder that all ranks see."""

    folder: str = ""

    @property
    def backend_cls(self) -> type["FileBackend"]:
        return FileBackend


class FileBackend(_TorchBackend):
    """As Ray's own, with a new file for each start of the group."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:  # any: Ray's worker group, a `FileTorchConfig`
        worker_group.execute(_set_torch_distributed_env_vars)
        settings = {"backend": backend_config.backend, "world_size": len(worker_group), "timeout_s": backend_config.timeout_s}
        settings["init_method"] = f"file://{Path(backend_config.folder, f'ranks-{uuid.uuid4().hex}')}"
        ray.get(
            [
                worker_group.execute_single_async(rank, _setup_torch_process_group, world_rank=rank, **settings)
                for rank in range(len(worker_group))
            ]
        )
