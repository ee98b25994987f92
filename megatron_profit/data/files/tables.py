"""Parquet and arrow files as batches of rows that are safe to convert to Python objects.

A file of a kilobyte may unpack to a terabyte: by a value of a dictionary that a million rows refer to, by a
run of nulls, or by a compressed buffer. And pyarrow does not check the offsets of an arrow file before it
follows them. So sizes and offsets are checked first, dictionaries stay dictionaries, and no portion is larger
than a record may be.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.compute
import pyarrow.ipc
import pyarrow.parquet
from pyarrow import types

from megatron_profit.data.errors import DataError, shown
from megatron_profit.data.files.bounded import BLOCK, LARGEST_RECORD, check_regular

# Whether the values of a column are wanted, by its name.
type Wanted = Callable[[str], bool]

_ROWS = 1024
# Entries of a column in a row group, with nulls and empty lists; each takes 12 bytes when it is read.
_MOST_ENTRIES = 2**26
# Bytes that are unpacked at once.
_UNPACKED = 2**30
# Approximate bytes of a Python object besides its content.
_OBJECT = 64
# Encodings of texts that pyarrow cannot read as dictionaries, see `parquet_batches`.
_DELTA = frozenset({"DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"})
# Parquet's types of values of any length.
_LONG = ("BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY")
_NESTED = (
    types.is_struct,
    types.is_map,
    types.is_list,
    types.is_large_list,
    types.is_fixed_size_list,
)
_LISTS = ((types.is_list, pyarrow.list_), (types.is_large_list, pyarrow.large_list))
_TEXTS = (
    (types.is_string, pyarrow.binary()),
    (types.is_large_string, pyarrow.large_binary()),
    (types.is_string_view, pyarrow.binary_view()),
)
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def parquet_batches(path: Path, wanted: Wanted) -> Iterator[pyarrow.RecordBatch]:
    """Yield the rows of a parquet file in batches.

    A column that is not wanted only says where it has a value, as True or null. It is read only where the
    file's statistics do not say that.

    Raises:
        DataError: It is no regular file, or a column has more entries than are read at once, or an encoding
            that is not read.
        pyarrow.ArrowException, OSError, ValueError: It is damaged, or cannot be read.
    """
    check_regular(path)
    with pyarrow.parquet.ParquetFile(path) as file:
        columns = [file.schema.column(index) for index in range(len(file.schema))]
        # As plain text, one value of a dictionary would be copied into every row that refers to it.
        texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
    with pyarrow.parquet.ParquetFile(
        path,
        read_dictionary=texts,
        page_checksum_verification=True,
        # Page by page, in place of whole row groups.
        pre_buffer=False,
        buffer_size=BLOCK,
    ) as file:
        _check_schema(path, file.schema_arrow, wanted)
        for group in range(file.num_row_groups):
            yield from _group_batches(path, file, group, wanted)


def _group_batches(
    path: Path, file: pyarrow.parquet.ParquetFile, group: int, wanted: Wanted
) -> Iterator[pyarrow.RecordBatch]:
    schema, metadata, numbers = file.schema_arrow, file.metadata.row_group(group), itertools.count()
    known: dict[str, bool] = {}
    rows_at_once = _ROWS
    for field in schema:
        leaves = [(kind, metadata.column(next(numbers))) for kind in _leaves(field.type)]
        filled = None if wanted(field.name) else _filled([column for _, column in leaves])
        if filled is None:
            rows_at_once = min(rows_at_once, _rows_at_once(path, leaves))
        else:
            known[field.name] = filled
    # At least one column, which gives the number of rows.
    read = [name for name in schema.names if name not in known] or schema.names[:1]
    for batch in file.iter_batches(rows_at_once, [group], read, use_threads=False):
        columns = [
            pyarrow.array([known[name] or None] * len(batch), pyarrow.bool_())
            if name in known
            else _told(batch.column(name), wanted(name))
            for name in schema.names
        ]
        yield _checked(columns, schema)


def _leaves(kind: pyarrow.DataType) -> Iterator[pyarrow.DataType]:
    """Yield the types of the columns in which parquet stores a column of a type, in its order."""
    if isinstance(kind, pyarrow.BaseExtensionType):
        yield from _leaves(kind.storage_type)
    elif types.is_nested(kind):
        for index in range(kind.num_fields):
            yield from _leaves(kind.field(index).type)
    else:
        yield kind


def _filled(columns: list[pyarrow.parquet.ColumnChunkMetaData]) -> bool | None:
    """Return whether a column has a value in every row of a row group (True) or in none (False).

    None if the statistics do not say.
    """
    nulls = [
        column.statistics.null_count
        if column.is_stats_set and column.statistics.has_null_count
        else None
        for column in columns
    ]
    if 0 in nulls:
        return True
    all_null = nulls == [column.num_values for column in columns]
    return False if all_null else None


def _rows_at_once(
    path: Path, leaves: list[tuple[pyarrow.DataType, pyarrow.parquet.ColumnChunkMetaData]]
) -> int:
    """Return how many rows of a column can be unpacked at once, by the sizes in the file's footer.

    Raises:
        DataError: It has more entries than are read at once, or an encoding that is not read.
    """
    dense = 1
    for kind, column in leaves:
        if column.physical_type == "BYTE_ARRAY" and (
            found := _DELTA.intersection(column.encodings)
        ):
            raise DataError(
                f"{path}: the column {shown(column.path_in_schema)} has the encoding {min(found)}, which is "
                "not read; write the file again without it, e.g. with to_parquet of pandas or datasets"
            )
        if column.num_values > _MOST_ENTRIES:
            raise DataError(
                f"{path}: the column {shown(column.path_in_schema)} has {column.num_values:,} "
                f"entries in one row group, more than {_MOST_ENTRIES:,}; write the file with smaller row "
                "groups, e.g. row_group_size=100_000"
            )
        # pyarrow cannot leave these packed.
        if column.physical_type in _LONG and not types.is_dictionary(kind):
            dense += column.total_uncompressed_size * column.has_dictionary_page
    return max(1, _UNPACKED // dense)


def _told(column: pyarrow.Array, wanted: bool) -> pyarrow.Array:
    """Return the column; for a column that is not wanted, whether it has a value in each row."""
    if wanted:
        return column
    filled = column.is_valid()
    if types.is_list(column.type) or types.is_large_list(column.type):  # an empty one is no value
        longer = pyarrow.compute.greater(pyarrow.compute.list_value_length(column), 0)
        filled = pyarrow.compute.and_kleene(filled, longer)
    return pyarrow.compute.if_else(filled, filled, pyarrow.scalar(None, pyarrow.bool_()))


def _check_schema(path: Path, schema: pyarrow.Schema, wanted: Wanted) -> None:
    """Refuse two columns of one name, and columns whose values are not read."""
    if twice := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        raise DataError(
            f"{path}: two columns are called {shown(twice[0])}; rename one or leave it out"
        )
    for field in schema:
        if wanted(field.name) and not _is_read(field.type):
            raise DataError(
                f"{path}: the column {shown(field.name)} has the type {shown(str(field.type))}, which is not "
                "read; write texts, numbers, lists or objects"
            )


def _is_read(kind: pyarrow.DataType) -> bool:
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _is_read(kind.storage_type)
    if types.is_dictionary(kind):
        return _is_read(kind.value_type)
    if types.is_nested(kind):
        children = (kind.field(index).type for index in range(kind.num_fields))
        return any(is_kind(kind) for is_kind in _NESTED) and all(map(_is_read, children))
    return True


def arrow_batches(path: Path, wanted: Wanted) -> Iterator[pyarrow.RecordBatch]:
    """Yield the rows of an arrow stream, as `datasets` writes it, in the file's own batches.

    A column that is not wanted only says where it has a value, as True or null.

    Raises:
        DataError: It is no regular file, is cut off, or unpacks to more than is read at once.
        pyarrow.ArrowException, OSError, ValueError: It is damaged, or cannot be read.
    """
    check_regular(path)
    with pyarrow.memory_map(str(path)) as source:
        _check_messages(path, source)
        source.seek(0)
        reader = pyarrow.ipc.open_stream(source)
        _check_schema(path, reader.schema, wanted)
        for batch in reader:
            batch.validate()  # that its buffers are as long as they must be
            columns = [_told(batch.column(name), wanted(name)) for name in batch.schema.names]
            yield _checked(columns, batch.schema)


def _check_messages(path: Path, source: pyarrow.NativeFile) -> None:
    """Check that a stream has its end, and the sizes that its compressed buffers claim to unpack to."""
    for message in pyarrow.ipc.MessageReader.open_stream(source):
        try:
            size = _unpacked_bytes(message)
        except struct.error as error:
            raise ValueError("a buffer lies outside of its batch") from error
        if size > _UNPACKED:
            raise DataError(
                f"{path}: a compressed batch says that it unpacks to {size:,} bytes, more than "
                f"{_UNPACKED:,}; write the file without compression, or in smaller batches"
            )
    end = source.tell()
    source.seek(max(0, end - len(_END_OF_STREAM)))
    if source.read(len(_END_OF_STREAM)) != _END_OF_STREAM:
        raise DataError(f"{path}: has no end, so its writer was stopped; write it again")


def _unpacked_bytes(message: pyarrow.ipc.Message) -> int:
    """Return the bytes that a message's compressed buffers claim to unpack to, 0 for other messages.

    The fields come from Arrow's Message.fbs: a batch of rows or of a dictionary, its buffers (offset and
    length each) and its compression. Each compressed buffer begins with its size, or with -1 if it is not
    compressed.
    """
    metadata = memoryview(message.metadata)
    (root,) = struct.unpack_from("<I", metadata)
    batch = _field(metadata, root, 2)
    if message.type == "dictionary":
        batch = _field(metadata, batch, 1)
    elif message.type != "record batch":
        return 0
    if _field(metadata, batch, 3) == 0:
        return 0
    buffers, body = _field(metadata, batch, 2), memoryview(message.body)
    (count,) = struct.unpack_from("<I", metadata, buffers)
    sizes = (
        struct.unpack_from("<q", body, offset)[0]
        for offset, length in struct.iter_unpack(
            "<qq", metadata[buffers + 4 : buffers + 4 + 16 * count]
        )
        if length >= 8
    )
    return sum(size for size in sizes if size > 0)


def _field(metadata: memoryview, table: int, number: int) -> int:
    """Return the place of a field in a flatbuffers table; 0 if the table has none."""
    (back,) = struct.unpack_from("<i", metadata, table)
    vtable = table - back
    (size,) = struct.unpack_from("<H", metadata, vtable)
    entry = 4 + 2 * number
    (offset,) = struct.unpack_from("<H", metadata, vtable + entry) if entry < size else (0,)
    if offset == 0:
        return 0
    return table + offset + struct.unpack_from("<I", metadata, table + offset)[0]


def _mapped(
    kind: pyarrow.DataType, change: Callable[[pyarrow.DataType], pyarrow.DataType]
) -> pyarrow.DataType:
    """Return a type with its leaves changed."""
    if types.is_struct(kind):
        return pyarrow.struct([field.with_type(_mapped(field.type, change)) for field in kind])
    if types.is_map(kind):
        return pyarrow.map_(
            kind.key_field.with_type(_mapped(kind.key_type, change)),
            kind.item_field.with_type(_mapped(kind.item_type, change)),
        )
    for is_list, make in _LISTS:
        if is_list(kind):
            return make(kind.value_field.with_type(_mapped(kind.value_type, change)))
    if types.is_fixed_size_list(kind):
        items = kind.value_field.with_type(_mapped(kind.value_type, change))
        return pyarrow.list_(items, kind.list_size)
    return change(kind)


def _as_bytes(kind: pyarrow.DataType) -> pyarrow.DataType:
    """Return a leaf without constraints on its values.

    Texts and dates are checked when they are converted.
    """
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _mapped(kind.storage_type, _as_bytes)
    if types.is_dictionary(kind):
        return pyarrow.dictionary(kind.index_type, _mapped(kind.value_type, _as_bytes))
    if types.is_temporal(kind) or types.is_decimal(kind):
        return pyarrow.binary(kind.bit_width // 8)
    return next((plain for is_text, plain in _TEXTS if is_text(kind)), kind)


def _unpacked(kind: pyarrow.DataType) -> pyarrow.DataType:
    """Return the type of a dictionary's values; for nulls another type, as casts give them a wrong length."""
    if types.is_null(kind):
        return pyarrow.bool_()
    return _mapped(kind.value_type, _unpacked) if types.is_dictionary(kind) else kind


