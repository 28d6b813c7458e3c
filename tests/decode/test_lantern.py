"""Relaxed acceptance: bounds, exactness without room to move, and the rule written out once more in plain Python."""
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from tokenkit.decode.engine import NoDraft, generate
from tokenkit.decode.lantern import (Lantern, lantern_verify_greedy, lantern_verify_sampling, longest_accepted, nearest_codes,
                                     relaxed_distribution, relaxed_probability)
from tokenkit.decode.trees import DraftTree, verify_greedy, verify_sampling

SIZE = 12


def lots(seed=0):
    return torch.Generator().manual_seed(seed)


def world(seed):
    g = lots(seed)
    codebook = torch.randn(SIZE, 3, generator=g)
    return codebook, nearest_codes(codebook), torch.softmax(2 * torch.randn(SIZE, generator=g), -1)


def random_tree(seed, nodes=8):
    g = lots(seed)
    tokens, parents = [-1], [-1]
    while len(tokens) < nodes:
        parent, token = (int(torch.randint(n, (), generator=g)) for n in (len(tokens), SIZE))
        if (parent, token) not in zip(parents, tokens):
            parents.append(parent), tokens.append(token)
    return torch.tensor(tokens), torch.tensor(parents), 2 * torch.randn(nodes, SIZE, generator=g)


def by_hand(p, x, row, k, delta, bound="tv"):
    """p' as the paper tells it, one neighbour after the other."""
    p, total, limit = p.tolist(), 0.0, delta if bound == "tv" else delta * p[x].item()
    for n in row[:k].tolist():
        if total + p[n] > limit:
            break
        total += p[n]
        p[n] = 0.0
    p[x] += total
    return p, total


# ---- neighbours

def test_nearest_codes_by_hand():
    line = torch.tensor([[0.0], [1.0], [3.0], [3.0], [7.0]])
    assert nearest_codes(line).tolist() == [[1, 2, 3, 4], [0, 2, 3, 4], [3, 1, 0, 4], [2, 1, 0, 4], [2, 3, 1, 0]]
    assert nearest_codes(line, 1).tolist() == [[1], [0], [3], [2], [2]]
    assert nearest_codes(torch.zeros(4, 2)).tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]  # all duplicates: by id
    rays = torch.tensor([[1.0, 0.0], [9.0, 1.0], [0.0, 2.0], [-1.0, 0.1]])
    assert nearest_codes(rays, metric="cosine")[0].tolist() == [1, 2, 3] and nearest_codes(rays)[0].tolist() == [3, 2, 1]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 30), st.integers(1, 5), st.sampled_from(["l2", "cosine"]))
def test_neighbours_are_sorted_and_leave_out_the_code_itself(seed, size, dim, metric):
    codebook = torch.randn(size, dim, generator=lots(seed))
    near = nearest_codes(codebook, metric=metric)
    assert torch.equal(torch.cat([torch.arange(size)[:, None], near], 1).sort(1).values, torch.arange(size).expand(size, -1))
    unit = torch.nn.functional.normalize(codebook, dim=1) if metric == "cosine" else codebook
    distance = (unit[:, None].double() - unit[near].double()).norm(dim=-1)
    assert (distance.diff(dim=1) >= -1e-5).all()
    assert torch.equal(nearest_codes(codebook, 1, metric), near[:, :1])
    unit = torch.nn.functional.normalize(codebook, dim=1)
    if dim > 1:
        assert torch.equal(nearest_codes(unit.double(), 1), nearest_codes(unit.double(), 1, "cosine"))


def test_large_codebooks_go_in_parts():
    codebook = torch.randn(1500, 2, generator=lots())
    expected = torch.cdist(codebook.double(), codebook.double()).fill_diagonal_(math.inf).argmin(1)
    assert torch.equal(nearest_codes(codebook, 1)[:, 0], expected)


# ---- the relaxed distribution

