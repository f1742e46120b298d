"""Read parquet files in the Hugging Face layout. The `pyarrow` library is imported only when it is used."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastddpm.errors import DataError, UsageError
from fastddpm.storage.documents import parse_json

from .source import MAX_ENCODED_BYTES, EncodedImage, ImageSource, check_regular, check_size, status_of
from .splits import listed, require_split, split_files

_SHARD = re.compile(r"(.*)-\d{5}-of-(\d{5})\.parquet")
_MAX_ROWS = 128  # rows that are read at a time, fewer if they are large
_MAX_BATCH_BYTES = 128 * 2**20
# The library unpacks a page at a time, which may be a whole row group. Encoded images do not pack further, so a large
# row group is refused only if it unpacks to many times its size.
_MAX_UNPACKED_BYTES = 2**30
_MAX_RATIO = 20
_DICTIONARIES = ("PLAIN_DICTIONARY", "RLE_DICTIONARY")


def parquet_files(folder: Path, split: str) -> tuple[list[Path], tuple[str, ...]]:
    """Return the split's parquet files in `folder` or up to two folders below it, and notes about what is left out.

    If none is named by a split, all are returned; none if there is no parquet file. Raises DataError and UsageError as
    `split_files` does, and DataError if a shard is missing.
    """
    tables: list[Path] = []
    for pattern in ("*.parquet", "*/*.parquet", "*/*/*.parquet"):
        tables = tables or sorted(folder.glob(pattern))
    tables, notes, named = split_files(tables, split, folder, "parquet")
    if tables and not named:
        require_split(split, folder, f"{len(tables)} parquet files, {listed(table.name for table in tables)}")
    for shard in map(_SHARD.fullmatch, (table.name for table in tables)):
        present = sum(table.name.startswith(f"{shard[1]}-") for table in tables) if shard else 0
        if shard and present != int(shard[2]):
            raise DataError(
                f"{folder} has {present} of the {int(shard[2])} files of {shard[1]}; the others are missing"
            )
    return tables, notes


def parquet_source(files: list[Path]) -> ImageSource:
    """Return the rows of parquet files as images.

    Columns: `img` or `image`, struct{bytes, ..} or bytes; `label` or `labels`, integers, may be absent. A negative
    label means that the image has none. Class names are those that `datasets` has stored with the schema. Raises
    UsageError if pyarrow is missing and DataError for another layout.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UsageError("reading parquet needs pyarrow: pip install 'fastddpm[parquet]'") from error
    counts, columns, classes = [], [], set()
    for path in files:
        check_regular(path)
        try:
            with parquet.ParquetFile(path) as table:
                counts.append(table.metadata.num_rows)
                columns.append(_columns(table.schema_arrow, path))
                classes.add(_class_names(table.schema_arrow, columns[-1][1]))
        except (ArrowException, OSError) as error:
            raise DataError(f"{path} cannot be read as parquet: {error}") from error

    def items() -> Iterator[EncodedImage]:
        for path, (image, label) in zip(files, columns, strict=True):
            try:
                with parquet.ParquetFile(path) as table:
                    yield from _rows(table, path, image, label)
            except (ArrowException, OSError) as error:
                raise DataError(f"{path} is damaged: {error}") from error

    name = str(files[0] if len(files) == 1 else files[0].parent)
    names = classes.pop() if len(classes) == 1 else None
    return ImageSource(name, sum(counts), status_of(files), items, classes=names)


def _columns(schema: Any, path: Path) -> tuple[str, str | None]:
    """Return the names of the image and label columns. Raises DataError if a column is missing or of another type."""
    from pyarrow import types

    twice = [name for name in ("img", "image", "label", "labels") if schema.names.count(name) > 1]
    if twice:
        raise DataError(f"{path} has {schema.names.count(twice[0])} columns named {twice[0]}; keep one of them")
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


def _class_names(schema: Any, label: str | None) -> tuple[str, ...] | None:
    """Return the names of the classes from the metadata that `datasets` writes, None without them."""
    try:
        info = parse_json((schema.metadata or {})[b"huggingface"], "metadata")
        names = info["info"]["features"][label]["names"]
        return tuple(names) if names and all(type(name) is str for name in names) else None
    except (DataError, KeyError, TypeError):
        return None


def _rows(table: Any, path: Path, image: str, label: str | None) -> Iterator[EncodedImage]:
    row = 0
    names = [image] + ([label] if label else [])
    for group in range(table.num_row_groups):
        rows = _rows_at_once(table.metadata.row_group(group), path)
        for batch in table.iter_batches(batch_size=rows, row_groups=[group], columns=names):
            labels = batch.column(label).to_pylist() if label else [None] * batch.num_rows
            values = batch.column(image)
            for i, number in enumerate(labels):
                known = number if number is not None and number >= 0 else None
                yield EncodedImage(f"{path.name} row {row}", known, _reader(values[i].as_py()))
                row += 1


def _rows_at_once(group: Any, path: Path) -> int:
    """Return the number of rows of a row group to read at a time, of about 128 MiB at most.

    Each row of a column with a dictionary may be its largest value, which is at most the whole column. Raises DataError
    for a row group that unpacks to more than 1 GiB and 20 times its size.
    """
    weight = 1
    for number in range(group.num_columns):
        column = group.column(number)
        unpacked, packed = column.total_uncompressed_size, column.total_compressed_size
        if unpacked > max(_MAX_UNPACKED_BYTES, _MAX_RATIO * packed):
            raise DataError(
                f"{path}: a row group unpacks to {unpacked:,} bytes, {unpacked // max(1, packed)} times its size; "
                "encoded images do not, so it is not read"
            )
        rows = 1 if set(column.encodings) & set(_DICTIONARIES) else max(1, group.num_rows)
        weight = max(weight, column.total_uncompressed_size // rows)
    return max(1, min(_MAX_ROWS, _MAX_BATCH_BYTES // weight))


def _reader(value: Any) -> Callable[[], bytes]:
    def read() -> bytes:
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None:
            path = value.get("path") if isinstance(value, dict) else None
            raise ValueError(f"the row names the file {path} but holds no bytes" if path else "the row is empty")
        check_size(len(data), MAX_ENCODED_BYTES)
        return bytes(data)

    return read
