"""ToP-ViM: the score, the choice, and pruning inside a Vision Mamba against a masked walk over all places."""
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenkit.reduce.ssm_prune import (IMPORTANCES, TokenPruning, VisionMamba, importance_by, keep_tokens, patches_left, selective_scan,
                                       token_importance)
from vits import normal


def mamba(seed=0, **options):
    torch.manual_seed(seed)
    return VisionMamba(**{**dict(dim=32, depth=4, state=4, num_classes=5), **options}).eval()


def pictures(batch=3, size=32, seed=1):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_contract_names():
    from tokenkit.reduce import mamba as engine
    assert VisionMamba is engine.VisionMamba and selective_scan is engine.selective_scan
    assert (TokenPruning().layers, TokenPruning().keep_ratio, TokenPruning().align, TokenPruning().importance, TokenPruning().seed) == ((2, 4, 6), 0.8, "decay", "clip", None)


@settings(max_examples=20, deadline=None)
@given(batch=st.integers(1, 3), length=st.integers(1, 9), width=st.integers(1, 5), seed=st.integers(0, 99))
def test_importance_counts_what_is_positive(batch, length, width, seed):
    y = normal(batch, length, width, seed=seed)
    scores = token_importance(y)
    for b in range(batch):
        for m in range(length):
            assert scores[b, m].item() == pytest.approx(sum(max(0.0, v) for v in y[b, m].tolist()))
    assert scores.shape == (batch, length) and (scores >= 0).all()
    torch.testing.assert_close(token_importance(torch.cat([y, -y.abs()], dim=2)), scores)  # negative channels say nothing


def test_the_other_scores():
    y = torch.tensor([[[3.0, -4.0], [1.0, 1.0]]])
    assert {name: importance_by(name, y).tolist() for name in IMPORTANCES} == {
        "clip": [[3, 2]], "sum": [[-1, 2]], "l1": [[7, 2]], "l2": [[5, pytest.approx(2 ** 0.5)]]}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_are_summed_wide(dtype):
    y = torch.full((1, 2, 3000), 30.0, dtype=dtype)
    assert token_importance(y).dtype == torch.float32 and (token_importance(y) == 90_000).all()


@settings(max_examples=40, deadline=None)
@given(batch=st.integers(1, 3), length=st.integers(4, 40), ratio=st.floats(0.5, 1.0), seed=st.integers(0, 99), middle=st.booleans(), levels=st.integers(2, 50))
def test_kept_tokens_are_the_best_in_order(batch, length, ratio, seed, middle, levels):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (batch, length), generator=g).double()  # with ties
    place = length // 2 if middle else None
    kept = keep_tokens(scores, ratio, place)
    assert kept.dtype == torch.long and (kept.diff(dim=1) > 0).all()
    for row, chosen in zip(scores.tolist(), kept.tolist()):
        others = [m for m in range(length) if m != place]
        count = math.ceil(len(others) * ratio)
        count -= count % 2 if middle and ratio < 1 else 0
        best = sorted(others, key=lambda m: (-row[m], m))[:count]
        assert chosen == sorted(best + [place] * middle)
    assert not middle or ratio == 1 or kept.shape[1] % 2 == 1


def test_counts_of_the_paper():
    assert patches_left(196, 0.8) == 156 and patches_left(64, 0.8) == 52 and patches_left(64, 0.75) == 48 and patches_left(9, 1.0) == 9
    assert patches_left(196, 0.7) == 138 and patches_left(9, 0.5, even=False) == 5 and patches_left(9, 0.5) == 4


def test_the_class_token_may_stand_elsewhere_in_each_image():
    scores = torch.tensor([[0.0, 5, 4, 3, 2], [5.0, 4, 3, 2, 0]])
    assert keep_tokens(scores, 0.5, torch.tensor([0, 4])).tolist() == [[0, 1, 2], [0, 1, 4]]
    assert torch.equal(keep_tokens(scores, 1.0, 2), torch.arange(5).expand(2, -1))
    assert torch.equal(keep_tokens(scores, 1.0), torch.arange(5).expand(2, -1))


