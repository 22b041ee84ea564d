"""fastkd.nn.FeatureTransforms: both forms against each other and against the layers typed again."""

import pytest
import torch
import torch.nn.functional as torch_functional

import fastkd
from fastkd.nn import FORMS, FeatureTransforms, chosen_form

NORMS = {"none": None, "batch": torch.nn.BatchNorm2d, "group": lambda channels: torch.nn.GroupNorm(2, channels)}


def make(form, norm="none", out_channels=(6, 6, 6), seed=0):
    torch.manual_seed(seed)
    return FeatureTransforms(5, out_channels, norm=NORMS[norm], form=form).double()


def test_three_convolutions_with_leaky_relu_typed_again():
    module, inputs = make("loop", out_channels=(6, 4)), torch.randn(2, 5, 7, 6, dtype=torch.float64)
    for k, output in enumerate(module(inputs)):
        x, state = inputs, module.state_dict()
        for layer in (0, 2, 4):
            weight, bias = state[f"transforms.{k}.{layer}.weight"], state[f"transforms.{k}.{layer}.bias"]
            x = torch_functional.conv2d(x, weight, bias, padding=1)
            x = torch.where(x > 0, x, 0.1 * x)
        torch.testing.assert_close(output, x)
    assert [tuple(o.shape) for o in module(inputs)] == [(2, 6, 7, 6), (2, 4, 7, 6)]


@pytest.mark.parametrize("form", ["loop", "grouped"])
def test_layers_and_slope_are_what_was_asked_for(form):
    torch.manual_seed(0)
    module = FeatureTransforms(5, (4, 4), layers=2, negative_slope=0.3, form=form).double()
    inputs = torch.randn(2, 5, 4, 4, dtype=torch.float64)
    assert module.state_dict().keys() == {
        f"transforms.{k}.{layer}.{name}" for k in range(2) for layer in (0, 2) for name in ("weight", "bias")
    }
    for transform, output in zip(module.transforms, module(inputs), strict=True):
        x = inputs
        for layer in (0, 2):
            x = torch_functional.conv2d(x, transform[layer].weight, transform[layer].bias, padding=1)
            x = torch.where(x > 0, x, 0.3 * x)
        torch.testing.assert_close(output, x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("norm", NORMS)
def test_both_forms_are_equal_in_outputs_gradients_and_statistics(norm, layout, training):
    loop, grouped = make("loop", norm).train(training), make("grouped", norm, seed=1).train(training)
    grouped.load_state_dict(loop.state_dict())
    maps = [torch.randn(4, 5, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) for _ in range(2)]
    maps = [each.to(memory_format=layout).requires_grad_() for each in maps]
    outputs = [module(each) for module, each in zip((loop, grouped), maps, strict=True)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-12)
    teachers = [torch.randn(4, 6, 6, 6, dtype=torch.float64) for _ in range(3)]
    for output in outputs:
        fastkd.functional.feature_ensemble(output, teachers, elements="sum").backward()
    torch.testing.assert_close(maps[0].grad, maps[1].grad, rtol=1e-10, atol=1e-12)
    for (name, a), b in zip(loop.named_parameters(), grouped.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-11, msg=name)
    torch.testing.assert_close(loop.state_dict(), grouped.state_dict(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_checkpoints_move_between_the_forms(norm):
    states = [make(form, norm, seed=seed).state_dict() for seed, form in enumerate(FORMS)]
    assert states[0].keys() == states[1].keys() == states[2].keys()
    for form in FORMS:
        module = make(form, norm, seed=9)
        for state in states:
            assert module.load_state_dict(state).missing_keys == []


def test_transforms_share_no_parameter():
    module = make("grouped")
    names = [name for name, _ in module.named_parameters()]
    assert len(names) == 3 * 3 * 2
    first = [module.transforms[k][0].weight for k in range(3)]
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])


def test_the_form_that_is_chosen():
    inputs = torch.zeros(2, 5, 4, 4)
    assert chosen_form(inputs, (8, 8, 8)) == "grouped" and chosen_form(inputs, (16, 16)) == "grouped"
    for widths in ((8, 16), (17, 17), (8,)):
        assert chosen_form(inputs, widths) == "loop"
    assert chosen_form(inputs, (8, 8), normalised=True) == "loop"
    assert chosen_form(inputs.to("meta"), (8, 8)) == "loop"
    module, calls = make("auto"), []
    module._grouped = lambda inputs: calls.append(inputs) or []
    module(inputs.double())
    assert len(calls) == 1
    make("auto", "batch")(inputs.double())


def test_compiles_without_a_break():
    module, inputs = make("auto"), torch.randn(2, 5, 4, 4, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs), module(inputs))


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ((5, []), "out_channels must be a channel count per teacher, got"),
        ((5, 6), "out_channels must be a channel count per teacher, got 6"),
        ((0, [6]), "in_channels must be whole numbers of at least 1, got 0"),
        ((5, [6, 2.5]), "out_channels must be whole numbers of at least 1, got 2.5"),
        ((5, [6], "fast"), "form must be one of 'auto', 'loop', 'grouped', got 'fast'"),
        ((5, [6, 4], "grouped"), r"one width for all teachers where form='grouped', got \[6, 4\]"),
    ],
)
def test_wrong_calls(arguments, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        FeatureTransforms(*arguments[:2], form=arguments[2] if len(arguments) > 2 else "auto")
    assert str(caught.value).startswith("FeatureTransforms: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"layers": 0}, "layers must be whole numbers of at least 1, got 0"),
        ({"negative_slope": -0.1}, r"negative_slope must be a number in \[0, 1\], got -0.1"),
        ({"negative_slope": float("nan")}, r"negative_slope must be a number in \[0, 1\], got nan"),
    ],
)
def test_wrong_options(options, sentence):
    with pytest.raises(ValueError, match=f"^FeatureTransforms: {sentence}$"):
        FeatureTransforms(5, [6], **options)


def test_exported_on_first_use():
    import subprocess
    import sys

    code = "import sys, fastkd; assert 'fastkd.nn' not in sys.modules; print(fastkd.nn.FeatureTransforms.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "FeatureTransforms"
