"""Models of the Hugging Face hub, downloaded because they are named: hub:USER/NAME or hub:USER/NAME@REVISION.

`huggingface_hub` is imported only when it is used. Its cache and its variables count here, too: HF_HOME, HF_ENDPOINT,
HF_TOKEN, HF_HUB_OFFLINE. Downloaded are the files that a reader of this package takes, and no others:

    model_index.json, unet/, scheduler/, fastddpm.json    a directory of diffusers, as `push_to_hub` writes
    NAME.safetensors                                      or one packed file (compact.py)

The hub's listing tells their sizes and hashes. A file that is larger than the network of its configuration is not
downloaded, and a file with another hash is not read.
"""

import hashlib
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastddpm.errors import DataError, UsageError
from fastddpm.runtime.options import check_hub_name, hub_name
from fastddpm.storage.documents import MAX_JSON_BYTES
from fastddpm.storage.reading import open_regular, readable

from . import diffusers
from .facts import parameters_of

_DOCUMENTS = (
    "model_index.json", "unet/config.json", "config.json", "scheduler/scheduler_config.json", "scheduler_config.json",
    diffusers.OUR_FILE,
)  # fmt: skip
_MOST_PACKED_BYTES = 2**31
_PACKED = re.compile(r"[\w.-]+\.safetensors")
_SHA256, _GIT_SHA1 = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class _Listed:
    """A file in the hub's listing. `digest`: SHA-256, or of small files git's SHA-1 of them as a blob; hexadecimal."""

    size: int
    digest: str


def fetch(source: str, *, weights: bool = True) -> Path:
    """Download the model that "hub:USER/NAME[@REVISION]" names, unless it is cached; return its directory or file.

    The directory is a diffusers pipeline, the file a packed one, both in the cache of huggingface_hub. Without
    `weights`, only the documents of a pipeline are there. With HF_HUB_OFFLINE set, only the cache is looked at.

    Raises `UsageError` for a name of another form, without huggingface_hub, and for a model that is not there, or while
    offline not in the cache. Raises `DataError` if it holds no such files, or if size or hash of one is not as listed.
    """
    check_hub_name(source)
    repository = _Repository(source)
    names = repository.names()
    documents = [name for name in _DOCUMENTS if name in names]
    packed = [name for name in names if _PACKED.fullmatch(name) and not name.startswith(diffusers.STEM)]
    if {"model_index.json", "unet/config.json"}.isdisjoint(documents):
        if len(packed) != 1:
            raise DataError(
                f"{source} holds neither a diffusers pipeline nor one packed .safetensors file{_pickled(names)}"
            )
        return repository.get(packed[0], _MOST_PACKED_BYTES)
    paths = {name: repository.get(name, MAX_JSON_BYTES) for name in documents}
    root = paths[documents[0]].parents[documents[0].count("/")]
    if weights:
        left = diffusers.most_bytes(parameters_of(diffusers.read_preset(root)))
        files = diffusers.weights_among(names, lambda index: repository.get(index, MAX_JSON_BYTES), source)
        if not files and (pickled := _pickled(names)):
            raise DataError(f"{source} holds no .safetensors of its weights{pickled}")
        for name in files:
            left -= repository.get(name, left).stat().st_size
    return root


def _pickled(names: Collection[str]) -> str:
    """Return words on the first of `names` that is a pickle, for a message; none if there is none."""
    name = next((name for name in names if name.endswith((".bin", ".ckpt", ".pt"))), None)
    return "" if name is None else f"; {name} is a pickle, which can run code, and is not read"


