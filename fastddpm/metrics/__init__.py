"""Scores of generated images, computed in float64 from features, and the networks that compute the features."""

from .features import Activations, FeatureNetwork, Pretrained
from .frechet import Moments, frechet_distance
from .inception_score import inception_score
from .kid import kernel_distance, kernel_distance_of_subsets
from .networks import open_network
from .precision_recall import precision_recall

__all__ = [
    "Activations",
    "FeatureNetwork",
    "Moments",
    "Pretrained",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "kernel_distance_of_subsets",
    "open_network",
    "precision_recall",
]
