"""Rebuild the models of the box, seismodel/box/NAME, from two data sets and the seeds.

    python scripts/build_box.py --unlabelled FOLDER --labelled FOLDER --work FOLDER --only tiny

Each size gives two models: NAME, pretrained, and NAME-picker. A call that was stopped goes on
where it was. What it prints last is how many minutes each part took, and where; both sizes want a
GPU. With --only-train it stops before the models are scored and written, which --as-is then does
on any machine. Both data sets are folders in SeisBench's format, with the columns
`trace_license` (labelled data: `trace_redistribution` as well), `trace_dataset` and
`trace_source_repository`.
"""
import argparse
import json
import subprocess
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import seismodel
from seismodel.core import count_parameters
from seismodel.data.pack import pack
from seismodel.data.sources import open_dataset, open_source
from seismodel.data.windows import WindowDataset
from seismodel.finetuning.calibration import (apply_temperature, calibrate, calibration_error,
                                              fit_temperature, labelled_curves, peaks_of,
                                              rated_peaks, reliability)
from seismodel.finetuning.finetune import finetune
from seismodel.finetuning.heads import load_picker
from seismodel.models.pretraining import from_pretrained, read_config, write_model
from seismodel.picking.evaluation import found_within, score_records
from seismodel.picking.matching import pick_records
from seismodel.picking.seisbench_model import SeisModelPicker
from seismodel.statistics import bootstrap
from seismodel.training.checkpoints import checkpoint_files
from seismodel.training.pretrain import pretrain
from seismodel.training.runlog import read_metrics

ROOT = Path(__file__).resolve().parents[1]

SIZES = {   # samples of a window of pretraining; steps, windows of a step; layer decay
    'tiny': dict(preset='spectrum-tiny', window=2048, pretrain=(4000, 128), finetune=(2000, 32),
                 decay=.65),
    'small': dict(preset='spectrum-small', window=4096, pretrain=(3000, 256), finetune=(2000, 32),
                  decay=.65),
}
# of windows in pretraining: unlabelled records, labelled ones without their labels
SHARES = '3,1'
EVENTS = '3,1'    # of windows in fine-tuning: labelled records, synthetic events in their noise
SEED = 0
SAME = 5          # samples, half of the closest score: by so much half precision may move a pick
AVERAGE = .995    # decay of the moving average of the weights in fine-tuning

NO_LICENCE = 'its repository states no licence'
OTHER_PICKERS = 'its picks were made by other pickers'
REGIONS = {   # of the unlabelled sources, whose table has no such column
    'cx_ipoc': 'northern Chile', 'xp_uturuncu': 'Bolivia', 'pr_saipy': 'Puerto Rico',
    'pb_ridgecrest2019': 'California', '6l_rutford_ice': 'Antarctica', 'z7_iceland': 'Iceland',
    'nz_geonet2014': 'New Zealand', 'ko_turkey2023': 'Türkiye', 'ci_saltonsea2020': 'California',
    'bh_taiwan': 'Taiwan', 'ok_2013': 'Oklahoma', 'sc_pnsn': 'Sichuan'}
WORSE_THAN_A_LINE = (
    'a start that saves labels: interpolation predicts hidden frames better than it does, '
                     'so take it as a small example')
NOT_FOR = [
    'alarms and bulletins that nobody looks at: it is far from an analyst, see the scores',
    'regional and distant earthquakes: the labelled records are of local ones, S seconds after P',
    'ocean-bottom seismometers: of these it knows noise, and no earthquake',
    'polarities and magnitudes: it was never asked for them',
    'benchmarks with records of the sources named above; ncedc_qf120 in particular is in others']


# What may be used

def why_not(
    table: pd.DataFrame,  # metadata
) -> pd.Series:           # (traces,) why a trace is left out; empty where it is not
    "A licence must be stated, redistribution allowed, and picks made by people"
    why = pd.Series('', table.index)
    why[table['trace_license'].fillna('none stated').str.startswith('none stated')] = NO_LICENCE
    if 'trace_redistribution' in table:
        why[~table['trace_redistribution'].fillna('').str.startswith('ok')] = NO_LICENCE
    for phase in 'ps':
        column = f'trace_{phase}_status'
        if column in table: why[table[column].eq('auto')] = OTHER_PICKERS
    return why


def pack_subset(
    folder: Path,  # from `write_subset`
) -> str:          # of the store beside it
    "Pack it once: from a store a GPU need not wait for windows"
    store = folder.with_name(f'{folder.name}-store')
    if not (store/'manifest.json').exists(): pack([str(folder)], store)
    return str(store)


