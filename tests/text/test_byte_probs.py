"""Next-byte probabilities are sums over all token sequences: compared with enumerating them, for tokenizers and models of several kinds."""
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from tokenkit.text.byte_probs import ByteEnsemble, ByteLM, ByteModel, cover_encodings, next_byte_probs, prefix_logprob, sample_byte
from tokenkit.text.engine import encode_bytes, start_ids, vocab_bytes

TOY = [None, b"a", b"b", b"c", b"ab", b"abc", b"ca", b"bb"]
WEIGHTS = torch.randn(97, len(TOY), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ABC = st.text("abc", max_size=6).map(str.encode)


def longest_match(data):
    ids = []
    while data:
        ids.append(max((i for i, entry in enumerate(TOY) if entry and data.startswith(entry)), key=lambda i: len(TOY[i])))
        data = data[len(TOY[ids[-1]]):]
    return ids


def spell(ids, vocab=TOY):
    return b"".join(vocab[i] for i in ids)


def toy_model(ids):
    return WEIGHTS[sum((n + 1) * (i + 3) for n, i in enumerate(ids)) % 97].log_softmax(-1)


def compositions(context, vocab):
    """All token sequences that reach the end of a context with their last token, without a tokenizer's help."""
    for v, entry in enumerate(vocab):
        if entry is None:
            continue
        if entry.startswith(context):
            yield [v]
        if len(entry) < len(context) and context.startswith(entry):
            yield from ([v, *rest] for rest in compositions(context[len(entry):], vocab))


def covers_by_force(context, vocab, encode):
    return [t for t in compositions(context, vocab) if encode(spell(t, vocab)) == t] if context else [[]]


def log_p(ids, model, start=()):
    return sum((model([*start, *ids[:n]])[ids[n]] for n in range(len(ids))), torch.zeros((), dtype=torch.float64))


def next_by_force(context, vocab, encode, model, start=()):
    """The definition: mass of the covers of the context and one more byte, and of the end, normalised."""
    sums = torch.zeros(257, dtype=torch.float64)
    for ids in covers_by_force(context, vocab, encode):
        mass, surplus = log_p(ids, model, start).exp(), spell(ids, vocab)[len(context):]
        if surplus:
            sums[surplus[0]] += mass
        else:
            row = model([*start, *ids])
            for v, entry in enumerate(vocab):
                if entry is None:
                    sums[256] += mass * row[v].exp()
                elif encode(spell(ids, vocab) + entry) == [*ids, v]:
                    sums[entry[0]] += mass * row[v].exp()
    return sums / sums.sum()


# covers

@settings(max_examples=40, deadline=None)
@given(context=ABC)
def test_covers_by_force(context):
    found = cover_encodings(context, TOY, longest_match)
    assert sorted(ids for ids, _ in found) == sorted(covers_by_force(context, TOY, longest_match))
    assert all(context + surplus == spell(ids) for ids, surplus in found)
    assert [(len(spell(ids[:-1])), ids[-1:]) for ids, _ in found] == sorted((len(spell(ids[:-1])), ids[-1:]) for ids, _ in found), "by head length, then last id"
    assert sum(surplus == b"" for _, surplus in found) == 1


@settings(max_examples=30, deadline=None)
@given(context=ABC)
def test_covers_are_disjoint_and_complete(context):
    """Every valid sequence whose bytes begin with the context has exactly one cover at its beginning."""
    covers = [ids for ids, _ in cover_encodings(context, TOY, longest_match)]
    for more in itertools.product(b"abc", repeat=3):
        ids = longest_match(context + bytes(more))
        assert sum(ids[:len(cover)] == cover for cover in covers) == 1


@pytest.mark.parametrize("text", ["the doc", "a\n\nthe", "a  the", " \n d", "it's", "12 345", "é☕", "x\n\n\n  y"])
@pytest.mark.parametrize("name", ["words", "digits", "whole"])
def test_no_cover_is_missed_with_real_tokenizers(tokenizers, name, text):
    """Blank lines and double spaces are spelled differently once a word follows."""
    tokenizer = tokenizers[name]
    vocab, context = vocab_bytes(tokenizer), text.encode()
    encode = lambda data: encode_bytes(tokenizer, data)
    found = cover_encodings(context, vocab, encode)
    vocab_size = max(len(entry) for entry in vocab if entry)
    expected = [ids for at in range(max(0, len(context) - vocab_size), len(context)) for v, entry in enumerate(vocab) if entry and entry.startswith(context[at:])
                for ids in [encode(context[:at] + entry)] if ids[-1] == v and spell(ids[:-1], vocab) == context[:at]]
    assert sorted(ids for ids, _ in found) == sorted(expected) and len(found) == len({tuple(ids) for ids, _ in found})


def test_covers_of_nothing():
    assert cover_encodings(b"", TOY, longest_match) == [([], b"")]
    assert cover_encodings(b"ca", TOY, longest_match, check_valid=False) == cover_encodings(b"ca", TOY, longest_match), "covers are always valid"
    assert prefix_logprob(b"", TOY, longest_match, toy_model).item() == 0


# probabilities

@settings(max_examples=40, deadline=None)
@given(context=ABC, start=st.sampled_from([(), (0,)]))
def test_probabilities_by_force(context, start):
    exact = next_byte_probs(context, TOY, longest_match, toy_model, start_ids=start)
    torch.testing.assert_close(exact, next_by_force(context, TOY, longest_match, toy_model, start), atol=1e-12, rtol=0)
    assert exact.shape == (257,) and exact.dtype == torch.float64 and math.isclose(exact.sum().item(), 1)
    by_force = torch.stack([log_p(ids, toy_model, start) for ids in covers_by_force(context, TOY, longest_match)]).logsumexp(0)
    torch.testing.assert_close(prefix_logprob(context, TOY, longest_match, toy_model, start_ids=start).double(), by_force, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["words", "digits", "whole"])
def test_a_language_model_by_force(tokenizers, tiny, name):
    """To 1e-6, with a real tokenizer and a Llama with random weights."""
    tokenizer = tokenizers[name]
    model, vocab, start = tiny("llama", len(tokenizer), scale=2.0).double(), vocab_bytes(tokenizer), start_ids(tokenizer)
    encode, known = (lambda data: encode_bytes(tokenizer, data)), {}

    @torch.no_grad()
    def rows(ids):
        if tuple(ids) not in known:
            known[tuple(ids)] = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        return known[tuple(ids)]

    lm = ByteLM(model, tokenizer)
    for context in (b"", b"t", b"the", b"n d", "é".encode()):
        expected = next_by_force(context, vocab, encode, rows, start)
        for made in (next_byte_probs(context, vocab, encode, rows, start_ids=start), lm.next_byte_probs(context)):
            torch.testing.assert_close(made.double(), expected, atol=1e-6, rtol=0)


def chain_model(seed):
    """Letters of a Markov chain of order 2, tokenized by longest match: no mass on invalid sequences or the end."""
    chain = (1.2 * torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).softmax(-1)

    def text(data):
        letters = [b - ord("a") for b in data]
        return math.prod(chain[i, j, k].item() for i, j, k in zip(letters, letters[1:], letters[2:])) / 3 ** min(2, len(letters))

    def tokens(ids):
        more = (spell(ids) + bytes(m) for m in itertools.product(b"abc", repeat=2))
        return sum(text(data) for data in more if longest_match(data)[:len(ids)] == list(ids))

    return chain, lambda ids: torch.tensor([tokens([*ids, v]) / tokens(ids) if v else 0.0 for v in range(len(TOY))], dtype=torch.float64).log()


@settings(max_examples=12, deadline=None)
@given(context=st.text("abc", min_size=2, max_size=6).map(str.encode), seed=st.integers(0, 3))
def test_the_chain_is_recovered_and_the_chain_rule_holds(context, seed):
    chain, model = chain_model(seed)
    probs = next_byte_probs(context, TOY, longest_match, model)
    torch.testing.assert_close(probs[list(b"abc")], chain[context[-2] - 97, context[-1] - 97], atol=1e-10, rtol=0)
    before = prefix_logprob(context, TOY, longest_match, model)
    for b in b"abc":
        torch.testing.assert_close(prefix_logprob(context + bytes([b]), TOY, longest_match, model), before + probs[b].log())


def test_single_bytes_are_the_models_own():
    vocab, row = [*(bytes([b]) for b in range(256)), None, None], torch.randn(258).log_softmax(-1)
    probs = next_byte_probs(b"any", vocab, list, lambda ids: row)
    torch.testing.assert_close(probs, torch.cat([row[:256].exp(), row[256:].exp().sum(0, keepdim=True)]))


@settings(max_examples=20, deadline=None)
@given(context=ABC)
def test_fast_mode_lets_every_entry_follow(context):
    """P(T) p(v | T) for all v, valid or not; the covers stay valid."""
    sums = torch.zeros(257, dtype=torch.float64)
    for ids in covers_by_force(context, TOY, longest_match):
        surplus = spell(ids)[len(context):]
        if surplus:
            sums[surplus[0]] += log_p(ids, toy_model).exp()
    whole = longest_match(context)
    for v, entry in enumerate(TOY):
        sums[entry[0] if entry else 256] += (log_p(whole, toy_model) + toy_model(whole)[v]).exp()
    made = next_byte_probs(context, TOY, longest_match, toy_model, check_valid=False)
    torch.testing.assert_close(made, sums / sums.sum(), atol=1e-12, rtol=0)


def test_gradient_and_dtype():
    logits = torch.randn(len(TOY), requires_grad=True)
    probs = next_byte_probs(b"ab", TOY, longest_match, lambda ids: logits.log_softmax(-1))
    probs[ord("c")].log().backward()
    assert torch.isfinite(logits.grad).all() and logits.grad.abs().sum() > 0
    assert next_byte_probs(b"ab", TOY, longest_match, lambda ids: logits.bfloat16().log_softmax(-1)).dtype == torch.float32


def test_shorter_rows_are_padded_and_longer_ones_refused():
    vocab = [*TOY, b"c", None]
    torch.testing.assert_close(next_byte_probs(b"ab", vocab, longest_match, toy_model), next_byte_probs(b"ab", TOY, longest_match, toy_model))
    for function in (next_byte_probs, prefix_logprob):
        with pytest.raises(ValueError, match="vocab must have an entry for each log-probability: it has 7"):
            function(b"ab", TOY[:7], longest_match, toy_model)


def test_contexts_that_nothing_covers():
    bos_first = lambda data: [0, *longest_match(data)]
    for function in (cover_encodings, lambda *a: prefix_logprob(*a, toy_model), lambda *a: next_byte_probs(*a, toy_model)):
        with pytest.raises(ValueError, match="has no cover"):
            function(b"abz", TOY, longest_match)
        with pytest.raises(ValueError, match="encode adds something"):
            function(b"ab", TOY, bos_first)
        with pytest.raises(ValueError, match="context must be bytes, got str"):
            function("ab", TOY, longest_match)


def test_rows_that_are_no_log_probabilities():
    for row in (torch.ones(len(TOY)), torch.full((len(TOY),), math.nan)):
        with pytest.raises(ValueError, match="must give log-probabilities"):
            next_byte_probs(b"ab", TOY, longest_match, lambda ids: row)
    with pytest.raises(ValueError, match="vocab must have an entry"):
        next_byte_probs(b"ab", TOY, longest_match, lambda ids: torch.zeros(1, len(TOY)))
    with pytest.raises(ValueError, match="probability zero"):
        next_byte_probs(b"ab", TOY, longest_match, lambda ids: torch.full((len(TOY),), -math.inf))


# models

@pytest.mark.parametrize("kind, name", [("llama", "words"), ("gpt2", "digits"), ("mamba", "words"), ("bloom", "digits"), ("qwen3", "whole")])
@pytest.mark.parametrize("check_valid", [True, False])
def test_byte_lm_is_the_plain_function(tokenizers, tiny, kind, name, check_valid):
    tokenizer = tokenizers[name]
    model, vocab, start = tiny(kind, len(tokenizer) + 12, scale=2.0), vocab_bytes(tokenizer) + [None] * 12, start_ids(tokenizer)
    rows = torch.no_grad()(lambda ids: model(torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1))
    lm = ByteLM(model, tokenizer, check_valid=check_valid)
    prompts = ["the interp", "def area(self):\n    ret", "it's ", "☕".encode()[:2]]
    together = lm.many(prompts)
    for prompt, probs in zip(prompts, together):
        data = prompt.encode() if isinstance(prompt, str) else prompt
        expected = next_byte_probs(data, vocab, lambda d: encode_bytes(tokenizer, d), rows, start_ids=start, check_valid=check_valid)
        torch.testing.assert_close(probs, expected, atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(lm.next_byte_probs(prompt), expected, atol=2e-4, rtol=1e-3)


def test_a_tokenizer_that_puts_a_space_in_front(tokenizers, tiny):
    tokenizer = tokenizers["prefix"]
    lm = ByteLM(tiny("llama", len(tokenizer)), tokenizer)
    assert lm.start == (1,) and math.isclose(lm.next_byte_probs("").sum().item(), 1, rel_tol=1e-5)
    torch.testing.assert_close(lm.text_logprobs("the doc").exp().log(), torch.stack([lm.next_byte_probs(b"the doc"[:n])[b"the doc"[n]].log() for n in range(7)]), atol=1e-4, rtol=1e-3)


def test_texts_cost_what_their_bytes_cost(tokenizers, tiny):
    lm = ByteLM(tiny("llama", 380, scale=2.0), tokenizers["words"])
    text, prompt = "the docs, é☕ " * 4, "We read "
    one_by_one = [lm.next_byte_probs(prompt.encode() + text.encode()[:n])[b] for n, b in enumerate(text.encode())]
    torch.testing.assert_close(lm.text_logprobs(text, prompt), torch.stack(one_by_one).log(), atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="text must not be empty"):
        lm.text_logprobs("")


def test_one_pass_a_byte(tokenizers, tiny):
    lm = ByteLM(tiny("llama", 380, scale=2.0), tokenizers["words"])
    lm.next_byte_probs("The interpreter reads the docu" * 4)
    calls = lm.reader.calls
    assert calls <= 2, "the heads of a prompt are read together"
    new = lm.generate("The interpreter reads the docu" * 4, 12, temperature=0.0)
    assert len(new) == 12 and lm.reader.calls - calls <= 12


def test_writing(tokenizers, tiny):
    lm = ByteLM(tiny("llama", 380, scale=1.5), tokenizers["words"])
    seeded = lambda seed: torch.Generator().manual_seed(seed)
    assert lm.generate("the", 8, generator=seeded(1)) == lm.generate(b"the", 8, generator=seeded(1))
    assert lm.generate("the", 8, generator=seeded(1)) != lm.generate("the", 8, generator=seeded(2))
    assert lm.generate("the", 0) == b""
    greedy = b""
    for _ in range(5):
        greedy += bytes([int(lm.next_byte_probs(b"the" + greedy)[:256].argmax())])
    assert lm.generate("the", 5, temperature=0.0) == greedy == lm.generate("the", 5, top_p=1e-9)


class Fixed(ByteModel):
    def __init__(self, probs):
        self.probs = torch.tensor([probs.get(b, 0.0) for b in range(257)])

    def many(self, prompts):
        return self.probs.expand(len(prompts), -1)


def test_writing_stops_at_the_end():
    assert Fixed({65: 0.4, 256: 0.6}).generate("x", 10, temperature=0.0) == b""
    assert Fixed({65: 0.6, 256: 0.4}).generate("x", 10, temperature=0.0) == b"A" * 10
    lengths = [len(Fixed({65: 0.5, 256: 0.5}).generate("", 50, generator=torch.Generator().manual_seed(seed))) for seed in range(300)]
    assert 0.8 < sum(lengths) / 300 < 1.25


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.6), (0.7, 0.9)])
def test_draws_follow_the_authors_rule(temperature, top_p):
    probs = torch.zeros(257)
    probs[list(b"abcd")] = torch.tensor([0.5, 0.3, 0.15, 0.05])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.bincount(torch.tensor([sample_byte(probs, temperature, top_p, generator) for _ in range(4000)]), minlength=257) / 4000
    expected = (probs + 1e-7) ** (1 / temperature) * (probs > 0)
    expected = expected / expected.sum()
    kept = [b for n, b in enumerate(b"abcd") if expected[list(b"abcd")[:n]].sum() <= top_p]
    expected = torch.zeros(257).index_put((torch.tensor(kept),), expected[kept])
    torch.testing.assert_close(drawn, expected / expected.sum(), atol=0.03, rtol=0)


