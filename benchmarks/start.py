"""How long a user waits for an answer that needs no model: help, version, a mistyped option, beside
the import of torch alone.

    python benchmarks/start.py

Printed is the median of 7 fresh processes each, in seconds and as a fraction of `import torch`.

The first call of each is not counted: it fills the disk cache and writes bytecode. Meant for a
quiet machine. """
import os
import statistics
import subprocess
import sys
from time import perf_counter

CALLS = {
    "python -c 'import torch'": ['-c', 'import torch'],
    'python -c pass': ['-c', 'pass'],
    "python -c 'import seismodel; dir(seismodel)'": ['-c', 'import seismodel; dir(seismodel)'],
    'seismodel --version': ['-m', 'seismodel', '--version'],
    'seismodel --help': ['-m', 'seismodel', '--help'],
    'seismodel pretrain --help': ['-m', 'seismodel', 'pretrain', '--help'],
    'seismodel pack --help': ['-m', 'seismodel', 'pack', '--help'],
    'seismodel pretrain --stesp 5': ['-m', 'seismodel', 'pretrain', '--stesp', '5'],
    'seismodel pretrian': ['-m', 'seismodel', 'pretrian'],
}


def seconds(words):
    "Of one process"
    begin = perf_counter()
    subprocess.run([sys.executable, *words], capture_output=True)
    return perf_counter() - begin


def main(repeats=7):
    taken = {call: [] for call in CALLS}
    for words in CALLS.values(): seconds(words)
    # in turn, so that another program's load meets all of them
    for _ in range(repeats):
        for call, words in CALLS.items(): taken[call].append(seconds(words))
    torch = statistics.median(taken["python -c 'import torch'"])
    print(f'{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, Python {sys.version.split()[0]}')
    for call, times in taken.items():
        middle = statistics.median(times)
        print(f'{call:46} {middle:5.2f} s  ({min(times):.2f} to {max(times):.2f})  '
              f'{middle/torch:5.2f} of torch')


if __name__ == '__main__': main()
