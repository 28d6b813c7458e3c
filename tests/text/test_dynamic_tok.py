"""Merging over a batch: its definition, its boundaries and its embeddings, for byte-level, SentencePiece and WordPiece tokenizers."""
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from tokenkit.text.dynamic_tok import (DynamicTokenizer, PartNetwork, count_tokens, dynamic_bpe, merge_pair, merge_steps, merges_for_reduction, most_frequent_pair,
                                       network_embedder, parts_of, token_bytes, valid_pair)
from tokenkit.text.engine import mean_embeddings

GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
BATCHES = st.lists(st.lists(st.sampled_from(["a", "b", "Ġa", "Ġb", "-", "Ġ", "Ċ", "Ã", "©", "<s>"]), max_size=12), min_size=1, max_size=4)
SENTENCES = ["The interpreter reads the documentation.", "It's reading documents: areas, the area\n\nand 12 lines.", "the docs"]


def checker(boundary):
    return lambda pair: valid_pair(*pair, boundary=boundary, pretokenize=GPT2, special_tokens={"<s>"}, punctuation_tokens={"-", ",", "."})


def fvt(tokenizer, dim=8):
    weight = torch.randn(len(tokenizer), dim, generator=torch.Generator().manual_seed(0))
    return weight, lambda tokens: mean_embeddings(tokens, tokenizer, weight)


@pytest.mark.parametrize("a, b, pretokens, word, hyphen, sentence", [
    ("Ġtoken", "izer", True, True, True, True), ("ize", "Ġit", False, False, False, False), ("Ġread", ",", False, True, False, True), ("Ġread", "-", False, True, True, True),
    (",", "-", True, True, True, True), (",", "a", False, True, True, True), ("Ġ", "Ġ", True, False, False, True), ("Ċ", "Ċ", False, False, False, False), ("Ċ", "ĊĊ", True, False, False, True),
    ("Ã", "©", True, True, True, True), ("a", "Ã", True, True, True, True), ("Ġ", "a", True, True, True, True), ("a", "1", False, True, True, True), ("a", "ĉ", False, False, False, False),
    ("<s>", "a", False, False, False, False), ("a", "<s>", False, False, False, False), ("Ã", "<s>", False, False, False, False)])
def test_pairs_by_boundary(a, b, pretokens, word, hyphen, sentence):
    for boundary, expected in zip(("pretokens", "word", "word_hyphen", "sentence"), (pretokens, word, hyphen, sentence)):
        assert checker(boundary)((a, b)) is expected, boundary


def test_bad_pairs():
    with pytest.raises(ValueError, match="boundary must be one of"):
        valid_pair("a", "b", boundary="paragraph")
    with pytest.raises(ValueError, match="pretokenize must be given"):
        valid_pair("a", "b")
    with pytest.raises(ValueError, match="must not be empty"):
        valid_pair("", "b", boundary="word")
    with pytest.raises(ValueError, match="byte-level alphabet"):
        valid_pair("▁a", "b", boundary="word")


def test_overlaps_count_and_ties_go_to_the_first():
    assert most_frequent_pair([["a", "b"], ["c", "c", "c"]]) == ("c", "c")
    assert most_frequent_pair([["a", "b", "c"], ["b", "c", "a", "b"]]) == ("a", "b")
    assert most_frequent_pair([["a", "b", "c"]], lambda pair: pair != ("a", "b")) == ("b", "c")
    assert most_frequent_pair([["a"], []]) is None and most_frequent_pair([["a", "b"]], lambda pair: False) is None
    assert merge_pair([["a", "a", "a"], ["b", "a"]], ("a", "a")) == [["aa", "a"], ["b", "a"]]


@settings(max_examples=60, deadline=None)
@given(BATCHES, st.integers(0, 8), st.sampled_from([None, "pretokens", "word", "word_hyphen", "sentence"]))
def test_merging_follows_the_definition(batch, n_merges, boundary):
    is_valid = checker(boundary) if boundary else None
    before = [list(sequence) for sequence in batch]
    merged, merges = dynamic_bpe(batch, n_merges, is_valid=is_valid)
    assert batch == before and len(merges) <= n_merges
    assert ["".join(s) for s in merged] == ["".join(s) for s in before]
    again, length = before, count_tokens(before)
    for pair in merges:
        counts = Counter(pair for s in again for pair in pairwise(s) if is_valid is None or is_valid(pair))
        assert pair == max(counts, key=counts.get) == most_frequent_pair(again, is_valid)
        again = merge_pair(again, pair)
        assert count_tokens(again) < length
        length = count_tokens(again)
    assert again == merged
    assert len(merges) == n_merges or most_frequent_pair(merged, is_valid) is None
    if boundary == "word":
        for token in (t for s in merged for t in s if t != "<s>" and set(t) - set("ĠĊ")):
            assert not set(token[1:]) & set("ĠĊ")


