"""A hypernetwork over surface forms: its parts by their definitions, its invariants, and models that speak a new tokenizer."""
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokenkit.text.dynamic_tok import parts_of, token_bytes, token_strings
from tokenkit.text.engine import BYTE_TO_CHAR, bits_per_byte, mean_embeddings, train_bpe, vocab_bytes
from tokenkit.text.zett import (Hypernetwork, ProjectorBlock, Rescaler, fvt, lexical_loss, match_scale, pad_of, predicted_rows, read_vocabulary, sample_vocabulary,
                                source_rows, surface_forms, transfer, unigram_tokenizer)

LETTERS = {"a": 0, "b": 1, "c": 2, "z": 9}
SPELL = lambda token: [LETTERS[char] for char in token]
TOKENS = st.lists(st.text("abcz", min_size=1, max_size=5), min_size=1, max_size=6)
TEXTS = ["The interpreter reads the documentation, and it's done.", "def area(self):\n    return self.width * self.height\n", "naïve cafés ☕"]


def small(**more):
    torch.manual_seed(0)
    return Hypernetwork(**(dict(n_embd=8, vocab_size=12, pad_id=3, hidden_size=16, intermediate_size=24, n_layers=2, n_heads=2) | more)).eval()


def random_surface(rows=7, columns=5, top=12, pad=3, seed=0):
    lots = torch.Generator().manual_seed(seed)
    surface = torch.randint(0, top, (rows, columns), generator=lots)
    surface[surface == pad] = 4
    return torch.where(torch.arange(columns) < torch.randint(1, columns + 1, (rows, 1), generator=lots), surface, pad)


# surface forms, averages, lexical loss

@settings(max_examples=30, deadline=None)
@given(TOKENS, st.integers(1, 4))
def test_surface_forms_by_definition(tokens, max_len):
    surface, cut = surface_forms(tokens, SPELL, max_len, 7, {"ab": 5})
    assert surface.shape == (len(tokens), max_len) and surface.dtype == torch.int64
    for token, row in zip(tokens, surface.tolist()):
        ids = [5] if token == "ab" else SPELL(token)
        assert row == (ids + [7] * max_len)[:max_len]
    assert cut == sum(len(token) > max_len and token != "ab" for token in tokens)


