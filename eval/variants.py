"""The ways to run the same networks, by name: each is a row of a benchmark, or the reason why it is none.

Names are joined by "+", one of each kind: `bf16+channels_last+compile-regional`. Nothing is replaced by something else:
a variant that cannot be had here raises `Unavailable`.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from fastgen.cond import Cond
from fastgen.errors import UserError, first_line, suggestion
from fastgen.eval.graphs import Graphed
from fastgen.student import Student
from fastgen.teacher import Teacher

# name -> (kind, what it is); of each kind at most one.
VARIANTS = {
    "eager": ("plain", "as loaded: float32, TF32 off, torch's choice of attention"),
    "bf16": ("dtype", "weights and activations in bfloat16"),
    "fp16": ("dtype", "weights and activations in float16 (a VAE that asks for float32 stays there)"),
    "tf32": ("dtype", "float32 with TF32 matrix products and convolutions"),
    "channels_last": ("layout", "4-D weights and activations in NHWC order"),
    "sdpa-flash": ("attention", "the denoiser's attention by torch's FlashAttention kernel alone"),
    "sdpa-efficient": ("attention", "the same by the memory-efficient kernel"),
    "sdpa-cudnn": ("attention", "the same by cuDNN"),
    "sdpa-math": ("attention", "the same by plain matrix products"),
    "xformers": ("attention", "the same by xformers"),
    "tiny-decoder": ("decoder", "an AutoencoderTiny in place of the VAE's decoder"),
    "compile-regional": ("compile", "torch.compile of the repeated blocks, each kind once"),
    "compile-full": ("compile", "torch.compile of every network"),
    "reduce-overhead": ("compile", "torch.compile of every network, in CUDA graphs of torch's making"),
    "cuda-graph": ("compile", "every network captured as a CUDA graph, nothing compiled"),
}
KERNELS = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
CUDA_ONLY = {"tf32", "sdpa-cudnn", "xformers", "reduce-overhead", "cuda-graph"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
RECOMPILE_LIMIT = 256  # one for each shape of each block: torch's 8 would go back to eager without a word


class Unavailable(Exception):
    """A variant that cannot be had here; one line that says why."""


@dataclass(frozen=True)
class Variant:
    """`name` as the user wrote it, and its part of each kind."""

    name: str
    parts: dict[str, str] = field(hash=False)

    @property
    def plain(self) -> bool:
        return set(self.parts) == {"plain"}

    @property
    def compiled(self) -> str:
        return self.parts.get("compile", "none")

    @property
    def attention(self) -> str:
        return self.parts.get("attention", "torch's choice")


def parse(names: Sequence[str]) -> tuple[Variant, ...]:
    """Variants from the command line; unknown names, two of a kind and repetitions are UserErrors."""
    found = tuple(_parse(name.strip()) for name in names)
    twice = [name for name, n in Counter(variant.name for variant in found).items() if n > 1]
    if twice:
        raise UserError(f"--variants {twice[0]}: given twice")
    return found


def _parse(name: str) -> Variant:
    parts: dict[str, str] = {}
    for part in name.split("+"):
        if part not in VARIANTS:
            raise UserError(f"--variants {part}: no such variant ({suggestion(part, VARIANTS)})")
        kind = VARIANTS[part][0]
        if kind in parts:
            raise UserError(f"--variants {name}: {parts[kind]} and {part} exclude each other")
        parts[kind] = part
    if "plain" in parts and len(parts) > 1:
        raise UserError(f"--variants {name}: eager is the plain form; leave it out of a combination")
    return Variant(name, parts)


def refuse_without_cuda(variant: Variant, device: torch.device) -> None:
    """Variants made of nothing but CUDA are Unavailable elsewhere, before anything is opened."""
    for part in variant.parts.values():
        if part in CUDA_ONLY and device.type != "cuda":
            raise Unavailable(f"{part} needs a CUDA GPU, and this is a {device.type} device")


@contextmanager
def prepared(model: Student | Teacher, variant: Variant) -> Iterator[None]:
    """Precision and attention of a freshly opened model (it is spent afterwards), and torch's settings."""
    parts = variant.parts
    with ExitStack() as stack:
        stack.enter_context(_settings(tf32=parts.get("dtype") == "tf32"))
        if variant.compiled not in ("none", "cuda-graph"):
            stack.enter_context(_compiler())
        if parts.get("dtype") in DTYPES:
            _cast(model, DTYPES[parts["dtype"]])
        if "attention" in parts:
            stack.enter_context(_attention(model.denoiser.net, parts["attention"]))
        yield


