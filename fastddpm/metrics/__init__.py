"""How good samples are: distances and scores of features, in float64, and the networks that give the features.

The names are imported when first used, so that the command answers `--help` without loading torch.
"""

from fastddpm.lazy import attributes

_HOMES = {
    "Activations": ".features",
    "FeatureNetwork": ".features",
    "Moments": ".frechet",
    "Pretrained": ".features",
    "frechet_distance": ".frechet",
    "inception_score": ".class_score",
    "kernel_distance": ".kid",
    "kernel_distance_of_subsets": ".kid",
    "open_network": ".networks",
    "precision_recall": ".manifolds",
}
__all__ = sorted(_HOMES)
__getattr__ = attributes(__name__, _HOMES)
