"""The mLSTM kernels against the recurrence in float64 (in Triton's interpreter where there is no
GPU), their plan, their self-check"""
import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seismodel.kernels import fused, mixer
from seismodel.kernels.fused import (FusedMLSTM, constant_when_compiled, disagreement, mlstm,
                                     mlstm_fault, plan_tiles, trusted,
                                     verdicts)
from seismodel.kernels.mixer import FusedMix, mlstm_mix, mix_plain
from seismodel.kernels.mlstm import MLSTMState, mlstm_chunkwise, mlstm_recurrent, soft_cap

cuda = torch.cuda.is_available()
device = 'cuda' if cuda else 'cpu'
# of the interpreter, at -inf
pytestmark = pytest.mark.filterwarnings('ignore:(overflow|invalid|divide):RuntimeWarning')
NAMES = 'h', 'dq', 'dk', 'dv', 'di', 'df'


def inputs(B, H, T, dk, dv=None, seed=0, gates='usual', dtype=torch.float32):
    "q, k, v, i, f and a gradient of h"
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(B, H, T, *shape, generator=g, dtype=torch.float64)
    q, k, v, dh = (draw(d).to(dtype).to(device) for d in (dk, dk, dv or dk, dv or dk))
    i, f = draw(), 3 + draw()
    if gates == 'fresh':
        i, f = torch.full_like(i, -10.), torch.linspace(3, 6, H, dtype=i.dtype)[:, None].expand_as(
            f).contiguous()
    if gates == 'extreme': i, f = soft_cap(8*i), soft_cap(8*(f - 3))
    return q, k, v, i.float().to(device), f.float().to(device), dh


def by_kernels(*x, reverse=0): return FusedMLSTM.apply(*x, reverse, None, False)[0]


def outputs(fn, x, dh):
    x = [z.detach().requires_grad_() for z in x]
    h = fn(*x)
    return [h.detach(), *torch.autograd.grad(h, x, dh.to(h))]


def assert_close(found, wanted, limit):
    # the gradient of the first frame's forget gate is exactly 0
    least = 1e-3 * max(b.norm() for b in wanted)
    for name, a, b in zip(NAMES, found, wanted):
        assert a.shape == b.shape, name
        error = ((a.double() - b).norm() / b.norm().clamp_min(least)).item()
        assert error <= limit, f'{name}: {error:.1e}'


def check(x, limit, reverse):
    *x, dh = x
    wanted = outputs(lambda *z: mlstm_chunkwise(*z, reverse=reverse), [z.double() for z in x], dh)
    assert_close(outputs(lambda *z: by_kernels(*z, reverse=reverse), x, dh), wanted, limit)


@pytest.mark.parametrize('gates', ['usual', 'fresh', 'extreme'])
@pytest.mark.parametrize('T,d,reverse',
                         [(1, 16, 1), (15, 16, 2), (40, 16, 1), (70, 20, 1), (33, 8, 0)])
def test_against_float64(T, d, reverse, gates):
    check(inputs(1, 2, T, d, gates=gates), 2e-3 if gates == 'extreme' else 1e-4, reverse)


@pytest.mark.parametrize('how', [dict(scan=True, segments=1, per=5),
                                 dict(scan=True, segments=3, per=2), dict(scan=False)])
def test_every_way_of_cutting(how, monkeypatch):
    "Scan, scan in segments and tiles give the same"
    whole = plan_tiles(1, 2, 70, 16, wide=True, stream=False)._replace(L=16, **how)
    monkeypatch.setattr(fused, 'plan_tiles', lambda *a: whole)
    check(inputs(1, 2, 70, 16, seed=3), 1e-4, reverse=1)


def test_keys_and_values_of_unequal_width():
    check(inputs(1, 2, 40, 16, 24, seed=5), 1e-4, reverse=1)


def test_any_strides():
    "q, k, v as slices of one tensor, a gradient that is expanded, gates whose strides differ"
    qkv = torch.randn(1, 40, 3, 2, 16, device=device)
    q, k, v = (z.transpose(1, 2) for z in qkv.unbind(2))
    i, f = torch.randn(1, 40, 2,
                       device=device).transpose(1, 2), 3 + torch.randn(1, 2, 40, device=device)
    check((q, k, v, i, f, torch.ones((), device=device).expand(1, 2, 40, 16)), 1e-4, reverse=1)