def laid_out(networks: Sequence[nn.Module], variant: Variant) -> None:
    """channels_last, on the networks that a call runs."""
    if "layout" not in variant.parts:
        return
    layers = (module for network in networks for module in network.modules())
    if not any(isinstance(module, nn.Conv2d) for module in layers):
        raise Unavailable("channels_last: no network has a 2-D convolution")
    for network in networks:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def compiled(networks: Sequence[nn.Module], net: nn.Module, variant: Variant, say: Callable[[str], None]) -> None:
    """Compilation or capture of the networks; the work itself is done by their first call.

    A network other than the denoiser that cannot be captured stays eager, and is named.
    """
    kind = variant.compiled
    if kind == "none":
        return
    if kind == "compile-regional":
        _compile_regions(networks, say)
    for network in networks:
        forward: Any = network.forward
        if kind == "compile-full":
            network.forward = torch.compile(forward, dynamic=False)
        elif kind == "reduce-overhead":
            network.forward = _kept(torch.compile(forward, dynamic=False, mode="reduce-overhead"))
        elif kind == "cuda-graph":
            stays = partial(_stays_eager, type(network).__name__, say)
            network.forward = Graphed(forward, None if network is net else stays)


def _stays_eager(name: str, say: Callable[[str], None], reason: str) -> None:
    say(f"{name} stays eager: it cannot be captured ({reason})")


@contextmanager
def _settings(*, tf32: bool) -> Iterator[None]:
    """Precision of float32 products, and cuDNN's search for the best kernel (shapes do not change here)."""
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.benchmark
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    cudnn.allow_tf32, cudnn.benchmark = tf32, True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        cudnn.allow_tf32, cudnn.benchmark = before


@contextmanager
def _compiler() -> Iterator[None]:
    """A block of every shape is compiled; past the limit torch fails, and does not go back to eager unheard."""
    limits = {
        "recompile_limit": RECOMPILE_LIMIT,
        "accumulated_recompile_limit": 4 * RECOMPILE_LIMIT,
        "fail_on_recompile_limit_hit": True,
    }
    torch._dynamo.reset()
    with torch._dynamo.config.patch(limits), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on the libraries' code, by the page
        yield
    torch._dynamo.reset()


def _cast(model: Student | Teacher, dtype: torch.dtype) -> None:
    denoiser = model.denoiser
    if denoiser.net is None:
        raise Unavailable("the model has no network to cast")
    denoiser.net.to(dtype)
    codec: Any = denoiser.codec
    if codec is not None:
        codec.to(denoiser.device, dtype)


def put_decoder(model: Student | Teacher, variant: Variant, folder: Path | None) -> None:
    """The tiny decoder of a folder, where the variant names it."""
    if "decoder" not in variant.parts or folder is None:
        return
    if model.denoiser.codec is None:
        raise Unavailable("tiny-decoder: this model's samples are pixels; nothing decodes them")
    denoiser: Any = model.denoiser
    denoiser.codec = TinyDecoding(denoiser.codec, read_tiny(folder, denoiser.device))


def read_tiny(folder: Path, device: torch.device) -> Any:
    """A diffusers `AutoencoderTiny`; what is none is a UserError."""
    from diffusers import AutoencoderTiny

    if not (folder / "config.json").is_file():
        raise UserError(f"--tiny-decoder {folder}: no config.json; give the folder of a diffusers AutoencoderTiny")
    try:
        tiny = AutoencoderTiny.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except Exception as error:  # its reader raises whatever the file provokes
        raise UserError(f"--tiny-decoder {folder}: no AutoencoderTiny ({first_line(error)})") from error
    return tiny.eval().requires_grad_(False).to(device)


