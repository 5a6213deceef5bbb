#!/usr/bin/env python
"""Calls every command with any options, on files that are whole, missing, wrong or damaged, and
lists the tracebacks.

    python scripts/fuzz.py --calls 2000 --seed 0

Each call ends in a result or in a sentence; a traceback is a fault. Exit code 1 where there was
one. """
import argparse
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed as start_at, settings

sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'tests'))
from calls import call, calls, damages, files_of, make_world


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--calls', type=int, default=2000)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    faults, first, count, start = Counter(), {}, [0], time.perf_counter()
    with tempfile.TemporaryDirectory() as tmp:
        world, spare = Path(tmp)/'world', Path(tmp)/'spare'
        world.mkdir()
        print('runs to begin with:', make_world(world, study=True))
        shutil.copytree(world, spare)
        os.chdir(world)
        files = files_of(world)

        @start_at(args.seed)
        @settings(max_examples=args.calls, deadline=None, database=None, phases=[Phase.generate],
                  suppress_health_check=list(HealthCheck))
        @given(calls(), damages())
        def attack(words, how):
            count[0] += 1
            error = call(world, files, words, how)
            if error:
                frames = [line.strip() for line in error.splitlines() if 'seismodel/' in line]
                key = error.splitlines()[-1][:90], frames[-1].rpartition('seismodel/')[2]
                faults[key] += 1
                if key not in first:
                    print(f'\n{count[0]}: seismodel {words} damaged by {how}\n{error}', flush=True)
                first.setdefault(key, words)
            # as at the beginning, whatever calls have written
            if count[0] % 50 == 0:
                print(f'{count[0]} calls, {sum(faults.values())} tracebacks, '
                      f'{time.perf_counter() - start:.0f} s', flush=True)
                os.chdir(tmp)
                shutil.rmtree(world)
                shutil.copytree(spare, world)
                os.chdir(world)

        attack()
        os.chdir('/')
    print(f'{count[0]} calls in {time.perf_counter() - start:.0f} s: {sum(faults.values())} '
          f'tracebacks, {len(faults)} kinds')
    for (error, where), n in faults.most_common(): print(f'{n:5} {error}\n      {where}')
    return 1 if faults else 0


if __name__ == '__main__': sys.exit(main())
