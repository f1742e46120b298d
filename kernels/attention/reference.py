"""softmax(q k^T / sqrt(C)) v over (N, L, C) tokens, one head of the full width."""

import torch
from torch import Tensor

from . import Arguments


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """Return the output, in q's dtype, and the log-sum-exp of each score row, (N, L), which the backward pass reads.

    Scores and their softmax are float32 (float64 for float64 inputs) whatever the inputs are.
    """
    scores = torch.matmul(_factor(a, a.q), _factor(a, a.k).transpose(1, 2)).mul_(a.scale)
    lse = torch.logsumexp(scores, dim=-1)
    lse.masked_fill_(lse == torch.inf, torch.nan)  # infinity over infinity: like a softmax, the whole row is NaN
    weights = scores.sub_(lse.unsqueeze(-1)).exp_()
    return torch.matmul(_factor(a, weights), _factor(a, a.v)).to(a.q.dtype), lse


def backward(a: Arguments, grad: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v. The weights P are recomputed; dS = P * (dP - rowsum(P * dP)).

    `grad`: (N, L, C). `lse`: (N, L), as `forward` returned it. rowsum(dO * O) equals rowsum(P * dP), but would need O
    kept, and its rounding does not cancel against that of dP.
    """
    grad, q, k, v = (_factor(a, x) for x in (grad, a.q, a.k, a.v))
    weights = torch.matmul(q, k.transpose(1, 2)).mul_(a.scale).sub_(lse.unsqueeze(-1)).exp_()
    grad_v = torch.matmul(_factor(a, weights).transpose(1, 2), grad)
    grad_weights = torch.matmul(grad, v.transpose(1, 2))
    row = (weights * grad_weights).sum(-1, keepdim=True)
    grad_scores = _factor(a, grad_weights.sub_(row).mul_(weights).mul_(a.scale))
    grad_q = torch.matmul(grad_scores, k)
    grad_k = torch.matmul(grad_scores.transpose(1, 2), q)
    return grad_q.to(a.q.dtype), grad_k.to(a.k.dtype), grad_v.to(a.v.dtype)


def _factor(a: Arguments, x: Tensor) -> Tensor:
    return (x.bfloat16() if a.bf16 else x).to(a.statistics_dtype)
