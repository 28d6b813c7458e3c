"""The registry, its real models and the photos. Tests marked `network` need the cache filled, or the package index."""
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from tokenkit.core import assets
from tokenkit.core.assets import (ASSETS, PHOTOS, build_minilm, causal_lm, choose_source, fetch, find_asset, hub_name, photo_path, photos,
                                  sentence_encoder, status, timm_names, vision_model)
from tokenkit.core.cache import AssetError

network = pytest.mark.network


def test_listing_assets_imports_no_framework():
    code = "import sys; from tokenkit.core.assets import status; status(); print([m for m in ('torch', 'timm', 'transformers', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# Names and sources

@pytest.mark.parametrize("name, near", [("smollm", "smollm2-135m-instruct"), ("DINOv2-ViTS14", "dinov2-vits14"), ("all-minilm-l6", "all-minilm-l6-v2"),
                                        ("dinov3-vits14", "dinov2-vits14")])
def test_unknown_name_suggests_the_nearest(name, near):
    for call in (find_asset, fetch, status, causal_lm):
        with pytest.raises(ValueError, match=f"unknown asset '{name}'; did you mean '{near}'"):
            call(name)


@pytest.mark.parametrize("name", ["gpt-5", ""])
def test_unknown_name_far_from_all_lists_them(name):
    with pytest.raises(ValueError, match="known are smollm2-135m-instruct, all-minilm-l6-v2, dinov2-vits14"):
        vision_model(name)


def test_sources():
    assert choose_source("dinov2-vits14", None) == "registry" and choose_source("meta-llama/Llama-3.2-1B", None) == "hub"
    assert choose_source("anything", "toy") == "toy" and choose_source("gpt2-xl", "hub") == "hub"
    with pytest.raises(ValueError, match="source must be one of registry, hub, toy, got 'disk'"):
        choose_source("dinov2-vits14", "disk")
    with pytest.raises(ValueError, match="unknown asset 'meta-llama/Llama-3.2-1B'"):
        causal_lm("meta-llama/Llama-3.2-1B", source="registry")
    assert hub_name("smollm2-135m-instruct") == "HuggingFaceTB/SmolLM2-135M-Instruct" and hub_name("a/b") == "a/b"


def test_hub_source_asks_for_the_originals(monkeypatch):
    asked = []
    for loader in ("hub_causal_lm", "hub_encoder", "timm_model"):
        monkeypatch.setattr(assets, loader, lambda name, source, **options: asked.append((name, source)))
    causal_lm(source="hub")
    causal_lm("meta-llama/Llama-3.2-1B")
    sentence_encoder(source="hub")
    vision_model(source="hub")
    vision_model("deit_small_patch16_224.fb_in1k")
    assert asked == [("HuggingFaceTB/SmolLM2-135M-Instruct", "hub"), ("meta-llama/Llama-3.2-1B", "hub"), ("sentence-transformers/all-MiniLM-L6-v2", "hub"),
                     ("vit_small_patch14_dinov2.lvd142m", "hub"), ("deit_small_patch16_224.fb_in1k", "hub")]


def test_toys_of_all_kinds_need_no_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TOKENKIT_CACHE", str(tmp_path))
    model, tokenizer = causal_lm(source="toy", dtype=torch.bfloat16)
    assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.bfloat16 and tokenizer.chat_template
    assert sentence_encoder(source="toy").encode(["a"]).shape == (1, 384)
    vit = vision_model(source="toy", img_size=56)
    assert type(vit) is timm.models.VisionTransformer and len(vit.blocks) == 12 and vit.pos_embed.shape[1] == 17
    assert not list(tmp_path.iterdir())


def test_registry_entries_are_complete(monkeypatch, tmp_path):
    monkeypatch.setenv("TOKENKIT_CACHE", str(tmp_path))
    for name, asset in ASSETS.items():
        assert asset.name == name and len(asset.sha256) == 64 and "==" in asset.wheel and asset.licence and asset.origin
        assert asset.folder.parent == tmp_path
    assert "dequantised" in ASSETS["smollm2-135m-instruct"].origin and "saliency" in ASSETS["dinov2-vits14"].origin
    assert [(row.size, row.state) for row in status()] == [(0, "missing")] * 3


def test_status_tells_damage(monkeypatch, tmp_path):
    monkeypatch.setenv("TOKENKIT_CACHE", str(tmp_path))
    folder = find_asset("dinov2-vits14").folder
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"half a file")
    assert status("dinov2-vits14") == [("dinov2-vits14", 11, "damaged: manifest.json cannot be read", *status("dinov2-vits14")[0][3:])]


