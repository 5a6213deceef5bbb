"Span masking: what every mask keeps to, the published sampler against transformers, bad input"
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from seismodel.models.masking import (MODES, apply_mask, channel_mask, sample_without_replacement,
                                      cover, exact_starts, ensure_two_visible, max_masked,
                                      plan_spans,
                               spec_starts, span_mask, wav2vec2_starts)

masks = settings(max_examples=150, deadline=None)
rows_ = st.integers(0, 12)
frames_ = st.one_of(st.integers(4, 40), st.integers(4, 2000))
ratios = st.one_of(st.floats(1e-6, 1.), st.sampled_from([1e-6, .5, .65, .75, .999, 1.]))
spans_ = st.one_of(st.integers(1, 30), st.integers(1, 3000))
modes = st.sampled_from(MODES)
seeds = st.integers(0, 2**32)


def generator(seed): return torch.Generator().manual_seed(seed)


def runs(row):
    "Lengths of the runs of True in one row"
    edges = np.flatnonzero(np.diff(np.pad(row.int().numpy(), 1)))
    return edges[1::2] - edges[::2]


@masks
@given(rows_, frames_, ratios, spans_, modes, seeds)
def test_two_masked_two_visible_and_never_above_the_bound(rows, frames, ratio, span, mode, seed):
    mask = span_mask(rows, frames, ratio, span, mode, generator=generator(seed))
    assert mask.shape == (rows, frames) and mask.dtype == torch.bool and mask.is_contiguous()
    assert (mask.sum(1) >= 2).all() and ((~mask).sum(1) >= 2).all()
    assert (mask.sum(1) <= max_masked(frames, ratio, span, mode)).all()
    assert (isinstance(max_masked(frames, ratio, span, mode), int)
            and max_masked(frames, ratio, span, mode) <= frames - 2)


@masks
@given(frames_, ratios, spans_, seeds)
def test_exact_share_is_within_one_span_of_the_ratio(frames, ratio, span, seed):
    "Measured against the ratio as far as 2 masked and 2 visible frames allow it"
    masked = span_mask(6, frames, ratio, span, generator=generator(seed)).sum(1)
    wanted = min(max(ratio*frames, 2), frames - 2)
    assert ((masked - wanted).abs() <= min(span, frames - 2) + 1e-9).all()
    assert (masked == max_masked(frames, ratio, span)).all()   # the bound is the number itself


@masks
@given(frames_, ratios, spans_, seeds)
def test_exact_is_made_of_whole_spans(frames, ratio, span, seed):
    "Spans may touch, so every run of masked frames is a multiple of the span"
    span = min(span, frames - 2)
    for row in span_mask(3, frames, ratio, span, generator=generator(seed)):
        assert (runs(row) % span == 0).all()


@masks
@given(frames_, ratios, spans_, seeds)
def test_wav2vec2_has_no_run_below_a_span(frames, ratio, span, seed):
    span = min(span, frames - 2)
    for row in span_mask(3, frames, ratio, span, "wav2vec2", generator=generator(seed)):
        assert (runs(row) >= span).all()


@masks
@given(st.integers(1, 12), frames_, ratios, spans_, modes, seeds)
def test_same_generator_same_mask_and_the_global_state_rests(rows, frames, ratio, span, mode, seed):
    torch.manual_seed(seed % 7)
    before = torch.get_rng_state()
    a = span_mask(rows, frames, ratio, span, mode, generator=generator(seed))
    assert torch.equal(before, torch.get_rng_state())
    # the global state moves; the mask does not care
    torch.rand(3)
    np.random.seed(1)
    assert torch.equal(a, span_mask(rows, frames, ratio, span, mode, generator=generator(seed)))


def test_another_seed_gives_another_mask_and_rows_differ():
    for mode in MODES:
        a, b = (span_mask(4, 1024, .65, 10, mode, generator=generator(s)) for s in (0, 1))
        assert not torch.equal(a, b) and len(a.unique(dim=0)) == 4


def test_without_a_generator_the_global_seed_decides():
    torch.manual_seed(3); a = span_mask(4, 200, .65, 10)
    torch.manual_seed(3); b = span_mask(4, 200, .65, 10)
    assert torch.equal(a, b)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_read_back_from_the_device(mode):
    "On the meta device there are no numbers: any look at one would raise"
    mask = span_mask(8, 1024, .65, 10, mode, device="meta")
    assert mask.shape == (8, 1024)
    x = torch.empty(8, 1024, 16, device="meta")
    assert apply_mask(x, mask).shape == x.shape
    assert apply_mask(x, mask, torch.empty(16, device="meta")).shape == x.shape


