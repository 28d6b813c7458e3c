"""LookupViT: gather, scatter and compression against loops, the block's symmetries, the model at any grid and size, its cost, timm, and every refusal."""
import math

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import Block
from torch import nn

from tokenkit.core.measure import flops
from tokenkit.reduce.lookupvit import LookupBlock, LookupViT, compress_tokens, gather_attention, scatter_attention
from tokenkit.zoo.vit_world import ConvStem
from vits import Watch, normal

SEED = st.integers(0, 2**16)
SHAPE = dict(B=st.integers(1, 2), H=st.integers(1, 3), M=st.integers(1, 5), N=st.integers(1, 7), D=st.integers(1, 4), seed=SEED)


def block(dim=12, heads=3, **changes):
    torch.manual_seed(0)
    made = LookupBlock(dim, heads, **changes).double().eval()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return made


def model(**changes):
    torch.manual_seed(0)
    return LookupViT(**dict(img_size=16, patch_size=4, compressed=(2, 2), dim=12, depth=2, num_heads=3, num_classes=5) | changes).eval()


def soft(row):
    top = max(row)
    weights = [math.exp(v - top) for v in row]
    return [w / sum(weights) for w in weights]


# gather and scatter

@settings(max_examples=25, deadline=None)
@given(**SHAPE, scale=st.sampled_from([None, 0.3]))
def test_gather_and_scatter_against_loops(B, H, M, N, D, seed, scale):
    q, back = normal(B, H, M, D, seed=seed), normal(B, H, M, D, seed=seed + 3)
    k, v = normal(B, H, N, D, seed=seed + 1), normal(B, H, N, D, seed=seed + 2)
    out, scores = gather_attention(q, k, v, scale)
    soft_out, turned_out = scatter_attention(scores, back), scatter_attention(scores, back, "transpose")
    for b in range(B):
        for h in range(H):
            S = [[float(q[b, h, m] @ k[b, h, n]) * (D**-0.5 if scale is None else scale) for n in range(N)] for m in range(M)]
            A, columns = [soft(row) for row in S], [soft([S[m][n] for m in range(M)]) for n in range(N)]
            torch.testing.assert_close(scores[b, h], torch.tensor(S, dtype=torch.float64))
            torch.testing.assert_close(out[b, h], torch.stack([sum(A[m][n] * v[b, h, n] for n in range(N)) for m in range(M)]))
            torch.testing.assert_close(soft_out[b, h], torch.stack([sum(columns[n][m] * back[b, h, m] for m in range(M)) for n in range(N)]))
            torch.testing.assert_close(turned_out[b, h], torch.stack([sum(A[m][n] * back[b, h, m] for m in range(M)) for n in range(N)]))


@settings(max_examples=25, deadline=None)
@given(**SHAPE, mode=st.sampled_from(["softmax", "transpose"]))
def test_scatter_is_linear_in_the_values(B, H, M, N, D, seed, mode):
    scores, v, w = normal(B, H, M, N, seed=seed), normal(B, H, M, D, seed=seed + 1), normal(B, H, M, D, seed=seed + 2)
    torch.testing.assert_close(scatter_attention(scores, 2 * v - 3 * w, mode), 2 * scatter_attention(scores, v, mode) - 3 * scatter_attention(scores, w, mode))


@settings(max_examples=25, deadline=None)
@given(**SHAPE)
def test_a_constant_stays_and_transpose_is_the_adjoint(B, H, M, N, D, seed):
    q, k, v, w = normal(B, H, M, D, seed=seed), normal(B, H, N, D, seed=seed + 1), normal(B, H, N, D, seed=seed + 2), normal(B, H, M, D, seed=seed + 3)
    gathered, scores = gather_attention(q, k, v)
    torch.testing.assert_close(scatter_attention(5 * scores, torch.full_like(w, 2.5)), torch.full_like(v, 2.5))
    torch.testing.assert_close((gathered * w).sum(), (v * scatter_attention(scores, w, "transpose")).sum())


