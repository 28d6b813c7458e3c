"""ATS: scores and sampling against a plain reference, the plug-in on real architectures, and every refusal."""
import math

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tokenkit.reduce.ats import ATS, draw_patches, inverse_transform_sample, keep_padded, nearest_step, pack, rescaled_cdf, sample_points, significance_scores
from tokenkit.reduce.compare import match_flops, model_flops
from tokenkit.reduce.engine import reduce_model

SEEDS = st.integers(0, 10_000)


def reference(scores: Tensor, K: int) -> list[list[int]]:
    """The card's steps, image by image, with a table of all distances."""
    kept = []
    for s in scores:
        if len(s) == 1:
            kept.append([0])
            continue
        order = sorted(range(len(s)), key=lambda j: (s[j].item(), j))
        total = s[order].cumsum(0)
        F = (total - total.min()) / (total.max() - total.min())
        f = F[F > 0].min()
        i = torch.arange(K, dtype=s.dtype)
        u = f + (torch.linspace(0, 1, K, dtype=s.dtype) * (K - 1) - f * i) / (K - 1) if K > 1 else f[None]
        nearest = (u[:, None] - F).abs().argmin(dim=1)
        kept.append([order[j] for j in sorted(set(nearest.tolist()))])
    return kept


def rows(index: Tensor, mask: Tensor) -> list[list[int]]:
    return [i[m].tolist() for i, m in zip(index, mask)]


def random_scores(seed: int, B: int, M: int, power: float, dtype=torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(B, M, generator=g, dtype=torch.float64) + 1e-3).pow(power).to(dtype)


def vit(**changes):
    torch.manual_seed(0)
    return sharpened(timm.create_model("vit_tiny_patch16_224", **{**dict(img_size=64, depth=4, embed_dim=48, num_heads=3, num_classes=5), **changes}))


def sharpened(model):
    """Random weights attend to everything alike: larger ones make attention peaked, so that counts differ."""
    with torch.no_grad():
        for block in model.blocks:
            (block.attn.qkv.weight if block.attn.qkv is not None else block.attn.q_proj.weight).mul_(8)
    return model.eval()


def random_images(size=64, batch=3):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.3, 3, batch).view(-1, 1, 1, 1)


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, B=st.integers(1, 3), M=st.integers(1, 40), K=st.integers(1, 80), power=st.sampled_from([0.2, 1.0, 4.0, 20.0]), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_agrees_with_the_distance_table(seed, B, M, K, power, dtype):
    scores = random_scores(seed, B, M, power, dtype)
    index, mask = inverse_transform_sample(scores, K)
    assert index.dtype == torch.long and mask.dtype == torch.bool and index.shape == mask.shape
    assert rows(index, mask) == reference(scores, K)
    assert (index[~mask] == -1).all() and mask.any(0).all() and (mask.long().diff(dim=1) <= 0).all()  # padding last, no empty column


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, M=st.integers(2, 60), K=st.integers(2, 120), power=st.sampled_from([0.2, 1.0, 6.0]))
def test_highest_always_lowest_never(seed, M, K, power):
    scores = random_scores(seed, 2, M, power)
    index, mask = inverse_transform_sample(scores, K)
    for s, kept in zip(scores, rows(index, mask)):
        assert len(set(kept)) == len(kept) <= min(K, M - 1)
        assert s.argmax().item() in kept and s.argmin().item() not in kept
        assert s[kept].diff().ge(0).all()  # by rising score


@settings(max_examples=20, deadline=None)
@given(M=st.integers(2, 200), extra=st.integers(0, 50), value=st.floats(1e-6, 1e6))
def test_equal_scores_lose_one_patch(M, extra, value):
    index, mask = inverse_transform_sample(torch.full((2, M), value), M + extra)
    assert mask.sum(1).tolist() == [M - 1] * 2 and index[0].tolist() == list(range(1, M))  # the first position goes


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, factor=st.sampled_from([2.0**-20, 0.125, 4.0, 2.0**30]), K=st.integers(1, 60))
def test_scale_does_not_matter(seed, factor, K):
    scores = random_scores(seed, 3, 30, 3.0)
    assert rows(*inverse_transform_sample(scores * factor, K)) == rows(*inverse_transform_sample(scores, K))


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, K=st.integers(1, 60), M=st.integers(1, 30))
def test_rows_do_not_meet(seed, K, M):
    scores = random_scores(seed, 4, M, 5.0)
    together = rows(*inverse_transform_sample(scores, K))
    assert together == [rows(*inverse_transform_sample(s[None], K))[0] for s in scores]


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, K=st.integers(1, 60), M=st.integers(1, 30), pads=st.integers(0, 10))
def test_padding_changes_nothing(seed, K, M, pads):
    scores, g = random_scores(seed, 1, M, 5.0), torch.Generator().manual_seed(seed)
    place = torch.randperm(M + pads, generator=g)[:M].sort().values
    longer, valid = torch.zeros(1, M + pads, dtype=torch.float64), torch.zeros(1, M + pads, dtype=torch.bool)
    longer[0, place], valid[0, place] = scores[0], True
    kept = rows(*draw_patches(longer, K, valid))[0]
    assert kept == place[rows(*draw_patches(scores, K))[0]].tolist()


