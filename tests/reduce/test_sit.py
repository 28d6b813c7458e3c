"""SiT: soft mixing, the slimming and reverse modules, the distillation loss, the plug-in on real architectures, and every refusal."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tokenkit.core.measure import flops
from tokenkit.reduce.engine import Reducer, reduce_model
from tokenkit.reduce.sit import Recalibration, ReverseTokenSlimming, SiT, TokenSlimming, recalibration_loss, slim_tokens
from vits import ARCHITECTURES, Watch, assert_exports_and_compiles, images, normal, vit

SEED = st.integers(0, 2**16)
SHAPES = dict(B=st.integers(1, 3), N=st.integers(1, 12), C=st.integers(1, 6), share=st.floats(0, 1), seed=SEED)


def few(N, share):
    return max(1, round(share * N))


def slimming(dim, num_out, seed=0, dtype=torch.float64):
    """Every part of it matters."""
    torch.manual_seed(seed)
    made = TokenSlimming(dim, num_out).to(dtype)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.5 * torch.randn_like(p))
    return made


def sit_for(model, layers=(1, 2), keep_ratio=0.5):
    torch.manual_seed(0)
    made = SiT(model.embed_dim, model.patch_embed.num_patches, layers, keep_ratio)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return made.eval()


# mixing

@settings(max_examples=25, deadline=None)
@given(scale=st.floats(-2, 3), **SHAPES)
def test_slim_tokens_against_a_loop(scale, B, N, C, share, seed):
    M = few(N, share)
    x, logits = normal(B, N, C, seed=seed), 2 * normal(B, N, M, seed=seed + 1)
    out, weights = slim_tokens(x, logits, scale)
    assert out.shape == (B, M, C) and weights.shape == (B, M, N)
    for b in range(B):
        for m in range(M):
            e = [math.exp(scale * float(logits[b, n, m])) for n in range(N)]
            want = sum(e[n] / sum(e) * x[b, n] for n in range(N))
            torch.testing.assert_close(out[b, m], want)
            torch.testing.assert_close(weights[b, m], torch.tensor(e, dtype=torch.float64) / sum(e))


@settings(max_examples=25, deadline=None)
@given(**SHAPES)
def test_means_of_all_tokens(B, N, C, share, seed):
    M = few(N, share)
    x, logits = normal(B, N, C, seed=seed), 5 * normal(B, N, M, seed=seed + 1)
    out, weights = slim_tokens(x, logits)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(dim=2), torch.ones(B, M, dtype=torch.float64))
    low, high = x.amin(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)
    assert ((out >= low - 1e-9) & (out <= high + 1e-9)).all(), "inside the convex hull"
    constant = x[:, :1].expand(-1, N, -1)
    torch.testing.assert_close(slim_tokens(constant, logits)[0], constant[:, :1].expand(-1, M, -1))
    for scale in (0.0, torch.zeros(1, 1, 1, dtype=torch.float64), 1e-12):
        torch.testing.assert_close(slim_tokens(x, logits, scale)[0], x.mean(dim=1, keepdim=True).expand(-1, M, -1))
    torch.testing.assert_close(slim_tokens(x[:1], logits[:1])[0], out[:1])
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    moved, moved_weights = slim_tokens(x[:, order], logits[:, order])
    torch.testing.assert_close(moved, out)
    torch.testing.assert_close(moved_weights, weights[:, :, order])


def test_the_softmax_runs_over_the_old_tokens():
    logits = torch.tensor([[[9.0, 9.0], [0, 0], [0, 0]]])
    _, weights = slim_tokens(torch.zeros(1, 3, 1), logits)
    assert (weights[0, :, 0] > 0.99).all(), "both new tokens may want the same old one"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_precision(dtype):
    x, logits = normal(2, 40, 6), 3 * normal(2, 40, 10, seed=1)
    out, weights = slim_tokens(x.to(dtype), logits.to(dtype))
    assert out.dtype == dtype and weights.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(weights.sum(dim=2), torch.ones_like(weights[:, :, 0]))
    torch.testing.assert_close(out.double(), slim_tokens(x, logits)[0], atol=0.05, rtol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert slim_tokens(x.float(), logits.float())[0].dtype == torch.float32, "the residual stream keeps its precision"


def test_gradients():
    x, logits, scale = normal(2, 5, 3).requires_grad_(), normal(2, 5, 2, seed=1).requires_grad_(), torch.full((1, 1, 1), 1.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: slim_tokens(*t)[0], (x, logits, scale))
    made = slimming(6, 2)
    made(normal(2, 5, 6)).square().sum().backward()
    assert all((p.grad != 0).any() for p in made.parameters()) and made.scale.grad.shape == (1, 1, 1)


# the modules

@settings(max_examples=15, deadline=None)
@given(N=st.integers(1, 9), M=st.integers(1, 9), C=st.integers(2, 8), seed=SEED)
def test_slimming_module(N, M, C, seed):
    M = min(M, N)
    made, x = slimming(C, M, seed), normal(2, N, C, seed=seed)
    hidden = F.gelu(F.layer_norm(x, (C,), made.norm.weight, made.norm.bias, 1e-5) @ made.fc1.weight.T + made.fc1.bias)
    logits = (hidden @ made.fc2.weight.T + made.fc2.bias) * made.scale
    torch.testing.assert_close(made(x), logits.softmax(dim=1).transpose(1, 2) @ x)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(made(x[:, order]), made(x))
    constant = x[:, :1].expand(-1, N, -1)
    torch.testing.assert_close(made(constant), constant[:, :1].expand(-1, M, -1))


def test_start_of_the_modules():
    for made in (TokenSlimming(96, 20), ReverseTokenSlimming(96, 20, 50), TokenSlimming(10, 3, ratio=0.25)):
        for layer in made.modules():
            if isinstance(layer, nn.Linear):
                assert (layer.bias == 0).all() and 0 < layer.weight.std() < 0.04 and layer.weight.abs().max() <= 2
            if isinstance(layer, nn.LayerNorm):
                assert layer.eps == 1e-5
    assert (TokenSlimming(8, 2).scale == 1).all() and TokenSlimming(10, 3, ratio=0.25).fc1.out_features == 2
    assert list(dict(TokenSlimming(8, 2).named_children())) == ["norm", "fc1", "fc2"]


@settings(max_examples=15, deadline=None)
@given(M=st.integers(1, 5), N=st.integers(1, 7), C=st.integers(2, 6), ratio=st.sampled_from([1.0, 2.5, 4.0]), seed=SEED)
def test_reverse_module(M, N, C, ratio, seed):
    torch.manual_seed(seed)
    made, x = ReverseTokenSlimming(C, M, N, ratio).double(), normal(2, M, C, seed=seed)
    assert made.token_fc1.out_features == int(N * ratio) and made.fc1.out_features == int(C * ratio)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.5 * torch.randn_like(p))
    normed = F.layer_norm(x, (C,), made.norm1.weight, made.norm1.bias)
    y = torch.einsum("nh,bhc->bnc", made.token_fc2.weight, F.gelu(torch.einsum("hm,bmc->bhc", made.token_fc1.weight, normed) + made.token_fc1.bias[:, None])) + made.token_fc2.bias[:, None]
    z = F.gelu(F.layer_norm(y, (C,), made.norm2.weight, made.norm2.bias) @ made.fc1.weight.T + made.fc1.bias) @ made.fc2.weight.T + made.fc2.bias
    torch.testing.assert_close(made(x), y + z)


# the loss

@settings(max_examples=20, deadline=None)
@given(B=st.integers(1, 4), layers=st.integers(0, 3), tau=st.floats(0.3, 4), a=st.floats(0, 3), b=st.floats(0, 3), seed=SEED)
def test_loss_against_a_loop(B, layers, tau, a, b, seed):
    student, teacher = ([normal(B, 5, 3, seed=seed + 10 * i + k) for i in range(layers)] for k in range(2))
    z, t = 2 * normal(B, 4, seed=seed + 98), 2 * normal(B, 4, seed=seed + 99)
    target = torch.randint(0, 4, (B,), generator=torch.Generator().manual_seed(seed))
    got = recalibration_loss(student, teacher, z, t, target, a, b, tau)
    assert list(got) == ["total", "ce", "token", "logits"]
    ce = -sum(z[i].log_softmax(0)[target[i]] for i in range(B)) / B
    token = a * sum((x - y).square().mean() for x, y in zip(student, teacher)) / max(layers, 1)
    kl = 0.0
    for i in range(B):
        p, q = (t[i] / tau).softmax(0), (z[i] / tau).softmax(0)
        kl += (p * (p.log() - q.log())).sum() / B
    for name, want in {"ce": ce, "token": token, "logits": b * tau**2 * kl, "total": ce + token + b * tau**2 * kl}.items():
        torch.testing.assert_close(got[name], torch.as_tensor(want, dtype=torch.float64), atol=1e-9, rtol=1e-6)
    unlabelled = recalibration_loss(student, teacher, z, t, None, a, b, tau)
    assert unlabelled["ce"] == 0
    torch.testing.assert_close(unlabelled["total"], got["total"] - got["ce"])


@settings(max_examples=10, deadline=None)
@given(seed=SEED, tau=st.floats(0.2, 5))
def test_identical_inputs_cost_nothing(seed, tau):
    tokens, logits = [normal(2, 4, 3, seed=seed), normal(2, 4, 3, seed=seed + 1)], normal(2, 5, seed=seed)
    parts = recalibration_loss(tokens, tokens, logits, logits, tau=tau)
    assert parts["token"] == 0 and parts["logits"].abs() < 1e-12 and parts["ce"] == 0
    apart = recalibration_loss(tokens, tokens[::-1], logits, -logits, tau=tau)
    assert apart["token"] > 0 and apart["logits"] > 0


def test_only_the_student_learns():
    tensors = [normal(2, 4, 3, seed=s).requires_grad_() for s in range(2)] + [normal(2, 5, seed=s).requires_grad_() for s in (2, 3)]
    x, y, z, t = tensors
    recalibration_loss([x], [y], z, t, torch.tensor([0, 4]))["total"].backward()
    assert y.grad is None and t.grad is None and (x.grad != 0).all() and (z.grad != 0).all()
    half = recalibration_loss([x.bfloat16()], [y.bfloat16()], z.bfloat16(), t.bfloat16(), torch.tensor([0, 4]))
    assert all(v.dtype == torch.float32 and v.isfinite() for v in half.values())


# refusals

X = normal(2, 6, 4, dtype=torch.float32)


@pytest.mark.parametrize("call, words", [
    (lambda: slim_tokens(X[0], X), "x must be"), (lambda: slim_tokens(X, X[0]), "logits must be"), (lambda: slim_tokens(X, X[:, :5]), "logits must be"),
    (lambda: slim_tokens(X, X[:1]), "logits must be"), (lambda: slim_tokens(X, X[:, :, :0]), r"num_out must be in 1..6"),
    (lambda: slim_tokens(X, torch.zeros(2, 6, 7)), r"num_out must be in 1..6"), (lambda: TokenSlimming(4, 0), "num_out must be at least 1"),
    (lambda: TokenSlimming(4, 7)(X), r"num_out must be in 1..6"), (lambda: TokenSlimming(5, 2)(X), "x must be"), (lambda: TokenSlimming(4, 2)(X[0]), "x must be"),
    (lambda: ReverseTokenSlimming(4, 0, 9), "num_in and num_out must be"), (lambda: ReverseTokenSlimming(4, 6, 0), "num_in and num_out must be"),
    (lambda: ReverseTokenSlimming(4, 5, 9)(X), "x must be"), (lambda: ReverseTokenSlimming(5, 6, 9)(X), "x must be"),
    (lambda: SiT(4, 9, (2, 2)), "layers must be increasing"), (lambda: SiT(4, 9, (3, 1)), "layers must be increasing"), (lambda: SiT(4, 9, (0, 1)), "layers must be increasing"),
    (lambda: SiT(4, 9, keep_ratio=0.0), r"keep_ratio must be in \(0, 1\]"), (lambda: SiT(4, 9, keep_ratio=1.1), r"keep_ratio must be in \(0, 1\]"),
    (lambda: SiT(4, 9, keep_ratio=math.nan), r"keep_ratio must be in \(0, 1\]"), (lambda: SiT(4, 4, (1, 2, 3), 0.5), "num_out must be at least 1"),
    (lambda: Recalibration(SiT(4, 9, (1,)), 3)([X, X]), "layer_tokens must be of 3 blocks")])
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("changes, words", [
    (dict(tau=0.0), "tau must be above 0"), (dict(tau=-1.0), "tau must be above 0"), (dict(tau=math.nan), "tau must be above 0"), (dict(student_tokens=[X]), "equally many layers"),
    (dict(teacher_tokens=[X, X[:, :5]]), "layer 1 has"), (dict(student_tokens=[X[:1], X]), "layer 0 has"), (dict(student_logits=torch.zeros(2, 4)), "must both be"),
    (dict(teacher_logits=torch.zeros(1, 3)), "must both be"), (dict(student_logits=torch.zeros(2), teacher_logits=torch.zeros(2)), "must both be")])
def test_refusals_of_the_loss(changes, words):
    with pytest.raises(ValueError, match=words):
        recalibration_loss(**{"student_tokens": [X, X], "teacher_tokens": [X, X], "student_logits": torch.zeros(2, 3), "teacher_logits": torch.zeros(2, 3), **changes})


def test_models_that_do_not_fit():
    model = vit()
    patches = model.patch_embed.num_patches
    for reducer, words in ((SiT(48, patches, (1, 4)), r"layers must be in 1..3"), (SiT(32, patches), "dim is 32"), (SiT(48, patches + 1), "weights belong to one image size")):
        with pytest.raises(ValueError, match=words):
            reduce_model(model, reducer)(images(model))


# the plug-in

@pytest.mark.parametrize("kind", [k for k in ARCHITECTURES if "rotary" not in k])
def test_on_architectures(kind):
    model = vit(kind)
    x, patches, P = images(model), model.patch_embed.num_patches, model.num_prefix_tokens
    reduced = reduce_model(model, sit_for(model))
    with torch.no_grad():
        nothing = reduce_model(model, SiT(model.embed_dim, patches, ()))
        torch.testing.assert_close(nothing(x), reduce_model(model, Reducer())(x))
        torch.testing.assert_close(nothing(x), model(x), atol=1e-5, rtol=1e-5)
        logits, tokens = reduced(x), reduced.forward_features(x)
        assert torch.allclose(reduced(x[1:]), logits[1:], atol=1e-4), "batch rows are independent"
        reduced(x)
    counts = [int(patches * 0.5), int(patches * 0.25)]
    assert reduced.counts == [P + counts[0], P + counts[1], P + counts[1]] and logits.shape == (2, 7) and logits.isfinite().all()
    assert tokens.index is None and torch.allclose(tokens.size, torch.ones_like(tokens.size)) and tokens.size.shape == tokens.x[:, :, :1].shape
    assert [t.shape[1] for t in reduced.reducer.layer_tokens] == [counts[0], counts[1], counts[1]]
    mix = reduced.reducer.mix
    assert mix.shape == (2, counts[1], patches) and not mix.requires_grad and torch.allclose(mix.sum(dim=2), torch.ones(2, counts[1]))
    with pytest.raises(ValueError, match="index is None"):
        reduced.forward_dense(x)


def test_rotary_models_are_refused():
    model = vit("dinov3, rotary")
    with pytest.raises(ValueError, match="soft methods do not fit a rotary model"):
        reduce_model(model, sit_for(model))(images(model))


def test_against_blocks_by_hand():
    model = vit()
    x, sit = images(model), sit_for(model, (1, 3), 0.4)
    with torch.no_grad():
        reduced = reduce_model(model, sit)
        got = reduced.forward_features(x).x
        tokens, seen, mix = model._pos_embed(model.patch_embed(x)), [], None
        for i, block in enumerate(model.blocks):
            tokens = block(tokens)
            if i in (0, 2):
                made = sit.slims[str(i)]
                logits = made.fc2(F.gelu(made.fc1(made.norm(tokens[:, 1:]))))
                out, weights = slim_tokens(tokens[:, 1:], logits, made.scale)
                tokens, mix = torch.cat([tokens[:, :1], out], dim=1), weights if mix is None else weights @ mix
            seen.append(tokens[:, 1:])
        torch.testing.assert_close(got, model.norm(tokens))
        torch.testing.assert_close(sit.mix, mix)
        for mine, theirs in zip(sit.layer_tokens, seen):
            torch.testing.assert_close(mine, theirs)


def test_training():
    model = vit()
    before = copy.deepcopy(model.state_dict())
    patches = model.patch_embed.num_patches
    student = reduce_model(copy.deepcopy(model), sit_for(model, (2, 3))).train()
    watched = reduce_model(model, SiT(48, patches, ()))
    recalibration = Recalibration(student.reducer, 3)
    assert [type(m) for m in recalibration.reverse] == [nn.Identity, ReverseTokenSlimming, ReverseTokenSlimming]
    x, labels = images(model), torch.tensor([1, 5])
    with torch.no_grad():
        teacher_logits = watched(x)
    optimizer = torch.optim.Adam([*student.parameters(), *recalibration.parameters()], lr=1e-2)
    history = []
    for _ in range(10):
        logits = student(x)
        parts = recalibration_loss(recalibration(student.reducer.layer_tokens), watched.reducer.layer_tokens, logits, teacher_logits, labels)
        optimizer.zero_grad()
        parts["total"].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for m in (student.reducer, recalibration) for p in m.parameters())
        optimizer.step()
        history.append(parts["total"].item())
    assert history[-1] < 0.9 * history[0]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "the teacher stays as it is"


def test_costs_less_and_builds_no_map():
    model = vit(depth=6, img_size=112)
    x = images(model, 1)
    reduced = reduce_model(model, sit_for(model, (1, 2, 3)))
    assert flops(reduced, x) < 0.6 * flops(model, x)
    with torch.no_grad(), Watch() as watch:
        reduced(x)
    assert watch.largest <= 7, "nothing larger than the patch grid is square"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    model = vit()
    with torch.no_grad():
        exact = reduce_model(model, sit_for(model))(images(model))
        low = reduce_model(vit().to(dtype), sit_for(model).to(dtype))(images(model).to(dtype))
    assert low.dtype == dtype and F.cosine_similarity(low.float(), exact).min() > (0.95 if dtype == torch.bfloat16 else 0.9999)


def test_state_dict_goes_round():
    model = vit()
    one, two = sit_for(model), SiT(48, model.patch_embed.num_patches, (1, 2))
    two.load_state_dict(one.state_dict())
    with torch.no_grad():
        assert torch.equal(reduce_model(model, one)(images(model)), reduce_model(model, two.eval())(images(model)))


def test_export_and_compile():
    model = vit(depth=2)
    reduced, x = reduce_model(model, sit_for(model, (1,))), images(model)
    assert_exports_and_compiles(reduced, x)
