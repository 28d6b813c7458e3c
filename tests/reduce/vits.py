"""Small timm ViTs of many kinds, their images, and a watch for attention maps: for the tests of all reduction methods."""
import warnings

import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ARCHITECTURES = {
    "vit": ("vit_tiny_patch16_224", dict(img_size=64)),
    "deit distilled": ("deit_tiny_distilled_patch16_224", dict(img_size=64)),
    "dinov2": ("vit_small_patch14_dinov2", dict(img_size=70)),
    "registers": ("vit_small_patch14_reg4_dinov2", dict(img_size=70)),
    "no class token": ("vit_medium_patch16_gap_256", dict(img_size=64)),
    "query and key norms": ("vit_tiny_patch16_224", dict(img_size=64, qk_norm=True)),
    "dinov3, rotary": ("vit_small_patch16_dinov3", dict(img_size=64)),
}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def build(architecture, noise=0.15, **changes):
    """A small model of a kind, with weights large enough that every part of it matters."""
    name, parts = architecture
    torch.manual_seed(0)
    model = timm.create_model(name, **{**dict(depth=3, embed_dim=48, num_heads=3, num_classes=7), **parts, **changes}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise * torch.randn_like(p))
    return model


def vit(kind="vit", **changes):
    return build(ARCHITECTURES[kind], **changes)


def images(model, batch=2):
    return normal(batch, 3, *model.patch_embed.img_size, seed=1, dtype=torch.float32)


def assert_exports_and_compiles(reduced, x):
    """The model runs the same after torch.export, for another batch size, and under torch.compile as one graph."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = reduced(x)
        program = torch.export.export(reduced, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
        assert torch.allclose(program.module()(x[:1]), want[:1], atol=1e-5)
        torch._dynamo.reset()
        assert torch.allclose(torch.compile(reduced, backend="eager", fullgraph=True)(x), want, atol=1e-5)


class Watch(TorchDispatchMode):
    """Notes the largest square 4-D result: an attention map, where nothing else is square."""
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and t.ndim == 4 and t.shape[-1] == t.shape[-2]:
                self.largest = max(self.largest, t.shape[-1])
        return out
