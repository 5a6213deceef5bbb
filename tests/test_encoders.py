"The two encoders against the specification, and in the corners that the notebook does not visit"
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seismodel.models.encoders import (BidirAutoregConfig, BidirAutoregEncoder, ConvDownConfig,
                                       ConvDownEncoderContrastive,
                                ConvDownFeatures, MaskedTokens)
from seismodel.core import count_parameters
from seismodel.finetuning.finetune import start_model
from seismodel.models.masking import max_masked
from seismodel.models.pretraining import ReconstructionConfig, build
from seismodel.training.settings import read_settings

ENCODERS = [ConvDownEncoderContrastive, BidirAutoregEncoder]
SMALL = {ConvDownEncoderContrastive: ConvDownConfig(conv_features=16, out_features=12,
                                                    codevector_dim=8,
                                                    target_features=10,
                                                    num_codevectors_per_group=6),
         BidirAutoregEncoder: BidirAutoregConfig(d_model=16)}


def make(cls, seed=0, **changes):
    "A small encoder with fixed weights"
    torch.manual_seed(seed)
    return cls(replace(SMALL[cls], **changes))


def rng(seed=0): return torch.Generator().manual_seed(seed)
def windows(batch=3, samples=400, seed=0):
    return torch.randn(batch, samples, 3, generator=rng(seed))
def tensors(out): return list(vars(out).values())


@pytest.fixture(scope='module')
def specified():
    "Both encoders as the specification has them, and what they make of one batch of two windows"
    torch.manual_seed(0)
    both, x = {'conv': ConvDownEncoderContrastive(),
               'bidir': BidirAutoregEncoder()}, windows(2, 4096)
    with torch.no_grad(): return both, {name: encoder(x, rng()) for name, encoder in both.items()}


SEED = [   # what the specification says of (4096, 3) windows, batch dimension aside
    ('conv', 'clean', (1024, 256)), ('conv', 'features', (1024, 256)),
        ('conv', 'targets', (1024, 256)),
    ('conv', 'mask', (1024,)), ('conv', 'codes', (1024, 2)),
        ('conv', 'code_logits', (1024, 2, 320)),
    ('bidir', 'features', (1024, 256)), ('bidir', 'tokens', (1024, 256)),
        ('bidir', 'mask', (1024,))]

@pytest.mark.parametrize('name,field,shape', SEED)
def test_shapes_of_the_specification(specified, name, field, shape):
    value = getattr(specified[1][name], field)
    assert tuple(value.shape) == (2, *shape)
    assert (value.dtype
            == (torch.bool if field == 'mask' else torch.int64
                if field == 'codes' else torch.float32))


CONV = dict(in_features=3, conv_features=256, out_features=256, kernel_size=3, dilation=1,
            mask_prob=.65,
            mask_length=10, mask_channel_prob=0., num_codevector_groups=2,
            num_codevectors_per_group=320,
            codevector_dim=256, max_temperature=2., min_temperature=.5)
BIDIR = dict(in_features=3, mask=.75, num_zero_elements=10, dropout=0., pretraining=True)
KEYS = [('conv', k, v) for k, v in CONV.items()] + [('bidir', k, v) for k, v in BIDIR.items()]

@pytest.mark.parametrize('name,key,value', KEYS)
def test_keys_of_the_specification(specified, name, key, value):
    assert getattr(specified[0][name].config, key) == value


PARAMETERS = [('conv', 'frontend', 2_560 + 196_864 + 3*512), ('conv', 'projection', 65_792),
              ('conv', 'quantizer', 164_480 + 81_920), ('conv', 'target_projection', 65_792),
              ('conv', None, 579_200),
              ('bidir', 'subsampling', 2_560 + 196_864), ('bidir', 'projection', 65_792),
              ('bidir', None, 265_216)]

@pytest.mark.parametrize('name,part,count', PARAMETERS)
def test_parameter_counts(specified, name, part, count):
    encoder = specified[0][name]
    assert count_parameters(getattr(encoder, part) if part else encoder) == count


def test_mask_vector_and_codebook_have_the_specified_shapes(specified):
    encoder = specified[0]['conv']
    assert encoder.mask_emb.shape == (256,) and encoder.mask_emb.requires_grad
    assert encoder.quantizer.codevectors.shape == (1, 640, 128)
    assert encoder.quantizer.temperature == 2.


