"""The decoding loop: the same text as plain decoding, whatever is guessed, on models of several kinds."""
import pytest
import torch
from scipy.stats import chisquare
from transformers import (AutoConfig, AutoModelForCausalLM, BloomConfig, GPTNeoConfig, MambaConfig, MistralConfig, StaticCache, StopStringCriteria,
                          StoppingCriteriaList, T5Config, T5ForConditionalGeneration)

from tokenkit.core.hub import byte_tokenizer
from tokenkit.decode.engine import DecodeResult, NoDraft, check_model, commit_path, generate, read_tree, trimmable_cache
from tokenkit.decode.trees import DraftTree, verify_exact

SIZES = dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=128,
             bos_token_id=1, eos_token_id=2, pad_token_id=0)
KINDS = {"llama": dict(num_key_value_heads=2), "gpt2": dict(tie_word_embeddings=False), "gpt_neox": {}, "qwen3": dict(num_key_value_heads=2, head_dim=8), "opt": dict(ffn_dim=48, word_embed_proj_dim=32)}


def tiny(kind="llama", attention="sdpa", dtype=torch.float32, **more):
    torch.manual_seed(0)
    sizes = {**SIZES, **KINDS[kind], **more}
    if kind in ("gpt2", "opt"):
        sizes.pop("intermediate_size")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), dtype=dtype, attn_implementation=attention).eval()
    for p in model.parameters():  # random weights of the usual size say the same token for ever
        p.data.mul_({"gpt2": 6, "opt": 8}.get(kind, 3) if p.ndim > 1 else 1)
    return model


def greedy(model, ids, tokens, **more):
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, **{"pad_token_id": 0, **more})
    return out[0, ids.shape[1]:]


def prompt(length=7, vocab=60, seed=1):
    return torch.randint(3, vocab, (1, length), generator=torch.Generator().manual_seed(seed))


class Mixed:
    """Knows the text, and hides it among wrong guesses: the right token comes second, and is right with a given chance."""

    def __init__(self, text, chance, vocab=60, seed=0):
        self.text, self.chance, self.vocab, self.generator = text, chance, vocab, torch.Generator().manual_seed(seed)
        self.seen, self.largest = [], 0

    def draft(self, context):
        tokens, parents, here = [int(context[-1])], [-1], 0
        for right in self.text[len(context):len(context) + 4]:
            right = int(right) if torch.rand((), generator=self.generator) < self.chance else (int(right) + 7) % self.vocab
            wrong = [t for t in torch.randperm(self.vocab, generator=self.generator)[:3].tolist() if t != right]
            tokens += [wrong[0], right, wrong[1]]
            parents += [here] * 3
            here = len(tokens) - 2
        self.largest = max(self.largest, len(tokens))
        return DraftTree(torch.tensor(tokens), torch.tensor(parents))

    def observe(self, tree, logits, path):
        assert logits.shape == (len(tree), self.vocab) and path[0] == 0
        self.seen.append(tree.tokens[path].tolist())

    def reset(self):
        self.seen = []


@pytest.mark.parametrize("kind,attention", [*((kind, "sdpa") for kind in KINDS), ("llama", "eager"), ("gpt2", "eager")])
@pytest.mark.parametrize("chance", [0.0, 0.7])
def test_text_is_that_of_transformers(kind, attention, chance):
    model, ids = tiny(kind, attention), prompt()
    theirs = greedy(model, ids, 24)
    assert len(set(theirs.tolist())) > 3, "a text worth comparing"
    drafter = Mixed(torch.cat([ids[0], theirs]), chance)
    ours = generate(model, ids, drafter, max_new_tokens=24)
    assert torch.equal(ours.tokens, theirs)
    assert sum(ours.accepted) == len(ours.tokens) and len(ours.accepted) == ours.steps and ours.seconds > 0
    assert ours.mean_accepted == pytest.approx(len(theirs) / ours.steps) and (ours.mean_accepted > 1.5) == (chance > 0)


