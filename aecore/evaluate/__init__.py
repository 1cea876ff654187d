"""How good a model is on a split: exact sums over every sample, and the scores that labels or known factors allow."""

from aecore.evaluate._evaluation import Evaluation, evaluate, evaluate_run, open_for_evaluation
from aecore.evaluate._spec import EvaluateSpec
from aecore.evaluate._warnings import ACTIVE_VARIANCE

__all__ = ["ACTIVE_VARIANCE", "EvaluateSpec", "Evaluation", "evaluate", "evaluate_run", "open_for_evaluation"]