def test_frontend_is_the_written_arithmetic(specified):
    "Steps 2 to 7 and A1, again in plain float64 sums, for one window"
    encoder, x = specified[0]['conv'], windows(2, 4096)[:1, :64]
    weights = {name: p.detach().double() for name, p in encoder.named_parameters()}
    conv = [p for name, p in weights.items() if name.startswith('frontend') and p.dim() == 3]
    h = x[0].double()
    for w in conv:
        b = next(p for name, p in weights.items() if name.endswith('bias')
                 and weights[name[:-4] + 'weight'] is w)
        padded = torch.cat([h.new_zeros(1, h.shape[1]), h, h.new_zeros(1, h.shape[1])])
        h = torch.stack([sum(w[:, :, k] @ padded[2*t + k] for k in range(3)) + b
                         for t in range((len(h) + 1)//2)])
        h = (h - h.mean(1, keepdim=True))/(h.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        h = h*torch.special.ndtr(h)                                        # GELU(x) = x Φ(x)
    h = (h - h.mean(1, keepdim=True))/(h.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert len(conv) == 2
    h = h @ weights['projection.weight'].T + weights['projection.bias']
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode(x)[0].double(), h, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('mode', ['exact', 'wav2vec2', 'spec'])
@pytest.mark.parametrize('cls', ENCODERS)
def test_hidden_frames_are_replaced_and_visible_ones_kept(cls, mode):
    encoder, x = make(cls, mask_mode=mode), windows(4)
    with torch.no_grad(): out, plain = encoder(x, rng()), encoder.encode(x)
    value = encoder.mask_emb.detach() if cls is ConvDownEncoderContrastive else torch.zeros(16)
    assert torch.equal(out.features, torch.where(out.mask[..., None], value, plain))
    assert (out.mask.sum(1) >= 2).all() and ((~out.mask).sum(1) >= 2).all()
    key = (.65, 10) if cls is ConvDownEncoderContrastive else (.75, 10)
    assert out.mask.sum(1).max() <= max_masked(100, *key, mode)


@pytest.mark.parametrize('cls', ENCODERS)
def test_same_generator_state_same_output(cls):
    encoder, x = make(cls), windows()
    torch.manual_seed(1); a = encoder(x, rng(5))
    torch.manual_seed(2); b = encoder(x, rng(5))
    c = encoder(x, rng(6))
    for u, v in zip(tensors(a), tensors(b)): assert torch.equal(u, v)
    assert not torch.equal(a.mask, c.mask)


@pytest.mark.parametrize('cls', ENCODERS)
def test_the_global_generator_is_the_default(cls):
    encoder, x = make(cls), windows()
    outs = []
    for _ in range(2):
        torch.manual_seed(3)
        outs.append(tensors(encoder(x)))
    for u, v in zip(*outs): assert torch.equal(u, v)


def test_a_window_does_not_see_its_neighbours():
    "Clean frames of a window are the same alone and in a batch"
    for cls in ENCODERS:
        encoder, x = make(cls), windows()
        with torch.no_grad():
            torch.testing.assert_close(encoder.encode(x)[1:2], encoder.encode(x[1:2]))


@pytest.mark.parametrize('where', ['quantizer', 'encoder'])
def test_gradients_of_the_targets(where):
    encoder = make(ConvDownEncoderContrastive, target_gradients=where)
    out = encoder(windows(), rng())
    (out.targets.square().mean() + out.code_logits.square().mean()).backward()
    reached = [p.grad is not None and bool(p.grad.any()) for p in encoder.frontend.parameters()]
    assert all(reached) if where == 'encoder' else not any(reached)
    for p in [*encoder.quantizer.parameters(), *encoder.target_projection.parameters()]:
        assert p.grad.any()
    assert encoder.projection.weight.grad is None and encoder.mask_emb.grad is None


def test_targets_do_not_depend_on_the_mask():
    """Path B reads clean frames: with other holes, the same targets (in evaluation mode, without
    the noise of the codes)"""
    encoder, x = make(ConvDownEncoderContrastive).eval(), windows()
    with torch.no_grad(): a, b = encoder(x, rng(1)), encoder(x, rng(2))
    assert not torch.equal(a.mask, b.mask)
    assert torch.equal(a.targets, b.targets) and torch.equal(a.codes, b.codes)


def test_features_do_not_depend_on_hidden_frames():
    "What is hidden leaves no trace in the features: change samples that only hidden frames see"
    for cls in ENCODERS:
        encoder, x = make(cls), windows(1)
        with torch.no_grad(): out = encoder(x, rng(4))
        hidden = out.mask[0]
        seen = torch.zeros(400, dtype=torch.bool)
        # they see 7 samples
        for t in (~hidden).nonzero().flatten().tolist(): seen[max(0, 4*t - 3):4*t + 4] = True
        assert (~seen).sum() > 100
        y = x.clone()
        y[0, ~seen] = 9.
        with torch.no_grad(): again = encoder(y, rng(4))
        assert torch.equal(again.mask, out.mask)
        torch.testing.assert_close(again.features, out.features)
        assert not torch.allclose(encoder.encode(y), encoder.encode(x))


@settings(max_examples=25, deadline=None)
@given(samples=st.integers(1, 130), batch=st.integers(1, 3))
def test_any_length(samples, batch):
    "T = ceil(L/4) for every length; masks need four frames and say so"
    for cls in ENCODERS:
        encoder, x, T = make(cls), windows(batch, samples), -(-samples//4)
        with torch.no_grad():
            assert encoder.encode(x).shape[:2] == (batch, T)
            assert encoder.encode(x).isfinite().all()
            if T < 4:
                with pytest.raises(ValueError): encoder(x, rng())
            else:
                out = encoder(x, rng())
                assert out.mask.shape == (batch, T) and out.features.shape[:2] == (batch, T)
                assert all(t.isfinite().all() for t in tensors(out))


@pytest.mark.parametrize('cls', ENCODERS)
def test_silent_window_stays_finite(cls):
    encoder = make(cls)
    out = encoder(torch.zeros(2, 400, 3), rng())
    out.features.square().sum().backward()
    assert all(t.isfinite().all() for t in tensors(out))
    assert all(p.grad.isfinite().all() for p in encoder.parameters() if p.grad is not None)


@pytest.mark.parametrize('cls', ENCODERS)
def test_fine_tuning_returns_unmasked_features_alone(cls):
    encoder = make(cls, pretraining=False)
    with torch.no_grad(): out = encoder(windows())
    assert isinstance(out, torch.Tensor) and torch.equal(out, encoder.encode(windows()))
    encoder.pretraining = True
    assert isinstance(encoder(windows()), (ConvDownFeatures, MaskedTokens))


@pytest.mark.parametrize('cls', ENCODERS)
def test_the_pair_of_the_specification(cls):
    "`features, targets = encoder(x)`, an index and the length; everything else by name"
    out = make(cls)(windows(), rng())
    targets = out.targets if cls is ConvDownEncoderContrastive else out.tokens
    masked_features, second = out
    assert masked_features is out.features and second is targets
    assert (out[0] is out.features and out[1] is targets and out[-1] is targets
            and out[:1] == (out.features,))
    assert len(out) == 2 and len(vars(out)) == (6 if cls is ConvDownEncoderContrastive else 3)
    with pytest.raises(IndexError): out[2]


def test_dilation_acts_on_both_convolutions():
    encoder = make(ConvDownEncoderContrastive, dilation=2)
    assert ([conv.dilation for conv in (encoder.frontend.conv1, encoder.frontend.conv2)]
            == [(2,), (2,)])
    x = windows(1, 64).requires_grad_()
    encoder.encode(x)[0, 8].sum().backward()
    seen = x.grad[0].abs().sum(-1).nonzero().flatten()
    assert seen.max() - seen.min() + 1 == 13


@pytest.mark.parametrize('cls', ENCODERS)
def test_a_short_row_has_shorter_spans_and_below_13_samples_none(cls):
    with pytest.raises(ValueError): make(cls)(windows(1, 12), rng())
    assert make(cls)(windows(1, 13), rng()).mask.sum() == 2      # four frames


@pytest.mark.parametrize('field', ['encoder.dropout', 'dropout'])
def test_dropout_of_fine_tuning_can_be_chosen(field, tmp_path):
    """By `seismodel finetune --set model.encoder.dropout=.1`, though the run that it starts from
    has none"""
    config = ReconstructionConfig(SMALL[BidirAutoregEncoder], blocks=1, heads=2)
    build(config).save_pretrained(tmp_path)
    changes, _ = read_settings(None, [f'model.{field}=.1'], {})
    model = start_model(str(tmp_path), changes=changes).train()
    rates = {m.p for m in (model.encoder if 'encoder' in field else model.backbone).modules()
             if isinstance(m, torch.nn.Dropout)}
    assert rates == {.1}
    a, b = model.features(windows()), model.features(windows())
    assert not torch.equal(a, b)
    model.eval()
    assert torch.equal(model.features(windows()), model.features(windows()))


@pytest.mark.parametrize('cls', ENCODERS)
def test_masks_are_drawn_in_evaluation_mode_too(cls):
    assert make(cls).eval()(windows(), rng()).mask.float().mean() > .5


@pytest.mark.parametrize('changes', [{}, {'pretraining': False}])
@pytest.mark.parametrize('cls', ENCODERS)
def test_state_dict_round_trip(cls, changes, tmp_path):
    "Weights and temperature survive a file, also from pretraining to fine-tuning"
    a, b = make(cls, seed=1), make(cls, seed=2, **changes)
    if cls is ConvDownEncoderContrastive: a.quantizer.temperature.fill_(.75)
    torch.save(a.state_dict(), tmp_path/'weights.pt')
    b.load_state_dict(torch.load(tmp_path/'weights.pt'))
    if cls is ConvDownEncoderContrastive: assert b.quantizer.temperature == .75
    b.pretraining = True
    for u, v in zip(tensors(a(windows(), rng())), tensors(b(windows(), rng()))):
        assert torch.equal(u, v)


@pytest.mark.parametrize('cls', ENCODERS)
def test_configuration_round_trip(cls):
    config = SMALL[cls]
    assert type(config)(**asdict(config)) == config


C, R = ConvDownConfig, BidirAutoregConfig
BAD = [(C, dict(mask_prob=1.1), 'mask_prob'), (C, dict(mask_prob=-.1), 'mask_prob'),
       (C, dict(mask_prob=float('nan')), 'mask_prob'),
       (C, dict(mask_channel_prob=2), 'mask_channel_prob'),
       (C, dict(mask_mode='random'), 'mask_mode'),
       (C, dict(target_gradients='none'), 'target_gradients'),
       (C, dict(temperature_schedule='linear'), 'temperature_schedule'),
       (C, dict(mask_length=0), 'mask_length'),
       (C, dict(codevector_dim=7), 'codevector_dim'), (C, dict(min_temperature=0.), 'Temperatures'),
       (C, dict(max_temperature=.1), 'Temperatures'), (C, dict(out_features=2.5), 'out_features'),
       (R, dict(mask=75), 'mask'), (R, dict(dropout=-1.), 'dropout'),
       (R, dict(d_model=0), 'd_model'),
       (R, dict(mask_value='mean'), 'mask_value'), (R, dict(mask_mode=''), 'mask_mode'),
       (R, dict(num_zero_elements=-1), 'num_zero_elements')]

@pytest.mark.parametrize('cls,changes,name', BAD)
def test_wrong_settings_are_named(cls, changes, name):
    with pytest.raises(ValueError, match=name) as e: cls(**changes)
    assert str(e.value).endswith('.') and '\n' not in str(e.value)


@pytest.mark.parametrize('cls', ENCODERS)
def test_channels_first_is_refused(cls):
    "SeisBench's layout (B, C, L) must not pass in silence"
    for pretraining in (True, False):
        with pytest.raises(ValueError, match='components last'):
            make(cls, pretraining=pretraining)(windows().mT)


def test_channel_mask():
    encoder = make(ConvDownEncoderContrastive, mask_channel_prob=.25, mask_channel_length=1)
    with torch.no_grad():
        out, none = encoder(windows(), rng()), make(ConvDownEncoderContrastive)(windows(), rng())
    silent = (out.features == 0).all(1)
    assert silent.shape == (3, 12) and (silent.sum(1) == 3).all()
    assert not (none.features == 0).any()
    # the mask of frames is drawn first
    assert torch.equal(out.mask, none.mask) and torch.equal(out.clean, none.clean)
    kept = (~silent)[:, None].expand_as(out.features)
    assert torch.equal(out.features[kept], none.features[kept])


def test_positions_of_the_hidden_frames():
    out = make(BidirAutoregEncoder)(windows(), rng())
    for positions, row in zip(out.mask_indices, out.mask, strict=True):
        assert (positions.dtype == torch.int64
                and torch.equal(torch.zeros_like(row).index_fill(0, positions, True), row))


def test_learned_mask_value():
    encoder, zero = make(BidirAutoregEncoder, mask_value='learned'), make(BidirAutoregEncoder)
    a, b = encoder(windows(), rng()), zero(windows(), rng())
    assert torch.equal(a.features, b.features)          # starts as the zero mask
    a.features.sum().backward()
    torch.testing.assert_close(encoder.mask_emb.grad, torch.full((16,), float(a.mask.sum())))
    assert zero.mask_emb is None


def test_dropout_leaves_tokens_alone():
    encoder = make(BidirAutoregEncoder, dropout=.5)
    with torch.no_grad(): out, whole = encoder(windows(), rng()), encoder.eval()(windows(), rng())
    visible = out.features[~out.mask]
    assert abs((visible == 0).float().mean() - .5) < .05
    assert torch.equal(out.tokens, whole.tokens) and torch.equal(out.mask, whole.mask)
    assert not (whole.features[~whole.mask] == 0).all()


@pytest.mark.parametrize('cls', ENCODERS)
def test_bfloat16_autocast(cls):
    encoder = make(cls)
    with torch.autocast('cpu', dtype=torch.bfloat16): out = encoder(windows(), rng())
    assert out.features.dtype == torch.bfloat16
    # codes are chosen in fp32
    if cls is ConvDownEncoderContrastive: assert out.code_logits.dtype == torch.float32
    out.features.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in encoder.projection.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('cls', ENCODERS)
def test_on_a_gpu(cls):
    encoder, g = make(cls).cuda(), torch.Generator('cuda').manual_seed(0)
    for t in tensors(encoder(windows().cuda(), g)): assert t.is_cuda
