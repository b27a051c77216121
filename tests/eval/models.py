"""Models for benchmarks: a text-to-image network in miniature with a codec that counts, and one of pixels."""

from __future__ import annotations

import torch
from torch import nn

from fastgen.denoiser import Denoiser
from fastgen.paths import Prediction, RectifiedFlow
from fastgen.student import SamplerSpec, Student
from fastgen.teachers import mlp

LATENT = (4, 8, 8)


class Attention(nn.Module):
    """One head over all places, and a convolution beside it."""

    def __init__(self, width):
        super().__init__()
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        q, k, v = (part[:, None] for part in self.qkv(x.flatten(2).mT).chunk(3, dim=-1))
        seen = nn.functional.scaled_dot_product_attention(q, k, v)[:, 0].mT.reshape(x.shape)
        return x + self.mix(seen.contiguous())


class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.inner = nn.Conv2d(4, width, 1)
        self.blocks = nn.ModuleList([Attention(width) for _ in range(2)])
        self.outer = nn.Conv2d(width, 4, 1)

    def forward(self, x, text):
        x = self.inner(x) + text.mean(dim=(1, 2))[:, None, None, None]
        for block in self.blocks:
            x = block(x)
        return self.outer(x)


class TextDenoiser(Denoiser):
    family = "fake"

    def raw(self, x, time, cond, extra):
        dtype = self.net.inner.weight.dtype
        return self.net(x.to(dtype), cond["text"].to(dtype))

    @property
    def has_null(self):
        return True

    @property
    def null(self):
        return {"text": torch.zeros(1, 5, 8, device=self.device)}


class FakeCodec:
    """Prompts to [n, 5, 8], latents [n, 4, 8, 8] to images twice as large."""

    image_shape = (3, 16, 16)

    def __init__(self):
        self.text = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).requires_grad_(False)
        self.decoder = nn.Sequential(nn.ConvTranspose2d(4, 3, 2, stride=2), nn.Tanh()).requires_grad_(False)
        self.dtype = torch.float32

    def encode_prompts(self, prompts, framing=None):
        letters = torch.tensor([[ord(letter) % 8 for letter in prompt[:5]] for prompt in prompts])
        return {"text": self.text(nn.functional.one_hot(letters, 8).to(self.dtype)).float()}

    def decode(self, latents):
        return self.decoder(latents.to(self.dtype)).float()

    def to(self, device, dtype=None):
        self.dtype = dtype or self.dtype
        for module in self.modules().values():
            module.to(device, dtype)
        return self

    def modules(self):
        return {"text_encoder": self.text, "vae": self.decoder}


def text_denoiser(seed=0):
    torch.manual_seed(seed)
    net, prediction = Net().requires_grad_(False), Prediction(kind="flow")
    return TextDenoiser(net, RectifiedFlow(), prediction, shape=LATENT, codec=FakeCodec())


def spec(*counts, renoise=False):
    path = RectifiedFlow()
    return SamplerSpec(path=path, times={n: path.grid(n) for n in counts}, renoise=renoise)


def text_student(*counts, renoise=False):
    return Student(text_denoiser(), spec(*(counts or (1, 2)), renoise=renoise), {})


def pixel_denoiser(size=8):
    torch.manual_seed(0)
    return mlp.build(mlp.MLPConfig(width=8, depth=1), (1, size, size), 4).requires_grad_(False)
