"""The mLSTM cell on one GPU: ours and every peer that is installed, each checked against float64
before it is timed.

    python benchmarks/cell.py            # the table of the chapter "How fast is fast"

Times are medians of replayed CUDA graphs over three sets of random inputs, taken twice to show the
noise. Bytes: each tensor once. """
import argparse
import statistics

import torch
import torch.nn.functional as F

from seismodel.kernels.fused import FusedMLSTM, mlstm
from seismodel.kernels.mlstm import mlstm_chunkwise

SHAPES = [(64, 4, 1024, 64), (64, 8, 1024, 64), (64, 4, 256, 128), (64, 4, 64, 256),
          (8, 4, 16384, 64), (256, 4, 1024, 32), (64, 4, 1024, 44)]


def inputs(B, H, T, d, seed, dtype=torch.bfloat16, gates='usual'):
    "q, k, v as a layer makes them, (B, T, H, d) in memory; gates; the gradient of h"
    g = torch.Generator('cuda').manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, device='cuda')
    q, k, v, dh = (draw(B, T, H, d).to(dtype).transpose(1, 2) for _ in range(4))
    i, f = draw(B, H, T), 3 + draw(B, H, T)
    if gates == 'fresh': i, f = i*0 - 10, f*0 + torch.linspace(3, 6, H, device='cuda')[:, None]
    if gates == 'extreme': i, f = 15*torch.tanh(8*i/15), 15*torch.tanh(8*(f - 3)/15)
    return q, k, v, i, f, dh


def errors(B, H, T, d, dtype, gates, seed):
    "Relative errors of h, dq, dk, dv, di, df against float64"
    *x, dh = inputs(B, H, T, d, seed, dtype, gates)
    x = [z.detach().requires_grad_() for z in x]
    h = mlstm(*x, reverse=H//2)
    found = [h, *torch.autograd.grad(h, x, dh)]
    x = [z.detach().double().requires_grad_() for z in x]
    h = mlstm_chunkwise(*x, reverse=H//2)
    wanted = [h, *torch.autograd.grad(h, x, dh.double())]
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, wanted)]


def median_ms(runs, repeats=30):
    "Median over replays of the graphs of `runs`, one after the other"
    graphs = []
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for run in runs: run()
    torch.cuda.synchronize()
    for run in runs:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]): run()
    times = []
    for n in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record(); graphs[n % len(graphs)].replay(); end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def cell(x):
    "Forward, and forward with backward, of our cell"
    *x, dh = x
    x = [z.detach().requires_grad_() for z in x]
    H = x[0].shape[1]
    def forward():
        with torch.no_grad(): return FusedMLSTM.apply(*x, H//2, None, False)[0]
    return forward, lambda: torch.autograd.grad(FusedMLSTM.apply(*x, H//2, None, False)[0], x, dh)


def attention(x):
    "Flash attention over the whole window, by PyTorch"
    q, k, v, _, _, dh = x
    q, k, v = (z.contiguous().requires_grad_() for z in (q, k, v))
    dh = dh.contiguous()
    def forward():
        with torch.no_grad(): return F.scaled_dot_product_attention(q, k, v)
    return forward, lambda: torch.autograd.grad(F.scaled_dot_product_attention(q, k, v),
                                                (q, k, v), dh)


def published(x):
    "The best published mLSTM kernel, one direction; None where it is not installed"
    try: from mlstm_kernels.torch import get_mlstm_kernel
    except ImportError: return None
    kernel = get_mlstm_kernel('chunkwise--triton_limit_chunk')
    *x, dh = x
    x = [z.contiguous().detach().requires_grad_() for z in x]
    call = lambda: kernel(*x, chunk_size=64, autocast_kernel_dtype=torch.bfloat16)
    def forward():
        with torch.no_grad(): return call()
    return forward, lambda: torch.autograd.grad(call(), x, dh.contiguous())


def lstm(x):
    "cuDNN's LSTM of the same width, one direction, its projections included"
    B, H, T, d = x[0].shape
    net = torch.nn.LSTM(H*d, H*d, batch_first=True).cuda().bfloat16()
    z = torch.randn(B, T, H*d, device='cuda', dtype=torch.bfloat16, requires_grad=True)
    def forward():
        with torch.no_grad(): return net(z)[0]
    return forward, lambda: net(z)[0].sum().backward()


def ceilings():
    "Bytes a second of a large copy, bf16 operations a second of a large product"
    a = torch.randn(2**30, device='cuda', dtype=torch.bfloat16); b = torch.empty_like(a)
    copy = 4*2**30 / median_ms([lambda: torch.add(a, 1, out=b)], 10) * 1e3
    m = torch.randn(8192, 8192, device='cuda', dtype=torch.bfloat16); n = torch.randn_like(m)
    return copy, 2*8192**3 / median_ms([lambda: m @ n], 10) * 1e3


if __name__ == '__main__':
    argparse.ArgumentParser(description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(torch.cuda.get_device_name(), '| torch', torch.__version__)
    worst = {}
    for shape in SHAPES:
        B, H, T, d = 2, *shape[1:3], shape[3]
        for dtype in (torch.bfloat16, torch.float32):
            for gates in ('usual', 'fresh', 'extreme'):
                for seed in range(3):
                    e = errors(B, H, min(T, 2048), d, dtype, gates, seed)
                    key = (shape[1:], str(dtype)[6:], gates)
                    worst[key] = [max(p, q) for p, q in zip(worst.get(key, [0]*6), e)]
    print('largest relative error over three seeds:'
          '      h       dq      dk      dv      di      df')
    for (shape, dtype, gates), e in worst.items():
        print(f'{str(shape):18} {dtype:9} {gates:9}', *(f'{x:.1e}' for x in e))
    copy, product = ceilings()
    print(f'ceilings: copy {copy/1e12:.2f} TB/s, product {product/1e12:.0f} TFLOP/s')
    print(f'{"shape":20} {"what":12} {"forward":>16} {"and backward":>16} ms   bytes at the '
          f'ceiling   share')
    for shape in SHAPES:
        B, H, T, d = shape
        unit = 2*B*H*T*d
        for name, peer in (('seismodel', cell), ('attention', attention),
                           ('mlstm_kernels', published), ('cuDNN LSTM', lstm)):
            if name == 'cuDNN LSTM' and T > 1024: continue
            pairs = [peer(inputs(*shape, seed)) for seed in range(3)]
            if pairs[0] is None: continue
            try:
                f = [median_ms([p[0] for p in pairs]) for _ in range(2)]
                fb = [median_ms([p[1] for p in pairs]) for _ in range(2)]
            except Exception as e:
                print(f'{str(shape):20} {name:12} {type(e).__name__}: {str(e)[:60]}'); continue
            floor = 12*unit/copy*1e3
            print(f'{str(shape):20} {name:12} {f[0]:7.4f} {f[1]:7.4f}  {fb[0]:7.4f} {fb[1]:7.4f}'
                  + (f'      {4*unit/copy*1e3:.3f} {floor:.3f}   {floor/min(fb):.0%}'
                     if name == 'seismodel' else ''), flush=True)
            del pairs
            torch.cuda.empty_cache()
    for T in (1024, 4096, 16384, 65536):
        f, fb = (median_ms([p[n] for p in [cell(inputs(4, 4, T, 64, s)) for s in range(2)]])
                 for n in (0, 1))
        print(f'batch 4, {T:6} frames: {f:.3f} {fb:.3f} ms, {fb/T*1e6:.1f} ns a frame')
