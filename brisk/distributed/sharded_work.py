"""Work on many matrices, each of which one process does for all."""

import math

import torch
import torch.distributed as dist


def by_turns(ranks, parts, shapes, work):
    """Do `work` on matrices, shared between the processes; called by all of them together.

    Args:
        parts: of every matrix what this process has: all of it, or its rows where they are sharded.
        shapes: the (rows, columns) of the matrices; equal ones are dealt out evenly.
        work: called with the numbers of some matrices, and these whole; returns one for each, of
            the same shape and precision.

    Returns:
        What came of every matrix, as much of it as this process has of the matrix.
    """
    if ranks.is_alone:
        return work(range(len(parts)), parts)
    by_shape = sorted(range(len(parts)), key=lambda number: shapes[number])
    owned = [by_shape[rank :: ranks.world_size] for rank in range(ranks.world_size)]
    mine = owned[ranks.rank]

    def rows(number, rank):
        height = shapes[number][0]
        return rows_of(rank, ranks.world_size, height) if ranks.shards else (0, height)

    def shapes_of(numbers, rank):
        return [(end - first, shapes[i][1]) for i in numbers for first, end in [rows(i, rank)]]

    everyone = range(ranks.world_size)
    wholes = [parts[i] for i in mine]
    if ranks.shards:
        sent = [[parts[i] for i in numbers] for numbers in owned]
        pieces = exchange(sent, [shapes_of(mine, rank) for rank in everyone], parts[0])
        wholes = [torch.cat(rows) for rows in zip(*pieces, strict=True)]
    done = list(zip(mine, work(mine, wholes), strict=True))
    sent = [[whole[slice(*rows(i, rank))] for i, whole in done] for rank in everyone]
    received = exchange(sent, [shapes_of(numbers, ranks.rank) for numbers in owned], parts[0])
    results = {}
    for numbers, tensors in zip(owned, received, strict=True):
        results.update(zip(numbers, tensors, strict=True))
    return [results[number] for number in range(len(parts))]


def exchange(sent, shapes, like):
    """Give process r the tensors `sent[r]`; `result[r]` are those from process r, of `shapes[r]`.
    All are of the precision and on the device of the tensor `like`."""
    flat = torch.cat([like.new_empty(0), *(t.reshape(-1) for tensors in sent for t in tensors)])
    counts = [[math.prod(shape) for shape in group] for group in shapes]
    received = like.new_empty(sum(map(sum, counts)))
    given, taken = [sum(t.numel() for t in tensors) for tensors in sent], [*map(sum, counts)]
    dist.all_to_all_single(received, flat, taken, given)
    pieces = iter(received.split([n for group in counts for n in group]))
    return [[next(pieces).view(shape) for shape in group] for group in shapes]


def rows_of(rank, world_size, rows):
    """(first, end) of the rows, of so many, that a process has: `torch.chunk`'s division, and
    FSDP's."""
    each = math.ceil(rows / world_size)
    return min(rank * each, rows), min((rank + 1) * each, rows)
