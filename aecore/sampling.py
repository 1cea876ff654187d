"""From latents to data: samples of the prior, and latents of a table or an array decoded.

    OUT/samples.npz (or decoded.npz)    x [n, *shape] float32 in the network's scale, z [n, D], label or key where there are some
        images/000000.png  grid.png     where the data are images: the first ones one by one, the first 64 in one picture
        samples.json (or decoded.json)  the settings and the checkpoint; written last

Latents of the prior are a function of the seed and their number: the first ten of a hundred are the ten of ten. The same command
again writes nothing; another one into the same folder is refused.
"""

import dataclasses
import io
import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aecore._base.batch import Batch
from aecore._base.noise import seed_of, step_noise
from aecore._base.trainable import has_posterior, latent_column
from aecore.artifact.commit import require_same
from aecore.artifact.documents import read_json, sealed
from aecore.checkpoint.weights import LoadedModel, load_model
from aecore.data.classes import UNKNOWN, numbers_of, quoted, require_known
from aecore.data.format.pictures import grid, is_image, pixels, png
from aecore.data.format.transform import Transform
from aecore.data.sources._arrayfile import ArrayFile
from aecore.errors import ConfigError, DataError, Hint, counted, did_you_mean
from aecore.registry import absent_values, as_recorded, knob, spec, to_dict
from aecore.store import Store, absolute_url, open_files, open_store, read_again, sha256_file, sha256_json

if TYPE_CHECKING:
    from aecore.table.table import LatentTable

logger = logging.getLogger(__name__)

BLOCK = 64  # latents of the prior that are drawn at once: part of their definition
GRID = 64  # images of grid.png
GRID_COLUMNS = 8
_SECTIONS = {"samples": ("sample", "samples"), "decoded": ("decode", "decoded latents")}  # section of the recipe, and what it makes


@spec
class SampleSpec:
    """What is drawn from the prior of a model."""

    num: int = knob(64, "number of samples", ge=1)
    seed: int = knob(0, "seed of the latents", ge=0)
    label: int | str | None = knob(None, "class, for a conditional model: its name, or its number", ge=0)
    batch: int = knob(256, "latents decoded at once", ge=1)
    images: int = knob(64, "samples that are also written one by one as PNG files", ge=0)


@spec
class DecodeSpec:
    """Which latents are decoded."""

    column: str | None = knob(None, "column of the table, or array of the .npz; null: the model's own (mu, z, codes), or the only array")
    split: str | None = knob(None, "split of the table; null: all rows")
    num: int = knob(0, "decode the first ones only; 0: all", ge=0)
    label: int | str | None = knob(None, "class, for a conditional model: its name, or its number; null: the table's own", ge=0)
    batch: int = knob(256, "latents decoded at once", ge=1)
    images: int = knob(64, "samples that are also written one by one as PNG files", ge=0)


@dataclass(frozen=True, slots=True)
class Latents:
    """Latents `[n, D]` to decode, the columns kept with them (`key`, `label`), and their source."""

    z: NDArray[Any]  # any: float32, float16 or int32
    rows: Mapping[str, NDArray[Any]]
    source: Mapping[str, Any]


def sample_run(run: str, out: str, spec: SampleSpec, *, device: str = "cpu", dry_run: bool = False) -> dict[str, Any]:
    """Decode samples of the prior of a finished run (or checkpoint) into `out`; return what was made as plain JSON.

    Raises
    ------
    ConfigError
        The model has no prior, a label is missing, not taken or unknown, or `out` holds something else.
    """
    loaded = load_model(absolute_url(run, "run"), device=device)
    dim = prior_dim(loaded)
    labels = _labels(loaded, spec.label, None, spec.num)
    rows = {} if labels is None else {"label": labels}
    z = prior_latents(spec.seed, spec.num, dim)
    return _generate("samples", loaded, Latents(z.numpy(), rows, {"prior": "N(0, I)"}), out, spec, dry_run)


