"Heads, labels and the picker's loss: SeisBench as oracle, missing labels, freezing, files"
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load, save
from torch import nn
from torch.nn import functional as F

from seismodel.finetuning.heads import (LABELS, SIGMA, PickHead, Picker, WindowHead, found,
                                        label_curves, load_picker,
                                        pick_loss, picker_from_dict, to_samples)
from seismodel.models.pretraining import build, config_to_dict, from_pretrained, preset
from seismodel.training.trainer import parameter_groups
from seismodel.core import UserError

TINY = ('contrastive-tiny', 'reconstruction-tiny')
nan = math.nan
onsets = st.one_of(st.just(nan), st.floats(0, 511))


def batch(n=2, samples=1024, **more):
    g = torch.Generator().manual_seed(3)
    onset = lambda: 200 + 600*torch.rand(n, generator=g)
    return {'x': torch.randn(n, samples, 3, generator=g), 'p_onset': onset(),
            's_onset': onset(), **more}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(onsets, onsets), min_size=1, max_size=3))
def test_labels_are_seisbench_s(picks):
    "The same numbers as SeisBench's ProbabilisticLabeller, for any two onsets, near or far"
    from seisbench.generate import ProbabilisticLabeller
    columns = {'trace_p_arrival_sample': 'P', 'trace_s_arrival_sample': 'S'}
    assert SIGMA == 20.                                          # 0.2 s
    ours = label_curves(*torch.tensor(picks).T, 512)
    assert ours.shape == (len(picks), 512, 3)
    for row, onset in zip(ours, picks):
        state = {'X': (np.zeros((3, 512)), dict(zip(columns, onset)))}
        ProbabilisticLabeller(label_columns=columns, model_labels=LABELS, sigma=SIGMA, dim=0)(state)
        torch.testing.assert_close(row.T.double(), torch.tensor(state['y'][0]), atol=1e-5, rtol=0)


def test_interpolation_is_linear_between_frames():
    f = torch.randn(2, 9, 5, dtype=torch.double)
    u = to_samples(f, 33)
    assert u.shape == (2, 33, 5)
    for d in range(5):
        theirs = np.interp(np.arange(33)/4, np.arange(9), f[1, :, d])
        np.testing.assert_allclose(u[1, :, d], theirs, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=4),
       st.integers(0, 99))
def test_loss_is_that_of_the_classes_told_apart(known, seed):
    "Against a loop that merges noise with what is not labelled, window by window"
    g = torch.Generator().manual_seed(seed)
    known, n = torch.tensor(known), len(known)
    logits = 3*torch.randn(n, 64, 3, generator=g)
    onset = (64*torch.rand(n, 2, generator=g)).masked_fill(~known, nan)
    labels = label_curves(*onset.T, 64)
    losses = []
    for z, y, (p, s) in zip(logits, labels, known.tolist()):
        keep = [[0], [1], [2]] if p and s else [[0, 2], [1]] if p else [[0, 1], [2]] if s else None
        if keep is None: continue
        merged = torch.stack([z.softmax(-1)[:, k].sum(-1) for k in keep], -1)
        losses.append(
            -(torch.stack([y[:, k].sum(-1) for k in keep], -1)*merged.log()).sum(-1).mean())
    want = torch.stack(losses).mean() if losses else torch.tensor(0.)
    torch.testing.assert_close(pick_loss(logits, labels, known), want)


def test_loss_survives_extreme_logits():
    z = torch.tensor([[[1e4, -1e4, 0.], [-1e4, 1e4, 1e4]]], requires_grad=True)
    for known in ([[True, True]], [[True, False]], [[False, False]]):
        loss = pick_loss(z, label_curves(torch.tensor([nan]), torch.tensor([nan]), 2),
                         torch.tensor(known))
        g, = torch.autograd.grad(loss, z)
        assert loss.isfinite() and g.isfinite().all()


@pytest.mark.parametrize('name', TINY)
def test_unlabelled_phase_leaves_no_trace(name):
    "An onset in a phase that is said to be unlabelled changes neither loss nor gradient"
    torch.manual_seed(0)
    picker, b = Picker(build(preset(name).model),
                       dropout=0.), batch(p_status=torch.tensor([4, 3]),
                                          s_status=torch.tensor([0, 2]))
    losses = []
    for s in (nan, 40., 900.):
        b['s_onset'] = torch.tensor([s, 500.])
        losses.append(picker(b).loss)
    assert losses[0] == losses[1] == losses[2]
    unknown = {**b, 's_status': torch.tensor([1, 2])}
    assert picker(unknown).loss != losses[0]


def test_without_status_every_phase_counts():
    torch.manual_seed(0)
    picker, b, true = Picker(build(preset(TINY[0]).model),
                             dropout=0.), batch(), torch.tensor([1, 4], dtype=torch.int8)
    assert picker(b).loss == picker({**b, 'p_status': true, 's_status': true}).loss
    want = F.cross_entropy(picker.logits(b['x']).flatten(0, 1),
                           label_curves(b['p_onset'], b['s_onset'], 1024).flatten(0, 1))
    torch.testing.assert_close(picker(b).loss, want)


