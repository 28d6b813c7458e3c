"""Toys have the classes and interfaces of what they stand for; the hub's failures are one sentence."""
import sys

import numpy as np
import pytest
import timm
import torch
import transformers

from tokenkit.core.cache import AssetError
from tokenkit.core.hub import (SentenceEncoder, byte_tokenizer, from_hub, hub_causal_lm, hub_dataset, hub_encoder, is_hub, needs, quiet,
                               seeded, timm_model, toy_config)


def test_byte_tokenizer_is_lossless_and_chats():
    tokenizer = byte_tokenizer()
    for text in ("plain", "naïve 日本 🙂\n\t", "  two  spaces ", "<|im_start|>x"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer) == 260 and len(tokenizer("日").input_ids) == 3
    batch = tokenizer(["a", "abc"], padding=True, return_tensors="pt")
    assert batch.input_ids.shape == (2, 3) and batch.attention_mask.tolist() == [[1, 0, 0], [1, 1, 1]]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False).startswith("<|im_start|>user\nhi<|im_end|>")


@pytest.mark.parametrize("name, cls", [
    ("meta-llama/Llama-3.2-1B", "Llama"), ("facebook/opt-6.7b", "OPT"), ("gpt2-xl", "GPT2"), ("EleutherAI/pythia-2.8b", "GPTNeoX"),
    ("EleutherAI/gpt-neo-1.3B", "GPTNeo"), ("bigscience/bloom-560m", "Bloom"), ("Qwen/Qwen2.5-0.5B", "Qwen2"),
    ("Qwen/Qwen3-0.6B", "Qwen3"), ("mistralai/Mistral-7B-v0.1", "Mistral"), ("google/gemma-2b", "Gemma"), ("somebody/unheard-of", "Llama")])
def test_toy_language_models(name, cls):
    model, tokenizer = hub_causal_lm(name, "toy")
    assert type(model).__name__.startswith(cls + "For") or type(model).__name__ == cls + "LMHeadModel"
    assert not model.training and sum(p.numel() for p in model.parameters()) < 500_000
    tokens = tokenizer("abc", return_tensors="pt")
    logits = model(**tokens, use_cache=False).logits
    assert logits.shape == (1, 3, 260) and logits.isfinite().all()
    assert model.generate(**tokens, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, 6)


def test_toys_repeat_and_leave_the_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = hub_causal_lm("x/llama", "toy")[0]
    assert torch.equal(torch.rand(2), expected)
    second = hub_causal_lm("x/llama", "toy")[0]
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters()))


def test_toy_options():
    model, _ = hub_causal_lm("x/llama", "toy", dtype=torch.bfloat16, attn_implementation="eager")
    assert model.dtype == torch.bfloat16
    out = model(torch.tensor([[5, 6, 7]]), output_attentions=True)
    assert out.attentions[0].shape == (1, 4, 3, 3)
    assert toy_config("x/llama").num_key_value_heads == 2


def test_toy_encoder_pools_over_real_tokens_and_has_gradients():
    encoder = hub_encoder("sentence-transformers/all-MiniLM-L6-v2", "toy")
    together = encoder.encode(["a", "a much longer text"], batch_size=2)
    assert together.shape == (2, 384) and torch.allclose(together.norm(dim=1), torch.ones(2), atol=1e-5)
    assert torch.allclose(together[:1], encoder.encode(["a"]), atol=1e-5), "padding changes nothing"
    tokens = encoder.tokenizer(["abc"], return_tensors="pt")
    embeds = encoder.model.get_input_embeddings()(tokens.input_ids).detach().requires_grad_()
    encoder(inputs_embeds=embeds, attention_mask=tokens.attention_mask)[0, 0].backward()
    assert embeds.grad.abs().sum() > 0
    for bad in ([], "one string"):
        with pytest.raises(ValueError, match="non-empty list"):
            encoder.encode(bad)


@pytest.mark.parametrize("name", ["deit_small_patch16_224.fb_in1k", "deit_base_distilled_patch16_224.fb_in1k", "timm/vit_base_patch16_224.augreg_in1k",
                                  "vit_small_patch14_reg4_dinov2.lvd142m", "swin_tiny_patch4_window7_224.ms_in1k", "convnext_tiny.fb_in1k",
                                  "davit_tiny.msft_in1k", "resnet18.a1_in1k"])
def test_toy_timm_models(name):
    architecture = name.removeprefix("timm/").split(".")[0]
    size = {"img_size": 56} if "dinov2" in name else {}
    model = timm_model(name, "toy", num_classes=7, **size)
    with torch.device("meta"):
        full = timm.create_model(architecture, pretrained=False)
    assert type(model) is type(full) and not model.training
    side = 56 if "dinov2" in name else 224
    with torch.no_grad():
        assert model(torch.zeros(1, 3, side, side)).shape == (1, 7)


