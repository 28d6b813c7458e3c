"""Zero-TPrune: page rank against oracles, both stages against loops, the plug-in on real architectures, and every refusal."""
import math
import warnings

import networkx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenkit.core.measure import flops
from tokenkit.reduce.engine import Reducer, reduce_model
from tokenkit.reduce.zero_tprune import ZeroTPrune, aggregate_importance, importance_prune, similarity_prune, weighted_page_rank
from vits import ARCHITECTURES as SHARED
from vits import Watch, build, images, normal

SEEDS = st.integers(0, 10_000)


def graph(*shape, seed=0, dtype=torch.float64, sharp=1.0):
    return (sharp * normal(*shape, shape[-1], seed=seed, dtype=dtype)).softmax(-1)


# page rank

@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, N=st.integers(1, 12), T=st.integers(1, 9), sharp=st.floats(0.1, 5.0))
def test_scores_are_the_vote_counted_by_hand(seed, N, T, sharp):
    attn = graph(2, 2, N, seed=seed, sharp=sharp)
    s = weighted_page_rank(attn, T)
    by_hand = torch.full((2, 2, N), 1 / N, dtype=torch.float64)
    for _ in range(T):
        by_hand = torch.stack([sum(by_hand[..., i] * attn[..., i, j] for i in range(N)) for j in range(N)], dim=-1)
    torch.testing.assert_close(s, by_hand)
    assert (s >= 0).all()
    torch.testing.assert_close(s.sum(-1), torch.ones(2, 2, dtype=torch.float64))
    torch.testing.assert_close(weighted_page_rank(attn, 1), attn.mean(dim=2))


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, N=st.integers(2, 10))
def test_many_votes_are_the_left_eigenvector(seed, N):
    attn = graph(1, 1, N, seed=seed)
    values, vectors = torch.linalg.eig(attn[0, 0].T)
    exact = vectors[:, (values - 1).abs().argmin()].real
    torch.testing.assert_close(weighted_page_rank(attn, 500)[0, 0], exact / exact.sum(), atol=1e-8, rtol=1e-6)