def test_one_sample_is_the_second_least():
    assert inverse_transform_sample(torch.tensor([[0.5, 0.1, 0.15, 0.25]]), 1)[0].tolist() == [[2]]  # u_0 = f is exactly its step


def test_a_single_patch_stays():
    for K in (1, 2, 7):
        index, mask = inverse_transform_sample(torch.tensor([[0.3], [2.0]]), K)
        assert index.tolist() == [[0], [0]] and mask.all()


def test_zero_scores_are_never_drawn():
    scores = torch.tensor([[0.0, 0.2, 0.0, 0.5, 0.3], [0.0, 0.0, 0.0, 0.0, 1.0]])
    assert rows(*inverse_transform_sample(scores, 50)) == [[1, 4, 3], [4]]


def test_ties_go_to_the_earlier_step():
    cdf = torch.tensor([[0.0, 0.25, 0.5, 0.5, 1.0]])
    assert nearest_step(cdf, torch.tensor([[0.375, 0.5, 0.75, 0.1, 1.5, -1.0]])).tolist() == [[1, 2, 2, 0, 4, 0]]


def test_many_small_scores_survive_half_precision():
    scores = torch.full((1, 4096), 2.0**-11)
    scores[0, 7] = 1.0
    for dtype in (torch.float16, torch.bfloat16):
        assert rows(*inverse_transform_sample(scores.to(dtype), 500)) == rows(*inverse_transform_sample(scores, 500))


def test_points_run_from_the_first_step_to_one():
    cdf = rescaled_cdf(torch.tensor([[-1.0, 0.1, 0.2, 0.3, 0.4]]))
    torch.testing.assert_close(cdf, torch.tensor([[-math.inf, 0, 2 / 9, 5 / 9, 1]]))
    torch.testing.assert_close(sample_points(cdf, 3), torch.tensor([[2 / 9, 11 / 18, 1]]))


def test_pack_and_keep_padded():
    index, mask = pack(torch.tensor([[2, 0, 1], [1, 2, 0]]), torch.tensor([[True, False, True], [False, True, False]]))
    assert index.tolist() == [[2, 1], [2, -1]] and mask.tolist() == [[True, True], [True, False]]
    a = keep_padded(torch.tensor([[0, 3, 2], [0, 3, -1]]), 4)
    assert a.index.tolist() == [[0, -1, 2, 1], [0, -1, -1, 1]] and a.num_out == 3


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, B=st.integers(1, 3), H=st.integers(1, 4), N=st.integers(3, 20), P=st.integers(1, 2))
def test_scores_are_attention_times_value(seed, B, H, N, P):
    g = torch.Generator().manual_seed(seed)
    attn, v = torch.randn(B, H, N, N, generator=g, dtype=torch.float64).softmax(-1), torch.randn(B, H, N, 5, generator=g, dtype=torch.float64)
    mask = torch.rand(B, N, generator=g) < 0.8
    mask[:, P] = True
    scores = significance_scores(attn, v, P, mask)
    for b in range(B):
        expected = torch.tensor([(attn[b, :, 0, j].sum() * v[b, :, j].flatten().norm() * mask[b, j]).item() for j in range(P, N)], dtype=torch.float64)
        torch.testing.assert_close(scores[b], expected / expected.sum())
    assert (scores[~mask[:, P:]] == 0).all() and scores.shape == (B, N - P)
    torch.testing.assert_close(scores.sum(1), torch.ones(B, dtype=torch.float64))


def test_scores_of_half_precision_are_float32_and_differentiable():
    attn, v = torch.randn(2, 3, 9, 9).softmax(-1), torch.randn(2, 3, 9, 4)
    half = significance_scores(attn.bfloat16(), v.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, significance_scores(attn, v), atol=0.01, rtol=0.05)
    attn, v = attn.double().requires_grad_(), v.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, v: significance_scores(a, v), (attn, v))


