"""Batches: each row once per epoch, as a pure function of (seed, position)."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

import brisk
from brisk.data import loader
from brisk.data.loader import TokenFile, find_data_dir, hash64, shuffled, to_device
from brisk.errors import UserError

EOT = 99


@pytest.fixture
def write(tmp_path):
    """Write token ids to a file. Returns its path."""

    def write(ids, dtype="<u2", name="train.bin"):
        np.asarray(ids).astype(dtype).tofile(tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def counting(write):
    """A file of the ids 0, 1, 2, …, so that a window shows its position."""
    return lambda n=1000, block_size=8, **more: TokenFile(write(range(n)), block_size, n, **more)


def firsts(data, position, count):
    x, _ = data.batch(position, count)
    return x[:, 0].numpy()


# ----------------------------------------------------------------------------- windows


def test_targets_are_shifted_inputs(counting):
    x, y = counting(block_size=8).batch(0, 5)
    assert x.shape == y.shape == (5, 8) and x.dtype == y.dtype == torch.int64
    assert torch.equal(y, x + 1)
    assert torch.equal(x, x[:, :1] + torch.arange(8))  # consecutive tokens of the file


@pytest.mark.parametrize("n, block_size", [(1000, 8), (999, 8), (97, 10), (33, 16), (21, 10)])
def test_epoch_visits_every_row_once(counting, n, block_size):
    data = counting(n, block_size)
    for epoch in range(5):
        starts = np.sort(firsts(data, epoch * data.rows, data.rows))
        assert (np.diff(starts) == block_size).all()  # adjacent: no token twice or missing
        assert starts[-1] + block_size < n  # room for the last target
    # at most two windows are missing, to leave room for the offset
    assert data.rows >= n // block_size - 1


def test_epochs_differ_in_order_and_offset(counting):
    data = counting(1000, 8)
    epochs = [firsts(data, epoch * data.rows, data.rows) for epoch in range(12)]
    offsets = {int(epoch.min()) for epoch in epochs}
    assert offsets <= set(range(8)) and len(offsets) > 3
    orders = {tuple((epoch - epoch.min()) // 8) for epoch in epochs}
    assert len(orders) == 12
    assert not any((np.diff(order) > 0).all() for order in orders)  # shuffled, not in sequence


def test_offsets_make_every_token_a_target(counting):
    """Tokens before the first row of one epoch are inside a row of another. Up to one row at the
    end of the file may be missing."""
    data = counting(100, 8)
    seen = {int(t) for e in range(60) for t in data.batch(e * data.rows, data.rows)[1].flatten()}
    assert seen >= set(range(1, 100 - 8))


@given(
    position=st.integers(0, 10**12),
    count=st.integers(2, 40),
    cut=st.floats(0, 1),
    seed=st.integers(0, 2**40),
)
def test_batch_is_independent_of_its_split(tmp_path_factory, position, count, cut, seed):
    path = tmp_path_factory.getbasetemp() / "split.bin"
    if not path.exists():
        np.arange(300, dtype="<u2").tofile(path)
    whole = TokenFile(path, 8, 300, seed=seed).batch(position, count)
    other = TokenFile(path, 8, 300, seed=seed)  # as in another process
    at = 1 + int(cut * (count - 2))
    parts = other.batch(position + at, count - at), other.batch(position, at)
    for i in (0, 1):
        assert torch.equal(whole[i], torch.cat([parts[1][i], parts[0][i]]))


def test_seed_determines_the_order(counting):
    one, same, other = (counting(1000, 8, seed=seed) for seed in (1, 1, 2))
    assert (firsts(one, 0, 50) == firsts(same, 0, 50)).all()
    assert (firsts(one, 0, 50) != firsts(other, 0, 50)).any()


def test_batch_larger_than_an_epoch(counting):
    data = counting(25, 8)
    x, _ = data.batch(0, 5 * data.rows)
    assert len(x) == 5 * data.rows


def test_file_of_one_window(counting):
    data = counting(9, 8)
    assert data.rows == 1
    assert firsts(data, 0, 3).tolist() == [0, 0, 0]


def test_uint32(write):
    ids = np.arange(70000, 70100)
    data = TokenFile(write(ids, "<u4"), 8, 70100, dtype="uint32")
    x, y = data.batch(0, 4)
    assert x.min() >= 70000 and torch.equal(y, x + 1)


# ----------------------------------------------------------------------------- documents

DOCUMENTS = [[1], [2, 3, 4], [], [5, 6, 7, 8, 9, 10, 11, 12], [13, 14]]


@pytest.fixture
def documents(write):
    ids = [token for document in DOCUMENTS for token in (*document, EOT)]
    return TokenFile(write(ids), 5, 100, rows="documents", eot=EOT)


def test_row_is_one_document(documents):
    assert documents.rows == 4  # without the empty one
    x, y = documents.batch(0, 4)
    found = {}
    for row, targets in zip(x.tolist(), y.tolist(), strict=True):
        assert row[0] == EOT
        found[targets[0]] = targets
        # inputs are the previous targets, up to the last target
        for read, said in zip(row[1:], targets, strict=False):
            assert read == said or said == -1
    assert found == {
        1: [1, EOT, -1, -1, -1],
        2: [2, 3, 4, EOT, -1],
        5: [5, 6, 7, 8, 9],  # longer than block_size: truncated
        13: [13, 14, EOT, -1, -1],
    }
    assert x.min() >= 0  # no -1 reaches the embedding


def test_epoch_visits_every_document_once(documents):
    orders = set()
    for epoch in range(8):
        _, y = documents.batch(epoch * 4, 4)
        orders.add(tuple(y[:, 0].tolist()))
    assert {tuple(sorted(order)) for order in orders} == {(1, 2, 5, 13)}
    assert len(orders) > 1


@given(position=st.integers(0, 1000), count=st.integers(1, 30))
def test_targets_counts_the_targets(tmp_path_factory, position, count):
    path = tmp_path_factory.getbasetemp() / "documents.bin"
    if not path.exists():
        ids = [token for document in DOCUMENTS for token in (*document, EOT)]
        np.array(ids, dtype="<u2").tofile(path)
    for rows in ("documents", "windows"):
        data = TokenFile(path, 5, 100, rows=rows, eot=EOT)
        _, y = data.batch(position, count)
        assert data.targets(position, count) == int((y >= 0).sum())


def test_unfinished_document_is_not_a_row(write):
    data = TokenFile(write([1, 2, EOT, 3, 4, 5, 6]), 4, 100, rows="documents", eot=EOT)
    assert data.rows == 1
    assert data.batch(0, 1)[1].tolist() == [[1, 2, EOT, -1]]


def test_documents_need_an_end_of_text_token(write):
    path = write(range(50))
    with pytest.raises(UserError, match="end-of-text"):
        TokenFile(path, 8, 100, rows="documents", eot=None)
    with pytest.raises(UserError, match="no end-of-text after a document"):
        TokenFile(path, 8, 100, rows="documents", eot=EOT)


# ----------------------------------------------------------------------------- errors


def test_short_file_is_refused(write):
    with pytest.raises(UserError, match=r"train\.bin.*8 tokens.*block_size=8"):
        TokenFile(write(range(8)), 8, 100)
    with pytest.raises(UserError, match="block_size"):
        TokenFile(write([]), 8, 100)


def test_truncated_file_is_refused(write):
    path = write(range(100))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="truncated"):
        TokenFile(path, 8, 100)


def test_ids_beyond_the_vocabulary(write):
    with pytest.raises(UserError, match=r"train\.bin.*500.*99"):
        TokenFile(write([1] * 40 + [500] + [1] * 40), 8, 100)


@pytest.mark.parametrize("bad", range(20, 28))
def test_late_ids_beyond_the_vocabulary(write, monkeypatch, bad):
    """Only the beginning of a large file is checked when it is opened. Later ids are found in the
    batch, in any column of a row."""
    monkeypatch.setattr(loader, "SCAN", 4)
    ids = [1] * 60
    ids[bad] = 500
    data = TokenFile(write(ids), 8, 100)
    for row in range(data.rows):
        window = None
        try:
            window = data.batch(row, 1)
        except UserError as error:
            assert "500" in str(error)
        if window is not None:
            assert max(t.max() for t in window) < 100


@pytest.mark.parametrize("missing", [("train.bin", "val.bin"), ("val.bin",)])
def test_missing_data_set_names_its_command(tmp_path, monkeypatch, missing):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "sonnets"
    folder.mkdir(parents=True)
    (folder / "prepare.py").touch()
    for name in {"train.bin", "val.bin"} - set(missing):
        (folder / name).touch()
    with pytest.raises(UserError) as caught:
        find_data_dir("", "sonnets")
    assert all(name in str(caught.value) for name in missing)
    assert "python data/sonnets/prepare.py" in str(caught.value)


def test_missing_data_dir(tmp_path):
    """The command is for the folder, not for the default `dataset`."""
    folder = tmp_path / "sonnets"
    folder.mkdir()
    (folder / "prepare.py").touch()
    with pytest.raises(UserError) as caught:
        find_data_dir(str(folder), "openwebtext")
    assert f"python {folder / 'prepare.py'}" in str(caught.value)


def test_unknown_data_set_lists_known_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        find_data_dir("", "shakespear_char")
    assert "shakespeare_char" in str(caught.value)


def test_data_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "mine"
    folder.mkdir(parents=True)
    for name in ("train.bin", "val.bin"):
        (folder / name).touch()
    assert find_data_dir("", "mine").resolve() == folder
    assert find_data_dir(str(folder), "openwebtext") == folder


def test_data_found_from_another_directory(tmp_path, monkeypatch):
    folder = tmp_path / "clone" / "data" / "mine"
    folder.mkdir(parents=True)
    for name in ("train.bin", "val.bin"):
        (folder / name).touch()
    monkeypatch.setattr(loader, "repository", lambda: tmp_path / "clone")
    monkeypatch.chdir(tmp_path)
    assert find_data_dir("", "mine") == folder


def test_repository_is_the_clone(tmp_path, monkeypatch):
    """An installed package has no repository."""
    assert brisk.repository().samefile(ROOT)
    assert (brisk.repository() / "train.py").exists()
    monkeypatch.setattr(brisk, "__file__", str(tmp_path / "site-packages/brisk/__init__.py"))
    assert brisk.repository() is None


def test_missing_data_set_without_a_clone(tmp_path, monkeypatch):
    """The message names the working directory, not site-packages."""
    monkeypatch.setattr(loader, "repository", lambda: None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        find_data_dir("", "shakespeare")
    where, remedy = str(caught.value).split("; ")
    assert where == f"no train.bin and no val.bin in {Path('data', 'shakespeare')}"
    assert "clone" in remedy and "--data_dir" in remedy
    own = Path("data", "shakespeare", "prepare.py")
    own.parent.mkdir(parents=True)
    own.touch()
    with pytest.raises(UserError, match="make it with: python data"):
        find_data_dir("", "shakespeare")


def test_folder_without_a_data_set(tmp_path):
    with pytest.raises(UserError, match=r"known data sets: none$"):
        find_data_dir(str(tmp_path / "empty"), "openwebtext")


# ----------------------------------------------------------------------------- the shuffle


@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_shuffled_is_a_permutation(n, key):
    assert sorted(shuffled(np.arange(n), n, key)) == list(range(n))


@given(n=st.integers(1, 2**62), key=st.integers(0, 2**64 - 1), data=st.data())
def test_shuffled_is_injective_for_large_n(n, key, data):
    ranks = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20, unique=True))
    found = shuffled(np.array(ranks, dtype=np.int64), n, key)
    assert len(set(found.tolist())) == len(ranks)
    assert found.min() >= 0 and found.max() < n


def test_shuffled_is_uniform():
    """Ranks and their images are uncorrelated, and so are different keys."""
    n = 4096
    for key in range(20):
        order = shuffled(np.arange(n), n, hash64(7, key))
        assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.08  # five standard deviations
        assert (order == shuffled(np.arange(n), n, hash64(7, key + 1))).sum() < 12


def test_shuffle_matches_recorded_numbers():
    """A checkpoint resumes with the same data under any version of the libraries."""
    assert hash64(0) == 0xE220A8397B1DCDAF  # SplitMix64's first number for the seed 0
    assert hash64(1337, 5, 2) == 3954968150649167876
    assert shuffled(np.arange(10), 10, 1337).tolist() == [1, 8, 5, 4, 6, 7, 3, 2, 0, 9]


@pytest.mark.parametrize("evenly", [1, 7, 30, 1000])
def test_evaluation_rows_are_even_and_seedless(tmp_path, evenly):
    np.arange(500, dtype="<u2").tofile(tmp_path / "val.bin")
    one, other = (
        TokenFile(tmp_path / "val.bin", 8, 500, seed=seed, evenly=evenly) for seed in (1, 2)
    )
    x, y = one.batch(0, evenly)
    starts = x[:, 0].tolist()
    assert starts == sorted(starts) and len(set(starts)) == min(evenly, one.rows)
    gaps = np.diff([*starts, 500])
    assert gaps.max() <= max(8, 500 / evenly) + 24  # no large gaps
    assert torch.equal(x, other.batch(0, evenly)[0]) and torch.equal(y[:, :-1], x[:, 1:])


def test_batch_is_sent_without_waiting():
    """From pinned memory: from other memory a copy to a GPU waits for it."""

    class Batch:
        def __init__(self, calls=()):
            self.calls = calls

        def pin_memory(self):
            return Batch((*self.calls, "pinned"))

        def to(self, device, non_blocking=False):
            return Batch((*self.calls, device, non_blocking))

    device = torch.device("cuda", 0)
    (sent,) = to_device([Batch()], SimpleNamespace(type="cuda", device=device))
    assert sent.calls == ("pinned", device, True)