def test_many_votes_are_undamped_pagerank():
    attn = graph(1, 1, 9, seed=3)
    ranks = networkx.pagerank(networkx.from_numpy_array(attn[0, 0].numpy(), create_using=networkx.DiGraph), alpha=1.0, tol=1e-12, max_iter=1000)
    torch.testing.assert_close(weighted_page_rank(attn, 300)[0, 0], torch.tensor([ranks[i] for i in range(9)], dtype=torch.float64), atol=1e-8, rtol=1e-6)


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, N=st.integers(1, 10), T=st.integers(1, 30))
def test_uniform_attention_and_relabelling(seed, N, T):
    assert torch.allclose(weighted_page_rank(torch.full((1, 2, N, N), 1 / N), T), torch.tensor(1 / N))
    attn, order = graph(1, 2, N, seed=seed), torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(weighted_page_rank(attn[:, :, order][..., order], T), weighted_page_rank(attn, T)[..., order])


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, N=st.integers(2, 10), T=st.integers(1, 8))
def test_a_mask_is_a_smaller_graph(seed, N, T):
    attn = graph(2, 2, N, seed=seed)
    mask = torch.rand(2, N, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[:, seed % N] = True
    s = weighted_page_rank(attn, T, mask=mask)
    for row, inside, scores in zip(attn, mask, s):
        small = row[:, inside][..., inside]
        torch.testing.assert_close(scores[:, inside], weighted_page_rank((small / small.sum(-1, keepdim=True))[None], T)[0])
        assert (scores[:, ~inside] == 0).all()
    torch.testing.assert_close(weighted_page_rank(attn, T, mask=torch.ones(2, N, dtype=torch.bool)), weighted_page_rank(attn, T))


def test_a_token_that_attends_to_removed_nodes_only_votes_for_all():
    attn = torch.eye(4).roll(1, 1)[None, None]  # 0 -> 1 -> 2 -> 3 -> 0
    s = weighted_page_rank(attn, 1, mask=torch.tensor([[True, True, True, False]]))
    torch.testing.assert_close(s[0, 0], torch.tensor([1 / 9, 4 / 9, 4 / 9, 0]))
    assert weighted_page_rank(attn, 40, mask=torch.tensor([[True, False, True, False]])).isfinite().all()


def test_tolerance_stops_early():
    attn = graph(1, 2, 20, seed=1)
    fixed = weighted_page_rank(attn, 200)
    early = weighted_page_rank(attn, 200, tol=1e-3)
    assert not torch.equal(early, fixed) and (early - fixed).abs().max() < 1e-2
    steps = next(T for T in range(1, 200) if torch.equal(weighted_page_rank(attn, T), early))
    assert (early - weighted_page_rank(attn, steps - 1)).abs().max() < 1e-3 <= (weighted_page_rank(attn, steps - 1) - (weighted_page_rank(attn, steps - 2) if steps > 2 else 1 / 20)).abs().max()
    cycle = torch.tensor([[0., 1], [.5, .5]])[None, None]
    assert torch.equal(weighted_page_rank(cycle, 7, tol=0.0), weighted_page_rank(cycle, 7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_counted_in_float32(dtype):
    attn = graph(1, 3, 197, dtype=torch.float32, sharp=2.0)
    low, exact = weighted_page_rank(attn.to(dtype), 50), weighted_page_rank(attn, 50)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, exact, rtol=0.02, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(weighted_page_rank(attn, 50), exact)


def test_gradient():
    raw = normal(1, 2, 5, 5).requires_grad_()
    mask = torch.tensor([[True, True, False, True, True]])
    assert torch.autograd.gradcheck(lambda a: weighted_page_rank(a.softmax(-1), 4), raw)
    assert torch.autograd.gradcheck(lambda a: aggregate_importance(weighted_page_rank(a.softmax(-1), 3, mask=mask))[:, mask[0]], raw)


# heads to one score

@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, H=st.integers(1, 5), N=st.integers(1, 9), low=st.floats(0, 1), width=st.floats(0, 2))
def test_importance_is_the_root_mean_square_of_heads_that_pass(seed, H, N, low, width):
    scores = graph(2, H, N, seed=seed)[:, :, 0]
    S = aggregate_importance(scores, low, low + width)
    for row, heads in zip(S, scores):
        variances = [((N * h - (N * h).mean()) ** 2).mean().item() for h in heads]
        passing = [h for h, v in zip(heads, variances) if low <= v <= low + width] or list(heads)
        torch.testing.assert_close(row, (sum(h ** 2 for h in passing) / len(passing)).sqrt())
    assert (aggregate_importance(scores) >= scores.mean(dim=1) - 1e-12).all()


# both stages

def similarity_loop(keys, importance, r):
    """The S-stage of one image, patch by patch."""
    order = sorted(range(len(importance)), key=lambda j: (-importance[j].item(), j))
    half = math.ceil(len(order) / 2)
    cosine = {b: max(torch.cosine_similarity(keys[a], keys[b], dim=0).item() for a in order[:half]) for b in order[half:]}
    gone = sorted(cosine, key=lambda b: -cosine[b])[:r]
    return [j for j in range(len(importance)) if j not in gone]


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, M=st.integers(1, 14), share=st.floats(0, 1))
def test_similarity_agrees_with_a_loop(seed, M, share):
    keys, importance, r = normal(2, M, 5, seed=seed), normal(2, M, seed=seed + 1), int(share * (M // 2))
    kept = similarity_prune(keys, importance, r)
    assert kept.dtype == torch.long
    assert kept.tolist() == [similarity_loop(k, i, r) for k, i in zip(keys, importance)]
    upper = importance_prune(importance, (M + 1) // 2)
    assert all(set(u) <= set(k) for u, k in zip(upper.tolist(), kept.tolist())), "the upper half stays"


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, M=st.integers(2, 12))
def test_of_duplicates_the_lesser_goes_first(seed, M):
    keys, importance = normal(1, M, 6, seed=seed), torch.arange(M, 0, -1.0)[None]
    order = torch.randperm(M, generator=torch.Generator().manual_seed(seed))
    better, worse = 0, M - 1
    keys[0, worse] = 3 * keys[0, better]  # the same direction
    kept = similarity_prune(keys[:, order], importance[:, order], 1)
    assert sorted(order[kept[0]].tolist()) == [j for j in range(M) if j != worse]


def test_ties_keep_the_lower_position():
    assert importance_prune(torch.ones(2, 6), 4).tolist() == [[0, 1, 2, 3]] * 2
    assert similarity_prune(torch.ones(1, 6, 3), torch.ones(1, 6), 2).tolist() == [[0, 1, 2, 3]]
    assert importance_prune(torch.tensor([[0.1, 0.5, 0.3, 0.5, 0.3]]), 3).tolist() == [[1, 2, 3]]


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, M=st.integers(1, 20), share=st.floats(0, 1))
def test_the_most_important_stay_in_order(seed, M, share):
    importance, keep = normal(2, M, seed=seed), max(1, round(share * M))
    kept = importance_prune(importance, keep)
    assert (kept.diff(dim=1) > 0).all() and kept.shape == (2, keep)
    assert torch.equal(importance.gather(1, kept).sort(dim=1).values, importance.topk(keep, dim=1).values.flip(1))


def test_nothing_to_remove_is_the_identity():
    assert similarity_prune(normal(2, 7, 3), normal(2, 7), 0).tolist() == importance_prune(normal(2, 7), 7).tolist() == [list(range(7))] * 2


# the plug-in

ARCHITECTURES = SHARED | {"no class token": ("vit_tiny_patch16_224", dict(img_size=64, class_token=False, global_pool="avg"))}


def vit(kind="vit", **changes):
    return build(ARCHITECTURES[kind], noise=0.1, **{"depth": 4, **changes})


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_on_architectures(kind):
    model = vit(kind)
    x, M, P = images(model), model.patch_embed.num_patches, model.num_prefix_tokens
    reduced = reduce_model(model, ZeroTPrune({0: 0.8, 2: 0.5}, num_similar=2))
    with torch.no_grad():
        before = model(x)
        torch.testing.assert_close(reduce_model(model, ZeroTPrune({0: 1.0, 2: 1.0}))(x), before, atol=1e-5, rtol=1e-5)
        logits, tokens, dense = reduced(x), reduced.forward_features(x), reduced.forward_dense(x)
        torch.testing.assert_close(reduced(x[1:]), logits[1:], atol=1e-4, rtol=1e-4)
        assert torch.equal(model(x), before), "the model given is not changed"
    first = math.ceil(0.8 * M)
    assert reduced.counts == [P + first, P + first, *[P + math.ceil(0.5 * first)] * 2]
    assert logits.isfinite().all() and dense.shape[2] * dense.shape[3] == M
    for row in tokens.index:
        assert row[row >= 0].tolist() == list(range(tokens.x.shape[1])), "survivors keep their order"
        assert row[:P].tolist() == list(range(P)), "tokens in front stay"


def expected(attn, keys, layer, depth, rate, num_similar, P, has_class, num_iters=None, **bounds):
    """Positions that stay, of one image: the card's three steps on explicitly smaller matrices."""
    N, T = attn.shape[-1], num_iters or (30 if layer < 3 else 1 if layer >= depth - 3 else 5)
    front, patches = [0] if has_class else [], list(range(P, N))

    def score(patches):
        nodes = front + patches
        small = attn[:, nodes][..., nodes]
        scores = weighted_page_rank((small / small.sum(-1, keepdim=True))[None], T)
        return aggregate_importance(scores, **bounds)[:, len(front):]

    keep = math.ceil(rate * len(patches))
    r = min(num_similar, len(patches) - keep, len(patches) // 2)
    flat = keys.transpose(0, 1).flatten(1)[patches][None]
    patches = [patches[j] for j in similarity_prune(flat, score(patches), r)[0].tolist()]
    return [patches[j] for j in importance_prune(score(patches), keep)[0].tolist()]


@pytest.mark.parametrize("kind", ["vit", "deit distilled", "registers", "no class token"])
@pytest.mark.parametrize("arguments", [dict(), dict(num_similar=0), dict(num_similar=2, num_iters=3, var_min=0.01, var_max=0.7)])
def test_plug_in_follows_the_functional_core(kind, arguments):
    class Spy(ZeroTPrune):
        def after_block(self, layer, tokens, maps):
            out = super().after_block(layer, tokens, maps)
            if layer in self.keep_rates:
                rest = {"num_similar": 10, **arguments}
                for attn, k, x, new in zip(maps.attn, maps.k, tokens.x, out.x):
                    stay = expected(attn, k, layer, 8, self.keep_rates[layer], rest["num_similar"], tokens.num_prefix, tokens.has_class,
                                    **{key: v for key, v in rest.items() if key != "num_similar"})
                    torch.testing.assert_close(new, torch.cat([x[:tokens.num_prefix], x[stay]]))
                seen.append(layer)
            return out

    seen, model = [], vit(kind, depth=8).double()
    with torch.no_grad():
        reduce_model(model, Spy({1: 0.8, 4: 0.7, 6: 0.55}, **arguments))(images(model).double())
    assert seen == [1, 4, 6]


def test_votes_of_each_block():
    rule = reduce_model(vit(depth=12, img_size=32), ZeroTPrune({})).reducer
    assert [rule.steps(layer) for layer in range(12)] == [30] * 3 + [5] * 6 + [1] * 3
    assert ZeroTPrune({}, num_iters=7).steps(2) == 7


def test_maps_are_built_in_pruning_blocks_only():
    model = vit(img_size=(112, 80))  # 36 tokens; nothing else of four dimensions is square
    sizes = []
    for rates in ({}, {1: 1.0}, {1: 0.5}):
        with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION), Watch() as watch:
            reduce_model(model, ZeroTPrune(rates))(images(model))
        sizes.append(watch.largest)
    assert sizes[0] < 20 and sizes[1] < 20 and sizes[2] == 36


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    model = vit()
    with torch.no_grad():
        exact = reduce_model(model, ZeroTPrune({1: 0.9}))(images(model))
        low = reduce_model(vit().to(dtype), ZeroTPrune({1: 0.9}))(images(model).to(dtype))
    assert low.dtype == dtype and torch.nn.functional.cosine_similarity(low.float(), exact).min() > (0.9 if dtype == torch.bfloat16 else 0.9999)


def test_training_reaches_every_weight():
    model = vit()
    reduce_model(model, ZeroTPrune({0: 0.7, 2: 0.6}, num_similar=2)).train()(images(model)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_export_and_compile():
    model = vit(depth=2)
    reduced, x = reduce_model(model, ZeroTPrune({0: 0.6}, num_similar=3, num_iters=2)), images(model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = reduced(x)
        program = torch.export.export(reduced, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
        torch.testing.assert_close(program.module()(x[:1]), want[:1], atol=1e-4, rtol=1e-4)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(reduced, backend="eager", fullgraph=True)(x), want, atol=1e-4, rtol=1e-4)


def test_strength():
    strengths = (0.0, 0.25, 0.5, 0.75, 1.0)
    for depth, layers in ((1, [0]), (4, [1, 2]), (6, [1, 3, 4]), (12, [1, 3, 6, 9])):
        model = vit(depth=depth, embed_dim=96, img_size=160)
        arms = [ZeroTPrune.at_strength(s, model, (10, 10)) for s in strengths]
        assert list(arms[2].keep_rates) == layers and arms[2].num_similar == 5 and ZeroTPrune.training_free
        if depth in (4, 12):
            costs = [flops(reduce_model(model, arm), images(model, 1)) for arm in arms]
            assert costs[0] == flops(reduce_model(model, Reducer()), images(model, 1))
            assert costs == sorted(costs, reverse=True) and costs[-1] < 0.75 * costs[0]


# refusals

A, K, S = graph(1, 2, 6, dtype=torch.float32), normal(1, 6, 3), normal(1, 6)


@pytest.mark.parametrize("call, message", [
    (lambda: weighted_page_rank(A[0]), r"attn must be \(B, H, N, N\)"),
    (lambda: weighted_page_rank(A[..., :5]), r"attn must be \(B, H, N, N\)"),
    (lambda: weighted_page_rank(A * 1.002), "attn must have rows that sum to 1"),
    (lambda: weighted_page_rank(normal(1, 1, 4, 4)), "attn must have rows that sum to 1"),
    (lambda: weighted_page_rank(torch.full((1, 1, 2, 2), math.nan)), "attn must have rows that sum to 1"),
    (lambda: weighted_page_rank(torch.tensor([[[[2.0, -1.0], [0.5, 0.5]]]])), "attn must not be negative"),
    (lambda: weighted_page_rank(A, 0), "num_iters must be at least 1, got 0"),
    (lambda: weighted_page_rank(A, tol=-0.1), "tol must not be negative, got -0.1"),
    (lambda: weighted_page_rank(A, tol=math.nan), "tol must not be negative"),
    (lambda: weighted_page_rank(A, mask=torch.ones(1, 5, dtype=torch.bool)), r"mask must be \(1, 6\) bool"),
    (lambda: weighted_page_rank(A, mask=torch.ones(1, 6)), "mask must be .* bool, got"),
    (lambda: weighted_page_rank(A, mask=torch.zeros(1, 6, dtype=torch.bool)), "mask must leave at least one node"),
    (lambda: aggregate_importance(S), r"scores must be \(B, H, N\)"),
    (lambda: aggregate_importance(A[:, :, 0], 0.7, 0.01), "var_min must not be above var_max, got 0.7 and 0.01"),
    (lambda: similarity_prune(K, S, 4), r"r must be in 0..3 for 6 patches, got 4"),
    (lambda: similarity_prune(K, S, -1), "r must be in 0..3"),
    (lambda: similarity_prune(K, S[:, :5], 1), "keys must be .* and importance"),
    (lambda: similarity_prune(K / 0, S, 1), "keys must be finite"),
    (lambda: similarity_prune(K, S * math.nan, 1), "importance must be finite"),
    (lambda: importance_prune(S, 0), "keep must be in 1..6, got 0"),
    (lambda: importance_prune(S, 7), "keep must be in 1..6, got 7"),
    (lambda: importance_prune(S[0], 1), r"importance must be \(B, M\)"),
    (lambda: importance_prune(S * math.inf, 1), "importance must be finite"),
    (lambda: ZeroTPrune({1: 0.0}), r"keep_rates must be in \(0, 1\]"),
    (lambda: ZeroTPrune({1: 0.5, 2: 1.1}), r"keep_rates must be in \(0, 1\], got \{2: 1.1\}"),
    (lambda: ZeroTPrune({1: math.nan}), r"keep_rates must be in \(0, 1\]"),
    (lambda: ZeroTPrune([0.5]), "keep_rates must map blocks to rates"),
    (lambda: ZeroTPrune({}, num_similar=-1), "num_similar must not be negative"),
    (lambda: ZeroTPrune({}, num_iters=0), "num_iters must be at least 1"),
    (lambda: ZeroTPrune({}, var_min=1.0, var_max=0.5), "var_min must not be above var_max"),
    (lambda: reduce_model(vit(), ZeroTPrune({4: 0.5}))(images(vit())), r"keep_rates must name blocks in 0..3 for this model, got \[4\]"),
])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
