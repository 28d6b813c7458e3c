"""The reduce engine: matching, provenance, the protocol, and ToMe, on every kind of timm ViT."""
import math
import warnings

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer

from tokenkit.reduce.blocks import NEEDS
from tokenkit.reduce.engine import (Assignment, ReducedViT, Reducer, ToMe, Tokens, bipartite_soft_matching, merge_schedule,
                                    proportional_attention, reduce_model, shrinking)
from vits import ARCHITECTURES as SHARED
from vits import Watch
from vits import build as build_vit

SMALL = dict(num_classes=7, depth=3, embed_dim=48, num_heads=3)
ARCHITECTURES = SHARED | {
    "registers, no class token": ("vit_medium_patch16_reg4_gap_256", dict(img_size=64)),
    "query and key norms": ("vit_tiny_patch16_224", dict(img_size=64, qk_norm=True, init_values=0.5)),
    "norm last": ("vit_small_patch16_224", dict(img_size=64, block_fn=ResPostBlock, init_values=0.5)),
    "average and maximum": ("vit_tiny_patch16_224", dict(img_size=64, global_pool="avgmax")),
    "eva02, rotary": ("eva02_tiny_patch14_224", dict(img_size=70)),
    "rotary, per layer": ("vit_small_patch16_rope_mixed_224", dict(img_size=64)),
}


def build(kind="vit", **changes):
    return build_vit(ARCHITECTURES[kind], **changes)


def images(model, batch=2):
    torch.manual_seed(1)
    return torch.randn(batch, 3, *model.patch_embed.img_size)


class Reader(Reducer):
    """Reads what it asked for, and changes nothing."""

    def __init__(self, needs=frozenset()):
        super().__init__()
        self.needs, self.seen = frozenset(needs), []

    def after_attention(self, layer, tokens, maps):
        self.seen.append({name: getattr(maps, name) for name in NEEDS})
        return tokens


# matching

matchings = st.tuples(st.integers(1, 3), st.integers(4, 24), st.integers(0, 5), st.integers(0, 2**16))


@settings(max_examples=40, deadline=None)
@given(matchings, st.floats(0, 1))
def test_matching_invariants(case, share):
    batch, n, prefix, seed = case
    prefix = min(prefix, n)
    r = int(share * ((n - prefix) // 2))
    metric = torch.randn(batch, n, 6, generator=torch.Generator().manual_seed(seed))
    a = bipartite_soft_matching(metric, r, prefix)
    assert a.num_out == n - r and a.src.shape == a.dst.shape == (batch, r)
    assert torch.equal(a.index[:, :prefix], torch.arange(prefix).expand(batch, -1)), "prefix tokens stay in front"
    for row in range(batch):
        used = torch.bincount(a.index[row], minlength=a.num_out)
        assert used.min() >= 1 and used.sum() == n and (used[:prefix] == 1).all()
        assert torch.equal(a.index[row, a.src[row]], a.index[row, a.dst[row]])
        alone = bipartite_soft_matching(metric[row:row + 1], r, prefix)
        assert torch.equal(alone.index[0], a.index[row]), "rows are independent"
    cosine = torch.nn.functional.cosine_similarity(metric.gather(1, a.src[..., None].expand(-1, -1, 6)),
                                                   metric.gather(1, a.dst[..., None].expand(-1, -1, 6)), dim=2)
    assert (cosine.diff(dim=1) <= 1e-5).all(), "most similar pair first"
    assert (a.src % 2 == 0).all() and (a.dst % 2 == 1).all()


def test_matching_against_a_loop():
    metric = torch.randn(1, 15, 8)
    for prefix in range(4):
        r = (15 - prefix) // 2 - 1
        unit = torch.nn.functional.normalize(metric[0], dim=-1)
        evens, odds = [i for i in range(prefix, 15) if i % 2 == 0], [i for i in range(prefix, 15) if i % 2]
        best = {i: max(odds, key=lambda j: float(unit[i] @ unit[j])) for i in evens}
        chosen = sorted(evens, key=lambda i: -float(unit[i] @ unit[best[i]]))[:r]
        order = [*range(prefix), *(i for i in evens if i not in chosen), *odds]
        a = bipartite_soft_matching(metric, r, prefix)
        assert a.src[0].tolist() == chosen and a.dst[0].tolist() == [best[i] for i in chosen]
        assert a.index[0].tolist() == [order.index(best.get(i, i) if i in chosen else i) for i in range(15)]


def test_nothing_to_merge_is_the_identity_and_ties_are_stable():
    metric = torch.randn(2, 9, 4)
    assert torch.equal(bipartite_soft_matching(metric, 0).index, torch.arange(9).expand(2, 9))
    assert bipartite_soft_matching(torch.ones(1, 9, 4), 3).src[0].tolist() == [2, 4, 6]


@pytest.mark.parametrize("metric, r, words", [
    (torch.randn(5, 4), 1, "metric must be"), (torch.randn(1, 5, 4), 3, "r must be in 0..2"), (torch.randn(1, 5, 4), -1, "r must be in"),
    (torch.full((1, 5, 4), math.nan), 1, "finite"), (torch.full((1, 5, 4), math.inf), 1, "finite"), (torch.zeros(1, 5, 4), 1, "zero row")])
def test_matching_refuses(metric, r, words):
    with pytest.raises(ValueError, match=words):
        bipartite_soft_matching(metric, r)


# assignments

assignments = st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 8), st.integers(0, 2**16))


