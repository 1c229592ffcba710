"""One arm over one benchmark: every stream is read once, its questions are asked on forks, one line per question."""

from omnimem.evaluation.answering import Evaluation
from omnimem.evaluation.options import Arm, EvaluateOptions, EvaluationError
from omnimem.evaluation.sharding import Shard
from omnimem.evaluation.summary import summarise

__all__ = ["Arm", "EvaluateOptions", "Evaluation", "EvaluationError", "Shard", "summarise"]
