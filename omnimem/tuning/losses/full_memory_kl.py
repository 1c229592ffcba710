"""Self-distillation: match the answers under the budget to those of the original model with full memory."""

from dataclasses import dataclass
from typing import ClassVar, final

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from omnimem.tuning.losses.base import AbstractLoss, Rows


@final
@dataclass(frozen=True, kw_only=True)
class FullMemoryKL(AbstractLoss):
    """T^2 KL(teacher || student) at the answers' rows; the teacher is this model without adapter and eviction.

    Also applies to steps at full memory, where it keeps the adapter close to the original model.
    """

    name: ClassVar[str] = "full_memory_kl"
    temperature: float = 1.0  # T; higher values give unlikely tokens more weight
    max_tokens: int = 32_768  # longest stream, in audio and visual tokens; the loss does not apply to longer ones

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature = {self.temperature:g} of tuning.loss.{self.name} must be a number above 0")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens = {self.max_tokens} of tuning.loss.{self.name} must be at least 1")

    @property
    def needs_teacher(self) -> bool:
        return True

    def applies_to(self, tokens: int) -> bool:
        return tokens <= self.max_tokens

    def __call__(self, rows: Rows) -> Float[Tensor, " rows"]:
        assert rows.teacher is not None, "streamed_loss passes the teacher's logits"
        return kl_divergences(rows.logits, rows.teacher, self.temperature)


def kl_divergences(
    student: Float[Tensor, "rows vocabulary"], teacher: Float[Tensor, "rows vocabulary"], temperature: float
) -> Float[Tensor, " rows"]:
    """T^2 sum_v p_v (log p_v - log q_v) of each row, p = softmax(teacher / T), q = softmax(student / T), in float32.

    d/d student = T (q - p), of order 1 for large T. Without the factor T^2 gradients would shrink as 1 / T^2, and the
    weight would depend on T (Hinton et al. 2015, section 2.1).
    """
    log_p = F.log_softmax(teacher.detach().float() / temperature, dim=-1)
    log_q = F.log_softmax(student.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(dim=-1)
