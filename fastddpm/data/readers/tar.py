"""Read images from tar files in the layout of webdataset.

Consecutive files whose names agree up to the first dot are one sample: 0001.jpg, and its class in 0001.cls (a number)
or 0001.json (label or cls). Files are read in place and never extracted, so members' paths and links cannot reach
other files.

The standard library's tarfile parses the headers. `Tar` adds the checks that it lacks: tarfile allocates as much as a
header claims, stops at a damaged header as if the file ended there, and keeps every member in memory.
"""

import itertools
import os
import tarfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from fastddpm.errors import DataError
from fastddpm.storage.documents import parse_json

from .labels import LABEL_FILES, MAX_LISTS, with_listed_labels
from .layout import choose, whole_split
from .source import (
    EXTENSIONS,
    EncodedImage,
    ImageSource,
    check_size,
    is_hidden,
    is_image,
    left_alone,
    status_of,
)

_MAX_HEADER_BYTES = 2**20
_MAX_LABEL_BYTES = 2**20
_MAX_SAMPLE_FILES = 64  # of one name up to the first dot
_LABELS = (".cls", ".json")


@dataclass(frozen=True)
class Member:
    """A regular file in a tar file; `offset` is that of its content, in bytes."""

    path: PurePosixPath
    offset: int
    size: int
    sparse: bool

    @property
    def stem(self) -> str:
        """The path up to the first dot of the name, which the members of a sample share."""
        return f"{self.path.parent}/{self.path.name.partition('.')[0]}"

    @property
    def ending(self) -> str:
        """The rest of the name from its first dot on, in lower case."""
        _, dot, rest = self.path.name.partition(".")
        return (dot + rest).lower()


@dataclass(frozen=True)
class _Sample:
    """An image with its label or None; `problem` says why it cannot be used, "" if it can."""

    image: Member
    label: int | None
    problem: str


def tar_source(files: list[Path], split: str, *, named: bool = False) -> ImageSource:
    """Return the images in tar files, file by file, in the order of their members.

    The split is that of the members' folders (`layout.choose`), unless `named` says that it is that of the files' names
    and there are no split folders. The labels are those of .cls and .json files; without them those of a list
    (`labels.py`), or of class folders. Memory does not grow with the files: their headers are read once to count the
    images and again for `items`. Raises DataError if a file is damaged or not a tar file, or if there is no image.
    """
    others: Counter[str] = Counter()
    lists: dict[PurePosixPath, tuple[Tar, Member]] = {}
    labelled = False

    def images() -> Iterator[PurePosixPath]:
        nonlocal labelled
        for path in files:
            for sample in _samples(Tar(path), others, lists):
                labelled = labelled or sample.label is not None or bool(sample.problem)
                yield sample.image.path

    def all_images() -> Iterator[PurePosixPath]:
        return (sample.image.path for path in files for sample in _samples(Tar(path), Counter(), {}))

    def read(path: PurePosixPath, limit: int) -> bytes:
        tar, member = lists[path]
        check_size(member.size, limit)
        return tar.read(member)

    where = files[0] if len(files) == 1 else files[0].parent
    choice = choose(images(), split, where, others=others, named=named)
    if not labelled:
        choice = with_listed_labels(choice, lists, read, all_images, where)
    elif choice.classes is not None or choice.base != choice.split_base:
        choice = whole_split(choice, all_images())

    def items() -> Iterator[EncodedImage]:
        for path in files:
            tar = Tar(path)
            for sample in _samples(tar, Counter(), {}):
                member = sample.image
                if choice.takes(member.path):
                    label = sample.label if labelled else choice.label(member.path)
                    yield EncodedImage(f"{path.name}: {member.path}", label, _reader(tar, sample))

    notes = tuple(note.text for note in choice.notes) + left_alone(others)
    return ImageSource(str(where), choice.count, [split, *status_of(files)], items, notes, choice.classes)


