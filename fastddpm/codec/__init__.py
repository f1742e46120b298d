"""An encoder and a decoder for images on top of a model's conditionals: lossless, and lossy down to a timestep.

The names are imported when first used, so that the command answers `--help` without loading torch.
"""

from fastddpm.lazy import attributes

_HOMES = {
    "CodecOptions": ".options",
    "Decoded": ".coder",
    "Encoded": ".coder",
    "decode": ".coder",
    "encode": ".coder",
}
__all__ = sorted(_HOMES)
__getattr__ = attributes(__name__, _HOMES)
