"""EViT: the functional core, the plug-in on real architectures, and every refusal."""
import math

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tokenkit.reduce.engine import reduce_model
from tokenkit.reduce.evit import EViT, class_attention, keep_rate_schedule, reorganize_tokens

SIZES = dict(B=st.integers(1, 3), M=st.integers(1, 40), P=st.integers(1, 3), rate=st.floats(0.05, 1.0), fuse=st.booleans())


def reference(x: Tensor, scores: Tensor, rate: float, fuse: bool, P: int) -> Tensor:
    """The same, token by token."""
    rows = []
    for tokens, a in zip(x, scores):
        patches, K = tokens[P:], math.ceil(rate * len(a))
        order = sorted(range(len(a)), key=lambda j: (-a[j].item(), j))
        kept, lost = order[:K], order[K:]
        if not lost:
            rows.append(tokens)
            continue
        fused = [sum(a[j] * patches[j] for j in lost)] if fuse else []
        rows.append(torch.stack([*tokens[:P], *(patches[j] for j in kept), *fused]))
    return torch.stack(rows)


def vit(**changes):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **{**dict(img_size=64, depth=4, embed_dim=48, num_heads=3, num_classes=5), **changes}).eval()


def random_images(size=64, batch=3):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


@settings(max_examples=30, deadline=None)
@given(**SIZES)
def test_agrees_with_a_loop(B, M, P, rate, fuse):
    x, scores = torch.randn(B, P + M, 4, dtype=torch.float64), torch.rand(B, M, dtype=torch.float64)
    out, kept = reorganize_tokens(x, scores, rate, fuse, P)
    torch.testing.assert_close(out, reference(x, scores, rate, fuse, P))
    assert kept.dtype == torch.long and all(len(set(row.tolist())) == kept.shape[1] for row in kept)


@settings(max_examples=20, deadline=None)
@given(**SIZES)
def test_kept_scores_are_the_largest(B, M, P, rate, fuse):
    scores = torch.rand(B, M)
    _, kept = reorganize_tokens(torch.randn(B, P + M, 2), scores, rate, fuse, P)
    mask = torch.zeros(B, M, dtype=torch.bool).scatter(1, kept, True)
    for row, m in zip(scores, mask):
        assert m.all() or row[m].min() >= row[~m].max()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), rate=st.floats(0.1, 1.0))
def test_permuting_patches_permutes_kept_and_nothing_else(seed, rate):
    g = torch.Generator().manual_seed(seed)
    x, scores, order = torch.randn(1, 18, 3, generator=g), torch.rand(1, 17, generator=g), torch.randperm(17, generator=g)
    out, kept = reorganize_tokens(x, scores, rate)
    out2, kept2 = reorganize_tokens(torch.cat([x[:, :1], x[:, 1:][:, order]], 1), scores[:, order], rate)
    if kept.shape[1] < 17:
        torch.testing.assert_close(out, out2)
        assert torch.equal(order[kept2], kept)


def test_float_ceil_is_pythons():
    x, scores = torch.randn(1, 11, 2), torch.rand(1, 10)
    assert reorganize_tokens(x, scores, 0.7, fuse=False)[1].shape[1] == math.ceil(0.7 * 10)
    assert reorganize_tokens(torch.randn(1, 197, 2), torch.rand(1, 196), 0.7)[0].shape[1] == 1 + 138 + 1


def test_ties_go_to_the_lower_position():
    _, kept = reorganize_tokens(torch.randn(2, 9, 2), torch.ones(2, 8), 0.5)
    assert kept.tolist() == [[0, 1, 2, 3]] * 2


def test_keeping_all_changes_nothing():
    x = torch.randn(2, 10, 3)
    out, kept = reorganize_tokens(x, torch.rand(2, 9), 1.0)
    assert torch.equal(out, x) and kept.tolist() == [list(range(9))] * 2


def test_gradient_reaches_scores_only_through_the_fused_token():
    x, scores = torch.randn(1, 7, 3, dtype=torch.float64), torch.rand(1, 6, dtype=torch.float64, requires_grad=True)
    out, kept = reorganize_tokens(x, scores, 0.5)
    out.sum().backward()
    assert (scores.grad.gather(1, kept) == 0).all() and (scores.grad != 0).sum() == 3
    out, _ = reorganize_tokens(x.requires_grad_(), scores, 0.5, fuse=False)
    assert torch.autograd.grad(out.sum(), scores, allow_unused=True)[0] is None
    assert torch.autograd.gradcheck(lambda x, s: reorganize_tokens(x, s, 0.5)[0], (x, scores))


