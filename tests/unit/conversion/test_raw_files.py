"""Files that are read at random places."""

from __future__ import annotations

import os
import resource

from checkpoint_conversion.engine.raw_files import OpenFiles


def test_more_files_than_the_usual_limit_are_open_at_once(tmp_path):
    """The checkpoint of 512 ranks has 1,024 files, and the usual limit of open files is 1,024."""
    for number in range(8):
        (tmp_path / str(number)).write_bytes(bytes([number]))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = os.dup(0)  # the lowest number that is free
    os.close(used)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 4, limits[1]))
    try:
        with OpenFiles() as files:
            for number in range(8):
                data = memoryview(bytearray(1))
                files.read(tmp_path / str(number), 0, data, "a number")
                assert data[0] == number
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
