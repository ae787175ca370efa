"""Device, precision and compiling, decided once for all scripts.

`auto` means CUDA, then MPS, then the CPU; bfloat16 on a CUDA GPU that has it, else float16 with a
gradient scaler; float32 on MPS and on a CPU, except that training on a CPU has a rule
(`cpu_training_dtype`).
"""

import ctypes
import os
import re
import shutil
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

import torch

from brisk.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

BFLOAT16_UNITS = ("amx_tile", "avx512_bf16")  # of a CPU, as PyTorch calls them

# Dense 16-bit peak in FLOP/s by the vendors' datasheets, by the device's name without NOT_A_MODEL.
DATASHEET_PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIE": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "A100 PCIE": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "V100 PCIE": 112e12,
    "T4": 65e12,
}
NOT_A_MODEL = r"NVIDIA|TESLA|GEFORCE|SXM\d?|HBM3E?|\d+GB"  # of its name: same arithmetic with any


@dataclass
class Device:
    """Where tensors live and in what precision products are computed."""

    device: torch.device
    dtype_name: str  # a key of DTYPES

    @property
    def type(self):
        return self.device.type

    @property
    def dtype(self):
        return DTYPES[self.dtype_name]

    def autocast(self):
        """A context in which products run in `dtype` while the weights stay in float32."""
        if self.dtype_name == "float32":
            return nullcontext()
        return torch.autocast(self.type, dtype=self.dtype)

    def cast_linear_weights(self, model):
        """Cast the weights of `model`'s linear layers to `dtype`, for inference: autocast casts
        them at every call. The results are the same. A tied head becomes a copy."""
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and self.dtype_name != "float32":
                for name, weight in list(module.named_parameters(recurse=False)):
                    cast = torch.nn.Parameter(weight.detach().to(self.dtype), requires_grad=False)
                    setattr(module, name, cast)

    def scaler(self):
        """A gradient scaler, at work for float16 only (Micikevicius et al. 2018, section 3.2)."""
        return torch.amp.GradScaler(self.type, enabled=self.dtype_name == "float16")

    def synchronize(self):
        """Wait until the device has done all that it was given."""
        if self.type != "cpu":
            getattr(torch, self.type).synchronize()

    def peak_flops(self):
        """(FLOP/s, where the figure comes from): the datasheet's, or else what was measured."""
        if self.type == "cuda" and self.dtype_name != "float32":
            model = model_of(torch.cuda.get_device_name(self.device))
            if model in DATASHEET_PEAKS:
                return DATASHEET_PEAKS[model], f"the datasheet's peak of {model}"
        emulated = (self.type, self.dtype_name) == ("cpu", "float16")  # its product is no ceiling
        fastest = Device(self.device, "float32") if emulated else self
        name = fastest.dtype_name
        return matmul_flops(fastest), f"the measured ceiling of a {name} matrix product"

    def __str__(self):
        if self.type == "cuda":
            name = f"{self.device} ({torch.cuda.get_device_name(self.device)})"
        elif self.type == "cpu":
            name = f"cpu ({torch.get_num_threads()} threads)"
        else:
            name = str(self.device)
        return f"{name}, {self.dtype_name}"


def model_of(name):
    """The model in a GPU's name as its driver gives it. It is all of the rest, so that relatives
    (A10G, RTX 4090 Laptop GPU, one part of an A100 shared by MIG) are not taken for it."""
    words = re.split(r"[\s-]+", name.upper())
    return " ".join(word for word in words if not re.fullmatch(NOT_A_MODEL, word))


def open_device(device="auto", dtype="auto", local_rank=None):
    """Choose device and precision and set PyTorch up for them.

    `local_rank` picks the GPU of a process under torchrun. Raises `UserError` where this machine
    does not have what is asked for.
    """
    name = best_device() if device == "auto" else device
    try:
        chosen = torch.device(name)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--device={name}: PyTorch knows no such device") from error
    check_device(chosen, name)
    if chosen.type == "cuda":
        index = local_rank if local_rank is not None else chosen.index or 0
        if index >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise UserError(f"GPU {index} is asked for, this machine has {count} (counted from 0)")
        chosen = torch.device("cuda", index)
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
    elif chosen.type == "cpu":
        keep_freed_memory()
    if dtype == "auto":
        dtype = "float32"
        if chosen.type not in ("cpu", "mps"):
            dtype = "bfloat16" if has_bfloat16(chosen) else "float16"
    return Device(chosen, dtype)