def test_conversion_needs_its_package(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for build, package in ((assets.build_smollm2, "gguf"), (assets.build_dinov2, "onnx")):
        with pytest.raises(AssetError, match=rf"needs the package {package}: pip install 'tokenkit\[notebooks\]'"):
            build(tmp_path / "raw", tmp_path)


def test_minilm_recipe_keeps_what_transformers_reads(tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir(), out.mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "README.md"):
        (raw / name).write_text(name)
    build_minilm(raw, out)
    assert len(list(out.iterdir())) == 6 and not (out / "README.md").exists()


def test_timm_names_put_every_tensor_where_it_belongs():
    """Inverse of the renaming, on numbered tensors: nothing swapped, nothing lost."""
    width, embed = 384, "backbone.embeddings."
    arrays, expected = {}, {}

    def number(name, *shape):
        arrays[name] = torch.full(shape, float(len(arrays) + 1))
        return arrays[name]

    expected["cls_token"] = number(embed + "cls_token", 1, 1, width)
    expected["pos_embed"] = torch.cat([number("onnx::Concat_1957", 1, 1, width), number("onnx::Reshape_1962", 1, 1369, width)], 1)
    for part, tail in (("weight", (3, 14, 14)), ("bias", ())):
        expected[f"patch_embed.proj.{part}"] = number(f"{embed}patch_embeddings.projection.{part}", width, *tail)
        expected[f"norm.{part}"] = number(f"backbone.layernorm.{part}", width)
    for i in range(12):
        old, new = f"backbone.encoder.layer.{i}.", f"blocks.{i}."
        for part in ("weight", "bias"):
            tail = (width,) if part == "weight" else ()
            expected[f"{new}attn.qkv.{part}"] = torch.cat([number(f"{old}attention.attention.{n}.{part}", width, *tail) for n in ("query", "key", "value")])
            expected[f"{new}attn.proj.{part}"] = number(f"{old}attention.output.dense.{part}", width, *tail)
            expected[f"{new}mlp.fc1.{part}"] = number(f"{old}mlp.fc1.{part}", 4 * width, *tail)
            expected[f"{new}mlp.fc2.{part}"] = number(f"{old}mlp.fc2.{part}", width, *((4 * width,) if tail else ()))
            for n in (1, 2):
                expected[f"{new}norm{n}.{part}"] = number(f"{old}norm{n}.{part}", width)
        for n in (1, 2):
            expected[f"{new}ls{n}.gamma"] = number(f"{old}layer_scale{n}.lambda1", width)
    state = timm_names(arrays)
    assert state.keys() == expected.keys() and all(torch.equal(state[k], expected[k]) for k in expected)
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch14_dinov2", pretrained=False)
    model.load_state_dict(state, strict=True, assign=True)


# The real models

@pytest.fixture(scope="module")
def smollm2():
    return causal_lm()


@network
@torch.no_grad()
def test_smollm2_knows_paris_and_prefers_english(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(model.generate(**ids, max_new_tokens=2, do_sample=False)[0])

    def loss(text):
        ids = tokenizer(text, return_tensors="pt").input_ids
        return model(ids, labels=ids).loss.item()
    english = "The old man walked slowly down to the river and watched the boats go by."
    assert loss(english) + 2 < loss(" ".join(sorted(english.split(), key=len)))


@network
def test_smollm2_is_what_was_published_in_shape(smollm2):
    model, tokenizer = smollm2
    c = model.config
    assert (c.num_hidden_layers, c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.vocab_size) == (30, 576, 9, 3, 49152)
    assert model.dtype == torch.float32 and not model.training and not hasattr(c, "quantization_config")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.model_max_length) == ("<|im_start|>", "<|im_end|>", 8192)
    assert tokenizer.tokenize("\n\n12 apples") == ["ĊĊ", "1", "2", "Ġapples"], "digits stand alone"
    for text in ("naïve 日本\n", " 3.14  = pi", "def f(x):\n\treturn x"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


@network
def test_smollm2_weights_are_four_bit(smollm2):
    for layer in (0, 29):
        blocks = smollm2[0].model.layers[layer].self_attn.o_proj.weight.detach().reshape(-1, 32)
        assert max(len(block.unique()) for block in blocks[:500]) <= 16


@network
@torch.no_grad()
def test_causal_lm_dtype_and_attention(smollm2):
    model, tokenizer = causal_lm(dtype=torch.bfloat16, attn_implementation="eager")
    ids = tokenizer("A short text", return_tensors="pt").input_ids
    out = model(ids, output_attentions=True)
    assert model.dtype == torch.bfloat16 and out.attentions[0].shape[1] == 9
    expected, found = smollm2[0](ids).logits.log_softmax(-1), out.logits.float().log_softmax(-1)
    assert (expected.exp() * (expected - found)).sum(-1).max() < 0.05, "bfloat16 tells nearly the same story"


@network
def test_minilm_finds_paraphrases():
    texts = ["A cat sits on the mat.", "A kitten rests on a rug.", "The stock market fell on Monday.", "Shares lost value this week."]
    embeddings = sentence_encoder().encode(texts)
    assert embeddings.shape == (4, 384) and torch.allclose(embeddings.norm(dim=1), torch.ones(4), atol=1e-5)
    assert (embeddings @ embeddings.T).fill_diagonal_(-1).argmax(1).tolist() == [1, 0, 3, 2]


@network
@torch.no_grad()
def test_dinov2_agrees_with_the_onnx_graph_that_it_came_from():
    """Values computed once from the wheel's graph with onnx's reference evaluator. The graph resizes its position
    embeddings without antialiasing, timm with, so the test does it the graph's way."""
    model, full = vision_model(img_size=224), vision_model()
    assert full.pos_embed.shape == (1, 1370, 384) and not model.training
    grid = full.pos_embed[:, 1:].reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    patches = torch.nn.functional.interpolate(grid, size=(16, 16), mode="bicubic").flatten(2).mT
    model.pos_embed.data = torch.cat([full.pos_embed[:, :1], patches], 1)
    features = model.forward_features(torch.linspace(0, 300, 3 * 224 * 224).sin().reshape(1, 3, 224, 224))
    assert torch.allclose(features[0, 0, :6], torch.tensor([1.1383, -0.2809, 0.8909, -3.7603, -0.7815, -0.8798]), atol=1e-3)
    assert torch.allclose(features[0, -1, :6], torch.tensor([1.7011, 0.1001, -0.1049, -4.3721, -1.0005, -2.4291]), atol=1e-3)
    assert all((block.ls1.gamma != 1).any() for block in full.blocks), "LayerScale is loaded"


@network
@torch.no_grad()
def test_dinov2_accepts_other_sizes():
    model = vision_model(dynamic_img_size=True)
    for side in (112, 224):
        assert model.forward_features(torch.zeros(1, 3, side, side)).shape == (1, 1 + (side // 14) ** 2, 384)


@network
def test_all_assets_are_sound():
    for name in ASSETS:
        fetch(name)
    assert [row.state for row in status(hashes=True)] == ["ready"] * 3
    assert all(row.size > 80e6 for row in status())


# Photos

def test_photos_shape_range_and_names():
    images, names = photos(64)
    assert images.shape == (15, 3, 64, 64) and images.dtype == torch.float32 and names == list(PHOTOS)
    assert images.min() >= 0 and images.max() <= 1 and (images.std((1, 2, 3)) > 0.02).all()
    assert torch.equal(images, photos(64)[0]), "the same every time"


def test_photos_normalize_and_select():
    plain, names = photos(32, names=["china", "astronaut"])
    normal, _ = photos(32, normalize=True, names=["china", "astronaut"])
    mean, deviation = torch.tensor(timm.data.IMAGENET_DEFAULT_MEAN), torch.tensor(timm.data.IMAGENET_DEFAULT_STD)
    assert names == ["china", "astronaut"]
    assert torch.allclose(normal * deviation.view(3, 1, 1) + mean.view(3, 1, 1), plain, atol=1e-6)


def test_photos_are_antialiased_and_keep_the_centre():
    from PIL import Image
    image = Image.open(photo_path("rocket")).convert("RGB")
    left = (image.width - image.height) // 2
    square = image.crop((left, 0, left + image.height, image.height))
    average = torch.tensor(list(square.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)))) / 255
    small, _ = photos(16, names=["rocket"])
    assert torch.allclose(small[0].mean((1, 2)), average, atol=0.02), "shrinking averages"


@pytest.mark.parametrize("call, match", [(lambda: photos(0), "size must be at least 1, got 0"),
                                         (lambda: photos(8, names=[]), "names must not be empty"),
                                         (lambda: photos(8, names=["chelse"]), "unknown photo 'chelse'; did you mean 'chelsea'"),
                                         (lambda: photo_path("zzz"), "unknown photo 'zzz'; known are astronaut")])
def test_photos_refuse(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_missing_photo_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(AssetError, match="comes with scikit-learn>=1.5, which is not installed"):
        photo_path("china")


def test_photo_files_exist():
    assert all(isinstance(photo_path(name), Path) and photo_path(name).is_file() for name in PHOTOS)
