"""Distil vision transformers by token relations (TinyMIM, CVPR 2023), fast."""

from pathlib import Path

# In a checkout the kernels lie beside this folder, in an installation inside it (see setup.py).
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

from tinymim_fast.kernels import RelationLoss, relation_kl, relation_loss
from tinymim_fast.version import __version__

__all__ = ["RelationLoss", "__version__", "relation_kl", "relation_loss"]