def test_ties_and_integers():
    assert keep_tokens(torch.ones(1, 6), 0.5).tolist() == [[0, 1, 2]]
    assert keep_tokens(torch.ones(1, 7, dtype=torch.long), 0.5, 3).tolist() == [[0, 1, 3]]


def masked_forward(model, image, pruning):
    """One image, walking over all places: states pass pruned ones as selective_scan says."""
    x = model.embed(image[None])[0]
    places, middle = list(range(len(x))), model.class_position
    for layer, block in enumerate(model.blocks):
        inner, gate = block.in_proj(block.norm(x)).chunk(2, dim=-1)
        total = 0
        for number, direction in enumerate(block.directions):
            order = list(range(len(places)))[::-1] if number else list(range(len(places)))
            u = F.silu(direction.conv1d(inner[order].T[None])[..., :len(order)][0].T)
            rank, B, C = direction.x_proj(u).split(direction.sizes, -1)
            at = torch.tensor([model.num_tokens - 1 - places[i] if number else places[i] for i in order])
            keep = torch.zeros(1, model.num_tokens, dtype=torch.bool).index_fill(1, at, True)
            wide = lambda t: torch.zeros(1, model.num_tokens, t.shape[-1]).index_copy(1, at, t[None])
            delta = F.softplus(direction.dt_proj(wide(rank)))
            y = selective_scan(wide(u), delta, -direction.A_log.exp(), wide(B), wide(C), direction.D, keep, pruning.align)[0, at]
            total = total + (y.flip(0) if number else y)
        y = total * F.silu(gate)
        x = x + block.out_proj(y / len(block.directions))
        if layer in pruning.layers:
            kept = keep_tokens(importance_by(pruning.importance, y[None]), pruning.keep_ratio, places.index(middle))[0].tolist()
            x, places = x[kept], [places[k] for k in kept]
    return model.head(model.norm(x)[places.index(middle)]), places


@pytest.mark.parametrize("align", ["decay", "hold"])
@pytest.mark.parametrize("importance", ["clip", "l2"])
@pytest.mark.parametrize("both", [True, False])
def test_agrees_with_a_masked_walk(align, importance, both):
    model, images = mamba(bidirectional=both), pictures()
    pruning = TokenPruning((0, 2), 0.6, align, importance)
    with torch.no_grad():
        logits = model(images, prune=pruning)
        for b, image in enumerate(images):
            expected, places = masked_forward(model, image, pruning)
            torch.testing.assert_close(logits[b], expected, atol=1e-5, rtol=1e-4)
            index = model.assignment.index[b]
            assert (index >= 0).nonzero().flatten().tolist() == places and index[places].tolist() == list(range(len(places)))
    assert model.counts == [39, 39, 23, 23] and model.assignment.num_out == 23


def test_alignments_differ_only_after_pruning():
    model, images = mamba(), pictures()
    with torch.no_grad():
        decay, hold = (model(images, prune=TokenPruning((1,), 0.5, align)) for align in ("decay", "hold"))
        assert (decay - hold).abs().max() > 1e-5
        last = [model(images, prune=TokenPruning((3,), 0.5, align)) for align in ("decay", "hold")]
        full = model(images)
    torch.testing.assert_close(last[0], full)  # what leaves after the last block can change nothing
    torch.testing.assert_close(last[1], full)


def test_keeping_all_changes_nothing():
    model, images = mamba(), pictures()
    with torch.no_grad():
        assert torch.equal(model(images, prune=TokenPruning((0, 1, 2), 1.0)), model(images))
    assert model.counts == [65] * 4


