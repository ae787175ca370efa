"""Capture functions and replay them as CUDA graphs.

With a small model, a GPU waits for the host to launch its kernels one by one. A CUDA graph launches
all kernels of a function at once. It replays them with the tensor addresses and the Python numbers
of the capture, so values that change between calls must be in tensors that stay in place.

See https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from functools import cache, partial

import torch

from brisk.errors import UserError

WARM_UP = 3  # calls before a capture, which compile, load and select kernels and allocate state


@cache
def capture_stream(device):
    """The stream of all captures on `device`. cuBLAS keeps a workspace for each stream in use."""
    return torch.cuda.Stream(device)


class GraphPool:
    """Captures functions on `device`, a `torch.device`, as CUDA graphs that share memory.

    Graphs of a pool must not be replayed at the same time: each overwrites the intermediate results
    of the others. Uncaptured calls and captures run on one stream, since autograd accumulates a
    gradient on the stream that used the parameter first.
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
    """A function that runs uncaptured in its first `WARM_UP` calls, and then as a CUDA graph.

    A replay draws random numbers from the current state of the device's default generator, which
    may be seeded before each call.
    """

    def __init__(self, pool):
        self.pool, self.calls = pool, 0
        self.inputs = self.replay = self.outputs = None

    def __call__(self, function, *inputs):
        """`function(*inputs)`: a tensor or a tuple of tensors.

        Args:
            function: the same in all calls. No reference is kept, which avoids cycles.
            inputs: tensors on the device, of the same shapes in all calls, and floats, which are
                passed as float32 tensors ().
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
