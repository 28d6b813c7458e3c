#| export
import torch
from torch import Tensor
from torch.nn.functional import normalize

from .trees import DraftTree, all_finite, check_logits, check_temperature, check_tree, sample


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


#| export
def nearest_codes(codebook: Tensor,      # (V, d)
                  k: int | None = None,  # neighbours of each code; None = all V - 1
                  metric: str = "l2",    # or "cosine"
                  ) -> Tensor: # (V, k) integer
    """The other codes of each code, nearest first, equally near ones by id. Duplicates of a code are its neighbours at distance 0.

    Errors: ValueError for a codebook that is not (V, d) with V >= 2, or not finite, k outside [1, V - 1], or an unknown metric.
    """
    if codebook.ndim != 2 or len(codebook) < 2 or codebook.shape[1] == 0 or not torch.isfinite(codebook).all():
        raise ValueError(f"codebook must be (V, d), finite, with at least two codes, got {tuple(codebook.shape)}")
    if metric not in ("l2", "cosine"):
        raise ValueError(f"metric must be 'l2' or 'cosine', got {metric!r}")
    k = len(codebook) - 1 if k is None else k
    if not 1 <= k < len(codebook):
        raise ValueError(f"k must be from 1 to V - 1 = {len(codebook) - 1}, got {k}")
    codes = _precise(codebook.detach())
    if metric == "cosine":
        codes = normalize(codes.double(), dim=1)
    rows, ids = [], torch.arange(len(codes), device=codes.device)
    for part in ids.split(1024):
        if metric == "cosine":
            distance = 1 - codes[part] @ codes.T
        else:
            distance = torch.cdist(codes[part], codes, compute_mode="donot_use_mm_for_euclid_dist")  # so that equal codes are at distance 0
        distance[torch.arange(len(part), device=codes.device), part] = -1.5  # a code is first in its own row
        rows.append(distance.sort(dim=1, stable=True).indices[:, 1:k + 1])
    return torch.cat(rows)


#| export
def check_relaxation(k: int, delta: float, bound: str = "tv") -> None:
    """Errors: ValueError for k < 1, an unknown bound, or delta that is negative or, for "tv", above 1."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if bound not in ("tv", "ratio"):
        raise ValueError(f"bound must be 'tv' or 'ratio', got {bound!r}")
    if not 0 <= delta < float("inf") or bound == "tv" and delta > 1:
        raise ValueError(f"delta must be at least 0{' and at most 1' if bound == 'tv' else ''}, got {delta}")


def check_codes(probs: Tensor, tokens: Tensor, neighbors: Tensor) -> None:
    """Errors: ValueError for probabilities that are negative or do not sum to 1 within 1e-3, or tokens outside the codebook."""
    size = len(neighbors)
    if neighbors.ndim != 2 or neighbors.shape[1] == 0 or probs.ndim == 0 or probs.shape[-1] != size:
        raise ValueError(f"probs must be (..., V) for neighbors (V, K) with K >= 1, got {tuple(probs.shape)} and {tuple(neighbors.shape)}")
    if tokens.shape != probs.shape[:-1]:
        raise ValueError(f"tokens must be one for each distribution, {tuple(probs.shape[:-1])}, got {tuple(tokens.shape)}")
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < size:
        raise ValueError(f"tokens must be in the codebook, [0, {size}), got {int(tokens.min())} to {int(tokens.max())}")
    if not (probs >= 0).all() or not ((_precise(probs).sum(-1) - 1).abs() <= 1e-3).all():
        raise ValueError("probs must not be negative and must sum to 1 within 1e-3")


def _neighbor_mass(probs: Tensor, tokens: Tensor, neighbors: Tensor, k: int, delta: float, bound: str) -> tuple[Tensor, Tensor, Tensor]:
    """p[x], J, and the mass c_J that may move to x."""
    near = neighbors[tokens][..., :k]
    own = probs.gather(-1, tokens[..., None])
    mass = probs.gather(-1, near).cumsum(-1)
    count = (mass <= (delta if bound == "tv" else delta * own)).sum(-1)
    mass = torch.cat([torch.zeros_like(own), mass], -1).gather(-1, count[..., None])
    return own[..., 0], count, mass[..., 0]


def relaxed_probability(probs: Tensor,     # (..., V) the target's distributions
                        tokens: Tensor,    # (...) the draft token x of each
                        neighbors: Tensor, # (V, K) as from `nearest_codes`
                        *, k: int = 1000,       # neighbours at most; above K all K
                        delta: float = 0.1,
                        bound: str = "tv",      # "tv": c_J <= delta; "ratio": c_J <= delta p[x] (LANTERN++)
                        ) -> tuple[Tensor, Tensor]: # p'[x] (...), J (...)
    """The probability of a token together with its nearest neighbours, as many as the bound allows.

    Errors: ValueError as `check_relaxation` and `check_codes`. Source: Jang et al. 2025, Eqs. 4 to 6.
    """
    check_relaxation(k, delta, bound)
    check_codes(probs, tokens, neighbors)
    own, count, mass = _neighbor_mass(_precise(probs), tokens, neighbors, k, delta, bound)
    return (own + mass).to(probs.dtype), count


#| export
def _relax(probs: Tensor, token: int, neighbors: Tensor, k: int, delta: float, bound: str) -> tuple[Tensor, Tensor]:
    """p' (V,), and A without x: the codes that gave their mass away."""
    x = torch.tensor(token, device=probs.device)
    own, count, mass = _neighbor_mass(probs, x, neighbors, k, delta, bound)
    given = neighbors[token, :int(count)]
    return probs.index_fill(0, given, 0).index_put((x,), own + mass), given


