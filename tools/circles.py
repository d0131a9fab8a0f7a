#!/usr/bin/env python3
"""Finds circles of imports between the files of src/: circles.py [DIRECTORY].

A file imports another where it names an item of it: in a `use`, or as a path that begins with `crate::`,
`self::` or `super::`. A name that a parent passes on with `pub use` counts as an import of the file that
defines it; the parent's own `mod` and `pub use` lines do not count, and neither do tests.

Prints each circle as a list of files, and exits with 1 where there is one.
"""

import re
import sys
from pathlib import Path

ROOT = Path(sys.argv[1] if len(sys.argv) > 1 else "src")


def without_comments_and_tests(text):
    text = re.sub(r"'(?:\\.|[^\\'])'", "' '", text)
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r'"(?:[^"\\]|\\.)*"', '""', text)
    # A module of tests stands at the end of its file.
    return re.split(r"#\[cfg\((?:all\()?test\b[^\]]*\)\]\s*(?:pub(?:\([^)]*\))? )?mod \w+ \{", text)[0]


def module_of(path):
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[-1] in ("mod", "lib"):
        parts.pop()
    return tuple(parts)


FILES = {}
for path in sorted(ROOT.rglob("*.rs")):
    if "tests" not in path.relative_to(ROOT).parts and path.stem != "tests":
        FILES[module_of(path)] = without_comments_and_tests(path.read_text())


def expand(tree):
    """The paths of a `use` tree, with the name that each is known by afterwards."""
    tree = tree.strip()
    match = re.match(r"(?s)^(.*?)\{(.*)\}$", tree)
    if not match:
        path, _, name = tree.partition(" as ")
        parts = [part.strip() for part in path.split("::") if part.strip()]
        return [(parts, (name or (parts[-1] if parts else "")).strip())]
    prefix = [part.strip() for part in match[1].split("::") if part.strip()]
    depth, start, pieces = 0, 0, []
    for index, char in enumerate(match[2]):
        depth += (char == "{") - (char == "}")
        if char == "," and depth == 0:
            pieces.append(match[2][start:index])
            start = index + 1
    pieces.append(match[2][start:])
    paths = []
    for piece in pieces:
        for parts, name in expand(piece) if piece.strip() else []:
            parts = prefix + [part for part in parts if part != "self"] if parts == ["self"] else prefix + parts
            paths.append((parts, parts[-1] if name == "self" else name))
    return paths


USES = re.compile(r"(?s)(pub(?:\([^)]*\))?\s+)?\buse\s+([^;]+);")
PATHS = re.compile(r"\b((?:crate|super|self)(?:::\w+)+)")


def absolute(parts, module):
    """The path from the root of the crate; None for other crates."""
    at = module
    if parts and parts[0] == "crate":
        at, parts = (), parts[1:]
    elif parts and parts[0] in ("self", "super"):
        while parts and parts[0] in ("self", "super"):
            if parts[0] == "super":
                at = at[:-1]
            parts = parts[1:]
    elif not (parts and module + (parts[0],) in FILES):
        return None
    return at + tuple(parts)


PASSED_ON = {}
for module, text in FILES.items():
    for public, tree in USES.findall(text):
        if public:
            for parts, name in expand(tree):
                PASSED_ON.setdefault(module, {})[name] = parts


def defining(path, seen=()):
    """The file that defines what a path names."""
    for length in range(len(path), -1, -1):
        module = path[:length]
        if module in FILES:
            if length == len(path):
                return module
            passed_on = PASSED_ON.get(module, {}).get(path[length])
            if passed_on and (module, path[length]) not in seen:
                target = absolute(passed_on, module)
                if target is not None:
                    return defining(target + path[length + 1 :], seen + ((module, path[length]),))
            return module
    return None


def imports(module, text):
    named = set()
    is_parent = any(other[: len(module)] == module and other != module for other in FILES)
    for public, tree in USES.findall(text):
        for parts, _ in expand(tree):
            target = absolute(parts, module)
            if target is not None and not (public and is_parent):
                named.add(defining(target))
    for path in PATHS.findall(USES.sub("", text)):
        target = absolute(path.split("::"), module)
        if target is not None:
            named.add(defining(target))
    # A module's own children belong to it, and the crate's root only lists.
    return {target for target in named if target and target != module}


GRAPH = {module: imports(module, text) for module, text in FILES.items()}


def circles():
    """The strongly connected parts with more than one file (Tarjan, 1972)."""
    index, low, stack, found = {}, {}, [], []

    def visit(module):
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in GRAPH[module]:
            if target not in index:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], index[target])
        if low[module] == index[module]:
            part = []
            while True:
                part.append(stack.pop())
                if part[-1] == module:
                    break
            if len(part) > 1:
                found.append(sorted(part))

    sys.setrecursionlimit(10_000)
    for module in GRAPH:
        if module not in index:
            visit(module)
    return found


found = circles()
for part in found:
    print("a circle of imports:", ", ".join("::".join(module) or "lib" for module in part))
    for module in part:
        inside = sorted("::".join(target) for target in GRAPH[module] if target in part)
        print(f"    {'::'.join(module) or 'lib'} imports {', '.join(inside)}")
if found:
    sys.exit(1)
print(f"no circle of imports between {len(FILES)} files")
