"""A user's first day, in one process: imports, help, a run that is stopped and resumed, a store,
picks. Prints what it saw"""
import importlib
import json
import multiprocessing
import pkgutil
import signal
from pathlib import Path


def modules():
    "Every module of the package: name -> what it lacked to be imported, or None"
    import seismodel
    found = {}
    for module in pkgutil.walk_packages(seismodel.__path__, 'seismodel.'):
        if module.name.endswith('__main__'): continue
        try: found[module.name] = importlib.import_module(module.name) and None
        except ImportError as e: found[module.name] = e.name
    return found


def helps():
    "The exit code of --help, of every command"
    from seismodel.cli import COMMANDS, main
    codes = {'': main(['--help'])}
    for command in COMMANDS:
        try: main([command, '--help'])
        except SystemExit as e: codes[command] = e.code
    return codes


def stop_after_two(step):
    """A training step that is told to stop the second time, after somebody else has tried to train
    in the same folder"""
    calls = []
    def stopping(*args, **how):
        calls.append(1)
        if len(calls) == 2:
            from seismodel.training.runlog import RunLog
            from seismodel.core import UserError
            try: RunLog(Path('run'))
            except UserError as e: print(e)
            signal.raise_signal(signal.SIGINT)
        return step(*args, **how)
    return stopping


def pretraining():
    "Exit codes of a run of four steps that is stopped after two, and of the same run resumed"
    from seismodel.training import trainer
    from seismodel.cli import main
    step = trainer.train_step
    trainer.train_step = stop_after_two(step)
    words = ('pretrain --preset contrastive-tiny --steps 4 --batch-size 2 --window 512 '
             '--device cpu '
             '--workers 1 --log-every 1 --validation-windows 2 --out run')
    codes = [main(words.split())]
    trainer.train_step = step
    return [*codes, main('pretrain --resume run'.split())]


def finetuning():
    """Exit codes of a picker that is trained from that run and resumed, of its scores, and of
    features of the synthetic data"""
    from seismodel.cli import main
    from seismodel.data.sources import write_synthetic
    write_synthetic(Path('quakes'), {'train': 12, 'dev': 4, 'test': 4})
    return [main(
        'finetune --from run --data quakes --steps 2 --batch-size 2 --validation-windows 2 '
        '--device cpu --workers 0 --out fine'.split()),
            main('finetune --resume fine'.split()),
            main('evaluate fine --data quakes --device cpu --out scores'.split()),
            main('embed run quakes --device cpu --out features.npz'.split())]


def picks():
    """Packs a folder of ObsPy's records, and picks one of them with a picker from random weights;
    exit codes"""
    import torch
    from obspy import read
    from seismodel.cli import main
    from seismodel.finetuning.heads import Picker
    from seismodel.models.pretraining import from_pretrained
    Path('records').mkdir()
    stream = read()
    for trace in stream: trace.data = (1000*trace.data).astype('int32')
    stream.write('records/day.mseed', format='MSEED')
    codes = [main('pack records --out store --window 512'.split())]
    torch.manual_seed(0)
    picker = Picker(from_pretrained('run'))
    with torch.no_grad(): picker.head.out.weight.mul_(8.)
    picker.save_pretrained('picker')
    return [*codes,
            main(
        'pick records/day.mseed --model picker --out picks --figures --device cpu'.split())]


def trial():
    "A trial of a study whose output is written into its folder, and which gets its name at the end"
    from seismodel.study import run
    from seismodel.study.trial import Candidate, Trial
    def run_trial(trial, common, folder):
        print('trained, at 5 °C'), (folder/f'{trial.name}.part/records.csv').touch()
    run.run_trial = run_trial
    return run.attempt(Trial(Candidate('PhaseNet', 'peer', 'PhaseNet'), 1., 0), None,
                       Path('trials'))


if __name__ == '__main__':
    multiprocessing.set_start_method('spawn')
    parts = {f.__name__: f for f in (modules, helps, pretraining, finetuning, picks, trial)}
    report = {name: f() for name, f in parts.items()}
    Path('report.json').write_text(json.dumps(report), encoding='utf-8')
