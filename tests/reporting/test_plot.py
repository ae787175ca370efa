"""Loss curves show the numbers of their files and distinguish runs."""

import json
import math
import os
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.colors import same_color, to_hex, to_rgb
from matplotlib.image import imread

from brisk.errors import UserError
from brisk.reporting.curves import (
    draw,
    font_families,
    leave_picture,
    read_run,
    read_runs,
    save,
    smoothed,
)

BLUE = "tab:blue"  # the first run
VAL = [4.0, 2.5, 2.0, 2.25]  # at steps 0, 100, 200, 300: the best is not the last


@pytest.fixture
def run(tmp_path):
    """Write a metrics.jsonl with evaluations and training lines. Returns its folder."""

    def write(name="out-a", val=VAL, batches=30, tokens=1000, seconds=0.5):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        lines = []
        for i, loss in enumerate(val):
            train = None if loss is None else loss - 0.1
            record = {"step": 100 * i, "train_loss": train, "val_loss": loss}
            lines.append(record | {"tokens": 100 * i * tokens, "seconds": 100 * i * seconds})
        for i in range(batches):
            record = {"step": 10 * i, "loss": 4.0 - 0.05 * i + 0.1 * (-1) ** i, "grad_norm": 1.0}
            lines.append(record | {"tokens": 10 * i * tokens, "seconds": 10 * i * seconds})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
        return folder

    return write


def lines_of(figure):
    """{label: curve} of a picture."""
    lines = figure.axes[0].get_lines()
    return {line.get_label(): line for line in lines if not line.get_label().startswith("_")}


def rings_of(figure):
    """(x, y, colour) of the marks of the best values."""
    rings = [line for line in figure.axes[0].get_lines() if line.get_marker() == "o"]
    return [(*line.get_xdata(), *line.get_ydata(), line.get_color()) for line in rings]


def names(figure):
    """The texts of the runs, from the top."""
    return [text.get_text() for text in figure.legends[0].get_texts()]


def legend(figure):
    box = figure.axes[0].get_legend()
    return [text.get_text() for text in box.get_texts()] if box else []


def pixels(path):
    return imread(path)[..., :3]


# ----------------------------------------------------------------------------- curves


def test_curves_match_the_file(run):
    figure = draw([read_run(run())])
    axes, lines = figure.axes[0], lines_of(figure)
    val, train, batch = (lines[f"out-a {key}"] for key in ("val_loss", "train_loss", "loss"))
    assert list(val.get_xdata()) == [0, 100, 200, 300] and list(val.get_ydata()) == VAL
    assert list(train.get_ydata()) == pytest.approx([loss - 0.1 for loss in VAL])
    assert list(batch.get_xdata()) == [10 * i for i in range(30)]
    assert batch.get_ydata()[3] == pytest.approx(4.0 - 0.15 - 0.1)
    # one colour with different styles: solid, dashed, thin and translucent
    assert same_color(val.get_color(), train.get_color())
    assert same_color(val.get_color(), batch.get_color())
    assert val.get_linestyle() == "-" and train.get_linestyle() == "--"
    assert batch.get_linewidth() < val.get_linewidth() and batch.get_alpha() < 0.5
    assert legend(figure) == ["validation", "training, estimated", "training batches"]
    assert "nats" in axes.get_ylabel() and axes.get_xlabel() == "steps"


@pytest.mark.parametrize(
    ("x", "seconds", "name", "at"),
    [
        ("tokens", 0.5, "tokens", [0, 1e5, 2e5, 3e5]),
        ("seconds", 0.5, "seconds", [0, 50, 100, 150]),
        ("seconds", 6, "minutes", [0, 10, 20, 30]),
        ("seconds", 72, "hours", [0, 2, 4, 6]),
        ("seconds", 3456, "days", [0, 4, 8, 12]),
    ],
)
def test_axes_of_tokens_and_time(run, x, seconds, name, at):
    figure = draw([read_run(run(seconds=seconds))], x=x)
    val = lines_of(figure)["out-a val_loss"]
    assert list(val.get_xdata()) == pytest.approx(at) and list(val.get_ydata()) == VAL
    assert figure.axes[0].get_xlabel() == name
    assert rings_of(figure)[0][:2] == pytest.approx((at[2], 2.0))