def _checked(columns: Sequence[pyarrow.Array], schema: pyarrow.Schema) -> pyarrow.RecordBatch:
    """Return `_batch` of columns that are safe to read.

    Raises:
        pyarrow.ArrowInvalid: An offset or an index points outside of a column.
    """
    for column in columns:
        column.validate()
        _check_values(column)
    return _batch(columns, schema)


def _check_values(array: pyarrow.Array) -> None:
    """Check everything that an array's values refer to; its buffers have been found long enough.

    A view of a whole array would do, if pyarrow did not give nulls within lists a wrong length in it.

    Raises:
        pyarrow.ArrowInvalid: An offset or an index points outside of it.
    """
    kind = array.type
    if isinstance(kind, pyarrow.BaseExtensionType):
        _check_values(array.storage)
    elif types.is_struct(kind):
        for index in range(kind.num_fields):
            _check_values(array.field(index))
    elif types.is_fixed_size_list(kind):
        _check_values(array.values)
    elif types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        parts = (array.keys, array.items) if types.is_map(kind) else (array.values,)
        ends = array.offsets.to_numpy()
        if len(array) and (ends[0] < 0 or ends[-1] > len(parts[0]) or (ends[1:] < ends[:-1]).any()):
            raise pyarrow.ArrowInvalid("the offset of a list points outside of its values")
        for part in parts:
            _check_values(part)
    else:
        array.view(_as_bytes(kind)).validate(full=True)


