"""The rules of boundaries give what the definition gives, entry by entry, for tokenizers of several kinds."""
import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tokenkit.text.boundaries import (CONTRACTIONS, Boundaries, Merges, character_kind, continuations, first_kind, merges_of, open_contraction, splitting)
from tokenkit.text.engine import encode_bytes, vocab_bytes

# strings near every rule: white space, contractions, digits, signs, broken characters, special tokens
PIECES = ["the", " doc", "s", " ", "  ", "\n", "\n\n", "\t", "'", "'s", "'re", "'r", " '", "1", "23", ".", "...", " (", "é", "☕", "ï", "_", "\u00a0", "<|endo", "ftext|>", "\x1c", "²", "日"]
HEADS = st.lists(st.sampled_from(PIECES), max_size=4).flatmap(lambda parts: st.tuples(st.just("".join(parts).encode()), st.integers(0, 2))).map(lambda t: t[0][:len(t[0]) - t[1]])


@pytest.fixture(scope="module")
def boundaries(tokenizers):
    return {name: Boundaries(tokenizer) for name, tokenizer in tokenizers.items()}


def sets(groups):
    assert all(np.array_equal(entries, np.unique(entries)) for _, entries in groups), "ascending, each once"
    assert len({ids for ids, _ in groups}) == len(groups), "one group for each spelling"
    return {ids: set(entries.tolist()) for ids, entries in groups}


def by_definition(b, head):
    return sets(continuations(head, b.every, b.vocab, b.encode))


@pytest.mark.parametrize("name", ["words", "digits"])
@settings(max_examples=25, deadline=None)
@given(head=HEADS)
@example(head=b"")
@example(head=b"we'r")
@example(head=b" '")
@example(head=b"a\n\n")
@example(head="a\u00a0 ".encode())
@example(head="☕".encode()[:2])
@example(head=b"12")
@example(head=b"<|endoftext")
@example(head=b"<|endoftext|>")
def test_rules_are_the_definition(boundaries, name, head):
    b = boundaries[name]
    assert sets(b.after(head)) == by_definition(b, head)


@pytest.mark.parametrize("name", ["prefix", "whole"])
@settings(max_examples=20, deadline=None)
@given(head=HEADS)
@example(head=b"")
@example(head="☕".encode()[:2])
@example(head=b"the<s")
def test_rules_without_splitting(boundaries, name, head):
    b = boundaries[name]
    if head or name == "whole":
        assert sets(b.after(b.prefix + head)) == by_definition(b, b.prefix + head)


@settings(max_examples=8, deadline=None)
@given(head=st.text(st.sampled_from("the doc"), max_size=8).map(str.encode))
def test_other_tokenizers_are_tried_one_by_one(boundaries, head):
    for b in (boundaries["unigram"], boundaries["wordpiece"]):
        assert b.rule is None and sets(b.after(b.prefix + head)) == by_definition(b, b.prefix + head)


@settings(max_examples=15, deadline=None)
@given(head=HEADS, seed=st.integers(0, 1000))
def test_candidates_are_a_choice(boundaries, head, seed):
    b = boundaries["words"]
    some = np.random.default_rng(seed).choice(b.every, 50)
    expected = {ids: entries & set(some.tolist()) for ids, entries in sets(b.after(head)).items()}
    assert sets(b.after(head, some)) == {ids: entries for ids, entries in expected.items() if entries}
    assert b.after(head, []) == []


def test_which_splitter(tokenizers):
    assert {name: splitting(t) for name, t in tokenizers.items()} == {"words": "words", "digits": "digits", "prefix": "whole", "whole": "whole", "unigram": None, "wordpiece": None}


@pytest.mark.parametrize("change", [
    lambda spec: spec["model"].update(dropout=0.1), lambda spec: spec["model"].update(ignore_merges=True), lambda spec: spec["model"].update(end_of_word_suffix="</w>"),
    lambda spec: spec.update(normalizer={"type": "NFC"}), lambda spec: spec["pre_tokenizer"].update(add_prefix_space=True),
    lambda spec: spec.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": r"\s"}, "behavior": "Isolated", "invert": False}, spec["pre_tokenizer"]]})])
def test_unknown_splitters_have_no_rule(tokenizers, change):
    spec = json.loads(tokenizers["words"].backend_tokenizer.to_str())
    change(spec)
    assert splitting(PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)))) is None


