"""YAML as recipes are written in it: what YAML 1.1 reads in a way that nobody means is refused, or read as people do."""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.parser import ParserError
from yaml.reader import ReaderError
from yaml.scanner import ScannerError

WHOLE, FRACTION = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"  # YAML's numbers
TRUTH, DATE = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp"
DECIMAL = re.compile(
    r"^(?:[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
MOST_DIGITS = 100  # of a whole number; any more would be no setting's
# Of text that is no YAML, unlike YAML of values that cannot be.
NO_YAML = (ReaderError, ScannerError, ParserError, ComposerError)


def read_yaml(text: str) -> Any:
    """What YAML says; YAMLError for what it cannot say in a recipe."""
    try:
        return yaml.load(text, _Plain)
    except RecursionError as error:
        raise yaml.MarkedYAMLError(problem="it is nested too deeply") from error
    except (ValueError, LookupError, AttributeError) as error:  # of values that are not what their tag says
        raise yaml.MarkedYAMLError(problem=str(error)) from error


def fault(error: yaml.YAMLError) -> str:
    """Where and what, as far as an error knows, to be put behind a name."""
    mark, what = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    return (f", line {mark.line + 1}" if mark else "") + (f": {what}" if what else "")


class _Plain(yaml.SafeLoader):
    """YAML as people read it: numbers are decimal (not 010 as 8, nor 1:30 as 90), and 3e-4 is one; true and false alone are truth
    values (on and no are text, as a date is); a key is given once, for of two nobody would see which counts; an alias stands
    for no more than is written.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in known if tag not in (WHOLE, FRACTION, TRUTH, DATE)]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.anchors_around = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        alias = isinstance(event, yaml.AliasEvent)
        if alias and self.anchors_around:  # which could grow without end
            raise ComposerError(None, None, f"alias *{event.anchor} within an anchor", event.start_mark)
        anchored = not alias and event.anchor is not None
        self.anchors_around += anchored
        node = super().compose_node(parent, index)
        self.anchors_around -= anchored
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for place, key in enumerate(keys):
            if key.value in (earlier.value for earlier in keys[:place]):
                raise ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
        return super().construct_mapping(node, deep)

    def construct_whole(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > MOST_DIGITS:
            raise ConstructorError(None, None, f"a number of more than {MOST_DIGITS} digits", node.start_mark)
        return int(node.value.replace("_", ""))


_Plain.add_implicit_resolver(WHOLE, re.compile(r"^[-+]?[0-9][0-9_]*$"), [*"-+0123456789"])
_Plain.add_implicit_resolver(FRACTION, DECIMAL, [*"-+.0123456789"])
_Plain.add_implicit_resolver(TRUTH, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), [*"tTfF"])
_Plain.add_constructor(WHOLE, _Plain.construct_whole)
