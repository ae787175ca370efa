"""Loss curves of runs, as a picture: what `metrics.jsonl` holds, drawn to be read in a page.

    runs = read_runs(["out-a", "out-b"])
    save(draw(runs, x="tokens"), "loss.png")

matplotlib is loaded when something is drawn, and its `Figure` used without `pyplot`: no display,
no window and no state are involved.
"""

import io
import json
import logging
import math
import warnings
from pathlib import Path

import numpy as np

from brisk.errors import UserError
from brisk.reporting.fonts import fonts_for

# Dark enough to be read as text on white; ordered so that neighbours differ in lightness too.
COLORS = ("#1f5fa8", "#d1493f", "#2f8f57", "#d9861f", "#7a4fa3")
COLORS += ("#1898a8", "#8a5a3c", "#c6539b", "#6c7683", "#8f8b1e")
INK, FAINT = "#33383f", "#7d848d"
MANY = 4  # with more runs than these, `auto` leaves out the training curves


class RunCurves:
    """The numbers of one run, by key, as `metrics.jsonl` has them."""

    def __init__(self, path, lines):
        self.path, self.lines = Path(path), lines
        self.name = self.path.resolve().name  # of the folder; `read_runs` tells like ones apart

    def curve(self, key, x="step"):
        """Two arrays: `x` (step, tokens or seconds) and `key` of the lines that have both, in
        order; a value that is infinite or not a number is a gap (NaN)."""
        found = [(line[x], line[key]) for line in self.lines if is_number(line, x, key)]
        found = np.array(sorted(found, key=lambda point: point[0]), dtype=float).reshape(-1, 2)
        found = found[np.isfinite(found[:, 0])]
        return found[:, 0], np.where(np.isfinite(found[:, 1]), found[:, 1], np.nan)

    def best(self, x="step"):
        """(x, loss) of the lowest validation loss, None where there is none."""
        at, losses = self.curve("val_loss", x)
        if np.isnan(losses).all():
            return None
        lowest = np.nanargmin(losses)
        return at[lowest], losses[lowest]


def is_number(line, *keys):
    return all(type(line.get(key)) in (int, float) for key in keys)


def read_run(path):
    """The curves of a run: its folder, or the metrics.jsonl in it. Broken lines, such as the last
    one of a run that was killed, are skipped. Raises `UserError` where there are no losses."""
    path = Path(path)
    file = path / "metrics.jsonl" if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError) as error:  # ValueError: what is no path at all
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the run {file}: {reason}") from error
    lines = []
    for line in text.split("\n"):
        try:
            lines.append(json.loads(line, parse_int=float))  # one of 400 digits is infinite
        except (ValueError, RecursionError):
            continue
    lines = [line for line in lines if isinstance(line, dict) and is_number(line, "step")]
    run = RunCurves(file.parent if file.name == "metrics.jsonl" else file, lines)
    if not any(np.isfinite(run.curve(key)[1]).any() for key in ("loss", "train_loss", "val_loss")):
        raise UserError(f"{file} holds no losses to draw")
    return run


def read_runs(paths):
    """The runs in `paths`, each once, with `name`s as short as tells them apart."""
    runs = {}
    for path in paths:
        run = read_run(path)
        runs.setdefault(run.path.resolve(), run)
    for path, run in runs.items():
        others = [other for other in runs if other != path]
        depth = 1
        while any(other.parts[-depth:] == path.parts[-depth:] for other in others):
            depth += 1
        run.name = "/".join(path.parts[-depth:])
    return list(runs.values())


