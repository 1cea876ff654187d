"""Whether a dataset and a model are compatible, checked before any work begins."""

import logging
from collections.abc import Iterable

from aecore._base.trainable import Trainable
from aecore.checkpoint.weights import LoadedModel
from aecore.data.classes import quoted, require_known
from aecore.data.dataset import Dataset
from aecore.errors import DataError

logger = logging.getLogger(__name__)


def check_input_shape(dataset: Dataset, loaded: LoadedModel) -> None:
    """Raise DataError unless the dataset's samples have the shape that the checkpoint expects (0 there: any number of steps).

    Images may have alpha beyond the channels that the model takes: it is composed over `transform.background`.
    """
    expected = loaded.config.input_shape
    varying = expected[:1] == (0,)
    shape = dataset.input_shape(sequences=varying)
    if shape == (*(size + 1 for size in expected[:1]), *expected[1:]) and dataset.has_alpha and loaded.config.transform.pixels == 2:
        return
    if shape != expected and not (varying and shape[1:] == expected[1:] and shape):
        raise DataError(
            f"dataset {dataset.url} holds samples of shape {shape}; checkpoint {loaded.url} expects "
            f"{expected}: shard the data again with a fitting shards.resize and shards.mode, or pick another checkpoint"
        )


def takes_labels(model: Trainable | type[Trainable]) -> bool:
    """Return whether a model is conditioned on the class of each sample."""
    return "label" in model.train_inputs or "label" in model.encode_inputs


def require_labels(dataset: Dataset, model: Trainable, classes: tuple[str, ...] | None, splits: Iterable[str], whose: str = "") -> None:
    """DataError if the model takes labels, and the dataset has none, or samples of classes that the model does not know by name.

    `classes` are the names of the model's labels in order; None: those of a checkpoint that recorded none, whose labels are numbers.
    `splits` are those whose samples the model gets; `whose` names the model in messages.
    """
    if not takes_labels(model):
        return
    name, whose = type(model).__name__, whose or f"the {type(model).__name__}"
    known = dataset.manifest.classes
    if not known:
        raise DataError(f"{name} takes labels and dataset {dataset.url} has none: shard images in class folders, or use another model.kind")
    used = known if classes is None else classes
    if model.num_classes is not None and len(used) > model.num_classes:
        raise DataError(
            f"dataset {dataset.url} has {len(used)} classes, the {name} takes labels in 0..{model.num_classes - 1}: "
            f"train with model.num_classes={len(used)}, or pick other data"
        )
    if classes is None:
        return
    remedy = "rename or leave out these samples, or use a model that was trained with their classes"
    for split in splits:
        counts = dataset.manifest.statistics[split].classes if split in dataset.manifest.statistics else {}
        require_known(counts, classes, f"split {split!r} of dataset {dataset.url}", whose, remedy)


def require_known_labels(dataset: Dataset, loaded: LoadedModel, splits: Iterable[str]) -> None:
    """Check as `require_labels` for a checkpoint; a warning if it recorded no class names and was trained on another dataset."""
    classes = loaded.config.classes
    require_labels(dataset, loaded.model, classes, splits, f"checkpoint {loaded.url}")
    if takes_labels(loaded.model) and classes is None and loaded.checkpoint.info.get("dataset_sha256") != dataset.dataset_sha256:
        logger.warning(
            "checkpoint %s has no class names (an older version wrote it), and this is not the dataset that it was trained on: "
            "labels are taken by number, 0 to %d being %s of %s",
            *(loaded.url, len(dataset.classes) - 1, quoted(dataset.classes), dataset.url),
        )
