"""Every figure of a trained model on a split of a dataset, as PNG files below a URL.

    OUT/reconstructions.png  losses.png  ...   figures.json: their inputs, written last

A figure that does not apply to a model (samples of a prior it does not have, a plane of ten latents) is left out, with the reason.
The same command again writes nothing; a folder that holds the figures of another model is refused.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

from aecore.artifact.commit import require_same
from aecore.artifact.documents import read_json, sealed
from aecore.artifact.withdrawn import made_of
from aecore.checkpoint.weights import LoadedModel
from aecore.data.dataset import Dataset
from aecore.data.format.pictures import require_matplotlib
from aecore.evaluate import EvaluateSpec, open_for_evaluation
from aecore.report import _maps, _panels
from aecore.report._draw import draw
from aecore.report._panels import Panel
from aecore.report._view import NotDrawn, View
from aecore.store import absolute_url, open_store

logger = logging.getLogger(__name__)

FIGURES: dict[str, Callable[[View], Panel]] = {
    "reconstructions": _panels.reconstructions,
    "denoising": _panels.denoising,
    "prior_samples": _panels.prior_samples,
    "interpolation": _panels.interpolation,
    "traversals": _panels.traversals,
    "latents_pca": _maps.latents_pca,
    "latents_tsne": _maps.latents_tsne,
    "latents_2d": _maps.latents_2d,
    "manifold": _panels.manifold,
    "reparameterisation": _panels.reparameterisation,
}
MANIFEST = "figures.json"


def write_figures(run: str, data: str, out: str, spec: EvaluateSpec = EvaluateSpec(), *, device: str = "cpu") -> dict[str, Any]:  # noqa: B008  # frozen
    """Draw the figures of a run on `spec.split` of a dataset into `out`; return the files and what was left out, as plain JSON.

    Raises
    ------
    ConfigError
        Matplotlib is not installed, or `out` holds other figures.
    DataError
        No such run or split, or samples that do not fit.
    """
    require_matplotlib()
    dataset, loaded = open_for_evaluation(run, data, EvaluateSpec(split=spec.split, batch=spec.batch, seed=spec.seed), device)
    store, identity = open_store(absolute_url(out, "figures")), _identity(loaded, dataset, spec)
    if store.size(MANIFEST) is not None:
        known = read_json(store, MANIFEST)
        require_same(store.url, "set of figures", _as_asked(identity), _as_asked(known["identity"]))
        return {"url": store.url, "files": known["files"], "left_out": known["left_out"]}
    model, trained = f"{loaded.config.model.kind}, checkpoint {loaded.sha256[:12]}", loaded.checkpoint.info
    seen = f"{model}; {spec.split} of dataset {dataset.manifest.dataset_sha256[:12]}, seed {spec.seed}"
    learnt = f"{model}; trained on {trained.get('train_split')} of dataset {str(trained.get('dataset_sha256'))[:12]}"
    files, left_out = [], {}
    with View(loaded, dataset, spec, device) as view:
        metrics = functools.partial(_maps.losses, open_store(absolute_url(run, "run")), loaded.checkpoint.info.get("run_sha256"))
        drawn: dict[str, Callable[[], Panel]] = {"losses": metrics}
        drawn |= {name: functools.partial(figure, view) for name, figure in FIGURES.items()}
        for name, panel in drawn.items():
            try:
                picture = draw(panel(), view.transform, learnt if name == "losses" else seen)
                store.put(f"{name}.png", picture, role="figure")
                files.append(f"{name}.png")
            except NotDrawn as reason:
                left_out[name] = str(reason)
    with made_of(dataset.url, dataset.number, f"{store.url}/{MANIFEST}"):
        store.put(MANIFEST, sealed({"identity": identity, "files": files, "left_out": left_out}), role="figures")
    logger.info("%s: %d figures, left out: %s", store.url, len(files), ", ".join(left_out) or "none")
    return {"url": store.url, "files": files, "left_out": left_out}


def _identity(loaded: LoadedModel, dataset: Dataset, spec: EvaluateSpec) -> dict[str, Any]:
    return {
        "checkpoint_sha256": loaded.sha256,
        "dataset_sha256": dataset.manifest.dataset_sha256,
        "split": spec.split,
        "seed": spec.seed,
    }


def _as_asked(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return an identity with the names that a recipe has."""
    return {name if name.endswith("_sha256") else f"evaluate.{name}": value for name, value in identity.items()}
