"""The kernels of a training step by their time."""

import re

import torch
from torch.autograd import DeviceType

from gpu_sections.job import row

# Kinds of kernels by their names, the first that fits. On a CPU names are those of operations.
KINDS = {
    "attention": r"flash|fmha|attention|cudnn_generated_fort|sdpa",
    "products": r"gemm|cutlass|nvjet|cublas|matmul|::mm|::addmm|::bmm|xmma|splitK",
    "optimizer": r"adam|multi_tensor|foreach|lerp",
    "compiled, pointwise": r"^triton_",
    "communication": r"nccl|c10d",
    "copies and fills": r"memcpy|memset|copy|fill",
    "softmax, gather, scatter, sums": r"softmax|gather|scatter|reduce|index|embedding|sum|amax",
}
TOP = 25


def kernel_table(step, device):
    """Yield a row for each kind of kernel, and for the slowest kernels, of one `step`."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        device.synchronize()
    found = []
    for event in profiler.key_averages():
        on_device = event.device_type == (
            DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
        )
        time = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        if on_device and time:
            found.append((time / 1000, event.count, event.key))
    found.sort(reverse=True)
    total = sum(time for time, _, _ in found)
    kinds = {}
    for time, count, name in found:
        kind = next((k for k, pattern in KINDS.items() if re.search(pattern, name, re.I)), "others")
        spent, calls = kinds.get(kind, (0.0, 0))
        kinds[kind] = spent + time, calls + count
    yield row("kernels of a step, all", "ms", [total], calls=sum(count for _, count, _ in found))
    for kind, (time, calls) in sorted(kinds.items(), key=lambda item: -item[1][0]):
        yield row(f"kernels: {kind}", "ms", [time], share=f"{time / total:.1%}", calls=calls)
    for time, count, name in found[:TOP]:
        short = re.sub(r"\s+", " ", name.replace("|", "/"))[:100]
        yield row(f"kernel `{short}`", "ms", [time], share=f"{time / total:.1%}", calls=count)
