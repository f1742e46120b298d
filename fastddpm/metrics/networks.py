"""Feature networks by name or by their weights' file."""

import hashlib
import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastddpm.errors import DataError, UsageError
from fastddpm.storage.tensors import parse_tensors

from . import digits, efficientnet, inception
from .features import Pretrained

NAMES = ("inception", "digits", "efficientnet-lite0")
_MAX_BYTES = 2**30

M = TypeVar("M", bound=nn.Module)


def open_network(
    name: str, *, image_size: int, device: torch.device | str = "cpu", report: Callable[[str], None] | None = None
) -> Pretrained:
    """The network called `name`, on `device`.

    inception: the network of FID, its weights as `inception.find_weights` finds them. digits: a small classifier of the
    embedded digits at `image_size`, trained when it is first asked for (half a minute; `report` is told) and kept in
    the cache. efficientnet-lite0: from the package with its weights. Anything else: a .pth or .safetensors file with
    weights of the Inception network, which is called inception when it is the published file, and by its checksum
    otherwise. Raises `UsageError` for weights that are not there, saying what to fetch, and `DataError` for a file
    that is damaged or of another network.
    """
    if name == "digits":
        return digits.load(image_size, device, report=report)
    if name == "efficientnet-lite0":
        path = _found(efficientnet.find_weights(), efficientnet.how_to_get_them())
        return _efficientnet(path, device)
    if name == "inception":
        path = _found(inception.find_weights(), inception.how_to_get_them())
    else:
        path = Path(name)
        if path.suffix not in (".pth", ".safetensors"):
            raise UsageError(f"features are {', '.join(NAMES)}, or a .pth or .safetensors file; got {name!r}")
        if not path.is_file():
            raise UsageError(f"there are no weights at {path}")
    network = _inception(path, device)
    if name == "inception" and not network.is_inception:
        raise DataError(f"{path} is not the published file, or damaged: its sha256 is {network.checksum}")
    return network


def _found(path: Path | None, how: str) -> Path:
    if path is None:
        raise UsageError(how)
    return path


def _inception(path: Path, device: torch.device | str) -> Pretrained:
    weights, checksum = read_weights(path)
    genuine = checksum == inception.SHA256
    module = _filled(inception.InceptionV3(), weights, path).folded().to(device)
    name = "inception" if genuine else f"inception-{checksum[:8]}"
    return Pretrained(name, checksum, inception.DIMENSION, inception.CLASSES, genuine, 3, module)


def _efficientnet(path: Path, device: torch.device | str) -> Pretrained:
    weights, checksum = read_weights(path)
    if checksum != efficientnet.SHA256:
        raise DataError(f"{path} is damaged, or of another version: its sha256 is {checksum}")
    module = _filled(efficientnet.EfficientNetLite0(), efficientnet.renamed(weights), path)
    module = module.eval().requires_grad_(False).to(device)
    return Pretrained("efficientnet-lite0", checksum, efficientnet.DIMENSION, efficientnet.CLASSES, False, 3, module)


def _filled(module: M, weights: dict[str, Tensor], path: Path) -> M:
    """The module with the weights; what old files lack, the counters of batches, is not needed."""
    try:
        missing, unexpected = module.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise DataError(f"{path} does not hold the weights of {type(module).__name__}: {error}") from error
    wrong = [*unexpected, *(name for name in missing if not name.endswith("num_batches_tracked"))]
    if wrong:
        raise DataError(f"{path} does not hold the weights of {type(module).__name__}: see {wrong[0]}")
    return module


def read_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a .pth or .safetensors file, by name, and the file's sha256.

    A .pth is a pickle; torch reads it as weights only: tensors, and containers of them, and nothing that runs. Raises
    `DataError` for a file that cannot be read.
    """
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise DataError(f"{path} has {size:,} bytes; weights of at most {_MAX_BYTES:,} are read")
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    checksum = hashlib.sha256(data).hexdigest()
    if path.suffix == ".safetensors":
        return parse_tensors(data, path), checksum
    try:
        weights = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError, KeyError) as error:
        raise DataError(f"{path} cannot be read as weights: {str(error).splitlines()[0]}") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise DataError(f"{path} holds no tensors by name")
    return weights, checksum
