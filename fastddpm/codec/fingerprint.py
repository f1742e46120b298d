"""Whether the network computes here, to the last bit, what it computed where a file was made."""

import hashlib
import platform

import numpy as np
import torch

from fastddpm.kernels import native
from fastddpm.kernels.philox import STREAM_PAD
from fastddpm.kernels.philox.reference import normals, philox
from fastddpm.sampling.sampler import Sampler

from .quantised import NORMAL, RELEASED

_DIGITS = 32  # of a checksum, hexadecimal: 128 bits


def of_network(sampler: Sampler) -> str:
    """Checksum of the weights."""
    return str(sampler.settings()["network"])[:_DIGITS]


def of_process(sampler: Sampler) -> str:
    """Checksum of the timesteps, the chain's coefficients and the tables of the normal distribution."""
    settings = sampler.settings()
    digest = hashlib.sha256(f"{settings['timesteps']} {settings['coefficients']}".encode())
    digest.update(sampler.diffusion.alpha_bar.tobytes() + repr(sampler.diffusion.config).encode())
    for table in (NORMAL, RELEASED):
        digest.update(table.values.tobytes())
    return digest.hexdigest()[:_DIGITS]


def of_outputs(sampler: Sampler, sizes: set[int]) -> str:
    """Checksum of the network's outputs for noise, in batches of `sizes`, at the first, a middle and the last timestep.

    Rather than guess what in a machine, its libraries and their threads changes a bit, this tries it out.
    """
    config = sampler.unet.config
    device = next(sampler.unet.parameters()).device
    digest = hashlib.sha256()
    for size in sorted(sizes):
        shape = (size, config.image_channels, config.image_size, config.image_size)
        count = int(np.prod(shape))
        words = philox(np.arange(-(-count // 4)), np.zeros(1), np.zeros(1), np.array(STREAM_PAD), 2)
        x_t = torch.from_numpy(normals(words).reshape(-1)[:count].reshape(shape).astype(np.float32)).to(device)
        label = torch.arange(size, device=device) % config.num_classes if config.num_classes else None
        for t in {int(sampler.timesteps[i]): None for i in (0, sampler.steps // 2, -1)}:
            digest.update(sampler.denoise(x_t, t, label).float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:_DIGITS]


def made_by(sampler: Sampler) -> str:
    """What computes the network here, for a message."""
    device = next(sampler.unet.parameters()).device
    name = platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif native.unavailable() is None:
        name = f"{name} {native.isa()}"
    precision = sampler.settings()["precision"]
    threads = torch.get_num_threads()
    return f"{precision} on {name}, torch {torch.__version__}, {threads} threads"
