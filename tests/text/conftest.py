"""Small tokenizers of all kinds, and a small language model."""
import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, BertTokenizerFast, PreTrainedTokenizerFast

from tokenkit.text.engine import train_bpe

TEXTS = ["The interpreter reads the documentation and then it's done.\n\nWe're reading the docs: 12 lines, 345 words.",
         "def area(self):\n    return self.width * self.height\n\n\ndef areas(self):\n        return [self.area()]\n",
         "naïve cafés, ☕ and tea; they'll say \"it isn't\"...  twice   over.\tThe end of the text is here. " * 3]


def byte_bpe(digits=False, size=380):
    tokenizer = train_bpe(TEXTS, size, special_tokens=["<|endoftext|>"], min_frequency=1)
    if digits:
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>", clean_up_tokenization_spaces=False)
    return tokenizer


def sentencepiece(prefix=True):
    """As Llama 2's: no splitting, spaces are ▁, unknown characters are bytes."""
    spaces = [normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")]
    learned = Tokenizer(models.BPE())
    learned.normalizer = normalizers.Sequence(spaces)
    learned.train_from_iterator([line for text in TEXTS for line in text.splitlines()], trainers.BpeTrainer(vocab_size=160, show_progress=False))
    spec = json.loads(learned.to_str())["model"]
    first = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    vocab = {entry: i for i, entry in enumerate([*first, *spec["vocab"]])}
    backend = Tokenizer(models.BPE(vocab, [tuple(pair) for pair in spec["merges"]], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = learned.normalizer
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False)


def unigram():
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁the", -2.0), ("▁doc", -3.0), ("s", -3.5), ("▁", -4.0), *((c, -5.0 - i / 10) for i, c in enumerate("abcdefghijklmnopqrtuvwxyz.,é"))]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def wordpiece(folder):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "token", "##ize", "##izer", "##s", "read", "##er", *"abcdefghijklmnopqrstuvwxyz.", *("##" + c for c in "abcdefghijklmnopqrstuvwxyz")]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(words)), encoding="utf-8")
    return BertTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    return {"words": byte_bpe(), "digits": byte_bpe(digits=True), "prefix": sentencepiece(), "whole": sentencepiece(prefix=False),
            "unigram": unigram(), "wordpiece": wordpiece(tmp_path_factory.mktemp("wordpiece"))}


@pytest.fixture(scope="session")
def tiny():
    """Random causal models that are not indifferent: tiny(kind, vocab_size, ...)."""
    def make(kind="llama", vocab=380, scale=3.0, dtype=torch.float32, **more):
        torch.manual_seed(0)
        sizes = dict(vocab_size=vocab, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=256,
                     bos_token_id=0, eos_token_id=0, pad_token_id=0, **more)
        if kind in ("gpt2", "bloom", "mamba", "gpt_neo"):
            sizes.pop("intermediate_size")
        if kind == "gpt_neo":
            sizes |= dict(num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=8)
        if kind == "qwen3":
            sizes |= dict(head_dim=8, num_key_value_heads=2)
        if kind == "mamba":
            sizes = dict(vocab_size=vocab, hidden_size=32, num_hidden_layers=2, state_size=4, bos_token_id=0, eos_token_id=0, pad_token_id=0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), dtype=dtype).eval()
        for p in model.parameters():
            p.data.mul_(scale if p.ndim > 1 else 1)
        return model
    return make
