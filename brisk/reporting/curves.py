"""Loss curves of runs, drawn from `metrics.jsonl`.

runs = read_runs(["out-a", "out-b"])
save(draw(runs, x="tokens"), "loss.png")
"""

import json
import math
import re
import textwrap
import warnings
from pathlib import Path

import numpy as np

from brisk.errors import UserError

INK = "#33383f"
STYLES = {  # of the lines of a run
    "val_loss": dict(label="validation", linewidth=2, zorder=4),
    "train_loss": dict(label="training, estimated", linewidth=1.4, linestyle="--", zorder=3),
    "loss": dict(label="training batches", linewidth=0.8, alpha=0.45, zorder=2),
}
TIME_UNITS = (200, 1, "seconds"), (7200, 60, "minutes"), (96 * 3600, 3600, "hours")  # below, …
LARGEST = 1e39  # losses are float32; a larger number is a damaged line, and no axis can show it

# Families with Chinese characters on Linux, Windows and macOS; DejaVu Sans comes with matplotlib.
CJK_FONTS = ["Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei"]
CJK_FONTS += ["WenQuanYi Zen Hei", "Microsoft YaHei", "SimHei", "PingFang SC", "Arial Unicode MS"]


class RunCurves:
    """The numbers of one run, by key, as in `metrics.jsonl`."""

    def __init__(self, path, lines):
        self.path, self.lines = Path(path), lines
        self.name = self.path.resolve().name  # of the folder; `read_runs` makes it unique

    def curve(self, key, x="step"):
        """Two arrays in order of `x` (step, tokens or seconds): `x` and `key` of the lines that
        have both. A value that is not finite (null in the file) is NaN, a gap in the curve."""
        lines = [line for line in self.lines if isinstance(line.get(x), int | float)]
        lines = [line for line in lines if isinstance(line.get(key, ""), int | float | None)]
        lines.sort(key=lambda line: line[x])
        found = np.array([(line[x], line[key]) for line in lines], dtype=float).reshape(-1, 2)
        at, y = found[np.abs(found[:, 0]) < LARGEST].T
        return at, np.where(np.abs(y) < LARGEST, y, np.nan)

    def best(self):
        """(step, loss) of the lowest validation loss, None where there is none."""
        steps, losses = self.curve("val_loss")
        if np.isnan(losses).all():
            return None
        lowest = np.nanargmin(losses)
        return steps[lowest], losses[lowest]


def read_run(path):
    """The curves of a run, from its folder or its metrics.jsonl. Broken lines, such as the last
    one of a killed run, are skipped. Raises `UserError` where there are no losses."""
    path = Path(path)
    file = path / "metrics.jsonl" if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError) as error:  # ValueError: not a path at all
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the run {file}: {reason}") from error
    lines = []
    for line in text.split("\n"):
        try:
            lines.append(json.loads(line, parse_int=float))  # an int of 400 digits is infinite
        except (ValueError, RecursionError):
            continue
    lines = [
        line
        for line in lines
        if isinstance(line, dict) and isinstance(line.get("step"), int | float)
    ]
    run = RunCurves(file.parent if file.name == "metrics.jsonl" else file, lines)
    if not any(np.isfinite(run.curve(key)[1]).any() for key in ("loss", "train_loss", "val_loss")):
        raise UserError(f"{file} holds no losses to draw")
    return run


def read_runs(paths):
    """The runs in `paths`, each once, with the shortest `name`s that differ."""
    runs = {}
    for path in paths:
        run = read_run(path)
        runs.setdefault(run.path.resolve(), run)
    for path, run in runs.items():
        depth = 1
        while any(p != path and p.parts[-depth:] == path.parts[-depth:] for p in runs):
            depth += 1
        run.name = "/".join(path.parts[-depth:])
    return list(runs.values())


