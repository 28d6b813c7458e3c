"""Phantoms are addressed, their findings are in the picture and in the report, and arguments are validated."""
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenkit.core.world import WorldDataset, to_datasets
from tokenkit.core.world_chest import FINDINGS, REPORT_WORDS, SIDES, SIZES_FOUND, ZONES, Chests, chests, parse_report

FIELDS = list(Chests.__dataclass_fields__)


def same(a: Chests, b: Chests) -> bool:
    pairs = [(getattr(a, name), getattr(b, name)) for name in FIELDS]
    return all(x == y if isinstance(x, list) else torch.equal(x, y) for x, y in pairs)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**40), start=st.integers(0, 10**9), cut=st.integers(1, 5))
def test_any_split_into_batches_gives_the_same_phantoms(seed, start, cut):
    whole = chests(6, 32, seed=seed, start=start, normal=0.2)
    assert same(whole[:cut], chests(cut, 32, seed=seed, start=start, normal=0.2))
    assert same(whole[torch.tensor([5, cut - 1])], chests([5, cut - 1], 32, seed=seed, start=start, normal=0.2))


def test_chunks_do_not_matter(monkeypatch):
    whole = chests(5, 32)
    monkeypatch.setattr("tokenkit.core.world_chest.CHUNK_PIXELS", 2 * 32**2)
    assert same(whole, chests(5, 32))


def test_seeds_and_splits_are_different():
    base = chests(4, 32).images
    for other in (chests(4, 32, seed=1), chests(4, 32, split="test"), chests(4, 32, start=4)):
        assert not any(torch.equal(a, b) for a in base for b in other.images)


@pytest.mark.parametrize("size", [32, 64, 112])
def test_shapes_types_and_slots(size):
    batch = chests(30, size)
    assert batch.images.shape == (30, 3, size, size) and batch.images.dtype == torch.float32 and batch.masks.shape == (30, 3, size, size)
    assert torch.equal((batch.images * 255).round() / 255, batch.images) and batch.images.min() >= 0 and batch.images.max() <= 1
    assert torch.equal(batch.images[:, 0], batch.images[:, 2]) and batch.lungs.shape == (30, 2, size, size) and batch.heart.dtype == torch.bool
    there = torch.arange(3) < batch.counts[:, None]
    for name in ("kinds", "sides", "sizes"):
        assert torch.equal(getattr(batch, name) >= 0, there)
    assert torch.equal(batch.zones >= 0, (batch.kinds == 0) | (batch.kinds == 1))
    assert torch.equal(batch.masks.any(-1).any(-1), there), "every finding has a mask, at any size"


def test_anatomy():
    batch = chests(60, 64, normal=1.0, noise=0.0)
    middle = torch.arange(64) + 0.5
    columns = [(batch.lungs[:, k].sum(1) * middle).sum(1) / batch.lungs[:, k].sum((1, 2)) for k in range(2)]
    assert (columns[0] < 28).all() and (columns[1] > 36).all(), "the right lung is on the left of the picture"
    assert not (batch.lungs.any(1) & batch.heart).any() and not batch.lungs.all(1).any()
    film = batch.images[:, 0]
    dark, bright = (torch.stack([film[b][where[b]].mean() for b in range(60)]) for where in (batch.lungs.any(1), batch.heart))
    assert (bright > dark + 0.25).all() and (batch.counts == 0).all() and not batch.masks.any()


def test_findings_lie_in_their_lung_and_zone():
    batch = chests(300, 64, normal=0.0)
    for b in range(300):
        for k in range(batch.counts[b]):
            assert (batch.masks[b, k] <= batch.lungs[b, batch.sides[b, k]]).all()
    height = torch.arange(64.0)[:, None]
    rows = [[(batch.masks[b, k] * height).sum() / batch.masks[b, k].sum() for b, k in torch.nonzero(batch.zones == zone).tolist()] for zone in range(3)]
    upper, middle, lower = (torch.stack(r).mean() for r in rows)
    assert upper + 5 < middle < lower - 5
    pairs = [[(k, s) for k, s in zip(batch.kinds[b].tolist(), batch.sides[b].tolist()) if k >= 0] for b in range(300)]
    assert all(len(set(p)) == len(p) for p in pairs)