@pytest.mark.parametrize("kind,attention", [("llama", "sdpa"), ("gpt2", "eager"), ("gpt_neox", "sdpa")])
def test_a_node_reads_what_a_plain_pass_over_its_path_reads(kind, attention):
    model, ids = tiny(kind, attention), prompt()
    tree = DraftTree(torch.tensor([ids[0, -1], 4, 9, 5, 4, 8]), torch.tensor([-1, 0, 0, 1, 2, 4]))
    cache = trimmable_cache(model)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache)
        logits = read_tree(model, tree, cache)
        for path in tree.paths():
            plain = model(torch.cat([ids[0, :-1], tree.tokens[path]])[None]).logits[0, -len(path):]
            torch.testing.assert_close(logits[path], plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("path", [[0], [0, 1], [0, 2, 4, 5], [0, 1, 3]])
def test_keeping_a_path_leaves_the_cache_of_a_fresh_prefill(path):
    model, ids = tiny(), prompt()
    tree = DraftTree(torch.tensor([ids[0, -1], 4, 9, 5, 4, 8]), torch.tensor([-1, 0, 0, 1, 2, 4]))
    cache, fresh = trimmable_cache(model), trimmable_cache(model)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache)
        read_tree(model, tree, cache)
        commit_path(cache, torch.tensor(path), ids.shape[1] - 1)
        model(torch.cat([ids[0, :-1], tree.tokens[path]])[None], past_key_values=fresh)
    assert cache.get_seq_length() == fresh.get_seq_length() == ids.shape[1] - 1 + len(path)
    for ours, theirs in zip(cache.layers, fresh.layers):
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.values, theirs.values, atol=1e-4, rtol=1e-4)


def test_a_root_alone_is_plain_decoding():
    model, ids = tiny(), prompt()
    result = generate(model, ids, NoDraft(), max_new_tokens=9)
    assert torch.equal(result.tokens, greedy(model, ids, 9)) and result.accepted == [1] * 9 and result.mean_accepted == 1
    assert torch.equal(generate(model, ids[:, :1], NoDraft(), max_new_tokens=5).tokens, greedy(model, ids[:, :1], 5)), "a prompt of one token"


@pytest.mark.parametrize("tokens", [1, 2, 3, 5])
def test_the_budget_is_kept_and_no_tree_reads_beyond_it(tokens):
    model, ids = tiny(max_position_embeddings=7 + tokens), prompt()
    text = torch.cat([ids[0], greedy(tiny(), ids, 12)])
    drafter = Mixed(text, 1.0)
    result = generate(model, ids, drafter, max_new_tokens=tokens)
    assert torch.equal(result.tokens, text[7:7 + tokens]) and sum(result.accepted) == tokens


def test_text_ends_at_the_end_token_inside_a_pass():
    model, ids = tiny(), prompt()
    text = greedy(model, ids, 20)
    eos = next(int(t) for i, t in enumerate(text.tolist()) if i >= 3 and t not in text[:i].tolist())
    theirs = greedy(model, ids, 20, eos_token_id=eos)
    ours = generate(model, ids, Mixed(torch.cat([ids[0], text]), 1.0), max_new_tokens=20, eos_token_id=eos)
    assert torch.equal(ours.tokens, theirs) and ours.tokens[-1] == eos and sum(ours.accepted) == len(theirs)
    several = generate(model, ids, NoDraft(), max_new_tokens=20, eos_token_id=[eos, 59])
    assert torch.equal(several.tokens, theirs)
    model.generation_config.eos_token_id = eos
    assert torch.equal(generate(model, ids, NoDraft(), max_new_tokens=20).tokens, theirs), "the model's own end"
    assert len(generate(model, ids, NoDraft(), max_new_tokens=20, eos_token_id=()).tokens) == 20, "() never stops"


