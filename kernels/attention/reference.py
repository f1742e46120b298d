"""softmax(q k^T / sqrt(C)) v over (N, L, C) tokens, one head of the full width."""

import torch
from torch import Tensor


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The output, in q's dtype, and the log-sum-exp of each score row, (N, L), which the backward pass reads.

    Scores and their softmax are float32 (float64 for float64 inputs) whatever the inputs are.
    """
    dtype = _compute_dtype(q.dtype)
    scores = torch.matmul(q.to(dtype), k.to(dtype).transpose(1, 2)).mul_(scale)
    lse = torch.logsumexp(scores, dim=-1)
    lse.masked_fill_(lse == torch.inf, torch.nan)  # infinity over infinity: as a softmax, the whole row is NaN
    weights = scores.sub_(lse.unsqueeze(-1)).exp_()
    return torch.matmul(weights, v.to(dtype)).to(q.dtype), lse


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v. The weights P are recomputed; dS = P * (dP - rowsum(P * dP)).

    rowsum(dO * O) is the same number, but would need O kept, and its rounding does not cancel against dP's.
    """
    dtype = _compute_dtype(q.dtype)
    grad, qf, kf, vf = (x.to(dtype) for x in (grad, q, k, v))
    weights = torch.matmul(qf, kf.transpose(1, 2)).mul_(scale).sub_(lse.unsqueeze(-1)).exp_()
    grad_v = torch.matmul(weights.transpose(1, 2), grad)
    grad_weights = torch.matmul(grad, vf.transpose(1, 2))
    row = (weights * grad_weights).sum(-1, keepdim=True)
    grad_scores = grad_weights.sub_(row).mul_(weights).mul_(scale)
    grad_q = torch.matmul(grad_scores, kf)
    grad_k = torch.matmul(grad_scores.transpose(1, 2), qf)
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)
