"""The zoo's language models know their text, and their parts keep their promises."""
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from tokenkit import zoo
from tokenkit.core.corpus import stdlib_text
from tokenkit.core.train import fit
from tokenkit.text.engine import bits_per_byte
from tokenkit.zoo import hub
from tokenkit.zoo.lm_world import (END, LM_RECIPES, LMS, VOCABULARY, KneserNey, MuonAdamW, build_lm, lm_batch, lm_groups, lm_loss, lm_texts,
                                   lm_tokenizer, orthogonalized, token_bits, token_stream, train_lm)

TEXT = stdlib_text("held-out")[:60]


def tiny(**changes):
    torch.manual_seed(0)
    return build_lm("lm-world", **dict(vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=2) | changes).eval()


@pytest.mark.parametrize("name,most", [("lm-world", 1.75), ("lm-world-draft", 2.1)])
def test_shipped_models_know_their_text(name, most):
    model, tokenizer = zoo.load(name), zoo.tokenizer(name)
    assert isinstance(model, LlamaForCausalLM) and isinstance(tokenizer, PreTrainedTokenizerFast)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.num_hidden_layers == LMS[name]["num_hidden_layers"]
    stream = token_stream(tokenizer, TEXT)
    size = sum(len(text.encode()) for text in TEXT)
    paid = token_bits(model, stream).sum().item() / size
    assert paid < most and abs(paid - bits_per_byte(model, tokenizer, TEXT)) < 0.2
    assert model.card.bytes < 4e6 and model.card.scores["bits per byte"] < model.card.scores["bits per byte of a trigram model"]


def test_both_share_one_tokenizer():
    tokenizer = lm_tokenizer()
    assert tokenizer is lm_tokenizer() and tokenizer.get_vocab() == zoo.tokenizer("lm-world-draft").get_vocab()
    assert len(tokenizer) == VOCABULARY == zoo.load("lm-world").config.vocab_size
    assert [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token] == [END] * 3 and tokenizer.bos_token_id == 0
    for text in ("def f(x):\n\treturn x  # ünï\r\n", " leading", "日本\x00", *TEXT[:5]):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert token_stream(tokenizer, ["a", "b"]).tolist() == [0, *tokenizer("a").input_ids, 0, *tokenizer("b").input_ids]


def test_the_draft_assists_and_changes_nothing():
    model, draft, tokenizer = zoo.load("lm-world"), zoo.load("lm-world-draft"), lm_tokenizer()
    ids = tokenizer("def read_header(self, ", return_tensors="pt").input_ids
    settings = dict(attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(ids, **settings), model.generate(ids, assistant_model=draft, **settings))


@pytest.mark.parametrize("name", LMS)
def test_hub_folder_is_read_by_transformers(name, tmp_path):
    path = hub.hub_folder(name, tmp_path / "new")
    assert {"model.safetensors", "config.json", "card.json", "README.md", "tokenizer.json", "tokenizer_config.json"} <= {p.name for p in path.iterdir()}
    model, tokenizer = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(path)
    ids = tokenizer("Return the number of bytes.", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, zoo.load(name)(ids).logits, atol=1e-4)
    assert f'zoo.tokenizer("{name}")' in (path / "README.md").read_text()


def test_texts_and_names_are_checked():
    assert len(lm_texts("held-out")) > len(stdlib_text("held-out")) and lm_texts("held-out")[-1] == stdlib_text("held-out")[-1]
    with pytest.raises(ValueError, match="split"):
        lm_texts("test")
    with pytest.raises(ValueError, match="name must be one of"):
        build_lm("lm-moon")
    assert set(LM_RECIPES) == set(LMS)


# ---- the n-gram model

@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(2, 7))
def test_probabilities_sum_to_one(seed, order, vocabulary):
    lots = torch.Generator().manual_seed(seed)
    stream = (torch.rand(200, generator=lots) ** 2 * vocabulary).long()
    model = KneserNey(stream, vocabulary, order)
    history = torch.randint(vocabulary, (order,), generator=lots)
    p = sum(2 ** -model.bits(torch.tensor([*history.tolist(), w]))[-1].item() for w in range(vocabulary))
    assert abs(p - 1) < 1e-9


def test_kneser_ney_by_hand():
    stream = torch.tensor([0, 1, 0, 1, 0, 2, 0, 1, 2, 2])
    model = KneserNey(stream, 3, 2)
    grams, value, histories, total, back = model.levels[1]
    assert dict(zip(grams.tolist(), (value + 0).tolist())).keys() == {0 * 3 + 1, 1 * 3 + 0, 0 * 3 + 2, 2 * 3 + 0, 1 * 3 + 2, 2 * 3 + 2}
    assert total.tolist() == [4, 3, 2]  # 0 stands in front four times, 1 three times, 2 twice
    # below the highest order counts are numbers of different predecessors: {1, 2} before 0, {0} before 1, {0, 1, 2} before 2
    assert (model.levels[0][1] + 0).tolist() <= [2, 1, 3] and model.levels[0][3].tolist() == [6]
    n1, n2, n3, n4 = 4, 1, 1, 1  # bigrams seen once: 02, 20, 12, 22; twice: 10; three times: 01
    y = n1 / (n1 + 2 * n2)
    assert (grams[value.argmax()], value.max()) == (1, pytest.approx(3 - max(0, 3 - 4 * y * n4 / n3)))
    assert (back * total).sum() == pytest.approx(9 - value.sum())