def test_best_value_is_marked(run):
    figure = draw([read_run(run())])
    [(x, y, color)] = rings_of(figure)
    assert (x, y) == (200, 2.0)
    assert names(figure) == ["out-a\nbest 2.0000 at step 200"]
    assert same_color(color, figure.legends[0].get_lines()[0].get_color())


@pytest.mark.parametrize(
    ("which", "kinds"),
    [("val", {"val_loss"}), ("train", {"train_loss", "loss"})],
)
def test_curves_option(run, which, kinds):
    figure = draw([read_run(run())], curves=which)
    assert {label.split()[-1] for label in lines_of(figure)} == kinds
    assert ("best" in names(figure)[0]) == (which == "val")
    assert bool(rings_of(figure)) == (which == "val")
    assert figure.axes[0].get_ylabel().startswith({"val": "validation", "train": "training"}[which])


def test_many_runs_show_validation_only(run):
    runs = read_runs([run(f"out-{i}", [4, 3, 2 + i / 1000]) for i in range(10)])
    figure = draw(runs)
    lines = lines_of(figure)
    assert len(lines) == 10 and all("val_loss" in label for label in lines)
    assert len(rings_of(figure)) == 10 and not legend(figure)
    assert len(lines_of(draw(runs, curves="both"))) == 30


@pytest.mark.parametrize("number", [2, 12, 25])
def test_names_do_not_overlap(run, number):
    """They do not overlap each other or the curves, are complete, and have distinct colours."""
    figure = draw(read_runs([run(f"gjy{i}/{'out-' * 20}", [4, 3, 2]) for i in range(number)]))
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.legends[0].get_texts()]
    assert len(boxes) == number
    assert all(above.y0 >= below.y1 for above, below in pairwise(boxes))
    assert min(box.x0 for box in boxes) > figure.axes[0].get_window_extent().x1
    assert len({to_rgb(line.get_color()) for line in lines_of(figure).values()}) == number
    page = figure.get_tightbbox().transformed(figure.dpi_scale_trans).padded(1)  # pixel
    assert all(page.x0 <= box.x0 and box.x1 <= page.x1 for box in boxes)
    assert all(page.y0 <= box.y0 and box.y1 <= page.y1 for box in boxes)


def test_best_run_is_first(run):
    """Runs without a validation loss are last, in the given order."""
    runs = [run("none", [], 5), run("high", [4, 2.2]), run("low", [4, 2.0, 3]), run("nor", [], 5)]
    figure = draw(read_runs(runs))
    assert [name.split("\n")[0] for name in names(figure)] == ["low", "high", "none", "nor"]
    curves = {label.split()[0]: line.get_color() for label, line in lines_of(figure).items()}
    shown = [line.get_color() for line in figure.legends[0].get_lines()]
    assert shown == [curves[name] for name in ("low", "high", "none", "nor")]


def test_runs_with_equal_names_are_distinguished(run):
    paths = [run("a/1/out"), run("b/1/out"), run("out-c")]
    assert [r.name for r in read_runs(paths)] == ["a/1/out", "b/1/out", "out-c"]
    # a run given twice, by its folder and its file, is drawn once
    assert [r.name for r in read_runs([paths[0], paths[0] / "metrics.jsonl"])] == ["out"]


def test_smoothing_is_a_centered_mean(run):
    figure = draw([read_run(run())], smooth=3)
    batch = lines_of(figure)["out-a loss"].get_ydata()
    raw = [4.0 - 0.05 * i + 0.1 * (-1) ** i for i in range(30)]
    assert batch[0] == pytest.approx(np.mean(raw[:2]))
    assert batch[5] == pytest.approx(np.mean(raw[4:7]))
    assert legend(figure)[-1] == "training batches, mean of 3"


