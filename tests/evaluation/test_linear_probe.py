"""The linear probe against the conditions of its minimum, in fp64, and its choice of the weight decay."""

import torch

from tinymim_fast.evaluation.linear_probe import fit_logistic, linear_probe


def clusters(n, generator, *, noise=1.0, classes=4, width=6):
    centers = 2 * torch.randn(classes, width, generator=torch.Generator().manual_seed(7))
    y = torch.arange(n) % classes
    return centers[y] + noise * torch.randn(n, width, generator=generator), y


def test_the_fit_is_the_minimum():
    """There the gradient, by formula, is zero, and the problem is convex."""
    x, y = clusters(300, torch.Generator().manual_seed(0), noise=2.0)
    for weight_decay in (1e-1, 1e-3):
        f = x.double()
        w, b = fit_logistic(f, y, num_classes=4, weight_decay=weight_decay)
        surplus = torch.softmax(f @ w.T + b, dim=1)
        surplus[torch.arange(len(y)), y] -= 1
        assert (surplus.T @ f / len(f) + weight_decay * w).abs().max() < 2e-6
        assert surplus.mean(0).abs().max() < 2e-6
        assert w.norm() > 0.1


def test_a_start_changes_nothing():
    x, y = clusters(200, torch.Generator().manual_seed(1), noise=2.0)
    x = x.double()
    cold = fit_logistic(x, y, num_classes=4, weight_decay=1e-2)
    warm = fit_logistic(x, y, num_classes=4, weight_decay=1e-2, start=(x.new_ones(4, 6), x.new_ones(4)))
    torch.testing.assert_close(warm[0], cold[0], atol=1e-4, rtol=0)


def test_it_is_chosen_on_training_images_and_counted_on_the_others():
    generator = torch.Generator().manual_seed(2)
    train, val = clusters(400, generator), clusters(200, generator)
    found = linear_probe(train, val, num_classes=4)
    assert found["num_images"] == 200 and found["top1"] == 100 * found["top1_correct"] / 200 > 60
    assert found["held_out_top1"][found["weight_decay"]] == max(found["held_out_top1"].values())
    swapped = linear_probe(train, (val[0], (val[1] + 1) % 4), num_classes=4)
    assert swapped["held_out_top1"] == found["held_out_top1"], "the choice must not see the validation labels"
    assert swapped["top1_correct"] < found["top1_correct"]


def test_regularisation_matters_where_there_are_few_images():
    """Twenty images of forty channels of noise and one that tells: without weight decay the noise is learnt."""
    generator = torch.Generator().manual_seed(3)

    def images(n):
        y = torch.arange(n) % 2
        x = torch.randn(n, 41, generator=generator)
        x[:, 0] += 4.0 * (2 * y - 1)
        return x, y

    train, val = images(20), images(500)
    accuracy = {decay: linear_probe(train, val, num_classes=2, weight_decays=[decay])["top1"] for decay in (1e-1, 1e-6)}
    assert accuracy[1e-1] != accuracy[1e-6] and min(accuracy.values()) > 60


def test_inference_tensors_are_taken():
    with torch.inference_mode():
        train, val = (clusters(50, torch.Generator().manual_seed(i)) for i in (4, 5))
    assert linear_probe(train, val, num_classes=4)["top1"] > 60
