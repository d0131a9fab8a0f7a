#!/usr/bin/env python3
"""Compares docs/api.md, the table of names, with the sources of every language: api.py

A row of a table begins with its canonical name, and has one cell for each language: names in backticks, or `–`.
A heading may name what its column's names are members of: "C++ `client`". A table with the columns "name",
"language" and "why" lists names that exist in one language only.

Under a table, a line "- `row` (language): reason" is an exception. It is needed where a cell is `–`, and where a
name is not the row's, in which case the reason contains that name in backticks.

Prints what is missing, unknown or named otherwise, and what to do, and fails if anything is.
"""

import ast
import os
import re
import sys
from pathlib import Path

os.chdir(Path(__file__).resolve().parent.parent)

PAGE = "docs/api.md"
SYMBOLS = "tests/abi/symbols.txt"
C_HEADER = "include/nblock.h"
CPP_HEADER = "include/nblock.hpp"
PYTHON = Path("bindings/python/python/nblock")
PYTHON_STATES = "bindings/python/src/lock.rs"
RBS = Path("bindings/ruby/sig")
RUBY_ERRORS = "bindings/ruby/lib/nblock/error.rb"
RUBY_STATES = "bindings/ruby/lib/nblock/lock.rb"
COMMAND = Path("cli/src")

LANGUAGES = ["C", "C++", "Python", "Ruby", "shell"]
MEMBER = {"C": ".", "C++": "::", "Python": ".", "Ruby": "#", "shell": " "}

# What the canonical name does not have: C's prefixes, and how a language writes an operation, a unit or a question.
PREFIXES = ["NBL_ERR_", "NBL_IF_HELD_", "NBL_LIST_", "NBL_TEXT_", "NBL_LOG_", "NBL_STATE_", "NBL_"]
PREFIXES += ["nbl_lock_", "nbl_list_", "nbl_client_", "nbl_op_", "nbl_"]
PREFIXES += ["__", "--", "$NBLOCK_", ":", '"', '"NBL_ERR_']
SUFFIXES = ["_start", "_new", "_ms", "_us", "_t", "__", "_", "?", "!", "=", '"']

# What the languages themselves ask of every class or range.
CPP_STANDARD = {"iterator_category", "value_type", "difference_type", "pointer", "reference", "const_iterator"}
RUBY_STANDARD = {"initialize", "==", "eql?", "hash", "inspect", "to_s"}

# Each language's public names, with the file that each is in. The page has to have those of `required`; it may also
# have those of `allowed`, such as parameters of C functions.
required = {language: {} for language in LANGUAGES}
allowed = {language: set() for language in LANGUAGES}


def read(path):
    return Path(path).read_text(encoding="utf-8")


def read_c():
    for symbol in read(SYMBOLS).split():
        required["C"][symbol] = SYMBOLS
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", read(C_HEADER), flags=re.S)
    for name in re.findall(r"^#define (NBL_\w+)", text, flags=re.M):
        required["C"][name] = C_HEADER
    for name in re.findall(r"^typedef [^;{]*?\(?\*?(nbl_\w+)\)?(?:\([^;{]*\))?;", text, flags=re.M):
        required["C"][name] = C_HEADER
    for body, struct in re.findall(r"^typedef struct \w+ \{(.*?)\} (\w+);", text, flags=re.M | re.S):
        required["C"][struct] = C_HEADER
        for field in re.findall(r"(\w+)(?:\[\w+\])?;", body):
            required["C"][f"{struct}.{field}"] = C_HEADER
    for parameters in re.findall(r"^[\w *]*\bnbl_\w+\(([^;{]*)\);", text, flags=re.M):
        allowed["C"].update(re.findall(r"(\w+)\s*(?:,|$)", parameters))


