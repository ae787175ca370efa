"""Tokenizers: round trips, ids that match nanoGPT and tiktoken, and safe loading."""

import base64
import json
import os
import pickle
import random
import sys
import time
import unicodedata
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brisk.data.bpe import (
    GPT2_PATTERN,
    KINDS,
    TIKTOKEN_PATTERN,
    BPETokenizer,
    gpt2,
    train_bpe,
    train_merges,
)
from brisk.data.saved_tokenizer import from_dict, read_meta_pkl, same_tokenizer
from brisk.data.tokenizer import (
    EOT,
    ByteTokenizer,
    CharTokenizer,
    WordTokenizer,
    find_words,
    learn_words,
)
from brisk.errors import UserError

TEXT = "First Citizen:\nBefore we proceed, hear me — “speak”, 你好 😀é\r\n\tend"
valid_text = st.text()  # without lone surrogates


def small_bpe():
    """A BPE with the 256 bytes and five merges, built without files."""
    tiktoken = pytest.importorskip("tiktoken")
    merges = [b"he", b"th", b"the", b" t", b" the"]
    ranks = {bytes([i]): i for i in range(256)} | {m: 256 + i for i, m in enumerate(merges)}
    pattern = r" ?\p{L}+|\s+|[^\s\p{L}]+"
    return BPETokenizer(
        tiktoken.Encoding(
            "small", pat_str=pattern, mergeable_ranks=ranks, special_tokens={EOT: 261}
        )
    )


@pytest.fixture(scope="module")
def shakespeare():
    file = Path(os.environ.get("BRISK_DATA", ""), "tinyshakespeare.txt")
    if "BRISK_DATA" not in os.environ or not file.exists():
        pytest.skip("BRISK_DATA names no folder with tinyshakespeare.txt")
    return file.read_text(encoding="utf-8")


def tokenizers():
    return [
        CharTokenizer(sorted(set(TEXT))),
        CharTokenizer(sorted(set(TEXT)), eot=True),
        ByteTokenizer(),
        WordTokenizer(["the", "citizen"], stop_words=["we"]),
        WordTokenizer(["The"], lower=False, eot=True),
        small_bpe(),
    ]


@given(valid_text)
def test_bytes_and_bpe_round_trip(text):
    for tokenizer in (ByteTokenizer(), small_bpe()):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        # a character may be spread over several tokens
        streamed = b"".join(tokenizer.token_bytes(i) for i in tokenizer.encode(text).tolist())
        assert streamed.decode() == text


@given(valid_text, valid_text)
def test_characters_round_trip(known, other):
    tokenizer = CharTokenizer(sorted(set(known)))
    assert tokenizer.encode(known).tolist() == [sorted(set(known)).index(c) for c in known]
    assert tokenizer.decode(tokenizer.encode(known)) == known
    assert CharTokenizer.of(known).characters == tokenizer.characters
    if not set(other) <= set(known):
        with pytest.raises(UserError, match="outside the vocabulary"):
            tokenizer.encode(other)


def test_ascii_in_a_large_vocabulary():
    characters = [chr(code) for code in range(32, 400)]
    tokenizer = CharTokenizer(characters)
    assert tokenizer.encode("plain text").tolist() == [ord(c) - 32 for c in "plain text"]
    for text in ("a\nline", "a\n€"):
        with pytest.raises(UserError, match="outside the vocabulary"):
            tokenizer.encode(text)


def test_gpt2_from_its_dict_needs_no_files(gpt2_tokenizer, monkeypatch):
    monkeypatch.setattr("tiktoken.get_encoding", None)
    again = from_dict(json.loads(json.dumps(gpt2_tokenizer.to_dict())))
    assert again.encoding is not gpt2_tokenizer.encoding
    assert (again.vocab_size, again.eot) == (50257, 50256)

    @settings(max_examples=200)
    @given(valid_text)
    def check(text):
        ids = gpt2_tokenizer.encoding.encode_ordinary(text)
        assert gpt2_tokenizer.encode(text).tolist() == again.encode(text).tolist() == ids
        assert again.decode(ids) == text

    check()


def test_real_text(gpt2_tokenizer, shakespeare):
    again = from_dict(gpt2_tokenizer.to_dict())
    ids = gpt2_tokenizer.encode(shakespeare)
    assert ids.dtype == np.uint16
    assert np.array_equal(again.encode(shakespeare), ids)
    assert again.decode(ids) == shakespeare
    characters = CharTokenizer(sorted(set(shakespeare)))
    stoi = {c: i for i, c in enumerate(sorted(set(shakespeare)))}
    assert characters.encode(shakespeare).tolist() == [stoi[c] for c in shakespeare]


