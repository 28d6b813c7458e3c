"""Draft trees: shape, mask, and the rules that judge them."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from tokenkit.decode.trees import (DraftTree, ancestors, node_heights, tree_attention_mask, tree_layout, tree_position_ids, verify_exact,
                                   verify_greedy, verify_sampling)

parent_lists = st.integers(0, 12).flatmap(lambda n: st.tuples(*(st.integers(0, i) for i in range(n)))).map(lambda p: [-1, *p])


def lineage(parents, node):
    """The path to a node, the slow way."""
    return ([] if node == 0 else lineage(parents, parents[node])) + [node]


def tree_of(parents, **more):
    return DraftTree(torch.arange(len(parents)) + 5, torch.tensor(parents), **more)


@settings(max_examples=40, deadline=None)
@given(parent_lists, st.integers(0, 5))
def test_mask_positions_and_paths_are_those_of_the_definition(parents, past):
    paths = [lineage(parents, node) for node in range(len(parents))]
    tree, given_parents = tree_of(parents), torch.tensor(parents)
    mask = tree_attention_mask(given_parents, past)
    assert mask.dtype == torch.bool and mask.shape == (len(parents), past + len(parents)) and mask[:, :past].all()
    assert [row.nonzero().flatten().tolist() for row in mask[:, past:]] == paths
    assert tree_position_ids(given_parents, past).tolist() == [past + len(path) - 1 for path in paths]
    assert tree.depths.tolist() == [len(path) - 1 for path in paths]
    leaves = [paths[node] for node in range(len(parents)) if node not in parents]
    assert tree.paths() == sorted(leaves)
    assert sorted(node_heights(parents)[path[-1]] for path in leaves) == list(range(len(leaves)))


@settings(max_examples=30, deadline=None)
@given(parent_lists, st.data())
def test_select_keeps_the_shape_of_what_is_kept(parents, data):
    tree = tree_of(parents, values=torch.rand(len(parents)))
    limit = data.draw(st.integers(0, int(tree.depths.max())))
    keep = tree.depths <= limit
    cut = tree.select(keep)
    assert torch.equal(cut.tokens, tree.tokens[keep]) and torch.equal(cut.values, tree.values[keep])
    for node, old in enumerate(keep.nonzero().flatten().tolist()):
        assert cut.tokens[lineage(cut.parents.tolist(), node)].tolist() == tree.tokens[lineage(parents, old)].tolist()


def test_a_chain_gives_the_causal_mask():
    assert torch.equal(tree_attention_mask(torch.arange(-1, 7), 0), torch.ones(8, 8).tril().bool())
    assert ancestors(torch.arange(-1, 130)).sum() == 131 * 132 // 2, "deep chains too"


@settings(max_examples=40, deadline=None)
@given(parent_lists, st.integers(0, 10**6))
def test_greedy_keeps_the_longest_path_that_agrees(parents, seed):
    generator = torch.Generator().manual_seed(seed)
    vocab = 4
    seen, tokens = {}, [-1]
    for parent in parents[1:]:  # distinct siblings, as many as the vocabulary allows
        used = seen.setdefault(parent, [])
        used.append(len(used))
        tokens.append(used[-1])
    if max(tokens) >= vocab:
        vocab = max(tokens) + 1
    logits = torch.randn(len(parents), vocab, generator=generator)
    path, token = verify_greedy(torch.tensor(tokens), torch.tensor(parents), logits)
    choice = logits.argmax(1).tolist()
    agreeing = [p for p in (lineage(parents, node) for node in range(len(parents))) if all(tokens[b] == choice[a] for a, b in zip(p, p[1:]))]
    assert path.tolist() == max(agreeing, key=len) and token == choice[path[-1]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_greedy_takes_any_precision(dtype):
    path, token = verify_greedy(torch.tensor([-1, 2]), torch.tensor([-1, 0]), torch.eye(3)[[2, 1]].to(dtype))
    assert path.tolist() == [0, 1] and token == 1 and isinstance(token, int) and path.dtype == torch.long


def drawn_tree(draft, width, generator):
    """Children drawn without replacement, then one child under the first of them."""
    first = torch.multinomial(draft[0], width, generator=generator)
    second = torch.multinomial(draft[1], 1, generator=generator)
    tokens = torch.cat([torch.tensor([-1]), first, second])
    rows = [0, 1] + [2] * width
    return DraftTree(tokens, torch.tensor([-1] + [0] * width + [1]), draft_probs=draft[rows[:len(tokens)]])


@pytest.mark.parametrize("width,temperature", [(1, 1.0), (3, 1.0), (4, 0.7)])
def test_sampling_rule_follows_the_target(width, temperature):
    generator = torch.Generator().manual_seed(width)
    draft = torch.softmax(2 * torch.randn(3, 4, generator=generator), 1)
    logits = 2 * torch.randn(1, 4, generator=generator).expand(width + 2, 4)
    counts = torch.zeros(4)
    for _ in range(3000):
        tree = drawn_tree(draft, width, generator)
        path, bonus = verify_exact(tree, logits, temperature=temperature, generator=generator)
        counts[tree.tokens[path[1]] if len(path) > 1 else bonus] += 1
    assert chisquare(counts, 3000 * torch.softmax(logits[0].double() / temperature, 0)).pvalue > 1e-3


def test_second_token_follows_the_target_too():
    generator = torch.Generator().manual_seed(5)
    draft = torch.softmax(torch.randn(3, 4, generator=generator), 1)
    target = torch.softmax(torch.randn(4, 4, generator=generator), 1)  # rows: root, the two children, their child
    counts = torch.zeros(4)
    for _ in range(4000):
        tree = drawn_tree(draft, 2, generator)
        path, bonus = verify_sampling(tree.tokens, tree.parents, target, tree.draft_probs, generator=generator)
        if len(path) > 1 and path[1] == 1:  # went to the first child: what follows is row 1's
            counts[tree.tokens[path[2]] if len(path) > 2 else bonus] += 1
    assert chisquare(counts, counts.sum() * target[1].double() / target[1].double().sum()).pvalue > 1e-3


def test_without_draft_distribution_the_walk_samples_the_target():
    generator, logits = torch.Generator().manual_seed(0), torch.tensor([[0.0, 1.0, 2.0]] * 2)
    tree, counts = DraftTree(torch.tensor([-1, 2]), torch.tensor([-1, 0])), torch.zeros(3)
    for _ in range(3000):
        path, bonus = verify_exact(tree, logits, temperature=1.5, generator=generator)
        counts[2 if len(path) > 1 else bonus] += 1
    assert chisquare(counts, 3000 * torch.softmax(logits[0].double() / 1.5, 0)).pvalue > 1e-3


def test_extreme_drafts():
    one_hot = torch.eye(3)
    tree = torch.tensor([-1, 1]), torch.tensor([-1, 0])
    path, token = verify_sampling(*tree, one_hot[[1, 0]], one_hot[[1, 1]])  # the target wants just what was drawn
    assert path.tolist() == [0, 1] and token == 0
    path, token = verify_sampling(*tree, one_hot[[2, 0]], one_hot[[1, 1]])  # and the opposite
    assert path.tolist() == [0] and token == 2
    path, token = verify_sampling(*tree, one_hot[[1, 0]], torch.tensor([[1.0, 0, 0]] * 2))  # D[y] = 0 < R[y]: an infinite ratio
    assert path.tolist() == [0, 1]
    path, token = verify_sampling(*tree, one_hot[[2, 0]], torch.tensor([[1.0, 0, 0]] * 2))  # D[y] = R[y] = 0: a rejection
    assert path.tolist() == [0] and token == 2


def test_layout_numbers_by_depth_then_path():
    parents, ranks = tree_layout([(1, 0), (0,), (1,), (0, 2)])
    assert parents.tolist() == [-1, 0, 0, 1, 2] and ranks.tolist() == [-1, 0, 1, 2, 0]
    assert parents.dtype == ranks.dtype == torch.long


@pytest.mark.parametrize("paths,message", [([], "non-empty"), ([(0, 0)], "parent"), ([(0,), (0,)], "duplicates"), ([(-1,)], "at least 0"),
                                           ([()], "without the root")])
def test_bad_layouts(paths, message):
    with pytest.raises(ValueError, match=message):
        tree_layout(paths)


@pytest.mark.parametrize("tokens,parents,message", [
    ([], [], "empty tree"), ([1, 2], [-1], "both be"), ([[1]], [[-1]], "both be"), ([1, 2], [0, 0], "start with -1"), ([1, 2, 3], [-1, 2, 0], "before its child"),
    ([1, 2], [-1, 1], "before its child"), ([1, 2, 2], [-1, 0, 0], "duplicate siblings"), ([1, -1], [-1, 0], "negative"), ([1, 2], [-1, -1], "before its child")])
def test_bad_trees(tokens, parents, message):
    with pytest.raises(ValueError, match=message):
        DraftTree(torch.tensor(tokens, dtype=torch.long), torch.tensor(parents, dtype=torch.long))


def test_bad_extras_and_inputs():
    tokens, parents, nan = torch.tensor([1, 2]), torch.tensor([-1, 0]), float("nan")
    half = torch.full((2, 2), 0.5)
    for extra in (dict(values=torch.ones(3)), dict(values=torch.tensor([1.0, nan])), dict(draft_probs=torch.ones(2)), dict(draft_probs=torch.ones(3, 4))):
        with pytest.raises(ValueError, match=f"{next(iter(extra))} must be finite with one row"):
            DraftTree(tokens, parents, **extra)
    with pytest.raises(ValueError, match="past_len"):
        tree_attention_mask(parents, -1)
    with pytest.raises(ValueError, match="past_len"):
        tree_position_ids(parents, -1)
    with pytest.raises(ValueError, match=r"logits must be \(N, V\)"):
        verify_greedy(tokens, parents, torch.zeros(3, 4))
    with pytest.raises(ValueError, match="logits must be finite"):
        verify_greedy(tokens, parents, torch.tensor([[0.0, nan], [0, 0]]))
    with pytest.raises(ValueError, match="temperature must be at least 0, got -1"):
        verify_exact(DraftTree(tokens, parents), torch.zeros(2, 4), temperature=-1)
    with pytest.raises(ValueError, match="target_probs must sum to 1"):
        verify_sampling(tokens, parents, half * 0.5, half)
    with pytest.raises(ValueError, match="target_probs must be finite and not negative"):
        verify_sampling(tokens, parents, torch.tensor([[2.0, -1], [1, 0]]), half)
    with pytest.raises(ValueError, match="draft_probs must be"):
        verify_sampling(tokens, parents, half, torch.ones(2, 3))
    with pytest.raises(ValueError, match="keep must hold the root"):
        DraftTree(tokens, parents).select(torch.tensor([False, True]))
    with pytest.raises(AttributeError):
        DraftTree(tokens, parents).tokens = tokens
