"""The documentation's site. `scripts/check` builds it, and a warning is an error: sphinx-build -W docs build/site"""

import forge

project = "forge"
release = version = forge.__version__
default_role = "code"  # docstrings write `names` as Markdown does
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser"]
html_theme = "furo"
html_title = f"forge {forge.__version__}"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_class_signature = "separated"
autodoc_default_options = {"members": True}
napoleon_use_ivar = True
add_module_names = False
