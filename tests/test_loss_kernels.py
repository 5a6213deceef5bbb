"""The kernels of quantizer and loss against their definitions in float64: on the GPU where there is
one, else in Triton's interpreter.

The interpreter of Triton 3.6 cannot run loops with NumPy 2.4 or later; that of 3.9 can.
"""
import math

import numpy as np
import pytest
import torch

triton = pytest.importorskip('triton')
cuda = torch.cuda.is_available()

from seismodel.models import infonce, quantizer as quantizers
from seismodel.kernels import triton_infonce as kernels
from seismodel.training.distributed import WholeBatchDraws
from seismodel.models.encoders import ConvDownConfig
from seismodel.models.infonce import gather_frames, masked_frames
from seismodel.models.pretraining import ContrastiveConfig, ContrastivePretraining
from seismodel.models.quantizer import (GumbelVectorQuantizer, look_up, quantize_masked,
                                        soft_usage, straight_through)

device = 'cuda' if cuda else 'cpu'
on_gpu = pytest.mark.skipif(not cuda, reason='no GPU: full size only there')
# of the interpreter, at -inf
pytestmark = pytest.mark.filterwarnings('ignore:(overflow|invalid|divide):RuntimeWarning')


def generator(seed): return torch.Generator(device).manual_seed(seed)


def close(ours, exact, limit):
    "The norm of the difference over the norm of what is exact"
    assert ours.shape == exact.shape
    error = (ours.double() - exact).norm() / exact.norm().clamp_min(1e-30)
    assert error <= limit, f'{error:.2e} > {limit}'


