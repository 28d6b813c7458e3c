from dataclasses import dataclass, fields, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torch.utils.data import Dataset

from tokenkit.core.world_paint import BACKGROUNDS, CLUTTER, COLORS, SHAPES, TEXTURES, Draws, look_up, texture

SIZES = {"small": (0.20, 0.25), "medium": (0.30, 0.36), "large": (0.42, 0.48)}
DIFFICULTIES = {
    "easy": dict(busy=0.2, clutter=0, lighting=0.0, noise=0.0, occlusion=0.0, rotation=0.0),
    "medium": dict(busy=0.6, clutter=2, lighting=0.2, noise=0.02, occlusion=0.1, rotation=12.0),
    "hard": dict(busy=1.0, clutter=10, lighting=0.35, noise=0.05, occlusion=0.3, rotation=25.0),
}
ATTRIBUTES = (*SHAPES, *COLORS, *TEXTURES, *BACKGROUNDS)

@dataclass(frozen=True)
class World:
    """What a scene may contain. None takes the value from `difficulty`; ValueError for anything out of range."""

    size: int = 96  # image side in pixels
    objects: int | tuple[int, int] = (1, 6)  # how many, or from-to
    difficulty: str = "medium"  # easy, medium or hard: sets the knobs that are None
    scale: float | None = None  # multiplies SIZES; None is 1 from 64 px on and 1.4 below
    shapes: tuple[str, ...] = SHAPES
    colors: tuple[str, ...] = tuple(COLORS)
    textures: tuple[str, ...] = TEXTURES
    sizes: tuple[str, ...] = tuple(SIZES)
    backgrounds: tuple[str, ...] = tuple(BACKGROUNDS)
    background_textures: tuple[str, ...] = TEXTURES
    pairs: str = "all"  # shape-colour pairs: all, seen (80 % of them) or unseen (the others)
    shape_weights: tuple[float, ...] | None = None  # how often each shape, for imbalanced data
    long_tail: float = 0.0  # exponent of a Zipf law over shape-colour pairs
    busy: float | None = None  # contrast of the background's pattern, 0 to 1
    clutter: int | None = None  # bits and pieces on the background
    lighting: float | None = None  # brightness gradient over the image, 0 to 1
    noise: float | None = None  # standard deviation of pixel noise
    occlusion: float | None = None  # how far objects may overlap, as a share of their distance
    rotation: float | None = None  # degrees to either side

    def __post_init__(self):
        if self.difficulty not in DIFFICULTIES:
            raise ValueError(f"difficulty must be one of {tuple(DIFFICULTIES)}, got {self.difficulty!r}")
        knobs = {name: value for name, value in DIFFICULTIES[self.difficulty].items() if getattr(self, name) is None}
        knobs |= dict(scale=1.0 if self.size >= 64 else 1.4) if self.scale is None else {}
        knobs |= dict(objects=(self.objects,) * 2) if isinstance(self.objects, int) else {}
        for name, value in knobs.items():
            object.__setattr__(self, name, value)
        _check_world(self)

_VOCABULARIES = dict(shapes=SHAPES, colors=COLORS, textures=TEXTURES, sizes=SIZES, backgrounds=BACKGROUNDS,
                     background_textures=TEXTURES)
_RANGES = dict(busy=(0, 1), clutter=(0, 40), lighting=(0, 1), noise=(0, 1), occlusion=(0, 1), rotation=(0, 180),
               long_tail=(0, 10), scale=(0.2, 4))


def _check_world(world: World) -> None:
    """Raise ValueError for the first field that is out of range."""
    if not (isinstance(world.size, int) and 16 <= world.size <= 512):
        raise ValueError(f"size must be an integer between 16 and 512 pixels, got {world.size!r}")
    low, high = world.objects
    if not 0 <= low <= high <= 6:
        raise ValueError(f"objects must be a count, or a pair low <= high, within 0 and 6, got {world.objects}")
    for name, known in _VOCABULARIES.items():
        words = getattr(world, name)
        if not words or isinstance(words, str) or len(set(words)) < len(words) or not set(words) <= set(known):
            raise ValueError(f"{name} must be different words out of {tuple(known)}, got {words!r}")
    for name, (least, most) in _RANGES.items():
        if not least <= getattr(world, name) <= most:
            raise ValueError(f"{name} must be between {least} and {most}, got {getattr(world, name)}")
    if world.pairs not in ("all", "seen", "unseen"):
        raise ValueError(f"pairs must be 'all', 'seen' or 'unseen', got {world.pairs!r}")
    weights = world.shape_weights
    if weights is not None and not (len(weights) == len(world.shapes) and min(weights) >= 0 and sum(weights) > 0):
        raise ValueError(f"shape_weights must be one number >= 0 per shape, not all 0, got {weights}")
    widest = max(SIZES[name][1] for name in world.sizes) * world.scale
    if widest > 0.9:
        raise ValueError(f"scale {world.scale} makes objects {widest:.2f} of the image, at most 0.9 is possible")
    if not pair_weights(world).any():
        raise ValueError(f"no shape-colour pair is left for pairs={world.pairs!r} in this vocabulary")

