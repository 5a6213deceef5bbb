"The quantizer against transformers, float64 references and properties that hold for any input"
import sys

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from transformers import Wav2Vec2Config
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2GumbelVectorQuantizer

import seismodel.kernels
from conftest import Largest
from seismodel.kernels import fused
from seismodel.kernels.choice import loss_kernels
from seismodel.models import quantizer as module
from seismodel.models.infonce import masked_frames
from seismodel.models.quantizer import (GumbelVectorQuantizer, code_usage, dead_codes,
                                        entropy_perplexity, gather_frames, gumbel_noise,
                                 hard_perplexity, look_up, quantize_masked, soft_perplexity,
                                        soft_usage, straight_through,
                                 temperature_at)

quick = settings(max_examples=40, deadline=None)


def pair(groups=2, codes=20, width=24, dim=32, seed=0):
    "Our quantizer and the one of transformers with the same weights"
    torch.manual_seed(seed)
    ours = GumbelVectorQuantizer(width, groups, codes, dim, scale_logits=False)
    config = Wav2Vec2Config(num_codevector_groups=groups, num_codevectors_per_group=codes,
                            codevector_dim=dim,
                            conv_dim=(width,), conv_stride=(2,), conv_kernel=(3,))
    theirs = Wav2Vec2GumbelVectorQuantizer(config)
    theirs.load_state_dict({name: value for name, value in ours.state_dict().items()
                            if name != 'temperature'})
    # logits of order one, or the softmax has next to no gradient
    ours.weight_proj.weight.data /= 4
    theirs.weight_proj.weight.data /= 4
    return ours, theirs


@pytest.fixture
def same_noise(monkeypatch):
    "One fixed noise for both: theirs enters by gumbel_softmax, ours by gumbel_noise"
    def fix(noise):
        def gumbel_softmax(logits, tau=1, hard=False, eps=1e-10, dim=-1):
            assert hard and dim == -1
            soft = ((logits + noise.view_as(logits)) / tau).softmax(-1)
            return F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft) - soft.detach() + soft
        monkeypatch.setattr(F, 'gumbel_softmax', gumbel_softmax)
        monkeypatch.setattr(module, 'gumbel_noise', lambda logits, generator=None: noise)
    return fix


@pytest.mark.parametrize('tau', [2.0, 0.5])
@pytest.mark.parametrize('groups', [1, 2, 4])
def test_training_agrees_with_transformers(same_noise, tau, groups):
    "Vectors, perplexity and every gradient, with the same noise injected, to 1e-5"
    ours, theirs = pair(groups)
    ours.temperature.fill_(tau)
    theirs.temperature = tau
    same_noise(gumbel_noise(torch.empty(3, 17, groups, 20), torch.Generator().manual_seed(1)))
    x = torch.randn(3, 17, 24)
    mask = torch.rand(3, 17) < .6
    weight = torch.randn(3, 17, 32)
    results = []
    for vq in (ours, theirs):
        a = x.clone().requires_grad_()
        if vq is ours:
            out = vq(a)
            vectors, perplexity = out.vectors, soft_perplexity(out.logits, mask)
        else: vectors, perplexity = vq(a, mask)
        ((vectors * weight).sum() + perplexity).backward()
        results.append((vectors, perplexity, a.grad,
                        *(p.grad for _, p in sorted(vq.named_parameters()))))
    assert results[0][2].abs().max() > 1e-2       # there is a gradient to compare
    for mine, other in zip(*results): torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_evaluation_agrees_with_transformers():
    "argmax, its vectors and the hard perplexity"
    ours, theirs = (vq.eval() for vq in pair())
    x, mask = torch.randn(3, 17, 24), torch.rand(3, 17) < .6
    out = ours(x)
    vectors, perplexity = theirs(x, mask)
    torch.testing.assert_close(out.vectors, vectors, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hard_perplexity(out.codes, 20, mask), perplexity, rtol=1e-5,
                               atol=1e-5)
    assert torch.equal(out.codes, out.logits.argmax(-1))


