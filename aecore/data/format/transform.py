"""Scale stored values to network inputs, and back for figures; runs on the device, on whole batches.

The scaling is a function of the stored dtype alone, so it is the same for every batch, rank and machine; it is part of the
checkpoint's config, and with the decoder's name and version of the preprocessing hash of every latent table.
"""

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from aecore._base.batch import Batch
from aecore._base.noise import seed_of
from aecore.data.format.colour import background_of
from aecore.data.format.decode import Reading, decoder_version, preprocessing_hash
from aecore.errors import ConfigError, DataError
from aecore.registry import knob, spec, to_dict

INTEGER_RANGES = {torch.uint8: 255.0, torch.uint16: 65535.0}


@spec
class TransformSpec:
    """How stored samples become network inputs (`transform.*` of a recipe)."""

    scale: Literal["unit", "symmetric", "none"] = knob("unit", "unit: [0, 1]; symmetric: [-1, 1]; none: the stored values as floats")
    decoder: Literal["imagecodecs", "pillow"] = knob("imagecodecs", "image decoder; they agree on PNG and differ by a few levels on JPEG")
    binarize: Literal["none", "dynamic"] = knob(
        "none", "dynamic: every step and validation draws black or white, white with the grey value's probability; encode takes the grey"
    )
    pixels: Literal[1, 2] = knob(2, "2: pixels as files mean them (EXIF, alpha, TIFF values); 1: as version 1 read them", since=2, absent=1)
    background: str = knob("white", "colour under alpha where the model takes none: a CSS name or #rrggbb", since=2)

    def __post_init__(self) -> None:
        background_of(self.background, 3)
        if self.binarize == "dynamic" and self.scale != "unit":
            raise ConfigError(
                f"TransformSpec.binarize=dynamic draws from grey values in [0, 1], TransformSpec.scale is {self.scale}: use unit"
            )

    @property
    def reading(self) -> Reading:
        """How samples are decoded."""
        return Reading(self.decoder, self.pixels, self.background)


class Transform:
    """The scaling of a spec: call it on a batch, get the batch with float32 `x` (and `x_pair`), contiguous.

    uint8 is divided by 255, uint16 by 65535, bool becomes 0 and 1; symmetric then maps [0, 1] to [-1, 1]. Float arrays are taken as
    they are under `unit` (their values are the user's own scale). Other integers have no natural range: only `none` takes them.
    """

    def __init__(self, spec: TransformSpec) -> None:
        self.spec = spec

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with scaled `x` (and `x_pair`)."""
        return dataclasses.replace(batch, x=self.scale(batch.x), x_pair=None if batch.x_pair is None else self.scale(batch.x_pair))

    def draw(self, batch: Batch, seed: int, index: int) -> Batch:
        """Return the stored batch with drawn black and white samples (bool) if the spec asks for it, else as it is.

        The draws are those of row `positions` of the global batch number `index`, the same on any number of ranks (Burda et al. 2015
        draw training images anew at every step). A call scales bool samples to 0 and 1.
        """
        if self.spec.binarize == "none":
            return batch
        views = [batch.x] if batch.x_pair is None else [batch.x, batch.x_pair]
        drawn = [self._black_or_white(view, batch, seed_of("binarize", seed, number), index) for number, view in enumerate(views)]
        return dataclasses.replace(batch, x=drawn[0], x_pair=drawn[1] if len(drawn) > 1 else None)

    def _black_or_white(self, stored: Tensor, batch: Batch, seed: int, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed_of(seed, index))
        shape = stored.shape[1 if batch.mask is None else 2 :]  # of one sample
        uniform = torch.rand((batch.num_global, *shape), generator=generator)
        rows = uniform[batch.positions] if len(batch.positions) else uniform[:1]
        grey = self.scale(stored)
        drawn = batch.placed(rows).to(stored.device) < grey
        return drawn if not stored.dtype.is_floating_point else _where_grey(drawn, grey)

    def scale(self, stored: Tensor) -> Tensor:
        """Return float32 values of the same shape. Raises DataError for a dtype that has no known range."""
        values = stored.to(torch.float32, memory_format=torch.contiguous_format)
        if self.spec.scale == "none":
            return values
        largest = INTEGER_RANGES.get(stored.dtype)
        if largest is None and not (stored.dtype == torch.bool or (stored.dtype.is_floating_point and self.spec.scale == "unit")):
            kind = str(stored.dtype).removeprefix("torch.")
            raise DataError(
                f"{kind} samples have no known range for transform.scale={self.spec.scale}: use transform.scale=none, which takes their "
                "values as they are, or save floats of about 1 (array.astype('float32') / largest), which transform.scale=unit takes"
            )
        if largest is not None:
            values = values.div_(largest)
        return values.mul_(2.0).sub_(1.0) if self.spec.scale == "symmetric" else values

    def inverse(self, values: Tensor, dtype: torch.dtype = torch.uint8) -> Tensor:
        """Return network-scale values as the stored dtype, rounded and clipped to its range: for figures and files."""
        if dtype.is_floating_point:
            return values.to(dtype)
        unit = (values + 1.0) / 2.0 if self.spec.scale == "symmetric" else values
        if dtype == torch.bool:
            return unit > 0.5
        largest = INTEGER_RANGES.get(dtype, float(torch.iinfo(dtype).max))
        levels = unit if self.spec.scale == "none" else unit * largest
        return levels.round().clamp(float(torch.iinfo(dtype).min), largest).to(dtype)


def _where_grey(drawn: Tensor, grey: Tensor) -> Tensor:
    """Return what was drawn; DataError if a value is outside [0, 1]. On a GPU it becomes NaN, which the loss reports."""
    known = (grey >= 0) & (grey <= 1)
    if grey.device.type != "cpu":
        return torch.where(known, drawn, torch.nan)
    if not known.all():
        raise DataError(
            f"binarize=dynamic draws from grey values in [0, 1], and a batch holds {grey[~known][0]:g}: "
            "scale the data to [0, 1] (uint8 images are), or leave samples with NaN out"
        )
    return drawn


def preprocessing_sha256(spec: TransformSpec, decoder: str | None = None) -> str:
    """Return the hash of everything that turns stored bytes into network input.

    `decoder` is what `decoder_version` returns; by default for what is installed.
    """
    return preprocessing_hash(to_dict(spec, identity_only=True), decoder or decoder_version(spec.decoder, spec.pixels))
