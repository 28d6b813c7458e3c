import matplotlib.pyplot as plt
import pytest
import torch

from tokenkit.core.plots import COLORS, overlay_tokens, reliability, show_image, tradeoff


@pytest.fixture
def ax():
    fig, ax = plt.subplots()
    yield ax
    plt.close(fig)


def picture(ax):
    return torch.from_numpy(ax.images[0].get_array().data.copy())


def test_kept_patches_are_untouched_and_dropped_ones_fade(ax):
    image = torch.rand(3, 8, 8)
    keep = torch.zeros(2, 2, dtype=torch.bool)
    keep[0, 0] = True
    overlay_tokens(ax, image, keep)
    shown = picture(ax)
    torch.testing.assert_close(shown[:4, :4], image.permute(1, 2, 0)[:4, :4])
    assert (shown[4:, 4:] >= 0.75 - 1e-6).all()


def test_fused_patches_share_their_mean(ax):
    image = torch.rand(3, 8, 8)
    overlay_tokens(ax, image, torch.zeros(4, dtype=torch.long), grid=(2, 2))
    assert picture(ax).flatten(0, 1).unique(dim=0).shape[0] == 1


def test_grid_must_fit(ax):
    with pytest.raises(ValueError, match="h\\*w = 4 entries"):
        overlay_tokens(ax, torch.rand(3, 8, 8), torch.zeros(5), grid=(2, 2))


def test_tradeoff_and_image_draw(ax):
    tradeoff(ax, {"m": ([1, 2], [3, 4]), "r": ([1, 2], [1, 2], [0.1, 0.1])}, "x", "y", {"m": "method", "r": "random"})
    assert ax.get_lines()[0].get_color() == COLORS["method"]
    show_image(ax, torch.rand(8, 8))


def test_reliability_bars_are_the_accuracy(ax):
    reliability(ax, torch.tensor([0.95, 0.95, 0.15]), torch.tensor([True, False, False]))
    assert sorted(bar.get_height() for bar in ax.patches) == [0, 0.5]


@pytest.mark.parametrize("confidence", [torch.tensor([1.2]), torch.tensor([[0.2]])])
def test_reliability_bad_input(ax, confidence):
    with pytest.raises(ValueError):
        reliability(ax, confidence, torch.tensor([True]))
