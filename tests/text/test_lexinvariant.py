"""Lexinvariance is exact when rows follow symbols, for any decoder; draws come in the documented order; bad input is refused."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from tokenkit.text.lexinvariant import (ARMS, SYMBOLS, LexinvariantLM, character_ids, encipher, gaussian_embedding, lexinvariant_logits, loss_by_position, readable,
                                        ready_to_copy, rows, semi_lexinvariant_tables, small_config, tiled, train_arm, training_batch)

V = 23
CONFIGS = {"gpt2": GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=2, n_positions=48), "lfm2": small_config(V, hidden_size=32, intermediate_size=40),
           "llama": LlamaConfig(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, tie_word_embeddings=False)}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def some_ids(batch=3, length=20, seed=0, vocab=V):
    return torch.randint(vocab, (batch, length), generator=seeded(seed))


def make(kind, **arguments):
    torch.manual_seed(0)
    return LexinvariantLM(CONFIGS[kind], **arguments).eval()


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 30), st.integers(1, 8), st.floats(0.1, 3))
def test_embeddings_are_rows_of_tables(batch, length, vocab, dim, std):
    ids = some_ids(batch, length, vocab=vocab)
    embeddings, tables = gaussian_embedding(ids, vocab, dim, std=std, generator=seeded(1))
    assert torch.equal(tables, std * torch.randn(batch, vocab, dim, generator=seeded(1)))
    assert all(torch.equal(embeddings[b, t], tables[b, ids[b, t]]) for b in range(batch) for t in range(length))


def test_tables_differ_between_sequences_and_not_between_runs():
    ids = some_ids(1).repeat(2, 1)
    embeddings, tables = gaussian_embedding(ids, V, 8, generator=seeded())
    assert not torch.isclose(tables[0], tables[1]).any()
    assert torch.equal(embeddings, gaussian_embedding(ids, V, 8, generator=seeded())[0])


def test_logits():
    hidden, tables = torch.randn(2, 5, 16, generator=seeded()), torch.randn(2, V, 16, generator=seeded(1))
    assert torch.allclose(lexinvariant_logits(hidden, tables), torch.einsum("btd,bvd->btv", hidden, tables) / 4, atol=1e-5)
    assert lexinvariant_logits(hidden.bfloat16(), tables).dtype == torch.bfloat16


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 30), st.data())
def test_encipher_is_a_bijection(batch, vocab, data):
    keep = data.draw(st.lists(st.integers(0, vocab - 1), max_size=5))
    ids = some_ids(batch, 11, vocab=vocab)
    secret, perm = encipher(ids, vocab, keep=keep, generator=seeded(3))
    assert torch.equal(perm.sort(1).values, torch.arange(vocab).expand(batch, -1))
    assert torch.equal(secret, perm.gather(1, ids)) and torch.equal(perm.argsort(1).gather(1, secret), ids)
    assert all((perm[:, symbol] == symbol).all() for symbol in keep)
    assert torch.equal(secret, encipher(ids, vocab, keep=keep, generator=seeded(3))[0])


def test_keys_are_uniform_and_each_sequence_has_its_own():
    _, perm = encipher(torch.zeros(6000, 1, dtype=torch.long), 3, generator=seeded())
    counts = torch.stack([(perm == torch.tensor(p)).all(1).sum() for p in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))])
    assert (counts - 1000).abs().max() < 150


def test_semi_draws_the_mask_first():
    weight = torch.randn(V, 8, generator=seeded())
    tables, replaced = semi_lexinvariant_tables(weight, 4, 0.3, generator=seeded(5))
    again = seeded(5)
    mask, noise = torch.rand(4, V, generator=again) < 0.3, torch.randn(4, V, 8, generator=again)
    assert torch.equal(replaced, mask) and torch.allclose(tables, torch.where(mask[..., None], noise * weight.std(), weight))
    loud, _ = semi_lexinvariant_tables(weight, 4, 1.0, std=7.0, generator=seeded(5))
    assert 6 < loud.std() < 8


@pytest.mark.parametrize("p", [0, 1])
def test_semi_at_its_ends(p):
    weight = torch.randn(V, 8, generator=seeded())
    tables, replaced = semi_lexinvariant_tables(weight, 2, p)
    assert (replaced == bool(p)).all() and torch.equal(tables[0], weight) == (p == 0)


def test_gradient_reaches_the_learned_rows_only():
    weight = torch.randn(V, 8, generator=seeded(), requires_grad=True)
    tables, replaced = semi_lexinvariant_tables(weight, 1, 0.5, generator=seeded(6))
    tables.sum().backward()
    assert torch.equal(weight.grad, (~replaced[0, :, None]).float().expand(-1, 8))


def test_loss_by_position_against_the_long_way():
    logits, ids = torch.randn(3, 6, V, generator=seeded()), some_ids(3, 6)
    expected = torch.stack([torch.stack([-logits[b, t].log_softmax(-1)[ids[b, t + 1]] for b in range(3)]).mean() for t in range(5)])
    assert torch.allclose(loss_by_position(logits, ids), expected, atol=1e-6)
    uniform = loss_by_position(torch.zeros(3, 6, V, dtype=torch.bfloat16), ids)
    assert uniform.shape == (5,) and torch.allclose(uniform, torch.tensor(float(V)).log())


@pytest.mark.parametrize("kind", CONFIGS)
def test_exact_invariance(kind):
    model, ids = make(kind), some_ids()
    secret, perm = encipher(ids, V, generator=seeded(7))
    tables = model.tables(3, seeded(8))
    followed = torch.empty_like(tables).scatter_(1, perm[..., None].expand_as(tables), tables)
    plain, hidden = model(ids, tables=tables), model(secret, tables=followed)
    assert torch.allclose(hidden.gather(2, perm[:, None].expand_as(hidden)), plain, atol=1e-5)
    assert torch.allclose(loss_by_position(hidden, secret), loss_by_position(plain, ids), atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_nothing_learned_has_a_row_for_a_symbol(kind):
    model = make(kind)
    assert not any(V in p.shape for p in [*model.parameters(), *model.buffers()])
    assert any(V in p.shape for p in make(kind, p=0.5).parameters())
    model(some_ids(), generator=seeded()).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("kind", CONFIGS)
def test_p_0_is_the_transformers_model(kind):
    torch.manual_seed(0)
    config = type(CONFIGS[kind])(**(CONFIGS[kind].to_dict() | {"tie_word_embeddings": True}))
    reference, model = AutoModelForCausalLM.from_config(config).eval(), make(kind, p=0)
    model.model.load_state_dict(reference.base_model.state_dict())
    ids = some_ids()
    assert torch.allclose(model(ids), reference(ids).logits, atol=1e-5)


def test_the_draws_of_the_model():
    ids, model = some_ids(), make("gpt2")
    assert torch.equal(model(ids, generator=seeded(1)), model(ids, tables=torch.randn(3, V, 32, generator=seeded(1))))
    assert torch.equal(make("gpt2", std=2.0).tables(3, seeded(1)), 2 * torch.randn(3, V, 32, generator=seeded(1)))
    mixed = make("gpt2", p=0.4)
    tables, _ = semi_lexinvariant_tables(mixed.model.get_input_embeddings().weight, 3, 0.4, generator=seeded(1))
    assert torch.equal(mixed(ids, generator=seeded(1)), mixed(ids, tables=tables))
    hidden = mixed.hidden(ids, tables)
    assert torch.allclose(mixed(ids, tables=tables), hidden @ tables.mT, atol=1e-6), "no division for p < 1"


@pytest.mark.parametrize("p", [0, 0.5, 1])
def test_half_precision(p):
    model = make("llama", p=p).bfloat16()
    logits = model(some_ids(), generator=seeded())
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


def test_bad_input():
    ids, model = some_ids(), make("gpt2")
    for call in (lambda i: gaussian_embedding(i, V, 8), lambda i: encipher(i, V), lambda i: model(i), lambda i: loss_by_position(torch.zeros(*i.shape, V), i)):
        for wrong in (ids + V, ids - V):
            with pytest.raises(ValueError, match=r"ids must be in \[0, 23\), got"):
                call(wrong)
    with pytest.raises(ValueError, match=r"ids must be integers of shape \(B, T\)"):
        gaussian_embedding(ids[0], V, 8)
    for p in (-0.1, 1.5):
        with pytest.raises(ValueError, match=r"p must be in \[0, 1\], got"):
            LexinvariantLM(CONFIGS["gpt2"], p=p)
        with pytest.raises(ValueError, match=r"p must be in \[0, 1\], got"):
            semi_lexinvariant_tables(torch.zeros(V, 8), 2, p)
    with pytest.raises(ValueError, match="T >= 2"):
        loss_by_position(torch.zeros(3, 1, V), ids[:, :1])
    for tables in (torch.zeros(2, V, 32), torch.zeros(V, 32)):
        with pytest.raises(ValueError, match=r"tables must be \(B, V, D\) with B = 3"):
            model(ids, tables=tables)
        with pytest.raises(ValueError, match=r"tables must be \(B, V, D\) with B = 3"):
            lexinvariant_logits(torch.zeros(3, 4, 32), tables)
    with pytest.raises(ValueError, match=r"keep must hold symbols in \[0, 23\), got \[40\]"):
        encipher(ids, V, keep=(3, 40))
    with pytest.raises(ValueError, match="arm must be one of lexinvariant, ordinary, enciphered, got 'other'"):
        train_arm("other", ids.flatten(), CONFIGS["lfm2"], steps=1)


def test_characters():
    ids = character_ids(["Hello, World!  \n\n  42 naïve lines", "end"])
    assert readable(ids.tolist()) == "hello world⏎na ve lines⏎end"
    assert len(SYMBOLS) == 28 and 0 <= ids.min() and ids.max() < 28


def test_tiles_and_batches():
    ids = torch.arange(40).repeat(6, 1)
    pieces = tiled(ids, 16, seeded())
    for row in pieces:
        period = int(row.max()) + 1
        assert 4 <= period <= 16 and torch.equal(row, torch.arange(40) % period)
    stream = some_ids(1, 3000, vocab=28)[0]
    shapes = [training_batch(stream, step, 10, tokens=256, length=64).shape for step in (0, 9)]
    assert shapes == [(8, 33), (4, 65)]
    text = training_batch(stream, 9, 10, tokens=256, length=64)
    assert torch.equal(text, training_batch(stream, 9, 10, tokens=256, length=64)) and any(torch.equal(stream[i:i + 65], text[0]) for i in range(len(stream) - 64))


@pytest.mark.parametrize("arm", ARMS)
def test_training_lowers_the_loss_of_what_repeats(arm):
    stream = torch.arange(5).repeat(100)
    model, history = train_arm(arm, stream, CONFIGS["lfm2"], steps=25, tokens=128, length=32)
    assert history.steps == 25 and history.losses[-1] < history.losses[0]
    again, same = train_arm(arm, stream, CONFIGS["lfm2"], steps=25, tokens=128, length=32)
    assert same.losses == history.losses and model.p == ARMS[arm]


def test_a_start_that_copies():
    model = make("lfm2")
    ready_to_copy(model)
    attention = model.model.layers[-1].self_attn
    assert torch.allclose(attention.out_proj.weight @ attention.v_proj.weight, torch.eye(32), atol=1e-5)
    tables = torch.randn(2, V, 4)
    assert torch.equal(rows(tables, torch.tensor([[1], [2]]))[1, 0], tables[1, 2])
