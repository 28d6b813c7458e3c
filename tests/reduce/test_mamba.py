"""The selective scan against a sequential reference and transformers, and the Vision Mamba built on it."""
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vits import normal
from tokenkit.reduce.mamba import Direction, VimBlock, VisionMamba, from_vim, gaps_before, scan, selective_scan
from tokenkit.zoo.vit_world import ConvStem


def tensors(batch=2, length=12, width=3, state=4, seed=0, dtype=torch.float64):
    """u, delta, A, B, C, D."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    made = (draw(batch, length, width), 0.3 * draw(batch, length, width).exp(), -draw(width, state).exp(),
            draw(batch, length, state), draw(batch, length, state), draw(width))
    return tuple(t.to(dtype) for t in made)


def mask(batch, length, seed=0, share=0.6):
    keep = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < share
    keep[:, length // 2] = True
    return keep


def reference(u, delta, A, B, C, D=None, keep=None, align="decay"):
    """One number at a time."""
    y = torch.zeros_like(u)
    for b in range(u.shape[0]):
        for e in range(u.shape[2]):
            h = [0.0] * A.shape[1]
            for t in range(u.shape[1]):
                there = keep is None or bool(keep[b, t])
                for s in range(A.shape[1]):
                    if there:
                        h[s] = math.exp(delta[b, t, e] * A[e, s]) * h[s] + float(delta[b, t, e] * B[b, t, s] * u[b, t, e])
                    elif align == "decay":
                        h[s] = math.exp(delta[b, t, e] * A[e, s]) * h[s]
                if there:
                    y[b, t, e] = sum(float(C[b, t, s]) * h[s] for s in range(A.shape[1])) + (float(D[e] * u[b, t, e]) if D is not None else 0.0)
    return y


@settings(max_examples=15, deadline=None)
@given(batch=st.integers(1, 2), length=st.integers(1, 9), width=st.integers(1, 3), state=st.integers(1, 3), seed=st.integers(0, 99),
       align=st.sampled_from(["decay", "hold"]), skip=st.booleans(), pruned=st.booleans())
def test_agrees_with_a_sequential_reference(batch, length, width, state, seed, align, skip, pruned):
    *rest, D = tensors(batch, length, width, state, seed)
    D, keep = D if skip else None, mask(batch, length, seed) if pruned else None
    torch.testing.assert_close(selective_scan(*rest, D, keep, align), reference(*rest, D, keep, align))


@settings(max_examples=20, deadline=None)
@given(length=st.integers(1, 30), seed=st.integers(0, 99))
def test_what_hold_and_decay_are(length, seed):
    u, delta, A, B, C, D = tensors(1, length, seed=seed)
    keep = mask(1, length, seed)
    at = keep[0]
    short = selective_scan(u[:, at], delta[:, at], A, B[:, at], C[:, at], D)
    torch.testing.assert_close(selective_scan(u, delta, A, B, C, D, keep, "hold")[:, at], short)
    zeros = selective_scan(u * keep.unsqueeze(2), delta, A, B, C, D)
    out = selective_scan(u, delta, A, B, C, D, keep)
    torch.testing.assert_close(out[:, at], zeros[:, at])
    assert (out[:, ~at] == 0).all()
    for align in ("decay", "hold"):
        everything = torch.ones_like(keep)
        assert torch.equal(selective_scan(u, delta, A, B, C, D, everything, align), selective_scan(u, delta, A, B, C, D))


@settings(max_examples=15, deadline=None)
@given(at=st.integers(0, 11), seed=st.integers(0, 99), align=st.sampled_from(["decay", "hold"]))
def test_causal_and_linear_in_u(at, seed, align):
    u, delta, A, B, C, D = tensors(seed=seed)
    keep = mask(2, 12, seed)
    run = lambda u, delta=delta, B=B, C=C: selective_scan(u, delta, A, B, C, D, keep, align)
    late = torch.arange(12).ge(at).view(1, -1, 1)
    changed = run(torch.where(late, u + 1, u), torch.where(late, delta * 2, delta), torch.where(late, B - 1, B), torch.where(late, -C, C))
    torch.testing.assert_close(changed[:, :at], run(u)[:, :at])
    other = normal(2, 12, 3, seed=seed + 1)
    torch.testing.assert_close(run(2 * u - 3 * other), 2 * run(u) - 3 * run(other))


def test_pruned_values_do_not_matter_even_if_not_finite():
    u, delta, A, B, C, D = tensors()
    keep = mask(2, 12)
    wild = torch.where(keep.unsqueeze(2), u, torch.inf)
    for align in ("decay", "hold"):
        assert torch.equal(selective_scan(wild, delta, A, B, C, D, keep, align), selective_scan(u, delta, A, B, C, D, keep, align))


@pytest.mark.parametrize("length", [1, 6])
@pytest.mark.parametrize("align", ["decay", "hold"])
def test_gradients(length, align):
    inputs = [t.requires_grad_() for t in tensors(2, length, 2, 3)]
    assert torch.autograd.gradcheck(lambda *a: selective_scan(*a, mask(2, length), align), inputs)
    assert torch.autograd.gradcheck(lambda *a: selective_scan(*a), inputs)


def test_exact_in_float32_at_a_hundred_tokens():
    values = tensors(4, 100, 8, 8, dtype=torch.float32)
    wide = selective_scan(*(t.double() for t in values))
    assert (selective_scan(*values) - wide).abs().max() < 1e-5 * wide.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept(dtype):
    values = tensors(dtype=dtype)
    out = selective_scan(*values)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), selective_scan(*(t.double() for t in values)), atol=0.05, rtol=0.02)


def test_transformers_slow_scan():
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan
    u, delta, A, B, C, D = tensors(2, 20, dtype=torch.float32)
    raw = delta.expm1().log()  # the inverse of softplus
    theirs = mamba_selective_scan(u.transpose(1, 2), raw.transpose(1, 2), A, B.transpose(1, 2), C.transpose(1, 2), D=D, delta_softplus=True)
    torch.testing.assert_close(selective_scan(u, delta, A, B, C, D), theirs.transpose(1, 2), atol=1e-5, rtol=1e-4)


def test_transformers_layer():
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer
    torch.manual_seed(0)
    theirs = MambaMixer(MambaConfig(hidden_size=32, state_size=5, expand=2, conv_kernel=4, time_step_rank=2, num_hidden_layers=1), 0).eval()
    ours = VimBlock(32, 5, 2, 4, bidirectional=False).eval()
    missing = ours.load_state_dict({k if k.startswith(("in_proj", "out_proj")) else f"directions.0.{k}": v for k, v in theirs.state_dict().items()}, strict=False)
    assert missing.missing_keys == ["norm.weight"] and not missing.unexpected_keys
    x = normal(2, 33, 32, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x)[0] - x, theirs(ours.norm(x)), atol=1e-5, rtol=1e-4)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), back=st.booleans())
def test_gaps_stand_for_pruned_places(seed, back):
    torch.manual_seed(seed)
    direction = Direction(width=4, state=3, conv=3, rank=2).double()
    keep = mask(1, 15, seed)
    places = keep[0].nonzero().T
    x = normal(1, places.shape[1], 4, seed=seed)
    with torch.no_grad():
        places = places.flip(1) if back else places
        jumped = direction(x, gaps_before(places))
        u = F.silu(direction.conv1d(x.transpose(1, 2))[..., :x.shape[1]].transpose(1, 2))
        rank, B, C = direction.x_proj(u).split(direction.sizes, -1)
        at = 14 - places[0] if back else places[0]  # along the walk
        wide = lambda t, fill=0.0: torch.full((1, 15, t.shape[2]), fill, dtype=t.dtype).index_copy(1, at, t)
        delta = F.softplus(direction.dt_proj(wide(rank)))
        there = torch.zeros(1, 15, dtype=torch.bool).index_fill(1, at, True)
        walked = selective_scan(wide(u), delta, -direction.A_log.exp(), wide(B), wide(C), direction.D, there)
    torch.testing.assert_close(jumped, walked[:, at])


def test_gaps():
    assert gaps_before(torch.tensor([[2, 3, 7, 8]])).tolist() == [[0, 0, 3, 0]]
    assert gaps_before(torch.tensor([[8, 7, 3, 2]])).tolist() == [[0, 0, 3, 0]]


@pytest.mark.parametrize("options", [dict(), dict(bidirectional=False), dict(expand=1, state=1, conv=1), dict(img_size=48, patch_size=16, in_chans=1),
                                     dict(embed_layer=ConvStem, dim=48), dict(depth=1, num_classes=3)])
def test_vision_mamba(options):
    torch.manual_seed(0)
    model = VisionMamba(**options)
    size, channels = options.get("img_size", 32), options.get("in_chans", 3)
    images = torch.rand(3, channels, size, size)
    out = model(images)
    assert out.shape == (3, options.get("num_classes", 10)) and model.class_position == model.num_tokens // 2
    assert model.counts == [model.num_tokens] * len(model.blocks)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(images)[1:2], model(images[1:2]), atol=1e-5, rtol=1e-4)


def test_vision_mamba_in_half_precision():
    model, images = VisionMamba(depth=2).eval(), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        full = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(images).float(), full, atol=0.05, rtol=0.05)
        half = model.bfloat16()(images.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, atol=0.1, rtol=0.1)


def test_the_backward_walk_is_the_forward_walk_of_the_mirror_image():
    torch.manual_seed(0)
    block = VimBlock(16, 4, 2, 4, bidirectional=True).eval()
    block.directions[1].load_state_dict(block.directions[0].state_dict())
    x = torch.randn(2, 9, 16)
    with torch.no_grad():
        torch.testing.assert_close(block(x.flip(1))[0].flip(1), block(x)[0], atol=1e-6, rtol=1e-5)


def test_official_names():
    model = VisionMamba(depth=2)
    theirs = {}
    for key, value in model.state_dict().items():
        if key.startswith("blocks."):
            _, number, *rest = key.split(".")
            if rest[0] == "directions":
                part, *tail = rest[2:]
                part = {"A_log": "A_b_log"}.get(part, part + "_b") if rest[1] == "1" else part
                rest = ["mixer", part, *tail]
            elif rest[0] != "norm":
                rest = ["mixer", *rest]
            key = ".".join(["layers", number, *rest])
        theirs[key.replace("norm.", "norm_f.") if key.startswith("norm.") else key] = value
    assert "layers.1.mixer.A_b_log" in theirs and "layers.0.mixer.conv1d_b.bias" in theirs and "norm_f.weight" in theirs
    back = from_vim(theirs)
    assert all(torch.equal(back[k], v) for k, v in model.state_dict().items()) and len(back) == len(theirs)
    VisionMamba(depth=2).load_state_dict(back)


def bad(**changes):
    values = dict(zip("u delta A B C".split(), tensors())) | changes
    return selective_scan(**values)


u0, delta0, A0, B0, C0, D0 = tensors()


@pytest.mark.parametrize("call, message", [
    (lambda: bad(A=-A0), "A must be negative"),
    (lambda: bad(A=A0 * torch.tensor([0.0, 1, 1, 1])), "A must be negative"),
    (lambda: bad(delta=delta0 * 0), "delta must be positive"),
    (lambda: bad(delta=delta0 * torch.nan), "delta must be positive"),
    (lambda: bad(delta=delta0[:, :5]), r"delta must be \(2, 12, 3\), got \(2, 5, 3\)"),
    (lambda: bad(A=A0[:2]), r"A must be \(3, 4\)"),
    (lambda: bad(B=B0[..., :2]), r"B must be \(2, 12, 4\)"),
    (lambda: bad(C=C0[:1]), r"C must be \(2, 12, 4\)"),
    (lambda: bad(D=D0[:2]), r"D must be \(3,\)"),
    (lambda: bad(u=u0[0]), r"u must be \(B, L, E\)"),
    (lambda: bad(A=A0[0]), r"u must be \(B, L, E\) and A \(E, S\)"),
    (lambda: bad(keep=torch.ones(2, 11, dtype=torch.bool)), r"keep must be \(2, 12\)"),
    (lambda: bad(keep=torch.ones(2, 12)), "keep must be bool"),
    (lambda: bad(keep=torch.arange(24).view(2, 12) < 12), "at least one token in each row"),
    (lambda: bad(align="skip"), r"align must be one of \('decay', 'hold'\), got 'skip'"),
    (lambda: VisionMamba(depth=0), "sizes must be at least 1"),
    (lambda: VisionMamba(state=0), "sizes must be at least 1"),
    (lambda: VisionMamba(depth=1)(torch.zeros(1, 3, 16, 16)), r"images must be \(B, 3, 32, 32\)"),
    (lambda: VisionMamba(depth=1)(torch.zeros(3, 32, 32)), r"images must be \(B, 3, 32, 32\)"),
])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_scan_takes_steps_and_inputs_apart():
    u, delta, A, B, C, _ = tensors()
    torch.testing.assert_close(scan(delta, delta * u, A, B, C), selective_scan(u, delta, A, B, C))
