"""Images in a zip file, read in memory: nothing is ever extracted, so members' paths and links lead nowhere."""

import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from fastddpm.errors import DataError

from .collection import MAX_ENCODED_BYTES, Collection, Item, choose, is_hidden, is_image, left_alone

_MAX_MEMBERS = 2_000_000
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # zipfile unpacks the other two without a bound on memory


def zip_collection(path: Path, split: str) -> Collection:
    """All images in a zip file, by the rules of a folder (`collection.choose`).

    Raises DataError for a file that is no zip, has more than 2,000,000 members, two members of one name, or no
    image.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise DataError(f"{path} cannot be read as a zip file: {error}") from error
    infos = archive.infolist()
    if len(infos) > _MAX_MEMBERS:
        raise DataError(f"{path} has {len(infos):,} members; at most {_MAX_MEMBERS:,} are read")
    files = [(PurePosixPath(info.filename), info) for info in infos if not info.is_dir()]
    members = {name: info for name, info in files if is_image(name)}
    if len(members) < sum(is_image(name) for name, _ in files):
        raise DataError(f"{path} has several members of the same name; pack it anew")
    images = choose(members, split, path)

    def items() -> Iterator[Item]:
        for name, label in images:
            yield Item(str(name), label, _reader(archive, members[name]))

    status = path.stat()
    listing = [status.st_size, status.st_mtime_ns, split]
    notes = left_alone(name for name, _ in files if not is_image(name) and not is_hidden(name))
    return Collection(str(path), len(images), listing, items, notes)


def _reader(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Callable[[], bytes]:
    def read() -> bytes:
        if info.file_size > MAX_ENCODED_BYTES:
            raise ValueError(f"{info.file_size:,} bytes unpacked; at most {MAX_ENCODED_BYTES:,} are read")
        if info.compress_type not in _METHODS:
            raise ValueError("packed by a method other than deflate; pack it anew")
        try:
            with archive.open(info) as file:
                # Told a size, zipfile unpacks no more than that, whatever the member really holds.
                return file.read(info.file_size)
        except (RuntimeError, NotImplementedError, zipfile.BadZipFile, EOFError, zlib.error) as error:
            raise ValueError(str(error)) from error  # encrypted, of an unknown method, damaged

    return read