def test_smoothing_with_nan_and_spikes():
    values = np.array([1.0, np.nan, 3.0, 1e30, 1.0, 1.0, 1.0, np.nan, np.nan, np.nan])
    mean = smoothed(values, 3)
    assert mean[:2] == pytest.approx([1, 2]) and mean[5:7] == pytest.approx([1, 1])
    assert mean[3] == pytest.approx(1e30 / 3) and np.isnan(mean[8])
    assert list(smoothed(values[:1], 50)) == [1]


# ----------------------------------------------------------------------------- damaged numbers


def test_broken_lines_are_skipped(run):
    folder = run()
    whole = len(read_run(folder).lines)
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'\n[1]\n"x"\n{"loss": 1}\n{"step": "4", "loss": 2}\n\xff\xfe\n')
        file.write(b'{"step": 5, "loss": "2"}\n{"step": 400, "val_lo')
    after = read_run(folder)
    assert [len(after.curve(key)[0]) for key in ("loss", "val_loss")] == [30, 4]
    assert len(after.lines) == whole + 1


def test_nonfinite_losses_leave_a_gap(run, tmp_path):
    """null, as written now, and NaN and Infinity from earlier versions."""
    nan, inf = math.nan, math.inf
    figure = draw([read_run(run(val=[4.0, nan, 3.0, inf, 3.5, -inf, None, 3.2]))])
    val = lines_of(figure)["out-a val_loss"]
    assert list(val.get_xdata()) == [100 * i for i in range(8)]
    assert [i for i in range(8) if np.isnan(val.get_ydata()[i])] == [1, 3, 5, 6]
    assert rings_of(figure)[0][:2] == (200, 3.0)
    assert np.isfinite(figure.axes[0].get_ylim()).all()
    save(figure, tmp_path / "loss.png")


@pytest.mark.parametrize("log", [False, True])
def test_diverged_run_does_not_flatten_others(run, log):
    runs = read_runs([run("good"), run("bad", [4.0, 3.0, 1e4, 1e12, math.nan])])
    low, high = draw(runs, log=log).axes[0].get_ylim()
    assert 4.0 < high < 6 and low < 2.0


def test_extreme_losses_are_plotted(run, tmp_path):
    save(draw([read_run(run("negative", [-1.0], batches=0))]), tmp_path / "loss.png")
    save(draw([read_run(run("huge", [1e308, -1e308, 3.0]))]), tmp_path / "loss.png")


def test_overfitting_stays_visible(run):
    low, high = draw([read_run(run(val=[3.0, 2.0, 3.3]))]).axes[0].get_ylim()
    assert low < 2.0 and high > 3.3


def test_single_point_is_visible(run, tmp_path):
    one = run("one", val=[3.0], batches=0)
    none = run("none", val=[], batches=1)
    for folder in (one, none):
        figure = draw([read_run(folder)])
        assert any(
            line.get_marker() not in ("None", None, "") for line in lines_of(figure).values()
        )
        save(figure, tmp_path / "loss.png")


def test_logarithmic_axis(run, tmp_path):
    figure = draw([read_run(run(val=[2.0, 0.1, 0.01, 0.0]))], curves="val", log=True)
    axes = figure.axes[0]
    assert axes.get_yscale() == "log"
    figure.draw_without_rendering()
    low, high = axes.get_ylim()
    shown = [tick for tick in axes.get_yticks() if low <= tick <= high]
    assert len(shown) >= 4
    assert {label.get_text() for label in axes.get_yticklabels()} >= {"0.01", "0.1", "1"}
    save(figure, tmp_path / "loss.png")


# ----------------------------------------------------------------------------- the file


