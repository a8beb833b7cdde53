"""The fused kernels of mamba_ssm on a GPU, where they are asked for (`backend='cuda'`) or found (`backend='auto'`)."""

import functools
import logging

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "torch", "cuda")


@functools.cache
def kernels_found() -> bool:
    try:
        import mamba_ssm.ops.triton.ssd_combined  # noqa: F401
    except (ImportError, RuntimeError):  # not installed, or not for this driver
        return False
    return True


def resolve_backend(backend: str, device: torch.device) -> str:
    """The backend that runs: 'torch' or 'cuda'. 'auto' takes the kernels on a GPU that has them, and logs it once."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend '{backend}': choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        return _announced("cuda" if device.type == "cuda" and kernels_found() else "torch")
    if backend == "cuda" and device.type != "cuda":
        raise ValueError(f"backend 'cuda' runs on a GPU, but the data is on {device}: use backend 'torch'")
    if backend == "cuda" and not kernels_found():
        raise ImportError("backend 'cuda' needs mamba_ssm: pip install -r requirements/cuda.txt, or backend 'torch'")
    return backend


@functools.cache
def _announced(backend: str) -> str:
    logger.info("Mamba-2 backend: %s", backend)
    return backend


def run_mamba2(block, u: Tensor) -> Tensor:
    """What `model.Mamba2` states, by the fused kernel, which takes the projected input whole."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined

    return mamba_split_conv1d_scan_combined(
        block.in_proj(u),
        block.conv1d.weight.squeeze(1),
        block.conv1d.bias,
        block.dt_bias,
        -block.A_log.float().exp(),
        D=block.D,
        chunk_size=block.chunk_size,
        activation="silu",
        rmsnorm_weight=block.norm.weight,
        rmsnorm_eps=block.norm.eps,
        outproj_weight=block.out_proj.weight,
        headdim=block.headdim,
        ngroups=1,
        norm_before_gate=False,
    )
