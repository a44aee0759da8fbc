"""Relation-distillation losses: the KL divergence between the token relations of two vision transformers."""

if __name__ != "tinymim_fast.kernels":  # a second copy would register the ops twice
    raise ImportError(f"{__name__}: got the folder itself, want `import tinymim_fast.kernels`, which is this folder")

from tinymim_fast.kernels.relation_kl import relation_kl
from tinymim_fast.kernels.relation_loss import RelationLoss, relation_loss

__all__ = ["RelationLoss", "relation_kl", "relation_loss"]
