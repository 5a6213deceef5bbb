"The front door: names offered by the package without importing torch, and commands that answer without it"
import ast
import inspect
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from textwrap import dedent
from types import UnionType
from typing import Annotated, get_args, get_origin

import pytest
from conftest import root
from fastcore.docments import docments

import seismodel
from seismodel.cli import COMMANDS, described, imported, main
from seismodel.models.pretraining import PRESETS, build, preset
from seismodel.options import FLAGS, definition, make_parser
from seismodel.training.config import TrainConfig

PUBLIC = ('PRESETS', 'SeisModelPicker', 'build', 'embed', 'finetune', 'from_pretrained', 'normalize', 'open_dataset',
          'pick', 'pretrain', 'read_waveform')


def without_torch(code):
    "Run lines of Python in a process of its own; what they print, after a check that torch was not imported"
    code = dedent(code) + '\nassert not {"torch", "numpy", "seisbench", "obspy"} & sys.modules.keys()'
    done = subprocess.run([sys.executable, '-c', 'import sys\n' + code], capture_output=True, text=True, cwd=root)
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
        if name != 'PRESETS': assert value.__module__ == f'seismodel.{module}', f'{name} is imported there from elsewhere'


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
        kind, *how = get_args(p.annotation) if get_origin(p.annotation) is Annotated else (p.annotation,)
        if isinstance(kind, UnionType): kind = get_args(kind)[0]
        assert o.kind is kind, o.name
        assert o.how == {k: v for k, v in (how[0] if how else {}).items() if k != 'opt'}, o.name
        assert o.positional == (p.default is p.empty if not how else not how[0].get('opt', p.default is not p.empty)), o.name
        default = None if p.default is p.empty else p.default
        assert o.default == (str(default) if isinstance(default, Path) else default), o.name
        assert o.help == comments[o.name] and o.help, f'{command} --{o.name} has no help'
        assert o.kind is not bool or o.default is False, f'{o.name} could not be switched off'


@pytest.mark.parametrize('command', COMMANDS)
def test_help_shows_every_option_and_no_other(command):
    parser = make_parser(command, described(command))
    shown = {a.dest for a in parser._actions} - {'help', 'quiet'}
    assert shown == set(parameters(command))
    text = ' '.join(parser.format_help().split())
    for o in described(command).options:
        assert FLAGS.get(o.name, o.name.replace('_', '-') if not o.positional else o.name) in text, o.name


@pytest.mark.parametrize('words, code, says', [
    (['--help'], 0, 'usage: seismodel COMMAND'), (['--version'], 0, seismodel.__version__), ([], 0, 'pretrain'),
    (['pretrain', '--help'], 0, '--batch-size (int)'), (['pack', '--help'], 0, '(default: 4096)'),
    (['pretrian'], 2, 'did you mean pretrain?'), (['xyzzy'], 2, 'choose one of pretrain, info'),
    (['pretrain', '--stesp', '5'], 2, "no option '--stesp', did you mean --steps?"), (['pretrain', '--steps', 'five'], 2, "--steps: invalid int value: 'five'"),
    (['pretrain', '--steps=', '5'], 2, '--steps'), (['plot'], 2, 'required: runs'), (['pretrain', 'runs/first'], 2, "'runs/first' is too much"),
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
    assert vars(parser.parse_args(['a.mseed', 'b.mseed'])) == {'sources': ['a.mseed', 'b.mseed'], 'quiet': False}
    args = vars(parser.parse_args(['a', '--p-threshold', '.5', '--z-only', '--out', 'x']))
    assert args == {'sources': ['a'], 'p_threshold': .5, 'z_only': True, 'out': Path('x'), 'quiet': False}


def test_definitions_are_found_where_they_are_made():
    "Through relative imports, and not under a name that is only similar"
    assert definition('seismodel.picking.pick', 'Selection')[0] == 'seismodel.data.archive'
    assert definition('seismodel.training.pretrain', 'WINDOW')[0] == 'seismodel.signals.records'
    with pytest.raises(LookupError, match='seismodel.picking.pick defines no Selectio'): definition('seismodel.picking.pick', 'Selectio')


# quiet

def test_quiet_prints_the_result_alone(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    words = 'pretrain --preset reconstruction-tiny --steps 2 --batch-size 2 --validation-windows 2 --device cpu --quiet'.split()
    assert main(words) == 0
    out, err = capfd.readouterr()
    assert (out, err) == (str(Path('runs/reconstruction-tiny-1')) + '\n', '')
    assert main(['info', out.strip(), '--quiet']) == 0         # there to print: it does
    out, err = capfd.readouterr()
    assert 'step 2 of 2' in out and not err
    assert main([*words, '--batch-size', '0']) == 2            # what is wrong is still said
    out, err = capfd.readouterr()
    assert not out and 'batch' in err


def test_info_describes_several_and_names_the_ones_it_cannot(tmp_path, capsys):
    build(preset('reconstruction-tiny').model).save_pretrained(tmp_path/'a')
    assert main(['info', str(tmp_path/'a'), 'nowhere', 'contrastive-tiny']) == 2
    out, err = capsys.readouterr()
    assert f"{tmp_path/'a'}\nreconstruction: " in out and 'contrastive-tiny\nmodel.encoder.in_features' in out
    assert "No pretrained model in 'nowhere'" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize('name', PRESETS)
def test_info_of_a_preset_gives_every_field_with_its_meaning(name, capsys):
    assert main(['info', name]) == 0
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in capsys.readouterr().out.splitlines()}
    p = PRESETS[name]
    names = [f'model.{n}' for n in vars(p.model) if n != 'encoder'] + [f'model.encoder.{n}' for n in vars(p.model.encoder)]
    assert rows.keys() == {*names, *(f'train.{f.name}' for f in fields(TrainConfig))}
    assert [n for n, row in rows.items() if len(row) < 2] == [], 'fields without a meaning'
    assert rows['train.lr'][0] == str(p.lr) and rows['train.steps'][0] == str(p.steps) and rows['model.dropout'][0] == '0.0'
