"""The zoo's Vision Mamba does its task, and timm knows it."""
import timm
import torch

from tokenkit.core.world import scenes
from tokenkit.reduce.mamba import VisionMamba
from tokenkit.reduce.ssm_prune import TokenPruning
from tokenkit.zoo import hub
from tokenkit.zoo.mamba_world import MAMBA_SHAPE, MambaTaught, build_mamba, mamba_accuracy, mamba_batch, mamba_groups, train_mamba
from tokenkit.zoo.vit_world import taught_loss


def test_shipped_model_does_its_task():
    model = hub.load("mamba-world")
    assert isinstance(model, VisionMamba) and model.patch_embed.num_patches == 64 and model.card.parameters < 300_000
    assert mamba_accuracy(model, 300) >= 0.88 and model.card.scores["top-1"] >= 0.85
    assert mamba_accuracy(model, 100, prune=TokenPruning((2, 4, 6), 0.5)) <= 0.8  # it needs its tokens


def test_it_sees_what_vit_world_small_sees():
    assert hub.load("mamba-world").patch_embed.convs[0][0].weight.shape == hub.load("vit-world-small").patch_embed.convs[0][0].weight.shape


def test_timm_knows_the_model():
    mine, image = hub.load("mamba-world"), scenes(1, 32, task="class").images
    model = timm.create_model("tokenkit_mamba_world", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(image), mine(image), atol=1e-5, rtol=1e-4)
    assert timm.create_model("tokenkit_mamba_world", pretrained=True, num_classes=3).head.out_features == 3
    assert timm.create_model("tokenkit_mamba_world", pretrained=True, in_chans=1).eval()(image[:, :1]).shape == (1, 12)
    assert len(timm.create_model("tokenkit_mamba_world", depth=2).blocks) == 2 and timm.is_model("tokenkit_mamba_world")


def test_build_is_repeatable_and_takes_changes():
    torch.manual_seed(0)
    a = build_mamba()
    torch.manual_seed(0)
    b = build_mamba()
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    assert build_mamba(expand=2, depth=1)(torch.rand(1, 3, 32, 32)).shape == (1, 12)
    likeness = a.pos_embed[0] @ a.pos_embed[0, 10]
    assert likeness[:32].argmax() == 10 and likeness[11] > likeness[13]


def test_recipe():
    images, labels, patches = mamba_batch(3)
    again = mamba_batch(3)
    assert torch.equal(images, again[0]) and torch.equal(patches, again[2]) and images.shape[-1] == MAMBA_SHAPE["img_size"]
    taught = MambaTaught(build_mamba())
    whole, parts = taught(images[:4])
    assert whole.shape == (4, 12) and parts.shape == (4, 64, 13)
    loss = taught_loss(taught, (images[:8], labels[:8], patches[:8]))
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in taught.parameters())
    decays, rest = mamba_groups(taught)
    names = {id(p): name for name, p in taught.named_parameters()}
    assert len(decays["params"]) + len(rest["params"]) == len(names) and rest["weight_decay"] == 0
    kept = [names[id(p)] for p in rest["params"]]
    assert any("A_log" in name for name in kept) and "mamba.pos_embed" in kept and not any("proj.weight" in name for name in kept)


def test_two_steps_of_training():
    model, history = train_mamba(steps=2)
    assert history.steps == 2 and not model.training
    stem = hub.load("vit-world-small").patch_embed
    assert (model.patch_embed.proj.weight - stem.proj.weight).abs().max() < 0.02  # it began as the ViT's