def test_each_head_has_its_own_scores():
    scores, v = normal(1, 2, 3, 5), normal(1, 2, 3, 4, seed=1)
    for mode in ("softmax", "transpose"):
        out = scatter_attention(scores, v, mode)
        for h in range(2):
            torch.testing.assert_close(out[:, h:h + 1], scatter_attention(scores[:, h:h + 1], v[:, h:h + 1], mode))
        assert not torch.allclose(out, scatter_attention(scores.mean(1, keepdim=True).expand_as(scores), v, mode))


# compression

def bilinear(maps, out):
    """(h, w, C) resized entry by entry: pixel centres at halves, edges repeated."""
    h, w = maps.shape[:2]

    def corners(i, n, m):
        at = max((i + 0.5) * n / m - 0.5, 0.0)
        low = min(int(at), n - 1)
        return (low, 1 - (at - low)), (min(low + 1, n - 1), at - low)

    return torch.stack([sum(a * b * maps[y, x] for y, a in corners(i, h, out[0]) for x, b in corners(j, w, out[1])) for i in range(out[0]) for j in range(out[1])])


@settings(max_examples=25, deadline=None)
@given(h=st.integers(1, 7), w=st.integers(1, 7), share=st.tuples(st.floats(0, 1), st.floats(0, 1)), seed=SEED)
def test_compression_against_a_loop(h, w, share, seed):
    out = max(1, round(share[0] * h)), max(1, round(share[1] * w))
    x = normal(2, h * w, 3, seed=seed)
    got = compress_tokens(x, (h, w), out)
    assert got.shape == (2, out[0] * out[1], 3)
    for row in range(2):
        torch.testing.assert_close(got[row], bilinear(x[row].view(h, w, 3), out), atol=1e-6, rtol=1e-6)


def test_compression_to_the_same_grid_is_the_identity():
    x = normal(2, 12, 5)
    assert torch.equal(compress_tokens(x, (3, 4), (3, 4)), x)


# the block

def test_the_block_is_its_five_steps():
    b, p, l = block(), normal(2, 4, 12), normal(2, 9, 12, seed=1)
    few, many, scores = b(p, l)
    k, v = b.kv(b.norm_kv(l)).chunk(2, dim=2)
    heads = lambda x: torch.stack(x.split(4, dim=2), dim=1)
    joined = lambda x: torch.cat(x.unbind(1), dim=2)
    S = heads(b.q(b.norm_q(p))) @ heads(k).mT / 2
    p1 = p + b.proj(joined(S.softmax(3) @ heads(v)))
    p2 = p1 + b.attn(b.norm1(p1))
    p3 = p2 + b.mlp(b.norm2(p2))
    l1 = l + b.lookup_proj(joined(S.mT.softmax(3) @ heads(b.v(b.norm_v(p3)))))
    l2 = l1 + b.lookup_mlp(b.lookup_norm(l1))
    for got, want in ((few, p3), (many, l2), (scores, S)):
        torch.testing.assert_close(got, want)
    assert b.mlp.fc1.out_features == 48 and b.lookup_mlp.fc1.out_features == 6


@pytest.mark.parametrize("scatter", ["softmax", "transpose", None])
def test_shuffled_lookup_tokens(scatter):
    b, p, l, order = block(scatter=scatter), normal(2, 4, 12), normal(2, 9, 12, seed=1), torch.randperm(9)
    (few, many, scores), (few2, many2, scores2) = b(p, l), b(p, l[:, order])
    torch.testing.assert_close(few2, few)
    torch.testing.assert_close(many2, many[:, order])
    torch.testing.assert_close(scores2, scores[..., order])


@pytest.mark.parametrize("scatter", ["softmax", "transpose", None])
def test_gradients_pass_through_every_weight(scatter):
    b, p, l = block(scatter=scatter), normal(1, 4, 12).requires_grad_(), normal(1, 9, 12, seed=1).requires_grad_()
    few, many, _ = b(p, l)
    (few.square().sum() + many.square().sum()).backward()
    assert all(w.grad is not None and w.grad.abs().sum() > 0 for name, w in b.named_parameters() if name != "kv.bias"), "a key's bias moves all scores alike"
    assert (p.grad != 0).all() and (l.grad != 0).all()


