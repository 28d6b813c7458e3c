import pytest
import timm
import torch
from torch import nn

from tokenkit.reduce.compare import (RandomMerging, RandomPruning, class_features, correct, counts_of, fidelity, load_task,
                                     match_flops, model_flops)
from tokenkit.reduce.engine import Reducer, ToMe, reduce_model


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4, embed_dim=48, num_heads=3, num_classes=5).eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("baseline", [RandomPruning, RandomMerging])
def test_counts_are_as_ordered_and_seeds_repeat(vit, images, baseline):
    reduced = reduce_model(vit, baseline([0, 5, 3], seed=4))
    with torch.no_grad():
        tokens = reduced.forward_features(images)
    assert reduced.counts == [17, 12, 9, 9] and counts_of(reduced) == [0, 5, 3, 0]
    assert (tokens.size.sum(1) == (17 if baseline is RandomMerging else 9)).all()
    assert torch.equal(class_features(reduced, images), class_features(reduced, images))
    assert not torch.equal(class_features(reduced, images), class_features(reduce_model(vit, baseline([0, 5, 3], seed=5)), images))


def test_matched_flops_never_exceed_the_budget(vit, images):
    full = model_flops(vit, images[:1])
    for share in (0.9, 0.7, 0.55):
        model, cost = match_flops(lambda s: reduce_model(vit, ToMe.at_strength(s, vit, (4, 4))), images[:1], share * full)
        assert 0.6 * share * full < cost <= share * full and cost == model_flops(model, images[:1])
    with pytest.raises(ValueError, match="target must be at least"):
        match_flops(lambda s: reduce_model(vit, ToMe.at_strength(s, vit, (4, 4))), images[:1], 0.01 * full)


def test_fidelity_of_the_full_model_is_one(vit, images):
    full = class_features(vit, images)
    torch.testing.assert_close(fidelity(reduce_model(vit, Reducer()), images, full), torch.ones(6), atol=1e-5, rtol=0)
    assert fidelity(reduce_model(vit, RandomPruning([8, 4])), images, full).mean() < 1 - 1e-4


def test_correct_counts_right_answers():
    class Sign(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return torch.stack([-x.mean((1, 2, 3)), x.mean((1, 2, 3))], 1)
    x = torch.tensor([1.0, -1.0, 2.0]).view(3, 1, 1, 1)
    assert correct(Sign(), x, torch.tensor([1, 0, 0]), batch_size=2).tolist() == [1, 1, 0]


def test_zoo_task_knows_its_objects():
    task = load_task("vit-world", 3)
    assert task.on_object.shape == (3, 144) and task.on_object.any(1).all()
    again = load_task("vit-world", 1, start=2)
    assert torch.equal(again.images[0], task.images[2])


@pytest.mark.parametrize("call, message", [
    (lambda v, x: RandomPruning([-1]), "schedule must not be negative"),
    (lambda v, x: correct(v, x, torch.zeros(2)), "equally many"),
    (lambda v, x: load_task("vit-wolrd", 2), "vit-wolrd"),
])
def test_bad_input(vit, images, call, message):
    with pytest.raises(ValueError, match=message):
        call(vit, images)
