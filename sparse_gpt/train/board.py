"""Points for TensorBoard, one file a start.

Written as they come: TensorBoard's own writer, and torch's, have a thread, whose failure on a full
disk shows as a traceback, and later as an error anywhere.
"""

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Board:
    """An event file in `folder`; what earlier starts drew after `step` is hidden by it.

    After an `OSError` only `close` may be called: a reader takes nothing behind half a record.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._events: Any = event_pb2
        self._summaries: Any = summary_pb2
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(folder / name, "xb")  # noqa: SIM115 - closed in close()
        self._records = RecordWriter(self._file)
        started = self._events.SessionLog(status=self._events.SessionLog.START)
        self._add(step + 1, file_version="brain.Event:2")
        self._add(step + 1, session_log=started)

    def add(self, numbers: Mapping[str, float], step: int) -> None:
        """One point each."""
        summary = self._summaries.Summary()
        for tag, number in numbers.items():
            summary.value.add(tag=tag, simple_value=float(number))
        self._add(step, summary=summary)

    def _add(self, step: int, **what: Any) -> None:
        event = self._events.Event(wall_time=time.time(), step=step, **what)
        self._records.write(event.SerializeToString())
        self._file.flush()

    def close(self) -> None:
        """End the file; nothing was held back."""
        self._file.close()
