"The front door: names offered by the package without importing torch, and commands that answer without it"
import ast
import inspect
import subprocess
import sys

import seismodel
from conftest import root

PUBLIC = ('PRESETS', 'SeisModelPicker', 'build', 'embed', 'finetune', 'from_pretrained', 'normalize', 'open_dataset',
          'pick', 'pretrain', 'read_waveform')


def without_torch(code):
    "Run lines of Python in a process of its own; what they print, after a check that torch was not imported"
    code += '\nassert not {"torch", "numpy", "seisbench", "obspy"} & sys.modules.keys()'
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
