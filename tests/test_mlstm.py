"""mLSTM: the three forms against the recurrence in float64, extreme gates, streaming, directions,
initialisation"""
import math
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from seismodel.models.blocks import BidirectionalMLSTM, MLSTMBlock
from seismodel.kernels.mlstm import (MLSTMState, chunk_inference, mlstm_chunkwise, mlstm_parallel,
                                     mlstm_recurrent, soft_cap)

NAMES = 'h', 'dq', 'dk', 'dv', 'di', 'df'


def inputs(B, H, T, dk, dv=None, seed=0, gates=1., bias=2.):
    "q, k, v, i, f in float64; the gates are capped and spread by `gates`"
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    q, k, v = draw(B, H, T, dk), draw(B, H, T, dk), draw(B, H, T, dv or dk)
    return q, k, v, soft_cap(gates * draw(B, H, T)), soft_cap(gates * draw(B, H, T) + bias)


def run(fn, x, dtype=torch.float64, weight=None):
    "h and the gradients of sum(weight * h), all in float64"
    x = [z.to(dtype).requires_grad_() for z in x]
    h = fn(*x)
    if weight is None:
        weight = torch.randn(h.shape, generator=torch.Generator().manual_seed(9),
                             dtype=torch.float64)
    grads = torch.autograd.grad(h, x, weight.to(h))
    return [z.detach().double().cpu() for z in (h, *grads)]


def assert_near(got, want, tol):
    """Largest error of each tensor relative to its largest reference value (a zero gradient is
    measured by the others)"""
    least = 1e-6 * max(b.abs().max() for b in want)
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert a.shape == b.shape, name
        error = ((a - b).abs().max() / b.abs().max().clamp(min=least)).item()
        assert error <= tol, f'{name}: {error:.1e}'


@lru_cache
def reference(T, reverse):
    "Inputs and the recurrent form's outputs and gradients in float64"
    x = inputs(1, 2, T, 4, 3, seed=T)
    return x, run(lambda *z: mlstm_recurrent(*z, reverse=reverse), x)


FORMS = {'parallel': mlstm_parallel, 'chunkwise': mlstm_chunkwise,
         'chunk48': lambda *z, reverse: mlstm_chunkwise(*z, reverse=reverse, chunk=48),
         'chunk5': lambda *z, reverse: mlstm_chunkwise(*z, reverse=reverse, chunk=5)}
# 1: one head each way
CASES = [(T, reverse) for T in (1, 7, 64, 1000, 1024) for reverse in (0, 1)] + [(64, 2), (4096, 1)]


@pytest.mark.parametrize('T,reverse', CASES)
@pytest.mark.parametrize('form', FORMS)
def test_forms_agree(form, T, reverse):
    """Outputs and all five gradients equal those of the recurrence, at lengths that the chunk
    divides and does not"""
    x, want = reference(T, reverse)
    fn = lambda *z: FORMS[form](*z, reverse=reverse)
    assert_near(run(fn, x), want, 1e-9)
    assert_near(run(fn, x, torch.float32), want, 1e-4)


@pytest.mark.parametrize('T,reverse', [(7, 1), (1000, 0), (1000, 1)])
def test_recurrent_in_single_precision(T, reverse):
    "The reference itself, in float32"
    x, want = reference(T, reverse)
    assert_near(run(lambda *z: mlstm_recurrent(*z, reverse=reverse), x, torch.float32), want, 1e-4)


@pytest.mark.parametrize('chunk', [16, 64, 100, 1000])
def test_forms_agree_with_saturated_gates(chunk):
    "Gates that hit the cap on both sides"
    x = inputs(2, 2, 256, 8, seed=3, gates=8., bias=0.)
    want = run(lambda *z: mlstm_recurrent(*z, reverse=1), x)
    assert_near(run(lambda *z: mlstm_chunkwise(*z, reverse=1, chunk=chunk), x), want, 1e-9)
    assert_near(run(lambda *z: mlstm_parallel(*z, reverse=1), x), want, 1e-9)


