"""One run in a folder at a time."""

import errno
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from brisk.errors import UserError

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP)  # of a network file system without them


class FolderLock:
    """A lock on a run's folder. The operating system holds it, and takes it back when the process
    dies, however it dies. Who only reads the folder does not need it."""

    def __init__(self, folder, ranks):
        self.ranks = ranks
        self.path = Path(folder, ".lock")
        self.note = Path(folder, ".running")  # who has it, for the one who is refused
        self.lock = self.stat = None  # the lock, and its file when it was taken

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.give_back()

    def take(self, make=False):
        """Take the folder if it is there, or with `make` in any case; once more does no harm. All
        processes call it, the main one does it.

        Raises `UserError` where another run has it, or nothing can be written there.
        """
        refusal = self.ranks.broadcast(self.try_to(make) if self.ranks.is_main else None)
        if refusal:
            raise UserError(refusal)

    def try_to(self, make):
        """Take it, or return in a line why not."""
        from filelock import FileLock, Timeout  # not needed by a run that writes nothing

        folder = self.path.parent
        try:
            if make:
                folder.mkdir(parents=True, exist_ok=True)
            if self.lock or not folder.is_dir():
                return None
            lock = FileLock(self.path)
            lock.acquire(blocking=False)
        except Timeout:
            return f"another run is in {folder}: {self.holder()}; name another --out_dir"
        except ValueError as error:  # what is no path at all
            return f"--out_dir={folder}: {error}"
        except OSError as error:
            if error.errno not in NO_LOCKS:
                return f"cannot write to the folder --out_dir={folder}: {error.strerror or error}"
            return None
        self.lock, self.stat = lock, os.stat(self.path)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        with suppress(OSError):  # a full disk: the lock holds without the note
            self.note.write_text(f"process {os.getpid()} on {socket.gethostname()}, since {now}")
        return None

    def is_held(self):
        """Whether the lock, if it was taken, still keeps others out: on a file that was removed or
        replaced it does not."""
        try:
            return not self.lock or os.path.samestat(os.stat(self.path), self.stat)
        except OSError:
            return False

    def holder(self):
        try:
            return self.note.read_text()
        except OSError:  # it has just come, or just left
            return "a process that has not said which"

    def give_back(self):
        if self.lock:
            with suppress(OSError):  # a folder that is gone
                self.note.unlink(missing_ok=True)
            self.lock.release()  # its file stays: one that waits at a removed file holds nothing
            self.lock = None
