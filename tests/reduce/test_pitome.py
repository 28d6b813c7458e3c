"""PiToMe: energy, both forms of the matching, the spectral distance, the plug-in on real architectures, and every refusal."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenkit.core.measure import flops
from tokenkit.reduce.engine import Reducer, Tokens, reduce_model
from tokenkit.reduce.matching import Assignment, bipartite_soft_matching
from tokenkit.reduce.pitome import PiToMe, energy_score, pairs_per_block, pairs_to_merge, pitome_matching, spectral_distance
from vits import ARCHITECTURES, Watch, assert_exports_and_compiles, images, normal, vit

CASES = dict(B=st.integers(1, 3), M=st.integers(1, 24), P=st.integers(0, 3), ratio=st.floats(0.5, 1.0), margin=st.floats(-1, 1),
             alpha=st.floats(0.1, 3.0), bsm=st.booleans(), seed=st.integers(0, 2**16))


def energy_by_loop(tokens, margin, alpha):
    """Energies of one image's patches, entry by entry."""
    unit = [t / t.norm() for t in tokens]
    return [sum(w - margin if w > margin else alpha * (math.exp(w - margin) - 1) for w in (float(u @ v) for v in unit)) / len(unit) for u in unit]


def groups_by_loop(tokens, r, margin, alpha, bsm, prefix):
    """Members of each output slot, in order, for one image: the method as its card tells it."""
    patches, positions = tokens[prefix:], range(len(tokens) - prefix)
    if r == 0:
        return [[i] for i in range(len(tokens))]
    energy, unit = energy_by_loop(patches, margin, alpha), patches / patches.norm(dim=1, keepdim=True)
    order = sorted(positions, key=lambda i: -energy[i])
    pool, protected = (order, []) if bsm else (order[:2 * r], order[2 * r:])
    a, b = pool[::2], pool[1::2]
    partner = {i: max(b, key=lambda j: float(unit[i] @ unit[j])) for i in a}
    ranked = sorted(a, key=lambda i: -float(unit[i] @ unit[partner[i]]))
    slots = [[i] for i in protected + ranked[r:]] + [[j] + [i for i in ranked[:r] if partner[i] == j] for j in b]
    return [[i] for i in range(prefix)] + [[i + prefix for i in slot] for slot in slots]


# energy

@settings(max_examples=15, deadline=None)
@given(M=st.integers(1, 12), margin=CASES["margin"], alpha=CASES["alpha"], seed=CASES["seed"])
def test_energy_against_a_loop(M, margin, alpha, seed):
    metric = normal(2, M, 5, seed=seed)
    want = torch.tensor([energy_by_loop(tokens, margin, alpha) for tokens in metric], dtype=torch.float64)
    torch.testing.assert_close(energy_score(metric, margin, alpha), want)
    torch.testing.assert_close(energy_score(7 * metric, margin, alpha), want)  # only directions count


def test_energy_grows_with_the_group():
    centre = torch.eye(3, dtype=torch.float64)
    metric = centre[[0, 0, 0, 0, 1, 1, 2]][None] + 0.01 * normal(1, 7, 3)
    energy = energy_score(metric, 0.75)[0]
    assert energy[:4].min() > energy[4:6].max() > energy[6]
    assert energy_score(metric, 0.75, alpha=2.0)[0, 6] < energy[6], "alpha is what dissimilar tokens take away"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_energy_has_gradients_and_precision(dtype):
    metric = normal(2, 9, 4).to(dtype).requires_grad_()
    energy = energy_score(metric, 0.5)
    assert energy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    energy.sum().backward()
    assert metric.grad.isfinite().all() and (metric.grad != 0).any()


# matching

@settings(max_examples=60, deadline=None)
@given(**CASES)
def test_matching_against_a_loop(B, M, P, ratio, margin, alpha, bsm, seed):
    metric = normal(B, P + M, 5, seed=seed)
    a = pitome_matching(metric, ratio, margin, alpha, bsm, P)
    r = math.floor(M - M * ratio)
    assert a.num_out == P + M - r and a.src.shape == a.dst.shape == (B, r)
    for row in range(B):
        want = groups_by_loop(metric[row], r, margin, alpha, bsm, P)
        assert [sorted((a.index[row] == slot).nonzero().flatten().tolist()) for slot in range(a.num_out)] == [sorted(g) for g in want]
        assert torch.equal(a.index[row, a.src[row]], a.index[row, a.dst[row]])
    unit = torch.nn.functional.normalize(metric, dim=2)
    pairs = [(unit[row, a.src[row]] * unit[row, a.dst[row]]).sum(1) for row in range(B)]
    assert all((p.diff() <= 1e-9).all() for p in pairs), "most similar pair first"