def relaxed_distribution(probs: Tensor,      # (V,)
                         token: int,         # x
                         neighbors: Tensor,  # (V, K)
                         *, k: int = 1000, delta: float = 0.1, bound: str = "tv",
                         ) -> Tensor: # (V,)
    """p': the mass of the nearest neighbours of a token moved to it. Errors: ValueError as `relaxed_probability`."""
    check_relaxation(k, delta, bound)
    if probs.ndim != 1:
        raise ValueError(f"probs must be one distribution, (V,), got {tuple(probs.shape)}")
    check_codes(probs, torch.as_tensor(token), neighbors)
    return _relax(_precise(probs), int(token), neighbors, k, delta, bound)[0].to(probs.dtype)


#| export
def longest_accepted(parents: list[int], accepted: list[bool]) -> list[int]:
    """The longest path from the root through accepted nodes; among equals the one with the smallest node indices."""
    paths = {0: [0]}
    for node in range(1, len(parents)):
        if accepted[node] and parents[node] in paths:
            paths[node] = [*paths[parents[node]], node]
    return min(paths.values(), key=lambda path: (-len(path), path))


def lantern_verify_greedy(tokens: Tensor,    # (N,)
                          parents: Tensor,   # (N,)
                          logits: Tensor,    # (N, V) the target's, row i after the path to node i
                          neighbors: Tensor, # (V, K)
                          *, k: int = 1000, delta: float = 0.1, bound: str = "tv",
                          ) -> tuple[Tensor, int]: # path (node indices, starts with 0), next token
    """Accept a guess that would be the most likely code if its neighbours' mass were its own. The next token is the plain argmax.

    Errors: ValueError for a bad tree or logits, or as `relaxed_probability`.
    """
    _, parent_ids = check_tree(tokens, parents)
    check_logits(tokens, logits)
    check_relaxation(k, delta, bound)
    path = [0]
    if len(parent_ids) > 1:
        rows, guesses = torch.softmax(_precise(logits), -1)[parents[1:].to(logits.device)], tokens[1:].to(logits.device)
        check_codes(rows, guesses, neighbors)
        own, _, mass = _neighbor_mass(rows, guesses, neighbors, k, delta, bound)
        others = rows.scatter(-1, guesses[:, None], -1)
        best = others.max(-1).values
        first = torch.where(others == best[:, None], torch.arange(len(neighbors), device=rows.device), len(neighbors)).min(-1).values
        wins = (own + mass > best) | ((own + mass == best) & (guesses < first))  # ties go to the lowest id
        exact = logits.argmax(-1)[parents[1:].to(logits.device)] == guesses      # where nothing moves, the logits themselves decide
        path = longest_accepted(parent_ids, [True, *torch.where(mass > 0, wins, exact).tolist()])
    return torch.tensor(path), int(logits[path[-1]].argmax())


#| export
def try_relaxed(target: Tensor,                      # (V,) what is left of the target's distribution
                draft: Tensor | None,                # (V,) the draft's; None = each guess was certain
                children: list[tuple[int, int]],     # (node, token), in order
                neighbors: Tensor, k: int, delta: float, bound: str,
                generator: torch.Generator | None,
                ) -> tuple[int | None, Tensor]: # the accepted child, or None; the residual distribution
    """Accept one of a node's children, or none, by its relaxed probability."""
    for node, token in children:
        chance = torch.rand((), generator=generator, device=generator.device if generator else None).item()
        relaxed, _ = _relax(target, token, neighbors, k, delta, bound)
        if chance * (1 if draft is None else draft[token].item()) < relaxed[token].item():
            return node, target
        if draft is None:
            residual = relaxed.index_fill(0, torch.tensor([token], device=relaxed.device), 0)
        else:
            residual = (relaxed - draft).clamp(min=0)
        total = residual.sum()
        target = residual / total if total > 0 else torch.full_like(residual, 1 / len(residual))
        if draft is not None:
            draft = draft.index_fill(0, torch.tensor([token], device=draft.device), 0)
            if draft.sum() == 0:
                break
            draft = draft / draft.sum()
    return None, target