def push(directory: Path, name: str, *, private: bool | None, revision: str | None, message: str) -> str:
    """Upload a directory as the model `name`, USER/NAME, which is made if it is new; return the address of the commit.

    Raises as `fetch` does, and `UsageError` if the hub refuses it.
    """
    source = f"hub:{name}"
    check_hub_name(source)
    if "@" in name:
        raise UsageError(f"name the branch to write with revision=; got {name!r}")
    api = _client().HfApi(library_name="fastddpm")
    with _explained(source, "be written"):
        api.create_repo(name, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        found = api.upload_folder(repo_id=name, folder_path=directory, revision=revision, commit_message=message)
    return str(found.commit_url)


class _Repository:
    """A model at the hub, or what the cache holds of it while offline."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.name, self.revision = hub_name(source)
        self.client = _client()
        self.offline = bool(self.client.constants.HF_HUB_OFFLINE)
        self.commit: str | None = None
        self._listed: dict[str, _Listed] = {}

    def names(self) -> list[str]:
        """Return the names of its files; while offline, of those that are cached."""
        if self.offline:
            return self._cached()
        with _explained(self.source, "be read"):
            info = self.client.HfApi(library_name="fastddpm").model_info(
                self.name, revision=self.revision, files_metadata=True
            )
        self.commit = info.sha
        for file in info.siblings or ():
            digest = file.blob_id if file.lfs is None else file.lfs.sha256
            if type(file.size) is int and isinstance(digest, str):
                self._listed[file.rfilename] = _Listed(file.size, digest)
        return [*self._listed]

    def _cached(self) -> list[str]:
        with _explained(self.source, "be read"):
            root = Path(self.client.snapshot_download(self.name, revision=self.revision, local_files_only=True))
        self.commit = root.name
        return [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]

    def get(self, name: str, limit: int) -> Path:
        """Return the path of a file in the cache, downloaded if it is missing, of at most `limit` bytes, verified."""
        listed = self._listed.get(name)
        if listed is not None and listed.size > limit:
            raise DataError(f"{self.source}: {name} has {listed.size:,} bytes; at most {limit:,} are read")
        with _explained(self.source, "be read"):
            path = Path(
                self.client.hf_hub_download(
                    self.name, name, revision=self.revision, local_files_only=self.offline, library_name="fastddpm"
                )
            )
        if self.commit is not None and self.commit not in path.parts:
            raise DataError(f"{self.source} was changed while it was downloaded; start again")
        # The cache names each file by the hash that the hub gave for it, and links to it.
        expected = path.resolve().name if listed is None else listed.digest
        with readable(path):
            problem = _problem(path, limit, expected, None if listed is None else listed.size)
        if problem is not None:
            raise DataError(f"{self.source}: {path} {problem}; remove {path.resolve()}, and start again")
        return path


def _problem(path: Path, limit: int, digest: str, size: int | None) -> str | None:
    """Return in what a file differs from its listing, reading it block by block; None if in nothing."""
    with open_regular(path) as file:
        found = path.stat().st_size
        if found > limit or (size is not None and found != size):
            return f"has {found:,} bytes, and {size or limit:,} were expected"
        if _SHA256.fullmatch(digest):
            total = hashlib.sha256()
        elif _GIT_SHA1.fullmatch(digest):
            total = hashlib.sha1(b"blob %d\0" % found, usedforsecurity=False)
        else:  # a cache on a file system without links: its size is all that is known
            return None
        while block := file.read(2**20):
            total.update(block)
    return None if total.hexdigest() == digest else "is damaged: its hash is not the one that the hub tells"


def _client() -> Any:
    import huggingface_hub  # `check_hub_name` has said it if it is missing
    import huggingface_hub.constants

    return huggingface_hub


@contextmanager
def _explained(source: str, what: str) -> Iterator[None]:
    """Turn what the client raises, of many kinds, into one line."""
    from huggingface_hub import errors

    try:
        yield
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        found = "model" if isinstance(error, errors.RepositoryNotFoundError) else "revision"
        raise UsageError(
            f"{source} cannot {what}: the hub has no such {found}, or shows it only to others; if it is yours, log in "
            "with: hf auth login"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if not _client().constants.HF_HUB_OFFLINE:
            raise UsageError(f"{source} cannot {what}: the hub does not answer ({_reason(error)})") from error
        raise UsageError(
            f"{source} cannot {what}: it is not in the cache, and HF_HUB_OFFLINE forbids to ask the hub; unset it"
        ) from error
    except Exception as error:  # the client and its dependencies raise many kinds
        raise UsageError(f"{source} cannot {what}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__
