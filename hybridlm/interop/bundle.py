"""The code of a model in one file that needs torch and transformers only, out of the package's own sources.

What is written is what the model reaches from ``remote_wrapper``, statement by statement, as it stands in the modules,
except for: imports from the package; names that two modules define, to which the module's is appended; methods that
only the package calls; compiled kernels; and the namespace of the operators, so that the file can be loaded beside the
package and beside other such files.
"""

from __future__ import annotations

import builtins
import re
import sys
from collections import Counter
from collections.abc import Iterable
from functools import cache
from graphlib import TopologicalSorter
from itertools import chain

from hybridlm.config.layers import Spec
from hybridlm.interop.source import Place, Source, Statement, edited

FILE = "modeling_hybridlm.py"
_WRAPPER = "hybridlm.interop.remote_wrapper"
_ROOMS = "config ops layers model interop"  # each imports from those before it
_NAMED = {Place("hybridlm.config.model", "ModelConfig"): "HybridLMConfig"}  # what stands for the model section
_HEADER = '''"""The code of this model, for `trust_remote_code=True`: it needs torch and transformers only.

Written by `hybridlm export` out of hybridlm's own sources; each part says from which one.

Copyright (c) The hybridlm authors, MIT License.
"""

from __future__ import annotations
'''
# A name for every file that is loaded: operators of one name would replace each other.
_SPACE = '_OPERATORS = "hybridlm_" + re.sub(r"\\W", "_", __name__)  # the namespace of the operators'


def bundle(specs: Iterable[Spec]) -> str:
    """The file for a model of these layers. RuntimeError: the sources use something that cannot be moved."""
    kinds = {
        spec.layer: (
            Place(type(spec).__module__, type(spec).__name__),
            Place(*f"hybridlm.layers.{spec.layer}".rsplit(".", 1)),
        )
        for spec in specs
    }
    files = Reached()
    for place in chain.from_iterable(kinds.values()):
        files.reach(place)
    for statement in files.source(_WRAPPER).statements:
        files.keep(_WRAPPER, statement)
    names = files.names()
    table = [f'    "{kind}": ({names[spec]}, {names[layer]}),' for kind, (spec, layer) in kinds.items()]
    text = "\n".join([_HEADER, files.imports(), "", _SPACE, *files.parts(names), "\n", "KINDS |= {", *table, "}", ""])
    compile(text, FILE, "exec")
    return text


class Reached:
    """The statements that are needed, by module."""

    def __init__(self) -> None:
        self.source = cache(Source)
        self._kept: dict[str, set[Statement]] = {}

    def reach(self, place: Place) -> None:
        """Keeps what defines ``place`` and all that it refers to."""
        if place in _NAMED:
            return
        source = self.source(place.module)
        for statement in source.statements:
            if place.name in source.home(statement):
                self.keep(place.module, statement)

    def keep(self, module: str, statement: Statement) -> None:
        kept = self._kept.setdefault(module, set())
        if statement in kept:
            return
        kept.add(statement)
        for refer in statement.refers:
            if (place := self.meant(module, refer.text)).ours:
                self.reach(place)

    def meant(self, module: str, name: str) -> Place:
        """What a global name of a module means: a definition in one of ours, or something of another package."""
        source = self.source(module)
        place = source.imports.get(name) or source.typing.get(name)
        if place is None:
            return Place(module if name in source.own else "builtins", name)
        return self.meant(*place) if place.ours and place not in _NAMED else place

    def names(self) -> dict[Place, str]:
        """The name in the file of every definition."""
        places = [
            Place(module, name)
            for module, kept in self._kept.items()
            for name in sorted(set().union(*(statement.defines for statement in kept)) - {"_"})
        ]
        taken = Counter(place.name for place in places) + Counter(
            [*self._foreign(), *dir(builtins), "re", "_OPERATORS"]
        )
        found = {
            place: place.name if taken[place.name] == 1 or place.module == _WRAPPER else _longer(place)
            for place in places
        }
        if twice := [name for name, count in Counter(found.values()).items() if count > 1]:
            raise RuntimeError(f"two definitions would be called {twice[0]}")
        return found | _NAMED

    def _foreign(self) -> dict[str, Place]:
        """The names of other packages that are referred to."""
        found: dict[str, Place] = {}
        for module, kept in self._kept.items():
            for name in sorted({refer.text for statement in kept for refer in statement.refers}):
                place = self.meant(module, name)
                if not place.ours and place.module != "builtins" and found.setdefault(name, place) != place:
                    raise RuntimeError(f"{name} means {found[name]} and {place}")
        return found

    def imports(self) -> str:
        """The import statements, the standard library's among the others."""
        lines = ["import re"]
        for name, place in self._foreign().items():
            source, alias = place.module and f"from {place.module} ", "" if name == place.name else f" as {name}"
            lines.append(f"{source}import {place.name}{alias}")
        standard = sys.stdlib_module_names
        return "\n".join(
            sorted(set(lines), key=lambda line: (re.split("[ .]", line)[1] not in standard, line[0] == "f", line))
        )

    def parts(self, names: dict[Place, str]) -> Iterable[str]:
        """The text of every module, each behind what it imports."""
        needed: dict[str, list[str]] = {}
        for module, kept in self._kept.items():
            used = {refer.text for statement in kept for refer in statement.refers}
            needed[module] = [self.meant(module, name).module for name in self.source(module).imports if name in used]
        order = [module for module in TopologicalSorter(needed).static_order() if module in self._kept]
        return [self._part(one, names) for one in sorted(order, key=lambda one: _ROOMS.find(one.split(".")[1]))]

    def _part(self, module: str, names: dict[Place, str]) -> str:
        source = self.source(module)
        title = "\n".join(f"# {line}".rstrip() for line in source.title.splitlines())
        pieces = [f"\n\n# {'-' * 20} {module.replace('.', '/')}.py\n{title}"]
        for statement in source.statements:
            if statement in self._kept[module]:
                meant = [(refer, self.meant(module, refer.text)) for refer in statement.refers]
                edits = [refer._replace(text=names[place]) for refer, place in meant if place in names]
                pieces.append(edited(statement.text, edits).decode().rstrip("\n"))
        return "\n".join(pieces)


def _longer(place: Place) -> str:
    """With its module behind, in the spelling of its kind: _scan_of_ssd, CAP_OF_SSD, ScanOfSsd."""
    name, module = place.name, place.module.rpartition(".")[2]
    if name.isupper():
        return f"{name}_OF_{module.upper()}"
    return f"{name}_of_{module}" if name.islower() else f"{name}Of{module.title().replace('_', '')}"
