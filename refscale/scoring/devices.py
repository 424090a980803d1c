"""What the device can do: dtype, budget, memory, compiling. Each choice comes with its reason."""

import ctypes
import os
import resource
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refscale.scoring.sizes import widest

# Tokens of a forward pass. CPU: what the weights' reordering for bf16 products is spread over
# (4,096 were 6 % faster than 2,048 on SmolLM2-135M; in fp32 they are equal). CUDA: enough rows to
# saturate the matrix units, bounded by free memory.
_BUDGET_CPU = 4096
_BUDGET_CUDA = (2048, 65536)
# Work that has lasted this long is taken to last longer. On an H200 compiling took 10 to 17 s and
# saves 17 to 28 % of the time after (8B and 0.5B); on two cores with AMX it took 27 s and saves
# 16 to 20 % in bfloat16 (SmolLM2-135M; nothing on four short completions a prompt).
_COMPILE_AFTER_S = {"cuda": 60.0, "cpu": 300.0}


def choose_dtype(requested: str, device: str | torch.device) -> tuple[torch.dtype, str]:
    """The dtype to score in, and why.

    Args:
        requested: auto, or a torch dtype's name.
        device: For auto: bfloat16 where the device multiplies it fast, else float32.
    """
    if requested != "auto":
        return getattr(torch, requested), "asked for"
    kind = torch.device(device).type
    if kind == "cuda":
        # Before Ampere it is emulated.
        if torch.cuda.is_available() and not torch.cuda.is_bf16_supported(
            including_emulation=False
        ):
            return torch.float32, "this GPU has no bfloat16 units"
        return torch.bfloat16, "a GPU multiplies bfloat16 fast"
    fast = sorted(_cpu_flags() & {"avx512_bf16", "amx_bf16"})
    if fast:
        return torch.bfloat16, f"this CPU has {', '.join(fast)}"
    # Without those instructions bf16 products are emulated: 44-500 times slower than fp32
    # (pytorch issue 146508).
    return torch.float32, "this CPU has no fast bfloat16 (avx512_bf16 or amx_bf16)"


def compile_after(dtype: torch.dtype, device: torch.device) -> float | None:
    """Seconds of scoring after which compiling pays; None where it was not seen to.

    CPUs: in bfloat16 with AMX, whose products leave most of the time to what lies between them.
    Without it compiling saves 4 % at most (Zen 4), in float32 1 to 3 %.
    """
    if device.type == "cpu" and not (dtype == torch.bfloat16 and "amx_bf16" in _cpu_flags()):
        return None
    return _COMPILE_AFTER_S.get(device.type)


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    for line in text.splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def default_budget(config: Any, dtype: torch.dtype, device: torch.device) -> int:
    """Tokens of a forward pass for a model of this text config, given the free memory."""
    if device.type != "cuda":
        return _BUDGET_CPU
    free, _total = torch.cuda.mem_get_info(device)
    # Activations alive in one layer, in elements: residuals, q, k, v, gate, up and their product.
    hidden, intermediate = widest(config)
    width = 12 * hidden + 3 * intermediate
    tokens = int(0.5 * free / (max(width, 1) * dtype.itemsize))
    low, high = _BUDGET_CUDA
    return max(low, min(high, tokens))


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on a device; the host does not wait for what a GPU has still to do."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    # CUDA may hold up a copy from pageable memory until the stream is idle.
    return tensor.pin_memory().to(device, non_blocking=True)


@cache
def keep_freed_memory() -> bool:
    """Let this process keep what it frees, up to its peak; whether the C library can.

    A CPU forward allocates and frees tens of MiB per layer. glibc hands them back to the system and
    faults them in again each time: 8 % of a forward of SmolLM2-135M in bf16, 10 % in fp32.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False  # not glibc
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    done = [
        mallopt(trim_threshold, 2**31 - 1),
        mallopt(mmap_threshold, 2**30),
        mallopt(top_pad, 64 * 2**20),
    ]
    return all(done)


def device_name(device: torch.device) -> str:
    """For people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {os.cpu_count()} cores"


def reset_peak_memory(device: torch.device) -> None:
    """Start counting `peak_memory` anew; a CPU's count cannot be."""
    if device.type == "cuda":
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)


def peak_memory(device: torch.device) -> int:
    """Bytes: of tensors on all GPUs of this process, or of the whole process on a CPU."""
    if device.type == "cuda":
        return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


def is_out_of_memory(exc: BaseException) -> bool:
    """Whether a device or the host ran out of memory; the CPU allocator raises RuntimeError."""
    text = str(exc)
    return (
        isinstance(exc, torch.OutOfMemoryError)
        or "out of memory" in text
        or "can't allocate memory" in text
    )
