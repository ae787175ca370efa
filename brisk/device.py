"""Choose device, precision and compilation, for all scripts.

`auto` is CUDA, else MPS, else the CPU; bfloat16 on a CUDA GPU that supports it, else float16 with a
gradient scaler; float32 on MPS and on a CPU. For training on a CPU see `cpu_training_dtype`.
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

BFLOAT16_UNITS = ("amx_tile", "avx512_bf16")  # CPU features, in PyTorch's names

# Dense 16-bit peak in FLOP/s from the vendors' datasheets. Keys are device names after `model_of`.
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
NOT_A_MODEL = r"NVIDIA|TESLA|GEFORCE|SXM\d?|HBM3E?|\d+GB"  # words that do not affect the peak


@dataclass
class Device:
    """A device, and the precision of its matrix products."""

    device: torch.device
    dtype_name: str  # a key of DTYPES

    @property
    def type(self):
        return self.device.type

    @property
    def dtype(self):
        return DTYPES[self.dtype_name]

    def autocast(self):
        """`torch.autocast` to `dtype`; weights stay float32."""
        if self.dtype_name == "float32":
            return nullcontext()
        return torch.autocast(self.type, dtype=self.dtype)

    def cast_linear_weights(self, model):
        """Cast the weights of the linear layers of `model` to `dtype`, for inference. Autocast
        casts them at every call, with the same results. A tied head becomes a copy."""
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and self.dtype_name != "float32":
                for name, weight in list(module.named_parameters(recurse=False)):
                    cast = torch.nn.Parameter(weight.detach().to(self.dtype), requires_grad=False)
                    setattr(module, name, cast)

    def scaler(self):
        """A gradient scaler, enabled for float16 only (Micikevicius et al. 2018, section 3.2)."""
        return torch.amp.GradScaler(self.type, enabled=self.dtype_name == "float16")

    def synchronize(self):
        """Wait until all work queued on the device is done."""
        if self.type != "cpu":
            getattr(torch, self.type).synchronize()

    def peak_flops(self):
        """Return (FLOP/s, source): the peak in the datasheet if known, else a measured one."""
        if self.type == "cuda" and self.dtype_name != "float32":
            model = model_of(torch.cuda.get_device_name(self.device))
            if model in DATASHEET_PEAKS:
                return DATASHEET_PEAKS[model], f"the datasheet's peak of {model}"
        emulated = (self.type, self.dtype_name) == ("cpu", "float16")  # slower than float32
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
    """The model in a GPU's name as reported by its driver. All other words are kept, so variants
    (A10G, RTX 4090 Laptop GPU, a MIG partition of an A100) are different models."""
    words = re.split(r"[\s-]+", name.upper())
    return " ".join(word for word in words if not re.fullmatch(NOT_A_MODEL, word))


def open_device(device="auto", dtype="auto", local_rank=None):
    """Choose device and precision, and configure PyTorch for them.

    `local_rank` is the index of the GPU under torchrun. Raises `UserError` if the device is not
    available.
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
        torch.set_float32_matmul_precision("high")  # TF32 for products outside autocast
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
    """Whether a device of another kind computes results (PyTorch's meta device does not)."""
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
    """Make glibc keep freed memory instead of returning it to the system.

    By default each tensor above 32 MiB is mapped, page-faulted and unmapped in every step. See
    mallopt(3): M_MMAP_MAX = -4, M_TRIM_THRESHOLD = -1.
    """
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL(None)
            libc.mallopt(-4, 0)
            libc.mallopt(-1, 2**31 - 1)
        except (OSError, AttributeError):  # another C library, without mallopt
            pass


def cpu_training_dtype(batch_size, block_size, n_embd):
    """The dtype of `auto` for training on a CPU: "bfloat16" if the CPU supports it natively and a
    micro-batch has at least 2^18 activations in a layer, else "float32".

    For smaller products the casts cost more than they gain. Speedup of a step in bfloat16 over
    float32, on an AMD Zen 5 with two cores: 1.09 at 12×64 tokens with 128 channels, 1.53 at 12×256
    with 128, 1.99 at 16×128 with 256, 2.73 at 16×256 with 384.
    """
    large = batch_size * block_size * n_embd >= 2**18
    return "bfloat16" if large and has_native_bfloat16() else "float32"


def has_native_bfloat16():
    """Whether the CPU has AMX or AVX-512 BF16, and ATEN_CPU_CAPABILITY does not disable them."""
    known = [getattr(torch.cpu, f"_is_{name}_supported", None) for name in BFLOAT16_UNITS]
    used = torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")
    return used and any(is_supported() for is_supported in known if is_supported)


def resolve_compile(wanted, device):
    """Whether to compile. `wanted` is True, False or "auto". Prints a line if compilation is wanted
    but does not work here."""
    if wanted is False or (wanted == "auto" and device.type != "cuda"):
        return False  # on a CPU the speedup rarely pays for the compilation time
    if reason := why_not_compile(device):
        print(f"not compiling: {reason}")
        return False
    return True


def why_not_compile(device):
    """The reason why `torch.compile` does not work on `device`, or None."""
    if sys.platform == "win32":
        return "PyTorch does not support it well on Windows"
    if device.type == "cuda":
        try:
            import triton  # noqa: F401 (checks that it is installed)
        except ImportError:
            return "Triton is not installed"
        if torch.cuda.get_device_capability(device.device) < (7, 0):
            return "Triton needs a GPU of compute capability 7.0 or later"
    if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        return "there is no C++ compiler (g++)"
    return compile_failure(str(device.device))


@cache
def compile_failure(device):
    """Compile a small function on the device of this name. Returns the error in one line, or None.

    A missing C compiler or Python.h, a broken Triton, or a Python version that Dynamo does not
    support raise different exceptions.
    """
    try:
        x = torch.ones(8, device=device, requires_grad=True)
        torch.compile(lambda x: (2 * x.sin()).sum())(x).backward()
    except Exception as error:  # any exception: it is reported, and training runs uncompiled
        return first_line(error)
    return None


def first_line(error):
    """The cause of an error of torch.compile, in one line."""
    cause = getattr(error, "inner_exception", None) or error
    lines = [line for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0].strip()}" if lines else type(cause).__name__


def matmul_flops(device, size=None, seconds=0.05):
    """FLOP/s of a square matrix product in the device's precision, the best of repeated runs.

    The matrices are random: with zeros, a GPU uses less power and runs faster.
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
