"""MCTF: the three criteria, matching both ways, fused values and attention, the consistency loss, the plug-in on real architectures, and every refusal."""
import math

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenkit.core.measure import flops
from tokenkit.reduce.engine import Reducer, reduce_model
from tokenkit.reduce.matching import Assignment, bipartite_soft_matching
from tokenkit.reduce.mctf import MCTF, TwoPasses, bidirectional_matching, consistency_loss, fuse, fusion_weights, one_step_ahead_attention
from vits import ARCHITECTURES, assert_exports_and_compiles, images, normal, vit

SEED, PREFIX = st.integers(0, 2**16), st.integers(0, 3)


def state(B, N, seed=0, C=5, H=2, dtype=torch.float64):
    """Tokens, attention and sizes."""
    x, attn = normal(B, N, C, seed=seed, dtype=dtype), (2 * normal(B, H, N, N, seed=seed + 1, dtype=dtype)).softmax(dim=3)
    size = torch.randint(1, 9, (B, N, 1), generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x, attn, size


def most(N, P):
    return max(N - P, 0) // 2


# the criteria

def weights_by_loop(x, attn, size, taus):
    """One image, entry by entry, as the paper writes it."""
    N = len(x)
    received = [sum(float(attn[h, q, n]) for h in range(len(attn)) for q in range(N)) / len(attn) / N for n in range(N)]
    u, p = [1 / a for a in received], [1 / float(s) for s in size.flatten()]
    u, p = [v / max(u) for v in u], [v / max(p) for v in p]
    tau_sim, tau_info, tau_size = taus

    def weight(i, j):
        cosine = float(x[i] @ x[j] / x[i].norm() / x[j].norm())
        w = ((cosine + 1) / 2) ** (1 / tau_sim) if tau_sim else 1.0
        w *= (u[i] * u[j]) ** (1 / tau_info) if tau_info else 1.0
        return w * ((p[i] * p[j]) ** (1 / tau_size) if tau_size else 1.0)

    return [[weight(i, j) for j in range(1, N, 2)] for i in range(0, N, 2)]


@settings(max_examples=20, deadline=None)
@given(N=st.integers(2, 9), taus=st.tuples(*[st.sampled_from([0, 0.5, 1, 20, 40])] * 3), seed=SEED)
def test_weights_against_a_loop(N, taus, seed):
    x, attn, size = state(2, N, seed)
    want = torch.tensor([weights_by_loop(*image, taus) for image in zip(x, attn, size)], dtype=torch.float64)
    torch.testing.assert_close(fusion_weights(x, attn, size, *taus), want)
    torch.testing.assert_close(fusion_weights(3 * x, attn, 7 * size, *taus), want)  # only directions and relative sizes count
    assert fusion_weights(x, attn, size, *taus).shape == (2, math.ceil(N / 2), N // 2)


def test_a_missing_input_switches_its_criterion_off():
    x, attn, size = state(2, 7)
    torch.testing.assert_close(fusion_weights(x), fusion_weights(x, attn, size, tau_info=0, tau_size=0))
    torch.testing.assert_close(fusion_weights(x, attn), fusion_weights(x, attn, size, tau_size=0))
    torch.testing.assert_close(fusion_weights(x, size=size), fusion_weights(x, attn, size, tau_info=0))


def test_larger_and_more_attended_tokens_get_smaller_weights():
    x = torch.ones(1, 6, 4, dtype=torch.float64)
    size = torch.tensor([1.0, 2, 1, 4, 1, 8], dtype=torch.float64).view(1, 6, 1)
    assert (fusion_weights(x, size=size)[0].diff(dim=1) < 0).all()
    attn = torch.tensor([0.1, 0.1, 0.1, 0.2, 0.1, 0.4], dtype=torch.float64).expand(1, 2, 6, 6)
    assert (fusion_weights(x, attn)[0].diff(dim=1) < 0).all()
    assert torch.equal(fusion_weights(x), torch.ones(1, 3, 3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_token_that_nobody_attends_to(dtype):
    x, attn, size = state(1, 6, dtype=torch.float32)
    attn[..., 3] = 0
    attn = (attn / attn.sum(dim=3, keepdim=True)).to(dtype)
    weights = fusion_weights(x.to(dtype), attn, size.to(dtype))
    assert weights.dtype == torch.float32 and weights.isfinite().all() and (weights > 0).all()
    a = bidirectional_matching(weights, 2)
    value, fused = fuse(x.to(dtype), a, attn, size.to(dtype))[0], one_step_ahead_attention(attn, a, size.to(dtype))
    assert value.dtype == dtype and value.isfinite().all() and fused.isfinite().all()
    alone = Assignment(torch.arange(6)[None], 6)
    torch.testing.assert_close(fuse(x, alone, attn, size)[0], x)  # its weight is tiny, but it is all there is


# matching

def groups_by_loop(weights, r, P, both):
    """Members of each slot in order, and the pairs, for one image: the method as its card tells it."""
    N = len(weights) + len(weights[0])
    w = {(i, j): float(weights[i // 2][j // 2]) for i in range(0, N, 2) for j in range(1, N, 2)}
    even, odd = [i for i in range(0, N, 2) if i >= P], [j for j in range(1, N, 2) if j >= P]
    r1 = r // 2 if both else r
    partner = {i: max(odd, key=lambda j: w[i, j]) for i in even} if odd else {}
    first = sorted(even, key=lambda i: -w[i, partner[i]])[:r1] if r1 else []
    members = {n: [n] for n in range(N)}
    pairs = [(i, partner[i]) for i in first]
    for i in first:
        members[partner[i]] += members.pop(i)
    even = [i for i in even if i not in first]
    if both and r:
        partner = {j: max(even, key=lambda i: w[i, j]) for j in odd}
        order = sorted(odd, key=lambda j: -w[partner[j], j])
        pairs += [(j, partner[j]) for j in order[:r - r1]]
        for j in order[:r - r1]:
            members[partner[j]] += members.pop(j)
        odd = order[r - r1:]
    slots = [*range(P), *even, *odd] if r else range(N)
    return [sorted(members[n]) for n in slots], pairs


@settings(max_examples=60, deadline=None)
@given(N=st.integers(2, 20), P=PREFIX, share=st.floats(0, 1), both=st.booleans(), seed=SEED)
def test_matching_against_a_loop(N, P, share, both, seed):
    P = min(P, N)
    weights, r = normal(2, math.ceil(N / 2), N // 2, seed=seed), round(share * most(N, P))
    a = bidirectional_matching(weights, r, P, both)
    assert a.num_out == N - r and a.src.shape == a.dst.shape == (2, r)
    for row in range(2):
        groups, pairs = groups_by_loop(weights[row], r, P, both)
        assert [(a.index[row] == slot).nonzero().flatten().tolist() for slot in range(a.num_out)] == groups
        assert list(zip(a.src[row].tolist(), a.dst[row].tolist())) == pairs
    assert torch.equal(a.index[:, :P], torch.arange(P).expand(2, -1)), "prefix stays in front"


@settings(max_examples=25, deadline=None)
@given(N=st.integers(2, 24), P=PREFIX, share=st.floats(0, 1), seed=SEED)
def test_similarity_one_way_is_token_merging(N, P, share, seed):
    P = min(P, N)
    x, r = normal(2, N, 6, seed=seed), round(share * most(N, P))
    ours = bidirectional_matching(fusion_weights(x, tau_info=0, tau_size=0), r, P, bidirectional=False)
    tome = bipartite_soft_matching(x, r, P)
    assert torch.equal(ours.index, tome.index) and torch.equal(ours.src, tome.src) and torch.equal(ours.dst, tome.dst)


def test_an_odd_token_takes_along_what_it_absorbed():
    #                     odd 1  odd 3
    weights = torch.tensor([[[0.0, 0.0],    # class
                             [0.9, 0.1],    # even 2 goes into odd 1 in step one
                             [0.8, 0.2]]])  # odd 1 goes into even 4 in step two
    a = bidirectional_matching(weights, r=2)
    assert a.src.tolist() == [[2, 1]] and a.dst.tolist() == [[1, 4]] and a.index.tolist() == [[0, 1, 1, 2, 1]]


def test_ties_are_stable_and_nothing_to_fuse_is_the_identity():
    flat = torch.ones(1, 5, 4)
    a = bidirectional_matching(flat, 4)
    assert a.src.tolist() == [[2, 4, 1, 3]] and a.dst.tolist() == [[1, 1, 6, 6]]
    for weights, P in ((flat, 1), (flat, 9), (torch.ones(1, 1, 1), 0)):
        same = bidirectional_matching(weights, 0, P)
        assert torch.equal(same.index, torch.arange(same.num_out)[None]) and same.src.shape == (1, 0)


# fused values and attention

@settings(max_examples=20, deadline=None)
@given(N=st.integers(2, 12), P=PREFIX, share=st.floats(0, 1), both=st.booleans(), seed=SEED)
def test_fusing_against_matrices(N, P, share, both, seed):
    P = min(P, N)
    x, attn, size = state(2, N, seed)
    a = bidirectional_matching(fusion_weights(x, attn, size), round(share * most(N, P)), P, both)
    value, sizes = fuse(x, a, attn, size)
    fused = one_step_ahead_attention(attn, a, size)
    assert fused.shape == (2, 2, a.num_out, a.num_out)
    torch.testing.assert_close(fused.sum(dim=3), torch.ones(2, 2, a.num_out, dtype=torch.float64))
    torch.testing.assert_close(sizes.sum(dim=1), size.sum(dim=1))
    for row in range(2):
        member = torch.nn.functional.one_hot(a.index[row], a.num_out).double()        # (N, N')
        w = attn[row].mean(dim=(0, 1)) * size[row, :, 0] / size[row].max()
        rows = member * w[:, None] / (member * w[:, None]).sum(dim=0)                 # columns sum to 1
        torch.testing.assert_close(value[row], rows.T @ x[row])
        torch.testing.assert_close(sizes[row], member.T @ size[row])
        torch.testing.assert_close(fused[row], rows.T @ attn[row] @ member)
    torch.testing.assert_close(fuse(torch.ones_like(x), a, attn, size)[0], torch.ones(2, a.num_out, 5, dtype=torch.float64))


def test_weights_of_the_mean_have_no_gradient_and_values_have_one():
    x, attn, size = state(1, 9)
    x.requires_grad_(), attn.requires_grad_()
    weights = fusion_weights(x, attn, size)
    assert not weights.requires_grad
    a = bidirectional_matching(weights, 3)
    value, _ = fuse(x, a, attn, size)
    value.square().sum().backward()
    assert attn.grad is None and (x.grad != 0).all()
    one_step_ahead_attention(attn, a, size).square().sum().backward()
    assert (attn.grad != 0).any() and attn.grad.isfinite().all()


# the consistency loss

@settings(max_examples=20, deadline=None)
@given(B=st.integers(1, 6), threshold=st.floats(0, 0.9), seed=SEED)
def test_consistency_against_a_loop(B, threshold, seed):
    student, teacher, logits = normal(B, 4, seed=seed), normal(B, 4, seed=seed + 1), 3 * normal(B, 3, seed=seed + 2)
    target = torch.randint(0, 3, (B,), generator=torch.Generator().manual_seed(seed))
    picked = [b for b in range(B) if logits[b].softmax(0)[target[b]] > threshold]
    want = sum(((student[b] - teacher[b]) ** 2).mean() for b in picked) / max(len(picked), 1)
    torch.testing.assert_close(consistency_loss(student, teacher, logits, target, threshold), torch.as_tensor(want, dtype=torch.float64))


def test_consistency_moves_only_the_student():
    student, teacher, logits = (normal(3, 4, seed=s).requires_grad_() for s in range(3))
    sure = torch.tensor([[9.0, 0], [9, 0], [0, 9]], dtype=torch.float64, requires_grad=True)
    consistency_loss(student, teacher, sure, torch.tensor([0, 0, 0])).backward()
    assert teacher.grad is None and sure.grad is None
    assert (student.grad[:2] != 0).all() and (student.grad[2] == 0).all(), "only what the student understands"
    none = consistency_loss(student, teacher, sure, torch.tensor([1, 1, 0]))
    assert none.item() == 0 and none.requires_grad
    half = consistency_loss(student.bfloat16(), teacher.bfloat16(), sure.bfloat16(), torch.tensor([0, 0, 0]))
    assert half.dtype == torch.float32 and half.isfinite()


# refusals

X, ATTN, SIZE = state(1, 7, dtype=torch.float32)
W = fusion_weights(X, ATTN, SIZE)
A = bidirectional_matching(W, 2)


def spoiled(tensor, value):
    tensor = tensor.clone()
    tensor.flatten()[3] = value
    return tensor


@pytest.mark.parametrize("changes, words", [
    (dict(x=X[0]), "x must be"), (dict(x=X[:, :1]), "N >= 2"), (dict(x=spoiled(X, math.nan)), "x must be finite"), (dict(x=spoiled(X, math.inf)), "x must be finite"),
    (dict(tau_sim=-1), "tau must not be negative"), (dict(tau_info=-1), "tau must not be negative"), (dict(tau_size=math.nan), "tau must not be negative"),
    (dict(attn=ATTN[:, :, :3]), "attn must be"), (dict(attn=ATTN[0]), "attn must be"), (dict(attn=1.01 * ATTN), "sum to 1"), (dict(attn=spoiled(ATTN, math.nan)), "sum to 1"),
    (dict(size=SIZE[..., 0]), "size must be"), (dict(size=0 * SIZE), "size must be positive"), (dict(size=spoiled(SIZE, -1.0)), "size must be positive")])
def test_bad_weights(changes, words):
    with pytest.raises(ValueError, match=words):
        fusion_weights(**{"x": X, "attn": ATTN, "size": SIZE, **changes})
    if "attn" in changes or "size" in changes:
        given = {"attn": ATTN, "size": SIZE, **changes}
        for call in (lambda: fuse(X, A, **given), lambda: one_step_ahead_attention(given["attn"], A, given["size"])):
            with pytest.raises(ValueError, match=words):
                call()


def test_attention_in_half_precision_is_not_refused():
    for dtype in (torch.float16, torch.bfloat16):
        fusion_weights(X, (8 * normal(1, 3, 7, 7, dtype=torch.float32)).softmax(dim=3).to(dtype))


@pytest.mark.parametrize("weights, r, P, words", [
    (W[0], 1, 1, "weights must be"), (W[:, :2], 1, 1, "weights must be"), (W.new_ones(1, 1, 0), 0, 1, "N >= 2"), (spoiled(W, math.nan), 1, 1, "NaN"),
    (W, -1, 1, r"r must be in 0..3"), (W, 4, 1, r"r must be in 0..3"), (W, 3, 2, r"r must be in 0..2"), (W, 1, -1, "num_prefix must be in 0..7"), (W, 0, 8, "num_prefix must be in 0..7")])
def test_bad_matching(weights, r, P, words):
    with pytest.raises(ValueError, match=words):
        bidirectional_matching(weights, r, P)


def test_other_refusals():
    with pytest.raises(ValueError, match="assignment must be of"):
        fuse(X, Assignment(torch.arange(5)[None], 5), ATTN, SIZE)
    z, logits, y = normal(2, 4), normal(2, 3), torch.tensor([0, 2])
    for threshold in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\)"):
            consistency_loss(z, z, logits, y, threshold)
    for target in (torch.tensor([0, 3]), torch.tensor([-1, 0])):
        with pytest.raises(ValueError, match="target must be in 0..2"):
            consistency_loss(z, z, logits, target)
    for wrong in ((z, z[:1], logits, y), (z[0], z[0], logits, y)):
        with pytest.raises(ValueError, match="student_cls and teacher_cls must both be"):
            consistency_loss(*wrong)
    for wrong in ((z, z, logits[:1], y), (z, z, logits, y[:1]), (z, z, logits[0], y)):
        with pytest.raises(ValueError, match="logits must be"):
            consistency_loss(*wrong)
    for r in (-1, -0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="r must be a whole number"):
            MCTF(r)
    with pytest.raises(ValueError, match="tau must be three"):
        MCTF(tau=(1, 20))
    with pytest.raises(ValueError, match="tau must not be negative"):
        MCTF(tau=(1, 20, -1))
    with pytest.raises(ValueError, match="layers must be in 0..2"):
        reduce_model(vit(), MCTF(2))(images(vit()))


# the plug-in

def mctf(r=3, layers=(0, 1, 2), **changes):
    return MCTF(r, layers, **{"min_tokens": 4, **changes})


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_on_architectures(kind):
    model = vit(kind)
    x, patches, prefix = images(model), model.patch_embed.num_patches, model.num_prefix_tokens
    reduced = reduce_model(model, mctf())
    with torch.no_grad():
        torch.testing.assert_close(reduce_model(model, mctf(0))(x), model(x), atol=1e-5, rtol=1e-5)
        logits, tokens, dense = reduced(x), reduced.forward_features(x), reduced.forward_dense(x)
        assert torch.allclose(reduced(x[1:]), logits[1:], atol=1e-4), "batch rows are independent"
    assert reduced.counts == [prefix + patches - 3 * (i + 1) for i in range(3)]
    assert logits.shape == (2, 7) and logits.isfinite().all() and dense.shape[2] * dense.shape[3] == patches
    counted = torch.stack([torch.bincount(row, minlength=tokens.x.shape[1]) for row in tokens.index]).float()
    assert torch.equal(counted, tokens.size[..., 0])


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("both", [True, False])
def test_blocks_follow_the_functional_core(ahead, both):
    class Spy(MCTF):
        def before_block(self, layer, tokens, attend):
            out, given = super().before_block(layer, tokens, attend)
            attn = attend(tokens)
            a = bidirectional_matching(fusion_weights(tokens.x, attn, tokens.size, *self.tau), 3, tokens.num_prefix, both)
            value, size = fuse(tokens.x, a, attn, tokens.size)
            torch.testing.assert_close(out.x, value)
            torch.testing.assert_close(out.size, size)
            assert given is None if not ahead else torch.allclose(given, one_step_ahead_attention(attn, a, tokens.size), atol=1e-6)
            if given is not None:
                torch.testing.assert_close(given.sum(dim=3), torch.ones(given.shape[:3]))
            seen.append(layer)
            return out, given

    seen, model = [], vit()
    with torch.no_grad():
        reduce_model(model, Spy(3, range(3), tau=(2, 10, 5), one_step_ahead=ahead, bidirectional=both, min_tokens=4))(images(model))
    assert seen == [0, 1, 2]


def test_how_many():
    deit = timm.create_model("deit_tiny_patch16_224", embed_dim=24, num_heads=3, num_classes=3).eval()
    for reducer, want in ((MCTF(), [197 - 16 * i for i in range(12)]), (MCTF(0.35, (3, 6, 9)), [197] * 3 + [129] * 3 + [85] * 3 + [56] * 3)):
        reduced = reduce_model(deit, reducer)
        with torch.no_grad():
            reduced(torch.zeros(1, 3, 224, 224))
        assert reduced.counts == want and reducer.proportional
    many = MCTF(100)
    assert [many.tokens_to_fuse(n, 1) for n in (197, 40, 19, 12, 10, 5)] == [98, 19, 9, 2, 0, 0]
    assert MCTF(0.35).tokens_to_fuse(12, 1) == 2 and MCTF(0.5, min_tokens=0).tokens_to_fuse(4, 1) == 1


def test_sizes_count_in_the_attention_that_is_reused():
    class Seen(MCTF):
        def before_block(self, layer, tokens, attend):
            if layer == 1:
                self.plain, self.sized = attend(type(tokens)(tokens.x, torch.ones_like(tokens.size), tokens.index, None, tokens.num_prefix, tokens.grid)), attend(tokens)
            return super().before_block(layer, tokens, attend)

    model = vit()
    reduced = reduce_model(model, Seen(3, (0, 1), min_tokens=4))
    with torch.no_grad():
        reduced(images(model))
    assert not torch.allclose(reduced.reducer.plain, reduced.reducer.sized, atol=1e-3)


def test_reusing_the_attention_saves_flops():
    model = vit()
    reused, again = (flops(reduce_model(model, mctf(one_step_ahead=ahead)), images(model)) for ahead in (True, False))
    assert reused < again


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    model = vit()
    with torch.no_grad():
        exact, low = reduce_model(model, mctf())(images(model)), reduce_model(vit().to(dtype), mctf())(images(model).to(dtype))
    assert low.dtype == dtype and torch.nn.functional.cosine_similarity(low.float(), exact).min() > (0.85 if dtype == torch.bfloat16 else 0.9999)


@pytest.mark.parametrize("weight", [0.0, 3.0])
def test_two_passes(weight):
    model, target = vit(), torch.tensor([1, 5])
    reduced = reduce_model(model, mctf()).train()
    loss = TwoPasses(reduced)(images(model), target, teacher_r=1, weight=weight, threshold=0.0)
    assert reduced.reducer.r == 3, "the student's strength is back"
    features, logits = [], []
    for r in (3, 1):
        reduced.reducer.r = r
        tokens = reduced.forward_features(images(model))
        features.append(tokens.x[:, 0]), logits.append(reduced.forward_head(tokens))
    want = sum(torch.nn.functional.cross_entropy(z, target) for z in logits) + weight * (features[0] - features[1]).square().mean()
    torch.testing.assert_close(loss, want)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_queries_learn_through_the_reused_attention():
    model = vit()
    reduce_model(model, mctf(layers=[2]))(images(model)).square().sum().backward()
    queries = model.blocks[2].attn.qkv.weight.grad[:48]
    assert (queries != 0).any()


def test_export_and_compile():
    model = vit(depth=2)
    reduced, x = reduce_model(model, mctf(layers=[1])), images(model)
    assert_exports_and_compiles(reduced, x)


def test_strength():
    model = vit(depth=6, img_size=112)
    costs = [flops(reduce_model(model, MCTF.at_strength(s, model, (7, 7))), images(model, 1)) for s in (0.0, 0.4, 0.6, 0.8, 1.0)]
    assert costs == sorted(costs, reverse=True) and costs[-1] < 0.6 * costs[0] and costs[0] == flops(reduce_model(model, Reducer()), images(model, 1))
    assert MCTF.training_free