def draw(runs, x="steps", curves="auto", smooth=1, log=False, title="", say=print):
    """A matplotlib `Figure` with the losses of `runs` (nats a token).

    A run has one colour: its validation loss a solid line, the training loss estimated at the
    same time a dashed one, the loss of the training batches a thin one. A ring marks the lowest
    validation loss, which stands beside the run's name at the right.

    The frame ends at 1.2 times the highest loss that a curve begins with, at most: a run that
    explodes leaves it instead of flattening the others.

    Args:
        x: "steps", "tokens" or "seconds" (shown in a unit that fits).
        curves: "val", "train", "both", or "auto": both, of up to `MANY` runs.
        smooth: each point of the batch loss is the mean of the `smooth` logged ones around it
            (fewer at the ends).
        log: whether the loss axis is logarithmic.
        say: called with a line where no font has a character of a name or the title.

    Raises `UserError` where the runs hold nothing of what is asked for.
    """
    from matplotlib.figure import Figure

    if curves == "auto":
        curves = "both" if len(runs) <= MANY or not any(run.best() for run in runs) else "val"
    column = "step" if x == "steps" else x
    wanted = ["loss", "train_loss"] if curves != "val" else []
    wanted += ["val_loss"] if curves != "train" else []
    points = {(run, key): run.curve(key, column) for run in runs for key in wanted}
    points = {which: (at, y) for which, (at, y) in points.items() if np.isfinite(y).any()}
    if log:
        points = {which: (at, np.where(y > 0, y, np.nan)) for which, (at, y) in points.items()}
    if not points:
        kind = {"val": "validation ", "train": "training "}.get(curves, "")
        raise UserError(f"no {kind}losses by {x} in {', '.join(run.name for run in runs)}")
    unit, unit_name = time_unit(points) if x == "seconds" else (1, x)
    points = {which: (at / unit, y) for which, (at, y) in points.items()}
    for (_, key), (_, y) in points.items():
        y[:] = smoothed(y, smooth) if key == "loss" else y

    texts, title = [as_text(name) for name in elided([run.name for run in runs])], as_text(title)
    families, lacking = fonts_for("".join(texts) + title)
    if lacking:
        say(f"no font here has {' '.join(sorted(lacking)[:10])}: install one, Noto Sans CJK say")

    height = max(4.2, 0.42 * len(runs))  # inches
    figure = Figure(figsize=(8.4, height + 1), dpi=160, facecolor="white")
    axes = figure.add_axes((0.09, 0.62 / (height + 1), 0.66, height / (height + 1)))
    set_frame(axes, points, log)
    colors = run_colors(len(runs))
    styles = {
        "loss": {"linewidth": 0.8, "alpha": 0.35 if smooth == 1 else 0.7, "zorder": 2},
        "train_loss": {"linewidth": 1.4, "linestyle": (0, (3.5, 2)), "alpha": 0.9, "zorder": 3},
        "val_loss": {"linewidth": 2.0, "zorder": 4},
    }
    for (run, key), (at, y) in points.items():
        alone = "." if np.isfinite(y).sum() == 1 else None  # a line needs two points
        color = colors[runs.index(run)]
        axes.plot(at, y, color=color, marker=alone, label=f"{run.name} {key}", **styles[key])

    ends = []
    for run, color in zip(runs, colors, strict=True):
        best = run.best(column) if curves != "train" else None
        if best:
            ring = {"markerfacecolor": "white", "markeredgewidth": 1.8, "markersize": 6.5}
            inside = axes.get_ylim()[0] <= best[1] <= axes.get_ylim()[1]
            axes.plot(
                best[0] / unit, best[1], "o", color=color, zorder=6, clip_on=not inside, **ring
            )
        shown = [
            points[run, key] for key in ("val_loss", "train_loss", "loss") if (run, key) in points
        ]
        ends.append(last_point(*shown[0]) if shown else (0, axes.get_ylim()[0]))
    label_runs(axes, runs, texts, colors, ends, curves != "train", families)
    explain_lines(axes, {key for _, key in points}, styles, smooth)

    word = {"val": "validation loss", "train": "training loss"}.get(curves, "loss")
    axes.set_ylabel(f"{word} (nats per token)", color=INK, fontsize=11, labelpad=8)
    axes.set_xlabel(unit_name, color=INK, fontsize=11, labelpad=6)
    if title:
        style = {
            "fontfamily": families,
            "parse_math": False,
            "loc": "left",
            "pad": 30 if axes.get_legend() else 12,
        }
        axes.set_title(title, color=INK, fontsize=13, fontweight="bold", **style)
    return figure


def as_text(name):
    """`name`, of a path say, with what no font can have a sign for (lone surrogates) as "?"."""
    return name.encode("utf-8", "replace").decode("utf-8")


