"""The zoo's vision transformers do their task, and timm knows them."""
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from tokenkit.core.world import scenes
from tokenkit.zoo import hub
from tokenkit.zoo.vit_world import (VITS, ConvStem, PatchTaught, vit_accuracy, build_vit, vit_tokens, patch_labels, position_table,
                                    vit_batch, taught_loss)


@pytest.mark.parametrize("name,least", [("vit-world", 0.95), ("vit-world-small", 0.93)])
def test_shipped_models_do_their_task(name, least):
    model = hub.load(name)
    assert isinstance(model, VisionTransformer)
    whole = vit_accuracy(model, 300)
    assert whole >= least - 0.03 and vit_accuracy(model, 300, drop=0.5) <= whole - 0.05
    batch = scenes(4, VITS[name]["img_size"], task="class", split="test")
    with torch.no_grad():
        logits = model(batch.images)
        assert torch.allclose(model.head(vit_tokens(model, batch.images)[:, 0]), logits, atol=1e-4)
        everything = torch.arange(model.patch_embed.num_patches).expand(4, -1)
        assert torch.allclose(vit_tokens(model, batch.images, everything), vit_tokens(model, batch.images), atol=1e-5)


def test_timm_knows_the_models():
    for name in VITS:
        entry = "tokenkit_" + name.replace("-", "_")
        model = timm.create_model(entry, pretrained=True).eval()
        mine = hub.load(name)
        image = scenes(1, VITS[name]["img_size"], task="class").images
        with torch.no_grad():
            assert torch.allclose(model(image), mine(image), atol=1e-5)
        assert timm.create_model(entry, pretrained=True, num_classes=3).head.out_features == 3
        assert timm.create_model(entry, pretrained=True, in_chans=1).eval()(image[:, :1]).shape == (1, 12)
        assert timm.create_model(entry, pretrained=False, depth=2).blocks[1] and timm.is_model(entry)
        maps = timm.create_model(entry, pretrained=True, features_only=True).eval()(image)
        assert [m.shape[-1] for m in maps] == [mine.patch_embed.grid_size[0]] * 3


def test_build_is_fresh_and_validated():
    torch.manual_seed(0)
    a = build_vit("vit-world-small")
    torch.manual_seed(0)
    b = build_vit("vit-world-small")
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    with pytest.raises(ValueError, match="name"):
        build_vit("vit-moon")
    for bad in (dict(patch_size=6), dict(patch_size=8, img_size=100), dict(patch_size=1)):
        with pytest.raises(ValueError, match="patch_size"):
            ConvStem(**bad)
    with pytest.raises(ValueError, match="drop"):
        vit_accuracy(a, 10, drop=1.0)


def test_position_table_makes_neighbours_alike():
    table = position_table(8, 64)
    likeness = (table @ table[27]).view(8, 8)
    assert likeness.argmax() == 27 and likeness[3, 4] > likeness[3, 5] > likeness[3, 6]


def test_recipe_batches_and_loss():
    images, labels, patches = vit_batch("vit-world-small", 3)
    again = vit_batch("vit-world-small", 3)
    assert torch.equal(images, again[0]) and torch.equal(patches, again[2])
    assert set(patches[0].tolist()) <= {0, labels[0].item() + 1} and (patches > 0).any(1).all()
    model = PatchTaught(build_vit("vit-world-small"))
    loss = taught_loss(model, (images[:8], labels[:8], patches[:8]))
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in model.parameters())
    batch = scenes(3, 32, task="class")
    assert patch_labels(batch, 4).shape == (3, 64)
