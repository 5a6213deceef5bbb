"""The convolutional front ends: lengths and fields by properties, the layers against plain loops,
costs against formulas"""
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from seismodel.models.frontend import (Conv1dSubsampling, ConvDownFrontend, convolve, frames,
                                       multiply_adds, receptive_field, same_padding)
from seismodel.core import count_parameters

few = settings(max_examples=60, deadline=None)


def output(module, x):
    out = module(x)
    return out[0] if isinstance(out, tuple) else out


@few
@given(st.integers(1, 3000), st.sampled_from([1, 3, 5, 7]), st.integers(1, 4),
       st.sampled_from([(2,), (2, 2), (4,), (3, 2), (2, 2, 2)]))
def test_frames_is_what_centred_convolutions_return(samples, kernel_size, dilation, strides):
    x = torch.zeros(1, samples, 1)
    for s in strides:
        x = convolve(nn.Conv1d(1, 1, kernel_size, s, same_padding(kernel_size, dilation),
                               dilation), x)
    assert x.shape == (1, frames(samples, strides), 1)


@few
@given(st.integers(1, 200), st.sampled_from([1, 3, 5]), st.integers(1, 3), st.integers(1, 3))
def test_any_length_works(samples, kernel_size, dilation, batch):
    x = torch.zeros(batch, samples, 3)
    y = ConvDownFrontend(3, 8, kernel_size, dilation)(x)
    features, tokens = Conv1dSubsampling(3, 8, kernel_size)(x)
    for out in (y, features, tokens):
        assert out.shape == (batch, -(-samples//4), 8) and out.isfinite().all()


@pytest.mark.parametrize("kernel_size,dilation", [(3, 1), (3, 2), (5, 1), (5, 2), (7, 1), (1, 1)])
@pytest.mark.parametrize("kind", [ConvDownFrontend, Conv1dSubsampling])
def test_a_frame_sees_its_field_and_nothing_else(kind, kernel_size, dilation):
    "By gradients, and by changing samples outside"
    if kind is Conv1dSubsampling and dilation > 1: pytest.skip("no dilation there")
    torch.manual_seed(0)
    module = (kind(3, 32, kernel_size, dilation)
              if kind is ConvDownFrontend else kind(3, 32, kernel_size))
    t, half = 24, receptive_field(kernel_size, dilation=dilation)//2
    x = torch.randn(1, 200, 3, requires_grad=True)
    (output(module, x)[0, t] @ torch.randn(32)).backward()
    seen = x.grad[0].abs().sum(-1).nonzero().flatten()
    # dilation leaves holes between the taps, so only the ends of the field are compared
    assert (seen.min(), seen.max()) == (4*t - half, 4*t + half)
    with torch.no_grad():
        other = torch.randn_like(x)
        other[:, 4*t - half:4*t + half + 1] = x[:, 4*t - half:4*t + half + 1]
        assert_close(output(module, other)[:, t], output(module, x)[:, t])


def test_the_field_of_the_specification():
    assert receptive_field() == 7 and receptive_field(3, (2, 2), 1)*10 == 70   # samples, ms
    assert receptive_field(10, (5,)) == 10 and receptive_field(1, (2, 2)) == 1
    assert receptive_field(3, (5, 2, 2), 1) == 1 + 2*(1 + 5 + 10)


def test_convdown_against_plain_arithmetic():
    "float64, tap by tap, with weights of norms that are not 1 and 0"
    torch.manual_seed(1)
    module = ConvDownFrontend(3, 6, 3).double()
    for p in module.parameters(): nn.init.normal_(p)

    def conv(layer, x):                                                       # (L, C)
        padded = torch.cat([x.new_zeros(1, x.shape[1]), x, x.new_zeros(1, x.shape[1])])
        steps = range((len(x) + 1)//2)
        return torch.stack([sum(layer.weight[:, :, k] @ padded[2*t + k] for k in range(3))
                            + layer.bias for t in steps])

    def norm(layer, x):
        return (x - x.mean(-1, keepdim=True))/(x.var(-1, correction=0, keepdim=True)
                                               + 1e-5).sqrt()*layer.weight + layer.bias
    def gelu(x): return x*torch.special.ndtr(x)

    x = torch.randn(2, 21, 3, dtype=torch.double)
    for row, got in zip(x, module(x)):
        h = gelu(norm(module.norm1, conv(module.conv1, row)))
        h = norm(module.norm, gelu(norm(module.norm2, conv(module.conv2, h))))
        assert_close(got, h)


def test_subsampling_against_plain_arithmetic():
    torch.manual_seed(2)
    module = Conv1dSubsampling(3, 5)
    x = torch.randn(2, 33, 3)
    h = x.transpose(1, 2)
    for layer in (module.conv1, module.conv2):
        h = F.relu(F.conv1d(h, layer.weight, layer.bias, stride=2, padding=1))
    features, tokens = module(x)
    assert_close(features, h.transpose(1, 2))
    assert torch.equal(features, tokens)


def test_shapes_and_costs_of_the_specification():
    convdown, subsampling, x = ConvDownFrontend(), Conv1dSubsampling(), torch.zeros(1, 4096, 3)
    assert convdown(torch.zeros(32, 4096, 3)).shape == (32, 1024, 256)
    for module in (convdown, subsampling):
        assert [count_parameters(c) for c in (module.conv1, module.conv2)] == [2560, 196_864]
        assert multiply_adds(module, x) == 4_718_592 + 201_326_592
    assert count_parameters(convdown) == 200_960 and count_parameters(subsampling) == 199_424
    assert multiply_adds(convdown, x.expand(4, -1, -1)) == 4*multiply_adds(convdown, x)


def test_shared_parameters_count_once():
    layer = nn.Linear(3, 3)
    assert count_parameters(nn.Sequential(layer, layer)) == 12


def test_windows_do_not_meet():
    "A window's frames do not depend on its neighbours in the batch"
    torch.manual_seed(3)
    x = torch.randn(4, 64, 3)
    for module in (ConvDownFrontend(3, 16), Conv1dSubsampling(3, 16)):
        assert_close(output(module, x)[2:3], output(module, x[2:3]))


def test_zeros_and_huge_values_stay_finite():
    torch.manual_seed(4)
    module = ConvDownFrontend(3, 16)
    for x in (torch.zeros(2, 40, 3), torch.cat([torch.zeros(1, 40, 3), torch.randn(1, 40, 3)]),
              1e6*torch.randn(2, 40, 3)):
        x.requires_grad_()
        module.zero_grad()
        module(x).square().sum().backward()
        assert module(x).isfinite().all() and x.grad.isfinite().all()
        assert all(p.grad.isfinite().all() for p in module.parameters())


def test_bfloat16_autocast_stays_close():
    torch.manual_seed(5)
    module, x = ConvDownFrontend(3, 64), torch.randn(2, 128, 3)
    with torch.autocast("cpu", torch.bfloat16): y = module(x)
    assert (y.float() - module(x)).square().mean().sqrt() < 0.05


@pytest.mark.parametrize("kernel_size", [2, 4])
def test_even_kernels_are_refused(kernel_size):
    for make in (lambda: ConvDownFrontend(kernel_size=kernel_size),
                 lambda: Conv1dSubsampling(kernel_size=kernel_size)):
        with pytest.raises(ValueError, match="odd size"): make()
    assert same_padding(kernel_size, 2) == kernel_size - 1   # an even reach has a middle
