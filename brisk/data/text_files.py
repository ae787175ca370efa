"""Find text files, detect their encoding, and read them in pieces."""

import codecs
import hashlib
import io
import os
import re
import shlex
import sys
import urllib.request
from http.client import HTTPException
from pathlib import Path

from brisk.data.raw_files import NotText, ZipMember, blocks, checksum, refuse_binary
from brisk.errors import UserError, note

# Candidates for text that is not UTF-8 and has no byte order mark. The list is short on purpose:
# the more candidates, the likelier a wrong one fits. GB18030 includes GBK and GB2312.
ENCODINGS = ["gb18030", "big5hkscs", "cp932", "euc_jp", "cp949", "cp1251", "koi8_r", "cp1252"]
MARKS = [  # byte order marks, longest first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (b"\x84\x31\x95\x33", "gb18030"),
]


class TextFile:
    """Re-iterable over the text of a file in strings of about a million characters.

    The file may be compressed (.gz, .bz2, .xz, .zst, .zip). The byte order mark is removed, and
    line ends become "\\n". The attribute `encoding` is the detected encoding.

    Raises `UserError` if the file cannot be read, is binary, or is not valid in that encoding.
    """

    def __init__(self, path, encoding="auto"):
        self.path = path if isinstance(path, ZipMember) else Path(path)
        refuse_binary(self.path)
        self.encoding = encoding
        if encoding == "auto":
            self.encoding = detect_encoding(self.path)
        else:
            try:
                "".encode(encoding)  # also rejects codecs that are not text encodings, such as hex
            except (LookupError, UnicodeError) as error:
                raise UserError(f"--encoding={encoding}: Python has no such encoding") from error

    def __iter__(self):
        decoder = codecs.getincrementaldecoder(self.encoding)()
        lines = io.IncrementalNewlineDecoder(None, translate=True)
        position, first = 0, True
        for raw in blocks(self.path):
            try:
                waiting = len(decoder.getstate()[0])
                text = decoder.decode(raw, final=not raw)
            except UnicodeError as error:
                place = position - waiting + getattr(error, "start", 0)
                raise UserError(
                    f"{self.path} is not {self.encoding} at byte {place}; name its encoding, such "
                    f"as --encoding=gb18030, or convert it: {iconv(self.path, 'NAME')}"
                ) from error
            position += len(raw)
            if first and text:  # Python's gb18030 decodes the byte order mark to U+FEFF
                text, first = text.removeprefix("\ufeff"), False
            if piece := lines.decode(text, final=not raw):
                yield piece


class Lines:
    """The non-empty lines of a text; with `end`, all lines, each followed by `end`."""

    def __init__(self, text, end=""):
        self.text, self.end = text, end

    def __iter__(self):
        rest = ""
        for piece in self.text:
            *lines, rest = (rest + piece).split("\n")
            yield from (line + self.end for line in lines if line or self.end)
        if rest:
            yield rest + self.end


def read_text(path, encoding="auto"):
    """Read a text file as one string."""
    return "".join(TextFile(path, encoding))


def detect_encoding(path):
    """Detect the encoding of a text file: by its byte order mark, else UTF-8 if valid, else the
    most likely of `ENCODINGS`. ASCII counts as UTF-8.

    Examines the first block that is not ASCII. Raises `UserError` if no encoding fits.
    """
    stream, position = blocks(path), 0
    for block in stream:
        if not position:
            for mark, encoding in MARKS:
                if block.startswith(mark):
                    return encoding
        if b"\0" in block:
            refuse_zeros(path, block)
        if not block.isascii():
            break
        position += len(block)
    else:
        return "utf-8"
    more = next(stream)
    sample = block + more
    try:
        codecs.getincrementaldecoder("utf-8")().decode(sample, final=not more)
        return "utf-8"
    except UnicodeDecodeError as error:
        position += error.start
    if is_damaged_utf8(sample):
        raise UserError(
            f"{path} is UTF-8, but damaged at byte {position}; remove the damaged bytes: "
            f"{iconv(path, 'utf-8').replace('iconv', 'iconv -c')}"
        )
    found = guess_encoding(sample, 4 if more else 1)
    if found is None:
        raise UserError(
            f"{path} is not UTF-8 at byte {position}, and its encoding is unknown; name it, such "
            f"as --encoding=gb18030, or convert it: {iconv(path, 'NAME')}"
        )
    note(
        f"{path} is not UTF-8 at byte {position}; reading it as {found}. If that is wrong: "
        f"--encoding=NAME, or convert it: {iconv(path, found)}"
    )
    return found