def test_sampling_refuses():
    lm = Fixed({65: 1.0})
    for temperature in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature must be at least 0"):
            lm.generate("a", 3, temperature=temperature)
    for top_p in (0.0, 1.1):
        with pytest.raises(ValueError, match=r"top_p must be in \(0, 1\]"):
            lm.generate("a", 0, top_p=top_p)
    with pytest.raises(ValueError, match="max_new_bytes must not be negative, got -1"):
        lm.generate("a", -1)
    with pytest.raises(ValueError, match="prompt must be a string or bytes, got list"):
        lm.generate([1, 2], 1)


def test_start_ids(tokenizers, tiny):
    model = tiny("llama", 380, scale=2.0)
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizers["words"].backend_tokenizer.to_str()))
    with pytest.raises(ValueError, match="start_ids are needed"):
        ByteLM(model, bare)
    assert ByteLM(model, bare, start_ids=[7, 8]).start == (7, 8)
    one, other = (ByteLM(model, tokenizers["words"], start_ids=ids).next_byte_probs("the") for ids in ([5, 6], [0]))
    assert not torch.allclose(one, other), "what is read before the prompt matters"


def test_prompts_with_special_tokens_have_no_cover(tokenizers, tiny):
    with pytest.raises(ValueError, match="no cover"):
        ByteLM(tiny("llama", 380), tokenizers["words"]).next_byte_probs("the<|endoftext|>")


