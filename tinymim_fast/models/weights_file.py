"""Files of weights as others write them: read at one boundary, past which every failure is an `InputError`.

`read_file` gives the tensors under flat names ("state_dict.module.cls_token") and what the file says of itself;
`find_encoder` picks the vision transformer among them, by its patch embedding.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch

from tinymim_fast.errors import InputError
from tinymim_fast.models.architecture import shown

logger = logging.getLogger("tinymim_fast")


class _Ignored:
    """Stands for an object that trainers leave beside weights: made, filled, and never looked at."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Ignored:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


def _dictionary(*factory: Any) -> collections.OrderedDict:
    """Stands for defaultdict's constructor."""
    return collections.OrderedDict()


# Not the real classes: numpy's believe what a pickle says of their memory.
STAND_INS = [
    argparse.Namespace,
    (_dictionary, "collections.defaultdict"),
    *((_Ignored, f"builtins.{name}") for name in ("int", "float", "list", "dict", "set")),
    *(
        (_Ignored, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
    ),
    *(
        (_Ignored, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for name in ("scalar", "_reconstruct", "_frombuffer")
    ),
    *((_Ignored, f"numpy.dtypes.{type(np.dtype(kind)).__name__}") for kind in "?bBhHiIlLqQefdFDSU"),
    *((_Ignored, f"numpy.{name}") for name in ("dtype", "ndarray")),
    *((_Ignored, f"datetime.{name}") for name in ("datetime", "date", "timedelta")),
    (_Ignored, "_codecs.encode"),
]
MAX_DEPTH = 8  # of dictionaries in dictionaries
# Names that wrappers put into the middle of a key.
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
ANCHOR = "patch_embed.proj.weight"
AVERAGED = re.compile(r"(^|[._])ema([._]|$)")


@dataclass
class FileContent:
    """What a file of weights holds.

    Args:
        tensors: by flat name, the keys of nested dictionaries joined by dots.
        metadata: of a safetensors file.
        args: the training program's arguments, where the file has them ("args", a namespace or dictionary).
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    args: dict[str, Any] = field(default_factory=dict)


def read_file(path: Path) -> FileContent:
    """All tensors of a safetensors file or PyTorch pickle, on the CPU; no code of the file runs.

    Raises:
        InputError: whatever goes wrong, argument "source"; says what the file is instead.
    """
    try:
        head = _head(path)
        what = _not_weights(head, path)
        if what:
            raise _refused(path, what)
        content = _read_safetensors(path) if _is_safetensors(head, path) else _read_pickle(path)
        if not content.tensors:
            raise _refused(path, "holds no tensors; want a state dict, at top level or in a dictionary")
        _check_tensors(content.tensors, path)
    except InputError:
        raise
    except Exception as error:  # of a file that anybody may have written: RecursionError, MemoryError, IndexError, ...
        raise _refused(path, f"not a checkpoint that can be read: {_reason(error)}") from error
    return content


def find_encoder(content: FileContent, path: Path, key: str | None = None) -> dict[str, torch.Tensor]:
    """The weights of one vision transformer in timm's names, without what wrappers put before them.

    Of several, averaged weights (EMA, or a self-distillation's teacher) are taken before the others, as timm does;
    what was taken is logged.

    Args:
        content: of the file.
        path: for messages.
        key: take those below this key, e.g. "teacher".

    Raises:
        InputError: none, or several that nothing tells apart, argument "source"; no such key, argument "key".
    """
    tensors = {_unwrapped(name): tensor for name, tensor in content.tensors.items()}
    found = sorted(name.removesuffix(ANCHOR) for name in tensors if ("." + name).endswith("." + ANCHOR))
    if not found:
        raise _refused(path, f"not a vision transformer: no {ANCHOR}; {_told(tensors)}")
    names = ", ".join(prefix.rstrip(".") or "the top level" for prefix in found)
    if key is not None:
        within = [p for p in found if f".{p}".startswith(f".{key}.") or p.rstrip(".").endswith(f".{key}")]
        if not within:
            raise InputError(f"got {shown(key)}, but {path} holds weights at {names}", argument="key")
    else:
        rank = min(map(_rank, found))
        within = [prefix for prefix in found if _rank(prefix) == rank]
    prefix = within[0]
    if any(not other.startswith(prefix) for other in within[1:]):
        raise InputError(f"{path} holds several models, at {names}; say which", argument="key")
    if prefix not in ("", "model.", "state_dict.") or len(found) > 1:
        logger.info("%s: took the weights at %s; it holds %s", path, prefix.rstrip(".") or "the top level", names)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def check_finite(state: Mapping[str, torch.Tensor], path: object) -> None:
    """Refuse weights that are NaN or infinite.

    Raises:
        InputError: names the first such tensor, argument "source".
    """
    for name, tensor in state.items():
        bad = int((~tensor.isfinite()).sum())
        if bad:
            raise InputError(
                f"{path}: {name} is not finite ({bad} of {tensor.numel()} values): damaged, or saved by a run that "
                "diverged",
                argument="source",
            )


def _rank(prefix: str) -> int:
    """0 for averaged weights, 1 for a teacher's, 2 for others."""
    if AVERAGED.search(prefix):
        return 0
    return 1 if "teacher" in prefix.split(".") else 2


def _unwrapped(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _refused(path: Path, why: str) -> InputError:
    return InputError(f"{path}: {why}", argument="source")


def _reason(error: Exception) -> str:
    message = (str(error).strip().split("\n") or [""])[0]
    return f"{type(error).__name__}: {shown(message)}" if message else type(error).__name__


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(512)


def _not_weights(head: bytes, path: Path) -> str | None:
    """What a file is that is no checkpoint, by its first bytes; None where it may be one."""
    text = head.lstrip().lower()
    if not head:
        return "is empty; copy or download it again"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not weights; the download gave an error or a confirmation page: download it again"
    for magic, kind in ((b"\x1f\x8b", "gzip"), (b"\xfd7zXZ", "xz"), (b"BZh", "bzip2"), (b"\x28\xb5\x2f\xfd", "zstd")):
        if head.startswith(magic):
            return f"is {kind}-compressed; unpack it"
    if head[257:262] == b"ustar":
        return "is a tar archive; unpack it"
    if head.startswith(b"\x89HDF"):
        return "is an HDF5 file (Keras, TensorFlow); want PyTorch weights"
    if head.startswith(b"PK"):
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        if any(member.filename.endswith(".npy") for member in members):
            return "is a NumPy archive (JAX weights); want PyTorch weights"
        if not any(member.filename.endswith("data.pkl") for member in members):
            return "is a zip archive that torch.save did not write; unpack it"
        if sum(member.file_size for member in members) > 2 * path.stat().st_size + 2**20:
            return "is a compressed zip archive, which torch.save does not write; unpack it and save it again"
    return None


def _is_safetensors(head: bytes, path: Path) -> bool:
    return path.suffix == ".safetensors" or (
        len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < path.stat().st_size
    )


def _read_safetensors(path: Path) -> FileContent:
    with safetensors.safe_open(path, framework="pt") as file:
        return FileContent({key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {})  # noqa: SIM118


def _read_pickle(path: Path) -> FileContent:
    try:
        with torch.serialization.safe_globals(STAND_INS):
            whole = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # PyTorch's own message advises to switch its protection off
        named = re.search(r"(?:GLOBAL|global) ([\w.]+)", str(error))
        if named is None or "." not in named[1]:
            raise _refused(
                path, "not a checkpoint that can be read: damaged, cut, or no pickle of torch.save"
            ) from error
        raise _refused(
            path,
            f"holds a Python object, {shown(named[1])}, beside its tensors, and loading it could run code; save the "
            "weights alone where they were made: torch.save({'model': model.state_dict()}, FILE)",
        ) from error
    content = FileContent(dict(_tensors(whole)))
    args = whole.get("args") if isinstance(whole, dict) else None
    if isinstance(args, argparse.Namespace):
        args = vars(args)
    content.args = args if isinstance(args, dict) else {}
    return content


def _tensors(node: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors in nested dictionaries, an optimizer's left out; the depth is bounded: a pickle may hold itself."""
    if not isinstance(node, Mapping) or depth > MAX_DEPTH:
        return
    for key, value in node.items():
        name = f"{prefix}{key}"
        if isinstance(value, torch.Tensor):
            yield name, value
        elif key not in ("optimizer", "optimizer_state_dict", "optimizer_states"):
            yield from _tensors(value, f"{name}.", depth + 1)


def _check_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Plain tensors in memory, no larger together than the file can hold."""
    for name, tensor in tensors.items():
        kind = (
            "on the meta device, without values"
            if tensor.is_meta
            else "sparse"
            if tensor.layout != torch.strided
            else "quantized"
            if tensor.is_quantized
            else "complex"
            if tensor.is_complex()
            else None
        )
        if kind:
            raise _refused(
                path, f"{shown(name)} is {kind}; want plain tensors: save model.state_dict() of a whole model"
            )
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if claimed > 4 * path.stat().st_size + 2**20:
        raise _refused(path, f"its tensors claim {claimed >> 20} MiB, more than the file can hold; it is damaged")


def _told(tensors: Mapping[str, torch.Tensor]) -> str:
    """What a file without timm's names holds."""
    names = list(tensors)
    if any("embeddings.patch_embeddings.projection" in name for name in names):
        return "the names are Hugging Face's; give timm's model of it, timm:NAME, or convert the names to timm's"
    if any(name.endswith(("transformer.resblocks.0.attn.in_proj_weight", "visual.conv1.weight")) for name in names):
        return "the names are OpenAI CLIP's; give timm's model of it, timm:NAME"
    embed = next((name for name in names if name.endswith("patch_embed.weight") or "patch_embed" in name), None)
    if embed:
        return f"it has {shown(embed)}, {tuple(tensors[embed].shape)}, a patch embedding of another kind than timm's"
    some = ", ".join(shown(name).strip("'") for name in names[:3])
    return f"it holds {len(names)} tensors, the first {some}"


def read_json(path: Path) -> Any:
    """What a small JSON file holds.

    Raises:
        InputError: missing or no JSON, argument "source".
    """
    try:
        if path.stat().st_size > 2**24:
            raise ValueError("larger than 16 MiB")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _refused(path, f"can't be read: {_reason(error)}") from error