def write_subset(
    source: Path,      # a SeisBench folder
    folder: Path,      # gets the rows that may be used, beside a link to the waveforms
    chosen: list[str], # splits to which that applies; others stay whole, to be scored
) -> pd.DataFrame:     # all rows, with the column why
    "A data set of what may be used; picks of other models are not even carried along"
    table = pd.read_csv(source/'metadata.csv', low_memory=False)
    table['why'] = why_not(table).where(table['split'].isin(chosen), '')
    models = [c for c in table if c.endswith('_model_sample')]
    folder.mkdir(parents=True, exist_ok=True)
    kept = table[table['why'].eq('')].drop(columns=['why', *models])
    kept.to_csv(folder/'metadata.csv', index=False)
    link = folder/'waveforms.hdf5'
    if not link.exists(): link.symlink_to((source/'waveforms.hdf5').resolve())
    return table


# Training

def is_done(
    run: Path,  # folder of a run
) -> bool:
    "Whether a run has made all of its steps"
    if not (run/'metrics.jsonl').exists(): return False
    rows, steps = read_metrics(run), read_config(run)['train']['steps']
    return bool(rows) and rows[-1]['step'] >= steps


def timed(
    file: Path,  # JSON with minutes of each part
    name: str,   # of the part
    where: str,  # the device
    job,         # called without arguments
):
    "Do a part, and add its minutes to those of earlier calls"
    since = time.monotonic()
    try: job()
    finally:
        minutes = read_minutes(file)
        before, _ = minutes.get(name, (0., ''))
        minutes[name] = round(before + (time.monotonic() - since)/60, 2), where
        file.write_text(json.dumps(minutes, indent=1), encoding='utf-8')


def read_minutes(
    file: Path,  # from `timed`
) -> dict:       # name -> minutes, where
    "How long each part took so far"
    return json.loads(file.read_text(encoding='utf-8')) if file.exists() else {}


def train_pretrained(a, size, run):
    "Pretrain, or go on"
    steps, batch = size['pretrain']
    if is_done(run): return
    if (run/'config.json').exists(): return pretrain(resume=run, device=a.device)
    data = [pack_subset(a.work/name) for name in ('unlabelled', 'labelled')]
    pretrain(size['preset'], data, SHARES, size['window'], steps=steps, batch_size=batch, seed=SEED,
             device=a.device, validate_every=200, checkpoint_every=100, out=run)


def train_picker(a, size, start, run):
    "Fine-tune, or go on"
    steps, batch = size['finetune']
    if is_done(run): return
    if (run/'config.json').exists(): return finetune(resume=run, device=a.device)
    finetune(str(start), data=[pack_subset(a.work/'labelled'), 'synthetic'], data_weights=EVENTS,
             steps=steps, batch_size=batch, seed=SEED, average=AVERAGE, layer_decay=size['decay'],
             device=a.device, validate_every=250, validation_windows=128, checkpoint_every=100,
             out=run)


# Half precision

def halved(
    weights: dict,  # name -> tensor
) -> dict:          # matrices in half precision; biases and scales as they are
    "Half of the bytes"
    half = lambda w: w.half() if w.is_floating_point() and w.ndim > 1 else w
    return {name: half(w) for name, w in weights.items()}


def places(
    curves: dict,  # from `labelled_curves`
    args: dict,    # thresholds
) -> list[list]:   # samples of the picks, of each window and phase
    "Where the picks are"
    return [peaks_of(p, args[f'{phase}_threshold'])[:, 0].tolist()
            for phase in 'PS' for p in curves[phase][0]]


def moved(
    before: list[list],  # from `places`
    after: list[list],
# picks; those that came or went; samples that the others moved at most
) -> tuple[int, int, float]:
    "What a change of the weights did to picks"
    count = sum(map(len, before))
    changed = sum(abs(len(x) - len(y)) for x, y in zip(before, after))
    away = [abs(p - q) for x, y in zip(before, after) if len(x) == len(y) for p, q in zip(x, y)]
    return count, changed, max(away, default=0.)


def shipped(picker, windows, args) -> tuple[dict, str]:
    "The weights of a picker for the box, and what half precision does to its picks on some windows"
    whole = {name: w.clone() for name, w in picker.state_dict().items()}
    before = places(labelled_curves(picker, windows), args)
    picker.load_state_dict(halved(whole))
    count, changed, far = moved(before, places(labelled_curves(picker, windows), args))
    said = (f'of {count} picks on dev windows {changed} came or went, '
            f'none moved by over {far:g} samples')
    if not changed and far <= SAME: return halved(whole), f'matrices in half precision: {said}'
    picker.load_state_dict(whole)
    return whole, f'single precision; in half precision, {said}'


