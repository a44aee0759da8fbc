"""Relation-distillation losses: the KL divergence between the token relations of two vision transformers."""

from tinymim_fast.kernels.relation_kl import relation_kl
from tinymim_fast.kernels.relation_loss import RelationLoss, relation_loss

__all__ = ["RelationLoss", "relation_kl", "relation_loss"]
