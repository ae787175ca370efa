"""Interactive sampling: prompts and commands at a terminal and from a pipe."""

import io
import os
import re
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from test_sample import CHARACTERS, DASHES, SCRIPT, records, texts, write_checkpoint

import sample
from brisk.data.tokenizer import EOT, ByteTokenizer, CharTokenizer
from brisk.generation.repl import completions
from configurator import configure


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with a run in `out/` that has a character tokenizer."""
    tokenizer = CharTokenizer(CHARACTERS).to_dict()
    write_checkpoint(tmp_path / "out" / "ckpt.pt", len(CHARACTERS), tokenizer=tokenizer)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def converse(folder, capsys, monkeypatch):
    """`converse(*lines)`: type lines into a session in this process. Returns its standard output,
    and the lines on standard error after the model was loaded."""

    def converse(*lines, argv=(), tokens=30):
        typed = b"".join(
            line if isinstance(line, bytes) else f"{line}\n".encode() for line in lines
        )
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="latin-1"))
        limit = [] if tokens is None else [f"--max_new_tokens={tokens}"]
        argv = ["--interactive", *limit, "--device=cpu", *argv]
        config = configure(sample.SampleConfig, argv)
        sample.main(config)
        captured = capsys.readouterr()
        return captured.out, captured.err.split("parameters on")[1].splitlines()[1:]

    return converse


@pytest.fixture
def batch(folder, capsys):
    """The texts that sample.py generates for a prompt."""

    def batch(start, *argv, samples=1, tokens=30):
        argv = [f"--start={start}", f"--num_samples={samples}", f"--max_new_tokens={tokens}", *argv]
        capsys.readouterr()
        sample.main(configure(sample.SampleConfig, ["--device=cpu", *argv]))
        return texts(capsys.readouterr().out)

    return batch


# ----------------------------------------------------------------------------- from a pipe


def test_each_line_is_a_prompt(converse, batch):
    out, notices = converse("ab", "ab", "语言 x", "")
    first, second, third, fourth = texts(out)
    assert [first, second] == batch("ab", samples=2)  # the same prompt gives another text
    assert third == batch("语言 x", samples=3)[2]
    assert fourth == batch("", samples=4)[3]
    assert notices == []


def test_settings_change_between_prompts(converse, batch):
    out, notices = converse(
        "/temperature 2", "ab", "/seed=5", "/top_k 9", "/top-p=0.9", "/max_new_tokens 12", "ab"
    )
    first, second = texts(out)
    assert [first] == batch("ab", "--temperature=2") != batch("ab")
    settings = ["--temperature=2", "--seed=5", "--top_k=9", "--top_p=0.9"]
    assert [second] == batch("ab", *settings, tokens=12)  # a new seed restarts at sample 0
    assert notices == []


def test_several_samples_for_a_prompt(converse, batch):
    out, _ = converse("ab", "/num_samples 2", "ab", "ab", argv=["--stop=z"])
    assert texts(out) == batch("ab", "--stop=z", samples=5)
    out, _ = converse("ab", argv=["--num_samples=3"])
    assert texts(out) == batch("ab", samples=3)


def test_stop_and_words_by_command(converse, batch):
    out, notices = converse("/stop z", "ab", "/stop", "/stop=", "/seed 1337", "ab")
    assert texts(out) == [*batch("ab", "--stop=z"), *batch("ab")]
    assert notices == ["stop=z"]
    out, _ = converse("/max_words 2", "ab")
    assert texts(out) == batch("ab", "--max_words=2")
    out, _ = converse("/max_words 99", "/max_new_tokens 30", "ab", tokens=None)
    assert texts(out) == batch("ab", "--max_words=99")  # tokens bound words where both are given


def test_top_next_by_command(converse, batch):
    out, _ = converse("/top_next 2", "ab", "/top_next 0", "/temperature=0", "ab")
    table, text = out.split(DASHES)[:2]
    drawn = text[2]
    assert table.startswith(f"1  {drawn!r}") and len(table.splitlines()) == 2


def test_prompt_with_a_slash_or_from_a_file(converse, batch, folder):
    tokenizer = CharTokenizer("\nab/").to_dict()
    write_checkpoint(folder / "out" / "ckpt.pt", 4, tokenizer=tokenizer)
    (folder / "prompt.txt").write_text("a\nb")
    out, notices = converse("//ab", "///", "a/b", "FILE:prompt.txt")
    assert texts(out)[1].startswith("//")
    assert [text[:3] for text in texts(out)[::2]] == ["/ab", "a/b"]
    assert texts(out)[3].startswith("a\nb")
    assert notices == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/temprature 0.5", "did you mean /temperature"),
        ("/hlep", "did you mean /help"),
        ("/", "unknown command /"),
        ("/device cuda", "unknown command /device"),
        ("/ temperature 1", "unknown command /"),
        ("/temperature -1", "temperature takes a number of at least 0"),
        ("/temperature=", "temperature takes a number"),
        ("/temperature hot", "temperature takes a number"),
        ("/top_p 2", "from 0 to 1"),
        ("/num_samples 0", "at least 1"),
        ("/max_new_tokens 1e9", "from 0 to"),
        (f"/stop {EOT}", "no end of text"),
        ("ABC é", "outside the vocabulary"),
        ("FILE:nowhere.txt", "nowhere.txt"),
        (b"caf\xe9\n", "UTF-8"),
        ("a\0b", "outside the vocabulary"),
    ],
)
def test_wrong_command_changes_nothing(converse, batch, line, words):
    out, notices = converse(line, "/settings", "ab")
    assert len(notices) == 2 and notices[0].startswith("error: ") and words in notices[0]
    assert notices[1].startswith("temperature=0.8  top_k=200  top_p=1.0  max_new_tokens=30")
    assert texts(out) == batch("ab")  # sample 0: nothing was sampled before


def test_help_names_every_command(converse):
    out, notices = converse("/help")
    text = "\n".join(notices)
    for name in ("settings", "help", "quit", *sample.SHAPING, "num_samples", "top_next"):
        assert f"  /{name}" in text
    assert "/temperature 0.8" in text and "Ctrl-C" in text and "another text" in text and out == ""


def test_nothing_is_read_after_quit(converse):
    assert converse("/quit", "ab") == ("", [])


def test_out_records_samples_with_settings(converse):
    out, _ = converse("ab", "/temperature 0.5", "/seed 3", "语", "", argv=["--out=talk.jsonl"])
    written = records("talk.jsonl")
    assert [(one["prompt"], one["sample"]) for one in written] == [("ab", 0), ("语", 0), ("", 1)]
    assert [(one["temperature"], one["seed"]) for one in written] == [(0.8, 1337), *[(0.5, 3)] * 2]
    shown = [(one["prompt"] or "\n") + one["text"] for one in written]
    assert shown == texts(out)


def test_document_model_ends_each_text(converse, batch, folder):
    trained = {
        "tokenizer": CharTokenizer("\nab", eot=True).to_dict(),
        "config": {"rows": "documents"},
    }
    write_checkpoint(folder / "out" / "ckpt.pt", 4, **trained)
    out, _ = converse("a", "", "/stop b", "a", argv=["--temperature=2"])
    expected = [batch(start, "--temperature=2", samples=3) for start in ("a", "")]
    assert texts(out) == [expected[0][0], expected[1][1], expected[0][2].partition("b")[0]]
    assert EOT not in out


def test_backslash_continues_a_prompt(converse, batch):
    out, notices = converse("ab\\", "\\", "the end", "ab", "x\\")  # the last has no next line
    assert texts(out) == [
        *batch("ab\n\nthe end"),
        batch("ab", samples=2)[1],
        batch("x", samples=3)[2],
    ]
    assert notices == []
    out, _ = converse("/stop a\\", "b", "/settings\\", "")
    assert out == ""


def test_continue_extends_the_last_text(converse, batch):
    out, _ = converse("/temperature 0", "ab", "/continue", "/max_new_tokens 7", "/continue")
    long = batch("ab", "--temperature=0", tokens=67)[0]
    assert texts(out) == [long[:-37], long[:-7], long]
    out, _ = converse("ab", "/seed 5", "/continue", argv=["--num_samples=2", "--out=talk.jsonl"])
    _, second, third, fourth = texts(out)
    assert [third, fourth] == batch(second, "--seed=5", samples=2)  # of the last one shown
    assert [one["prompt"] for one in records("talk.jsonl")] == ["ab", "ab", second, second]


def test_continue_without_a_text(converse, batch):
    _, notices = converse("/continue", "/top_next 2", "ab", "/continue", "/top_next 0", "ab")
    assert [line.split(":")[0] for line in notices] == ["error"] * 2
    assert "there is no text to continue" in notices[0]


def test_continue_after_half_a_character(converse, batch, folder):
    tokenizer = ByteTokenizer()
    write_checkpoint(folder / "out" / "ckpt.pt", 257, tokenizer=tokenizer.to_dict())
    out, _ = converse("ab\N{REPLACEMENT CHARACTER}", "/continue", tokens=0)
    assert [text.rstrip("\n") for text in texts(out)] == ["ab\N{REPLACEMENT CHARACTER}", "ab"]


def test_tab_completes_commands_and_keys():
    keys = ["temperature", "top_k", "top_p", "stop", "seed"]
    assert completions("/tem", keys) == ["/temperature "]
    assert completions("/top", keys) == ["/top_k ", "/top_p "]
    assert completions("/se", keys) == ["/seed ", "/settings"]
    assert completions("/co", keys) == ["/continue"]
    assert len(completions("/", keys)) == 9 and completions("/seed 1", keys) == []
    for prompt in ("", "a", "//te"):
        assert completions(prompt, keys) == [f"{prompt}\t"]  # a prompt may have tabs in it


def environment(terminal="dumb"):
    return {**os.environ, "OMP_NUM_THREADS": "1", "TERM": terminal}


def test_pipe(folder, batch):
    lines = "语 ab\n/nonsense\n/temperature=0\nthe end"  # without an end of line
    done = subprocess.run(
        [sys.executable, SCRIPT, "--device=cpu", "--interactive", "--max_new_tokens=30"],
        input=lines.encode(),
        env={**environment(), "PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    out = done.stdout.decode("utf-8").replace("\r\n", "\n")
    assert texts(out) == [*batch("语 ab"), *batch("the end", "--temperature=0")]  # no sign, no echo
    notices = done.stderr.decode().splitlines()
    assert "unknown command /nonsense" in notices[-1] and ">" not in notices[-1]
    assert len(notices) == 3  # checkpoint, size, error


# ----------------------------------------------------------------------------- at a terminal

CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"


class Terminal:
    """sample.py at a pseudo-terminal."""

    def __init__(self, *argv, kind="dumb", **redirected):
        import fcntl
        import pty
        import termios

        self.fd, theirs = pty.openpty()

        def in_the_foreground():  # so that Ctrl-C reaches it as a signal
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        command = [sys.executable, SCRIPT, "--device=cpu", "--interactive", *argv]
        streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs, **redirected}
        self.process = subprocess.Popen(
            command, env=environment(kind), preexec_fn=in_the_foreground, **streams
        )
        os.close(theirs)
        self.seen = ""

    def type(self, text):
        os.write(self.fd, text.encode())

    def expect(self, pattern, seconds=60):
        """Read until `pattern` matches. Returns the text up to the end of the match."""
        import select

        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen, re.DOTALL)):
            wait = deadline - time.monotonic()
            ready = wait > 0 and select.select([self.fd], [], [], wait)[0]
            assert ready, f"no {pattern!r} in {self.seen!r}"
            try:
                piece = os.read(self.fd, 65536)
            except OSError:  # Linux's way to say that the other end is closed
                piece = b""
            assert piece, f"it left without {pattern!r}, saying {self.seen!r}"
            self.seen += piece.decode("utf-8", "replace").replace("\r\n", "\n")
        before, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return before

    def status(self):
        return self.process.wait(timeout=60)


@pytest.fixture
def terminal(folder):
    if sys.platform == "win32":
        pytest.skip("Windows has no pseudo-terminals of this kind")
    opened = []

    def terminal(*argv, **redirected):
        opened.append(Terminal(*argv, **redirected))
        return opened[-1]

    yield terminal
    for one in opened:
        one.process.kill()
        one.process.wait()
        os.close(one.fd)


ENDLESS = "--max_new_tokens=1_000_000"  # longer than any test


def test_terminal(terminal, batch):
    at = terminal("--max_new_tokens=30")
    assert "/help" in at.expect("\n> ")
    at.type("语 ab\n")
    assert texts(at.expect(f"{DASHES}(?=> )").partition("\n")[2]) == batch("语 ab")
    at.expect("> ")
    at.type(UP + "\n")  # the line before, again
    assert texts(at.expect(f"{DASHES}(?=> )").partition("\n")[2]) == batch("语 ab", samples=2)[1:]
    at.expect("> ")
    at.type("/wrong\n")
    at.expect("error: unknown command /wrong[^\n]*\n> ")
    at.type(CTRL_D)
    assert at.status() == 0


def test_terminal_tab_and_history(terminal, batch):
    at = terminal("--max_new_tokens=30")
    at.expect("\n> ")
    at.type("/tempera\t0\n/temperat\t\n")
    at.expect("temperature=0.0\n> ")
    at.type("ab\\\n")
    at.expect(r"\n\.\.\. ")
    at.type("x\n")
    out = at.expect(f"{DASHES}(?=> )").partition("\n")[2]
    assert texts(out) == batch("ab\nx", "--temperature=0")
    at.type("/cont\t\n")
    assert texts(at.expect(f"/continue\n.*?{DASHES}(?=> )").partition("/continue\n")[2]) == batch(
        "ab\nx", "--temperature=0", tokens=60
    )
    at.type("ab\\\n")
    at.expect(r"\n\.\.\. ")
    at.type(CTRL_C)  # discards the previous lines of the prompt too
    at.expect("\n> ")
    at.type(CTRL_D)
    assert at.status() == 0


def test_paste_is_one_prompt(terminal, batch):
    readline = pytest.importorskip("readline")
    if "libedit" in readline.__doc__:
        pytest.skip("libedit has no bracketed paste")
    at = terminal("--max_new_tokens=30", kind="xterm")
    at.expect("> ")
    at.type("\x1b[200~ab\rthe end\r\rx\x1b[201~\n")
    shown = at.expect(f"{DASHES}.*> ").partition("\x1b[?2004l\r")[2]
    assert texts(shown.partition("\x1b")[0]) == batch("ab\nthe end\n\nx")
    at.type("\x1b[200~/temperature 0\rab\x1b[201~\n")  # never taken for a prompt
    at.expect("error: [^\n]*temperature takes a number")
    at.type(CTRL_D)
    assert at.status() == 0


def test_stopped_text_can_be_continued(terminal, folder):
    at = terminal("--max_new_tokens=1_000_000", "--out=talk.jsonl")
    at.expect("\n> ")
    at.type("ab\n")
    at.expect("\nab[^>]{200}")
    at.type(CTRL_C)
    shown = at.expect("\n> ", seconds=20)
    at.type("/max_new_tokens 7\n/continue\n")
    at.expect(f"{DASHES}> ")
    at.type("/quit\n")
    assert at.status() == 0
    (one,) = records(folder / "talk.jsonl")
    assert len(one["prompt"]) > 200 and one["prompt"].startswith("ab") and len(one["text"]) == 7
    assert one["prompt"].endswith(shown.removesuffix("\n> ").partition("^C")[0][-100:])


def test_terminal_gets_no_control_characters(folder):
    """They could move the cursor, clear the screen or set the title. A pipe gets them unchanged."""
    pty = pytest.importorskip("pty", reason="Windows has no pseudo-terminals of this kind")
    characters = "a\n\t\r\x07\x1b\x7f\x9b\x9d[]0;2J\u3000\N{REPLACEMENT CHARACTER}"
    tokenizer = CharTokenizer(characters).to_dict()
    write_checkpoint(folder / "out" / "ckpt.pt", len(characters), tokenizer=tokenizer)
    (folder / "prompt.txt").write_bytes(b"\x1b]0;a\x07\xc2\x9b2J\x7f")
    main, side = pty.openpty()
    shown, command = b"", [sys.executable, str(SCRIPT), "--start=FILE:prompt.txt", "--device=cpu"]
    with subprocess.Popen([*command, "--num_samples=2"], stdout=side, stderr=subprocess.PIPE) as at:
        os.close(side)
        with suppress(OSError):  # Linux's way to say that the other end is closed
            while piece := os.read(main, 65536):
                shown += piece
        at.stderr.read()
    os.close(main)
    piped = subprocess.run([*command, "--num_samples=2"], capture_output=True, check=True).stdout
    assert {ord(c) for c in "\r\x07\x1b\x7f"} <= set(piped) and b"\xc2\x9b" in piped
    shown, piped = shown.decode().replace("\r\n", "\n"), piped.decode()
    assert shown == re.sub("[\r\x07\x1b\x7f\x9b\x9d]", "\ufffd", piped)


def test_ctrl_c_stops_a_text_and_clears_a_line(terminal, folder):
    at = terminal("--max_new_tokens=30", "--out=talk.jsonl")
    at.expect("\n> ")
    for _ in range(2):
        at.type("/max_new_tokens 1_000_000\nab\n")
        at.expect("\nab[^>]{200}")  # it is still streaming
        at.type(CTRL_C)
        assert "---" not in at.expect("\n> ", seconds=20)
    at.type("/max_new_tokens 7\n")
    at.expect("> ")
    at.type("xyz")
    at.expect("xyz")
    for _ in range(3):  # at an empty line too, repeatedly
        time.sleep(0.3)  # the line editor could miss a signal before it waits for input
        at.type(CTRL_C)
        at.expect("\n> ")
    at.type("ab\n")
    at.expect(f"\nab[^\n]*(\n[^\n]*)*\n{DASHES}> ")
    at.type("/quit\n")
    assert at.status() == 0
    written = records(folder / "talk.jsonl")  # without interrupted texts
    assert [(one["prompt"], one["sample"], len(one["text"])) for one in written] == [("ab", 2, 7)]


def test_redirected_text_has_no_prompt_sign(terminal, folder, batch):
    with open(folder / "text.txt", "wb") as file:
        at = terminal("--max_new_tokens=30", stdout=file)
        at.expect("\n> ")
        at.type("ab\n")
        at.expect("> ")
        at.type(CTRL_D)
        assert at.status() == 0
    assert texts((folder / "text.txt").read_text(encoding="utf-8")) == batch("ab")


def test_ctrl_c_in_a_pipe_exits(folder):
    """Nobody can type further input."""
    if sys.platform == "win32":
        pytest.skip("Windows has no such signal")
    import signal

    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--device=cpu", "--interactive", ENDLESS],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdin.write(b"ab\nab\n")
    process.stdin.flush()
    assert process.stdout.read(100)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors.endswith(b"interrupted\n")


def test_killed_session_leaves_complete_lines(folder):
    argv = ["--interactive", "--max_new_tokens=20", "--out=talk.jsonl"]
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--device=cpu", *argv],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    process.stdin.write(b"ab\n" * 5000)
    process.stdin.flush()
    process.stdout.read(2000)
    process.kill()
    process.communicate()
    assert 20 < len(records("talk.jsonl")) < 5000