@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, SIZE - 1), st.integers(1, 20), st.floats(0, 1), st.sampled_from(["tv", "ratio"]))
def test_relaxed_distribution_is_that_of_the_paper(seed, x, k, delta, bound):
    _, neighbors, p = world(seed)
    p = p.double() / p.double().sum()
    expected, moved = by_hand(p, x, neighbors[x], k, delta, bound)
    relaxed = relaxed_distribution(p, x, neighbors, k=k, delta=delta, bound=bound)
    value, count = relaxed_probability(p, torch.tensor(x), neighbors, k=k, delta=delta, bound=bound)
    assert torch.allclose(relaxed, torch.tensor(expected).double(), atol=1e-9)
    assert abs(relaxed.sum() - 1) < 1e-9 and torch.equal(value, relaxed[x]) and count <= min(k, SIZE - 1)
    assert abs((relaxed - p).abs().sum() / 2 - moved) < 1e-9
    assert moved <= (delta if bound == "tv" else delta * p[x]) + 1e-12


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 0.5), st.integers(1, 5))
def test_acceptance_grows_with_delta_and_k(seed, delta, k):
    _, neighbors, p = world(seed)
    rows, tokens = p.expand(SIZE, -1), torch.arange(SIZE)
    value, count = relaxed_probability(rows, tokens, neighbors, k=k, delta=delta)
    for more in (dict(k=k, delta=delta + 0.2), dict(k=k + 3, delta=delta)):
        wider, wider_count = relaxed_probability(rows, tokens, neighbors, **more)
        assert (wider >= value).all() and (wider_count >= count).all()
    assert torch.equal(relaxed_probability(rows, tokens, neighbors, k=1000, delta=delta)[0],
                       relaxed_probability(rows, tokens, neighbors, k=SIZE - 1, delta=delta)[0])


def test_shapes_types_and_gradients():
    _, neighbors, p = world(0)
    rows, tokens = p.expand(2, 3, -1), torch.tensor([[0, 1, 2], [3, 4, 5]])
    value, count = relaxed_probability(rows, tokens, neighbors, delta=0.3)
    assert value.shape == count.shape == (2, 3) and count.dtype == torch.long
    assert torch.equal(value[1, 0], relaxed_distribution(p, 3, neighbors, k=1000, delta=0.3)[3])
    assert relaxed_probability(p, torch.tensor(0), neighbors)[0].shape == ()
    half = relaxed_probability(p.half(), torch.tensor(0), neighbors, delta=0.3)[0]
    assert half.dtype == torch.float16 and abs(half.float() - relaxed_probability(p, torch.tensor(0), neighbors, delta=0.3)[0]) < 2e-3
    logits = torch.randn(SIZE, generator=lots(1), requires_grad=True)
    relaxed_distribution(torch.softmax(logits, -1), 2, neighbors, k=5, delta=0.5)[2].backward()
    assert logits.grad.isfinite().all() and logits.grad.abs().sum() > 0


def test_neighbours_without_mass_change_nothing():
    _, neighbors, _ = world(0)
    p = torch.zeros(SIZE)
    p[0] = 1
    value, count = relaxed_probability(p, torch.tensor(0), neighbors, delta=0.0)
    assert value == 1 and count == SIZE - 1 and torch.equal(relaxed_distribution(p, 0, neighbors, k=5, delta=0.0), p)


# ---- greedy

