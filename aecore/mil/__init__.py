"""Variational autoencoders of vectors and of bags of instances, in the API of torchmil."""

from aecore.mil._bags import VariationalAutoEncoderMIL
from aecore.mil._vae import VariationalAutoEncoder

__all__ = ["VariationalAutoEncoder", "VariationalAutoEncoderMIL"]
