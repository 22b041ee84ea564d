"""mutual_kd: gradients of every kind, compile, export, opcheck, inference mode."""

import inspect
import math

import pytest
import torch
from compile_helpers import recording
from conftest import PLACES
from rows_helpers import beside
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import fastkd
from fastkd import _backend
from fastkd.ops import _peer_kernels as kernels
from fastkd.ops import mutual as op
from fastkd.ops._inputs import REDUCTIONS

F = fastkd.functional
OPTIONS = [
    dict(),
    dict(ce_weight=0.7, label_smoothing=0.1, reduction="none"),
    dict(ce_weight=0.3, temperature=2.5, reduction="sum"),
    dict(weights=[[math.nan, 0.3, -0.2], [0.5, math.nan, 0.0], [1.0, 2.0, math.nan]], temperature=4.0),
    dict(weights=torch.rand(3, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))),
    dict(teachers=2, ce_weight=0.3, teacher_weights=[[0.5, 1.0], [0.0, 2.0], [-0.5, 0.1]]),
]
IDS = dict(ids=lambda o: " ".join(o) or "plain")


def make(rows=4, classes=6, m=3, n=2, dtype=torch.float64, device="cpu", requires_grad=True):
    g = torch.Generator().manual_seed(0)
    logits = [torch.randn(rows, classes, generator=g, dtype=torch.float64) * 2 for _ in range(m + n)]
    target = torch.randint(0, classes, (rows,), generator=g)
    target[1] = -100
    learners = [z.to(device, dtype).requires_grad_(requires_grad) for z in logits[:m]]
    return learners, [t.to(device, dtype) for t in logits[m:]], target.to(device)


def resolve(options, teachers):
    return dict(options, teachers=teachers[: options["teachers"]]) if "teachers" in options else options


def checked(*arguments, **options):
    """Tensors, options and leading shape of a call."""
    bound = inspect.signature(F.mutual_kd).bind(*arguments, **options)
    bound.apply_defaults()
    return op._check(**bound.arguments)


def own_loss(logits, m, target, **options):
    """Loss m as a function of network m alone."""
    others = [z.detach() for z in logits]
    return lambda z: F.mutual_kd([*others[:m], z, *others[m + 1 :]], target, **options)[m]


# --- first and second derivatives -------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("options", OPTIONS, **IDS)
def test_gradcheck(options, place, at):
    logits, teachers, target = make(device=at(place))
    options = beside(logits[0], resolve(options, teachers))
    assert fastkd.explain(F.mutual_kd, logits, target, **options).backend == "native"
    for m in range(3):
        assert gradcheck(own_loss(logits, m, target, **options), logits[m])


