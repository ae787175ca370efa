"""Plot the loss curves of one or more runs.

    $ python plot.py out-shakespeare-char
    $ python plot.py out-a out-b out-c/metrics.jsonl --x=tokens --to=loss.svg
    $ python plot.py out-* --curves=val --log=True --title="Four learning rates"

Arguments other than --key=value are runs: their folders, or the metrics.jsonl in them. Prints the
path of the picture.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from brisk.errors import UserError, one_line_errors
from brisk.reporting.curves import draw, picture_kind, read_runs, save
from configurator import PositiveInt, configure


@dataclass(frozen=True)
class PlotConfig:
    to: str = ""  # picture to write, .png or .svg; if empty, loss.png, for one run in its folder
    x: Literal["steps", "tokens", "seconds"] = "steps"  # quantity on the horizontal axis
    curves: Literal["auto", "val", "train", "both"] = "auto"  # auto: both for up to four runs
    smooth: PositiveInt = 1  # smooth the batch loss over this many logged values
    log: bool = False  # logarithmic loss axis
    title: str = ""  # title of the picture


def main(argv):
    paths = [a for a in argv if not a.startswith("-") and (os.path.exists(a) or "=" not in a)]
    config = configure(PlotConfig, [argument for argument in argv if argument not in paths])
    if not paths:
        raise UserError("no run given; name the folder of a run, as in: python plot.py out")
    picture_kind(config.to or "loss.png")  # raises for an unknown suffix, before the work
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError("matplotlib is not installed (pip install matplotlib)") from error
    runs = read_runs(paths)
    figure = draw(runs, config.x, config.curves, config.smooth, config.log, config.title)
    folder = runs[0].path if len(runs) == 1 and runs[0].path.is_dir() else Path()
    to = Path(config.to or folder / "loss.png")
    save(figure, to, say=notice)
    print(to)


def notice(text):
    print(text, file=sys.stderr)


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
