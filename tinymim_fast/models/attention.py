"""softmax(Q K^T / sqrt(D)) V by a kernel that the user, or a measured table, chooses for each model.

Kernels:

    sdpa        F.scaled_dot_product_attention, PyTorch choosing
    flash       its FlashAttention; FA3 or FA4 instead of FA2 where that package is installed
    cudnn       its cuDNN kernel
    efficient   its memory-efficient kernel
    xformers    xformers' memory_efficient_attention on (B, N, H, D), so that no transposed copy is made
    math        two products with a softmax between, in the inputs' dtype; holds N x N maps
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import warnings

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import nn
from torch.nn.attention import SDPBackend, activate_flash_attention_impl, current_flash_attention_impl, sdpa_kernel

from tinymim_fast.errors import InputError

KERNELS = ("sdpa", "flash", "cudnn", "efficient", "xformers", "math")
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# What "auto" takes, by (architecture, dtype, with gradients), where measuring showed another than sdpa to be faster:
# figures in benchmarks/NOTES.md. What is not here, every GPU so far, takes sdpa.
MEASURED = {
    ("cpu_avx512_bf16", torch.bfloat16, False): "math",
    ("cpu_avx512_bf16", torch.bfloat16, True): "math",
}
NEW_FLASH = {"FA4": ("flash_attn.cute", 10), "FA3": ("flash_attn_interface", 9)}  # module, compute capability


class ChosenAttention(Attention):
    """timm's Attention with `kernel`, one of `KERNELS`, between the projections; the same weights by the same names."""

    kernel = "sdpa"

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        """(B, N, C) to (B, N, C); with a mask, which no task here uses, as timm does it."""
        if attn_mask is not None or is_causal:
            return super().forward(x, attn_mask, is_causal)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        return attend_and_project(self, x, self.q_norm(q), self.k_norm(k), v)


def attend_and_project(
    attn: Attention, x: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """The rest of timm's `Attention.forward` behind the heads' projections.

    Args:
        attn: timm's, or a `ChosenAttention`.
        x: what was projected, (B, N, C); a gate reads it.
        q, k, v: (B, N, H, D), behind a qk-norm.
    """
    dropout = attn.attn_drop.p if attn.training else 0.0
    out = attn.norm(attend(getattr(attn, "kernel", "sdpa"), q, k, v, dropout).flatten(2))
    if attn.gate is not None:
        out = out * attn.gate(x).sigmoid()
    return attn.proj_drop(attn.proj(out))


def attend(kernel: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
    """softmax(Q K^T / sqrt(D)) V, (B, N, H, D) from three of that shape; `math` alone holds the (B, H, N, N) maps."""
    if kernel == "xformers":
        return _xformers_attention(q, k, v, dropout)
    q, k, v = (z.transpose(1, 2) for z in (q, k, v))
    if kernel == "math":
        maps = (q * q.shape[-1] ** -0.5) @ k.mT
        return (F.dropout(maps.softmax(-1), dropout) @ v).transpose(1, 2)
    if kernel == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2)
    with sdpa_kernel([SDPA[kernel]]):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2)


def _xformers_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float) -> torch.Tensor:
    return _xformers().memory_efficient_attention(q, k, v, p=dropout)


def _xformers():
    """Its extension is built for one version of PyTorch; that it can't be loaded is said by the operator's name."""
    logging.getLogger("xformers").setLevel(logging.ERROR)
    import xformers.ops

    return xformers.ops


def use_attention(
    model: nn.Module, kernel: str, device: torch.device, dtype: torch.dtype, *, gradients: bool = False
) -> str:
    """Choose the kernel of every timm Attention in `model`, in place; weights and names stay.

    Args:
        model: holds timm's Attention modules.
        kernel: one of `KERNELS`, or "auto".
        device, dtype: of the tensors that it will see.
        gradients: whether a backward pass will follow.

    Returns:
        What runs, for a log: the kernel, and whose it is where PyTorch or xformers chooses.

    Raises:
        InputError: a named kernel that can't run here; argument "attention".
    """
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    auto = kernel == "auto"
    if auto:
        kernel = MEASURED.get((architecture(device), dtype, gradients), "sdpa")
    notes = {_try(kernel, layer.head_dim, device, dtype, gradients) for layer in layers}
    for layer in layers:
        layer.__class__, layer.kernel = ChosenAttention, kernel
    return " ".join([kernel, *sorted(notes - {""}), *(["by auto"] if auto else [])])


def architecture(device: torch.device) -> str:
    """What kernels' speed depends on: "sm_90", "gfx942", "cpu_amx", "cpu_avx512_bf16", "cpu"."""
    if device.type == "cuda":
        if torch.version.hip:
            return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
        return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    if device.type != "cpu":
        return device.type
    for name, there in (
        ("amx", torch.cpu._is_amx_tile_supported),
        ("avx512_bf16", torch.cpu._is_avx512_bf16_supported),
    ):
        if there():
            return f"cpu_{name}"
    return "cpu"


def _try(kernel: str, head_dim: int, device: torch.device, dtype: torch.dtype, gradients: bool) -> str:
    """Run it on 32 tokens; says whose kernel it was where that isn't in its name."""
    if kernel == "flash" and device.type == "cuda":
        _activate_new_flash(torch.cuda.get_device_capability(device)[0])
    q, k, v = torch.zeros(1, 32, 3, 1, head_dim, dtype=dtype, device=device, requires_grad=gradients).unbind(2)
    try:
        _run(kernel, q, k, v)
    except (RuntimeError, ImportError, NotImplementedError, ValueError) as error:
        reason = f"{error}".strip().split("\n")[0].split(". ")[0].rstrip(":") or type(error).__name__
        can = ["auto", *(name for name in KERNELS if name != kernel and _can_run(name, q, k, v))]
        raise InputError(
            f"got {kernel}, which can't run on {architecture(device)} with {str(dtype).removeprefix('torch.')} and "
            f"heads of width {head_dim}: {reason}; want {', '.join(can[:-1])} or {can[-1]}",
            argument="attention",
        ) from error
    if kernel == "xformers":  # without its own extension, only operators that PyTorch brings, called "...-pt"
        fmha = _xformers().fmha
        return f"({fmha.dispatch._dispatch_fw(fmha.Inputs(q, k, v), gradients).NAME})"
    if kernel == "sdpa":
        chosen = SDPBackend(torch._fused_sdp_choice(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)))
        return f"({chosen.name.removesuffix('_ATTENTION').lower()}, chosen by PyTorch)"
    if kernel == "flash" and device.type == "cuda":
        return f"({current_flash_attention_impl() or 'FA2'})"
    return ""


def _run(kernel: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    with warnings.catch_warnings(), torch.set_grad_enabled(q.requires_grad):
        warnings.simplefilter("ignore")
        out = attend(kernel, q, k, v)
        if q.requires_grad:
            torch.autograd.grad(out.sum(), (q, k, v))


def _can_run(kernel: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    try:
        _run(kernel, q, k, v)
    except (RuntimeError, ImportError, NotImplementedError, ValueError):
        return False
    return True


def _activate_new_flash(major: int) -> None:
    for name, (module, wants) in NEW_FLASH.items():
        with contextlib.suppress(Exception):  # a package that is there but can't be used is no reason to end a run
            if major >= wants and importlib.util.find_spec(module):
                activate_flash_attention_impl(name)
                return
