"""Read parquet files in the Hugging Face layout. The `pyarrow` library is imported only when it is used."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastddpm.errors import DataError, UsageError

from .source import MAX_ENCODED_BYTES, EncodedImage, ImageSource, check_size, split_files, status_of

_SHARD = re.compile(r"(.*)-\d{5}-of-(\d{5})\.parquet")
_ROWS = 128  # rows that are read at a time


def parquet_files(folder: Path, split: str) -> list[Path]:
    """Return the split's parquet files in `folder` or one folder below it; all of them if none is named by a split.

    The list is empty if there is no parquet file. Raises DataError if the files lie in several folders, if only other
    splits are there, or if a shard is missing.
    """
    tables = sorted(folder.glob("*.parquet")) or sorted(folder.glob("*/*.parquet"))
    tables = split_files(tables, split, folder, "parquet")
    for shard in map(_SHARD.fullmatch, (table.name for table in tables)):
        present = sum(table.name.startswith(f"{shard[1]}-") for table in tables) if shard else 0
        if shard and present != int(shard[2]):
            raise DataError(
                f"{folder} has {present} of the {int(shard[2])} files of {shard[1]}; the others are missing"
            )
    return tables


def parquet_source(files: list[Path]) -> ImageSource:
    """Return the rows of parquet files as images.

    Columns: `img` or `image`, struct{bytes, ..} or bytes; `label` or `labels`, integers, may be absent. A negative
    label means that the image has none. Raises UsageError if pyarrow is missing and DataError for another layout.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UsageError("reading parquet needs pyarrow: pip install 'fastddpm[parquet]'") from error
    counts, columns = [], []
    for path in files:
        try:
            with parquet.ParquetFile(path) as table:
                counts.append(table.metadata.num_rows)
                columns.append(_columns(table.schema_arrow, path))
        except (ArrowException, OSError) as error:
            raise DataError(f"{path} cannot be read as parquet: {error}") from error

    def items() -> Iterator[EncodedImage]:
        for path, (image, label) in zip(files, columns, strict=True):
            try:
                with parquet.ParquetFile(path) as table:
                    yield from _rows(table, path.name, image, label)
            except (ArrowException, OSError) as error:
                raise DataError(f"{path} is damaged: {error}") from error

    name = str(files[0] if len(files) == 1 else files[0].parent)
    return ImageSource(name, sum(counts), status_of(files), items)


def _columns(schema: Any, path: Path) -> tuple[str, str | None]:
    """Return the names of the image and label columns. Raises DataError if a column is missing or of another type."""
    from pyarrow import types

    image = next((name for name in ("img", "image") if name in schema.names), None)
    if image is None:
        raise DataError(f"{path} has columns {', '.join(schema.names)}; images are expected in the column img or image")
    kind = schema.field(image).type
    if types.is_struct(kind):
        kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else kind
    if not (types.is_binary(kind) or types.is_large_binary(kind)):
        raise DataError(
            f"{path}: {image} is {kind}; expected the bytes of an image file, or a struct with a field bytes"
        )
    label = next((name for name in ("label", "labels") if name in schema.names), None)
    if label is not None and not types.is_integer(schema.field(label).type):
        raise DataError(f"{path}: {label} is {schema.field(label).type}; expected integers")
    return image, label


def _rows(table: Any, file: str, image: str, label: str | None) -> Iterator[EncodedImage]:
    row = 0
    for batch in table.iter_batches(batch_size=_ROWS, columns=[image] + ([label] if label else [])):
        labels = batch.column(label).to_pylist() if label else [None] * batch.num_rows
        for value, number in zip(batch.column(image).to_pylist(), labels, strict=True):
            known = number if number is not None and number >= 0 else None
            yield EncodedImage(f"{file} row {row}", known, _reader(value))
            row += 1


def _reader(value: Any) -> Callable[[], bytes]:
    def read() -> bytes:
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None:
            path = value.get("path") if isinstance(value, dict) else None
            raise ValueError(f"the row names the file {path} but holds no bytes" if path else "the row is empty")
        check_size(len(data), MAX_ENCODED_BYTES)
        return bytes(data)

    return read