def lantern_verify_sampling(tokens: Tensor,       # (N,)
                            parents: Tensor,      # (N,)
                            target_probs: Tensor, # (N, V) the target's distributions, after temperature, top-k and top-p
                            neighbors: Tensor,    # (V, K)
                            *, draft_probs: Tensor | None = None, # (N, V) from which the children of node i were drawn; None = chosen, not drawn
                            k: int = 1000, delta: float = 0.1, bound: str = "tv",
                            generator: torch.Generator | None = None,
                            ) -> tuple[Tensor, int]: # path (node indices, starts with 0), next token
    """Sample, and accept a guess by its relaxed probability. Errors: ValueError for a bad tree, bad probabilities, or as `relaxed_probability`.

    Source: Jang et al. 2025, Algorithm 1.
    """
    token_ids, parent_ids = check_tree(tokens, parents)
    check_relaxation(k, delta, bound)
    for name, probs in (("target_probs", target_probs), ("draft_probs", draft_probs)):
        if probs is not None and (probs.shape != target_probs.shape or probs.ndim != 2 or len(probs) != len(tokens)):
            raise ValueError(f"{name} must be (N, V) with N = {len(tokens)} nodes, got {tuple(probs.shape)}")
    guesses = torch.cat([tokens.new_zeros(1), tokens[1:]]).to(target_probs.device)  # the root's token is not read
    check_codes(target_probs, guesses, neighbors)
    if draft_probs is not None and not (all_finite(draft_probs) and (draft_probs >= 0).all()):
        raise ValueError("draft_probs must be finite and not negative")
    path, child = [], 0
    while child is not None:
        path.append(child)
        children = [(node, token_ids[node]) for node in range(child + 1, len(token_ids)) if parent_ids[node] == child]
        draft = None if draft_probs is None else _precise(draft_probs[child])
        child, residual = try_relaxed(_precise(target_probs[child]), draft, children, neighbors, k, delta, bound, generator)
    return torch.tensor(path), sample(residual, generator)


#| export
class Lantern:
    """Relaxed acceptance for codes of a codebook: a rule for `generate(..., verify=Lantern(codebook))`.

    Token ids from 0 on are codes; larger ones (words, class tokens) are left out of every distribution.
    Errors: ValueError as `check_relaxation` and `nearest_codes`. Source: Jang et al. 2025.
    """

    def __init__(self, codebook: Tensor,     # (V, d)
                 k: int = 1000,              # neighbours at most; all V - 1 if there are fewer
                 delta: float = 0.1,
                 bound: str = "tv"):         # as in `relaxed_probability`
        check_relaxation(k, delta, bound)
        self.neighbors = nearest_codes(codebook, min(k, max(1, len(codebook) - 1)))
        self.settings = dict(k=k, delta=delta, bound=bound)

    def __call__(self, tree: DraftTree, logits: Tensor, *, temperature: float = 0.0,
                 generator: torch.Generator | None = None) -> tuple[Tensor, int]: # path, next token
        """Judge a tree by the target's raw logits (N, at least V). Errors: ValueError for fewer logits than codes, or a guess that is no code."""
        check_temperature(temperature)
        size, neighbors = len(self.neighbors), self.neighbors.to(logits.device)
        check_logits(tree.tokens, logits)
        if logits.shape[1] < size:
            raise ValueError(f"logits must have at least one column for each of {size} codes, got {tuple(logits.shape)}")
        logits = logits[:, :size]
        if temperature == 0:
            return lantern_verify_greedy(tree.tokens, tree.parents, logits, neighbors, **self.settings)
        draft = tree.draft_probs
        if draft is not None:
            draft = draft[:, :size].to(logits.device)
            draft = draft / draft.sum(-1, keepdim=True).clamp(min=torch.finfo(draft.dtype).tiny)
        target = torch.softmax(_precise(logits) / temperature, -1)
        return lantern_verify_sampling(tree.tokens, tree.parents, target, neighbors, draft_probs=draft, generator=generator, **self.settings)