def test_stop_strings_streaming_and_the_prompt():
    tokenizer = byte_tokenizer()
    model = tiny(vocab_size=len(tokenizer))
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    text = greedy(model, ids, 30)
    stop = next(c for c in map(tokenizer.decode, text[5:-1, None]) if c.isascii() and c.isprintable())

    class Ear:
        heard, ended = [], False
        def put(self, value): self.heard.append(value)
        def end(self): self.ended = True

    ear = Ear()
    drafter = Mixed(torch.cat([ids[0], text]), 1.0, vocab=len(tokenizer))
    ours = generate(model, ids, drafter, max_new_tokens=30, stop_strings=[stop], tokenizer=tokenizer, streamer=ear)
    theirs = greedy(model, ids, 30, stopping_criteria=StoppingCriteriaList([StopStringCriteria(tokenizer, [stop])]))
    assert torch.equal(ours.tokens, theirs) and len(theirs) < 30
    assert ear.ended and torch.equal(ear.heard[0], ids) and torch.equal(torch.cat(ear.heard[1:]), ours.tokens) and len(ear.heard) == 1 + ours.steps
    with pytest.raises(ValueError, match="stop_strings need the model's tokenizer"):
        generate(model, ids, NoDraft(), max_new_tokens=3, stop_strings="a")


def test_goes_on_from_a_cache():
    model, ids = tiny(), prompt()
    whole, cache = greedy(model, ids, 16), trimmable_cache(model)
    drafter = Mixed(torch.cat([ids[0], whole]), 0.8)
    first = generate(model, ids, drafter, max_new_tokens=8, past_key_values=cache)
    assert cache.get_seq_length() == 7 + 8 - 1
    second = generate(model, torch.cat([ids, first.tokens[None]], 1), drafter, max_new_tokens=8, past_key_values=cache)
    assert torch.equal(torch.cat([first.tokens, second.tokens]), whole)
    with pytest.raises(ValueError, match="its last token must not be cached"):
        generate(model, ids, drafter, max_new_tokens=2, past_key_values=cache)


def test_prompt_is_shown_to_those_who_ask():
    model, ids = tiny(), prompt()

    class Curious(NoDraft):
        learn_from_prompt, shown = True, []
        def observe_prompt(self, tokens, logits): self.shown.append((tokens, logits))

    generate(model, ids, Curious(), max_new_tokens=1)
    (tokens, logits), = Curious.shown
    assert torch.equal(tokens, ids[0, :-1]) and torch.allclose(logits, model(ids[:, :-1]).logits[0], atol=1e-4)
    Curious.learn_from_prompt = False
    generate(model, ids, Curious(), max_new_tokens=1)
    assert len(Curious.shown) == 1


@pytest.mark.parametrize("stated", [False, True])
def test_sampled_text_follows_the_model(stated):
    model, ids = tiny(vocab_size=6, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1), prompt(3, 6)
    with torch.no_grad():
        first = torch.softmax(model(ids).logits[0, -1] / 0.8, 0)
        pairs = torch.stack([first[t] * torch.softmax(model(torch.cat([ids, torch.tensor([[t]])], 1)).logits[0, -1] / 0.8, 0) for t in range(6)])
    generator = torch.Generator().manual_seed(3)
    draft = torch.softmax(torch.randn(6, generator=generator), 0)

    class Drawn(NoDraft):
        def draft(self, context):
            tokens = torch.cat([context[-1:], torch.multinomial(draft, 3, generator=generator), torch.multinomial(draft, 1, generator=generator)])
            return DraftTree(tokens, torch.tensor([-1, 0, 0, 0, 1]), draft_probs=draft.expand(5, 6) if stated else None)

    counts = torch.zeros(6, 6)
    for _ in range(500):
        result = generate(model, ids, Drawn(), max_new_tokens=2, temperature=0.8, generator=generator, eos_token_id=())
        counts[tuple(result.tokens.tolist())] += 1
    expected, often = 500 * pairs.double(), pairs * 900 >= 5
    seen = torch.cat([counts[often], counts[~often].sum()[None]]) if (~often).any() else counts[often]
    wanted = torch.cat([expected[often], expected[~often].sum()[None]]) if (~often).any() else expected[often]
    assert chisquare(seen, wanted * seen.sum() / wanted.sum()).pvalue > 1e-3


