"""Other libraries' model formats, one module each; none of those libraries is imported."""

from . import diffusers

__all__ = ["diffusers"]