def pair_weights(
    world: World,
) -> np.ndarray:  # (len(shapes), len(colors)) relative frequency
    """How often each shape-colour pair occurs: unseen pairs, class weights and long tail together."""
    s = np.array([SHAPES.index(name) for name in world.shapes])[:, None]
    c = np.array([list(COLORS).index(name) for name in world.colors])[None]
    unseen = (s + c) % 5 == 0
    weights = {"all": np.ones(unseen.shape), "seen": ~unseen, "unseen": unseen}[world.pairs].astype(float)
    if world.shape_weights is not None:
        weights *= np.array(world.shape_weights)[:, None]
    rank = 1 + Draws(7, np.arange(1), "long tail").bits("rank", weights.size)[0].argsort().argsort()
    return weights * (rank**-world.long_tail).reshape(weights.shape)

TRIES = 24


def _place(draws: Draws, radius: np.ndarray, size: int, occlusion: float) -> np.ndarray:  # (B, K, 2) centres x, y
    """Centres inside the image, apart from each other by (1 - occlusion) times the sum of radii where possible."""
    room = size / 2 - radius - 1
    tries = draws.uniform("place", radius.shape[1], TRIES, 2, low=-1, high=1) * room[:, :, None, None] + size / 2
    centre = np.zeros((*radius.shape, 2), np.float32)
    for k in range(radius.shape[1]):
        distance = np.linalg.norm(tries[:, k, :, None] - centre[:, None, :k], axis=-1)
        apart = (distance / (radius[:, None, :k] + radius[:, None, k : k + 1])).min(-1, initial=9.0)
        good = apart >= 1 - occlusion
        chosen = np.where(good.any(1), good.argmax(1), apart.argmax(1))
        centre[:, k] = tries[np.arange(len(chosen)), k, chosen]
    return centre

def plan(
    world: World,
    draws: Draws,  # of B scenes
) -> dict[str, np.ndarray]:
    """The scenes as numbers: (B, K) arrays per object (words as vocabulary indices), (B,) arrays per scene."""
    low, high = world.objects
    slots = max(high, 1)
    lookup = {name: np.array([list(known).index(word) for word in getattr(world, name)])
              for name, known in _VOCABULARIES.items()}
    pair = draws.weighted("pair", slots, weights=pair_weights(world).ravel())
    sizes = lookup["sizes"][draws.integers("size", slots, high=len(world.sizes))]
    least, most = np.moveaxis(np.array(list(SIZES.values()), np.float32)[sizes], -1, 0)
    radius = (least + (most - least) * draws.uniform("within", slots)) * np.float32(world.scale * world.size / 2)
    p = dict(shapes=lookup["shapes"][pair // len(world.colors)], colors=lookup["colors"][pair % len(world.colors)],
             textures=lookup["textures"][draws.integers("texture", slots, high=len(world.textures))],
             sizes=sizes)
    counts = low + draws.integers("count", high=high - low + 1)
    exists = np.arange(slots) < counts[:, None]
    p = {name: np.where(exists, value, -1) for name, value in p.items()}
    turn = np.float32(np.pi / 180 * world.rotation)
    return p | dict(
        counts=counts, radius=radius, centers=_place(draws, radius, world.size, world.occlusion),
        angle=draws.uniform("angle", slots, low=-1, high=1) * turn,
        backgrounds=lookup["backgrounds"][draws.integers("background", high=len(world.backgrounds))],
        background_textures=lookup["background_textures"][
            draws.integers("background texture", high=len(world.background_textures))])

def _coordinates(size: int) -> tuple[np.ndarray, np.ndarray]:  # x, y of pixel centres in [-1, 1], (size, size)
    axis = ((np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1).astype(np.float32)
    return np.broadcast_to(axis, (size, size)), np.broadcast_to(axis[:, None], (size, size))


def _smooth(values: np.ndarray, size: int) -> np.ndarray:  # (B, g, g) -> (B, size, size)
    """Bilinear interpolation of a coarse grid."""
    at = np.linspace(0, values.shape[1] - 1, size, dtype=np.float32)
    weights = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(values.shape[1], dtype=np.float32)))
    return weights @ values @ weights.T


