"""DySpec: the order of growth, drawing without replacement, exact text, and a draft model's cache."""
import heapq

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import AutoConfig, AutoModelForCausalLM

from tokenkit.decode import dyspec
from tokenkit.decode.dyspec import (DraftReader, DySpec, Growth, branching, checked_rows, draw_chances, dynamic_tree, expected_accepted, fixed_tree, grow,
                                    threshold_tree)
from tokenkit.decode.engine import generate, verify_sampling
from tokenkit.decode.trees import DraftTree, check_tree

VOCAB = 40


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_draft(seed, vocab=7, sharp=2.0, dtype=torch.float32):
    """Looks at one token; the root counts as the last."""
    table = torch.softmax(sharp * torch.randn(vocab, vocab, generator=seeded(seed), dtype=torch.float64), dim=-1).to(dtype)
    return lambda path: table[path[-1] if path else -1]


def tiny(kind="llama", attention="sdpa", dtype=torch.float32, seed=0, **more):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    sizes |= dict(num_key_value_heads=2, intermediate_size=48) if kind == "llama" else dict(tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **more}), dtype=dtype, attn_implementation=attention).eval()
    model.lm_head.weight.data.mul_(20)  # fresh weights are a flat draft
    return model


def relative(model, seed=1, noise=0.3):
    """A model that often agrees with another one."""
    import copy
    other = copy.deepcopy(model)
    torch.manual_seed(seed)
    for p in other.parameters():
        p.data += noise * p.data.std() * torch.randn_like(p) if p.ndim > 1 else 0
    return other


def prompt(seed=1, length=8):
    return torch.randint(3, VOCAB, (1, length), generator=seeded(seed))


def algorithm_1(draft_fn, budget, generator):
    """The paper's algorithm, written again in the plainest way."""
    tokens, parents, values, paths = [-1], [-1], [1.0], [()]
    slots, order = [(-1.0, 0, 0, draft_fn(()) / draft_fn(()).sum())], 0
    while slots and len(tokens) <= budget:
        v, _, parent, left = heapq.heappop(slots)
        y = int(torch.multinomial(left, 1, generator=generator))
        tokens.append(y), parents.append(parent), values.append(-v), paths.append((*paths[parent], y))
        p = min(1.0, left[y].item())
        below = draft_fn(paths[-1])
        left = left.clone()
        left[y] = 0
        if left.sum() > 0:
            heapq.heappush(slots, (v * (1 - p), order := order + 1, parent, left / left.sum()))
        heapq.heappush(slots, (v * p, order := order + 1, len(tokens) - 1, below / below.sum()))
    return tokens, parents, values, paths


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 20), st.floats(0, 6), st.sampled_from([torch.float32, torch.float64]))
def test_growth_follows_the_algorithm(seed, budget, sharp, dtype):
    draft = random_draft(seed, sharp=sharp, dtype=dtype)
    tree = dynamic_tree(draft, budget, generator=seeded(seed))
    tokens, parents, values, paths = algorithm_1(draft, budget, seeded(seed))
    assert tree.tokens.tolist() == tokens and tree.parents.tolist() == parents
    assert torch.allclose(tree.values, tree.values.new_tensor(values), atol=1e-6)
    assert tree.draft_probs.dtype == dtype and torch.allclose(tree.draft_probs, torch.stack([draft(path) for path in paths]), atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30), st.floats(0, 8), st.integers(2, 9))
def test_invariants_of_a_dynamic_tree(seed, budget, sharp, vocab):
    tree = dynamic_tree(random_draft(seed, vocab, sharp), budget, generator=seeded(seed))
    check_tree(tree.tokens, tree.parents)  # siblings differ
    assert len(tree) == budget + 1 and tree.tokens[0] == -1 and tree.values[0] == 1
    assert (tree.values[1:].diff() <= 0).all() and tree.draft_probs.shape == (budget + 1, vocab)
    chances = draw_chances(tree)
    assert chances[0] == 1 and (chances > 0).all() and (chances <= 1 + 1e-5).all()
    assert expected_accepted(tree) == pytest.approx(float((tree.values * chances)[1:].sum()), abs=1e-4)
    assert 0 < expected_accepted(tree) <= budget * (1 + 1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.02, 0.9), st.floats(0, 6), st.integers(1, 30))