def test_half_precision_model(tokenizers, tiny):
    exact, half = (ByteLM(tiny("llama", 380, scale=1.0, dtype=dtype), tokenizers["words"]).next_byte_probs("the doc") for dtype in (torch.float32, torch.bfloat16))
    assert half.dtype == torch.float32 and (exact - half).abs().max() < 0.02


# ensembles

def test_an_ensemble_averages(tokenizers, tiny):
    first, second = ByteLM(tiny("llama", 380, scale=2.0), tokenizers["words"]), ByteLM(tiny("gpt2", len(tokenizers["whole"])), tokenizers["whole"])
    a, b = first.next_byte_probs("the doc"), second.next_byte_probs("the doc")
    torch.testing.assert_close(ByteEnsemble([first, first]).next_byte_probs("the doc"), a)
    torch.testing.assert_close(ByteEnsemble([first, second]).next_byte_probs("the doc"), (a + b) / 2)
    torch.testing.assert_close(ByteEnsemble([first, second], [3, 1]).next_byte_probs("the doc"), 0.75 * a + 0.25 * b)
    torch.testing.assert_close(ByteEnsemble([first, second], [0, 2]).next_byte_probs("the doc"), b)
    assert len(ByteEnsemble([first, second]).generate("the", 4, generator=torch.Generator().manual_seed(0))) <= 4


def test_an_ensemble_refuses():
    lm = Fixed({65: 1.0})
    for weights in ([-1, 2], [0, 0], [math.nan, 1], [math.inf, 1]):
        with pytest.raises(ValueError, match="not negative, and not all zero"):
            ByteEnsemble([lm, lm], weights)
    for lms, weights in (([], None), ([lm], [1, 1])):
        with pytest.raises(ValueError, match="weights must be one a model"):
            ByteEnsemble(lms, weights)
    with pytest.raises(NotImplementedError):
        ByteModel().next_byte_probs("a")


@pytest.mark.network
def test_smollm2_after_part_of_a_word():
    from tokenkit.core.assets import causal_lm

    model, tokenizer = causal_lm()
    lm = ByteLM(model, tokenizer)
    probs = lm.next_byte_probs("The interpreter reads the docu")
    assert probs.argmax() == ord("m") and probs[ord("m")] > 0.95
    assert lm.reader.calls == 1
    assert lm.generate("The capital of France is Par", 2, temperature=0.0) == b"is"