@pytest.mark.parametrize('name', TINY)
@pytest.mark.parametrize('freeze', ['none', 'encoder', 'all', 'gradual'])
def test_frozen_parts_stay_bit_for_bit(name, freeze):
    "Through real optimiser steps with weight decay"
    torch.manual_seed(0)
    picker = Picker(build(preset(name).model), freeze=freeze)
    # what the trainer asks before it records a step
    assert picker.steady == (freeze != 'gradual')
    before = {k: v.clone() for k, v in picker.state_dict().items()}
    optimizer, b = torch.optim.AdamW(parameter_groups(picker, .1), lr=1e-2), batch()
    moved = []
    for step in range(4):
        picker.set_progress(step, 4)
        picker(b).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        moved.append({k.split('.')[0] for k, v in picker.state_dict().items()
                      if not torch.equal(v, before[k])})
    want = {'none': [{'encoder', 'backbone', 'head'}]*4, 'encoder': [{'backbone', 'head'}]*4,
            'all': [{'head'}]*4,
            'gradual': [{'head'}, {'backbone', 'head'}] + [{'encoder', 'backbone', 'head'}]*2}
    assert moved == want[freeze]


def test_found_counts_peaks_near_labelled_onsets():
    logits = torch.zeros(3, 400, 3)
    logits[0, 100, 1] = logits[1, 200, 1] = logits[0, 300, 2] = 9.
    share = found(logits, torch.tensor([[110., nan], [260., nan], [nan, nan]]))
    assert share['p_found'] == .5
    assert share['s_found'] == 1.       # nothing to find


@pytest.mark.parametrize('name', TINY)
def test_takes_the_pretrained_weights(name, tmp_path):
    torch.manual_seed(1)
    model = build(preset(name).model)
    model.save_pretrained(tmp_path)
    picker = Picker(from_pretrained(tmp_path)).eval()
    x = batch()['x']
    torch.testing.assert_close(picker.features(x), model.eval().features(x), rtol=0, atol=0)
    picker.save_pretrained(tmp_path/'picker')
    torch.testing.assert_close(load_picker(tmp_path/'picker').logits(x), picker.logits(x),
                               rtol=0, atol=0)
    # not a pretraining model any more
    with pytest.raises(UserError): from_pretrained(tmp_path/'picker')
    weights = tmp_path/'picker/model.safetensors'
    # as version 0.1 wrote them: config.json alone describes them
    weights.write_bytes(save(load(weights.read_bytes())))
    config = json.loads((tmp_path/'picker/config.json').read_text(encoding='utf-8'))
    config['picker']['width'] = 48
    (tmp_path/'picker/config.json').write_text(json.dumps(config), encoding='utf-8')
    with pytest.raises(UserError, match='shape'): load_picker(tmp_path/'picker')
    config['picker']['colour'] = 'red'
    (tmp_path/'picker/config.json').write_text(json.dumps(config), encoding='utf-8')
    with pytest.raises(UserError, match='colour'): load_picker(tmp_path/'picker')


def test_head_needs_no_seisbench():
    "The machine that trains may have none"
    import subprocess, sys
    code = ('import sys, seismodel.finetuning.heads; '
            'sys.exit("seisbench" in sys.modules or "obspy" in sys.modules)')
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


def test_what_drops_out_in_training():
    """A fifth of the channels after each convolution, a fifth of the pooled vector, unless another
    share is named"""
    shares = lambda head: [m.p for m in head.modules() if isinstance(m, nn.Dropout)]
    assert (shares(PickHead(8)) == [.2, .2] and shares(PickHead(8, width=0)) == []
            and shares(WindowHead(8, 3)) == [.2])
    assert (shares(PickHead(8, dropout=.5)) == [.5, .5]
            and shares(WindowHead(8, 3, dropout=.5)) == [.5])


def test_linear_probe_is_linear():
    head = PickHead(8, 0, raw=False).eval()
    f, x = torch.randn(2, 5, 8), torch.randn(2, 20, 3)
    torch.testing.assert_close(head(2*f, x) - head(0*f, x), 2*(head(f, x) - head(0*f, x)))


@pytest.mark.parametrize('at, answers', [('frames', 4), ('samples', 1)])
@pytest.mark.parametrize('samples', [1, 2, 3, 4, 5, 37, 400])
def test_a_head_answers_for_every_sample(at, answers, samples):
    """Any length; the linear probe gives sample 4 t + r what its row r says of frame t and its
    samples"""
    head = PickHead(8, 0, at=at).eval()
    f, x = torch.randn(2, -(-samples//4), 8), torch.randn(2, samples, 3)
    z = head(f, x)
    assert z.shape == (2, samples, 3) and head.out.weight.shape == (3*answers, 8 + 3*answers)
    if at == 'frames':
        padded = F.pad(x, (0, 0, 0, -samples % 4)).reshape(2, -1, 12)
        for n in (0, samples//2, samples - 1):
            t, r = divmod(n, 4)
            want = (torch.cat([f[:, t], padded[:, t]], -1) @ head.out.weight[3*r:3*r + 3].T
                    + head.out.bias[3*r:3*r + 3])
            torch.testing.assert_close(z[:, n], want)
    shares = z.new_zeros(2, 4, 8)
    quiet = PickHead(8, 0, raw=False, at=at)
    assert torch.allclose(quiet(shares, x.new_zeros(2, 16, 3)).softmax(-1).mean((0, 1))[1:],
                          torch.tensor(.01224), atol=1e-4)


def test_a_head_of_0_1_opens_as_it_was(tmp_path):
    "A configuration that does not say where its head works means samples"
    config = {'model': config_to_dict(preset('contrastive-tiny').model),
              'picker': {'width': 8, 'dropout': .2, 'raw': True}}
    old = picker_from_dict(config)
    assert old.head.at == 'samples' and old.head.out.weight.shape == (3, 8)
    assert picker_from_dict({**config, 'picker': old.options}).head.at == 'samples'
    assert Picker(build(preset('contrastive-tiny').model)).head.at == 'frames'
    with pytest.raises(UserError, match="'windows'; choose one of frames, samples"):
        PickHead(8, at='windows')
