"""Relation-distillation losses: the KL divergence between the token relations of two vision transformers."""

if __name__ == "tinymim_fast.kernels":
    from tinymim_fast.kernels.relation_kl import relation_kl
    from tinymim_fast.kernels.relation_loss import RelationLoss, relation_loss

    __all__ = ["RelationLoss", "relation_kl", "relation_loss"]
else:
    # From a checkout, who looks for another package called "kernels" (transformers does) finds this folder: it is
    # there, and nothing of ours can be taken from it, for a second copy would register the ops twice.
    __path__ = []

    def __getattr__(name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(f"{__name__}: got the folder itself, want `tinymim_fast.kernels`, which is this folder")