def test_without_a_way_back_lookup_tokens_do_not_see_the_compressed_ones():
    b, l = block(scatter=None), normal(1, 9, 12, seed=1)
    assert torch.equal(b(normal(1, 4, 12), l)[1], b(normal(1, 4, 12, seed=5), l)[1])
    with_it = block()
    assert not torch.allclose(with_it(normal(1, 4, 12), l)[1], with_it(normal(1, 4, 12, seed=5), l)[1])


# the model

@settings(max_examples=15, deadline=None)
@given(h=st.integers(1, 5), w=st.integers(1, 5), share=st.tuples(st.floats(0, 1), st.floats(0, 1)), seed=SEED)
def test_any_grid_and_image_size_with_the_same_weights(h, w, share, seed):
    net, images = model(compressed=(1, 1)), normal(2, 3, 4 * h, 4 * w, seed=seed, dtype=torch.float32)
    grid = max(1, round(share[0] * h)), max(1, round(share[1] * w))
    with torch.no_grad():
        few, many = net.forward_features(images, grid)
        logits = net(images, grid)
    assert few.shape == (2, grid[0] * grid[1], 12) and many.shape == (2, h * w, 12) and logits.shape == (2, 5)
    assert net.grid == (h, w) and net.counts == [grid[0] * grid[1]] * 2
    torch.testing.assert_close(logits, net.head(few.mean(dim=1)))
    torch.testing.assert_close(net(images[1:], grid), logits[1:], msg="rows of a batch are independent")


