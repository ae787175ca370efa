"""Loss curves of one or more runs as a picture.

    $ python plot.py out-shakespeare-char
    $ python plot.py out-a out-b out-c/metrics.jsonl --x=tokens --to=loss.svg
    $ python plot.py out-* --curves=val --log=True --title="Four learning rates"

Arguments that are no --key=value are runs: their folders, or the metrics.jsonl in them. Prints
the path of the picture.
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
    to: str = ""  # the picture, .png or .svg; none means loss.png, in the run's folder if it is one
    x: Literal["steps", "tokens", "seconds"] = "steps"  # what the losses are drawn against
    curves: Literal["auto", "val", "train", "both"] = "auto"  # auto: both, of up to four runs
    smooth: PositiveInt = 1  # the batch loss is the mean of so many logged ones around each
    log: bool = False  # logarithmic loss axis
    title: str = ""  # above the picture


def main(argv):
    paths = [a for a in argv if not a.startswith("-") and (os.path.exists(a) or "=" not in a)]
    config = configure(PlotConfig, [argument for argument in argv if argument not in paths])
    if not paths:
        raise UserError("no run given; name a run's folder, as in: python plot.py out")
    picture_kind(config.to or "loss.png")  # before the work
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
