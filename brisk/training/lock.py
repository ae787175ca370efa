"""A file lock: one run in a folder at a time."""

import errno
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from brisk.errors import UserError

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP)  # a network file system without locks


class FolderLock:
    """A lock on a run's folder, which the operating system releases when the process ends in any
    way. Reading the folder does not need it."""

    def __init__(self, folder, ranks):
        self.ranks = ranks
        self.path = Path(folder, ".lock")
        self.note = Path(folder, ".running")  # names the owner, for the error message
        self.lock = self.stat = None  # the lock, and the stat of its file when acquired

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.release()

    def acquire(self, create=False):
        """Lock the folder if it exists, or create it first with `create`. Call it on all ranks;
        rank 0 holds the lock. Acquiring it twice is harmless.

        Raises `UserError` if another run holds the lock or the folder is not writable.
        """
        refusal = self.ranks.broadcast(self.try_acquire(create) if self.ranks.is_main else None)
        if refusal:
            raise UserError(refusal)

    def try_acquire(self, create):
        """Acquire the lock, or return the reason why not in one line."""
        from filelock import FileLock, Timeout  # not needed by a run that writes nothing

        folder = self.path.parent
        try:
            if create:
                folder.mkdir(parents=True, exist_ok=True)
            if self.lock or not folder.is_dir():
                return None
            lock = FileLock(self.path)
            lock.acquire(blocking=False)
        except Timeout:
            return f"another run is in {folder}: {self.owner()}; use another --out_dir"
        except ValueError as error:  # an invalid path
            return f"--out_dir={folder}: {error}"
        except OSError as error:
            if error.errno not in NO_LOCKS:
                return f"cannot write to the folder --out_dir={folder}: {error.strerror or error}"
            return None
        self.lock, self.stat = lock, os.stat(self.path)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        with suppress(OSError):  # a full disk: the lock works without the note
            self.note.write_text(f"process {os.getpid()} on {socket.gethostname()}, since {now}")
        return None

    def is_held(self):
        """Whether the lock, if acquired, is still effective: not if its file was removed or
        replaced."""
        try:
            return not self.lock or os.path.samestat(os.stat(self.path), self.stat)
        except OSError:
            return False

    def owner(self):
        try:
            return self.note.read_text()
        except OSError:  # it has just started or ended
            return "an unknown process"

    def release(self):
        if self.lock:
            with suppress(OSError):  # the folder was removed
                self.note.unlink(missing_ok=True)
            self.lock.release()  # the file stays: a lock on a removed file excludes nobody
            self.lock = None
