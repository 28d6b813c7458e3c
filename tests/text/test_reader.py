"""Read as a tree, over a cache, in any order: the same as reading each sequence alone."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import T5Config, T5ForConditionalGeneration

from tokenkit.text.reader import CachedPath, Reader, read_padded, sequence_tree, shared_prefix

SEQUENCES = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=6).map(tuple), min_size=1, max_size=8)


@pytest.fixture(scope="module")
def models(tiny):
    return {kind: tiny(kind, 50) for kind in ("llama", "gpt2", "gpt_neox", "qwen3", "bloom", "mamba")}


@torch.no_grad()
def alone(model, ids):
    return model(torch.tensor([ids]), use_cache=False).logits[0, -1].float().log_softmax(-1)


def check(rows, model, wanted, atol=2e-4):
    assert set(rows) == set(wanted)
    for ids in wanted:
        torch.testing.assert_close(rows[ids], alone(model, ids), atol=atol, rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(sequences=SEQUENCES)
def test_shared_prefix(sequences):
    base = shared_prefix(sequences)
    assert all(ids[:len(base)] == base for ids in sequences)
    assert min(map(len, sequences)) == len(base) or len({ids[len(base)] for ids in sequences}) > 1
    with pytest.raises(ValueError, match="sequences must not be empty"):
        shared_prefix([])


@settings(max_examples=40, deadline=None)
@given(sequences=SEQUENCES)
def test_sequence_tree(sequences):
    sequences = [(9, 8, *ids) for ids in sequences]
    tree, place = sequence_tree(sequences, past=1)
    for ids in sequences:
        node, found = place[ids], []
        while node >= 0:
            found, node = [int(tree.tokens[node]), *found], int(tree.parents[node])
        assert tuple(found) == ids[1:]
    assert len(tree) == len({ids[:n] for ids in sequences for n in range(2, len(ids) + 1)})


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "qwen3", "bloom", "mamba"])
@settings(max_examples=8, deadline=None)
@given(questions=st.lists(SEQUENCES, min_size=1, max_size=4))
def test_rows_are_those_of_reading_alone(models, kind, questions):
    reader = Reader(models[kind])
    for wanted in questions:
        check(reader.read(wanted), models[kind], wanted)


@pytest.mark.parametrize("kind, trees", [("llama", True), ("gpt2", True), ("bloom", False), ("mamba", False)])
def test_which_models_read_trees(models, kind, trees):
    if trees:
        assert CachedPath(models[kind]).ids == ()
    else:
        with pytest.raises(ValueError):
            CachedPath(models[kind])


def test_local_attention_is_read_padded(tiny):
    model = tiny("gpt_neo", 50)
    wanted = [tuple(range(1, 20)), (*range(1, 20), 7), (*range(1, 18), 3)]
    check(Reader(model).read(wanted), model, wanted)


def test_a_long_beginning_is_read_once(models):
    model, text = models["llama"], tuple(i % 40 + 1 for i in range(90))
    reader = Reader(model)
    wanted = [text, (*text, 5), (*text, 6), (*text, 6, 7)]
    check(reader.read(wanted), model, wanted)
    assert (reader.calls, reader.tokens) == (2, len(text) + 3), "the beginning, then the tree"
    longer = [(*text, 6, 7, 8)]
    check(reader.read(longer), model, longer)
    assert (reader.calls, reader.tokens) == (3, len(text) + 4), "one more token"
    other = [(*text[:50], 2)]
    check(reader.read(other), model, other)
    assert reader.tokens == len(text) + 5, "the cache is cut back"


def test_what_was_asked_is_remembered_until_told_otherwise(models, tiny):
    reader = Reader(models["llama"])
    first = reader.read([(1, 2), (1, 3)])
    assert reader.read([(1, 3)])[(1, 3)] is first[(1, 3)] and reader.calls == 1
    reader.model = tiny("llama", 50, scale=2.0)
    reader.forget()
    check(reader.read([(1, 3)]), reader.model, [(1, 3)])
    assert reader.calls == 2


def test_memory_is_bounded(models):
    reader = Reader(models["llama"])
    wanted = [(1, i, j) for i in range(20) for j in range(10)]
    check(reader.read(wanted), models["llama"], wanted)
    assert reader.calls == 2 and len(reader.rows) == reader.remembered, "more than go together in one pass"
    assert list(reader.read([(1, 2), (1, 2), [1, 2]])) == [(1, 2)]


def test_padded_batches(models):
    model = models["gpt2"]
    wanted = [(1,), (1, 2, 3), (1, 2), (4, 5, 6, 7), (1, 2, 3, 4)]
    rows, passes, tokens = read_padded(model, wanted, batch=1)
    check(rows, model, wanted)
    assert (passes, tokens) == (2, 8), "beginnings of longer sequences cost nothing"


def test_half_precision(tiny):
    model = tiny("llama", 50, scale=1.0, dtype=torch.bfloat16)
    rows = Reader(model).read([(1, 2, 3), (1, 2, 4)])
    assert all(row.dtype == torch.float32 for row in rows.values())
    check(rows, model, [(1, 2, 3), (1, 2, 4)], atol=0.1)


def test_eager_attention(tiny):
    model = tiny("llama", 50)
    model.set_attn_implementation("eager")
    check(Reader(model).read([(1, 2, 3), (1, 2, 4, 5)]), model, [(1, 2, 3), (1, 2, 4, 5)])


def test_refusals(models):
    with pytest.raises(ValueError, match="begin with the same id"):
        CachedPath(models["llama"]).read([(1,), (2,)])
    assert Reader(models["llama"]).read([]) == {}
    with pytest.raises(ValueError, match="must not hold an empty sequence"):
        Reader(models["llama"]).read([(1,), ()])
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="T5ForConditionalGeneration, an encoder-decoder"):
        Reader(t5)
