"""Functions on tensors as CUDA graphs.

A small model leaves a GPU idle while the host launches its kernels one by one. A CUDA graph
launches all kernels of a function at once. It repeats what was captured: the kernels, the addresses
of their tensors, and the Python numbers. What differs between calls must be in tensors that stay in
place.

See https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from functools import cache, partial

import torch

from brisk.errors import UserError

WARM_UP = 3  # calls before a capture: they compile, load and select kernels, and allocate state


@cache
def capture_stream(device):
    """The stream of all captures on `device`: cuBLAS keeps memory for each stream that it meets."""
    return torch.cuda.Stream(device)


class GraphPool:
    """Captures functions on `device`, a `torch.device`, as CUDA graphs that share memory.

    Replay the graphs of a pool one after another: each overwrites the intermediate results of the
    others. Uncaptured calls and captures run on one stream, since autograd runs the accumulation of
    a gradient on the stream on which it met the parameter first.
    """

    def __init__(self, device):
        self.device, self.stream = device, capture_stream(device)
        self.handle = torch.cuda.graph_pool_handle()

    @staticmethod
    def supports(device):
        return device.type == "cuda"

    def call(self, function):
        """`function()` without a graph."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            outputs = function()
        current.wait_stream(self.stream)
        return outputs

    def capture(self, function):
        """Capture `function()`, without running its kernels. Returns (replay, outputs): a function
        that runs them, and the tensors that hold its results after each replay."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.handle, stream=self.stream):
            outputs = function()
        return graph.replay, outputs


def check_device(device):
    """Raise `UserError` if functions on `device` cannot be CUDA graphs."""
    if not GraphPool.supports(device):
        raise UserError(f"--cuda_graph needs a GPU with CUDA; the device is {device.type}")


class CapturedFunction:
    """A function that runs as it is in its first `WARM_UP` calls, and then as a CUDA graph.

    The graph draws the random numbers that PyTorch's generator of the device gives at a replay: it
    may be seeded anew before each call.
    """

    def __init__(self, pool):
        self.pool, self.calls = pool, 0
        self.inputs = self.replay = self.outputs = None

    def __call__(self, function, *inputs):
        """`function(*inputs)`: a tensor or a tuple of tensors.

        Args:
            function: the same in all calls. It is not kept: it may refer to what owns this object.
            inputs: tensors on the device, of the same shapes in all calls, and floats, which the
                function gets as tensors () in float32.
        """
        if self.inputs is None:
            self.inputs = [
                i.clone()
                if isinstance(i, torch.Tensor)
                else torch.full((), i, device=self.pool.device)
                for i in inputs
            ]
        for static, given in zip(self.inputs, inputs, strict=True):
            if not isinstance(given, torch.Tensor):
                static.fill_(given)
            elif given.shape != static.shape:  # copy_ would broadcast
                raise ValueError(f"captured for shape {tuple(static.shape)}, not {given.shape}")
            else:
                static.copy_(given)
        self.calls += 1
        if self.calls <= WARM_UP:
            return self.pool.call(partial(function, *self.inputs))
        if self.replay is None:
            self.replay, self.outputs = self.pool.capture(partial(function, *self.inputs))
        self.replay()
        if isinstance(self.outputs, torch.Tensor):  # copies: the next replay overwrites them
            return self.outputs.clone()
        return tuple(output.clone() for output in self.outputs)