def decode_run(run: str, latents: str, out: str, spec: DecodeSpec, *, device: str = "cpu", dry_run: bool = False) -> dict[str, Any]:
    """Decode latents (a table of this checkpoint, a .npy or a .npz file) into `out`; return what was made as plain JSON.

    Raises
    ------
    DataError
        There are no such latents, they are of another width or not finite, or the table is of another checkpoint.
    ConfigError
        The model does not decode latents, a label is missing, not taken or unknown, or `out` holds something else.
    """
    loaded = load_model(absolute_url(run, "run"), device=device)
    found = _read_latents(absolute_url(latents, "the latents"), loaded, spec)
    _require_width(loaded, found, latents)
    labels = _labels(loaded, spec.label, found.rows.get("label"), len(found.z))
    rows = {name: column for name, column in found.rows.items() if name != "label"} | ({} if labels is None else {"label": labels})
    return _generate("decoded", loaded, dataclasses.replace(found, rows=rows), out, spec, dry_run)


def prior_dim(loaded: LoadedModel) -> int:
    """Return D of the prior N(0, I); ConfigError for a model without a prior."""
    model = loaded.config.model
    shape = loaded.model.noise_shape()
    if shape is None or not has_posterior(model.columns):
        raise ConfigError(
            f"model.kind={model.kind} has no prior to draw from (its latents are {', '.join(model.columns)}): use a model of the VAE "
            "family, or decode given latents (decode_run)",
            hint=Hint("no-prior"),
        )
    return math.prod(shape)