def attention_of(model, images):
    """For every block of a reduced model: the tokens that enter it, its attention, its values, and the tokens after sampling."""
    seen, entering = [], []

    class Watch(ATS):
        def before_block(self, layer, tokens, attend):
            entering.append(tokens)
            return tokens, None

        def after_attention(self, layer, tokens, maps):
            after = super().after_attention(layer, tokens, maps)
            seen.append((entering[-1], maps.attn, maps.v, after))
            return after
    reduced = reduce_model(model, Watch(layers=(1, 2, 3)))
    with torch.no_grad():
        final = reduced.forward_features(images)
    return seen, final


def test_the_plug_in_is_the_functional_core():
    model, images = vit(), random_images()
    seen, final = attention_of(model, images)
    for layer in (1, 2, 3):
        tokens, attn, v, after = seen[layer]
        scores = significance_scores(attn, v, 1, tokens.mask)
        index, mask = draw_patches(scores, 16, None if tokens.mask is None else tokens.mask[:, 1:])
        assert after.mask.tolist() == torch.cat([torch.ones(3, 1, dtype=torch.bool), mask], 1).tolist()
        assert after.x.shape[1] == 1 + index.shape[1]
    assert len(set(final.mask.sum(1).tolist())) > 1, "the images should differ, or this test shows little"
    for b in range(3):  # provenance: each surviving patch has one slot of its own, in front of the padding
        slots = final.index[b][final.index[b] >= 0]
        assert sorted(slots.tolist()) == list(range(int(final.mask[b].sum())))
    assert (final.x[~final.mask] == 0).all() and (final.size[..., 0] == final.mask).all()