def cpp_items(text):
    """The declarations of a scope: the text before its body, and the body, if there is one."""
    head, at = "", 0
    while at < len(text):
        char = text[at]
        if char == ";" and head.count("(") == head.count(")"):
            yield head.strip(), None
            head = ""
        elif char == "{" and head.count("(") == head.count(")"):
            start, depth = at, 0
            while True:
                depth += {"{": 1, "}": -1}.get(text[at], 0)
                if depth == 0:
                    break
                at += 1
            is_scope = re.search(r"\b(namespace|class|struct|enum)\b", re.sub(r"<[^<>]*>", "", head))
            if is_scope or "(" in head.split("=")[0]:
                yield head.strip(), text[start + 1 : at]
                head = ""
        elif char == ":" and re.search(r"\b(public|private|protected)\s*$", head):
            yield re.search(r"\w+\s*$", head)[0].strip() + ":", None
            head = ""
        else:
            head += char
        at += 1


def cpp_scope(text, scope, public):
    """Adds the names of a namespace or class to `required`."""
    for head, body in cpp_items(text):
        if head in ("public:", "private:", "protected:"):
            public = head == "public:"
            continue
        head = re.sub(r"\[\[.*?\]\]", "", head)
        while re.search(r"<[^<>]*>", head):
            head = re.sub(r"(\btemplate\s*)?<[^<>]*>", "", head)
        head = re.sub(r"\s+", " ", head).strip()
        kind = re.match(r"(?:inline )?(enum class|enum|class|struct|namespace|using|friend)\b ?([\w:]*)", head)
        if not public or not head or (kind and kind[1] == "friend"):
            continue
        if kind and kind[1] == "namespace":
            # What is in `detail` is public where a class derives from it.
            if kind[2] == "nblock":
                cpp_scope(body, "", True)
            elif kind[2] == "detail":
                for inner, base in cpp_items(body):
                    if inner == "class operation_base":
                        cpp_scope(base, "operation::", False)
            continue
        if kind and kind[1] == "using":
            names = [kind[2]] if "=" in head else []
        elif kind and body is not None:
            # A class of another namespace, such as std::is_error_code_enum, is not ours.
            names = [kind[2]] if "::" not in kind[2] else []
            if kind[1].startswith("enum"):
                for value in re.findall(r"(\w+)(?:\s*=[^,]*)?(?:,|\s*$)", body):
                    required["C++"][f"{scope}{kind[2]}::{value}"] = CPP_HEADER
            elif kind[2] != "iterator":
                cpp_scope(body, f"{scope}{kind[2]}::", kind[1] == "struct")
        elif "(" in head.split("=")[0] and "operator" not in head:
            names = re.findall(r"(~?\w+) ?\(", head.split("=")[0])[:1]
            parameters = re.sub(r"=[^,]*(?=,)|=.*", "", head[head.index("(") + 1 :].split(")")[0])
            allowed["C++"].update(re.findall(r"(\w+)\s*(?:,|$)", parameters))
        elif "operator" in head or "static_assert" in head:
            names = []
        else:
            names = re.findall(r"(\w+)$", re.split(r"=", head)[0].strip().split(",")[0])
            names += [name.strip() for name in re.split(r"=", head)[0].split(",")[1:]]
        for name in names:
            own_class = scope.rstrip(":").split("::")[-1]
            if name and name not in CPP_STANDARD and name.lstrip("~") != own_class:
                required["C++"][scope + name] = CPP_HEADER


def read_cpp():
    text = re.sub(r"/\*.*?\*/|//[^\n]*|^#(?:[^\n]*\\\n)*[^\n]*", "", read(CPP_HEADER), flags=re.S | re.M)
    text = re.sub(r'"(?:[^"\\\n]|\\.)*"' + r"|'(?:[^'\\\n]|\\.)'", '""', text)
    cpp_scope(text, "", True)


