#!/usr/bin/env python
"""Trains each method for a long time while everything goes wrong: killed at random, a full disk, a
folder that cannot be written.

    # 2,000 steps of each method, killed about every 30 s: an hour or two
    python scripts/soak.py OUT
    # a short one
    python scripts/soak.py OUT --steps 60 --every 6 --settle 20 --methods contrastive-tiny

Asserted for each method: the run that was killed ends in the same weights, metrics and progress,
bit for bit, as the one that was left alone; after the first `--settle` steps, memory stays level
(the median of the last quarter of the looks is within 20 MB of the first quarter's), and the usual
number of open files does not change (it rises for the moment of a checkpoint); a disk that was full
for a while costs a checkpoint and nothing else; where the folder cannot be written for a while, the
run ends in a sentence and goes on later. Linux: memory and files are read from /proc. """
import argparse
import ctypes
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median, mode

import torch

METHODS = ('contrastive-tiny', 'reconstruction-tiny', 'spectrum-tiny', 'joint-tiny')
CHILD = '''
import errno, os, sys
from seismodel import cli, files
# from one step to another no checkpoint fits on the disk
if os.environ.get('SOAK_FULL'):
    import seismodel.training.checkpoints as c
    real, first, last = c.write_atomically, *map(int, os.environ['SOAK_FULL'].split(','))
    def full(path, write, *size):
        if first <= int(path.stem[5:]) < last:
            raise OSError(errno.ENOSPC, 'No space left on device', str(path))
        return real(path, write, *size)
    c.write_atomically = full
sys.exit(cli.main(sys.argv[1:]))
'''


def start(words, before=None, **environment):
    "A process of its own, with its loader processes in one group; `before` is called in it first"
    return subprocess.Popen([sys.executable, '-c', CHILD, *map(str, words)], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, **environment}, start_new_session=True,
                            preexec_fn=before)


def kill(process):
    "Process and loader processes, at once"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def steps_done(run):
    "By the last whole line of the metrics"
    file = run/'metrics.jsonl'
    lines = file.read_bytes().split(b'\n')[:-1] if file.exists() else []
    return json.loads(lines[-1])['step'] if lines else 0


def usage(pid):
    "Memory of the process that it shares with nobody, in use or swapped out, MB; its open files"
    try:
        status, files = Path(
            f'/proc/{pid}/status').read_text(encoding='utf-8'), len(os.listdir(f'/proc/{pid}/fd'))
    except OSError: return None
    found = [int(line.split()[1]) for line in status.splitlines()
             if line.startswith(('RssAnon', 'VmSwap'))]
    return (sum(found)/1000, files) if found else None


def undisturbed(words, run, settle):
    "To the end; memory and open files, twice a second once the run has settled"
    process, seen = start([*words, '--out', run]), []
    while process.poll() is None:
        if steps_done(run) >= settle and (now := usage(process.pid)):
            seen.append((steps_done(run), *now))
        time.sleep(.5)
    assert process.returncode == 0, process.communicate()[0]
    return seen


def disturbed(words, run, every, rng, full):
    """To the end, through kills, a full disk and a folder that cannot be written; how many kills,
    and what was said of the folder"""
    kills, before, said = 0, -1, ''
    while True:
        newest = max([int(f.stem[5:]) for f in run.glob('checkpoints/step-*.safetensors')],
                     default=0)
        # a slow machine: it had not come to the next checkpoint
        if newest == before: every *= 1.5
        before = newest
        if newest and not said: said = read_only(run)
        again = (run/'config.json').exists()
        process = start(['pretrain', '--resume', run] if again else [*words, '--out', run],
                        SOAK_FULL=full)
        try:
            text, _ = process.communicate(timeout=rng.uniform(.3*every, 1.7*every))
            assert process.returncode in (0, 1), text
            if process.returncode == 0: return kills, said
            assert 'last checkpoint' in text, text          # the disk was full at the very end
            full = ''
        except subprocess.TimeoutExpired:
            kill(process)
            kills += 1


def no_override():
    "Take away root's right to write where the mode of a folder forbids it"
    ctypes.CDLL(None).prctl(24, 1)                            # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE


def read_only(run):
    "A folder that cannot be written: a sentence, and nothing lost"
    modes = {f: f.stat().st_mode for f in [run, *run.rglob('*')] if f.is_dir()}
    files = {f: f.read_bytes() for f in run.rglob('*') if f.is_file()}
    for f in modes: f.chmod(0o555)
    try:
        process = start(['pretrain', '--resume', run], no_override)
        text, _ = process.communicate()
    finally:
        for f, mode in modes.items(): f.chmod(mode)
    assert process.returncode == 2 and 'Traceback' not in text, text
    assert files == {f: f.read_bytes() for f in run.rglob('*')
                     if f.is_file()}, 'something was written'
    return text.strip().splitlines()[-1]


def same(a, b):
    "Weights, moments, progress and metrics, but for the clock"
    from seismodel.training.checkpoints import checkpoint_files, read_checkpoint
    from seismodel.training.runlog import CLOCK, read_metrics
    left, right = (read_checkpoint(checkpoint_files(f)[0]) for f in (a, b))
    rows = [[{k: v for k, v in r.items() if k not in CLOCK} for r in read_metrics(f)]
            for f in (a, b)]
    assert left.state['progress'] == right.state['progress'] and rows[0] == rows[1]
    assert (left.tensors.keys() == right.tensors.keys()
            and all(torch.equal(t, right.tensors[n]) for n, t in left.tensors.items()))
    assert (a/'model.safetensors').read_bytes() == (b/'model.safetensors').read_bytes()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out', type=Path)
    parser.add_argument('--methods', default=','.join(METHODS))
    parser.add_argument('--steps', type=int, default=2000)
    parser.add_argument('--every', type=float, default=30.,
                        help='seconds between two kills, on average')
    parser.add_argument('--settle', type=int, default=200,
                        help='steps before memory and files are watched')
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for method in args.methods.split(','):
        rng, whole, killed = random.Random(
            args.seed), args.out/f'{method}-whole', args.out/f'{method}-killed'
        for run in (whole, killed): shutil.rmtree(run, ignore_errors=True)
        words = ['pretrain', '--preset', method, '--window', 1024, '--batch-size', 4, '--steps',
                 args.steps, '--workers', args.workers, '--device', args.device,
                 '--log-every', 5, '--checkpoint-every', max(args.steps//100, 2),
                 '--validate-every', max(args.steps//10, 10), '--validation-windows', 4]
        seen = undisturbed(words, whole, args.settle)
        full = f'{args.steps//3},{args.steps//3 + max(args.steps//20, 4)}'
        memory, files = [m for _, m, _ in seen], [n for _, _, n in seen]
        quarter = len(memory)//4
        early, late = median(memory[:quarter]), median(memory[-quarter:])
        print(f'{method}: memory {early:.0f} MB early, {late:.0f} MB late, {min(memory):.0f} to '
              f'{max(memory):.0f} in {len(memory)} looks; '
              f'open files {mode(files)}, at most {max(files)}', flush=True)
        assert abs(late - early) <= 20, 'memory is not level'
        half = len(files)//2
        assert mode(files[:half]) == mode(files[half:]), 'open files become more or fewer'
        kills, said = disturbed(words, killed, args.every, rng, full)
        same(whole, killed)
        print(f'  {args.steps} steps, {kills} kills, disk full at steps {full}: bit-equal; '
              f'read-only: {said}', flush=True)


if __name__ == '__main__': main()
