"""Compare synthetic with real seismograms: quantiles of what a seismologist would look at, and a
small classifier.

    python scripts/match_synthetic.py FOLDER [--records 600] [--seed 0]

FOLDER holds a SeisBench dataset (metadata.csv and waveforms.hdf5); its train split is used,
three-component records with a labelled P only. The classifier needs scikit-learn and is skipped
without it. """
import argparse

import numpy as np

from seismodel.signals.synthetic import SyntheticConfig, synthesize

RATE, WINDOW = 100., 4096
BANDS = [(.5, 1), (1, 2), (2, 5), (5, 10), (10, 20), (20, 30), (30, 45)]      # Hz


def spectrum(x):
    "Mean power in each band of a piece (n, 3), Hann tapered, in dB"
    f = np.fft.rfftfreq(len(x), 1 / RATE)
    power = (np.abs(np.fft.rfft((x - x.mean(0)) * np.hanning(len(x))[:, None],
                                axis=0))**2).sum(1) / len(x)
    return np.array([10 * np.log10(power[(f >= a) & (f < b)].mean() + 1e-30) for a, b in BANDS])


def high_pass(x, corner=1.):
    "Zero-phase high-pass by FFT: takes the microseism away before amplitudes are compared"
    f = np.fft.rfftfreq(len(x), 1 / RATE)[:, None]
    gain = 1 / np.sqrt(1 + (corner / np.maximum(f, 1e-9))**8)
    return np.fft.irfft(np.fft.rfft(x - x.mean(0), axis=0) * gain, len(x), axis=0)


def features(x, p, s):
    """Named numbers of one window (4096, 3) with picks in samples (s may be NaN), or None if too
    little lies around P"""
    p = int(round(p))
    if p < 450 or p > len(x) - 650: return None
    y = high_pass(x)
    if (y[p - 400:p].std(0) == 0).any(): return None
    noise, wave = x[p - 400:p - 20], x[p:p + 200]
    noise_db, wave_db = spectrum(noise), spectrum(wave)
    out = {'P SNR 2-20 Hz, dB': np.mean(wave_db[2:5] - noise_db[2:5])}
    first = y[p:p + 50]
    w, v = np.linalg.eigh(np.cov(first.T))
    out['rectilinearity 0.5 s'] = 1 - (w[0] + w[1]) / (2 * w[2])
    out['verticality of P'] = abs(v[0, 2])
    out['onset 0.1 s / 1 s, dB'] = 20 * np.log10(y[p:p + 10].std() / y[p:p + 100].std())
    out['noise H/V, dB'] = 20 * np.log10(np.sqrt((y[p - 400:p - 20,
                                                    1:]**2).mean() / (y[p - 400:p - 20,
                                                                        0]**2).mean()))
    out['noise N/E, dB'] = abs(20 * np.log10(y[p - 400:p - 20, 1].std() / y[p - 400:p - 20,
                                                                            2].std()))
    out['noise kurtosis'] = np.log10((y[p - 400:p - 20]**4).mean() / (y[p - 400:p
                                                                        - 20]**2).mean()**2)
    for i, (a, b) in enumerate(BANDS):
        if i != 3: out[f'noise {a}-{b} re 5-10 Hz, dB'] = noise_db[i] - noise_db[3]
    for i, (a, b) in enumerate(BANDS):
        if i > 1 and i != 3: out[f'P {a}-{b} re 5-10 Hz, dB'] = wave_db[i] - wave_db[3]
    out['S-P, s'] = (s - p) / RATE
    if np.isfinite(s) and s < len(x) - 200 and s > p + 20:
        s = int(round(s))
        out['S/P amplitude, dB'] = 20 * np.log10(np.abs(y[s:s
                                                          + 200]).max() / np.abs(y[p:min(p + 200,
                                                                                         s)]).max())
        late = spectrum(x[s:s + 200])
        out['S 2-5 re 5-10 Hz, dB'], out[
            'S 10-20 re 5-10 Hz, dB'] = late[2] - late[3], late[4] - late[3]
        out['S H/V, dB'] = 20 * np.log10(y[s:s + 200, 1:].std() / y[s:s + 200, 0].std())
        # ends 0.3 s before S: real picks run late or early by a tenth or two
        early = y[max(s - 130, p):max(s - 30, p + 20)]
        out['before S / P, dB'] = 20 * np.log10(early.std() / y[p:min(p + 100, s)].std())
        if s < len(x) - 1000:
            level = [np.log10(y[i:i + 200].std()) for i in range(s, s + 1000, 200)]
            out['decay after S, dB/s'] = 20 * np.polyfit(np.arange(5) * 2., level, 1)[0]
    return out


