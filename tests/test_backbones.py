"""Backbones: any length, float64 parity with the recurrence, padding, gradients, independence of
the members of a batch"""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from seismodel.models.backbones import (MLSTMSequential, MLSTMUNet, fold, pad_frames, stage_shapes,
                                        unfold)
from seismodel.models.blocks import MLSTMBlock
from seismodel.kernels.mlstm import mlstm_recurrent, soft_cap

DIRECTIONS = ['per_head', 'shared', 'two_pass']


def build(kind, direction='per_head', dropout=0., seed=0):
    """A small backbone in float64, its gates moved off their initial values so that they depend on
    the input"""
    torch.manual_seed(seed)
    if kind == 'unet': model = MLSTMUNet(8, 1, heads=2, ff=2., direction=direction, dropout=dropout)
    else: model = MLSTMSequential(8, 2, heads=2, ff=2., direction=direction, dropout=dropout)
    for block in model.modules():
        if isinstance(block, MLSTMBlock):
            cells = block.mlstm.cells
            nn.init.normal_(block.mlstm.gates.weight, std=0.5)
            nn.init.normal_(block.mlstm.gates.bias[:cells])       # input gates open
            nn.init.normal_(block.mlstm.qkvo.weight, std=0.5)
    return model.double()


def wave(rows, frames, seed=0):
    "Features (rows, frames, 8) in float64"
    return torch.randn(rows, frames, 8, dtype=torch.float64,
                       generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize('kind', ['unet', 'sequential'])
@pytest.mark.parametrize('frames', [*range(1, 71), 749, 1000, 1024])
def test_any_length(kind, frames):
    model = build(kind)
    with torch.no_grad(): y = model(wave(1, frames))
    assert y.shape == (1, frames, 8) and y.isfinite().all()
    torch.testing.assert_close(y.square().mean(-1), torch.ones(1, frames, dtype=torch.float64),
                               rtol=1e-3, atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(1, 8), st.integers(1, 4))
def test_fold_and_unfold_are_inverse_and_pad_with_the_last_frame(frames, pool, width):
    x = torch.randn(2, frames, width)
    folded = fold(x, pool)
    assert folded.shape == (2, -(-frames//pool), pool*width)
    assert torch.equal(unfold(folded, pool, frames), x)
    padded = pad_frames(x, pool)
    assert torch.equal(padded[:, frames:], x[:, -1:].expand(-1, padded.shape[1] - frames, -1))
    assert torch.equal(unfold(folded, pool, padded.shape[1]), padded)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 150), st.sampled_from([(), (2,), (4, 4), (2, 3, 5)]))
def test_stages_run_at_the_stated_shapes(frames, pooling):
    "No block ever sees a frame that was made up"
    torch.manual_seed(0)
    model, seen = MLSTMUNet(4, 1, pooling, heads=2, ff=2.), []
    for stage in [*model.encoder, model.middle, *model.decoder]:
        stage.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[1:])))
    with torch.no_grad(): assert model(torch.randn(1, frames, 4)).shape == (1, frames, 4)
    assert seen == stage_shapes(frames, 4, pooling)


class RunningMean(nn.Module):
    "Reads forward only"
    def forward(self, x): return x + x.cumsum(1)/torch.arange(1, x.shape[1] + 1)[:, None]


def one_way(model, backward):
    "The U with stages that read in one direction"
    mean = RunningMean()
    stage = (lambda: Flipped(mean)) if backward else (lambda: mean)
    model.encoder = nn.ModuleList([stage() for _ in model.encoder])
    model.decoder = nn.ModuleList([stage() for _ in model.decoder])
    model.middle = stage()
    return model


class Flipped(nn.Module):
    "Reads backward only"
    def __init__(self, stage):
        super().__init__()
        self.stage = stage

    def forward(self, x): return self.stage(x.flip(1)).flip(1)