def _batch(columns: Sequence[pyarrow.Array], schema: pyarrow.Schema) -> pyarrow.RecordBatch:
    """Return a batch of other columns, with the names and metadata of a schema."""
    fields = [field.with_type(column.type) for field, column in zip(schema, columns, strict=True)]
    return pyarrow.RecordBatch.from_arrays(
        columns, schema=pyarrow.schema(fields, metadata=schema.metadata)
    )


def portions(batch: pyarrow.RecordBatch) -> Iterator[tuple[pyarrow.RecordBatch, list[int]]]:
    """Yield the parts of a batch, each with the bytes of its rows.

    A part takes up to `LARGEST_RECORD` bytes as Python objects. A row that takes more comes alone, and as it
    is; the dictionaries of others are unpacked.
    """
    for start in range(0, len(batch), _ROWS):
        rows = batch.slice(start, _ROWS)
        sizes = np.zeros(len(rows), np.int64) + sum(map(_row_bytes, rows.columns))
        begin = 0
        while begin < len(rows):
            fitting = np.searchsorted(np.cumsum(sizes[begin:]), LARGEST_RECORD, side="right")
            end = begin + max(int(fitting), 1)
            part = rows.slice(begin, end - begin)
            yield _unpack(part) if fitting else part, sizes[begin:end].tolist()
            begin = end


