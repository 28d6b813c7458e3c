"""Bytes and tokens: nothing is lost, costs are those of the bytes, and a model keeps what its new vocabulary shares with the old."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BertModel, BertConfig, ByT5Tokenizer, PreTrainedTokenizerFast

from tokenkit.text.engine import (BYTE_TO_CHAR, CHAR_TO_BYTE, PrefixIndex, bits_per_byte, bytes_per_token, decompose, encode_bytes, entry_bytes,
                                  mean_embeddings, set_vocabulary, start_ids, tokenizer_kind, train_bpe, valid_text, vocab_bytes)

TEXTS = ["The docs say: it's 12 o'clock, naïve ☕.", "\n\n  def f(self):\n\treturn 1\n", "a", "Ünïcödé and  spaces "]


def joined(tokenizer, ids):
    vocab = vocab_bytes(tokenizer)
    return b"".join(vocab[i] for i in ids)


class Uniform(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, ids):
        return torch.zeros(*ids.shape, self.size)


# alphabet and vocabulary

def test_the_alphabet_is_gpt2s():
    assert sorted(CHAR_TO_BYTE) == sorted(pre_tokenizers.ByteLevel.alphabet()) and len(BYTE_TO_CHAR) == 256
    assert all(CHAR_TO_BYTE[BYTE_TO_CHAR[b]] == b for b in range(256))
    assert (BYTE_TO_CHAR[32], BYTE_TO_CHAR[10], BYTE_TO_CHAR[65]) == ("Ġ", "Ċ", "A")


def test_kinds(tokenizers):
    assert {name: tokenizer_kind(t) for name, t in tokenizers.items()} == {"words": "byte-level", "digits": "byte-level", "prefix": "sentencepiece",
                                                                            "whole": "sentencepiece", "unigram": "sentencepiece", "wordpiece": "wordpiece"}


def test_an_unknown_kind_is_named():
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    for tokenizer in (plain, ByT5Tokenizer()):
        for function in (tokenizer_kind, vocab_bytes):
            with pytest.raises(ValueError, match=type(tokenizer).__name__):
                function(tokenizer)


@pytest.mark.parametrize("entry, kind, expected", [
    ("ĠcafÃ©", "byte-level", " café".encode()), ("▁café", "sentencepiece", " café".encode()), ("<0xE2>", "sentencepiece", b"\xe2"), ("<0x0a>", "sentencepiece", b"\n"),
    ("##ing", "wordpiece", b"ing"), ("ing", "wordpiece", b" ing"), ("▁▁", "sentencepiece", b"  "), ("日本", "byte-level", "日本".encode())])
def test_entries(entry, kind, expected):
    assert entry_bytes(entry, kind) == expected


def test_vocab_bytes_has_one_entry_an_id(tokenizers):
    for tokenizer in tokenizers.values():
        vocab = vocab_bytes(tokenizer)
        assert len(vocab) == len(tokenizer)
        assert [i for i, entry in enumerate(vocab) if entry is None] == sorted(tokenizer.all_special_ids)
        assert all(isinstance(entry, bytes) and entry for entry in vocab if entry is not None)


def test_added_tokens_are_literal(tokenizers):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizers["words"].backend_tokenizer.to_str()))
    tokenizer.add_tokens(["<tool é>"])
    assert vocab_bytes(tokenizer)[-1] == "<tool é>".encode()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert vocab_bytes(tokenizer)[-1] is None


# bytes to ids and back

@pytest.mark.parametrize("name", ["words", "digits"])
@settings(max_examples=40, deadline=None)
@given(data=st.one_of(st.binary(max_size=40), st.text(max_size=30).map(str.encode)))
def test_bytes_come_back(tokenizers, name, data):
    assert joined(tokenizers[name], encode_bytes(tokenizers[name], data)) == data


@pytest.mark.parametrize("name", ["words", "digits", "prefix", "whole", "unigram", "wordpiece"])
@settings(max_examples=25, deadline=None)
@given(text=st.text(st.sampled_from("the docs\n '12é☕.,"), max_size=20))
def test_text_is_encoded_as_the_tokenizer_does(tokenizers, name, text):
    assert encode_bytes(tokenizers[name], text.encode()) == tokenizers[name](text, add_special_tokens=False).input_ids


@settings(max_examples=40, deadline=None)
@given(data=st.binary(max_size=12))
def test_valid_text_is_the_longest(data):
    text, tail = valid_text(data)
    assert text.encode() + tail == data
    assert not tail or all(data[:n].decode(errors="ignore").encode() != data[:n] for n in range(len(data) - len(tail) + 1, len(data) + 1))


def test_sentencepiece_spells_broken_characters(tokenizers):
    half = "☕".encode()[:2]
    for name, space in (("whole", b""), ("prefix", b" ")):
        assert joined(tokenizers[name], encode_bytes(tokenizers[name], b"the" + half)) == space + b"the" + half


def test_bytes_that_cannot_be_spelled(tokenizers):
    for name in ("wordpiece", "unigram"):
        with pytest.raises(ValueError, match="cannot spell"):
            encode_bytes(tokenizers[name], b"the\xff")
    with pytest.raises(ValueError, match="data must be bytes, got str"):
        encode_bytes(tokenizers["words"], "text")
    assert decompose(tokenizers["wordpiece"], "☕".encode(), strict=False) == []


def test_decompose_does_not_split_words(tokenizers):
    tokenizer = tokenizers["words"]
    assert joined(tokenizer, decompose(tokenizer, b"the docs, the end")) == b"the docs, the end"
    word = tokenizers["wordpiece"]
    assert word.convert_ids_to_tokens(decompose(word, b" tokenizers")) == ["token", "##izer", "##s"]
    assert word.convert_ids_to_tokens(decompose(word, b"izers")) == ["##izer", "##s"]


# prefixes

@settings(max_examples=60, deadline=None)
@given(vocab=st.lists(st.one_of(st.none(), st.binary(min_size=1, max_size=3), st.text("ab\xff", min_size=1, max_size=4).map(lambda s: s.encode("latin-1"))), max_size=20),
       prefix=st.one_of(st.binary(max_size=2), st.sampled_from([b"", b"a", b"ab", b"\xff", b"\xff\xff", b"a\xff"])))
def test_prefix_index_is_a_scan(vocab, prefix):
    index = PrefixIndex(vocab)
    assert index.starting_with(prefix) == [i for i, entry in enumerate(vocab) if entry is not None and entry.startswith(prefix)]
    assert index.max_len() == max((len(entry) for entry in vocab if entry is not None), default=0)


# costs

@pytest.mark.parametrize("name", ["words", "prefix", "unigram", "wordpiece"])
@pytest.mark.parametrize("context", [2, 5, 256])
def test_a_uniform_model_pays_log_v_a_token(tokenizers, name, context):
    tokenizer = tokenizers[name]
    texts = ["the docs", "reader"] if name == "wordpiece" else TEXTS
    if start_ids(tokenizer):
        expected = math.log2(len(tokenizer)) / bytes_per_token(tokenizer, texts)
        assert bits_per_byte(Uniform(len(tokenizer)), tokenizer, texts, context=context) == pytest.approx(expected, rel=1e-6)


def test_bits_per_byte_by_hand(tokenizers, tiny):
    tokenizer, model, context = tokenizers["words"], tiny("llama", len(tokenizers["words"])), 6
    total = 0.0
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        for at in range(0, len(ids), context):
            row = [tokenizer.bos_token_id, *ids[at:at + context]]
            logs = model(torch.tensor([row])).logits[0].log_softmax(-1)
            total -= sum(logs[j, row[j + 1]].item() for j in range(len(row) - 1))
    expected = total / math.log(2) / sum(len(text.encode()) for text in TEXTS)
    model.train()
    assert bits_per_byte(model, tokenizer, TEXTS, context=context) == pytest.approx(expected, rel=1e-5)
    assert model.training, "the model's mode is restored"
    assert bits_per_byte(model, tokenizer, [*TEXTS, ""], context=context) == pytest.approx(expected, rel=1e-5)


def test_without_a_start_token_each_chunks_first_is_left_out(tokenizers):
    backend = Tokenizer.from_str(tokenizers["words"].backend_tokenizer.to_str())
    bare = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert start_ids(bare) == [] and start_ids(tokenizers["words"]) == [0] and start_ids(tokenizers["unigram"]) == [1]
    ids, vocab = bare(TEXTS[0]).input_ids, vocab_bytes(bare)
    chunks = [ids[at:at + 4] for at in range(0, len(ids), 4)]
    tokens, left = sum(len(c) - 1 for c in chunks), sum(len(vocab[c[0]]) for c in chunks)
    expected = tokens * math.log2(len(bare)) / (len(TEXTS[0].encode()) - left)
    assert bits_per_byte(Uniform(len(bare)), bare, [TEXTS[0]], context=4) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="longer than one token"):
        bits_per_byte(Uniform(len(bare)), bare, ["a"])


def test_costs_refuse(tokenizers):
    tokenizer = tokenizers["words"]
    for texts in ([], [""], "the docs"):
        with pytest.raises(ValueError, match="texts must be a list of strings"):
            bits_per_byte(Uniform(380), tokenizer, texts)
        with pytest.raises(ValueError, match="texts must be a list of strings"):
            bytes_per_token(tokenizer, texts)
    with pytest.raises(ValueError, match="context must be at least 2, got 1"):
        bits_per_byte(Uniform(380), tokenizer, ["the"], context=1)


# a new vocabulary

def test_train_bpe():
    tokenizer = train_bpe(TEXTS * 3, 300, special_tokens=["<bos>", "<pad>"])
    assert len(tokenizer) == 300 and tokenizer.bos_token == tokenizer.eos_token == "<bos>"
    assert tokenizer.convert_tokens_to_ids(["<bos>", "<pad>"]) == [0, 1] and vocab_bytes(tokenizer)[:2] == [None, None]
    assert {bytes([b]) for b in range(256)} <= set(vocab_bytes(tokenizer))
    assert tokenizer.convert_ids_to_tokens(tokenizer("a b").input_ids)[0] == "a", "no space in front"
    assert len(train_bpe(["ab"], 5000)) == 256, "smaller if there is nothing to merge"
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_train_bpe_refuses():
    for texts in ([], [""], "text"):
        with pytest.raises(ValueError, match="texts must be a list"):
            train_bpe(texts, 300)
    with pytest.raises(ValueError, match=r"256 bytes \+ 2 special tokens, got 257"):
        train_bpe(TEXTS, 257, special_tokens=["<a>", "<b>"])


def test_mean_embeddings_by_hand(tokenizers):
    tokenizer = tokenizers["words"]
    vocab, weight = vocab_bytes(tokenizer), torch.randn(len(tokenizer) + 4, 6, dtype=torch.float64, requires_grad=True)
    own = [i for i, entry in enumerate(vocab) if entry is not None][::17]
    assert torch.equal(mean_embeddings([vocab[i] for i in own], tokenizer, weight), weight[own])
    assert torch.equal(mean_embeddings([b"<|endoftext|>"], tokenizer, weight)[0], weight[0])
    new = [b"zq\xff", " the docs".encode() * 3]
    out = mean_embeddings(new, tokenizer, weight)
    for row, token in zip(out, new):
        ids = decompose(tokenizer, token)
        assert len(ids) > 1 and joined(tokenizer, ids) == token
        torch.testing.assert_close(row, weight[ids].mean(0))
    out.sum().backward()
    assert weight.grad.abs().sum() > 0
    assert mean_embeddings(new, tokenizer, weight.detach().half()).dtype == torch.float16


def test_mean_embeddings_without_parts(tokenizers):
    weight = torch.randn(len(tokenizers["wordpiece"]), 4)
    torch.testing.assert_close(mean_embeddings(["☕".encode()], tokenizers["wordpiece"], weight)[0], weight.mean(0))


def test_mean_embeddings_refuses(tokenizers):
    weight = torch.zeros(380, 4)
    for tokens in ([], [b"a", b""]):
        with pytest.raises(ValueError, match="non-empty list of non-empty byte strings"):
            mean_embeddings(tokens, tokenizers["words"], weight)
    for bad in (weight[:10], weight[0]):
        with pytest.raises(ValueError, match=r"weight must be \(V, D\)"):
            mean_embeddings([b"a"], tokenizers["words"], bad)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_its_own_rows_change_nothing(tokenizers, tiny, kind, tied):
    tokenizer = tokenizers["words"]
    model = tiny(kind, len(tokenizer), tie_word_embeddings=tied)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows, ids = model.get_input_embeddings().weight, torch.tensor([tokenizer(TEXTS[0]).input_ids])
    same = set_vocabulary(model, tokenizer, rows)
    assert torch.equal(same(ids).logits, model(ids).logits)
    assert (same.get_output_embeddings().weight is same.get_input_embeddings().weight) == tied
    same.get_input_embeddings().weight.data.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "the original is unchanged"


@pytest.mark.parametrize("tied", [True, False])
def test_another_vocabulary(tokenizers, tiny, tied, tmp_path):
    old, new = tokenizers["words"], train_bpe(TEXTS, 300, special_tokens=["<bos>", "<pad>"])
    new.pad_token = "<pad>"
    model = tiny("llama", len(old), tie_word_embeddings=tied)
    rows = torch.randn(len(new), 32)
    made = set_vocabulary(model, new, rows, None if tied else 2 * rows)
    assert made.config.vocab_size == made.vocab_size == len(new) and model.config.vocab_size == len(old)
    assert (made.config.bos_token_id, made.config.eos_token_id, made.config.pad_token_id, made.generation_config.pad_token_id) == (0, 0, 1, 1)
    ids = torch.tensor([new(TEXTS[0]).input_ids])
    logits = made(ids).logits
    assert logits.shape[-1] == len(new) and torch.isfinite(made(ids, labels=ids).loss)
    made.save_pretrained(tmp_path), new.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, logits) and again.config.tie_word_embeddings == tied
    assert AutoTokenizer.from_pretrained(tmp_path)(TEXTS[0]).input_ids == ids[0].tolist()
    assert made.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False).shape[1] <= ids.shape[1] + 3


def test_separate_output_rows_untie(tokenizers, tiny, tmp_path):
    model = tiny("llama", 380, tie_word_embeddings=True)
    rows = model.get_input_embeddings().weight.detach()
    made = set_vocabulary(model, tokenizers["words"], rows, 2 * rows)
    ids = torch.tensor([[5, 6, 7]])
    assert not made.config.tie_word_embeddings and model.config.tie_word_embeddings
    torch.testing.assert_close(made(ids).logits, 2 * model(ids).logits)
    made.save_pretrained(tmp_path)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, made(ids).logits)


def test_rows_keep_the_models_dtype_and_train(tokenizers, tiny):
    model = tiny("llama", 380, dtype=torch.bfloat16)
    made = set_vocabulary(model, tokenizers["words"], torch.randn(380, 32), torch.randn(380, 32))
    assert made.get_input_embeddings().weight.dtype == torch.bfloat16
    made(torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).loss.backward()
    assert made.get_input_embeddings().weight.grad is not None and made.get_output_embeddings().weight.grad is not None


def test_set_vocabulary_refuses(tokenizers, tiny):
    model, rows = tiny("llama", 400, tie_word_embeddings=False), torch.zeros(380, 32)
    for bad in (rows[:-1], torch.zeros(380, 31)):
        with pytest.raises(ValueError, match=r"input_embeddings must be \(380, 32\)"):
            set_vocabulary(model, tokenizers["words"], bad, rows)
    with pytest.raises(ValueError, match=r"output_embeddings must be \(380, 32\)"):
        set_vocabulary(model, tokenizers["words"], rows, rows[:-1])
    with pytest.raises(ValueError, match="output_embeddings are needed"):
        set_vocabulary(model, tokenizers["words"], rows)
    encoder = BertModel(BertConfig(vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
    with pytest.raises(ValueError, match="BertModel has no output head"):
        set_vocabulary(encoder, tokenizers["words"], rows, rows)
    assert set_vocabulary(encoder, tokenizers["words"], rows)(torch.tensor([[1]])).last_hidden_state.shape == (1, 1, 32)


@pytest.mark.network
def test_smollm2():
    from tokenkit.core.assets import fetch

    tokenizer = AutoTokenizer.from_pretrained(fetch("smollm2-135m-instruct"))
    vocab = vocab_bytes(tokenizer)
    index = PrefixIndex(vocab)
    assert len(index.starting_with(b"")) == len([entry for entry in vocab if entry is not None]) and None in vocab
    for text in TEXTS:
        assert encode_bytes(tokenizer, text.encode()) == tokenizer(text, add_special_tokens=False).input_ids
        for data in (text.encode()[:n] for n in range(len(text.encode()))):
            assert b"".join(vocab[i] for i in encode_bytes(tokenizer, data)) == data