# Probabilities and scores

def windows_of(a, split, count, data='labelled'):
    "Windows of a split, the same ones for every size"
    return WindowDataset([open_source(str(a.work/data), split)], count, seed=SEED)


def temper(picker, curves) -> str:
    """Give a picker a temperature if that helps on windows that did not choose it; says what was
    done"""
    table = np.concatenate([rated_peaks(*curves[phase]) for phase in 'PS'])
    first, second = (table[table[:, 0] % 2 == k, 1:] for k in (0, 1))
    t = fit_temperature(*first.T)
    p = np.clip(second[:, 0], 1e-6, 1 - 1e-6)
    cooled = 1/(1 + ((1 - p)/p)**(1/t))
    before, after = (calibration_error(reliability(q, second[:, 1])) for q in (p, cooled))
    said = (f'{before:.3f} as trained, {after:.3f} with the temperature {t} '
            'that the first half chose')
    said = f'expected calibration error on the second half of the dev windows: {said}'
    if before <= .05 or after >= before: return f'as trained. {said}'
    apply_temperature(picker, t)
    return f'logits were divided by {t}. {said}'


def reliability_rows(picker, windows) -> pd.DataFrame:
    "The reliability curve of each phase"
    curves = labelled_curves(picker, windows)
    rows = lambda phase: pd.DataFrame(reliability(*rated_peaks(*curves[phase])[:, 1:].T))
    return pd.concat([rows(phase).assign(phase=phase) for phase in 'PS'])


def store_rows(file, model, rows):
    "Replace the rows of a model in a table"
    rows = rows.round(4).assign(model=model)
    old = [pd.read_csv(file).query('model != @model')] if file.exists() else []
    pd.concat([*old, rows]).sort_values(['model', 'phase', 'probability']).to_csv(file, index=False)


def scores_of(
    net: SeisModelPicker,
    dataset,               # the test records
    untrained: list[str],  # sources of which no record was trained on
) -> pd.DataFrame:         # records, kind, n, metric, value, low, high
    "Fractions of labels found and of noise records disturbed, at the picker's own thresholds"
    p, s = (pick_records(net, dataset, net.default_args[f'{phase}_threshold']) for phase in 'PS')
    found = [dict(P=one['P'], S=two['S']) for one, two in zip(p, s)]
    table = score_records(net, dataset, found=found)
    automatic = set(dataset.metadata.query('trace_p_status == "auto"')['trace_dataset'])
    parts = {'all test records': table,
             f"without {', '.join(untrained)}": table[~table['trace_dataset'].isin(untrained)],
             **{f"{source}{' (automatic labels)' if source in automatic else ''}": own
                for source, own in table.groupby('trace_dataset')}}
    near = {f'within {t} s': found_within(t) for t in (.1, .3, .5)}
    disturbed, rows = {'with a pick': lambda t: (t['picks'] > 0).mean()}, []
    for part, records in parts.items():
        for kind in ('P', 'S', 'noise'):
            own = records[records['kind'] == kind]
            for name, metric in (disturbed if kind == 'noise' else near).items():
                if len(own):
                    rows.append((part, kind, len(own), name, *bootstrap(metric, own, draws=500)))
    return pd.DataFrame(rows, columns=['records', 'kind', 'n', 'metric', 'value', 'low', 'high'])


# Cards

def joined(values) -> str:
    "Different texts, in order, without what is missing"
    return ', '.join(sorted({v for v in values if isinstance(v, str)}))


def sources_of(
    table: pd.DataFrame,  # metadata of what was trained on
) -> list[dict]:
    "Records, hours, region, repository and licence of each source"
    rows = []
    for name, part in table.groupby('trace_dataset'):
        hours = (part['trace_npts']/part['trace_sampling_rate_hz']).sum()/3600
        region = joined(part.get('trace_region', [])) or REGIONS.get(name, '')
        rows.append(dict(source=name, records=len(part), hours=round(float(hours), 2),
                         region=region,
                         repository=joined(part['trace_source_repository']),
                         licence=joined(part['trace_license'])))
    return rows


def left_out_of(
    tables: dict,  # all metadata, with the column why
) -> list[dict]:
    "What was not trained on, and why"
    gone = pd.concat([t[t['why'].ne('')] for t in tables.values()])
    groups = gone.groupby(['trace_dataset', 'why'])
    return [dict(source=name, records=len(part), why=why) for (name, why), part in groups]