@pytest.mark.parametrize("kind", FINDINGS)
def test_findings_change_the_film_where_they_are(kind):
    ill, well = (chests(200, 64, normal=share, most=1, noise=0.0) for share in (0.0, 1.0))
    rows = (ill.kinds[:, 0] == FINDINGS.index(kind)).nonzero().flatten()
    change = (ill.images - well.images)[rows, 0]
    mask = ill.masks[rows, 0]
    wide = torch.nn.functional.max_pool2d(mask[:, None].float(), 9, 1, 4)[:, 0] > 0
    sign = -1 if kind == "pneumothorax" else 1
    inside = torch.stack([c[m].median() for c, m in zip(change, mask)])
    assert (sign * inside > 0.04).all() and change[~wide].abs().mean() < 0.01
    area = [mask[ill.sizes[rows, 0] == size].float().sum((1, 2)).mean() for size in range(2)]
    assert area[1] > 1.4 * area[0]


def test_reports_say_what_is_found():
    batch = chests(500, 32)
    for row, text in enumerate(batch.reports):
        assert parse_report(text) == batch.findings(row) and set(text.split()) <= set(REPORT_WORDS)
        assert 3 <= text.count(".") <= 6 and len(text) == len(text.strip())
        for k in range(batch.counts[row]):
            assert batch.zones[row, k] < 0 or f"{SIDES[batch.sides[row, k]]} {ZONES[batch.zones[row, k]]} zone" in text
    assert 0.3 < (batch.counts == 0).float().mean() < 0.5 and len(set(batch.reports)) > 250
    assert set(chests(100, 32, normal=0.0, most=2).counts.tolist()) == {1, 2}


def test_parsing_generated_reports():
    assert parse_report("there is a small left effusion . no nodule is seen .") == {("effusion", "left", "small")}
    assert parse_report("effusion") == {("effusion", "", "")} and parse_report("") == set() == parse_report("the lungs are clear.")
    assert parse_report("Large right nodule. there is no effusion.") == {("nodule", "right", "large")}
    assert parse_report("a large nodule and opacity on the left") == {("nodule", "left", "large"), ("opacity", "left", "large")}


def test_labels():
    batch = chests(100, 32)
    assert batch.labels.shape == (100, 8) and torch.equal(batch.labels.sum(1).long(), batch.counts)
    for row in range(100):
        told = {(FINDINGS[c // 2], SIDES[c % 2]) for c in batch.labels[row].nonzero().flatten().tolist()}
        assert told == {(kind, side) for kind, side, _ in batch.findings(row)}


def test_views():
    data = WorldDataset(chests, 6, keys=("images", "reports"), size=32, start=4)
    batch = next(iter(torch.utils.data.DataLoader(data, batch_size=3)))
    assert torch.equal(batch["images"], chests(3, 32, start=4).images) and list(batch["reports"]) == chests(3, 32, start=4).reports
    pytest.importorskip("datasets")
    some = chests(3, 32, normal=0.0)
    view = to_datasets(some)
    pixels = torch.from_numpy(np.array(view[1]["image"])).permute(2, 0, 1) / 255
    assert torch.allclose(pixels, some.images[1]) and view[0]["report"] == some.reports[0]
    assert {tuple(f) for f in json.loads(view[2]["findings"])} == some.findings(2) and SIZES_FOUND == ("small", "large")


@pytest.mark.parametrize("change,word", [
    (dict(size=16), "size"), (dict(size=64.0), "size"), (dict(most=0), "most"), (dict(most=4), "most"), (dict(normal=-0.1), "normal"),
    (dict(normal=float("nan")), "normal"), (dict(noise=0.5), "noise"), (dict(n=0), "index"), (dict(start=-1), "index"), (dict(seed=-1), "seed"),
])
def test_bad_arguments_are_refused(change, word):
    with pytest.raises(ValueError, match=word):
        chests(**(dict(n=1, size=32) | change))