def random_assignment(batch, n, slots, seed):
    generator = torch.Generator().manual_seed(seed)
    return Assignment(torch.randint(-1, slots, (batch, n), generator=generator), slots), generator


@settings(max_examples=40, deadline=None)
@given(assignments)
def test_merge_modes_against_loops(case):
    a, generator = random_assignment(*case)
    batch, n, slots, _ = case
    x, weight = torch.randn(batch, n, 3, generator=generator), torch.rand(batch, n, 1, generator=generator) + 0.1
    for mode in ("mean", "sum", "amax"):
        for w in (None, weight):
            got, by_hand = a.merge(x, w, mode), torch.ones(batch, n, 1) if w is None else w
            for i in range(batch):
                for j in range(slots):
                    there = a.index[i] == j
                    want = torch.zeros(3)
                    if there.any():
                        total = (by_hand[i, there] * x[i, there]).sum(0)
                        want = {"mean": total / by_hand[i, there].sum(), "sum": total, "amax": x[i, there].amax(0)}[mode]
                    assert torch.allclose(got[i, j], want, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(assignments, st.integers(0, 2**16))
def test_undo_and_compose(case, seed):
    a, generator = random_assignment(*case)
    batch, n, slots, _ = case
    y = torch.randn(batch, slots, 3, generator=generator)
    occupied = a.merge(torch.ones(batch, n, 1), mode="amax")
    assert torch.allclose(a.merge(a.unmerge(y)), y * occupied, atol=1e-6), "merging an unmerged tensor gives it back"
    assert (a.unmerge(y, fill=9.0)[a.index < 0] == 9).all()
    later, _ = random_assignment(batch, slots, 5, seed)
    both, x = a.then(later), torch.randn(batch, n, 2, generator=generator)
    assert torch.allclose(both.merge(x, mode="sum"), later.merge(a.merge(x, mode="sum"), mode="sum"), atol=1e-5)
    assert both.src is None and both.dst is None


def test_keep_and_constants():
    kept = torch.tensor([[3, 0], [1, 2]])
    a = Assignment.keep(kept, 4)
    x = torch.randn(2, 4, 5)
    assert torch.equal(a.merge(x), x.gather(1, kept[..., None].expand(-1, -1, 5))) and a.index[0].tolist() == [1, -1, -1, 0]
    m = bipartite_soft_matching(torch.randn(2, 21, 6), 9)
    size = torch.rand(2, 21, 1) * 5 + 1
    assert torch.allclose(m.merge(torch.full((2, 21, 3), 2.5), size), torch.full((2, 12, 3), 2.5))
    single = torch.bincount(m.index[0])[m.index[0]] == 1
    assert torch.equal(m.unmerge(m.merge(torch.ones(2, 21, 3) / 3, size))[0, single], torch.ones(2, 21, 3)[0, single] / 3)


def test_assignments_refuse():
    a, x = Assignment(torch.zeros(2, 4, dtype=torch.long), 1), torch.zeros(2, 4, 3)
    for call, words in [(lambda: a.merge(x, torch.ones(2, 4)), "weight must be"), (lambda: a.merge(x, mode="median"), "mode must be"),
                        (lambda: a.merge(x[:, :3]), "x must be"), (lambda: a.unmerge(torch.zeros(2, 2, 3)), "y must be"),
                        (lambda: a.then(a), "later index"), (lambda: Assignment(torch.zeros(4, dtype=torch.long), 1), "index must be"),
                        (lambda: Assignment(torch.zeros(2, 4), 1), "index must be")]:
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_merging_keeps_dtype_and_has_gradients(dtype):
    x = torch.randn(2, 9, 4, dtype=dtype, requires_grad=True)
    a = bipartite_soft_matching(x, 3)
    y = a.merge(x, torch.ones(2, 9, 1))
    y.float().square().sum().backward()
    assert y.dtype == dtype and x.grad.isfinite().all() and (x.grad != 0).any()


# schedule and attention

@settings(max_examples=50, deadline=None)
@given(st.integers(1, 24), st.integers(0, 60), st.floats(-1, 1), st.integers(0, 4), st.integers(5, 300))
def test_schedule(layers, r, inflect, prefix, tokens):
    free = merge_schedule(layers, r, inflect)
    low = int(r * (1 - inflect))
    assert free == [int(low + (2 * r - low - low) * l / (layers - 1)) if layers > 1 else int(low) for l in range(layers)]
    n = tokens
    for count, wanted in zip(merge_schedule(layers, r, inflect, tokens, prefix), free):
        assert count == max(0, min(wanted, (n - prefix) // 2))
        n -= count


def test_schedule_by_hand():
    assert merge_schedule(12, 13) == [13] * 12 and merge_schedule(1, 5) == [5]
    assert merge_schedule(12, 8, -1.0) == [16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0]
    assert merge_schedule(4, [5, 2]) == [5, 2, 0, 0]
    for bad, words in [(dict(r=-1), "negative"), (dict(r=[1, -2]), "negative"), (dict(r=[1] * 5), "5 entries"), (dict(r=1, inflect=1.5), "inflect")]:
        with pytest.raises(ValueError, match=words):
            merge_schedule(4, **bad)
    assert shrinking(144, 0.5, 3) == [72, 36, 18] and shrinking(144, 0.0, 2) == [0, 0]


def test_proportional_attention():
    q, k, v = torch.randn(3, 2, 3, 6, 8).unbind(0)
    out, attn = proportional_attention(q, k, v)
    assert torch.allclose(out, torch.nn.functional.scaled_dot_product_attention(q, k, v), atol=1e-6)
    copies = torch.tensor([0, 1, 2, 3, 4, 4, 4, 5])
    size = torch.ones(2, 6, 1)
    size[:, 4] = 3
    assert torch.allclose(proportional_attention(q, k, v, size)[0], proportional_attention(q, k[:, :, copies], v[:, :, copies])[0], atol=1e-5)
    mask = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    out, attn = proportional_attention(q, k, v, size, mask=mask)
    assert (attn[0, :, :, 4:] == 0).all() and torch.allclose(attn.sum(-1), torch.ones(2, 3, 6))
    assert torch.allclose(out[0], proportional_attention(q[:1], k[:1, :, :4], v[:1, :, :4])[0][0], atol=1e-6)
    half = proportional_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), size)[0]
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), proportional_attention(q, k, v, size)[0], atol=0.05)
    with pytest.raises(ValueError, match="size must be"):
        proportional_attention(q, k, v, size[:, :3])
    with pytest.raises(ValueError, match="mask must leave"):
        proportional_attention(q, k, v, mask=torch.zeros(2, 6, dtype=torch.bool))