@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1), st.integers(1, 11))
def test_greedy_by_hand(seed, delta, k):
    _, neighbors, _ = world(seed)
    tokens, parents, logits = random_tree(seed)
    logits = logits.double()
    probs, best = torch.softmax(logits, -1), [0]
    accepted = {0: [0]}
    for node in range(1, len(tokens)):
        p, x = probs[parents[node]].clone(), int(tokens[node])
        p[x] = by_hand(p, x, neighbors[x], k, delta)[0][x]
        if int(parents[node]) in accepted and int(p.argmax()) == x:
            accepted[node] = [*accepted[int(parents[node])], node]
    best = sorted(accepted.values(), key=lambda path: (-len(path), path))[0]
    path, bonus = lantern_verify_greedy(tokens, parents, logits, neighbors, k=k, delta=delta)
    assert path.tolist() == best and bonus == int(logits[best[-1]].argmax())
    assert len(path) >= len(verify_greedy(tokens, parents, logits)[0])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_delta_zero_is_exact(seed):
    codebook, neighbors, _ = world(seed)
    tokens, parents, logits = random_tree(seed)
    mine, exact = lantern_verify_greedy(tokens, parents, logits, neighbors, delta=0.0), verify_greedy(tokens, parents, logits)
    assert mine[0].tolist() == exact[0].tolist() and mine[1] == exact[1]
    target, draft = torch.softmax(logits, -1), torch.softmax(logits.flip(0), -1)
    mine = lantern_verify_sampling(tokens, parents, target, neighbors, draft_probs=draft, delta=0.0, generator=lots(seed))
    exact = verify_sampling(tokens, parents, target, draft, generator=lots(seed))
    assert mine[0].tolist() == exact[0].tolist() and mine[1] == exact[1]
    rule = Lantern(codebook, delta=0.0)
    mine = rule(DraftTree(tokens, parents, draft), logits, temperature=1.0, generator=lots(seed))
    assert mine[0].tolist() == exact[0].tolist() and mine[1] == exact[1]


def test_ties():
    near = nearest_codes(torch.arange(4.0)[:, None])
    logits = torch.log(torch.tensor([0.3, 0.2, 0.3, 0.2])).expand(4, -1)
    chain = lambda token: lantern_verify_greedy(torch.tensor([-1, token]), torch.tensor([-1, 0]), logits[:2], near, delta=0.0)[0].tolist()
    assert [chain(token) for token in range(4)] == [[0, 1], [0], [0], [0]]  # of two favourites the lower id
    tokens, parents = torch.tensor([-1, 2, 0, 1]), torch.tensor([-1, 0, 0, 2])  # 2 and 0 -> 1: with room all pass, the longer path wins
    assert lantern_verify_greedy(tokens, parents, logits, near, delta=1.0)[0].tolist() == [0, 2, 3]
    assert lantern_verify_greedy(tokens[:3], parents[:3], logits[:3], near, delta=1.0)[0].tolist() == [0, 1]  # equally long: the first
    assert longest_accepted([-1, 0, 0, 1, 2, 3], [True, True, True, False, True, True]) == [0, 2, 4]


# ---- sampling

def outcome(first, neighbors, children, rounds=1500, draft=None, **settings):
    tokens = torch.tensor([-1, *children])
    parents = torch.tensor([-1, *[0] * len(children)])
    target = first.expand(len(tokens), -1)
    g, counts = lots(1), torch.zeros(SIZE)
    for _ in range(rounds):
        path, bonus = lantern_verify_sampling(tokens, parents, target, neighbors, generator=g, draft_probs=draft, **settings)
        counts[tokens[path[1]] if len(path) > 1 else bonus] += 1
    return counts / rounds


def test_chosen_guesses_follow_the_relaxed_distribution():
    _, neighbors, p = world(3)
    for x in (0, 4):
        found = outcome(p, neighbors, [x], k=4, delta=0.3)
        assert (found - relaxed_distribution(p, x, neighbors, k=4, delta=0.3)).abs().sum() / 2 < 0.06
    exact = outcome(p, neighbors, [2, 5], k=4, delta=0.0)
    assert (exact - p).abs().sum() / 2 < 0.06


def test_siblings_meet_the_residual():
    _, neighbors, p = world(5)
    k, delta, (x, y) = 3, 0.25, (1, 6)
    first, _ = by_hand(p, x, neighbors[x], k, delta)
    rest = torch.tensor(first)
    rest[x] = 0
    rest = rest / rest.sum()
    second = torch.tensor(by_hand(rest, y, neighbors[y], k, delta)[0])
    expected = (1 - first[x]) * second
    expected[x] += first[x]
    assert (outcome(p, neighbors, [x, y], k=k, delta=delta) - expected).abs().sum() / 2 < 0.06


