"""An encoder and a decoder for images on top of a model's conditionals: lossless, and lossy down to a timestep.

The names are imported when first used, so that the command answers `--help` without loading torch.
"""

from typing import TYPE_CHECKING

from fastddpm.lazy import attributes, listing

_HOMES = {
    "CodecOptions": ".options",
    "Decoded": ".coder",
    "Encoded": ".coder",
    "decode": ".coder",
    "encode": ".coder",
}
__all__ = list(_HOMES)
__dir__ = listing(__all__)

if TYPE_CHECKING:  # the same names for type checkers and editors
    from .coder import Decoded as Decoded
    from .coder import Encoded as Encoded
    from .coder import decode as decode
    from .coder import encode as encode
    from .options import CodecOptions as CodecOptions
else:
    __getattr__ = attributes(__name__, _HOMES)