def test_same_seed_same_text():
    model, ids = tiny(), prompt()
    runs = [generate(model, ids, Mixed(torch.arange(60) % 50, 0.5), max_new_tokens=10, temperature=1.0, generator=torch.Generator().manual_seed(4)).tokens for _ in range(2)]
    assert torch.equal(*runs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs(dtype):
    model, ids = tiny(dtype=dtype), prompt()
    text = torch.cat([ids[0], greedy(tiny(), ids, 12)])
    assert len(generate(model, ids, Mixed(text, 0.8), max_new_tokens=12).tokens) == 12


def test_another_rule_and_its_bad_paths():
    model, ids = tiny(), prompt()
    drafter = Mixed(torch.cat([ids[0], greedy(model, ids, 12)]), 1.0)
    result = generate(model, ids, drafter, max_new_tokens=6, verify=lambda tree, logits, *, temperature, generator: (torch.tensor([0]), 11))
    assert result.tokens.tolist() == [11] * 6
    for path in ([1], [], [0, 1, 2]):
        with pytest.raises(ValueError, match="path from the root downwards"):
            generate(model, ids, drafter, max_new_tokens=6, verify=lambda tree, logits, *, temperature, generator: (torch.tensor(path, dtype=torch.long), 1))


class Says(NoDraft):
    def __init__(self, tree): self.tree = tree
    def draft(self, context): return self.tree


def test_bad_arguments():
    model, ids = tiny(), prompt()
    for wrong, message in ((ids.expand(2, -1), "batch of one"), (ids[0], "batch of one"), (ids[:, :0], "batch of one")):
        with pytest.raises(ValueError, match=message):
            generate(model, wrong, NoDraft(), max_new_tokens=2)
    for more, message in ((dict(max_new_tokens=0), "max_new_tokens must be at least 1, got 0"), (dict(max_new_tokens=2, temperature=-0.5), "temperature must be at least 0")):
        with pytest.raises(ValueError, match=message):
            generate(model, ids, NoDraft(), **more)
    with pytest.raises(ValueError, match="the root of a draft must be the last token"):
        generate(model, ids, Says(DraftTree(torch.tensor([(int(ids[0, -1]) + 1) % 60]), torch.tensor([-1]))), max_new_tokens=2)
    model.lm_head.weight.data[:] = float("nan")
    with pytest.raises(ValueError, match="logits must be finite"):
        generate(model, ids, Says(DraftTree(torch.tensor([-1]), torch.tensor([-1]))), max_new_tokens=2)


@pytest.mark.parametrize("config,message", [
    (MistralConfig(**{**SIZES, "num_key_value_heads": 2}, sliding_window=4), "SlidingWindow.*cannot be trimmed"),
    (MambaConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1), "state cannot be trimmed"),
    (BloomConfig(vocab_size=60, hidden_size=16, n_layer=1, n_head=2), "cannot be told where|not distances"),
    (GPTNeoConfig(vocab_size=60, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]), "not distances")])
def test_models_that_cannot_read_a_tree_are_refused(config, message):
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=message):
        generate(model, prompt(), NoDraft(), max_new_tokens=2)


def test_other_caches_and_attentions_are_refused():
    model, ids = tiny(), prompt()
    with pytest.raises(ValueError, match="StaticCache.*cannot be trimmed"):
        generate(model, ids, NoDraft(), max_new_tokens=2, past_key_values=StaticCache(config=model.config, max_cache_len=32))
    with pytest.raises(ValueError, match="decoder-only"):
        check_model(T5ForConditionalGeneration(T5Config(vocab_size=60, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)))
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='sdpa' or 'eager', got 'flash_attention_2'"):
        generate(model, ids, NoDraft(), max_new_tokens=2)


@pytest.mark.parametrize("path,past", [([0, 9], 6), ([-1], 6), ([0], 99), ([0], -1)])
def test_rows_that_the_cache_does_not_hold(path, past):
    model, cache = tiny(), None
    cache = trimmable_cache(model)
    with torch.no_grad():
        model(prompt(), past_key_values=cache)
    with pytest.raises(ValueError, match="path must name rows"):
        commit_path(cache, torch.tensor(path), past)


def test_verify_exact_is_the_default():
    model, ids = tiny(), prompt()
    drafter = Mixed(torch.cat([ids[0], greedy(model, ids, 10)]), 0.6)
    assert torch.equal(*(generate(model, ids, drafter, max_new_tokens=10, verify=rule).tokens for rule in (None, verify_exact)))
    assert DecodeResult(torch.arange(6), 3, [2, 2, 2], 0.1).mean_accepted == 2