def set_frame(axes, points, log):
    """Limits, ticks and grid."""
    from matplotlib.ticker import (
        FuncFormatter,
        LogLocator,
        MaxNLocator,
        NullLocator,
        ScalarFormatter,
    )

    finite = [y[np.isfinite(y)] for _, y in points.values()]
    finite = [y for y in finite if len(y)] or [np.array([1.0])]
    losses = np.concatenate(finite)
    low = losses.min()
    high = losses[losses <= 1.2 * max(y[0] for y in finite)].max()
    if log:
        axes.set_yscale("log")
        low, high = math.log10(low), math.log10(high)
    margin = 0.04 * (high - low) or 0.1
    limits = low - margin, high + margin
    axes.set_ylim(*(10**limit for limit in limits) if log else limits)
    decades = log and high - low > 1
    ticks = LogLocator(subs=(1, 2, 5)) if decades else MaxNLocator(7, steps=(1, 2, 2.5, 5, 10))
    axes.yaxis.set_major_locator(ticks)
    plain = ScalarFormatter(useOffset=False)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}") if log else plain)
    axes.yaxis.set_minor_locator(NullLocator())

    last = max(at[-1] for at, _ in points.values())
    axes.set_xlim(min(0, *(at[0] for at, _ in points.values())), last or 1)
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=(1, 2, 2.5, 5, 10)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))

    axes.set_axisbelow(True)
    axes.grid(color="#e6e8eb", linewidth=0.8)
    axes.tick_params(length=0, pad=6, labelsize=10, labelcolor=INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color("#c3c8ce")


def label_runs(axes, runs, texts, colors, ends, with_best, families):
    """Each run's name at the right, in the order of the curves' ends and as near to them as the
    other names allow, and its best validation loss below it."""
    entry = 27 / (axes.get_window_extent().height / axes.figure.dpi * 72)  # two lines of text
    ends = axes.transAxes.inverted().transform(axes.transData.transform(ends))
    heights = np.clip(ends[:, 1], 0, 1)
    placed = spread(heights, 1.12 * entry, entry / 2, 1 - entry / 2)
    are_near = np.abs(placed - heights).max() < entry
    outside = {"transform": axes.transAxes, "clip_on": False}
    for i, (run, color) in enumerate(zip(runs, colors, strict=True)):
        if are_near and ends[i, 0] > 0.95:  # a line from the curve to its name
            at = [1.008, 1.022, 1.034], [heights[i], placed[i], placed[i]]
            axes.plot(*at, color=color, linewidth=1, alpha=0.7, **outside)
        else:  # many such lines would be a tangle, and one to a curve that ends early would cross
            axes.plot([1.015, 1.034], [placed[i]] * 2, color=color, linewidth=2.5, **outside)
        best = run.best() if with_best else None
        style = {"fontsize": 10.5, "fontweight": "bold", "fontfamily": families}
        style |= {"va": "bottom" if best else "center", "parse_math": False}
        axes.text(1.045, placed[i], texts[i], color=color, **style, **outside)
        if best:
            text = f"best {best[1]:.4f} at step {best[0]:,.0f}"
            axes.text(1.045, placed[i], text, color=FAINT, fontsize=9, va="top", **outside)


def explain_lines(axes, keys, styles, smooth):
    """A legend above the frame of what solid, dashed and thin lines are."""
    from matplotlib.lines import Line2D

    words = {"val_loss": "validation", "train_loss": "training, estimated"}
    words |= {"loss": "training batches" + (f", mean of {smooth}" if smooth > 1 else "")}
    if keys == {"val_loss"}:
        return  # the axis says it
    shown = [key for key in words if key in keys]
    handles = [Line2D([], [], color=INK, label=words[key], **styles[key]) for key in shown]
    style = {"loc": "lower left", "bbox_to_anchor": (-0.005, 1), "ncols": 3, "frameon": False}
    style |= {"fontsize": 9.5, "labelcolor": INK, "handlelength": 2.2, "columnspacing": 1.8}
    axes.legend(handles=handles, borderaxespad=0.3, borderpad=0, **style)


def save(figure, path):
    """Write `figure` to `path`, a .png or .svg; the same figure gives the same bytes. Raises
    `UserError` for another suffix and where it cannot be written."""
    import matplotlib

    path, kind = Path(path), picture_kind(path)
    settings = {"format": kind, "facecolor": "white", "bbox_inches": "tight", "pad_inches": 0.2}
    settings["metadata"] = {"Date": None} if kind == "svg" else {"Software": None}
    picture, fonts = io.BytesIO(), logging.getLogger("matplotlib.font_manager")
    level = fonts.level
    fonts.setLevel(logging.ERROR)  # a font that has no bold is no news
    try:
        with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": "brisk"}):
            warnings.filterwarnings("ignore", "Glyph .* missing")  # `draw` has said it, once
            figure.savefig(picture, **settings)
    finally:
        fonts.setLevel(level)
    try:
        path.write_bytes(picture.getvalue())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write the picture {path}: {reason}") from error


def picture_kind(path):
    """png or svg, by the suffix of `path`; another raises `UserError`."""
    kind = Path(path).suffix.lower().lstrip(".")
    if kind not in ("png", "svg"):
        raise UserError(f"the picture {path} would be of no known kind; let it end in .png or .svg")
    return kind


def leave_picture(out_dir, say):
    """`loss.png` in a run's folder. A picture is not worth a run: where there cannot be one, a
    line says why."""
    try:
        save(draw(read_runs([out_dir]), say=say), Path(out_dir, "loss.png"))
    except ImportError:
        say("no loss.png: matplotlib is not installed (pip install matplotlib)")
    except Exception as error:
        say(f"no loss.png: {' '.join(str(error).split())}")


def smoothed(values, window):
    """Mean of the `window` values around each one, fewer at the ends; NaN where all are NaN, and
    left out of the mean otherwise."""
    known = np.isfinite(values)
    window = min(window, 2 * len(values))  # reaches over all of them
    around = (window // 2, (window - 1) // 2)

    def sums(terms):  # (not as a difference of running sums: a spike's rounding would spread)
        return np.convolve(np.pad(terms, around), np.ones(window), "valid")

    count = sums(known.astype(float))
    return np.where(count > 0, sums(np.where(known, values, 0.0)) / np.maximum(count, 1), np.nan)


def spread(wanted, gap, low, high):
    """Positions at least `gap` apart, in the order of `wanted`, from `low` to `high` if they fit,
    with the least sum of squared moves: isotonic regression by pooling neighbours."""
    order = np.argsort(wanted, kind="stable")
    pools = []  # [sum, number] of what is wanted, less the gaps below
    for i, k in enumerate(order):
        pools.append([wanted[k] - i * gap, 1])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            total, number = pools.pop()
            pools[-1][0] += total
            pools[-1][1] += number
    fit = np.concatenate([[total / number] * number for total, number in pools])
    fit = np.clip(fit, low, max(low, high - (len(fit) - 1) * gap)) + np.arange(len(fit)) * gap
    placed = np.empty(len(fit))
    placed[order] = fit
    return placed


def last_point(at, y):
    known = np.flatnonzero(np.isfinite(y))[-1]
    return at[known], y[known]


def time_unit(points):
    """(seconds in it, name) of a unit in which the longest run is a handy number."""
    longest = max(at[-1] for at, _ in points.values())
    for limit, unit, name in (
        (200, 1, "seconds"),
        (7200, 60, "minutes"),
        (96 * 3600, 3600, "hours"),
    ):
        if longest < limit:
            return unit, name
    return 86400, "days"


def compact(number):
    """`number` with k, M, B (10⁹) or T (10¹²)."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:g}{suffix}"
    return f"{number:g}"


def elided(names, longest=32):
    """`names` with the middle of long ones left out, unless they would be alike then."""
    half = longest // 2
    short = [n if len(n) <= longest else f"{n[:half]}…{n[1 - half :]}" for n in names]
    return short if len(set(short)) == len(set(names)) else list(names)


def run_colors(number):
    if number <= len(COLORS):
        return list(COLORS[:number])
    from matplotlib import colormaps

    return [colormaps["turbo"](0.05 + 0.9 * i / (number - 1)) for i in range(number)]