def refuse_zeros(path, block):
    """Raise `UserError` for a block with zero bytes: UTF-16 without a byte order mark or binary."""
    for encoding, ascii_half in (("utf-16-le", block[1::2]), ("utf-16-be", block[0::2])):
        zeros = ascii_half.count(0)
        if zeros > max(8, 0.4 * len(ascii_half)) and block.count(0) < 1.1 * zeros:
            raise UserError(f"{path} looks like {encoding}; if it is: --encoding={encoding}")
    raise NotText(f"{path} is not text: it has zero bytes")


def is_damaged_utf8(sample):
    """Whether invalid UTF-8 has at least as many valid multi-byte characters as invalid bytes. Text
    in another encoding has few."""
    text = sample.decode("utf-8", errors="replace")
    invalid = text.count("\N{REPLACEMENT CHARACTER}")
    return sum(map(len, re.findall(r"[^\0-\x7f\ufffd]+", text))) >= invalid


def guess_encoding(sample, cuts):
    """Return the most likely encoding of bytes, or None. `sample` may end inside a character, so
    this also tries it without its last bytes, up to `cuts` - 1."""
    import charset_normalizer

    # ASCII lines are the same in all encodings
    telling = b"".join(line for line in sample.splitlines(True) if not line.isascii())
    samples = [telling[: len(telling) - cut] for cut in range(cuts)]
    guesses = (charset_normalizer.from_bytes(cut, cp_isolation=ENCODINGS).best() for cut in samples)
    found = next(filter(None, guesses), None)
    return found and found.encoding


def iconv(path, encoding):
    """The shell command that converts a file to UTF-8."""
    name = shlex.quote(str(path))
    return f"iconv -f {encoding} -t utf-8 {name} > new.txt"


def find_text(given, here, filename, url, sha256, encoding="auto"):
    """Find and read the raw text of a data set.

    Searches the path `given` (if not empty), `here/input.txt`, `$BRISK_DATA/filename`, then `url`,
    which is saved as `here/input.txt` and must have the checksum `sha256` (hex). Line ends become
    "\\n", as in nanoGPT.

    Returns (text, source). `source` is `url` if the checksum matches, else the file's name. Raises
    `UserError` if no text is found.
    """
    path = find_file(given, here, filename, url, sha256)
    text = read_text(path, encoding)
    if not text:
        raise UserError(f"{path} is empty")
    return text, url if url and checksum(path) == sha256 else path.name


def find_file(given, here, filename, url, sha256, name="input.txt"):
    """Find a raw file as in `find_text` and return its path. `name` is its name in `here`. Without
    a `url`, nothing is downloaded."""
    if given:
        return Path(given)
    places = [Path(here) / name]
    if os.environ.get("BRISK_DATA"):
        places.append(Path(os.environ["BRISK_DATA"]) / filename)
    found = next(filter(Path.exists, places), None)
    if found is None and not url:
        looked = ", ".join(map(str, places))
        raise UserError(f"no text found at {looked}; use your own file: --input=PATH")
    return found or download(url, sha256, places)


def download(url, sha256, places):
    """Download `url` to the first of `places`, the paths already searched. Returns the path."""
    kept = places[0]
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            raw = response.read()
        if sha256 and hashlib.sha256(raw).hexdigest() != sha256:
            raise UserError(f"the download of {url} is damaged (wrong checksum); try again")
        part = kept.with_suffix(".part")
        part.write_bytes(raw)
        return part.replace(kept)
    except (OSError, HTTPException) as error:
        looked = ", ".join(map(str, places))
        print(f"searched for the text at {looked} and {url} ({error})", file=sys.stderr)
        print("to use your own file: --input=PATH", file=sys.stderr)
        raise UserError(f"no text found; download {url} and save it as {kept}") from error