@pytest.mark.parametrize('learns', [True, False])
def test_saturated_gates_in_single_precision(learns):
    """Frames whose denominator cancels show every rounding; with exponents in float32 the worst
    would be ten times worse than in the recurrence"""
    worst = dict(recurrent=0., chunkwise=0.)
    for seed in range(3):
        q, k, v, i, f = (z.float() for z in inputs(2, 4, 1024, 16, seed=seed, gates=30., bias=0.))
        x = q, k, v, i.abs(), f
        want = mlstm_recurrent(*(z.double() for z in x), reverse=2)
        for name, h in (('recurrent', mlstm_recurrent(*x, reverse=2)),
                        ('chunkwise',
                         mlstm_chunkwise(*(z.requires_grad_(learns) for z in x), reverse=2))):
            assert h.shape == want.shape
            worst[name] = max(worst[name],
                              ((h.detach().double() - want).abs().max() / want.abs().max()).item())
    assert worst['chunkwise'] < 2 * worst['recurrent'] < 1e-2, worst


def test_recurrence_is_the_formula():
    "Without stabiliser, in float64, from the definition: C and n by running sums, floor 1"
    q, k, v, i, f = inputs(1, 1, 30, 3, 2)
    C, n = torch.zeros(3, 2, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for t in range(30):
        keep, write = torch.sigmoid(f[0, 0, t]), torch.exp(i[0, 0, t])
        C = keep * C + write * torch.outer(k[0, 0, t], v[0, 0, t])
        n = keep * n + write * k[0, 0, t]
        h = (C.T @ q[0, 0, t] / math.sqrt(3)) / (n @ q[0, 0, t] / math.sqrt(3)).abs().clamp(min=1)
        torch.testing.assert_close(mlstm_recurrent(q, k, v, i, f)[0, 0, t], h)


@pytest.mark.parametrize('gate_i,gate_f',
                         [(50., 50.), (50., -50.), (-50., 50.), (-50., -50.), (None, None)])
@pytest.mark.parametrize('T', [7, 64, 300])
def test_extreme_gates_stay_finite(T, gate_i, gate_f):
    """Pre-activations of ±50 in float32, forward and backward, and the outputs are those of the
    recurrence in float64"""
    q, k, v, i, f = inputs(2, 4, T, 8, seed=5)
    i = 50 * torch.sign(i) if gate_i is None else torch.full_like(i, gate_i)
    f = 50 * torch.sign(f - 2) if gate_f is None else torch.full_like(f, gate_f)
    for fn in (mlstm_chunkwise, mlstm_parallel):
        got = run(lambda *z: fn(*z, reverse=2), (q, k, v, i, f), torch.float32)
        for name, z in zip(NAMES, got): assert z.isfinite().all(), name
    torch.testing.assert_close(run(lambda *z: mlstm_chunkwise(*z, reverse=2), (q, k, v, i, f))[0],
                               mlstm_recurrent(q, k, v, i, f, reverse=2), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize('B,H,T,dk,dv,chunk,reverse',
                         [(1, 1, 1, 2, 2, 64, 0), (2, 2, 5, 3, 2, 2, 1), (1, 3, 6, 2, 3, 3, 3),
                                                       (1, 2, 7, 2, 2, 64, 1),
                          (1, 2, 8, 1, 1, 4, 0)])
def test_gradcheck(B, H, T, dk, dv, chunk, reverse):
    "The hand-written backward against finite differences"
    x = [z.requires_grad_() for z in inputs(B, H, T, dk, dv, seed=2)]
    assert torch.autograd.gradcheck(lambda *z: mlstm_chunkwise(*z, reverse=reverse, chunk=chunk), x)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 70), st.integers(1, 5),
       st.integers(1, 5), st.integers(1, 80),
       st.data())
def test_chunkwise_for_any_shape(B, H, T, dk, dv, chunk, data):
    "Any shape, chunk and number of reversed heads gives the recurrence's outputs and gradients"
    reverse = data.draw(st.integers(0, H))
    x = inputs(B, H, T, dk, dv, seed=T)
    want = run(lambda *z: mlstm_recurrent(*z, reverse=reverse), x)
    assert_near(run(lambda *z: mlstm_chunkwise(*z, reverse=reverse, chunk=chunk), x), want, 1e-9)


@settings(max_examples=60, deadline=None)
@given(B=st.integers(1, 2), H=st.integers(1, 4), N=st.integers(1, 5), L=st.integers(1, 32),
       dk=st.integers(1, 9), dv=st.integers(1, 9), data=st.data())
