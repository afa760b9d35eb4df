"""Log-probabilities of tokens from hidden states and the head's weight, without a [tokens, vocabulary] matrix."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from . import op
from .plan import RowPlan, row_plan

__all__ = ["LogProb", "RowPlan", "linear_candidates", "linear_ce", "linear_kl", "linear_logprob", "row_plan"]


class LogProb(NamedTuple):
    """Of N rows, each [N] float32 (float64 from float64).

    Attributes:
        logp: log-probability of the row's target, at most 0.
        lse: log of the sum of the exponentials of the logits.
        entropy: -sum p log p, in nats.
        mean_logit: mean of the logits.
    """

    logp: Tensor
    lse: Tensor
    entropy: Tensor
    mean_logit: Tensor


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float = 0.0,
    save: str = "auto",
    backend: str = "",
) -> LogProb:
    """Log-probabilities of `targets` under a language model's head, and what else a loss may need of its logits.

    For row r with hidden state h = hidden[rows[r]]::

        z = h weight^T + bias;  z = softcap tanh(z / softcap) if softcap;  z = z / temperature
        lse = log sum_v exp(z_v);  logp = z[target] - lse;  entropy = lse - sum_v p_v z_v;  mean_logit = mean_v z_v

    Args:
        hidden: [..., H] float32, bfloat16, float16 or float64; its leading dimensions count as one, T.
        weight: [V, H], the dtype of `hidden`, or float32 beside 16-bit hidden states; may be tied to the embeddings.
        targets: [N] int64 in [0, V).
        rows: [N] int64 in [0, T): the hidden states that count; the others are not read. None: all T. `row_plan` makes
            both from labels.
        bias: [V], the dtype of `weight` or float32.
        temperature: that the tokens were, or will be, sampled with; > 0.
        softcap: limit of the logits' size (Gemma); 0: none.
        save: what a backward finds: "nothing": logits are computed again; "logits": they were kept, in float32; "auto":
            kept where they take no more memory than the weight does.
        backend: force a backend; empty picks the best.

    Returns:
        `LogProb`, in float32 whatever the dtype of the inputs: products are accumulated in float32 and logits never
        rounded. NaN for a row with a logit of NaN or +inf, and on a GPU for a target outside the vocabulary.

    Raises:
        ValueError, TypeError: a shape, dtype, device or value does not fit; a DTensor or an empty shard.

    Gradients flow from all four results to hidden, weight and bias, once (no double backward), in their dtypes; a row
    whose gradients are all zero costs nothing in the backward. The gradient of the weight is a sum over all rows that
    is rounded once, without a float32 copy of it. Deterministic, and on the CPU independent of the number of threads;
    there and on GPUs the results of a row do not depend on the other rows. Under `torch.autocast` hidden states take
    its dtype, and the weight is used as it is.

    Example:
        >>> found = linear_logprob(torch.eye(2), torch.tensor([[0.0, 0.0], [1.0, 2.0]]), torch.tensor([1, 1]))
        >>> found.logp
        tensor([-0.3133, -0.1269])
    """
    return LogProb(*op.linear_logprob(hidden, weight, targets, rows, bias, temperature, softcap, save, backend))


def linear_ce(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor | None = None,
    row_weight: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    backend: str = "",
) -> Tensor:
    """The weighted sum of cross-entropies, `-sum_r row_weight[r] logp[r]`, with logp as in `linear_logprob`.

    Its gradients are known before its value is, so that where it is cheaper (on the CPU, for a float32 weight) they are
    made in the forward, in one pass over the logits of some rows at a time.

    Args:
        hidden, weight, targets, rows, bias, softcap, backend: as in `linear_logprob`.
        row_weight: [N] float32, a constant: weights over the denominator, such as `plan.weight / plan.denominator`.
            None: ones, the plain sum.

    Returns:
        A scalar, float32 (float64 from float64); 0 for no rows, and gradients of 0.

    Raises:
        ValueError, TypeError: as in `linear_logprob`; `row_weight` requires gradients.

    Gradients flow to hidden, weight and bias, once (no double backward).
    """
    return op.linear_ce(hidden, weight, targets, rows, row_weight, bias, softcap, backend)


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    rows: Tensor | None = None,
    teacher_rows: Tensor | None = None,
    row_weight: Tensor | None = None,
    *,
    temperature: float = 1.0,
    backend: str = "",
) -> Tensor:
    """The divergence KL(q || p) of a student's distribution p from a teacher's q, over the whole vocabulary.

    With z of either head as in `linear_logprob`::

        kl[r] = sum_v q_v (log q_v - log p_v)

    Args:
        hidden: [..., H] hidden states of the student.
        weight: [V, H] its head; dtypes as in `linear_logprob`.
        teacher_hidden: [..., G] hidden states of the teacher; G may differ from H.
        teacher_weight: [V, G] its head.
        rows: [N] int64: the student's rows; None: all.
        teacher_rows: [N] int64: the teacher's rows of the same tokens; None: all. The sequences may differ in length.
        row_weight: [N] float32, a constant: the result is then the sum of the divergences times it.
        temperature: both heads' logits are divided by it.
        backend: force a backend; empty picks the best.

    Returns:
        [N], or with `row_weight` a scalar; float32 (float64 from float64), at least 0.

    Raises:
        ValueError, TypeError: as in `linear_logprob`.

    Gradients flow to hidden and weight only, once. p - q is taken without cancellation where they are close. With
    `row_weight` the gradients may be made in the forward, as in `linear_ce`.
    """
    return op.linear_kl(
        hidden, weight, teacher_hidden, teacher_weight, rows, teacher_rows, row_weight, temperature, backend
    )


def linear_candidates(
    hidden: Tensor,
    weight: Tensor,
    candidates: Tensor,
    rows: Tensor | None = None,
    *,
    bias: Tensor | None = None,
) -> Tensor:
    """Logits of a few words: `softmax(-1)` of them are probabilities among those words (a process reward model's).

    Args:
        hidden, weight, rows, bias: as in `linear_logprob`.
        candidates: [C] int64 in [0, V).

    Returns:
        [N, C] float32 (float64 from float64). A row does not depend on the others.

    Raises:
        ValueError, TypeError: as in `linear_logprob`.

    Plain torch on every device: it reads C rows of the weight. Gradients flow to hidden, weight and bias; that of the
    weight is dense, so training goes through `linear_ce`.
    """
    return op.linear_candidates(hidden, weight, candidates, rows, bias)
