"""One run per output folder: a lock file that names its holder (pid, host, boot id) and dies with it.

The kernel's lock (flock) says whether the holder lives, over restarts of containers and reused pids; the file's
content says who it is. Only a holder on another machine cannot be asked: its lock stands until somebody removes the
file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from pathlib import Path
from types import TracebackType

from alpaca_lora.errors import MachineError, UserError

NAME = ".lock"
_NO_FOLDER = (errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG)  # a file is in the way, or no folder can have the name


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux: the host alone has to tell
        return ""


class RunLock:
    """A context that holds ``folder``; UserError naming the live holder if there is one, takes over what a dead one
    left.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.taken_over: dict[str, object] | None = None  # the dead holder's record
        self._descriptor: int | None = None
        self._made_folder = False

    def __enter__(self) -> RunLock:
        try:
            self._made_folder = not self.path.parent.exists()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = self._lock()
        except OSError as error:
            if error.errno in _NO_FOLDER:
                what = f"cannot be a folder: {error.strerror}"
                raise UserError(what, file=self.path.parent, field="output_dir", fix="choose another name") from error
            raise MachineError(
                f"cannot write here: {error.strerror}",
                file=self.path,
                field="output_dir",
                fix="choose a folder you may write to",
            ) from error
        self.taken_over = self._read(self._descriptor)
        if self.taken_over is not None and self._is_elsewhere(self.taken_over):
            holder = self.taken_over
            os.close(self._descriptor)
            self._descriptor = None
            raise UserError(
                f"{self.path.parent} is in use by {_holder(holder)}", field="output_dir",
                fix=f"choose another folder, or remove {self.path} if that machine is no longer at it",
            )  # fmt: skip
        os.ftruncate(self._descriptor, 0)
        record = {"pid": os.getpid(), "host": socket.gethostname(), "boot_id": _boot_id()}
        os.pwrite(self._descriptor, json.dumps(record).encode(), 0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            with contextlib.suppress(FileNotFoundError):  # somebody removed the folder under us
                self.path.unlink()
            os.close(self._descriptor)
            self._descriptor = None
            if self._made_folder:  # a run that was refused leaves nothing behind
                with contextlib.suppress(OSError):  # it holds a run's files now
                    self.path.parent.rmdir()

    def _lock(self) -> int:
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = self._read(descriptor) or {}
                os.close(descriptor)
                raise UserError(
                    f"{self.path.parent} is in use by {_holder(holder)}", field="output_dir",
                    fix="wait for it, stop it, or choose another folder",
                ) from None  # fmt: skip
            # the holder before us may have removed the file between our open and our lock
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(descriptor).st_ino == os.stat(self.path).st_ino:
                    return descriptor
            os.close(descriptor)

    @staticmethod
    def _read(descriptor: int) -> dict[str, object] | None:
        try:
            record = json.loads(os.pread(descriptor, 4096, 0))
        except ValueError:  # empty: just made, or its writer died before it wrote
            return None
        return record if isinstance(record, dict) else None

    @staticmethod
    def _is_elsewhere(holder: dict[str, object]) -> bool:
        return holder.get("host") != socket.gethostname() and holder.get("boot_id") != _boot_id()


def _holder(record: dict[str, object]) -> str:
    return f"a live run (pid {record.get('pid', 'unknown')}, host {record.get('host', 'unknown')})"
