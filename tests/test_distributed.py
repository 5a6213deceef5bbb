"""One rank against two, as torchrun starts them on CPUs: gradients, whole runs, resuming on another
number, signals"""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend

from seismodel.training.checkpoints import checkpoint_files, read_checkpoint
from seismodel.training.distributed import Ranks
from seismodel.models.encoders import BidirAutoregConfig, ConvDownConfig
from seismodel.models.pretraining import ContrastiveConfig, ReconstructionConfig, no_reduce, build
from seismodel.training.runlog import read_metrics

root = Path(__file__).resolve().parents[1]
RUN = ('--window 512 --batch-size 4 --log-every 1 --validate-every 6 --validation-windows 4 '
       '--checkpoint-every 6 --device cpu --workers 0 --steps').split()
needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(),
                                reason='PyTorch was built without Gloo')


def start(ranks, *words, cwd):
    "A process that runs this Python with `words`, or torchrun over so many of them"
    engine = ([]
              if ranks == 1 else ['-m', 'torch.distributed.run', '--nproc-per-node', str(ranks),
                                  '--master-port', str(29500 + os.getpid() % 1000)])
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg', 'CUDA_VISIBLE_DEVICES': '',
           'PYTHONPATH': str(root)}
    return subprocess.Popen([sys.executable, *engine, *map(str, words)], cwd=cwd, env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def pretrain(ranks, *words, cwd):
    process = start(ranks, '-m', 'seismodel', 'pretrain', *words, cwd=cwd)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    return said


def largest_difference(a, b, name='loss'):
    left, right = ([r[name] for r in read_metrics(run)] for run in (a, b))
    assert len(left) == len(right)
    return max(abs(x - y) for x, y in zip(left, right))


def first_difference(a, b): return abs(read_metrics(a)[0]['loss'] - read_metrics(b)[0]['loss'])


MODELS = {'contrastive': ContrastiveConfig(ConvDownConfig(conv_features=16, out_features=16,
                                                          codevector_dim=16, target_features=16,
                                                          mask_mode='wav2vec2'), blocks=1,
                                           pooling=(4,)),
          'reconstruction': ReconstructionConfig(
    BidirAutoregConfig(d_model=16, mask_mode='wav2vec2'), blocks=1, ff=2.)}


def gradients(ranks):
    """Loss, its measures and its gradient for six windows, as this process and its peers find them
    together; masks of different sizes"""
    found = {}
    for name, config in MODELS.items():
        torch.manual_seed(0)
        model = build(config).double().train()
        x = torch.randn(6, 260, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        model.average, model.draws = ranks.average, ranks.draws
        loss, measures = model(x.unflatten(0, (ranks.world, -1))[ranks.rank],
                               torch.Generator().manual_seed(2))
        loss.backward()
        ranks.average_gradients(model)
        found[name] = {**{n: p.grad for n, p in model.named_parameters()},
                       'loss': ranks.average(loss.detach()),
                       **{n: ranks.average(m.double()) for n, m in measures.items()
                          if 'variance' not in n and n != 'masked'}}
    return found


def test_a_compiled_block_stays_whole_while_a_rank_draws():
    """What the whole batch's draws catch must not reach the backbone: every function that is caught
    there breaks a graph"""
    seen = CompileCounterWithBackend('eager')
    model = build(MODELS['reconstruction']).train()
    model.draws, x = Ranks(torch.device('cpu'), 0, 2).draws, torch.randn(2, 260, 3)
    torch.compiler.reset()
    for block in model.backbone.blocks: block.compile(dynamic=False, backend=seen)
    model(x, torch.Generator().manual_seed(2))
    whole = seen.frame_count
    with Ranks(torch.device('cpu'), 0, 2).draws(): model(x, torch.Generator().manual_seed(2))
    assert whole == 1 and seen.frame_count > 2*whole
    torch.compiler.reset()


def scattered(ranks):
    "Weights and buffers that differ from rank to rank, after `same_weights`"
    torch.manual_seed(ranks.rank)
    layer = torch.nn.BatchNorm1d(3)
    torch.nn.init.normal_(layer.weight)
    layer.running_var.fill_(ranks.rank)
    ranks.same_weights(layer)
    return layer.state_dict()


@needs_gloo
def test_losses_and_gradients_of_two_ranks_are_those_of_one(tmp_path):
    code = (f"import sys, torch; sys.path.insert(0, {str(root/'tests')!r}); from test_distributed "
            f"import gradients, scattered\n"
            "from seismodel.training.distributed import join_ranks\nwith join_ranks('cpu') as "
            "r:\n    found = gradients(r)\n"
            "    if r.rank == 0: torch.save(found, 'found.pt')\n    torch.save(scattered(r), "
            "f'{r.rank}.pt')")
    (tmp_path/'work.py').write_text(code, encoding='utf-8')
    process = start(2, 'work.py', cwd=tmp_path)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    two, one = torch.load(tmp_path/'found.pt'), gradients(Ranks(torch.device('cpu')))
    for method in MODELS:
        assert two[method].keys() == one[method].keys()
        for name, value in one[method].items():
            torch.testing.assert_close(two[method][name], value, rtol=1e-6, atol=1e-8,
                                       msg=lambda m: f'{method} {name}: {m}')
    first, second = (torch.load(tmp_path/f'{rank}.pt') for rank in range(2))
    assert (first['running_var'].tolist() == [0., 0., 0.]
            and all(torch.equal(t, second[name]) for name, t in first.items()))


def test_without_the_average_the_gradients_would_differ():
    """The check above can fail: the plain mean of two halves is another number when their masks
    have different sizes"""
    torch.manual_seed(0)
    model = build(MODELS['contrastive']).double().train()
    x = torch.randn(6, 260, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = model(x, torch.Generator().manual_seed(2)).loss
    halves = []
    for rank in range(2):
        model.draws = Ranks(torch.device('cpu'), rank, 2).draws
        halves.append(model(x[3*rank:3*rank + 3], torch.Generator().manual_seed(2)).loss)
    assert abs(sum(halves)/2 - whole) > 1e-4
    assert model.average is no_reduce


@needs_gloo
@pytest.mark.parametrize('method', ['contrastive', 'reconstruction'])
def test_a_run_on_one_rank_and_on_two_has_the_same_curve(method, tmp_path):
    """And begun on one it goes on on two, or the other way round

    Twelve steps drift by rounding alone. Where a code is a draw between two, they drift further:
    one frame of 340 has another target. Gradients that are not averaged make 0.08 of it, and 0.4 in
    their norm.
    """
    drift = {'contrastive': .02, 'reconstruction': 1e-4}[method]
    words = ['--preset', f'{method}-tiny', *RUN, 12]
    pretrain(1, *words, '--out', 'one', cwd=tmp_path)
    pretrain(2, *words, '--out', 'two', cwd=tmp_path)
    assert first_difference(tmp_path/'one', tmp_path/'two') < 1e-5
    assert largest_difference(tmp_path/'one', tmp_path/'two') < drift
    assert largest_difference(tmp_path/'one', tmp_path/'two', 'grad_norm') < 10*drift
    run, ranks = ('one', 2) if method == 'contrastive' else ('two', 1)
    kept = read_metrics(tmp_path/run)
    # as if it had been killed before step 12
    checkpoint_files(tmp_path/run)[0].unlink()
    assert 'Going on from step 6' in pretrain(ranks, '--resume', run, cwd=tmp_path)
    again = read_metrics(tmp_path/run)
    assert [r['step'] for r in again] == [r['step'] for r in kept]
    assert max(abs(a['loss'] - b['loss']) for a, b in zip(kept, again)) < drift


@needs_gloo
def test_ranks_agree_where_to_stop(tmp_path):
    process = start(2, '-m', 'seismodel', 'pretrain', '--preset', 'reconstruction-tiny', *RUN, 4000,
                    '--out', 'run', cwd=tmp_path)
    while process.poll() is None and not (tmp_path/'run/metrics.jsonl').exists(): time.sleep(.1)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)                              # torchrun hands it to both
    said, _ = process.communicate(timeout=60)
    assert said.count('Stopped by') == 2 and 'is safe. Go on with --resume run' in said, said
    newest = int(checkpoint_files(tmp_path/'run')[0].stem[5:])
    assert said.count(
        f'after step {newest} of 4000; the checkpoint of step {newest} is safe') == 2, said


HUNG = """
import sys
import seismodel.training.trainer as trainer
from seismodel.cli import main
trainer.PATIENCE = 1.
sys.exit(main(['pretrain', *sys.argv[1:]]))
"""


@needs_gloo
@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGSTOP])
def test_who_is_left_says_so_when_a_rank_is_lost(number, tmp_path):
    """A rank that is killed, which Gloo notices; and one that stands still, as NCCL has it with one
    that is killed: nothing is noticed, until SIGTERM comes"""
    (tmp_path/'work.py').write_text(HUNG, encoding='utf-8')
    both = [subprocess.Popen([sys.executable, 'work.py', '--preset', 'reconstruction-tiny', *RUN,
                              '4000', '--out', 'run'], cwd=tmp_path,
                             env={**os.environ, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg',
                                  'CUDA_VISIBLE_DEVICES': '', 'PYTHONPATH': str(root),
                                  'RANK': str(rank),
                                  'LOCAL_RANK': str(rank), 'WORLD_SIZE': '2',
                                  'MASTER_ADDR': 'localhost',
                                  'MASTER_PORT': str(33500 + os.getpid() % 1000)},
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for rank in range(2)]
    try:
        while both[0].poll() is None and not checkpoint_files(tmp_path/'run'): time.sleep(.1)
        both[1].send_signal(number)
        if number == signal.SIGSTOP:
            time.sleep(1)
            both[0].send_signal(signal.SIGTERM)
        _, said = both[0].communicate(timeout=60)
    finally:
        for p in both: p.kill()
    assert both[0].returncode == 1 and 'Traceback' not in said, said
    assert ('Another rank is lost'
            if number == signal.SIGKILL else 'no step ended in 1 s: another rank is lost') in said
    assert said.count('go on with --resume run') == 1
    kept = read_checkpoint(checkpoint_files(tmp_path/'run')[0])
    assert kept.state['step'] >= 6 and all(t.isfinite().all() for t in kept.tensors.values())


POISONED = """
import hashlib, os, sys
import seismodel.cli as cli, seismodel.training.pretrain as pretraining
import seismodel.training.trainer as trainer

class Poisoned(pretraining.WindowDataset):
    "Window 31 is not a number: the last of step 8, which rank 1 has"
    def batch(self, numbers):
        b = super().batch(numbers)
        for k, n in enumerate(numbers):
            if n == 31: b['x'][k] = float('nan')
        return b

def train(model, *args):
    try: return trainer.train(model, *args)
    finally:
        weights = b''.join(t.numpy().tobytes() for t in model.state_dict().values())
        print('digest', hashlib.sha256(weights).hexdigest())

pretraining.WindowDataset, pretraining.train, trainer.draw_run = Poisoned, train, lambda *_: None
for name, more in (('stopped', []), ('skipped', ['--skip-nonfinite', '1'])):
    print('exit', cli.main(['pretrain', *sys.argv[1:], '--out', name, *more]), flush=True)
    os.environ['MASTER_PORT'] = str(int(os.environ['MASTER_PORT']) + 1)
"""


@needs_gloo
def test_a_nan_on_one_rank_stops_both_or_is_skipped_by_both(tmp_path):
    """Two processes, without torchrun, which would end the other one at once: each comes to its end
    by itself"""
    (tmp_path/'work.py').write_text(POISONED, encoding='utf-8')
    port, both = 31500 + os.getpid() % 1000, []
    for rank in range(2):
        env = {**os.environ, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg',
               'CUDA_VISIBLE_DEVICES': '', 'PYTHONPATH': str(root), 'RANK': str(rank),
               'LOCAL_RANK': str(rank),
               'WORLD_SIZE': '2', 'MASTER_ADDR': 'localhost', 'MASTER_PORT': str(port)}
        both.append(subprocess.Popen([sys.executable, 'work.py', '--preset', 'reconstruction-tiny',
                                      *RUN, '12'], cwd=tmp_path, env=env,
                                     stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    try: said = [p.communicate(timeout=120) for p in both]
    finally:
        for p in both: p.kill()
    assert [[line for line in out.splitlines() if line.startswith('exit')] for out,
            _ in said] == [['exit 1', 'exit 0']]*2, said
    sentence = ('The loss is nan and the norm of its gradient nan at step 8, with windows 28 to '
                '31; the update was withheld. Lower the learning rate, or look at these windows '
                "(they are listed in 'stopped/nonfinite.jsonl').")
    for (_, errors), who in zip(said, ('seismodel: ', 'seismodel, rank 1: ')):
        assert errors.count(who + sentence) == 1 and errors.count('The loss is') == 1
    digests = [[line for line in out.splitlines() if line.startswith('digest')] for out, _ in said]
    # those of step 7 and of step 12, the same on both ranks
    assert digests[0] == digests[1] and digests[0][0] != digests[0][1]
    kept = read_checkpoint(checkpoint_files(tmp_path/'stopped')[0])
    assert kept.state['step'] == 6 and all(t.isfinite().all() for t in kept.tensors.values())
    assert [r['step'] for r in read_metrics(tmp_path/'stopped')] == list(range(1, 8))
    assert ([r['loss'] is None for r in read_metrics(tmp_path/'skipped')]
            == [step == 8 for step in range(1, 13)])
    for name in ('stopped', 'skipped'):
        assert [json.loads(line)['windows']
                for line in open(tmp_path/name/'nonfinite.jsonl', encoding='utf-8')] == [
                    [28, 29, 30, 31]]


def test_a_batch_that_ranks_cannot_share_is_refused(tmp_path):
    from seismodel.training.config import TrainConfig
    from seismodel.training.trainer import check_fit
    from seismodel.core import UserError
    with pytest.raises(UserError, match='batch size is 4, which 3 ranks cannot share'):
        check_fit(TrainConfig(steps=1, batch_size=4), range(4), tmp_path/'run', False,
                  Ranks(torch.device('cpu'), 0, 3))