def test_higher_orders_learn_a_pattern_and_bits_count_all_but_the_first():
    stream = torch.tensor([0, 1, 0, 2] * 100)
    paid = [KneserNey(stream, 3, order).bits(stream) for order in (1, 2, 3)]
    assert [len(p) for p in paid] == [399] * 3 and paid[0].mean() > paid[1].mean() > paid[2].mean()
    assert paid[2][5:].mean() < 0.2
    for order in (0, 9):
        with pytest.raises(ValueError, match="order"):
            KneserNey(stream, 2048, order)
    with pytest.raises(ValueError, match="order"):
        KneserNey(stream[:2], 3, 3)


# ---- what a model pays

@settings(max_examples=12, deadline=None)
@given(st.integers(2, 70), st.integers(1, 20), st.data())
def test_every_token_is_counted_once(length, context, data):
    stride = data.draw(st.integers(1, context))
    model, stream = tiny(), torch.randint(11, (length,), generator=torch.Generator().manual_seed(length))
    bits = token_bits(model, stream, context=context, stride=stride, rows=3)
    assert len(bits) == length - 1
    end = min(stride, length - 1)
    with torch.no_grad():
        for i in range(0, length - 1, 5):
            end = min((i // stride + 1) * stride, length - 1)
            row = stream[max(0, end - context):end + 1]
            expected = cross_entropy(model(row[None, :-1]).logits[0], row[1:], reduction="none") / math.log(2)
            assert torch.allclose(bits[i], expected[i - end], atol=1e-4)


def test_bad_strides_are_refused():
    for stride in (0, 9):
        with pytest.raises(ValueError, match="stride must be from 1 to context 8"):
            token_bits(tiny(), torch.arange(10), context=8, stride=stride)


# ---- the recipe

def test_orthogonalized():
    lots = torch.Generator().manual_seed(0)
    for shape in ((8, 20), (20, 8), (3, 16, 16)):
        matrix = torch.randn(shape, generator=lots)
        flat = orthogonalized(matrix)
        values = torch.linalg.svdvals(flat.float())
        assert flat.shape == matrix.shape and flat.dtype == torch.bfloat16 and values.max() < 1.35 and values.median() > 0.6
    u, _, v = torch.linalg.svd(torch.randn(8, 20, generator=lots), full_matrices=False)
    assert ((u @ v) * orthogonalized(u @ v)).sum() / 8 > 0.6
    assert not orthogonalized(torch.zeros(4, 4)).any()


def test_optimizer_matches_torch():
    torch.manual_seed(0)
    start = torch.randn(6, 10)
    mine, theirs = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    for parameter, optimizer in ((mine, MuonAdamW([dict(params=[mine])], lr=0.01)),
                                 (theirs, torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1, betas=(0.9, 0.95)))):
        for step in range(5):
            parameter.grad = torch.randn(6, 10, generator=torch.Generator().manual_seed(step))
            optimizer.step()
    assert torch.allclose(mine, theirs, atol=1e-6)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_muon_matches_torch(shape):
    torch.manual_seed(0)
    start = torch.randn(shape)
    mine, theirs = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    for parameter, optimizer in ((mine, MuonAdamW([dict(params=[mine], muon=True)], lr=0.02)),
                                 (theirs, torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="original"))):
        for step in range(5):
            parameter.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()
    assert torch.allclose(mine, theirs, atol=5e-3)


def test_groups_hold_every_parameter_once():
    model = tiny()
    groups = lm_groups(model, 1e-3, 0.02)
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in model.parameters())
    assert [g.get("muon", False) for g in groups] == [True, False, False] and all(p.ndim == 2 for p in groups[0]["params"])
    with pytest.raises(ValueError, match="matrices"):
        MuonAdamW([dict(params=groups[2]["params"], muon=True)])


def test_training_learns_and_resumes_exactly(tmp_path):
    stream = torch.tensor([0, 1, 2, 3, 4, 5] * 60)
    batch = lambda step: lm_batch(stream, step, windows=4, length=16)
    more = lambda model: dict(parameters=lm_groups(model, 3e-2, 0.02), optimizer=MuonAdamW, progress=False)
    whole, halves = tiny(), tiny()
    history = fit(whole, batch, lm_loss, steps=40, **more(whole))
    assert history.losses[-1] < 0.3 * history.losses[0]
    path = tmp_path / "half.pt"

    class Interrupted(Exception):
        pass

    def stop(step, loss):
        if step == 25:
            raise Interrupted

    with pytest.raises(Interrupted):
        fit(halves, batch, lm_loss, steps=40, checkpoint=path, every=20, on_step=stop, **more(halves))
    halves = tiny()
    again = fit(halves, batch, lm_loss, steps=40, checkpoint=path, every=20, **more(halves))
    assert again.losses == history.losses
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), halves.state_dict().values()))


def test_batches_are_pure_functions_of_the_step():
    stream = torch.arange(1000)
    a, b = lm_batch(stream, 3, windows=5, length=20), lm_batch(stream, 3, windows=5, length=20)
    assert torch.equal(a, b) and a.shape == (5, 21) and (a.diff(dim=1) == 1).all()
    assert not torch.equal(a, lm_batch(stream, 4, windows=5, length=20)) and not torch.equal(a, lm_batch(stream, 3, windows=5, length=20, seed=1))
    with pytest.raises(ValueError, match="stream must be longer"):
        lm_batch(stream[:20], 0, length=20)


def test_train_lm_takes_a_few_steps():
    stream = torch.randint(VOCABULARY, (600,), generator=torch.Generator().manual_seed(0))
    model, history = train_lm("lm-world-draft", stream, steps=2)
    again, _ = train_lm("lm-world-draft", stream, steps=2)
    assert history.steps == 2 and not model.training and model.config._attn_implementation == "sdpa"
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)
