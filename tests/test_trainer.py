"The loop as a whole: alarms on rigged collapses, reproducibility, accumulation, runs that fail"
import json
import math

import pytest
import torch

from seismodel.training.checkpoints import checkpoint_files, read_checkpoint
from seismodel.training.distributed import Ranks
from seismodel.core import TrainingError, UserError, pick_device
from seismodel.models.encoders import BidirAutoregConfig, ConvDownConfig
from seismodel.training.monitoring import alarms
from seismodel.models.masked_mse import feature_variance, masked_mse
from seismodel.models.pretraining import (ContrastiveConfig, ReconstructionConfig,
                                          ReconstructionPretraining, Step, build,
                                   from_pretrained)
from seismodel.training.config import TrainConfig
from seismodel.training.batches import sequential_batches, make_dataloader
from seismodel.training.schedule import lr_at, parameter_groups, seed_step
from seismodel.training.runlog import CLOCK, read_metrics
from seismodel.training.trainer import Augmented, TrainingRun, validation_metrics, train, train_step
from seismodel.data.windows import WindowDataset
from seismodel.data.sources import SyntheticSource, open_source

CONTRASTIVE = ContrastiveConfig(ConvDownConfig(conv_features=16, out_features=16, codevector_dim=16,
                                               target_features=16, scale_logits=False),
                                blocks=1, pooling=(4,), negatives=20)
RECONSTRUCTION = ReconstructionConfig(BidirAutoregConfig(d_model=16), blocks=1, ff=2.)


def windows(n, split='train', window=1024):
    return WindowDataset([SyntheticSource(split=split)], n, window=window)


def run(model, folder, **settings):
    c = TrainConfig(**{**dict(steps=4, batch_size=4, lr=3e-3, device='cpu', workers=0, log_every=1,
                              validation_windows=4, validate_every=100), **settings})
    return train(model, windows(c.steps*c.accumulate*c.batch_size),
                 windows(c.validation_windows, 'dev'), c, folder)


class AttachedTokens(ReconstructionPretraining):
    """The mistake that the package does not make: the target is the encoder's own output, with its
    gradient"""
    def forward(self, x, generator=None):
        e = self.encoder(x, generator=generator)
        loss = masked_mse(self.head(self.backbone(e.features)), e.tokens, e.mask)
        return Step(loss, {'mse': loss.detach(), 'feature_variance': feature_variance(e.tokens)})


def test_attached_tokens_raise_the_alarm_within_200_steps(tmp_path):
    torch.manual_seed(0)
    rows = read_metrics(run(AttachedTokens(RECONSTRUCTION), tmp_path/'run', steps=200,
                            log_every=10))
    assert any('dead features' in a for r in rows for a in r['alarms'])
    assert rows[-1]['loss'] < .1*rows[0]['loss']   # and the loss looks splendid


def test_a_learning_rate_of_a_hundred_times_raises_the_alarm_within_100_steps(tmp_path):
    torch.manual_seed(0)
    try: run(build(CONTRASTIVE), tmp_path/'run', steps=100, lr=.3, log_every=10)
    except TrainingError: return   # the loss itself blew up: as loud an alarm as any
    assert any(r['alarms'] for r in read_metrics(tmp_path/'run'))


@pytest.mark.parametrize('config', [CONTRASTIVE, RECONSTRUCTION], ids=lambda c: c.method)
def test_a_healthy_run_raises_none(config, tmp_path):
    torch.manual_seed(0)
    rows = read_metrics(run(build(config), tmp_path/'run', steps=60, log_every=10))
    assert [a for r in rows for a in r['alarms']] == []
    assert rows[-1]['loss'] < rows[0]['loss']


@pytest.mark.parametrize('config', [CONTRASTIVE, RECONSTRUCTION], ids=lambda c: c.method)
def test_the_same_seed_gives_the_same_run(config, tmp_path):
    def once(folder, workers):
        torch.manual_seed(1)
        rows = read_metrics(run(build(config), folder, workers=workers))
        weights = from_pretrained(folder).state_dict()
        return [{k: v for k, v in r.items() if k not in CLOCK} for r in rows], weights
    # the number of workers does not matter
    (a, wa), (b, wb) = once(tmp_path/'a', 0), once(tmp_path/'b', 2)
    assert a == b
    assert all(torch.equal(wa[k], wb[k]) for k in wa)


