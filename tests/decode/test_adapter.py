"""Drafters behind model.generate: the same text as without them, under whatever settings."""
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList, StopStringCriteria, TopKLogitsWarper

from tokenkit.core.hub import byte_tokenizer
from tokenkit.decode.adapter import ProcessedRule, TreeDecoding
from tokenkit.decode.engine import NoDraft
from tokenkit.decode.trees import DraftTree, verify_greedy


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=260, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
                         max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = LlamaForCausalLM(config).eval()
    for p in model.parameters():
        p.data.mul_(3 if p.ndim > 1 else 1)
    return model


class Bushy(NoDraft):
    """Guesses the tokens of a known text, and wrong ones beside them."""

    def __init__(self, text): self.text = text.tolist()

    def draft(self, context):
        tokens, parents, here = [int(context[-1])], [-1], 0
        for right in self.text[len(context):len(context) + 3]:
            tokens += [(right + 1) % 260, right]
            parents += [here, here]
            here = len(tokens) - 1
        return DraftTree(torch.tensor(tokens), torch.tensor(parents))


def write(model, ids, custom=None, **settings):
    torch.manual_seed(5)
    settings = {"do_sample": False, "max_new_tokens": 18, "pad_token_id": 0, "eos_token_id": 255, **settings}
    return model.generate(ids, attention_mask=torch.ones_like(ids), custom_generate=custom, **settings)


@pytest.mark.parametrize("settings", [{}, dict(repetition_penalty=1.4), dict(no_repeat_ngram_size=2), dict(min_new_tokens=15), dict(bad_words_ids=[[7], [9, 9]]),
                                      dict(do_sample=True, temperature=0.7, top_k=20), dict(do_sample=True, top_p=0.8, repetition_penalty=1.2)], ids=lambda s: "-".join(s) or "greedy")
def test_same_text_as_without(model, settings):
    ids = torch.randint(3, 260, (1, 9), generator=torch.Generator().manual_seed(2))
    theirs = write(model, ids, **settings)
    decoding = TreeDecoding(Bushy(theirs[0]))
    assert torch.equal(write(model, ids, decoding, **settings), theirs)
    assert decoding.result.mean_accepted > 2 and torch.equal(decoding.result.tokens, theirs[0, 9:])


def test_dict_output_cache_stop_string_and_streamer(model):
    tokenizer = byte_tokenizer()
    ids = tokenizer("abc abc", return_tensors="pt").input_ids
    whole = write(model, ids)

    class Ear:
        heard, ended = [], False
        def put(self, value): self.heard.append(value.flatten())
        def end(self): self.ended = True

    out = write(model, ids, TreeDecoding(Bushy(whole[0]), streamer=(ear := Ear())), return_dict_in_generate=True, max_new_tokens=8)
    assert torch.equal(out.sequences, whole[:, :len(ids[0]) + 8]) and torch.equal(torch.cat(ear.heard), out.sequences[0]) and ear.ended
    assert out.past_key_values.get_seq_length() == out.sequences.shape[1] - 1
    assert torch.equal(write(model, out.sequences, TreeDecoding(Bushy(whole[0])), past_key_values=out.past_key_values, max_new_tokens=10), whole)
    stop = next(c for c in map(tokenizer.decode, whole[0, len(ids[0]) + 4:, None]) if c.isascii() and c.isprintable())
    criteria = [StopStringCriteria(tokenizer, [stop])]
    assert torch.equal(write(model, ids, TreeDecoding(Bushy(whole[0])), stopping_criteria=criteria), write(model, ids, stopping_criteria=criteria))


def test_rule_without_processors_is_the_greedy_one():
    tree, logits = DraftTree(torch.tensor([0, 3, 3]), torch.tensor([-1, 0, 1])), torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    path, token = ProcessedRule(torch.tensor([[1, 0]]), LogitsProcessorList(), do_sample=False)(tree, logits, temperature=0.0, generator=None)
    expected = verify_greedy(tree.tokens, tree.parents, logits)
    assert torch.equal(path, expected[0]) and token == expected[1]
    only = ProcessedRule(torch.tensor([[1, 0]]), LogitsProcessorList([TopKLogitsWarper(1)]), do_sample=True)  # a sample of one
    assert only(tree, logits, temperature=1.0, generator=torch.Generator())[1] == expected[1]


def test_refusals(model):
    ids, decoding = torch.randint(3, 260, (1, 5)), TreeDecoding(NoDraft())
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="without padding"):
        model.generate(ids, attention_mask=mask, custom_generate=decoding, max_new_tokens=2, do_sample=False)
    with pytest.raises(ValueError, match="batch of one"):
        write(model, ids.expand(2, -1), decoding)
    with pytest.raises(ValueError, match="does not return output_scores"):
        write(model, ids, decoding, output_scores=True, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="reads input_ids only, got inputs_embeds"):
        decoding(model, ids, LogitsProcessorList(), [], model.generation_config, inputs_embeds=torch.zeros(1, 5, 32))
    with pytest.raises(ValueError, match="cannot be trimmed"):
        write(model, ids, decoding, cache_implementation="static")
