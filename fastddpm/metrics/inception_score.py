"""The Inception Score: high if a classifier is confident about each image and its classes vary over the images."""

import torch
from torch import Tensor

from fastddpm.errors import DataError, UsageError

SPLITS = 10


def inception_score(logits: Tensor, splits: int = SPLITS) -> tuple[float, float]:
    """Return the mean and standard deviation (divisor N) of exp(mean KL(p(y|x) || p(y))) over `splits` parts.

    `logits`: (N, K), in the order of the images, without bias for the published score; part i is images
    i N // splits to (i + 1) N // splits (Salimans et al. 2016, section 4, and its code). Computed in float64. Raises
    `UsageError` for fewer images than parts and `DataError` for NaN and infinity.
    """
    count = len(logits)
    if splits < 1 or count < splits:
        raise UsageError(f"a score of {splits} parts needs as many images or more; got {count}")
    log_p = torch.log_softmax(logits.to(torch.float64), dim=1)
    if not bool(torch.isfinite(log_p).all()):
        raise DataError("logits hold NaN or infinity; the images or the network's weights are damaged")
    scores = []
    for i in range(splits):
        part = log_p[i * count // splits : (i + 1) * count // splits]
        marginal = torch.logsumexp(part, dim=0) - torch.log(torch.tensor(float(len(part)), dtype=torch.float64))
        divergence = (part.exp() * (part - marginal)).sum(1)
        scores.append(divergence.mean().exp())
    found = torch.stack(scores)
    return float(found.mean()), float(found.std(correction=0))
