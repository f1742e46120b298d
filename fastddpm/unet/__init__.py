"""The U-Net: its blocks, and the network that they make."""

from .blocks import AttnBlock, Conv3x3, Down, GroupNormSiLU, Level, Middle, ResBlock, Up
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
    "meta_network",
    "network_with",
    "timestep_embedding",
]
