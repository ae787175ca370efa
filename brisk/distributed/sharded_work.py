"""Divide work on many matrices among the ranks, and exchange the results."""

import math

import torch
import torch.distributed as dist


def distribute_work(ranks, parts, shapes, work):
    """Apply `work` to matrices, each on one rank. Collective.

    Args:
        parts: this rank's part of every matrix: its rows if they are sharded, else all of it.
        shapes: (rows, columns) of every matrix. Matrices of equal shape are divided evenly.
        work: a function of indices and the full matrices at these indices, which returns a matrix
            of the same shape and dtype for each.

    Returns:
        A list with this rank's part of every result.
    """
    if ranks.is_alone:
        return work(range(len(parts)), parts)
    by_shape = sorted(range(len(parts)), key=lambda i: shapes[i])
    assigned = [by_shape[rank :: ranks.world_size] for rank in range(ranks.world_size)]
    mine = assigned[ranks.rank]

    def bounds(i, rank):
        rows = shapes[i][0]
        return chunk_bounds(rank, ranks.world_size, rows) if ranks.shards else (0, rows)

    def part_shapes(indices, rank):
        return [(end - first, shapes[i][1]) for i in indices for first, end in [bounds(i, rank)]]

    every_rank = range(ranks.world_size)
    matrices = [parts[i] for i in mine]
    if ranks.shards:
        send = [[parts[i] for i in indices] for indices in assigned]
        pieces = all_to_all(send, [part_shapes(mine, rank) for rank in every_rank], parts[0])
        matrices = [torch.cat(rows) for rows in zip(*pieces, strict=True)]
    done = list(zip(mine, work(mine, matrices), strict=True))
    send = [[matrix[slice(*bounds(i, rank))] for i, matrix in done] for rank in every_rank]
    received = all_to_all(send, [part_shapes(each, ranks.rank) for each in assigned], parts[0])
    results = {}
    for indices, tensors in zip(assigned, received, strict=True):
        results.update(zip(indices, tensors, strict=True))
    return [results[i] for i in range(len(parts))]


def all_to_all(send, shapes, like):
    """Send the tensors `send[r]` to rank r. Returns a list whose entry r has the tensors from rank
    r, of shapes `shapes[r]`. All have the dtype and device of `like`."""
    flat = torch.cat([like.new_empty(0), *(t.reshape(-1) for tensors in send for t in tensors)])
    sizes = [[math.prod(shape) for shape in group] for group in shapes]
    received = like.new_empty(sum(map(sum, sizes)))
    send_sizes = [sum(t.numel() for t in tensors) for tensors in send]
    dist.all_to_all_single(received, flat, [*map(sum, sizes)], send_sizes)
    pieces = iter(received.split([n for group in sizes for n in group]))
    return [[next(pieces).view(shape) for shape in group] for group in shapes]


def chunk_bounds(rank, world_size, rows):
    """(first, end) of this rank's part of `rows` rows, divided as `torch.chunk` and FSDP do."""
    each = math.ceil(rows / world_size)
    return min(rank * each, rows), min((rank + 1) * each, rows)