def test_toy_timm_keeps_depth():
    assert len(timm_model("vit_large_patch16_224", "toy").blocks) == 24


def test_unknown_timm_model():
    with pytest.raises(ValueError, match="no model 'deit_smal_patch16_224'; did you mean 'deit_small_patch16_224'"):
        timm_model("deit_smal_patch16_224", "toy")
    with pytest.raises(TypeError, match="nonsense"):
        timm_model("vit_tiny_patch16_224", "toy", nonsense=1)


def test_toy_dataset():
    rows = hub_dataset("ILSVRC/imagenet-1k", "validation", n=20, source="toy", classes=4)
    assert [row["label"] for row in rows] == [i % 4 for i in range(20)] and rows[0]["image"].mode == "RGB"
    colours = np.array([np.asarray(row["image"]).mean((0, 1)) for row in rows])
    labels = np.arange(20) % 4
    centre = np.array([colours[labels == c].mean(0) for c in range(4)])
    nearest = ((colours[:, None] - centre) ** 2).sum(-1).argmin(1)
    assert (nearest == labels).all(), "a toy image's colour tells its label"
    again = hub_dataset("ILSVRC/imagenet-1k", n=20, source="toy", classes=4)
    assert all(a["image"].tobytes() == b["image"].tobytes() for a, b in zip(rows, again))
    text = hub_dataset("any", n=2, source="toy", columns={"text": "content"})
    assert list(text[0]) == ["text"] and isinstance(text[0]["text"], str)


@pytest.mark.parametrize("options, match", [({"n": 0}, "n must be at least 1"), ({"columns": {"img": "image"}}, "columns must be among image, label, text"),
                                            ({"source": "disk"}, "source must be 'hub' or 'toy', got 'disk'")])
def test_dataset_refuses(options, match):
    with pytest.raises(ValueError, match=match):
        hub_dataset("any", **{"source": "toy"} | options)


def test_hub_path_renames_columns(monkeypatch):
    import datasets
    from PIL import Image

    asked = {}

    class Stream:
        def take(self, n):
            return [{"img": Image.new("L", (4, 4)), "fine_label": i} for i in range(n)]

    def load(*args, **kwargs):
        asked.update(args=args, **kwargs)
        return Stream()

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = hub_dataset("uoft-cs/cifar100", "test", n=3, columns={"image": "img", "label": "fine_label"})
    assert asked == {"args": ("uoft-cs/cifar100", None), "split": "test", "streaming": True}
    assert [row["label"] for row in rows] == [0, 1, 2] and rows[0]["image"].mode == "RGB"


def test_hub_loads_by_name(tmp_path, monkeypatch):
    """A folder is as good as a name: what hub_causal_lm does with the real thing."""
    model, tokenizer = hub_causal_lm("x/llama", "toy")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, words = hub_causal_lm(str(tmp_path), "hub")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), loaded.parameters())) and words("ab").input_ids == tokenizer("ab").input_ids
    made = {}
    monkeypatch.setattr(timm, "create_model", lambda name, **options: made.update(name=name, **options) or torch.nn.Identity())
    timm_model("timm/deit_small_patch16_224.fb_in1k", img_size=384)
    assert made == {"name": "deit_small_patch16_224.fb_in1k", "pretrained": True, "img_size": 384}


def test_hub_failures_are_one_sentence(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("cannot connect\nand a page of advice")
    for loader in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        monkeypatch.setattr(loader, "from_pretrained", fail)
    monkeypatch.setattr(timm, "create_model", fail)
    for call in (lambda: hub_causal_lm("a/b"), lambda: hub_encoder("a/b"), lambda: timm_model("resnet18.a1_in1k")):
        with pytest.raises(AssetError, match="could not be loaded from the Hugging Face Hub .OSError: cannot connect.; check the name") as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(AssetError, match="no details"), from_hub("a/b"):
        raise OSError
    with pytest.raises(KeyboardInterrupt), from_hub("a/b"):
        raise KeyboardInterrupt


def test_small_helpers():
    assert is_hub("hub") and not is_hub("toy")
    with pytest.raises(ValueError, match="got None"):
        is_hub(None)
    needs("json", "notebooks")
    with pytest.raises(AssetError, match=r"pip install 'tokenkit\[notebooks\]'"):
        needs("no_such_module", "notebooks")
    logging = transformers.utils.logging
    logging.enable_progress_bar()
    with quiet():
        assert not logging.is_progress_bar_enabled()
    assert logging.is_progress_bar_enabled()
    with seeded():
        a = torch.rand(1)
    with seeded():
        assert torch.equal(a, torch.rand(1))
    assert isinstance(SentenceEncoder.__doc__, str) and "tokenkit.core.hub" in sys.modules
