"""Recognize binary files by their first bytes, and suggest how to extract their text."""

import re
import shlex

HEAD = 4096  # bytes that `kind_of_file` needs

PANDOC = "convert it: pandoc -t plain -o {stem}.txt {name}"
OFFICE = "convert it: soffice --headless --convert-to txt:Text {name}"
PARQUET = "save it as parquet"
UNPACK = "unpack it and give the folder"
# Signatures that text never begins with: (bytes, kind, advice).
SIGNATURES = [
    (b"%PDF-", "a PDF", "convert it: pdftotext {name}"),
    (b"{\\rtf", "rich text (RTF)", PANDOC),
    (b"%!PS", "PostScript", "convert it: ps2ascii {name} {stem}.txt"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document", OFFICE),
    (b"AT&TFORM", "a DjVu document", "convert it: djvutxt {name} {stem}.txt"),
    (b"\x89PNG\r\n", "a PNG image", ""),
    (b"\xff\xd8\xff", "a JPEG image", ""),
    (b"\x1aE\xdf\xa3", "a Matroska video", ""),
    (b"SQLite format 3\0", "an SQLite database", "save its texts as csv: sqlite3 -csv -header"),
    (b"\x89HDF\r\n", "an HDF5 file", ""),
    (b"\x93NUMPY", "a numpy array", ""),
    (b"ARROW1\0\0", "an Arrow file", PARQUET),
    (b"Obj\x01", "an Avro file", PARQUET),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (b"Rar!\x1a\x07", "a rar archive", UNPACK),
    (b"\x1f\x8b\x08", "compressed twice", "decompress it first"),
    (b"\xfd7zXZ\0", "compressed twice", "decompress it first"),
    (b"\x04\x22\x4d\x18", "compressed by lz4", "decompress it first"),
    (b"\x7fELF", "a program", ""),
    (b"\xca\xfe\xba\xbe", "a program", ""),
    (b"\xed\xab\xee\xdb", "an rpm package", ""),
]
# Signatures that text may begin with: they count only if the head has a zero byte.
WEAK_SIGNATURES = [
    (rb"GIF8[79]a|BM|II\*\x00|MM\x00\*|RIFF....WEBP|....ftyp(heic|avif|mif1)", "an image"),
    (rb"ID3|OggS|fLaC|RIFF....WAVE|MThd|FORM....AIFF|\xff[\xe2-\xfb]", "audio"),
    (rb"....ftyp|RIFF....AVI ", "a video"),
    (rb"GGUF", "a GGUF model"),
    (rb".{8}\{\s*\"", "a safetensors model"),
    (rb"MZ|!<arch>\n", "a program"),
    (rb"wOF[F2]|OTTO|\x00\x01\x00\x00\x00", "a font"),
    (rb".{60}BOOKMOBI", "a Mobipocket book"),
]
# Formats based on zip: (name of a member, prefix of another member, kind, advice).
IN_ZIP = [
    ("[Content_Types].xml", "word/", "a Word document", PANDOC),
    ("[Content_Types].xml", "ppt/", "a PowerPoint document", OFFICE),
    ("[Content_Types].xml", "xl/", "an Excel document", "save it as csv"),
    ("META-INF/container.xml", "", "an EPUB book", PANDOC),
    ("mimetype", "content.xml", "an OpenDocument file", PANDOC),
    ("META-INF/MANIFEST.MF", "", "a Java archive", ""),
]


def kind_of_file(head):
    """Return (kind, advice) for a file that begins with `head`; None if it may be text."""
    for signature, kind, advice in SIGNATURES:
        if head.startswith(signature):
            return kind, advice
    if head[257:262] == b"ustar":
        return "a tar archive", UNPACK
    if re.match(rb"\x80[\x02-\x05][\x95}\](cX\x8aKMJ]", head, re.DOTALL):
        return "a Python pickle", ""
    if b"\0" in head:
        for pattern, kind in WEAK_SIGNATURES:
            if re.match(pattern, head, re.DOTALL):
                return kind, PANDOC if "book" in kind else ""
    return None


def kind_of_zip(names):
    """Return (kind, advice) for a document or model stored as a zip archive with members of these
    names; None for an ordinary archive."""
    for member, start, kind, advice in IN_ZIP:
        if member in names and any(name.startswith(start) for name in names):
            return kind, advice
    if any(name.split("/")[1:] == ["data.pkl"] for name in names):
        return "a PyTorch checkpoint", ""
    if names and all(name.endswith(".npy") for name in names):
        return "numpy arrays", ""
    return None


def refusal(path, kind, advice):
    """The error message for a binary file: its kind, and how to extract its text."""
    name, stem = shlex.quote(str(path)), shlex.quote(str(path).rsplit(".", 1)[0])
    advice = advice and "; " + advice.format(name=name, stem=stem)
    return f"{path} is not text: it is {kind}{advice}"
