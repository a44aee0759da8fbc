"""The weighted k-nearest-neighbour classifier on features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

MAX_SIMILARITIES = 1 << 27  # at once: 512 MiB


def knn_correct(
    train: tuple[torch.Tensor, torch.Tensor],
    val: tuple[torch.Tensor, torch.Tensor],
    *,
    ks: Sequence[int],
    temperature: float = 0.07,
) -> dict[int, int]:
    """How many are classified right, by k, by the weighted k-NN classifier of DINO (arXiv 2104.14294).

    Each of the k nearest training features votes for its class with `exp(cosine / temperature)`. Features are
    standardised first, by the mean and standard deviation of each channel over the training features.

    Args:
        train: features (n, C) and labels (n,).
        val: the same, of what is classified; a label means the same class as in `train`.
        ks: numbers of neighbours; more than there are means all.
        temperature: of the votes.
    """
    (x, y), (queries, truth) = train, val
    std, mean = torch.std_mean(x, dim=0)
    x, queries = (F.normalize((f - mean) / (std + 1e-6), dim=1) for f in (x, queries))
    num_classes = int(y.max()) + 1
    correct = dict.fromkeys(ks, 0)
    rows = max(1, min(1024, MAX_SIMILARITIES // len(x)))
    for chunk, labels in zip(queries.split(rows), truth.split(rows), strict=True):
        similarity, nearest = (chunk @ x.T).topk(min(max(ks), len(x)), dim=1)
        votes, classes = (similarity / temperature).exp(), y[nearest]
        for k in ks:
            of_class = chunk.new_zeros(len(chunk), num_classes)
            of_class.scatter_add_(1, classes[:, :k], votes[:, :k])
            correct[k] += int((of_class.argmax(1) == labels).sum())
    return correct


def knn_accuracy(
    train: tuple[torch.Tensor, torch.Tensor],
    val: tuple[torch.Tensor, torch.Tensor],
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Share, 0 to 1, that `knn_correct` counts for one k."""
    return knn_correct(train, val, ks=(k,), temperature=temperature)[k] / len(val[0])