def draw(runs, x="steps", curves="auto", smooth=1, log=False, title=""):
    """A matplotlib `Figure` with the losses of `runs` (nats per token).

    A run has one colour: its validation loss is a solid line, the training loss estimated at the
    same time a dashed one, the loss of the training batches a thin one. A ring marks the lowest
    validation loss; the legend lists the runs from the best to the worst. The frame ends at 1.2
    times the highest initial loss, so that a run that explodes does not flatten the others.

    Args:
        x: "steps", "tokens" or "seconds" (shown in minutes, hours or days where those fit).
        curves: "val", "train", "both", or "auto": both, of up to four runs.
        smooth: each point of the batch loss is the mean of the `smooth` logged ones around it.
        log: whether the loss axis is logarithmic.

    Raises `UserError` where the runs have none of the losses asked for.
    """
    from matplotlib import colormaps, rc_context
    from matplotlib.figure import Figure  # without pyplot no display is needed

    if curves == "auto":
        curves = "both" if len(runs) <= 4 or not any(run.best() for run in runs) else "val"
    keys = {"val": ["val_loss"], "train": ["train_loss", "loss"]}.get(curves, list(STYLES))
    points = {}
    for run, key in ((run, key) for run in runs for key in keys):
        at, y = run.curve(key, "step" if x == "steps" else x)
        y = np.where(y > 0, y, np.nan) if log else y
        if np.isfinite(y).any():
            points[run, key] = at, smoothed(y, smooth) if key == "loss" else y
    kind = {"val": "validation ", "train": "training "}.get(curves, "")
    if not points:
        raise UserError(f"no {kind}losses by {x} in {', '.join(run.name for run in runs)}")
    last = max(at[-1] for at, _ in points.values())
    unit, unit_name = 1, x
    if x == "seconds":
        unit, unit_name = next((u for end, *u in TIME_UNITS if last < end), (86400, "days"))

    axes = Figure(figsize=(7.2, max(5.4, 0.54 * len(runs))), dpi=160).subplots()  # inches
    set_frame(axes, [y[np.isfinite(y)] for _, y in points.values()], log)
    axes.set_xlim(min(0, *(at[0] for at, _ in points.values())) / unit, last / unit or 1)
    palette = colormaps["tab10"] if len(runs) <= 10 else colormaps["turbo"].resampled(len(runs))
    colors = {run: palette(i) for i, run in enumerate(runs)}
    for (run, key), (at, y) in points.items():
        style = STYLES[key] | {"color": colors[run], "label": f"{run.name} {key}"}
        axes.plot(at / unit, y, marker="." if np.isfinite(y).sum() == 1 else None, **style)
        if key == "val_loss":  # at the edge of the frame the ring is whole
            best = np.nanargmin(y)
            ring = {"marker": "o", "markersize": 6.5, "markerfacecolor": "white", "zorder": 6}
            axes.plot(at[best] / unit, y[best], color=colors[run], mew=1.8, clip_on=False, **ring)

    axes.set(xlabel=unit_name, ylabel=f"{kind}loss (nats per token)")
    title = title.encode("utf-8", "replace").decode()  # lone surrogates have no glyph
    with rc_context({"font.family": font_families(), "text.parse_math": False}):  # "$" is "$"
        add_legends(axes, colors, {key for _, key in points}, smooth)
        pad = 30 if axes.get_legend() else 12
        axes.annotate(title, (0, 1), (0, pad), "axes fraction", "offset points", size=13, color=INK)
    return axes.figure