def test_a_space_in_front_is_a_part_of_the_text(boundaries):
    assert boundaries["prefix"].prefix == b" " and boundaries["words"].prefix == boundaries["whole"].prefix == b""
    b = boundaries["prefix"]
    for data in (b" the docs", b" ", " ☕".encode(), " ☕".encode()[:3]):
        assert b"".join(b.vocab[i] for i in b.encode(data)) == data


@pytest.mark.parametrize("name", ["words", "prefix"])
def test_crossing_is_what_bpe_does(boundaries, name):
    """Two entries side by side: their cut survives if the model, given both as one piece, returns both."""
    b = boundaries[name]
    model, generator = b.tokenizer.backend_tokenizer.model, np.random.default_rng(0)
    entries = np.flatnonzero(b.raw & ~b.byte)
    for left, right in generator.choice(entries, (400, 2)).tolist():
        together = [token.id for token in model.tokenize(model.id_to_token(left) + model.id_to_token(right))]
        assert b.merges.crosses(left, right) == (together != [left, right])
        assert b.merges.broken(left)[right] == b.merges.crosses(left, right)


def test_an_entry_with_two_ways_keeps_the_one_that_bpe_takes():
    vocab = [b"a", b"b", b"c", b"ab", b"bc", b"abc"]
    merges = Merges(vocab, [(1, 2, 4), (0, 1, 3), (3, 2, 5), (0, 4, 5)]) # bc first: abc is a + bc
    assert merges.spine(5, 0) == [(5, np.iinfo(np.int64).max), (0, 3)] and [piece for piece, _ in merges.spine(5, 1)] == [5, 4, 2]


def test_characters_are_gpt2s(tokenizers):
    """Which of two neighbours the splitter keeps together tells their kinds."""
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for char in [*map(chr, range(0x250)), "\u2028", "\u3000", "٣", "²", "日", "☕", "\u200b", "\u0300"]:
        kind = character_kind(char)
        joins = [len(splitter.pre_tokenize_str(other + char)) == 1 for other in ("x", "7", "+")]
        assert joins == [kind == 2, kind == 3, kind == 4 or (kind == 3 and False)], (char, kind, joins)
        assert (kind <= 1) == (len(splitter.pre_tokenize_str("x" + char + "x")) == (2 if char == " " else 3) and kind not in (3, 4)), char
    assert [first_kind(entry) for entry in (b" a", b" ", b"  a", b"\n", b"a", b"1", b".", "é".encode()[1:], b"", None)] == [0, 1, 1, 1, 2, 3, 4, 5, 5, 5]


def test_open_contractions():
    assert [open_contraction(text) for text in ("we'r", "we're", "we 'r", "we''r", "it'", "'", "weather", "5'l", "")] == ["'r", "'re", None, None, "'", "'", None, "'l", None]
    assert all(open_contraction("it" + c) == c for c in CONTRACTIONS)


def test_definition_skips_what_does_not_spell_the_head(tokenizers):
    vocab = vocab_bytes(tokenizers["words"])
    assert continuations(b"a", [5, 6], vocab, lambda data: [0, 5]) == [], "a special token is not the head"
    with_bos = lambda data: [0, *encode_bytes(tokenizers["words"], data)]
    assert continuations(b"the", range(1, 300), vocab, with_bos) == []


def test_merges_of_a_tokenizer(boundaries):
    b = boundaries["words"]
    merges = merges_of(b.tokenizer, b.vocab)
    spec = json.loads(b.tokenizer.backend_tokenizer.model.__getstate__())
    assert len(spec["merges"]) > 50
    first = b.tokenizer.convert_tokens_to_ids(list(spec["merges"][0]))
    assert merges.crosses(*first) and not merges.crosses(*first, own=True)


@pytest.mark.network
def test_smollm2():
    from transformers import AutoTokenizer

    from tokenkit.core.assets import fetch

    b = Boundaries(AutoTokenizer.from_pretrained(fetch("smollm2-135m-instruct")))
    assert b.rule is not None
    generator = np.random.default_rng(0)
    for head in (b" docu", b"we'r", b"one\n\n", b"naive " + "☕".encode()[:2], b"12"):
        some = np.union1d(generator.choice(b.every, 80), b.every[:40])
        assert sets(b.after(head, some)) == sets(continuations(head, some, b.vocab, b.encode))
