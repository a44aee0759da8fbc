"""The k-NN classifier against loops."""

import math

import torch

from tinymim_fast.evaluation.knn import knn_accuracy


def test_knn_votes_by_similarity():
    """Written out with loops: standardised features, cosines, exponential votes of the k nearest."""
    generator = torch.Generator().manual_seed(0)
    x, queries = torch.randn(30, 4, generator=generator) * 3 + 1, torch.randn(20, 4, generator=generator) * 3 + 1
    y, truth = torch.arange(30) % 3, torch.arange(20) % 3
    z = [(f - x.mean(0)) / x.std(0) for f in (x, queries)]
    correct = 0
    for query, label in zip(z[1], truth.tolist(), strict=True):
        cosines = [float(torch.cosine_similarity(query, other, dim=0)) for other in z[0]]
        nearest = sorted(range(30), key=lambda i: -cosines[i])[:5]
        votes = [sum(math.exp(cosines[i] / 0.5) for i in nearest if y[i] == c) for c in range(3)]
        correct += votes.index(max(votes)) == label
    assert knn_accuracy((x, y), (queries, truth), k=5, temperature=0.5) == correct / 20
