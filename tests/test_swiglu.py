"""The gate of the feed-forward part by kernels and its choice, and a layer whose heads are filled
up (in Triton's interpreter where there is no GPU)"""
import re

import pytest
import torch
import torch.nn.functional as F

from seismodel.kernels import choice, fused
from seismodel.kernels import swiglu as kernels
from seismodel.kernels.choice import SwiGLU, swiglu, swiglu_fault, swiglu_plain
from seismodel.models import blocks
from seismodel.models.blocks import BidirectionalMLSTM, fill_heads

device = 'cuda' if torch.cuda.is_available() else 'cpu'


@pytest.mark.parametrize('shape', [(1, 2), (3, 5, 64), (17, 260), (2, 0, 32), (40, 1248)])
def test_swiglu_and_its_gradient(shape):
    torch.manual_seed(0)
    ab = torch.randn(shape, device=device, requires_grad=True)
    y = SwiGLU.apply(ab)
    exact = ab.detach().double().requires_grad_()
    a, b = exact.chunk(2, -1)
    wanted = F.silu(a)*b
    assert y.shape == wanted.shape and y.dtype == ab.dtype
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-6)
    dy = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, ab, dy)[0].double(),
                               torch.autograd.grad(wanted, exact, dy.double())[0], rtol=1e-5,
                               atol=1e-6)


def test_any_strides():
    "Halves that are not contiguous, a gradient that is expanded"
    ab = torch.randn(64, 10, device=device).T.requires_grad_()
    y = SwiGLU.apply(ab)
    a, b = ab.chunk(2, -1)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), ab)[0],
                               torch.autograd.grad((F.silu(a)*b).sum(), ab)[0])


def test_the_compiler_is_told_true_shapes():
    ab = torch.randn(2, 5, 64, device=device)
    torch.library.opcheck(choice.swiglu_forward, (ab,),
                          test_utils=('test_schema', 'test_faketensor'))
    torch.library.opcheck(choice.swiglu_backward, (ab[..., :32].contiguous(), ab),
                          test_utils=('test_schema', 'test_faketensor'))


class OnGPU(torch.Tensor):
    "A tensor that says that it is on a GPU"
    is_cuda = True


@pytest.fixture
def claims():
    "Halves a, b that claim to be on a GPU, and no verdict about any kernel, before and after"
    fused.verdicts.clear()
    torch.manual_seed(0)
    yield torch.randn(5, 64, device=device).as_subclass(OnGPU).requires_grad_()
    fused.verdicts.clear()


def agrees(ab):
    """Whether `swiglu` and its gradient are those of the definition, and whether they came from the
    kernels"""
    y = swiglu(ab)
    plain = ab.detach().as_subclass(torch.Tensor).requires_grad_()
    wanted = swiglu_plain(plain)
    torch.testing.assert_close(y.as_subclass(torch.Tensor), wanted)
    dy = torch.linspace(-1, 1, wanted.numel(), device=wanted.device).view_as(wanted)
    grad = torch.autograd.grad(y, ab, dy)[0].as_subclass(torch.Tensor)
    torch.testing.assert_close(grad, torch.autograd.grad(wanted, plain, dy)[0])
    return 'SwiGLU' in type(y.grad_fn).__name__


def test_on_a_gpu_the_kernels_run(claims, caplog):
    assert agrees(claims) and agrees(claims) and not caplog.records


def test_on_a_cpu_the_torch_form_runs_and_nothing_is_asked(claims, caplog):
    assert not agrees(torch.randn(5, 64, requires_grad=True))
    assert not caplog.records and not fused.verdicts


def break_backward(monkeypatch):
    right = kernels.backward
    monkeypatch.setattr(kernels, 'backward', lambda dy, ab: 1.2*right(dy, ab))


def crash(*inputs): raise RuntimeError('no such instruction\nand more')


@pytest.mark.parametrize('fault, said', [
    (lambda m: m.setattr(fused, 'find_spec', lambda name: None), 'Triton is not installed'),
    (break_backward, 'off by 2.0e-01'),
    (lambda m: m.setattr(kernels, 'forward', crash),
     'cannot run on .*RuntimeError: no such instruction')])
def test_a_kernel_that_fails_its_check_is_not_used(claims, monkeypatch, caplog, fault, said):
    "No Triton, a wrong gradient, a crash: one warning, the right result, the right gradient"
    fault(monkeypatch)
    assert [agrees(claims) for _ in range(2)] == [False, False]
    record, = caplog.records
    assert (record.levelname == 'WARNING' and re.search(said, record.message)
            and 'plain PyTorch' in record.message)


@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode,
                                  lambda: torch.autocast(device, torch.bfloat16)])
def test_the_check_does_not_mind_where_it_is_asked(mode):
    with mode(): assert swiglu_fault(torch.device(device), torch.float32) == ''


def test_compiled_code_asks_no_question(claims):
    "The verdict is found while the compiler looks, and is a constant in its graph: no break"
    compiled = torch.compile(lambda ab: SwiGLU.apply(ab) if choice.swiglu_trusted(
        ab.device, ab.dtype) else ab, fullgraph=True, backend='eager')
    ab = torch.randn(5, 64, device=device)
    torch.testing.assert_close(compiled(ab), swiglu_plain(ab))
    assert fused.verdicts == {('SwiGLU in float32', torch.device(ab.device), torch.float32): True}


@pytest.mark.parametrize('direction', ['per_head', 'two_pass'])
def test_a_layer_with_heads_filled_up_is_the_same_layer(direction, monkeypatch):
    "Outputs and the gradients of all parameters"
    torch.manual_seed(0)
    layer = BidirectionalMLSTM(44, heads=4, direction=direction).double()
    torch.nn.init.normal_(layer.gates.weight)
    x = torch.randn(2, 9, 44, dtype=torch.double)
    def grads(y): return [y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))]
    wanted = grads(layer(x))
    qkvo, out = fill_heads(layer.qkvo.weight, layer.out.weight, layer.heads)
    assert qkvo.shape == (4*layer.heads*16, 44) and out.shape == (44, layer.heads*16)
    gates = layer.gates(x).unflatten(-1, (2, -1))
    y = blocks.mlstm_mix(F.linear(x, qkvo).unflatten(-1, (4, layer.heads, -1)), gates,
                         layer.norm.weight, layer.cells//2, layer.norm.eps)
    for a, b in zip(grads(F.linear(y, out)), wanted, strict=True): torch.testing.assert_close(a, b)
