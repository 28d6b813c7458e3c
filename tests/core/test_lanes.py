import json

import pytest
import torch
from torch import nn

from tokenkit.core.lanes import Shelf, choose

SETTINGS = dict(images=10, model="vit-world")


def test_settings_and_overrides():
    lane = choose("long", cpu=SETTINGS, long=dict(images=20))
    assert (lane.images, lane.model, lane.trains, lane.source) == (20, "vit-world", True, "registry")
    assert choose("cpu", cpu=SETTINGS).images == 10


def test_rehearsal_is_gpu_at_toy_size():
    lane = choose("rehearsal", cpu=SETTINGS, gpu=dict(images=50, model="big"), rehearsal=dict(images=2))
    assert (lane.images, lane.model, lane.device.type, lane.source) == (2, "big", "cpu", "toy")


def test_seeded_twice_alike():
    draws = []
    for _ in range(2):
        lane = choose("cpu", seed=3, cpu={})
        draws.append((torch.rand(3), torch.rand(3, generator=lane.generator(1))))
    assert all(torch.equal(a, b) for a, b in zip(*draws))


@pytest.mark.parametrize("call, message", [
    (lambda: choose("tpu", cpu={}), "lane must be one of cpu, long, gpu, rehearsal, got 'tpu'"),
    (lambda: choose("cpu", cpu={}, gpu=dict(imagse=3)), "gpu changes .'imagse'., which cpu does not name"),
    (lambda: Shelf("evit"), "method must be 'family/method'"),
    (lambda: Shelf("reduce/evit").path("a.b"), "arm must be a name"),
])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_unknown_setting():
    with pytest.raises(AttributeError, match="has no setting 'imagse'; it has .'images', 'model'."):
        choose("cpu", cpu=SETTINGS).imagse


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpu_lane_needs_a_gpu():
    with pytest.raises(RuntimeError, match="needs a CUDA device; use lane='cpu'"):
        choose("gpu", cpu={})


def test_shelf_round_trip(tmp_path):
    shelf, net = Shelf("reduce/made_up", tmp_path), nn.Linear(5, 3)
    shelf.save("net", net)
    assert shelf.arms() == ["net"]
    loaded = shelf.load("net")
    assert loaded["weight"].dtype == torch.float32
    torch.testing.assert_close(loaded["weight"], net.weight.detach(), atol=1e-3, rtol=1e-3)
    shelf.save("exact", {"index": torch.arange(4), "w": torch.rand(3, dtype=torch.float32)}, half=False)
    assert shelf.load("exact")["index"].dtype == torch.int64
    assert not list(tmp_path.rglob("*partial*"))


def test_shelf_budget_counts_all_arms(tmp_path):
    shelf = Shelf("reduce/made_up", tmp_path, max_bytes=20_000)
    shelf.save("a", {"w": torch.zeros(5000)})
    shelf.save("a", {"w": torch.zeros(6000)})  # replacing does not count twice
    with pytest.raises(ValueError, match="must stay under 20,000 bytes"):
        shelf.save("b", {"w": torch.zeros(6000)})
    assert shelf.arms() == ["a"]


def test_record_says_how_to_make_it_again(tmp_path):
    shelf = Shelf("reduce/made_up", tmp_path)
    with pytest.raises(FileNotFoundError, match="`tokenkit run reduce/made_up --lane long` makes it"):
        shelf.record
    shelf.save_record({"accuracy": [0.5]})
    record = json.loads((tmp_path / "reduce" / "made_up.json").read_text())
    assert record["accuracy"] == [0.5] and {"date", "versions", "command"} <= record.keys()
    assert "makes it again" in shelf.caption()


def test_missing_checkpoint_says_how_to_make_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no checkpoint 'x'.*--lane long"):
        Shelf("reduce/made_up", tmp_path).load("x")