def test_reading_alone_is_the_recurrence(B, H, N, L, dk, dv, data):
    """Any shape and direction, gates from shut to open; where they close too far it declines, and
    the caller's answer is right all the same"""
    reverse = data.draw(st.integers(0, H))
    x = inputs(B, H, N * L, dk, dv, seed=data.draw(st.integers(0, 99)),
               gates=data.draw(st.sampled_from([.1, 1., 8.])),
               bias=data.draw(st.sampled_from([-4., 2., 6.])))
    want = mlstm_recurrent(*x, reverse=reverse)
    got = chunk_inference(*x, reverse, L)
    if got is not None: assert (got - want).abs().max() <= 1e-9 * want.abs().max()
    with torch.no_grad():
        assert (mlstm_chunkwise(*x, reverse=reverse) - want).abs().max() <= 1e-9 * want.abs().max()


@pytest.mark.parametrize('shift, declines', [(0., False), (-1., False), (-14., True)])
def test_reading_alone_in_single_precision(shift, declines):
    "Nearly as exact as the tile as long as it answers, views and lengths between chunks included"
    x = inputs(2, 4, 300, 8, gates=1.5, bias=4. + shift)
    want = mlstm_recurrent(*x, reverse=2)
    single = [z.float().transpose(1, 2).contiguous().transpose(1, 2) for z in x]
    padded = [z[:, :, :288] for z in single]
    assert (chunk_inference(*padded, 2, 32) is None) == declines
    with torch.no_grad(): got = mlstm_chunkwise(*single, reverse=2)
    tile = mlstm_chunkwise(*[z.clone().requires_grad_() for z in single], reverse=2).detach()
    errors = [((h.double() - want).abs().max() / want.abs().max()).item() for h in (got, tile)]
    assert errors[0] <= max(2e-6, 4 * errors[1])


@pytest.mark.parametrize('T', [1, 31, 32, 33, 150])
def test_any_length_is_read_without_the_tile(T, monkeypatch):
    "Filled up or not; and with a gradient to come, or a state, the tile is used"
    x = [z.float() for z in inputs(1, 2, T, 4, bias=4.)]
    with torch.no_grad(): want = mlstm_recurrent(*x, reverse=1)
    def refuse(*_): raise AssertionError('the tile')
    monkeypatch.setattr('seismodel.kernels.mlstm.chunk_forward', refuse)
    torch.testing.assert_close(mlstm_chunkwise(*x, reverse=1), want, rtol=1e-4, atol=1e-4)
    with pytest.raises(AssertionError, match='the tile'):
        mlstm_chunkwise(*[z.requires_grad_() for z in x], reverse=1)
    with torch.no_grad(), pytest.raises(AssertionError, match='the tile'):
        mlstm_chunkwise(*x, return_state=True)


def test_a_memory_far_above_or_below_its_chunk():
    "Input gates at their cap in one chunk and shut in the next, both ways"
    q, k, v, i, f = inputs(1, 2, 128, 4, bias=6.)
    for loud in (slice(0, 32), slice(64, 96)):
        gate = torch.full_like(i, -15.)
        gate[:, :, loud] = 15.
        want = mlstm_recurrent(q, k, v, gate, f, reverse=1)
        torch.testing.assert_close(chunk_inference(*(z.float() for z in (q, k, v, gate, f)), 1,
                                                   32).double(), want, rtol=1e-4,
                                   atol=1e-5 * want.abs().max().item())


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 20))
def test_streaming_equals_one_go(sizes, chunk):
    """Pieces of any size, with the state handed on, give the outputs and the final state of the
    whole, in both forms"""
    x = inputs(2, 2, sum(sizes), 3, 4, seed=len(sizes))
    want, end = mlstm_recurrent(*x, return_state=True)
    for fn in (lambda *z, **kw: mlstm_chunkwise(*z, chunk=chunk, **kw), mlstm_recurrent):
        state, out, a = None, [], 0
        for size in sizes:
            h, state = fn(*(z[:, :, a:a + size] for z in x), state=state, return_state=True)
            out.append(h); a += size
        torch.testing.assert_close(torch.cat(out, 2), want, rtol=1e-9, atol=1e-11)
        for got, ref in zip(state, end): torch.testing.assert_close(got, ref, rtol=1e-9, atol=1e-11)


def test_state_carries_no_gradient_but_counts_in_those_of_the_piece():
    """The incoming state gets no gradient; the piece's own gradients are those of the recurrence
    with that state fixed"""
    x = inputs(1, 2, 50, 4, seed=1)
    state = MLSTMState(*(z.requires_grad_() for z in mlstm_recurrent(*x, return_state=True)[1]))
    y = inputs(1, 2, 45, 4, seed=2)
    got = run(lambda *z: mlstm_chunkwise(*z, chunk=16, state=state), y)
    assert_near(got,
                run(lambda *z: mlstm_recurrent(*z, state=MLSTMState(*(s.detach() for s in state))),
                    y), 1e-9)
    h, end = mlstm_chunkwise(*(z.requires_grad_() for z in y), state=state, return_state=True)
    h.sum().backward()
    assert all(s.grad is None for s in state) and not any(s.requires_grad for s in end)


