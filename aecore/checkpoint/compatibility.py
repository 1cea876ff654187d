"""Whether a dataset and a model are compatible, checked before any work begins."""

from collections.abc import Sequence

from aecore._base.trainable import Trainable
from aecore.checkpoint.weights import LoadedModel
from aecore.data.dataset import Dataset
from aecore.errors import DataError


def check_input_shape(dataset: Dataset, loaded: LoadedModel) -> None:
    """Raise DataError unless the dataset's samples have the shape that the checkpoint expects (0 there: any number of steps)."""
    expected = loaded.config.input_shape
    varying = expected[:1] == (0,)
    shape = dataset.input_shape(sequences=varying)
    if shape != expected and not (varying and shape[1:] == expected[1:] and shape):
        raise DataError(
            f"dataset {dataset.url} holds samples of shape {shape}; checkpoint {loaded.url} expects "
            f"{expected}: shard the data again with a fitting shards.resize and shards.mode, or pick another checkpoint"
        )


def require_labels(dataset_url: str, classes: Sequence[str], model: Trainable) -> None:
    """DataError if the model takes labels and the dataset has none, or more classes than the model knows."""
    if "label" not in model.train_inputs:
        return
    name = type(model).__name__
    if not classes:
        raise DataError(f"{name} takes labels and dataset {dataset_url} has none: shard images in class folders, or use another model.kind")
    if model.num_classes is not None and len(classes) > model.num_classes:
        raise DataError(
            f"dataset {dataset_url} has {len(classes)} classes, the {name} takes labels in 0..{model.num_classes - 1}: "
            f"train with model.num_classes={len(classes)}, or pick other data"
        )