def test_invariants_of_a_threshold_tree(seed, threshold, sharp, max_size):
    draft = random_draft(seed, sharp=sharp)
    tree = threshold_tree(draft, threshold, max_size=max_size, generator=seeded(seed))
    check_tree(tree.tokens, tree.parents)
    assert (tree.values > threshold).all() and 2 <= len(tree) <= max_size + 1 and (tree.depths.diff() >= 0).all()
    longer = threshold_tree(draft, threshold, max_size=max_size + 7, generator=seeded(seed))
    assert torch.equal(longer.tokens[:len(tree)], tree.tokens) and torch.equal(longer.parents[:len(tree)], tree.parents), "the cut is breadth first"
    chances = draw_chances(tree)
    for node in range(1, len(tree) if len(tree) <= max_size else 0):  # not cut: nothing above the threshold is left out
        children = (tree.parents == node).nonzero().flatten()
        own = float(tree.values[node] * chances[node])
        assert bool(len(children)) == (own > threshold) or own == pytest.approx(threshold, rel=1e-5)


def test_a_sure_draft_makes_a_chain():
    def sure(path):
        return torch.eye(6)[(path[-1] + 1) % 6 if path else 0]
    for tree in (dynamic_tree(sure, 10), threshold_tree(sure, 0.5, max_size=10), fixed_tree(sure, branching(2, 2, *[1] * 8))):
        assert tree.parents.tolist() == [-1, *range(len(tree) - 1)] and tree.tokens[1:].tolist() == [i % 6 for i in range(len(tree) - 1)]
        assert expected_accepted(tree) == len(tree) - 1 == 10 and (tree.values == 1).all()


def test_a_flat_draft_makes_a_fan():
    tree = dynamic_tree(lambda path: torch.ones(12), 10, generator=seeded())  # not normalised: that is done here
    assert (tree.parents[1:] == 0).all() and torch.allclose(tree.draft_probs, torch.full((11, 12), 1 / 12))
    assert torch.allclose(tree.values[1:], torch.tensor([(12 - j) / 12 for j in range(10)]))


def test_a_dry_distribution_opens_no_slot_beside():
    growth = Growth(lambda paths: [torch.tensor([0.5, 0.5, 0.0]) for _ in paths], seeded())
    growth.draw(0), growth.draw(0)
    assert 0 not in growth.open and sorted(path[0] for path in growth.paths[1:]) == [0, 1]
    tree = dynamic_tree(lambda path: torch.tensor([0.5, 0.5, 0.0]), 30, generator=seeded())
    assert len(tree) == 31 and set(tree.tokens[1:].tolist()) == {0, 1}


def test_equal_estimates_are_filled_in_the_order_of_opening():
    tree = dynamic_tree(lambda path: torch.tensor([0.5, 0.5]), 4, generator=seeded())
    assert tree.parents.tolist() == [-1, 0, 0, 1, 2] and tree.values.tolist() == [1, 1, 0.5, 0.5, 0.5], "beside before below"


def test_the_order_by_gain_expects_more():
    many = [[expected_accepted(dynamic_tree(random_draft(s, 12, 2.0), 10, generator=seeded(s), by_gain=gain)) for s in range(60)] for gain in (False, True)]
    assert sum(many[1]) > sum(many[0])


def test_many_paths_are_read_at_once():
    calls, draft = [], random_draft(3, sharp=1)

    def read(paths):
        calls.append(paths)
        return [draft(path) for path in paths]
    tree = grow(read, 20, seeded(5))
    assert [path for call in calls for path in call] == [(), *(tuple(tree.tokens[nodes].tolist()) for nodes in paths_of(tree))]
    assert len(calls) < 12 and torch.equal(tree.tokens, dynamic_tree(draft, 20, generator=seeded(5)).tokens)


