"""Kill training processes on a GPU, resume them, and say what is equal to the bit.

    python scripts/resume_on_gpu.py [--device cuda] [--steps 60] [--kills 3] [--data FOLDER]

For both methods of pretraining and for fine-tuning with its augmentation (on synthetic events in
the noise of FOLDER, a labelled dataset or store; without one there is no real noise), with
deterministic algorithms and without: one run that nothing happens to, a second one (is the same
command twice the same at all?), and one that is killed with SIGKILL at random moments and resumed
each time. Exit code 1 if a deterministic run is not bit-equal. """
import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from seismodel.training.checkpoints import checkpoint_files, read_checkpoint
from seismodel.training.runlog import CLOCK, read_metrics

root = Path(__file__).resolve().parents[1]
MAIN = """import sys, torch
if {deterministic}:
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
from seismodel.cli import main
sys.exit(main())"""


def start(deterministic, *words, cwd):
    env = {**os.environ, 'CUBLAS_WORKSPACE_CONFIG': ':4096:8', 'MPLBACKEND': 'agg',
           'PYTHONPATH': os.pathsep.join([str(root),
                                          *filter(None, [os.environ.get('PYTHONPATH')])])}
    return subprocess.Popen([sys.executable, '-c', MAIN.format(deterministic=deterministic),
                             *map(str, words)], cwd=cwd, env=env,
                            stdout=subprocess.DEVNULL,
                            stderr=open(cwd/'stderr.txt', 'a', encoding='utf-8'))


def wait(process, cwd):
    if process.wait(): sys.exit((cwd/'stderr.txt').read_text(encoding='utf-8')[-3000:])


def compare(a, b):
    "What differs between two finished runs, in words"
    rows = [[{k: v for k, v in r.items() if k not in CLOCK} for r in read_metrics(run)]
            for run in (a, b)]
    left, right = (read_checkpoint(checkpoint_files(run)[0]).tensors for run in (a, b))
    apart = [name for name, t in left.items() if not torch.equal(t, right[name])]
    first = next((x['step'] for x, y in zip(*rows) if x != y), None)
    loss = max(abs(x['loss'] - y['loss']) for x, y in zip(*rows))
    if not apart and rows[0] == rows[1]:
        return True, 'bit-equal: every line of metrics, weight and moment'
    return False, (f'{len(apart)} of {len(left)} tensors differ, first line at step {first}, '
                   f'largest difference of the loss {loss:.1e}')


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    for name, value in (('device', 'cuda'), ('steps', 60), ('kills', 3), ('data', '')):
        parser.add_argument(f'--{name}', default=value, type=type(value))
    args, failed = parser.parse_args(), False
    labelled = ['--data', Path(args.data).resolve()] if args.data else []
    cases = {'contrastive': ['pretrain', '--preset', 'contrastive-tiny', '--log-every', 1],
             'reconstruction': ['pretrain', '--preset', 'reconstruction-tiny', '--log-every', 1],
             'fine-tuning': ['finetune', '--from', 'random', '--preset', 'contrastive-tiny',
                             '--data', 'synthetic', *labelled]}
    for case, (command, *given) in cases.items():
        for deterministic in (True, False):
            with tempfile.TemporaryDirectory() as tmp:
                tmp, rng = Path(tmp), random.Random(case)
                words = [command, *given, '--steps', args.steps, '--batch-size', 8,
                         '--validate-every', 20, '--validation-windows', 8,
                         '--checkpoint-every', 7, '--device', args.device, '--workers', 2]
                for name in ('whole', 'twice'):
                    wait(start(deterministic, *words, '--out', name, cwd=tmp), tmp)
                process, run = start(deterministic, *words, '--out', 'killed',
                                     cwd=tmp), tmp/'killed'
                for k in range(args.kills):
                    goal = (k + 1)*args.steps//(args.kills + 1)
                    reached = lambda: max((row['step'] for row in read_metrics(run)), default=0)
                    while process.poll() is None and reached() < goal: time.sleep(.005)
                    time.sleep(rng.uniform(0, .1))
                    process.kill()
                    process.wait()
                    process = start(deterministic, command, '--resume', run, cwd=tmp)
                wait(process, tmp)
                print(f"{case}, {'deterministic' if deterministic else 'default'} algorithms")
                for name in ('twice', 'killed'):
                    same, words_ = compare(tmp/'whole', tmp/name)
                    failed |= deterministic and not same
                    what = {'twice': 'the same command twice',
                            'killed': f'killed {args.kills} times and resumed'}[name]
                    print(f'  {what}: {words_}', flush=True)
    sys.exit(failed)


if __name__ == '__main__': main()
