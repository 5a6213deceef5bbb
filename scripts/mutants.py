"""Plant small faults in a copy of the package, one at a time, and list those that no test notices.

    python scripts/mutants.py [--count 300] [--seed 0] [--jobs 2] [--again]
                              [--only models/masking …]

Cosmic Ray makes the faults. Those of each module come in a random order, and the modules take
turns, a long one more often: the first 100 are a sample of all modules, and the first 300 hold
them. What came out is kept in build/mutants/results.jsonl, so that a second call goes on where the
first one stopped; a fault is known by the text of its module. `--again` tries the survivors once
more, after tests were added. What may live, and why, stands in tests/survivors.txt.
"""
import argparse
import ast
import difflib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha1
from pathlib import Path
from queue import Queue
from threading import Lock
from time import monotonic
from typing import NamedTuple

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

root = Path(__file__).resolve().parents[1]
out = root/'build/mutants'
# module -> the tests that are about it, the quick ones first: a mutant is dead at the first that
# fails
TESTS = {
    'kernels/choice': ['swiglu', 'quantizer'],
    'models/masking': ['masking', 'encoders'],
    'models/quantizer': ['quantizer', 'infonce', 'recipe'],
    'models/infonce': ['infonce', 'quantizer', 'recipe'],
    'models/masked_mse': ['masked_mse', 'recipe'],
    'models/spectrum': ['spectrum', 'folds'],
    'data/formats': ['cut_records', 'archive'],
    'data/archive': ['archive', 'pieces'],
    'data/channels': ['archive'],
    'data/pick_checks': ['dataset'],
    'data/record_plan': ['dataset'],
    'data/build_dataset': ['dataset'],
    'data/prefetch': ['loading', 'noise', 'interruptions'],
    'data/sources': ['signs_and_ends', 'waveforms', 'leakage', 'several_events'],
    'data/windows': ['signs_and_ends', 'waveforms', 'loading'],
    'signals/source': ['sources', 'signs_and_ends', 'waveforms'],
    'signals/several_events': ['several_events'],
    'signals/noise': ['noise', 'signs_and_ends', 'leakage'],
    'training/config': ['recipe', 'trainer'],
    'training/schedule': ['recipe', 'trainer'],
    'training/batches': ['recipe', 'loading', 'trainer'],
    'training/trainer': ['recipe', 'interruptions', 'trainer', 'distributed'],
    'finetuning/heads': ['heads', 'signs_and_ends', 'recipe', 'finetuning'],
    'finetuning/events': ['finetuning', 'leakage'],
    'finetuning/finetune': ['recipe', 'finetuning', 'leakage'],
    'finetuning/calibration': ['calibration', 'picks', 'finetuning'],
    'finetuning/window_labels': ['window_tasks', 'leakage'],
    'statistics': ['evaluation'],
    'picking/evaluation': ['signs_and_ends', 'evaluation', 'leakage'],
    'picking/seisbench_model': ['picking'],
    'picking/pick': ['picks', 'catalogue'],
    'picking/pieces': ['pieces'],
    'picking/matching': ['several_events'],
    'picking/amplitude': ['picks'],
    'picking/output': ['picks', 'catalogue'],
    'training/settings': ['front_door'],
    'study/trial': ['recipe', 'study', 'leakage'],
    'study/paired': ['study'],
    'study/tables': ['signs_and_ends', 'study'],
    'study/run': ['study'],
    'study/fold_report': ['fold_report'],
    'study/arms': ['folds', 'leakage'],
    'study/arrays': ['folds', 'leakage'],
    'study/device_records': ['folds', 'leakage'],
    'study/baselines': ['study', 'recipe'],
    'study/command': ['folds', 'study'],
    'study/folds': ['folds', 'leakage'],
    'study/fold_scores': ['folds', 'leakage'],
    'study/fold_trial': ['folds', 'leakage'],
    'study/fold_run': ['folds'],
}


class Mutant(NamedTuple):
    "One fault"
    module: str
    version: str    # checksum of the module's text
    operator: str   # of Cosmic Ray
    occurrence: int # which of the places where it fits

    @property
    def key(self): return '|'.join(map(str, self))


def module_file(module): return Path('seismodel')/f'{module}.py'


