"""Rebuild the models of the box, seismodel/box/NAME, from two data sets and the seeds.

    python scripts/build_box.py --unlabelled FOLDER --labelled FOLDER --work FOLDER --only tiny

Each size gives two models: NAME, pretrained, and NAME-picker. A call that was stopped goes on where it was. What it
prints last is how many minutes each part took, and on what. `small` wants a GPU; `tiny` takes two CPU cores.
Both data sets are folders in SeisBench's format, with the columns `trace_license` (labelled data: `trace_redistribution`
as well), `trace_dataset` and `trace_source_repository`.
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
from seismodel.data.sources import open_dataset, open_source
from seismodel.data.windows import WindowDataset
from seismodel.finetuning.calibration import (apply_temperature, calibrate, calibration_error, fit_temperature,
                                              labelled_curves, peaks_of, rated_peaks, reliability)
from seismodel.finetuning.finetune import finetune
from seismodel.finetuning.heads import load_picker
from seismodel.models.pretraining import from_pretrained, read_config, write_model
from seismodel.picking.evaluation import found_within, score_records
from seismodel.picking.matching import pick_records
from seismodel.picking.seisbench_model import SeisModelPicker
from seismodel.statistics import bootstrap
from seismodel.training.pretrain import pretrain
from seismodel.training.runlog import read_metrics

ROOT = Path(__file__).resolve().parents[1]

SIZES = {   # samples of a window of pretraining; steps and windows of a step: of pretraining, of fine-tuning
    'tiny': dict(preset='spectrum-tiny', window=2048, pretrain=(500, 16), finetune=(900, 32)),
    'small': dict(preset='spectrum-small', window=4096, pretrain=(6000, 256), finetune=(3000, 32)),
}
WEIGHTS = '3,1'    # of the windows of pretraining: unlabelled records, and the labelled ones without their labels
SEED = 0
AVERAGE = .995    # decay of the moving average of the weights in fine-tuning


def licensed(
    table: pd.DataFrame,  # metadata
) -> pd.Series:           # (traces,) why a trace is left out; empty where it is not
    "A repository must state a licence, and redistribution must be allowed where the table says anything about it"
    why = pd.Series('', table.index)
    why[table['trace_license'].fillna('none stated').str.startswith('none stated')] = 'its repository states no licence'
    if 'trace_redistribution' in table:
        why[~table['trace_redistribution'].fillna('').str.startswith('ok')] = 'its repository states no licence'
    for phase in 'ps':
        if f'trace_{phase}_status' not in table: continue
        why[table[f'trace_{phase}_status'].eq('auto')] = 'its picks were made by other pickers'
    return why


def write_subset(
    source: Path,        # a SeisBench folder
    folder: Path,        # gets the rows that may be used
    training: list[str], # splits to which that applies; others stay whole, to be scored
) -> pd.DataFrame:       # all rows, with the column why
    "The metadata of what may be used, beside a link to the waveforms"
    table = pd.read_csv(source/'metadata.csv', low_memory=False)
    table['why'] = licensed(table).where(table['split'].isin(training), '')
    folder.mkdir(parents=True, exist_ok=True)
    models = [c for c in table if c.endswith('_model_sample')]          # picks of other models are not even carried along
    table[table['why'].eq('')].drop(columns=['why', *models]).to_csv(folder/'metadata.csv', index=False)
    link = folder/'waveforms.hdf5'
    if not link.exists(): link.symlink_to((source/'waveforms.hdf5').resolve())
    return table


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
    job,         # called without arguments
):
    "Do a part, and add its minutes to those of earlier calls"
    since = time.monotonic()
    try: job()
    finally:
        minutes = json.loads(file.read_text()) if file.exists() else {}
        minutes[name] = round(minutes.get(name, 0.) + (time.monotonic() - since)/60, 2)
        file.write_text(json.dumps(minutes, indent=1))


def train_pretrained(a, size, run):
    "Pretrain, or go on"
    steps, batch = size['pretrain']
    if is_done(run): return
    if (run/'config.json').exists(): return pretrain(resume=run, device=a.device)
    pretrain(size['preset'], [str(a.work/'unlabelled'), str(a.work/'labelled')], WEIGHTS, size['window'], steps=steps, batch_size=batch,
             seed=SEED, device=a.device, validate_every=200, checkpoint_every=100, out=run)


def train_picker(a, size, start, run):
    "Fine-tune, or go on"
    steps, batch = size['finetune']
    if is_done(run): return
    if (run/'config.json').exists(): return finetune(resume=run, device=a.device)
    finetune(str(start), data=[str(a.work/'labelled')], steps=steps, batch_size=batch, average=AVERAGE, seed=SEED,
             device=a.device, validate_every=250, validation_windows=128, checkpoint_every=100, out=run)


REGIONS = {   # of the unlabelled sources, whose table has no such column
    'cx_ipoc': 'northern Chile', 'xp_uturuncu': 'Bolivia', 'pr_saipy': 'Puerto Rico', 'pb_ridgecrest2019': 'California',
    '6l_rutford_ice': 'Antarctica', 'z7_iceland': 'Iceland', 'nz_geonet2014': 'New Zealand', 'ko_turkey2023': 'Türkiye',
    'ci_saltonsea2020': 'California', 'bh_taiwan': 'Taiwan', 'ok_2013': 'Oklahoma', 'sc_pnsn': 'Sichuan'}

NOT_FOR = [
    'alarms and bulletins that nobody looks at: probabilities are of the quality shown here, not of that of an analyst',
    'regional and distant earthquakes: the labelled records are of local ones, with S a few seconds after P',
    'ocean-bottom seismometers: no record of an earthquake on one was trained on, only noise',
    'polarities and magnitudes: it was never asked for them',
    'benchmarks with records of the sources named above; ncedc_qf120 in particular appears in others']


def joined(values) -> str:
    "Different values, in order, without those that are missing"
    return ', '.join(sorted({str(v) for v in values if isinstance(v, str)}))


def sources_of(
    table: pd.DataFrame,  # metadata of what was trained on
) -> list[dict]:          # of each source
    "Records, hours, region, repository and licence, source by source"
    rows = []
    for name, part in table.groupby('trace_dataset'):
        region = joined(part.get('trace_region', [])) or REGIONS.get(name, '')
        rows.append(dict(source=name, records=len(part), hours=round(float((part['trace_npts']/part['trace_sampling_rate_hz']).sum()/3600), 2),
                         region=region, repository=joined(part['trace_source_repository']), licence=joined(part['trace_license'])))
    return rows


def left_out_of(
    table: pd.DataFrame,  # all metadata, with the column why
) -> list[dict]:
    "What was not trained on, and why"
    gone = table[table['why'].ne('')]
    return [dict(source=name, records=len(part), why=why) for (name, why), part in gone.groupby(['trace_dataset', 'why'])]


def halved(
    weights: dict,  # name -> tensor
) -> dict:          # matrices in half precision; biases and scales as they are
    "Half of the bytes"
    return {name: w.half() if w.is_floating_point() and w.ndim > 1 else w for name, w in weights.items()}


def dev_windows(a, count):
    "Labelled dev windows, the same for every size"
    return WindowDataset([open_source(str(a.work/'labelled'), 'dev')], count, seed=SEED)


def peak_places(curves, thresholds) -> dict:
    "Samples of all picks of some windows: phase -> one list for each window"
    return {phase: [peaks_of(p, thresholds[f'{phase}_threshold'])[:, 0].tolist() for p in curves[phase][0]] for phase in 'PS'}


def moved(before: dict, after: dict) -> tuple[int, int, float]:
    "How many picks there were, how many came or went, and by how many samples the others moved at most"
    count = changed = 0
    far = 0.
    for phase in 'PS':
        for x, y in zip(before[phase], after[phase]):
            count += len(x)
            if len(x) == len(y): far = max([far, *(abs(p - q) for p, q in zip(x, y))])
            else: changed += abs(len(x) - len(y))
    return count, changed, far


def peaks_right(curves) -> np.ndarray:
    "Peaks of both phases, see `rated_peaks`"
    return np.concatenate([rated_peaks(*curves[phase]) for phase in 'PS'])


def temper(picker, curves) -> list[str]:
    "Give a picker a temperature where that helps on windows that were not used to choose it; says what was done"
    table = peaks_right(curves)
    first, second = (table[table[:, 0] % 2 == k] for k in (0, 1))
    t = fit_temperature(*first[:, 1:].T)
    logit = np.log(second[:, 1]/np.clip(1 - second[:, 1], 1e-6, 1))
    errors = [calibration_error(reliability(p, second[:, 2])) for p in (second[:, 1], 1/(1 + np.exp(-logit/t)))]
    said = f'expected calibration error of the other half of the dev windows {errors[0]:.3f} before, {errors[1]:.3f} with temperature {t}'
    if errors[0] <= .05 or errors[1] >= errors[0]: return [f'probabilities are as trained: {said}']
    apply_temperature(picker, t)
    return [f'logits were divided by a temperature that was chosen on half of the dev windows: {said}']


def picks_at(net, dataset) -> list[dict]:
    "Picks of whole records at the picker's own thresholds"
    args = net.default_args
    p, s = (pick_records(net, dataset, args[f'{phase}_threshold']) for phase in 'PS')
    return [dict(P=one['P'], S=two['S']) for one, two in zip(p, s)]


def scores_of(net, dataset, untrained: list[str]) -> pd.DataFrame:
    "Shares of labels found and of noise records disturbed, with 95 % intervals over events"
    records = score_records(net, dataset, found=picks_at(net, dataset))
    without = records[~records['trace_dataset'].isin(untrained)]
    parts = {'all test records': records, f"without {', '.join(untrained)}": without,
             **{name: part for name, part in records.groupby('trace_dataset')}}
    rows = []
    for part, table in parts.items():
        for kind in ('P', 'S', 'noise'):
            own = table[table['kind'] == kind]
            if not len(own): continue
            metrics = {'with a pick': lambda t: (t['picks'] > 0).mean()} if kind == 'noise' else {f'within {t} s': found_within(t) for t in (.1, .3, .5)}
            rows += [(part, kind, len(own), name, *bootstrap(f, own, draws=1000)) for name, f in metrics.items()]
    return pd.DataFrame(rows, columns=['records', 'kind', 'n', 'metric', 'value', 'low', 'high'])


def score_lines(scores: pd.DataFrame) -> list[dict]:
    "One row for each part and phase, for the card"
    rows = []
    for (part, kind, n), own in scores[scores['kind'].ne('noise')].groupby(['records', 'kind', 'n'], sort=False):
        rows.append(dict(records=part, phase=kind, labels=n, **{m: f'{v:.2f} [{lo:.2f}, {hi:.2f}]' for m, v, lo, hi in
                                                               own[['metric', 'value', 'low', 'high']].itertuples(index=False)}))
    return rows


def commit() -> str:
    "The version of the code"
    said = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True, cwd=ROOT)
    return f"{seismodel.__version__}, commit {said.stdout.strip() or 'unknown'}"


def recipe_lines(a, size, name, minutes) -> list[str]:
    "The commands, and how long they took"
    (steps, batch), (fine, fine_batch) = size['pretrain'], size['finetune']
    where = torch.cuda.get_device_name() if torch.cuda.is_available() and a.device != 'cpu' else f'{torch.get_num_threads()} CPU threads'
    lines = [f"seismodel pretrain --preset {size['preset']} --data UNLABELLED --data LABELLED --data-weights {WEIGHTS} --window {size['window']} --steps {steps} "
             f'--batch-size {batch} --seed {SEED}   ({steps*batch:,} windows, no labels)']
    if name.endswith('-picker'):
        lines.append(f'seismodel finetune --from {name.removesuffix("-picker")} --data LABELLED --steps {fine} --batch-size {fine_batch} '
                     f'--average {AVERAGE} --seed {SEED}   ({fine*fine_batch:,} windows)')
    took = ', '.join(f'{part} {m:g}' for part, m in minutes.items() if part.startswith(name.split('-')[0] + ' '))
    return [*lines, f'all by scripts/build_box.py; minutes on {where}: {took}', f'seismodel {commit()}']


def ship_pretrained(a, name, size, tables, minutes):
    "Weights in half precision, and a card with what they predict on dev"
    run, box = a.work/name/'pretrain', a.box/name
    model = from_pretrained(run)
    weights = halved(model.state_dict())
    model.load_state_dict(weights)
    windows = WindowDataset([open_source(str(a.work/'unlabelled'), 'dev')], 256, seed=SEED)
    x = windows.batch(range(256))['x']
    with torch.no_grad(): m = model(x, torch.Generator().manual_seed(SEED)).metrics
    said = (f"error of the band powers of hidden frames {m['spectrum_mse']:.3f} on 256 dev windows of unlabelled records; "
            f"{m['line_spectrum_mse']:.3f} by interpolation, {m['zero_spectrum_mse']:.3f} by the mean")
    summary = (f"{count_parameters(model)/1e6:.2f} M parameters, pretrained on spectra of {size['pretrain'][0]*size['pretrain'][1]:,} windows without labels: "
               'to fine-tune, or for features')
    unlabelled, labelled = (tables[k].query('split == "train" and why == ""') for k in ('unlabelled', 'labelled'))
    card = {'summary': summary, 'trained on, without labels': sources_of(pd.concat([unlabelled, labelled])),
            'left out': left_out_of(tables['unlabelled']) + left_out_of(tables['labelled']), 'recipe': recipe_lines(a, size, name, minutes),
            'weights': ['matrices in half precision, biases and scales in single precision'], 'scores': [said], 'not for': NOT_FOR[1:]}
    config = read_config(run)
    write_model(box, {'model': config['model'], 'preset': config['preset'], 'train': config['train'], 'card': card}, weights)


def ship_picker(a, name, size, tables, minutes):
    "Temperature, half precision, thresholds, uncertainties, scores, card"
    run, box = a.work/name/'finetune', a.box/f'{name}-picker'
    picker = load_picker(run)
    tempered = temper(picker, labelled_curves(picker, dev_windows(a, 1024)))
    args, _ = calibrate(picker, dev_windows(a, 1024))
    whole, before = picker.state_dict(), labelled_curves(picker, dev_windows(a, 512))
    whole = {k: v.clone() for k, v in whole.items()}
    picker.load_state_dict(halved(whole))
    count, changed, far = moved(peak_places(before, args), peak_places(labelled_curves(picker, dev_windows(a, 512)), args))
    half = not changed and far <= 1
    said = f'of {count} picks on dev windows {changed} came or went and none moved by more than {far:g} samples'
    if half: weights, how = halved(whole), f'matrices in half precision: {said}'
    else: weights, how = whole, f'single precision; in half precision, {said}'
    picker.load_state_dict(weights)
    args, quality = calibrate(picker, dev_windows(a, 1024))
    config = read_config(run)
    shared = {'model': config['model'], 'train': config['train'], 'picker': config['picker'], 'default_args': args, 'calibration': quality}
    write_model(box, shared, weights)                     # the files that are scored are those that are shipped
    net = SeisModelPicker.from_pretrained(box)
    test = open_dataset(str(a.work/'labelled')).get_split('test')
    untrained = sorted(set(tables['labelled'].query('why == "its repository states no licence"')['trace_dataset']))
    scores = scores_of(net, test, untrained)
    rows = reliability_rows(picker, a)
    write_model(box, {**shared, 'card': picker_card(a, name, size, tables, minutes, [tempered, how, args, quality, scores]),
                      'scores': scores.to_dict('records')}, weights)
    store_rows(a.curves, f'{name}-picker', rows)


def reliability_rows(picker, a) -> pd.DataFrame:
    "The reliability curve of each phase, on windows of the test records"
    windows = WindowDataset([open_source(str(a.work/'labelled'), 'test')], 2048, seed=SEED)
    curves = labelled_curves(picker, windows)
    parts = [pd.DataFrame(reliability(*rated_peaks(*curves[phase])[:, 1:].T)).assign(phase=phase) for phase in 'PS']
    return pd.concat(parts)


def store_rows(file, model, rows):
    "Replace the rows of a model in a table"
    rows = rows.round(4).assign(model=model)
    if file.exists():
        old = pd.read_csv(file)
        rows = pd.concat([old[old['model'] != model], rows])
    rows.to_csv(file, index=False)


def picker_card(a, name, size, tables, minutes, found) -> dict:
    "What the picker says of itself"
    tempered, how, args, quality, scores = found
    value = lambda kind, metric: scores.query('records == "all test records" and kind == @kind and metric == @metric')['value'].iloc[0]
    parameters = count_parameters(load_picker(a.work/name/'finetune'))
    summary = (f"{parameters/1e6:.2f} M parameters, picks P and S: {value('P', 'within 0.3 s'):.2f} and {value('S', 'within 0.3 s'):.2f} of the labels "
               f"of test records within 0.3 s, a pick in {value('noise', 'with a pick'):.2f} of the noise records")
    labelled, unlabelled = (tables[k].query('split == "train" and why == ""') for k in ('labelled', 'unlabelled'))
    noise = scores[scores['kind'].eq('noise')]
    lines = [f'{part}: {v:.2f} [{lo:.2f}, {hi:.2f}] of {n}' for part, n, v, lo, hi in noise[['records', 'n', 'value', 'low', 'high']].itertuples(index=False)]
    chosen = [f"{p}: {args[f'{p}_threshold']:g}, F1 {quality[p]['f1']:.2f} of {quality[p]['picks']} picks near labels; {args.get(f'{p}_uncertainty')} "
              f"for the uncertainty, with {quality[p].get('coverage', {}).get('all', ['?'])[0]} of the residuals inside" for p in 'PS']
    return {'summary': summary, 'trained on, with labels': sources_of(labelled), 'pretrained on, without labels': sources_of(pd.concat([unlabelled, labelled])),
            'left out': left_out_of(tables['labelled']) + left_out_of(tables['unlabelled']), 'recipe': recipe_lines(a, size, f'{name}-picker', minutes),
            'weights': [how], 'probabilities': tempered, 'thresholds and uncertainties, from windows of the dev records of the same sources': chosen,
            'scores of these weights at these thresholds, with 95 % intervals over events': score_lines(scores),
            'noise records with a pick': lines, 'not for': NOT_FOR}


def build_size(a, name, tables):
    "Both models of a size"
    size, work, minutes = SIZES[name], a.work/name, a.work/'minutes.json'
    work.mkdir(parents=True, exist_ok=True)
    timed(minutes, f'{name} pretraining', lambda: train_pretrained(a, size, work/'pretrain'))
    timed(minutes, f'{name} fine-tuning', lambda: train_picker(a, size, work/'pretrain', work/'finetune'))
    took = json.loads(minutes.read_text())
    ship_pretrained(a, name, size, tables, took)
    ship_picker(a, name, size, tables, took)
    for part, m in took.items(): print(f'{part:24} {m:7.1f} minutes')


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--unlabelled', type=Path, required=True, help='a SeisBench folder of windows, for pretraining')
    parser.add_argument('--labelled', type=Path, required=True, help='a SeisBench folder with picks and the splits train, dev and test')
    parser.add_argument('--work', type=Path, required=True, help='a folder for runs; a call goes on with what lies there')
    parser.add_argument('--box', type=Path, default=ROOT/'seismodel/box', help='gets the models')
    parser.add_argument('--curves', type=Path, default=ROOT/'nbs/runs/box_reliability.csv', help='gets the reliability curves')
    parser.add_argument('--only', choices=SIZES, action='append', help='a size; all if not given')
    parser.add_argument('--device', default='auto')
    a = parser.parse_args()
    a.work = a.work.resolve()
    tables = {'unlabelled': write_subset(a.unlabelled, a.work/'unlabelled', ['train', 'dev']),
              'labelled': write_subset(a.labelled, a.work/'labelled', ['train', 'dev'])}
    for name in a.only or SIZES: build_size(a, name, tables)


if __name__ == '__main__': main()