@pytest.mark.parametrize('cut', [1, 16, 33])
def test_a_stream_in_pieces(cut):
    *x, _ = inputs(1, 2, 50, 16, seed=7)
    whole, end = mlstm_recurrent(*[z.double() for z in x], return_state=True)
    first, *state = FusedMLSTM.apply(*[z[:, :, :cut] for z in x], 0, None, True)
    second, *state = FusedMLSTM.apply(*[z[:, :, cut:] for z in x], 0, MLSTMState(*state), True)
    torch.testing.assert_close(torch.cat([first, second], 2).double(), whole, rtol=1e-3, atol=1e-5)
    unscaled = lambda s: (s[0]*torch.exp(s[2])[..., None, None], s[1]*torch.exp(s[2])[..., None])
    for a, b in zip(unscaled(state), unscaled(end)):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-5)


def test_a_state_reaches_the_gradients_of_what_reads_it():
    *x, dh = inputs(1, 1, 20, 16, seed=8)
    state = MLSTMState(torch.randn(1, 1, 16, 16, device=device),
                       torch.randn(1, 1, 16, device=device), torch.full((1, 1), .5, device=device))
    wanted = outputs(lambda *z: mlstm_chunkwise(*z, state=MLSTMState(*(s.double() for s in state))),
                     [z.double() for z in x], dh)
    assert_close(outputs(lambda *z: FusedMLSTM.apply(*z, 0, state, False)[0], x, dh)[:4],
                 wanted[:4], 1e-4)


@pytest.mark.parametrize('T,d', [(40, 16), (21, 20)])
def test_mixer(T, d):
    "Cap, norm and output gate inside the kernels, against the plain form in float64"
    torch.manual_seed(T)
    x = [torch.randn(2, T, 4, 2, d, device=device), 3*torch.randn(2, T, 2, 2, device=device),
         1 + .1*torch.randn(2*d, device=device)]
    dy = torch.randn(2, T, 2*d, device=device)
    wanted = outputs(lambda *z: mix_plain(*z, 1), [z.double() for z in x], dy)
    found = outputs(lambda *z: FusedMix.apply(*z, 1, 1e-6), x, dy)
    for a, b in zip(found, wanted, strict=True):
        assert ((a.double() - b).norm() / b.norm()).item() < 1e-4


@pytest.mark.parametrize('T,d,spare', [(40, 12, 4), (21, 20, 12)])
def test_heads_filled_up_with_zeros(T, d, spare):
    "The kernels and the plain form leave out what fills a head up, in y and in all gradients"
    torch.manual_seed(T)
    qkvo, gates = torch.randn(2, T, 4, 2, d,
                              device=device), 3*torch.randn(2, T, 2, 2, device=device)
    weight, dy = 1 + .1*torch.randn(2*d, device=device), torch.randn(2, T, 2*d, device=device)
    fill = lambda z: torch.nn.functional.pad(z, (0, spare))
    without = lambda y: y.unflatten(2, (2, -1))[..., :d].flatten(2)
    wanted = outputs(lambda *z: mix_plain(*z, 1), [z.double() for z in (qkvo, gates, weight)], dy)
    for form, kind in ((lambda *z: FusedMix.apply(*z, 1, 1e-6), torch.float32),
                       (lambda *z: mix_plain(*z, 1), torch.float64)):
        found = outputs(lambda a, *z: without(form(fill(a), *z)),
                        [z.to(kind) for z in (qkvo, gates, weight)], dy)
        for a, b in zip(found, wanted, strict=True):
            assert a.shape == b.shape and ((a.double() - b).norm() / b.norm()).item() < 1e-4
    y = FusedMix.apply(fill(qkvo), gates, weight, 1, 1e-6).unflatten(2, (2, -1))
    assert y.shape[-1] == d + spare and (y[..., d:] == 0).all()


def test_the_compiler_is_told_true_shapes():
    x = [torch.randn(2, 40, 4, 2, 16, device=device), torch.randn(2, 40, 2, 2, device=device),
         torch.ones(32, device=device)]
    torch.library.opcheck(mixer.mix_forward, (*x, 1, 1e-6),
                          test_utils=('test_schema', 'test_faketensor'))