def test_the_noise_is_that_of_torch():
    """Seeded alike, gumbel_softmax of torch and our sample are the same choice and the same soft
    sample"""
    logits = torch.randn(50, 30)
    torch.manual_seed(7)
    soft = F.gumbel_softmax(logits, tau=.7)
    torch.manual_seed(7)
    mine = ((logits + gumbel_noise(logits)) / .7).softmax(-1)
    torch.testing.assert_close(mine, soft)


def test_scaled_logits_are_unscaled_ones_over_the_root():
    torch.manual_seed(0)
    plain = GumbelVectorQuantizer(64, scale_logits=False)
    scaled = GumbelVectorQuantizer(64)
    scaled.load_state_dict(plain.state_dict())
    x = torch.randn(2, 9, 64)
    torch.testing.assert_close(scaled(x).logits, plain(x).logits / 8)


def test_no_expanded_codebook():
    "No tensor of the forward and backward pass is larger than the one-hot choice or the codebook"
    vq = GumbelVectorQuantizer(32, 2, 40, 64)
    x = torch.randn(2, 100, 32, requires_grad=True)
    with Largest() as seen: vq(x).vectors.sum().backward()
    assert seen.numbers == 2*100*2*40


def test_nothing_is_read_back_from_the_device():
    """Quantizer, perplexities and usage run on shapes alone: fake tensors raise where a value would
    have to be read"""
    with FakeTensorMode():
        vq = GumbelVectorQuantizer(8, 2, 10, 6)
        x, mask = torch.zeros(2, 5, 8, requires_grad=True), torch.zeros(2, 5, dtype=torch.bool)
        out = vq(x)
        (out.vectors.sum() + soft_perplexity(out.logits, mask)).backward()
        assert (hard_perplexity(out.codes, 10, mask).shape
                == dead_codes(code_usage(out.codes, 10, mask)).shape == ())
        assert x.grad.shape == x.shape


def test_a_draw_of_zero_stays_finite(monkeypatch):
    "The exponential variable can come out as 0, whose logarithm is infinite"
    monkeypatch.setattr(torch.Tensor, 'exponential_', lambda self, generator=None: self.zero_())
    assert gumbel_noise(torch.zeros(3)).isfinite().all()


def test_bfloat16_autocast_changes_nothing():
    torch.manual_seed(0)
    vq = GumbelVectorQuantizer(32, codes=40, codevector_dim=64)
    x = torch.randn(2, 30, 32)
    runs = []
    for enabled in (False, True):
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            out = vq(x, torch.Generator().manual_seed(0))
            perplexity = soft_perplexity(out.logits)
        vq.zero_grad()
        (out.vectors.square().sum() + perplexity).backward()
        runs.append((*out, perplexity, vq.weight_proj.weight.grad.clone()))
    for plain, mixed in zip(*runs):
        assert plain.dtype == mixed.dtype
        torch.testing.assert_close(mixed, plain, rtol=0, atol=0)


def test_bfloat16_input_is_taken():
    out = GumbelVectorQuantizer(32)(torch.randn(1, 5, 32).bfloat16())
    assert out.vectors.dtype == out.logits.dtype == torch.float32


def test_generator_decides_and_global_state_is_left_alone():
    vq = GumbelVectorQuantizer(32)
    x = torch.randn(2, 30, 32)
    before = torch.get_rng_state()
    a, b = (vq(x, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(before, torch.get_rng_state())


def test_choices_follow_the_softmax():
    """Over many draws the codes of a frame have the frequencies of the softmax of its logits,
    whatever the temperature"""
    torch.manual_seed(0)
    vq = GumbelVectorQuantizer(8, 1, 5, 4, temperature=.3)
    out = vq(torch.randn(1, 1, 8).expand(1, 40_000, 8), torch.Generator().manual_seed(0))
    drawn = code_usage(out.codes, 5)[0] / 40_000
    torch.testing.assert_close(drawn, out.logits[0, 0, 0].softmax(-1), rtol=0, atol=.01)


def test_temperature_is_saved():
    vq = GumbelVectorQuantizer(8)
    vq.temperature.fill_(.77)
    fresh = GumbelVectorQuantizer(8)
    fresh.load_state_dict(vq.state_dict())
    assert fresh.temperature.item() == vq.temperature.item()


def test_gradients_in_float64():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 2, 4, dtype=torch.float64, generator=g).requires_grad_()
    book = torch.randn(1, 8, 3, dtype=torch.float64, generator=g).requires_grad_()
    noise = gumbel_noise(logits.detach(), g)
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]], dtype=torch.bool)
    soft = lambda logits: ((logits + noise) / .7).softmax(-1)
    assert torch.autograd.gradcheck(lambda l, b: look_up(soft(l), b), (logits, book))
    assert torch.autograd.gradcheck(lambda l: soft_perplexity(l, mask), logits)
    assert torch.autograd.gradcheck(lambda b: look_up(straight_through(soft(logits.detach()))[0],
                                                      b), book)


