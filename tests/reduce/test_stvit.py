"""STViT: pooling, the block that looks elsewhere, the two looks, the plug-in on real architectures, recovery, and every refusal."""

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tokenkit.core.measure import flops
from tokenkit.reduce.engine import reduce_model
from tokenkit.reduce.stvit import CrossBlock, SemanticTokens, STViT, convert, cross_block, pool_semantic_tokens
from vits import ARCHITECTURES, Watch, assert_exports_and_compiles, images, normal, vit

SEED = st.integers(0, 2**16)


def woken(module, seed=0, scale=0.3):
    """Random weights everywhere, as if trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return module


def by_hand(block, x, context, residual=True):
    """The equations of the card, head by head, with an explicit attention map."""
    heads, D = block.num_heads, x.shape[-1] // block.num_heads
    a, b = (nn.functional.layer_norm(t, t.shape[-1:], block.norm1.weight, block.norm1.bias, 1e-5) for t in (x, context))
    q, kv = a @ block.q.weight.T + block.q.bias, b @ block.kv.weight.T + block.kv.bias
    k, v = kv[..., :x.shape[-1]], kv[..., x.shape[-1]:]
    parts = []
    for h in range(heads):
        mine = slice(h * D, (h + 1) * D)
        parts.append(((q[..., mine] @ k[..., mine].transpose(1, 2)) * D**-0.5).softmax(-1) @ v[..., mine])
    y = block.gamma1 * block.proj(torch.cat(parts, -1))
    x = x + y if residual else y
    z = nn.functional.layer_norm(x, x.shape[-1:], block.norm2.weight, block.norm2.bias, 1e-5)
    return x + block.gamma2 * block.fc2(nn.functional.gelu(block.fc1(z)))


# pooling

@settings(max_examples=30, deadline=None)
@given(B=st.integers(1, 3), h=st.integers(1, 9), w=st.integers(1, 9), rows=st.integers(1, 9), columns=st.integers(1, 9), mode=st.sampled_from(["max", "avg"]), seed=SEED)
def test_pooling_against_a_loop(B, h, w, rows, columns, mode, seed):
    rows, columns = min(rows, h), min(columns, w)
    x = normal(B, h * w, 3, seed=seed)
    got, picture = pool_semantic_tokens(x, (h, w), (rows, columns), mode), x.view(B, h, w, 3)
    for i in range(rows):
        for j in range(columns):
            cell = picture[:, i * h // rows:-(-(i + 1) * h // rows), j * w // columns:-(-(j + 1) * w // columns)].flatten(1, 2)
            torch.testing.assert_close(got[:, i * columns + j], cell.amax(1) if mode == "max" else cell.mean(1))


@settings(max_examples=20, deadline=None)
@given(h=st.integers(1, 6), w=st.integers(1, 6), k=st.integers(1, 4), mode=st.sampled_from(["max", "avg"]), seed=SEED)
def test_pooling_properties(h, w, k, mode, seed):
    x = normal(2, h * w, 4, seed=seed)
    assert torch.equal(pool_semantic_tokens(x, (h, w), (h, w), mode), x), "as many cells as patches: the identity"
    larger = normal(2, k * h * k * w, 4, seed=seed)
    torch.testing.assert_close(pool_semantic_tokens(larger, (k * h, k * w), (h, w), "avg").mean(1), larger.mean(1))


@pytest.mark.parametrize("mode", ["max", "avg"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_pooling_precision(mode, dtype):
    x = normal(2, 24, 4)
    got = pool_semantic_tokens(x.to(dtype), (4, 6), (2, 3), mode)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), pool_semantic_tokens(x, (4, 6), (2, 3), mode), atol=0.05, rtol=0.05)


def test_pooling_gradient():
    x = normal(2, 24, 3).requires_grad_()
    for mode in ("max", "avg"):
        assert torch.autograd.gradcheck(lambda t: pool_semantic_tokens(t, (4, 6), (2, 4), mode), (x,))
    assert torch.autograd.gradcheck(lambda t: pool_semantic_tokens(t.transpose(1, 2), (4, 6), (2, 4)), (normal(2, 3, 24).requires_grad_(),)), "strided input"


# the block

@settings(max_examples=15, deadline=None)
@given(N=st.integers(1, 6), K=st.integers(1, 9), heads=st.sampled_from([1, 2, 4]), residual=st.booleans(), seed=SEED)
def test_block_against_the_equations(N, K, heads, residual, seed):
    block = woken(CrossBlock(8, heads, init_values=0.5, residual=residual).double(), seed)
    x, context = normal(2, N, 8, seed=seed), normal(2, K, 8, seed=seed + 1)
    torch.testing.assert_close(block(x, context), by_hand(block, x, context, residual))
    torch.testing.assert_close(block(x), by_hand(block, x, x, residual))
    torch.testing.assert_close(block(x), block(x, x))
    order = torch.randperm(K, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(block(x, context[:, order]), block(x, context))
    torch.testing.assert_close(block(x[:1], context[:1]), block(x, context)[:1])
    attention = block.attention(x, context)
    assert attention.shape == (2, heads, N, K) and torch.allclose(attention.sum(3), torch.ones(2, heads, N, dtype=attention.dtype), atol=1e-5)


def test_block_starts_as_the_identity():
    x, context = normal(2, 5, 12, dtype=torch.float32), normal(2, 9, 12, seed=1, dtype=torch.float32)
    assert torch.equal(CrossBlock(12, 3, init_values=0)(x, context), x)
    block = CrossBlock(12, 3)
    assert (block(x, context) - x).abs().max() < 1e-3 and (block.gamma1 == 1e-5).all() and (block.gamma2 == 1e-5).all()
    assert CrossBlock(12, 3, residual=False)(x, context).abs().max() < 1e-3, "without the residual nothing is left at the start"
    assert CrossBlock(12, 3, qkv_bias=False).q.bias is None and CrossBlock(12, 3, mlp_ratio=2).fc1.out_features == 24
    assert block.norm1.eps == 1e-5 and block.kv.weight.shape == (24, 12)


def test_block_builds_no_map():
    with torch.no_grad(), Watch() as watch:
        CrossBlock(48, 3)(normal(1, 64, 48, dtype=torch.float32))
    assert watch.largest < 64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_block_dtype(dtype):
    block = woken(CrossBlock(12, 3))
    x, context = normal(2, 5, 12, dtype=torch.float32), normal(2, 9, 12, seed=1, dtype=torch.float32)
    want = block(x, context)
    got = block.to(dtype)(x.to(dtype), context.to(dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, atol=0.3 if dtype == torch.bfloat16 else 1e-5, rtol=0.1)


# two looks

@pytest.mark.parametrize("global_tokens", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("P", [0, 2])
def test_module_against_the_equations(P, residual, global_tokens):
    module = woken(SemanticTokens(8, 2, (2, 3), global_tokens, init_values=0.5, residual=residual).double())
    x, prefix = normal(2, 4 * 5, 8), normal(2, P, 8, seed=1)
    s = torch.cat([prefix, pool_semantic_tokens(x, (4, 5), (2, 3))], 1)
    s1 = by_hand(module.block1, s, torch.cat([s, x], 1), residual)
    query = s1.clone()
    if global_tokens:
        query[:, P:] += module.global_tokens
    want = by_hand(module.block2, query, torch.cat([s1, x], 1))
    torch.testing.assert_close(module(x, (4, 5), prefix if P else None), want)
    assert want.shape == (2, P + 6, 8) and (module.global_tokens is None) == (not global_tokens)


def test_module_sizes():
    module = SemanticTokens(12, 3)
    assert module.global_tokens.shape == (1, 16, 12) and 0.01 < module.global_tokens.std() < 0.03
    for grid in ((4, 4), (14, 14), (5, 9), (20, 12)):
        assert module(normal(1, grid[0] * grid[1], 12, dtype=torch.float32), grid).shape == (1, 16, 12)
    assert SemanticTokens(12, 3, (3, 2), mode="avg")(normal(1, 30, 12, dtype=torch.float32), (5, 6)).shape == (1, 6, 12)


def test_gradient_reaches_everything():
    module = woken(SemanticTokens(8, 2, (2, 2), init_values=0.5))
    x, prefix = normal(2, 16, 8, dtype=torch.float32).requires_grad_(), normal(2, 1, 8, dtype=torch.float32).requires_grad_()
    module(x, (4, 4), prefix).square().sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() and t.grad.abs().sum() > 0 for t in (x, prefix, *module.parameters()))


# bad input

def test_refusals_of_the_pooling():
    x = normal(2, 24, 3)
    for bad, grid in ((x, (5, 5)), (x[0], (4, 6)), (x, (4, 5))):
        with pytest.raises(ValueError, match="x must be"):
            pool_semantic_tokens(bad, grid, (2, 2))
    for out in ((5, 2), (2, 7)):
        with pytest.raises(ValueError, match=r"out must be at most the grid \(4, 6\)"):
            pool_semantic_tokens(x, (4, 6), out)
    for out in ((0, 2), (2,), (1, -1)):
        with pytest.raises(ValueError, match="out must be"):
            pool_semantic_tokens(x, (4, 6), out)
        with pytest.raises(ValueError, match="out must be"):
            SemanticTokens(8, 2, out)
    with pytest.raises(ValueError, match="mode must be 'max' or 'avg', got 'mean'"):
        pool_semantic_tokens(x, (4, 6), (2, 2), "mean")
    with pytest.raises(ValueError, match="mode must be"):
        SemanticTokens(8, 2, mode="sum")


def test_refusals_of_the_modules():
    for dim, heads in ((10, 3), (8, 0)):
        with pytest.raises(ValueError, match="dim must be divisible by num_heads"):
            CrossBlock(dim, heads)
    with pytest.raises(ValueError, match="dim must be divisible"):
        STViT(10, 3, 0)
    with pytest.raises(ValueError, match="layer must not be negative"):
        STViT(48, 3, -1)
    model = vit()
    with pytest.raises(ValueError, match=r"layers must be in 0..2 for this model, got \[3\]"):
        reduce_model(model, STViT(48, 3, 3))(images(model))
    with pytest.raises(ValueError, match="dim is 24, but the model's tokens have 48"):
        reduce_model(model, STViT(24, 3, 0))(images(model))
    with pytest.raises(ValueError, match=r"out must be at most the grid \(4, 4\)"):
        reduce_model(model, STViT(48, 3, 0, out=(5, 4)))(images(model))
    with pytest.raises(ValueError, match="after a soft method no patch belongs to one token"):
        reduce_model(model, STViT(48, 3, 0)).forward_dense(images(model))
    for layer in (1, 2, -1):
        with pytest.raises(ValueError, match="layer must be in 0..0, so that two blocks follow it"):
            convert(model, layer)


def test_refusals_of_blocks():
    with pytest.raises(ValueError, match=r"block must be a timm block with plain attention .*q_norm"):
        cross_block(vit("query and key norms").blocks[0])
    with pytest.raises(ValueError, match="block must be"):
        cross_block(vit("dinov3, rotary").blocks[0])
    with pytest.raises(ValueError, match="block must be"):
        cross_block(nn.Linear(3, 3))


# the plug-in

@pytest.mark.parametrize("kind", [k for k in ARCHITECTURES if "rotary" not in k])
def test_on_architectures(kind):
    model = vit(kind)
    x, P = images(model), model.num_prefix_tokens
    reduced = reduce_model(model, woken(STViT(48, 3, 0, (2, 3), init_values=0.5))).eval()
    with torch.no_grad():
        before, logits, tokens = model(x), reduced(x), reduced.forward_features(x)
        assert reduced.counts == [P + 6] * 3 and tokens.index is None and (tokens.size == 1).all() and tokens.x.shape[1] == P + 6
        assert logits.shape == (2, 7) and logits.isfinite().all() and not torch.allclose(logits, before, atol=1e-3)
        assert torch.allclose(reduced(x[1:]), logits[1:], atol=1e-4), "batch rows are independent"
        assert torch.equal(model(x), before), "the model given is untouched"
        back = reduce_model(model, woken(STViT(48, 3, 1, (2, 3), recover=True, init_values=0.5))).eval()
        h, w = model.patch_embed.grid_size
        assert back.forward_dense(x).shape == (2, 48, h, w) and back.counts[1:] == [P + 6] * 2
        tokens = back.forward_features(x)
        assert tokens.x.shape[1] == P + h * w and torch.equal(tokens.index, torch.arange(P + h * w).expand(2, -1))


def test_rotary_positions_are_refused():
    model = vit("dinov3, rotary")
    with pytest.raises(ValueError, match="soft methods do not fit a rotary model"):
        reduce_model(model, STViT(48, 3, 0, (2, 2)))(images(model))


def test_the_plug_in_follows_the_module():
    model = vit()
    reducer = woken(STViT(48, 3, 1, (2, 2), recover=True, init_values=0.5))
    x = images(model)
    with torch.no_grad():
        tokens = model.blocks[:2](model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x)))))
        s = model.blocks[2](reducer.semantic(tokens[:, 1:], (4, 4), tokens[:, :1]))
        want = model.norm(torch.cat([s[:, :1], reducer.recovery(tokens[:, 1:], s[:, 1:])], 1))
        torch.testing.assert_close(reduce_model(model, reducer).eval().forward_features(x).x, want, atol=1e-4, rtol=1e-4)


def test_recovery_leaves_a_class_token_alone():
    model = vit()
    torch.manual_seed(0)
    with_, without = STViT(48, 3, 0, (2, 2), recover=True), STViT(48, 3, 0, (2, 2))
    without.load_state_dict({k: v for k, v in with_.state_dict().items() if "recovery" not in k})
    with torch.no_grad():
        torch.testing.assert_close(reduce_model(model, with_)(images(model)), reduce_model(model, without)(images(model)))


def test_other_image_sizes():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=48, num_heads=3, num_classes=7, dynamic_img_size=True).eval()
    reduced = reduce_model(model, STViT(48, 3, 0, (2, 3), recover=True)).eval()
    with torch.no_grad():
        for size in ((64, 64), (96, 48), (48, 160)):
            x = normal(1, 3, *size, dtype=torch.float32)
            assert reduced.forward_dense(x).shape[2:] == (size[0] // 16, size[1] // 16) and reduced.counts == [7, 7]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_model_dtypes(dtype):
    def made():
        return reduce_model(vit(), woken(STViT(48, 3, 0, (2, 2), recover=True), scale=0.1)).eval()
    x = images(vit())
    with torch.no_grad():
        exact, low = made()(x), made().to(dtype)(x.to(dtype))
    assert low.dtype == dtype and nn.functional.cosine_similarity(low.float(), exact).min() > (0.98 if dtype == torch.bfloat16 else 0.9999)


def test_autocast_trains():
    reduced = reduce_model(vit("no class token"), STViT(48, 3, 0, (2, 2), recover=True)).train()
    with torch.autocast("cpu", torch.bfloat16):
        reduced(images(reduced.vit)).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in reduced.reducer.parameters())


def test_cost_and_export():
    model = vit(img_size=160, depth=4)
    x = images(model)
    assert flops(reduce_model(model, STViT(48, 3, 0)), x) < 0.65 * flops(model, x)
    reduced = reduce_model(vit(), woken(STViT(48, 3, 0, (2, 2), recover=True))).eval().requires_grad_(False)
    x = images(reduced.vit)
    assert_exports_and_compiles(reduced, x)


# from a trained model

@pytest.mark.parametrize("kind", ["vit", "deit distilled", "dinov2"])
def test_a_cross_block_computes_what_the_block_does(kind):
    block = vit(kind).blocks[1]
    x = normal(2, 9, 48, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(cross_block(block)(x), block(x), atol=1e-5, rtol=1e-5)
    assert cross_block(block, residual=False).residual is False and cross_block(block.double())(x.double()).dtype == torch.float64


def test_convert():
    model = vit(depth=5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    reduced = convert(model, 1, (2, 2), recover=True)
    x = images(model)
    assert len(model.blocks) == 5 and len(reduced.vit.blocks) == 3
    assert reduced.vit.blocks[2].mlp.fc1.weight is model.blocks[4].mlp.fc1.weight, "shared with the last block"
    assert torch.equal(reduced.reducer.semantic.block1.q.weight, model.blocks[2].attn.qkv.weight[:48])
    assert torch.equal(reduced.reducer.semantic.block2.kv.weight, model.blocks[3].attn.qkv.weight[48:])
    assert torch.equal(reduced.reducer.recovery.fc2.weight, model.blocks[4].mlp.fc2.weight)
    with torch.no_grad():
        assert reduced(x).shape == (2, 7) and reduced.counts == [17, 5, 5]
        reduced.reducer.semantic.block1.fc1.weight.add_(1)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_as_many_centres_as_patches_is_the_model():
    """Pooling to the patches themselves: block 1 sees every key twice, which changes nothing, and then the tokens differ from the image."""
    model = vit(depth=3)
    reduced = convert(model, 0, (4, 4), global_tokens=False)
    x = images(model)
    with torch.no_grad():
        tokens = model.blocks[:1](model._pos_embed(model.patch_embed(x)))
        doubled = reduced.reducer.semantic.block1(tokens[:, 1:], torch.cat([tokens[:, 1:]] * 2, 1))
        torch.testing.assert_close(doubled, model.blocks[1](tokens[:, 1:]), atol=1e-5, rtol=1e-5)


def test_training_lowers_the_loss():
    reduced = reduce_model(vit(noise=0.02), STViT(48, 3, 0, (2, 2)))
    x, y = normal(12, 3, 64, 64, dtype=torch.float32), torch.arange(12) % 3
    optimizer, losses = torch.optim.AdamW(reduced.parameters(), lr=2e-3), []
    for _ in range(12):
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(reduced(x), y)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.8 * losses[0]
