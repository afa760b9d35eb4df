"""A language model's head and its loss: whole logits against log-probabilities by tiles.

`kind`: "ce" (next-token loss with gradients), "logprob" (per-row results with gradients, recomputed), "evaluation"
(forward only), "preference" (pairs, with a frozen reference head in the call), "group" (sequence-level ratios), "kl".
`part`: the share of the positions that is supervised. Peers are TRL 1.16 and Liger-Kernel, where they are installed and
compute the same.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from bench.measure import Case, Work, backward, device
from ivl_kernels.ops import linear_ce, linear_kl, linear_logprob
from ivl_kernels.testing.cases import Cost

WIDTH, VOCABULARY = 1024, 151936


def _eager_logprob(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = hidden @ weight.t()
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return -F.cross_entropy(logits, targets, reduction="none")


def _preference(logp: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """DPO's sigmoid loss and the chosen half's mean, each half of the rows one response."""
    ratio = 0.1 * (logp - reference).view(2, -1).sum(1)
    return F.softplus(ratio[1] - ratio[0]) - logp[: len(logp) // 2].mean()


def _group(logp: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """GSPO: 8 responses, half of them better than the mean."""
    s = (logp - old).view(8, -1).mean(1).exp()
    advantage = torch.linspace(-1, 1, 8, dtype=s.dtype, device=s.device)
    return -torch.minimum(s * advantage, s.clamp(1 - 3e-4, 1 + 4e-4) * advantage).mean()


def _torch_chunked(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=256)
    return F.linear_cross_entropy(hidden, weight, targets, options=options)


def _peers(kind: str, targets: torch.Tensor, old: torch.Tensor, teacher: Any) -> dict[str, Callable[..., torch.Tensor]]:
    """name -> (hidden, weight) -> the loss of this kind, all rows supervised."""
    found: dict[str, Callable[..., torch.Tensor]] = {}
    of_loss = {"ce": lambda logp: -logp.mean(), "logprob": lambda logp: -logp.mean(), "evaluation": lambda p: -p.mean()}
    if importlib.util.find_spec("trl"):
        from trl.kernels import ChunkedLogProbFunction

        def trl_logp(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return ChunkedLogProbFunction.apply(h, w, None, targets, 1.0, 32768, None, 1.0, ())[0]

        def trl(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            if kind == "kl":
                from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

                return ChunkedDivergenceFunction.apply(h, w, None, *teacher, None, 0.0)[0].mean()
            if kind == "preference":
                with torch.no_grad():
                    reference = trl_logp(*teacher)
                return _preference(trl_logp(h, w), reference)
            return _group(trl_logp(h, w), old) if kind == "group" else of_loss[kind](trl_logp(h, w))

        found["TRL"] = trl
    if importlib.util.find_spec("liger_kernel") and kind in ("preference", "group", "kl"):
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss, LigerFusedLinearGRPOLoss, LigerFusedLinearJSDLoss

        def liger(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            if kind == "kl":
                of_kl = LigerFusedLinearJSDLoss(0.0, 1.0, beta=0.0, compiled=False, chunk_size=256)
                return of_kl(h, w, *teacher, targets)
            if kind == "preference":
                of_pair = LigerFusedLinearDPOLoss(beta=0.1, alpha=1.0, compute_nll_loss=True, compiled=False)
                both = h.view(2, -1, h.shape[1]), targets.view(2, -1)
                return of_pair(w, *both, ref_input=teacher[0].view_as(both[0]), ref_weight=teacher[1])[0]
            of_group = LigerFusedLinearGRPOLoss(
                0.0, False, False, 1, 3e-4, 4e-4, "grpo", importance_sampling_level="sequence"
            )
            ids, advantage = targets.view(8, -1), torch.linspace(-1, 1, 8, device=h.device)
            mask = torch.ones_like(ids)
            return of_group(h.view(8, -1, h.shape[1]), w, ids, mask, advantage, old_per_token_logps=old.view(8, -1))[0]

        found["Liger"] = liger
    return found


@functools.lru_cache(maxsize=1)
def _heads(tokens: int, dtype: torch.dtype, width: int, vocabulary: int) -> tuple[torch.Tensor, ...]:
    """Hidden states and weight of the model, then of its teacher."""
    g = torch.Generator().manual_seed(0)

    def rand(*shape: int, scale: float) -> torch.Tensor:
        return (torch.randn(shape, generator=g) * scale).to(device(), dtype)

    hidden, weight = rand(tokens, width, scale=1), rand(vocabulary, width, scale=3 * width**-0.5)
    teacher = rand(tokens, width, scale=0.3).add_(hidden), rand(vocabulary, width, scale=0.1 * width**-0.5).add_(weight)
    return hidden, weight, *teacher


def make(kind: str, tokens: int, part: float, dtype: torch.dtype, width: int, vocabulary: int) -> Work:
    g = torch.Generator().manual_seed(1)
    count = int(tokens * part)
    hidden, weight, *teacher = (t.detach() for t in _heads(tokens, dtype, width, vocabulary))
    rows = torch.randperm(tokens, generator=g)[:count].sort().values.to(device())
    targets = torch.randint(vocabulary, (count,), generator=g).to(device())
    labels = torch.full((tokens,), -100, device=device()).index_copy_(0, rows, targets)
    chosen = None if count == tokens else rows
    leaves = [hidden, weight]
    if kind != "evaluation":
        leaves = [t.requires_grad_() for t in leaves]
    old = torch.zeros(count, device=device())
    if kind == "group":  # of the policy itself: nothing is clipped
        old = linear_logprob(hidden.detach(), weight.detach(), targets, chosen).logp

    def grads(loss: torch.Tensor) -> Any:
        return loss, *backward(loss, leaves, None)

    def ours(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        if kind == "ce":
            return linear_ce(h, w, targets, chosen, torch.full((count,), 1 / count, device=device()))
        if kind == "kl":
            each = torch.full((count,), 1 / count, device=device())
            return linear_kl(h, w, *teacher, row_weight=each)
        logp = linear_logprob(h, w, targets, chosen, save="nothing" if kind == "logprob" else "auto").logp
        if kind == "preference":
            with torch.no_grad():
                reference = linear_logprob(*teacher, targets).logp
            return _preference(logp, reference)
        return _group(logp, old) if kind == "group" else -logp.mean()

    def eager(h: torch.Tensor, w: torch.Tensor, teacher: Any = teacher) -> torch.Tensor:
        if kind in ("ce", "logprob", "evaluation"):  # every position, as a model's forward does
            logits = h @ w.t()
            return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), labels)
        if kind == "kl":
            p, q = (torch.log_softmax((a @ b.t()).float(), -1) for a, b in ((h, w), teacher))
            return F.kl_div(p, q, log_target=True, reduction="batchmean")
        logp = _eager_logprob(h, w, targets)
        if kind == "preference":
            with torch.no_grad():
                reference = _eager_logprob(*teacher, targets)
            return _preference(logp, reference)
        return _group(logp, old)

    def run(function: Callable[..., torch.Tensor]) -> Callable[[], Any]:
        if kind == "evaluation":
            return torch.no_grad()(lambda: function(*leaves))
        return lambda: grads(function(*leaves))

    variants = {"ours": run(ours), "eager": run(eager)}
    if kind in ("ce", "logprob"):
        variants["torch chunked"] = run(lambda h, w: _torch_chunked(h, w, labels))
    if part == 1:
        variants |= {name: run(peer) for name, peer in _peers(kind, targets, old, teacher).items()}

    def truth() -> Any:
        wide = [t.detach().double().requires_grad_(t.requires_grad) for t in leaves]
        logp = linear_logprob(*wide, targets, chosen, save="nothing", backend="reference").logp
        if kind == "kl":
            loss = linear_kl(*wide, *(t.double() for t in teacher), row_weight=torch.full((count,), 1 / count).double())
        elif kind == "preference":
            loss = _preference(logp, linear_logprob(*(t.double() for t in teacher), targets, backend="reference").logp)
        else:
            loss = _group(logp, old) if kind == "group" else -logp.mean()
        return loss if kind == "evaluation" else (loss, *backward(loss, wide, None))

    # Of one pass: two more heads' products in a divergence, one more beside a reference.
    products = {"evaluation": 2, "kl": 8, "preference": 8}.get(kind, 6)
    cost = Cost(weight.nbytes, products * count * width * vocabulary)
    # The gradients are held to the rule: one number's error is luck.
    return Work(variants, truth=truth, select=lambda found: found[1:] if isinstance(found, tuple) else found, cost=cost)


def cases(quick: bool) -> Iterator[Case]:
    width, vocabulary, tokens = (128, 4999, 256) if quick else (WIDTH, VOCABULARY, 2048)
    shapes = [("ce", 1.0), ("ce", 0.25), ("ce", 0.1), ("logprob", 1.0), ("evaluation", 1.0), ("preference", 1.0)]
    shapes += [("group", 1.0), ("kl", 1.0)]
    for dtype in (torch.float32, torch.bfloat16):
        for kind, part in shapes:
            name = str(dtype).removeprefix("torch.")
            yield Case(
                "linear_logprob", f"{kind} {tokens} rows, {part:g} supervised, {name}",
                dict(kind=kind, tokens=tokens, part=part, dtype=name, width=width, vocabulary=vocabulary),
                lambda v=(kind, tokens, part, dtype, width, vocabulary): make(*v),
                dtype=dtype, seconds=60.0,
            )  # fmt: skip
