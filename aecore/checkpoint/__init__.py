"""Checkpoints on disk: config.json, safetensors and checkpoint.json; how a model comes back from them."""

from aecore.checkpoint.files import CheckpointRef, LoadedModel, load_model

__all__ = ["CheckpointRef", "LoadedModel", "load_model"]