@settings(max_examples=30, deadline=None)
@given(**{k: v for k, v in CASES.items() if k not in ("B", "bsm")})
def test_protected_tokens_have_the_lowest_energy_and_leave_as_they_came(M, P, ratio, margin, alpha, seed):
    metric = normal(1, P + M, 5, seed=seed, dtype=torch.float32)
    a = pitome_matching(metric, ratio, margin, alpha, num_prefix=P)
    r = pairs_to_merge(M, ratio)
    energy, x = energy_score(metric[:, P:], margin, alpha)[0], normal(1, P + M, 3, seed=seed + 1, dtype=torch.float32)
    protected = (a.index[0, P:] < P + M - 2 * r) if r else torch.ones(M, dtype=torch.bool)
    assert protected.sum() == M - 2 * r
    if 0 < 2 * r < M:
        assert energy[~protected].min() >= energy[protected].max()
    y = a.merge(x, torch.ones(1, P + M, 1))[0]
    alone = torch.cat([torch.ones(P, dtype=torch.bool), protected])
    assert torch.equal(y[a.index[0, alone]], x[0, alone])
    size = a.merge(torch.ones(1, P + M, 1), mode="sum")
    assert size.sum() == P + M and torch.equal(a.index[0, :P], torch.arange(P))


@settings(max_examples=30, deadline=None)
@given(M=st.integers(2, 24), ratio=CASES["ratio"], bsm=st.booleans(), seed=CASES["seed"])
def test_permuting_patches_gives_the_same_set(M, ratio, bsm, seed):
    x, order = normal(1, 1 + M, 6, seed=seed), torch.randperm(M, generator=torch.Generator().manual_seed(seed))
    moved = torch.cat([x[:, :1], x[:, 1:][:, order]], dim=1)
    y, z = (pitome_matching(t, ratio, bsm=bsm).merge(t)[0] for t in (x, moved))
    if pairs_to_merge(M, ratio, bsm):
        torch.testing.assert_close(y, z)  # the slots are sorted by content, so even their order is the same
    else:
        torch.testing.assert_close(z[1:], y[1:][order])


def test_tome_depends_on_the_order_where_pitome_does_not():
    x, shift = normal(1, 40, 6), torch.arange(40).roll(1)
    same = {name: torch.allclose(*(m(t).merge(t)[0].sort(dim=0).values for t in (x, x[:, shift])))
            for name, m in (("pitome", lambda t: pitome_matching(t, 0.75, num_prefix=0)), ("tome", lambda t: bipartite_soft_matching(t, 10, 0)))}
    assert same == {"pitome": True, "tome": False}


@pytest.mark.parametrize("ratio, tokens", [(1.0, 20), (0.95, 20), (0.6, 3), (0.5, 2)])
@pytest.mark.parametrize("bsm", [False, True])
def test_nothing_to_merge_is_the_identity(ratio, tokens, bsm):
    a = pitome_matching(normal(2, tokens, 4), ratio, bsm=bsm)
    assert torch.equal(a.index, torch.arange(tokens).expand(2, -1)) and a.num_out == tokens and a.src.shape == (2, 0)


def test_how_many():
    assert pairs_to_merge(196, 0.95) == math.floor(196 - 196 * 0.95) == 9
    assert pairs_to_merge(3, 1 / 3, bsm=True) == 2 and pairs_to_merge(0, 0.5) == 0
    assert pairs_per_block(80, 0.8, 3) == [16, 12, 10] and pairs_per_block(10, 1.0, 2) == [0, 0]
    assert pitome_matching(normal(1, 4, 4), 1 / 3, bsm=True).num_out == 2


