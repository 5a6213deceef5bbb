"""Plant small faults by Cosmic Ray in copies of the package, a sample of them, and list those that no test notices.

    python scripts/mutants.py [--count 300] [--seed 0] [--jobs 2] [--only models/masking training/trainer] [--again]

Everything lies in build/mutants: a copy of package and tests, a session and a summary for each module. A second call goes on where the first
was stopped. After new tests, `--again` tries the survivors once more. A module that was changed since needs a new session: remove its folder.
"""
import argparse
import ast
import os
import random
import shlex
import shutil
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic

from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkResult

root = Path(__file__).resolve().parents[1]
out = root/'build/mutants'
COSMIC_RAY = [sys.executable, '-m', 'cosmic_ray.cli']
# module -> the test files that are about it; the quick ones first, since a mutant is dead at the first test that fails
TESTS = {'training/trainer': ['interruptions', 'recipe', 'trainer'], 'study/run': ['study'], 'study/trial': ['recipe', 'leakage', 'study'],
         'finetuning/finetune': ['leakage', 'recipe', 'finetuning'], 'picking/evaluation': ['signs_and_ends', 'evaluation', 'leakage'],
         'data/windows': ['signs_and_ends', 'loading', 'waveforms'], 'data/sources': ['signs_and_ends', 'waveforms', 'leakage'],
         'training/config': ['recipe', 'trainer'], 'picking/seisbench_model': ['picking'], 'models/quantizer': ['quantizer'], 'models/infonce': ['infonce'],
         'models/masking': ['masking', 'encoders'], 'models/masked_mse': ['masked_mse']}


def module_file(name):
    "Of the module, below the root"
    return Path('seismodel')/f'{name}.py'


def command(name):
    "What decides whether a mutant lives"
    files = [f'tests/test_{stem}.py' for stem in TESTS[name]]
    words = [sys.executable, '-m', 'pytest', '-x', '-q', '-p', 'no:cacheprovider', '--hypothesis-seed=0', *files]
    return shlex.join(words)


def write_config(name, seconds):
    "What Cosmic Ray wants to know; tests that take longer than so many seconds hang"
    (out/name/'config.toml').write_text(f'[cosmic-ray]\nmodule-path = "{module_file(name).as_posix()}"\ntimeout = {seconds:.1f}\nexcluded-modules = []\n'
                                        f'test-command = {command(name)!r}\n[cosmic-ray.distributor]\nname = "local"\n')


def copy(name):
    "A tree of its own, in which the mutants of a module are made: the module stays as it was, tests are those of today"
    tree = out/name/'tree'
    for part in ('seismodel', 'tests'):
        if part == 'seismodel' and (tree/part).exists(): continue
        shutil.rmtree(tree/part, ignore_errors=True)
        shutil.copytree(root/part, tree/part, ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copy(root/'pytest.ini', tree)
    return tree


def places(items, source):
    "Work items by their place and kind: twelve ways to replace a `+` are one place. Annotations do nothing, and are left out"
    spans = [(a.lineno, a.col_offset, a.end_lineno, a.end_col_offset) for node in ast.walk(ast.parse(source))
             for a in (getattr(node, 'annotation', None), getattr(node, 'returns', None)) if isinstance(a, ast.expr)]
    found = {}
    for item in items:
        m = item.mutations[0]
        if any((a, b) <= tuple(m.start_pos) < (c, d) for a, b, c, d in spans): continue
        found.setdefault((tuple(m.start_pos), m.operator_name.split('/')[1].split('_')[0]), []).append(item.job_id)
    return [found[k] for k in sorted(found)]


def begin(name):
    "A session with every mutant of a module; where the module can be changed"
    folder, file = out/name, module_file(name)
    if (folder/'all.sqlite').exists():
        if (folder/'module.py').read_text() != (root/file).read_text(): sys.exit(f"{file} is not what it was when '{folder}' was begun; remove that folder.")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder/'tree', ignore_errors=True)
        shutil.copy(root/file, folder/'module.py')
        tree = copy(name)
        write_config(name, 600)
        subprocess.run([*COSMIC_RAY, 'init', folder/'config.toml', folder/'begun.sqlite'], cwd=tree, check=True)
        (folder/'begun.sqlite').rename(folder/'all.sqlite')
    with use_db(folder/'all.sqlite', WorkDB.Mode.open) as db: return places(db.work_items, (folder/'module.py').read_text())