def test_drawn_guesses_follow_the_relaxed_distribution():
    _, neighbors, p = world(7)
    q = torch.softmax(torch.randn(SIZE, generator=lots(9)), -1)
    expected = torch.zeros(SIZE)
    for x in range(SIZE):
        relaxed = relaxed_distribution(p, x, neighbors, k=2, delta=0.2)
        accept = min(1.0, (relaxed[x] / q[x]).item())
        rest = (relaxed - q).clamp(min=0)
        expected += q[x] * (1 - accept) * rest / rest.sum().clamp(min=1e-9)
        expected[x] += q[x] * accept
    g, counts, rounds = lots(2), torch.zeros(SIZE), 1500
    for _ in range(rounds):
        x = int(torch.multinomial(q, 1, generator=g))
        path, bonus = lantern_verify_sampling(torch.tensor([-1, x]), torch.tensor([-1, 0]), p.expand(2, -1), neighbors,
                                              draft_probs=q.expand(2, -1), k=2, delta=0.2, generator=g)
        counts[x if len(path) > 1 else bonus] += 1
    assert (counts / rounds - expected).abs().sum() / 2 < 0.06


def test_nothing_left_means_anything():
    near, p = nearest_codes(torch.arange(4.0)[:, None]), torch.tensor([0.5, 0.5, 0.0, 0.0])
    path, bonus = lantern_verify_sampling(torch.tensor([-1, 3]), torch.tensor([-1, 0]), p.expand(2, -1), near, delta=0.0, generator=lots())
    assert path.tolist() == [0] and bonus in (0, 1)  # a guess without mass is rejected and changes nothing
    tries = []
    for seed in range(200):  # code 2 speaks for all the mass; its rejection (p' slightly below 1) leaves nothing
        target = torch.tensor([0.4995, 0.4999, 0.0, 0.0])
        path, bonus = lantern_verify_sampling(torch.tensor([-1, 2]), torch.tensor([-1, 0]), target.expand(2, -1), near, delta=1.0, generator=lots(seed))
        tries.append(len(path))
    assert sum(tries) >= 395


# ---- in the engine

def tiny(vocab=SIZE + 3):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                                         eos_token_id=None)).eval()
    model.lm_head.weight.data.mul_(30)
    return model


class Random(NoDraft):
    """Chains of codes drawn from nowhere."""

    def __init__(self, probs):
        self.lots, self.probs = lots(4), probs

    def draft(self, context):
        guesses = torch.randint(SIZE, (3,), generator=self.lots)
        draft = torch.full((4, SIZE + 3), 1 / (SIZE + 3)) if self.probs else None
        return DraftTree(torch.cat([torch.tensor([-1]), guesses]), torch.arange(-1, 3), draft)


@pytest.mark.parametrize("temperature,probs", [(0.0, False), (1.0, False), (1.0, True)])
def test_plugs_into_generate(temperature, probs):
    model, (codebook, _, _) = tiny(), world(0)
    run = lambda delta: generate(model, torch.tensor([[SIZE + 1]]), Random(probs), max_new_tokens=40, temperature=temperature,
                                 verify=Lantern(codebook, delta=delta), generator=lots(1))
    exact, relaxed = run(0.0), run(0.9)
    assert len(exact.tokens) == len(relaxed.tokens) == 40 and exact.tokens.max() < SIZE and relaxed.tokens.max() < SIZE
    assert relaxed.steps < exact.steps
    if temperature == 0:  # no room: what the model writes when it may write codes only
        ids = torch.tensor([[SIZE + 1]])
        for _ in range(40):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids).logits[:, -1, :SIZE].argmax(-1, keepdim=True)], 1)
        assert torch.equal(exact.tokens, ids[0, 1:])


def test_bfloat16_logits_are_judged():
    codebook, _, _ = world(0)
    tokens, parents, logits = random_tree(0)
    for temperature in (0.0, 0.7):
        path, bonus = Lantern(codebook)(DraftTree(tokens, parents), logits.bfloat16(), temperature=temperature, generator=lots())
        assert path[0] == 0 and 0 <= bonus < SIZE


