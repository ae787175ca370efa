"""Raw text on disk: finding it, detecting its encoding, and reading it a piece at a time."""

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

# Besides UTF-8 and whatever has a byte order mark. Few on purpose: the more there are, the
# likelier a wrong one fits. Each is the largest of its family (GB18030 reads GBK and GB2312).
ENCODINGS = ["gb18030", "big5hkscs", "cp932", "euc_jp", "cp949", "cp1251", "koi8_r", "cp1252"]
MARKS = [  # longest first: UTF-32's mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (b"\x84\x31\x95\x33", "gb18030"),
]


class TextFile:
    """The text of a file, possibly compressed (.gz, .bz2, .xz, .zst, .zip), as an iterable of
    strings of about a million characters; it can be gone through again and again.

    A byte order mark is left out, and line ends become "\\n". `encoding` is what it was read as.

    Raises `UserError` for a file that cannot be read, that is no text, or that is not in that
    encoding throughout.
    """

    def __init__(self, path, encoding="auto"):
        self.path = path if isinstance(path, ZipMember) else Path(path)
        refuse_binary(self.path)
        self.encoding = encoding
        if encoding == "auto":
            self.encoding = detect_encoding(self.path)
        else:
            try:
                "".encode(encoding)  # fails for what is no encoding of text, such as hex, too
            except (LookupError, UnicodeError) as error:
                raise UserError(f"--encoding={encoding}: Python knows no such encoding") from error

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
                    f"{self.path} is not {self.encoding} at byte {place}; name its encoding "
                    f"(--encoding=gb18030, say), or convert it: {iconv(self.path, 'NAME')}"
                ) from error
            position += len(raw)
            if first and text:  # GB18030's mark decodes to U+FEFF like any other character
                text, first = text.removeprefix("\ufeff"), False
            if piece := lines.decode(text, final=not raw):
                yield piece


class Lines:
    """The lines of a text that are not empty; with `end`, all of them, each followed by it."""

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
    """The whole text of a file as one string."""
    return "".join(TextFile(path, encoding))


def detect_encoding(path):
    """The name of the encoding of a text file: from its byte order mark, else UTF-8 if it is that,
    else what its bytes look most like. ASCII counts as UTF-8.

    The first block with anything but ASCII decides. Raises `UserError` where it looks like no text.
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
            f"{path} is UTF-8, but damaged at byte {position}; leave out the damaged bytes: "
            f"{iconv(path, 'utf-8').replace('iconv', 'iconv -c')}"
        )
    found = guess_encoding(sample, 4 if more else 1)
    if found is None:
        raise UserError(
            f"{path} is not UTF-8 at byte {position}, and its encoding is unknown; name it "
            f"(--encoding=gb18030, say), or convert it: {iconv(path, 'NAME')}"
        )
    note(
        f"{path} is not UTF-8 at byte {position}; it looks like {found}, and is read as that. "
        f"If it is not: --encoding=NAME, or convert it: {iconv(path, found)}"
    )
    return found


def refuse_zeros(path, block):
    """Raise `UserError` for a block with bytes of zero: UTF-16 without a mark has many."""
    for encoding, ascii_half in (("utf-16-le", block[1::2]), ("utf-16-be", block[0::2])):
        zeros = ascii_half.count(0)
        if zeros > max(8, 0.4 * len(ascii_half)) and block.count(0) < 1.1 * zeros:
            raise UserError(f"{path} looks like {encoding}; if it is: --encoding={encoding}")
    raise NotText(f"{path} is no text: it has bytes of zero")


def is_damaged_utf8(sample):
    """Whether bytes that are not UTF-8 hold at least as many of its multi-byte characters as bytes
    that cannot belong to one: text in another encoding has few."""
    text = sample.decode("utf-8", errors="replace")
    invalid = text.count("\N{REPLACEMENT CHARACTER}")
    return sum(map(len, re.findall(r"[^\0-\x7f\ufffd]+", text))) >= invalid


def guess_encoding(sample, cuts):
    """The encoding that bytes look most like, or None. They may end within a character: `cuts` is
    the number of ends to try."""
    import charset_normalizer

    # Lines of ASCII say nothing.
    telling = b"".join(line for line in sample.splitlines(True) if not line.isascii())
    samples = [telling[: len(telling) - cut] for cut in range(cuts)]
    guesses = (charset_normalizer.from_bytes(cut, cp_isolation=ENCODINGS).best() for cut in samples)
    found = next(filter(None, guesses), None)
    return found and found.encoding


def iconv(path, encoding):
    """The command that converts a file to UTF-8."""
    name = shlex.quote(str(path))
    return f"iconv -f {encoding} -t utf-8 {name} > new.txt"


def find_text(given, here, filename, url, sha256, encoding="auto"):
    """The raw text of a data set, and a word on where it comes from.

    Looks at the path `given` (if not empty), `here/input.txt`, `$BRISK_DATA/filename`, then `url`,
    whose bytes must have the checksum `sha256` (hex) and are kept as `here/input.txt`. Line ends
    become "\\n", as in nanoGPT.

    Returns (text, source); source is `url` if the checksum is the known one, else the file's name.
    Raises `UserError` where there is no text.
    """
    path = find_file(given, here, filename, url, sha256)
    text = read_text(path, encoding)
    if not text:
        raise UserError(f"{path} is empty")
    return text, url if url and checksum(path) == sha256 else path.name


def find_file(given, here, filename, url, sha256, name="input.txt"):
    """The path of a raw file, looked for as in `find_text`; `name` is what it is called in `here`.
    Without a `url` the network is left out."""
    if given:
        return Path(given)
    places = [Path(here) / name]
    if os.environ.get("BRISK_DATA"):
        places.append(Path(os.environ["BRISK_DATA"]) / filename)
    found = next(filter(Path.exists, places), None)
    if found is None and not url:
        looked = ", ".join(map(str, places))
        raise UserError(f"no text found at {looked}; give a file of yours: --input=PATH")
    return found or download(url, sha256, places)


def download(url, sha256, places):
    """Keep the bytes at `url` at the first of `places`, where it was looked for in vain."""
    kept = places[0]
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            raw = response.read()
        if sha256 and hashlib.sha256(raw).hexdigest() != sha256:
            raise UserError(f"what {url} sent is damaged (its checksum is wrong); try again")
        part = kept.with_suffix(".part")
        part.write_bytes(raw)
        return part.replace(kept)
    except (OSError, HTTPException) as error:
        looked = ", ".join(map(str, places))
        print(f"looked for the text at {looked} and {url} ({error})", file=sys.stderr)
        print("to use a file of your own: --input=PATH", file=sys.stderr)
        raise UserError(f"no text found; download {url} and save it as {kept}") from error
