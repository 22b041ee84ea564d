"""The table of conventions in docs/language_models.md, row by row: their losses typed again, and what to write here."""

import pytest
import torch
import torch.nn.functional as torch_functional
from divergence_helpers import distillm, kl, trl
from linear_helpers import randn

from fastkd import TopK
from fastkd.functional import linear_multi_teacher_kd, multi_teacher_kd

BATCH, LENGTH, WIDTH, CLASSES, K, ITEMS = 2, 6, 5, 40, 7, 17
pytestmark = pytest.mark.usefixtures("one_thread")


def networks():
    """Student's hidden states [B, T, H] and head [V, H], the teacher's logits [B, T, V], labels [B, T]."""
    hidden, weight = randn(BATCH, LENGTH, WIDTH).requires_grad_(), randn(CLASSES, WIDTH, seed=1).requires_grad_()
    labels = (torch.arange(BATCH * LENGTH) * 7 % CLASSES).reshape(BATCH, LENGTH)
    return hidden, weight, 2 * randn(BATCH, LENGTH, CLASSES, seed=2), labels.masked_fill(labels % 3 == 0, -100)


def compare(theirs, form, teacher_of=lambda t: [t], constant=lambda t, keep: 0.0, **write):
    """`theirs(z [N, V], t [N, V], labels [N])` of the rows that count, against multi_teacher_kd or the linear form."""
    hidden, weight, t, labels = networks()
    keep = labels != -100
    expected = theirs((hidden @ weight.T)[keep], t[keep], labels[keep])
    slopes = torch.autograd.grad(expected, (hidden, weight))
    if form == "linear":
        loss = linear_multi_teacher_kd(hidden, weight, teacher_of(t), labels, **write)
    else:
        loss = multi_teacher_kd(hidden @ weight.T, teacher_of(t), labels, **write)
    ours = torch.autograd.grad(loss, (hidden, weight))
    torch.testing.assert_close(loss + constant(t, keep), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours, slopes, rtol=1e-12, atol=1e-12)


def tempered(z, t, temperature):
    return (t / temperature).log_softmax(-1), (z / temperature).log_softmax(-1)


def entropy(t, keep):
    """Of the teacher, a mean over rows: what a cross-entropy has over a divergence."""
    log_p = t[keep].log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


forms = pytest.mark.parametrize("form", ["whole", "linear"])


@forms
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_trl(form, beta, temperature):
    """GKD's and the distillation trainer's loss with num_items_in_batch: the temperature, not its square."""
    theirs = lambda z, t, _: trl(*tempered(z, t, temperature), beta).sum() / ITEMS  # noqa: E731
    write = dict(divergence="jsd", divergence_beta=beta, temperature=temperature, scale_by_t2=False, num_items=ITEMS)
    compare(theirs, form, **write)


@forms
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_liger(form, beta):
    """Labels at temperature 1, the divergence at T, both means over rows."""

    def theirs(z, t, labels):
        hard = torch_functional.nll_loss(z.log_softmax(-1), labels)
        return 0.4 * hard + 0.7 * trl(*tempered(z, t, 2.0), beta).mean()

    write = dict(divergence="jsd", divergence_beta=beta, scale_by_t2=False, temperature=2.0)
    compare(theirs, form, ce_weight=0.4, kd_weight=0.7, **write)


@forms
@pytest.mark.parametrize("square", [True, False])
def test_model_optimizer_and_distillkit(form, square):
    """T^2 times the mean over tokens; Model-Optimizer's trainer with Liger leaves the square out."""
    theirs = lambda z, t, _: (4.0 if square else 1.0) * kl(*tempered(z, t, 2.0)).mean()  # noqa: E731
    compare(theirs, form, temperature=2.0, scale_by_t2=square)


@forms
@pytest.mark.parametrize("loss", ["forward", "reverse", "symmetric"])
def test_torchtune(form, loss):
    """kd_ratio of the divergence and the rest of labels; its forward one is a cross-entropy with p."""
    ratio, share = 0.3, {"forward": 1.0, "reverse": 0.0, "symmetric": 0.5}[loss]

    def theirs(z, t, labels):
        log_p, log_q = tempered(z, t, 1.0)
        p, q = log_p.exp(), log_q.exp()
        forward, reverse = -(p * log_q).sum(-1).mean(), (q * log_q).sum(-1).mean() - (q * log_p).sum(-1).mean()
        kd = share * forward + (1 - share) * reverse
        return ratio * kd + (1 - ratio) * torch_functional.cross_entropy(z, labels)

    write = dict(divergence=loss) if share != 0.5 else dict(divergence={"forward": 0.5, "reverse": 0.5})
    constant = lambda t, keep: ratio * share * entropy(t, keep)  # noqa: E731
    compare(theirs, form, constant=constant, temperature=1.0, kd_weight=ratio, ce_weight=1 - ratio, **write)


