"""The U-Net: its blocks, and the network that they make."""

from .blocks import AttnBlock, Conv3x3, Down, GroupNormSiLU, Level, Middle, ResBlock, Up, join_heads, split_heads
from .network import FORWARDS, UNet, meta_network, network_with, timestep_embedding

__all__ = [
    "FORWARDS",
    "AttnBlock",
    "Conv3x3",
    "Down",
    "GroupNormSiLU",
    "Level",
    "Middle",
    "ResBlock",
    "UNet",
    "Up",
    "join_heads",
    "meta_network",
    "network_with",
    "split_heads",
    "timestep_embedding",
]
