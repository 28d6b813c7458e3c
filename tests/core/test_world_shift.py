"""Corruptions, shifts, label noise, long tails and episodes."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenkit.core.world import scenes
from tokenkit.core.world_paint import SHAPES
from tokenkit.core.world_shift import CORRUPTIONS, LOOKALIKES, SHIFTS, corrupt, episode, flip_labels, long_tail_weights


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corruptions_grow_with_severity(kind):
    images = scenes(6, 32, task="class").images
    errors = [(corrupt(images, kind, s) - images).abs().mean().item() for s in (1, 2, 3, 4, 5)]
    assert all(a < b + 1e-3 for a, b in zip(errors, errors[1:])) and errors[0] > 0 and errors[4] > 1.3 * errors[0]
    worse = corrupt(images, kind, 4)
    assert worse.shape == images.shape and worse.dtype == images.dtype and worse.min() >= 0 and worse.max() <= 1
    assert torch.equal(worse, corrupt(images, kind, 4)) and torch.allclose(worse[:2], corrupt(images[:2], kind, 4), atol=1e-6)
    assert corrupt(images.half(), kind, 4).dtype == torch.float16


def test_blur_keeps_constants_and_occlusion_hides_a_square():
    flat = torch.full((1, 3, 20, 20), 0.7)
    for kind in ("blur", "contrast", "pixelation"):
        assert torch.allclose(corrupt(flat, kind, 5), flat, atol=1e-6)
    hidden = (corrupt(flat, "occlusion", 5)[0, 0] == 0.5)
    assert hidden.sum() == 11 * 11


def test_corrupt_refuses():
    images = torch.rand(1, 3, 8, 8)
    with pytest.raises(ValueError, match="kind"):
        corrupt(images, "rain")
    for severity in (0, 6, 2.5):
        with pytest.raises(ValueError, match="severity"):
            corrupt(images, "blur", severity)
    for bad in (images * 2, images - 1, images[0], images * float("nan")):
        with pytest.raises(ValueError, match="images"):
            corrupt(bad, "blur")


def test_shifts_are_valid_worlds():
    for train, test in SHIFTS.values():
        assert len(scenes(2, 16, task="class", **train)) == len(scenes(2, 16, task="class", **test)) == 2


@settings(max_examples=20, deadline=None)
@given(rate=st.floats(0, 1), classes=st.integers(2, 30), seed=st.integers(0, 1000))
def test_flips_are_where_they_say(rate, classes, seed):
    labels = torch.randint(classes, (500,))
    noisy, wrong = flip_labels(labels, rate, classes=classes, seed=seed)
    assert torch.equal(noisy != labels, wrong) and noisy.min() >= 0 and noisy.max() < classes
    assert abs(wrong.float().mean().item() - rate) < 0.12


def test_similar_flips_and_refusals():
    labels = torch.arange(12)
    noisy, wrong = flip_labels(labels, 1.0, kind="similar")
    assert wrong.all() and [SHAPES[i] for i in noisy] == [LOOKALIKES[name] for name in SHAPES]
    assert set(LOOKALIKES) == set(SHAPES) and all(k != v for k, v in LOOKALIKES.items())
    for bad, word in ((dict(rate=1.5), "rate"), (dict(rate=float("nan")), "rate"), (dict(rate=0.1, kind="evil"), "kind"),
                      (dict(rate=0.1, classes=5), "labels"), (dict(rate=0.1, kind="similar", classes=20), "labels")):
        with pytest.raises(ValueError, match=word):
            flip_labels(labels, **bad)


def test_long_tail():
    weights = long_tail_weights(10, 100.0, seed=None)
    assert abs(sum(weights) - 1) < 1e-9 and abs(weights[0] / weights[-1] - 100) < 1e-6
    ratios = [a / b for a, b in zip(weights, weights[1:])]
    assert max(ratios) - min(ratios) < 1e-6
    assert sorted(long_tail_weights(10, 100.0, seed=3)) == pytest.approx(sorted(weights))
    assert len(set(round(w, 9) for w in long_tail_weights(ratio=1.0))) == 1
    for bad in (dict(classes=1), dict(ratio=0.5), dict(ratio=float("nan"))):
        with pytest.raises(ValueError, match="ratio"):
            long_tail_weights(**bad)


def test_episodes_are_disjoint_and_balanced():
    labels = torch.randint(5, (300,), generator=torch.Generator().manual_seed(0))
    support, asked = episode(labels, 3, 7, seed=1)
    assert labels[support].tolist() == [c for c in range(5) for _ in range(3)]
    assert torch.bincount(labels[asked]).tolist() == [7] * 5 and not set(support.tolist()) & set(asked.tolist())
    assert not torch.equal(support, episode(labels, 3, 7, seed=2)[0])
    assert labels[episode(labels, 1, 0, classes=(4, 2))[0]].tolist() == [4, 2]
    with pytest.raises(ValueError, match="class"):
        episode(labels, 200, 7)
    with pytest.raises(ValueError, match="shots"):
        episode(labels, 0, 7)