def test_bad_surface_forms():
    with pytest.raises(ValueError, match="max_len must be at least 1"):
        surface_forms(["a"], SPELL, 0, 0)
    for tokens in ([], ["a", ""], "ab"):
        with pytest.raises(ValueError, match="tokens must be a list"):
            surface_forms(tokens, SPELL, 2, 0)
        with pytest.raises(ValueError, match="tokens must be a list"):
            fvt(tokens, LETTERS, SPELL, torch.eye(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@settings(max_examples=15, deadline=None)
@given(tokens=TOKENS)
def test_averages_by_definition(dtype, tokens):
    source = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    vocab = {"a": 0, "b": 1, "c": 2, "ab": 3, "cc": 8} # "cc" has no row: by its parts
    for fallback in (None, torch.arange(6).to(dtype)):
        rows = fvt(tokens, vocab, SPELL, source, fallback=fallback)
        assert rows.dtype == dtype
        for token, row in zip(tokens, rows):
            if token in vocab and vocab[token] < 4:
                assert torch.equal(row, source[vocab[token]])
            else:
                lost = source.mean(0) if fallback is None else fallback
                expected = lost if "z" in token else source[SPELL(token)].mean(0)
                torch.testing.assert_close(row, expected, atol=0.02 if dtype == torch.bfloat16 else 1e-6, rtol=0.02)


def test_averages_learn_and_refuse():
    source = torch.randn(4, 6, requires_grad=True)
    fvt(["ab", "c", "zz"], {"c": 2}, SPELL, source, fallback=torch.zeros(6)).sum().backward()
    torch.testing.assert_close(source.grad, torch.tensor([0.5, 0.5, 1, 0])[:, None].expand(4, 6))
    assert torch.equal(fvt(["q"], {}, lambda token: [], source), source.mean(0, keepdim=True))
    for bad in (dict(source=torch.zeros(4)), dict(source=torch.zeros(4, 6), fallback=torch.zeros(5))):
        with pytest.raises(ValueError, match="source must be"):
            fvt(["a"], LETTERS, SPELL, **bad)


def test_averages_are_the_engines(tokenizers):
    tokenizer, target = tokenizers["words"], train_bpe(TEXTS, 300, min_frequency=1)
    weight = torch.randn(len(tokenizer), 8)
    parts = parts_of(tokenizer)
    rows = fvt(token_strings(target), tokenizer.get_vocab(), lambda token: parts(token_bytes(token)), weight)
    torch.testing.assert_close(rows, mean_embeddings(vocab_bytes(target), tokenizer, weight))


def test_lexical_loss_by_definition():
    source, surface = torch.randn(12, 8), random_surface()
    pred = torch.randn(7, 8, requires_grad=True)
    known = [row[1:].eq(3).all().item() for row in surface]
    assert any(known) and not all(known)
    total = sum(((pred[i] - source[surface[i, 0]]) ** 2).sum() for i in range(7) if known[i]) / (sum(known) + 1e-8)
    loss = lexical_loss(pred, source, surface, 3)
    torch.testing.assert_close(loss, total / torch.stack([source[i].norm() for i in surface[:, 0]]).mean())
    loss.backward()
    assert (pred.grad.abs().sum(1) > 0).tolist() == known
    assert lexical_loss(source[surface[:, 0]], source, surface, 3) == 0
    assert lexical_loss(torch.ones(1, 8), source, torch.full((1, 5), 3), 3) > 0, "the padding token counts"
    assert lexical_loss(pred, source, surface[:, :1], 3) > 0 and lexical_loss(pred[:1], source, torch.tensor([[1, 2]]), 3) == 0


def test_bad_lexical_loss():
    for pred, source, surface in ((torch.zeros(2, 3), torch.zeros(5, 4), torch.zeros(2, 2).long()), (torch.zeros(2, 4), torch.zeros(5, 4), torch.zeros(3, 2).long()),
                                  (torch.zeros(4), torch.zeros(5, 4), torch.zeros(4, 2).long())):
        with pytest.raises(ValueError, match=r"pred must be \(V, E\)"):
            lexical_loss(pred, source, surface, 0)


# sampled vocabularies

@settings(max_examples=20, deadline=None)
@given(st.lists(st.text("ab -é\n", max_size=12), min_size=1, max_size=4), st.integers(257, 270), st.integers(2, 6))
def test_sampling_by_definition(texts, vocab_size, max_length):
    split = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    score = {}
    for text in texts:
        for word, _ in split(text):
            for i in range(len(word)):
                for k in range(1, max_length):
                    if i + k <= len(word):
                        score[word[i:i + k]] = score.get(word[i:i + k], 0) + k
    best = sorted(((piece, math.log(value / sum(score.values()))) for piece, value in score.items() if len(piece) > 1), key=lambda pair: -pair[1])[:vocab_size - 256]
    found = sample_vocabulary(texts, vocab_size, max_length=max_length)
    assert len(found) == len(best) + 256 and sorted(char for char, _ in found[-256:]) == sorted(BYTE_TO_CHAR.values())
    assert sorted(round(value, 9) for _, value in found[:-256]) == sorted(round(value, 9) for _, value in best)
    assert all(value == pytest.approx(math.log(score[piece] / sum(score.values()))) for piece, value in found[:-256])
    if best:
        assert {value for _, value in found[-256:]} == {found[-257][1]} and [v for _, v in found[:-256]] == sorted((v for _, v in found[:-256]), reverse=True)


def test_ties_go_to_the_first_and_noise_to_the_generator():
    assert [piece for piece, _ in sample_vocabulary(["ab cd"], 258)[:2]] == ["Ġcd", "ab"]
    assert [piece for piece, _ in sample_vocabulary(["xy", "ab"], 258)[:2]] == ["xy", "ab"]
    draw = lambda seed: sample_vocabulary(TEXTS, 300, noise_std=0.01, generator=torch.Generator().manual_seed(seed))
    assert draw(0) == draw(0) != draw(1) and sample_vocabulary(TEXTS, 300) == sample_vocabulary(TEXTS, 300)
    assert any(value == -100_000 for _, value in sample_vocabulary(TEXTS, 2000, noise_std=10.0, generator=torch.Generator().manual_seed(0)))


def test_bad_sampling():
    for bad, words in ((dict(vocab_size=256), "vocab_size must be at least 257"), (dict(texts=[]), "texts must be a list"), (dict(texts="abc"), "texts must be a list"),
                       (dict(max_length=1), "max_length must be at least 2"), (dict(noise_std=-1.0), "noise_std not negative"), (dict(noise_std=math.nan), "noise_std not negative")):
        with pytest.raises(ValueError, match=words):
            sample_vocabulary(**(dict(texts=TEXTS, vocab_size=300) | bad))


def test_a_sampled_tokenizer_spells_everything():
    tokenizer = unigram_tokenizer(sample_vocabulary(TEXTS, 300), ["<s>", "<t>"])
    assert tokenizer.convert_tokens_to_ids(["<s>", "<t>"]) == [0, 1] and tokenizer.bos_token == tokenizer.eos_token == tokenizer.pad_token == "<s>"
    vocab = vocab_bytes(tokenizer)
    for text in (*TEXTS, "日本\x00 unseen\t!"):
        assert b"".join(vocab[i] for i in tokenizer(text, add_special_tokens=False).input_ids).decode() == text
    with pytest.raises(ValueError, match="special_tokens must hold"):
        unigram_tokenizer([], [])


# the hypernetwork

def plain_forward(state, surface, source, *, vocab_size, pad_id, n_layers, n_heads, n_embd, lang=None):
    """The same network from its weights, in plain operations."""
    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name, x, eps):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def block(name, x):
        return norm(f"{name}.ln", x + F.gelu(linear(f"{name}.dense2", F.gelu(linear(f"{name}.dense1", x), approximate="tanh")), approximate="tanh"), 1e-6)

    scale = lambda name, x: state[f"{name}.w"] * x + state[f"{name}.b"] if f"{name}.w" in state else x
    answers = []
    for row in surface:
        x = torch.stack([state["fallback_embeddings.weight"][i - vocab_size] if i >= vocab_size else scale("in_scaler", source[i])[0] if "in_scaler.w" in state else source[i]
                         for i in row.tolist()])
        x = block("input_projection.1", linear("input_projection.0", x))
        x = x + state["model.embeddings.position_embeddings.weight"][:len(x)] + state["model.embeddings.token_type_embeddings.weight"][0]
        seen = row != pad_id
        if lang is not None:
            x, seen = torch.cat([x, state["lang_embeddings.weight"][lang][None]]), torch.cat([seen, torch.tensor([True])])
        x = norm("model.embeddings.LayerNorm", x, 1e-5)
        for n in range(n_layers):
            name = f"model.encoder.layer.{n}."
            q, k, v = (linear(f"{name}attention.self.{kind}", x).view(len(x), n_heads, -1).transpose(0, 1) for kind in ("query", "key", "value"))
            weights = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, -math.inf).softmax(-1)
            x = norm(f"{name}attention.output.LayerNorm", x + linear(f"{name}attention.output.dense", (weights @ v).transpose(0, 1).flatten(1)), 1e-5)
            x = norm(f"{name}output.LayerNorm", x + linear(f"{name}output.dense", F.gelu(linear(f"{name}intermediate.dense", x))), 1e-5)
        out = linear("output_projection.1", block("output_projection.0", x[0]))
        second = linear("output_projection_out.1", block("output_projection_out.0", x[0])) if "output_projection_out.1.weight" in state else out[n_embd:]
        bias = linear("bias_projection", x[0]) if "bias_projection.weight" in state else torch.zeros(1)
        answers.append((scale("scaler", out[:n_embd]).flatten(), scale("out_scaler", second).flatten() if len(second) else None, bias[0]))
    return answers


