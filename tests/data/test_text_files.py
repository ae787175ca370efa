"""Search order of raw text, and detection of its encoding."""

import bz2
import gzip
import hashlib
import io
import lzma
import os
import urllib.error
import urllib.request

import pytest

from brisk.data import raw_files
from brisk.data.text_files import TextFile, find_text, read_text
from brisk.errors import UserError

URL = "https://example.org/raw.txt"
RAW = "Grüße\r\nund mehr".encode()
SHA256 = hashlib.sha256(RAW).hexdigest()


def look(here, given=""):
    return find_text(given, here, "raw.txt", URL, SHA256)


@pytest.fixture
def network(monkeypatch):
    """A network that answers with the last item of the list; without items, no network."""
    answers = []

    def urlopen(url, timeout):
        if not answers:
            raise urllib.error.URLError("no route to host")
        return io.BytesIO(answers[-1])

    monkeypatch.delenv("BRISK_DATA", raising=False)
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return answers


def test_search_order(tmp_path, monkeypatch, network):
    here, shared = tmp_path / "here", tmp_path / "shared"
    here.mkdir()
    shared.mkdir()
    network.append(RAW)
    assert look(here) == ("Grüße\nund mehr", URL)
    assert (here / "input.txt").read_bytes() == RAW  # saved for the next time
    network.clear()
    assert look(here) == ("Grüße\nund mehr", URL)

    (here / "input.txt").unlink()
    (shared / "raw.txt").write_text("shared")
    monkeypatch.setenv("BRISK_DATA", str(shared))
    assert look(here) == ("shared", "raw.txt")
    (here / "input.txt").write_text("beside")
    assert look(here) == ("beside", "input.txt")
    (tmp_path / "mine.txt").write_text("given")
    assert look(here, str(tmp_path / "mine.txt")) == ("given", "mine.txt")


def test_missing_text_is_three_lines(tmp_path, network, capsys):
    with pytest.raises(UserError, match=rf"download {URL} and save it as .*input\.txt"):
        look(tmp_path)
    looked, use = capsys.readouterr().err.splitlines()
    assert "input.txt" in looked and "--input=PATH" in use


def test_damaged_download_is_not_kept(tmp_path, network):
    network.append(RAW[:-1])
    with pytest.raises(UserError, match="checksum"):
        look(tmp_path)
    assert os.listdir(tmp_path) == []


def test_missing_or_binary_file_is_refused(tmp_path, network):
    network.append(RAW)
    with pytest.raises(UserError, match=r"cannot read .*: No such file"):
        look(tmp_path, str(tmp_path / "missing.txt"))
    (tmp_path / "zeros.txt").write_bytes(b"a\0b")
    with pytest.raises(UserError, match="not text"):
        look(tmp_path, str(tmp_path / "zeros.txt"))


# ----------------------------------------------------------------------------- encodings

SIMPLIFIED = (
    "第一章　风雪\n那年冬天，雪下得很大。他推开门，看见院子里站着一个人。\n“你是谁？”他问。\n"
)
TRADITIONAL = (
    "第一章　風雪\n那年冬天，雪下得很大。他推開門，看見院子裡站著一個人。\n「你是誰？」他問。\n"
)
JAPANESE = "吾輩は猫である。名前はまだ無い。\nどこで生れたかとんと見当がつかぬ。\n"
FRENCH = (
    "Longtemps, je me suis couché de bonne heure. Parfois, à peine ma bougie éteinte, mes yeux se\n"
    "fermaient si vite que je n’avais pas le temps de me dire : « Je m’endors. » Et, une\n"
    "demi-heure après, la pensée qu’il était temps de chercher le sommeil m’éveillait ;\n"
)
CASES = [
    ("utf-8", SIMPLIFIED),
    ("utf-8-sig", SIMPLIFIED),
    ("utf-16", FRENCH),
    ("utf-32", SIMPLIFIED),
    ("gb18030", SIMPLIFIED),
    ("big5", TRADITIONAL),
    ("cp932", JAPANESE),
    ("cp1252", FRENCH),
]


def format_bytes(text, encoding, line_end="\n"):
    return text.replace("\n", line_end).encode(encoding)


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(("encoding", "text"), CASES)
def test_any_encoding_and_line_end(tmp_path, monkeypatch, encoding, text, line_end):
    file = tmp_path / "a.txt"
    file.write_bytes(format_bytes(text * 5, encoding, line_end))
    assert read_text(file) == text * 5
    found = TextFile(file)
    for piece in (1, 2, 3, 7):  # pieces end inside characters and line ends
        monkeypatch.setattr(raw_files, "PIECE", piece)
        assert "".join(found) == text * 5 == "".join(found)
        assert read_text(file, encoding) == text * 5