class TinyDecoding:
    """A codec whose `decode` is an AutoencoderTiny's: it was trained on the network's own latents."""

    def __init__(self, codec: Any, tiny: Any) -> None:
        self.codec, self.tiny = codec, tiny

    def __getattr__(self, name: str) -> Any:
        return getattr(self.codec, name)

    def encode_prompts(self, prompts: Sequence[str]) -> Cond:
        return self.codec.encode_prompts(prompts)

    def decode(self, latents: Tensor) -> Tensor:
        x = latents / self.tiny.config.scaling_factor
        return self.tiny.decode(x.to(self.tiny.dtype), return_dict=False)[0].float()

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> TinyDecoding:
        self.codec.to(device, dtype)
        self.tiny.to(device, dtype)
        return self


@contextmanager
def _attention(net: Any, name: str) -> Iterator[None]:
    """The denoiser's attention alone: the text encoder needs a mask, a VAE's heads are too wide for some kernels."""
    if name == "xformers":
        with _xformers(net):
            yield
        return
    forward, seen = net.forward, _Seen()

    def first(*arguments: Any, **options: Any) -> Any:
        with seen:
            output = forced(*arguments, **options)
        if not seen.attention:
            raise Unavailable(f"{name}: {type(net).__name__} never calls scaled_dot_product_attention")
        net.forward = forced
        return output

    def forced(*arguments: Any, **options: Any) -> Any:
        with sdpa_kernel(KERNELS[name]):
            return forward(*arguments, **options)

    net.forward = first
    yield


class _Seen(TorchFunctionMode):
    """Whether torch's attention was called inside."""

    attention = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.attention = self.attention or function is F.scaled_dot_product_attention
        return function(*args, **(kwargs or {}))


@contextmanager
def _xformers(net: Any) -> Iterator[None]:
    if importlib.util.find_spec("xformers") is None:
        raise Unavailable("xformers is not installed; pip install 'fastgen-distill[xformers]'")
    processors = [module.processor for module in net.modules() if hasattr(module, "processor")]
    if any(hasattr(processor, "_attention_backend") for processor in processors):
        net.set_attention_backend("xformers")
        try:
            yield
        finally:
            net.reset_attention_backend()  # the choice is global in diffusers
        return
    if not hasattr(net, "enable_xformers_memory_efficient_attention"):
        raise Unavailable(f"{type(net).__name__} cannot be told to use xformers")
    net.enable_xformers_memory_efficient_attention()
    chosen = {type(module.processor).__name__ for module in net.modules() if hasattr(module, "processor")}
    if not any("XFormers" in name for name in chosen):
        raise Unavailable(f"xformers: the network kept {', '.join(sorted(chosen)) or 'its own attention'}")
    yield


def _compile_regions(networks: Sequence[nn.Module], say: Callable[[str], None]) -> None:
    """diffusers' own list of repeated blocks where a network has one, else what its lists hold two or more of."""
    done = False
    for network in networks:
        if getattr(network, "_repeated_blocks", None):
            network.compile_repeated_blocks(dynamic=False)  # type: ignore[operator]
            done = True
            continue
        blocks = repeated_blocks(network)
        for block in blocks:
            block.forward = torch.compile(block.forward, dynamic=False)
        if not blocks:
            say(f"{type(network).__name__} has no repeated blocks and stays eager")
        done = done or bool(blocks)
    if not done:
        raise Unavailable("compile-regional: no network has repeated blocks")


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """The outermost members of lists that hold two or more of their class, single layers left out."""
    if isinstance(network, nn.ModuleList | nn.Sequential):
        count = Counter(type(child) for child in network)
        found = [child for child in network if count[type(child)] > 1 and next(child.children(), None)]
        rest = [child for child in network if child not in found]
    else:
        found, rest = [], list(network.children())
    return found + [block for child in rest for block in repeated_blocks(child)]


def _kept(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Results of torch's CUDA graphs are overwritten by the next call: each is copied out."""

    def call(*arguments: Any, **options: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, forward(*arguments, **options))

    return call
