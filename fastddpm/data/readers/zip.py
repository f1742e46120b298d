"""Read images from a zip file.

Members are read into memory and never extracted, so their paths and links cannot reach other files.
"""

import itertools
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from fastddpm.errors import DataError

from .labels import LABEL_FILES, with_listed_labels
from .layout import choose
from .source import MAX_ENCODED_BYTES, EncodedImage, ImageSource, is_hidden, is_image, left_alone

_MAX_MEMBERS = 2_000_000  # zipfile keeps about 0.7 KB per member in memory
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # zipfile unpacks bzip2 and LZMA without a bound on memory


def zip_source(path: Path, split: str) -> ImageSource:
    """Return the images in a zip file, sorted by path, with the split and labels of `layout.choose`.

    A list of labels (`labels.py`) replaces class folders. Raises DataError if the file is not a zip file, has more than
    2,000,000 members, several members of one name, or no image.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise DataError(f"{path} cannot be read as a zip file: {error}") from error
    infos = archive.infolist()
    if len(infos) > _MAX_MEMBERS:
        raise DataError(f"{path} has {len(infos):,} members; at most {_MAX_MEMBERS:,} are read")
    others: Counter[str] = Counter()
    members = []
    lists = {}
    if not any("/" in info.filename for info in infos):  # as some programs on Windows write it
        for info in infos:
            info.filename = info.filename.replace("\\", "/")
    for info in infos:
        name = PurePosixPath(info.filename)
        if info.is_dir() or is_hidden(name):
            continue
        if is_image(name):
            members.append(info)
        elif name.name in LABEL_FILES:
            lists[name] = info
        else:
            others[name.suffix.lower()] += 1
    members.sort(key=_parts)
    if any(_parts(one) == _parts(two) for one, two in itertools.pairwise(members)):
        raise DataError(f"{path} has several members of the same name; make the zip file again without them")
    choice = choose(map(_path, members), split, path, others=others)
    choice = with_listed_labels(
        choice,
        lists,
        lambda name, limit: _reader(archive, lists[name], limit)(),
        lambda: map(_path, members),
        path,
    )

    def items() -> Iterator[EncodedImage]:
        for info in members:
            name = _path(info)
            if choice.takes(name):
                yield EncodedImage(str(name), choice.label(name), _reader(archive, info))

    status = path.stat()
    listing = [status.st_size, status.st_mtime_ns, split]
    notes = tuple(note.text for note in choice.notes) + left_alone(others)
    return ImageSource(str(path), choice.count, listing, items, notes, choice.classes)


def _path(info: zipfile.ZipInfo) -> PurePosixPath:
    return PurePosixPath(info.filename)


def _parts(info: zipfile.ZipInfo) -> tuple[str, ...]:
    return PurePosixPath(info.filename).parts


def _reader(archive: zipfile.ZipFile, info: zipfile.ZipInfo, limit: int = MAX_ENCODED_BYTES) -> Callable[[], bytes]:
    def read() -> bytes:
        if info.file_size > limit:
            raise ValueError(f"{info.file_size:,} bytes unpacked; at most {limit:,} are read")
        if info.compress_type not in _METHODS:
            raise ValueError("compressed by a method other than deflate; make the zip file again with deflate")
        try:
            with archive.open(info) as file:
                # With a size given, zipfile unpacks no more than that, whatever the member really holds.
                return file.read(info.file_size)
        except (RuntimeError, NotImplementedError, zipfile.BadZipFile, EOFError, zlib.error) as error:
            raise ValueError(str(error)) from error  # encrypted, damaged, or compressed by an unknown method

    return read
