"Masked reconstruction loss: numpy and float64 oracles, properties, odd rows"
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from seismodel.models.masked_mse import (effective_rank, feature_variance, interpolate_masked,
                                         interpolation_predictor,
                                  masked_mse, patch_targets, token_targets, visible_neighbours,
                                         zero_predictor)

shapes = st.tuples(st.integers(1, 4), st.integers(1, 30), st.integers(1, 5))


def draw(shape, seed, ratio=0.5):
    "Prediction, target (float32) and a mask"
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g), torch.randn(shape, generator=g), torch.rand(
        shape[:2], generator=g) < ratio


def interpolation_loop(target, mask):
    "numpy.interp, row by row and channel by channel; zeros where nothing is visible"
    out = np.zeros(target.shape)
    for b in range(target.shape[0]):
        seen = np.flatnonzero(~mask[b])
        for d in range(target.shape[2]):
            if len(seen):
                out[b, :, d] = np.interp(np.arange(target.shape[1]), seen, target[b, seen, d])
    return out


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 2**31), st.sampled_from([0., 0.2, 0.5, 0.75, 0.95, 1.]))
def test_interpolation_is_numpys(shape, seed, ratio):
    _, target, mask = draw(shape, seed, ratio)
    target = target.double()
    expected = interpolation_loop(target.numpy(), mask.numpy())
    torch.testing.assert_close(interpolate_masked(target, mask), torch.from_numpy(expected))
    error = ((expected - target.numpy())**2)[mask.numpy()]
    assert (interpolation_predictor(target, mask).item()
            == pytest.approx(error.mean() if error.size else 0.))


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 2**31), st.floats(0, 1))
def test_loss_is_the_mean_over_selected_frames(shape, seed, ratio):
    prediction, target, mask = draw(shape, seed, ratio)
    selected = (prediction.double() - target.double())[mask].square()
    expected = selected.mean().item() if selected.numel() else 0.
    assert masked_mse(prediction, target, mask).item() == pytest.approx(expected, rel=1e-5)
    zeros = target.double()[mask].square()
    assert (zero_predictor(target, mask).item()
            == pytest.approx(zeros.mean().item() if zeros.numel() else 0., rel=1e-5))


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 2**31))
def test_loss_is_even_quadratic_and_zero_at_the_target(shape, seed):
    prediction, target, mask = draw(shape, seed)
    loss = masked_mse(prediction, target, mask)
    torch.testing.assert_close(masked_mse(target, prediction, mask), loss)
    torch.testing.assert_close(masked_mse(3*prediction, 3*target, mask), 9*loss)
    assert masked_mse(target, target, mask) == 0


@pytest.mark.parametrize('odd', [1e30, float('inf'), float('nan')])
def test_visible_frames_change_nothing(odd):
    "Neither the loss, nor the gradient, nor the zero baseline sees a visible frame"
    prediction, target, mask = draw((3, 20, 4), 0)
    losses, gradients = [], []
    for value in (None, odd):
        p, y = prediction.clone(), target.clone()
        if value is not None: p[~mask], y[~mask] = value, -value
        p.requires_grad_()
        loss = masked_mse(p, y, mask)
        loss.backward()
        losses.append((loss.detach(), zero_predictor(y, mask)))
        gradients.append(p.grad)
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)
    assert (torch.equal((gradients[1] != 0).all(-1), mask)
            and torch.equal((gradients[1] != 0).any(-1), mask))


def test_hidden_values_do_not_leak_into_the_interpolation():
    _, target, mask = draw((3, 20, 4), 1, 0.7)
    spoiled = target.masked_fill(mask[..., None], float('nan'))
    torch.testing.assert_close(interpolate_masked(spoiled, mask), interpolate_masked(target, mask),
                               rtol=0, atol=0)


