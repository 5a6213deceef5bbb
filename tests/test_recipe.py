"""Each line of a recipe, by what it does: to gradients, weights, masks, negatives, codes, dropout
and windows

The optimiser is watched from outside, just before its step, while `train` runs as it does for
everybody.
"""
import json
import math
from contextlib import contextmanager
from hashlib import sha1

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import Dataset, default_collate

import seismodel.training.pretrain as pretraining
import seismodel.models.encoders as encoders
import seismodel.finetuning.finetune as finetuning
import seismodel.models.infonce as infonce
import seismodel.models.quantizer as quantizer
import seismodel.training.trainer as trainer
from seismodel.signals.augment import Augmentation, fine_augment
from seismodel.models.blocks import HeadNorm
from seismodel.study.trial import Trial, StudyConfig, Candidate, trial_recipe, trial_windows
from seismodel.training.checkpoints import checkpoint_files, read_checkpoint
from seismodel.training.distributed import Ranks
from seismodel.models.encoders import BidirAutoregConfig, ConvDownConfig
from seismodel.core import TrainingError
from seismodel.finetuning.heads import Picker
from seismodel.data.windows import WindowDataset
from seismodel.study.baselines import fresh_baseline
from seismodel.models.pretraining import (ContrastiveConfig, PRESETS, ReconstructionConfig,
                                          ReconstructionPretraining, Step, build, from_pretrained)
from seismodel.models.masked_mse import (effective_rank, feature_variance, interpolation_predictor,
                                         zero_predictor)
from seismodel.training.batches import ResumableBatchSampler
from seismodel.training.config import TrainConfig
from seismodel.training.schedule import mix_seed, parameter_groups
from seismodel.training.runlog import read_metrics
from seismodel.training.trainer import Augmented, train, validation_metrics
from seismodel.signals.records import Record
from seismodel.signals.source import Source
from seismodel.finetuning.window_labels import LabelSpec
from seismodel.finetuning.classification import WindowModel

CONTRASTIVE = ContrastiveConfig(ConvDownConfig(conv_features=16, out_features=16, codevector_dim=16,
                                               target_features=16), blocks=1, pooling=(4,),
                                negatives=20, dropout=.2)
RECONSTRUCTION = ReconstructionConfig(
    BidirAutoregConfig(d_model=16, dropout=.1, mask_value='learned'), blocks=1, ff=2., dropout=.2)
MODELS = {'contrastive': lambda: build(CONTRASTIVE),
          'reconstruction': lambda: build(RECONSTRUCTION),
          'picker': lambda: Picker(build(CONTRASTIVE)),
          'other picker': lambda: Picker(build(RECONSTRUCTION)),
          'window model': lambda: WindowModel(build(CONTRASTIVE),
                                              LabelSpec('c', ['a', 'b', 'c'], [.3, .3, .4]))}
every = pytest.mark.parametrize('name', MODELS)
methods = pytest.mark.parametrize('name', ['contrastive', 'reconstruction'])
STEPS = 10


class Windows(Dataset):
    "Noise with onsets and a class, item n a function of n alone, or all items alike"
    def __init__(self, length, alike=False, dtype=torch.float32):
        self.length, self.alike, self.dtype = length, alike, dtype
    def __len__(self): return self.length
    def __getitem__(self, n):
        rng = np.random.default_rng(0 if self.alike else n)
        x = torch.from_numpy(rng.standard_normal((256, 3))).to(self.dtype)
        return {'x': x, 'n': torch.tensor(n), 'source': torch.tensor(0), 'redrawn': torch.tensor(0),
                'y': torch.tensor(n % 3),
                'p_onset': torch.tensor(rng.uniform(20, 100), dtype=self.dtype),
                's_onset': torch.tensor(rng.uniform(120, 200), dtype=self.dtype)}


def config(**given):
    return TrainConfig(**{**dict(steps=STEPS, batch_size=4, lr=3e-3, device='cpu', workers=0,
                                 log_every=1, validate_every=100, validation_windows=4,
                                 checkpoint_every=4), **given})


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch): monkeypatch.setattr(trainer, 'draw_run', lambda *a: None)


def go(model, folder, resume=False, data=None, **given):
    c = config(**given)
    return train(model, data or Windows(c.steps*c.accumulate*c.batch_size),
                 Windows(c.validation_windows), c, folder, resume=resume)