DISTILLM = {
    "skew_forward": (dict(divergence="skew_forward", divergence_beta=0.1), 1.0),
    "skew_reverse": (dict(divergence="skew_reverse", divergence_beta=0.1), 0.0),
    "jsd": (dict(divergence="jsd", divergence_beta=0.9), 0.0),  # its lambda is the student's weight
    "tvd": (dict(divergence="tvd"), 0.0),
}


@forms
@pytest.mark.parametrize("name", DISTILLM)
def test_distillm(form, name):
    write, share = DISTILLM[name]
    theirs = lambda z, t, _: distillm(name, *tempered(z, t, 1.0), 0.1).mean()  # noqa: E731
    constant = lambda t, keep: share * entropy(t, keep)  # noqa: E731
    compare(theirs, form, constant=constant, temperature=1.0, **write)


def topk(mode):
    """Of the teacher's logits: log-probabilities, or logits where the mode renormalises."""

    def teacher_of(t):
        ids = t.topk(K).indices
        values = t if mode == "both" else t.log_softmax(-1)
        return TopK(ids, values.gather(-1, ids), mode=mode)

    return teacher_of


def on_topk(z, t, temperature=1.0):
    """(log p~, log q~), both renormalised on the teacher's k classes."""
    ids = t.topk(K).indices
    return tempered(z.gather(-1, ids), t.gather(-1, ids), temperature)


@forms
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_nemo_rl_and_axolotl_forward_on_topk(form, temperature):
    """Both renormalised; axolotl's gradient lacks the square that its reported value has."""
    theirs = lambda z, t, _: kl(*on_topk(z, t, temperature)).sum() / ITEMS  # noqa: E731
    compare(theirs, form, topk("both"), temperature=temperature, scale_by_t2=False, num_items=ITEMS)


@forms
def test_verl(form):
    """sum_S p (log p - log q) with q of all classes, a mean over tokens, before the clamp."""

    def theirs(z, t, _):
        ids = t.topk(K).indices
        log_p, log_q = (x.log_softmax(-1).gather(-1, ids) for x in (t, z))
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    compare(theirs, form, topk("truncate"), temperature=1.0)


@forms
def test_tail_buckets(form):
    """TRL's server teachers and Megatron-LM's ghost token: one more class, with what is missing to 1."""

    def theirs(z, t, _):
        ids, pair = t.topk(K).indices, []
        for x in (t, z):
            log_x = x.log_softmax(-1).gather(-1, ids)
            rest = torch.log(-torch.expm1(log_x.logsumexp(-1, keepdim=True)))
            pair.append(torch.cat([log_x, rest], -1))
        return kl(*pair).mean()

    compare(theirs, form, topk("tail"), temperature=1.0)


REVERSED = {
    "NeMo-RL reverse": (lambda p, q: kl(q, p), dict(divergence="reverse")),
    "NeMo-RL mixed": (
        lambda p, q: 0.3 * kl(p, q) + 0.7 * kl(q, p),
        dict(divergence={"forward": 0.3, "reverse": 0.7}),
    ),
    "axolotl and TRL without a tail, beta 0.4": (
        lambda p, q: trl(p, q, 0.4),
        dict(divergence="jsd", divergence_beta=0.4),
    ),
}


@pytest.mark.parametrize("name", REVERSED)
def test_other_divergences_on_topk_are_those_of_k_classes(name):
    """The student's logits gathered at the ids are logits of k classes, and the call is that of whole logits."""
    formula, write = REVERSED[name]
    hidden, weight, t, labels = networks()
    keep, ids = labels != -100, t.topk(K).indices
    z = hidden @ weight.T
    expected = formula(*on_topk(z[keep], t[keep])).sum() / ITEMS
    options = dict(mask=keep, temperature=1.0, num_items=ITEMS, **write)
    loss = multi_teacher_kd(z.gather(-1, ids), [t.gather(-1, ids)], **options)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    slopes = (torch.autograd.grad(x, (hidden, weight), retain_graph=True) for x in (loss, expected))
    torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-12)
