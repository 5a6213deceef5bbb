"Spectra as targets: numpy and scipy as oracles, properties, and models that learn from them"
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from scipy.signal import get_window

from seismodel.models.encoders import BidirAutoregConfig, ConvDownConfig
from seismodel.models.pretraining import (MaskedConfig, ReconstructionConfig, build,
                                          config_from_dict,
                                   config_to_dict, preset)
from seismodel.models.spectrum import (BANDS, FFT, HIGH, LOW, band_weights, log_spectra,
                                       spectrum_targets)
from seismodel.core import UserError

torch.set_num_threads(1)
CONV = ConvDownConfig(conv_features=16, out_features=16, codevector_dim=16, target_features=16)
BIDIR = BidirAutoregConfig(d_model=16)
centres = LOW*(HIGH/LOW)**(np.arange(BANDS)/(BANDS - 1))


def windows(seed, rows=2, samples=512):
    return torch.randn(rows, samples, 3, generator=torch.Generator().manual_seed(seed))


def spectrum_of(x, t, weights):
    "Frame t of one component, in float64: cut, taper, transform, weigh"
    padded = np.concatenate([np.zeros(FFT), x, np.zeros(FFT)])
    piece = padded[FFT + 4*t - FFT//2:FFT + 4*t + FFT//2] * get_window('hann', FFT)
    return np.log(np.abs(np.fft.rfft(piece))**2 @ weights + 1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 700), st.floats(-3, 3))
