"""Tokenizing on many cores, in parts, and after a kill gives what one process gives at one go."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_corpus import DOCUMENTS, small_bpe, write

from brisk import tokenizing


def test_workers_write_the_same_files_as_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizing, "BATCH", 100)
    tokenizer = small_bpe()
    alone = write(tmp_path / "alone", tokenizer, end_documents=True, workers=1)
    shared = write(tmp_path / "shared", tokenizer, DOCUMENTS, end_documents=True, workers=2)
    assert shared == alone
    same = [(tmp_path / who / "train.bin").read_bytes() for who in ("alone", "shared")]
    assert same[0] == same[1]


def test_only_a_few_batches_wait_for_the_workers(monkeypatch):
    monkeypatch.setattr(tokenizing, "BATCH", 100)
    taken = 0

    def many():
        nonlocal taken
        for _ in range(500):
            taken += 1
            yield "x" * 100

    batches = ((batch, "") for batch in tokenizing.batched(many()))
    results = tokenizing.encode(small_bpe(), batches, workers=1)
    next(results)
    assert taken <= tokenizing.FEW_BATCHES + 1
    batches = ((batch, "") for batch in tokenizing.batched(many()))
    results = tokenizing.encode(small_bpe(), batches, workers=2)
    next(results)
    results.close()
    assert taken < 40


PIECES = st.lists(st.sampled_from(["a", "7", "_", " ", "\n", "\r\n", "é", "的", "'s", "!", "\x85"]))


@settings(deadline=None, max_examples=300)
@given(PIECES.map("".join))
def test_a_long_document_has_the_same_ids_in_parts(text):
    tokenizer = small_bpe()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizing, "BATCH", 3)
        parts, ends = zip(*tokenizing.parts(text), strict=True)
    assert "".join(parts) == text and ends == (False,) * (len(parts) - 1) + (True,)
    ids = [i for part in parts for i in tokenizer.encode(part).tolist()]
    assert ids == tokenizer.encode(text).tolist()