@pytest.mark.parametrize("options", [dict(), dict(rescale=True, predict_bias=True, n_extra_tokens=3), dict(separate_out=True, rescale=True), dict(separate_out=True, single_head=True),
                                     dict(n_langs=3, predict_bias=True), dict(pad_id=0, separate_out=True, n_langs=2, n_extra_tokens=0)])
def test_the_network_by_plain_operations(options):
    network = small(**options)
    with torch.no_grad():
        for name, p in network.named_parameters():
            p.copy_(torch.randn(p.shape) * 0.3 + ("scaler.w" in name or "LayerNorm.weight" in name or "ln.weight" in name))
    source = torch.randn(12, network.width)
    surface = random_surface(top=12 + max(options.get("n_extra_tokens", 1), 1), pad=network.pad_id)
    lang = 1 if "n_langs" in options else None
    with torch.no_grad():
        rows, outs, bias = network(surface, source, None if lang is None else torch.tensor(lang))
        expected = plain_forward(network.state_dict(), surface, source, vocab_size=12, pad_id=network.pad_id, n_layers=2, n_heads=2, n_embd=8, lang=lang)
    assert rows.shape == (7, 8) and bias.shape == (7,) and (outs is None) == (not options.get("separate_out"))
    for i, (row, out, b) in enumerate(expected):
        torch.testing.assert_close(rows[i], row, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(bias[i], b, atol=2e-5, rtol=1e-4)
        assert outs is None or torch.allclose(outs[i], out, atol=2e-5, rtol=1e-4)


def test_names_of_the_published_checkpoints():
    names = set(small(separate_out=True, rescale=True, predict_bias=True, n_langs=2).state_dict())
    heads = {f"{part}.{rest}" for part in ("input_projection.1", "output_projection.0", "output_projection_out.0")
             for rest in ("dense1.weight", "dense1.bias", "dense2.weight", "dense2.bias", "ln.weight", "ln.bias")}
    heads |= {f"{part}.{kind}" for part in ("input_projection.0", "output_projection.1", "output_projection_out.1", "bias_projection") for kind in ("weight", "bias")}
    heads |= {f"{part}.{kind}" for part in ("in_scaler", "scaler", "out_scaler") for kind in "wb"} | {"lang_embeddings.weight", "fallback_embeddings.weight"}
    assert {name for name in names if not name.startswith("model.")} == heads
    state = small(n_extra_tokens=0, rescale=True).state_dict()
    assert state["fallback_embeddings.weight"].shape == (1, 8) and not any("lang" in name or "_out" in name for name in state)
    assert state["in_scaler.b"].shape == (1, 8) and state["in_scaler.b"].eq(1).all() and state["scaler.w"].eq(1).all()
    assert state["model.embeddings.word_embeddings.weight"].shape == (4, 16) and state["model.embeddings.position_embeddings.weight"].shape == (514, 16)
    assert small(hidden_size=128, n_heads=None).model.config.num_attention_heads == 2 and small(n_heads=None).model.config.num_attention_heads == 1
    assert small(single_head=True, separate_out=True).output_projection[1].out_features == 16


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4), st.booleans())
def test_no_token_depends_on_others_or_on_padding(seed, more, langs):
    network, surface = small(n_langs=2 * langs), random_surface(seed=seed)
    source, lang = torch.randn(12, 8, generator=torch.Generator().manual_seed(seed)), torch.tensor([1]) if langs else None
    with torch.no_grad():
        rows = network(surface, source, lang)[0]
        torch.testing.assert_close(network(F.pad(surface, (0, more), value=3), source, lang)[0], rows, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(network(surface.flip(0), source, lang)[0].flip(0), rows, atol=1e-5, rtol=1e-4)
        one = surface[2][surface[2] != 3][None]
        torch.testing.assert_close(network(one, source, lang)[0][0], rows[2], atol=1e-5, rtol=1e-4)
        special = torch.arange(7) == 1
        if not langs:
            copied, out = predicted_rows(network, surface, special, source)
            assert out is None and torch.equal(copied[1], source[surface[1, 0]])
            torch.testing.assert_close(copied[~special], rows[~special], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_precision_and_gradient(dtype):
    network = small(rescale=True, separate_out=True).to(dtype)
    source = torch.randn(12, 16).to(dtype).requires_grad_()
    rows, out, bias = network(random_surface(), source)
    assert rows.dtype == out.dtype == bias.dtype == dtype and rows.isfinite().all()
    (rows.sum() + out.square().sum()).backward()
    positions = network.model.embeddings.position_embeddings.weight.grad.abs().sum(1)
    assert source.grad.abs().sum() > 0 and (positions[:5] > 0).all(), "position 1 learns, too"
    assert network.in_scaler.w.grad is None and all(p.grad is not None for name, p in network.named_parameters() if "output_projection" in name)
    assert network(torch.full((1, 4), 3), source)[0].isfinite().all(), "a token that is padding only"


def test_bad_networks_and_inputs():
    with pytest.raises(ValueError, match="max_len and vocab_size must be at least 1"):
        small(max_len=0)
    network, source = small(), torch.randn(12, 8)
    for surface, rows, words in ((torch.zeros(3).long(), source, "surface must be"), (torch.zeros(2, 0).long(), source, "surface must be"), (random_surface(), torch.randn(12, 9), "12 rows and 8 columns"),
                                 (random_surface(), torch.randn(11, 8), "12 rows and 8 columns"), (random_surface(), torch.randn(12, 16), "12 rows and 8 columns")):
        with pytest.raises(ValueError, match=words):
            network(surface, rows)
    with pytest.raises(ValueError, match="lang_index must be given if and only if"):
        network(random_surface(), source, torch.tensor(0))
    with pytest.raises(ValueError, match="lang_index must be given if and only if"):
        small(n_langs=2)(random_surface(), source)
    with pytest.raises(ValueError, match="rescale=True"):
        match_scale(network, source)


@pytest.mark.parametrize("separate_out", [False, True])
def test_scales_match(separate_out):
    network, source = small(rescale=True, separate_out=separate_out), 40 * torch.randn(12, 8 * (1 + separate_out)) + 5
    match_scale(network, source)
    scaled = network.in_scaler(source)
    assert scaled.mean(0).abs().max() < 1e-5 and (scaled.std(0, correction=0) - 0.02).abs().max() < 1e-5
    with torch.no_grad():
        for rows, own in zip(network(torch.arange(12)[:, None], source)[:2], source.split(8, 1)):
            torch.testing.assert_close(rows.mean(0), own.mean(0), atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(rows.std(0), own.std(0), atol=1e-3, rtol=1e-3)
    assert not any(p.requires_grad for p in network.scaler.parameters()) and ProjectorBlock(4, 6)(torch.zeros(2, 4)).shape == (2, 4) and Rescaler(3)(torch.zeros(3)).eq(1).all()


# models that speak a new tokenizer

@pytest.mark.parametrize("kind, tied", [("llama", True), ("llama", False), ("gpt2", True), ("qwen3", False), ("bloom", True)])
def test_transfer(tokenizers, tiny, tmp_path, kind, tied):
    tokenizer = tokenizers["words"]
    model = tiny(kind, vocab=len(tokenizer), tie_word_embeddings=tied)
    source = source_rows(model)
    assert source.shape == (len(tokenizer), 32 * (2 - tied))
    torch.manual_seed(1)
    network = Hypernetwork(n_embd=32, vocab_size=len(tokenizer), pad_id=pad_of(tokenizer), hidden_size=32, intermediate_size=32, n_layers=1, max_len=6, separate_out=not tied).eval()
    target = unigram_tokenizer(sample_vocabulary(TEXTS, 300), ["<|endoftext|>"])
    new = transfer(model, tokenizer, target, network)
    rows, head = new.get_input_embeddings().weight, new.get_output_embeddings().weight
    assert (head is rows) == tied and len(rows) == len(target) == new.config.vocab_size
    assert torch.equal(rows[0], source[tokenizer.eos_token_id, :32]) and torch.equal(head[0], source[tokenizer.eos_token_id, -32:])
    surface, special, cut = read_vocabulary(target, tokenizer, 6)
    torch.testing.assert_close(rows[1:9], network(surface, source)[0][1:9], atol=1e-5, rtol=1e-4)
    assert special.nonzero().flatten().tolist() == [0] and cut == sum(len(parts_of(tokenizer)(token_bytes(token))) > 6 for token in token_strings(target)[1:])
    assert math.isfinite(bits_per_byte(new, target, TEXTS)) and torch.equal(source_rows(model), source)
    new.save_pretrained(tmp_path), target.save_pretrained(tmp_path)
    again, again_tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    ids = target(TEXTS[1], return_tensors="pt", add_special_tokens=False).input_ids
    assert torch.equal(again_tokenizer(TEXTS[1], return_tensors="pt", add_special_tokens=False).input_ids, ids)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, new(ids).logits)


@pytest.mark.parametrize("kind", ["prefix", "whole", "unigram", "wordpiece", "digits"])
def test_other_kinds_of_tokenizers_are_read(tokenizers, kind):
    own, target = tokenizers["words"], tokenizers[kind]
    surface, special, _ = read_vocabulary(target, own, 4)
    assert len(surface) == len(target) and special.sum() == len(set(target.all_special_ids)) and (surface[~special, 0] < len(own)).all()
    assert read_vocabulary(own, target, 4)[0].shape == (len(own), 4)


def test_a_tokenizer_without_padding_and_end(tokenizers):
    plain = train_bpe(TEXTS, 256)
    with pytest.raises(ValueError, match="padding or an end-of-text token"):
        pad_of(plain)
    assert pad_of(tokenizers["prefix"]) == tokenizers["prefix"].eos_token_id
