"""What pretraining buys, by objective, budget and way of fine-tuning: plans of trials by folds, in
one's own words.

    python benchmarks/objectives.py prepare --labelled LABELLED --unlabelled UNLABELLED \\
        --out results
    python benchmarks/objectives.py run --out results --jobs 14
    python benchmarks/objectives.py table --out results

`seismodel study --folds 5` runs the arms of the study; this script runs whatever else is worth a
look, with the same arrays, trials and tables (`seismodel.study`). A plan line names pretrained
starts, ways of fine-tuning, fractions of the labelled events and folds, and stands for all their
combinations:

    --plan 'spectrum:480 spectrum:480:1 random | plain decay.65 | .1 1 | 0 1 2'

`spectrum:480:1` is the variant `spectrum` after 480,000 windows, with seed 1. A fifth part may name
the seeds of fine-tuning; a line without ways only pretrains. `variants` and `WAYS` below list the
names, and `PLAN` is the plan behind the page "Pretraining budget and gain". Records of `test` do
not leave `prepare`. """
import argparse
import sys
from dataclasses import replace
from pathlib import Path

from seismodel.core import UserError
from seismodel.models.pretraining import preset
from seismodel.study.arms import (DECAY, LOW_RATE, PLAIN, PROBE, FoldTrial, Start, Variant, Way,
                                  study_variants)
from seismodel.study.arrays import open_splits, save_array, write_records
from seismodel.study.fold_run import (FOREVER, begin_folds, manual_where_unsaid, run_fold_trials,
                                      write_fold_tables)
from seismodel.study.fold_trial import FoldStudy
from seismodel.study.folds import check_unlabelled


def reshaped(model, heads, conv=None, dim=None, **more):
    "A model of `spectrum` with other heads, other channels in the frontend, another width"
    e = model.encoder
    encoder = replace(e, conv_features=conv or e.conv_features, out_features=dim or e.out_features)
    return replace(model, encoder=encoder, heads=heads, **more)


def variants(size):
    "Ways of pretraining, and shapes that can be started from random weights, of a size"
    found = study_variants(size)
    spectrum, contrastive, recon = (found[name].model
                                    for name in ('spectrum', 'contrastive', 'recon'))
    joint, tiny = preset(f'joint-{size}').model, preset('spectrum-tiny').model
    slow = {k: getattr(found['recon'], k) for k in ('lr', 'weight_decay', 'batch', 'memory')}
    mended = replace(recon.encoder, mask_value='learned', activation='gelu')
    changed = lambda **more: replace(recon, encoder=replace(recon.encoder, **more))
    encoder = replace(contrastive.encoder, target_gradients='encoder')
    others = {
        'spectrum-aug': Variant(spectrum, augment=True),
        'spectrum-lr1e-3': Variant(spectrum, lr=1e-3),
        'spectrum-lr6e-3': Variant(spectrum, lr=6e-3),
        'joint': Variant(joint),
        'joint-aug': Variant(joint, augment=True),
        'joint-heavy': Variant(replace(joint, contrastive=1.)),
        'contrastive-encoder': Variant(replace(contrastive, encoder=encoder)),
        'recon-mended': Variant(replace(recon, encoder=mended, target='spectrum'), **slow),
        'recon-short': Variant(changed(mask=.5, num_zero_elements=4), **slow),
        'recon-learned': Variant(changed(mask_value='learned'), **slow),
        'recon-gelu': Variant(changed(activation='gelu'), **slow),
        'narrow': Variant(reshaped(spectrum, 2, 128)),
        'shallow': Variant(reshaped(spectrum, 2, 128, blocks=1)),
        'shallow-wide': Variant(reshaped(spectrum, 2, 128, 80, blocks=1)),
        'tiny': Variant(tiny),
        'tiny-4-heads': Variant(reshaped(tiny, 4)),
        'tiny-narrow': Variant(reshaped(tiny, 2, 32)),
    }
    return found | others


def random_starts(size):
    "Names of random starts -> shapes"
    v = variants(size)
    shapes = ('narrow', 'shallow', 'shallow-wide', 'tiny', 'tiny-4-heads', 'tiny-narrow')
    return {'random': v['spectrum'], 'random-sequential': v['recon'],
            'random-mended': v['recon-mended'],
            **{f'random-{name}': v[name] for name in shapes}}


GENTLE = dict(layer_decay=.65, freeze='gradual')
WAYS = {way.name: way for way in (
    PLAIN, DECAY, LOW_RATE, PROBE,
    Way('plain-3000', budget=3),
    Way('gradual', freeze='gradual'),
    Way('lr3e-4', lr=3e-4),
    Way('decay.8', layer_decay=.8),
    Way('decay.65-lr3e-4', layer_decay=.65, lr=3e-4),
    Way('decay.65-gradual', **GENTLE),
    Way('decay.65-gradual-lr3e-4', lr=3e-4, **GENTLE),
    Way('decay.65-lr2e-3', layer_decay=.65, lr=2e-3),
    Way('average', average=.99),
    Way('decay.65-average', layer_decay=.65, average=.99),
    Way('quiet', noise=.25),
    Way('plain-samples', at='samples', width=32),                  # the head of version 0.1
    Way('decay.65-samples', layer_decay=.65, at='samples', width=32),
    Way('decay.65-frames32', layer_decay=.65, width=32),
    Way('plain+synthetic', synthetic=.25),
    Way('decay.65+synthetic', layer_decay=.65, synthetic=.25),
)}