def test_accumulation_averages_the_gradients():
    "Two half batches make the update of their mean gradient"
    c, device = TrainConfig(steps=10, batch_size=2, accumulate=2, clip=1e9), torch.device('cpu')
    torch.manual_seed(0)
    model = build(RECONSTRUCTION)
    batches = list(make_dataloader(windows(4), sequential_batches(range(4), 2), c, device))
    generator, gradients = torch.Generator(), []
    seed_step(generator, 0, 0)
    for b in batches:
        model.zero_grad()
        model(b['x'], generator).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    expected = math.sqrt(sum(((a + b)/2).square().sum().item() for a, b in zip(*gradients)))
    model.zero_grad()
    optimizer = torch.optim.AdamW(parameter_groups(model, .1), fused=True)
    out, _, _ = train_step(TrainingRun(model, c, None, Ranks(device), optimizer=optimizer),
                           iter(batches), 0)
    assert out['grad_norm'].item() == pytest.approx(expected, rel=1e-4)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_weights(tmp_path):
    class Broken(ReconstructionPretraining):
        def forward(self, x, generator=None):
            loss, metrics = super().forward(x, generator)
            return Step(loss*float('nan'), metrics)
    torch.manual_seed(0)
    model = Broken(RECONSTRUCTION)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(TrainingError, match='loss is nan .* at step 1, with windows 0 to 3'):
        run(model, tmp_path/'run')
    after = from_pretrained(tmp_path/'run').state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before)


def test_a_run_is_never_overwritten(tmp_path):
    run(build(RECONSTRUCTION), tmp_path/'run', steps=1)
    kept = (tmp_path/'run/model.safetensors').read_bytes()
    with pytest.raises(UserError, match='holds a run already'):
        run(build(RECONSTRUCTION), tmp_path/'run', steps=1)
    assert (tmp_path/'run/model.safetensors').read_bytes() == kept


def test_a_run_folder_holds_what_the_readme_says(tmp_path):
    folder = run(build(CONTRASTIVE), tmp_path/'run', steps=3, tensorboard=True)
    assert ({p.name for p in folder.iterdir()} - {'.lock'}
            == {'config.json', 'metrics.jsonl', 'model.safetensors', 'checkpoints', 'figures',
                'tensorboard', 'best', 'bad_traces.json'})
    row = json.loads((folder/'metrics.jsonl').read_text(encoding='utf-8').split('\n')[0])
    assert {'step', 'loss', 'contrastive', 'diversity', 'lr', 'grad_norm'} <= row.keys()
    checkpoint = read_checkpoint(checkpoint_files(folder)[0])
    assert (checkpoint.state['step'] == 3
            and any(name.endswith('exp_avg_sq') for name in checkpoint.tensors))
    assert not list(folder.rglob('*.part'))


def test_what_a_run_was_given_stays_in_its_settings(tmp_path):
    "Beside model and training, at the start, with the best weights, and after each checkpoint"
    more = {'data': ['a'], 'zone': {'b': 1.5}}
    c = TrainConfig(steps=3, batch_size=4, device='cpu', workers=0, validate_every=1,
                    validation_windows=4)
    train(build(RECONSTRUCTION), windows(12), windows(4, 'dev'), c, tmp_path/'run', more)
    for folder in ('run', 'run/best'):
        said = json.loads((tmp_path/folder/'config.json').read_text(encoding='utf-8'))
        assert ({name: said[name] for name in more} == more and said['train']['steps'] == 3
                and said['model']['method'] == 'reconstruction')