class Watch(list):
    """Before every step of an optimiser: the settings of its groups, the norm of the gradient, and
    more by `note()`; may end the run there"""
    def __init__(self, note=None, until=None): self.note, self.until = note, until

    @contextmanager
    def hooked(self):
        hook = register_optimizer_step_pre_hook(self.look)
        try: yield self
        finally: hook.remove()

    def look(self, optimizer, args, kwargs):
        if len(self) == self.until: raise ZeroDivisionError('the power is cut')
        grads = [p.grad for g in optimizer.param_groups for p in g['params'] if p.grad is not None]
        self.append({'groups': [{k: g[k] for k in ('lr', 'betas', 'weight_decay', 'eps')}
                                for g in optimizer.param_groups],
                     'norm': math.sqrt(sum(g.double().square().sum().item() for g in grads)),
                     'more': self.note and self.note(optimizer)})


def cut_and_resumed(make, folder, note=None, at=6, **given):
    "What `Watch` sees of a run that is cut off in a step, and of its resumption"
    torch.manual_seed(0)
    model = make()
    with Watch(lambda o: note(model) if note else None,
               until=at).hooked() as before, pytest.raises(ZeroDivisionError): go(
                   model, folder, **given)
    torch.manual_seed(99)
    model = make()
    with Watch(lambda o: note(model)
               if note else None).hooked() as after: go(model, folder, resume=True, **given)
    return before, after


# the whole

def spared(model):
    """Which parameters do not decay, by what they are: everything in a norm, every bias, gates, the
    vectors of mask and backbone, the codebook"""
    norms = (nn.LayerNorm, nn.RMSNorm, HeadNorm)
    names = {f'{m}.{p}' if m else p for m, module in model.named_modules() for p,
             _ in module.named_parameters(recurse=False) if isinstance(module, norms)}
    return (names
            | {n for n, p in model.named_parameters()
               if n.endswith(('bias', 'gates.weight', 'mask_emb', 'codevectors', 'backbone.base'))})


