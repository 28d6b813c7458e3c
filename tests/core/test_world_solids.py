"""Distances, points and meshes agree on where a body is."""
import pytest
import torch

from tokenkit.core.world import WorldDataset, to_datasets
from tokenkit.core.world_solids import SOLIDS, meshes, solid_distance, solids


@pytest.fixture(scope="module")
def batch():
    return solids(24, points=128, queries=256, seed=5)


def test_a_body_does_not_depend_on_its_batch(batch):
    some = solids([9, 4], points=128, queries=256, seed=5)
    for name in ("kinds", "measures", "centers"):
        assert torch.equal(getattr(some, name), getattr(batch, name)[[9, 4]]), name
    for name in ("points", "normals", "queries", "distances"):
        assert torch.allclose(getattr(some, name), getattr(batch, name)[[9, 4]], atol=1e-5), name
    assert not torch.equal(solids([9], points=8, queries=8, seed=5, split="test").queries, solids([9], points=8, queries=8, seed=5).queries)


@pytest.mark.parametrize("kind, size", [("box", (0.5, 0.3, 0.2)), ("ball", (0.5, 0, 0)), ("cylinder", (0.4, 0.3, 0)), ("torus", (0.5, 0.2, 0))])
def test_distances_against_the_nearest_of_many_surface_points(kind, size):
    size = torch.tensor(size)
    generator = torch.Generator().manual_seed(0)
    near = 2 * torch.rand(200_000, 3, generator=generator) - 1
    d = solid_distance(kind, near, size)
    surface = near[d.abs() < 0.02]
    probe = 2 * torch.rand(50, 3, generator=generator) - 1
    far = torch.cdist(probe, surface).amin(1)
    assert (solid_distance(kind, probe, size).abs() - far).abs().max() < 0.06
    assert (solid_distance(kind, torch.zeros(3), size) < 0) == (kind != "torus")


def test_points_are_on_the_surface_and_normals_lead_away(batch):
    assert batch.signed_distance(batch.points).abs().max() < 1e-4 and batch.points.abs().max() < 1
    assert torch.allclose(batch.normals.norm(dim=-1), torch.ones(24, 128), atol=1e-4)
    assert (batch.signed_distance(batch.points + 0.01 * batch.normals) > 0).float().mean() > 0.99
    assert torch.equal(batch.occupancy, batch.distances < 0) and 0.3 < batch.occupancy[:, 1::2].float().mean() < 0.6
    assert (batch.queries.abs() <= 1).all()


def test_gradient_reaches_the_query(batch):
    p = batch.queries.clone().requires_grad_()
    batch.signed_distance(p).sum().backward()
    assert p.grad.isfinite().all() and (p.grad.norm(dim=-1) < 1.01).all()


def test_blend_only_adds_matter():
    sharp, soft = (solids(12, blend=blend, queries=256, points=8) for blend in (0.0, 0.2))
    p = torch.rand(12, 500, 3) * 2 - 1
    assert (soft.signed_distance(p) <= sharp.signed_distance(p) + 1e-6).all() and (soft.signed_distance(p) < sharp.signed_distance(p) - 1e-4).any()


def test_meshes_lie_on_the_surface(batch):
    pytest.importorskip("skimage")
    for row, (vertices, faces) in enumerate(meshes(batch[:3], 32)):
        assert batch[[row]].signed_distance(vertices[None]).abs().max() < 0.02 and faces.max() < len(vertices)
        a, b, c = vertices[faces].unbind(1)
        volume = torch.linalg.cross(a, b).mul(c).sum().abs() / 6
        p = torch.rand(1, 50_000, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
        assert volume == pytest.approx(8 * (batch[[row]].signed_distance(p) < 0).float().mean().item(), rel=0.15)


def test_one_part_is_its_solid():
    batch = solids(20, parts=(1, 1), points=8, queries=64)
    own = torch.einsum("bij,bqi->bqj", batch.turns[:, 0], batch.queries - batch.centers[:, :1])
    for row in range(20):
        assert torch.allclose(solid_distance(SOLIDS[batch.labels[row]], own[row], batch.measures[row, 0]), batch.distances[row], atol=1e-5)


def test_views(batch):
    item = WorldDataset(solids, 4, keys=("points", "distances"), points=16, queries=8)[2]
    assert item["points"].shape == (16, 3) and torch.allclose(item["points"], solids([2], points=16, queries=8).points[0], atol=1e-6)
    hub = to_datasets(solids(2, points=4, queries=4))
    assert hub.features["label"].names == list(SOLIDS) and len(hub[0]["points"]) == 4


@pytest.mark.parametrize("bad, match", [(dict(points=0), "points"), (dict(queries=0), "queries"), (dict(parts=(2, 1)), "parts"), (dict(parts=(0, 1)), "parts"),
                                        (dict(blend=-0.1), "blend"), (dict(start=-1), "index"), (dict(seed=-1), "seed")])
def test_refusals(bad, match):
    with pytest.raises(ValueError, match=match):
        solids(1, **bad)


def test_more_refusals(batch):
    with pytest.raises(ValueError, match="kind"):
        solid_distance("cone", torch.zeros(3), torch.ones(3))
    with pytest.raises(ValueError, match="resolution"):
        meshes(batch[:1], 4)