def test_tensorboard_gets_scalars_codes_and_a_window(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    folder = run(build(CONTRASTIVE), tmp_path/'run', steps=2, validate_every=2, tensorboard=True)
    events = EventAccumulator(str(folder/'tensorboard')).Reload().Tags()
    assert {'loss', 'dev_loss', 'lr'} <= set(events['scalars'])
    assert (set(events['histograms']) == {'codes/group 1', 'codes/group 2'}
            and set(events['images']) == {'window', 'codes'})


def test_evaluation_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model, c = build(CONTRASTIVE), TrainConfig(batch_size=2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first = validation_metrics(model, make_dataloader(windows(4), sequential_batches(range(4), 2),
                                                      c, torch.device('cpu')), torch.device('cpu'))
    assert (first
            == validation_metrics(model, make_dataloader(
        windows(4), sequential_batches(range(4), 2), c, torch.device('cpu')), torch.device('cpu')))
    assert model.training and all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_lr_never_leaves_its_bounds():
    for steps in (1, 2, 3, 10, 997):
        for warmup in (0., .1, 1.):
            c = TrainConfig(steps=steps, warmup=warmup, lr=2.)
            rates = [lr_at(s, c) for s in range(steps)]
            assert all(0 < r <= 2. for r in rates), (steps, warmup)


def test_each_alarm_alone():
    good = dict(code_perplexity=300., collided=.01, feature_variance=.9, accuracy=.3)
    for change, word in ((dict(code_perplexity=2.), 'codebook'), (dict(collided=.6), 'colliding'),
                         (dict(feature_variance=1e-4), 'dead'), (dict(accuracy=.005), 'chance')):
        found = alarms({**good, **change}, good, .9)
        assert len(found) == 1 and word in found[0]


def test_it_trains_on_real_data_where_there_is_some(real_data, quakes_folder, tmp_path):
    for k, folder in enumerate([quakes_folder, *real_data]):
        torch.manual_seed(0)
        c = TrainConfig(steps=2, batch_size=4, device='cpu', workers=0, log_every=1,
                        validation_windows=4)
        rows = read_metrics(train(build(RECONSTRUCTION), WindowDataset([open_source(str(
            folder))], 8), WindowDataset([open_source(str(folder), 'dev')], 4), c, tmp_path/str(k)))
        assert all(math.isfinite(r['loss']) for r in rows)


def fading(batch, generator):
    "An augmentation: each window dies away at a pace of its own"
    pace, t = torch.rand(len(batch['x']),
                         generator=generator), torch.linspace(0, 1, batch['x'].shape[1])
    return {**batch, 'x': batch['x']*torch.exp(-3*pace[:, None]*t)[..., None]}


@pytest.mark.parametrize('workers', [0, 1])
def test_an_augmented_run_resumes_to_the_bit(workers, tmp_path, monkeypatch):
    "Batches are made ahead, and what was ahead when the run died is made again; processes or not"
    import seismodel.training.trainer as trainer
    c = TrainConfig(steps=6, batch_size=4, accumulate=2, lr=3e-3, device='cpu', workers=workers,
                    log_every=1, validation_windows=4, checkpoint_every=2)
    monkeypatch.setattr(trainer, 'draw_run', lambda *a: None)
    def go(folder, resume=False):
        torch.manual_seed(0)
        return train(build(CONTRASTIVE), Augmented(windows(48), fading), windows(4, 'dev'), c,
                     folder, resume=resume)
    real, calls = trainer.train_step, []
    def cut_off(*a, **k):
        if len(calls) == 5: raise ZeroDivisionError
        calls.append(1)
        return real(*a, **k)
    monkeypatch.setattr(trainer, 'train_step', cut_off)
    with pytest.raises(ZeroDivisionError): go(tmp_path/'cut')
    monkeypatch.setattr(trainer, 'train_step', real)
    go(tmp_path/'cut', resume=True), go(tmp_path/'whole')
    a, b = (read_checkpoint(checkpoint_files(tmp_path/name)[0]) for name in ('cut', 'whole'))
    assert (a.state['progress'] == b.state['progress']
            and all(torch.equal(t, b.tensors[n]) for n, t in a.tensors.items()))
    rows = [[{k: v for k, v in r.items() if k not in CLOCK} for r in read_metrics(tmp_path/name)]
            for name in ('cut', 'whole')]
    assert rows[0] == rows[1]


def test_an_augmentation_that_fails_ends_the_run_with_its_error(tmp_path):
    def fails(batch, generator): raise ZeroDivisionError('in the augmentation')
    with pytest.raises(ZeroDivisionError, match='in the augmentation'):
        train(build(CONTRASTIVE), Augmented(windows(4), fails), windows(4, 'dev'),
              TrainConfig(steps=1, batch_size=4, device='cpu'), tmp_path/'run')
    with pytest.raises(UserError, match='not a list; train without'):
        train(build(CONTRASTIVE), Augmented(list(windows(4)), fading), windows(4, 'dev'),
              TrainConfig(steps=1, batch_size=4, device='cpu'), tmp_path/'other')


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(UserError, match="'abacus' is not a device"): pick_device('abacus')
    with pytest.raises(UserError, match='cuda:99'): pick_device('cuda:99')


def test_a_moving_average_is_what_is_saved_and_survives_resuming(tmp_path):
    """The checkpoint holds weights and averages, the model's folder the averages; resumed, both go
    on"""
    def once(folder, config):
        torch.manual_seed(0)
        return run(build(config), folder, steps=4, average=.5, checkpoint_every=2, validate_every=2)
    folder = once(tmp_path/'run', RECONSTRUCTION)
    saved, last = from_pretrained(folder).state_dict(), read_checkpoint(
        checkpoint_files(folder)[0]).tensors
    name = 'head.1.weight'
    assert torch.equal(saved[name], last[f'optimizer.{name}.average'])
    assert not torch.equal(saved[name], last[f'model.{name}'])
    torch.manual_seed(0)
    plain = read_checkpoint(checkpoint_files(run(build(RECONSTRUCTION), tmp_path/'plain',
                                                 steps=4))[0]).tensors
    # the average disturbs nothing
    assert torch.equal(plain[f'model.{name}'], last[f'model.{name}'])
    # as if killed after step 2
    checkpoint_files(folder)[0].unlink()
    c = TrainConfig(steps=4, batch_size=4, lr=3e-3, device='cpu', workers=0, log_every=1,
                    validation_windows=4, validate_every=2, checkpoint_every=2, average=.5)
    train(build(RECONSTRUCTION), windows(16), windows(4, 'dev'), c, folder, resume=True)
    again = from_pretrained(folder).state_dict()
    assert all(torch.equal(again[k], saved[k]) for k in saved)


@pytest.mark.parametrize('config', [CONTRASTIVE, RECONSTRUCTION], ids=lambda c: c.method)
def test_layer_decay_slows_the_first_stages(config):
    torch.manual_seed(0)
    model = build(config)
    groups = parameter_groups(model, .1, .5)
    scale = {p: g['scale'] for g in groups for p in g['params']}
    usual = {p: g['weight_decay'] for g in parameter_groups(model, .1) for p in g['params']}
    assert {p: g['weight_decay'] for g in groups for p in g['params']} == usual
    stages = model.backbone.stages()
    assert {scale[p] for p in model.head.parameters()} == {1.}
    assert {scale[p] for p in model.encoder.parameters()} == {.5**(len(stages) + 1)}
    for k, stage in enumerate(reversed(stages), 1):
        assert {scale[p] for m in stage for p in m.parameters()} == {.5**k}


def test_a_run_of_version_0_1_goes_on(tmp_path):
    "Its settings lack the fields that came later"
    from seismodel.training.checkpoints import write_checkpoint
    torch.manual_seed(0)
    folder = run(build(RECONSTRUCTION), tmp_path/'run', steps=4, checkpoint_every=2)
    whole = (folder/'model.safetensors').read_bytes()
    newest, first = checkpoint_files(folder)
    newest.unlink()
    path, tensors, state, *_ = read_checkpoint(first)
    for field in ('layer_decay', 'average'): del state['settings']['train'][field]
    del state['settings']['model']['encoder']['activation']
    write_checkpoint(folder, tensors, state)
    c = TrainConfig(steps=4, batch_size=4, lr=3e-3, device='cpu', workers=0, log_every=1,
                    validation_windows=4, validate_every=100, checkpoint_every=2)
    train(build(RECONSTRUCTION), windows(16), windows(4, 'dev'), c, folder, resume=True)
    assert (folder/'model.safetensors').read_bytes() == whole


@pytest.mark.parametrize('error',
                         [ConnectionResetError(104, 'Connection reset by peer'), EOFError()])
def test_a_worker_lost_while_it_hands_a_batch_over_is_said(error, tmp_path, monkeypatch):
    "What the socket between the processes says then is no fault of a file"
    right = WindowDataset.batch
    def lost(self, *args):
        # the dev windows, which the process itself reads
        if len(self) == 4: return right(self, *args)
        raise error
    monkeypatch.setattr(WindowDataset, 'batch', lost)
    with pytest.raises(TrainingError, match='prepares windows was lost'):
        run(build(RECONSTRUCTION), tmp_path/'run')
