"""The zoo's picture writers draw what they are asked for, and their parts keep their promises."""
import pytest
import torch
from transformers import LlamaForCausalLM

from tokenkit import zoo
from tokenkit.core.world import SHAPES
from tokenkit.decode.engine import NoDraft, generate
from tokenkit.zoo import hub
from tokenkit.zoo.ar_world import (AR_ANY, AR_CODES, AR_LENGTH, AR_RECIPES, AR_VOCABULARY, ARS, ar_batch, ar_prompt, ar_sequences,
                                   ar_tokenizer, build_ar, code_bits, draw_codes, shape_agreement, train_ar)
from tokenkit.zoo.vq_world import vq_scenes


def tiny(**changes):
    torch.manual_seed(0)
    return build_ar("ar-world", **dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2) | changes).eval()


@pytest.mark.parametrize("name,least,most_bits", [("ar-world", 0.7, 4.0), ("ar-world-draft", 0.1, 5.0)])
def test_shipped_models_draw_shapes(name, least, most_bits):
    model, labels = zoo.load(name), torch.arange(96) % len(SHAPES)
    assert isinstance(model, LlamaForCausalLM) and model.lm_head.weight is model.model.embed_tokens.weight
    codes = draw_codes(model, labels, generator=torch.Generator().manual_seed(0))
    assert codes.shape == (96, AR_LENGTH) and 0 <= codes.min() and codes.max() < AR_CODES
    assert shape_agreement(codes, labels, zoo.load("vit-world-small")) >= least
    held_out = vq_scenes(50, split="test")
    assert code_bits(model, ar_sequences(held_out.images, held_out.labels)).mean() < most_bits
    assert model.card.bytes < 2e6


def test_the_draft_is_smaller_and_worse():
    large, draft = (hub.card(name) for name in ARS)
    assert draft.parameters < large.parameters / 2 and large.scores["shape agreement"] > draft.scores["shape agreement"]
    assert large.scores["shape agreement"] >= 0.8 and large.scores["bits a code"] < draft.scores["bits a code"]


def test_texts():
    held_out = vq_scenes(5, split="test")
    ids = ar_sequences(held_out.images, held_out.labels)
    assert ids.shape == (5, 1 + AR_LENGTH) and torch.equal(ids[:, 1:], ar_tokenizer().encode(held_out.images))
    assert torch.equal(ids[:, 0], AR_CODES + held_out.labels) and ar_prompt(torch.tensor([-1]))[0, 0] == AR_ANY == AR_VOCABULARY - 1
    assert len(ar_tokenizer().codebook) == AR_CODES
    for bad in (torch.tensor([12]), torch.tensor([-2]), torch.tensor([0.5]), torch.tensor([[1]])):
        with pytest.raises(ValueError, match="labels must be"):
            ar_prompt(bad)
    with pytest.raises(ValueError, match="name must be one of"):
        build_ar("ar-moon")


def test_drawing_agrees_with_transformers_and_with_the_decode_engine():
    model, labels = tiny(), torch.tensor([3, -1])
    codes = draw_codes(model, labels, temperature=0)
    theirs = model.generate(ar_prompt(labels), attention_mask=torch.ones(2, 1), max_new_tokens=AR_LENGTH, do_sample=False)
    assert torch.equal(theirs[:, 1:], codes)
    big = zoo.load("ar-world")
    one = draw_codes(big, torch.tensor([6]), temperature=0)[0]
    assert torch.equal(generate(big, ar_prompt(torch.tensor([6])), NoDraft(), max_new_tokens=AR_LENGTH).tokens, one)


def test_guidance():
    model, labels = tiny(), torch.tensor([3, 5])
    model.lm_head.weight.data.mul_(30)  # fresh weights hardly listen to the wish
    lots = lambda: torch.Generator().manual_seed(1)
    plain = draw_codes(model, labels, generator=lots())
    assert torch.equal(plain, draw_codes(model, labels, generator=lots())) and not torch.equal(plain, draw_codes(model, labels, scale=4.0, generator=lots()))
    free = draw_codes(model, torch.tensor([-1, -1]), generator=lots())
    assert torch.equal(free, draw_codes(model, labels, scale=0.0, generator=lots()))  # nothing of the wish is left
    for bad in (dict(temperature=-1.0), dict(scale=-0.1)):
        with pytest.raises(ValueError, match="temperature and scale"):
            draw_codes(model, labels, **bad)


def test_bits_are_those_of_one_pass():
    model, ids = tiny(), torch.randint(AR_CODES, (5, 1 + AR_LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = -torch.log_softmax(model(ids[:, :-1]).logits, -1).gather(-1, ids[:, 1:, None])[..., 0] / torch.tensor(2.0).log()
    bits = code_bits(model, ids, rows=2)
    assert bits.shape == (5, AR_LENGTH) and torch.allclose(bits, expected, atol=1e-4)
    assert abs(bits.mean() - torch.tensor(float(AR_VOCABULARY)).log2()) < 0.3  # it knows nothing yet


def test_batches_are_pure_functions_of_the_step():
    a, b = ar_batch(3, batch=16), ar_batch(3, batch=16)
    assert torch.equal(a, b) and a.shape == (16, 1 + AR_LENGTH) and not torch.equal(a, ar_batch(4, batch=16)) and not torch.equal(a, ar_batch(3, batch=16, seed=1))
    assert (ar_batch(0, batch=16, drop=1.0)[:, 0] == AR_ANY).all() and (ar_batch(0, batch=16, drop=0.0)[:, 0] < AR_ANY).all()


def test_train_ar_takes_a_few_steps():
    model, history = train_ar("ar-world-draft", steps=2, progress=False)
    again, _ = train_ar("ar-world-draft", steps=2, progress=False)
    assert history.steps == 2 and not model.training and model.config._attn_implementation == "sdpa"
    assert torch.equal(model.lm_head.weight, again.lm_head.weight) and set(AR_RECIPES) == set(ARS)


@pytest.mark.parametrize("name", ARS)
def test_hub_folder_is_read_by_transformers(name, tmp_path):
    path = hub.hub_folder(name, tmp_path / "new")
    model, ids = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), ar_prompt(torch.tensor([2]))
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, zoo.load(name)(ids).logits, atol=1e-4)
    assert model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=True).max() < AR_VOCABULARY
    assert set(model.generation_config.suppress_tokens) == set(range(AR_CODES, AR_VOCABULARY))
