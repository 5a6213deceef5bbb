"""Windows from stores and other sources: pure functions of (seed, n), right whatever the type, the
batch or the process; augmentations"""
import os
import subprocess
import sys
import threading
from itertools import islice
from multiprocessing import get_all_start_methods
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from seismodel.signals import augment
from seismodel.data.store_reader import Store, StoreSource
from seismodel.data.inspection import inspect, snr
from seismodel.data.windows import WindowDataset, uniforms
from seismodel.data.prefetch import (Batches, amplitudes, pack_batch, device_batches, to_model,
                                     unpack_batch, worker_context)
from seismodel.signals.normalize import is_flat, normalize_narrow, standardize, flat, normalize
from seismodel.data.pack import pack
from seismodel.data.sources import SyntheticSource, open_source
from seismodel.data.store import StoreWriter, finish
from seismodel.finetuning.events import subset_events
from seismodel.signals.records import STATUS, Record
from seismodel.signals.source import Source
from seismodel.training.batches import default_workers
from seismodel.core import BadRecord, UserError

root = Path(__file__).parents[1]
same = lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def make_store(folder, records, dtype='int16', shard_samples=100_000, weights=(None,),
               split=lambda s, k: 'train'):
    "A store of records given as (source, record)"
    plan = dict(dtype=dtype, window=4096, shard_samples=shard_samples,
                sources=[dict(name=f's{k}', where='', weight=w, files=[]) for k,
                         w in enumerate(weights)])
    with StoreWriter(folder, plan) as writer:
        for k, (s, r) in enumerate(records): writer.add(s, r, split(s, k), {}, k)
        finish(writer)
    return Store(folder)


def record(k, samples=9000, amplitude=1.):
    "Noise that is five times as loud after P; every third has an S, every fourth nothing"
    x = np.random.default_rng([5, k]).standard_normal((samples, 3))
    p = samples * .5
    x[int(p):] *= 5
    if k % 4 == 3:
        return Record((amplitude * x).astype(np.float32), np.nan, np.nan, f'r{k}',
                      STATUS.index('absent'), STATUS.index('absent'))
    s = p + 300 if k % 3 == 0 else np.nan
    return Record((amplitude * x).astype(np.float32), p, s, f'r{k}', STATUS.index('manual'),
                  STATUS.index('manual' if s == s else 'unlabelled'), p_weak=p + 5)


@pytest.fixture(scope='module')
def mixed(tmp_path_factory):
    "Long, short, dead in part; in several files"
    records = [record(k, (9000, 3000, 12_000, 4096)[k % 4], 10. ** (k % 5 - 3)) for k in range(40)]
    x = np.zeros((9000, 3), np.float32)
    x[-300:] = np.random.default_rng(0).standard_normal((300, 3))
    records[5] = Record(x, np.nan, np.nan, 'sleeper')
    return make_store(tmp_path_factory.mktemp('stores')/'mixed', [(0, r) for r in records])


# numbers

def test_uniforms_are_uniform_and_independent():
    "Chi-square of each column over seeds, numbers and attempts; neighbours are not correlated"
    for u in (uniforms(3, np.arange(60_000)),
              np.concatenate([uniforms(s, np.array([7])) for s in range(20_000)]),
              np.concatenate([uniforms(3, np.arange(200), a) for a in range(100)])):
        for column in u.T:
            counts, n = np.histogram(column, 50, (0, 1))[0], len(column)
            # 49 degrees of freedom: mean 49, spread 10
            assert ((counts - n / 50)**2 / (n / 50)).sum() < 100
        assert np.abs(np.corrcoef(np.c_[u[1:], u[:-1]].T) - np.eye(6)).max() < .03
    assert len(np.unique(uniforms(0, np.arange(100_000)))) == 300_000


@settings(max_examples=80, deadline=None)
@given(st.integers(2, 700), st.integers(0, 15), st.integers(-32_000, 32_000), st.booleans(),
       st.integers(0, 2**16))