def test_reversed_heads_equal_flipped_windows():
    "A reversed head on a window is a forward head on the window turned round, in every form"
    x = inputs(2, 3, 77, 4)
    for fn in (mlstm_chunkwise, mlstm_parallel, mlstm_recurrent):
        both = fn(*x, reverse=1)
        torch.testing.assert_close(both[:, :2], fn(*(z[:, :2] for z in x)), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(both[:, 2:], fn(*(z[:, 2:].flip(2) for z in x)).flip(2),
                                   rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize('frame', [0, 15, 16, 40, 76])
def test_no_head_sees_what_it_has_not_read(frame):
    """A change of one frame leaves the frames before it (forward) or after it (reversed) as they
    were, and only those"""
    x = inputs(1, 2, 77, 4, bias=6.)
    y = [z.clone() for z in x]
    for z in y: z[:, :, frame] += 1.
    changed = (mlstm_chunkwise(*x, reverse=1, chunk=16)
               - mlstm_chunkwise(*y, reverse=1, chunk=16)).abs().amax((0, 3))
    assert (changed[0, :frame] < 1e-12).all() and (changed[0, frame:] > 1e-6).all()
    assert (changed[1, frame + 1:] < 1e-12).all() and (changed[1, :frame + 1] > 1e-6).all()


def test_views_are_as_good_as_contiguous_tensors():
    "q, k, v as slices of one projection, transposed, and an expanded gradient"
    x = inputs(2, 2, 70, 4)
    # (B, T, H, 3, d)
    packed = torch.stack(x[:3], -2).transpose(1, 2).contiguous()
    views = [z.transpose(1, 2) for z in packed.unbind(-2)]
    assert not views[0].is_contiguous()
    ones = torch.ones((), dtype=torch.float64).expand(2, 2, 70, 4)
    got = run(lambda *z: mlstm_chunkwise(*z, reverse=1), (*views, *x[3:]), weight=ones)
    assert_near(got, run(lambda *z: mlstm_recurrent(*z, reverse=1), x, weight=ones), 1e-9)


def test_bfloat16_operands():
    """q, k, v in bfloat16 with float32 gates as a new layer has them: all within a few roundings of
    float64"""
    q, k, v, i, f = inputs(2, 4, 512, 32, seed=4, bias=5.)
    x = [*(z.bfloat16().double() for z in (q, k, v)), i - 10, f]
    want = run(lambda *z: mlstm_chunkwise(*z, reverse=2), x)
    low = [z.to(t).requires_grad_() for z, t in zip(x, [torch.bfloat16] * 3 + [torch.float32] * 2)]
    h = mlstm_chunkwise(*low, reverse=2)
    weight = torch.randn(h.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    grads = torch.autograd.grad(h, low, weight.to(h))
    assert h.dtype == torch.bfloat16 and [g.dtype for g in grads] == [z.dtype for z in low]
    for name, a, b in zip(NAMES, (h, *grads), want):
        assert (a.double() - b).norm() / b.norm() < 0.02, name


def test_autocast_changes_nothing_inside():
    """Float32 inputs give the same bits with and without autocast around the cell, forward and
    backward"""
    x = inputs(1, 2, 100, 8)
    plain = run(lambda *z: mlstm_chunkwise(*z, reverse=1), x, torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        cast = run(lambda *z: mlstm_chunkwise(*z, reverse=1), x, torch.float32)
    for a, b in zip(plain, cast): assert torch.equal(a, b)


def test_second_derivative_is_refused():
    "The backward is differentiable once; asking for more is an error, not a wrong number"
    x = [z.requires_grad_() for z in inputs(1, 1, 5, 2)]
    grad, = torch.autograd.grad(mlstm_chunkwise(*x).sum(), x[0], create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable|does not require grad'):
        grad.sum().backward()


def test_backward_keeps_no_tiles():
    "What is saved for the backward is a small multiple of q, whatever the number of frames"
    x = [z.float().requires_grad_() for z in inputs(1, 2, 1024, 64)]
    sizes = {}
    def pack(z): sizes[z.untyped_storage().data_ptr()] = z.untyped_storage().nbytes(); return z
    with torch.autograd.graph.saved_tensors_hooks(pack,
                                                  lambda z: z): h = mlstm_chunkwise(*x, reverse=1)
    assert h.grad_fn is not None and sum(sizes.values()) < 5.5 * x[0].numel() * 4


@pytest.mark.parametrize('change,message', [
    (lambda q, k, v, i, f: (q, k[:, :, :4], v, i, f), 'q and k must be'),
    (lambda q, k, v, i, f: (q, k, v[:, :1], i, f), 'q and k must be'),
    (lambda q, k, v, i, f: (q, k, v, i[..., :4], f), 'i and f must be'),
    (lambda q, k, v, i, f: (q.float(), k, v, i, f), 'one dtype'),
    (lambda *x: tuple(z[:, :, :0] for z in x), 'T ≥ 1')])
def test_bad_shapes_are_named(change, message):
    "Each form refuses inputs that do not fit, in one sentence"
    for fn in (mlstm_chunkwise, mlstm_parallel, mlstm_recurrent):
        with pytest.raises(ValueError, match=message): fn(*change(*inputs(1, 2, 5, 3)))


def test_bad_arguments_are_named():
    "reverse, chunk, and a state with reversed heads"
    x = inputs(1, 2, 5, 3)
    with pytest.raises(ValueError, match='between 0 and 2 heads'): mlstm_chunkwise(*x, reverse=3)
    with pytest.raises(ValueError, match='chunk must be'): mlstm_chunkwise(*x, chunk=0)
    state = mlstm_recurrent(*x, return_state=True)[1]
    for fn in (mlstm_chunkwise, mlstm_recurrent):
        with pytest.raises(ValueError, match='forwards in time only'):
            fn(*x, reverse=1, state=state)
    with pytest.raises(ValueError, match='direction must be'):
        BidirectionalMLSTM(8, direction='both')
    with pytest.raises(ValueError, match='multiple of heads'): BidirectionalMLSTM(10, heads=4)
    with pytest.raises(ValueError, match='even number of heads'): BidirectionalMLSTM(9, heads=3)


def by_flips(layer, x):
    "The layer from two one-directional passes by the recurrent form and explicit flips"
    H, D = layer.heads, x.shape[-1]
    q, k, v, o = (z.unflatten(-1, (H, -1)).transpose(1, 2)
                  for z in F.linear(x, layer.qkvo.weight).chunk(4, -1))
    gates = 15 * torch.tanh(F.linear(x, layer.gates.weight, layer.gates.bias) / 15)
    i, f = gates[..., :layer.cells].mT, gates[..., layer.cells:].mT
    half = layer.cells // 2
    fwd, bwd = (slice(None),
                slice(None)) if layer.direction == 'shared' else (slice(0, half), slice(half, None))
    there = mlstm_recurrent(q[:, fwd], k[:, fwd], v[:, fwd], i[:, :half], f[:, :half])
    back = mlstm_recurrent(*(z.flip(2) for z in (q[:, bwd], k[:, bwd], v[:, bwd], i[:, half:],
                                                 f[:, half:]))).flip(2)
    h = there + back if layer.direction == 'shared' else torch.cat([there, back], 1)
    h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    h = h * layer.norm.weight.view(H, 1, -1) * torch.sigmoid(o)
    return F.linear(h.transpose(1, 2).flatten(2), layer.out.weight)


@pytest.mark.parametrize('direction', ['per_head', 'shared', 'two_pass'])
def test_layer_equals_two_passes_with_flips(direction):
    "All three directions, with random weights everywhere, against flip-run-flip"
    torch.manual_seed(1)
    layer = BidirectionalMLSTM(16, heads=4, direction=direction).double()
    for p in layer.parameters(): torch.nn.init.normal_(p, std=0.5)
    x = torch.randn(2, 90, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x), by_flips(layer, x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize('direction,cells', [('per_head', 4), ('shared', 8), ('two_pass', 8)])
def test_initialisation(direction, cells):
    """Gate weights 0, input bias -10, forget bias 3 to 6 in each direction, o weight 0, the others
    as published"""
    torch.manual_seed(0)
    D, layer = 128, BidirectionalMLSTM(128, heads=4, direction=direction, blocks=3)
    width = 2 * D if direction == 'two_pass' else D
    assert layer.gates.weight.abs().max() == 0
    bias_i, bias_f = layer.gates.bias.detach().chunk(2)
    assert bias_f.shape == (cells,) and (bias_i == -10).all()
    for half in bias_f.chunk(2): torch.testing.assert_close(half, torch.linspace(3, 6, cells // 2))
    assert (layer.qkvo.weight[3 * width:] == 0).all()
    assert (layer.qkvo.weight[:3 * width].std().item()
            == pytest.approx(math.sqrt(2 / (5 * D)), rel=0.05))
    assert layer.out.weight.std().item() == pytest.approx(2 / (3 * math.sqrt(width)), rel=0.05)
    assert layer.qkvo.bias is None and layer.out.bias is None


def test_new_block_remembers_seconds():
    """At the start, a change of the first frame is felt by the forward heads a hundred frames (4 s)
    later"""
    torch.manual_seed(0)
    layer, x = BidirectionalMLSTM(32, heads=4).double(), torch.randn(
        1, 128, 32, dtype=torch.float64)
    y = x.clone(); y[:, 0] += 1
    change = (layer(y) - layer(x)).abs().amax((0, 2))
    assert change[100] > 0.01 * change[0]
    # what a global re-initialisation does
    with torch.no_grad(): layer.gates.bias.zero_()
    change = (layer(y) - layer(x)).abs().amax((0, 2))
    assert change[100] < 1e-6 * change[0]


@pytest.mark.parametrize('D,H,ff', [(16, 2, 3.), (64, 4, 2.667), (176, 4, 3.5)])
def test_block_parameters(D, H, ff):
    "Count by formula; only matrices outside of gates and norms may decay"
    block = MLSTMBlock(D, H, ff)
    hidden = -(-int(round(ff * D * 1000)) // 16000) * 16
    assert (sum(p.numel() for p in block.parameters())
            == 5 * D * D + 2 * H * (D + 1) + 3 * D * hidden + 3 * D)
    decays = [n for n, p in block.named_parameters() if p.ndim >= 2
              and not any(w in n for w in ('gate', 'norm'))]
    assert sorted(decays) == ['down.weight', 'mlstm.out.weight', 'mlstm.qkvo.weight', 'up.weight']


def test_block_has_a_clean_residual_path():
    "With both last Linears at zero the block is the identity, bit by bit"
    block, x = MLSTMBlock(32), torch.randn(2, 20, 32)
    torch.nn.init.zeros_(block.mlstm.out.weight); torch.nn.init.zeros_(block.down.weight)
    assert torch.equal(block(x), x)


def test_block_dropout_only_in_training():
    "Dropout acts in training mode and not in evaluation"
    torch.manual_seed(0)
    block, x = MLSTMBlock(32, dropout=0.5), torch.randn(2, 20, 32)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


@pytest.mark.parametrize('direction', ['per_head', 'shared', 'two_pass'])
@pytest.mark.parametrize('T', [1, 63, 130])
def test_block_trains_at_any_length(direction, T):
    "Shape kept; finite gradients, non-zero wherever T allows"
    torch.manual_seed(0)
    block, x = MLSTMBlock(32, direction=direction), torch.randn(2, T, 32)
    y = block(x)
    assert y.shape == x.shape
    y.square().sum().backward()
    for name, p in block.named_parameters():
        assert p.grad.isfinite().all(), name
        if T > 1: assert p.grad.abs().max() > 0, name


def test_block_under_autocast():
    """bfloat16 autocast: the gates see float32, the residual stream stays float32, the update is
    within 2 %"""
    torch.manual_seed(0)
    block, x = MLSTMBlock(64), torch.randn(2, 200, 64)
    seen = []
    block.mlstm.gates.register_forward_hook(lambda m, a, y: seen.append((a[0].dtype, y.dtype)))
    with torch.no_grad():
        with torch.autocast('cpu', torch.bfloat16): low = block(x)
        full = block(x)
    assert seen[0] == (torch.float32, torch.float32) and low.dtype == torch.float32
    assert (low - full).norm() < 0.02 * (full - x).norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('T', [64, 1000, 1024])
@pytest.mark.parametrize('dtype,tol', [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_on_gpu(T, dtype, tol):
    "The same on a GPU, against the CPU in float64"
    x = inputs(2, 4, T, 64, seed=7)
    want = run(lambda *z: mlstm_chunkwise(*z, reverse=2), x)
    assert_near(run(lambda *z: mlstm_chunkwise(*z, reverse=2), [z.cuda() for z in x], dtype),
                want, tol)