def paths_of(tree):
    paths = [[]]
    for node, parent in enumerate(tree.parents.tolist()[1:], 1):
        paths.append([*paths[parent], node])
    return paths[1:]


def test_expected_accepted_by_hand():
    rows = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    tree = DraftTree(torch.tensor([-1, 0, 1, 0]), torch.tensor([-1, 0, 0, 1]), rows)
    assert draw_chances(tree).tolist() == pytest.approx([1, 0.6, 0.75, 0.5])
    assert expected_accepted(tree) == pytest.approx(0.6 + 0.4 * 0.75 + 0.6 * 0.5)
    impossible = DraftTree(torch.tensor([-1, 0, 1]), torch.tensor([-1, 0, 0]), torch.tensor([[1.0, 0.0]] * 3))
    assert expected_accepted(impossible) == 1 and draw_chances(impossible)[2] == 0


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_fixed_shapes(seed):
    shape = branching(3, 2, 1, budget=14)
    tree = fixed_tree(random_draft(seed), shape, generator=seeded(seed))
    assert len(tree) == 15 and (tree.parents == 0).sum() == 3 and tree.depths.max() == 3
    assert expected_accepted(tree) == pytest.approx(float((tree.values * draw_chances(tree))[1:].sum()), abs=1e-4)
    narrow = fixed_tree(lambda path: torch.tensor([0.5, 0.5]), shape, generator=seeded(seed))
    assert (narrow.parents == 0).sum() == 2 and len(narrow) == 1 + 2 + 4 + 4, "two tokens have no third sibling"


class MoreDraws(Exception):
    """A script of draws is too short: holds the distribution that the next one is drawn from."""


def all_outcomes(monkeypatch, build):
    """Every tree that can be drawn, with its probability."""
    scripts = [[]]
    while scripts:
        script, position, chance = scripts.pop(), 0, 1.0

        def scripted(residual, generator):
            nonlocal position, chance
            if position == len(script):
                raise MoreDraws(residual)
            token = script[position]
            position, chance = position + 1, chance * residual[token].item()
            return token
        monkeypatch.setattr(dyspec, "sample", scripted)
        try:
            yield build(), chance
        except MoreDraws as more:
            scripts += [[*script, token] for token in more.args[0].nonzero().flatten().tolist()]


def two_tokens(tree, true):
    """Exact distribution of the first two tokens that the rule writes, (V, V), by the definition of the rule."""
    joint, left, draft, looked = torch.zeros(len(true) - 1, len(true) - 1, dtype=torch.float64), true[-1].clone(), tree.draft_probs[0].clone(), 1.0

    def next_token(node, target):
        out, left, draft, looked = torch.zeros_like(target), target.clone(), tree.draft_probs[node].clone(), 1.0
        for child in (tree.parents == node).nonzero().flatten().tolist():
            y = int(tree.tokens[child])
            accept = min(1.0, float(left[y] / draft[y]))
            out[y] += looked * accept
            looked *= 1 - accept
            left, draft = rejected(left, draft, y)
        return out + looked * left

    for child in (tree.parents == 0).nonzero().flatten().tolist():
        y = int(tree.tokens[child])
        accept = min(1.0, float(left[y] / draft[y]))
        joint[y] += looked * accept * next_token(child, true[y])
        looked *= 1 - accept
        left, draft = rejected(left, draft, y)
    return joint + looked * left[:, None] * true[:-1]  # a bonus token, then a new pass


def rejected(left, draft, y):
    rest = (left - draft).clamp(min=0)
    left = rest / rest.sum() if rest.sum() > 1e-12 else left
    draft = draft.clone()
    draft[y] = 0
    return left, draft / draft.sum() if draft.sum() > 0 else draft