@settings(max_examples=40, deadline=None)
@given(BATCHES, st.floats(0, 1))
def test_reduction_is_reached_by_the_smallest_count(batch, reduction):
    lengths = [count_tokens(batch), *(count_tokens(merged) for _, merged in merge_steps(batch))]
    n = merges_for_reduction(batch, reduction)
    goal = lengths[0] - reduction * (lengths[0] - lengths[-1]) + 1e-6
    assert lengths[n] <= goal and (n == 0 or lengths[n - 1] > goal - 1e-5)
    assert merges_for_reduction(batch, 0) == 0 and lengths[merges_for_reduction(batch, 1.0)] == lengths[-1]


def test_bad_batches():
    for call in (lambda b: dynamic_bpe(b, 1), most_frequent_pair, lambda b: merge_pair(b, ("a", "b")), lambda b: merges_for_reduction(b, 0.5)):
        with pytest.raises(ValueError, match="at least one sequence"):
            call([])
        with pytest.raises(ValueError, match="must not be empty"):
            call([["a", ""]])
    with pytest.raises(ValueError, match="must not be empty"):
        merge_pair([["a"]], ("", "a"))
    with pytest.raises(ValueError, match="n_merges must be at least 0"):
        dynamic_bpe([["a"]], -1)
    for reduction in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"reduction must be in \[0, 1\]"):
            merges_for_reduction([["a"]], reduction)
    with pytest.raises(ValueError, match="byte-level alphabet"):
        token_bytes("")


@pytest.mark.parametrize("kind, boundary", [("words", "pretokens"), ("words", "word_hyphen"), ("digits", "pretokens"), ("prefix", "word"), ("unigram", "pretokens"), ("wordpiece", "pretokens")])
def test_no_merge_is_the_model_itself(tokenizers, kind, boundary):
    tokenizer = tokenizers[kind]
    texts = [text.lower().replace("\n", " ").replace("'", "").replace(":", "").replace("12", "") for text in SENTENCES] if kind in ("wordpiece", "unigram") else SENTENCES
    weight, embed = fvt(tokenizer)
    out = DynamicTokenizer(tokenizer, embed, boundary=boundary)(texts, n_merges=0)
    for row, mask, text in zip(out["inputs_embeds"], out["attention_mask"], texts):
        ids = tokenizer(text).input_ids
        assert mask.sum() == len(ids) and torch.equal(row[:len(ids)], weight[ids])


@pytest.mark.parametrize("boundary", ["pretokens", "word", "word_hyphen", "sentence"])
def test_merged_embeddings(tokenizers, boundary):
    weight, embed = fvt(tokenizers["words"])
    dynamic = DynamicTokenizer(tokenizers["words"], embed, boundary=boundary)
    lengths = []
    for reduction in (0.0, 0.4, 1.0):
        out = dynamic(SENTENCES, reduction=reduction)
        lengths.append(count_tokens(out["tokens"]))
        assert out["inputs_embeds"].shape[:2] == out["attention_mask"].shape
        assert out["attention_mask"].sum(1).tolist() == list(map(len, out["tokens"]))
        assert [b"".join(map(token_bytes, s)).decode() for s in out["tokens"]] == SENTENCES
    assert lengths[0] > lengths[1] > lengths[2]
    assert lengths[2] >= sum(len(text.split()) for text in SENTENCES) or boundary == "sentence"
    alone = dynamic(SENTENCES[2:], reduction=1.0)
    here = out["tokens"][0].index("The"), alone["tokens"][0].index("the")
    assert torch.equal(alone["inputs_embeds"][0, here[1]], embed([b"the"])[0])


def test_sides_and_cache(tokenizers):
    calls = []
    _, embed = fvt(tokenizers["words"])
    dynamic = DynamicTokenizer(tokenizers["words"], lambda tokens: calls.append(tokens) or embed(tokens), cache_size=10)
    right, left = (dynamic(SENTENCES, n_merges=3, padding_side=side) for side in ("right", "left"))
    for i, sequence in enumerate(right["tokens"]):
        assert torch.equal(right["inputs_embeds"][i, :len(sequence)], left["inputs_embeds"][i, -len(sequence):])
        assert left["attention_mask"][i].tolist() == right["attention_mask"][i].flip(0).tolist()
    assert len(dynamic.cache) == 10 and len(calls[1]) < len(calls[0]) and all(len(set(tokens)) == len(tokens) for tokens in calls)
    whole = DynamicTokenizer(tokenizers["words"], lambda tokens: calls.append(tokens) or embed(tokens))
    calls.clear()
    whole(SENTENCES, reduction=1.0), whole(SENTENCES[::-1], reduction=1.0)
    assert len(calls) == 1
    assert DynamicTokenizer(tokenizers["words"], embed, cache_size=0)(SENTENCES, n_merges=3)["tokens"] == right["tokens"]


