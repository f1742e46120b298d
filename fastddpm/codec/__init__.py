"""A codec on a model's conditionals: lossless at the price of the variational bound, or lossy down to a timestep."""

from fastddpm.config import CodecOptions

from .coder import Decoded, Encoded, decode, encode

__all__ = ["CodecOptions", "Decoded", "Encoded", "decode", "encode"]
