"""Trees fitted to counts and costs."""
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenkit.core.hub import hub_causal_lm
from tokenkit.decode.engine import generate
from tokenkit.decode.fit import CountPaths, PathCounts, fit_tree, pass_seconds, tree_curve
from tokenkit.decode.token_recycling import TokenRecycling, small_tree
from tokenkit.decode.trees import tree_layout

PATHS = [(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]


@st.composite
def path_counts(draw):
    """Counts that agree with each other: siblings share their parent's."""
    accepted = {(): 100}
    for path in PATHS:
        left = accepted[path[:-1]] - sum(n for p, n in accepted.items() if p and p[:-1] == path[:-1])
        accepted[path] = draw(st.integers(0, left))
    accepted.pop(())
    return PathCounts(100, {path: draw(st.integers(max(n, 1), 100)) for path, n in accepted.items()}, accepted)


def is_tree(paths):
    return all(len(path) == 1 or path[:-1] in paths for path in paths)


@settings(max_examples=30, deadline=None)
@given(path_counts())
def test_no_tree_of_the_same_size_gains_more(counts):
    for nodes, tree in enumerate(tree_curve(counts, {1: 1.0, 100: 2.0}), 1):
        tree_layout(tree.paths)  # it is a tree
        best = max(sum(counts.accepted[p] for p in chosen) for chosen in combinations(PATHS, nodes) if is_tree(chosen))
        assert tree.tokens_per_pass == pytest.approx(1 + best / 100) and len(tree.paths) == nodes
        assert tree.size == pytest.approx(1 + sum(counts.drafted[p] for p in tree.paths) / 100)


def test_costs_decide():
    full = PathCounts(100, dict.fromkeys(PATHS, 100), {(0,): 50, (1,): 20, (2,): 5, (0, 0): 25, (0, 1): 10, (1, 0): 8, (0, 0, 0): 12})
    assert len(fit_tree(full, {1: 1.0, 8: 1.0}).paths) == 7, "free nodes are all taken"
    assert fit_tree(full, {1: 1.0, 2: 1.2, 8: 50.0}).paths == ((0,),), "dear ones are not"
    tree = fit_tree(full, {1: 1.0, 3: 1.0, 4: 2.0, 8: 2.0})
    assert set(tree.paths) == {(0,), (0, 0)} and tree.tokens_per_pass == pytest.approx(1.75) and tree.tokens_per_second == pytest.approx(1.75)
    assert len(fit_tree(full, {1: 1.0, 8: 1.0}, max_nodes=3).paths) == 3
    assert [len(t.paths) for t in tree_curve(full, {1: 1.0, 4: 1.0})] == [1, 2, 3], "nothing beyond the measured sizes"


def test_counting_while_decoding_and_storing():
    model, _ = hub_causal_lm("a/toy-llama", "toy")
    ids = torch.randint(3, 260, (1, 12), generator=torch.Generator().manual_seed(0))
    plain, counter = TokenRecycling(260, skip_cold=True, learn_from_prompt=True), CountPaths(TokenRecycling(260, skip_cold=True, learn_from_prompt=True))
    for _ in range(2):
        expected = generate(model, ids, plain, max_new_tokens=60, eos_token_id=())
        result = generate(model, ids, counter, max_new_tokens=60, eos_token_id=())
    assert torch.equal(result.tokens, expected.tokens) and result.accepted == expected.accepted, "counting changes nothing"
    counts = counter.counts
    assert 0 < counts.passes <= 2 * 60 and sum(counts.accepted.values()) > 0 and counts.drafted[(0,)] <= counts.passes
    assert PathCounts.of_rows(counts.rows()) == PathCounts(counts.passes, counts.drafted, {p: counts.accepted.get(p, 0) for p in counts.drafted})
    assert fit_tree(counts, {1: 1.0, 81: 1.0}).tokens_per_pass > 1
    counter.reset()
    assert not counter.drafter.matrix.any() and counter.counts == counts


def test_pass_seconds():
    model, _ = hub_causal_lm("a/toy-llama", "toy")
    drafter = TokenRecycling(260, tree=small_tree(4))
    seconds = pass_seconds(model, (8, 1, 8), drafter=drafter, rounds=2)
    assert list(seconds) == [1, 8] and 0 < seconds[1] <= seconds[8] and drafter.matrix.any()
    for wrong in (dict(sizes=()), dict(sizes=(0,)), dict(sizes=(1,), rounds=0), dict(sizes=(1,), past_len=0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            pass_seconds(model, **wrong)


@pytest.mark.parametrize("passes,drafted,accepted", [(0, {(0,): 1}, {}), (5, {}, {}), (5, {(0,): 6}, {}), (5, {(0,): 3}, {(0,): 4}), (5, {(0, 0): 3}, {}),
                                                     (5, {(0,): 5, (0, 0): 5}, {(0,): 1, (0, 0): 2})])
def test_counts_that_cannot_be(passes, drafted, accepted):
    with pytest.raises(ValueError, match="counts need|contradicts"):
        PathCounts(passes, drafted, accepted)


@pytest.mark.parametrize("seconds,more,message", [({}, {}, "must hold size 1"), ({2: 1.0}, {}, "must hold size 1"), ({1: 1.0, 4: 0.0}, {}, "be positive"),
                                                  ({1: 1.0}, {}, "must reach size"), ({1: 1.0, 9: 1.0}, dict(max_nodes=0), "max_nodes must be at least 1")])
def test_bad_costs(seconds, more, message):
    with pytest.raises(ValueError, match=message):
        tree_curve(PathCounts(5, {(0,): 5}, {(0,): 2}), seconds, **more)
