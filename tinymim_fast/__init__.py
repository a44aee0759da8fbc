"""Distil vision transformers by token relations (TinyMIM, CVPR 2023), fast."""

from tinymim_fast.kernels import RelationLoss, relation_kl, relation_loss
from tinymim_fast.version import __version__

__all__ = ["RelationLoss", "__version__", "relation_kl", "relation_loss"]