def set_frame(axes, losses, log):
    """Limits of the loss axis, ticks and grid. `losses`: an array of the finite ones per curve."""
    from matplotlib.ticker import AutoLocator, LogLocator, NullLocator

    first, losses = max(y[0] for y in losses), np.concatenate(losses)
    low, high = losses.min(), losses[losses <= first + 0.2 * abs(first)].max()
    if log:
        axes.set_yscale("log")
        low, high = math.log10(low), math.log10(high)
        locator = LogLocator(subs=(1, 2, 5)) if high - low > 1 else AutoLocator()
        axes.yaxis.set_major_locator(locator)
        axes.yaxis.set_minor_locator(NullLocator())
    margin = 0.04 * (high - low) or 0.1
    axes.set_ylim(*(10**y if log else y for y in (low - margin, high + margin)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.locator_params(axis="x", nbins=7)
    axes.xaxis.set_major_formatter(lambda value, _: compact(value))
    axes.grid(color="#e6e8eb", linewidth=0.8)
    axes.tick_params(length=0, pad=6, labelsize=10, labelcolor=INK)
    axes.spines[["left", "right", "top"]].set_visible(False)


def add_legends(axes, colors, keys, smooth):
    """Add a legend of the runs with their best validation losses, right of the frame or, for a
    single run, in its upper right corner; and, above the frame, a key to the solid, dashed and thin
    lines, unless all are validation losses."""
    from matplotlib.lines import Line2D

    best = {run: run.best() if "val_loss" in keys else None for run in colors}
    runs = sorted(colors, key=lambda run: best[run][1] if best[run] else math.inf)
    labels = [textwrap.fill(run.name.encode("utf-8", "replace").decode(), 40) for run in runs]
    for i, (step, loss) in enumerate(best[run] for run in runs if best[run]):  # these come first
        labels[i] += f"\nbest {loss:.4f} at step {step:,.0f}"
    handles = [Line2D([], [], color=colors[run], linewidth=2.5) for run in runs]
    style = {"frameon": False, "borderpad": 0, "labelcolor": INK, "fontsize": 9.5}
    place = {"loc": "upper left", "bbox_to_anchor": (1.02, 1), "bbox_transform": axes.transAxes}
    if len(runs) == 1:  # usually empty, since losses fall
        place |= {"loc": "upper right", "bbox_to_anchor": (0.99, 0.98)}
    box = style | {"frameon": True, "edgecolor": "none"}
    axes.figure.legend(handles, labels, borderaxespad=0, labelspacing=0.8, **place, **box)
    if keys != {"val_loss"}:
        handles = [Line2D([], [], color=INK, **STYLES[key]) for key in STYLES if key in keys]
        if "loss" in keys and smooth > 1:
            handles[-1].set_label(f"{STYLES['loss']['label']}, mean of {smooth}")
        place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 3, "borderaxespad": 0.3}
        axes.legend(handles=handles, **place, **style)


def font_families():
    """DejaVu Sans, and after it the families with Chinese characters that matplotlib knows."""
    from matplotlib.font_manager import fontManager

    known = {font.name for font in fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in CJK_FONTS if name in known)]


def save(figure, path, say=print):
    """Write `figure` to `path` (.png or .svg), the same bytes each time; `say` is called with a
    line about characters that no font has. Raises `UserError` where `path` cannot be written."""
    from matplotlib import get_cachedir, rc_context

    path, kind = Path(path), picture_kind(path)
    settings = {"format": kind, "facecolor": "white", "bbox_inches": "tight", "pad_inches": 0.2}
    settings["metadata"] = {"Date": None} if kind == "svg" else {"Software": None}
    try:
        with warnings.catch_warnings(record=True) as caught, rc_context({"svg.hashsalt": "brisk"}):
            warnings.filterwarnings("always", "Glyph .* missing")
            figure.savefig(path, **settings)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write the picture {path}: {reason}") from error
    found = re.findall(r"Glyph (\d+) ", " ".join(str(warning.message) for warning in caught))
    if missing := " ".join(sorted({chr(int(code)) for code in found})[:10]):
        cache = Path(get_cachedir(), "fontlist-*.json")  # a new font is not in it
        say(f"no font here has {missing}: install Noto Sans CJK, then remove {cache}")


def picture_kind(path):
    """png or svg, by the suffix of `path`; another raises `UserError`."""
    kind = Path(path).suffix.lower().lstrip(".")
    if kind not in ("png", "svg"):
        raise UserError(f"the picture {path} must end in .png or .svg")
    return kind


def leave_picture(out_dir, say):
    """Write `loss.png` into a run's folder. A failure costs one line, never the run."""
    try:
        save(draw(read_runs([out_dir])), Path(out_dir, "loss.png"), say)
    except ImportError:
        say("no loss.png: matplotlib is not installed (pip install matplotlib)")
    except Exception as error:
        say(f"no loss.png: {' '.join(str(error).split())}")


def smoothed(values, window):
    """Mean of the numbers among the `window` values around each one (fewer at the ends), or NaN."""
    before, after = window // 2, (window + 1) // 2
    parts = (values[max(0, i - before) : i + after] for i in range(len(values)))
    parts = (part[np.isfinite(part)] for part in parts)
    return np.array([part.mean() if len(part) else np.nan for part in parts])


def compact(number):
    """`number` with k, M, B (10⁹) or T (10¹²)."""
    sizes = (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")
    size, suffix = next((s for s in sizes if abs(number) >= s[0]), (1, ""))
    return f"{number / size:g}{suffix}"
