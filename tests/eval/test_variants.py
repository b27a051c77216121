"""Ways to run a network: each does what its name says, or says why it cannot."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

from fastgen.errors import RunFailed, UserError
from fastgen.eval import variants
from fastgen.eval.graphs import Graphed, _Captured, signature
from fastgen.eval.subject import refusals
from fastgen.eval.variants import (
    VARIANTS,
    TinyDecoding,
    Unavailable,
    compiled,
    laid_out,
    parse,
    prepared,
    put_decoder,
    repeated_blocks,
)
from fastgen.eval.workload import Workload
from fastgen.student import Student
from tests.eval.models import pixel_denoiser, spec, text_student

CPU = torch.device("cpu")


def one(name):
    return parse([name])[0]


def test_every_variant_is_read_and_described():
    for variant in parse(list(VARIANTS)):
        assert variant.parts == {VARIANTS[variant.name][0]: variant.name}
        assert VARIANTS[variant.name][1]


def test_combinations_keep_a_part_of_each_kind():
    (found,) = parse(["bf16+channels_last+compile-regional"])
    assert found.parts == {"dtype": "bf16", "layout": "channels_last", "compile": "compile-regional"}
    assert (found.compiled, found.attention, found.plain) == ("compile-regional", "torch's choice", False)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["eagre"], "did you mean 'eager'?"),
        (["bf16+compile"], "--variants compile: no such variant"),
        (["bf16+fp16"], "bf16 and fp16 exclude each other"),
        (["sdpa-math+xformers"], "exclude each other"),
        (["cuda-graph+compile-full"], "exclude each other"),
        (["eager+bf16"], "leave it out"),
        (["eager", "eager"], "given twice"),
        ([""], "no such variant"),
    ],
)
def test_what_is_no_variant_is_refused(names, message):
    with pytest.raises(UserError, match="--variants") as caught:
        parse(names)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["tf32", "sdpa-cudnn", "xformers", "reduce-overhead", "bf16+cuda-graph"])
def test_what_needs_a_gpu_says_so(name):
    with pytest.raises(Unavailable, match="needs a CUDA GPU"):
        variants.refuse_without_cuda(one(name), CPU)


def test_precision_reaches_every_network():
    model = text_student()
    with prepared(model, one("bf16")):
        networks = [model.denoiser.net, *model.denoiser.codec.modules().values()]
        assert {p.dtype for network in networks for p in network.parameters()} == {torch.bfloat16}
        assert Workload(model, steps=1, batch=1).run("e2e").shape == (1, 16, 16, 3)


def test_torchs_settings_are_put_back():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    with prepared(text_student(), one("eager")):
        assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.benchmark
    with prepared(text_student(), one("tf32")):
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
    after = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    assert after == before


def counted(model):
    """Operations seen by the counter, which does not know the CPU's fused attention."""
    work = Workload(model, steps=1, batch=1)
    work.run("net")
    with FlopCounterMode(display=False) as counter:
        work.run("net")
    return counter.get_total_flops()


def test_a_named_kernel_is_the_one_that_runs():
    kernels = {}
    for name in ("sdpa-flash", "sdpa-math"):
        model = text_student()
        with prepared(model, one(name)):
            kernels[name] = counted(model)
    assert kernels["sdpa-math"] > kernels["sdpa-flash"] > 0


def test_a_kernel_that_is_not_there_is_no_other_one():
    model = text_student()
    with (
        prepared(model, one("sdpa-efficient")),
        pytest.raises(Unavailable, match="RuntimeError"),
        refusals(one("sdpa-efficient")),
    ):
        Workload(model, steps=1, batch=1).run("net")


def test_a_network_without_attention_has_no_variants_of_it():
    model = Student(pixel_denoiser(), spec(1), {})
    with prepared(model, one("sdpa-math")), pytest.raises(Unavailable, match="never calls"):
        Workload(model, steps=1, batch=1).run("net")