class Tar:
    """An open tar file, closed when the last reference to it is gone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
        weakref.finalize(self, os.close, self._descriptor)

    def members(self) -> Iterator[Member]:
        """Yield the regular files, in order."""
        last = -1
        try:
            with open(self._descriptor, "rb", closefd=False) as file:
                file.seek(0)
                archive = tarfile.open(fileobj=_Headers(file), mode="r:")  # type: ignore[call-overload]  # noqa: SIM115
                while (info := archive.next()) is not None:
                    archive.members = []  # tarfile would keep them all
                    if archive.offset <= last:
                        raise tarfile.ReadError("a member of negative size")
                    last = archive.offset
                    if info.isreg():
                        yield Member(PurePosixPath(info.name), info.offset_data, info.size, info.issparse())
                # tarfile stops silently at a damaged header. A whole file ends with blocks of zeros.
                file.seek(archive.offset)
                if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                    raise tarfile.ReadError(f"damaged or cut off at byte {archive.offset:,}")
        except (tarfile.TarError, OSError, ValueError, RecursionError) as error:
            raise DataError(f"{self.path} cannot be read as a tar file: {error}") from error

    def read(self, member: Member) -> bytes:
        """Return the content of a member. Raises ValueError if it is sparse, cut off or too large."""
        if member.sparse:
            raise ValueError("a sparse file")
        check_size(member.size)
        data = os.pread(self._descriptor, member.size, member.offset)
        if len(data) != member.size:
            raise ValueError("the tar file is cut off")
        return data


class _Headers:
    """A file that raises ReadError for reads of more than 1 MiB, since a header may claim to have any length."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of more than {_MAX_HEADER_BYTES:,} bytes")
        return self._file.read(size)


def _samples(tar: Tar, others: Counter[str], lists: dict[PurePosixPath, tuple[Tar, Member]]) -> Iterator[_Sample]:
    """Yield the samples that have an image.

    Lists of labels without an image of their name are put into `lists`, up to 64 of them; extensions of other files
    that are no labels are counted in `others`.
    """
    members = (member for member in tar.members() if not is_hidden(member.path))
    for stem, group in itertools.groupby(members, key=lambda member: member.stem):
        files = list(itertools.islice(group, _MAX_SAMPLE_FILES + 1))
        if len(files) > _MAX_SAMPLE_FILES:
            raise DataError(
                f"{tar.path}: more than {_MAX_SAMPLE_FILES} files in a row have the name {stem!r} before the first "
                "dot, so they count as one sample; rename them, or pack them as a .zip"
            )
        images = [file for file in files if is_image(file.path)]
        found = [file for file in files if file.path.name in LABEL_FILES and not images][: MAX_LISTS - len(lists)]
        lists.update((file.path, (tar, file)) for file in found)
        files = [file for file in files if file not in found]
        others.update(file.path.suffix.lower() for file in files if file not in images and file.ending not in _LABELS)
        if images:
            yield _sample(tar, files, [file for file in images if file.ending in EXTENSIONS] or images)


def _sample(tar: Tar, files: list[Member], images: list[Member]) -> _Sample:
    label, problem = None, ""
    try:
        for file in files:
            if file.ending in _LABELS and label is None:
                label = _label(tar, file)
    except ValueError as error:
        problem = f"its label: {error}"
    if len(images) > 1:
        problem = f"several images in one sample: {', '.join(image.path.name for image in images)}"
    return _Sample(images[0], label, problem)


def _label(tar: Tar, file: Member) -> int | None:
    """Return the number in a .cls file, or in label or cls of a .json file, or None if the .json has neither.

    Raises ValueError if a .cls file holds anything else.
    """
    check_size(file.size, _MAX_LABEL_BYTES)
    try:
        value = parse_json(tar.read(file), file.path.name)
    except ValueError:
        value = None
    if file.ending == ".cls":
        if type(value) is not int or value < 0:
            raise ValueError(f"{file.path.name} holds no number")
        return value
    found = [value.get(name) for name in ("label", "cls")] if isinstance(value, dict) else []
    return next((number for number in found if type(number) is int and number >= 0), None)


def _reader(tar: Tar, sample: _Sample) -> Callable[[], bytes]:
    def read() -> bytes:
        if sample.problem:
            raise ValueError(sample.problem)
        return tar.read(sample.image)

    return read