def test_it_equals_full_attention_then_gathering():
    """One sampling block, by hand: the chosen rows of A times V, residual on the chosen rows."""
    model, images = vit(), random_images(batch=1)
    seen, _ = attention_of(model, images)
    tokens, attn, v, after = seen[1]
    index, _ = draw_patches(significance_scores(attn, v), 16)
    kept = torch.cat([torch.zeros(1, 1, dtype=torch.long), index + 1], 1)[0]
    block = model.blocks[1]
    with torch.no_grad():
        x = tokens.x[:, kept] + block.attn.proj((attn[:, :, kept] @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(x, after.x, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(x + block.mlp(block.norm2(x)), seen[2][0].x, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name, options", [
    ("vit_tiny_patch16_224", dict(img_size=64)), ("deit_tiny_distilled_patch16_224", dict(img_size=64)),
    ("vit_small_patch14_reg4_dinov2", dict(img_size=70)), ("vit_tiny_patch16_224", dict(img_size=64, qk_norm=True, init_values=0.1)),
    ("eva02_tiny_patch14_224", dict(img_size=70)),
])
def test_architectures(name, options):
    torch.manual_seed(0)
    options = dict(depth=4, embed_dim=48, num_heads=3, num_classes=5, **options)
    model = sharpened(timm.create_model(name, **options))
    images = random_images(options["img_size"])
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(reduce_model(model, ATS(layers=()))(images), expected, atol=1e-5, rtol=1e-5)
        reduced = reduce_model(model, ATS(layers=(1, 2)))
        tokens = reduced.forward_features(images)
        alone = torch.cat([reduced(image[None]) for image in images])
        torch.testing.assert_close(reduced(images), alone, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(model(images), expected)  # the model given is not changed
    P = model.num_prefix_tokens
    assert (tokens.index[:, :P] == torch.arange(P)).all() and tokens.mask[:, :P].all()
    assert len(set(tokens.mask.sum(1).tolist())) > 1 and (tokens.mask.sum(1) > P).all()  # padding is at work here
    assert reduced.forward_dense(images).isfinite().all()


def test_counts_are_means_of_valid_tokens():
    reduced = reduce_model(vit(), ATS(layers=(1, 2, 3)))
    with torch.no_grad():
        tokens = reduced.forward_features(random_images())
    assert reduced.counts[0] == 17 and reduced.counts[-1] == pytest.approx(tokens.mask.sum(1).float().mean().item())
    assert all(a > b for a, b in zip(reduced.counts, reduced.counts[1:]))  # the least significant goes each time


def test_more_samples_than_patches_and_fewer():
    model, counts = vit(), []
    for K in (1, 3, 16, 200):
        reduced = reduce_model(model, ATS(K, (1, 2, 3)))
        with torch.no_grad():
            assert reduced(random_images()).isfinite().all()
        counts.append(reduced.counts[-1])
    assert counts[0] == 2 and counts == sorted(counts) and counts[-1] <= 14
    assert ATS().layers == tuple(range(3, 12)) and ATS().num_samples is None


def test_default_number_of_samples_is_the_grid():
    model, images = vit(img_size=(64, 96)), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(reduce_model(model, ATS(None, (1, 2)))(images), reduce_model(model, ATS(24, (1, 2)))(images))


def test_a_chain_of_layers_never_loses_the_last_patch():
    reduced = reduce_model(vit(depth=20), ATS(3, range(20)))
    with torch.no_grad():
        tokens = reduced.forward_features(random_images())
    assert (tokens.mask.sum(1) >= 2).all() and tokens.x.isfinite().all()


def test_no_attention_map_is_built():
    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.update({tuple(out.shape[-2:])} if isinstance(out, Tensor) and out.ndim == 4 and out.shape[1] == 3 else ())  # 3 heads
            return out
    reduced = reduce_model(vit(img_size=224), ATS(64, (1, 2)))
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION), Watch():
        reduced(random_images(224, 1))
    assert seen and not seen & {(int(n), int(n)) for n in (197, *reduced.counts)}


def test_it_trains():
    model = reduce_model(vit(), ATS(layers=(1, 2))).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        loss = model(random_images()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        optimizer.step()


def test_half_precision():
    model, x = vit().bfloat16(), random_images(batch=2).bfloat16()
    reduced = reduce_model(model, ATS(layers=(1, 2)))
    with torch.no_grad():
        assert reduced(x).dtype == torch.bfloat16 and reduced(x).isfinite().all()


def test_strength():
    model, images = vit(depth=8), random_images(batch=1)
    cost = [model_flops(reduce_model(model, ATS.at_strength(s, model, (4, 4))), images) for s in (0.0, 0.2, 0.5, 0.8, 1.0)]
    assert cost[0] == model_flops(model, images) and cost == sorted(cost, reverse=True) and cost[-1] < 0.5 * cost[0]
    assert ATS.training_free and ATS.at_strength(0.0, model, (4, 4)).layers == ()
    reduced, spent = match_flops(lambda s: reduce_model(model, ATS.at_strength(s, model, (4, 4))), images, 0.7 * cost[0], tolerance=0.05)
    assert spent <= 0.7 * cost[0]


@pytest.mark.parametrize("call, message", [
    (lambda: ATS(0), "num_samples must be a whole number of at least 1, got 0"),
    (lambda: ATS(2.5), "num_samples must be a whole number of at least 1, got 2.5"),
    (lambda: inverse_transform_sample(torch.rand(1, 4), 0), "num_samples must be a whole number of at least 1, got 0"),
    (lambda: inverse_transform_sample(torch.rand(1, 4), -3), "num_samples must be"),
    (lambda: inverse_transform_sample(torch.rand(4), 4), r"scores must be \(B, M\)"),
    (lambda: inverse_transform_sample(torch.rand(2, 0), 4), r"scores must be \(B, M\) with M >= 1"),
    (lambda: inverse_transform_sample(torch.tensor([[0.5, -0.1]]), 4), "scores must not be negative, got -0.1"),
    (lambda: inverse_transform_sample(torch.tensor([[0.5, float("nan")]]), 4), "scores must be finite"),
    (lambda: inverse_transform_sample(torch.tensor([[0.5, float("inf")]]), 4), "scores must be finite"),
    (lambda: inverse_transform_sample(torch.tensor([[0.5, 0.5], [0, 0]]), 4), "scores must not sum to 0"),
    (lambda: significance_scores(torch.rand(2, 8, 8), torch.rand(2, 1, 8, 4)), r"attn must be \(B, H, N, N\)"),
    (lambda: significance_scores(torch.rand(2, 1, 8, 7), torch.rand(2, 1, 8, 4)), r"attn must be \(B, H, N, N\)"),
    (lambda: significance_scores(torch.rand(2, 1, 8, 8), torch.rand(2, 2, 8, 4)), "v must be"),
    (lambda: significance_scores(torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 4), 0), "there must be a class token"),
    (lambda: significance_scores(torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 4), 8), "there must be a class token"),
    (lambda: significance_scores(torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 4), mask=torch.ones(2, 7, dtype=torch.bool)), "mask must be"),
    (lambda: significance_scores(torch.rand(2, 1, 8, 8), torch.zeros(2, 1, 8, 4)), "scores must not sum to 0"),
    (lambda: significance_scores(torch.full((1, 1, 3, 3), float("nan")), torch.ones(1, 1, 3, 4)), "scores must be finite"),
    (lambda: significance_scores(-torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 4)), "scores must not be negative"),
    (lambda: reduce_model(vit(), ATS(None, (1, 7)))(random_images()), r"layers must be in 0..3"),
    (lambda: reduce_model(vit(), ATS())(random_images()), r"layers must be in 0..3"),
    (lambda: reduce_model(vit(class_token=False, global_pool="avg"), ATS(None, (1,)))(random_images()), "ATS needs a class token"),
])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