def test_row_without_masked_frame_adds_nothing():
    prediction, target, mask = draw((2, 20, 4), 2)
    mask[1] = False
    torch.testing.assert_close(masked_mse(prediction, target, mask),
                               masked_mse(prediction[:1], target[:1], mask[:1]))


def test_no_masked_frame_at_all_gives_zero_with_zero_gradient():
    prediction, target, mask = draw((2, 20, 4), 3, 0.)
    prediction.requires_grad_()
    loss = masked_mse(prediction, target, mask)
    loss.backward()
    assert loss.item() == 0 and torch.equal(prediction.grad, torch.zeros_like(prediction))
    assert zero_predictor(target, mask) == 0 and interpolation_predictor(target, mask) == 0


@pytest.mark.parametrize('prediction, target, mask',
                         [((2, 5, 3), (2, 5, 1), (2, 5)), ((2, 5, 3), (1, 5, 3), (2, 5)),
                                                      ((2, 5, 3), (2, 5, 3), (5,)),
                          ((2, 5, 3), (2, 5, 3), (1, 5)),
                                                      ((2, 5, 3), (2, 5, 3), (2, 5, 3))])
def test_shapes_that_would_broadcast_are_refused(prediction, target, mask):
    with pytest.raises(ValueError, match='masked_mse needs shapes'):
        masked_mse(torch.zeros(prediction), torch.zeros(target), torch.ones(mask, dtype=torch.bool))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_short_dtypes_are_summed_in_float32(dtype):
    "200,000 equal errors: exact in float32, saturated in the short dtype"
    prediction = torch.full((4, 1000, 50), 2., dtype=dtype, requires_grad=True)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = masked_mse(prediction, torch.zeros(4, 1000, 50),
                          torch.ones(4, 1000, dtype=torch.bool))
    assert loss.dtype == torch.float32 and loss.item() == 4.
    loss.backward()
    assert prediction.grad.dtype == dtype and prediction.grad.isfinite().all()


def test_gradcheck_float64():
    prediction, target, mask = draw((2, 7, 3), 4)
    prediction = prediction.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: masked_mse(p, target.double(), mask), prediction)


def test_neighbours_by_a_loop():
    mask = draw((5, 40, 1), 5, 0.8)[2]
    before, after = visible_neighbours(mask)
    for b in range(5):
        seen = [t for t in range(40) if not mask[b, t]]
        for t in range(40):
            assert before[b, t] == max([s for s in seen if s <= t], default=-1)
            assert after[b, t] == min([s for s in seen if s >= t], default=40)