@pytest.mark.parametrize("ratio,span,frames",
                         [(.65, 10, 1024), (.065, 10, 1024), (.75, 10, 300), (.4, 3, 77)])
def test_wav2vec2_statistics_agree_with_transformers(ratio, span, frames):
    """Share hidden, its spread between rows, chance of each frame and run lengths: two samplers,
    one distribution"""
    from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices
    np.random.seed(0)
    rows = 4000
    theirs = torch.cat([torch.from_numpy(_compute_mask_indices((10, frames), ratio, span))
                        for _ in range(rows//10)])
    ours = span_mask(rows, frames, ratio, span, "wav2vec2", generator=generator(0))
    a, b = ours.float().mean(1), theirs.float().mean(1)
    # their ten rows of a call round alike: 400 independent calls at worst
    error = (a.var()/rows + b.var()/(rows/10)).sqrt()
    assert (a.mean() - b.mean()).abs() < 5*error
    assert abs(a.std()/b.std() - 1) < .1
    p, q = ours.float().mean(0), theirs.float().mean(0)   # (frames,)
    assert (p - q).abs().max() < 6*(.5/rows)**.5
    mean_run = [np.concatenate([runs(r) for r in m[:500]]).mean() for m in (ours, theirs)]
    assert abs(mean_run[0]/mean_run[1] - 1) < .05


def test_wav2vec2_hides_49_percent():
    mask = span_mask(2000, 1024, .65, 10, "wav2vec2", generator=generator(0))
    assert abs(mask.float().mean() - .492) < .01


def test_wav2vec2_rounds_the_number_of_spans_by_chance():
    starts = wav2vec2_starts(4000, 1024, plan_spans(1024, .65, 10, "wav2vec2"),
                             generator=generator(1))
    used = starts < 1024
    assert sorted(used.sum(1).unique().tolist()) == [66, 67]
    assert abs(used.sum(1).float().mean() - 66.56) < 5*.5/4000**.5
    assert starts[used].max() == 1014 and starts.min() == 0
    # no start twice
    for row, use in zip(starts[:50], used[:50]): assert len(row[use].unique()) == use.sum()


def test_exact_draws_each_arrangement_equally_often():
    "All C(8, 3) = 56 arrangements of three spans of 3 in a row of 14, by a chi-square test"
    n = 56_000
    starts = exact_starts(n, 14, 3, 3, generator=generator(2))
    _, counts = cover(starts, 3, 14).int().unique(dim=0, return_counts=True)
    slots, counts = starts.unique(dim=0, return_counts=True)
    assert len(slots) == 56
    chi2 = ((counts - 1000)**2/1000.).sum()
    assert chi2 < 55 + 5*(2*55)**.5


def test_choose_has_no_repeats():
    drawn = sample_without_replacement(300, 7, 9, generator=generator(0))
    assert (drawn.sort(1).values.diff(dim=1) > 0).all() and drawn.min() == 0 and drawn.max() == 8


def test_cover_matches_a_loop():
    g = generator(4)
    # 30 = unused; late ones run over the end
    starts = torch.randint(0, 31, (20, 5), generator=g)
    expected = torch.zeros(20, 30, dtype=torch.bool)
    for row, ss in zip(expected, starts.tolist()):
        for s in ss: row[s:s + 4] = True
    assert torch.equal(cover(starts, 4, 30), expected)


def test_the_literal_formula_before_and_after_the_promise():
    """760 spans drawn with replacement: 99.8 % hidden, one row in five wholly masked; then 2
    visible frames at least"""
    plan = plan_spans(1024, .75, 10, "spec")
    assert plan.many == int(.75*(1024 - 10)) == 760
    raw = cover(spec_starts(3000, 1024, plan.many, plan.span, generator=generator(5)), 10, 1024)
    assert raw.float().mean() > .997 and .15 < raw.all(1).float().mean() < .25
    kept = span_mask(3000, 1024, .75, 10, "spec", generator=generator(5))
    assert (~kept).sum(1).min() == 2 and kept.float().mean() > .99


@masks
@given(st.integers(4, 60), st.floats(0, 1), seeds)
def test_keep_two_touches_only_rows_that_need_it(frames, share, seed):
    mask = torch.rand(20, frames, generator=generator(seed)) < share
    kept = ensure_two_visible(mask, generator(seed + 1))
    enough = (~mask).sum(1) >= 2
    assert torch.equal(kept[enough], mask[enough])
    assert ((~kept[~enough]).sum(1) == 2).all() and (kept <= mask).all()


def test_keep_two_spreads_over_the_row():
    kept = ensure_two_visible(torch.ones(6000, 6, dtype=torch.bool), generator(0))
    assert ((~kept).float().mean(0) - 1/3).abs().max() < .04


@pytest.mark.parametrize("mode", MODES)
def test_ratio_zero_hides_nothing_at_any_length(mode):
    for frames in (0, 1, 3, 4, 50):
        assert (not span_mask(2, frames, 0., 10, mode).any()
                and max_masked(frames, 0., 10, mode) == 0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change,sentence",
                         [(dict(frames=3), "4 at least"), (dict(ratio=-.1), "between 0 and 1"),
                                             (dict(ratio=1.1), "between 0 and 1"),
                          (dict(ratio=float("nan")), "between 0 and 1"),
                                             (dict(span=0), "at least 1"),
                          (dict(mode="half"), "must be one of")])
def test_bad_input_is_refused_with_one_sentence(mode, change, sentence):
    good = dict(frames=100, ratio=.5, span=10, mode=mode)
    with pytest.raises(ValueError, match=sentence): span_mask(2, **(good | change))
    with pytest.raises(ValueError, match=sentence): max_masked(**(good | change))
    if "frames" not in change:
        with pytest.raises(ValueError, match=sentence):
            span_mask(2, **(good | change | dict(frames=4096)))


def test_channel_mask_hides_whole_channels():
    hidden = channel_mask(16, 256, .2, 10, generator=generator(0))
    assert hidden.shape == (16, 256) and (hidden.sum(1) == 50).all()   # 5 spans of 10
    assert not channel_mask(16, 256, 0.).any()


def test_apply_mask_values_gradients_and_dtypes():
    g = generator(0)
    x, value = torch.randn(3, 20, 4, generator=g).double().requires_grad_(), torch.randn(
        4, generator=g).double().requires_grad_()
    mask = span_mask(3, 20, .5, 3, generator=g)
    y = apply_mask(x, mask, value)
    assert_close(y, torch.where(mask[..., None], value.expand_as(x), x))
    assert torch.autograd.gradcheck(lambda a, v: apply_mask(a, mask, v), (x, value))
    assert apply_mask(x, mask)[mask].abs().max() == 0 and apply_mask(x, mask, 7.)[mask].min() == 7
    assert apply_mask(x.bfloat16(), mask, value.float()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="the mask is"): apply_mask(x, mask[:, :-1])


@pytest.mark.parametrize('shape', [(2, 4), (2, 6), (1, 5), (3, 5), (2, 5, 1)])
def test_a_mask_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match='the mask is'):
        apply_mask(torch.zeros(2, 5, 3), torch.zeros(shape, dtype=torch.bool))


def test_apply_mask_hides_nan_without_spreading_it():
    x = torch.full((1, 4, 2), float("nan"))
    mask = torch.tensor([[True, True, True, True]])
    assert_close(apply_mask(x, mask, torch.ones(2)), torch.ones(1, 4, 2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", MODES)
def test_no_wait_for_the_gpu(mode):
    g = torch.Generator("cuda").manual_seed(0)
    value, x = torch.ones(16, device="cuda"), torch.randn(8, 1024, 16, device="cuda")
    span_mask(8, 1024, .65, 10, mode, generator=g)        # the first call may load kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        mask = span_mask(8, 1024, .65, 10, mode, generator=g)
        apply_mask(x, mask, value), apply_mask(x, mask)
    finally: torch.cuda.set_sync_debug_mode("default")
    assert (mask.is_cuda and (mask.sum(1) >= 2).all()
            and (mask.sum(1) <= max_masked(1024, .65, 10, mode)).all())
    a, b = (span_mask(8, 1024, .65, 10, mode, generator=torch.Generator("cuda").manual_seed(1))
            for _ in range(2))
    assert torch.equal(a, b)