def used(tables, *names) -> pd.DataFrame:
    "Metadata of the training records of one data set or several"
    return pd.concat([tables[name].query('split == "train" and why == ""') for name in names])


def stopped(run, steps) -> str:
    "What is said of a run that has not made all of its steps"
    if is_done(run): return ''
    return f', stopped after step {int(checkpoint_files(run)[0].stem.split("-")[1])} of {steps}'


def recipe_of(a, size, name, minutes) -> list[str]:
    "The commands, how long they took, and the version of the code"
    (steps, batch), (fine, fine_batch) = size['pretrain'], size['finetune']
    lines = [f"seismodel pretrain --preset {size['preset']} --data UNLABELLED --data LABELLED "
             f"--data-weights {SHARES} --window {size['window']} --steps {steps} "
             f'--batch-size {batch} --seed {SEED} ({steps*batch:,} windows, without labels)'
             + stopped(a.work/name.split('-')[0]/'pretrain', steps)]
    if name.endswith('-picker'):
        lines.append(f"seismodel finetune --from {name.removesuffix('-picker')} --data LABELLED "
                     f'--data synthetic --data-weights {EVENTS} --steps {fine} '
                     f'--batch-size {fine_batch} --average {AVERAGE} '
                     f"--layer-decay {size['decay']} --seed {SEED} "
                     f'({fine*fine_batch:,} windows)'
                     + stopped(a.work/name.split('-')[0]/'finetune', fine))
    own = {part: m for part, m in minutes.items() if part.split()[0] in name.split('-')}
    took = '; '.join(f'{part} {m:g} on {where}' for part, (m, where) in own.items())
    return [*lines,
            f'by scripts/build_box.py of seismodel {seismodel.__version__}; minutes: {took}']


def commit() -> str:
    "Of the code that trains"
    said = subprocess.run(['git', 'describe', '--always', '--dirty'], capture_output=True,
                          text=True, cwd=ROOT)
    return said.stdout.strip() or 'unknown'


def score_table(scores: pd.DataFrame) -> list[dict]:
    "A row for each part and phase"
    rows = []
    groups = scores[scores['kind'].ne('noise')].groupby(['records', 'kind', 'n'], sort=False)
    for (part, kind, n), own in groups:
        shown = {row.metric: f'{row.value:.2f} [{row.low:.2f}, {row.high:.2f}]'
                 for row in own.itertuples()}
        rows.append(dict(records=part, phase=kind, labels=n, **shown))
    return rows


def noise_table(scores: pd.DataFrame) -> list[dict]:
    "A row for each part"
    return [dict(records=r.records, number=r.n,
                 disturbed=f'{r.value:.2f} [{r.low:.2f}, {r.high:.2f}]')
            for r in scores[scores['kind'].eq('noise')].itertuples()]


def threshold_table(args: dict, quality: dict) -> list[dict]:
    "A row for each phase"
    rows = []
    for phase in 'PS':
        (a, b), q = args[f'{phase}_uncertainty'], quality[phase]
        inside = q['coverage']['all'][0] if 'coverage' in q else float('nan')
        rows.append({'phase': phase, 'threshold': args[f'{phase}_threshold'], 'F1': q['f1'],
                     'uncertainty': f'{a:.3f} s + {b:.2f} widths', 'residuals inside': inside})
    return rows


def ship_pretrained(a, name, tables, minutes):
    "Weights in half precision, and a card with what they predict on dev"
    run, size = a.work/name/'pretrain', SIZES[name]
    model, config = from_pretrained(run), read_config(run)
    weights = halved(model.state_dict())
    model.load_state_dict(weights)
    dev = windows_of(a, 'dev', 256, 'unlabelled')
    x = dev.batch(range(len(dev)))['x']
    with torch.no_grad(): m = model(x, torch.Generator().manual_seed(SEED)).metrics
    error, line, zero = (float(m[f'{k}spectrum_mse']) for k in ('', 'line_', 'zero_'))
    windows = size['pretrain'][0]*size['pretrain'][1]
    card = {'summary': f'{count_parameters(model)/1e6:.2f} M parameters, pretrained on the '
                       f'spectra of '
                       f'{windows:,} windows without labels: to fine-tune, or for features',
            'trained on, without labels': sources_of(used(tables, 'unlabelled', 'labelled')),
            'left out': left_out_of(tables), 'recipe': recipe_of(a, size, name, minutes),
            'weights': ['matrices in half precision, biases and scales in single precision'],
            'scores of these weights': [
                f'error of the band powers of hidden frames on {len(x)} dev windows of unlabelled '
                f'records: '
                f'{error:.3f}; by interpolation {line:.3f}, by the mean of a band {zero:.3f}'],
            'not for': ([WORSE_THAN_A_LINE] if error > line else []) + NOT_FOR[-1:]}
    write_model(a.box/name, {'model': config['model'], 'train': config['train'], 'card': card},
                weights)


