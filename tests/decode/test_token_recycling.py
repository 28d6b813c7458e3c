"""Token Recycling: the paper's tree, the table, and the same text as without them."""
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from tokenkit.decode.compare import replay
from tokenkit.decode.engine import Drafter, generate
from tokenkit.decode.token_recycling import DEFAULT_TREE, TokenRecycling, draft_tokens, small_tree, successor_matrix, tree_layout, update_matrix
from tokenkit.decode.trees import DraftTree

VOCAB = 60


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                         intermediate_size=48, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval()
    for p in model.parameters():
        p.data.mul_(3 if p.ndim > 1 else 1)
    return model


def prompt(seed=1, length=8):
    return torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


def greedy(model, ids, tokens):
    return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, pad_token_id=0)[0, ids.shape[1]:]


def test_the_papers_tree():
    assert len(DEFAULT_TREE) == len(set(DEFAULT_TREE)) == 80
    assert Counter(map(len, DEFAULT_TREE)) == {1: 8, 2: 21, 3: 25, 4: 15, 5: 8, 6: 3}
    assert DEFAULT_TREE == tuple(sorted(DEFAULT_TREE, key=lambda p: (len(p), p)))
    children = Counter(path[:-1] for path in DEFAULT_TREE)
    assert children[()] == 8 and children[0, 0] == 8 and children[0, 0, 0] == 5 and children[0, 0, 0, 0, 0] == 2 and children[0, 0, 0, 1, 0] == 1
    assert all(tuple(range(n)) == tuple(sorted(p[-1] for p in DEFAULT_TREE if p[:-1] == parent)) for parent, n in children.items())


def test_layout_whatever_the_order():
    parents, ranks = tree_layout(DEFAULT_TREE)
    assert len(parents) == len(ranks) == 81 and parents[0] == ranks[0] == -1 and (parents[1:] < torch.arange(1, 81)).all()
    again = tree_layout(reversed(DEFAULT_TREE))
    assert torch.equal(parents, again[0]) and torch.equal(ranks, again[1])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 100), st.integers(1, 8))
