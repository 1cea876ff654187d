"""What is evaluated: the knobs `evaluate.*` of a recipe. Everything beyond one pass over the split is off until it is asked for."""

import dataclasses
from typing import Literal

from aecore.data.format.transform import TransformSpec
from aecore.registry import knob, spec


@spec
class EvaluateSpec:
    """What is evaluated."""

    split: str = knob("test", "split of the dataset")
    batch: int = knob(512, "samples per batch; the noise depends on it", ge=1)
    seed: int = knob(0, "seed of the noise, and of every draw of the scores below", ge=0)
    binarize: Literal["trained", "none", "dynamic"] = knob(
        "trained", "trained: samples as the run trained on them; none: grey; dynamic: black or white, drawn with the seed"
    )
    iwae: int = knob(0, "importance samples per input for log p(x), constants included; 0: not computed", ge=0)
    probe: bool = knob(False, "accuracy of a linear probe and of nearest neighbours on the latents; the data need labels")
    neighbours: int = knob(5, "neighbours that vote on a label", ge=1)
    factors: bool = knob(False, "MIG, DCI and FactorVAE score; the data need factor_* columns")
    dci: bool = knob(True, "factors: also DCI, whose boosted trees need scikit-learn and most of the time")
    factor_samples: int = knob(10_000, "factors: samples that the scores are fitted on, half as many again test them", ge=100)
    train_split: str = knob("train", "split that probes are fitted on; the factor scores draw from it and from `split`")
    figures: str | None = knob(None, "folder or s3://bucket/prefix that gets the figures; null: no figures", identity=False)

    def transform(self, trained: TransformSpec) -> TransformSpec:
        """Return the transform of a run as this evaluation applies it. ConfigError if samples of that scale cannot be drawn from."""
        return trained if self.binarize == "trained" else dataclasses.replace(trained, binarize=self.binarize)
