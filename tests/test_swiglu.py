"The gate of the feed-forward part by kernels, and a layer whose heads are filled up (in Triton's interpreter where there is no GPU)"
import pytest
import torch
import torch.nn.functional as F

from seismodel.models import blocks
from seismodel.models.blocks import BidirectionalMLSTM, SwiGLU, fill_heads, swiglu

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
    torch.testing.assert_close(torch.autograd.grad(y, ab, dy)[0].double(), torch.autograd.grad(wanted, exact, dy.double())[0], rtol=1e-5, atol=1e-6)


def test_any_strides():
    "Halves that are not contiguous, a gradient that is expanded"
    ab = torch.randn(64, 10, device=device).T.requires_grad_()
    y = SwiGLU.apply(ab)
    a, b = ab.chunk(2, -1)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), ab)[0], torch.autograd.grad((F.silu(a)*b).sum(), ab)[0])


def test_the_compiler_is_told_true_shapes():
    ab = torch.randn(2, 5, 64, device=device)
    torch.library.opcheck(blocks.swiglu_forward, (ab,), test_utils=('test_schema', 'test_faketensor'))
    torch.library.opcheck(blocks.swiglu_backward, (ab[..., :32].contiguous(), ab), test_utils=('test_schema', 'test_faketensor'))


def test_without_triton_it_is_plain(monkeypatch):
    monkeypatch.setattr(blocks, 'TRITON', False)
    ab = torch.randn(3, 8, device=device)
    torch.testing.assert_close(swiglu(ab), F.silu(ab[:, :4])*ab[:, 4:])


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
    y = blocks.mix(F.linear(x, qkvo).unflatten(-1, (4, layer.heads, -1)), gates, layer.norm.weight, layer.cells//2, layer.norm.eps)
    for a, b in zip(grads(F.linear(y, out)), wanted, strict=True): torch.testing.assert_close(a, b)
