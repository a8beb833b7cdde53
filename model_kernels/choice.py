"""What multiplies matrices on a CPU: decided once a process by what the processor is, never by timing.

So a machine gives the same bits every time. `--kernels`:

    torch     PyTorch's own products, by MKL on x86
    onednn    `mkldnn._linear_pointwise`, the private operator of torch.compile: oneDNN. On an AMD processor MKL runs
              its AVX2 code; where the processor multiplies 512 bits at once (Zen 5), oneDNN is twice as fast
    plain     model.py's own forms, differentiated by autograd, as on a GPU

`--precision bf16` has the products of float32 networks in bfloat16, but for the last layer of an MLP, and all else in
float32. The Mamba-2 block has its fast forms on a GPU too.
"""

import ctypes
import functools
import logging
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from utils import UserError, processor_facts

logger = logging.getLogger(__name__)

Kernels = Literal["auto", "torch", "onednn", "plain"]
Precision = Literal["float32", "bf16"]


class _Chosen:
    """What this process multiplies with."""

    kernels: str | None = None  # None until choose_kernels runs
    precision: str = "float32"


@dataclass
class KernelConfig:
    """What every command that trains may be told of its products."""

    kernels: Kernels = "auto"  # products on a CPU: auto (by processor), torch (MKL on x86), onednn, plain (autograd)
    precision: Precision = "float32"  # precision of hidden layers; bf16 needs a CPU with bfloat16 instructions


def use_kernels(config: KernelConfig, device: torch.device) -> None:
    """`choose_kernels` by a command's settings; UserError where they cannot be met."""
    if config.precision == "bf16" and (device.type != "cpu" or config.kernels == "plain"):
        raise UserError("--precision bf16: for --device cpu and other --kernels than plain alone")
    if config.precision == "bf16" and not has_bf16():
        raise UserError("--precision bf16: this processor has no such products, and would take many times as long")
    choose_kernels(config.kernels, config.precision)


def choose_kernels(kernels: Kernels = "auto", precision: Precision = "float32") -> str:
    """Set and log what this process multiplies with; returns torch, onednn or plain.

    Raises UserError where onednn does not work.
    """
    if kernels == "onednn" and not onednn_works():
        raise UserError("--kernels onednn: this PyTorch lacks the operator, or it refuses this processor; use torch")
    chosen = fastest_kernels() if kernels == "auto" else kernels
    keep_freed_memory()
    if (chosen, precision) != (_Chosen.kernels, _Chosen.precision):
        logger.info("matrix products on a CPU: %s, %s", chosen, precision)
    _Chosen.kernels, _Chosen.precision = chosen, precision
    return chosen


def fastest_kernels() -> str:
    """onednn on an AMD processor of family 26 (Zen 5) or later with AVX-512, where its operator works, else torch."""
    vendor, family = processor()
    is_wide = torch.backends.cpu.get_cpu_capability() == "AVX512" and vendor == "AuthenticAMD" and family >= 26
    return "onednn" if is_wide and onednn_works() else "torch"


@functools.cache
def processor() -> tuple[str, int]:
    """The processor's maker, as AuthenticAMD, and its family; the platform's name and 0 where these are not told."""
    facts = processor_facts()
    return facts.get("vendor_id") or platform.processor(), int(facts.get("cpu family", 0))


@functools.cache
def onednn_works() -> bool:
    """Whether this PyTorch has the private operator, and it gives what a linear layer gives."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    x, weight, bias = torch.ones(2, 3), torch.ones(4, 3), torch.ones(4)
    try:
        found = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "relu", [], "")
    except (RuntimeError, TypeError):  # another signature, or a processor it does not know
        return False
    return torch.equal(found, torch.full((2, 4), 4.0))


def uses_bf16() -> bool:
    """Whether the products between hidden layers are in bfloat16."""
    return _Chosen.precision == "bf16"


@functools.cache
def keep_freed_memory() -> None:
    """Have glibc keep up to 64 MB that were freed: pages that a step gives back are a tenth of its time in faults."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-1, 1 << 26)  # M_TRIM_THRESHOLD
        mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD, at its largest


@functools.cache
def cache_bytes() -> int:
    """Size of a core's second-level cache; 512 KiB where the system does not tell."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
        return int(text.removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 512 * 1024


@functools.cache
def has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 itself. Elsewhere PyTorch does it by a loop, a hundred times slower."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # oneDNN's own answer is yes without them too
    return bool(supported and supported()) and torch.backends.mkldnn.is_available()


def chosen_kernels() -> str:
    """What this process multiplies with, chosen now if it was not before: torch, onednn or plain."""
    return _Chosen.kernels or choose_kernels()


def kernels_of(x: Tensor) -> str:
    """What multiplies x: plain off the CPU, in half precision and under autocast."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu"):
        return "plain"
    chosen = chosen_kernels()
    return "torch" if chosen == "onednn" and (x.dtype == torch.float64 or not x.numel()) else chosen