def _unpack(rows: pyarrow.RecordBatch) -> pyarrow.RecordBatch:
    """Return the rows with the values of their dictionaries."""
    kinds = [_mapped(column.type, _unpacked) for column in rows.columns]
    columns = [
        column if column.type == kind else column.cast(kind)
        for column, kind in zip(rows.columns, kinds, strict=True)
    ]
    return _batch(columns, rows.schema)


def _row_bytes(array: pyarrow.Array) -> npt.NDArray[np.int64] | int:
    """Return [N] the approximate bytes of each value as a Python object; one number if all take the same."""
    kind = array.type
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _row_bytes(array.storage)
    if types.is_dictionary(kind):
        values = np.full(len(array.dictionary) + 1, _OBJECT)  # the last one for null
        values[:-1] = _row_bytes(array.dictionary)
        return values[array.indices.fill_null(len(array.dictionary)).to_numpy(zero_copy_only=False)]
    if types.is_struct(kind):
        return _OBJECT + sum(_row_bytes(array.field(index)) for index in range(kind.num_fields))
    if types.is_fixed_size_list(kind):
        starts = (array.offset + np.arange(len(array))) * kind.list_size
        return _list_bytes(starts, starts + kind.list_size, array.values)
    if types.is_map(kind):
        ends = array.offsets.to_numpy()
        pairs = (_list_bytes(ends[:-1], ends[1:], part) for part in (array.keys, array.items))
        return sum(pairs)
    if types.is_list(kind) or types.is_large_list(kind):
        ends = array.offsets.to_numpy()
        return _list_bytes(ends[:-1], ends[1:], array.values)
    if types.is_string_view(kind) or types.is_binary_view(kind):
        # A view is four numbers, of which the first is the length.
        views = np.frombuffer(array.buffers()[1], np.int32)[4 * array.offset :][: 4 * len(array)]
        filled = array.is_valid().to_numpy(zero_copy_only=False)
        return views[::4].astype(np.int64) * filled + _OBJECT
    if (
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_binary(kind)
        or types.is_large_binary(kind)
    ):
        lengths = pyarrow.compute.binary_length(array).fill_null(0).to_numpy()
        return lengths.astype(np.int64) + _OBJECT
    return _OBJECT + (kind.bit_width // 8 if types.is_fixed_size_binary(kind) else 0)


def _list_bytes(
    starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64], values: pyarrow.Array
) -> npt.NDArray[np.int64]:
    """Return [N] the bytes of lists that hold the ranges [start, end) of `values`."""
    starts, ends = starts.astype(np.int64), ends.astype(np.int64)
    first, last = (int(starts[0]), int(ends[-1])) if len(starts) else (0, 0)
    each = _row_bytes(values.slice(first, last - first))
    if isinstance(each, int):
        return (ends - starts) * each + _OBJECT
    sums = np.concatenate([[0], np.cumsum(each)])
    return sums[ends - first] - sums[starts - first] + _OBJECT
