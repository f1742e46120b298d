"""Trained models, read from runs and from other libraries' files, one module per format, without importing those."""

from . import diffusers
from .model import Model

__all__ = ["Model", "diffusers", "load"]

load = Model.from_pretrained