def _ground(world: World, p: dict, draws: Draws) -> np.ndarray:  # (B, S, S, 3)
    """Backgrounds: colour, pattern and clouds."""
    x, y = _coordinates(world.size)
    angle, cycles = draws.uniform("ground angle", 1, 1, high=np.pi), draws.uniform("ground cycles", 1, 1, low=2, high=4)
    phase = draws.uniform("ground phase", 2, 1, 1, low=10, high=12)
    cos, sin = np.cos(angle) * cycles, np.sin(angle) * cycles
    dark = np.empty((len(angle), world.size, world.size), np.float32)
    for kind in np.unique(p["background_textures"]):
        at = p["background_textures"] == kind
        u, v = x * cos[at] + y * sin[at] + phase[at, 0], y * cos[at] - x * sin[at] + phase[at, 1]
        dark[at] = texture(TEXTURES[kind], u, v)
    light = 1 - 0.55 * world.busy * dark
    for cells, strength in ((4, 0.35), (11, 0.25)):
        light += world.busy * _smooth(draws.uniform(f"clouds {cells}", cells, cells, low=-strength, high=strength), world.size)
    tint = draws.uniform("ground tint", 3, low=-0.05, high=0.05)
    color = np.array(list(BACKGROUNDS.values()), np.float32)[p["backgrounds"]] + tint
    return light[..., None] * color[:, None, None]

def _stamp(canvas: np.ndarray, owner: np.ndarray, k: int, scene: np.ndarray, shape: np.ndarray, color: np.ndarray,
           kind: np.ndarray, centre: np.ndarray, radius: np.ndarray, angle: np.ndarray) -> np.ndarray:  # boxes (M, 5)
    """Paint one object into each of M scenes; `owner` notes k where it is on top. Returns x0, y0, x1, y1, area."""
    size = canvas.shape[1]
    side = min(size, int(np.ceil(2 * radius.max() * 1.42)) + 3)
    corner = np.clip(np.floor(centre - side / 2).astype(np.int64), 0, size - side)
    step = np.arange(side)
    column, row = corner[:, :1] + step, corner[:, 1:] + step
    dx = ((column + np.float32(0.5) - centre[:, :1]) / radius[:, None]).astype(np.float32)[:, None, :]
    dy = ((row + np.float32(0.5) - centre[:, 1:]) / radius[:, None]).astype(np.float32)[:, :, None]
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    u, v = dx * cos + dy * sin, dy * cos - dx * sin
    alpha = np.float32(0.5) - look_up(shape[:, None, None], u, v) * radius[:, None, None]
    m, i, j = np.nonzero(alpha > 0)
    pixel = (scene[m] * size + row[m, i]) * size + column[m, j]
    solid = alpha > 0.5
    owner.ravel()[pixel[solid[m, i, j]]] = k
    opacity = np.minimum(alpha[m, i, j], 1)[:, None]
    u, v = u[m, i, j], v[m, i, j]
    dark = np.zeros_like(u)
    for t in np.unique(kind):
        at = kind[m] == t
        dark[at] = texture(TEXTURES[t], u[at] * 2 + 10, v[at] * 2 + 10)
    paint = color[m] * (1 - np.float32(0.6) * dark - np.float32(0.12) * (u + v))[:, None]
    flat = canvas.reshape(-1, 3)
    flat[pixel] += opacity * (paint - flat[pixel])
    across, down = solid.any(1), solid.any(2)
    ends = [corner[:, 0] + across.argmax(1), corner[:, 1] + down.argmax(1),
            corner[:, 0] + side - across[:, ::-1].argmax(1), corner[:, 1] + side - down[:, ::-1].argmax(1)]
    return np.stack([*ends, solid.sum((1, 2))], 1)