def test_special_tokens_stay_alone(tokenizers):
    weight, embed = fvt(tokenizers["words"])
    tokenizer = tokenizers["words"]
    dynamic = DynamicTokenizer(tokenizer, embed, boundary="sentence")
    out = dynamic(["a<|endoftext|>b", "area"], reduction=1.0)
    assert out["tokens"][0] == ["a", "<|endoftext|>", "b"] and torch.equal(out["inputs_embeds"][0, 1], weight[0])
    assert not dynamic.is_valid(("<|endof", "text|>")) and dynamic.is_valid(("<|endof", "text|"))


def test_bad_calls(tokenizers):
    tokenizer = tokenizers["words"]
    _, embed = fvt(tokenizer)
    dynamic = DynamicTokenizer(tokenizer, embed)
    for both in ({}, dict(n_merges=1, reduction=0.5)):
        with pytest.raises(ValueError, match="exactly one of n_merges and reduction"):
            dynamic(SENTENCES, **both)
    for texts in ([], "one text"):
        with pytest.raises(ValueError, match="at least one string"):
            dynamic(texts, n_merges=1)
    for bad, words in ((dict(n_merges=-1), "n_merges must"), (dict(reduction=1.5), "reduction must"), (dict(n_merges=1, padding_side="top"), "padding_side must")):
        with pytest.raises(ValueError, match=words):
            dynamic(SENTENCES, **bad)
    with pytest.raises(ValueError, match="at least one token"):
        dynamic([""], n_merges=0)
    with pytest.raises(ValueError, match="boundary must be one of"):
        DynamicTokenizer(tokenizer, embed, boundary="line")
    with pytest.raises(ValueError, match="cache_size must"):
        DynamicTokenizer(tokenizer, embed, cache_size=-1)
    with pytest.raises(ValueError, match="needs a pre-tokenizer"):
        DynamicTokenizer(tokenizers["whole"], embed)
    with pytest.raises(ValueError, match="one row a token"):
        DynamicTokenizer(tokenizer, lambda tokens: torch.zeros(1, 4))(SENTENCES, n_merges=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_network_starts_as_the_mean_and_keeps_single_parts(tokenizers, dtype):
    tokenizer = tokenizers["words"]
    weight = torch.randn(len(tokenizer), 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    network = PartNetwork(16, hidden=8, num_heads=2).to(dtype)
    tokens = [b"the", b" the", b" documentreader", b"\xff\xfe", b"<|endoftext|>"]
    embed = network_embedder(network, tokenizer, weight)
    torch.testing.assert_close(embed(tokens), mean_embeddings(tokens, tokenizer, weight), atol=0.02 if dtype == torch.bfloat16 else 1e-5, rtol=0.02)
    with torch.no_grad():
        network.up.weight.normal_()
    single = [len(parts_of(tokenizer)(token)) == 1 for token in tokens]
    same = (embed(tokens) == mean_embeddings(tokens, tokenizer, weight)).all(1).tolist()
    assert any(single) and not all(single) and all(s or not one for s, one in zip(same, single)) and not all(same)
    assert embed(tokens).dtype == dtype


def test_network_ignores_padding_and_neighbours_and_learns(tokenizers):
    tokenizer = tokenizers["words"]
    weight = torch.randn(len(tokenizer), 16, generator=torch.Generator().manual_seed(1))
    network = PartNetwork(16, hidden=8, num_heads=2)
    with torch.no_grad():
        network.up.weight.normal_()
    embed = network_embedder(network, tokenizer, weight)
    torch.testing.assert_close(embed([b"zqz"]), embed([b" a" * 20, b"zqz", b"the"])[1:2])
    dynamic = DynamicTokenizer(tokenizer, embed)
    out = dynamic(SENTENCES, reduction=1.0)["inputs_embeds"]
    out.square().sum().backward()
    assert network.down.weight.grad.abs().sum() > 0 and not dynamic.cache
    with torch.no_grad():
        dynamic(SENTENCES, reduction=1.0)
    assert dynamic.cache
    with pytest.raises(ValueError, match="P at most 8"):
        network(torch.zeros(1, 9, 16), torch.ones(1, 9, dtype=torch.bool))


def test_a_language_model_reads_it(tokenizers, tiny):
    tokenizer, model = tokenizers["words"], tiny(vocab=len(tokenizers["words"]))
    weight = model.get_input_embeddings().weight.detach()
    dynamic = DynamicTokenizer(tokenizer, lambda tokens: mean_embeddings(tokens, tokenizer, weight))
    ids = tokenizer(SENTENCES[:1], return_tensors="pt").input_ids
    out = dynamic(SENTENCES[:1], n_merges=0)
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=out["inputs_embeds"], attention_mask=out["attention_mask"]).logits, model(ids, attention_mask=torch.ones_like(ids)).logits)
