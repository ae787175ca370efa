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
            path.name.encode()
            runs[path.name] = (path / "metrics.jsonl").stat().st_mtime_ns
        except (
            OSError,
            UnicodeEncodeError,
        ):  # not a run, removed, or a name that is not valid UTF-8
            continue
    return runs


def draw_runs(folder, names):
    """The loss curves (see `curves.draw`) of 1 to 8 runs in `folder` as the bytes of an SVG
    picture, which is remembered as long as none of them has grown.

    Raises `UserError` for names that are not in `list_runs`, for runs without losses, and without
    matplotlib.
    """
    known = list_runs(folder)
    if not 1 <= len(names) <= 8 or not known.keys() >= {*names}:
        raise UserError("/runs lists the runs; up to 8 are drawn")
    return draw_stamped(folder, tuple((name, known[name]) for name in names))


@lru_cache(maxsize=16)
def draw_stamped(folder, stamps):
    """`draw_runs` for items of `list_runs`."""
    runs = read_runs([Path(folder, name) for name, _ in stamps])
    with DRAWING, tempfile.TemporaryDirectory() as scratch:
        picture = Path(scratch, "loss.svg")
        try:
            save(draw(runs), picture)
        except ImportError as error:
            raise UserError("no loss curves: matplotlib is not installed") from error
        return picture.read_bytes()
