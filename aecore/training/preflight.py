"""Checks from the counts of a run before its first step: batches too small for batch normalisation or too large, schedules that do not end.

Batch normalisation needs two values per channel in training, so a net that normalises vectors cannot take one sample; a convolution gives
it many values of one. The counts of all steps follow from samples, batch, lanes and ranks; whole bags and tars without an index, whose
counts are not known, are checked as far as possible.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from aecore._base.batch import Batch
from aecore._base.trainable import ModelSpec, Trainable
from aecore.checkpoint.limits import require_memory
from aecore.data.read.order import TrainingOrder
from aecore.errors import ConfigError
from aecore.registry import to_dict

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
TRIED = 64  # batch sizes on each side of the one that does not work


def schedule_warnings(model: ModelSpec, total_steps: int) -> list[str]:
    """Return a sentence for each schedule of a model that a run of `total_steps` does not reach the end of."""
    knobs, run = to_dict(model), f"is longer than the run of {total_steps:,}"  # not every kind has these knobs
    rise, cycle, capacity_rise = (int(knobs.get(name, 0)) for name in ("beta_warmup_steps", "beta_cycle_steps", "capacity_steps"))
    warnings = []
    if max(rise, cycle) > total_steps:
        schedule = f"cycle of {cycle:,}" if cycle else f"warm-up of {rise:,}"
        warnings.append(f"beta {schedule} steps {run}: beta ends at {model.beta_at(total_steps):.2g} (model.beta is {knobs['beta']:g})")
    if capacity_rise > total_steps:
        reached = knobs["capacity"] * total_steps / capacity_rise
        aim = f"model.capacity is {knobs['capacity']:g}"
        warnings.append(f"capacity rise of {capacity_rise:,} steps {run}: it ends at {reached:.2g} ({aim})")
    return warnings


def require_batches_in_memory(model: Trainable, input_shape: tuple[int, ...], order: TrainingOrder, num_samples: int) -> None:
    """Raise ConfigError if this machine cannot hold a step's samples of one rank (float32) and the noise of all ranks, which it draws.

    `num_samples` is 0 where it is not known: then every step has `order.global_batch` samples.
    """
    rows = min(order.global_batch, num_samples or order.global_batch)
    sample, noise = math.prod(size or 1 for size in input_shape), math.prod(model.noise_shape() or (0,))
    own = -(-rows // order.world_size)
    what = f"a step of {rows:,} samples of shape {input_shape} (train.global_batch={order.global_batch}) takes at least"
    require_memory(4 * (own * sample + rows * noise), what, "lower train.global_batch, or model.num_samples")


def require_batch_statistics(
    model: Trainable, input_shape: tuple[int, ...], order: TrainingOrder, num_samples: int, total_steps: int, split: str
) -> None:
    """Raise ConfigError with the counts if `model` has batch normalisation and some rank has too few samples for it in some step.

    All `order.world_size` ranks are checked. `num_samples` is 0 where it is not known: then every step has `order.global_batch` samples.
    """
    worst = _smallest(order, num_samples, total_steps)
    if worst is None or worst.samples > 1 or not _needs_two_samples(model, input_shape):
        return
    name = next(name for name, module in model.named_modules() if isinstance(module, _BATCH_NORMS))
    where = f" on rank {worst.rank} of {order.world_size}" if order.world_size > 1 else ""
    counts = (
        f"{num_samples:,} samples of split {split!r} in steps of train.global_batch={order.global_batch}"
        if num_samples
        else (f"steps of train.global_batch={order.global_batch}")
    )
    seen = f"{worst.samples} sample{'' if worst.samples == 1 else 's'}{where}"
    raise ConfigError(
        f"batch normalisation (first layer of it: {name}) needs at least 2 samples in every batch of training, and "
        f"{counts} over {order.lanes} lanes leave {seen} in step {worst.step + 1:,} of an epoch: {_remedy(order, num_samples, total_steps)}"
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Share:
    """The samples of a step (from 0, in its epoch) that one rank gets."""

    samples: int
    step: int
    rank: int


def shares(order: TrainingOrder, num_samples: int, step: int) -> list[int]:
    """Return the samples that each of `order.world_size` ranks has in a step of an epoch, as `EpochOrder` deals them out."""
    lanes = np.diff([lane * num_samples // order.lanes for lane in range(order.lanes + 1)])
    rows = order.global_batch // order.lanes
    own = np.minimum(lanes, (step + 1) * rows) - np.minimum(lanes, step * rows)
    cuts = [rank * order.lanes // order.world_size for rank in range(order.world_size + 1)]
    return [int(own[first:last].sum()) for first, last in itertools.pairwise(cuts)]


def _smallest(order: TrainingOrder, num_samples: int, total_steps: int) -> _Share | None:
    """Return the smallest share of any rank in any step of the run; only the last steps of an epoch are not like the first one."""
    if not total_steps:
        return None
    if not num_samples:
        size, world_size = order.global_batch, order.world_size
        return min(
            (_Share((r + 1) * size // world_size - r * size // world_size, 0, r) for r in range(world_size)),
            key=lambda share: share.samples,
        )
    last = min(order.num_steps(num_samples), total_steps) - 1
    found = [_Share(samples, step, rank) for step in sorted({0, last}) for rank, samples in enumerate(shares(order, num_samples, step))]
    return min(found, key=lambda share: share.samples)


def _remedy(order: TrainingOrder, num_samples: int, total_steps: int) -> str:
    """Return what to set instead: the nearest batch sizes that work, if there are any, and another normalisation."""

    def works(global_batch: int) -> bool:
        share = _smallest(dataclasses.replace(order, global_batch=global_batch), num_samples, total_steps)
        return share is not None and share.samples > 1

    def nearest(step: int) -> Iterator[int]:
        sizes = itertools.islice(itertools.count(order.global_batch + step, step), TRIED)
        return itertools.islice((size for size in sizes if size >= order.lanes and works(size)), 1)

    sizes = [str(size) for size in (*nearest(-order.lanes), *nearest(order.lanes))]
    fewer = "fewer ranks, " if order.world_size > 1 else ""
    batches = f"train.global_batch={' or '.join(sizes)}, " if sizes else ""
    return f"use {batches}{fewer}or another normalisation (backbone.norm=group)"


class _Found(Exception):  # no error: it ends a forward pass early
    pass


def _needs_two_samples(model: Trainable, input_shape: tuple[int, ...]) -> bool:
    """Return whether a layer of batch normalisation gets a single value per channel of one sample, and would train on it."""
    was_training = model.training
    layers = [module for module in model.train().modules() if isinstance(module, _BATCH_NORMS) and module.training]
    hooks = [layer.register_forward_pre_hook(_stop_at_single_values) for layer in layers]
    model.eval()  # its running statistics stay as they are
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    try:
        if layers:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                model.loss(Batch.blank(input_shape, device))
    except _Found:
        return True
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    return False


def _stop_at_single_values(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    if inputs[0].numel() == inputs[0].shape[1]:
        raise _Found