def test_losses_and_baselines_never_ask_the_device():
    "On the meta device tensors have no values: reading one on the host fails"
    prediction, target, mask = (x.to('meta') for x in draw((3, 20, 4), 6))
    results = [masked_mse(prediction, target, mask), zero_predictor(target, mask),
               interpolation_predictor(target, mask),
               feature_variance(target)]
    assert all(x.shape == () and x.device.type == 'meta' for x in results)
    assert token_targets(prediction).shape == (3, 20, 4)
    assert patch_targets(torch.randn(2, 30, 3, device='meta')).shape == (2, 8, 12)
    with pytest.raises(Exception): prediction[mask].mean().item()   # the check can fail


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 24), st.integers(0, 2**31), st.sampled_from([1e-3, 1., 1e4]))
def test_token_targets_are_normalised_detached_and_scale_free(width, seed, scale):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, 9, width, generator=g, dtype=torch.float64, requires_grad=True)
    y = token_targets(tokens)
    expected = (tokens - tokens.mean(-1, keepdim=True)).detach()
    expected = expected/(expected.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(y, expected)
    assert not y.requires_grad
    # in a frame that is nearly constant, the eps of 1e-6 has its say
    spread = tokens.detach().var(-1, unbiased=False) > 1e-3
    if scale >= 1:
        torch.testing.assert_close(token_targets(scale*tokens)[spread], y[spread], rtol=0,
                                   atol=0.002)


@pytest.mark.parametrize('samples', [1, 2, 3, 4, 5, 4095, 4096])
@pytest.mark.parametrize('amplitude', [1e-14, 1., 1e9])
def test_patch_targets_any_length_and_amplitude(samples, amplitude):
    x = torch.randn(2, samples, 3, generator=torch.Generator().manual_seed(samples),
                    dtype=torch.float64)
    y = patch_targets((amplitude*(x + 0.3)).float())
    assert y.shape == (2, -(-samples//4), 12) and y.isfinite().all() and y.dtype == torch.float32
    expected = torch.zeros(2, y.shape[1]*4, 3, dtype=torch.float64)
    if samples > 1:
        expected[:, :samples] = (x - x.mean(1, keepdim=True))/x.std(1, keepdim=True, unbiased=False)
    torch.testing.assert_close(y.reshape(2, -1, 3).double(), expected, rtol=1e-4, atol=1e-4)


def test_patch_targets_of_constant_components_are_zero():
    x = torch.randn(2, 64, 3)
    x[..., 0], x[..., 2] = 0., 123456.7
    y = patch_targets(x).reshape(2, 64, 3)
    assert torch.equal(y[..., [0, 2]], torch.zeros(2, 64, 2))
    torch.testing.assert_close(y[..., 1].var(1, unbiased=False), torch.ones(2))


def test_patch_targets_keep_a_small_signal_on_a_large_offset():
    "2000 counts of offset, 1 count of signal: a record with a drifting sensor is not a dead one"
    x = torch.randn(2, 400, 3, generator=torch.Generator().manual_seed(0)) + 2000
    y = patch_targets(x).reshape(2, 400, 3)
    torch.testing.assert_close(
        y, (x - x.mean(1, keepdim=True))/x.std(1, keepdim=True, unbiased=False), atol=1e-2, rtol=0)


@pytest.mark.parametrize('rank', [1, 3, 7, 12])
@pytest.mark.parametrize('scale, shift', [(1., 0.), (1e-8, 0.), (1e4, 50.)])
def test_effective_rank_of_known_matrices(rank, scale, shift):
    "Equal singular values in `rank` directions, orthogonal to the mean: the rank itself"
    g = torch.Generator().manual_seed(rank)
    left = torch.randn(60, 13, generator=g, dtype=torch.float64)
    left[:, 0] = 1.
    left = torch.linalg.qr(left).Q[:, 1:1 + rank]                 # columns with mean 0
    right = torch.linalg.qr(torch.randn(12, 12, generator=g, dtype=torch.float64)).Q[:, :rank]
    x = scale*(left @ right.mT).reshape(3, 20, 12) + scale*shift
    assert effective_rank(x).item() == pytest.approx(rank, rel=1e-5)


def test_effective_rank_is_the_formula_on_singular_values():
    x = torch.randn(3, 40, 8, generator=torch.Generator().manual_seed(7),
                    dtype=torch.float64)*torch.arange(1, 9)
    flat = x.flatten(0, 1)
    p = torch.linalg.svdvals(flat - flat.mean(0))
    p = p/p.sum()
    assert effective_rank(x).item() == pytest.approx((-(p*p.log()).sum()).exp().item(), rel=1e-5)
    assert (effective_rank(x[:1, :1]).item() == 0.
            and effective_rank(torch.full((2, 5, 4), 0.1)).item() == 0.)


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 2**31))
def test_measures_of_collapse_have_their_bounds(shape, seed):
    x, _, _ = draw(shape, seed)
    rank = effective_rank(x).item()
    assert rank == 0. or 1 - 1e-5 <= rank <= min(shape[2], max(shape[0]*shape[1] - 1, 1)) + 1e-2
    torch.testing.assert_close(feature_variance(2*x + 1), 4*feature_variance(x), rtol=1e-4,
                               atol=1e-6)
    assert feature_variance(x[:, :1].expand(-1, 5, -1)[:1]) < 1e-12
