"""What an attempt has written for W&B, read back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record


def records(path: Path) -> Iterator[Record]:
    """All records of a .wandb file: LevelDB's log format, 7 bytes, then blocks of 32 KiB of records in pieces."""
    data, position, record = path.read_bytes(), 7, b""
    while position < len(data):
        if (rest := 32768 - position % 32768) < 7:
            position += rest
            continue
        size, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        record += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # the whole of one, or the last piece
            yield Record.FromString(record)
            record = b""