@pytest.mark.parametrize("build", [lambda d: dynamic_tree(d, 3), lambda d: dynamic_tree(d, 3, by_gain=True), lambda d: threshold_tree(d, 0.35, max_size=3)],
                         ids=["budget", "by_gain", "threshold"])
@pytest.mark.parametrize("sharp", [0.5, 2.5])
def test_written_tokens_follow_the_target_exactly(monkeypatch, build, sharp):
    true, wrong = torch.softmax(sharp * torch.randn(2, 5, 4, generator=seeded(3), dtype=torch.float64), dim=-1)
    total, joint = 0.0, torch.zeros(4, 4, dtype=torch.float64)
    for tree, chance in all_outcomes(monkeypatch, lambda: build(lambda path: wrong[path[-1] if path else 4])):
        total, joint = total + chance, joint + chance * two_tokens(tree, true)
    assert total == pytest.approx(1) and torch.allclose(joint, true[4][:, None] * true[:4], atol=1e-9)


def test_drawn_tokens_follow_the_target():
    rows, generator, draws = torch.softmax(1.5 * torch.randn(2, 6, 5, generator=seeded(3)), dim=-1), seeded(0), 2000
    true, wrong = rows  # row 5 is what comes first, row t what comes after t
    first, second = torch.zeros(5), torch.zeros(5, 5)
    for _ in range(draws):
        tree = dynamic_tree(lambda path: wrong[path[-1] if path else 5], 3, generator=generator)
        path, token = verify_sampling(tree.tokens, tree.parents, true[torch.where(tree.tokens < 0, 5, tree.tokens)], tree.draft_probs, generator=generator)
        written = [*tree.tokens[path[1:]].tolist(), token]
        first[written[0]] += 1
        if len(written) > 1:
            second[written[0], written[1]] += 1
    for counts, row in [(first, true[5]), *((second[t], true[t]) for t in range(5) if second[t].sum() > 200)]:
        expected = row.double() / row.double().sum() * counts.sum()
        assert chisquare(counts.double(), expected).pvalue > 1e-3


@pytest.mark.parametrize("kind,attention,threshold", [("llama", "sdpa", None), ("llama", "eager", None), ("gpt2", "sdpa", None), ("llama", "sdpa", 0.05), ("gpt2", "eager", 0.05)])
def test_a_draft_model_gives_the_tree_of_a_draft_without_a_cache(kind, attention, threshold):
    model = tiny(kind, attention)
    drafter, again, text = DySpec(model, 14, threshold, generator=seeded(4)), seeded(4), prompt()[0]

    def cold(path):
        with torch.no_grad():
            return torch.softmax(model(torch.cat([text, torch.tensor(path, dtype=torch.long)])[None]).logits[0, -1] / 0.6, dim=-1)
    for step in range(5):
        tree = drafter.draft(text)
        reference = dynamic_tree(cold, 14, generator=again) if threshold is None else threshold_tree(cold, threshold, max_size=14, generator=again)
        assert torch.equal(tree.tokens, reference.tokens) and torch.equal(tree.parents, reference.parents)
        assert torch.allclose(tree.draft_probs, reference.draft_probs, atol=1e-4)
        if step == 1:
            text = prompt(9)[0]  # another text altogether
        elif step == 2:
            text = text[:5]      # a beginning of it
        elif step != 3:          # step 3: the same once more
            text = torch.cat([text, tree.tokens[1:2], torch.tensor([7])])


@pytest.mark.parametrize("threshold", [None, 0.04])
@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_text_is_that_of_plain_decoding(threshold, temperature):
    target = tiny()
    draft = relative(target)
    drafter, gained = DySpec(draft, 12, threshold, temperature, generator=seeded()), []
    for seed in (1, 2):
        ids = prompt(seed)
        theirs = target.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=30, pad_token_id=0)[0, ids.shape[1]:]
        result = generate(target, ids, drafter, max_new_tokens=30)
        assert torch.equal(result.tokens, theirs)
        gained.append(result.mean_accepted)
    assert max(gained) > 1.2