def test_sixteen_bits_are_normalised_like_the_rest(window, power, offset, half, seed):
    "Against `normalize` in float64, at any length, size and offset; one by one or together"
    x = np.random.default_rng(seed).standard_normal((3, window, 3)) * 2. ** power + offset
    q = x.clip(-32_768, 32_767).astype(np.float16 if half else np.int16)
    y = normalize_narrow(q)
    want = normalize(torch.from_numpy(q.astype(np.float64))).float().numpy()
    np.testing.assert_allclose(y, want, rtol=2e-5, atol=2e-5)
    for k in range(3): np.testing.assert_array_equal(normalize_narrow(q[k:k + 1])[0], y[k])


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 300), st.data())
def test_only_valid_samples_count(window, data):
    "`standardize` on a part equals `normalize` of that part, with zeros around"
    a = data.draw(st.integers(0, window - 2))
    b = data.draw(st.integers(a + 2, window))
    x = torch.from_numpy(np.random.default_rng(window).standard_normal((1, window, 3)) + 3).float()
    y = standardize(x, torch.tensor([[a, b]]))
    torch.testing.assert_close(y[0, a:b], normalize(x[0, a:b]), rtol=1e-5, atol=1e-5)
    assert not y[0, :a].any() and not y[0, b:].any()


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 500), st.integers(0, 499),
       st.sampled_from([np.int16, np.float16, np.float32]), st.booleans())
def test_dead_windows_are_flat_windows(window, at, kind, moves):
    x = np.full((1, window, 3), 7, kind)
    if moves: x[0, at % window, 1] += 1
    assert (is_flat(x, np.array([[0, window]]))[0] == flat(torch.from_numpy(x[0])).all().item()
            == (not moves))


# purity

@pytest.mark.parametrize('raw', [False, True])
def test_a_window_depends_on_nothing_but_its_number(mixed, raw):
    "Any order, any company, twice the same, from another start: bit for bit"
    class Plain(Source):
        name = 'plain'
        def __len__(self): return 6
        def record(self, i):
            if i == 2: raise BadRecord('two', 'broken')
            return record(i)
    sources = [StoreSource(mixed), Plain(), SyntheticSource()]
    data = WindowDataset(sources, 120, [4, 1, 1], seed=8)
    whole = data.batch(range(120), raw)
    assert len(set(whole['source'].tolist())) == 3 and whole['redrawn'].sum() > 0
    rng = np.random.default_rng(0)
    for numbers in (rng.permutation(120)[:50], [7, 7, 119, 0], [55]):
        some = WindowDataset(sources, 120, [4, 1, 1], seed=8).batch(numbers, raw)
        for k, v in some.items(): same(v, whole[k][torch.as_tensor(np.asarray(numbers))])
    later = WindowDataset(sources, 20, [4, 1, 1], seed=8, start=100).batch(range(20), raw)
    for k, v in later.items(): same(v, whole[k][100:])
    if not raw: assert (whole['x'].isfinite().all() and (whole['x'].abs().amax((1, 2)) > 0).all())


@pytest.mark.parametrize('dtype', ['int16', 'float16', 'float32'])
def test_raw_on_the_device_equals_normalised_on_the_cpu(tmp_path, dtype):
    store = make_store(tmp_path/'s', [(0, record(k, (9000, 3000)[k % 2], 10. ** (4 * k - 14)))
                                      for k in range(8)], dtype)
    data = WindowDataset([StoreSource(store)], 64, seed=1)
    plain, raw = data.batch(range(64)), data.batch(range(64), raw=True)
    assert (raw['x'].dtype
            == {'int16': torch.int16, 'float16': torch.float16, 'float32': torch.float32}[dtype])
    for batch in (to_model(raw), to_model(amplitudes(raw))):
        assert set(batch) == set(plain)
        for k in plain:
            torch.testing.assert_close(batch[k], plain[k], rtol=1e-4, atol=1e-4, equal_nan=True)


def test_picks_and_statuses_through_windows(mixed):
    """The louder part begins at P; an unlabelled S stays unlabelled, an absent one absent; weak
    picks are apart"""
    b = WindowDataset([StoreSource(mixed)], 300, seed=2).batch(range(300))
    assert (b['s_onset'][b['s_status'] < 2].isnan().all()
            and b['p_onset'][b['p_status'] < 2].isnan().all())
    assert {STATUS[k] for k in b['s_status'].tolist()} == {'unlabelled', 'absent', 'manual'}
    loud = 0
    for x, p, weak in zip(b['x'], b['p_onset'], b['p_weak']):
        if not 600 < p < 3400: continue
        assert x[int(p):int(p) + 300].std() > 3 * x[int(p) - 300:int(p)].std()
        loud += 1
        assert weak == p + 5
    assert loud > 30


