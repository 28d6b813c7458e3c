"""Comparisons of drafters: prompts, replay, races."""
import pytest
import torch

from tokenkit.core.hub import byte_tokenizer, hub_causal_lm
from tokenkit.decode.compare import (PROMPTS, TUNING_PROMPTS, PromptLookup, Run, chat_ids, kind_of, race, replay, standing, tokens_per_pass, with_drafter,
                                     with_transformers)
from tokenkit.decode.engine import NoDraft, generate


@pytest.fixture(scope="module")
def model():
    return hub_causal_lm("a/toy-llama", "toy")[0]


def prompt(seed=1, length=8):
    return torch.randint(3, 260, (1, length), generator=torch.Generator().manual_seed(seed))


def test_prompts_are_distinct_and_balanced():
    assert len(set(PROMPTS) | set(TUNING_PROMPTS)) == len(PROMPTS) + len(TUNING_PROMPTS) == 36
    assert kind_of(0) == kind_of(6) == "code" and kind_of(3) == "rewrite"


@pytest.mark.parametrize("num_tokens", [1, 3, 10])
def test_replay_counts_what_a_run_counts_and_what_transformers_needs(model, num_tokens):
    ids = torch.cat([prompt(3, 12)] * 2, dim=1)
    run = generate(model, ids, PromptLookup(num_tokens), max_new_tokens=60)
    assert replay(PromptLookup(num_tokens), ids[0], run.tokens) == run.accepted
    passes = []
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=60, prompt_lookup_num_tokens=num_tokens, pad_token_id=0)
    hook.remove()
    assert torch.equal(out[0, ids.shape[1]:], run.tokens) and abs(len(passes) - run.steps) <= 1


def test_tokens_per_pass_and_bad_replays(model):
    assert tokens_per_pass([[1, 3], [2]]) == 2
    assert tokens_per_pass([generate(model, prompt(), PromptLookup(), max_new_tokens=5)]) >= 1
    with pytest.raises(ValueError, match="at least one pass"):
        tokens_per_pass([])
    for prompt_ids, text in ((torch.zeros(0), torch.ones(2)), (torch.ones(1, 2), torch.ones(2)), (torch.ones(2), torch.zeros(0))):
        with pytest.raises(ValueError, match="not empty"):
            replay(PromptLookup(), prompt_ids.long(), text.long())


def test_chat_and_plain_prompts():
    tokenizer = byte_tokenizer()
    assert "assistant" in tokenizer.decode(chat_ids(tokenizer, "Hello")[0]) and chat_ids(tokenizer, "Hello").shape[0] == 1
    tokenizer.chat_template = None
    assert tokenizer.decode(chat_ids(tokenizer, "Hello")[0]) == "Hello"


def test_a_race_and_its_standing(model):
    asked = []
    def counted(run):
        return lambda ids, tokens: (asked.append(int(ids[0, 0])), run(ids, tokens))[1]
    contenders = {"greedy": counted(with_transformers(model)), "lookup": counted(with_transformers(model, prompt_lookup_num_tokens=4)),
                  "ours": counted(with_drafter(model, PromptLookup(4))), "plain": counted(with_drafter(model, NoDraft()))}
    prompts = [prompt(seed) for seed in (1, 2)]
    runs = race(contenders, prompts, 20)
    assert asked == [int(p[0, 0]) for p in prompts for _ in contenders], "in turns"
    for i in range(2):
        greedy, lookup, ours, plain = (runs[name][i] for name in contenders)
        assert greedy.tokens == lookup.tokens == ours.tokens == plain.tokens == greedy.passes == plain.passes
        assert ours.passes <= lookup.passes + 1 and ours.seconds > 0
    assert not model._forward_hooks
    assert standing(runs["greedy"], runs["greedy"])["ratio"] == 1 and standing(runs["plain"], runs["greedy"])["tokens_per_pass"] == 1


def test_standing_by_hand():
    result = standing([Run(10, 5, 1.0), Run(20, 5, 1.0)], [Run(10, 10, 2.0), Run(10, 10, 4.0)])
    assert result == {"tokens_per_pass": 3.0, "tokens_per_second": 15.0, "ratio": 5.0, "low": 3.5, "high": 6.5}
    for runs, baseline in (([], []), ([Run(1, 1, 1.0)], [])):
        with pytest.raises(ValueError, match="must answer the same prompts"):
            standing(runs, baseline)
