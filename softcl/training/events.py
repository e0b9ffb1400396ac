"""TensorBoard event files, written in the caller's thread so that a full disk is reported there."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path


class EventFile:
    """One new event file with scalars.

    Args:
        folder: where ``events.out.tfevents.*`` is made.
        purge_step: TensorBoard hides what older files of the folder say from this step on.

    Raises:
        OSError: as the file system gave it, naming the file.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        now = time.time()
        # TensorBoard reads the files of a folder in the order of their names.
        stem = f"events.out.tfevents.{int(now)}.{socket.gethostname()}.{os.getpid()}"
        number = sum(1 for _ in folder.glob(f"{stem}.*"))
        self._path = folder / f"{stem}.{number}"
        self._file = open(self._path, "xb")
        self._records = RecordWriter(self._file)
        self._write(Event(wall_time=now, file_version="brain.Event:2"))
        if purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._write(Event(wall_time=now, step=purge_step, session_log=start))

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def _write(self, event: object) -> None:
        try:
            self._records.write(event.SerializeToString())
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def close(self) -> None:
        # After a failed write the buffer still holds bytes, which the disk refuses again.
        try:
            self._file.close()
        except OSError:
            pass
