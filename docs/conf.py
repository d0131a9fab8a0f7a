"""The documentation site, which `make docs` builds with Sphinx from the Markdown pages of this directory."""

import re

project = "nblock"
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
root_doc = "index"
# A link to a heading that does not exist is a warning, and CI takes warnings as errors.
myst_heading_anchors = 4
highlight_language = "none"
html_theme = "furo"
html_title = "nblock"
html_copy_source = False
html_show_copyright = False
html_static_path = ["static"]
html_css_files = ["site.css"]


def add_contents(app, docname, source):
    """Makes the contents of the site from the lists of index.md, so that each page is named once."""
    if docname == root_doc:
        for heading, pages in re.findall(r"^## (.+)\n\n((?:- .+\n)+)", source[0], flags=re.M):
            names = re.findall(r"^- \[[^]]+\]\(([^)]+)\.md\)", pages, flags=re.M)
            source[0] += "\n".join(["\n```{toctree}", ":hidden:", f":caption: {heading}", "", *names, "```\n"])


def wrap_names(app, pagename, templatename, context, doctree):
    """Lets long names wrap at their parts, so that wide tables are read without scrolling."""
    if "body" in context:
        context["body"] = re.sub(
            r'(?<=<span class="pre">)[^<]{18,}(?=</span>)',
            lambda name: re.sub(r"(?<=\w)(_|::|/|\.(?!rs\b))(?=\w)", r"\1<wbr>", name[0]),
            context["body"],
        )


def setup(app):
    app.connect("source-read", add_contents)
    app.connect("html-page-context", wrap_names)