# A parameter is known by its name alone: one row is enough for it, whichever functions have it.
def read_python():
    def parameters(function, path):
        arguments = function.args
        for argument in arguments.posonlyargs + arguments.args + arguments.kwonlyargs:
            if argument.arg not in ("self", "cls"):
                required["Python"].setdefault(argument.arg, path)

    def members(defined, path):
        for member in defined.body:
            if isinstance(member, (ast.FunctionDef, ast.AsyncFunctionDef)):
                if not member.name.startswith("_"):
                    required["Python"][f"{defined.name}.{member.name}"] = path
                if not member.name.startswith("_") or member.name in ("__new__", "__init__"):
                    parameters(member, path)
            elif isinstance(member, ast.AnnAssign) and not member.target.id.startswith("_"):
                required["Python"][f"{defined.name}.{member.target.id}"] = path

    definitions = {}
    for path in sorted(PYTHON.glob("*.py*"), key=lambda path: path.suffix):
        if path.suffix in (".py", ".pyi"):
            for defined in ast.parse(read(path)).body:
                if isinstance(defined, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                    definitions[defined.name] = (defined, str(path))
    package = str(PYTHON / "__init__.py")
    for statement in ast.parse(read(package)).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
            public = ast.literal_eval(statement.value)
    for name in public:
        defined, path = definitions.get(name, (None, package))
        if isinstance(defined, ast.ClassDef):
            required["Python"][name] = path
            members(defined, path)
        else:
            required["Python"][f"nblock.{name}"] = path
            if defined:
                parameters(defined, path)
    for state in re.findall(r'^ +NBL_STATE_\w+ => "(\w+)",', read(PYTHON_STATES), flags=re.M):
        required["Python"][f'"{state}"'] = PYTHON_STATES
    # The values of Error.status are the constants' names.
    allowed["Python"].update(f'"{name}"' for name in required["C"] if name.startswith("NBL_"))


def read_ruby():
    for path in sorted(RBS.glob("*.rbs")):
        where, scopes = str(path), []
        for line in read(path).split("\n"):
            line = re.sub(r"#.*", "", line).strip()
            if opened := re.match(r"(module|class|interface) (\w+)", line):
                scopes.append(opened[2])
                inside = "::".join(scopes[1:])
                if inside and not opened[2].startswith("_"):
                    required["Ruby"][inside] = where
                continue
            if line == "end":
                scopes.pop()
                continue
            if not scopes or scopes[-1].startswith("_"):
                continue
            inside = "::".join(scopes[1:]) or scopes[0]
            if constant := re.match(r"([A-Z]\w*):", line):
                required["Ruby"][constant[1]] = where
            elif alias := re.match(r"type (\w+)", line):
                allowed["Ruby"].add(alias[1])
            elif attribute := re.match(r"attr_\w+ (\w+):", line):
                required["Ruby"][f"{inside}#{attribute[1]}"] = where
            elif method := re.match(r"def (self\.)?([^:\s]+): (.*)", line):
                # A writer belongs to its reader.
                if method[2] not in RUBY_STANDARD and not method[2].endswith("="):
                    required["Ruby"][f"{inside}{'.' if method[1] else '#'}{method[2]}"] = where
                for parameter in re.findall(r"[(,]\s*\??(\w+): ", method[3]):
                    required["Ruby"].setdefault(parameter, where)
    for status in re.findall(r"=> (:\w+)", read(RUBY_ERRORS)):
        required["Ruby"][status] = RUBY_ERRORS
    for state in re.findall(r"Library::STATE_\w+ => (:\w+)", read(RUBY_STATES)):
        required["Ruby"][state] = RUBY_STATES


def kebab(name):
    return re.sub(r"(?<=[a-z])(?=[A-Z])|_", "-", name).lower()


def read_shell():
    path = COMMAND / "arguments.rs"
    where = str(path)
    text = re.sub(r"^\s*//[^\n]*\n", "", read(path), flags=re.M)
    attribute = r"((?:\s*#\[(?:[^\[\]]|\[[^\]]*\])*\])*)\s*"
    structs = {}
    for name, body in re.findall(r"^(?:pub )?struct (\w+) \{\n(.*?)^\}", text, flags=re.M | re.S):
        structs[name] = re.findall(attribute + r"(?:pub )?(\w+): ([\w<>:]+),", body)
    enums = dict(re.findall(r"^(?:pub )?enum (\w+) \{\n(.*?)^\}", text, flags=re.M | re.S))

    def options(command, struct):
        for attributes, field, kind in structs[struct]:
            if "command(flatten)" in attributes:
                options(command, kind)
            elif option := re.search(r"\blong(?: = \"([\w-]+)\")?", attributes):
                required["shell"][f"{command} --{option[1] or kebab(field)}"] = where
            elif "subcommand" not in attributes:
                value = re.search(r'value_name = "(\w+)"', attributes)
                allowed["shell"].add(value[1] if value else field.upper())

    if re.search(r'name = "nblock",\s*version,', text):
        required["shell"]["nblock --version"] = where
    options("nblock", "Arguments")
    for command, fields in re.findall(r"^    (\w+)(\(\w+\)| \{|,)", enums["Command"], flags=re.M):
        required["shell"][f"nblock {kebab(command)}"] = where
        if fields.startswith("("):
            options(f"nblock {kebab(command)}", fields.strip("()"))
    for name, body in enums.items():
        if name not in ("Command", "RunCommand"):
            allowed["shell"].update(kebab(value) for value in re.findall(r"^    (\w+),", body, flags=re.M))
    # `--json` names what is in its objects; numbers are exit statuses.
    for command, path in (("--json", COMMAND / "table.rs"), ("ping --json", COMMAND / "ping.rs")):
        for key in re.findall(r'"(\w+)": ', read(path).split("#[cfg(test)]")[0]):
            required["shell"][f"{command} {key}"] = str(path)
    path = COMMAND / "failure.rs"
    for status in re.findall(r"const \w+: u8 = (\d+);", read(path)):
        required["shell"][status] = str(path)
    for path in COMMAND.rglob("*.rs"):
        allowed["shell"].update("$" + name for name in re.findall(r"NBLOCK_[A-Z]+", read(path)))


def resolved(language, name, scopes):
    """The names of the source that a name of the page stands for; None where there is none."""
    known = required[language]
    inside = {scope + MEMBER[language] + name for scope in scopes} & set(known)
    if inside:
        return inside
    if language == "shell" and name.startswith("--"):
        # An option without its command is that of every command.
        inside = {option for option in known if option.startswith("nblock") and option.endswith(" " + name)}
    if name in known:
        inside.add(name)
    return inside or (set() if name in allowed[language] else None)


def canonical(name):
    """What a name may be called in the first column: without what its language adds to it."""
    last = re.split(r"::|[.# ](?=[^.# ]+$)", name)[-1]
    shapes = {last}
    shapes |= {last[len(prefix) :] for prefix in PREFIXES if last.startswith(prefix)}
    shapes |= {shape[: -len(suffix)] for shape in shapes for suffix in SUFFIXES if shape.endswith(suffix)}
    return {re.sub(r"(?<=[a-z])(?=[A-Z])|-", "_", shape).lower() for shape in shapes}


def tables(text):
    """The tables of the page: the line of each, its rows of cells, and the exceptions under it."""
    found, lines = [], text.split("\n")
    for number, line in enumerate(lines, 1):
        if line.startswith("|"):
            if number == 1 or not lines[number - 2].startswith("|"):
                found.append((number, [], []))
            found[-1][1].append((number, [cell.strip() for cell in line.strip().strip("|").split("|")]))
        elif line.startswith("## "):
            # An exception belongs to a table of its own section.
            found.append((number, [], []))
        elif line.startswith("- `") and found:
            found[-1][2].append([number, line])
        elif line.startswith("  ") and found and found[-1][2]:
            found[-1][2][-1][1] += " " + line.strip()
    return [table for table in found if table[1] or table[2]]


wrong = []


def report(where, name, what):
    wrong.append(f"{where}: {name}: {what}")


def exceptions_of(lines):
    """By row and language: the line, and the names that its reason mentions."""
    found = {}
    for number, line in lines:
        match = re.fullmatch(r"- ((?:`\w+`(?:, )?)+) \(([^()]+)\): (.+)", line)
        if not match:
            report(f"{PAGE}:{number}", line[:40], "write an exception as: - `row`, `row` (language, language): reason")
            continue
        for row in re.findall(r"`(\w+)`", match[1]):
            for language in match[2].split(", "):
                found[row, language] = (number, re.findall(r"`([^`]+)`", match[3]))
    return found


def names_of(where, row, cell):
    names = re.findall(r"`([^`]+)`", cell)
    if cell != "–" and cell != ", ".join(f"`{name}`" for name in names) or not cell:
        report(where, row, f"a cell is names in backticks with commas between them, or – (got {cell!r})")
    return names


def check_pattern():
    """Whether C's functions are named by one pattern: seven short verbs, otherwise nbl_<noun>_<verb>."""
    verbs = {f"nbl_{verb}" for verb in ("lock", "try_lock", "unlock", "refresh", "list", "find", "break")}
    for name in read(SYMBOLS).split():
        whole = name.removesuffix("_start")
        if whole != name and whole not in required["C"]:
            report(SYMBOLS, name, f"starts {whole}, which does not exist: name it after what it starts")
        if whole not in verbs | {"nbl_version"} and not re.match(
            r"nbl_(abi|client|lock|reentrant_lock|op|list|status|log)_[a-z]", whole
        ):
            report(SYMBOLS, name, "is not nbl_<noun>_<verb>: rename it, or add the noun here")


def check(listed):
    """Compares the rows of the page with the sources; returns how many rows there are."""
    rows, seen = 0, {language: set() for language in LANGUAGES}

    def take(where, language, name, scopes):
        stands_for = resolved(language, name, scopes)
        if stands_for is None:
            inside = f" in {', '.join(scopes)}" if scopes else ""
            report(where, name, f"{language} has no such name{inside}: correct it, or take it out of the row")
        else:
            seen[language].update(stands_for)
        return stands_for is not None

    for line, cells, exception_lines in listed:
        exceptions, needed = exceptions_of(exception_lines), set()
        heads = cells[0][1] if cells else []
        if heads == ["name", "language", "why"]:
            for number, (names, language, _) in cells[2:]:
                rows += 1
                if language not in LANGUAGES:
                    report(f"{PAGE}:{number}", language, f"a language is one of {', '.join(LANGUAGES)}")
                    continue
                for name in names_of(f"{PAGE}:{number}", language, names):
                    take(f"{PAGE}:{number}", language, name, [])
        elif cells and [head.split(" ")[0] for head in heads[1:]] != LANGUAGES:
            report(f"{PAGE}:{line}", "heading", f"a table has the columns {', '.join(LANGUAGES)} (got {heads[1:]})")
        elif cells:
            scopes = [re.findall(r"`([^`]+)`", head) for head in heads]
            for number, row in cells[2:]:
                where = f"{PAGE}:{number}"
                if len(row) != len(heads) or not re.fullmatch(r"`\w+`", row[0]):
                    report(where, row[0], f"a row is its canonical name and {len(LANGUAGES)} cells")
                    continue
                rows += 1
                own = row[0].strip("`")
                for language, cell, inside in zip(LANGUAGES, row[1:], scopes[1:]):
                    names = names_of(where, own, cell)
                    mentioned = exceptions.get((own, language), (0, []))[1]
                    reason = f"add the reason under the table, as - `{own}` ({language}):"
                    if not names:
                        needed.add((own, language))
                        if (own, language) not in exceptions:
                            report(where, own, f"{language} has no name for it: {reason} ...")
                    for name in names:
                        # An exit status is a number, and has no name to compare.
                        if take(where, language, name, inside) and own not in canonical(name) and not name.isdigit():
                            needed.add((own, language))
                            if name not in mentioned:
                                what = f"{language} names `{own}` otherwise: rename it, or {reason} `{name}` ..."
                                report(where, name, what)
        for (row, language), (number, _) in exceptions.items():
            if (row, language) not in needed:
                report(f"{PAGE}:{number}", row, f"the table above needs no exception for {language}: take it out")
    for language in LANGUAGES:
        for name, where in required[language].items():
            if name not in seen[language]:
                what = f"is in no row of {PAGE} for {language}: add it to a row, or to the names of one language"
                report(where, name, what)
    return rows


def main():
    read_c()
    read_cpp()
    read_python()
    read_ruby()
    read_shell()
    check_pattern()
    rows = check(tables(read(PAGE)))
    for line in wrong:
        print(line)
    if wrong:
        return 1
    counts = ", ".join(f"{language} {len(required[language])}" for language in LANGUAGES)
    print(f"{rows} rows, each with names that exist; public names that are in a row: {counts}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
