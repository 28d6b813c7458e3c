"""Expedit: clustering, reconstruction, the plug-in on real architectures, and every refusal."""
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenkit.core.measure import flops
from tokenkit.reduce.engine import Reducer, reduce_model
from tokenkit.reduce.expedit import (Clustered, Expedit, auto_temperature, cluster_tokens, home_cells, may_vote, pool_cells, reconstruct_tokens,
                                     squared_distances)
from vits import ARCHITECTURES as SHARED
from vits import Watch, build, images, normal

SEEDS = st.integers(0, 2**16)


@st.composite
def grids(draw, largest=6):
    """A grid, and a coarser one."""
    grid = draw(st.tuples(st.integers(1, largest), st.integers(1, largest)))
    return grid, tuple(draw(st.integers(1, side)) for side in grid)


def clusters_by_loop(tokens, grid, out, num_iters, temperature, window):
    """One image, token by token, as the card tells it: an additive penalty, and a softmax over all centres."""
    places = [(i, j) for i in range(out[0]) for j in range(out[1])]
    start = F.adaptive_avg_pool2d(tokens.T.reshape(1, -1, *grid), out)[0]
    centres = [start[:, i, j] for i, j in places]
    home = [(i * out[0] // grid[0], j * out[1] // grid[1]) for i in range(grid[0]) for j in range(grid[1])]
    for _ in range(num_iters):
        votes = []
        for x, (row, column) in zip(tokens, home):
            far = [0 if max(abs(row - i), abs(column - j)) <= window // 2 else 1e16 for i, j in places]
            votes.append(torch.stack([-temperature * ((x - z).square().sum() + f) for z, f in zip(centres, far)]).softmax(0))
        votes = torch.stack(votes)
        centres = [votes[:, m] @ tokens / votes[:, m].sum() if votes[:, m].sum() > 0 else centres[m] for m in range(len(places))]
    nearest = [min(range(len(centres)), key=lambda m: float((x - centres[m]).square().sum())) for x in tokens]
    return torch.stack(centres), torch.tensor(nearest)


def rebuilt_by_loop(x_before, z_before, z_after, k, temperature, normalize):
    rows = []
    for x in x_before:
        weight = torch.stack([torch.exp(-temperature * (x - z).square().sum()) for z in z_before])
        weight = torch.where(weight >= weight.sort(descending=True).values[k - 1], weight, 0.0)
        rows.append(weight / (weight.sum() if normalize == "l1" else weight.norm()) @ z_after)
    return torch.stack(rows)


# clustering

@settings(max_examples=40, deadline=None)
@given(sides=grids(), num_iters=st.integers(1, 4), temperature=st.floats(0.01, 5), window=st.sampled_from([1, 3, 5]), seed=SEEDS)
def test_clusters_against_a_loop(sides, num_iters, temperature, window, seed):
    grid, out = sides
    x = normal(2, grid[0] * grid[1], 4, seed=seed)
    z, labels = cluster_tokens(x, grid, out, num_iters, temperature, window)
    for row in range(2):
        centres, nearest = clusters_by_loop(x[row], grid, out, num_iters, temperature, window)
        torch.testing.assert_close(z[row], centres, atol=1e-7, rtol=1e-6)
        gap = squared_distances(x[row:row + 1], centres[None])[0]
        torch.testing.assert_close(gap.gather(1, labels[row][:, None]), gap.gather(1, nearest[:, None]), atol=1e-6, rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(sides=grids(), temperature=st.floats(0.01, 10), window=st.sampled_from([1, 3, 5, 7]), seed=SEEDS)
def test_centres_are_convex_combinations(sides, temperature, window, seed):
    grid, out = sides
    x = normal(1, grid[0] * grid[1], 3, seed=seed)
    z, labels = cluster_tokens(x, grid, out, 5, temperature, window)
    assert (z <= x.amax(1, keepdim=True) + 1e-9).all() and (z >= x.amin(1, keepdim=True) - 1e-9).all()
    assert labels.dtype == torch.long and labels.min() >= 0 and labels.max() < out[0] * out[1]
    assert z.shape == (1, out[0] * out[1], 3) and labels.shape == x.shape[:2]


@settings(max_examples=20, deadline=None)
@given(sides=grids(), seed=SEEDS)
def test_constants_rows_and_repetition(sides, seed):
    grid, out = sides
    constant = normal(1, 1, 4, seed=seed).expand(1, grid[0] * grid[1], 4)
    z, _ = cluster_tokens(constant, grid, out)
    torch.testing.assert_close(z, constant[:, :1].expand_as(z))
    x = normal(3, grid[0] * grid[1], 4, seed=seed)
    (z, labels), again, alone = cluster_tokens(x, grid, out), cluster_tokens(x, grid, out), cluster_tokens(x[1:2], grid, out)
    assert torch.equal(z, again[0]) and torch.equal(labels, again[1])
    torch.testing.assert_close(z[1:2], alone[0])


@settings(max_examples=15, deadline=None)
@given(grid=st.tuples(st.integers(1, 6), st.integers(1, 6)), seed=SEEDS)
def test_as_many_centres_as_tokens_is_the_identity(grid, seed):
    x = normal(2, grid[0] * grid[1], 4, seed=seed)
    z, labels = cluster_tokens(x, grid, grid, temperature=100.0, window=1)
    torch.testing.assert_close(z, x)
    assert torch.equal(labels, torch.arange(x.shape[1]).expand(2, -1))


def test_home_and_neighbours():
    assert home_cells((4, 6), (2, 3)).view(4, 6).tolist() == [[0, 0, 1, 1, 2, 2]] * 2 + [[3, 3, 4, 4, 5, 5]] * 2
    assert may_vote((6, 6), (6, 6), 1).equal(torch.eye(36, dtype=torch.bool))
    assert may_vote((5, 5), (5, 5), 9).all()
    assert may_vote((8, 8), (4, 4), 3).sum(1).view(8, 8)[[0, 0, 3], [0, 3, 3]].tolist() == [4, 6, 9]
    assert pool_cells(torch.arange(8.0).view(1, 8, 1), (2, 4), (1, 2)).flatten().tolist() == [2.5, 4.5]


def test_a_centre_without_votes_keeps_its_value():
    """One cell of opposite extremes: their mean is far from both, and each finds a neighbour that is much nearer."""
    x = torch.tensor([0.0, 0, 100, -100, 100, 100, -100, -100], dtype=torch.float32).view(1, 8, 1)
    x[0, :2] = torch.tensor([[100.0], [-100.0]])
    z, _ = cluster_tokens(x, (1, 8), (1, 4), num_iters=3, temperature=10.0, window=7)
    assert z.isfinite().all() and z[0, 0].item() == 0 and z[0, 1].item() == 0
    assert z[0, 2:].flatten().tolist() == [100, -100]


def test_clusters_follow_an_edge():
    image = torch.where(torch.arange(12) < 5, 0.0, 1.0).expand(12, 12).reshape(1, 144, 1)
    z, labels = cluster_tokens(image, (12, 12), (4, 4), temperature=100.0)
    torch.testing.assert_close(z[0].gather(0, labels[0][:, None]), image[0], atol=1e-4, rtol=0)
    assert ((pool_cells(image, (12, 12), (4, 4)) - 0.5).abs() < 0.3).any(), "cells mix the two sides"


# reconstruction

@settings(max_examples=40, deadline=None)
@given(N=st.integers(1, 9), M=st.integers(1, 8), share=st.floats(0.01, 1), temperature=st.floats(0.01, 5), normalize=st.sampled_from(["l1", "l2"]), seed=SEEDS)
def test_reconstruction_against_a_loop(N, M, share, temperature, normalize, seed):
    x, z, y = normal(2, N, 4, seed=seed), normal(2, M, 4, seed=seed + 1), normal(2, M, 3, seed=seed + 2)
    k = math.ceil(share * M)
    want = torch.stack([rebuilt_by_loop(x[row], z[row], y[row], k, temperature, normalize) for row in range(2)])
    torch.testing.assert_close(reconstruct_tokens(x, z, y, k, temperature, normalize), want, atol=1e-9, rtol=1e-6)


@settings(max_examples=20, deadline=None)
@given(N=st.integers(1, 9), M=st.integers(1, 8), temperature=st.floats(0.01, 5), seed=SEEDS)
def test_weights_sum_to_one_and_are_linear(N, M, temperature, seed):
    x, z, y = normal(1, N, 4, seed=seed), normal(1, M, 4, seed=seed + 1), normal(1, M, 3, seed=seed + 2)
    rebuild = lambda t, **k: reconstruct_tokens(x, z, t, min(3, M), temperature, **k)
    torch.testing.assert_close(rebuild(torch.full_like(y, 7.0)), torch.full((1, N, 3), 7.0, dtype=torch.float64))
    torch.testing.assert_close(rebuild(2 * y + 1), 2 * rebuild(y) + 1)
    assert (rebuild(torch.ones_like(y), normalize="l2") <= math.sqrt(min(3, M)) + 1e-9).all()
    own = normal(1, N, 4, seed=seed)
    torch.testing.assert_close(reconstruct_tokens(own, own, own, 1, temperature), own)


def test_ties_with_the_kth_are_included():
    x, z = torch.zeros(1, 1, 2), torch.tensor([[[1.0, 0], [0, 1], [-1, 0], [3, 0]]])
    weight = reconstruct_tokens(x, z, torch.eye(4)[None], k=1, temperature=1.0)
    torch.testing.assert_close(weight, torch.tensor([[[1 / 3, 1 / 3, 1 / 3, 0]]]))


def test_small_weights_are_still_exact():
    x, z = torch.tensor([[[9.0]]]), torch.tensor([[[0.0], [0.5]]])
    want = torch.softmax(-torch.tensor([81.0, 8.5**2]).double(), 0)
    torch.testing.assert_close(reconstruct_tokens(x, z, torch.eye(2)[None], 2, 1.0)[0, 0].double(), want, rtol=1e-4, atol=0)


# precision and gradients

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    x = (30 * normal(2, 36, 16, dtype=torch.float32)).to(dtype)
    z, _ = cluster_tokens(x, (6, 6), (3, 3), temperature=1e-3)
    exact, _ = cluster_tokens(x.float(), (6, 6), (3, 3), temperature=1e-3)
    back = reconstruct_tokens(x, z, z, 5, 1e-3)
    assert z.dtype == back.dtype == dtype and torch.equal(z, exact.to(dtype)) and back.isfinite().all()


def test_autocast_does_not_reach_distances():
    x = 30 + normal(1, 36, 16, dtype=torch.float32)
    want, labels = cluster_tokens(x, (6, 6), (3, 3), temperature=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, same = cluster_tokens(x, (6, 6), (3, 3), temperature=1.0)
        back = reconstruct_tokens(x, z, z, 3, 0.5)
    assert torch.equal(z, want) and torch.equal(labels, same) and torch.equal(back, reconstruct_tokens(x, want, want, 3, 0.5))


def test_gradients():
    x = normal(1, 12, 3).requires_grad_()
    z, labels = cluster_tokens(x, (3, 4), (2, 2), temperature=1.0)
    z.sum().backward()
    torch.testing.assert_close(x.grad.sum(), torch.tensor(12.0, dtype=torch.float64)), "votes are constants: each centre's weights sum to 1"
    assert not labels.requires_grad
    parts = normal(1, 6, 3), normal(1, 4, 3, seed=1), normal(1, 4, 2, seed=2)
    assert torch.autograd.gradcheck(lambda *t: reconstruct_tokens(*t, 3, 0.7), [t.requires_grad_() for t in parts])


# the plug-in

ARCHITECTURES = SHARED | {"oblong": ("vit_tiny_patch16_224", dict(img_size=(64, 96)))}


def vit(kind="vit", **changes):
    return build(ARCHITECTURES[kind], noise=0.05, **{"depth": 4, **changes})


AUTO = dict(temperature="auto", sharpness=5.0)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_on_architectures(kind):
    model = vit(kind)
    x, patches, prefix, grid = images(model), model.patch_embed.num_patches, model.num_prefix_tokens, model.patch_embed.grid_size
    reduced = reduce_model(model, Expedit(1, (2, 3), **AUTO))
    with torch.no_grad():
        before = model(x)
        tokens, logits, dense = reduced.forward_features(x), reduced(x), reduced.forward_dense(x)
        torch.testing.assert_close(reduce_model(model, Expedit(1, grid))(x), before, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(x), before)
        torch.testing.assert_close(reduced(x[1:]), logits[1:], atol=1e-4, rtol=1e-4)
    assert reduced.counts == [prefix + patches] * 1 + [prefix + 6] * 3
    assert torch.equal(tokens.index, torch.arange(prefix + patches).expand(2, -1)) and (tokens.size == 1).all()
    assert dense.shape == (2, 48, *grid) and logits.shape == (2, 7) and logits.isfinite().all()
    torch.testing.assert_close(dense.flatten(2).transpose(1, 2), tokens.x[:, prefix:])


@pytest.mark.parametrize("temperature, sharpness", [(0.5, 1.0), ("auto", 1.0), ("auto", 6.0)])
@pytest.mark.parametrize("normalize", ["l1", "l2"])
def test_it_is_the_functional_core(temperature, sharpness, normalize):
    """Clusters after block 1, rebuilt after block 2: the two functions, with the blocks of the model."""
    model = vit()
    x = images(model)
    with torch.no_grad():
        full = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        full = model.blocks[1](model.blocks[0](full))
        rows = []
        for t in full:
            patches = t[None, 1:]
            tau = sharpness * auto_temperature(patches, (4, 4), (3, 2)).item() if temperature == "auto" else temperature
            z, labels = cluster_tokens(patches, (4, 4), (3, 2), temperature=tau)
            after = model.blocks[2](torch.cat([t[None, :1], z], 1))
            rows.append(torch.cat([after[:, :1], reconstruct_tokens(patches, z, after[:, 1:], 6, tau, normalize)], 1))
        want = model.norm(model.blocks[3](torch.cat(rows)))
        reducer = Expedit(1, (3, 2), temperature=temperature, normalize=normalize, reconstruct_layer=2, sharpness=sharpness)
        reduced = reduce_model(model, reducer)
        torch.testing.assert_close(reduced.forward_features(x).x, want, atol=1e-4, rtol=1e-4)
    assert reduced.counts == [17, 7, 17, 17]


def test_auto_temperature_is_the_inverse_median():
    x = normal(3, 20, 6)
    own = pool_cells(x, (4, 5), (2, 2)).gather(1, home_cells((4, 5), (2, 2)).view(1, -1, 1).expand(3, -1, 6))
    torch.testing.assert_close(auto_temperature(x, (4, 5), (2, 2)).flatten(), 1 / (x - own).square().sum(2).median(1).values)
    assert auto_temperature(torch.ones(1, 20, 6), (4, 5), (2, 2)).item() == 1
    torch.testing.assert_close(auto_temperature(10 * x, (4, 5), (2, 2)), auto_temperature(x, (4, 5), (2, 2)) / 100)


def test_tokens_between():
    """Prefix tokens first, labels in index, sizes 1; attention is not proportional."""
    seen = []

    class Spy(Expedit):
        def after_block(self, layer, tokens, maps):
            tokens = super().after_block(layer, tokens, maps)
            seen.append(tokens)
            return tokens

    model = vit("registers")
    with torch.no_grad():
        reduce_model(model, Spy(0, (2, 2), **AUTO))(images(model))
    P = model.num_prefix_tokens
    for tokens in seen:
        assert isinstance(tokens, Clustered) and tokens.x.shape[1] == P + 4 and tokens.size.shape == (2, P + 4, 1) and (tokens.size == 1).all()
        assert torch.equal(tokens.index[:, :P], torch.arange(P).expand(2, -1)) and tokens.index[:, P:].min() >= P and tokens.index.max() < P + 4
    labels = squared_distances(seen[0].before, seen[0].centres).argmin(2)
    assert torch.equal(seen[0].index[:, P:] - P, labels) and torch.equal(seen[0].x[:, :P], seen[0].full.x[:, :P])


def test_flat_images_do_not_break_auto():
    model = vit("no class token")
    with torch.no_grad():
        assert reduce_model(model, Expedit(1, (2, 2), **AUTO))(torch.zeros(1, 3, *model.patch_embed.img_size)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    model = vit()
    with torch.no_grad():
        exact, low = reduce_model(model, Expedit(1, (3, 3), **AUTO))(images(model)), reduce_model(vit().to(dtype), Expedit(1, (3, 3), **AUTO))(images(model).to(dtype))
    assert low.dtype == dtype and F.cosine_similarity(low.float(), exact).min() > (0.9 if dtype == torch.bfloat16 else 0.9999)


def test_training_reaches_every_weight():
    model = vit()
    dense = reduce_model(model, Expedit(1, (2, 2), **AUTO)).train().forward_dense(images(model))
    dense.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in model.named_parameters() if not n.startswith("head"))


def test_no_attention_map_is_built():
    model = vit(img_size=(112, 80))
    with torch.no_grad(), Watch() as watch:
        reduce_model(model, Expedit(1, (3, 4), **AUTO))(images(model))
    assert watch.largest < 12


def test_export_and_compile():
    model = vit(depth=3)
    for options in (AUTO, dict(temperature=0.1)):
        reduced, x = reduce_model(model, Expedit(0, (2, 2), **options)), images(model)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            want = reduced(x)
            program = torch.export.export(reduced, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
            torch.testing.assert_close(program.module()(x[:1]), want[:1], atol=1e-4, rtol=1e-4)
            torch._dynamo.reset()
            torch.testing.assert_close(torch.compile(reduced, backend="eager", fullgraph=True)(x), want, atol=1e-4, rtol=1e-4)


def test_strength():
    for depth in (3, 12):
        model = vit(depth=depth, img_size=160)
        costs = [flops(reduce_model(model, Expedit.at_strength(s, model, (10, 10))), images(model)) for s in (0.0, 0.25, 0.5, 0.75, 1.0)]
        assert costs == sorted(costs, reverse=True) and costs[-1] < 0.6 * costs[0] and costs[0] == flops(reduce_model(model, Reducer()), images(model))
    steps = [Expedit.at_strength(s / 100, model, (16, 16)).out for s in range(1, 101)]
    assert len(set(steps)) > 20 and all(0 <= a - b <= 1 for a, b in steps) and Expedit.training_free


# refusals

X = normal(1, 12, 4)


@pytest.mark.parametrize("changes, words", [
    (dict(x=X[:, :11]), r"x must be \(B, 3 \* 4, C\)"), (dict(x=X[0]), r"x must be"), (dict(out=(4, 2)), r"out must be at most the grid \(3, 4\)"),
    (dict(out=(0, 2)), "out must be"), (dict(window=4), "window must be odd"), (dict(window=-1), "window must be odd"), (dict(num_iters=0), "num_iters must be at least 1"),
    (dict(temperature=0.0), "temperature must be positive"), (dict(temperature=-1.0), "temperature must be positive"), (dict(temperature=math.nan), "temperature must be positive")])
def test_bad_clustering(changes, words):
    with pytest.raises(ValueError, match=words):
        cluster_tokens(**{**dict(x=X, grid=(3, 4), out=(2, 2)), **changes})


@pytest.mark.parametrize("changes, words", [
    (dict(k=0), "k must be at least 1"), (dict(k=4), "k must be at most the number of centres 3"), (dict(temperature=0.0), "temperature must be positive"),
    (dict(normalize="sum"), "normalize must be 'l1'"), (dict(z_after=X[:, :2]), "z_after must be"), (dict(z_before=X[:, :3, :2]), "x_before and z_before must be"),
    (dict(temperature=1e5), "lower the temperature")])
def test_bad_reconstruction(changes, words):
    with pytest.raises(ValueError, match=words):
        reconstruct_tokens(**{**dict(x_before=X, z_before=normal(1, 3, 4, seed=1), z_after=X[:, :3], k=2), **changes})


@pytest.mark.parametrize("changes, words", [
    (dict(out=(0, 2)), "out must be"), (dict(window=2), "window must be odd"), (dict(num_iters=0), "num_iters must be"), (dict(temperature=0.0), "temperature must be positive"),
    (dict(temperature="warm"), "or 'auto'"), (dict(k=0), "k must be at least 1"), (dict(normalize="sum"), "normalize must be"), (dict(layer=-1), "layer must not be negative"),
    (dict(reconstruct_layer=1), "reconstruct_layer must come after layer 1"), (dict(sharpness=0.0), "sharpness must be positive"), (dict(sharpness=math.inf), "sharpness must be positive")])
def test_bad_settings(changes, words):
    with pytest.raises(ValueError, match=words):
        Expedit(**{**dict(layer=1, out=(2, 2)), **changes})


@pytest.mark.parametrize("reducer, words", [
    (Expedit(4, (2, 2)), r"must be in 0..3 for this model, got 4"), (Expedit(1, (2, 2), reconstruct_layer=4), r"must be in 0..3 for this model, got 4"),
    (Expedit(1, (5, 2)), r"out must be at most the grid \(4, 4\)"), (Expedit(1, (2, 2), temperature=1e5), "lower the temperature 1e\\+05")])
def test_bad_fit(reducer, words):
    model = vit()
    with pytest.raises(ValueError, match=words):
        reduce_model(model, reducer)(images(model))


def test_patch_dropout_does_not_fit():
    model = vit(patch_drop_rate=0.5).train()
    with pytest.raises(ValueError, match="patch dropout does not fit"):
        reduce_model(model, Expedit(1, (2, 2), **AUTO))(images(model))