def test_small_trees_are_trees_of_the_size_asked_for(nodes, k):
    try:
        paths = small_tree(nodes, k)
    except ValueError:
        assert k < 4
        return
    assert len(tree_layout(paths)[0]) == nodes + 1 and max(map(max, paths)) < k
    worst = max(len(p) + sum(p) for p in paths)
    assert set(small_tree(nodes - 1, k) if nodes > 1 else ()) < set(paths) and worst <= 8


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([torch.long, torch.int32]))
def test_drafting_follows_the_definition(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randint(0, 20, (20, 8), generator=generator).to(dtype)
    parents, ranks = tree_layout(DEFAULT_TREE)
    tokens = draft_tokens(matrix, 3, parents, ranks)
    assert tokens.dtype == torch.long and tokens[0] == 3
    for node in range(1, 81):
        assert tokens[node] == matrix[tokens[parents[node]], ranks[node]]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_update_writes_the_best_candidates_and_is_idempotent(seed, nodes, dtype):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randint(0, 10, (10, 4), generator=generator)
    ids = torch.randint(0, 10, (nodes,), generator=generator)
    logits = torch.stack([torch.randperm(10, generator=generator) for _ in range(nodes)]).to(dtype)  # no ties
    before = matrix.clone()
    updated = update_matrix(matrix, ids, logits)
    assert torch.equal(matrix, before) and updated.dtype == matrix.dtype
    expected = before.clone()
    for token, row in zip(ids, logits):  # in order: later entries win
        expected[token] = row.argsort(descending=True)[:4]
    assert torch.equal(updated, expected) and torch.equal(update_matrix(updated, ids, logits), updated)


def test_update_of_nothing_changes_nothing():
    matrix = torch.arange(12).view(6, 2) % 6
    assert torch.equal(update_matrix(matrix, torch.zeros(0, dtype=torch.long), torch.zeros(0, 6)), matrix)


def test_an_oracle_goes_to_the_bottom_each_time():
    drafter = TokenRecycling(50)
    drafter.matrix[:, 0] = (torch.arange(50) + 1) % 50
    assert replay(drafter, torch.tensor([0]), torch.arange(1, 43)) == [7] * 6


@pytest.mark.parametrize("more", [{}, dict(learn_from_prompt=True), dict(skip_cold=True, tree=small_tree(12)), dict(tree=[(0,)], k=1), dict(dtype=torch.int32)],
                         ids=["paper", "prompt", "skip", "one", "int32"])
def test_text_is_that_of_plain_decoding(model, more):
    drafter = TokenRecycling(VOCAB, **more)
    for seed in (1, 2, 1):
        ids = prompt(seed)
        theirs = greedy(model, ids, 40)
        result = generate(model, ids, drafter, max_new_tokens=40)
        assert torch.equal(result.tokens, theirs)
    assert result.mean_accepted > 1.2, "the third text was written before"


def test_observe_is_the_update_and_the_table_persists(model):
    ids, drafter = prompt(), TokenRecycling(VOCAB)
    tree, logits = drafter.draft(ids[0]), torch.randn(7, VOCAB)
    assert tree.tokens.tolist() == [int(ids[0, -1])] + [0] * 6, "a chain of zeros from an empty table"
    drafter.observe(tree, logits, torch.tensor([0]))
    assert torch.equal(drafter.matrix, update_matrix(torch.zeros(VOCAB, 8, dtype=torch.long), tree.tokens, logits))
    generate(model, ids, drafter, max_new_tokens=5)
    assert drafter.matrix.any()
    drafter.reset()
    assert not drafter.matrix.any()


def test_learning_from_the_prompt(model):
    ids = prompt()
    for learns in (False, True):
        drafter = TokenRecycling(VOCAB, learn_from_prompt=learns)
        generate(model, ids, drafter, max_new_tokens=1)
        assert drafter.matrix[ids[0, 2]].any() == learns


def test_equal_siblings_are_dropped_with_what_hangs_below():
    drafter = TokenRecycling(10, k=3, tree=[(0,), (1,), (2,), (1, 0), (2, 0)])
    drafter.matrix[1] = torch.tensor([4, 4, 5])
    tree = drafter.draft(torch.tensor([1]))
    assert tree.tokens.tolist() == [1, 4, 5, 0] and tree.parents.tolist() == [-1, 0, 0, 2]
    assert drafter.drafted_paths == [(), (0,), (2,), (2, 0)]
    drafter.skip_cold = True
    assert drafter.draft(torch.tensor([1])).tokens.tolist() == [1, 4, 5]
    assert isinstance(tree, DraftTree) and all(hasattr(drafter, name) for name in ("draft", "observe", "reset")) and Drafter


def test_start():
    start = torch.randint(0, 10, (10, 8), generator=torch.Generator().manual_seed(0))
    drafter = TokenRecycling(10, start=start)
    assert torch.equal(drafter.matrix, start)
    drafter.observe(drafter.draft(torch.tensor([1])), torch.randn(len(drafter.draft(torch.tensor([1]))), 10), torch.tensor([0]))
    assert not torch.equal(drafter.matrix, start)
    drafter.reset()
    assert torch.equal(drafter.matrix, start)


def test_sampling_and_half_precision_run(model):
    half = LlamaForCausalLM(model.config).to(torch.bfloat16).eval()
    result = generate(half, prompt(), TokenRecycling(VOCAB), max_new_tokens=12, temperature=0.9, generator=torch.Generator().manual_seed(0), eos_token_id=())
    assert len(result.tokens) == 12


def test_successors_of_a_corpus():
    tokens = torch.randint(0, 9, (400,), generator=torch.Generator().manual_seed(0))
    matrix, follow = successor_matrix(tokens, 10, k=3), {}
    for a, b in zip(tokens.tolist(), tokens.tolist()[1:]):
        follow.setdefault(a, Counter())[b] += 1
    for token in range(10):
        counts = follow.get(token, Counter())
        assert [counts[t] for t in matrix[token].tolist()][:len(counts)] == [n for _, n in counts.most_common(3)]
    assert not matrix[9].any()


@pytest.mark.parametrize("call,message", [
    (lambda: draft_tokens(torch.zeros(5, 2, dtype=torch.long), 5, *tree_layout([(0,)])), r"root must be in \[0, 5\), got 5"),
    (lambda: draft_tokens(torch.zeros(5, 2, dtype=torch.long), -1, *tree_layout([(0,)])), "root must be in"),
    (lambda: draft_tokens(torch.zeros(5, 2, dtype=torch.long), 0, *tree_layout([(0,), (2,)])), "ranks must be below k = 2, got 2"),
    (lambda: update_matrix(torch.zeros(5, 2, dtype=torch.long), torch.tensor([1]), torch.zeros(1, 6)), r"logits must be \(N, V\) = \(1, 5\)"),
    (lambda: update_matrix(torch.zeros(5, 2, dtype=torch.long), torch.tensor([1, 2]), torch.zeros(1, 5)), "logits must be"),
    (lambda: update_matrix(torch.zeros(5, 2, dtype=torch.long), torch.tensor([5]), torch.zeros(1, 5)), r"token_ids must be in \[0, 5\)"),
    (lambda: tree_layout([]), "non-empty"), (lambda: tree_layout([(0,), (0,)]), "duplicates"), (lambda: tree_layout([(1, 0)]), "parent"), (lambda: tree_layout([(-1,)]), "at least 0"),
    (lambda: TokenRecycling(5), "k must be in 1..vocab_size = 5, got 8"), (lambda: TokenRecycling(50, k=0), "k must be in"),
    (lambda: TokenRecycling(50, k=4), "ranks of tree must be below k = 4, got 7"), (lambda: TokenRecycling(50, tree=[]), "non-empty"),
    (lambda: TokenRecycling(50, start=torch.zeros(50, 3, dtype=torch.long)), r"start must be \(V, k\) = \(50, 8\)"),
    (lambda: TokenRecycling(50, start=torch.full((50, 8), 50)), "start must be"),
    (lambda: small_tree(0), "nodes must be in 1.."), (lambda: small_tree(9, k=1), "nodes must be in 1..6"),
    (lambda: successor_matrix(torch.tensor([1]), 5), "tokens must be"), (lambda: successor_matrix(torch.tensor([1, 5]), 5), "tokens must be")])
def test_bad_inputs(call, message):
    with pytest.raises(ValueError, match=message):
        call()