@lru_cache(maxsize=1)
def _noise_table() -> np.ndarray:  # (2^20,) standard normal
    a, b = (Draws(0, np.arange(1), "noise").uniform(name, 2**20)[0].astype(np.float64) for name in "ab")
    return (np.sqrt(-2 * np.log(1 - a)) * np.cos(2 * np.pi * b)).astype(np.float32)


def _litter(world: World, canvas: np.ndarray, owner: np.ndarray, draws: Draws) -> None:
    """Strew clutter over the ground."""
    count, b = world.clutter, len(canvas)
    scene, palette = np.arange(b), np.array(list(COLORS.values()), np.float32)
    centre = draws.uniform("clutter place", count, 2, high=world.size)
    radius = draws.uniform("clutter radius", count, low=0.03, high=0.08) * np.float32(world.size)
    kind, color = draws.integers("clutter kind", count, high=len(CLUTTER)), draws.integers("clutter color", count, high=len(COLORS))
    angle = draws.uniform("clutter angle", count, high=2 * np.pi)
    for k in range(count):
        _stamp(canvas, owner, -1, scene, len(SHAPES) + kind[:, k], palette[color[:, k]], np.zeros(b, int),
               centre[:, k], radius[:, k], angle[:, k])


def _develop(world: World, canvas: np.ndarray, draws: Draws) -> np.ndarray:  # (B, 3, S, S) in [0, 1]
    """Light, noise, and rounding to 8 bits."""
    x, y = _coordinates(world.size)
    if world.lighting:
        slope = draws.uniform("light", 2, 1, 1, low=-world.lighting, high=world.lighting)
        canvas *= (1 + slope[:, 0] * x + slope[:, 1] * y)[..., None]
    if world.noise:
        table = np.lib.stride_tricks.sliding_window_view(_noise_table(), canvas[0].size)
        canvas += np.float32(world.noise) * table[draws.integers("noise", high=len(table))].reshape(canvas.shape)
    levels = np.rint(np.clip(canvas, 0, 1) * 255)
    return np.ascontiguousarray((levels / np.float32(255)).transpose(0, 3, 1, 2))

@dataclass
class Scenes:
    """A batch of scenes and all their truth. K slots per scene; empty slots hold -1 (boxes 0)."""

    images: Tensor  # (B, 3, S, S) float in [0, 1]
    labels: Tensor  # (B,) shape of object 0, the subject; -1 without objects
    attributes: Tensor  # (B, len(ATTRIBUTES)) float, 1 where the scene shows it
    counts: Tensor  # (B,) number of objects
    shapes: Tensor  # (B, K) index into SHAPES
    colors: Tensor  # (B, K) index into COLORS
    textures: Tensor  # (B, K) index into TEXTURES
    sizes: Tensor  # (B, K) index into SIZES
    boxes: Tensor  # (B, K, 4) x0, y0, x1, y1 in pixels, of the whole object, hidden parts too
    visible: Tensor  # (B, K) share of the object's pixels that nothing covers
    owner: Tensor  # (B, S, S) which object is on top, -1 for ground
    backgrounds: Tensor  # (B,) index into BACKGROUNDS
    background_textures: Tensor  # (B,) index into TEXTURES
    index: Tensor  # (B,) the scenes' numbers

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows) -> "Scenes":
        """Some of the scenes: a slice, a list or a tensor of row numbers or booleans."""
        return Scenes(*(getattr(self, f.name)[rows] for f in fields(self)))

    @property
    def instance_masks(self) -> Tensor:  # (B, K, S, S) bool
        return self.owner[:, None] == torch.arange(self.shapes.shape[1], device=self.owner.device)[:, None, None]

    @property
    def semantic_masks(self) -> Tensor:  # (B, S, S) 0 for ground, 1 + shape index on objects
        padded = torch.cat([self.shapes, torch.full_like(self.shapes[:, :1], -1)], 1) + 1
        return padded.gather(1, self.owner.flatten(1) % padded.shape[1]).view(self.owner.shape)

    def coverage(self, patch_size: int) -> Tensor:  # (B, N) share of each patch that shows an object, row by row
        if self.owner.shape[-1] % patch_size:
            raise ValueError(f"patch_size must divide the image side {self.owner.shape[-1]}, got {patch_size}")
        return avg_pool2d((self.owner >= 0).float()[:, None], patch_size).flatten(1)

