"The contrastive loss against transformers, a loop in float64 and properties that hold for any mask"
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from transformers import Wav2Vec2Config, Wav2Vec2ForPreTraining
from transformers.modeling_outputs import ModelOutput

from conftest import Largest
from seismodel.models import infonce as module
from seismodel.models.infonce import (duplicate_negatives, contrastive_loss, diversity,
                                      gather_frames, info_nce, masked_frames, negatives)
from seismodel.models.quantizer import Quantized, soft_perplexity

def our_loss(predictions, targets, mask, codes, logits, **settings):
    "`contrastive_loss` of single tensors"
    return contrastive_loss(predictions, Quantized(targets, codes, logits), mask, **settings)


quick = settings(max_examples=40, deadline=None)


def example(B=3, T=26, D=16, G=2, V=3, ratio=.6, seed=0, dtype=torch.float32):
    "Predictions, targets (equal where codes are), mask with at least 2 frames a row, codes, logits"
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(V, (B, T, G), generator=g)
    book = torch.randn(G, V, D, generator=g, dtype=dtype)
    targets = book[torch.arange(G), codes].sum(2)
    mask = torch.rand(B, T, generator=g) < ratio
    mask[:, :2] = True
    logits = torch.randn(B, T, G, V, generator=g, dtype=dtype)
    return torch.randn(B, T, D, generator=g, dtype=dtype), targets, mask, codes, logits


def oracle(predictions, targets, mask, logits, frame_numbers):
    """Steps 3 to 8 of Wav2Vec2ForPreTraining.forward for given negatives (B, T, K): two sums and
    the number of frames"""
    B, T, D = predictions.shape
    rows = frame_numbers + torch.arange(B).view(B, 1, 1) * T
    wrong = targets.view(-1, D)[rows.flatten()].view(B, T, -1, D).permute(2, 0, 1, 3)
    scores = Wav2Vec2ForPreTraining.compute_contrastive_logits(targets[None], wrong,
                                                               predictions, .1)
    same = (targets == wrong).all(-1)
    if same.any(): scores[1:][same] = float('-inf')
    scores = scores.transpose(0, 2).reshape(-1, scores.size(0))
    label = ((1 - mask.long()) * -100).transpose(0, 1).flatten()
    contrastive = F.cross_entropy(scores.float(), label, reduction='sum')
    perplexity = soft_perplexity(logits, mask)
    size = logits.shape[2] * logits.shape[3]
    return contrastive, (size - perplexity) / size * mask.sum(), mask.sum()


def drawn(mask, K, seed):
    "Our draw of negatives, and the same as frame numbers (B, T, K) for the oracle"
    indices, valid = masked_frames(mask)
    picks = negatives(valid, K, torch.Generator().manual_seed(seed))
    frames = indices.gather(1, picks.flatten(1)).view_as(picks)
    return torch.zeros_like(frames).scatter_(1, indices.unsqueeze(-1).expand_as(frames), frames)


