"""The conversation that a script of WISE's builds about a picture, read out of its source: the script is never run."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apexflow.errors import UserError
from apexflow.evaluation.judge import Message


class Template:
    """Evaluates the one function that builds the messages, over a handful of harmless expression kinds."""

    def __init__(self, script: Path) -> None:
        self.script = script
        try:
            module = ast.parse(script.read_text("utf-8"))
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"cannot read the WISE template in {script}: {error}") from None
        functions = [node for node in ast.walk(module) if isinstance(node, ast.FunctionDef) and "messages" in node.name]
        # The documented name first; a checkout that renamed it still has only one message builder.
        functions.sort(key=lambda node: node.name != "build_evaluation_messages")
        if not functions:
            raise UserError(f"{script} has no build_evaluation_messages: point at a checkout of PKU-YuanGroup/WISE")
        self.function = functions[0]
        assignments = [node for node in module.body if isinstance(node, ast.Assign)]
        self.globals = {
            name.id: node.value for node in assignments for name in node.targets if isinstance(name, ast.Name)
        }

    def messages(self, record: Mapping[str, Any], image: str) -> list[Message]:
        try:
            names = self._bind(dict(record), image)
            for statement in self.function.body:
                if isinstance(statement, ast.Return) and statement.value is not None:
                    return self._value(statement.value, names)
                if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                    names[statement.targets[0].id] = self._value(statement.value, names)
                elif not isinstance(statement, ast.Expr | ast.Assert | ast.Pass):  # docstrings and checks do no work
                    raise self._beyond(statement)
        except KeyError as error:
            raise UserError(f"the WISE record {record.get('prompt_id')} has no {error}") from None
        except (AttributeError, IndexError, TypeError, ValueError):
            raise self._beyond(self.function) from None
        raise UserError(f"{self.function.name} in {self.script} returns no messages")

    def _bind(self, record: dict[str, Any], image: str) -> dict[str, Any]:
        """The parameters by their names: the image, the prompt's two texts if passed singly, else the record."""
        parameters = [argument.arg for argument in self.function.args.args]
        texts = {name: name.capitalize() for name in ("prompt", "explanation") if "explanation" in parameters}
        names: dict[str, Any] = {}
        for name in parameters:
            if re.search("image|img|base64|b64|url", name):
                names[name] = f"data:image/png;base64,{image}" if "url" in name else image
            else:
                names[name] = record[texts[name]] if name in texts else record
        return names

    def _value(self, node: ast.expr | None, names: Mapping[str, Any]) -> Any:
        match node:
            case ast.Constant():
                return node.value
            case ast.Name() if node.id in names:
                return names[node.id]
            case ast.Name() if node.id in self.globals:
                return self._value(self.globals[node.id], {})
            case ast.Subscript():
                return self._value(node.value, names)[self._value(node.slice, names)]
            case ast.BinOp(op=ast.Add()):
                return self._value(node.left, names) + self._value(node.right, names)
            case ast.Call():
                return self._call(node, names)
        return self._compound(node, names)

    def _compound(self, node: ast.expr | None, names: Mapping[str, Any]) -> Any:
        match node:
            case ast.JoinedStr():
                return "".join(str(self._value(part, names)) for part in node.values)
            case ast.FormattedValue(conversion=-1, format_spec=None):
                return self._value(node.value, names)
            case ast.List() | ast.Tuple():
                return [self._value(item, names) for item in node.elts]
            case ast.Dict():
                pairs = zip(node.keys, node.values, strict=True)
                return {self._value(key, names): self._value(item, names) for key, item in pairs}
        raise self._beyond(node)

    def _call(self, node: ast.Call, names: Mapping[str, Any]) -> Any:
        arguments = [self._value(argument, names) for argument in node.args]
        keywords = {word.arg: self._value(word.value, names) for word in node.keywords if word.arg}
        match node.func:
            case ast.Name(id="dedent") | ast.Attribute(value=ast.Name(id="textwrap"), attr="dedent"):
                return textwrap.dedent(*arguments)
            case ast.Attribute(attr="strip" | "format" | "replace" | "join" | "get"):
                return getattr(self._value(node.func.value, names), node.func.attr)(*arguments, **keywords)
            case ast.Name() if len(node.args) == 1 and isinstance(node.args[0], ast.Name) and not keywords:
                if re.search("image|img", node.args[0].id):
                    return arguments[0]  # a helper that encodes the image file: bound to its base64 already
        raise self._beyond(node)

    def _beyond(self, node: ast.AST | None) -> UserError:
        line = getattr(node, "lineno", "?")
        return UserError(f"{self.script} line {line} is more than a template: use the WISE version of 2026-04-25")
