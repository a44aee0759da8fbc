"""What both ops ask of their arguments; every error names the argument, what it got and what it wants."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

RELATIONS = ("qk", "vv", "qq", "kk")


def check_tensors(**tensors: Tensor) -> None:
    """x_s, y_s, x_t, y_t of relation_kl: (B, H, N, D) of one device, x and y of one side alike."""
    for name, z in tensors.items():
        if not isinstance(z, Tensor):
            raise ValueError(f"{name}: got {type(z).__name__}, want a tensor")
        if z.dim() != 4 or 0 in z.shape:
            raise ValueError(f"{name}: got shape {tuple(z.shape)}, want (B, H, N, D), all at least 1")
        if not z.dtype.is_floating_point:
            raise ValueError(f"{name}: got dtype {z.dtype}, want a floating-point dtype")
        check_strides(name, z)
    x_s = tensors["x_s"]
    for name, z in tensors.items():
        if z.shape[:3] != x_s.shape[:3]:
            raise ValueError(f"{name}: got (B, H, N) = {tuple(z.shape[:3])}, want {tuple(x_s.shape[:3])} as x_s has")
        if z.device != x_s.device:
            raise ValueError(f"{name}: got device {z.device}, want {x_s.device} as x_s has")
    for x, y in (("x_s", "y_s"), ("x_t", "y_t")):
        if tensors[y].shape != tensors[x].shape:
            raise ValueError(f"{y}: got D = {tensors[y].shape[3]}, want {tensors[x].shape[3]} as {x} has")
        if tensors[y].dtype != tensors[x].dtype:
            raise ValueError(f"{y}: got dtype {tensors[y].dtype}, want {tensors[x].dtype} as {x} has")
    check_teacher("x_t", tensors["x_t"])
    check_teacher("y_t", tensors["y_t"])


def check_projections(qkv_s: Tensor, qkv_t: Tensor, relation_heads: int) -> None:
    """qkv_s and qkv_t of relation_loss: (B, N, 3 C), relation_heads dividing each C."""
    check_relation_heads(relation_heads)
    for name, qkv in (("qkv_s", qkv_s), ("qkv_t", qkv_t)):
        if not isinstance(qkv, Tensor):
            raise ValueError(f"{name}: got {type(qkv).__name__}, want a tensor")
        if qkv.dim() != 3 or 0 in qkv.shape:
            raise ValueError(f"{name}: got shape {tuple(qkv.shape)}, want (B, N, 3 * C), all at least 1")
        if qkv.shape[2] % (3 * relation_heads):
            raise ValueError(
                f"{name}: got width {qkv.shape[2]}, want 3 * C, relation_heads={relation_heads} dividing C"
            )
        if not qkv.dtype.is_floating_point:
            raise ValueError(f"{name}: got dtype {qkv.dtype}, want a floating-point dtype")
        check_strides(name, qkv)
    if qkv_t.shape[:2] != qkv_s.shape[:2]:
        raise ValueError(f"qkv_t: got (B, N) = {tuple(qkv_t.shape[:2])}, want {tuple(qkv_s.shape[:2])} as qkv_s has")
    if qkv_t.device != qkv_s.device:
        raise ValueError(f"qkv_t: got device {qkv_t.device}, want {qkv_s.device} as qkv_s has")
    check_teacher("qkv_t", qkv_t)


def check_teacher(name: str, teacher: Tensor) -> None:
    """The teacher is data: a gradient that it asks for would silently not come."""
    if teacher.requires_grad:
        raise ValueError(
            f"{name}: got requires_grad=True, want a teacher without gradient: "
            f"run the teacher under torch.no_grad() or pass {name}.detach()"
        )


def outside_inference(teacher: Tensor) -> Tensor:
    """A copy where the teacher ran under torch.inference_mode: autograd keeps no tensor of that."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not teacher.is_inference():
        return teacher
    return teacher.clone()


def check_no_tangent(**tensors: Tensor) -> None:
    """A fused backend has no forward-mode derivative; unasked, PyTorch would take it for 0."""
    if torch.compiler.is_compiling():
        return
    for name, tensor in tensors.items():
        if forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(
                f"{name}: got a tangent of forward-mode differentiation, want none: the fused backends have first "
                "derivatives by backward() only, backend='reference' has all"
            )


def check_strides(name: str, tensor: Tensor) -> None:
    """Rows are read as vectors."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name}: got strides {tensor.stride()}, want a contiguous last dimension")


def check_lengths(lengths: Tensor | None, like: Tensor, num_images: int, num_tokens: int) -> None:
    """(B,) integers from 0 to N beside `like`; on a GPU their values are not read, the kernels clamp them."""
    if lengths is None:
        return
    if not isinstance(lengths, Tensor):
        raise ValueError(f"lengths: got {type(lengths).__name__}, want a tensor")
    if lengths.shape != (num_images,):
        raise ValueError(f"lengths: got shape {tuple(lengths.shape)}, want ({num_images},)")
    if lengths.dtype.is_floating_point or lengths.dtype.is_complex or lengths.dtype == torch.bool:
        raise ValueError(f"lengths: got dtype {lengths.dtype}, want an integer dtype")
    if lengths.device != like.device:
        raise ValueError(f"lengths: got device {lengths.device}, want {like.device}")
    # Reading values would be a sync on a GPU and a graph break under torch.compile.
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = lengths.min().item(), lengths.max().item()
        if low < 0 or high > num_tokens:
            raise ValueError(f"lengths: got values from {low} to {high}, want 0 to {num_tokens}")


def resolve_scale(name: str, scale: float | None, x: Tensor) -> float:
    """The factor on the logits, D ** -0.5 if None."""
    if scale is None:
        return x.shape[3] ** -0.5
    if not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f"{name}: got {scale!r}, want a finite number or None")
    return float(scale)


def check_relations(relations: Sequence[str]) -> None:
    """At least one of RELATIONS, each once."""
    if isinstance(relations, str) or not relations or any(relation not in RELATIONS for relation in relations):
        raise ValueError(f"relations: got {relations!r}, want a sequence of at least one of {RELATIONS}")
    if len(set(relations)) < len(relations):
        raise ValueError(f"relations: got {relations!r}, want no duplicates")


def check_relation_heads(relation_heads: int) -> None:
    """A positive integer; whether it divides a width is seen with the tensors."""
    if not isinstance(relation_heads, int) or relation_heads < 1:
        raise ValueError(f"relation_heads: got {relation_heads!r}, want a positive integer")


def weights_by_relation(
    weights: Mapping[str, float] | Sequence[float] | None, relations: tuple[str, ...]
) -> dict[str, float]:
    """A finite weight for each relation, by name or in order; 1 each if None."""
    if weights is None:
        return dict.fromkeys(relations, 1.0)
    named = {}
    if isinstance(weights, Mapping):
        named = dict(weights)
    elif isinstance(weights, Sequence) and len(weights) == len(relations):
        named = dict(zip(relations, weights, strict=True))
    if set(named) != set(relations) or not all(math.isfinite(weight) for weight in named.values()):
        raise ValueError(f"weights: got {weights!r}, want one finite weight for each of {relations}")
    return {relation: float(named[relation]) for relation in relations}