def test_a_store_and_its_parts_in_their_shares(tmp_path):
    "Weights inside a store, weights between sources, splits that a source does not have"
    records = [(0, record(k)) for k in range(10)] + [(1, record(k)) for k in range(10, 14)]
    store = make_store(tmp_path/'s', records, weights=(1., 3.), split=lambda s,
                       k: 'dev' if k in (0, 1) else 'train')
    train, dev = StoreSource(store, 'train'), StoreSource(store, 'dev')
    i = train.choose(uniforms(0, np.arange(40_000))[:, 0])
    counts = np.bincount(i, minlength=12) / len(i)
    np.testing.assert_allclose(counts[:8], .25 / 8, atol=.004)
    np.testing.assert_allclose(counts[8:], .75 / 4, atol=.008)
    assert sorted(np.unique(dev.choose(np.linspace(0, 1, 999, endpoint=False)))) == [0, 1]
    drawn = WindowDataset([train, SyntheticSource(), dev], 400, [3, 0, 1],
                          seed=1).batch(range(400))['source']
    assert ((drawn == 0).float().mean().item() == pytest.approx(.75, abs=.06)
            and not (drawn == 1).any())
    with pytest.raises(UserError, match='no trace in split .test., only in'):
        StoreSource(store, 'test')
    with pytest.raises(UserError, match='shorter than half a window of 20000'):
        StoreSource(store, window=20_000)


# processes and threads

def batches_of(data, size, raw=True, **how):
    "A loader over whole batches, in order"
    order = (range(k, min(k + size, len(data))) for k in range(0, len(data), size))
    return DataLoader(Batches(data, raw), None, sampler=order, **how)


@pytest.mark.parametrize('method, workers',
                         [p for p in (('fork', 2), ('spawn', 1))
                          if p[0] in get_all_start_methods()])
def test_the_loader_of_a_trainer(mixed, method, workers):
    "A plain DataLoader, in this process and in others, gives the same batches as whole ones do"
    data = WindowDataset([StoreSource(mixed), SyntheticSource()], 20, [3, 1], seed=5)
    want = data.batch(range(20))
    for loader in (DataLoader(data, 8),
                   DataLoader(data, 8, num_workers=workers, multiprocessing_context=method),
                   batches_of(data, 8, raw=False, num_workers=workers,
                              multiprocessing_context=method)):
        batches = list(loader)
        assert [len(b['x']) for b in batches] == [8, 8, 4]
        for k in want: same(torch.cat([b[k] for b in batches]), want[k])


@given(st.lists(st.tuples(st.sampled_from([torch.int64, torch.float32, torch.int16, torch.float16,
                                           torch.int8, torch.bool]),
                          st.lists(st.integers(0, 5), min_size=1, max_size=3)), min_size=1,
                max_size=6))
def test_a_bundle_of_anything(kinds):
    "Any types and shapes, empty ones too, in any order"
    batch = {f'v{k}': torch.randint(0, 2, shape).to(dtype) for k,
             (dtype, shape) in enumerate(kinds)}
    sent = pack_batch(batch)
    found = unpack_batch(sent['bytes'], sent['layout'])
    assert found.keys() == batch.keys()
    for k in batch: same(found[k], batch[k])


class Parents(Dataset):
    "Says which process has started the one that reads it"
    def __len__(self): return 40
    def batch(self, numbers): return dict(parent=torch.tensor([os.getppid()]*len(numbers)))


@pytest.mark.skipif('forkserver' not in get_all_start_methods(),
                    reason='this system starts fresh processes')
def test_workers_come_from_a_server_that_has_imported_the_package():
    "A fresh process imports PyTorch for seconds, and the next one begins only after it"
    loader = DataLoader(Batches(Parents()), None, sampler=[range(4)]*6, num_workers=2,
                        multiprocessing_context=worker_context())
    parents = {int(p) for b in loader for p in b['parent']}
    assert len(parents) == 1 and os.getpid() not in parents
    command = Path(f'/proc/{parents.pop()}/cmdline')
    if command.exists(): assert b"'seismodel.data.windows'" in command.read_bytes()


