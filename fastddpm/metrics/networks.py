"""Open feature networks by name or by weights file."""

import hashlib
import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastddpm.errors import DataError, UsageError
from fastddpm.runtime.image_size import ImageSize
from fastddpm.storage.reading import read_bytes, readable
from fastddpm.storage.tensors import parse_tensors

from . import digits, efficientnet, inception
from .features import Pretrained

NAMES = ("inception", "digits", "efficientnet-lite0")
_MAX_BYTES = 2**28

M = TypeVar("M", bound=nn.Module)


def open_network(
    name: str, *, image_size: ImageSize, device: torch.device | str = "cpu", report: Callable[[str], None] | None = None
) -> Pretrained:
    """Open the feature network `name` on `device`.

    "inception": the network of FID, with the weights that `inception.find_weights` finds. "digits": a small classifier
    of the embedded digits at `image_size` pixels, trained on first use (half a minute, after a line to `report`) and
    kept in the cache. "efficientnet-lite0": the weights of an installed package. Any other name: the path of a .pth or
    .safetensors file with weights of the Inception network; the network is called "inception" if it is the published
    file, otherwise "inception-" and 8 digits of the file's checksum. Raises `UsageError` for missing weights, saying
    how to get them, and `DataError` for a file that is damaged or holds another network.
    """
    if name == "digits":
        return digits.load(image_size, device, report=report)
    if name == "efficientnet-lite0":
        path = _required(efficientnet.find_weights(), efficientnet.how_to_get_them())
        return _efficientnet(path, device)
    if name == "inception":
        path = _required(inception.find_weights(), inception.how_to_get_them())
    else:
        path = _weights_file(name)
    network = _inception(path, device)
    if name == "inception" and not network.is_inception:
        raise DataError(f"{path} is not the published file, or damaged: its sha256 is {network.checksum}")
    return network


def check_network(name: str, *, image_size: ImageSize, channels: int) -> None:
    """Raise `UsageError` if `open_network` would refuse `name`, or its network images of this size; opens nothing.

    `channels`: 1 for grey images, 3 for colour.
    """
    if name == "digits":
        digits.check(image_size, channels)
    elif name == "efficientnet-lite0":
        _required(efficientnet.find_weights(), efficientnet.how_to_get_them())
    elif name == "inception":
        _required(inception.find_weights(), inception.how_to_get_them())
    else:
        _weights_file(name)


def _weights_file(name: str) -> Path:
    """Return `name` as the path of an existing weights file. Raises `UsageError` for anything else."""
    path = Path(name)
    if path.suffix not in (".pth", ".safetensors"):
        raise UsageError(f"a feature network is {', '.join(NAMES)}, or a .pth or .safetensors file; got {name!r}")
    if not path.is_file():
        raise UsageError(f"there is no weights file at {path}")
    return path


def _required(path: Path | None, how_to_get_it: str) -> Path:
    if path is None:
        raise UsageError(how_to_get_it)
    return path


def _inception(path: Path, device: torch.device | str) -> Pretrained:
    weights, checksum = read_weights(path)
    published = checksum == inception.SHA256
    module = _filled(inception.InceptionV3(), weights, path).folded().to(device)
    name = "inception" if published else f"inception-{checksum[:8]}"
    return Pretrained(name, checksum, inception.DIMENSION, inception.CLASSES, published, 3, module)


def _efficientnet(path: Path, device: torch.device | str) -> Pretrained:
    weights, checksum = read_weights(path)
    if checksum != efficientnet.SHA256:
        raise DataError(
            f"{path} is damaged or of another version: expected sha256 {efficientnet.SHA256}, got {checksum}"
        )
    module = _filled(efficientnet.EfficientNetLite0(), efficientnet.renamed(weights), path)
    module = module.eval().requires_grad_(False).to(device)
    return Pretrained("efficientnet-lite0", checksum, efficientnet.DIMENSION, efficientnet.CLASSES, False, 3, module)


def _filled(module: M, weights: dict[str, Tensor], path: Path) -> M:
    """Load the weights into the module and return it. Batch counters, which old files lack, may be missing."""
    try:
        missing, unexpected = module.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise DataError(f"{path} does not hold the weights of {type(module).__name__}: {error}") from error
    wrong = [*unexpected, *(name for name in missing if not name.endswith("num_batches_tracked"))]
    if wrong:
        problem = "unexpected" if unexpected else "missing"
        raise DataError(f"{path} does not hold the weights of {type(module).__name__}: {problem} tensor {wrong[0]}")
    return module


def read_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of a .pth or .safetensors file, by name, and the file's sha256.

    A .pth file is a pickle; torch loads it with `weights_only`, which runs no code from it. Raises `DataError` for a
    file that cannot be read or has more than 256 MiB.
    """
    with readable(path):
        data = read_bytes(path, _MAX_BYTES)
    checksum = hashlib.sha256(data).hexdigest()
    if path.suffix == ".safetensors":
        return parse_tensors(data, path), checksum
    try:
        _refuse_compressed(data)
        weights = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise nearly anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path} cannot be read as weights: {reason}") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise DataError(f"{path} must hold a dictionary of tensors by name; got something else")
    return weights, checksum


def _refuse_compressed(data: bytes) -> None:
    """Raise `ValueError` for an archive with compressed members, which PyTorch does not write: they could be large."""
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("its members are compressed, as PyTorch writes none")