@pytest.mark.parametrize('V', [3, 320])     # with collisions and without
def test_loss_and_gradients_agree_with_transformers(V):
    "The same negatives injected: loss and gradients to 1e-5"
    predictions, targets, mask, codes, logits = example(V=V)
    grads = []
    for ours in (True, False):
        inputs = [t.clone().requires_grad_() for t in (predictions, targets, logits)]
        if ours:
            out = our_loss(inputs[0], inputs[1], mask, codes, inputs[2], n_negatives=7,
                                   generator=torch.Generator().manual_seed(3))
            loss, parts = out.loss, (out.contrastive, out.diversity)
        else:
            contrastive, spread, n = oracle(*inputs[:2], mask, inputs[2], drawn(mask, 7, 3))
            loss, parts = (contrastive + .1*spread) / n, (contrastive/n, spread/n)
        loss.backward()
        grads.append((loss, *parts, *(t.grad for t in inputs)))
    assert (out.collided > .02) == (V == 3)
    # no frame is left out here
    assert not duplicate_negatives(codes, torch.arange(26).expand(3, 26, 26)).all(-1).any()
    for mine, other in zip(*grads): torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_agrees_with_the_whole_forward_of_transformers(monkeypatch):
    "Wav2Vec2ForPreTraining.forward itself, its network replaced by given tensors"
    B, T, D, K = 2, 40, 16, 9
    config = Wav2Vec2Config(hidden_size=D, num_hidden_layers=1, num_attention_heads=2,
                            intermediate_size=16,
                            conv_dim=(D,), conv_stride=(2,), conv_kernel=(3,),
                            num_feat_extract_layers=1,
                            num_codevectors_per_group=12, num_codevector_groups=2, codevector_dim=D,
                            proj_codevector_dim=D, num_conv_pos_embeddings=4,
                            num_conv_pos_embedding_groups=2,
                            feat_quantizer_dropout=0.)
    torch.manual_seed(0)
    model = Wav2Vec2ForPreTraining(config).eval()
    model.quantizer.weight_proj.weight.data.normal_()
    hidden, frames = torch.randn(B, T, D), torch.randn(B, T, D)
    mask = torch.rand(B, T) < .6
    given_out = ModelOutput(last_hidden_state=hidden, extract_features=frames, hidden_states=None,
                            attentions=None)
    monkeypatch.setattr(model.wav2vec2, 'forward', lambda *args, **kwargs: given_out)
    numbers = drawn(mask, K, 3) + torch.arange(B).view(B, 1, 1) * T
    theirs = model(torch.zeros(B, 99), mask_time_indices=mask, sampled_negative_indices=numbers)
    codes = model.quantizer.weight_proj(frames).view(B, T, 2, 12).argmax(-1)
    # in evaluation their perplexity is that of the hard choice
    hard = 1e4 * F.one_hot(codes, 12).float()
    ours = our_loss(theirs.projected_states, theirs.projected_quantized_states, mask, codes, hard,
                            n_negatives=K, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(ours.contrastive, theirs.contrastive_loss / mask.sum(), rtol=1e-5,
                               atol=1e-5)
    torch.testing.assert_close(ours.diversity, theirs.diversity_loss / mask.sum(), rtol=1e-5,
                               atol=1e-5)
    torch.testing.assert_close(ours.loss, theirs.loss / mask.sum(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.perplexity, theirs.codevector_perplexity, rtol=1e-5, atol=1e-5)


def loop(predictions, targets, picks, collided, valid, tau=.1):
    "InfoNCE in float64, one frame after the other"
    losses, hits = [], []
    for b, i in valid.nonzero().tolist():
        cos = lambda j: F.cosine_similarity(predictions[b, i].double(), targets[b, j].double(),
                                            dim=0).item() / tau
        wrong = [cos(j) for j, gone in zip(picks[b, i].tolist(), collided[b, i].tolist())
                 if not gone]
        if not wrong: continue
        losses.append(math.log(sum(math.exp(w) for w in [cos(i), *wrong])) - cos(i))
        hits.append(cos(i) > max(wrong))
    return (sum(losses)/len(losses), sum(hits)/len(hits)) if losses else (0., 0.)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(2, 8), st.integers(1, 4), st.integers(1, 2),
       st.integers(0, 10_000))
def test_agrees_with_a_loop(B, T, K, V, seed):
    "Small codebooks, so that some frames lose all of their negatives"
    predictions, targets, mask, codes, _ = example(B, T, 4, 2, V, .5, seed)
    indices, valid = masked_frames(mask)
    c, q, z = (gather_frames(t, indices) for t in (predictions, targets, codes))
    picks = negatives(valid, K, torch.Generator().manual_seed(seed))
    gone = duplicate_negatives(z, picks)
    loss, accuracy = info_nce(c, q, picks, gone, valid)
    expected = loop(c, q, picks, gone, valid)
    assert loss.item() == pytest.approx(expected[0], rel=1e-5, abs=1e-5)
    assert accuracy.item() == pytest.approx(expected[1], abs=1e-6)


masks = st.integers(1, 4).flatmap(lambda B: st.integers(2, 12).flatmap(
    lambda T: st.lists(st.lists(st.booleans(), min_size=T, max_size=T), min_size=B, max_size=B)))


@quick
@given(masks, st.integers(0, 10_000))
def test_negatives_are_other_masked_frames_of_the_row(rows, seed):
    mask = torch.tensor(rows)
    indices, valid = masked_frames(mask)
    assert torch.equal(valid.sum(1), mask.sum(1))
    assert ([p[v].tolist() for p, v in zip(indices, valid)]
            == [row.nonzero().flatten().tolist() for row in mask])
    picks = negatives(valid, 9, torch.Generator().manual_seed(seed))
    assert picks.min() >= 0 and picks.max() < mask.shape[1]
    enough = valid & (valid.sum(1, keepdim=True) > 1)
    frames = indices.gather(1, picks.flatten(1)).view_as(picks)
    hidden = mask.gather(1, frames.flatten(1)).view_as(frames)
    assert hidden[enough].all()
    assert (frames != indices.unsqueeze(-1))[enough].all()


@quick
@given(masks, st.integers(1, 3), st.integers(0, 10_000))
def test_any_mask_gives_finite_loss_and_gradient(rows, V, seed):
    "Empty, lone and colliding rows included; visible frames get no gradient"
    mask = torch.tensor(rows)
    B, T = mask.shape
    predictions, targets, _, codes, logits = example(B, T, 4, 2, V, seed=seed)
    inputs = [t.requires_grad_() for t in (predictions, targets, logits)]
    out = our_loss(inputs[0], inputs[1], mask, codes, inputs[2], n_negatives=5)
    out.loss.backward()
    for t in inputs:
        assert t.grad.isfinite().all() and not t.grad[~mask].any()
        assert not t.grad[mask.sum(1) < 2].any()
    assert (0 <= out.accuracy <= 1 and 0 <= out.collided <= 1 and out.contrastive >= 0
            and out.loss.isfinite())
    if (mask.sum(1) < 2).all(): assert out.loss == 0


def test_uniform_draw():
    """Each other masked frame is as likely as the next, in rows of 12 and of 5: chi square, limit
    at one in ten thousand"""
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[1, 5:] = False
    picks = negatives(valid, 30_000, torch.Generator().manual_seed(0))
    for row, m, limit in ((0, 12, 35.6), (1, 5, 21.2)):     # 10 and 3 degrees of freedom
        for i in (0, m//2, m - 1):
            counts = torch.bincount(picks[row, i], minlength=m).double()
            assert len(counts) == m and counts[i] == 0
            seen = torch.cat([counts[:i], counts[i+1:]])
            assert ((seen - 30_000/(m - 1))**2 / (30_000/(m - 1))).sum() < limit


def test_windows_of_one_frame():
    "A single frame, or a bound of one, leaves no negative: loss 0, nothing out of range"
    predictions, targets, mask, codes, logits = example()
    one = our_loss(predictions[:, :1], targets[:, :1], mask[:, :1], codes[:, :1], logits[:, :1])
    assert one.loss == 0 and one.accuracy == 0
    assert negatives(masked_frames(mask, 1)[1], 4).max() == 0


def test_static_bound_changes_nothing():
    "`most` as tight as it can be, and looser"
    predictions, targets, mask, codes, logits = example()
    M = int(mask.sum(1).max())
    indices, valid = masked_frames(mask, M)
    assert indices.shape == (3, M) and valid.sum() == mask.sum()
    picks = negatives(valid, 7, torch.Generator().manual_seed(1))
    wide, wide_valid = masked_frames(mask)
    wide_picks = torch.zeros(3, 26, 7, dtype=torch.long)
    wide_picks[:, :M] = picks
    results = []
    for at, ok, p in ((indices, valid, picks), (wide, wide_valid, wide_picks)):
        c, q, z = (gather_frames(t, at) for t in (predictions, targets, codes))
        results.append(info_nce(c, q, p, duplicate_negatives(z, p), ok))
    torch.testing.assert_close(results[0], results[1])


def test_rule_is_by_codes_not_by_vectors():
    """Different codes with the same vector stay negatives; the same codes with different vectors do
    not"""
    codes = torch.tensor([[[0, 0], [0, 1], [0, 0]]])
    picks = torch.tensor([[[1, 2], [0, 2], [0, 1]]])
    assert (duplicate_negatives(codes, picks).tolist()
            == [[[False, True], [False, False], [True, False]]])


def test_a_tie_is_no_hit():
    "A target that is no better than its negative is not recognised"
    q = torch.ones(1, 2, 3)
    valid = torch.ones(1, 2, dtype=torch.bool)
    picks = torch.tensor([[[1], [0]]])
    loss, accuracy = info_nce(torch.randn(1, 2, 3), q, picks,
                              torch.zeros_like(picks, dtype=torch.bool), valid)
    assert accuracy == 0 and loss.item() == pytest.approx(math.log(2))


def test_chance_is_ln_101():
    valid = torch.ones(2, 150, dtype=torch.bool)
    picks = negatives(valid)
    none = torch.zeros_like(picks, dtype=torch.bool)
    loss, _ = info_nce(torch.zeros(2, 150, 8), torch.randn(2, 150, 8), picks, none, valid)
    assert loss.item() == pytest.approx(math.log(101), rel=1e-6)


def test_collapse_is_not_reported_as_success():
    predictions, targets, mask, codes, logits = example(V=1)
    out = our_loss(predictions.requires_grad_(), targets, mask, codes, logits)
    out.loss.backward()
    assert (out.contrastive, out.accuracy, out.collided, out.perplexity) == (0, 0, 1, 2)
    assert not predictions.grad.any()


def test_gradients_in_float64():
    predictions, targets, mask, codes, logits = example(2, 7, 3, V=2, dtype=torch.float64, seed=4)
    mask[1] = False
    inputs = [t.requires_grad_() for t in (predictions, targets, logits)]

    def loss(c, q, l):
        return our_loss(c, q, mask, codes, l, n_negatives=4,
                        generator=torch.Generator().manual_seed(0)).loss
    assert loss(*inputs).dtype == torch.float64
    assert torch.autograd.gradcheck(loss, inputs)


def test_autocast_changes_nothing():
    args = example()
    runs = []
    for enabled in (False, True):
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            runs.append(our_loss(*args, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(tuple(runs[1]), tuple(runs[0]), rtol=0, atol=0)


def test_bfloat16_inputs_give_a_float32_loss():
    predictions, targets, mask, codes, logits = example()
    out = our_loss(predictions.bfloat16(), targets.bfloat16(), mask, codes, logits.bfloat16())
    assert out.loss.dtype == torch.float32 and out.loss.isfinite()


def test_negatives_are_never_gathered():
    "No floating tensor of the loss is as large as the negatives, M × K × D"
    predictions, targets, mask, codes, logits = example(1, 80, 64)
    predictions.requires_grad_()
    with Largest() as seen:
        our_loss(predictions, targets, mask, codes, logits, n_negatives=50, most=60).loss.backward()
    assert seen.numbers <= 80*64 < 60*50*64


def test_nothing_is_read_back_from_the_device():
    """Forward and backward run on shapes alone: fake tensors raise where a value would have to be
    read"""
    B, T, D = 2, 30, 8
    with FakeTensorMode():
        predictions, targets = torch.zeros(B, T, D, requires_grad=True), torch.zeros(B, T, D)
        mask, codes = torch.zeros(B, T, dtype=torch.bool), torch.zeros(B, T, 2, dtype=torch.long)
        out = our_loss(predictions, targets, mask, codes, torch.zeros(B, T, 2, 4), most=20)
        out.loss.backward()
        assert out.loss.shape == () and predictions.grad.shape == (B, T, D)
        with pytest.raises(RuntimeError, match='local_scalar'): out.loss.item()


def test_diversity_agrees_with_its_formula():
    logits = torch.randn(2, 30, 2, 5)
    mask = torch.rand(2, 30) < .5
    loss, perplexity = diversity(logits, mask)
    p = logits[mask].softmax(-1).mean(0)
    expected = torch.distributions.Categorical(p).entropy().exp().sum()
    torch.testing.assert_close(perplexity, expected)
    torch.testing.assert_close(loss, (10 - expected) / 10)


def test_bad_input_is_refused():
    predictions, targets, mask, codes, logits = example()
    rest = mask, codes, logits
    with pytest.raises(ValueError, match='shapes differ'):
        our_loss(predictions[:, 1:], targets, *rest)
    with pytest.raises(ValueError, match='shapes differ'):
        our_loss(predictions, targets, mask[:1], *rest[1:])
    with pytest.raises(ValueError, match='at least 1'):
        our_loss(predictions, targets, *rest, n_negatives=0)
    with pytest.raises(ValueError, match='above 0'):
        our_loss(predictions, targets, *rest, temperature=0.)


def test_the_generator_decides():
    "Same seed, same loss; another seed, another loss; the global state is untouched"
    args = example()
    before = torch.get_rng_state()
    a, b, c = (our_loss(*args, generator=torch.Generator().manual_seed(s)).loss for s in (1, 1, 2))
    assert a == b != c
    assert torch.equal(before, torch.get_rng_state())
    # without a generator: the global one
    assert module.negatives(masked_frames(args[2])[1], 3).shape == (3, 26, 3)