# the wrapped model

@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_zero_reduction_is_the_model(kind):
    model = build(kind)
    x = images(model)
    with torch.no_grad():
        want = model(x)
        for reducer in (Reducer(), Reader(NEEDS), ToMe(0)):
            assert torch.allclose(reduce_model(model, reducer)(x), want, atol=1e-5, rtol=1e-5)
        tokens = reduce_model(model, Reducer()).forward_features(x)
        assert torch.allclose(tokens.x, model.forward_features(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_tome_runs_and_accounts_for_every_patch(kind):
    model = build(kind)
    x = images(model)
    reduced = reduce_model(model, ToMe([3, 2]))
    with torch.no_grad():
        logits, tokens, dense = reduced(x), reduced.forward_features(x), reduced.forward_dense(x)
    prefix, (h, w) = model.num_prefix_tokens, model.patch_embed.grid_size
    n = prefix + h * w
    assert logits.shape == (2, 7) and logits.isfinite().all() and reduced.counts == [n - 3, n - 5, n - 5]
    assert reduced.grid == (h, w) and dense.shape == (2, 48, h, w)
    counted = torch.stack([torch.bincount(row, minlength=n - 5) for row in tokens.index]).float()
    assert torch.equal(counted, tokens.size[..., 0]), "a slot's size is the number of original tokens mapped to it"
    assert torch.equal(tokens.index[:, :prefix], torch.arange(prefix).expand(2, -1))
    assert torch.allclose(dense.flatten(2)[0, :, 5], tokens.x[0, tokens.index[0, prefix + 5]])
    with torch.no_grad():
        assert torch.allclose(reduced(x[1:]), logits[1:], atol=1e-4), "batch rows are independent"


def test_merged_duplicates_change_nothing():
    """Merging exact copies, with proportional attention, is exact: the strongest test of sizes, bias and pooling."""
    class MergeTwins(Reducer):
        proportional, needs = True, frozenset({"k"})

        def after_attention(self, layer, tokens, maps):
            if layer != 0:
                return tokens
            index = torch.arange(tokens.x.shape[1])
            index[1:] = (index[1:] - 1) // 2 + 1
            return tokens.apply(Assignment(index.expand(len(tokens.x), -1), int(index.max()) + 1))

    model = build(global_pool="avg", no_embed_class=True)
    with torch.no_grad():
        model.pos_embed.zero_()
        x = images(model).view(2, 3, 4, 16, 2, 32)[..., :16].repeat(1, 1, 1, 1, 1, 2).view(2, 3, 64, 64)  # patches 2k and 2k + 1 are equal
        reduced = reduce_model(model, MergeTwins())
        assert torch.allclose(reduced(x), model(x), atol=1e-4) and reduced.counts == [9, 9, 9]
        assert torch.allclose(reduced.forward_dense(x).flatten(2).mT, model.forward_features(x)[:, 1:], atol=1e-4)


def test_maps_are_what_was_asked_for():
    model = build()
    for needs in (set(), {"k"}, {"attn"}, NEEDS):
        reader = Reader(needs)
        reduce_model(model, reader)(images(model))
        for name, value in reader.seen[0].items():
            assert (value is not None) == (name in needs)
            if value is not None:
                assert value.shape == ((2, 3, 17, 17) if name == "attn" else (2, 3, 17, 16))
    assert torch.allclose(reader.seen[1]["attn"].sum(-1), torch.ones(2, 3, 17), atol=1e-5)


def test_no_map_unless_read():
    model = build(img_size=(112, 80))  # 36 tokens; nothing else of four dimensions is square
    for reducer, most in ((ToMe(4), 0), (Reader({"k", "v"}), 0), (Reader({"attn"}), 50)):
        with torch.no_grad(), Watch() as watch:
            reduce_model(model, reducer)(images(model))
        assert (watch.largest >= 20) == (most > 0), type(reducer)


def test_before_block_replaces_attention():
    class Replace(Reducer):
        def before_block(self, layer, tokens, attend):
            return tokens, attend(tokens)

    class Uniform(Reducer):
        def before_block(self, layer, tokens, attend):
            return tokens, torch.full_like(attend(tokens), 1 / tokens.x.shape[1])

    for kind in ("vit", "query and key norms", "eva02, rotary", "norm last"):
        model = build(kind)
        x = images(model)
        with torch.no_grad():
            assert torch.allclose(reduce_model(model, Replace())(x), model(x), atol=1e-4)
            assert not torch.allclose(reduce_model(model, Uniform())(x), model(x), atol=1e-2)


def test_padding_is_invisible():
    """A row with dropped tokens, padded to the length of the others, equals the same row alone, unpadded."""
    class Ragged(Reducer):
        def __init__(self, keep):
            super().__init__()
            self.keep = keep

        def after_attention(self, layer, tokens, maps):
            if layer:
                return tokens
            longest = max(self.keep)
            index = torch.stack([torch.where(torch.arange(17) < k, torch.arange(17), -1) for k in self.keep])
            tokens = tokens.apply(Assignment(index, longest))
            tokens.mask = torch.stack([torch.arange(longest) < k for k in self.keep])
            return tokens

    for kind, changes in (("vit", {}), ("vit", dict(global_pool="avg")), ("average and maximum", {})):
        model = build(kind, **changes)
        x = images(model)
        reduced = reduce_model(model, Ragged([6, 11]))
        with torch.no_grad():
            both = reduced(x)
            assert reduced.counts == [8.5] * 3
            tokens = reduced.forward_features(x)
            assert (tokens.x[0, 6:] == 0).all()
            for row, keep in enumerate((6, 11)):
                assert torch.allclose(both[row], reduce_model(model, Ragged([keep]))(x[row:row + 1])[0], atol=1e-4)


def test_tokens_apply_and_unmerge():
    tokens = Tokens.fresh(torch.randn(1, 5, 3), 1, (2, 2))
    tokens.mask = torch.tensor([[True, True, False, False, True]])
    later = tokens.apply(Assignment(torch.tensor([[0, 1, 1, 2, -1]]), 3))
    assert later.mask.tolist() == [[True, True, False]] and later.size.flatten().tolist() == [1, 2, 1]
    assert later.index.tolist() == [[0, 1, 1, 2, -1]]
    assert (later.unmerge(fill=7.0)[0, 3] == 7).all() and later.unmerge().shape == (1, 4, 3)
    later.index = None
    with pytest.raises(ValueError, match="soft method"):
        later.unmerge()


def test_the_model_given_is_untouched():
    model = build()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    reduced = reduce_model(model, ToMe(3))
    reduced.train()
    assert not model.training and all(not m.training for m in model.modules())
    assert {id(p) for p in reduced.parameters()} == {id(p) for p in model.parameters()}, "weights are shared"
    reduced(images(model)).sum().backward()
    assert model.head.weight.grad is not None
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert type(model.blocks[0]) is Block and "forward" not in vars(model.blocks[0])
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.zero_()
        assert (reduced.eval()(images(model)) == 0).all()


def test_other_image_sizes_follow_the_model():
    model = build("registers", dynamic_img_size=True)
    with torch.no_grad():
        x = torch.randn(1, 3, 56, 84)
        assert torch.allclose(reduce_model(model, Reducer())(x), model(x), atol=1e-5)
        reduced = reduce_model(model, ToMe(3))
        assert reduced.forward_dense(x).shape == (1, 48, 4, 6) and reduced.counts == [26, 23, 20]
        tall, rotary = torch.randn(1, 3, 96, 64), build("dinov3, rotary", dynamic_img_size=True)
        assert torch.allclose(reduce_model(rotary, Reducer())(tall), rotary(tall), atol=1e-5)
        assert reduce_model(rotary, ToMe(3)).forward_dense(tall).shape == (1, 48, 6, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    model = build()
    x, exact = images(model), reduce_model(model, ToMe(2))(images(model)).detach()
    low = reduce_model(build().to(dtype), ToMe(2))
    logits, tokens = low(x.to(dtype)), low.forward_features(x.to(dtype))
    assert logits.dtype == dtype and tokens.size.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(logits.float(), exact).min() > (0.9 if dtype == torch.bfloat16 else 0.9999)


def test_training_reaches_every_weight_and_dropout_works():
    model = build(proj_drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.1, pos_drop_rate=0.1)
    reduced = reduce_model(model, ToMe(2)).train()
    reduced(images(model)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    dropped = build(patch_drop_rate=0.5)
    tokens = reduce_model(dropped, ToMe(2)).train().forward_features(images(dropped))
    assert tokens.x.shape[1] == 9 - 2 * 3 and tokens.index is None


def test_export_and_compile():
    model = build()
    reduced, x = reduce_model(model, ToMe(2)), images(model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = reduced(x)
        program = torch.export.export(reduced, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
        assert torch.allclose(program.module()(x), want, atol=1e-5)
        assert torch.allclose(program.module()(x[:1]), want[:1], atol=1e-5)
        torch._dynamo.reset()
        assert torch.allclose(torch.compile(reduced, backend="eager", fullgraph=True)(x), want, atol=1e-5)


def test_refusals():
    model = build()
    for bad, words in [(torch.nn.Linear(2, 2), "timm VisionTransformer"), (timm.create_model("resnet10t"), "timm VisionTransformer"),
                       (VisionTransformer(img_size=32, embed_dim=12, depth=1, num_heads=1, global_pool="map", class_token=False), "attention-pooling"),
                       (timm.create_model("vit_small_patch16_18x2_224", **SMALL), "ParallelThingsBlock")]:
        with pytest.raises(ValueError, match=words):
            reduce_model(bad, ToMe(1))
    with pytest.raises(ValueError, match="needs"):
        reduce_model(model, Reader({"attention"}))
    with pytest.raises(ValueError, match="must be a Reducer"):
        reduce_model(model, torch.nn.Identity())
    differential = VisionTransformer(img_size=32, embed_dim=16, depth=1, num_heads=2, attn_layer="diff")
    assert isinstance(reduce_model(differential, Reducer()), ReducedViT)
    with pytest.raises(ValueError, match="DiffAttention"):
        reduce_model(differential, ToMe(1))
    with pytest.raises(ValueError, match="negative"):
        ToMe(-1)
    with pytest.raises(ValueError, match="4 entries"):
        reduce_model(model, ToMe([1, 1, 1, 1]))(images(model))
    with pytest.raises(ValueError, match="images must be"):
        reduce_model(model, ToMe(1))(torch.randn(3, 64, 64))

    class Soft(Reducer):
        def start(self, tokens):
            tokens.index = None
            return tokens

    with pytest.raises(ValueError, match="soft method"):
        reduce_model(model, Soft()).forward_dense(images(model))
    with pytest.raises(ValueError, match="rotary"):
        reduce_model(build("dinov3, rotary"), Soft())(images(model))


def test_strength():
    model = build()
    counts = []
    for strength in (0.0, 0.3, 1.0):
        reduced = reduce_model(model, ToMe.at_strength(strength, model, (4, 4)))
        reduced(images(model))
        counts.append(reduced.counts[-1])
    assert counts[0] == 17 and counts == sorted(counts, reverse=True) and counts[-1] <= 5
    with pytest.raises(NotImplementedError):
        Reducer.at_strength(0.5, model, (4, 4))


class Ahead(Reducer):
    """Computes each block's attention ahead and hands it in."""

    def before_block(self, layer, tokens, attend):
        return tokens, attend(tokens)


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_queries_and_keys_ahead_then_values_alone_are_the_block(kind):
    model = build(kind)
    pixels = images(model)
    with torch.no_grad():
        assert torch.allclose(reduce_model(model, Ahead())(pixels), model(pixels), atol=1e-4)


def test_attention_ahead_reads_an_adapted_projection():
    from tokenkit.reduce.pyra import add_lora
    model = add_lora(build("vit"), rank=2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    pixels = images(model)
    with torch.no_grad():
        assert torch.allclose(reduce_model(model, Ahead())(pixels), model(pixels), atol=1e-4)