# ---- what is refused

def test_bad_input_is_refused():
    codebook, near, p = world(0)
    for k in (0, SIZE):
        with pytest.raises(ValueError, match="k must be"):
            nearest_codes(codebook, k)
    for bad in (codebook[0], codebook[:1], codebook * float("nan")):
        with pytest.raises(ValueError, match="codebook must be"):
            nearest_codes(bad)
    with pytest.raises(ValueError, match="metric"):
        nearest_codes(codebook, metric="l1")
    x, tokens, parents = torch.tensor(0), torch.tensor([-1, 0]), torch.tensor([-1, 0])
    rows = p.expand(2, -1)
    calls = (lambda **s: relaxed_probability(p, x, near, **s), lambda **s: relaxed_distribution(p, 0, near, **s),
             lambda **s: lantern_verify_greedy(tokens, parents, rows.log(), near, **s),
             lambda **s: lantern_verify_sampling(tokens, parents, rows, near, **s), lambda **s: Lantern(codebook, **s))
    for call in calls:
        for settings_, word in ((dict(k=0, delta=0.1), "k must be"), (dict(k=2, delta=-0.1), "delta must be"), (dict(k=2, delta=1.5), "delta must be"),
                                (dict(k=2, delta=float("nan")), "delta must be"), (dict(k=2, delta=0.1, bound="mass"), "bound must be")):
            with pytest.raises(ValueError, match=word):
                call(**settings_)
    assert relaxed_probability(p, x, near, delta=1.5, bound="ratio")[0] >= p[0]
    for bad in (p * 2, -p, torch.full((SIZE,), float("nan"))):
        with pytest.raises(ValueError, match="probs must not be negative and must sum to 1"):
            relaxed_probability(bad, x, near)
        with pytest.raises(ValueError, match="probs must not be negative and must sum to 1"):
            lantern_verify_sampling(tokens, parents, bad.expand(2, -1), near)
    for outside in (-1, SIZE):
        with pytest.raises(ValueError, match="tokens must be in the codebook"):
            relaxed_distribution(p, outside, near, k=2, delta=0.1)
    with pytest.raises(ValueError, match="tokens must be in the codebook"):
        lantern_verify_greedy(torch.tensor([-1, SIZE]), parents, rows.log(), near)
    with pytest.raises(ValueError, match="tokens must be in the codebook"):
        lantern_verify_sampling(torch.tensor([-1, SIZE]), parents, rows, near)
    assert lantern_verify_sampling(torch.tensor([SIZE + 7, 0]), parents, rows, near, generator=lots())[0][0] == 0  # the root is excepted
    with pytest.raises(ValueError, match="probs must be"):
        relaxed_probability(p[:5], x, near)
    with pytest.raises(ValueError, match="one for each distribution"):
        relaxed_probability(rows, x, near)
    with pytest.raises(ValueError, match="one distribution"):
        relaxed_distribution(rows, 0, near, k=2, delta=0.1)
    with pytest.raises(ValueError, match="draft_probs must be"):
        lantern_verify_sampling(tokens, parents, rows, near, draft_probs=p)
    with pytest.raises(ValueError, match="draft_probs must be finite"):
        lantern_verify_sampling(tokens, parents, rows, near, draft_probs=-rows)
    with pytest.raises(ValueError, match="logits must be finite"):
        lantern_verify_greedy(tokens, parents, rows * float("nan"), near)
    with pytest.raises(ValueError, match="parent"):
        lantern_verify_greedy(tokens, torch.tensor([0, 0]), rows, near)
    with pytest.raises(ValueError, match="at least one column for each"):
        Lantern(codebook)(DraftTree(tokens, parents), rows[:, :5])
    with pytest.raises(ValueError, match="temperature"):
        Lantern(codebook)(DraftTree(tokens, parents), rows, temperature=-1.0)