def real_windows(folder, rng):
    "Windows (4096, 3) of the train split at random offsets, with picks"
    from seisbench.data import WaveformDataset
    data = WaveformDataset(folder, component_order='ZNE').train()
    for i, row in enumerate(data.metadata.to_dict('records')):
        p, s = row['trace_p_arrival_sample'], row['trace_s_arrival_sample']
        x = data.get_waveforms(i).T
        if not np.isfinite(p) or (x.std(0) == 0).any() or len(x) < WINDOW: continue
        onset = rng.uniform(.12, .8) * WINDOW
        start = int(np.clip(p - onset, 0, len(x) - WINDOW))
        yield x[start:start + WINDOW].astype(float), p - start, s - start


def synthetic_windows(count, seed):
    batch = synthesize(np.arange(count), seed, SyntheticConfig(samples=WINDOW, noise_only=0.))
    for x, p, s in zip(batch.waveforms, batch.p_onset, batch.s_onset):
        if np.isfinite(p) and (x.std(0) > 0).all(): yield x.astype(float), p, s


def table(windows):
    "Rows of features as one dict of arrays; what a record lacks is NaN"
    rows = [r for r in (features(*w) for w in windows) if r]
    names = list(dict.fromkeys(n for r in rows for n in r))
    return {n: np.array([r.get(n, np.nan) for r in rows]) for n in names}


def accuracy(real, fake, names):
    """Five-fold balanced accuracy of boosted trees, and the features that they lean on (None
    without scikit-learn)"""
    try:
        from sklearn.ensemble import HistGradientBoostingClassifier
        from sklearn.inspection import permutation_importance
        from sklearn.model_selection import cross_val_score, train_test_split
    except ImportError:
        return None
    n = min(len(real[names[0]]), len(fake[names[0]]))
    x = np.vstack([np.stack([t[k][:n] for k in names], 1) for t in (real, fake)])
    y = np.repeat([0, 1], n)
    model = HistGradientBoostingClassifier(max_iter=80, max_depth=4, random_state=0)
    order = np.random.default_rng(0).permutation(len(y))
    score = cross_val_score(model, x[order], y[order], cv=5, scoring='balanced_accuracy').mean()
    a, b, c, d = train_test_split(x, y, test_size=.4, random_state=0)
    weight = permutation_importance(model.fit(a, c), b, d, n_repeats=10,
                                    random_state=0).importances_mean
    return score, [(names[i], weight[i]) for i in np.argsort(-weight)[:8]]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', help='SeisBench dataset')
    parser.add_argument('--records', type=int, default=1500, help='synthetic windows to draw')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    real = table(real_windows(args.folder, np.random.default_rng(args.seed)))
    fake = table(synthetic_windows(args.records, args.seed))
    print(f"{'':30s}{'real 10 %':>10s}{'50 %':>8s}{'90 %':>8s}"
          f"{'synth 10 %':>13s}{'50 %':>8s}{'90 %':>8s}")
    for name in real:
        q = [np.nanquantile(t[name], [.1, .5, .9]) for t in (real, fake)]
        print(f'{name:30s}{q[0][0]:10.2f}{q[0][1]:8.2f}{q[0][2]:8.2f}'
              f'{q[1][0]:13.2f}{q[1][1]:8.2f}{q[1][2]:8.2f}')
    print(f"{len(real['S-P, s'])} real and {len(fake['S-P, s'])} synthetic windows")
    for title, names in [('all', list(real)),
                         ('without noise', [n for n in real if not n.startswith('noise')])]:
        result = accuracy(real, fake, names)
        if result is None: return print('no classifier: scikit-learn is not installed')
        print(f'classifier ({title}): balanced accuracy {result[0]:.3f}; leans on '
              + ', '.join(f'{n} ({w:.3f})' for n, w in result[1]))


if __name__ == '__main__':
    main()