def test_workers_only_where_windows_are_computed(mixed):
    "A store is copied by one thread; a GPU that waits for the generator gets processes"
    store, made = StoreSource(mixed), SyntheticSource()
    for sources, gpu in ([store], 0), ([store, store], 0), (
        [store, made], min(8, os.cpu_count())), ([made], min(8, os.cpu_count())):
        data = WindowDataset(sources, 10)
        assert default_workers(data, torch.device('cpu')) == 0
        assert default_workers(data, torch.device('cuda')) == gpu
    part = subset_events(store, .5, 0)
    assert part.copies and default_workers(WindowDataset([part], 10), torch.device('cuda')) == 0


def test_device_batches(mixed):
    """In order, raw or not, with processes or without; it stops with its caller and raises what
    went wrong"""
    data = WindowDataset([StoreSource(mixed)], 40, seed=5)
    want = data.batch(range(40))
    for workers in (0, 1):
        got = list(device_batches(batches_of(data, 16, raw=False, num_workers=workers), 16))
        for k in want: same(torch.cat([b[k] for b in got]), want[k])
        got = list(device_batches(batches_of(data, 16, num_workers=workers), 16))
        for k in want:
            torch.testing.assert_close(torch.cat([b[k] for b in got]), want[k], rtol=1e-4,
                                       atol=1e-4, equal_nan=True)
    before = set(threading.enumerate())
    endless = device_batches(batches_of(WindowDataset([StoreSource(mixed)], 10**9), 4), 4)
    assert [b['n'][0].item() for b in islice(endless, 3)] == [0, 4, 8]
    endless.close()
    # one of the loaders above may still be ending a thread of its own
    assert not set(threading.enumerate()) - before

    class Broken(Source):
        name = 'broken'
        def __len__(self): return 3
        def record(self, i): raise RuntimeError('the disk is gone')
    with pytest.raises(RuntimeError, match='the disk is gone'):
        list(device_batches(batches_of(WindowDataset([Broken()], 8), 4), 4))


def test_bad_traces_travel_with_the_batches(mixed):
    "Each is told once, in a batch at or before the one that counts its vain draw, raw or not"
    data = lambda: WindowDataset([StoreSource(mixed)], 200, seed=3)
    plain = data()
    plain.batch(range(200))
    assert plain.rejected
    for raw in (False, True):
        got = list(device_batches(batches_of(data(), 20, raw), 20))
        told = [name for b in got for name in b['rejected']]
        assert sorted(told) == sorted(plain.rejected) and len(set(told)) == len(told)
        assert sum(int(b['redrawn'].sum()) for b in got) > 0


def test_augmented_batches_are_reproducible(mixed):
    data = WindowDataset([StoreSource(mixed)], 48, seed=5)
    recipe = lambda b, g: augment.shift_time(augment.rotate_horizontals(b, g), g)
    a, b = (torch.cat([x['x'] for x in device_batches(batches_of(data, 16), 16, augment=recipe,
                                                      seed=2)]) for _ in range(2))
    same(a, b)
    resumed = WindowDataset([StoreSource(mixed)], 16, seed=5, start=32)
    same(next(device_batches(batches_of(resumed, 16), 16, augment=recipe, seed=2))['x'], a[32:])
    assert not torch.equal(a, torch.cat([x['x'] for x in device_batches(batches_of(data, 16), 16)]))


def test_reading_a_store_needs_numpy_and_torch_alone(mixed):
    "Also through `open_source`, the way of the command line"
    code = ('import sys\nfrom seismodel.data.sources import open_source\nfrom '
            'seismodel.data.windows import WindowDataset\nfrom seismodel.data.prefetch import '
            'Batches, device_batches\nfrom torch.utils.data import DataLoader as Loader\n'
            f'data = WindowDataset([open_source({str(mixed.folder)!r})], 64)\n'
            'loader = Loader(Batches(data, True), None, sampler=[range(8)])\n'
            'b = next(device_batches(loader, 8))\n'
            'print(len(b["x"]), [m for m in ("seisbench", "obspy", "h5py", "pandas", '
            '"matplotlib", "scipy") if m in sys.modules])')
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True,
                         cwd=root)
    assert out.stdout == '8 []\n'


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
def test_a_store_ten_times_the_memory(tmp_path):
    """Private memory is limited to 16 MiB more than after the first batch; 160 MiB are read, all of
    them"""
    x = np.round(np.random.default_rng(0).standard_normal((100_000, 3)) * 1000).astype(np.float32)
    store = make_store(tmp_path/'s', ((0, Record(x, np.nan, np.nan, f'r{k}')) for k in range(280)),
                       shard_samples=3_000_000)
    assert store.manifest['samples'] * 6 > 160 * 2**20
    limited = [sys.executable, str(root/'benchmarks/loading.py'), str(tmp_path/'s'), '--bounded',
               '--limit-mib', '16', '--windows', '8000']
    out = subprocess.run(limited, capture_output=True, text=True, cwd=root,
                         env=dict(os.environ, PYTHONPATH=str(root)))
    assert out.returncode == 0, out.stderr
    assert float(out.stdout) < 16


