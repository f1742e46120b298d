"""Compress images with a trained model: lossless at the rate of its variational bound, or lossy down to a timestep."""

from fastddpm.config import CodecOptions

from .coder import Decoded, Encoded, decode, encode

__all__ = ["CodecOptions", "Decoded", "Encoded", "decode", "encode"]
