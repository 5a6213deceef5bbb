"""Data for the tests: small SeisBench folders made on the spot, and the real ones where the machine
has them"""
import io
import os
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

root = Path(__file__).resolve().parents[1]
# all chapters
nbs = sorted(p for p in (root/'nbs').rglob('*.ipynb') if p.name[0] not in '._'
             and p.parent.name[0] != '.')
# such as models/02_masking
name_of = lambda nb: nb.relative_to(root/'nbs').with_suffix('').as_posix()
# as many threads here as in the processes that tests start, or sums differ in the last digits;
# tensors here are small: one
torch.set_num_threads(int(os.environ.setdefault('OMP_NUM_THREADS', '1')))
# kernels run on the CPU; to be said before anyone imports Triton
if not torch.cuda.is_available(): os.environ['TRITON_INTERPRET'] = '1'


def quake(k, samples=6000, amplitude=1.):
    "Noise with a P and an S burst: the waveform (3, samples) and the two onsets"
    rng = np.random.default_rng([17, k])
    p = rng.uniform(.2, .5) * samples
    s = p + rng.uniform(.05, .2) * samples
    x = .05 * rng.standard_normal((3, samples))
    for onset, size in ((p, 1.), (s, 2.)):
        t = (np.arange(samples) - onset) / 100
        x += size * np.where(t > 0, np.exp(-np.clip(t, 0, None) / 2),
                             0.) * rng.standard_normal((3, samples))
    return (amplitude * x).astype(np.float32), p, s


def quakes(n=48, **extra):
    """n records of n/2 events, 60 s, at amplitudes from 1e-12 to 1e6; every sixth is noise without
    picks"""
    for k in range(n):
        x, p, s = quake(k, amplitude=10. ** (6 * (k % 4) - 12))
        noise = k % 6 == 5
        if noise:
            x = x.std() * np.random.default_rng([18, k]).standard_normal(x.shape).astype(np.float32)
        yield {'trace_name': f'trace{k:03}', 'source_id': f'event{k // 2:03}',
               'split': ('train', 'train', 'dev', 'test')[k // 2 % 4],
               'trace_sampling_rate_hz': 100., 'trace_npts': x.shape[1],
               'trace_component_order': 'ZNE',
               'trace_category': 'noise' if noise else 'earthquake', 'station_code': f'ST{k % 3}',
               'trace_p_arrival_sample': np.nan if noise else p,
               'trace_s_arrival_sample': np.nan if noise else s, **extra}, x


@pytest.fixture(scope='session')
def quake_records():
    "The function `quakes(n, **extra)`: (metadata, waveform (3, 6000)) pairs for `write_dataset`"
    return quakes


@pytest.fixture(scope='session')
def write_dataset():
    """A function that writes (metadata, waveform) pairs as a SeisBench folder, every trace under
    its own name"""
    def write(folder, records, blocks=False, **data_format):
        with redirect_stderr(io.StringIO()):                    # its progress bar
            from seisbench.data import WaveformDataWriter
            with WaveformDataWriter(folder/'metadata.csv', folder/'waveforms.hdf5') as writer:
                writer.data_format = {'dimension_order': 'CW', **data_format}
                if not blocks: writer.bucket_size = 1
                for metadata, x in records: writer.add_trace(dict(metadata), x)
        return folder
    return write


@pytest.fixture
def quakes_folder(tmp_path, write_dataset):
    "A SeisBench folder of 48 records: train 24, dev 12, test 12; 40 with P and S"
    return write_dataset(tmp_path/'quakes', quakes())


@pytest.fixture(scope='session')
def real_data():
    """SeisBench folders with real data on this machine, perhaps none, in $SEISMODEL_DATA or
    ../shared/data"""
    where = (root/os.environ.get('SEISMODEL_DATA', '../shared/data')).resolve()
    return sorted(f.parent for f in where.glob('*/metadata.csv')
                  if (f.parent/'waveforms.hdf5').is_file())


class Largest(TorchDispatchMode):
    "Notes the most numbers in a tensor that an operation returned"
    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in (result if isinstance(result, (tuple, list)) else (result,)):
            if isinstance(t, torch.Tensor): self.numbers = max(self.numbers, t.numel())
        return result


def eager_picker():
    "A tiny picker with random weights whose logits of P and S pass any threshold here and there"
    from seismodel.finetuning.heads import Picker
    from seismodel.models.pretraining import build, preset
    from seismodel.picking.seisbench_model import SeisModelPicker
    torch.manual_seed(0)
    picker = Picker(build(preset('contrastive-tiny').model)).eval()
    with torch.no_grad(): picker.head.out.weight.mul_(8.)
    return SeisModelPicker.of(picker)