def test_json_round_trip():
    for tokenizer in tokenizers():
        again = from_dict(json.loads(json.dumps(tokenizer.to_dict())))
        assert (again.kind, again.vocab_size, again.eot) == (
            tokenizer.kind,
            tokenizer.vocab_size,
            tokenizer.eot,
        )
        assert again.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
        assert again.decode(range(-2, 300)) == tokenizer.decode(range(-2, 300))


LESSON = "def add(a, b):\n    return a + b\n\n\nfor number in range(10):\n    print(number)\n" * 20


@given(st.text(max_size=60) | st.sampled_from([LESSON, "  \n\t x", "数字 and 🎉's"]))
@settings(max_examples=60)
def test_trained_bpe_matches_tokenizers(text):
    learner, tokenizer = train_merges([LESSON], 279), train_bpe([LESSON], 280)
    assert tokenizer.encode(text).tolist() == learner.encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text
    again = from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert (again.vocab_size, again.eot) == (280, 279)
    assert again.encode(text).tolist() == tokenizer.encode(text).tolist()


def test_all_planes_round_trip(gpt2_tokenizer):
    characters = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    chosen = characters[::97] + [chr((plane << 16) + 0xFFFD) for plane in range(17)]
    text = "".join(chosen)
    trained = train_bpe([LESSON, text], 300)
    for tokenizer in (CharTokenizer(sorted(set(chosen))), ByteTokenizer(), trained, gpt2_tokenizer):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert (
            from_dict(json.loads(json.dumps(tokenizer.to_dict()))).decode(tokenizer.encode(text))
            == text
        )


def test_long_run_trains_in_bounded_time():
    run = "".join(random.Random(1).choices("ACGT", k=1_000_000))
    start = time.process_time()  # independent of other programs
    tokenizer = train_bpe([run], 1000)
    assert time.process_time() - start < 20  # takes three seconds; as one piece, minutes
    assert tokenizer.decode(tokenizer.encode(run)) == run
    assert len(tokenizer.encode(run)) < len(run) / 3


def test_bpe_vocabulary_is_limited_by_the_text(capsys):
    with pytest.raises(UserError, match="below 257"):
        train_bpe([LESSON], 256)
    tokenizer = train_bpe([LESSON], 5000)
    assert f"this text has too few pairs, using {tokenizer.vocab_size}" in capsys.readouterr().out
    assert 257 < tokenizer.vocab_size < 5000 and tokenizer.eot == tokenizer.vocab_size - 1
    assert tokenizer.decode(tokenizer.encode(LESSON)) == LESSON
    assert train_bpe([LESSON], tokenizer.vocab_size).to_dict() == tokenizer.to_dict()


def test_end_of_text_needs_allow_eot():
    text = f"the{EOT}{EOT}the"
    for tokenizer in (ByteTokenizer(), small_bpe(), CharTokenizer(sorted(set(text)), eot=True)):
        plain, special = tokenizer.encode(text), tokenizer.encode(text, allow_eot=True)
        assert tokenizer.eot not in plain
        assert special.tolist().count(tokenizer.eot) == 2
        assert special.dtype == plain.dtype == np.uint16
        assert tokenizer.decode(plain) == tokenizer.decode(special) == text
    without = CharTokenizer(sorted(set(text)))
    assert without.encode(text, allow_eot=True).tolist() == without.encode(text).tolist()


@given(st.lists(st.integers(-(2**40), 2**40) | st.integers(0, 300)))
def test_decoding_never_fails(ids):
    for tokenizer in tokenizers():
        assert isinstance(tokenizer.decode(ids), str)


def test_unknown_ids_decode_to_u_fffd():
    for tokenizer in tokenizers():
        assert tokenizer.decode([tokenizer.vocab_size, -1]) == "\N{REPLACEMENT CHARACTER}" * 2
    assert ByteTokenizer().decode([0xC3, 0x61]) == "\N{REPLACEMENT CHARACTER}a"


def test_large_vocabulary_is_uint32():
    characters = [chr(i) for i in range(0x20000) if not 0xD800 <= i < 0xE000]
    tokenizer = CharTokenizer(characters)
    ids = tokenizer.encode("".join(characters))
    assert ids.dtype == np.uint32
    assert np.array_equal(ids, np.arange(len(characters)))