def test_png_and_svg_are_not_blank(run, tmp_path):
    figure = draw([read_run(run())], title="two to the fifth: $2^5$")
    save(figure, tmp_path / "loss.png")
    picture = pixels(tmp_path / "loss.png")
    assert picture.shape[0] > 600 and picture.shape[1] > 1000
    assert (picture[0] == 1).all()  # white at the edge
    blue = np.abs(picture - to_rgb(BLUE)).max(axis=-1) < 0.02
    assert blue.sum() > 500
    save(figure, tmp_path / "loss.svg")
    first = (tmp_path / "loss.svg").read_bytes()
    assert b"<svg" in first and to_hex(BLUE).encode() in first
    save(draw([read_run(tmp_path / "out-a")], title="two to the fifth: $2^5$"), tmp_path / "b.svg")
    assert (tmp_path / "b.svg").read_bytes() == first
    save(figure, tmp_path / "UPPER.PNG")
    save(draw([read_run(tmp_path / "out-a")], title="two to the fifth: $2^5$"), tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "UPPER.PNG").read_bytes()


def test_names_are_not_formulas(run, tmp_path):
    figure = draw([read_run(run("_out-$lr$_{1"))], title="100% of $\\frac$")
    save(figure, tmp_path / "loss.png")
    assert names(figure)[0].startswith("_out-$lr$_{1")
    texts = [*figure.axes[0].texts, *figure.legends[0].get_texts()]
    assert texts and not any(text.get_parse_math() for text in texts)


# ----------------------------------------------------------------------------- characters


@pytest.fixture
def cjk_font(tmp_path, monkeypatch):
    """A font with a single glyph, 莎 as a full square, and a list of fonts with it."""
    builder = pytest.importorskip("fontTools.fontBuilder")
    pens = pytest.importorskip("fontTools.pens.ttGlyphPen")
    import matplotlib
    from matplotlib import font_manager

    def square(size):
        pen = pens.TTGlyphPen(None)
        if size:
            pen.moveTo((0, 0))
            for corner in ((0, size), (size, size), (size, 0)):
                pen.lineTo(corner)
            pen.closePath()
        return pen.glyph()

    font = builder.FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder([".notdef", "sha"])
    font.setupCharacterMap({ord("莎"): "sha"})
    font.setupGlyf({".notdef": square(0), "sha": square(900)})
    font.setupHorizontalMetrics({".notdef": (1000, 0), "sha": (1000, 0)})
    font.setupHorizontalHeader(ascent=900, descent=-100)
    font.setupNameTable({"familyName": "SimHei", "styleName": "Regular"})
    font.setupOS2(usWeightClass=400)
    font.setupPost()
    path = tmp_path / "square.ttf"
    font.save(path)
    data = str(matplotlib.get_data_path())
    bundled = [f for f in font_manager.fontManager.ttflist if f.fname.startswith(data)]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", bundled)
    font_manager.fontManager.addfont(path)
    yield
    font_manager.fontManager._findfont_cached.cache_clear()  # by families, whatever the list


