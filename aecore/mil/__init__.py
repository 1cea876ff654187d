"""Variational autoencoders of vectors and of bags of instances, in the API of torchmil; `mil_vae` is what the jobs train."""

from aecore.mil._bags import VariationalAutoEncoderMIL
from aecore.mil._model import MilVAE, MilVAESpec
from aecore.mil._vae import VariationalAutoEncoder

__all__ = ["MilVAE", "MilVAESpec", "VariationalAutoEncoder", "VariationalAutoEncoderMIL"]
