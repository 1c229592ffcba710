"""One arm over one benchmark: every stream read once, all its questions asked on forks, one line a question."""

from omnimem.evaluation.answering import Evaluation
from omnimem.evaluation.options import Arm, EvaluateOptions, EvaluationError
from omnimem.evaluation.sharding import Share
from omnimem.evaluation.summary import summarise

__all__ = ["Arm", "EvaluateOptions", "Evaluation", "EvaluationError", "Share", "summarise"]