def test_class_attention_is_the_class_row():
    attn = torch.randn(2, 3, 8, 8).softmax(-1)
    torch.testing.assert_close(class_attention(attn, 2), attn[:, :, 0, 2:].mean(1))
    assert class_attention(attn).shape == (2, 7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_is_kept(dtype):
    out, _ = reorganize_tokens(torch.randn(1, 9, 4, dtype=dtype), torch.rand(1, 8), 0.5)
    assert out.dtype == dtype


def test_token_counts_of_the_paper():
    model = timm.create_model("deit_small_patch16_224", embed_dim=48, num_heads=3, num_classes=2).eval()
    reduced = reduce_model(model, EViT(0.7))
    with torch.no_grad():
        reduced(torch.randn(1, 3, 224, 224))
    assert reduced.counts == [197] * 3 + [140] * 3 + [100] * 3 + [72] * 3


@pytest.mark.parametrize("name, options", [
    ("vit_tiny_patch16_224", dict(img_size=64)), ("deit_tiny_distilled_patch16_224", dict(img_size=64)),
    ("vit_small_patch14_reg4_dinov2", dict(img_size=70)), ("vit_tiny_patch16_224", dict(img_size=64, qk_norm=True, init_values=0.1)),
])
def test_architectures(name, options):
    torch.manual_seed(0)
    model = timm.create_model(name, depth=4, embed_dim=48, num_heads=3, num_classes=5, **options).eval()
    x = random_images(options["img_size"])
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(reduce_model(model, EViT(1.0, (1, 2)))(x), expected, atol=1e-5, rtol=1e-5)
        reduced = reduce_model(model, EViT(0.5, (1, 2)))
        tokens = reduced.forward_features(x)
        torch.testing.assert_close(model(x), expected)  # the model given is not changed
    patches = model.patch_embed.num_patches
    P, after = model.num_prefix_tokens, math.ceil(0.5 * (math.ceil(0.5 * patches) + 1)) + 1
    assert tokens.x.shape[1] == P + after
    torch.testing.assert_close(tokens.size.sum(1), torch.full((3, 1), float(P + patches)))  # every patch is in some token
    assert (tokens.index >= 0).all() and (tokens.index[:, :P] == torch.arange(P)).all()


def test_without_fusion_dropped_patches_point_nowhere():
    reduced = reduce_model(vit(), EViT(0.5, (1,), fuse=False))
    with torch.no_grad():
        tokens = reduced.forward_features(random_images())
    assert ((tokens.index >= 0).sum(1) == tokens.x.shape[1]).all() and (tokens.index == -1).sum() == 3 * 8
    assert reduced.forward_dense(random_images()).shape == (3, 48, 4, 4)


def test_rows_of_a_batch_do_not_meet():
    reduced, x = reduce_model(vit(), EViT(0.5, (1, 2))), random_images()
    with torch.no_grad():
        torch.testing.assert_close(reduced(x)[1:2], reduced(x[1:2]), atol=1e-5, rtol=1e-4)


def test_no_attention_map_is_built():
    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.update({tuple(out.shape[-2:])} if isinstance(out, Tensor) and out.ndim == 4 else ())
            return out
    reduced = reduce_model(vit(img_size=224), EViT(0.5, (1, 2)))
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION), Watch():
        reduced(random_images(224, 1))
    assert seen and not seen & {(n, n) for n in (197, *reduced.counts)}


def test_it_trains_and_keep_rate_may_change():
    model = reduce_model(vit(), EViT(1.0, (1, 2))).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for rate in (1.0, 0.8, 0.5):
        model.reducer.keep_rate = rate
        loss = model(random_images()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        optimizer.step()
    assert model.counts[-1] < model.counts[0]


def test_half_precision_and_export():
    model, x = vit(), random_images(batch=2)
    reduced = reduce_model(model, EViT(0.5, (1, 2)))
    with torch.no_grad():
        assert reduce_model(model.bfloat16(), EViT(0.5, (1, 2)))(x.bfloat16()).dtype == torch.bfloat16
    model.float()
    with torch.no_grad():
        exported = torch.export.export(reduced.float(), (x,)).module()
        torch.testing.assert_close(exported(x), reduced(x), atol=1e-5, rtol=1e-4)


@settings(max_examples=30, deadline=None)
@given(warmup=st.integers(0, 50), shrink=st.integers(0, 100), base=st.floats(0.1, 1.0))
def test_schedule_falls_from_one_to_base(warmup, shrink, base):
    rates = [keep_rate_schedule(step, warmup, shrink, base) for step in range(warmup + shrink + 3)]
    assert rates == sorted(rates, reverse=True) and rates[-1] == base
    assert all(r == 1.0 for r in rates[:warmup]) and all(base <= r <= 1 for r in rates)


@pytest.mark.parametrize("call, message", [
    (lambda: EViT(keep_rate=0.0), r"keep_rate must be in \(0, 1\], got 0.0"),
    (lambda: EViT(keep_rate=1.5), r"keep_rate must be in \(0, 1\], got 1.5"),
    (lambda: reorganize_tokens(torch.randn(1, 5, 2), torch.rand(1, 4), float("nan")), "keep_rate must be in"),
    (lambda: reorganize_tokens(torch.randn(1, 5, 2), torch.rand(1, 5), 0.5), "scores must be"),
    (lambda: reorganize_tokens(torch.randn(1, 5, 2), torch.rand(1, 5), 0.5, num_prefix=0), "there must be a class token"),
    (lambda: class_attention(torch.rand(2, 8, 8)), r"attn must be \(B, H, N, N\)"),
    (lambda: class_attention(torch.rand(2, 1, 8, 7)), r"attn must be \(B, H, N, N\)"),
    (lambda: class_attention(torch.rand(2, 1, 8, 8), 0), "there must be a class token"),
    (lambda: keep_rate_schedule(-1, 0, 0), "must not be negative"),
    (lambda: keep_rate_schedule(1, 0, 0, 0.0), "keep_rate must be in"),
    (lambda: reduce_model(vit(), EViT(0.5, (1, 7)))(random_images()), r"layers must be in 0..3"),
    (lambda: reduce_model(vit(class_token=False, global_pool="avg"), EViT(0.5, (1,)))(random_images()), "EViT needs a class token"),
])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