# augmentations

def a_batch(B=8, L=600, seed=0):
    "Amplitudes with a spike at each onset, so that a moved pick can be checked on the samples"
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, L, 3, generator=g)
    p, s = torch.randint(0, L, (2, B), generator=g)
    x[torch.arange(B), p] += 100
    x[torch.arange(B), s] -= 100
    p, s = p.float(), s.float()
    p[0], s[1] = torch.nan, torch.nan
    status = lambda v: torch.where(v.isfinite(), 4, 0).to(torch.int8)
    return dict(x=x, p_onset=p, s_onset=s, p_weak=p.clone(), s_weak=s.clone(), p_status=status(p),
                s_status=status(s),
                valid=torch.tensor([[0, L]]).repeat(B, 1), scale=torch.ones(B, 3))


NOISE = torch.randn(5, 600, 3, generator=torch.Generator().manual_seed(9))
CHANGES = dict(window=lambda b, g: augment.random_window(b, g, 300), shift=lambda b,
               g: augment.shift_time(b, g, 250),
               drop=lambda b, g: augment.drop_components(b, g, .7), flip=augment.flip_polarity,
               rotate=augment.rotate_horizontals,
               noise=lambda b, g: augment.add_noise(b, g, NOISE), gaps=lambda b,
               g: augment.add_gaps(b, g, .8, .5))


@pytest.mark.parametrize('name', sorted(CHANGES))
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20))
def test_augmentations(name, seed):
    """Nothing in place, nothing random but by the generator, finite, picks on their spikes,
    statuses as they should be"""
    batch, change = a_batch(seed=seed), CHANGES[name]
    before = {k: v.clone() for k, v in batch.items()}
    new, again = (change(batch, torch.Generator().manual_seed(seed)) for _ in range(2))
    for k in batch: same(batch[k], before[k])
    for k in new: same(new[k], again[k])
    assert set(new) == set(batch) and new['x'].isfinite().all() and new['x'].dtype == torch.float32
    L = new['x'].shape[1]
    for phase in 'ps':
        onset, was = new[f'{phase}_onset'], batch[f'{phase}_onset']
        there = onset.isfinite()
        assert ((onset[there] >= 0).all() and (onset[there] < L).all()
                and not there[was.isnan()].any())
        if name in ('window', 'shift'):                            # the very samples of the spike
            same(new['x'][there, onset[there].long()], batch['x'][there, was[there].long()])
            same(new[f'{phase}_status'], batch[f'{phase}_status'])
        elif name == 'gaps':
            lost = was.isfinite() & ~there
            assert (not new['x'][lost, was[lost].long()].any()
                    and not new[f'{phase}_status'][lost].any())
            same(new['x'][there, onset[there].long()], batch['x'][there, was[there].long()])
        else:
            same(onset, was)
            same(new[f'{phase}_status'], batch[f'{phase}_status'])
    a, b = new['valid'].T
    if name == 'shift':
        t = torch.arange(L)
        outside = (t < a[:, None]) | (t >= b[:, None])
        # randn can be 0
        assert (not new['x'][outside].any()
                and (new['x'][~outside] == 0).sum() <= (batch['x'] == 0).sum())
    if name == 'drop':
        alive = (new['x'] != 0).any(1).sum(1)
        assert ((alive >= 1) & (alive <= 3)).all()
    if name == 'rotate':
        back = new['x'][..., 1:].double().square().sum(-1)
        torch.testing.assert_close(back, batch['x'][..., 1:].double().square().sum(-1), rtol=1e-4,
                                   atol=1e-5)
    if name == 'flip': torch.testing.assert_close(new['x'].abs(), batch['x'].abs())