def _attributes(p: dict) -> np.ndarray:  # (B, len(ATTRIBUTES))
    """One column per word: 1 where some object, or the ground, has it."""
    columns = [(p[name][:, :, None] == np.arange(n)).any(1)
               for name, n in (("shapes", len(SHAPES)), ("colors", len(COLORS)), ("textures", len(TEXTURES)))]
    columns.append(p["backgrounds"][:, None] == np.arange(len(BACKGROUNDS)))
    return np.concatenate(columns, 1).astype(np.float32)


def _render(world: World, index: np.ndarray, seed: int, split: str) -> Scenes:
    """Draw the scenes with these numbers, all at once."""
    draws = Draws(seed, index, split)
    p = plan(world, draws)
    canvas = _ground(world, p, draws)
    owner = np.full(canvas.shape[:3], -1, np.int64)
    _litter(world, canvas, owner, draws)
    slots = p["shapes"].shape[1]
    tint = draws.uniform("tint", slots, 3, low=-0.05, high=0.05)
    color = np.array(list(COLORS.values()), np.float32)[p["colors"]] + tint
    boxes = np.zeros((len(index), slots, 5), np.int64)
    for k in range(slots):
        (on,) = np.nonzero(p["shapes"][:, k] >= 0)
        if len(on):
            boxes[on, k] = _stamp(canvas, owner, k, on, p["shapes"][on, k], color[on, k], p["textures"][on, k],
                                  p["centers"][on, k], p["radius"][on, k], p["angle"][on, k])
    shown = np.stack([(owner == k).sum((1, 2)) for k in range(slots)], 1)
    truth = dict(images=_develop(world, canvas, draws), labels=p["shapes"][:, 0], attributes=_attributes(p),
                 boxes=boxes[..., :4].astype(np.float32), owner=owner, index=np.asarray(index),
                 visible=(shown / np.maximum(boxes[..., 4], 1)).astype(np.float32))
    known = p | truth
    return Scenes(*(torch.from_numpy(known[f.name]) for f in fields(Scenes)))

CHUNK_PIXELS = 300_000  # scenes are drawn in chunks that stay in the processor's cache
TASKS = {
    "scene": dict(),
    "class": dict(objects=1, difficulty="hard", sizes=("medium", "large")),
}


def render(
    world: World,
    index: np.ndarray,  # (B,) scene numbers >= 0, in any order
    *,
    seed: int = 0,
    split: str = "train",  # any word; splits share no scenes
) -> Scenes:
    """The scenes with these numbers. ValueError if there is none, or a negative number or seed."""
    index = np.asarray(index, dtype=np.int64)
    if index.ndim != 1 or not len(index) or index.min() < 0:
        raise ValueError(f"index must be a non-empty list of scene numbers >= 0, got {index}")
    if seed < 0:
        raise ValueError(f"seed must be >= 0, got {seed}")
    step = max(1, CHUNK_PIXELS // world.size**2)
    parts = [_render(world, index[i : i + step], seed, split) for i in range(0, len(index), step)]
    return Scenes(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Scenes)))


def make_world(
    task: str = "scene",  # "scene": one to six objects; "class": one object on a busy background
    **changes,  # fields of World that differ from the task's
) -> World:
    """The world of a task. ValueError for an unknown task or field, and for anything World refuses."""
    if task not in TASKS:
        raise ValueError(f"task must be one of {tuple(TASKS)}, got {task!r}")
    unknown = set(changes) - {f.name for f in fields(World)}
    if unknown:
        raise ValueError(f"World has no field {sorted(unknown)}, only {[f.name for f in fields(World)]}")
    return World(**(TASKS[task] | changes))


def scenes(
    n: int,  # how many
    size: int = 96,  # image side in pixels
    *,
    seed: int = 0,
    start: int = 0,  # number of the first scene: batch 5 of 32 scenes starts at 160
    split: str = "train",  # any word; splits share no scenes
    task: str = "scene",  # "scene": one to six objects; "class": one object on a busy background
    **changes,  # fields of World that differ from the task's
) -> Scenes:
    """Scenes number `start` to `start + n - 1`. Errors: see `render` and `make_world`."""
    return render(make_world(task, size=size, **changes), np.arange(start, start + n), seed=seed, split=split)