def test_unknown_character_is_named():
    with pytest.raises(UserError, match="'é', '你'"):
        CharTokenizer("abc").encode("a你bé")


def test_gpt2_without_network_names_the_variable(monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")

    def offline(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
        gpt2()


@pytest.mark.parametrize(
    "description",
    [None, [], {}, {"kind": "runes"}, {"kind": "char"}, {"kind": "bpe", "tokens": "!"}],
)
def test_damaged_dict_is_refused(description):
    with pytest.raises(UserError):
        from_dict(description)


CL100K = (  # tiktoken's pattern; GPT-4o's is below
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|"
    r"\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DROPPING = [  # GPT-2's pattern without one of its parts, and others
    GPT2_PATTERN.replace(r" ?\p{N}+|", ""),
    GPT2_PATTERN.replace(r"|\s+(?!\S)|\s+", r"|\s+(?!\S)"),
    GPT2_PATTERN.replace(r"[^\s\p{L}\p{N}]+", r"[^\s\p{L}\p{M}\p{N}]+"),
    GPT2_PATTERN.replace(r"[^\s\p{L}\p{N}]+", r"[^\s\p{L}\p{N}\p{Co}]+"),
    GPT2_PATTERN.replace(r"[^\s\p{L}\p{N}]+", r"[^\s\p{L}\p{N}]{2,}"),
    GPT2_PATTERN.replace(r" ?\p{L}+", r" ?\p{L}{1,9}(?!\p{L})"),
    GPT2_PATTERN.replace(r" ?\p{L}+", r" ?[\p{Ll}\p{Lu}\p{Lt}\p{Lo}]+"),
    GPT2_PATTERN.replace(r"\s+(?!\S)|\s+", r"[^\S\u2028]+"),
    r"\w+",
    r"[^🙂]+",
    r"'(?!S)|[^']+",
    r"\S+|\s+(?=\S)",
    r"\w\K\w|[\s\S]",
    r"a*|[\s\S]",
    r"[\s\S]|$",
    r"(?:a|a)+b|[\s\S]",  # exponential
    r"(?:\w|\w\w)+$|[\s\S]",
]


def described(pattern):
    return {**train_bpe(["some text"], 257).to_dict(), "pattern": pattern}


@pytest.mark.parametrize("pattern", DROPPING)
def test_pattern_that_drops_text_is_refused(pattern):
    start = time.process_time()  # independent of other programs
    with pytest.raises(UserError, match="pattern does not match all text"):
        from_dict(described(pattern))
    assert time.process_time() - start < 10  # exponential patterns take a second or two


@pytest.mark.parametrize("pattern", [CL100K, O200K, r"\w{1,60}|\W", r"[\s\S]", r"(\s)\1*|\S+"])
def test_pattern_that_matches_all_is_accepted(pattern):
    tokenizer = from_dict(described(pattern))
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_kinds_cover_every_category():
    found = {unicodedata.category(kind) for kind in KINDS}
    assert found == {unicodedata.category(chr(code)) for code in range(0x110000)} - {"Cs"}


def test_same_tokenizer():
    bpe = train_bpe([TEXT], 300)
    other = from_dict({**bpe.to_dict(), "name": "another", "pattern": TIKTOKEN_PATTERN})
    assert same_tokenizer(bpe, other) and same_tokenizer(ByteTokenizer(), ByteTokenizer())
    others = [bpe, train_bpe([TEXT], 299), from_dict(described(CL100K)), ByteTokenizer()]
    others += [CharTokenizer("ab"), CharTokenizer("ba"), CharTokenizer("ab", eot=True)]
    for a, b in combinations(others, 2):
        assert not same_tokenizer(a, b)


# ----------------------------------------------------------------------------- words


def words_back(text, **settings):
    return learn_words([text], **settings).decode(learn_words([text], **settings).encode(text))


def test_words_round_trip():
    text = "Don't use AT&T's C++, C# or .NET (e.g. «Öl-Ofen 2»)!\nÉté_3 你好"
    assert words_back(text) == "don't use at&t's c++ c# or .net e.g öl ofen 2 été_3 你好 "
    assert words_back("The The the", lower=False) == "The The the "


@given(st.text() | st.text(st.sampled_from("aB9_ .'’&+#\n\u0130é")))
def test_words_are_stable_when_encoded_again(text):
    tokenizer = learn_words([text + " word"], eot=True)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16 and tokenizer.unk not in ids
    words = find_words(text)
    assert tokenizer.decode(ids) == "".join(word + " " for word in words)
    assert find_words(" ".join(words)) == words
    assert [tokenizer.words[i] for i in ids] == words
    other = WordTokenizer(["a"])
    assert set(other.encode(text).tolist()) <= {0, other.unk}


def test_words_are_ordered_by_frequency():
    texts = ["b a c", "c b c", "The d"]
    assert learn_words(texts).words == ["c", "b", "a", "the", "d"]  # ties in order of occurrence
    tokenizer = learn_words(texts, min_count=2, eot=True)
    assert tokenizer.words == ["c", "b"] and learn_words(texts, max_words=1).words == ["c"]
    assert (tokenizer.unk, tokenizer.eot, tokenizer.vocab_size) == (2, 3, 4)
    assert tokenizer.encode(f"a b{EOT}c").tolist()[:2] == [2, 1]
    assert tokenizer.encode(f"b{EOT}x c", allow_eot=True).tolist() == [1, 3, 2, 0]
    assert tokenizer.decode([1, 2, 3]) == f"b <|unknown|> {EOT}"
    assert [tokenizer.token_bytes(i) for i in range(4)] == [
        *(b"c ", b"b ", b"<|unknown|> "),
        EOT.encode(),
    ]


def test_stop_words_are_dropped():
    tokenizer = learn_words(["The cat and the hat"], stop_words=["the", "and"])
    assert tokenizer.words == ["cat", "hat"]
    again = from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    for each in (tokenizer, again):
        assert each.encode("AND the hat, the dog").tolist() == [1, each.unk]


@given(st.lists(st.text(min_size=1, max_size=4), unique=True), st.booleans(), st.booleans())
def test_words_json_round_trip(words, lower, eot):
    tokenizer = WordTokenizer(words, ["a", "b"], lower, eot)
    again = from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert again.to_dict() == tokenizer.to_dict()
    assert (again.words, again.unk, again.eot) == (words, tokenizer.unk, tokenizer.eot)


# ----------------------------------------------------------------------------- meta.pkl


def write_meta_pkl(path, itos, protocol=None):
    stoi = {character: i for i, character in itos.items()}
    meta = {"vocab_size": len(itos), "itos": itos, "stoi": stoi}
    path.write_bytes(pickle.dumps(meta, protocol=protocol))


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("integer", [int, np.int64, np.uint16, np.int8])
def test_nanogpts_meta_pkl_is_read(tmp_path, protocol, integer):
    characters = sorted(set(TEXT))
    write_meta_pkl(tmp_path / "m", {integer(i): c for i, c in enumerate(characters)}, protocol)
    ids = read_meta_pkl(tmp_path / "m").encode(TEXT)
    assert ids.tolist() == [characters.index(c) for c in TEXT]


class Hostile:
    """An object whose unpickling calls a function with an argument."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [eval, exec])
def test_hostile_meta_pkl_runs_nothing(tmp_path, function):
    code = f"open({str(tmp_path / 'ran')!r}, 'w')"
    pickle.loads(pickle.dumps(Hostile(function, code)))  # the attack works with plain pickle
    (tmp_path / "ran").unlink()
    (tmp_path / "m").write_bytes(pickle.dumps({"itos": {0: Hostile(function, code)}}))
    with pytest.raises(UserError, match="not a plain value"):
        read_meta_pkl(tmp_path / "m")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [np.zeros(3), np.float64(1), Path("a"), {"a"}, len])
def test_unpickler_allows_plain_values_only(tmp_path, value):
    (tmp_path / "m").write_bytes(pickle.dumps({"itos": {0: "a"}, "more": value}, protocol=3))
    with pytest.raises(UserError):
        read_meta_pkl(tmp_path / "m")


@given(st.binary(max_size=60), st.integers(0, 400))
def test_damaged_pickle_is_refused(tmp_path_factory, garbage, cut):
    path = tmp_path_factory.mktemp("pickles") / "m"
    write_meta_pkl(path, dict(enumerate("abcdefgh")))
    whole = path.read_bytes()
    for damaged in (garbage, whole[: cut % len(whole)], {"itos": 3}, {"itos": {1: "a"}}):
        path.write_bytes(damaged if isinstance(damaged, bytes) else pickle.dumps(damaged))
        with pytest.raises(UserError):
            read_meta_pkl(path)


def test_characters_do_not_import_tiktoken(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    assert CharTokenizer("ab").encode("ba").tolist() == [1, 0]
    with pytest.raises(UserError, match="pip install tiktoken"):
        from_dict({"kind": "bpe", "tokens": base64.b64encode(b"a").decode(), "name": "a"})