def test_sampling_runs_in_half_precision_and_repeats():
    target = tiny(dtype=torch.bfloat16)
    draft = relative(target)
    runs = [generate(target, prompt(), DySpec(draft, 8, generator=seeded(3)), max_new_tokens=20, temperature=0.8, generator=seeded(4), eos_token_id=()) for _ in range(2)]
    assert len(runs[0].tokens) == 20 and torch.equal(runs[0].tokens, runs[1].tokens)


def test_half_precision_rows_and_gradients():
    row = torch.tensor([0.25, 0.75], dtype=torch.bfloat16)
    assert dynamic_tree(lambda path: row, 3, generator=seeded()).draft_probs.dtype == torch.float32
    logits = torch.zeros(4, requires_grad=True)
    assert not dynamic_tree(lambda path: logits.softmax(0), 3, generator=seeded()).draft_probs.requires_grad


def test_reset_and_reading_less_the_second_time():
    model, seen = tiny(), []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    drafter, text = DySpec(model, 6, generator=seeded()), prompt(length=20)[0]
    drafter.draft(text)
    assert seen[0] == 20 and drafter.reader.cache.get_seq_length() > 20
    seen.clear()
    drafter.draft(torch.cat([text, torch.tensor([5, 6])]))
    assert seen[0] == 2, "only what is new"
    seen.clear()
    drafter.reset()
    drafter.draft(text)
    assert seen[0] == 20


def with_row(row):
    return lambda path: torch.tensor(row)


@pytest.mark.parametrize("call,message", [
    (lambda: dynamic_tree(with_row([1.0, 1.0]), 0), "budget must be at least 1, got 0"), (lambda: DySpec(tiny(), 0), "budget must be at least 1"),
    (lambda: threshold_tree(with_row([1.0, 1.0]), 0.0), r"threshold must be in \(0, 1\), got 0.0"), (lambda: threshold_tree(with_row([1.0, 1.0]), 1.0), "threshold must be in"),
    (lambda: DySpec(tiny(), 4, threshold=1.5), r"threshold must be in \(0, 1\) or None, got 1.5"), (lambda: threshold_tree(with_row([1.0]), 0.5, max_size=0), "max_size must be at least 1"),
    (lambda: dynamic_tree(with_row([[1.0, 1.0]]), 3), r"must return one distribution, \(V,\)"), (lambda: dynamic_tree(with_row([]), 3), "must return one distribution"),
    (lambda: dynamic_tree(lambda path: torch.ones(3 + len(path)), 3), r"\(V,\) = \(3,\) for every path, got \(4,\)"),
    (lambda: dynamic_tree(with_row([1.5, -0.5]), 3), "not negative"), (lambda: dynamic_tree(with_row([float("nan"), 1.0]), 3), "finite"),
    (lambda: dynamic_tree(with_row([float("inf"), 1.0]), 3), "finite"), (lambda: dynamic_tree(with_row([0.0, 0.0]), 3), "not all zero"),
    (lambda: threshold_tree(with_row([0.0, 0.0]), 0.5), "not all zero"), (lambda: checked_rows([torch.ones(2), torch.ones(3)]), "one distribution"),
    (lambda: expected_accepted(DraftTree(torch.tensor([-1]), torch.tensor([-1]))), "draft_probs"), (lambda: branching(2, 2, budget=7), "at least budget = 7"), (lambda: branching(), "at least"),
    (lambda: fixed_tree(with_row([1.0]), [(1, 0)]), "parent"), (lambda: DySpec(tiny(), temperature=-1.0), "temperature must be at least 0"),
    (lambda: DraftReader(AutoModelForCausalLM.from_config(AutoConfig.for_model(
        "mistral", vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, sliding_window=4)), 1.0), "cannot be trimmed"),
    (lambda: DySpec(tiny()).draft(torch.zeros(0, dtype=torch.long)), "context must be")])
def test_bad_inputs(call, message):
    with pytest.raises(ValueError, match=message):
        call()