def quotas(sizes, count):
    "How many mutants of each module: ten each, the rest by size"
    share = {name: min(n, max(1, min(10, count//len(sizes)))) for name, n in sizes.items()}
    while sum(share.values()) < min(count, sum(sizes.values())):
        share[max(sizes, key=lambda n: sizes[n]/(share[n] + 1) if share[n] < sizes[n] else 0)] += 1
    return share


def choose(name, places, quota, seed):
    "Skip all mutants but a sample: places in random order, one mutant of each; a larger sample holds the smaller one"
    rng = random.Random(f'{name} {seed}')
    order = rng.sample(range(len(places)), len(places))
    chosen = {rng.choice(places[k]) for k in order[:quota]} if quota else set()
    session = out/name/'session.sqlite'
    if not session.exists():
        shutil.copy(out/name/'all.sqlite', out/name/'sample.sqlite')
        with use_db(out/name/'sample.sqlite', WorkDB.Mode.open) as db:
            for item in db.work_items:
                if item.job_id not in chosen: db.set_result(item.job_id, WorkResult(WorkerOutcome.SKIPPED))
        (out/name/'sample.sqlite').rename(session)
        (out/name/'sample.txt').write_text(f'{quota} {seed}')
    elif (out/name/'sample.txt').read_text() != f'{quota} {seed}':
        sys.exit(f"'{out/name}' holds a sample of another size or seed; give the same --count, --seed and --only, or remove build/mutants.")


def forget_survivors(name):
    "So that they are tried again"
    with sqlite3.connect(out/name/'session.sqlite') as db: db.execute("delete from work_results where test_outcome = 'SURVIVED'")


def test(name):
    "Run the tests of a module as it is, then of each of its mutants; returns a sentence where that was impossible"
    folder, tree = out/name, copy(name)
    shutil.copy(folder/'module.py', tree/module_file(name))              # a killed run may have left a mutant
    with use_db(folder/'session.sqlite', WorkDB.Mode.open) as db:
        if not db.pending_work_items: return
    since = monotonic()
    env = {**os.environ, 'PYTHONPATH': str(tree), 'PYTHONDONTWRITEBYTECODE': '1'}
    whole = subprocess.run(shlex.split(command(name)), cwd=tree, env=env, capture_output=True, text=True)
    if whole.returncode: return f'{name}: its tests fail without any mutant.\n{whole.stdout[-2000:]}'
    seconds = monotonic() - since
    write_config(name, 60 + 4*seconds)
    print(f'{name}: {seconds:.0f} s for its tests', flush=True)
    done = subprocess.run([*COSMIC_RAY, 'exec', folder/'config.toml', folder/'session.sqlite'], cwd=tree, env=env, capture_output=True, text=True)
    shutil.copy(folder/'module.py', tree/module_file(name))
    if done.returncode: return f'{name}: {done.stderr[-2000:]}'
    print(summary([name])[0], flush=True)


def summary(names):
    "Lines: a table by module, then each survivor with what was changed"
    lines, survivors, total = [], [], [0, 0, 0]
    for name in names:
        if not (out/name/'session.sqlite').exists(): continue
        with use_db(out/name/'session.sqlite', WorkDB.Mode.open) as db: done, items = dict(db.results), {i.job_id: i.mutations[0] for i in db.work_items}
        tried = {job: r for job, r in done.items() if r.worker_outcome != WorkerOutcome.SKIPPED}
        alive = [job for job, r in tried.items() if r.test_outcome == TestOutcome.SURVIVED]
        numbers = len(tried), len(tried) - len(alive), len(items) - len(done)
        total = [a + b for a, b in zip(total, numbers)]
        lines.append(f'{name:24} {numbers[0]:4} tried  {numbers[1]:4} killed  {numbers[2]:4} to do')
        for job in sorted(alive, key=lambda job: items[job].start_pos):
            m, diff = items[job], [line for line in tried[job].diff.split('\n')[3:] if line[:1] in '+-' and line[:3] not in ('+++', '---')]
            survivors += [f'\n{m.module_path}:{m.start_pos[0]}, {m.definition_name or "module"}, {m.operator_name.split("/")[1]}', *diff]
    rate = f', {total[1]/total[0]:.1%}' if total[0] else ''
    return [*lines, f'{"together":24} {total[0]:4} tried  {total[1]:4} killed  {total[2]:4} to do{rate}', *survivors]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--count', type=int, default=300, help='mutants, of all modules together')
    parser.add_argument('--seed', type=int, default=0, help='of the sample')
    parser.add_argument('--jobs', type=int, default=2, help='modules at a time')
    parser.add_argument('--only', nargs='+', choices=TESTS, default=list(TESTS), help='these modules')
    parser.add_argument('--again', action='store_true', help='try the survivors once more, with the tests of today')
    args = parser.parse_args()
    found = {name: begin(name) for name in args.only}
    share = quotas({name: len(p) for name, p in found.items()}, args.count)
    for name in args.only: choose(name, found[name], share[name], args.seed)
    for name in args.only if args.again else []: forget_survivors(name)
    with ThreadPoolExecutor(args.jobs) as pool: wrong = [w for w in pool.map(test, args.only) if w]
    lines = summary(args.only)
    (out/'summary.txt').write_text('\n'.join(lines) + '\n')
    print('\n'.join(lines))
    if wrong: sys.exit('\n'.join(wrong))


if __name__ == '__main__': main()