def ship_picker(a, name, tables, minutes):
    "Temperature, half precision, thresholds, uncertainties, scores, card"
    run, box, size = a.work/name/'finetune', a.box/f'{name}-picker', SIZES[name]
    picker, config, dev = load_picker(run), read_config(run), windows_of(a, 'dev', 1024)
    tempered = temper(picker, labelled_curves(picker, dev))
    weights, precision = shipped(picker, dev, calibrate(picker, dev)[0])
    args, quality = calibrate(picker, dev)                # of the weights that are shipped
    shared = {k: config[k] for k in ('model', 'train', 'picker')}
    shared |= {'default_args': args, 'calibration': quality}
    write_model(box, shared, weights)                     # so that these files are scored
    untrained = sorted(set(tables['labelled'].query('why == @NO_LICENCE')['trace_dataset']))
    scores = scores_of(SeisModelPicker.from_pretrained(box),
                       open_dataset(str(a.work/'labelled')).get_split('test'), untrained)
    whole = scores[scores['records'].eq('all test records')].set_index(['kind', 'metric'])['value']
    card = {'summary': f"{count_parameters(picker)/1e6:.2f} M parameters, picks P and S: within "
                       f"0.3 s of "
                       f"{whole['P', 'within 0.3 s']:.2f} and {whole['S', 'within 0.3 s']:.2f} of "
                       f"the labels "
                       f"of test records; a pick in {whole['noise', 'with a pick']:.2f} of noise "
                       f"records",
            'trained on, with labels': sources_of(used(tables, 'labelled')),
            'pretrained on, without labels': sources_of(used(tables, 'unlabelled', 'labelled')),
            'left out': left_out_of(tables),
            'recipe': recipe_of(a, size, f'{name}-picker', minutes),
            'weights': [precision], 'probabilities': [tempered],
            'thresholds and uncertainties, from windows of the dev records':
                threshold_table(args, quality),
            'scores of these weights at these thresholds, with 95 % intervals': score_table(scores),
            'noise records with a pick': noise_table(scores), 'not for': NOT_FOR}
    write_model(box, {**shared, 'card': card, 'scores': scores.to_dict('records')}, weights)
    store_rows(a.curves, f'{name}-picker', reliability_rows(picker, windows_of(a, 'test', 2048)))


def build_size(a, name, tables):
    "Both models of a size"
    size, work, file = SIZES[name], a.work/name, a.work/'minutes.json'
    work.mkdir(parents=True, exist_ok=True)
    start, run = work/'pretrain', work/'finetune'
    if not a.as_is:
        timed(file, f'{name} pretraining', a.where, lambda: train_pretrained(a, size, start))
        timed(file, f'{name} fine-tuning', a.where, lambda: train_picker(a, size, start, run))
    minutes = read_minutes(file)
    if not a.only_train:
        ship_pretrained(a, name, tables, minutes)
        ship_picker(a, name, tables, minutes)
    for part, (m, where) in minutes.items(): print(f'{part:24} {m:7.1f} minutes on {where}')


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    add = parser.add_argument
    add('--unlabelled', type=Path, required=True,
        help='a SeisBench folder of windows, for pretraining')
    add('--labelled', type=Path, required=True,
        help='a SeisBench folder with picks: train, dev and test')
    add('--work', type=Path, required=True,
        help='a folder for runs; a call goes on with what is there')
    add('--box', type=Path, default=ROOT/'seismodel/box', help='gets the models')
    add('--curves', type=Path, default=ROOT/'nbs/runs/box_reliability.csv', help='gets the curves')
    add('--only', choices=SIZES, action='append', help='a size; all if not given')
    add('--as-is', action='store_true', help='no training: models of what is trained so far')
    add('--only-train', action='store_true', help='train, and write no models yet')
    add('--device', default='auto')
    a = parser.parse_args()
    a.work, gpu = a.work.resolve(), a.device != 'cpu' and torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else f'{torch.get_num_threads()} CPU thread(s)'
    a.where = f'{device}, commit {commit()}'
    sets = {'unlabelled': a.unlabelled, 'labelled': a.labelled}
    tables = {k: write_subset(folder, a.work/k, ['train', 'dev']) for k, folder in sets.items()}
    for name in a.only or SIZES: build_size(a, name, tables)


if __name__ == '__main__': main()
