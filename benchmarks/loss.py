"""Quantizer, InfoNCE and diversity, forward and backward: the kernels of seismodel beside its plain
form and the code of transformers.

    python benchmarks/loss.py            # on a GPU, under a minute

First every output and gradient is checked against float64; then each form is timed on fresh random
inputs under bf16 autocast with CUDA events, and the most memory beyond its inputs is noted. Needs
`transformers` for the third row. """
import argparse
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from seismodel.models import infonce, quantizer as quantizers
from seismodel.models.infonce import (contrastive_loss, contrastive_mean, contrastive_sums,
                                      masked_frames)
from seismodel.models.masking import max_masked, span_mask
from seismodel.models.quantizer import GumbelVectorQuantizer, quantize_masked

D, G, V, K, T = 256, 2, 320, 100, 1024
ROUNDS = 15          # timings of one input set
root = Path(__file__).resolve().parents[1]


def input_set(B, seed):
    "Frames as the conv stack gives them (fp32), predictions as autocast gives them (bf16), mask"
    g = torch.Generator('cuda').manual_seed(seed)
    frames = nn.functional.layer_norm(torch.randn(B, T, D, device='cuda', generator=g), (D,))
    predictions = torch.randn(B, T, D, device='cuda', generator=g).bfloat16().requires_grad_()
    return frames, predictions, span_mask(B, T, .65, 10, generator=g)


class Ours(nn.Module):
    "The way of ContrastivePretraining"
    def __init__(self):
        super().__init__()
        self.quantizer, self.project = GumbelVectorQuantizer(D, G, V, D), nn.Linear(D, D)

    def forward(self, frames, predictions, mask):
        indices, valid = masked_frames(mask, max_masked(T, .65, 10))
        q = quantize_masked(self.quantizer, frames, indices, valid)
        q = q._replace(vectors=self.project(q.vectors))
        return contrastive_mean(contrastive_sums(predictions, q, indices, valid, K)).loss


class Plain(Ours):
    "The same from the definitions: all frames quantized, one step of plain PyTorch after the other"
    def forward(self, frames, predictions, mask):
        q = self.quantizer(frames)
        q = q._replace(vectors=self.project(q.vectors))
        return contrastive_loss(predictions, q, mask, K, most=max_masked(T, .65, 10)).loss


class Transformers(nn.Module):
    """Wav2Vec2GumbelVectorQuantizer and the loss of Wav2Vec2ForPreTraining.forward (its steps 3 to
    8); the negatives are drawn beforehand"""
    def __init__(self):
        super().__init__()
        from transformers import Wav2Vec2Config, Wav2Vec2ForPreTraining
        from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2GumbelVectorQuantizer
        self.quantizer = Wav2Vec2GumbelVectorQuantizer(Wav2Vec2Config(
            conv_dim=(D,), conv_stride=(2,), conv_kernel=(3,), num_feat_extract_layers=1,
            num_codevectors_per_group=V,
            num_codevector_groups=G, codevector_dim=D))
        self.project, self.logits = nn.Linear(D,
                                              D), Wav2Vec2ForPreTraining.compute_contrastive_logits

    def forward(self, frames, predictions, mask):
        B, M = mask.shape[0], int(mask.sum(1).min())
        # not a part of what is timed
        if getattr(self, 'drawn_for', None) is not mask:
            where = mask.float().topk(M, 1).indices
            self.rows = (where.gather(1, torch.randint(M, (B, T*K), device='cuda'))
                         + T*torch.arange(B, device='cuda').unsqueeze(1))
            self.drawn_for = mask
        vectors, perplexity = self.quantizer(frames, mask_time_indices=mask)
        targets = self.project(vectors.to(self.project.weight.dtype))
        wrong = targets.view(-1, D)[self.rows.flatten()].view(B, T, K, D).permute(2, 0, 1, 3)
        scores = self.logits(targets[None], wrong, predictions, .1)
        same = (targets == wrong).all(-1)
        if same.any(): scores[1:][same] = float('-inf')
        scores = scores.transpose(0, 2).reshape(-1, K + 1)
        label = ((1 - mask.long()) * -100).transpose(0, 1).flatten()
        contrastive = nn.functional.cross_entropy(scores.float(), label, reduction='sum')
        return (contrastive + .1*(G*V - perplexity)/(G*V)*mask.sum()) / mask.sum()


