"""The weighted k-nearest-neighbour classifier on features."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def knn_accuracy(
    train: tuple[torch.Tensor, torch.Tensor],
    val: tuple[torch.Tensor, torch.Tensor],
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Top-1 accuracy, 0 to 1, of the weighted k-NN classifier of DINO (arXiv 2104.14294).

    Each of the `k` nearest training features votes for its class with `exp(cosine / temperature)`. Features are
    standardised first, by the mean and standard deviation of each channel over the training features.

    Args:
        train: features (n, C) and labels (n,).
        val: the same, of what is classified; a label means the same class as in `train`.
        k: neighbours.
        temperature: of the votes.
    """
    (x, y), (queries, truth) = train, val
    std, mean = torch.std_mean(x, dim=0)
    x, queries = (F.normalize((f - mean) / (std + 1e-6), dim=1) for f in (x, queries))
    num_classes = int(y.max()) + 1
    correct = 0
    for chunk, labels in zip(queries.split(1024), truth.split(1024), strict=True):
        similarity, nearest = (chunk @ x.T).topk(min(k, len(x)), dim=1)
        votes = chunk.new_zeros(len(chunk), num_classes)
        votes.scatter_add_(1, y[nearest], (similarity / temperature).exp())
        correct += int((votes.argmax(1) == labels).sum())
    return correct / len(queries)