def test_the_codecs_attention_is_left_to_torch(monkeypatch):
    asked = []
    monkeypatch.setattr(variants, "sdpa_kernel", lambda kernel: asked.append(kernel) or torch.no_grad())
    model = text_student()
    with prepared(model, one("sdpa-flash")):
        Workload(model, steps=2, batch=1).run("e2e")
    assert asked == [SDPBackend.FLASH_ATTENTION] * 2  # the denoiser's two calls


def test_channels_last_is_the_order_of_the_weights():
    net = text_student().denoiser.net
    laid_out([net], one("channels_last"))
    assert net.blocks[0].mix.weight.is_contiguous(memory_format=torch.channels_last)
    assert not net.blocks[0].mix.weight.is_contiguous()
    with pytest.raises(Unavailable, match="no network has a 2-D convolution"):
        laid_out([nn.Sequential(nn.Linear(2, 2))], one("channels_last"))


def test_a_missing_xformers_is_told(monkeypatch):
    monkeypatch.setattr(variants.importlib.util, "find_spec", lambda name: None)
    with (
        pytest.raises(Unavailable, match=r"pip install 'fastgen-distill\[xformers\]'"),
        variants._xformers(nn.Module()),
    ):
        pass


def test_a_network_that_keeps_its_attention_is_not_called_xformers(monkeypatch):
    class Stubborn(nn.Module):
        def enable_xformers_memory_efficient_attention(self):
            pass

    monkeypatch.setattr(variants.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(Unavailable, match="kept its own attention"), variants._xformers(Stubborn()):
        pass


@pytest.fixture
def asked(monkeypatch):
    """What torch.compile was asked for; nothing is compiled."""
    calls = []

    def fake(forward, **options):
        calls.append((forward.__self__, options))
        return forward

    monkeypatch.setattr(torch, "compile", fake)
    return calls


def test_regional_compilation_takes_the_repeated_blocks(asked):
    net, said = text_student().denoiser.net, []
    plain = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    compiled([net, plain], net, one("compile-regional"), said.append)
    assert [module for module, _ in asked] == list(net.blocks)
    assert all(options == {"dynamic": False} for _, options in asked)
    assert said == ["Sequential has no repeated blocks and stays eager"]
    with pytest.raises(Unavailable, match="no network has repeated blocks"):
        compiled([plain], plain, one("compile-regional"), said.append)


def test_diffusers_own_list_of_blocks_goes_first(asked):
    class Listed(nn.Module):
        _repeated_blocks = ("Attention",)
        compile_repeated_blocks = lambda self, **options: asked.append((self, options))  # noqa: E731

    listed = Listed()
    compiled([listed], listed, one("compile-regional"), print)
    assert asked == [(listed, {"dynamic": False})]


def test_full_compilation_takes_every_network(asked):
    model = text_student()
    networks = [model.denoiser.net, model.denoiser.codec.decoder]
    compiled(networks, networks[0], one("compile-full"), print)
    assert [module for module, _ in asked] == networks


def test_eager_compiles_nothing(asked):
    net = text_student().denoiser.net
    compiled([net], net, one("bf16"), print)
    assert asked == []


def test_the_compiler_may_not_go_back_to_eager_unheard():
    import torch._dynamo.config as config

    before = config.recompile_limit, config.fail_on_recompile_limit_hit
    with prepared(text_student(), one("compile-full")):
        assert config.fail_on_recompile_limit_hit and config.recompile_limit > 100
    assert (config.recompile_limit, config.fail_on_recompile_limit_hit) == before


def test_repeated_blocks_are_the_outermost_of_a_kind():
    block = lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU())  # noqa: E731
    tree = nn.ModuleDict({"one": nn.ModuleList([block()]), "two": nn.ModuleList([block(), block()])})
    assert repeated_blocks(tree) == list(tree["two"])