def step(model, inputs):
    "Forward and backward under bf16 autocast"
    inputs[1].grad = None
    model.zero_grad(set_to_none=True)
    with torch.autocast('cuda', torch.bfloat16): loss = model(*inputs)
    loss.backward()
    return loss


def extra_memory(model, inputs):
    "MiB a window at the peak, beyond inputs and weights"
    step(model, inputs)
    inputs[1].grad = None
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(model, inputs)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20 / len(inputs[0])


def milliseconds(work, rounds=ROUNDS):
    "Median time of one call"
    for _ in range(3): work()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(); work(); end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def in_a_graph(model, inputs):
    "The step as a CUDA graph: what is left where launches cost nothing"
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3): step(model, inputs)
    torch.cuda.current_stream().wait_stream(side)
    inputs[1].grad = None
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with torch.autocast('cuda', torch.bfloat16): loss = model(*inputs)
        loss.backward()
    return graph.replay


def row(name, model, sets):
    first, second = ([milliseconds(lambda: step(model, s)) for s in sets] for _ in range(2))
    ms, again = statistics.median(first), statistics.median(second)
    print(f'{name:<34}{ms:>9.3f}{again:>10.3f}{min(first):>9.3f} – '
          f'{max(first):<8.3f}{extra_memory(model, sets[0]):>10.2f}', flush=True)
    return ms


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--batch', type=int, default=64, help='windows of 1024 frames')
    parser.add_argument('--no-check', action='store_true',
                        help='do not run tests/test_loss_kernels.py first')
    B, no_check = vars(parser.parse_args()).values()
    if not torch.cuda.is_available(): sys.exit('This benchmark needs a GPU.')
    if not no_check:
        code = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider',
                               'tests/test_loss_kernels.py'], cwd=root).returncode
        if code: sys.exit('The kernels disagree with float64: nothing is timed.')
    print(f'{torch.cuda.get_device_name()}, torch {torch.__version__}; B {B}, T {T}, D {D}, {G} x '
          f'{V} codes, {K} negatives, bf16 autocast, '
          f'fp32 products: {torch.get_float32_matmul_precision()}\n')
    print(f"{'forward + backward':<34}{'ms':>9}{'again':>10}{'input sets':>20}{'MiB/window':>10}")
    torch.manual_seed(0)
    sets = [input_set(B, s) for s in range(3)]
    ours = Ours().cuda()
    fast = row('seismodel, kernels', ours, sets)
    torch.set_float32_matmul_precision('high')
    row('seismodel, kernels, TF32 allowed', ours, sets)
    torch.set_float32_matmul_precision('highest')
    try:
        replay = in_a_graph(ours, sets[0])
        print(f"{'seismodel, kernels, CUDA graph':<34}"
              f'{milliseconds(replay):>9.3f}{milliseconds(replay):>10.3f}', flush=True)
        del replay
    except RuntimeError as error: print(f'CUDA graph: {error}'.splitlines()[0])
    row('seismodel, plain, all frames', Plain().cuda(), sets)
    for module in (quantizers, infonce): module.kernels_for = lambda x: None
    row('seismodel, plain, masked frames', ours, sets)
    try: theirs = Transformers().cuda()
    except ImportError: return print('transformers is not installed: no peer')
    try: slow = row('transformers', theirs, sets[:1])
    except torch.cuda.OutOfMemoryError: return print(f'transformers: out of memory at B {B}')
    print(f'\ntransformers / seismodel: {slow/fast:.1f} x')


if __name__ == '__main__': main()
