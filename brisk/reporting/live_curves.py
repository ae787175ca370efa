"""Loss curves of the runs in a folder, drawn anew when a run has grown."""

import tempfile
import threading
from functools import lru_cache
from pathlib import Path

from brisk.errors import UserError
from brisk.reporting.curves import draw, read_runs, save

DRAWING = threading.Lock()  # matplotlib's settings are the process's


def list_runs(folder):
    """{name: when it was last written to} of the runs in `folder`, those with metrics."""
    runs = {}
    for path in sorted(Path(folder).iterdir()):
        try:
            runs[path.name] = (path / "metrics.jsonl").stat().st_mtime_ns
        except OSError:  # no run, or gone meanwhile
            continue
    return runs


@lru_cache(maxsize=16)
def draw_runs(folder, stamps):
    """The loss curves (see `curves.draw`) of runs in `folder` as the bytes of an SVG picture.

    Args:
        stamps: a tuple of items of `list_runs`: the picture is remembered as long as they are the
            same.

    Raises `UserError` for runs without losses, or without matplotlib.
    """
    runs = read_runs([Path(folder, name) for name, _ in stamps])
    with DRAWING, tempfile.TemporaryDirectory() as scratch:
        picture = Path(scratch, "loss.svg")
        try:
            save(draw(runs), picture)
        except ImportError as error:
            raise UserError("no loss curves: matplotlib is not installed") from error
        return picture.read_bytes()
