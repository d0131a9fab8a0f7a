#!/usr/bin/env python3
"""Checks what the pages of this repository cite: links, their anchors, files, functions and tests, and messages; and
that the page of messages lists what the sources in LISTED say.

Usage: tools/citations.py [PAGE...]; without pages, those in PAGES. Prints what does not exist, and fails if anything.
"""

import glob
import os
import re
import subprocess
import sys

PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "tests/README.md", *sorted(glob.glob("docs/**/*.md", recursive=True))]
# Names in backticks are looked for in these pages, and links in all of them.
NAMED = ["docs/protocol.md", "docs/architecture.md", "docs/correctness.md"]
# Every message of the library and the command is in a table of MESSAGES.
MESSAGES = "docs/troubleshooting.md"
# Sources without messages of their own: help, what tables show, queries; what is said of the store URL ("store URL has
# ...") and of C arguments; and tests.
NO_MESSAGE = (
    r"cli/src/(arguments|manual|table|watch|duration|ping|display)\.rs"
    r"|src/stores/.*/(url|options|term|queries|ddl|statements|table|resp|commands)\.rs"
    r"|src/(ffi|protocol)/.*|src/url\.rs|src/.*/tests?(/.*)?(\.rs)?"
)
SOURCES = sorted(glob.glob("src/**/*.rs", recursive=True) + glob.glob("cli/src/**/*.rs", recursive=True))
LISTED = [path for path in SOURCES if not re.fullmatch(NO_MESSAGE, path)]
# Literals that are no messages: of calls that look for a text, log for debugging, or report a defect.
NO_CALL = r"(expect|debug!|info!|trace!|reason =|sign|contains|starts_with|ends_with|SERVERS: &str =)\(?\s*$|assert!\(.*, $"
# How others begin: what `nblock ping` shows, what stands for a key, what a request is about, queries, commands of Redis.
OTHER_LITERALS = (
    *("given by the caller", "the default: ", "{why}; {ignored} ignored", "a table in shared memory, ", "memory"),
    *("(key with the hash ", "the list of locks", "the counter of fences", "nobody uses it any more"),
    *("SELECT ", "r.db(", "+hello ", "with args beginning with", "nblock runs on 64-bit Linux"),
)
# Files of the machine (/etc/...), commits, rules, and names of other libraries.
OTHERS = r"/.*|[0-9a-f]{7,40}|R\d+(\.\d+)?|[A-Za-z]+\.(timeout|wait_for|inf|epoll|close)"


def tracked():
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], check=True, capture_output=True, text=True)
    return [path for path in listed.stdout.split("\n") if os.path.isfile(path)]


def anchors(path):
    """The anchors of a page's headings, as GitHub makes them."""
    with open(path, encoding="utf-8") as page:
        text = re.sub(r"^```.*?^```", "", page.read(), flags=re.M | re.S)
    found = set()
    for heading in re.findall(r"^#+ +(.*)$", text, flags=re.M):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return found


def wrong_links(page, text):
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        path = os.path.normpath(os.path.join(os.path.dirname(page), path)) if path else page
        if not os.path.exists(path):
            yield f"no file {target}"
        elif anchor and path.endswith(".md") and anchor not in anchors(path):
            yield f"no heading {target}"


def wrong_messages(text, sources):
    """Parts of the messages in tables with a column "message" that no source contains. `...` stands for any text."""
    for parts in message_cells(text):
        for part in parts:
            if part not in sources:
                yield f"no source says {part!r}"


def message_cells(text):
    """The messages in tables with a column "message", each as its parts between `...`."""
    for table in re.findall(r"^\| message \|.*\n((?:\|.*\n)+)", text, flags=re.M):
        for cell in re.findall(r"^\| (`.*?) \|", table, flags=re.M):
            for message in re.findall(r"`([^`]+)`", cell):
                yield [part for part in (part.strip(" :;.,()") for part in message.split("...")) if len(part) > 3]


def messages_of(source):
    """The literals of a Rust source that may be messages: of four words or more, outside tests and comments."""
    source = re.sub(r"^#\[cfg\(test\)\]\nmod .*", "", source, flags=re.M | re.S)
    source = re.sub(r"\\\n\s*", "", source)
    for found in re.finditer(r"//[^\n]*|b?r#\".*?\"#|'(?:[^'\\]|\\.)'|\"((?:[^\"\\]|\\.)*)\"", source, flags=re.S):
        literal = found.group(1)
        if literal and not re.search(NO_CALL, source[: found.start()][-40:]):
            literal = literal.replace('\\"', '"')
            words = [word for word in re.sub(r"\{[^}]*\}", "", literal).split() if re.search("[A-Za-z]", word)]
            if len(words) >= 4 and not literal.startswith(OTHER_LITERALS):
                yield literal


def unlisted_messages():
    with open(MESSAGES, encoding="utf-8") as page:
        cells = list(message_cells(page.read()))
    for path in LISTED:
        with open(path, encoding="utf-8") as source:
            for message in messages_of(source.read()):
                if not any(parts and all(part in message for part in parts) for parts in cells):
                    yield f"{path} says {message!r}, and no table of messages lists it"


def is_there(name, paths, words):
    """Whether a file, a directory, or a name in the sources is meant, and exists."""
    if "/" in name or re.search(r"\.\w+$", name):
        where = name.rstrip("/")
        if any(path == where or path.endswith("/" + where) or ("/" + path).find(f"/{where}/") >= 0 for path in paths):
            return True
        return os.path.isdir(where)
    parts = name.split("::")
    if parts[-1].endswith("*"):
        prefix = parts[-1].rstrip("*")
        return all(part in words for part in parts[:-1]) and any(word.startswith(prefix) for word in words)
    return all(part in words for part in parts)


def main():
    paths = tracked()
    words = set()
    sources = ""
    for path in paths:
        if re.search(r"\.(rs|h|hpp|py|pyi|rb|c|cpp|sh|toml)$", path) or path == "Makefile":
            with open(path, encoding="utf-8", errors="replace") as source:
                content = source.read()
                words.update(re.findall(r"[A-Za-z_][A-Za-z0-9_]*", content))
            if path.startswith(("src/", "cli/", "bindings/")):
                # A literal of Rust may go on over lines that end with a backslash.
                sources += re.sub(r"\\\n\s*", "", content).replace('\\"', '"')
        words.update(re.findall(r"[A-Za-z_][A-Za-z0-9_]*", path))
    wrong = 0
    for page in sys.argv[1:] or PAGES:
        with open(page, encoding="utf-8") as opened:
            text = re.sub(r"^```.*?^```", "", opened.read(), flags=re.M | re.S)
        found = [*wrong_links(page, text), *wrong_messages(text, sources)]
        if page in NAMED:
            for name in sorted(set(re.findall(r"`([^`\n]+)`", text))):
                # What is no name, path or test is not looked for.
                if re.fullmatch(r"[A-Za-z_.][A-Za-z_./:0-9\-]*[A-Za-z0-9/*]", name) and not re.fullmatch(OTHERS, name):
                    if "://" not in name and not name.endswith(":") and not is_there(name, paths, words):
                        found.append(f"nothing is called {name}")
        for what in found:
            print(f"{page}: {what}")
            wrong += 1
    if not sys.argv[1:]:
        for what in unlisted_messages():
            print(f"{MESSAGES}: {what}")
            wrong += 1
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
