"""KV cache: prefilling, stepping and recycling a row does not affect other rows."""

import random

import pytest
import torch
from networks import MODERN, VARIANTS, random_ids, random_model
from torch.utils.flop_counter import FlopCounterMode

from brisk.cpu.decode import Decoder
from brisk.generation.generate import draw_uniforms, generate, sample_rows, sampling_settings
from brisk.generation.kv_cache import KVCache, decode_step, prefill, prefill_window, window_start

ALL_VARIANTS = [{}, *VARIANTS]
BOTH = pytest.mark.parametrize("decoding", [False, True], ids=["network", "decoder"])
VARIANT = pytest.mark.parametrize("variant", ALL_VARIANTS, ids=str)
CLOSE = dict(rtol=0, atol=1e-5)


def texts(*lengths):
    """Tensors (T,) of random ids."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(61, (T,), generator=generator) for T in lengths]


def logits_after(model, text):
    """Logits (vocab_size,) after a text, without a cache."""
    return model.predict(text[None], targets=False)[0, -1]


def last_ids(*texts):
    return torch.stack([text[-1:] for text in texts])


def poison(cache, rows, value):
    for memory in cache.memory:
        memory[:, rows] = value


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
@VARIANT
@BOTH
def test_recycled_row_is_independent(variant, decoding, value):
    """The new prompt is as long as the old contents of the row, and another row continues."""
    model = random_model(**variant)
    decoder = Decoder.of(model) if decoding else None
    old, new, other = texts(9, 9, 14)

    def answer(recycled):
        cache = KVCache(model, 2, 24)
        prefill(model, [other[:-2]], cache, [1])
        if recycled:
            prefill(model, [old[:-1]], cache, [0])
            decode_step(model, last_ids(old), cache, [0], decoder)
            poison(cache, 0, value)
            cache.reset([0])
        prefill(model, [new[:-1]], cache, [0])
        decode_step(model, other[None, -2:-1], cache, [1], decoder)
        return decode_step(model, last_ids(new, other), cache, decoder=decoder)

    found = answer(recycled=True)
    assert found.equal(answer(recycled=False))
    for row, text in zip(found, (new, other), strict=True):
        torch.testing.assert_close(row, logits_after(model, text), **CLOSE)


def test_prefill_window_resets_used_rows():
    """Rows of equal length may have different texts."""
    model = random_model(ngrams=3, ngram_rows=50)
    cache, (old, new) = KVCache(model, 1, 24), texts(9, 10)
    prefill_window(model, [old], cache, [0])
    decode_step(model, last_ids(old), cache)
    poison(cache, 0, torch.nan)
    prefill_window(model, [new], cache, [0])
    assert cache.lengths.tolist() == [9]
    found = decode_step(model, last_ids(new), cache)[0]
    torch.testing.assert_close(found, logits_after(model, new), **CLOSE)


@pytest.mark.parametrize("parts", [[8, 8, 4], [1] * 20, [19, 1], [1, 19], [3, 0, 17]], ids=str)
@VARIANT
def test_prefill_in_parts(variant, parts):
    """Between the parts another row is stepped."""
    model = random_model(**variant)
    cache, (long, other) = KVCache(model, 3, 24), texts(21, 24)
    prefill(model, [other[:1]], cache, [0])
    for i, part in enumerate(long[:-1].split(parts), 1):
        prefill(model, [part], cache, [2])
        stepped = decode_step(model, other[None, i : i + 1], cache, [0])
        torch.testing.assert_close(stepped[0], logits_after(model, other[: i + 1]), **CLOSE)
    found = decode_step(model, last_ids(long), cache, [2])[0]
    torch.testing.assert_close(found, logits_after(model, long), **CLOSE)
    assert cache.lengths.tolist() == [1 + len(parts), 0, 21]


@VARIANT
def test_prefill_rows_of_different_lengths(variant):
    model, prompts = random_model(**variant), texts(20, 5, 1, 24, 13)
    cache = KVCache(model, 5, 24)
    first = [7, 0, 0, 7, 12]  # earlier lengths
    prefill(model, [text[:n] for text, n in zip(prompts, first, strict=True)], cache, [*range(5)])
    order = [3, 0, 4, 2, 1]
    prefill(model, [prompts[i][first[i] : -1] for i in order], cache, order)
    found = decode_step(model, last_ids(*prompts), cache)
    assert cache.lengths.tolist() == [20, 5, 1, 24, 13]
    for row, text in zip(found, prompts, strict=True):
        torch.testing.assert_close(row, logits_after(model, text), **CLOSE)


LIVE = [[0], [3], [1, 2], [0, 3], [3, 1, 0], [2, 3, 0, 1]]


@pytest.mark.parametrize("rows", LIVE, ids=str)
@pytest.mark.parametrize("lengths", [(9, 9, 9, 9), (3, 12, 7, 20)], ids=["equal", "ragged"])
@pytest.mark.parametrize("variant", [{}, {**MODERN, "n_kv_head": 2, "ngrams": 3}], ids=str)
@BOTH
def test_only_given_rows_advance(variant, lengths, rows, decoding):
    model, prompts = random_model(**variant), texts(*lengths)
    decoder = Decoder.of(model) if decoding else None
    cache = KVCache(model, 4, 24)
    prefill(model, [text[:-1] for text in prompts], cache, [0, 1, 2, 3])
    idle = [row for row in range(4) if row not in rows]
    poison(cache, idle, torch.nan)  # they are not read
    before = [memory[:, idle].clone() for memory in cache.memory]
    newest = cache.last_ids[idle].clone()
    ids = last_ids(*(prompts[row] for row in rows))
    with FlopCounterMode(display=False) as flops:
        found = decode_step(model, ids, cache, rows, decoder)
    for logits, row in zip(found, rows, strict=True):
        torch.testing.assert_close(logits, logits_after(model, prompts[row]), **CLOSE)
    assert cache.lengths.tolist() == [n - (row in idle) for row, n in enumerate(lengths)]
    assert cache.last_ids[idle].equal(newest)
    for memory, kept in zip(cache.memory, before, strict=True):
        assert memory[:, idle].nan_to_num(7).equal(kept.nan_to_num(7))

    alone = KVCache(model, len(rows), 24)
    prefill(model, [prompts[row][:-1] for row in rows], alone, [*range(len(rows))])
    with FlopCounterMode(display=False) as fewest:
        decode_step(model, ids, alone, decoder=decoder)
    assert flops.get_total_flops() == fewest.get_total_flops() > 0


@BOTH
def test_full_row_is_refilled(decoding):
    model, (full, other) = random_model(), texts(40, 40)
    decoder = Decoder.of(model) if decoding else None
    cache = KVCache(model, 2, 99)
    prefill_window(model, [full[:24], other[:10]], cache, [0, 1])
    for T in range(24, 37):
        if T == 25:
            assert cache.full_rows() == [0]
            with pytest.raises(ValueError, match="24 positions is full"):
                decode_step(model, full[None, 24:25], cache, [0], decoder)
            prefill_window(model, [full[:25]], cache, [0])
        found = decode_step(model, last_ids(full[:T], other[: T - 14]), cache, decoder=decoder)
        window = full[window_start(T, 24) : T]
        torch.testing.assert_close(found[0], logits_after(model, window), **CLOSE)
        torch.testing.assert_close(found[1], logits_after(model, other[: T - 14]), **CLOSE)


@VARIANT
def test_static_step_is_one_graph(variant):
    """Positions are tensors: no shape and no constant of the graph depends on them."""
    model, idx = random_model(**variant), random_ids()
    cache, graphs = KVCache(model, 2, 24), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True)
    def step(ids, positions):
        return model(ids, cache=cache.static_step(ids, positions))[0][:, -1]

    torch.compiler.reset()
    prefill(model, [idx[0, :3], idx[1, :9]], cache, [0, 1])
    with torch.no_grad():
        for i in range(3, 18):
            ids, positions = torch.stack((idx[0, i], idx[1, i + 6])), cache.lengths[:, None].clone()
            found = step(ids[:, None], positions)
            cache.lengths += 1
            for row, T in enumerate((i + 1, i + 7)):
                torch.testing.assert_close(found[row], logits_after(model, idx[row, :T]), **CLOSE)
    assert len(graphs) == 1


# ----------------------------------------------------------------------------- settings per row

SETTINGS = [(0, None, None), (0.8, 5, None), (1.5, None, 0.7), (1.0, None, None), (2.0, 9, 0.9)]


@pytest.mark.parametrize("variant", [{}, {**MODERN, "n_kv_head": 2, "ngrams": 3}], ids=str)
def test_settings_and_seed_per_row(variant):
    """For 40 tokens with a window of 24, alone and with various other rows."""
    model, prompts = random_model(**variant), texts(3, 24, 1, 30, 3)
    temperature, top_k, top_p = map(list, zip(*SETTINGS, strict=True))
    seeds, numbers = [5, 6, 5, 7, 8], [0, 0, 3, 1, 0]
    options = dict(top_p=top_p, seed=seeds, samples=numbers)
    together = generate(model, prompts, 40, temperature, top_k, **options)
    for i, (prompt, found) in enumerate(zip(prompts, together, strict=True)):
        options = dict(top_p=top_p[i], seed=seeds[i], samples=[numbers[i]])
        alone = generate(model, [prompt], 40, temperature[i], top_k[i], **options)
        assert found.equal(alone[0])


@pytest.mark.parametrize(
    "options",
    [dict(temperature=[1, -1]), dict(top_k=[2, -2]), dict(top_p=[0.5, 2]), dict(seed=[1, 2, 3])],
    ids=str,
)
def test_wrong_settings_of_one_row_raise(options):
    with pytest.raises(ValueError):
        generate(random_model(), [[1], [2]], 1, **options)


def serve(model, requests, rows, rng, decoder):
    """Minimal continuous batching: requests are admitted, prefilled in parts, stepped together and
    finished in any order. A request is (prompt, n, settings, seed). Returns a list of texts."""
    waiting = [*enumerate(requests)]
    size, cache = model.config.block_size, KVCache(model, rows, 99)
    streams, answers = {}, [None] * len(requests)
    while waiting or streams:
        free = [row for row in range(rows) if row not in streams]
        if waiting and free and rng.random() < 0.3:
            number, (prompt, n, settings, seed) = waiting.pop(0)
            row = rng.choice(free)
            cache.reset([row])
            window = prompt[window_start(len(prompt), size) : -1]
            uniforms = draw_uniforms([0], n, seed)[0]
            streams[row] = dict(number=number, text=prompt, unread=window, end=len(prompt) + n)
            streams[row].update(settings=settings, uniforms=uniforms)
        for row in [row for row, stream in streams.items() if len(stream["unread"])]:
            part = rng.randint(1, 9)
            prefill(model, [streams[row]["unread"][:part]], cache, [row])
            streams[row]["unread"] = streams[row]["unread"][part:]
        live = [row for row, stream in streams.items() if not len(stream["unread"])]
        live = rng.sample(live, rng.randint(0, len(live)))
        if not live:
            continue
        if full := [row for row in live if row in cache.full_rows()]:
            prefill_window(model, [streams[row]["text"] for row in full], cache, full)
        ids = last_ids(*(streams[row]["text"] for row in live))
        logits = decode_step(model, ids, cache, live, decoder)
        uniform = torch.stack(
            [
                stream["uniforms"][len(stream["text"]) - stream["end"]]
                for stream in map(streams.get, live)
            ]
        )
        new = sample_rows(logits, uniform, [streams[row]["settings"] for row in live])
        for row, token in zip(live, new, strict=True):
            stream = streams[row]
            stream["text"] = torch.cat((stream["text"], token[None]))
            if len(stream["text"]) == stream["end"]:
                answers[stream["number"]] = streams.pop(row)["text"]
    return answers


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("variant", [{}, {**MODERN, "n_kv_head": 2}, {"ngrams": 3}], ids=str)
@BOTH
def test_served_text_matches_a_single_request(variant, decoding, seed):
    model, rng = random_model(**variant), random.Random(seed)
    requests = []
    for prompt in texts(*(rng.randint(1, 30) for _ in range(12))):
        requests.append((prompt, rng.randint(1, 40), rng.choice(SETTINGS), rng.randint(0, 9)))
    with torch.no_grad():
        found = serve(model, requests, 4, rng, Decoder.of(model) if decoding else None)
    for (prompt, n, (temperature, top_k, top_p), own), text in zip(requests, found, strict=True):
        alone = generate(model, [prompt], n, temperature, top_k, top_p=top_p, seed=own)[0]
        assert text.equal(alone)


def test_settings_are_scalars_or_lists():
    assert sampling_settings(2, 0.5, [1, 2]) == [(0.5, 1, None), (0.5, 2, None)]
    with pytest.raises(ValueError, match="3 settings for 2 rows"):
        sampling_settings(2, 0.5, [1, 2, 3])