def best_device():
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(device, name):
    available = {"cpu": True, "cuda": torch.cuda.is_available()}
    available["mps"] = torch.backends.mps.is_available()
    if not available.get(device.type, can_compute(device)):
        remedy = f"leave --device out (auto takes {best_device()})"
        raise UserError(f"--device={name}: PyTorch finds none on this machine; {remedy}")


def can_compute(device):
    """Whether a device of a kind not known here gives results (PyTorch's meta does not)."""
    try:
        return (torch.ones(1, device=device) + 1).item() == 2
    except (RuntimeError, AssertionError, ImportError, NotImplementedError):
        return False


def has_bfloat16(device):
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        torch.ones(1, device=device, dtype=torch.bfloat16).add_(1)
        return True
    except (RuntimeError, TypeError):
        return False


def keep_freed_memory():
    """Let glibc keep freed memory instead of handing it back to the system after each tensor.

    Otherwise every tensor past 32 MiB is mapped, faulted in page by page and unmapped again, in
    every step. (mallopt(3): M_MMAP_MAX = -4, M_TRIM_THRESHOLD = -1.)
    """
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL(None)
            libc.mallopt(-4, 0)
            libc.mallopt(-1, 2**31 - 1)
        except (OSError, AttributeError):  # another C library: it knows no mallopt
            pass


def cpu_training_dtype(batch_size, block_size, n_embd):
    """The dtype that `auto` stands for when training on a CPU: "bfloat16" where the CPU multiplies
    in it natively and a micro-batch has 2^18 activations or more in a layer, else "float32".

    Smaller products gain less than the casts cost. Time of a step in float32 by that of one in
    bfloat16, on an AMD Zen 5 with two cores: 1.09 at 12×64 tokens of 128 channels, 1.53 at 12×256
    of 128, 1.99 at 16×128 of 256, 2.73 at 16×256 of 384.
    """
    large = batch_size * block_size * n_embd >= 2**18
    return "bfloat16" if large and has_native_bfloat16() else "float32"


def has_native_bfloat16():
    """Whether the CPU has AMX or AVX-512 BF16 and PyTorch may use it (ATEN_CPU_CAPABILITY)."""
    known = [getattr(torch.cpu, f"_is_{name}_supported", None) for name in BFLOAT16_UNITS]
    used = torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")
    return used and any(is_supported() for is_supported in known if is_supported)


def resolve_compile(wanted, device):
    """Whether to compile: `wanted` is True, False or "auto". Where it was wanted and cannot
    work, says so in one line and returns False."""
    if wanted is False or (wanted == "auto" and device.type != "cuda"):
        return False  # on a CPU seconds of compiling rarely come back
    if reason := why_not_compile(device):
        print(f"not compiling: {reason}")
        return False
    return True


def why_not_compile(device):
    """What keeps `torch.compile` from working on `device`, or None."""
    if sys.platform == "win32":
        return "PyTorch does not support it well on Windows"
    if device.type == "cuda":
        try:
            import triton  # noqa: F401 (only whether it is there)
        except ImportError:
            return "Triton is not installed"
        if torch.cuda.get_device_capability(device.device) < (7, 0):
            return "Triton needs a GPU of compute capability 7.0 or later"
    if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        return "there is no C++ compiler (g++)"
    return compile_failure(str(device.device))


@cache
def compile_failure(device):
    """Why a small compilation fails on the device of this name, in one line, or None. No C
    compiler, no Python.h, no Triton that works, a Python that Dynamo does not know yet: each
    raises something of its own."""
    try:
        x = torch.ones(8, device=device, requires_grad=True)
        torch.compile(lambda x: (2 * x.sin()).sum())(x).backward()
    except Exception as error:  # of any kind: it is reported, and training goes on without
        return first_line(error)
    return None


def first_line(error):
    """What an error of torch.compile says of its cause, in one line."""
    cause = getattr(error, "inner_exception", None) or error
    lines = [line for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0].strip()}" if lines else type(cause).__name__


def matmul_flops(device, size=None, seconds=0.05):
    """FLOP/s of a square matrix product in the device's precision: the best of repeated runs.

    Random matrices: zeros cost a GPU less power and so flatter it.
    """
    size = size or (1024 if device.type == "cpu" else 8192)
    generator = torch.Generator(device.device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device.device, generator=generator) for _ in "ab")
    a, b = a.to(device.dtype), b.to(device.dtype)
    torch.mm(a, b)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        device.synchronize()
        start = time.perf_counter()
        torch.mm(a, b)
        device.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