@pytest.mark.parametrize('scale', [1., 1e3, 1e6])
def test_extreme_logits_give_finite_gradients(scale):
    "Probabilities of exactly 0 must not turn the gradient of the perplexity into NaN"
    logits = (scale * torch.randn(2, 6, 2, 50)).requires_grad_()
    soft_perplexity(logits).backward()
    assert logits.grad.isfinite().all()


def test_no_masked_frame():
    logits = torch.randn(2, 6, 2, 50, requires_grad=True)
    none = torch.zeros(2, 6, dtype=torch.bool)
    soft_perplexity(logits, none).backward()
    assert soft_perplexity(logits, none) == 2 and not logits.grad.any()
    assert hard_perplexity(torch.zeros(2, 6, 2, dtype=torch.long), 50, none) == 2


shapes = st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 3), st.integers(1, 9),
                   st.integers(0, 10_000))


@quick
@given(shapes)
def test_perplexities_stay_within_bounds(shape):
    "Between G and GV; the hard one not above the number of frames in each group"
    B, T, G, V, seed = shape
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(B, T, generator=g) < .7
    mask[0, 0] = True
    codes = torch.randint(V, (B, T, G), generator=g)
    soft = soft_perplexity(5*torch.randn(B, T, G, V, generator=g), mask).item()
    hard = hard_perplexity(codes, V, mask).item()
    assert G - 1e-4 <= soft <= G*V*(1 + 1e-5)
    assert G - 1e-4 <= hard <= G*min(V, int(mask.sum()))*(1 + 1e-5)


@quick
@given(shapes)
def test_usage_counts(shape):
    "Usage is a histogram of the masked frames, group by group, and unused codes are dead"
    B, T, G, V, seed = shape
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(B, T, generator=g) < .5
    codes = torch.randint(V, (B, T, G), generator=g)
    usage = code_usage(codes, V, mask)
    expected = torch.stack([torch.bincount(codes[mask][:, k], minlength=V) for k in range(G)])
    assert usage.shape == (G, V) and torch.equal(usage, expected)
    assert dead_codes(usage).item() == G*V - sum(len(codes[mask][:, k].unique()) for k in range(G))


