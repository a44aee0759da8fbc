"""Relation-distillation losses: the KL divergence between the token relations of two vision transformers."""

from tinymim_fast.kernels.relation_kl import relation_kl
from tinymim_fast.kernels.relation_loss import RelationLoss, relation_loss

__all__ = ["RelationLoss", "relation_kl", "relation_loss"]

if __name__ != "tinymim_fast.kernels":
    # `import kernels` in a checkout, as packages do that look for one of this name: the same functions, registered
    # once. Without a path it has no modules of its own, which would be second copies.
    del __path__