PLAN = (
    'spectrum:480 spectrum-aug:480 joint:480 contrastive:480 random | decay.65 plain | .1 | 0 1 2',
    'spectrum:480:1 spectrum-aug:480:1 spectrum:80 | decay.65 plain | .1 | 0 1 2',
    'spectrum:1500 | decay.65 plain | .1 | 0 1 2',
    'spectrum:480 random joint:480 spectrum-aug:480 contrastive:480 spectrum:1500 | plain '
    'decay.65 | 1 | 0 1',
    'spectrum:480 random | decay.65-gradual-lr3e-4 decay.65-average decay.65-lr3e-4 gradual '
    'decay.8 | .1 | 0 1 2',
    'spectrum:480 spectrum-aug:480 joint:480 contrastive:480 spectrum:80 spectrum:1500 random | '
    'probe | 1 | 0',
    'recon:480 recon-mended:480 recon-spectrum:480 random-sequential random-mended | plain low | '
    '.1 | 0 1 2',
    'random | plain-3000 | .1 | 0 1 2',
    'spectrum:480 spectrum-aug:480 joint:480 contrastive:480 random | decay.65 plain | .1 | 3 4',
    'joint:1500 spectrum-aug:1500 spectrum:1500:1 | decay.65 plain | .1 | 0 1 2',
)


def start_of(text, size):
    "The start that 'NAME:480:1' or the name of a random start stands for"
    name, *numbers = text.split(':')
    known, random = variants(size), random_starts(size)
    if name in random and not numbers: return Start(name, random[name])
    if name not in known or not 1 <= len(numbers) <= 2 or not all(n.isdigit() for n in numbers):
        sys.exit(f"'{text}' is no start: give NAME:THOUSANDS or NAME:THOUSANDS:SEED with one of "
                 f"{', '.join(known)}, or one of {', '.join(random)}.")
    thousands, seed = map(int, [*numbers, '0'][:2])
    return Start(name, known[name], 1000*thousands, seed)


def trials_of(plan, size):
    """All trials in the order of the plan: of each line first the pretrainings, then the
    fine-tunings"""
    trials = {}
    for line in plan:
        parts = [part.split() for part in line.split('|')]
        if len(parts) == 4: parts.append(['0'])
        if len(parts) != 5:
            sys.exit(f"'{line}' is no plan line: give STARTS | WAYS | FRACTIONS | FOLDS | SEEDS.")
        for way in parts[1]:
            if way not in WAYS:
                sys.exit(f"'{way}' is no way of fine-tuning: choose from {', '.join(WAYS)}.")
        starts = [start_of(text, size) for text in parts[0]]
        found = [FoldTrial(s) for s in starts if s.windows]
        found += [FoldTrial(s, WAYS[way], float(f), int(fold), int(seed)) for seed in parts[4]
                  for fold in parts[3] for f in parts[2] for way in parts[1] for s in starts]
        for t in found: trials.setdefault(t.name, t)
    return list(trials.values())


def prepare(args):
    "Arrays of the labelled records of train and dev, and of unlabelled ones of train"
    args.out.mkdir(parents=True, exist_ok=True)
    labelled = write_records(args.out, 'labelled', open_splits([args.labelled], ('train', 'dev')))
    save_array(args.out/'labelled-table.npy', manual_where_unsaid(labelled))
    check_unlabelled(labelled,
                     write_records(args.out, 'unlabelled',
                                   open_splits([args.unlabelled], ('train',))))


def drive(args):
    "Run what is not done"
    s, trials = FoldStudy(args.out, args.out, device=args.device), trials_of(args.plan or PLAN,
                                                                             args.size)
    begin_folds(s, trials, args.jobs)
    run_fold_trials(trials, s, args.jobs, args.stop_after)


def show(args):
    "The tables of all trials, means.csv, and the means on the screen"
    import pandas as pd
    if not write_fold_tables(args.out): return print('no trial is scored yet')
    scores = ['p0.1', 'p0.3', 's0.1', 's0.3', 'p_mae', 's_mae', 'p_auc']
    means = pd.read_csv(args.out/'trials.csv').groupby(['fraction', 'way',
                                                        'start'])[scores].mean().round(4)
    means.to_csv(args.out/'means.csv')
    print(means.to_string())


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=('prepare', 'run', 'table'))
    parser.add_argument('--labelled', help='prepare: data with picks')
    parser.add_argument('--unlabelled', help='prepare: data without')
    parser.add_argument('--out', type=Path, default='results', help='folder of arrays and results')
    parser.add_argument('--plan', action='append',
                        help='STARTS | WAYS | FRACTIONS | FOLDS | SEEDS; may be given '
                             'several times')
    parser.add_argument('--size', default='small', help='of the presets: tiny, small or base')
    parser.add_argument('--jobs', type=int, default=12, help='processes at once')
    parser.add_argument('--device', default='auto')
    parser.add_argument('--stop-after', type=float, default=FOREVER,
                        help='seconds after which trials that run are stopped')
    args = parser.parse_args()
    try: {'prepare': prepare, 'run': drive, 'table': show}[args.what](args)
    except UserError as e: sys.exit(str(e))
