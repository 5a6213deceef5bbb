"""How a page shows what has no signature of its own: `renderer` in pyproject.toml names the class
below (tools/settings.py writes it there), and `scripts/pages.sh` puts this folder on the search
path.

nbdev shows `(*args, **kwargs)` for named tuples, exceptions, autograd functions and Triton kernels,
since it asks for the signature of `__init__`. Here a class is shown by its first line and its
fields, and a kernel by its Python function."""
import ast
import inspect

from nbdev.config import get_config
from nbdev.showdoc import BasicMarkdownRenderer


def python_function(sym):
    "The function inside of a Triton kernel or of a custom operation, or the symbol itself"
    for name in ('fn', '_init_fn'):
        found = getattr(sym, name, None)
        if not inspect.isclass(sym) and inspect.isfunction(found): return found
    return sym


def is_unsigned(sym):
    "Whether a class takes its `__init__` from a base that names no parameters"
    if not inspect.isclass(sym): return False
    try: parameters = list(inspect.signature(sym.__init__).parameters.values())[1:]
    except ValueError: return True
    return bool(parameters) and all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
                                    for p in parameters)


def class_lines(cls):
    "The first line of a class and its annotated fields, as the package has them"
    for file in sorted(get_config().lib_path.rglob('*.py')):
        text = file.read_text(encoding='utf-8')
        if f'class {cls.__name__}' not in text: continue
        lines = text.splitlines()
        for node in ast.parse(text).body:
            if not isinstance(node, ast.ClassDef) or node.name != cls.__name__: continue
            fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
            return '\n'.join([lines[node.lineno - 1],
                              *(line for f in fields for line in lines[f.lineno - 1:f.end_lineno])])
    return f'class {cls.__name__}'


class SignatureRenderer(BasicMarkdownRenderer):
    "Signatures of functions as nbdev shows them, and of classes without one"
    def __init__(self, sym, name=None, title_level=3, maxline=110):
        super().__init__(python_function(sym), name=name, title_level=title_level, maxline=maxline)
        if is_unsigned(sym): self.dm = class_lines(sym)
