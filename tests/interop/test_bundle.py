"""The one file that travels: all of it is the package's own text, and it needs nothing of the package."""

from __future__ import annotations

import ast
import builtins
import dis
import importlib.util
import sys
from types import CodeType

import pytest
import torch

from hybridlm.config.load import validate_model
from hybridlm.interop import source as source_module
from hybridlm.interop.bundle import FILE, Reached, bundle

pytest.importorskip("transformers", reason="transformers is not installed")
EVERYTHING = "T M1 M2 M3 L G K T:moe"


def specs_of(pattern):
    layers = validate_model({"pattern": pattern}).layers
    return [spec for layer in layers for spec in (layer.params, layer.ffn) if spec is not None]


@pytest.fixture(scope="module")
def text():
    return bundle(specs_of(EVERYTHING))


def loaded(text, name, folder):
    path = folder / FILE
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def module(text, tmp_path_factory):
    return loaded(text, "bundle_of_everything", tmp_path_factory.mktemp("bundle"))


def test_it_imports_torch_and_transformers_only(text):
    tree = ast.parse(text)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert all(node in tree.body for node in imports)
    modules = {
        name.split(".")[0]
        for node in imports
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert modules - sys.stdlib_module_names == {"torch", "transformers"}


def test_every_name_in_it_means_something(text, module):
    """Of code by what the compiler calls global, of annotations, which nothing evaluates, by the tree."""
    known = {*vars(module), *dir(builtins)}
    wrong, todo = [], [compile(text, FILE, "exec")]
    for code in todo:
        todo += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        wrong += [
            f"{code.co_qualname}: {instruction.argval}"
            for instruction in dis.get_instructions(code)
            if instruction.opname == "LOAD_GLOBAL" and instruction.argval not in known
        ]
    for node in ast.walk(ast.parse(text)):
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            names = [one.id for one in ast.walk(annotation) if isinstance(one, ast.Name)] if annotation else []
            wrong += [f"line {node.lineno}: {name}" for name in names if name not in known]
    assert not wrong


def test_nothing_is_defined_twice(text):
    names = [node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert sorted({name for name in names if names.count(name) > 1}) == ["_"]


def test_no_method_that_was_left_out_is_called(text):
    called = {node.attr for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)}
    assert not called & source_module.LEFT_OUT


def test_a_model_gets_only_the_code_of_its_layers():
    small = bundle(specs_of("T"))
    assert "hybridlm/layers/attention.py" in small
    assert "hybridlm/ops/linear.py" in small
    assert not [name for name in ("mamba", "gdn", "mla", "moe") if f"hybridlm/layers/{name}" in small]
    assert "_ssd" not in small


def test_its_operators_are_not_the_packages(module, text):
    importlib.import_module("hybridlm.ops.rotary")
    assert torch.ops.hybridlm_bundle_of_everything.rotate is not torch.ops.hybridlm.rotate
    assert '"hybridlm::' not in text


def test_two_files_do_not_get_in_each_others_way(tmp_path):
    """Nor does loading one change the gradients of another."""
    text = bundle(specs_of("M2"))

    def gradient(module):
        torch.manual_seed(0)
        spec, layer = module.KINDS["mamba2.Mamba2"]
        mixer = layer(spec(**vars(specs_of("M2")[0])))
        mixer.reset_parameters(module.Init(None, "none", 1))
        x = torch.randn(1, 70, 256, requires_grad=True)
        mixer(x, module.SequenceInfo.contiguous(1, 70, 0, x.device)).square().sum().backward()
        return x.grad

    first = loaded(text, "first-of.two", tmp_path)
    before = gradient(first)
    second = loaded(text, "second", tmp_path)
    assert torch.equal(gradient(second), before)
    assert torch.equal(gradient(first), before)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of modules that a test writes."""
    monkeypatch.setattr(source_module, "_ROOT", tmp_path)

    def write(**modules):
        for name, text in modules.items():
            (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")

    return write


def parts(*places):
    reached = Reached()
    for place in places:
        reached.reach(source_module.Place(*place))
    return "\n".join(reached.parts(reached.names()))


def executed(text):
    space = {}
    exec(compile(text, "parts", "exec"), space)
    return space


def test_names_are_told_from_variables_of_the_same_name(package):
    """``cut`` is a function of two modules, a parameter, a variable, a method, an attribute and a keyword."""
    package(
        low="def cut(x):\n    return x + 1\n",
        high='''"""Höhe."""
from hybridlm.low import cut as low_cut


def cut(x, extra=low_cut(1)):
    é = [cut for cut in (x, extra)]; return [low_cut(one) for one in é]  # é


class Knife:
    """cut"""

    cut: int = 3

    def cut_all(self, cut=None):
        return [cut, self.cut, (lambda cut: cut)(2)]

    def other(self):
        def inner():
            cut = 5
            return cut

        return [inner(), cut(4)]


def both():
    return [cut(1), Knife().cut_all(cut=7), Knife().other()]
''',
    )
    text = parts(("hybridlm.high", "both"))
    assert executed(text)["both"]() == [[2, 3], [7, 3, 2], [5, [5, 3]]]
    assert "def cut_of_low(x)" in text
    assert "# Höhe." in text


def test_modules_stand_behind_what_they_import(package):
    """Through a module that only passes a name on, and where a name is a builtin's."""
    package(
        top="from hybridlm.middle import limit as most\n\nLIMITS = [most(2)]\n",
        middle="from hybridlm.low import limit\n",
        low="def limit(x):\n    return round(x) + max(x, 1)\n\n\ndef round(x):\n    return 10 * x\n",
    )
    assert executed(parts(("hybridlm.top", "LIMITS")))["LIMITS"] == [22]


def test_registrations_come_with_what_they_register(package):
    package(
        low="""def registry(f, other=None):
    f.register = lambda g: setattr(f, "other", g)
    f.partner = other
    return f
""",
        high='''from hybridlm.low import registry


@registry
def used():
    """Used."""


@registry
def unused():
    """Not."""


# A comment of its own.
@used.register
def _():
    return needed()


unused.register(lambda: 1)
registry(unused)
registry(used, (lambda: needed()))


def needed():
    return 7
''',
    )
    text = parts(("hybridlm.high", "used"))
    used = executed(text)["used"]
    assert used.partner() == 7
    assert "# A comment of its own." in text
    assert "unused" not in text


def test_kernels_become_an_error_and_methods_of_the_package_go(package):
    package(
        high="""class Layer:
    size = 1

    # What the planner asks.
    def flops(self):
        return unknown

    def forward(self, fast):
        if fast:
            from hybridlm.kernels import fast_form

            x = fast_form(self)
            return x
        return 2
""",
    )
    text = parts(("hybridlm.high", "Layer"))
    layer = executed(text)["Layer"]()
    assert layer.forward(False) == 2
    with pytest.raises(NotImplementedError):
        layer.forward(True)
    assert "planner" not in text
    assert "fast_form" not in text


def test_an_effect_that_belongs_to_nothing_is_refused(package):
    package(high="import torch\n\n\ndef used():\n    pass\n\n\ntorch.set_num_threads(1)\n")
    with pytest.raises(RuntimeError, match="set_num_threads"):
        parts(("hybridlm.high", "used"))


def test_what_cannot_be_moved_is_refused(package):
    package(
        one="import math as m\ndef f(): return m.pi\n",
        two="import cmath as m\nfrom hybridlm.one import f\ndef g(): return f() + m.pi\n",
    )
    reached = Reached()
    reached.reach(source_module.Place("hybridlm.two", "g"))
    with pytest.raises(RuntimeError, match="m means"):
        reached.names()
