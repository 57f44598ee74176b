"""Settings of the API reference. Run: sphinx-build -W -q -b html .docs build/reference."""

from __future__ import annotations

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import ftw_optim

project = "ftw_optim"
version = release = ftw_optim.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"ftw_optim {release}"
html_show_copyright = False

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# A name that leads nowhere is an error.
nitpicky = True
# Names of other packages: their pages are not asked for, so that the reference can be built without a network.
nitpick_ignore_regex = [("py:.*", r"(accelerate|collections|datasets|lightning|pathlib|torch|transformers|trl)\..*")]
nitpick_ignore = [
    ("py:class", "Accelerator"),  # of accelerate, imported for its type alone
    ("py:class", "ftw_optim._layers.registry.Function"),  # type variables: what a decorator takes, it returns
    ("py:class", "ftw_optim._preconditioners.registry.Rule"),
    ("py:class", "ftw_optim._step.target.TargetNow"),  # what a step gets of a target
    ("py:class", "ftw_optim.integrations._lightning.halves.Halves"),  # fields that nobody sets
    ("py:class", "ftw_optim.selection_log._store.Store"),
]


def found_by_its_end(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> nodes.reference | None:
    """The link of a name that a docstring writes short, such as Selection for that of ftw_optim."""
    if node.get("refdomain") != "py" or node["reftarget"].startswith("ftw_optim"):
        return None
    node["refspecific"] = True
    domain = env.get_domain("py")
    return domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], node["reftarget"], node, content)


def setup(app: Sphinx) -> None:
    """Connect the search for short names."""
    app.connect("missing-reference", found_by_its_end)