@pytest.mark.parametrize("place", ["cpu", "simt_stream"])
@pytest.mark.parametrize("options", OPTIONS, **IDS)
def test_double_backward(options, place, at):
    logits, teachers, target = make(device=at(place))
    options = beside(logits[0], resolve(options, teachers))
    assert gradgradcheck(own_loss(logits, 1, target, **options), logits[1])


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_the_gradient_flows_to_the_learner_of_each_loss_alone(place, stacked, at):
    logits, _, target = make(device=at(place))
    given = torch.stack([z.detach() for z in logits]).requires_grad_() if stacked else logits
    for create_graph in (False, True):
        loss = F.mutual_kd(given, target, ce_weight=0.5)
        for m in range(3):
            grads = torch.autograd.grad(
                loss[m], given, retain_graph=True, create_graph=create_graph, allow_unused=not stacked
            )
            grads = grads[0] if stacked else grads
            for n in range(3):
                nothing = torch.zeros_like(grads[n]) if stacked else None
                alone = torch.autograd.grad(own_loss(logits, m, target, ce_weight=0.5)(logits[m]), logits[m])[0]
                if n == m or stacked:
                    torch.testing.assert_close(grads[n], alone if n == m else nothing)
                else:
                    assert grads[n] is None


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("place", PLACES)
def test_the_backward_scales_each_network_by_its_own_grad_output(place, reduction, at):
    logits, _, target = make(device=at(place))
    loss = F.mutual_kd(logits, target, ce_weight=0.5, reduction=reduction)
    upstream = torch.randn(loss.shape, dtype=loss.dtype, device=loss.device)
    grads = torch.autograd.grad(loss, logits, upstream, retain_graph=True)
    with fastkd.use_backend("reference"):
        expected = F.mutual_kd(logits, target, ce_weight=0.5, reduction=reduction)
    for a, b in zip(grads, torch.autograd.grad(expected, logits, upstream), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("place", PLACES)
def test_networks_that_do_not_require_grad(place, at):
    logits, _, target = make(device=at(place))
    expected = torch.autograd.grad(F.mutual_kd(logits, target, ce_weight=0.5).sum(), logits)
    some = [logits[0].detach(), logits[1], logits[2].detach()]
    loss = F.mutual_kd(some, target, ce_weight=0.5)
    torch.testing.assert_close(loss, F.mutual_kd(logits, target, ce_weight=0.5), rtol=0, atol=0)
    (grad,) = torch.autograd.grad(loss.sum(), some[1], retain_graph=True)
    torch.testing.assert_close(grad, expected[1], rtol=0, atol=0)
    (again,) = torch.autograd.grad(loss.sum(), some[1], create_graph=True)
    torch.testing.assert_close(again, expected[1])
    assert F.mutual_kd([z.detach() for z in logits], target).grad_fn is None
    tensors, options, _ = checked(some, target, ce_weight=0.5)
    with torch.no_grad():
        rows = kernels.forward(op.OP, tensors, options, [1])[2]
    assert rows.shape == (1, 4, 6)  # no gradient is computed or stored for the others


def test_a_network_that_is_given_twice():
    (z, other, _), _, target = make()
    for create_graph in (False, True):
        (grad,) = torch.autograd.grad(F.mutual_kd([z, other, z], target).sum(), z, create_graph=create_graph)
        clone = z.detach().clone().requires_grad_()
        expected = torch.autograd.grad(F.mutual_kd([z, other, clone], target).sum(), (z, clone))
        torch.testing.assert_close(grad, expected[0] + expected[1])


def test_double_backward_reaches_what_is_before_the_networks():
    weight = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    inputs, (logits, _, target) = torch.randn(4, 5, dtype=torch.float64), make(requires_grad=False)

    def penalty(weight):
        loss = F.mutual_kd([inputs @ weight, *logits[1:]], target, ce_weight=0.5)
        (grad,) = torch.autograd.grad(loss[0], weight, create_graph=True)
        return grad.square().sum()

    assert gradcheck(penalty, weight)


# --- what goes to the reference ---------------------------------------------------------------------------------------


def test_gradients_of_teachers_weights_and_temperature():
    logits, teachers, target = make()
    weights = torch.tensor([[9.0, 0.2, 0.5], [0.3, 9.0, 0.0], [1.0, -0.4, 9.0]], dtype=torch.float64)
    inputs = (torch.stack(teachers), torch.rand(3, 2, dtype=torch.float64), weights, torch.tensor(2.5).double())
    inputs = tuple(x.detach().requires_grad_() for x in inputs)

    def loss(teachers, teacher_weights, weights, temperature):
        return F.mutual_kd(
            [z.detach() for z in logits], target, teachers=teachers, teacher_weights=teacher_weights, weights=weights,
            temperature=temperature, ce_weight=0.5,
        )  # fmt: skip

    assert gradcheck(loss, inputs) and gradgradcheck(loss, inputs)
    grad = torch.autograd.grad(loss(*inputs).sum(), inputs[2])[0]
    assert grad.diagonal().tolist() == [0.0] * 3


@pytest.mark.parametrize("shape", [(3, 3), (3, 3, 4)])
def test_a_diagonal_of_nan_in_weights_that_learn(shape):
    logits, _, target = make()
    weights = torch.rand(shape, dtype=torch.float64)
    weights[range(3), range(3)] = math.nan
    weights.requires_grad_()
    loss = F.mutual_kd(logits, target, weights=weights)
    grad, *others = torch.autograd.grad(loss.sum(), (weights, *logits))
    assert bool(loss.isfinite().all()) and bool(grad.isfinite().all()) and all(g.isfinite().all() for g in others)


def test_explain_names_the_reason():
    logits, teachers, target = make(dtype=torch.float32)
    explain = lambda *a, **k: fastkd.explain(F.mutual_kd, *a, **k)  # noqa: E731
    assert explain(logits, target, teachers=teachers).backend == "native"
    assert explain(torch.stack(logits)).backend == "native"
    assert explain([logits[0].double(), *logits[1:]], teachers=[teachers[0].half()]).backend == "native"
    reasons = {
        "teachers[0] requires grad": explain(logits, teachers=[teachers[0].clone().requires_grad_()]),
        "the weights require grad": explain(logits, weights=torch.ones(3, 3, requires_grad=True)),
        "weights require grad": explain(
            logits, teachers=teachers, teacher_weights=torch.ones(3, 2, requires_grad=True)
        ),
        "temperature": explain(logits, temperature=torch.tensor(2.0, requires_grad=True)),
        "the target's probabilities require grad": explain(logits, torch.rand(4, 6, requires_grad=True)),
    }
    for reason, explanation in reasons.items():
        assert explanation.backend == "reference" and reason in explanation.reason
    with fastkd.use_backend("reference"):
        assert "chosen" in explain(logits).reason
    with torch.no_grad():
        assert explain(logits, teachers=[t.clone().requires_grad_() for t in teachers]).backend == "native"


def test_networks_of_several_dtypes_are_promoted():
    logits, _, target = make(dtype=torch.float32)
    mixed = [logits[0].detach().half().requires_grad_(), *logits[1:]]
    loss = F.mutual_kd(mixed, target, ce_weight=0.5)
    grads = torch.autograd.grad(loss.sum(), mixed)
    expected = F.mutual_kd([mixed[0].float(), *logits[1:]], target, ce_weight=0.5)
    torch.testing.assert_close(loss, expected)
    assert [g.dtype for g in grads] == [z.dtype for z in mixed]


# --- transforms -------------------------------------------------------------------------------------------------------


def test_forward_mode_is_not_a_silent_zero():
    logits, _, target = make()
    tangent, loss = torch.randn_like(logits[0]), own_loss(logits, 0, target, ce_weight=0.5)
    z = logits[0].detach()
    expected = (torch.autograd.grad(loss(logits[0]), logits[0])[0] * tangent).sum()
    torch.testing.assert_close(torch.func.jvp(loss, (z,), (tangent,))[1], expected)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(z, tangent)
        torch.testing.assert_close(forward_ad.unpack_dual(loss(dual)).tangent, expected)


def test_func_grad_hessian_and_vmap():
    logits, _, target = make()
    loss, z = own_loss(logits, 0, target, ce_weight=0.5), logits[0].detach()
    torch.testing.assert_close(torch.func.grad(loss)(z), torch.autograd.grad(loss(logits[0]), logits[0])[0])
    flat = lambda x: loss(x.reshape(4, 6))  # noqa: E731
    torch.testing.assert_close(
        torch.func.hessian(flat)(z.flatten()), torch.autograd.functional.hessian(flat, z.flatten())
    )
    detached = [z.detach() for z in logits]
    per_row = torch.func.vmap(lambda *zs: F.mutual_kd(zs))(*detached)
    torch.testing.assert_close(per_row, F.mutual_kd(detached, reduction="none").T)


# --- compile, export, opcheck -----------------------------------------------------------------------------------------


COMPILED = [o for o in OPTIONS if not isinstance(o.get("weights"), torch.Tensor)] + [dict(weights="tensor")]


@pytest.mark.parametrize("options", COMPILED, **IDS)
def test_fullgraph_compile(options):
    logits, teachers, target = make(dtype=torch.float32)
    options = resolve(options, teachers)
    if options.get("weights") == "tensor":
        options = dict(weights=torch.rand(3, 3))
    graphs = []

    def function(zs, y):
        return F.mutual_kd([z * 1.5 for z in zs], y, **options)

    torch._dynamo.reset()
    actual = torch.compile(function, fullgraph=True, backend=recording(graphs))(logits, target)
    expected = function(logits, target)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    grads = [torch.autograd.grad(x.sum(), logits) for x in (actual, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert any("fastkd.mutual_forward" in text for text in graphs)


def test_compile_of_a_stack_with_dynamic_batch():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda z, y: F.mutual_kd(z, y, ce_weight=0.5), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for rows in (4, 5, 9):
        logits, _, target = make(rows=rows, dtype=torch.float32, requires_grad=False)
        stacked = torch.stack(logits).requires_grad_()
        actual, expected = compiled(stacked, target), F.mutual_kd(stacked, target, ce_weight=0.5)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        grads = [torch.autograd.grad(x.sum(), stacked)[0] for x in (actual, expected)]
        torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_export():
    class Loss(torch.nn.Module):
        def forward(self, a, b, y):
            return F.mutual_kd([a, b], y, ce_weight=0.5)

    logits, _, target = make(dtype=torch.float32, requires_grad=False)
    program = torch.export.export(Loss(), (*logits[:2], target))
    torch.testing.assert_close(program.module()(*logits[:2], target), F.mutual_kd(logits[:2], target, ce_weight=0.5))


@pytest.mark.parametrize("place", ["cpu", "simt", "simt_stream"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck(dtype, place, at):
    logits, teachers, target = make(dtype=dtype, requires_grad=False, device=at(place))
    for reduction in ("mean", "none"):
        options = dict(teachers=teachers, temperature=2.0, ce_weight=0.5, label_smoothing=0.1, reduction=reduction)
        tensors, options, _ = checked(logits, target, **options)
        ops = _backend.native_ops(logits[0])
        for learners in ([0, 1, 2], [1], []):
            given = options._replace(return_terms=len(learners) == 1)
            torch.library.opcheck(ops.mutual_forward.default, kernels.arguments(tensors, given, learners))
        loss, _, rows, saved, aux = ops.mutual_forward(*kernels.arguments(tensors, options, [0, 2]))
        arguments = (torch.ones_like(loss), rows, saved, aux, [0, 2], REDUCTIONS.index(reduction))
        torch.library.opcheck(ops.mutual_backward.default, arguments)


# --- modes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["cpu", "simt"])
def test_tensors_from_inference_mode(place, at):
    logits, teachers, target = make(device=at(place))
    given = [logits[0], logits[1], logits[2].detach()]
    options = dict(weights=torch.rand(3, 3, 4, dtype=torch.float64), ce_weight=0.5)
    expected = F.mutual_kd(given, target, teachers=teachers, **options)
    grads = torch.autograd.grad(expected.sum(), logits[:2])
    with torch.inference_mode():
        inside = [t * 1 for t in teachers]
        given[2], options["weights"] = given[2] * 1, options["weights"] * 1
    loss = F.mutual_kd(given, target, teachers=inside, **options)
    torch.testing.assert_close(loss, expected)
    for create_graph in (False, True):
        actual = torch.autograd.grad(loss.sum(), logits[:2], retain_graph=True, create_graph=create_graph)
        for a, b in zip(actual, grads, strict=True):
            torch.testing.assert_close(a, b)
    with torch.inference_mode():
        assert F.mutual_kd(logits, target).is_inference()


@pytest.mark.parametrize("stacked", [False, True])
def test_backward_twice_and_accumulation(stacked):
    logits, _, target = make()
    given = [torch.stack([z.detach() for z in logits]).requires_grad_()] if stacked else logits
    loss = F.mutual_kd(given[0] if stacked else given, target)
    once = torch.autograd.grad(loss.sum(), given, retain_graph=True)
    for _ in range(3):
        loss.sum().backward(retain_graph=True)
    loss.sum().backward()
    for z, g in zip(given, once, strict=True):
        torch.testing.assert_close(z.grad, 4 * g)
        z.grad.zero_()
    with pytest.raises(RuntimeError, match="second time"):
        loss.sum().backward()


def test_inputs_may_change_between_loss_and_backward_but_not_before_a_second_derivative():
    """Static buffers of teachers, CUDA graphs, in-place optimizers: the first derivative reads no input."""
    logits, teachers, target = make()
    weights = torch.rand(3, 3, 4, dtype=torch.float64)
    losses = [F.mutual_kd(logits, target, teachers=teachers, weights=weights, ce_weight=0.5) for _ in range(3)]
    expected = torch.autograd.grad(losses[0].sum(), logits)
    for tensor in (teachers[0], weights, target):
        tensor.zero_()
    for z in logits:
        z.detach().add_(1)
    for a, b in zip(torch.autograd.grad(losses[1].sum(), logits), expected, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match=r"mutual_kd: a second derivative .* needs the inputs as they were"):
        torch.autograd.grad(losses[2].sum(), logits, create_graph=True)


def test_autocast_computes_in_float32():
    logits, _, target = make(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = F.mutual_kd(logits, target, ce_weight=0.5)
        half = F.mutual_kd([z.bfloat16() for z in logits], target, ce_weight=0.5)
    assert torch.equal(inside, F.mutual_kd(logits, target, ce_weight=0.5))
    assert half.dtype == torch.float32


def test_saved_memory_is_the_gradients_and_inputs_that_exist_anyway():
    logits, teachers, target = make(rows=64, classes=100, dtype=torch.float32)
    mine = {t.data_ptr() for t in (*logits, *teachers, target)}
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({_key(t): t}) or t, lambda t: t):
        F.mutual_kd(logits, target, teachers=teachers, ce_weight=0.5)
    extra = sum(t.untyped_storage().nbytes() for t in kept.values() if t.data_ptr() not in mine)
    assert extra <= 3 * logits[0].numel() * 4 + 64


def _key(tensor):
    return tensor.untyped_storage().data_ptr()


def test_the_module_is_the_function():
    logits, teachers, target = make(dtype=torch.float32)
    weights = torch.rand(3, 3)
    module = fastkd.MutualKD(temperature=2.0, ce_weight=0.5, weights=weights)
    options = dict(temperature=2.0, ce_weight=0.5)
    torch.testing.assert_close(module(logits, target), F.mutual_kd(logits, target, weights=weights, **options))
    assert "weights" in module.state_dict() and "temperature=2.0" in repr(module)
    per_call = module(logits, target, weights=2 * weights, teachers=teachers, teacher_weights=[[1, 2]] * 3)
    expected = F.mutual_kd(
        logits, target, weights=2 * weights, teachers=teachers, teacher_weights=[[1, 2]] * 3, **options
    )
    torch.testing.assert_close(per_call, expected)
    learned = fastkd.MutualKD(temperature=torch.nn.Parameter(torch.tensor(2.0)))
    learned(logits, target).sum().backward()
    assert learned.temperature.grad is not None