@pytest.mark.parametrize('frames', [1, 15, 16, 17, 50, 100, 112, 127])
def test_padding_leaves_whole_groups_alone_when_reading_forward(frames):
    model, x = one_way(build('unet'), backward=False), wave(1, 128)
    whole = frames//16*16
    long, short = model(x)[:, :frames], model(x[:, :frames])
    torch.testing.assert_close(long[:, :whole], short[:, :whole])
    # the incomplete group does change
    if whole < frames: assert not torch.allclose(long[:, whole:], short[:, whole:])


@pytest.mark.parametrize('start', [16, 48, 112])
def test_reading_backward_only_ignores_the_past_by_groups(start):
    model, x = one_way(build('unet'), backward=True), wave(1, 121)
    torch.testing.assert_close(model(x)[:, start:], model(x[:, start:]))


def by_hand(model, x):
    "The U-Net written out for pooling (4, 4), frame by frame at the borders between levels"
    def down(x, linear):
        T = x.shape[1]
        frames = [torch.cat([x[:, min(4*t + k, T - 1)] for k in range(4)], -1)
                  for t in range(-(-T//4))]
        return torch.stack(frames, 1) @ linear.weight.mT
    def up(x, linear, frames):
        y = x @ linear.weight.mT
        d = y.shape[-1]//4
        return torch.stack([y[:, t//4, t % 4*d:(t % 4 + 1)*d] for t in range(frames)], 1)
    a = model.encoder[0](x)
    b = model.encoder[1](down(a, model.downs[0]))
    c = model.middle(down(b, model.downs[1]))
    b = model.decoder[1](b + up(c, model.ups[1], b.shape[1]))
    a = model.decoder[0](a + up(b, model.ups[0], a.shape[1]))
    return F.rms_norm(a, (x.shape[-1],), model.norm.weight, 1e-6)


@pytest.mark.parametrize('frames', [1, 3, 16, 23, 37])
def test_unet_written_out_by_hand(frames):
    model, x = build('unet'), wave(2, frames)
    torch.testing.assert_close(model(x), by_hand(model, x))


def recurrent_block(block, x):
    """`MLSTMBlock` with directions per head, by the step-by-step recurrence; backward heads by
    flipping"""
    rms = lambda z, norm: z*(z.square().mean(-1, keepdim=True) + 1e-6).rsqrt()*norm.weight
    layer, z = block.mlstm, rms(x, block.norm_mlstm)
    B, T, D = x.shape
    H = layer.heads
    q, k, v, o = (z @ layer.qkvo.weight.mT).chunk(4, -1)
    q, k, v = (y.reshape(B, T, H, D//H).transpose(1, 2) for y in (q, k, v))
    gates = soft_cap(z @ layer.gates.weight.mT + layer.gates.bias).transpose(1, 2)
    i, f = gates[:, :H], gates[:, H:]
    forward, backward = slice(0, H//2), slice(H//2, H)
    h = torch.empty_like(v)
    h[:, forward] = mlstm_recurrent(*(y[:, forward] for y in (q, k, v, i, f)))
    h[:, backward] = mlstm_recurrent(*(y[:, backward].flip(2) for y in (q, k, v, i, f))).flip(2)
    h = (h - h.mean(-1, keepdim=True))*(h.var(-1, unbiased=False, keepdim=True)
                                        + layer.norm.eps).rsqrt()
    h = h.transpose(1, 2).reshape(B, T, D)*layer.norm.weight
    x = x + (torch.sigmoid(o)*h) @ layer.out.weight.mT
    a, b = (rms(x, block.norm_ff) @ block.up.weight.mT).chunk(2, -1)
    return x + (F.silu(a)*b) @ block.down.weight.mT


@pytest.mark.parametrize('frames', [1, 7, 64, 100])
def test_sequential_against_the_recurrence_in_float64(frames):
    model, x = build('sequential'), wave(2, frames)
    expected = x + model.base
    for block in model.blocks: expected = recurrent_block(block, expected)
    expected = expected*(expected.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('kind', ['unet', 'sequential'])
@pytest.mark.parametrize('direction', DIRECTIONS)
def test_gradients_reach_every_parameter_and_every_input_frame(kind, direction):
    model, x = build(kind, direction), wave(2, 45).requires_grad_()
    (model(x)*wave(2, 45, seed=1)).sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None
                or not p.grad.abs().sum() > 0]
    assert (x.grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize('kind', ['unet', 'sequential'])
def test_gradcheck_of_the_input(kind):
    model = build(kind)
    assert torch.autograd.gradcheck(model, wave(1, 6).requires_grad_(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize('kind', ['unet', 'sequential'])
@pytest.mark.parametrize('direction', DIRECTIONS)
def test_one_frame_sees_both_directions(kind, direction):
    model, x = build(kind, direction), wave(1, 90).requires_grad_()
    model(x)[0, 45].sum().backward()
    seen = x.grad[0].norm(dim=-1)
    assert (seen > 0).all()


@pytest.mark.parametrize('kind', ['unet', 'sequential'])
def test_train_and_eval_agree_without_dropout_and_differ_with_it(kind):
    for dropout, same in ((0., True), (0.5, False)):
        model, x = build(kind, dropout=dropout), wave(2, 20)
        assert torch.equal(model.train()(x), model.eval()(x)) == same
        assert torch.equal(model.eval()(x), model.eval()(x))


@pytest.mark.parametrize('kind', ['unet', 'sequential'])
def test_members_of_a_batch_do_not_see_each_other(kind):
    model, x = build(kind), wave(3, 37)
    together = model(x)
    for b in range(3): torch.testing.assert_close(model(x[b:b + 1]), together[b:b + 1])
    other = x.clone()
    other[1] = 1e6
    torch.testing.assert_close(model(other)[[0, 2]], together[[0, 2]])


@pytest.mark.parametrize('kind', ['unet', 'sequential'])
def test_output_is_float32_under_autocast_and_close_to_it(kind):
    model, x = build(kind).float(), wave(2, 37).float()
    with torch.autocast('cpu', dtype=torch.bfloat16): y = model(x.bfloat16())
    assert y.dtype == torch.float32
    assert (y - model(x)).square().mean() < 0.02*model(x).square().mean()


def test_every_stage_of_the_unet_adds_in_float32_under_autocast():
    model, seen = build('unet').float(), []
    for stage in [*model.encoder, model.middle, *model.decoder]:
        stage.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with torch.autocast('cpu', dtype=torch.bfloat16): model(wave(1, 37).bfloat16())
    assert seen == [torch.float32]*5


@pytest.mark.parametrize('shape', [(2, 10), (2, 0, 8), (2, 10, 7), (1, 2, 10, 8)])
@pytest.mark.parametrize('kind', ['unet', 'sequential'])
def test_bad_features_are_named(kind, shape):
    with pytest.raises(ValueError, match=r'features of shape \(B, T, 8\)'):
        build(kind)(torch.zeros(shape))


def test_base_sizes():
    "The presets' sizes: 19 M and 12 M parameters"
    count = lambda model: sum(p.numel() for p in model.parameters())
    with torch.device('meta'):
        unet, sequential = MLSTMUNet(128, 3, ff=3.), MLSTMSequential(176, 24, ff=3.5)
    assert count(unet) == 19_244_536 and count(sequential) == 11_671_456


def test_changes_of_width_keep_the_size_and_have_no_bias():
    torch.manual_seed(0)
    model = MLSTMUNet(64, 1)
    assert [(m.in_features, m.out_features) for m in model.downs] == [(256, 128), (512, 256)]
    assert [(m.in_features, m.out_features) for m in model.ups] == [(128, 256), (256, 512)]
    for linear in [*model.downs, *model.ups]:
        assert linear.bias is None
        y = linear(torch.randn(500, linear.in_features))
        assert 0.9 < y.std() < 1.1
