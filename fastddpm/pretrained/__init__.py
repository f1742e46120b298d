"""Models of runs and of other libraries, one module for each format; none of those libraries is imported."""

from . import diffusers
from .model import Model

__all__ = ["Model", "diffusers", "load"]

load = Model.from_pretrained
