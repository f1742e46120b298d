"""Checksums of the weights, the chain and the network's outputs, to find out if a file can be decoded here.

Decoding needs the encoder's network outputs to the last bit.
"""

import hashlib
import platform

import numpy as np
import torch

from fastddpm.kernels import native
from fastddpm.kernels.philox import STREAM_PAD
from fastddpm.kernels.philox.reference import normals, philox
from fastddpm.sampling.sampler import Sampler
from fastddpm.storage.documents import stored_fields

from .quantised import NORMAL, RELEASED

_DIGITS = 32  # of a checksum, hexadecimal: 128 bits


def of_network(sampler: Sampler) -> str:
    """Return a checksum of the weights."""
    return str(sampler.settings()["network"])[:_DIGITS]


def of_process(sampler: Sampler) -> str:
    """Return a checksum of the timesteps, the chain's coefficients and the tables of the normal distribution."""
    settings = sampler.settings()
    digest = hashlib.sha256(f"{settings['timesteps']} {settings['coefficients']}".encode())
    described = ", ".join(f"{name}={value!r}" for name, value in stored_fields(sampler.diffusion.config))
    digest.update(sampler.diffusion.alpha_bar.tobytes() + f"DiffusionConfig({described})".encode())
    for table in (NORMAL, RELEASED):
        digest.update(table.values.tobytes())
    return digest.hexdigest()[:_DIGITS]


def of_outputs(sampler: Sampler, sizes: set[int]) -> str:
    """Return a checksum of the network's outputs for fixed noise, at the first, a middle and the last timestep.

    `sizes`: the batch sizes to evaluate. Outputs are compared because hardware, libraries and the number of threads may
    all change a bit, and no list of them would be complete.
    """
    classes, device = sampler.interface.num_classes, sampler.device
    digest = hashlib.sha256()
    for size in sorted(sizes):
        shape = (size, *sampler.interface.shape)
        count = int(np.prod(shape))
        words = philox(np.arange(-(-count // 4)), np.zeros(1), np.zeros(1), np.array(STREAM_PAD), 2)
        x_t = torch.from_numpy(normals(words).reshape(-1)[:count].reshape(shape).astype(np.float32)).to(device)
        label = torch.arange(size, device=device) % classes if classes else None
        for t in {int(sampler.timesteps[i]): None for i in (0, sampler.steps // 2, -1)}:
            digest.update(sampler.denoise(x_t, t, label).float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:_DIGITS]


def made_by(sampler: Sampler) -> str:
    """Describe the precision, device, torch version and threads that compute the network here, for messages."""
    device = sampler.device
    name = platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif native.unavailable() is None:
        name = f"{name} {native.isa()}"
    precision = sampler.settings()["precision"]
    threads = torch.get_num_threads()
    return f"{precision} on {name}, torch {torch.__version__}, {threads} threads"