def test_spectra_are_numpys(seed, samples, size):
    x = 10**size * windows(seed, 2, samples)
    y, weights = log_spectra(x), band_weights()
    assert y.shape == (2, -(-samples//4), 3, BANDS) and y.dtype == torch.float32
    for t in {0, y.shape[1]//2, y.shape[1] - 1}:
        for b, c in ((0, 0), (1, 2)):
            expected = spectrum_of(x[b, :, c].double().numpy(), t, weights)
            np.testing.assert_allclose(y[b, t, c].numpy(), expected, rtol=1e-3, atol=2e-3)


def test_weights_are_overlapping_triangles():
    w, bins = band_weights(), np.fft.rfftfreq(FFT, .01)
    assert w.shape == (FFT//2 + 1, BANDS) and (w >= 0).all()
    np.testing.assert_allclose(w.sum(0), 1)
    inside = (bins >= LOW) & (bins <= HIGH)
    assert (w[inside] > 0).any(1).all()                            # no frequency goes unheard
    assert all(((w[:, k] > 0) & (w[:, k + 1] > 0)).any() for k in range(BANDS - 1))
    middle = bins @ w                                              # rises, and lies at the centre
    assert (np.diff(middle) > 0).all()
    np.testing.assert_allclose(middle[8:], centres[8:], rtol=.05)


@pytest.mark.parametrize('band', range(8, BANDS))
def test_a_tone_is_heard_in_its_band(band):
    time = torch.arange(1024)/100
    tone = torch.sin(2*math.pi*centres[band]*time)[None, :, None].expand(1, -1, 3)
    assert (log_spectra(tone)[0, 100:150].argmax(-1) == band).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.floats(.1, 100), st.integers(1, 30))
def test_targets_know_neither_size_nor_sign_nor_time(seed, size, frames):
    x = windows(seed)
    y = spectrum_targets(x)
    assert y.shape == (2, 128, 3*BANDS)
    torch.testing.assert_close(spectrum_targets(-size*x), y, atol=2e-2, rtol=1e-3)
    late = torch.cat([torch.zeros(2, 4*frames, 3), x], 1)
    torch.testing.assert_close(log_spectra(late)[:, frames + 16:], log_spectra(x)[:, 16:],
                               atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(spectrum_targets(x[..., [2, 0, 1]]).unflatten(2, (3, BANDS)),
                               y.unflatten(2, (3, BANDS))[:, :, [2, 0, 1]])


@settings(max_examples=20, deadline=None)
@example(217, 6)
@given(st.integers(0, 2**31), st.integers(1, 600))
def test_targets_are_normalised_finite_and_without_gradient(seed, samples):
    x = windows(seed, 3, samples).requires_grad_()
    with torch.no_grad(): x[1, :, 2], x[2] = 0., 0.
    y = spectrum_targets(x)
    assert y.isfinite().all() and not y.requires_grad
    # rounding of a level of about 10, over the smallest deviation, 1e-3
    assert y.mean(1).abs().max() < 2e-3
    power = y.square().mean(1)
    assert ((power - 1).abs().lt(1e-3) | (power == 0)).all()
    assert (y[2] == 0).all() and (y[1, :, 2*BANDS:] == 0).all()
    if samples > 200: assert (power[0] > .9).all()


def test_autocast_changes_nothing():
    x = windows(0)
    with torch.autocast('cpu', dtype=torch.bfloat16): y = spectrum_targets(x)
    assert y.dtype == torch.float32 and torch.equal(y, spectrum_targets(x))


@pytest.mark.parametrize('encoder', [CONV, BIDIR], ids=['conv', 'bidir'])
@pytest.mark.parametrize('backbone', ['unet', 'sequential'])
def test_gradient_comes_from_hidden_frames_alone(encoder, backbone):
    torch.manual_seed(0)
    model, said = build(MaskedConfig(encoder, backbone, 1)), []
    def keep(module, inputs, out):
        out.retain_grad()
        said.append(out)
    model.head['spectrum'].register_forward_hook(keep)
    mask, _ = model.predict(windows(1), torch.Generator().manual_seed(3))
    model(windows(1), torch.Generator().manual_seed(3)).loss.backward()
    assert torch.equal((said[-1].grad != 0).any(-1), mask)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_loss_is_the_weighted_sum_of_its_objectives():
    x = windows(2)
    whole = MaskedConfig(CONV, 'unet', 1, spectrum=.5, contrastive=.25, tokens=2., patch=3.,
                         negatives=20)
    torch.manual_seed(0)
    model = build(whole)
    step = model(x, torch.Generator().manual_seed(0))
    m = step.metrics
    contrastive = m['contrastive'] + whole.diversity_weight*m['diversity']
    total = .5*m['spectrum_mse'] + .25*contrastive + 2*m['tokens_mse'] + 3*m['patch_mse']
    torch.testing.assert_close(step.loss.detach(), total)


def test_infonce_beside_a_spectrum_is_the_contrastive_models():
    "Same weights, same draws: the joint model's InfoNCE is that of the contrastive method"
    from seismodel.models.pretraining import ContrastiveConfig
    joint = build(MaskedConfig(CONV, 'unet', 1, spectrum=0., contrastive=1., negatives=20))
    pure = build(ContrastiveConfig(CONV, blocks=1, negatives=20))
    names = {k: k.replace('head.', 'head.contrastive.') for k in pure.state_dict()}
    pure.load_state_dict({k: joint.state_dict()[v] for k, v in names.items()})
    a, b = (m(windows(3), torch.Generator().manual_seed(1)) for m in (joint, pure))
    assert torch.equal(a.loss, b.loss)
    assert all(torch.equal(a.metrics[k], v) for k, v in b.metrics.items())


def test_without_infonce_there_is_no_quantizer():
    names = build(MaskedConfig(CONV, 'unet', 1)).state_dict()
    assert not any('quantizer' in n or 'target_projection' in n for n in names)
    assert any('quantizer' in n
               for n in build(MaskedConfig(CONV, 'unet', 1, contrastive=1.)).state_dict())


@pytest.mark.parametrize('change, says', [
    (dict(spectrum=0.), 'at least one must be above 0'), (dict(patch=-1.), 'none below'),
    (dict(backbone='transformer'), 'unet or sequential'),
    (dict(encoder=BIDIR, contrastive=1.), 'has no quantizer')])
def test_what_does_not_go_together_is_refused(change, says):
    with pytest.raises(UserError, match=says):
        build(MaskedConfig(**{'encoder': CONV, 'blocks': 1, **change}))


def test_an_encoder_is_known_by_its_fields():
    for encoder in (CONV, BIDIR):
        c = MaskedConfig(encoder, 'sequential', 1)
        assert config_from_dict(config_to_dict(c)) == c
    with pytest.raises(UserError, match='encoder.conv_features'):
        config_from_dict({'method': 'masked', 'encoder': {'d_model': 16, 'conv_features': 16}})


def test_a_configuration_of_version_0_1_still_loads():
    old = config_to_dict(ReconstructionConfig(BIDIR, 1))
    del old['encoder']['activation']
    assert config_from_dict(old).encoder.activation == 'relu'


def test_the_presets_are_there():
    for size in ('tiny', 'small', 'base'):
        spectrum, joint, contrastive = (preset(f'{m}-{size}').model
                                        for m in ('spectrum', 'joint', 'contrastive'))
        assert spectrum.encoder == joint.encoder == contrastive.encoder
        assert (spectrum.contrastive, spectrum.spectrum) == (0., 1.) and joint.contrastive > 0


def test_there_are_twenty_bands_of_each_component():
    assert log_spectra(torch.randn(1, 512, 3)).numel() == 512//4*3*20