def philox_gumbel(seed, rows, block):
    """Gumbel noise (rows, block) from Philox 4x32-10, written from its description (Salmon et al.,
    2011)"""
    low = np.uint64(0xFFFFFFFF)
    c = [np.arange(rows*block//4, dtype=np.uint64)] + [np.zeros(rows*block//4, dtype=np.uint64)]*3
    key = [np.uint64(seed) & low, np.uint64(seed) >> np.uint64(32)]
    for _ in range(10):
        b, a = np.uint64(0xCD9E8D57)*c[2], np.uint64(0xD2511F53)*c[0]
        c = [(b >> np.uint64(32)) ^ c[1] ^ key[0], b & low, (a >> np.uint64(32)) ^ c[3] ^ key[1],
             a & low]
        key = [(key[0] + np.uint64(0x9E3779B9)) & low, (key[1] + np.uint64(0xBB67AE85)) & low]
    x = np.stack(c, -1).astype(np.uint32).view(np.int32)
    u = np.where(x < 0, -x - 1, x) * 4.6566127342e-10
    return torch.from_numpy(-np.log(-np.log(np.maximum(u, 1e-10)))).view(rows, block).to(device)


def quantizer_case(B, T, M, D, G, V, d, seed):
    "A quantizer, frames, indices (the second row is masked in part) and weights of a loss"
    torch.manual_seed(seed)
    vq = GumbelVectorQuantizer(D, G, V, G*d, temperature=.8).to(device)
    mask = torch.zeros(B, T, dtype=torch.bool, device=device)
    for b in range(B): mask[b, torch.randperm(T)[:M if b == 0 else M//2]] = True
    return vq, torch.randn(B, T, D, device=device), *masked_frames(mask, M)


def check_quantizer(vq, x, indices, valid, limit, disagree=0.):
    """Outputs and all gradients against autograd through the definition in float64, fed with the
    same noise"""
    (B, M), G, V = indices.shape, vq.groups, vq.codes
    BLOCK = max(4, triton.next_power_of_2(V))
    leaf = x.clone().requires_grad_()
    vectors, codes, usage = kernels.quantize_frames(vq, leaf, indices, valid, generator(3))
    up, r = torch.randn_like(vectors), torch.randn_like(usage)
    ours = torch.autograd.grad((vectors*up).sum() + (usage*r).sum(), [leaf, *vq.parameters()])

    wide, exact_leaf = vq.__class__(x.shape[2], G, V, vq.codevectors.shape[2]*G).to(
        device).double(), x.double().requires_grad_()
    wide.load_state_dict(vq.state_dict())
    logits = wide.weight_proj(gather_frames(exact_leaf, indices))*vq.scale
    logits = logits.unflatten(-1, (G, V))
    scores = logits
    if vq.training:
        seeds = kernels.new_seeds(B, device, generator(3)).tolist()
        noise = torch.stack([philox_gumbel(seed, M*G, BLOCK)[:, :V].view(M, G, V)
                             for seed in seeds])
        scores = (logits + noise)/vq.temperature.double()
    one_hot, exact_codes = straight_through(scores.softmax(-1))
    assert (codes != exact_codes).double().mean() <= disagree          # a tie up to rounding
    if disagree:
        one_hot = (torch.zeros_like(one_hot).scatter_(-1, codes.unsqueeze(-1), 1.)
                   + scores.softmax(-1) - scores.softmax(-1).detach())
    exact_vectors, exact_usage = look_up(one_hot, wide.codevectors), soft_usage(logits, valid)
    exact = torch.autograd.grad((exact_vectors*up.double()).sum() + (exact_usage*r.double()).sum(),
                                [exact_leaf, *wide.parameters()])
    for a, b in zip((vectors, usage, *ours), (exact_vectors, exact_usage, *exact)):
        close(a, b, limit)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('shape', [(2, 30, 21, 12, 2, 9, 4), (3, 9, 4, 5, 1, 33, 3),
                                   (1, 9, 8, 8, 2, 320, 6), (2, 9, 4, 8, 2, 1, 6)])
def test_quantizer_agrees_with_float64(shape, training, monkeypatch):
    "Sizes that fill no tile, and a backward pass in several steps"
    monkeypatch.setattr(kernels, 'CHUNK', 10)
    vq, x, indices, valid = quantizer_case(*shape, seed=0)
    check_quantizer(vq.train(training), x, indices, valid, 1e-4)


def test_quantizer_draws_from_the_generator():
    vq, x, indices, valid = quantizer_case(2, 20, 9, 12, 2, 40, 4, seed=1)
    a, b, c = (kernels.quantize_frames(vq, x, indices, valid, generator(s))[1] for s in (5, 5, 6))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_a_frame_that_is_not_a_number_gets_a_code_of_the_book():
    "A code beyond the book would end the process on a GPU before the update can be withheld"
    vq, x, indices, valid = quantizer_case(2, 12, 6, 8, 2, 5, 4, seed=0)
    x[0] = float('nan')
    vectors, codes, _ = kernels.quantize_frames(vq, x, indices, valid, generator(1))
    assert codes.shape == (2, 6, 2) and ((0 <= codes) & (codes < 5)).all()
    clean = kernels.quantize_frames(vq, x.nan_to_num(), indices, valid, generator(1))
    assert torch.equal(codes[1], clean[1][1]) and torch.equal(vectors[1], clean[0][1])


def test_ranks_draw_what_one_process_draws(monkeypatch):
    """Codes, gradient of the noisy choice and negatives of three windows on each of two ranks, in
    steps that end inside a window"""
    monkeypatch.setattr(kernels, 'CHUNK', 10)
    vq, x, indices, valid = quantizer_case(6, 20, 9, 12, 2, 40, 4, seed=1)
    ids = torch.randint(50, (6, 9), device=device)
    def drawn(at):
        leaf, g = x[at].clone().requires_grad_(), generator(5)
        vectors, codes, _ = kernels.quantize_frames(vq, leaf, indices[at], valid[at], g)
        times, left, _ = kernels.draw_negatives(ids[at], valid[at], 7, g)
        return codes, torch.autograd.grad(vectors.sum(),
                                          leaf)[0], torch.where(valid[at][..., None], times,
                                                                0), left
    whole, parts = drawn(slice(6)), []
    for rank in range(2):
        with WholeBatchDraws(rank, 2): parts.append(drawn(slice(3*rank, 3*rank + 3)))
    for one, two in zip(whole, zip(*parts)): torch.testing.assert_close(torch.cat(two), one)
    # without it: those of the first rows
    assert not any(torch.equal(a, b) for a, b in zip(drawn(slice(3, 6))[::2], parts[1][::2]))


def test_quantizer_without_a_valid_frame():
    vq, x, indices, valid = quantizer_case(2, 20, 9, 12, 2, 40, 4, seed=1)
    usage = kernels.quantize_frames(vq, x, indices, valid & False, generator(0))[2]
    assert not usage.any()


def loss_case(B, T, M, D, V, seed, dtype=torch.float32):
    """Predictions, targets, codes and indices; the first row is full, later rows have M//2, 1 and 0
    masked frames"""
    torch.manual_seed(seed)
    mask = torch.zeros(B, T, dtype=torch.bool, device=device)
    for b, n in zip(range(B), [M, M//2, 1, 0] + [M]*B): mask[b, torch.randperm(T)[:n]] = True
    indices, valid = masked_frames(mask, M)
    codes = torch.randint(V, (B, M, 2), device=device)
    book = torch.randn(V, V, D, device=device)
    targets = book[codes[..., 0], codes[..., 1]].to(dtype)
    predictions = (3*torch.randn(B, T, D, device=device)).to(dtype)
    gathered = gather_frames(predictions, indices)
    # some right
    predictions.scatter_(1, indices.unsqueeze(-1).expand_as(gathered),
                         (gathered + 6*D**-.5*targets).to(dtype))
    return predictions, targets, codes, indices, valid


def check_info_nce(predictions, targets, codes, indices, valid, V, K, tau, limit, grad_limit):
    "Sums and gradients against the formula in float64, with the counts that the kernel drew"
    leaves = [t.clone().requires_grad_() for t in (predictions, targets)]
    loss, hits, counted, collided = kernels.fused_info_nce_sums(leaves[0], leaves[1], codes,
                                                                indices, valid, V, K, tau,
                                                                generator(3))
    ours = torch.autograd.grad(2.5*loss, leaves)
    ids = codes[..., 0]*V + codes[..., 1]
    times, left, masked = kernels.draw_negatives(ids, valid, K, generator(3))
    M = indices.shape[1]
    rows = valid.unsqueeze(-1)
    w = torch.where(rows, times[:, :, :M].double(), 0.)
    assert torch.equal(w.sum(-1), left.double()) and not w.diagonal(dim1=1, dim2=2).any()
    assert (not w[~valid.unsqueeze(1).expand_as(w)].any()
            and not w[ids.unsqueeze(1) == ids.unsqueeze(2)].any())
    c, q = (t.double().requires_grad_() for t in (predictions, targets))
    s = infonce.similarity(gather_frames(c, indices), q)/tau
    positive, counts = s.diagonal(dim1=1, dim2=2), w.sum(-1) > 0
    # log 0 is -inf: a place that was not drawn
    total = (w + torch.eye(M, device=device)).log() + s
    each = torch.where(counts, total.logsumexp(-1) - positive, 0.)
    exact = torch.autograd.grad(2.5*each.sum(), (c, q))
    close(loss, each.sum(), limit)
    for a, b in zip(ours, exact): close(a, b, grad_limit)
    enough = valid & (valid.sum(1, keepdim=True) > 1)
    assert counted == counts.sum() and collided == K*enough.sum() - w.sum()
    best = s.masked_fill(w == 0, float('-inf')).amax(-1)
    near = ((positive - best).abs() < 1e-3) & counts                           # may fall either way
    assert abs(hits - ((positive > best) & counts).sum()) <= near.sum()
    if predictions.shape[0] > 1: assert 0 < hits < counted


@pytest.mark.parametrize('tau', [.1, .01])
@pytest.mark.parametrize('shape', [(4, 80, 70, 24, 4), (2, 30, 13, 5, 2), (1, 140, 129, 40, 320)])
def test_info_nce_agrees_with_float64(shape, tau):
    """fp32: rounding alone. Several tiles and parts of tiles; rows with many, one and no masked
    frame; frames without a negative left"""
    check_info_nce(*loss_case(*shape, seed=0), shape[4], 9, tau, 1e-5, 1e-4)


@on_gpu     # the interpreter has no bf16 product
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_info_nce_of_bf16(seed):
    "bf16 inputs are taken as they are; only the weights of the second product are rounded"
    check_info_nce(*loss_case(4, 80, 70, 24, 4, seed, torch.bfloat16), 4, 9, .1, 1e-5, 1e-2)


def test_more_than_255_negatives():
    check_info_nce(*loss_case(2, 30, 13, 5, 3, 0), 3, 300, .1, 1e-5, 1e-5)


def test_counts_are_uniform():
    """Each other masked frame is as likely as the next, in rows of 12 and of 5: chi square, limit
    at one in ten thousand"""
    valid = torch.ones(2, 12, dtype=torch.bool, device=device)
    valid[1, 5:] = False
    ids = torch.arange(24, device=device).view(2, 12)
    times = sum(kernels.draw_negatives(ids, valid, 1000, generator(s))[0].double().cpu()
                for s in range(5))
    for row, m, limit in ((0, 12, 35.6), (1, 5, 21.2)):     # 10 and 3 degrees of freedom
        for i in range(m):
            seen = times[row, i, torch.arange(times.shape[2]) < m]
            assert seen[i] == 0 and seen.sum() == 5000
            seen = torch.cat([seen[:i], seen[i+1:]])
            assert ((seen - 5000/(m - 1))**2 / (5000/(m - 1))).sum() < limit


def test_everything_collides():
    "A dead codebook: nothing is counted, every negative has collided, and the gradient is zero"
    predictions, targets, codes, indices, valid = loss_case(2, 30, 13, 5, 2, 0)
    leaf = predictions.requires_grad_()
    loss, hits, counted, collided = kernels.fused_info_nce_sums(leaf, targets, codes*0, indices,
                                                                valid, 2, 9, .1, generator(0))
    loss.backward()
    assert (loss, hits, counted, collided) == (0, 0, 0, 9*valid.sum()) and not leaf.grad.any()


def test_zero_vectors_are_finite():
    predictions, targets, codes, indices, valid = loss_case(2, 30, 13, 5, 4, 0)
    leaves = [(t*0).requires_grad_() for t in (predictions, targets)]
    loss, hits, counted, _ = kernels.fused_info_nce_sums(*leaves, codes, indices, valid, 4, 9, .1,
                                                         generator(0))
    loss.backward()
    assert hits == 0 and loss.isfinite() and all(t.grad.isfinite().all() for t in leaves)


@pytest.fixture
def kernels_everywhere(monkeypatch):
    """The functions of the chapters take the kernels on this device, whatever it is (in the
    interpreter with fp32)"""
    if not cuda: monkeypatch.setattr(kernels, 'take', lambda *inputs: True)
    for module in (quantizers, infonce):
        monkeypatch.setattr(module, 'kernels_for', lambda x: kernels)


def test_the_model_runs_on_the_kernels(kernels_everywhere, monkeypatch):
    """Pretraining (on the GPU under bf16 autocast): close to the plain form, with gradients
    everywhere, decided by the generator"""
    config = ContrastiveConfig(ConvDownConfig(conv_features=16, out_features=16, codevector_dim=16,
                                              target_features=16), blocks=1, pooling=(4,),
                               negatives=20)
    torch.manual_seed(0)
    model, x = ContrastivePretraining(config).to(device), torch.randn(2, 160, 3, device=device)
    def step(seed):
        with torch.autocast(device, torch.bfloat16, enabled=cuda): return model(x, generator(seed))
    a, b = step(5), step(5)
    assert torch.equal(a.loss, b.loss) and a.loss.dtype == torch.float32
    a.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    for p in (*model.encoder.quantizer.parameters(), *model.encoder.target_projection.parameters(),
              model.head.weight):
        assert p.grad.any()
    for module in (quantizers, infonce): monkeypatch.setattr(module, 'kernels_for', lambda x: None)
    plain = step(5)
    for name in ('contrastive', 'diversity', 'perplexity'):
        assert math.isclose(a.metrics[name], plain.metrics[name], rel_tol=.1), name
    assert a.metrics['masked'] == plain.metrics['masked']


def test_fp32_stays_with_the_definition():
    p, q = torch.zeros(1, 8, 16), torch.zeros(1, 4, 16)
    assert (not kernels.take(p, q, 100) and kernels.take(p.bfloat16(), q.bfloat16(), 100)
            and not kernels.take(p.bfloat16(), q, 100))


@on_gpu
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_full_size(seed):
    "8 windows of 1024 frames, 670 masked, D 256, 2 x 320 codes, 100 negatives"
    torch.set_float32_matmul_precision('highest')
    vq, x, indices, valid = quantizer_case(8, 1024, 670, 256, 2, 320, 128, seed)
    check_quantizer(vq, x, indices, valid, 1e-4, disagree=1e-3)
    check_info_nce(*loss_case(8, 1024, 670, 256, 320, seed, torch.bfloat16), 320, 100, .1,
                   1e-4, 2e-2)


@on_gpu
def test_nobody_waits_for_the_gpu():
    "No step of forward or backward asks the device for a value"
    vq, x, indices, valid = quantizer_case(2, 100, 60, 16, 2, 40, 8, seed=0)
    predictions = torch.randn(2, 100, 16, device=device, dtype=torch.bfloat16, requires_grad=True)
    def run():
        q = quantize_masked(vq, x, indices, valid)
        sums = infonce.contrastive_sums(predictions, q._replace(vectors=q.vectors.bfloat16()),
                                        indices, valid)
        infonce.contrastive_mean(sums).loss.backward()
    run()       # compiles
    torch.cuda.set_sync_debug_mode('error')
    try: run()
    finally: torch.cuda.set_sync_debug_mode('default')
