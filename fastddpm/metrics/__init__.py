"""How good samples are: distances and scores of features, in float64, and the networks that give the features.

The names are imported when first used, so that the command answers `--help` without loading torch.
"""

from typing import TYPE_CHECKING

from fastddpm.lazy import attributes, listing

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
__all__ = list(_HOMES)
__dir__ = listing(__all__)

if TYPE_CHECKING:  # the same names for type checkers and editors
    from .class_score import inception_score as inception_score
    from .features import Activations as Activations
    from .features import FeatureNetwork as FeatureNetwork
    from .features import Pretrained as Pretrained
    from .frechet import Moments as Moments
    from .frechet import frechet_distance as frechet_distance
    from .kid import kernel_distance as kernel_distance
    from .kid import kernel_distance_of_subsets as kernel_distance_of_subsets
    from .manifolds import precision_recall as precision_recall
    from .networks import open_network as open_network
else:
    __getattr__ = attributes(__name__, _HOMES)