@settings(deadline=None, max_examples=200)
@given(B=st.integers(1, 512), H=st.integers(1, 16), T=st.integers(1, 100_000),
       d=st.integers(1, 256), wide=st.booleans(), stream=st.booleans(),
       room=st.sampled_from([99, 163, 227]))
def test_a_plan_covers_the_window(B, H, T, d, wide, stream, room):
    p = plan_tiles(B, H, T, d, wide, stream, room=room)
    chunks = math.ceil(T/p.L)
    assert (p.L in (16, 32, 64) and p.segments*p.per >= chunks > (p.segments - 1)*p.per
            and p.stages >= 1 and p.stages_back >= 1)
    if stream: assert p.scan and p.segments == 1
    if not p.scan: assert p.segments == 1
    # what the self-check relies on
    assert all(fused.uses_scan(frames, 16) == scan for frames, scan in ((100, False), (450, True)))


def test_a_gpu_that_computes_wrongly_is_found_out(monkeypatch, caplog):
    "A wrong gradient of k is caught by the self-check, said once, and plain PyTorch takes over"
    right = fused.fused_backward
    def wrong(dy, q, k, *rest, **how):
        out = right(dy, q, k, *rest, **how)
        rest[11].mul_(1.2)            # dk
        return out
    monkeypatch.setattr(fused, 'fused_backward', wrong)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda *a: 'a GPU')
    verdicts.clear()
    with caplog.at_level(logging.WARNING, 'seismodel'):
        for _ in range(2): assert not trusted(torch.device(device), torch.float32, 16, 16, False)
    verdicts.clear()
    assert len(caplog.records) == 1 and 'off by' in caplog.text and 'plain PyTorch' in caplog.text
    assert disagreement(torch.float32, 16, 16, torch.device(device), frames=20) > 1e-2


def test_a_kernel_that_cannot_run_is_named(monkeypatch):
    def broken(*a): raise RuntimeError('no such instruction\nand more')
    monkeypatch.setattr(fused, 'disagreement', broken)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda *a: 'a GPU')
    fault = mlstm_fault(torch.device(device), torch.float32, 16, 16, False)
    assert 'RuntimeError: no such instruction' in fault and '\n' not in fault


@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode,
                                  lambda: torch.autocast(device, torch.bfloat16)])
def test_the_self_check_does_not_mind_where_it_is_asked(mode):
    with mode():
        assert [mlstm_fault(torch.device(device), torch.float32, 16, 16, scan)
                for scan in (False, True)] == ['', '']


def test_without_triton(monkeypatch):
    monkeypatch.setattr(fused, 'find_spec', lambda name: None)
    assert (mlstm_fault(torch.device(device), torch.float32, 16, 16, False)
            == 'Triton is not installed')


def test_the_mark_of_a_constant_is_that_of_the_compiler():
    "Set by hand, since asking the compiler for it would import it"
    def ours(): pass
    def theirs(): pass
    assert (vars(constant_when_compiled(ours))
            == vars(torch.compiler.assume_constant_result(theirs)) != {})


def test_plain_forms_on_a_cpu():
    "Where there is no GPU the public functions are the plain ones, to the bit"
    *x, _ = (z.cpu() for z in inputs(1, 2, 30, 8))
    assert torch.equal(mlstm(*x, reverse=1), mlstm_chunkwise(*x, reverse=1))
    z = torch.randn(1, 30, 4, 2, 8), torch.randn(1, 30, 2, 2), torch.ones(16)
    assert torch.equal(mlstm_mix(*z, 1), mix_plain(*z, 1))


@pytest.mark.skipif(not cuda, reason='needs a GPU')
@pytest.mark.parametrize('T,d', [(1024, 64), (256, 128), (64, 256), (1000, 44), (5000, 32)])
@pytest.mark.parametrize('dtype,limit',
                         [(torch.bfloat16, 2e-2), (torch.float16, 1e-2), (torch.float32, 1e-4)])
@pytest.mark.parametrize('gates', ['usual', 'fresh'])
def test_full_size(T, d, dtype, limit, gates):
    check(inputs(2, 4, T, d, dtype=dtype, gates=gates), limit, reverse=2)
