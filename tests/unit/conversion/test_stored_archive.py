"""Archives, against those of zipfile."""

from __future__ import annotations

import io
import zipfile

import torch

from checkpoint_conversion.engine.dtypes import BF16
from checkpoint_conversion.pickles.stored_archive import StoredArchive
from checkpoint_conversion.pickles.torch_pickle import tensor_pickle, write_archive

RECORDS = {"a/empty": [], "a/one": [b"text"], "a/parts": [b"x" * 70_000, memoryview(b"yz"), b""]}


class FrontToBack(io.RawIOBase):
    """A stream that cannot seek, as an archive in the middle of a file must be written."""

    def __init__(self) -> None:
        self.content = b""

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        self.content += bytes(data)
        return len(data)


def test_the_bytes_are_those_of_zipfile():
    stream, ours = FrontToBack(), bytearray()
    archive = StoredArchive(ours.extend)
    with zipfile.ZipFile(stream, "w") as expected:
        for name, parts in RECORDS.items():
            archive.add(name, parts)
            with expected.open(zipfile.ZipInfo(name), "w") as record:
                for part in parts:
                    record.write(part)
    archive.close()
    assert bytes(ours) == stream.content
    assert zipfile.ZipFile(io.BytesIO(ours)).testzip() is None


def test_torch_loads_a_tensor():
    values = torch.randn(3, 5).bfloat16()
    content = bytearray()
    raw = memoryview(values.view(torch.uint8).numpy().tobytes())
    write_archive(content.extend, tensor_pickle(BF16, (3, 5)), [raw[:7], raw[7:]])
    assert torch.equal(torch.load(io.BytesIO(content), weights_only=True), values)