def prior_latents(seed: int, num: int, dim: int) -> Tensor:
    """Return `[num, dim]` standard normal latents, a function of (seed, number)."""
    blocks = [step_noise(seed_of("sample", seed), block, (BLOCK, dim)) for block in range(-(-num // BLOCK))]
    return torch.cat(blocks)[:num]


def decode_batches(loaded: LoadedModel, z: Tensor, label: Tensor | None, batch: int) -> Tensor:
    """Return the expected inputs `[n, *shape]` of latents `[n, D]` on the CPU, `batch` at a time."""
    device = next(loaded.model.parameters()).device
    parts = []
    for start in range(0, len(z), batch):
        rows = slice(start, start + batch)
        labels = None if label is None else label[rows].to(device)
        parts.append(loaded.model.decode_latents(z[rows].to(device), label=labels, likelihood=loaded.config.model.likelihood).cpu())
    return torch.cat(parts)


def latent_dim(loaded: LoadedModel, column: str) -> int:
    """Return the width of a latent column, found by encoding one row of zeros."""
    blank = Batch.blank(loaded.config.input_shape, next(loaded.model.parameters()).device)
    return int(loaded.model.latents(blank)[column].shape[1])


def _labels(loaded: LoadedModel, asked: int | str | None, known: NDArray[np.int64] | None, num: int) -> NDArray[np.int64] | None:
    """Return the class ids `[num]` to condition on, None for unconditional models; ConfigError for a missing or unknown class.

    `asked` is a name of the checkpoint's classes; a number that is no name is a class id.
    """
    kind, classes = loaded.config.model.kind, to_dict(loaded.config.model).get("num_classes")
    if "label" not in loaded.model.encode_inputs:
        if asked is not None:
            raise ConfigError(f"label={asked}, and model.kind={kind} is not conditional: leave label out, or use model.kind=cvae")
        return None
    names = loaded.config.classes or ()
    ids = f"0 to {classes - 1}" if classes else "0, 1, ..."
    span = quoted(names) if names else ids
    if asked is None and known is None:
        raise ConfigError(f"model.kind={kind} is conditional: add label=..., one of {span}")
    if asked is None:
        return known
    number = numbers_of([str(asked)], names)[str(asked)]
    if number == UNKNOWN and isinstance(asked, str):
        if names:
            raise ConfigError(f"label={asked}, and this model has no such class{did_you_mean(asked, names)}")
        raise ConfigError(f"label={asked}, and this checkpoint was written without class names: give the number of a class, {ids}")
    number = int(asked) if number == UNKNOWN else number
    if classes and number >= classes:
        raise ConfigError(f"label={asked}, and this model knows the classes {span}: choose one of them")
    return np.full(num, number, np.int64)


def _read_latents(url: str, loaded: LoadedModel, spec: DecodeSpec) -> Latents:
    found = _of_file(url, loaded, spec) if url.endswith((".npy", ".npz")) else _of_table(url, loaded, spec)
    if found.z.ndim != 2 or found.z.dtype.kind not in "fiu":
        raise DataError(f"{url} holds {found.z.dtype} of shape {found.z.shape}, expected numbers [n, D]: one latent a row")
    if not np.isfinite(found.z).all():
        bad = int((~np.isfinite(found.z)).any(1).sum())
        what = counted(bad, "latent", "latents")
        raise DataError(f"{url} holds {what} with NaN or infinite values, of {len(found.z)}: leave such rows out")
    if not len(found.z):
        raise DataError(f"{url} holds no latents: there is nothing to decode")
    return found


def _of_table(url: str, loaded: LoadedModel, spec: DecodeSpec) -> Latents:
    from aecore.table.table import open_table

    table = open_table(url)
    made_by = table.manifest.lineage.get("checkpoint", {}).get("sha256")
    if made_by != loaded.sha256:
        raise DataError(
            f"table {url} was encoded by checkpoint {str(made_by)[:12]}, and {loaded.url} is {loaded.sha256[:12]}: the latents of one "
            "model mean nothing to another; give the run that the table names (open_table(...).manifest.lineage)",
            hint=Hint("other-checkpoint", {"url": url}),
        )
    part = table if spec.split is None else table.select(spec.split)
    stop = spec.num or part.num_rows
    column = spec.column or latent_column(loaded.config.model.columns)
    rows = {"key": np.array(part.keys.to_pylist()[:stop])}
    if "label" in part.columns and not part.arrow("label").null_count:
        rows["label"] = _labels_of_table(part, loaded, url)[:stop]
    parts = sha256_json([one.file.sha256 for one in table.parts])
    return Latents(part.numpy(column)[:stop], rows, {"table": url, "sha256": parts, "column": column})


def _labels_of_table(table: "LatentTable", loaded: LoadedModel, url: str) -> NDArray[np.int64]:
    """Return the labels `[n]` of a table as the model numbers them: by name, where the checkpoint has names."""
    classes = loaded.config.classes
    if classes is None or "label_name" not in table.columns:
        return np.asarray(table.numpy("label"), np.int64)
    names = table.arrow("label_name").to_pylist()
    numbers = numbers_of(set(names), classes)
    require_known(Counter(names), classes, f"table {url}", f"checkpoint {loaded.url}", "give the run that the table names")
    return np.array([numbers[name] for name in names], np.int64)


def _of_file(url: str, loaded: LoadedModel, spec: DecodeSpec) -> Latents:
    if spec.split is not None:
        raise ConfigError(f"decode.split={spec.split} names the split of a table, and {url} is a file: leave it out")
    try:
        return _array_of(url, loaded, spec)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{url} is missing: check the address") from error
    except OSError as error:
        return read_again(lambda: _array_of(url, loaded, spec), url, error)


def _array_of(url: str, loaded: LoadedModel, spec: DecodeSpec) -> Latents:
    """Read the wanted array alone, in bounds; OSError if the file cannot be read."""
    folder, _, name = url.rpartition("/")
    files = open_files(folder or "/")  # as long as it lives, the copy of an object stays in the cache
    path = files.local(name)
    file = ArrayFile(path, url)
    names, own = file.names(), latent_column(loaded.config.model.columns)
    wanted = spec.column or (own if own in names else "z" if "z" in names else "")
    if wanted not in names and len(names) == 1 and spec.column is None:
        wanted = names[0]
    if wanted not in names:
        raise DataError(f"{url} has no array {wanted or own!r}{did_you_mean(wanted, names)}: name one with column=...")
    found = np.array(file.array(wanted, verify=True)[: spec.num or None])  # in memory: the file may change while it is decoded
    return Latents(found, {}, {"file": url, "sha256": sha256_file(path), "array": wanted})


def _require_width(loaded: LoadedModel, found: Latents, where: str) -> None:
    dim = latent_dim(loaded, latent_column(loaded.config.model.columns))
    if found.z.shape[1] != dim:
        raise DataError(
            f"{where} holds latents of width {found.z.shape[1]}, and {loaded.url} decodes {dim}: give the run that they were made with"
        )


def _generate(name: str, loaded: LoadedModel, latents: Latents, out: str, spec: SampleSpec | DecodeSpec, dry_run: bool) -> dict[str, Any]:
    """Decode and write; an earlier result of the same settings is returned, not made again."""
    store = open_store(absolute_url(out, "out"))
    known = read_json(store, f"{name}.json") if store.size(f"{name}.json") is not None else None
    spec = spec if known is None else as_recorded(spec, known["identity"]["spec"])
    identity = {"spec": to_dict(spec, identity_only=True), "checkpoint_sha256": loaded.sha256, "source": dict(latents.source)}
    shape, count = list(loaded.config.input_shape), len(latents.z)
    summary = {"out": store.url, "num": count, "shape": shape, "latent_dim": int(latents.z.shape[1]), "checkpoint": loaded.sha256}
    if known is not None:
        urls = {"checkpoint_sha256": (known["lineage"]["checkpoint"]["url"], loaded.url)}
        asked, there = _as_asked(name, identity), _as_asked(name, known["identity"])
        absent = _as_asked(name, {"spec": absent_values(spec)})
        require_same(store.url, f"set of {_SECTIONS[name][1]}", asked, there, urls=urls, absent=absent)
        return {**summary, "shape": known["shape"], "files": known["files"], "made": 0}
    if dry_run:
        return summary
    z = torch.from_numpy(np.array(latents.z))  # a copy: a table's memory is read-only
    label = torch.from_numpy(latents.rows["label"]) if "label" in latents.rows else None
    x = decode_batches(loaded, z if z.dtype in (torch.int32, torch.int64) else z.float(), label, spec.batch)
    files = _write(store, name, x, {"z": latents.z, **latents.rows}, Transform(loaded.config.transform), spec.images)
    made = list(x.shape[1:])  # sequences have a length only now
    lineage = {"checkpoint": {"sha256": loaded.sha256, "step": loaded.checkpoint.step, "url": loaded.url}}
    store.put(f"{name}.json", sealed({"identity": identity, "lineage": lineage, "shape": made, "files": files}), role=name)
    logger.info("%s: %d %s, %d files", store.url, count, name, files)
    return {**summary, "shape": made, "files": files, "made": files}


def _as_asked(name: str, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return an identity with the keys of the spec as the recipe has them."""
    return {_SECTIONS[name][0] if key == "spec" else key: value for key, value in identity.items()}


def _write(store: Store, name: str, x: Tensor, columns: Mapping[str, NDArray[Any]], transform: Transform, images: int) -> int:
    """Write arrays and pictures; return how many files."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, x=x.numpy(), **columns)
    store.put(f"{name}.npz", buffer.getvalue(), role=name)
    if not is_image(x.shape[1:]):
        return 1
    drawn = pixels(x[: max(images, GRID)], transform)
    for number in range(min(images, len(drawn))):
        store.put(f"images/{number:06d}.png", png(drawn[number]), role="image")
    store.put("grid.png", png(grid(drawn[:GRID], GRID_COLUMNS)), role="image")
    return 2 + min(images, len(drawn))