def plain_loop(model, data, c):
    "The recipe as a textbook says it"
    named = dict(model.named_parameters())
    without = spared(model)
    optimizer = torch.optim.AdamW([{'params': [p for n, p in named.items() if n not in without],
                                    'weight_decay': c.weight_decay},
                                   {'params': [p for n, p in named.items() if n in without],
                                    'weight_decay': 0.}], betas=(.9, .95), foreach=False)
    generator, warm, losses = torch.Generator(), round(.1*c.steps), []
    for step in range(c.steps):
        lr = (c.lr*(step + 1)/warm
              if step < warm else c.lr*(1 + math.cos(math.pi*(step - warm)/(c.steps - warm)))/2)
        for group in optimizer.param_groups: group['lr'] = lr
        if hasattr(model.encoder, 'quantizer'):
            model.encoder.quantizer.temperature.fill_(
                .5 + 1.5*(1 + math.cos(math.pi*step/c.steps))/2)
        if getattr(model, 'freeze', '') == 'gradual':
            model.frozen = ('all', 'encoder', 'none', 'none')[4*step//c.steps]
        generator.manual_seed(mix_seed(c.seed, step))
        optimizer.zero_grad()
        for k in range(c.accumulate):
            first = (step*c.accumulate + k)*c.batch_size
            batch = default_collate([data[n] for n in range(first, first + c.batch_size)])
            torch.manual_seed(mix_seed(c.seed, step, k, 0))
            loss = model(batch if getattr(model, 'whole_batch', False) else batch['x'],
                         generator).loss
            losses.append(loss.item())
            (loss/c.accumulate).backward()
        grads = [p.grad for p in named.values() if p.grad is not None]
        size = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        for g in grads: g *= min(1., c.clip/(size + 1e-6))
        optimizer.step()
    return losses


@every
def test_a_run_is_the_plain_loop(name, tmp_path):
    """In double precision, two passes a step, a clip that bites: the weights and the losses of a
    loop of twenty lines"""
    torch.manual_seed(0)
    model = MODELS[name]().double()
    torch.manual_seed(0)
    plain = MODELS[name]().double()
    c, data = config(accumulate=2, clip=.05, seed=5, lr=1e-2), Windows(8*STEPS, dtype=torch.double)
    train(model, data, Windows(4, dtype=torch.double), c, tmp_path/'run')
    losses = np.reshape(plain_loop(plain.train(), data, c), (STEPS, 2)).mean(1)
    np.testing.assert_allclose([row['loss'] for row in read_metrics(tmp_path/'run')], losses,
                               rtol=1e-5)
    for (n, a), b in zip(model.named_parameters(), plain.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=lambda m: f'{n}: {m}')
    start = MODELS[name]()
    assert max((a - b).abs().max() for a, b in zip(model.parameters(), start.parameters())) > 1e-2


# gradient, learning rate, temperature

@every
def test_the_gradient_is_clipped(name, tmp_path):
    "Its norm at the optimiser's step, beside the norm before that the log has"
    for clip in (1e-2, 1e9):
        torch.manual_seed(0)
        with Watch().hooked() as seen: go(MODELS[name](), tmp_path/str(clip), steps=3, clip=clip)
        logged = [row['grad_norm'] for row in read_metrics(tmp_path/str(clip))]
        assert len(seen) == len(logged) == 3 and min(logged) > 1e-2
        np.testing.assert_allclose([s['norm'] for s in seen], np.minimum(logged, clip), rtol=1e-3)


def temperature(model):
    return (model.encoder.quantizer.temperature.item()
            if hasattr(model.encoder, 'quantizer') else None)


@every
def test_learning_rate_and_temperature_along_a_run_and_its_resumption(name, tmp_path):
    "As the optimiser and the quantizer have them in each step, and as the log says"
    before, after = cut_and_resumed(MODELS[name], tmp_path/'run', temperature)
    # a checkpoint lies at step 4
    assert len(before) == 6 and len(after) == STEPS - 4
    rates = [3e-3*(1 + math.cos(math.pi*k/9))/2 for k in range(9)]
    # one step of warm-up, then half a cosine
    rates = [3e-3, *rates]
    for first, seen in ((0, before), (4, after)):
        for step, s in enumerate(seen, first):
            assert [g['lr'] for g in s['groups']] == pytest.approx(2*[rates[step]])
            assert ([g['betas'] for g in s['groups']] == 2*[(.9, .95)]
                    and [g['weight_decay'] for g in s['groups']] == [.1, 0.])
            if s['more']:
                assert s['more'] == pytest.approx(.5 + 1.5*(1 + math.cos(math.pi*step/STEPS))/2)
    rows = read_metrics(tmp_path/'run')
    assert [row['lr'] for row in rows] == pytest.approx(rates)
    if name == 'contrastive':
        assert ([row['gumbel_temperature'] for row in rows]
                == pytest.approx([s['more'] for s in before[:4] + after]))


def test_the_warm_up_is_a_straight_line(tmp_path):
    torch.manual_seed(0)
    with Watch().hooked() as seen: go(build(RECONSTRUCTION), tmp_path/'run', warmup=.4, lr=1.)
    assert [s['groups'][0]['lr'] for s in seen[:5]] == pytest.approx([.25, .5, .75, 1., 1.])
    assert all(a['groups'][0]['lr'] > b['groups'][0]['lr'] > 0 for a, b in zip(seen[4:], seen[5:]))


# weight decay

@every
def test_what_decays_and_what_does_not(name, tmp_path):
    """A loss without a slope: matrices shrink by lr × decay, everything else stays to the bit;
    nothing is forgotten"""
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        # zeros would not show it
        for p in model.parameters(): p.add_(.1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    flat = lambda *a: Step(sum(0.*p.sum() for p in model.parameters()), {})
    model.forward = flat
    go(model, tmp_path/'run', steps=1, lr=.1, weight_decay=.5)
    without = spared(model)
    assert (10 < len(without) < len(before) and any('norm' in n for n in without)
            and any('gates' in n for n in without))
    for n, p in model.named_parameters():
        if n in without: assert torch.equal(p, before[n]), n
        else: torch.testing.assert_close(p, before[n]*(1 - .1*.5), msg=lambda m: f'{n}: {m}')


@every
def test_every_parameter_is_in_one_group(name):
    "And a frozen one in none"
    for model in (MODELS[name](), MODELS[name]().requires_grad_(False)):
        next(model.parameters()).requires_grad_()
        both = [id(p) for g in parameter_groups(model, .1) for p in g['params']]
        assert (len(both) == len(set(both))
                and set(both) == {id(p) for p in model.parameters() if p.requires_grad})


@pytest.mark.parametrize('freeze', ['none', 'encoder', 'all', 'gradual'])
def test_frozen_parts_stay_through_a_run(freeze, tmp_path):
    "To the bit, decay and all; what is not frozen moves"
    torch.manual_seed(0)
    picker = Picker(build(CONTRASTIVE), freeze=freeze)
    start, moved = {k: v.clone() for k, v in picker.state_dict().items()}, []
    def note(optimizer):
        moved.append({k.split('.')[0] for k, v in picker.state_dict().items()
                      if not torch.equal(v, start[k])})
    with Watch(note).hooked(): go(picker, tmp_path/'run', steps=8, lr=1e-2, weight_decay=.5)
    note(None)
    whole, upper, head = {'encoder', 'backbone', 'head'}, {'backbone', 'head'}, {'head'}
    learns = {n.split('.')[0] for n, p in picker.named_parameters() if p.requires_grad}
    assert learns == {'encoder': upper, 'all': head}.get(freeze, whole) and moved[0] == set()
    assert (moved[1:]
            == {'none': [whole]*8, 'encoder': [upper]*8, 'all': [head]*8,
                'gradual': [head]*2 + [upper]*2 + [whole]*4}[freeze])


# what is random

class Ear:
    """Fingerprints of masks, negatives, Gumbel noise and dropout of each forward pass of a model,
    by their kind"""
    def __init__(self, model, monkeypatch):
        self.model, self.training, self.looking = model, [], []
        for module, name, kind in ((encoders, 'span_mask', 'mask'),
                                   (infonce, 'negatives', 'negatives'),
                                   (quantizer, 'gumbel_noise', 'noise')):
            monkeypatch.setattr(module, name, self.ear(getattr(module, name), kind))
        for m in model.modules():
            if isinstance(m, nn.Dropout):
                m.register_forward_hook(lambda m, a,
                                        out: self.hear('dropout', (out == 0) & (a[0] != 0)))
        model.register_forward_pre_hook(lambda m,
                                        a: (self.training
                                            if m.training else self.looking).append({}))

    def ear(self, function, kind):
        def listening(*args, **kwargs):
            result = function(*args, **kwargs)
            self.hear(kind, result)
            return result
        return listening

    def hear(self, kind, t):
        now = (self.training if self.model.training else self.looking)[-1]
        for row, part in enumerate(t):
            now.setdefault(kind, []).append(sha1(part.contiguous().numpy().tobytes()).hexdigest())


KINDS = {'contrastive': {'mask', 'negatives', 'noise', 'dropout'},
         'reconstruction': {'mask', 'dropout'}, 'picker': {'dropout'}, 'window model': {'dropout'}}


@pytest.mark.parametrize('name', KINDS)
def test_no_two_passes_draw_alike_and_a_resumption_draws_the_same(name, tmp_path, monkeypatch):
    """The same window over and over, weights that do not move: what differs is drawn. Masks,
    negatives, codes and dropout, from window to window, pass to pass, step to step"""
    given = dict(data=Windows(8*STEPS, alike=True), accumulate=2, lr=1e-12, weight_decay=0.,
                 validate_every=5)
    def run(folder, seed=0, **more):
        torch.manual_seed(0)
        model = MODELS[name]()
        with pytest.MonkeyPatch.context() as patch:
            ear = Ear(model, patch)
            if 'until' in more:
                with Watch(until=more.pop('until')).hooked(), pytest.raises(ZeroDivisionError):
                    go(model, folder, seed=seed, **given)
            else: go(model, folder, seed=seed, **given, **more)
        return ear
    whole = run(tmp_path/'whole')
    assert (len(whole.training) == 2*STEPS
            and all(set(heard) == KINDS[name] for heard in whole.training))
    for kind in KINDS[name]:
        prints = [tuple(heard[kind]) for heard in whole.training]
        assert len(set(prints)) == 2*STEPS, f'{kind}: two passes drew alike'
        assert all(len(set(p)) == len(p)
                   for p in prints), f'{kind}: two windows of a batch, or two layers, drew alike'
    cut = run(tmp_path/'cut', until=6)
    # what else happens in a process does not matter
    torch.rand(7)
    again = run(tmp_path/'cut', resume=True)
    assert cut.training == whole.training[:14] and again.training == whole.training[8:]
    other = run(tmp_path/'other', seed=1)
    assert not {tuple(h[k]) for h in other.training
                for k in h} & {tuple(h[k]) for h in whole.training for k in h}


@methods
def test_every_look_at_dev_hides_the_same_frames(name, tmp_path, monkeypatch):
    """Other ones in each batch; nothing drops out, no noise is on the codes; and looking changes
    nothing"""
    def run(folder, **given):
        torch.manual_seed(0)
        model = MODELS[name]()
        with pytest.MonkeyPatch.context() as patch:
            ear = Ear(model, patch)
            go(model, folder, validation_windows=8, **given)
        return ear, model
    ear, model = run(tmp_path/'often', validate_every=2)
    assert (len(ear.looking) == 5*2
            and all(set(heard) <= {'mask', 'negatives', 'dropout'} for heard in ear.looking))
    # nothing but the shapes of two kinds of layers
    for heard in ear.looking: assert len(set(heard.pop('dropout'))) <= 2
    assert ear.looking == 5*ear.looking[:2] and ear.looking[0] != ear.looking[1]
    other, _ = run(tmp_path/'other', seed=1)
    assert not {tuple(h['mask']) for h in other.looking} & {tuple(h['mask']) for h in ear.looking}
    _, seldom = run(tmp_path/'seldom', validate_every=100)
    for a, b in zip(model.parameters(), seldom.parameters()): assert torch.equal(a, b)


class OneRecord(Source):
    "A source with one record of one window: without augmentation every window is alike"
    name = 'one'
    def __len__(self): return 1
    def record(self, i):
        x = np.random.default_rng(0).standard_normal((1024, 3)).astype(np.float32)
        return Record(x, 400., 600., 'r', 4, 4)


def test_no_two_batches_are_augmented_alike_and_a_resumption_augments_the_same(tmp_path):
    "Also with workers: two processes cut and resume what the main process made in one go"
    noise = torch.randn(6, 1024, 3, generator=torch.Generator().manual_seed(0))
    def run(folder, augment=fine_augment(noise), until=None, workers=0, resume=False):
        torch.manual_seed(0)
        model, seen = Picker(build(CONTRASTIVE)), []
        model.register_forward_pre_hook(lambda m, a: seen.append(
            sha1(a[0]['x'].numpy().tobytes()).hexdigest()) if m.training else None)
        c = config(steps=6, batch_size=6, accumulate=2, workers=workers)
        call = lambda: train(model, Augmented(WindowDataset([OneRecord()], 72, window=1024),
                                              augment),
                             WindowDataset([OneRecord()], 4, window=1024), c, folder, resume=resume)
        with Watch(until=until).hooked():
            if until is None: call()
            else:
                with pytest.raises(ZeroDivisionError): call()
        return seen
    assert len(set(run(tmp_path/'none', None))) == 1
    whole = run(tmp_path/'whole')
    assert len(whole) == 12 and len(set(whole)) == 12
    for workers in (0, 2):
        assert run(tmp_path/f'cut {workers}', until=5, workers=workers) == whole[:12]
        assert run(tmp_path/f'cut {workers}', workers=workers, resume=True) == whole[8:]


def test_each_window_of_a_batch_is_augmented_by_itself(tmp_path):
    "And with all the settings of the recipe: two of six alike would be a wonder"
    seen = []
    model = Picker(build(CONTRASTIVE))
    model.register_forward_pre_hook(lambda m, a: seen.append(a[0]['x'].clone())
                                    if m.training else None)
    augment = fine_augment(torch.zeros(0, 1024, 3), Augmentation(rotate=1., flip=.5, shift=1.))
    train(model, Augmented(WindowDataset([OneRecord()], 18, window=1024), augment),
          WindowDataset([OneRecord()], 4, window=1024), config(steps=3, batch_size=6),
          tmp_path/'run')
    rows = [sha1(x.numpy().tobytes()).hexdigest() for batch in seen for x in batch]
    assert len(set(rows)) == 18


def test_a_run_takes_its_windows_in_order_from_the_first():
    "Each window once; a resumed run from where it stopped"
    c, alone = config(steps=3, accumulate=2), Ranks(torch.device('cpu'))
    assert (list(ResumableBatchSampler(c, alone))
            == [list(range(k, k + 4)) for k in range(0, 24, 4)]
            and len(ResumableBatchSampler(c, alone)) == 6)
    assert (list(ResumableBatchSampler(c, alone, 1)) == list(ResumableBatchSampler(c, alone))[2:]
            and len(ResumableBatchSampler(c, alone, 1)) == 4)


# dev and the best weights

def test_a_look_at_dev_is_the_mean_over_windows():
    "Also where the last batch is short, and in evaluation mode"
    class Mean(nn.Module):
        def forward(self, x, generator):
            assert not self.training
            return Step(x.mean(), {'largest': x.amax()})
    model, x = Mean().train(), torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(0))
    said = validation_metrics(model, [{'x': x[:3]}, {'x': x[3:6]}, {'x': x[6:]}],
                              torch.device('cpu'))
    assert said['loss'] == pytest.approx(x.mean().item()) and model.training
    assert said['largest'] == pytest.approx((3*x[:3].max() + 3*x[3:6].max() + x[6].max()).item()/7)


@pytest.mark.parametrize('losses, best', [([5., 3., 4., 2.5, 3.], 8), ([2., 3., 4., 5., 6.], 2), (
    [5., 4., 3., 2., 1.], 10), ([5., math.nan, 3., math.inf, 4.], 6), ([3., 3., 3., 3., 3.], 2)])
@pytest.mark.parametrize('cut', [None, 7])
def test_best_holds_the_weights_with_the_lowest_dev_loss(losses, best, cut, tmp_path, monkeypatch):
    "Of the log, ties to the first; also where the run was cut off and resumed"
    weights = {}
    def looked(model, batches, device, seed):
        step = int(next(iter(optimizers[-1].state.values()))['step'])
        weights[step] = {k: v.clone() for k, v in model.state_dict().items()}
        return {'loss': losses[step//2 - 1]}
    monkeypatch.setattr(trainer, 'validation_metrics', looked)
    optimizers = []
    note = lambda optimizer: optimizers.append(optimizer)
    with Watch(note, until=cut).hooked():
        if cut:
            with pytest.raises(ZeroDivisionError):
                go(build(RECONSTRUCTION), tmp_path/'run', validate_every=2)
        else: go(build(RECONSTRUCTION), tmp_path/'run', validate_every=2)
    if cut:
        with Watch(note).hooked():
            go(build(RECONSTRUCTION), tmp_path/'run', resume=True, validate_every=2)
    rows = {row['step']: row['dev_loss'] for row in read_metrics(tmp_path/'run')
            if 'dev_loss' in row}
    assert rows == {2*k: v if math.isfinite(v) else None for k, v in enumerate(losses, 1)}
    kept = from_pretrained(tmp_path/'run/best')
    assert all(torch.equal(v, weights[best][k]) for k, v in kept.state_dict().items())
    about = json.loads((tmp_path/'run/best/config.json').read_text(encoding='utf-8'))
    assert (about['step'], about['dev_loss']) == (best, min(v for v in losses if math.isfinite(v)))
    assert (read_checkpoint(checkpoint_files(tmp_path/'run')[0]).state['progress']['best']
            == about['dev_loss'])


def test_measures_carry_no_gradient():
    "They are logged, and a graph that hangs on one would be kept"
    x = torch.randn(2, 8, 4, requires_grad=True)
    for measure in (feature_variance, effective_rank): assert not measure(x).requires_grad
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[:, 3:5] = True
    for baseline in (zero_predictor, interpolation_predictor):
        assert not baseline(x.detach(), mask).requires_grad


@methods
def test_the_best_weights_have_the_loss_they_are_said_to_have(name, tmp_path):
    "Loaded, and looked at once more on the same windows"
    torch.manual_seed(0)
    go(MODELS[name](), tmp_path/'run', validate_every=3, seed=2)
    rows = [row for row in read_metrics(tmp_path/'run') if 'dev_loss' in row]
    lowest = min(rows, key=lambda row: row['dev_loss'])
    model = from_pretrained(tmp_path/'run/best')
    model.set_progress(lowest['step'] - 1, STEPS)
    said = validation_metrics(model, [default_collate([Windows(4)[n] for n in range(4)])],
                              torch.device('cpu'), seed=2)
    assert said['loss'] == pytest.approx(lowest['dev_loss'], rel=1e-5)


# what is not finite

def test_a_gradient_that_is_not_finite_is_withheld_although_the_loss_is(tmp_path):
    class Edge(ReconstructionPretraining):
        def forward(self, x, generator=None):
            loss, metrics = super().forward(x, generator)
            bias = self.head[1].bias
            # 0, with the slope 0 · ∞
            return Step(loss + (0.*bias).sqrt().sum() if self.training else loss, metrics)
    torch.manual_seed(0)
    model = Edge(RECONSTRUCTION)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(TrainingError, match='the norm of its gradient nan at step 1'):
        go(model, tmp_path/'run')
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# what the commands hand to the trainer

class Stop(Exception): pass


@pytest.fixture
def told(monkeypatch):
    """The `TrainConfig` of each call of `train`, which does nothing; model and windows in
    `told.given`"""
    class Told(list): pass
    got = Told()
    got.given = []
    def instead(model, data, dev, c, folder, extra=None, resume=False, ranks=None):
        data, augment = data if isinstance(data, Augmented) else (data, None)
        got.append(c)
        got.given.append({'model': model, 'data': data, 'dev': dev, 'augment': augment})
        raise Stop
    for module in (pretraining, finetuning): monkeypatch.setattr(module, 'train', instead)
    return got


PRETRAINING = {f'{method}-{size}': own for method in ('contrastive', 'spectrum', 'joint')
               for size, own in (('tiny', (300, 8, 3e-3, .1)), ('small', (6000, 256, 3e-3, .1)),
                                 ('base', (100_000, 256, 1e-3, .1)))}
PRETRAINING |= {'reconstruction-tiny': (300, 8, 3e-3, .01),
                'reconstruction-small': (12_000, 128, 2e-3, .01),
                'reconstruction-base': (100_000, 256, 2e-3, .01)}
COMMON = dict(accumulate=1, layer_decay=1., average=0., betas=(.9, .95), warmup=.1, clip=1., seed=0,
              skip_nonfinite=0, on_write_error='continue', tensorboard=False)
LOOKS = dict(log_every=10, validate_every=100, validation_windows=64, checkpoint_every=100, keep=3)


def says(c, steps, batch_size, lr, weight_decay):
    assert (c.steps, c.batch_size, c.lr, c.weight_decay) == (steps, batch_size, lr, weight_decay)
    assert {k: getattr(c, k) for k in COMMON} == COMMON


@pytest.mark.parametrize('preset', PRESETS)
def test_pretraining_follows_its_preset(preset, told, tmp_path):
    with pytest.raises(Stop): pretraining.pretrain(preset, device='cpu', out=tmp_path/'run')
    says(told[0], *PRETRAINING[preset])
    assert {k: getattr(told[0], k) for k in LOOKS} == LOOKS
    with pytest.raises(Stop):
        pretraining.pretrain(preset, device='cpu', out=tmp_path/'run', steps=7, batch_size=6, lr=.5,
                             weight_decay=.25, seed=3, accumulate=2)
    c = told[1]
    assert ((c.steps, c.batch_size, c.lr, c.weight_decay, c.seed, c.accumulate)
            == (7, 6, .5, .25, 3, 2))


FINE = {'contrastive-tiny': (1e-3, .1), 'reconstruction-tiny': (2e-4, .005),
        'spectrum-tiny': (1e-3, .1)}


@pytest.mark.parametrize('preset', FINE)
def test_fine_tuning_follows_its_recipe(preset, told, quakes_folder, tmp_path):
    data = [str(quakes_folder)]
    with pytest.raises(Stop):
        finetuning.finetune('random', preset, data, device='cpu', augment='none',
                            out=tmp_path/'run')
    with pytest.raises(Stop):
        finetuning.finetune('random', preset, data, 'trace_category', device='cpu',
                            out=tmp_path/'run')
    says(told[0], 2000, 32, *FINE[preset])
    says(told[1], 500, 32, *FINE[preset])
    given = dict(steps=7, batch_size=6, lr=.5, weight_decay=.25, seed=3)
    with pytest.raises(Stop):
        finetuning.finetune('random', preset, data, device='cpu', augment='none',
                            out=tmp_path/'run', **given)
    with pytest.raises(Stop):
        finetuning.finetune('random', preset, data, 'trace_category', device='cpu',
                            out=tmp_path/'run', **given)
    for c in told[2:]: assert {k: getattr(c, k) for k in given} == given


def test_a_study_trains_every_method_by_its_own_recipe():
    h = StudyConfig(('d',), steps=700, batch_size=16, validation_windows=40, device='cpu')
    nets = {'contrastive': Picker(build(CONTRASTIVE)),
            'reconstruction': Picker(build(RECONSTRUCTION)), 'peer': fresh_baseline('PhaseNet')}
    for kind, rates in (('contrastive', (1e-3, .1)), ('reconstruction', (2e-4, .005)),
                        ('peer', (1e-3, 0.))):
        c = trial_recipe(nets[kind], Trial(Candidate('m', 'random', 'x'), .5, 0), h)
        says(c, 700, 16, *rates)
        assert (c.validate_every, c.validation_windows) == (70, 40)
        assert (trial_recipe(nets[kind], Trial(Candidate('m', 'random', 'x', lr=.2), .5, 4), h).lr
                == .2)
        assert (trial_recipe(nets[kind], Trial(Candidate('m', 'random', 'x', lr=.2), .5, 4), h).seed
                == 4)


TWO = dict(data_weights='3,1', seed=3, steps=7, batch_size=6, validation_windows=5, device='cpu')


@pytest.mark.parametrize('command', ['pretrain', 'finetune', 'finetune_window'])
def test_seed_and_weights_reach_the_windows_and_the_model(command, told, tmp_path, write_dataset,
                                                          quake_records):
    """As many windows as the run needs, by the shares that were asked for; a seed for them, for dev
    and for the fresh weights"""
    two = [str(write_dataset(tmp_path/name, quake_records(24))) for name in 'ab']
    run = {'pretrain': lambda **more: pretraining.pretrain('contrastive-tiny', two,
                                                           out=tmp_path/'run', **more),
           'finetune': lambda **more: finetuning.finetune('random', 'contrastive-tiny', two,
                                                          augment='none', out=tmp_path/'run',
                                                          **more),
           'finetune_window': lambda **more: finetuning.finetune(
               'random', 'contrastive-tiny', two, 'trace_category', out=tmp_path/'run',
               **more)}[command]
    for more in (TWO, TWO, {**TWO, 'seed': 4}):
        with pytest.raises(Stop): run(**more)
    first, again, other = told.given
    for given, seed in ((first, 3), (other, 4)):
        assert ((len(given['data']), given['data'].seed, len(given['dev']), given['dev'].seed)
                == (42, seed, 5, seed))
        np.testing.assert_allclose(given['data'].share, [.75, .25])
        assert given['augment'] is None
    weights = [torch.cat([p.detach().flatten() for p in given['model'].parameters()])
               for given in told.given]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_fine_tuning_augments_unless_told_not_to(told, quakes_folder, tmp_path):
    "And its head has 32 channels and a dropout of 0.2 after each convolution"
    with pytest.raises(Stop):
        finetuning.finetune('random', 'contrastive-tiny', [str(quakes_folder)], device='cpu',
                            out=tmp_path/'run')
    assert told.given[0]['augment'] is not None
    picker = told.given[0]['model']
    assert (picker.options == {'width': 64, 'dropout': .2, 'raw': True, 'at': 'frames'}
            and picker.freeze == 'none')
    assert [m.p for m in picker.head.modules() if isinstance(m, nn.Dropout)] == [.2, .2]


SHARES = {'rotate': .5, 'flip': .5, 'flip_one': 1 - .95**3, 'shift': .1, 'noise': .5, 'drop': .1,
          'gap': .05, 'stack': .1}


def augmented(count=2000, **settings):
    """Windows of noise and what an augmentation with these settings alone makes of them; noise of
    the bank is as strong"""
    draw = torch.Generator().manual_seed(0)
    batch = {'x': torch.randn(count, 256, 3, generator=draw),
             'valid': torch.tensor([[0, 256]]).repeat(count, 1),
             **{f'{k}_onset': torch.full((count,), t) for k, t in (('p', 100.), ('s', 200.))},
             **{f'{k}_status': torch.full((count,), 4, dtype=torch.int8) for k in 'ps'}}
    off = {name: 0. for name in SHARES}
    return batch, fine_augment(torch.randn(5, 256, 3, generator=draw),
                               Augmentation(**{**off, **settings}))(batch, draw)


@pytest.mark.parametrize('name', SHARES)
def test_how_often_a_picker_s_windows_are_changed(name):
    "One setting at a time, by the windows that are not as before"
    batch, new = augmented(**{name: getattr(Augmentation(), name)})
    changed = (new['x'] != batch['x']).flatten(1).any(1)
    assert (new['x'].shape == batch['x'].shape
            and changed.float().mean().item() == pytest.approx(SHARES[name], abs=.04))


def test_how_much_a_picker_s_windows_are_changed():
    "Up to 500 samples later or earlier, noise of 0 to 20 dB, a gap of up to a tenth of the window"
    by = augmented(shift=1.)[1]['valid'].float()
    assert ((by[:, 0] == 256).float().mean().item() + (by[:, 1] == 0).float().mean().item()
            == pytest.approx(1 - 511/1001, abs=.04))
    batch, new = augmented(noise=1.)
    db = -20*((new['x'] - batch['x']).std((1, 2))/batch['x'].std((1, 2))).log10()
    assert (-.5 < db.min() < 1 and 19 < db.max() < 20.5
            and db.mean().item() == pytest.approx(10, abs=.5))
    gap = (augmented(gap=1.)[1]['x'] == 0).all(2).float().mean(1)
    assert .09 < gap.max() <= .105 and gap.mean().item() == pytest.approx(.05, abs=.005)


def test_a_study_mixes_a_quarter_of_synthetic_events_and_augments(quakes_folder):
    "Of its training windows, of none of its dev windows; whoever turns them off has neither"
    trial, few = Trial(Candidate('m', 'peer', 'PhaseNet'), 1.,
                       3), dict(steps=4, batch_size=8, validation_windows=6, device='cpu')
    def windows(**given):
        common = StudyConfig((str(quakes_folder),), **few, **given)
        return trial_windows(trial, trial_recipe(fresh_baseline('PhaseNet'), trial, common), common)
    usual, dev, change, records = windows()
    np.testing.assert_allclose(usual.share, [.75, .25])
    assert ((usual.sources[1].name, len(usual), usual.seed) == ('synthetic', 32, 3)
            and change is not None)
    assert (len(dev.sources), len(dev), dev.seed, records) == (1, 6, 3, [24])
    plain, _, change, _ = windows(synthetic=0., augment='none')
    assert len(plain.sources) == 1 and change is None
    usual = StudyConfig(('d',))
    assert (usual.steps, usual.batch_size, usual.threshold, usual.augment) == (1000, 32, .3, 'full')
