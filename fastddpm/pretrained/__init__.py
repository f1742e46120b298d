"""Trained models, read from runs and from other libraries' files, one module per format, without importing those."""

from . import diffusers
from .model import Model, read_preset
from .run import load_weights

__all__ = ["Model", "diffusers", "load", "load_weights", "read_preset"]

load = Model.from_pretrained