def test_random_choices_follow_the_seed():
    model, images = mamba(), pictures()
    with torch.no_grad():
        pruning = TokenPruning((1,), 0.5, importance="random", seed=3)
        first = model(images, prune=pruning)
        assert torch.equal(first, model(images, prune=pruning))
        assert not torch.equal(first, model(images, prune=TokenPruning((1,), 0.5, importance="random", seed=4)))
        assert not torch.equal(model(images, prune=TokenPruning((1,), 0.5, importance="random")), model(images, prune=TokenPruning((1,), 0.5, importance="random")))
    assert (model.assignment.index[:, 32] >= 0).all()


def test_default_schedule_on_the_default_model():
    model = VisionMamba(dim=16).eval()
    with torch.no_grad():
        features = model.forward_features(pictures(), TokenPruning())
    assert model.counts == [65, 65, 53, 53, 43, 43, 35, 35] and features.shape == (3, 35, 16)


def test_it_trains():
    model = mamba().train()
    loss = model(pictures(), prune=TokenPruning((0, 2), 0.7)).square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.blocks[3].directions[0].dt_proj.bias.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model, images = mamba().to(dtype), pictures().to(dtype)
    with torch.no_grad():
        assert model(images, prune=TokenPruning((1,), 0.5)).dtype == dtype


@pytest.mark.parametrize("size, patch", [(16, 4), (12, 4), (32, 16)])
def test_small_grids(size, patch):
    model = mamba(img_size=size, patch_size=patch)
    with torch.no_grad():
        assert model(pictures(size=size), prune=TokenPruning((0, 1, 2), 0.9)).shape == (3, 5)
    assert (model.assignment.index[:, model.class_position] >= 0).all()


@pytest.mark.parametrize("call, message", [
    (lambda: token_importance(torch.zeros(2, 3)), r"y must be \(B, L, E\), got \(2, 3\)"),
    (lambda: importance_by("entropy", torch.zeros(1, 1, 1)), "importance must be one of .*'random'.*, got 'entropy'"),
    (lambda: keep_tokens(torch.rand(4), 0.5), r"importance must be \(B, L\)"),
    (lambda: keep_tokens(torch.rand(1, 0), 0.5), r"importance must be \(B, L\), not empty"),
    (lambda: keep_tokens(torch.full((1, 4), torch.nan), 0.5), "importance must be finite"),
    (lambda: keep_tokens(torch.rand(1, 5), 0.0), r"keep_ratio must be in \(0, 1\], got 0.0"),
    (lambda: keep_tokens(torch.rand(1, 5), 1.1), r"keep_ratio must be in \(0, 1\], got 1.1"),
    (lambda: keep_tokens(torch.rand(1, 5), float("nan")), r"keep_ratio must be in \(0, 1\]"),
    (lambda: keep_tokens(torch.rand(1, 5), 0.2, 2), "no patch would be left: keep_ratio 0.2 of 4"),
    (lambda: keep_tokens(torch.rand(1, 1), 1.0, 0), "no patch would be left"),
    (lambda: keep_tokens(torch.rand(1, 5), 0.8, 5), r"class_position must be in 0..4, one or one an image, got 5"),
    (lambda: keep_tokens(torch.rand(1, 5), 0.8, -1), r"class_position must be in 0..4"),
    (lambda: keep_tokens(torch.rand(2, 5), 0.8, torch.tensor([1, 2, 3])), r"class_position must be in 0..4, one or one an image"),
    (lambda: TokenPruning(keep_ratio=0), r"keep_ratio must be in \(0, 1\], got 0"),
    (lambda: TokenPruning(keep_ratio=2), r"keep_ratio must be in \(0, 1\], got 2"),
    (lambda: TokenPruning(align="skip"), "align must be one of"),
    (lambda: TokenPruning(importance="l3"), "importance must be one of"),
    (lambda: mamba()(pictures(), prune=TokenPruning()), r"layers must be in 0..3 for this model, got \[4, 6\]"),
    (lambda: mamba()(pictures(), prune=TokenPruning((-1,))), r"layers must be in 0..3"),
    (lambda: mamba(img_size=8, patch_size=4)(pictures(size=8), prune=TokenPruning((0, 1, 2), 0.3)), "no patch would be left"),
])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