def test_noise_comes_at_its_ratio_and_not_into_what_is_missing():
    batch = a_batch(200)
    batch['x'][:, :, 2] = 0
    batch['valid'][:, 1], batch['x'][:, 400:] = 400, 0
    new = augment.add_noise(batch, torch.Generator().manual_seed(0), NOISE, (6., 6.))
    assert not new['x'][:, :, 2].any() and not new['x'][:, 400:].any()
    spread = lambda v: (v - v.mean(1, keepdim=True)).square().mean((1, 2)).sqrt()
    added = (new['x'] - batch['x'])[:, :400, :2].std((1, 2))
    np.testing.assert_allclose(20 * torch.log10(spread(batch['x']) / added).numpy(), 6., atol=.5)


def test_directions_are_all_alike():
    """Rotation by a uniform angle: the mean direction of a horizontal pulse vanishes; share of
    dropped and flipped as asked"""
    g, n = torch.Generator().manual_seed(0), 4000
    b = dict(a_batch(2), x=torch.zeros(n, 4, 3))
    b['x'][:, 1] = torch.tensor([0., 1., 0.])
    b['x'][:, 2] = torch.tensor([0., 0., 1.])
    assert augment.rotate_horizontals(b, g)['x'][:, 1].mean(0).abs().max() < .05
    b['x'][:, 0] = 1.
    lost = (augment.drop_components(b, g, .3)['x'] == 0).all(1)
    assert lost.any(1).float().mean().item() == pytest.approx(.3, abs=.03)
    torch.testing.assert_close(lost.float().mean(0), torch.full((3,), .15), rtol=0, atol=.03)
    assert ((augment.flip_polarity(b, g, .25)['x'][:, 0] < 0).float().mean().item()
            == pytest.approx(.25, abs=.02))
    with pytest.raises(ValueError, match='has none of'): augment.random_window(b, g, 5)


# inspection

def test_inspect_counts_everything_once(tmp_path, quakes_folder, capsys):
    "A folder and the store packed from it tell the same; the page is a PNG"
    pack([quakes_folder], tmp_path/'store')
    capsys.readouterr()
    for where in (quakes_folder, tmp_path/'store'):
        o = inspect(str(where), tmp_path/'page.png')
        assert ({split: n for (_, split), n in o.packed.items()} == dict(train=24, dev=12, test=12)
                and not o.bad)
        text = capsys.readouterr().out
        assert ('48 usable traces' in text and 'bad traces: 0 of 48' in text
                and 'P: 8 absent, 40 picked' in text)
        assert (tmp_path/'page.png').read_bytes()[:4] == b'\x89PNG'
    for kwargs, why in ((dict(records=0), '--records'),):
        with pytest.raises(UserError, match=why):
            inspect(str(quakes_folder), tmp_path/'page.png', **kwargs)
    with pytest.raises(UserError, match='does not exist'): inspect(str(tmp_path/'no/where'))


def test_inspect_names_what_is_bad(tmp_path, quake_records, write_dataset, capsys):
    records = [(m, x * np.nan if k == 4 else 0 * x if k == 9 else x) for k,
               (m, x) in enumerate(quake_records(24))]
    o = inspect(str(write_dataset(tmp_path/'some_bad', records)), tmp_path/'page.png')
    assert sum(o.packed.values()) == 22 and sum(o.bad.values()) == 2
    assert 'bad traces: 2 of 24 (8.3%)' in capsys.readouterr().out


def test_snr_against_the_real_catalogue(real_data):
    "The definition that the real set used for its own column"
    import pandas as pd
    for folder in real_data:
        table = pd.read_csv(folder/'metadata.csv', low_memory=False)
        if 'trace_snr_db' not in table: continue
        source = open_source(folder, 'test')
        known = table.set_index('trace_name').trace_snr_db
        pairs = np.array([(snr(source.record(i)), known[source.names[i]])
                          for i in range(len(source))])
        pairs = pairs[np.isfinite(pairs).all(1)]
        assert len(pairs) > 50 and np.corrcoef(pairs.T)[0, 1] > .95
