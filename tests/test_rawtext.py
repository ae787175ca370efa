"""Raw text is found in the promised order, and read right in whatever encoding it is."""

import hashlib
import io
import os
import urllib.error
import urllib.request

import pytest

from brisk.errors import UserError
from brisk.rawtext import find_text

URL = "https://example.org/raw.txt"
RAW = "Grüße\r\nund mehr".encode()
SHA256 = hashlib.sha256(RAW).hexdigest()


def look(here, given=""):
    return find_text(given, here, "raw.txt", URL, SHA256)


@pytest.fixture
def network(monkeypatch):
    """A network whose answer is the last thing in the list; without one there is no network."""
    answers = []

    def urlopen(url, timeout):
        if not answers:
            raise urllib.error.URLError("no route to host")
        return io.BytesIO(answers[-1])

    monkeypatch.delenv("BRISK_DATA", raising=False)
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return answers


def test_text_is_looked_for_in_the_promised_order(tmp_path, monkeypatch, network):
    here, shared = tmp_path / "here", tmp_path / "shared"
    here.mkdir()
    shared.mkdir()
    network.append(RAW)
    assert look(here) == ("Grüße\nund mehr", URL)
    assert (here / "input.txt").read_bytes() == RAW  # kept, so the next time needs no network
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


def test_without_any_text_three_lines_say_what_to_do(tmp_path, network, capsys):
    with pytest.raises(UserError, match=rf"download {URL} and save it as .*input\.txt"):
        look(tmp_path)
    looked, use = capsys.readouterr().err.splitlines()
    assert "input.txt" in looked and "--input=PATH" in use


def test_a_damaged_download_is_not_kept(tmp_path, network):
    network.append(RAW[:-1])
    with pytest.raises(UserError, match="checksum"):
        look(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_given_file_that_is_missing_or_no_text_is_told(tmp_path, network):
    network.append(RAW)
    with pytest.raises(UserError, match=r"cannot read .*: No such file"):
        look(tmp_path, str(tmp_path / "missing.txt"))
    (tmp_path / "zeros.txt").write_bytes(b"a\0b")
    with pytest.raises(UserError, match="no text"):
        look(tmp_path, str(tmp_path / "zeros.txt"))