def places(module):
    """The mutants of a module by place: twelve ways to replace a `+` are one place. Left out are
    annotations, which do nothing, functions that draw, which are for the eye, and `is` for `==`,
    which says the same of short texts"""
    text = (root/module_file(module)).read_text(encoding='utf-8')
    version, tree = sha1(text.encode()).hexdigest()[:10], get_ast(text)
    nodes = list(ast.walk(ast.parse(text)))
    quiet = [getattr(node, part, None) for node in nodes for part in ('annotation', 'returns')]
    quiet += [node for node in nodes if isinstance(node, ast.FunctionDef)
              and node.name.startswith(('plot', 'draw'))]
    spans = [(a.lineno, a.col_offset, a.end_lineno, a.end_col_offset) for a in quiet
             if isinstance(a, ast.AST)]
    found = {}
    for name in operator_names():
        if get_operator(name).arguments() or name.endswith(('_Eq_Is', '_NotEq_IsNot')): continue
        starts = (at for node in ast_nodes(tree) for at,
                  _ in get_operator(name)().mutation_positions(node))
        for k, at in enumerate(starts):
            if any((a, b) <= tuple(at) < (c, d) for a, b, c, d in spans): continue
            kind = name.split('/')[1].split('_')[0]
            found.setdefault((tuple(at), kind), []).append(Mutant(module, version, name, k))
    return [found[k] for k in sorted(found)]


def sample(modules, seed):
    "All places of all modules, one mutant of each, in the order in which they are tried"
    turns = []
    for module in modules:
        rng, of_module = random.Random(f'{module} {seed}'), places(module)
        rng.shuffle(of_module)
        chosen = [rng.choice(mutants) for mutants in of_module]
        turns += [((k + .5)/len(chosen)**.5, m) for k, m in enumerate(chosen)]
    return [m for _, m in sorted(turns)]


def mutated(mutant):
    "The module's text with the fault, and the lines that differ"
    text = (root/module_file(mutant.module)).read_text(encoding='utf-8')
    new = mutate_code(text, get_operator(mutant.operator)(), mutant.occurrence)
    lines = list(difflib.unified_diff(text.splitlines(), new.splitlines(), lineterm='', n=0))[2:]
    line = int(re.match(r'@@ -(\d+)', lines[0])[1])
    return new, line, [line for line in lines if not line.startswith('@@')]


def copy(name):
    "A tree of its own in which mutants are made"
    tree = out/name
    for part in ('seismodel', 'tests', 'benchmarks', 'nbs/runs'):
        shutil.rmtree(tree/part, ignore_errors=True)
        shutil.copytree(root/part, tree/part, ignore=shutil.ignore_patterns('__pycache__'))
    # a test reads what the README says
    for file in ('pytest.ini', 'README.md'): shutil.copy(root/file, tree)
    return tree


def run_tests(stems, tree, seconds):
    "Whether some tests pass (None: not in this time), the first that failed, and how long it took"
    shutil.rmtree(tree/'.hypothesis', ignore_errors=True)
    files = [f'tests/test_{stem}.py' for stem in stems]
    command = [sys.executable, '-m', 'pytest', '-x', '-q', '-p', 'no:cacheprovider',
               '--hypothesis-seed=0', *files]
    env = {**os.environ, 'PYTHONPATH': str(tree), 'PYTHONDONTWRITEBYTECODE': '1',
           'SEISMODEL_DATA': str(tree)}
    since = monotonic()
    with open(tree/'output.txt', 'w', encoding='utf-8') as said:
        process = subprocess.Popen(command, cwd=tree, env=env, stdout=said, stderr=said,
                                   start_new_session=True)
        try: passed = process.wait(seconds) == 0
        except subprocess.TimeoutExpired: passed = None
        finally:
            try: os.killpg(process.pid, signal.SIGKILL)      # a mutant may have left processes
            except ProcessLookupError: pass
            process.wait()
    failed = re.search(r'^(?:FAILED|ERROR) tests/test_(\S+)',
                       (tree/'output.txt').read_text(encoding='utf-8', errors='replace'), re.M)
    return passed, failed[1] if failed else '', monotonic() - since


def seconds_without(stems, tree):
    """How long each file of tests takes without a mutant, known as long as package and tests stay;
    ends where one fails"""
    text = b''.join(f.read_bytes() for part in ('seismodel', 'tests')
                    for f in sorted((tree/part).rglob('*.py')))
    file, now = out/'seconds.json', sha1(text).hexdigest()
    known = json.loads(file.read_text(encoding='utf-8')) if file.exists() else {}
    if known.get('of') != now: known = {'of': now}
    for stem in stems:
        if stem in known: continue
        passed, failed, known[stem] = run_tests([stem], tree, 3600)
        if not passed:
            sys.exit(f"The tests fail without any mutant, first {failed}; see {tree/'output.txt'}.")
        print(f'{known[stem]:4.0f} s for {stem}', flush=True)
        file.write_text(json.dumps(known), encoding='utf-8')
    return known