def test_the_default_grid_and_a_full_one():
    net, images = model(), normal(2, 3, 16, 16, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(net(images), net(images, (2, 2)))
        few, many = net.embed(images, (4, 4))
        assert torch.equal(few, many), "nothing is compressed"
        assert not torch.allclose(net(images, (4, 4)), net(images))


def test_the_last_block_only_reads():
    net, images = model(), normal(1, 3, 16, 16, dtype=torch.float32)
    net(images).sum().backward()
    idle = {name for name, p in net.blocks[-1].named_parameters() if p.grad is None}
    assert idle == {f"{part}.{w}" for part in ("norm_v", "v", "lookup_proj", "lookup_norm", "lookup_mlp.fc1", "lookup_mlp.fc2") for w in ("weight", "bias")}
    assert all(p.grad is not None for p in net.blocks[0].parameters())
    assert flops(net, images) < flops(net.forward_features, images)


def test_positions_are_added_before_the_resizing():
    net = model()
    with torch.no_grad():
        few, many = net.embed(torch.zeros(1, 3, 16, 16), (2, 2))
    torch.testing.assert_close(few, compress_tokens(many, (4, 4), (2, 2)))
    assert (few[0, 0] - few[0, 3]).abs().max() > 0.1, "on a flat image only positions tell them apart"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions(dtype):
    net, images = model(), normal(2, 3, 16, 16, dtype=torch.float32)
    with torch.no_grad():
        want, got = net(images), net.to(dtype)(images.to(dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, atol=0.02, rtol=0.05)


@pytest.mark.parametrize("changes", [dict(scatter="transpose"), dict(scatter=None), dict(embed_layer=ConvStem), dict(in_chans=1), dict(mlp_ratio=2.0, lookup_mlp_ratio=1.0)])
def test_it_trains(changes):
    net = model(**changes).train()
    images, labels = normal(8, changes.get("in_chans", 3), 16, 16, dtype=torch.float32), torch.arange(8) % 5
    optimizer, losses = torch.optim.AdamW(net.parameters(), lr=1e-2), []
    for _ in range(30):
        losses.append(nn.functional.cross_entropy(net(images), labels))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def test_work_grows_linearly_and_there_is_no_square_map():
    def work(side):
        return flops(LookupViT(img_size=4 * side, patch_size=4, dim=12, depth=2, num_heads=3).eval(), torch.rand(1, 3, 4 * side, 4 * side))
    assert abs((work(16) - work(12)) / (16**2 - 12**2) / ((work(12) - work(8)) / (12**2 - 8**2)) - 1) < 1e-6
    with Watch() as watch, torch.no_grad():
        model()(normal(1, 3, 40, 24, dtype=torch.float32), (3, 3))
    assert watch.largest < 60, "never N x N"


@pytest.mark.parametrize("N, M, C", [(64, 9, 48), (144, 16, 24)])
def test_the_formula_of_a_block(N, M, C):
    few, many = torch.rand(1, M, C), torch.rand(1, N, C)
    want = (3 * N * M * C + 3 * N * C**2 + 3 * M * C**2) + (2 * M**2 * C + 4 * M * C**2) + (8 * M * C**2 + N * C**2)
    assert flops(LookupBlock(C, 3).eval(), few, many) == 2 * want
    assert flops(Block(C, 3).eval(), many) == 2 * (2 * N**2 * C + 12 * N * C**2)


# timm

def test_timm_makes_it():
    net = timm.create_model("lookupvit_tiny", img_size=32, patch_size=8, dim=24, depth=2, num_heads=2, compressed=(2, 2), num_classes=7).eval()
    assert isinstance(net, LookupViT) and net(torch.rand(1, 3, 32, 32)).shape == (1, 7) and net.default_cfg["input_size"] == (3, 32, 32)
    net.reset_classifier(3)
    assert net(torch.rand(1, 3, 32, 32)).shape == (1, 3) and net.get_classifier().out_features == 3
    net.reset_classifier(0)
    assert net(torch.rand(1, 3, 32, 32)).shape == (1, 24)
    full = timm.create_model("lookupvit_tiny")
    assert (full.dim, len(full.blocks), full.grid, full.compressed) == (192, 12, (14, 14), (7, 7))


def test_compile_and_export():
    net, images = model(), normal(2, 3, 16, 16, dtype=torch.float32)
    exported = torch.export.export(net, (images,)).module()
    torch.testing.assert_close(exported(images), net(images))


# refusals

Q, K = normal(1, 2, 3, 4), normal(1, 2, 5, 4)
S = normal(1, 2, 3, 5)


@pytest.mark.parametrize("call, match", [
    (lambda: gather_attention(Q[0], K, K), "q must be"),
    (lambda: gather_attention(Q, K, K[:, :, :4]), "q must be"),
    (lambda: gather_attention(Q[:, :1], K, K), "q must be"),
    (lambda: gather_attention(Q[..., :3], K, K), "q must be"),
    (lambda: scatter_attention(S, Q[:, :, :2]), "scores must be"),
    (lambda: scatter_attention(S, Q[:, :1]), "scores must be"),
    (lambda: scatter_attention(S[0], Q), "scores must be"),
    (lambda: scatter_attention(S, Q, "sum"), "mode must be one of"),
    (lambda: compress_tokens(normal(1, 11, 4), (3, 4), (2, 2)), "x must be"),
    (lambda: compress_tokens(normal(1, 12, 4), (3, 4), (4, 4)), "larger than the lookup grid"),
    (lambda: compress_tokens(normal(1, 12, 4), (3, 4), (0, 2)), "at least 1"),
    (lambda: compress_tokens(normal(1, 12, 4), (12, 0), (1, 1)), "at least 1"),
    (lambda: LookupBlock(12, 5), "divisible by num_heads"),
    (lambda: LookupBlock(12, 3, scatter="sum"), "scatter must be one of"),
    (lambda: model(num_heads=5), "divisible by num_heads"),
    (lambda: model(dim=18), "divisible by 4"),
    (lambda: model(depth=0), "depth must be"),
    (lambda: model(img_size=18), "divisible by patch_size"),
    (lambda: model(compressed=(5, 2)), "larger than the lookup grid"),
    (lambda: model(compressed=(0, 2)), "at least 1"),
    (lambda: model()(torch.rand(1, 3, 16, 18)), "divisible by patch_size"),
    (lambda: model()(torch.rand(1, 3, 8, 16), (3, 3)), "larger than the lookup grid"),
    (lambda: model()(torch.rand(1, 3, 16, 16), (2,)), "must be .rows, columns."),
])
def test_refusals(call, match):
    with pytest.raises(ValueError, match=match):
        call()
