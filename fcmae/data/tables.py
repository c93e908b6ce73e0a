"""Images in tables with a column of their bytes: Parquet files, and Arrow files as Hugging Face's datasets saves them.

In an Arrow file an image is a range of bytes; of a Parquet file the row group around it is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import lru_cache, partial
from importlib.util import find_spec
from threading import Semaphore
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcmae.data.storage import AT_ONCE, Storage, is_remote

PARQUET, ARROW = ".parquet", ".arrow"
LABELS = ("label", "labels", "cls", "class")  # columns, the first that there is
WHOLE_AT_ONCE = Semaphore(4)  # Arrow files from afar, of half a gigabyte each, that threads hold in memory
MAX_GROUP = 1 << 30  # bytes of images that are read for one
EMPTY = -5  # in place of a size


def can_read() -> bool:
    """Whether what reads tables is installed."""
    return find_spec("pyarrow") is not None


def scan(storage: Storage, address: str) -> tuple[NDArray[np.int64], NDArray[np.int64], list[str]]:
    """Where each image of a table is.

    Args:
        storage: that reads it.
        address: of the table.

    Returns:
        Of an Arrow file (N,) int64 first bytes and sizes; of Parquet row groups and rows in them; EMPTY where a row has
        no bytes. And labels, empty where there is none. Of a table without a column of images, none.

    Raises:
        ValueError: if it cannot be read this way.
        OSError: if it cannot be read.
    """
    if not can_read():
        raise ValueError("tables need pyarrow: pip install 'fcmae[parquet]'")
    import pyarrow as pa

    try:
        parts = list(_parquet(storage, address) if address.endswith(PARQUET) else _arrow(storage, address))
    except pa.ArrowException as error:
        raise ValueError(str(error)) from error
    none = np.zeros(0, np.int64)
    starts, sizes = (np.concatenate([none, *(part[i] for part in parts)]) for i in range(2))
    return starts, sizes, [label for part in parts for label in part[2]]


def _arrow(storage: Storage, address: str) -> Iterable[tuple[Any, Any, list[str]]]:
    import pyarrow as pa

    if is_remote(address):
        with WHOLE_AT_ONCE, storage.open(address) as file:
            whole = pa.py_buffer(b"".join(iter(partial(file.read, AT_ONCE), b"")))
    else:
        with pa.memory_map(address) as file:
            whole = file.read_buffer()
    try:
        batches: Iterable[Any] = pa.ipc.open_stream(whole)
    except pa.ArrowInvalid:
        reader = pa.ipc.open_file(whole)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
    for batch in batches:
        batch.validate(full=True)  # nothing else compares offsets with what there is
        if (column := _image_column(batch.schema)) is None:
            return
        images, is_empty = _bytes(batch.column(column))
        if pa.types.is_binary(images.type):
            width = np.int32
        elif pa.types.is_large_binary(images.type):
            width = np.int64
        else:
            raise ValueError(f"its images are of type {images.type}, and not binary")
        _, offsets, content = images.buffers()
        begin = content.address - whole.address if content is not None and content.size else 0
        if not 0 <= begin <= whole.size:
            raise ValueError("it is compressed, so that no image can be read alone: save it with save_to_disk")
        ends = np.frombuffer(offsets, width)[images.offset : images.offset + len(images) + 1].astype(np.int64)
        yield ends[:-1] + begin, np.where(is_empty, EMPTY, np.diff(ends)), _labels(batch)


def _parquet(storage: Storage, address: str) -> Iterable[tuple[Any, Any, list[str]]]:
    import pyarrow.parquet as pq

    with storage.open(address) as file, pq.ParquetFile(file) as table:
        if (column := _image_column(table.schema_arrow)) is None:
            return
        for number in range(table.num_row_groups):
            group = table.metadata.row_group(number)
            parts = [group.column(i) for i in range(group.num_columns)]
            if sum(p.total_uncompressed_size for p in parts if p.path_in_schema.split(".")[0] == column) > MAX_GROUP:
                raise ValueError("a row group has more than a gigabyte of images: write it with row_group_size=100")
            label = [name for name in LABELS if name in table.schema_arrow.names][:1]
            labels = _labels(table.read_row_group(number, columns=label)) if label else [""] * group.num_rows
            yield np.full(group.num_rows, number), np.arange(group.num_rows), labels


def read_row(storage: Storage, address: str, stamp: str, group: int, row: int) -> bytes:
    """The image of a row of a Parquet file.

    Args:
        storage: that reads it.
        address: of the file.
        stamp: of the file, which another one of its name does not have.
        group: number of the row group.
        row: number of the row within it.

    Raises:
        OSError: if there is none.
    """
    import pyarrow as pa

    try:
        content = _group(storage, address, stamp, group)[row].as_py()
    except (pa.ArrowException, IndexError) as error:
        raise OSError(f"{address} has changed since its index was made") from error
    if content is None:
        raise OSError("its row has no bytes of an image")
    return bytes(content)


@lru_cache(maxsize=2)  # in file order the next image is in the same group
def _group(storage: Storage, address: str, _stamp: str, group: int) -> Any:
    import pyarrow.parquet as pq

    with storage.open(address, cached=True) as file, pq.ParquetFile(file) as table:
        column = _image_column(table.schema_arrow)
        return _bytes(table.read_row_group(group, columns=[column]).column(0).combine_chunks())[0]


def _image_column(schema: Any) -> str | None:
    """The first column of bytes, or of structs with bytes."""
    import pyarrow as pa

    def is_bytes(kind: Any) -> bool:
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    for field in (field for field in schema if field.name not in LABELS):
        inner = field.type.field("bytes").type if pa.types.is_struct(field.type) and _has_bytes(field.type) else None
        if is_bytes(field.type) or (inner is not None and is_bytes(inner)):
            return str(field.name)
    return None


def _has_bytes(kind: Any) -> bool:
    return bool(kind.get_field_index("bytes") >= 0)


def _bytes(column: Any) -> tuple[Any, NDArray[np.bool_]]:
    """The bytes of a column's images, and where there are none."""
    import pyarrow as pa

    images = column.field("bytes") if pa.types.is_struct(column.type) else column
    is_empty = images.is_null().to_numpy(zero_copy_only=False) | column.is_null().to_numpy(zero_copy_only=False)
    return images, is_empty


def _labels(table: Any) -> list[str]:
    """As text: by the names that datasets keeps of its classes, if there are any."""
    name = next((name for name in LABELS if name in table.schema.names), None)
    if name is None:
        return [""] * int(table.num_rows)
    entry: Any = None
    if metadata := (table.schema.metadata or {}).get(b"huggingface"):
        entry = json.loads(metadata)
    for key in ("info", "features", name, "names"):
        entry = entry.get(key) if isinstance(entry, dict) else None
    classes = entry if isinstance(entry, list) else None

    def text(value: Any) -> str:
        if value is None or (classes and value == -1):  # as datasets writes what is not known
            return ""
        if isinstance(value, bytes):  # of writers that name no text
            return value.decode("utf-8", "replace")
        return str(classes[value]) if classes and isinstance(value, int) and 0 <= value < len(classes) else str(value)

    return list(map(text, table.column(name).to_pylist()))