def test_ties_are_stable():
    a = pitome_matching(torch.ones(1, 9, 4), 0.75)
    assert a.src[0].tolist() == [1, 3] and a.dst[0].tolist() == [2, 2] and a.index[0].tolist() == [0, 5, 5, 5, 6, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_indices_have_no_gradient_and_values_have_one(dtype):
    x = normal(2, 12, 4).to(dtype).requires_grad_()
    a = pitome_matching(x, 0.7)
    y = a.merge(x, torch.ones(2, 12, 1))
    y.float().square().sum().backward()
    assert y.dtype == dtype and not a.index.requires_grad and x.grad.isfinite().all() and (x.grad != 0).any()


# spectral distance

def distance_by_loop(tokens, index, num_out):
    unit = tokens / tokens.norm(dim=1, keepdim=True)
    W = torch.exp(unit @ unit.T - 1)
    groups = [(index == g).nonzero().flatten() for g in range(num_out)]
    lifted = W.clone()
    for g in groups:
        for h in groups:
            lifted[g[:, None], h] = W[g[:, None], h].mean()
    values = []
    for graph in (W, lifted):
        root = torch.diag(graph.sum(1) ** -0.5)
        values.append(torch.linalg.eigvalsh(torch.eye(len(graph), dtype=graph.dtype) - root @ graph @ root))
    return (values[0] - values[1]).abs().mean()


@settings(max_examples=20, deadline=None)
@given(M=st.integers(2, 14), ratio=CASES["ratio"], bsm=st.booleans(), seed=CASES["seed"])
def test_distance_against_a_loop(M, ratio, bsm, seed):
    metric = normal(2, M, 5, seed=seed)
    a = pitome_matching(metric, ratio, bsm=bsm, num_prefix=0)
    want = torch.stack([distance_by_loop(metric[row], a.index[row], a.num_out) for row in range(2)])
    torch.testing.assert_close(spectral_distance(metric, a), want, atol=1e-12, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distance_is_zero_for_the_identity_and_for_duplicates(dtype):
    metric = normal(2, 8, 4).to(dtype)
    same = Assignment(torch.arange(8).expand(2, -1), 8)
    assert (spectral_distance(metric, same) < 1e-12).all()
    twins = Assignment((torch.arange(8) // 2).expand(2, -1), 4)
    assert (spectral_distance(metric[:, ::2].repeat_interleave(2, dim=1), twins) < 1e-12).all()
    assert (spectral_distance(metric, twins) > 1e-4).all() and spectral_distance(metric, twins).dtype == dtype
    assert spectral_distance(metric.bfloat16(), twins).dtype == torch.float32


def test_stripes_defeat_tome():
    """Two clusters on even and odd positions: the claim of the paper's theory, at its plainest."""
    vectors = torch.eye(2, 16, dtype=torch.float64)[torch.arange(40) % 2][None] + 0.05 * normal(1, 40, 16)
    ours, tome = pitome_matching(vectors, 0.7, num_prefix=0), bipartite_soft_matching(vectors, 12, 0)
    assert ((ours.src - ours.dst) % 2 == 0).all() and ((tome.src - tome.dst) % 2 == 1).all()
    assert spectral_distance(vectors, ours) < 0.5 * spectral_distance(vectors, tome)


# refusals

GOOD = normal(1, 11, 4, dtype=torch.float32)


def spoiled(value):
    metric = GOOD.clone()
    metric[0, 3] = value
    return metric


@pytest.mark.parametrize("metric, words", [(GOOD[0], "metric must be"), (spoiled(math.nan), "finite"), (spoiled(math.inf), "finite"), (spoiled(0.0), "zero row")])
def test_bad_metric(metric, words):
    same = Assignment(torch.arange(11)[None], 11)
    for call in (lambda: energy_score(metric, 0.5), lambda: pitome_matching(metric, 0.8), lambda: spectral_distance(metric, same)):
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.1, math.nan])
def test_bad_ratio(ratio):
    for call in (lambda: pitome_matching(GOOD, ratio), lambda: PiToMe(ratio), lambda: pairs_to_merge(10, ratio)):
        with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\]"):
            call()


def test_too_many_pairs():
    for bsm, most in ((False, 5), (True, 5)):
        with pytest.raises(ValueError, match=f"merges 6 of 10 patches, of which at most {most} can"):
            pitome_matching(GOOD, 0.4, bsm=bsm)
    with pytest.raises(ValueError, match="merges 2 of 3 patches"):
        pitome_matching(GOOD[:, :4], 0.3)
    with pytest.raises(ValueError, match="merges 1 of 1 patches"):
        pairs_to_merge(1, 1e-20, bsm=True)
    model = vit()
    with pytest.raises(ValueError, match="merges 9 of 16 patches"):
        reduce_model(model, PiToMe(0.4))(images(model))


@pytest.mark.parametrize("changes, words", [(dict(margin=1.1), "margin must be in"), (dict(margin=-1.1), "margin must be in"), (dict(margin=math.nan), "margin must be in"),
                                            (dict(alpha=0.0), "alpha must be positive"), (dict(alpha=-1.0), "alpha must be positive"), (dict(alpha=math.nan), "alpha must be")])
def test_bad_energy(changes, words):
    for call in (lambda: energy_score(GOOD, **{"margin": 0.5, **changes}), lambda: pitome_matching(GOOD, 0.8, **changes), lambda: PiToMe(**changes)):
        with pytest.raises(ValueError, match=words):
            call()


def test_other_refusals():
    with pytest.raises(ValueError, match="bsm_blocks must be"):
        PiToMe(bsm_blocks="half")
    for prefix in (-1, 12):
        with pytest.raises(ValueError, match="num_prefix must be in 0..11"):
            pitome_matching(GOOD, 0.8, num_prefix=prefix)
    with pytest.raises(ValueError, match="must not drop tokens"):
        spectral_distance(GOOD, Assignment.keep(torch.tensor([[0, 1]]), 11))
    with pytest.raises(ValueError, match="assignment must be of"):
        spectral_distance(GOOD, Assignment(torch.arange(5)[None], 5))


# the plug-in

@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_on_architectures(kind):
    model = vit(kind)
    x, patches, prefix = images(model), model.patch_embed.num_patches, model.num_prefix_tokens
    reduced = reduce_model(model, PiToMe(0.75, prop_attn=True))
    with torch.no_grad():
        torch.testing.assert_close(reduce_model(model, PiToMe(1.0))(x), model(x), atol=1e-5, rtol=1e-5)
        logits, tokens, dense = reduced(x), reduced.forward_features(x), reduced.forward_dense(x)
        assert torch.allclose(reduced(x[1:]), logits[1:], atol=1e-4), "batch rows are independent"
    merged = pairs_per_block(patches, 0.75, 3)
    assert reduced.counts == [prefix + patches - sum(merged[:i + 1]) for i in range(3)]
    assert logits.shape == (2, 7) and logits.isfinite().all() and dense.shape[2] * dense.shape[3] == patches
    counted = torch.stack([torch.bincount(row, minlength=tokens.x.shape[1]) for row in tokens.index]).float()
    assert torch.equal(counted, tokens.size[..., 0])


@pytest.mark.parametrize("blocks, want", [("first", [True, True, True, False, False]), ("last", [False, False, False, True, True]), ("none", [False] * 5), ("all", [True] * 5)])
def test_blocks_follow_the_functional_core(blocks, want):
    """The plug-in is the matching, with this block's keys, form and margin, and a mean weighted by size."""
    class Spy(PiToMe):
        def after_attention(self, layer, tokens, maps):
            out = super().after_attention(layer, tokens, maps)
            a = pitome_matching(maps.k.mean(dim=1), self.ratio, self.margin * (1 - layer / 5), self.alpha, want[layer], tokens.num_prefix)
            torch.testing.assert_close(out.x, a.merge(tokens.x, tokens.size))
            torch.testing.assert_close(out.size, a.merge(tokens.size, mode="sum"))
            seen.append(layer)
            return out

    seen, model = [], vit(depth=5)
    spy = Spy(0.8, margin=0.9, alpha=1.5, bsm_blocks=blocks)
    reduce_model(model, spy)(images(model))
    assert seen == list(range(5)) and [spy.is_bsm(layer) for layer in range(5)] == want


def test_sizes_weigh_the_mean():
    class Uneven(PiToMe):
        def start(self, tokens):
            return Tokens(tokens.x, tokens.size * torch.arange(1, 18).view(1, 17, 1), tokens.index, None, tokens.num_prefix, tokens.grid)

    model = vit()
    with torch.no_grad():
        assert not torch.allclose(reduce_model(model, Uneven(0.7))(images(model)), reduce_model(model, PiToMe(0.7))(images(model)), atol=1e-3)
        assert reduce_model(model, Uneven(0.7)).forward_features(images(model)).size.sum() == 2 * 153


def test_proportional_attention_is_off_by_default():
    model = vit()
    plain, weighted = (reduce_model(model, PiToMe(0.6, prop_attn=p)) for p in (False, True))
    assert not PiToMe().proportional and PiToMe().ratio == 0.95 and PiToMe().margin == 0.75
    with torch.no_grad():
        assert not torch.allclose(plain(images(model)), weighted(images(model)), atol=1e-3)


def test_no_attention_map_is_built():
    model = vit(img_size=(112, 80))  # 36 tokens; nothing else of four dimensions is square
    with torch.no_grad(), Watch() as watch:
        reduce_model(model, PiToMe(0.8))(images(model))
    assert watch.largest < 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    model = vit()
    with torch.no_grad():
        exact, low = reduce_model(model, PiToMe(0.8))(images(model)), reduce_model(vit().to(dtype), PiToMe(0.8))(images(model).to(dtype))
    assert low.dtype == dtype and torch.nn.functional.cosine_similarity(low.float(), exact).min() > (0.9 if dtype == torch.bfloat16 else 0.9999)


def test_training_reaches_every_weight():
    model = vit()
    reduce_model(model, PiToMe(0.8)).train()(images(model)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_export_and_compile():
    model = vit(depth=2)
    reduced, x = reduce_model(model, PiToMe(0.8)), images(model)
    assert_exports_and_compiles(reduced, x)


def test_strength():
    for depth in (3, 12):
        model = vit(depth=depth, img_size=160)
        costs = [flops(reduce_model(model, PiToMe.at_strength(s, model, (10, 10))), images(model)) for s in (0.0, 0.25, 0.5, 0.75, 1.0)]
        assert costs == sorted(costs, reverse=True) and costs[-1] < 0.6 * costs[0] and costs[0] == flops(reduce_model(model, Reducer()), images(model))
    assert PiToMe.training_free and PiToMe.at_strength(0.5, model, (10, 10)).proportional
