"""Properties that hold for anything: shapes, factors, dtypes, batches, budgets, recipes, architectures, text."""

from __future__ import annotations

import copy
import html
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import FAMILIES, HEADS, outputs, tiny_model
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from test_decomposers import build
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import compresskit
from compresskit.decomposers import ROLES, AnyDecomposer, Group, Spec, Target
from compresskit.decomposers.kronecker import KroneckerSpec
from compresskit.decomposers.registry import METHODS, get
from compresskit.errors import InputError, UnreachableError
from compresskit.markup import fenced, plain
from compresskit.pipeline import Request
from compresskit.planning.recipe import Recipe, parse_recipe
from compresskit.testing import Matrices
from compresskit.validation import parse_mapping

METHODS = sorted(METHODS.all())
#: Relative to the largest number of the result.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}

# Examples are the same in every run: a failure is nobody's bad luck.
repeatable = settings(deadline=None, derandomize=True, max_examples=60)
few = settings(deadline=None, derandomize=True, max_examples=12)


@st.composite
def layers(draw: st.DrawFn) -> tuple[AnyDecomposer, Group, Spec]:
    """A method, a matrix of any shape, and one of the specs that fit it, fast or slow."""
    method = get(draw(st.sampled_from(METHODS)))
    kind = draw(st.sampled_from(["linear", "embedding"]))
    shape = (draw(st.integers(2, 60)), draw(st.integers(2, 60)))
    target = Target("layer", kind, "embedding" if kind == "embedding" else "ffn", shape, bias=draw(st.booleans()))
    group = Group("layer", (target,))
    if method.name == "kronecker" and kind == "linear" and draw(st.booleans()):
        a = [draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0])) for size in shape]
        spec: Spec = KroneckerSpec(a=a, b=(shape[0] // a[0], shape[1] // a[1]), terms=draw(st.integers(1, 4)))
        try:
            method.check(group, spec)
        except InputError:
            assume(False)
        return method, group, spec
    offered = method.candidates(group, draw(st.integers(1, target.parameters)), allow_slow=True)
    assume(offered)
    return method, group, draw(st.sampled_from(offered))


batches = st.lists(st.integers(0, 5), max_size=3).map(tuple)


def inputs(target: Target, batch: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    if target.kind == "embedding":
        return torch.randint(0, target.shape[0], batch, generator=generator)
    return torch.randn(*batch, target.shape[1], generator=generator, dtype=torch.float64).to(dtype)


def near(mine: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    assert mine.shape == theirs.shape
    assert mine.dtype == theirs.dtype
    if mine.numel():
        assert float((mine - theirs).abs().max()) <= tolerance * (1 + float(theirs.abs().max()))


@repeatable
@given(layers(), batches, st.sampled_from(list(TOLERANCE)))
def test_forward_equals_the_dense_product(
    layer: tuple[AnyDecomposer, Group, Spec], batch: tuple[int, ...], dtype: torch.dtype
) -> None:
    method, group, spec = layer
    weight = torch.randn(group.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    made = build(method, group, spec, weight)
    x = inputs(group.targets[0], batch, dtype)
    near(made(x), made.to_dense()(x), TOLERANCE[dtype])


@repeatable
@given(layers(), batches)
def test_gradients_equal_those_of_the_dense_product(
    layer: tuple[AnyDecomposer, Group, Spec], batch: tuple[int, ...]
) -> None:
    method, group, spec = layer
    weight = torch.randn(group.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    made = build(method, group, spec, weight)
    x = inputs(group.targets[0], batch, torch.float64)
    factors = [parameter for name, parameter in made.named_parameters() if name != "bias"]
    if group.kind == "embedding":
        dense = F.embedding(x, made.dense_weight())
    else:
        dense = F.linear(x, made.dense_weight(), made.bias)
    got = torch.autograd.grad(made(x).sin().sum(), factors)
    for mine, theirs in zip(got, torch.autograd.grad(dense.sin().sum(), factors), strict=True):
        near(mine, theirs, 1e-9)


@repeatable
@given(layers(), st.integers(0, 40))
def test_costs_are_those_of_the_layer(layer: tuple[AnyDecomposer, Group, Spec], tokens: int) -> None:
    method, group, spec = layer
    made = build(method, group, spec, torch.randn(group.shape, dtype=torch.float64))
    cost = method.cost(group, spec, max(tokens, 1))
    assert cost.parameters == sum(p.numel() for name, p in made.named_parameters() if name != "bias")
    assert cost.parameters < group.parameters
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        made(inputs(group.targets[0], (max(tokens, 1),), torch.float64))
    assert cost.flops == counter.get_total_flops()


@repeatable
@given(layers(), st.integers(0, 2**32))
def test_errors_are_predicted(layer: tuple[AnyDecomposer, Group, Spec], seed: int) -> None:
    method, group, spec = layer
    weight = torch.randn(group.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    made = build(method, group, spec, weight).dense_weight().detach()
    measured = float((weight - made).norm() / weight.norm())
    assert method.errors(group, [spec], Matrices({group.target.name: weight})) == pytest.approx([measured], abs=1e-6)
    assert 0 <= measured <= 1 + 1e-9


@st.composite
def architectures(draw: st.DrawFn) -> Any:
    """A random small model of any family, size and head, in any dtype."""
    family, head = draw(st.sampled_from(sorted(FAMILIES))), draw(st.sampled_from(sorted(HEADS)))
    hidden = 4 * draw(st.integers(4, 14))
    inner, depth = draw(st.integers(16, 90)), draw(st.integers(1, 3))
    sizes: dict[str, Any] = {"vocab_size": draw(st.integers(60, 400))}
    if family == "distilbert":
        sizes |= {"dim": hidden, "hidden_dim": inner, "n_layers": depth}
    else:
        sizes |= {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": depth}
    model = tiny_model(family, head, seed=draw(st.integers(0, 99)), **sizes)
    return model.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))


@few
@given(architectures(), st.sampled_from(METHODS), st.floats(1.2, 4))
def test_save_and_reload_bit_for_bit(model: Any, method: str, ratio: float) -> None:
    try:
        student = compresskit.compress(model, method=method, ratio=ratio)
    except UnreachableError:
        assume(False)
    with tempfile.TemporaryDirectory() as folder:
        student.save_pretrained(folder)
        again = compresskit.load(folder)
        assert not list(Path(folder).glob("*.bin"))
    ours, theirs = student.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
    ids = torch.arange(5, 25)[None] % model.config.vocab_size
    # Tensors of a mapped file may lie at odd addresses, where a matrix product rounds otherwise; copies do not.
    one, other = (copy.deepcopy(read.float().eval()) for read in (student, again))
    assert torch.equal(outputs(one, ids), outputs(other, ids))


def reached(model: Any, asked: list[float], **options: Any) -> None:
    """Every ratio is reached, a larger one never by a larger model, and the limit that a refusal names can be had."""
    with pytest.raises(UnreachableError) as refusal:
        compresskit.plan(model, ratio=1e6, **options)
    named = re.search(r"at most ([0-9.]+)x", str(refusal.value))
    assert named is not None or "no matrix of this model has a shape" in str(refusal.value)
    if named is None:
        return
    limit, before = float(named[1]), sum(parameter.numel() for parameter in model.parameters())
    asked = [ratio for ratio in (*sorted(asked), limit) if ratio <= limit]
    plans = [compresskit.plan(model, ratio=ratio, **options) for ratio in asked if ratio > 1]
    for ratio, plan in zip(asked, plans, strict=False):
        assert plan.parameters_before == before
        assert plan.ratio >= ratio
    ratios = [plan.ratio for plan in plans]
    assert ratios == sorted(ratios)


choices = st.fixed_dictionaries(
    {"method": st.sampled_from([*METHODS, "auto"]), "objective": st.sampled_from(["size", "latency"])},
    optional={"allocation": st.just("error"), "allow_slow": st.booleans()},
)
ratios = st.lists(st.floats(1.001, 12), min_size=2, max_size=4)


@settings(few, max_examples=6)
@given(architectures(), choices, ratios)
def test_asking_more_never_gives_less_and_the_limit_can_be_had(model: Any, options: Any, asked: list[float]) -> None:
    reached(model, asked, **options)


@pytest.mark.sweep
@settings(deadline=None, max_examples=150)
@given(architectures(), choices, st.lists(st.floats(1.001, 30), min_size=6, max_size=12))
def test_asking_more_never_gives_less_at_length(model: Any, options: Any, asked: list[float]) -> None:
    reached(model, asked, **options)


def fits(model: Any, share: float, folder: Path, **options: Any) -> None:
    """The weight file of a checkpoint that may have ``share`` of its bytes has no more; what is refused says how many
    it needs, and with those it can be had.
    """
    dense, small = folder / "dense", folder / "small"
    model.save_pretrained(dense)
    size = int(share * (dense / "model.safetensors").stat().st_size)
    work = Request(model=dense, size=f"{size / 1e6}MB", **options).read()
    try:
        plan = work.plan()
    except UnreachableError as error:
        least = re.search(r"at least ([0-9.]+) MB", str(error))
        if least is None:
            assume(False)  # no matrix of this model has a shape that saves
            return
        size = round(1e6 * float(least[1]))
        work = Request(model=dense, size=f"{least[1]}MB", **options).read()
        plan = work.plan()
    small.mkdir()
    work.write(work.apply(plan), small, "compresskit compress")
    assert (small / "model.safetensors").stat().st_size <= size


@settings(few, max_examples=6)
@given(architectures(), choices, st.floats(0.1, 0.95), st.sampled_from([None, "base", "masked-lm"]))
def test_a_size_is_never_exceeded(model: Any, options: Any, share: float, as_class: str | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        fits(model, share, Path(folder), as_class=as_class, **options)


@pytest.mark.sweep
@settings(deadline=None, max_examples=150)
@given(architectures(), choices, st.floats(0.05, 0.99), st.sampled_from([None, "base", "masked-lm"]))
def test_a_size_is_never_exceeded_at_length(model: Any, options: Any, share: float, as_class: str | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        fits(model, share, Path(folder), as_class=as_class, **options)


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
selections = st.fixed_dictionaries(
    {"role": st.lists(st.sampled_from(ROLES), min_size=1, max_size=3), "method": st.sampled_from([*METHODS, "dense"])},
    optional={"optional": st.booleans(), "match": st.sampled_from(["^encoder", r"layer\.[0-9]+", "'\"#: {x}|"])},
)
by_ratio = st.fixed_dictionaries(
    {"version": st.just(1), "name": names, "rules": st.lists(selections, min_size=1, max_size=4)},
    optional={
        "ratio": st.floats(1.01, 1e6),
        "description": st.text(st.characters(exclude_categories=("Cs",)), max_size=40),
        "allow_slow": st.booleans(),
        "allocation": st.sampled_from(["uniform", "error"]),
        "distill": st.fixed_dictionaries({}, optional={"task": st.just({"losses": {"hidden": 0.5}, "epochs": 2.5})}),
    },
)


@repeatable
@given(by_ratio)
def test_recipes_are_read_as_they_were_written(data: dict[str, Any]) -> None:
    recipe = Recipe.model_validate(data)
    assert parse_recipe(recipe.to_yaml(), "x") == recipe


leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
trees = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))


@repeatable
@given(st.dictionaries(st.text(max_size=8), trees, max_size=4))
def test_yaml_of_plain_data_is_read_as_it_was_written(data: dict[str, Any]) -> None:
    text = yaml.dump(data, Dumper=_NoAliases)
    assert parse_mapping(text, "x", "y") == yaml.safe_load(text) == data


class _NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


marks = st.text(st.sampled_from("<>&|`*_[]()!#-+\\~$\"'=:/ax1 \n\t"), max_size=40)


@settings(repeatable, max_examples=300)
@given(marks)
def test_no_text_is_markup(text: str) -> None:
    page = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    shown = page.render(f"| a |\n| --- |\n| {plain(text)} |\n").partition("<td>")[2].partition("\n</tr>")[0]
    assert shown.count("<") == 1  # the end of its one cell
    assert html.unescape(shown.removesuffix("</td>")).split() == text.split()
    assert page.render(fenced(text)).count("<") == 4  # pre and code, opened and closed
