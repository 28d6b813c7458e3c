import numpy as np
import pytest
import torch
from timm.models.vision_transformer import Block

from tokenkit.core.measure import bootstrap_interval, flops, paired_ratio, peak_memory


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("N, C, heads", [(197, 192, 3), (50, 64, 4)])
def test_flops_of_a_vit_block_agree_with_a_hand_count(N, C, heads, fused):
    block = Block(C, heads).eval()
    block.attn.fused_attn = fused
    assert flops(block, torch.zeros(1, N, C)) == 2 * (12 * N * C**2 + 2 * N**2 * C)


def test_flops_scale_with_the_batch():
    layer = torch.nn.Linear(8, 8)
    assert flops(layer, torch.zeros(6, 8)) == 2 * flops(layer, torch.zeros(3, 8)) == 2 * 6 * 64


def test_paired_ratio_sees_more_calls():
    count = {"slow": 0, "fast": 0}
    def tick(name): count[name] += 1
    ratio = paired_ratio(lambda: tick("slow"), lambda: tick("fast"), rounds=5, warmup=2)
    assert count == {"slow": 7, "fast": 7}
    assert ratio.low <= ratio.median <= ratio.high and "quartiles" in str(ratio)


def test_peak_memory_sees_a_large_tensor():
    assert peak_memory(lambda: torch.ones(50_000_000).sum()) > 100e6


def test_interval_covers_and_is_reproducible():
    rng = np.random.default_rng(0)
    values = rng.normal(2.0, 1.0, 400)
    a, b = bootstrap_interval(values), bootstrap_interval(torch.from_numpy(values))
    assert a == b and a.low < a.value < a.high
    assert abs(a.std_error - 1 / 20) < 0.01
    assert bootstrap_interval(values, level=0.5).high < a.high


def test_interval_of_a_constant_is_a_point():
    i = bootstrap_interval([3.0] * 5)
    assert i.low == i.value == i.high == 3.0 and i.std_error == 0


@pytest.mark.parametrize("call", [
    lambda: bootstrap_interval([]), lambda: bootstrap_interval([1.0, float("nan")]), lambda: bootstrap_interval([1.0], level=1.0),
    lambda: paired_ratio(int, int, rounds=0), lambda: paired_ratio(int, int, warmup=-1),
])
def test_bad_input(call):
    with pytest.raises(ValueError):
        call()