def test_chinese_uses_a_font_that_has_it(run, tmp_path, cjk_font, caplog):
    said = []
    figure = draw([read_run(run("莎莎莎莎"))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(figure, tmp_path / "loss.png", said.append)
    assert not said and not caplog.records
    # only 莎 is a full square in the right part
    names = pixels(tmp_path / "loss.png")[..., 0] < 0.3
    rows = names[:, int(0.6 * names.shape[1]) :].sum(axis=1)
    assert (rows > 60).sum() >= 12


def test_missing_font_is_one_line(run, tmp_path, cjk_font, caplog):
    for name in ("loss.png", "loss.svg"):
        said = []
        figure = draw([read_run(run(f"{name}/莎士比亚"))], title="士 $x$")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            save(figure, tmp_path / name / name, said.append)
        [line] = said
        assert "no font here has 亚 士 比: " in line
        assert not caplog.records and (tmp_path / name / name).stat().st_size > 10_000


def test_latin_text_needs_no_extra_font(run, tmp_path, cjk_font):
    assert font_families() == ["DejaVu Sans", "SimHei"]
    said = []
    save(draw([read_run(run("naïve → Ωμέγα"))]), tmp_path / "loss.png", said.append)
    assert not said


# ----------------------------------------------------------------------------- at a run's end


def test_run_saves_its_picture(train_tiny, tmp_path):
    ran = train_tiny(tmp_path / "out")
    assert pixels(ran.out_dir / "loss.png").std() > 0.05
    assert "loss.png" in ran.console.splitlines()[-2]
    assert not train_tiny(tmp_path / "other", eval_only=True).out_dir.exists()


def test_stopped_run_saves_its_picture(settings, tmp_path, monkeypatch):
    import train
    from brisk.reporting.run_log import RunLog
    from brisk.training.signals import StopRequest
    from configurator import configure

    stop, iteration = StopRequest(), RunLog.iteration

    def stopping(log, step, record):
        iteration(log, step, record)
        stop.number = 15 if step == 2 else stop.number

    monkeypatch.setattr(RunLog, "iteration", stopping)
    with pytest.raises(SystemExit):
        train.main(configure(train.TrainConfig, settings(tmp_path / "out")), stop)
    assert (tmp_path / "out" / "loss.png").exists()
    assert len(read_run(tmp_path / "out").curve("loss")[0]) == 3


def test_missing_matplotlib_is_one_line(train_tiny, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ran = train_tiny(tmp_path / "out")
    told = [line for line in ran.console.splitlines() if "loss.png" in line]
    assert len(told) == 1 and "pip install matplotlib" in told[0]
    assert ran.checkpoint()["iter_num"] == 8


def test_unwritable_picture_is_one_line(run, tmp_path):
    said = []
    (run() / "loss.png").mkdir()
    leave_picture(tmp_path / "out-a", said.append)
    leave_picture(tmp_path / "none", said.append)
    assert len(said) == 2 and all(line.startswith("no loss.png: ") for line in said)


# ----------------------------------------------------------------------------- plot.py


def test_command_line(script, run, tmp_path):
    one, two = run("莎士比亚"), run("out-b")
    env = {"DISPLAY": "", "MPLBACKEND": "agg"}
    done = script("plot.py", one, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(one / "loss.png") and (one / "loss.png").exists()
    done = script("plot.py", one, two / "metrics.jsonl", "--x=tokens", cwd=tmp_path, env=env)
    assert done.stdout.strip() == "loss.png" and (tmp_path / "loss.png").exists()


@pytest.fixture
def plot(capsys):
    """Run plot.py in this process. Returns its output."""
    import plot

    def run_main(*argv):
        plot.main([str(argument) for argument in argv])
        return capsys.readouterr().out

    return run_main


def test_to_option(plot, run, tmp_path):
    to = tmp_path / "a.svg"
    keys = ("--log=True", "--smooth=5", "--title=Two runs", "--curves=both")
    assert plot("--x=seconds", run("a=b"), f"--to={to}", run("out-b"), *keys) == f"{to}\n"
    assert b"<svg" in to.read_bytes()


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([], "no run given"),
        (["nowhere"], "nowhere"),
        (["empty"], "metrics.jsonl"),
        (["words.txt"], "words.txt"),
        (["out", "empty"], "empty"),
        (["out", "--to=loss.jpg"], ".png or .svg"),
        (["out", "--to=loss"], ".png or .svg"),
        (["out", "--to=nowhere/loss.png"], "nowhere"),
        (["out", "--to=folder.png"], "folder.png"),
        (["out", "--x=epochs"], "steps"),
        (["out", "--smooth=0"], "smooth"),
        (["out", "--x=tokens"], "tokens"),
        (["out", "--curves=val"], "validation"),
        (["out", "log=True"], "--log=True"),
    ],
)
def test_wrong_input_is_a_user_error(plot, tmp_path, monkeypatch, argv, named):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "folder.png", "out"):
        Path(folder).mkdir()
    Path("words.txt").write_text("to be or not\n{}\n")
    Path("out", "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    with pytest.raises(UserError, match=named):
        plot(*argv)


def test_wrong_input_is_one_line_and_status_2(script, tmp_path):
    done = script("plot.py", "nowhere", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
    assert not os.listdir(tmp_path)
