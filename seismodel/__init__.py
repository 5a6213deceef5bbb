__version__ = "0.2.0"

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:   # for editors and type checkers: what `__getattr__` finds
    from .data.sources import open_dataset
    from .data.waveform import read_waveform
    from .finetuning.finetune import finetune
    from .finetuning.load import load
    from .models.embedding import embed
    from .models.pretraining import PRESETS, build, from_pretrained
    from .picking.pick import pick
    from .picking.seisbench_model import SeisModelPicker
    from .signals.normalize import normalize
    from .training.pretrain import pretrain

# Each is imported when it is first used, since torch alone takes seconds
_PUBLIC = {
    'PRESETS': 'models.pretraining', 'SeisModelPicker': 'picking.seisbench_model',
    'build': 'models.pretraining', 'embed': 'models.embedding', 'finetune': 'finetuning.finetune',
    'from_pretrained': 'models.pretraining', 'load': 'finetuning.load', 'normalize': 'signals.normalize',
    'open_dataset': 'data.sources', 'pick': 'picking.pick', 'pretrain': 'training.pretrain',
    'read_waveform': 'data.waveform',
}
__all__ = ['__version__', *_PUBLIC]


def __getattr__(name: str):
    "Import a public name from the chapter that defines it (PEP 562)"
    if name not in _PUBLIC: raise AttributeError(f"module 'seismodel' has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f'.{_PUBLIC[name]}', __name__), name)
    return value


def __dir__(): return sorted({*globals(), *_PUBLIC})
