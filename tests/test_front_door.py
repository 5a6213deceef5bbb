"""The front door: names offered by the package without importing torch, and commands that answer
without it"""
import ast
import inspect
import io
import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from textwrap import dedent
from types import UnionType
from typing import Annotated, get_args, get_origin

import numpy as np
import pytest
from conftest import root
from fastcore.docments import docments

import seismodel
from seismodel import core
from seismodel.cli import COMMANDS, call_quietly, described, imported, main
from seismodel.data.pack import pack
from seismodel.models.pretraining import PRESETS, build, preset
from seismodel.options import FLAGS, definition, make_parser
from seismodel.training.config import TrainConfig

PUBLIC = ('PRESETS', 'SeisModelPicker', 'build', 'embed', 'finetune', 'from_pretrained', 'load',
          'normalize', 'open_dataset',
          'pick', 'pretrain', 'read_waveform')


def without_torch(code):
    """Run lines of Python in a process of its own; what they print, after a check that torch was
    not imported"""
    code = (dedent(code)
            + '\nassert not {"torch", "numpy", "seisbench", "obspy"} & sys.modules.keys()')
    done = subprocess.run([sys.executable, '-c', 'import sys\n' + code], capture_output=True,
                          text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_offers_its_names_and_imports_none_of_them():
    said = without_torch('import seismodel\nprint(*dir(seismodel))')
    assert set(PUBLIC) <= set(said.split())
    assert set(seismodel.__all__) == {'__version__', *PUBLIC}


def test_each_public_name_is_what_its_chapter_defines():
    for name, module in seismodel._PUBLIC.items():
        value = getattr(seismodel, name)
        assert value is getattr(sys.modules[f'seismodel.{module}'], name)
        if name != 'PRESETS':
            assert value.__module__ == f'seismodel.{module}', (
                f'{name} is imported there from elsewhere')


def test_editors_are_told_the_same_names():
    "The imports under TYPE_CHECKING are those of `__getattr__`"
    tree = ast.parse(inspect.getsource(seismodel))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    assert {a.name: node.module for node in guarded.body for a in node.names} == seismodel._PUBLIC


def test_a_name_that_is_not_there_is_an_attribute_error():
    assert not hasattr(seismodel, 'pretrian')
    from seismodel import core   # a module is found as before
    assert core.UserError


# commands, read from their source

def parameters(command):
    "Name -> parameter of the function behind a command, as Python sees it"
    found = inspect.signature(imported(command), eval_str=True).parameters
    return {name: p for name, p in found.items() if p.kind != p.VAR_KEYWORD}


@pytest.mark.parametrize('command', COMMANDS)
def test_options_are_the_parameters_of_the_function(command):
    "Names, types, defaults and comments that the source says are those of the imported function"
    read, real, comments = described(command), parameters(command), docments(imported(command))
    assert [o.name for o in read.options] == list(real)
    assert read.help == inspect.getdoc(imported(command)) and read.help
    for o in read.options:
        p = real[o.name]
        kind, *how = get_args(p.annotation) if get_origin(p.annotation) is Annotated else (
            p.annotation,)
        if isinstance(kind, UnionType): kind = get_args(kind)[0]
        assert o.kind is kind, o.name
        assert o.how == {k: v for k, v in (how[0] if how else {}).items() if k != 'opt'}, o.name
        assert o.positional == (p.default is p.empty
                                if not how else not how[0].get('opt',
                                                               p.default is not p.empty)), o.name
        default = None if p.default is p.empty else p.default
        assert o.default == (str(default) if isinstance(default, Path) else default), o.name
        assert o.help == (comments[o.name]
                          or '').replace('\n', ' ') and o.help, f'{command} --{o.name} has no help'
        assert o.kind is not bool or o.default is False, f'{o.name} could not be switched off'


@pytest.mark.parametrize('command', COMMANDS)
def test_help_shows_every_option_and_no_other(command):
    parser = make_parser(command, described(command))
    shown = {a.dest for a in parser._actions} - {'help', 'quiet'}
    assert shown == set(parameters(command))
    text = ' '.join(parser.format_help().split())
    for o in described(command).options:
        assert FLAGS.get(o.name, o.name.replace('_', '-')
                         if not o.positional else o.name) in text, o.name


@pytest.mark.parametrize('words, code, says', [
    (['--help'], 0, 'usage: seismodel COMMAND'), (['--version'], 0, seismodel.__version__),
    ([], 0, 'pretrain'),
    (['pretrain', '--help'], 0, '--batch-size (int)'), (['pack', '--help'], 0, '(default: 4096)'),
    (['pretrian'], 2, 'did you mean pretrain?'), (['xyzzy'], 2, 'choose one of pretrain, info'),
    (['pretrain', '--stesp', '5'], 2, "no option '--stesp', did you mean --steps?"),
    (['pretrain', '--steps', 'five'], 2, "--steps: invalid int value: 'five'"),
    (['pretrain', '--steps=', '5'], 2, '--steps'), (['plot'], 2, 'required: runs'),
    (['pretrain', 'runs/first'], 2, "'runs/first' is too much"),
], ids=lambda v: ' '.join(v) if isinstance(v, list) else '')
def test_help_and_errors_of_usage_do_without_torch(words, code, says):
    said = without_torch(f'''
        import contextlib, io
        from seismodel.cli import main
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try: code = main({words!r})
            except SystemExit as e: code = e.code
        print(code, bool(err.getvalue()), len(err.getvalue().splitlines()))
        print(out.getvalue() + err.getvalue())''')
    first, _, text = said.partition('\n')
    assert first == (f'{code} True 1' if code else f'{code} False 0')
    assert says in ' '.join(text.split())


def test_what_is_not_typed_is_not_handed_over():
    "So that a default stands in one place, the function"
    parser = make_parser('seismodel pick', described('pick'))
    assert (vars(parser.parse_args(['a.mseed', 'b.mseed']))
            == {'sources': ['a.mseed', 'b.mseed'], 'quiet': False})
    args = vars(parser.parse_args(['a', '--p-threshold', '.5', '--z-only', '--out', 'x']))
    assert (args
            == {'sources': ['a'], 'p_threshold': .5, 'z_only': True, 'out': Path('x'),
                'quiet': False})


def test_definitions_are_found_where_they_are_made():
    "Through relative imports, and not under a name that is only similar"
    assert definition('seismodel.picking.pick', 'Selection')[0] == 'seismodel.data.archive'
    assert definition('seismodel.training.pretrain', 'WINDOW')[0] == 'seismodel.signals.records'
    with pytest.raises(LookupError, match='seismodel.picking.pick defines no Selectio'):
        definition('seismodel.picking.pick', 'Selectio')


# quiet

def test_quiet_prints_the_result_alone(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    words = ('pretrain --preset reconstruction-tiny --steps 2 --batch-size 2 '
             '--validation-windows 2 --device cpu --quiet').split()
    assert main(words) == 0
    out, err = capfd.readouterr()
    assert (out, err) == (str(Path('runs/reconstruction-tiny-1')) + '\n', '')
    assert main(['info', out.strip(), '--quiet']) == 0         # there to print: it does
    out, err = capfd.readouterr()
    assert 'step 2 of 2' in out and not err
    assert main([*words, '--batch-size', '0']) == 2            # what is wrong is still said
    out, err = capfd.readouterr()
    assert not out and 'batch' in err


def test_quiet_reaches_the_processes_of_a_command(capfd):
    "Such as those of `pick --device all`; afterwards they are heard again"
    def command(code=0):
        subprocess.run([sys.executable, '-c',
                        'import sys; print(1); print(2, file=sys.stderr); '
                        'sys.exit(int(sys.argv[1]))', str(code)], check=True)
        return 'result'
    call_quietly(command, {})
    assert capfd.readouterr() == ('result\n', '')
    with pytest.raises(subprocess.CalledProcessError): call_quietly(command, {'code': 1})
    assert capfd.readouterr() == ('', '')
    command()
    assert capfd.readouterr() == ('1\n', '2\n')


def test_info_describes_several_and_names_the_ones_it_cannot(tmp_path, capsys):
    build(preset('reconstruction-tiny').model).save_pretrained(tmp_path/'a')
    assert main(['info', str(tmp_path/'a'), 'nowhere', 'contrastive-tiny']) == 2
    out, err = capsys.readouterr()
    assert (f"{tmp_path/'a'}\nreconstruction: " in out
            and 'contrastive-tiny\nmodel.encoder.in_features' in out)
    assert "No pretrained model in 'nowhere'" in err and len(err.splitlines()) == 1


def test_info_says_the_versions_that_a_report_needs(capsys):
    assert main(['info', '--versions']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f'seismodel {seismodel.__version__}'
    named = {line.split()[0] for line in lines}
    assert {'Python', 'torch', 'numpy', 'obspy', 'seisbench', 'triton', 'safetensors',
            'processor:'} <= named and 'nbdev' not in named


@pytest.mark.parametrize('name', PRESETS)
def test_info_of_a_preset_gives_every_field_with_its_meaning(name, capsys):
    assert main(['info', name]) == 0
    rows = {line.split()[0]: line.split(maxsplit=2)[1:]
            for line in capsys.readouterr().out.splitlines()}
    p = PRESETS[name]
    names = ([f'model.{n}' for n in vars(p.model) if n != 'encoder']
             + [f'model.encoder.{n}' for n in vars(p.model.encoder)])
    assert rows.keys() == {*names, *(f'train.{f.name}' for f in fields(TrainConfig))}
    assert [n for n, row in rows.items() if len(row) < 2] == [], 'fields without a meaning'
    assert (rows['train.lr'][0] == str(p.lr) and rows['train.steps'][0] == str(p.steps)
            and rows['model.dropout'][0] == '0.0')


# any field from the command line

SHORT = ['pretrain', '--steps', '1', '--batch-size', '1', '--validation-windows', '1', '--device',
         'cpu', '--window', '512']


def read(folder): return json.loads((folder/'config.json').read_text(encoding='utf-8'))


def test_fields_reach_the_run_and_its_config_makes_it_again(tmp_path, quakes_folder, capsys):
    words = [*SHORT, '--preset', 'reconstruction-tiny', '--data', str(quakes_folder), '--data',
             'synthetic', '--data-weights', '3,1',
             '--augment', 'full', '--set', 'model.target=patch', '--set', 'train.warmup=.05',
             '--set', 'encoder.mask=.6', '--set', 'train.betas=.8,.9']
    assert main([*words, '--out', str(tmp_path/'a')]) == 0
    a = read(tmp_path/'a')
    assert (a['model']['target'], a['model']['encoder']['mask'], a['train']['warmup'],
            a['train']['betas']) == ('patch', .6, .05, [.8, .9])
    assert main(['pretrain', '--config', str(tmp_path/'a/config.json'), '--out', str(tmp_path/'b'),
                 '--set', 'train.seed=1']) == 0
    b = read(tmp_path/'b')
    assert b['train'].pop('seed') == 1 and a['train'].pop('seed') == 0
    assert (b == a and b['data'] == [str(quakes_folder), 'synthetic'] and b['weights'] == [3., 1.]
            and b['window'] == 512 and b['augment'])
    assert main(['pretrain', '--resume', str(tmp_path/'b'), '--set', 'train.keep=1']) == 0
    capsys.readouterr()
    for more, says in ((['--set', 'train.seed=2'], 'seed was 1 and is 2'),
                       (['--set', 'model.blocks=2'], 'leave --set model'),
                       (['--config', str(tmp_path/'a/config.json')], 'leave --config away'),
                       (['--set', 'train.bogus=2'], 'train.bogus')):
        assert main(['pretrain', '--resume', str(tmp_path/'b'), *more]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize('setting, says', [
    ('train.warmpu=1', "'train.warmpu'; did you mean train.warmup?"),
    ('encoder.mask_lenght=25', 'did you mean model.encoder.mask_length?'),
    ('mask_length=25', 'did you mean model.encoder.mask_length?'),
    ('lr=1', 'did you mean train.lr?'), ('xyzzy=1', 'seismodel info PRESET'),
    ('encoder=4', "no field 'encoder'"), ('model.encoder=4', "no field 'model.encoder'"),
    ('train.warmup', 'write NAME=VALUE'), ('=3', 'write NAME=VALUE'),
    ('encoder.mask_length=long', "'encoder.mask_length' is 'long'; it must be a whole number"),
    ('encoder.mask_length=2.5', 'a whole number'),
    ('train.betas=.9', '2 values, each a number'), ('train.betas=.9,.8,.7', '2 values'),
    ('train.betas=.9,2', 'below 1'), ('train.tensorboard=2', 'true or false'),
    ('model.method=masked', 'name a --preset'), ('encoder.mask_prob=7', 'mask_prob is a share'),
    ('train.steps=3', "'train.steps' is set twice"),
    ('train.clip=-1', 'train.clip is -1'), ('encoder.pretraining=false', 'leave it True'),
    ('model.heads=3', 'multiple of heads'),
    ('encoder.mask_prob=0', "'model.encoder.mask_prob' is 0, which hides no frame")])
def test_fields_that_cannot_be_are_refused_by_name(setting, says, tmp_path, capsys):
    assert main([*SHORT, '--out', str(tmp_path/'run'), '--set', setting]) == 2
    said = capsys.readouterr().err
    assert says in said and len(said.splitlines()) == 1 and not (tmp_path/'run').exists()


@pytest.mark.parametrize('preset, field',
                         [('reconstruction-tiny', 'mask'), ('joint-tiny', 'mask_prob')])
def test_masks_that_hide_nothing_are_refused(preset, field, tmp_path, capsys):
    assert main([*SHORT, '--preset', preset, '--out', str(tmp_path/'run'), '--set',
                 f'encoder.{field}=0']) == 2
    assert (f"'model.encoder.{field}' is 0" in capsys.readouterr().err
            and not (tmp_path/'run').exists())


@pytest.mark.parametrize('text, says', [
    ('{"modle": {}}', "has an entry 'modle'"), ('{"model": 3}', "'model' in"),
    ('[]', 'holds no object'), ('{', 'is not valid JSON'), (None, 'cannot be read'),
    ('{"data": 3}', "'data' is 3"), ('{"window": "a"}', "'window' is 'a'"),
    ('{"augment": {"bogus": 1}}', "'augment.bogus'"),
    ('{"train": {"bogus": 1}}', "'train.bogus'"),
    ('{"model": {"encoder": {"mask_prob": "x"}}}', "'encoder.mask_prob' is 'x'"),
    ('{"model": {"method": "reconstruction"}}', "method is 'reconstruction'"),
    ('{"preset": "contrastive-huge"}', 'contrastive-huge')])
def test_files_of_fields_that_cannot_be_are_refused(text, says, tmp_path, capsys):
    if text is not None: (tmp_path/'fields.json').write_text(text, encoding='utf-8')
    assert main(['pretrain', '--out', str(tmp_path/'run'), '--config',
                 str(tmp_path/'fields.json')]) == 2
    said = capsys.readouterr().err
    assert says in said and len(said.splitlines()) == 1 and not (tmp_path/'run').exists()


def test_options_are_named_as_they_are_typed(tmp_path, capsys):
    for words, says in ((['--batch-size', '0'], '--batch-size is 0'),
                        (['--workers', '-1'], '--workers is -1'),
                        (['--validate-every', '0'], '--validate-every is 0')):
        assert main(['pretrain', *words, '--out', str(tmp_path/'run')]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize('command, more, plan',
                         [('finetune', ['--width', '0', '--augment', 'none'], 'finetune'),
                                                 ('finetune-window', ['--column', 'trace_category'],
                                                  'finetune_window')])
def test_fields_reach_a_fine_tuning_run(command, more, plan, tmp_path, quakes_folder, capsys):
    build(preset('contrastive-tiny').model).save_pretrained(tmp_path/'start')
    words = [command, '--from', str(tmp_path/'start'), '--data', str(quakes_folder), *more,
             '--steps', '1', '--batch-size', '1', '--validation-windows', '1', '--device', 'cpu']
    assert main([*words, '--set', 'train.warmup=.05', '--set', 'model.dropout=.1', '--out',
                 str(tmp_path/'a')]) == 0
    a = read(tmp_path/'a')
    assert ((a['train']['warmup'], a['train']['steps'], a['model']['dropout']) == (.05, 1, .1)
            and plan in a)
    capsys.readouterr()
    assert main([*words[:words.index('--steps')], '--config', str(tmp_path/'a/config.json'),
                 '--out', str(tmp_path/'b')]) == 0
    assert 'gives the fields of model and recipe' in capsys.readouterr().out
    b = read(tmp_path/'b')
    assert b['train'] == a['train'] and b['model'] == a['model']
    for wrong, says in (('train.warmpu=1', 'did you mean train.warmup?'),
                        ('model.blocks=2', 'weight'), ('train.clip=x', 'a number'),
                        ('train.steps=2', 'set twice')):
        assert main([*words, '--set', wrong, '--out', str(tmp_path/'c')]) == 2
        assert says in capsys.readouterr().err and not (tmp_path/'c').exists()
    for wrong, says in (('train.warmup=1', 'warmup'),
                        ('model.dropout=0', '--set model.dropout cannot change'),
                        ('train.workers=x', 'a whole number'), ('train.bogus=1', 'bogus')):
        assert main([command, '--resume', str(tmp_path/'a'), '--set', wrong]) == 2
        assert says in capsys.readouterr().err
    assert main([command, '--resume', str(tmp_path/'a'), '--set', 'train.keep=1']) == 0


# progress in a file

def test_without_a_terminal_progress_is_a_line_a_minute():
    "400 steps, each with a new postfix, and minutes that pass by a clock of our own"
    clock, file = [0.], io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, 'monotonic', lambda: clock[0])
        bar = core.progress_bar(range(400), unit='step', file=file, mininterval=0)
        for step in bar:
            bar.set_postfix(loss=step)
            clock[0] += .5                                             # 200 s
            if step == 300: core.LineProgress.write('ALARM', file=file)
    lines = file.getvalue().splitlines()
    assert (len(lines) == 5 and lines.index('ALARM') == 2 and '\r' not in file.getvalue()
            and len(file.getvalue()) < 500)
    assert '400/400' in lines[-1] and all('step' in line for line in lines if line != 'ALARM')


def test_on_a_terminal_a_bar_moves(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(sys, 'stderr', file)
    file.isatty = lambda: True
    for _ in core.progress_bar(range(3), mininterval=0): pass
    assert file.getvalue().count('\r') >= 3


def test_a_bar_that_is_switched_off_or_left_says_nothing():
    file = io.StringIO()
    for how in (dict(disable=True), dict(leave=False)):
        for _ in core.progress_bar(range(3), file=file, **how): pass
    assert not file.getvalue()


def test_every_bar_of_the_package_is_this_one():
    "No chapter draws its own, which would fill log files"
    for path in (root/'seismodel').rglob('*.py'):
        text = path.read_text(encoding='utf-8')
        if path.name != 'core.py': assert not re.search(r'\btqdm\(|\btrange\(', text), path


# several inputs

def test_embed_and_inspect_take_several_data_sets(tmp_path, write_dataset, quake_records, capsys):
    a, b = (write_dataset(tmp_path/name, quake_records(n)) for name, n in (('a', 8), ('b', 16)))
    build(preset('reconstruction-tiny').model).save_pretrained(tmp_path/'model')
    words = ['embed', str(tmp_path/'model'), str(a), str(b), '--device', 'cpu', '--out',
             str(tmp_path/'f.npz')]
    assert main(words) == 0
    both = np.load(tmp_path/'f.npz')
    names = both['name'].tolist()
    assert ('a/trace000' in names and 'b/trace000' in names and 'b/trace010' in names
            and 'a/trace010' not in names)
    assert both['features'].shape == (len(names), 64)
    assert main([*words[:2], str(b), *words[4:]]) == 0
    alone = np.load(tmp_path/'f.npz')
    of_b = np.array([name.startswith('b/') for name in names])
    assert alone['name'].tolist() == [name[2:] for name in names if name.startswith('b/')]
    np.testing.assert_array_equal(both['features'][of_b], alone['features'])
    (tmp_path/'x.mseed').write_bytes(b'1')
    assert main([*words[:4], str(tmp_path/'x.mseed'), *words[4:]]) == 2
    assert f"'{tmp_path/'x.mseed'}' means waveform files" in capsys.readouterr().err
    pack([str(b)], tmp_path/'store')
    capsys.readouterr()
    assert main(['inspect', str(a), str(b), str(tmp_path/'store'), '--verify', '--out',
                 str(tmp_path/'page.png')]) == 0
    said = capsys.readouterr().out
    assert ('store, a, b: 40 usable traces' in said and 'every checksum is right' in said
            and (tmp_path/'page.png').exists())