def try_mutant(mutant, tree, seconds):
    "What became of a mutant, as a line of results.jsonl"
    file = module_file(mutant.module)
    new, line, diff = mutated(mutant)
    (tree/file).write_text(new, encoding='utf-8')
    try: passed, failed, took = run_tests(TESTS[mutant.module], tree, 60 + 4*seconds)
    finally: shutil.copy(root/file, tree/file)
    outcome = {True: 'survived', False: 'killed', None: 'too slow'}[passed]
    return {'key': mutant.key, 'module': mutant.module, 'line': line,
            'operator': mutant.operator.split('/')[1],
            'outcome': outcome, 'by': failed, 'seconds': round(took, 1), 'diff': diff}


def read_results():
    "key -> the last line about it"
    file = out/'results.jsonl'
    lines = map(json.loads, file.read_text(encoding='utf-8').splitlines()) if file.exists() else ()
    return {r['key']: r for r in lines}


def survivor(result): return '\n'.join([module_file(result['module']).as_posix(), *result['diff']])


def explained():
    "What may live: a survivor as the summary shows it -> why"
    blocks = (root/'tests/survivors.txt').read_text(encoding='utf-8').strip().split('\n\n')
    parts = (block.partition('\nwhy: ') for block in blocks if not block.startswith('#'))
    return {what: why for what, _, why in parts}


def summary(chosen, results):
    "Lines: a table by module, then each survivor, those explained last"
    lines, alive, whys = [], [], explained()
    count = lambda name, rs, live, fine, todo: (
        f'{name:26} {len(rs):4} tried {len(rs) - live:4} killed '
        f'{fine:4} explained {live - fine:4} left {todo:4} to do')
    groups = {}
    for m in chosen: groups.setdefault(m.module, []).append(m)
    for name, mutants in sorted(groups.items()):
        rs = [results[m.key] for m in mutants if m.key in results]
        living = [r for r in rs if r['outcome'] == 'survived']
        lines.append(count(name, rs, len(living), sum(survivor(r) in whys for r in living),
                           len(mutants) - len(rs)))
        alive += living
    tried = [results[m.key] for m in chosen if m.key in results]
    lines.append(count('together', tried, len(alive), sum(survivor(r) in whys for r in alive),
                       len(chosen) - len(tried)))
    if tried: lines.append(f'{1 - len(alive)/len(tried):.1%} of those tried are killed')
    alive.sort(key=lambda r: (survivor(r) in whys, r['module'], r['line']))
    return lines + [f'\n{survivor(r)}\nwhy: {whys.get(survivor(r), "")}' for r in alive]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--count', type=int, default=300, help='mutants, of all modules together')
    parser.add_argument('--seed', type=int, default=0, help='of the sample')
    parser.add_argument('--jobs', type=int, default=2, help='mutants at a time')
    parser.add_argument('--only', nargs='+', choices=TESTS, default=list(TESTS),
                        help='these modules')
    parser.add_argument('--again', action='store_true', help='try the survivors once more')
    args = parser.parse_args()
    # as Ctrl-C: mutants that are tried now are the last
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    out.mkdir(parents=True, exist_ok=True)
    chosen, results, lock = sample(args.only, args.seed)[:args.count], read_results(), Lock()
    todo = [m for m in chosen if m.key not in results or args.again and results[m.key]['outcome']
            == 'survived']
    trees = Queue()
    for k in range(args.jobs): trees.put(copy(f'tree{k}'))
    seconds = seconds_without(dict.fromkeys(stem for m in todo for stem in TESTS[m.module]),
                              out/'tree0')

    def one(mutant):
        tree = trees.get()
        try: result = try_mutant(mutant, tree, sum(seconds[stem] for stem in TESTS[mutant.module]))
        finally: trees.put(tree)
        with lock, open(out/'results.jsonl', 'a', encoding='utf-8') as f:
            results[mutant.key] = result
            f.write(json.dumps(result, ensure_ascii=False) + '\n')
            print(f"{result['outcome']:8} {result['seconds']:5.0f} s  "
                  f"{result['module']}:{result['line']}  {result['by']}", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool: list(pool.map(one, todo))
    lines = summary(chosen, results)
    (out/'summary.txt').write_text('\n'.join(lines) + '\n', encoding='utf-8')
    print('\n'.join(lines))


if __name__ == '__main__': main()
