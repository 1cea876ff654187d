"""Verify a run: its files, and that claim, checkpoints, metrics, published model and dataset agree. No torch is imported.

Checkpoints and models are small and are always read by sha256, as is the claim that they belong to. With `read_data` also the rows of the
metrics, all claims, and the dataset if it still exists: the hashes of the splits that the run was trained on, and its number of steps.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aecore.artifact.commit import newest_number
from aecore.artifact.documents import CLAIM, disagreement, guarded, problems_of, read_json
from aecore.checkpoint.files import CONFIG, MANIFEST, WEIGHTS, CheckpointRef, committed_checkpoints, read_checkpoint
from aecore.errors import AecoreError, DataError
from aecore.registry import shown
from aecore.store import FileRef, Store, open_store, recorded_url, sha256_json
from aecore.training.metrics import is_row, read_rows, steps_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunVerification:
    """What was checked (checkpoints, their files, whether the model is published), and the problems found (empty: none)."""

    problems: tuple[str, ...]
    checkpoints: tuple[str, ...]
    files: int
    finished: bool


def verify_run(store: Store, *, read_data: bool = False, dataset_url: str | None = None) -> RunVerification:
    """Check a run; reads only.

    Parameters
    ----------
    store : Store
        The run's folder.
    read_data : bool
        Also read metrics, and compare claim and dataset.
    dataset_url : str, optional
        Where the dataset is, by default where the claim says.
    """
    problems, found = list[str](), list[CheckpointRef]()
    finished = store.size(f"model/{MANIFEST}") is not None
    names = [name for _, name in committed_checkpoints(store)] + (["model"] if finished else [])
    for name in names:
        damage, checkpoint = _damage(store, name, finished)
        problems += [problem for problem in damage if problem not in problems]  # several name the same metrics
        found += [checkpoint] if checkpoint is not None and not damage else []
    claim = read_json(store, CLAIM)
    problems += guarded(f"{store.url}/{CLAIM}", _claim_problems(store, claim, found))
    if read_data:
        problems += [problem for problem in problems_of(store) if problem not in problems]
        problems += guarded(f"{store.url}/metrics", _metric_problems(store, found))
        problems += guarded(f"{store.url}/{CLAIM}", _dataset_problems(store, claim, dataset_url))
    return RunVerification(tuple(problems), tuple(names), sum(len(each.files) for each in found), finished)


def _damage(store: Store, name: str, finished: bool) -> tuple[list[str], CheckpointRef | None]:
    """Return what is wrong with the files of a checkpoint and with its metrics, each with what to do, and what its list says."""
    if name == "model":
        remedy = "the same train command publishes it again from its checkpoint if model/ is removed"
    else:
        why = "model/ does not need it" if finished else "the same train command goes on from an older one"
        remedy = f"or remove {store.url}/{name}: {why}"
    try:
        checkpoint = read_checkpoint(store, name, verify=None)
    except DataError as error:
        return [f"{error}; {remedy}"], None
    problems = []
    for refs, what in ((checkpoint.files, remedy), (checkpoint.metrics, "metrics may be removed only with all of checkpoints/")):
        for ref in refs:
            try:
                store.check(ref, verify=True)
            except DataError as error:
                problems.append(f"{error}; {what}")
    return problems, checkpoint


def _claim_problems(store: Store, claim: Mapping[str, Any], found: Sequence[CheckpointRef]) -> Iterator[str]:
    """Yield where checkpoints are not those of the claim, or the published model is not one of them."""
    identity, info = claim["identity"], claim["info"]
    right = {"run_sha256": sha256_json(identity), "train_split": identity["train"]["split"]}
    right |= {name: info[name] for name in ("dataset_sha256", "dataset_number", "total_steps")}
    settings = {name: identity[name] for name in ("model", "backbone", "transform")}
    for checkpoint in found:
        where = f"{store.url}/{checkpoint.name}/{MANIFEST}"
        if differences := disagreement(checkpoint.info, right):
            yield f"{where} belongs to another run, or was changed: {differences}, as {CLAIM} has it"
        config = read_json(store, f"{checkpoint.name}/{CONFIG}", ref=checkpoint.file(CONFIG))
        if differences := disagreement({name: config[name] for name in settings}, settings):
            yield f"{store.url}/{checkpoint.name}/{CONFIG} is not what {CLAIM} says: {differences}"
        if checkpoint.step > info["total_steps"]:
            yield f"{where} states step {checkpoint.step}, the run has {info['total_steps']}"
        best = checkpoint.best
        if best is not None and (not identity["checkpoint"]["best"] or int(str(best["name"]).split("-")[1]) != best["step"]):
            yield f"{where} names {best['name']} as the best checkpoint, of step {best['step']}"
    models, kept = ([each for each in found if (each.name == "model") == wanted] for wanted in (True, False))
    for model in models:
        last = info["total_steps"]
        if identity["checkpoint"]["best"]:  # the last one names it
            last = next((each.best["step"] for each in kept if each.step == last and each.best is not None), model.step)
        if model.step != last:
            yield f"{store.url}/model is of step {model.step}, expected {last}"
        of_step = [each for each in kept if each.step == model.step]
        if of_step and all(each.file(WEIGHTS).sha256 != model.file(WEIGHTS).sha256 for each in of_step):
            yield f"{store.url}/model has other weights than {of_step[0].name}, the checkpoint of its step"


def _metric_problems(store: Store, found: Sequence[CheckpointRef]) -> Iterator[str]:
    """Yield where metrics do not cover every step up to their checkpoint once, or do not say what the best checkpoint is."""
    parts: dict[FileRef, list[dict[str, Any]]] = {}
    for checkpoint in found:
        if checkpoint.name == "model":  # names none
            continue
        where, step, rows = f"{store.url}/{checkpoint.name}/{MANIFEST}", 0, list[dict[str, Any]]()
        for ref in checkpoint.metrics:
            first, last = steps_of(ref.name)
            if ref not in parts:
                parts[ref] = read_rows(store, [ref])
                yield from _row_problems(f"{store.url}/{ref.name}", parts[ref], first, last)
            if first != step + 1:
                yield f"{where} names metrics of steps {first} to {last} after those up to {step}"
            step = last
            rows += parts[ref]
        if step not in (checkpoint.step, checkpoint.step - 1):  # the last row may wait for its validation
            yield f"{where} names metrics up to step {step}, and is of step {checkpoint.step}"
        best = checkpoint.best
        losses = {row["step"]: row["validation"]["loss"] for row in rows if "validation" in row}
        if best is not None and best["step"] in losses and (losses[best["step"]] != best["loss"] or min(losses.values()) != best["loss"]):
            yield f"{where} says a best loss of {best['loss']} at step {best['step']}, the metrics {losses[best['step']]} there"


def _row_problems(where: str, rows: Sequence[dict[str, Any]], first: int, last: int) -> Iterator[str]:
    if [row.get("step") for row in rows] != list(range(first, first + len(rows))) or len(rows) != last - first + 1:
        yield f"{where} does not hold the rows of steps {first} to {last}, each once"
        return
    for row in rows:
        numbers = {name: value for name, value in row.items() if name != "validation"}
        if not is_row(numbers, row["step"]):
            yield f"{where} holds {shown(row)}, which is no row of metrics"
            return


def _dataset_problems(store: Store, claim: Mapping[str, Any], url: str | None) -> Iterator[str]:
    """Yield where the dataset, if it exists, is not the one that the claim names."""
    from aecore.data.dataset import open_dataset  # imported late: who reads no data needs no tables

    identity, info = claim["identity"], claim["info"]
    number = info["dataset_number"]
    if not number:
        return  # external tars without an index
    try:
        where = recorded_url(info["data"], f"the data in {store.url}/{CLAIM}") if url is None else url
        if newest_number(open_store(where), "dataset") is None:
            logger.warning("%s: there is no dataset at %s, so what the run was trained on was not compared", store.url, where)
            return
        dataset = open_dataset(where, number)
        keys = {split: dataset.training_key(split) for split in identity["data"]}
        counts = dataset.num_samples(identity["train"]["split"]), dataset.num_groups(identity["train"]["split"])  # a step may take bags
    except AecoreError as error:
        yield str(error)
        return
    name = f"{store.url}/{CLAIM}"
    if dataset.dataset_sha256 != info["dataset_sha256"]:
        yield f"{name} names dataset_sha256 {shown(info['dataset_sha256'])}, generation {number} of {where} has {dataset.dataset_sha256}"
    if differences := disagreement(identity["data"], keys):
        yield f"{name} names other data than {where} holds: {differences}"
    train = identity["train"]
    if {train["split"], train["val_split"]} - {None} != identity["data"].keys():
        yield f"{name} has the splits {train['split']} and {train['val_split']}, and hashes of {', '.join(identity['data'])}"
    steps = {train["epochs"] * -(-num // train["global_batch"]) for num in counts if num}
    right = sorted({min(num, train["max_steps"] or num) for num in steps})
    if info["total_steps"] not in right:
        yield f"{name} says {info['total_steps']} steps, its settings and the dataset give {' or '.join(map(str, right))}"