def test_refusals_become_reasons_but_not_for_plain_runs():
    with pytest.raises(Unavailable, match="ValueError: no such kernel"), refusals(one("bf16")):
        raise ValueError("no such kernel\nand a page of reasons")
    with pytest.raises(ValueError), refusals(one("eager")):
        raise ValueError("a bug")
    with pytest.raises(Unavailable, match="out of memory"), refusals(one("eager")):
        raise torch.OutOfMemoryError("CUDA out of memory")
    for kind in (UserError, RunFailed):
        with pytest.raises(kind), refusals(one("bf16")):
            raise kind("told as it is")


def test_the_tiny_decoder_takes_the_place_of_the_large_one(tmp_path):
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    options = {"encoder_block_out_channels": (4, 4), "decoder_block_out_channels": (4, 4)}
    options |= {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    tiny = AutoencoderTiny(**options, upsampling_scaling_factor=2)
    tiny.save_pretrained(tmp_path)
    model = text_student()
    put_decoder(model, one("tiny-decoder"), tmp_path)
    codec = model.denoiser.codec
    assert isinstance(codec, TinyDecoding) and codec.image_shape == (3, 16, 16)
    x = torch.randn(2, 4, 8, 8)
    assert torch.allclose(codec.decode(x), tiny.decode(x).sample, atol=1e-6)
    assert Workload(model, steps=1, batch=2).run("e2e").shape == (2, 16, 16, 3)


def test_what_is_no_tiny_decoder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        variants.read_tiny(tmp_path, CPU)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no AutoencoderTiny"):
        variants.read_tiny(tmp_path, CPU)
    with pytest.raises(Unavailable, match="pixels"):
        put_decoder(Student(pixel_denoiser(), spec(1), {}), one("tiny-decoder"), tmp_path)


class Replayed(Graphed):
    """The graph of a machine without one: a replay fills the captured output from the captured inputs."""

    captures = 0

    def _capture(self, leaves, spec):
        self.captures += 1
        inputs = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        output = torch.empty_like(inputs[0])
        owner = self

        class Graph:
            def replay(self):
                output.copy_(owner.forward(*inputs))

        return _Captured(Graph(), inputs, {"out": output})


def test_graphs_read_their_inputs_anew_and_give_results_away():
    graphed = Replayed(lambda x, k: x * k)
    first = graphed(torch.tensor([1.0, 2.0]), 3)["out"]
    second = graphed(torch.tensor([5.0, 7.0]), 3)["out"]
    assert first.tolist() == [3.0, 6.0] and second.tolist() == [15.0, 21.0]
    assert graphed.captures == 1


class Uncapturable(Graphed):
    def _capture(self, leaves, spec):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


def test_what_cannot_be_captured_is_named_once_or_refused():
    said, double = [], lambda x: 2 * x
    spared = Uncapturable(double, said.append)
    assert [spared(x) for x in (1, 2)] == [2, 4]
    assert said == ["operation not permitted when stream is capturing"]
    with pytest.raises(RuntimeError, match="not permitted"):
        Uncapturable(double)(1)


def test_only_the_denoiser_must_be_captured():
    model, said = text_student(), []
    net, decoder = model.denoiser.net, model.denoiser.codec.decoder
    compiled([net, decoder], net, one("cuda-graph"), said.append)
    assert net.forward.spared is None
    decoder.forward.spared("a reason")
    assert said == ["Sequential stays eager: it cannot be captured (a reason)"]


def test_other_shapes_and_settings_get_graphs_of_their_own():
    graphed = Replayed(lambda x, k: x * k)
    for x, k in ((torch.ones(2), 3), (torch.ones(3), 3), (torch.ones(2), 4), (torch.ones(2).double(), 3)):
        assert graphed(x, k)["out"].tolist() == [float(k)] * len(x)
    assert graphed.captures == 4


def test_a_signature_sees_names_and_dtypes_but_not_values():
    told = [signature(*tree_flatten(of)) for of in ({"a": torch.ones(2)}, {"a": torch.zeros(2)}, {"b": torch.ones(2)})]
    assert told[0] == told[1] != told[2]
