"""The zoo's picture tokenizer keeps its promises."""
import pytest
import torch
from hypothesis import given, settings, strategies as st
from vector_quantize_pytorch import VectorQuantize

from tokenkit import zoo
from tokenkit.zoo import hub
from tokenkit.zoo.vq_world import VQ_RECIPES, VQ_SCENES, VQS, VQAutoencoder, build_vq, train_vq, vq_loss, vq_scenes, vq_scores


def tiny(**changes):
    torch.manual_seed(0)
    return VQAutoencoder(**dict(codes=16, dim=4, width=8, depth=(1, 1), kmeans_init=False) | changes).eval()


def test_shipped_model_keeps_pictures():
    model, held_out = zoo.load("vq-world"), vq_scenes(300, split="test")
    scores = vq_scores(model, held_out.images)
    assert scores["PSNR"] >= 24 and scores["code usage"] >= 0.8 and 5 < scores["entropy"] <= 9
    assert model.card.bytes < 1e6 and abs(model.card.scores["PSNR"] - scores["PSNR"]) < 1
    assert isinstance(model.quantizer, VectorQuantize) and model.codebook.shape == (512, 8)
    with torch.no_grad():
        judge = zoo.load("vit-world-small")
        assert (judge(model.decode(model.encode(held_out.images))).argmax(-1) == held_out.labels).float().mean() > 0.8


def test_codes_are_those_of_the_library():
    model, images = zoo.load("vq-world"), vq_scenes(20, split="test").images
    with torch.no_grad():
        reconstruction, codes, loss = model(images)
    assert torch.equal(codes, model.encode(images)) and codes.shape == (20, 64) and codes.dtype == torch.long
    assert torch.allclose(model.decode(codes), reconstruction.clamp(0, 1), atol=1e-5) and loss == 0
    assert torch.equal(model.embed(codes)[3, :, 2, 5], model.codebook[codes[3, 8 * 2 + 5]])


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 3))
def test_shapes_and_rows_do_not_mix(seed, side, batch):
    model, lots = tiny(), torch.Generator().manual_seed(seed)
    images = torch.rand(batch, 3, 4 * side, 4 * side, generator=lots)
    codes = model.encode(images)
    pictures = model.decode(codes)
    assert codes.shape == (batch, side * side) and pictures.shape == images.shape and 0 <= pictures.min() and pictures.max() <= 1
    order = torch.randperm(batch, generator=lots)
    assert torch.equal(model.encode(images[order]), codes[order])
    assert torch.allclose(model.decode(codes[order]), pictures[order], atol=1e-5)


def test_code_vectors_are_their_own_codes():
    model = tiny()
    codes = torch.arange(16)[None]
    z = model.embed(codes)
    assert torch.equal(torch.cdist(z.flatten(2).mT, model.codebook).argmin(-1), codes)


def test_encoding_teaches_the_codebook_nothing():
    model = tiny().train()
    before = model.codebook.clone()
    model.encode(torch.rand(4, 3, 16, 16))
    assert torch.equal(model.codebook, before)
    model(torch.rand(4, 3, 16, 16))
    assert not torch.equal(model.codebook, before)


def test_gradients_pass_the_codes():
    model = tiny().train()
    vq_loss(model, torch.rand(2, 3, 16, 16)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.encoder[1][0].weight.grad.abs().sum() > 0


def test_half_precision():
    model = tiny().bfloat16()
    codes = model.encode(torch.rand(2, 3, 16, 16, dtype=torch.bfloat16))
    assert model.decode(codes).dtype == torch.bfloat16


def test_bad_input_is_refused():
    model = tiny()
    for shape in ((2, 1, 16, 16), (3, 16, 16), (2, 3, 16, 18), (2, 3, 0, 16)):
        with pytest.raises(ValueError, match="images must be"):
            model.encode(torch.rand(shape))
    for codes in (torch.zeros(2, 3, dtype=torch.long), torch.zeros(4, dtype=torch.long), torch.zeros(2, 0, dtype=torch.long)):
        with pytest.raises(ValueError, match="square number"):
            model.decode(codes)
    for wrong in (16, -1):
        with pytest.raises(ValueError, match="codes must be in"):
            model.decode(torch.full((1, 4), wrong))
    with pytest.raises(ValueError, match="name must be one of"):
        build_vq("vq-moon")


def test_scores_by_hand():
    model = tiny()
    images = torch.rand(7, 3, 16, 16)
    codes = model.encode(images)
    scores = vq_scores(model, images, batch=3)
    assert scores["PSNR"] == pytest.approx(-10 * (model.decode(codes) - images).square().mean().log10().item(), abs=1e-4)
    assert scores["code usage"] == len(codes.unique()) / 16
    constant = torch.full((2, 3, 16, 16), 0.5)
    assert vq_scores(model, constant)["code usage"] <= 9 / 16  # corners, edges, middle


def test_recipe_is_deterministic_and_learns():
    first, history = train_vq(steps=3, progress=False, codes=32, width=16)
    second, _ = train_vq(steps=3, progress=False, codes=32, width=16)
    assert history.steps == 3 and not first.training
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
    assert set(VQ_RECIPES) == set(VQS) and history.losses[-1] < history.losses[0]


def test_scenes_share_none_between_splits():
    a, b = vq_scenes(4), vq_scenes(4, split="test")
    assert a.images.shape == (4, 3, VQ_SCENES["size"], VQ_SCENES["size"]) and not torch.equal(a.images, b.images)
    assert torch.equal(vq_scenes(2, start=2).images, a.images[2:]) and (a.textures[:, 0] == 0).all() and (a.counts == 1).all()
    assert vq_scenes(2, size=64).images.shape[-1] == 64


def test_hub_folder(tmp_path):
    path = hub.hub_folder("vq-world", tmp_path / "new")
    assert {p.name for p in path.iterdir()} == {"model.safetensors", "config.json", "README.md"}