@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"\xff\xfe", "utf-16-le"),
        (b"\xfe\xff", "utf-16-be"),
        (b"\xff\xfe\0\0", "utf-32-le"),
        (b"\0\0\xfe\xff", "utf-32-be"),
        (b"\x84\x31\x95\x33", "gb18030"),
        (b"\xef\xbb\xbf", "utf-8"),
    ],
)
def test_byte_order_marks(tmp_path, mark, encoding):
    file = tmp_path / "a.txt"
    file.write_bytes(mark + SIMPLIFIED.encode(encoding))
    assert read_text(file) == read_text(file, encoding) == SIMPLIFIED
    file.write_bytes(mark)
    assert read_text(file) == ""


def test_given_encoding_wins(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("été".encode())
    assert read_text(file) == "été"
    assert read_text(file, "latin-1") == "Ã©tÃ©"


@pytest.mark.parametrize("name", ["klingon", "", "hex", "rot13", "undefined"])
def test_unknown_encoding_is_refused(tmp_path, name):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match=f"--encoding={name}: Python has no such encoding"):
        TextFile(tmp_path / "a.txt", name)


@pytest.mark.parametrize("piece", [1, 4, 2**20])
def test_invalid_byte_is_located(tmp_path, monkeypatch, piece):
    file = tmp_path / "a.txt"
    file.write_bytes("好".encode() + b"ab\xff" + "好".encode())
    monkeypatch.setattr(raw_files, "PIECE", piece)
    with pytest.raises(UserError, match=r"a\.txt is not utf-8 at byte 5; name its encoding"):
        read_text(file, "utf-8")
    file.write_bytes(b"ab\xe5\xa5")  # ends inside a character
    with pytest.raises(UserError, match="at byte 2;"):
        read_text(file, "utf-8")


def test_late_invalid_byte_is_located(tmp_path):
    start = "你好 hello\n".encode() * 300_000
    (tmp_path / "a.txt").write_bytes(start + b"\xff")
    with pytest.raises(UserError, match=f"is not utf-8 at byte {len(start)};"):
        read_text(tmp_path / "a.txt")


@pytest.mark.parametrize(("encoding", "text"), [c for c in CASES if "utf" not in c[0]])
def test_encoding_after_a_long_ascii_start(tmp_path, capsys, encoding, text):
    plain = "Project notes, in plain ASCII, line after line of them.\n"
    whole = plain * 30_000 + text + plain * 100 + text * 3
    (tmp_path / "a.txt").write_bytes(whole.encode(encoding))
    assert read_text(tmp_path / "a.txt") == whole
    assert "reading it as" in capsys.readouterr().err


@pytest.mark.parametrize("shift", range(4))
def test_encoding_of_one_huge_line(tmp_path, shift):
    """The sample may end inside a character."""
    for encoding, text in (("gb18030", SIMPLIFIED), ("utf-8", SIMPLIFIED), ("big5", TRADITIONAL)):
        line = "a" * shift + text.replace("\n", "") * 40_000
        (tmp_path / "a.txt").write_bytes(line.encode(encoding))
        assert read_text(tmp_path / "a.txt") == line


def test_text_may_end_with_an_accent(tmp_path):
    text = FRENCH * 5 + "… un café"
    (tmp_path / "a.txt").write_bytes(text.encode("cp1252"))
    assert read_text(tmp_path / "a.txt") == text
    (tmp_path / "a.txt").write_bytes("un café".encode("cp1252"))  # too short to detect
    assert read_text(tmp_path / "a.txt").startswith("un caf")
    (tmp_path / "b.txt").write_bytes(b"a" * (raw_files.PIECE - 1) + "é…".encode())
    assert read_text(tmp_path / "b.txt").endswith("aé…")  # the first of it, half in a block


# ----------------------------------------------------------------------------- compression


@pytest.mark.parametrize(("end", "module"), [("gz", gzip), ("bz2", bz2), ("xz", lzma)])
def test_compressed_text_and_damage(tmp_path, end, module):
    file = tmp_path / f"a.txt.{end}"
    packed = module.compress(format_bytes(SIMPLIFIED * 3000, "gb18030", "\r\n"))
    file.write_bytes(packed)
    assert read_text(file) == SIMPLIFIED * 3000
    for damaged in (packed[:-10], b"no such thing", packed[:40] + b"????" + packed[44:]):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=f"cannot read .*{end}: "):
            read_text(file, "gb18030")