@quick
@given(shapes)
def test_straight_through_is_exactly_one_hot(shape):
    B, T, G, V, seed = shape
    soft = torch.randn(B, T, G, V, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    one_hot, codes = straight_through(soft)
    assert torch.equal(one_hot, F.one_hot(codes, V).float())
    assert torch.equal(codes, soft.argmax(-1))


@quick
@given(shapes)
def test_vectors_are_rows_of_the_codebook(shape):
    B, T, G, V, seed = shape
    torch.manual_seed(seed)
    vq = GumbelVectorQuantizer(5, G, V, 3*G)
    out = vq(torch.randn(B, T, 5))
    rows = vq.codevectors.view(G, V, 3)[torch.arange(G), out.codes].flatten(-2)
    assert torch.equal(out.vectors, rows)


@quick
@given(st.integers(1, 2_000_000), st.floats(.6, 5), st.floats(.01, .5),
       st.sampled_from(['cosine', 'exponential']))
def test_temperature_falls_between_its_ends(steps, start, end, schedule):
    at = [temperature_at(steps*k//20, steps, start, end, schedule) for k in range(21)]
    assert at[0] == pytest.approx(start) and all(end - 1e-9 <= t <= start + 1e-9 for t in at)
    assert all(a >= b - 1e-12 for a, b in zip(at, at[1:]))
    assert temperature_at(10*steps, steps, start, end, schedule) == at[-1]
    if schedule == 'cosine': assert at[-1] == pytest.approx(end)


def test_exponential_is_the_published_product():
    value = 2.0
    for _ in range(1000): value *= 0.999995
    assert temperature_at(1000, 5000, schedule='exponential') == pytest.approx(value, rel=1e-9)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match='multiple of groups'):
        GumbelVectorQuantizer(codevector_dim=255)
    with pytest.raises(ValueError, match='above 0'): GumbelVectorQuantizer(temperature=0.)
    with pytest.raises(ValueError, match='schedule'): temperature_at(0, 10, schedule='linear')
    with pytest.raises(ValueError, match='at least 1'): temperature_at(0, 0)
    # a code outside the book
    with pytest.raises((RuntimeError, IndexError)): code_usage(torch.full((4, 2), 7), 5)


def test_entropy_perplexity_reference():
    "Against the definition in float64"
    p = torch.rand(3, 11, dtype=torch.float64)
    p /= p.sum(-1, keepdim=True)
    torch.testing.assert_close(entropy_perplexity(p),
                               torch.distributions.Categorical(p).entropy().exp().sum())


def test_masked_frames_alone_give_the_same():
    """In evaluation, where nothing is drawn: vectors, codes and usage are those of the whole at the
    given indices"""
    torch.manual_seed(0)
    vq = GumbelVectorQuantizer(32, codes=40, codevector_dim=64).eval()
    x, mask = torch.randn(3, 30, 32), torch.rand(3, 30) < .5
    indices, valid = masked_frames(mask)
    some, whole = quantize_masked(vq, x, indices, valid), vq(x)
    torch.testing.assert_close(some.vectors, gather_frames(whole.vectors, indices))
    assert torch.equal(some.codes, gather_frames(whole.codes, indices))
    torch.testing.assert_close(some.usage, soft_usage(whole.logits, mask))


@pytest.fixture
def no_verdicts():
    "No kernel has been checked, before and after"
    fused.verdicts.clear()
    yield torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    fused.verdicts.clear()


def test_kernels_that_compute_wrongly_are_not_used(no_verdicts, monkeypatch, caplog):
    """A gradient of the codebook with a wrong sign is found at first use, said once, and the plain
    form runs"""
    from seismodel.kernels import triton_infonce
    right, device = triton_infonce.Quantize.backward, no_verdicts
    def wrong(ctx, *upstream):
        grads = list(right(ctx, *upstream))
        grads[5] = -grads[5]
        return tuple(grads)
    monkeypatch.setattr(triton_infonce.Quantize, 'backward', staticmethod(wrong))
    with torch.no_grad(): assert [loss_kernels(device) for _ in range(2)] == [None]*2
    assert [r.levelname for r in caplog.records] == ['WARNING'] and 'off by' in caplog.text
    monkeypatch.undo()
    fused.verdicts.clear()
    assert loss_kernels(device) is triton_infonce


@pytest.mark.parametrize('lost', ['Triton', 'a part of it'])
def test_a_missing_triton_is_said_once(no_verdicts, monkeypatch, caplog, lost):
    if lost == 'Triton': monkeypatch.setattr(fused, 'find_spec', lambda name: None)
    else:
        # importing it now fails
        monkeypatch.setitem(sys.modules, 'seismodel.kernels.triton_infonce', None)
        monkeypatch.delattr(seismodel.kernels, 'triton_infonce', raising=False)
    assert [loss_kernels(torch.device('cpu')) for _ in range(3)] == [None]*3
    assert ([r.levelname for r in caplog.records] == ['WARNING']
            and ('not installed' in caplog.text) == (lost == 'Triton'))
